"""Random numbers as pure functions of (seed, stream, index).

Nothing random in a run depends on a rank, a worker or on what was drawn before, so samples, augmentations, mixing
and masks are equal at any world size, and resuming needs no generator state.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.random.bit_generator import ISeedSequence

if TYPE_CHECKING:  # the scenes draw with numpy alone, and importing torch takes seconds
    import torch


class Stream(IntEnum):
    """What a draw is for. Two streams never share numbers. Values are part of a run's identity: never reuse one."""

    SOURCE_ORDER = 1
    TARGET_ORDER = 2
    SOURCE_CROP = 3
    TARGET_CROP = 4
    CLASS_MIX = 5
    STRONG_AUGMENT = 6
    MFM_MASK = 7
    FORWARD = 8
    """Dropout, Dropout2d and drop-path inside the forward of one loss term."""
    INITIAL_WEIGHTS = 9
    SCENE = 10
    OBJECT = 11
    RARE_CLASS = 12
    STREAM_ORDER = 13
    MIC_MASK = 14
    MIC_AUGMENT = 15
    DETAIL_BOX = 16
    BOOTSTRAP = 17


class Keyed(Protocol):
    """What all draws of a micro-batch are keyed by."""

    @property
    def seed(self) -> int:
        """Of the run."""

    @property
    def block(self) -> int:
        """Index of the micro-batch: key of what is drawn once for it."""

    @property
    def positions(self) -> range:
        """Position of each sample: key of what is drawn once for a sample."""


class BlockKey(NamedTuple):
    """The keys of one micro-batch, without the micro-batch."""

    seed: int
    block: int
    positions: range


class _Key(ISeedSequence):
    """The key of a Philox generator. Given as ``key=`` numpy would first ask the system for entropy, and drop it."""

    def __init__(self, seed: int, stream: int) -> None:
        self._words = np.array([seed, stream], dtype=np.uint64)

    def generate_state(self, n_words: int, dtype: object = np.uint64) -> np.ndarray:  # noqa: ARG002  Philox asks for 2
        return self._words


def keyed_generator(seed: int, stream: Stream | int, index: int, sub_index: int = 0) -> np.random.Generator:
    """Return a numpy generator whose numbers depend on nothing but the arguments; O(1) for any index.

    Philox takes (seed, stream) as its key and (index, sub_index) as the high words of its counter, so every
    index owns 2^128 draws that no other index can reach.
    """
    counter = np.array([0, 0, sub_index, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(_Key(seed, stream), counter=counter))  # type: ignore[arg-type]


def keyed_seed(seed: int, stream: Stream | int, index: int, sub_index: int = 0) -> int:
    """Return a 63-bit seed for generators that take one integer, such as torch's."""
    return int(keyed_generator(seed, stream, index, sub_index).integers(2**63 - 1))


def torch_generator(seed: int, stream: Stream | int, index: int, sub_index: int = 0) -> torch.Generator:
    """Return a CPU torch generator keyed like ``keyed_generator``. Draw on the CPU and copy: equal on every device."""
    import torch

    return torch.Generator().manual_seed(keyed_seed(seed, stream, index, sub_index))
