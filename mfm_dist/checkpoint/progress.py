"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Progress:
    """How far a run is."""

    step: int = 0
    """Global batches consumed, whether their update was applied or skipped."""
    applied: int = 0
    """Updates applied; also the number of teacher updates."""
    block: int = 0
    """Next block of the data streams: their whole state."""
    skipped: int = 0
    """Steps in a row, up to now, that were not applied."""
    rollbacks: int = 0
    """Times the run went back without having got past ``furthest_failed_step`` since."""
    furthest_failed_step: int = 0
    """Furthest step from which the run went back."""
    rollback_step: int = 0
    """Step that it went back to the last time, while ``rollbacks`` counts."""
    losses: list[float] = field(default_factory=list)
    """Of the last applied steps, where ``recovery.spike_factor`` asks for them. Replaced, never changed in place."""
    grad_norms: list[float] = field(default_factory=list)
    """Likewise."""
    map_norms: list[float] = field(default_factory=list)
    """What ``schedules.within_budget`` is given. Likewise."""
