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


def looks_at_a_run(leak: float, slower: float) -> list[dict[str, float]]:
    """20,000 steps on a processor whose speed goes up and down by 10 %; a step costs up to ``slower`` more each."""
    generator, cpu, reference = np.random.default_rng(0), 0.0, 0.0
    looks = []
    for step in range(100, 20_000, 100):
        speed = 1 + 0.1 * np.sin(step / 1500)
        cpu += 100 * 0.05 * (1 + slower * step) * speed * (1 + generator.normal(0, 0.005))
        reference += 150 * 0.01 * speed * (1 + generator.normal(0, 0.005))
        memory = 500 + 0.9 * leak * step + generator.normal(0, 0.2)
        looks.append({"step": step, "memory_mib": memory, "descriptors": 10, "threads": 6, "cpu_seconds": cpu,
                      "reference_seconds": reference, "repetitions": 1.5 * step})  # fmt: skip
    return looks


@pytest.mark.parametrize(
    ("leak", "slower", "grows"),
    [(0.0, 0.0, []), (0.002, 0.0, []), (0.01, 0.0, ["memory_mib"]), (0.0, 2e-6, ["cpu_percent"])],
)
def test_a_leak_and_a_step_that_costs_more_are_seen(leak: float, slower: float, grows: list[str]) -> None:
    """MiB a step, of which 20 in 10,000 steps are 0.002; and 2 % in 10,000 steps, below what the speed does."""
    looks = looks_at_a_run(leak, slower)
    found = judged(looks)
    assert [problem.partition(":")[0] for problem in found["problems"]] == grows
    assert found["growth_in_10000_steps"]["memory_mib"] == pytest.approx(9000 * leak, abs=0.5)
    assert found["growth_in_10000_steps"]["cpu_percent"] == pytest.approx(1e6 * slower, abs=0.5)
    assert found["blocks"][0]["step"] == FIRST + BLOCK
    looks[-1]["descriptors"] = 11  # while a checkpoint is written
    assert judged(looks)["problems"] == found["problems"]
    for look in looks[-30:]:
        look["descriptors"] = 11
    assert "descriptors: 10 at the beginning, 11 at the end" in judged(looks)["problems"]
