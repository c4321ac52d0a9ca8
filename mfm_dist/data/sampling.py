"""Rare class sampling (DAFormer): a source sample is drawn for a class, and rare classes come up more often.

Every position draws by itself, keyed by (seed, position), so there is nothing to remember: any position costs the
same, and the same samples come up at any world size, with any number of workers and after any resume.
"""

from __future__ import annotations

import numpy as np

from mfm_dist.errors import ConfigError
from mfm_dist.rng import Stream, keyed_generator


def class_probabilities(pixels: np.ndarray, temperature: float) -> np.ndarray:
    """Chance of each class: the softmax of (1 - frequency) / temperature over the classes that occur at all.

    Args:
        pixels: [classes], pixels of each class in the whole data set.
        temperature: T of the paper; infinite makes all classes equally likely.

    Returns:
        float64 [classes]; 0 for a class that does not occur.
    """
    frequency = pixels / pixels.sum()
    exponent = np.where(pixels > 0, (1.0 - frequency) / temperature, -np.inf)
    weights = np.exp(exponent - exponent.max())
    return weights / weights.sum()


class RareClassOrder:
    """An endless stream of draws with replacement: a class, then one of the samples that hold enough of it.

    It stands in for ``SampleOrder``; ``wanted`` says which class a sample was drawn for.
    """

    def __init__(
        self, pixels: np.ndarray, *, class_names: tuple[str, ...], temperature: float, min_pixels: int, seed: int
    ) -> None:
        """
        Args:
            pixels: uint32 [samples, classes], the class statistics.
            temperature: as in ``class_probabilities``.
            min_pixels: a sample stands for a class of which it holds more than this many pixels.

        Raises:
            ConfigError: no sample holds that many pixels of a class that occurs.
        """
        self.count = len(pixels)
        self.seed = seed
        totals = pixels.sum(axis=0, dtype=np.int64)
        enough = pixels > min_pixels
        if missing := [i for i in np.flatnonzero(totals) if not enough[:, i].any()]:
            found = ", ".join(f"{class_names[i]} ({pixels[:, i].max()})" for i in missing)
            least = min(int(pixels[:, i].max()) for i in missing)
            raise ConfigError(
                f"data.rare_class_sampling.min_pixels={min_pixels}: no sample holds that many pixels of {found}; "
                f"in brackets the most that one holds. Lower it below {least} (the published 3000 are meant for "
                "labels of about 2 million pixels)"
            )
        self.probabilities = class_probabilities(totals, temperature)
        self._cumulated = np.cumsum(self.probabilities)
        self._samples = [np.flatnonzero(enough[:, i]) for i in range(len(totals))]

    def __getitem__(self, position: int) -> int:
        return self.probe(position, 0)

    def probe(self, position: int, attempt: int) -> int:
        """The sample number of a position; every further ``attempt``, in place of a damaged sample, is a new draw."""
        train_id, generator = self._draw_class(position, attempt)
        samples = self._samples[train_id]
        return int(samples[generator.integers(len(samples))])

    def wanted(self, position: int, attempt: int) -> int:
        """The train id that ``probe`` drew its sample for."""
        return self._draw_class(position, attempt)[0]

    def _draw_class(self, position: int, attempt: int) -> tuple[int, np.random.Generator]:
        generator = keyed_generator(self.seed, Stream.RARE_CLASS, position, attempt)
        train_id = int(np.searchsorted(self._cumulated, generator.random() * self._cumulated[-1], side="right"))
        return train_id, generator
