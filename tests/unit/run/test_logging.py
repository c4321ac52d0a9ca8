"""What metrics.jsonl is made of: means since the last line, and lines that survive a kill."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch

from mfm_dist.run.cards import CARDS, card_of, peak_flops
from mfm_dist.run.logging import Console, ForwardClock, RunningMean, spread_of_ranks
from mfm_dist.storage import JsonLines, write_atomically


def test_running_mean_starts_anew_after_pop() -> None:
    means = RunningMean()
    for value in (1.0, 2.0, 6.0):
        means.add({"a": torch.tensor(value), "b": torch.tensor(-value)})
    assert means.pop() == {"a": 3.0, "b": -3.0}
    assert means.pop() == {}
    means.add({"a": torch.tensor(5.0)})
    assert means.pop() == {"a": 5.0}


def test_of_several_ranks_the_slowest_is_named() -> None:
    assert spread_of_ranks([0.3]) == {}
    assert spread_of_ranks([0.2, 0.1, 0.5, 0.4]) == {"slowest_rank": 2, "rank_spread": pytest.approx(4 / 3)}


def test_the_time_of_forwards_is_that_of_the_newest_times_their_number() -> None:
    class Sleeper(torch.nn.Module):
        def forward(self, seconds: float) -> None:
            if seconds:
                time.sleep(seconds)

    module = Sleeper()
    timed = ForwardClock(module, torch.device("cpu"))
    assert timed.seconds() == 0.0
    for _ in range(3):
        module(0.01)
    assert 0.03 <= timed.seconds() < 3.0
    timed.clear()
    assert timed.seconds() == 0.0
    module(0.05)
    for _ in range(ForwardClock.KEPT):
        module(0.0)
    assert timed.seconds() < 0.05, "the first one counts no more"


def test_forwards_that_are_captured_in_a_cuda_graph_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA refuses to wait for an event of a graph; here without a GPU, with an event that says so."""
    capturing = False

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.captured = capturing

        def synchronize(self) -> None:
            assert not self.captured, "operation not permitted on an event last recorded in a capturing stream"

        def elapsed_time(self, ended: Event) -> float:
            assert not self.captured
            assert not ended.captured
            return 500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    module = torch.nn.Identity()
    timed = ForwardClock(module, torch.device("cuda"))
    module(1)
    capturing = True
    module(2)
    capturing = False
    assert timed.seconds() == 0.5


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A10G", None),
    ],
)
def test_a_card_is_known_by_its_name(name: str, key: str | None) -> None:
    assert card_of(name) == (None if key is None else CARDS[key])


def test_the_highest_rate_is_that_of_the_precision() -> None:
    card = CARDS["h100"]
    rates = [
        peak_flops(card, "bf16", tf32=False), peak_flops(card, "bf16_weights", tf32=True),
        peak_flops(card, "fp32", tf32=True), peak_flops(card, "fp32", tf32=False),
    ]  # fmt: skip
    assert rates == [card.bf16, card.bf16, card.tf32, card.fp32]


def test_the_console_names_use_and_a_slow_rank_where_there_is_something_to_say(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console(enabled=True, steps=10)
    line = {"step": 5, "loss/total": 1.0, "images_per_second": 8.0}
    console.show({**line, "rank_spread": 0.05, "slowest_rank": 1})
    assert "8.0 images/s  " in capsys.readouterr().out
    console.show({**line, "mfu": 0.123, "rank_spread": 0.5, "slowest_rank": 3})
    assert "8.0 images/s, 12% MFU, rank 3 slowest (spread 50%)" in capsys.readouterr().out


def test_after_going_back_the_console_counts_from_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 100.0, 200.0, 220.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    console = Console(enabled=True, steps=100)
    console.begin(60)
    console.begin(20)  # gone back after 100 seconds
    console.show({"step": 40, "loss/total": 1.0, "images_per_second": 8.0})
    assert "1:00 left" in capsys.readouterr().out, "60 steps at the second each that the last 20 took"


def test_json_lines_forgets_later_steps_and_survives_a_torn_line(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    assert list(file) == []
    for step in (10, 20, 30):
        file.append({"step": step, "loss": math.nan if step == 20 else 0.5})
    with file.path.open("a") as stream:
        stream.write('{"step": 40, "lo')  # killed while writing
    assert [record["step"] for record in file] == [10, 20, 30]
    file.append({"step": 50})
    assert [record["step"] for record in file] == [10, 20, 30, 50], "what follows a torn line is not lost with it"
    file.forget_after(20)
    assert list(file) == [{"step": 10, "loss": 0.5}, {"step": 20, "loss": None}]
    assert all(json.loads(line) for line in file.path.read_text().splitlines())


def test_write_atomically_leaves_nothing_beside(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_atomically(tmp_path / "file", text)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "two")]
