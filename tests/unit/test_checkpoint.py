"""Checkpoints are whole, verified, and never lost to a full disk."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from mfm_dist import checkpoint as checkpoints
from mfm_dist.build import build_train_module
from mfm_dist.checkpoint import Progress, find_latest, load_modules, load_optimizer, save_checkpoint, verify
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.engine import Engine
from mfm_dist.distributed.start import start_engine
from mfm_dist.errors import ConfigError, StorageError
from mfm_dist.optim import build_optimizer
from mfm_dist.train_module import TrainModule


@pytest.fixture
def trained(tiny_config: RunConfig) -> tuple[TrainModule, Engine]:
    """A module after one step on made-up gradients, in this process."""
    engine = start_engine(tiny_config)
    module = build_train_module(tiny_config)
    engine.prepare(module, build_optimizer(module, tiny_config.optim))
    step_on_random_gradients(module, engine)
    return module, engine


def step_on_random_gradients(module: TrainModule, engine: Engine) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    engine._pending = engine.accumulation
    assert engine.step().applied


def test_round_trip_restores_every_tensor(
    trained: tuple[TrainModule, Engine], tiny_config: RunConfig, tmp_path: Path
) -> None:
    module, engine = trained
    progress = Progress(step=7, applied=6, block=14)
    path = save_checkpoint(tmp_path, module, engine, progress, tiny_config)
    assert verify(path) is None
    assert (tmp_path / "latest").read_text().strip() == path.name

    found = find_latest(tmp_path, report=pytest.fail)
    assert found is not None
    assert found.progress == progress
    torch.manual_seed(1)
    other = build_train_module(tiny_config)
    load_modules(found, other, rank=0)
    other_engine = Engine(engine.accelerator, tiny_config)
    other_engine.prepare(other, build_optimizer(other, tiny_config.optim))
    load_optimizer(found, other, other_engine)
    before, after = module.state_dict(), other.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
        if ours.requires_grad:
            for key, value in engine.optimizer_state(ours).items():
                assert torch.equal(value, other_engine.optimizer_state(theirs)[key])
            assert other_engine.optimizer.state[theirs]["step"] == 6


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    trained: tuple[TrainModule, Engine], tiny_config: RunConfig, tmp_path: Path
) -> None:
    module, engine = trained
    for step in (1, 2):
        save_checkpoint(tmp_path, module, engine, Progress(step=step), tiny_config)
    damaged = tmp_path / "step_00000002"
    faults = {
        "flipped bit": lambda: flip_a_bit(damaged / "teacher.safetensors"),
        "truncated": lambda: (damaged / "student.safetensors").write_bytes(b"short"),
        "no manifest": lambda: (damaged / "manifest.json").unlink(),
    }
    for inject in faults.values():
        inject()
        lines: list[str] = []
        found = find_latest(tmp_path, report=lines.append)
        assert found is not None
        assert found.progress.step == 1
        assert len(lines) == 1
        assert "step_00000002 is damaged" in lines[0]


def flip_a_bit(path: Path) -> None:
    payload = bytearray(path.read_bytes())
    payload[-10] ^= 4
    path.write_bytes(payload)


@pytest.mark.parametrize("file", ["student", "optimizer", "buffers"])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_half(
    file: str,
    trained: tuple[TrainModule, Engine],
    tiny_config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, engine = trained
    save_checkpoint(tmp_path, module, engine, Progress(step=1), tiny_config)
    write = checkpoints.save_file

    def disk_full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        write(tensors, path)
        if path.stem == file:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", disk_full)
    with pytest.raises(StorageError, match=r"No space left.*start the same command again"):
        save_checkpoint(tmp_path, module, engine, Progress(step=2), tiny_config)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "run") == ["latest", "step_00000001"]
    found = find_latest(tmp_path, report=pytest.fail)
    assert found is not None
    assert found.progress.step == 1


def test_old_checkpoints_go_when_the_new_one_is_whole(
    trained: tuple[TrainModule, Engine], tiny_config: RunConfig, tmp_path: Path
) -> None:
    module, engine = trained
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, module, engine, Progress(step=step), tiny_config)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000002", "step_00000003"]


def test_a_damaged_later_checkpoint_never_costs_the_new_one(
    trained: tuple[TrainModule, Engine], tiny_config: RunConfig, tmp_path: Path
) -> None:
    module, engine = trained
    tiny_config.checkpoint.keep = 1
    save_checkpoint(tmp_path, module, engine, Progress(step=4), tiny_config)
    flip_a_bit(tmp_path / "step_00000004" / "teacher.safetensors")
    save_checkpoint(tmp_path, module, engine, Progress(step=3), tiny_config)
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_00000003"]
    save_checkpoint(tmp_path, module, engine, Progress(step=3), tiny_config)  # the same step again
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "run") == ["latest", "step_00000003"]


def test_another_network_is_refused(
    trained: tuple[TrainModule, Engine], tiny_config: RunConfig, tmp_path: Path
) -> None:
    module, engine = trained
    save_checkpoint(tmp_path, module, engine, Progress(step=1), tiny_config)
    found = find_latest(tmp_path, report=pytest.fail)
    assert found is not None
    tiny_config.rebuilder.width = 64
    with pytest.raises(ConfigError, match="of another network"):
        load_modules(found, build_train_module(tiny_config), rank=0)


def test_a_manifest_cannot_point_outside_its_folder(
    trained: tuple[TrainModule, Engine], tiny_config: RunConfig, tmp_path: Path
) -> None:
    module, engine = trained
    path = save_checkpoint(tmp_path, module, engine, Progress(step=1), tiny_config)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../latest"] = {"bytes": 1, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert "outside the folder" in (verify(path) or "")


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(trained: tuple[TrainModule, Engine]) -> None:
    module, engine = trained
    before = [p.detach().clone() for p in module.parameters()]
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    first = next(p for p in module.parameters() if p.requires_grad)
    assert first.grad is not None
    first.grad.view(-1)[0] = torch.nan
    engine._pending = engine.accumulation
    result = engine.step()
    assert not result.applied
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert first.grad is None
