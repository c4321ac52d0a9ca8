"""What the soak campaign calls growth: a small one is seen below noise, and noise that lasts is not taken for one."""

from __future__ import annotations

import numpy as np
import pytest

from tests.campaign.soak import BLOCK, FIRST, judged, slope_bound


def test_the_bound_holds_where_noise_lasts() -> None:
    """Of 400 series without growth, each error carrying over by half, about 5 % may have a bound below 0."""
    generator, below = np.random.default_rng(0), 0
    for _ in range(400):
        values = np.zeros(36)
        for at in range(1, 36):
            values[at] = 0.5 * values[at - 1] + generator.normal()
        below += slope_bound(values)[1] < 0
    assert below <= 0.09 * 400


@pytest.mark.parametrize(("leak", "problems"), [(0.0, 0), (0.002, 0), (0.01, 1)])
def test_a_leak_is_seen(leak: float, problems: int) -> None:
    """MiB a step; 20 in 10,000 steps are 0.002."""
    generator = np.random.default_rng(0)
    looks = [
        {"step": step, "memory_mib": 500 + 0.9 * leak * step + generator.normal(0, 0.2), "descriptors": 10,
         "threads": 6, "cpu_seconds": 0.05 * step}
        for step in range(100, 20_000, 100)
    ]  # fmt: skip
    found = judged(looks)
    assert len(found["problems"]) == problems, found["problems"]
    assert found["growth_in_10000_steps"]["memory_mib"] == pytest.approx(9000 * leak, abs=0.5)
    assert found["blocks"][0]["step"] == FIRST + BLOCK
    looks[-1]["descriptors"] = 11
    assert "descriptors: 10 at the beginning, 11 at the end" in judged(looks)["problems"]
