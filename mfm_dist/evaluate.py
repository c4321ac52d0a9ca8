"""Score a trained segmentor.

mfm-evaluate --run RUN [--split SHARD_SET]       the student of a run's newest checkpoint
mfm-evaluate --model EXPORT --data SHARD_SET     an export, of a run or of tools/convert_weights.py

Images are predicted as the run's evaluation does, or as the export's config.json says (`resize`); with --scales and
--flip in several views, whose probabilities are averaged. Figures so made do not compare with those of one view.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mfm_dist.classes import ClassSet
from mfm_dist.config.class_files import load_class_set
from mfm_dist.config.schema import DataSection
from mfm_dist.data.pipeline import EvaluationSet
from mfm_dist.data.reader import ShardReader
from mfm_dist.distributed.arithmetic import set_fp32_math
from mfm_dist.errors import EXIT_DONE, ConfigError, tell_user_errors
from mfm_dist.inference.command_line import model_parser
from mfm_dist.inference.evaluation import OneProcess, evaluate
from mfm_dist.inference.open_run import open_run
from mfm_dist.inference.segmentor import TrainedSegmentor, load_export
from mfm_dist.inference.views import Views

SMALLEST_SCALE, LARGEST_SCALE = 0.1, 8.0
"""Of --scales."""


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parse_arguments(argv)
    scored = what_to_score(arguments)
    model, reader, classes = scored.model, scored.reader, scored.classes
    set_fp32_math(model.card.fp32_math)
    ranks = OneProcess()
    scores, _ = evaluate(
        model.segmentor.to(ranks.device),
        EvaluationSet(reader, rank=0, world_size=1, workers=DataSection().workers),
        ranks,
        step=model.card.step,
        classes=classes,
        class_sets=scored.class_sets,
        fit_into=model.card.resize,
        scale=model.normalise,
        views=Views(scales=tuple(arguments.scales), flip=arguments.flip),
        overlays=len(reader) if arguments.overlays else 0,
        overlay_folder=arguments.overlays,
    )
    print(scores.to_json() if arguments.json else f"{scored.name}, {scores.images} images\n{scores.table()}")
    for line in scores.bad_samples:
        print(f"not counted: {line}", file=sys.stderr)
    return EXIT_DONE


class Scored(NamedTuple):
    """A segmentor, and what it is scored on."""

    name: str
    model: TrainedSegmentor
    reader: ShardReader
    classes: ClassSet
    class_sets: Sequence[str]
    """Groups of the classes to give means over, too."""


def what_to_score(arguments: argparse.Namespace) -> Scored:
    """Open the segmentor and its data.

    Raises:
        UserError: what ``open_run``, ``load_export`` and ``ShardReader`` raise; or the classes do not agree.
    """
    mapped_into = None if arguments.classes is None else load_class_set(arguments.classes)
    class_sets: Sequence[str] = arguments.class_sets or ()
    if arguments.model is not None:
        name, model, data = str(arguments.model), load_export(arguments.model), arguments.data
        trained_on = None
    else:
        run = open_run(arguments.run)
        name, model, settings = str(run.checkpoint.path), run.model, run.config
        data = arguments.data or _data_of_run(arguments, settings.data)
        trained_on = run.checkpoint.classes
        mapped_into = mapped_into or (trained_on if settings.data.classes else None)
        class_sets = settings.eval.class_sets if arguments.class_sets is None else class_sets
    reader = ShardReader(data, classes=mapped_into)
    if reader.classes is None:
        raise ConfigError(f"{data} has no labels to score against")
    if difference := model.card.classes.difference(reader.classes):
        raise ConfigError(
            f"{name} and {data} do not agree, {difference}\n    Score on shards of the first, or name with --classes a "
            "set of these classes into which the shards' are mapped by name"
        )
    classes = trained_on or reader.classes  # the same names; a run's groups and colours are its own
    if unknown := [one for one in class_sets if one not in classes.groups]:
        known = ", ".join(classes.groups) or "none"
        raise ConfigError(f"--class-sets {' '.join(unknown)}: groups of these classes: {known}")
    return Scored(name, model, reader, classes, class_sets)


def _data_of_run(arguments: argparse.Namespace, data: DataSection) -> Path:
    """Return the shard set that was named, or that the run was scored on. Raises ConfigError: there is neither."""
    name = arguments.split or data.validation
    if name is None:
        raise ConfigError(
            f"{arguments.run} was trained without target labels (data.validation=null), so there is nothing to score "
            "it on: give a folder of labelled shards, --data SHARD_SET"
        )
    if not data.root.is_dir():
        raise ConfigError(
            f"the data of {arguments.run}, data.root={data.root}, is neither in the working folder nor in the one that "
            "the run was started in: call this from the folder that has it, or give --data SHARD_SET"
        )
    return data.root / name


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = model_parser("evaluate", __doc__)
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--data", type=Path, metavar="SHARD_SET", help="folder of a labelled shard set; --model needs it")
    data.add_argument("--split", metavar="SHARD_SET", help="name of one in the run's data.root (its data.validation)")
    parser.add_argument(
        "--classes", metavar="NAME|FILE", help="map the shards' classes into this set (as the run does)"
    )
    parser.add_argument("--class-sets", nargs="+", metavar="GROUP", help="also means over these groups (the run's)")
    parser.add_argument(
        "--scales", type=_scale, nargs="+", default=[1.0], metavar="S", help="predict at these shares of the size (1)"
    )
    parser.add_argument("--flip", action="store_true", help="predict each image mirrored, too")
    parser.add_argument(
        "--overlays", type=Path, metavar="FOLDER", help="save image, label and prediction of all images"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    if arguments.model is not None and arguments.data is None:
        parser.error("--model needs --data, the folder of a labelled shard set")
    return arguments


def _scale(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
        raise argparse.ArgumentTypeError(f"expected a scale from {SMALLEST_SCALE} to {LARGEST_SCALE}, got {text!r}")
    return scale


if __name__ == "__main__":
    sys.exit(main())
