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
from typing import NamedTuple

from mfm_dist.classes import CLASS_SETS
from mfm_dist.data.pipeline import EvaluationSet
from mfm_dist.data.reader import ShardReader
from mfm_dist.errors import EXIT_DONE, UserError
from mfm_dist.inference.evaluation import OneProcess, evaluate
from mfm_dist.inference.open_run import open_run
from mfm_dist.inference.segmentor import TrainedSegmentor, load_export


class Task(NamedTuple):
    """What is scored on what."""

    name: str
    model: TrainedSegmentor
    data: Path
    class_sets: Sequence[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = parse_arguments(argv)
    try:
        name, model, data, class_sets = task_of(arguments)
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
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(scores.to_json() if arguments.json else f"{name}, {scores.images} images\n{scores.table()}")
    for line in scores.bad_samples:
        print(f"not counted: {line}", file=sys.stderr)
    return EXIT_DONE


def task_of(arguments: argparse.Namespace) -> Task:
    """The segmentor and the data that were asked for.

    Raises:
        UserError: what ``open_run`` and ``load_export`` raise.
    """
    if arguments.model is not None:
        model = load_export(arguments.model)
        return Task(str(arguments.model), model, arguments.data, arguments.class_sets or ())
    run = open_run(arguments.run)
    data = arguments.data or run.config.data.root / (arguments.split or run.config.data.validation)
    class_sets = run.config.eval.class_sets if arguments.class_sets is None else arguments.class_sets
    return Task(str(run.checkpoint.path), run.trained_segmentor(), data, class_sets)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mfm_dist.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", type=Path, help="run folder; its newest checkpoint is scored")
    model.add_argument("--model", type=Path, metavar="EXPORT", help="folder of an export")
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
