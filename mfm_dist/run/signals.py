"""How a run is asked to stop, at any time, any number of times.

SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (Slurm's warning) or SIGHUP (the terminal is gone; not below nohup, which ignores it).

Light on purpose: the command listens before it imports torch, which takes seconds.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stopped(Exception):  # noqa: N818  not an error
    """Some rank was asked to stop and all have agreed to; raised on every rank at the same place."""


class StopRequested:
    """Before training a signal ends the process at once; from ``training_begins`` on it is noted, and looked at.

    Python runs a handler only between two of its own instructions, and a start waits for other ranks, or reads a
    large file, inside a single one. So a thread listens too, and it is that thread that ends the process.
    """

    def __init__(self, leave: Callable[[str], object]) -> None:
        """
        Args:
            leave: ends the process; called in a thread, with the signal's name, while there is nothing to save.
        """
        self.name: str | None = None
        """The last stop signal, if there was one."""
        self.training = False
        self._leave = leave
        self._lock = threading.Lock()
        receiving, sending = os.pipe()
        os.set_blocking(sending, False)
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)
        signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are its own
        threading.Thread(target=self._listen, args=(receiving,), daemon=True, name="stop signals").start()

    def training_begins(self) -> None:
        """From here on there is something to lose: whoever trains looks at ``name``, saves and ends."""
        with self._lock:
            self.training = True

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def _listen(self, receiving: int) -> None:
        while numbers := os.read(receiving, 64):
            for number in numbers:
                with self._lock:
                    if number in STOP_SIGNALS and not self.training:
                        self._leave(signal.Signals(number).name)
