"""Samples that could not be used: named once, counted, and too many of them end the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mfm_dist.batch import BadSample
from mfm_dist.distributed.engine import Engine
from mfm_dist.errors import DataError
from mfm_dist.run_folder import RunFolder


class BadSamples:
    """What all ranks together know of the bad samples of this start."""

    def __init__(
        self, *, total: int, limit: float, engine: Engine, run: RunFolder, say: Callable[[str], object]
    ) -> None:
        """
        Args:
            total: samples of all data sets of the run.
            limit: share of them that may be bad (``data.bad_sample_limit``).
            say: prints a line on rank 0.
        """
        self.total = total
        self.limit = limit
        self.engine = engine
        self.run = run
        self.say = say
        self.known: set[BadSample] = set()

    def news(self, samples: Iterable[BadSample]) -> bool:
        """Whether this rank has one that is not known yet. Not collective."""
        return bool(set(samples) - self.known)

    def note(self, samples: Iterable[BadSample], step: int) -> None:
        """Name those of all ranks that are new. Collective.

        Raises:
            DataError: on every rank, when they are more than the limit allows; it lists all.
        """
        everyone = {sample for found in self.engine.gather_objects(list(samples)) for sample in found}
        for sample in sorted(everyone - self.known):
            self.run.event("bad_sample", step=step, shard=sample.shard, key=sample.key, reason=sample.reason)
            self.say(f"bad sample: {sample}")
        self.known |= everyone
        if len(self.known) > self.limit * self.total:
            listed = "\n".join(f"  {sample}" for sample in sorted(self.known))
            raise DataError(
                f"{len(self.known)} of {self.total} samples are bad, more than data.bad_sample_limit={self.limit} "
                f"allows. Make their shards again (tools/check_shards.py names all), or raise the limit:\n{listed}"
            )
