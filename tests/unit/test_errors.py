"""What a command prints when it cannot go on."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mfm_dist.errors import ended_from_outside
from tests.helpers.runs import REPOSITORY

TALKATIVE = """
from mfm_dist.errors import tell_user_errors

@tell_user_errors
def main(argv=None):
    for number in range(100_000):
        print(number)
    return 0

raise SystemExit(main())
"""


def test_a_reader_that_has_seen_enough_ends_a_command_in_silence() -> None:
    pipe = ["bash", "-c", 'set -o pipefail; "$@" | head -1', "bash", sys.executable, "-c", TALKATIVE]
    ended = subprocess.run(pipe, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("0\n", "", 141)


class KilledWhileReading(Dataset[int]):
    """As by a system that is short of memory."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0


@contextmanager
def without_descriptors() -> Iterator[None]:
    """Let no more files be opened."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))  # what is open stays open
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_came_from_outside_is_told_from_mistakes_of_ours() -> None:
    """A rank that loses another one: tests/distributed/test_signals.py."""
    with pytest.raises(RuntimeError) as caught:
        next(iter(DataLoader(KilledWhileReading(), num_workers=1)))
    assert "a loader worker is gone" in str(ended_from_outside(caught.value))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert "no more memory" in str(ended_from_outside(caught.value))
    assert "no more memory" in str(ended_from_outside(MemoryError()))
    with without_descriptors(), pytest.raises(OSError, match="Too many open files") as full:
        os.pipe()
    assert "may not open more files" in str(ended_from_outside(full.value))
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2) + torch.zeros(3)
    assert ended_from_outside(caught.value) is None
    assert ended_from_outside(OSError("gloo/transport/")) is None


@pytest.mark.parametrize(("kind", "told"), [("ncclRemoteError", True), ("ncclInvalidUsage", False)])
def test_a_peer_that_nccl_lost_is_told_from_a_wrong_call_of_it(kind: str, told: bool) -> None:
    error = torch.distributed.DistBackendError(f"NCCL error in: ProcessGroupNCCL.cpp:1, NCCL version 2\n{kind}: A call")
    assert (ended_from_outside(error) is not None) == told
