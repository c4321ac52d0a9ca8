"""tools/bench_evaluation.py runs, counts the same in both forms and leaves its figures."""

from __future__ import annotations

import json
from pathlib import Path

from tools.bench_evaluation import main


def test_it_measures_whole_and_parts(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    assert main(["--size", "64x128", "--images", "2", "--rounds", "1", "--workers", "1", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert set(found["images_per_second"]) == {"before", "now"}
    assert all(value > 0 for value in found["milliseconds"].values())
    for part, before in (("confusion", "confusion_over_before"), ("argmax", None)):
        assert {part, f"{part}, before"} <= set(found["milliseconds"])
        assert before is None or found[before] > 0
