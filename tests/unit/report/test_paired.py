"""Student's t and Holm's rule against what they are defined by."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from mfm_dist.report.paired import holm, paired_difference, t_quantile, t_within

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t for a two-sided 95 % interval of a mean, by number of seeds, as printed in tables."""


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 8, 30])
@pytest.mark.parametrize("t", [0.3, 1.0, 2.5])
def test_t_is_the_integral_of_its_density(t: float, degrees: int) -> None:
    x = (np.arange(200_000) + 0.5) * t / 200_000
    density = (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    assert t_within(t, degrees) == pytest.approx(2 * scale * float(density.mean()) * t, abs=1e-9)


@pytest.mark.parametrize(("seeds", "printed"), T_95.items())
def test_quantiles_are_those_of_printed_tables(seeds: int, printed: float) -> None:
    assert t_quantile(0.95, seeds - 1) == pytest.approx(printed, abs=6e-4)


def test_a_difference_has_an_interval_that_ends_at_0_where_p_is_5_percent() -> None:
    values = [0.2, 0.5, 0.1, 0.9]
    found = paired_difference(values)
    assert found.half_width == pytest.approx(3.1824 * statistics.stdev(values) / 2, rel=1e-4)
    edge = paired_difference([value - found.mean + found.half_width for value in values])
    assert edge.p == pytest.approx(0.05, abs=1e-9)
    assert paired_difference([-value for value in values]).p == found.p
    assert (paired_difference([1.0]).half_width, paired_difference([1.0]).p) == (None, None)
    assert paired_difference([1.0, 1.0]).p == 0
    assert paired_difference([0.0, 0.0]).p == 1


def test_holm_rejects_what_the_step_down_rule_rejects() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        p_values = list(generator.uniform(0, 0.08, size=6))
        rejected = set()
        for rank, index in enumerate(np.argsort(p_values)):
            if p_values[index] > 0.05 / (6 - rank):
                break
            rejected.add(int(index))
        assert {i for i, p in enumerate(holm(p_values)) if p <= 0.05} == rejected
