"""Who is named after a hang, from the files alone; and when a watchdog ends its process and when it does not."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from mfm_dist.run.watchdog import NAMED, Phase, Report, Watchdog, name_the_hang, read_reports


def report(rank: int, entered: int, phase: Phase = "micro-batch", step: int = 12, start: str = "now") -> Report:
    return Report(
        start=start, rank=rank, entered=entered, phase=phase, step=step, host=f"node{rank}", process=100 + rank
    )


def test_the_rank_behind_is_named() -> None:
    reports = {0: report(0, 50, "agreement"), 1: report(1, 49, "data"), 2: report(2, 50, "agreement")}
    reason = name_the_hang(reports, {}, 3)
    assert "rank 1 (node1, process 101, in 'data' of step 12) kept the others waiting" in reason
    assert "'agreement' of step 12" in reason
    assert "rank 0" not in reason


def test_a_rank_a_whole_step_behind_is_further_behind_than_one_in_an_earlier_phase() -> None:
    reports = {0: report(0, 50, "update"), 1: report(1, 48, "data"), 2: report(2, 45, "update", step=11)}
    reason = name_the_hang(reports, {}, 3)
    assert "rank 2 (node2, process 102, in 'update' of step 11)" in reason
    assert "rank 1" not in reason


def test_a_rank_that_cannot_report_is_named_with_its_last_sign() -> None:
    reason = name_the_hang({0: report(0, 50), 2: report(2, 50)}, {1: report(1, 30, "data", step=9)}, 4)
    assert "rank 1 (node1, process 101, last seen in 'data' of step 9), rank 3 (never seen) gave no sign" in reason


def test_nobody_is_blamed_when_all_are_in_the_same_place() -> None:
    assert "all 2 ranks are in 'update' of step 12" in name_the_hang(
        {rank: report(rank, 50, "update") for rank in range(2)}, {}, 2
    )


def test_a_long_list_is_cut() -> None:
    reason = name_the_hang({0: report(0, 5)}, {}, 1000)
    assert reason.count("never seen") == NAMED
    assert f"and {999 - NAMED} more" in reason


def test_reports_of_an_earlier_start_and_stacks_are_passed_over(tmp_path: Path) -> None:
    def line(one: Report) -> str:
        return json.dumps(asdict(one)) + "\n"

    (tmp_path / "rank_00000.txt").write_text(line(report(0, 9, start="before")) + "Thread 0x7f:\n  File x\n")
    both = line(report(1, 9, start="before")) + "Thread 0x7f:\n" + line(report(1, 70)) + "{half a li"
    (tmp_path / "rank_00001.txt").write_text(both)
    assert read_reports(tmp_path, "txt", "now", 3) == {1: report(1, 70)}


PROGRAM = """
import sys, time
from pathlib import Path
from mfm_dist.run.watchdog import Watchdog
run, rank, pauses = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
dog = Watchdog(run, rank=rank, world_size=2, seconds=1.0, start="now", on_hang=lambda reason, step: print(reason, step))
for step, pause in enumerate(pauses):
    with dog.phase(*(pause.split("=")[:-1] or ["data"]), step):
        time.sleep(float(pause.split("=")[-1]))
"""
"""A rank that moves at the given intervals (seconds, or phase=seconds), then ends."""


def ranks(run: Path, *pauses: list[float | str]) -> tuple[list[int], str]:
    """Exit codes and output of two ranks."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(run), str(rank), *map(str, own)], stdout=subprocess.PIPE, text=True
        )
        for rank, own in enumerate(pauses)
    ]
    outputs = [process.communicate(timeout=30)[0] for process in started]
    return [process.returncode for process in started], "".join(outputs)


def test_a_hang_ends_every_rank_and_is_told_once(tmp_path: Path) -> None:
    codes, output = ranks(tmp_path, [0.1, 0.1, 60], [0.1, 60])
    assert codes == [76, 76]
    assert output.count("hung: rank 1 (") == 1
    assert "in 'data' of step 1) kept the others waiting, who are in 'data' of step 2. Nothing moved for 1 s" in output
    assert 'File "<string>", line 9 in <module>' in (tmp_path / "hang" / "rank_00001.txt").read_text()


def test_a_rank_that_waits_for_one_that_moves_does_not_hang(tmp_path: Path) -> None:
    """Rank 0 writes something for three times the limit."""
    codes, _ = ranks(tmp_path, [0.3] * 12, [3.2])
    assert codes == [0, 0]
    assert not (tmp_path / "hang").exists()


def test_a_phase_that_cannot_say_that_it_moves_has_more_time(tmp_path: Path) -> None:
    """Twice the limit of the others; what takes that long in ``data`` hangs."""
    assert ranks(tmp_path / "save", ["save=2.2"], ["save=2.2"])[0] == [0, 0]
    assert ranks(tmp_path / "data", ["data=2.2"], ["data=2.2"])[0] == [76, 76]


def test_a_folder_that_is_gone_does_not_keep_a_slow_phase_from_ending(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended: list[float] = []
    clock = iter([0.1 * tick for tick in range(1, 100)])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock, None) or dog.close() or 10.0)
    monkeypatch.setattr(Watchdog, "_end", lambda _: ended.append(0) or dog.close())
    dog = Watchdog(tmp_path, rank=0, world_size=2, seconds=0, start="now", on_hang=print)
    dog.seconds, dog._tick, dog._moves = 1.0, 0.05, 0
    dog._place = ("save", 0)
    dog._heartbeats = tmp_path / "gone"
    dog._watch()
    assert ended == [0]


def test_a_job_that_was_suspended_as_a_whole_does_not_hang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Between two looks the clock jumps by an hour: that counts as two looks at most."""
    ended: list[float] = []
    clock = iter([0.0, 0.1, 3600.1, 3600.2])
    monkeypatch.setattr(Watchdog, "_end", lambda _: ended.append(0))
    dog = Watchdog(tmp_path, rank=0, world_size=1, seconds=0, start="now", on_hang=print)
    dog.seconds, dog._tick = 1.0, 0.05
    monkeypatch.setattr(time, "monotonic", lambda: next(clock, None) or dog.close() or 3600.3)
    dog._watch()
    assert ended == []


def test_off_means_no_files(tmp_path: Path) -> None:
    with Watchdog(tmp_path, rank=0, world_size=1, seconds=0, start="now", on_hang=print).phase("data", 0):
        pass
    assert list(tmp_path.iterdir()) == []
