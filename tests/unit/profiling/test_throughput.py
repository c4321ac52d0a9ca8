"""What mfm-profile step runs and reports; how long anything takes is never asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mfm_dist.build import open_readers
from mfm_dist.config.schema import RunConfig
from mfm_dist.profiling.step import PARTS, Blocks, PartClock, build_setting, peak_gib
from mfm_dist.profiling.throughput import main
from tests.helpers.runs import DEFAULTS, tiny_overrides

CPU = torch.device("cpu")


def test_the_command_reports_both_settings(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "throughput.json"
    arguments = ["step", *DEFAULTS, "--steps", "2", "--warmup", "1", "--json", str(path)]
    assert main([*arguments, *tiny_overrides(scenes, tmp_path / "run")]) == 0
    assert "images/s, source and target" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["images_per_step"] == 8
    for name in ("without", "with"):
        rounds = found["rounds"][name]
        assert len(rounds) == 2
        for one in rounds:
            assert set(one["engine"]) == {"step", *PARTS}
            assert sum(one["engine"][part] for part in PARTS) <= one["engine"]["step"]
            assert set(one["bare"]) == {"step", "data wait"}
        assert found[name]["images_per_second"] == pytest.approx(8 / found[name]["step_seconds"]["median"])
    assert found["with"]["memory_gib"] > found["without"]["memory_gib"] > 0
    assert not (tmp_path / "run").exists()


def test_a_plain_call_is_the_step_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*DEFAULTS, "data.root=/nowhere"]) == main(["step", *DEFAULTS, "data.root=/nowhere"]) != 0
    assert "/nowhere" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*DEFAULTS, "--steps", "0"])


def test_it_runs_one_process_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*DEFAULTS]) == 2
    assert "not with accelerate launch" in capsys.readouterr().err


@pytest.mark.parametrize(("clip_norm", "difference"), [(0.0, 1e-9), (0.1, 1e-6)])
def test_the_bare_twin_does_the_same_to_every_number(
    clip_norm: float, difference: float, tiny_config: RunConfig
) -> None:
    """Torch adds up a norm in another order than the engine, which knows it by part, and rounds the teacher's first
    average, of a half, the other way: hence the last bits."""
    tiny_config.train.clip_norm = clip_norm
    readers = open_readers(tiny_config)
    ours, twin = build_setting(tiny_config, readers), build_setting(tiny_config, readers)
    before = {name: value.clone() for name, value in ours.module.state_dict().items()}
    blocks = Blocks(tiny_config, readers)
    for number in range(2):
        batches = blocks.take(number)
        ours.engine_step(batches)
        twin.bare_step(batches)
    after, other = ours.module.state_dict(), twin.module.state_dict()
    for name, value in after.items():
        torch.testing.assert_close(value, other[name], rtol=0.0, atol=difference)
    for part in ("student.backbone", "student.decoder", "teacher", "rebuilder"):
        assert any(name.startswith(part) and not torch.equal(after[name], before[name]) for name in after), part


def test_all_ways_of_a_round_have_the_same_draws_and_new_pictures(tiny_config: RunConfig) -> None:
    blocks = Blocks(tiny_config, open_readers(tiny_config))
    first, second = blocks.take(3), blocks.take(3)
    assert [batch.block for batch in first] == [batch.block for batch in second] == [6, 7]
    assert not torch.equal(first[0].target_image, second[0].target_image)


def test_the_clock_adds_up_by_part_and_only_once_started() -> None:
    clock = PartClock(CPU)
    clock.mark("before the start")
    assert clock.pop() == {}
    clock.start()
    for part in ("forward", "backward", "forward"):
        clock.mark(part)
    marks = [moment for _, moment in clock.marks]
    seconds = clock.pop()
    assert list(seconds) == ["forward", "backward"]
    assert sum(seconds.values()) == pytest.approx(marks[-1] - marks[0])
    assert clock.pop() == {}


def test_peak_memory_is_what_lives_at_once() -> None:
    kept: list[torch.Tensor] = []

    def work() -> None:
        passing = torch.zeros(2**20)  # 4 MiB, gone before the 2 MiB come
        del passing
        kept.append(torch.zeros(2**18))  # 1 MiB
        kept.append(torch.zeros(2**19))

    assert peak_gib(work, CPU) * 1024 == pytest.approx(4.0)
    assert peak_gib(lambda: kept.append(torch.zeros(2**18)), CPU) * 1024 == pytest.approx(1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_command_on_a_gpu(scenes: Path, tmp_path: Path) -> None:
    path = tmp_path / "throughput.json"
    arguments = [*DEFAULTS, "--steps", "2", "--warmup", "1", "--json", str(path)]
    assert main([*arguments, *tiny_overrides(scenes, tmp_path / "run"), "train.precision=bf16"]) == 0
    found = json.loads(path.read_text())
    assert found["device"] == torch.cuda.get_device_name()
    assert found["with"]["memory_gib"] > found["without"]["memory_gib"] > 0
    assert all(found["with"]["part_seconds"][part] > 0 for part in PARTS)
