"""Errors meant for the person who started the run, each tied to an exit code of ``mfm_dist.train``; and bad data.

Bad data has three names. ``DataError``: the run stops. ``BadSample``: one sample is passed over, named and counted.
``CorruptFileError``: a file is not what was written; whoever knows which one makes one of the other two of it.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import NamedTuple

EXIT_DONE = 0
EXIT_ERROR = 1  # no mistake of a user that we know of: what Python ends with after a traceback
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_STORAGE = 4
EXIT_BROKEN_PIPE = 141  # as a shell has it of a program that SIGPIPE ended
EXIT_UNSTABLE = 5  # training left the rails again and again; running it again would not help
EXIT_OUT_OF_MEMORY = 6  # the same settings would not fit the next time either
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved after a signal, run me again
EXIT_HUNG = 76  # nothing moved for watchdog.seconds; run me again from the last checkpoint
EXIT_MISMATCH = 77  # ranks disagree about a weight; run me again from the last checkpoint


class UserError(Exception):
    """Something outside the program is wrong; the message says what, where, and what to do about it."""

    exit_code: int = 1


class ConfigError(UserError):
    """A mistake in the configuration, the command line or the launch file.

    Attributes:
        problems: every mistake found, each a full sentence naming the key and the fix.
    """

    exit_code = EXIT_CONFIG

    def __init__(self, problems: list[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __str__(self) -> str:
        problems = [problem if len(problem) <= 1000 else f"{problem[:1000]} ..." for problem in self.problems]
        if len(problems) == 1:
            return f"configuration error: {problems[0]}"
        lines, size = [f"{len(problems)} configuration errors:"], 0
        for number, problem in enumerate(problems, 1):
            size += len(problem)
            if size > 3500:
                lines.append(f"  and {len(problems) - number + 1} more")
                break
            lines.append(f"  {number}. {problem}")
        return "\n".join(lines)


class DataError(UserError):
    """Shards or samples that cannot be used; the message names the file and the sample."""

    exit_code = EXIT_DATA


class BadSample(NamedTuple):
    """A sample that could not be used; the trainer names it once in the run's events and counts it."""

    shard: str
    """Path of the tar, or of the folder it was to be packed into."""
    key: str
    """Name of the sample in it; empty where that is lost."""
    number: int
    """Number of the sample in its folder; -1 where it has none."""
    reason: str
    expected: bool = False
    """Whether its data set is known to hold such samples."""

    def __str__(self) -> str:
        return f"{self.shard}{f', sample {self.key!r}' if self.key else ''}: {self.reason}"


class CorruptFileError(Exception):
    """Why a file, or a part of one, is not what was written or cannot be decoded."""


class StorageError(UserError):
    """A folder that cannot be written (full, read-only, gone; what was written before is intact), or is damaged."""

    exit_code = EXIT_STORAGE


class DiskFullError(StorageError, OSError):
    """A disk that took a part of a file. An ``OSError`` too, as any other failure to write one."""


class UnstableError(UserError):
    """Training diverges at one place again and again; the message says what was seen and what to try."""

    exit_code = EXIT_UNSTABLE


class OutOfMemoryError(UserError):
    """The memory of a GPU does not hold the run; the message says where, and what needs less.

    Raised on one rank alone, the first that ran out; the others get ``EndedByPeerError``.
    """

    exit_code = EXIT_OUT_OF_MEMORY


class EndedByPeerError(Exception):
    """Another rank has ended the run and says why; this one has nothing to add.

    Attributes:
        exit_code: to end with.
    """

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(f"another rank ended the run with code {exit_code}")


class RankMismatchError(UserError):
    """What several places hold is not the same any more; a memory or network fault. The last checkpoint is sound."""

    exit_code = EXIT_MISMATCH


def joined(errors: Sequence[UserError]) -> UserError:
    """Join several errors into one, of the kind of the first; what two of them say is said once."""
    said = [text for error in errors for text in getattr(error, "problems", [str(error)])]
    problems = list(dict.fromkeys(said))
    return ConfigError(problems) if isinstance(errors[0], ConfigError) else type(errors[0])("\n".join(problems))


def tell_user_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Have a command print a ``UserError`` to stderr, without a traceback, and return its exit code.

    A reader of its output that has seen enough, such as ``head``, ends it in silence.
    """

    @wraps(main)
    def told(argv: Sequence[str] | None = None) -> int:
        try:
            code = main(argv)
            sys.stdout.flush()
            return code
        except UserError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
            return EXIT_BROKEN_PIPE

    return told


def ended_from_outside(error: Exception) -> str | None:
    """Say what outside of this process ended it, where an error tells of that: a traceback would not help.

    PyTorch raises ``RuntimeError`` for all of it; which it is, its text tells. NCCL's is as reported by others
    (https://github.com/NVIDIA/nccl/issues/934), and was not seen here.
    """
    said = str(error) if isinstance(error, RuntimeError) else ""
    if "gloo/transport/" in said or "ncclRemoteError" in said:
        return "another process of the job is gone: killed, failed or cut off"
    if said.startswith("DataLoader worker"):
        return "a loader worker is gone, perhaps killed for want of memory, of which a smaller data.workers takes less"
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EMFILE, errno.ENFILE):
        return "this process, or this machine, may not open more files (ulimit -n)"
    out_of_memory = isinstance(error, MemoryError) or number == errno.ENOMEM or "can't allocate memory" in said
    if out_of_memory or said == "can't start new thread":
        return "this machine has no more memory or threads, or this process may not take more"
    return None


def first_line(error: Exception) -> str:
    """Return what an error says, without the lines that follow; its kind if it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
