"""Score a trained segmentor.

python -m mfm_dist.evaluate --run RUN [--split SHARD_SET]       the student of a run's newest checkpoint
python -m mfm_dist.evaluate --model EXPORT --data SHARD_SET     an export, of a run or of tools/convert_weights.py

Images are predicted as the run's evaluation does, or as the export's config.json says (`resize`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mfm_dist.classes import CLASS_SETS
from mfm_dist.data.pipeline import EvaluationSet
from mfm_dist.data.reader import ShardReader
from mfm_dist.errors import EXIT_DONE, tell_user_errors
from mfm_dist.inference.command_line import model_parser
from mfm_dist.inference.evaluation import OneProcess, evaluate
from mfm_dist.inference.open_run import open_run
from mfm_dist.inference.segmentor import TrainedSegmentor, load_export


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parse_arguments(argv)
    name, model, data, class_sets = what_to_score(arguments)
    reader = ShardReader(data)
    ranks = OneProcess()
    scores, _ = evaluate(
        model.segmentor.to(ranks.device),
        EvaluationSet(reader, rank=0, world_size=1),
        ranks,
        step=model.card.step,
        class_sets=class_sets,
        fit_into=model.card.resize,
        scale=model.normalise,
        overlays=len(reader) if arguments.overlays else 0,
        overlay_folder=arguments.overlays,
    )
    print(scores.to_json() if arguments.json else f"{name}, {scores.images} images\n{scores.table()}")
    for line in scores.bad_samples:
        print(f"not counted: {line}", file=sys.stderr)
    return EXIT_DONE


def what_to_score(arguments: argparse.Namespace) -> tuple[str, TrainedSegmentor, Path, Sequence[str]]:
    """Return the name of what is scored, the segmentor, the folder of its data and the class sets to give means over.

    Raises:
        UserError: what ``open_run`` and ``load_export`` raise.
    """
    if arguments.model is not None:
        model = load_export(arguments.model)
        return str(arguments.model), model, arguments.data, arguments.class_sets or ()
    run = open_run(arguments.run)
    data = arguments.data or run.config.data.root / (arguments.split or run.config.data.validation)
    class_sets = run.config.eval.class_sets if arguments.class_sets is None else arguments.class_sets
    return str(run.checkpoint.path), run.model, data, class_sets


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = model_parser("evaluate", __doc__)
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--data", type=Path, metavar="SHARD_SET", help="folder of a labelled shard set; --model needs it")
    data.add_argument("--split", metavar="SHARD_SET", help="name of one in the run's data.root (its data.validation)")
    parser.add_argument(
        "--class-sets", nargs="+", choices=sorted(CLASS_SETS), help="also means over these classes (those of the run)"
    )
    parser.add_argument(
        "--overlays", type=Path, metavar="FOLDER", help="save image, label and prediction of all images"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    if arguments.model is not None and arguments.data is None:
        parser.error("--model needs --data, the folder of a labelled shard set")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
