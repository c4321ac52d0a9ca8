"""The end of a process that was a rank.

Threads of gloo outlive the process group. Now and then one still runs while the interpreter is taken down, which ends
in ``terminate called without an active exception`` and SIGABRT (torch 2.15, one end in thirty on a busy machine):
torchrun then reports a finished run as failed.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """``sys.exit`` for a rank: what is to be done at the end is done, but the interpreter is not taken down."""
    atexit._run_exitfuncs()  # ends child processes too, and lets trackers write
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
