"""The arithmetic of the benchmark, against the textbook."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from mfm_dist.config.loader import load_config
from mfm_dist.config.validate import problems
from tests.helpers.runs import REPOSITORY
from tools.benchmark_scenes import VARIANTS, main, summary, table
from tools.seeds import interval


def test_interval_is_students() -> None:
    """Five values: t(0.975, 4) = 2.776 standard errors."""
    values = [1.0, 2.0, 4.0, 4.0, 5.0]
    assert interval(values) == pytest.approx(2.776 * statistics.stdev(values) / 5**0.5, rel=1e-3)
    assert interval([3.0]) is None


def test_differences_are_paired_by_seed() -> None:
    """A gain of exactly 1 on seeds that differ by 10 has no spread."""
    result = summary({"base": [10.0, 20.0, 30.0], "mfm": [11.0, 21.0, 31.0]})
    assert result["mfm"]["minus"]["base"] == {"mean": 1.0, "interval_95": 0.0}
    assert "+1.00 ± 0.00" in table(result)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_configuration(name: str) -> None:
    config = load_config(REPOSITORY / "configs" / "scenes" / "dacs.yaml", VARIANTS[name])
    assert problems(config) == []
    assert config.mfm.enabled == name.startswith("mfm")


def test_a_run_without_target_labels_is_refused_before_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = REPOSITORY / "configs" / "scenes" / "dacs.yaml"
    said = ["--config", str(config), "--folder", str(tmp_path / "runs"), "data.validation=null"]
    assert main(said) == 2
    assert "data.validation=null: nothing to compare variants by" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
