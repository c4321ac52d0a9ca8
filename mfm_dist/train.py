"""Train: accelerate launch [--config_file LAUNCH.yaml] -m mfm_dist.train [--config RUN.yaml] [section.key=value ...]

The same command again resumes the run in run.folder. Without arguments it runs the quickstart. Exit codes: 0 done,
2 configuration, 3 bad data, 4 storage, 5 training that does not get past a step, 75 stopped by a signal after saving,
76 hung, 77 a weight is not the same in all the places that hold it (75 to 77: run the same command again);
outcome.json says the same.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mfm_dist.config.loader import describe, load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.launch import Launch
from mfm_dist.errors import EXIT_DONE, EXIT_STOPPED, StorageError, UserError
from mfm_dist.run.folder import write_outcome
from mfm_dist.run.signals import StopRequested, end_process, end_with_launcher

QUICKSTART = Path("configs/quickstart.yaml")
RANK_0_SPEAKS_WITHIN = 20.0
"""Seconds."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = parse_arguments(argv)
    launch = Launch.from_environment()
    folder: Path | None = None
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.check:
            from mfm_dist.session import check

            check(config)
            return EXIT_DONE
        folder = config.run.folder
        end_with_launcher(launch)
        return listen_and_train(config, launch.rank)
    except UserError as error:
        return tell(error, launch.rank, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        advice = "Checkpoints are intact; free some space and start the same command again"
        return tell(StorageError(f"{error}. {advice}"), launch.rank, folder)


def listen_and_train(config: RunConfig, rank: int) -> int:
    """Train; a signal ends it with ``EXIT_STOPPED``, also while torch is still being imported."""

    def leave(name: str) -> None:
        reason = f"stopped by {name} before training began"
        if rank == 0:
            os.write(sys.stderr.fileno(), f"{reason}; the same command starts again\n".encode())
        with suppress(OSError):
            config.run.folder.mkdir(parents=True, exist_ok=True)
        write_outcome(config.run.folder, code=EXIT_STOPPED, reason=reason, step=-1)
        os._exit(EXIT_STOPPED)

    stop = StopRequested(leave)
    try:
        from mfm_dist.run.folder import RunFolder
        from mfm_dist.session import train

        return train(config, RunFolder(config.run.folder, writes=rank == 0), stop)
    except Exception:
        if stop.name is not None and not stop.training:
            leave(stop.name)  # what fails because its peers or its workers were stopped is no error
        raise


def tell(error: UserError, rank: int, folder: Path | None) -> int:
    """The message, once, for it is the same on every rank; in the run folder too, if there is one."""
    if rank != 0:
        # The launcher ends every rank as soon as one has ended, and rank 0 may not have spoken yet. Who is still there
        # after the wait met with something that rank 0 did not.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(RANK_0_SPEAKS_WITHIN)
    print(error, file=sys.stderr, flush=True)
    if folder is not None and folder.is_dir():
        write_outcome(folder, code=error.exit_code, reason=str(error), step=error.step)
    return error.exit_code


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``--help`` lists every key of the configuration."""
    keys = "\n".join(f"  {line}" for line in describe())
    parser = argparse.ArgumentParser(
        prog="python -m mfm_dist.train",
        description=__doc__,
        epilog=f"keys, defaults and meaning:\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    files = f"the run; given again, later files win key by key (default: {QUICKSTART})"
    parser.add_argument("--config", type=Path, action="append", metavar="FILE", help=files)
    parser.add_argument("--check", action="store_true", help="find mistakes without training, then end")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single settings")
    arguments = parser.parse_intermixed_args(argv)
    arguments.config = arguments.config or [QUICKSTART]
    return arguments


if __name__ == "__main__":
    end_process(main())
