"""Score a trained segmenter: python -m mfm_dist.evaluate --run RUN [--split SHARD_SET] [--overlays FOLDER] [--json]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mfm_dist.build import build_student
from mfm_dist.checkpoint import find_latest, load_student
from mfm_dist.config.loader import load_config
from mfm_dist.data.pipeline import EvaluationSet
from mfm_dist.data.reader import ShardReader
from mfm_dist.errors import EXIT_DONE, ConfigError, UserError
from mfm_dist.evaluation import OneProcess, evaluate


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = parse_arguments(argv)
    try:
        run: Path = arguments.run
        if not (run / "config.yaml").is_file():
            raise ConfigError(f"--run {run}: no run folder (it has no config.yaml)")
        config = load_config(run / "config.yaml")
        checkpoint = find_latest(run / "checkpoints", report=lambda line: print(line, file=sys.stderr))
        if checkpoint is None:
            raise ConfigError(f"{run / 'checkpoints'} holds no complete checkpoint yet")
        reader = ShardReader(config.data.root / (arguments.split or config.data.validation))
        config.model.pretrained, config.model.weights = False, None  # the checkpoint brings all weights
        student = build_student(config)
        load_student(checkpoint, student)
        ranks = OneProcess()
        scores, _ = evaluate(
            student.to(ranks.device),
            EvaluationSet(reader, rank=0, world_size=1),
            ranks,
            step=checkpoint.progress.step,
            overlays=len(reader) if arguments.overlays else 0,
            overlay_folder=arguments.overlays,
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(scores.to_json() if arguments.json else f"{checkpoint.path}, {scores.images} images\n{scores.table()}")
    for line in scores.bad_samples:
        print(f"not counted: {line}", file=sys.stderr)
    return EXIT_DONE


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mfm_dist.evaluate", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder; its newest checkpoint is scored")
    parser.add_argument("--split", metavar="SHARD_SET", help="labelled shard set (default: the run's data.validation)")
    parser.add_argument(
        "--overlays", type=Path, metavar="FOLDER", help="save image, label and prediction of all images"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
