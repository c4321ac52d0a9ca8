"""Samples that could not be used: named once and counted; too many end the run. ``data.blocks`` replaces each."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mfm_dist.distributed.engine import Engine
from mfm_dist.errors import BadSample, DataError
from mfm_dist.run.folder import RunFolder

Name = tuple[str, str]
"""Shard and key of a sample, or shard and reason where the key is not known."""
TOO_MANY = "too_many_bad_samples"
"""Event of the stop. The data is mended or the limit raised before the next start, so the count begins anew there."""


class BadSamples:
    """What all ranks together know of the bad samples of a run, earlier starts included."""

    def __init__(
        self, *, total: int, limit: float, engine: Engine, run: RunFolder, say: Callable[[str], object]
    ) -> None:
        """
        Args:
            total: samples of all data sets of the run.
            limit: share of them that may be bad (``data.bad_sample_limit``).
            say: prints a line on rank 0.

        Collective: rank 0 tells all what the run's events name already.
        """
        self.total = total
        self.limit = limit
        self.engine = engine
        self.run = run
        self.say = say
        named = _named_before(run) if engine.is_main else {}
        self.known: dict[Name, BadSample] = engine.gather_objects(named)[0]

    def has_unseen(self, samples: Iterable[BadSample]) -> bool:
        """Tell whether this rank has one that is not known yet. Not collective."""
        return any(_name(sample) not in self.known for sample in samples)

    def record(self, samples: Iterable[BadSample], step: int) -> None:
        """Name those of all ranks that are new. Collective.

        Raises:
            DataError: on every rank, when they are more than the limit allows; it lists all.
        """
        everyone = {sample for found in self.engine.gather_objects(list(samples)) for sample in found}
        for sample in sorted(everyone):
            if _name(sample) in self.known:
                continue
            self.known[_name(sample)] = sample
            self.run.event("bad_sample", step=step, shard=sample.shard, key=sample.key, reason=sample.reason)
            self.say(f"bad sample: {sample}")
        if len(self.known) > self.limit * self.total:
            self.run.event(TOO_MANY, step=step, samples=len(self.known))
            listed = "\n".join(f"  {sample}" for sample in sorted(self.known.values()))
            raise DataError(
                f"{len(self.known)} of {self.total} samples are bad, more than data.bad_sample_limit={self.limit} "
                f"allows. Make their shards again (mfm-shards check names all), or raise the limit:\n{listed}"
            )


def _name(sample: BadSample) -> Name:
    """Return one name for all that is said of one sample, and for each thing lost in a shard whose key is not known."""
    return sample.shard, sample.key or sample.reason


def _named_before(run: RunFolder) -> dict[Name, BadSample]:
    """Collect the samples that the run's events name since it was last stopped for them."""
    named: dict[Name, BadSample] = {}
    for event in run.events():
        if event.get("event") == TOO_MANY:
            named.clear()
        shard, key, reason = (str(event.get(field, "")) for field in ("shard", "key", "reason"))
        if event.get("event") == "bad_sample":
            sample = BadSample(shard=shard, key=key, number=-1, reason=reason)
            named[_name(sample)] = sample
    return named
