"""Score a trained segmenter: python -m mfm_dist.evaluate --run RUN [--split SHARD_SET] [--overlays FOLDER] [--json]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mfm_dist.data.pipeline import EvaluationSet
from mfm_dist.data.reader import ShardReader
from mfm_dist.errors import EXIT_DONE, UserError
from mfm_dist.evaluation import OneProcess, evaluate
from mfm_dist.trained_run import open_run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = parse_arguments(argv)
    try:
        run = open_run(arguments.run)
        reader = ShardReader(run.config.data.root / (arguments.split or run.config.data.validation))
        ranks = OneProcess()
        scores, _ = evaluate(
            run.segmentor.to(ranks.device),
            EvaluationSet(reader, rank=0, world_size=1),
            ranks,
            step=run.checkpoint.progress.step,
            class_sets=run.config.eval.class_sets,
            overlays=len(reader) if arguments.overlays else 0,
            overlay_folder=arguments.overlays,
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(scores.to_json() if arguments.json else f"{run.checkpoint.path}, {scores.images} images\n{scores.table()}")
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
