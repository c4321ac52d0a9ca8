"""Checkpoints are whole, verified, and never lost to a full disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mfm_dist.build import build_train_module
from mfm_dist.checkpoint.contents import collect, load_modules, load_state
from mfm_dist.checkpoint.files import find_latest, read_checkpoint, sound_first, write_checkpoint, write_rank
from mfm_dist.checkpoint.host_memory import HostMemory
from mfm_dist.checkpoint.progress import Progress
from mfm_dist.checkpoint.writer import CheckpointWriter, Saved
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.engine import Engine
from mfm_dist.distributed.start import start_engine
from mfm_dist.errors import ConfigError, StorageError
from mfm_dist.optim import build_optimizer
from mfm_dist.train_module import TrainModule
from tests.helpers.classes import CLASSES
from tests.helpers.modules import block
from tests.helpers.mutations import vouch
from tests.helpers.runs import checkpoint_tensors, rewrite_tensors


@pytest.fixture
def trained(tiny_config: RunConfig) -> tuple[TrainModule, Engine]:
    """A module after one step on made-up gradients, in this process."""
    engine = start_engine(tiny_config)
    module = build_train_module(tiny_config, CLASSES)
    engine.prepare(module, build_optimizer(module, tiny_config.optim))
    step_on_random_gradients(module, engine)
    return module, engine


def run_micro_batches(engine: Engine) -> None:
    """Everything of a step but its end; the gradients may then be replaced."""
    for number in range(engine.accumulation):
        engine.forward_backward(block(number, size=32), 0.5)


def step_on_random_gradients(module: TrainModule, engine: Engine) -> None:
    run_micro_batches(engine)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    assert engine.step().applied


def save_checkpoint(folder: Path, module: TrainModule, engine: Engine, progress: Progress, config: RunConfig) -> Path:
    """One checkpoint, on disk when this returns."""
    saved: list[Saved] = []
    writes = CheckpointWriter(folder, engine, config, data_fingerprints={}, written=saved.append)
    writes.save(module, progress)
    writes.wait()
    writes.close()
    return saved[0].path


def write_small(folder: Path, step: int, *, skipped: int = 0, keep: int = 1) -> None:
    """A checkpoint of one number, in the wake of that many steps that were not applied."""
    write_checkpoint(
        folder / f"step_{step:08d}",
        {"student": {"weight": torch.tensor(float(step))}},
        progress=Progress(step=step, applied=step - skipped, block=step, skipped=skipped),
        config={},
        data={},
        classes=CLASSES,
        keep=keep,
    )


def test_a_save_amid_trouble_costs_no_sound_checkpoint(tmp_path: Path) -> None:
    """A run stopped by signals while its steps are not applied can still go back to before."""
    write_small(tmp_path, 4)
    write_small(tmp_path, 7, skipped=2)
    write_small(tmp_path, 8, skipped=3)
    latest = find_latest(tmp_path, pytest.fail)
    assert latest is not None
    assert latest.progress.step == 8, "where a start goes on"
    assert next(sound_first(tmp_path, None, pytest.fail)).progress.step == 4
    write_small(tmp_path, 10)
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000010"]


def test_going_back_again_goes_further_back(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        write_small(tmp_path, step, skipped=2 if step == 6 else 0, keep=9)

    def order(before: int | None) -> list[int]:
        return [found.progress.step for found in sound_first(tmp_path, before, pytest.fail)]

    assert [order(before) for before in (None, 8, 4)] == [[8, 4, 2], [4, 2, 8], [2, 4, 8]]
    assert order(2) == [2, 4, 8], "at last there is nothing further"
    assert list(sound_first(tmp_path / "nothing", None, pytest.fail)) == []


def test_round_trip_restores_every_tensor(
    trained: tuple[TrainModule, Engine], tiny_config: RunConfig, tmp_path: Path
) -> None:
    module, engine = trained
    progress = Progress(step=7, applied=6, block=14)
    path = save_checkpoint(tmp_path, module, engine, progress, tiny_config)
    assert read_checkpoint(path).progress == progress
    assert (tmp_path / "latest").read_text().strip() == path.name

    found = find_latest(tmp_path, report=pytest.fail)
    assert found is not None
    assert found.progress == progress
    torch.manual_seed(1)
    other = build_train_module(tiny_config, CLASSES)
    other_engine = Engine(engine.accelerator, tiny_config)
    other_engine.prepare(other, build_optimizer(other, tiny_config.optim))
    load_state(found, other, other_engine)
    before, after = module.state_dict(), other.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    ours, theirs = ([p for p in m.parameters() if p.requires_grad] for m in (module, other))
    for own, parameter in zip(ours, theirs, strict=True):
        state, loaded = engine.optimizer.state[own], other_engine.optimizer.state[parameter]
        assert state.keys() == loaded.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(state[key], loaded[key]) for key in state if key != "step")
        assert loaded["step"] == 6
    plain = build_train_module(tiny_config, CLASSES)
    load_modules(found, plain)
    after = plain.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    trained: tuple[TrainModule, Engine], tiny_config: RunConfig, tmp_path: Path
) -> None:
    module, engine = trained
    for step in (1, 2):
        save_checkpoint(tmp_path, module, engine, Progress(step=step), tiny_config)
    damaged = tmp_path / "step_00000002"
    faults = {
        "flipped bit": lambda: flip_a_bit(damaged / "rank_00000.safetensors"),
        "truncated": lambda: (damaged / "buffers_00000.safetensors").write_bytes(b"short"),
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
    flip_a_bit(tmp_path / "step_00000004" / "rank_00000.safetensors")
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
        load_modules(found, build_train_module(tiny_config, CLASSES))


def change(tensors: dict[str, Tensor], name: str, into: Tensor | None, *, key: str = "") -> None:
    """Another tensor under a name, or another name; neither is what a run writes."""
    old = tensors.pop(name)
    tensors[key or name] = old if into is None else into


def a_variance(tensors: dict[str, Tensor]) -> str:
    return next(name for name in tensors if name.endswith("running_var"))


UNLIKE_A_RUN: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "int8": ("student", lambda t: change(t, min(t), t[min(t)].to(torch.int8)), "is int8"),
    "bool": ("teacher", lambda t: change(t, min(t), t[min(t)] > 0), "is bool"),
    "float64": ("rebuilder", lambda t: change(t, min(t), t[min(t)].double()), "is float64"),
    "float16": ("rebuilder", lambda t: change(t, min(t), t[min(t)].half()), "is float16"),
    "nan": ("student", lambda t: t[max(t)].view(-1)[:1].fill_(torch.nan), "not finite"),
    "infinity": ("teacher", lambda t: t[max(t)].view(-1)[:1].fill_(torch.inf), "not finite"),
    "mean of variances": ("student", lambda t: t[a_variance(t)].fill_(torch.inf), "running_var holds .* not finite"),
    "shape": ("student", lambda t: change(t, min(t), torch.zeros(1)), "another network"),
    "name": ("student", lambda t: change(t, min(t), None, key="other"), "another network"),
    "state's name": ("optimizer", lambda t: change(t, min(t), None, key=f"{min(t)}_cubed"), "another network"),
    "state's shape": ("optimizer", lambda t: change(t, min(t), torch.zeros(1)), "another network"),
    "half a state": ("optimizer", lambda t: t.pop(min(t)), "another network"),
    "state's type": ("optimizer", lambda t: change(t, min(t), t[min(t)].bfloat16()), "is torch.bfloat16"),
    "state's nan": ("optimizer", lambda t: t[min(t)].view(-1)[:1].fill_(torch.nan), "not finite"),
    "state below 0": (
        "optimizer",
        lambda t: t[next(name for name in t if name.endswith("_sq"))].view(-1)[:1].fill_(-1),
        "below 0",
    ),
}


def test_tensors_that_no_run_writes_are_refused_under_right_checksums(
    trained: tuple[TrainModule, Engine], tiny_config: RunConfig, tmp_path: Path
) -> None:
    module, engine = trained
    path = save_checkpoint(tmp_path, module, engine, Progress(step=1, applied=1), tiny_config)
    whole = {name: t for name, t in checkpoint_tensors(path).items() if not name.startswith("buffers/")}
    for kind, (part, spoil, reason) in UNLIKE_A_RUN.items():
        tensors = {name: tensor.clone() for name, tensor in whole.items()}
        own = {name.removeprefix(f"{part}/"): t for name, t in tensors.items() if name.startswith(f"{part}/")}
        spoil(own)
        others = {name: t for name, t in tensors.items() if not name.startswith(f"{part}/")}
        rewrite_tensors(path, others | {f"{part}/{name}": t for name, t in own.items()})
        found = read_checkpoint(path)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        with pytest.raises(ConfigError, match=reason):
            load_state(found, module, engine)
        if not reason.endswith(("not finite", "below 0")):
            assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in before.items()), kind
    rewrite_tensors(path, whole)
    load_state(read_checkpoint(path), module, engine)
    statistics = path / "buffers_00000.safetensors"
    tensors = load_file(statistics)
    tensors[next(name for name in tensors if "running_var[" in name)].fill_(torch.inf)
    save_file(tensors, statistics)
    vouch(path)
    with pytest.raises(ConfigError, match=r"running_var holds .* not finite"):
        load_state(read_checkpoint(path), module, engine)


def test_a_manifest_cannot_point_outside_its_folder(
    trained: tuple[TrainModule, Engine], tiny_config: RunConfig, tmp_path: Path
) -> None:
    module, engine = trained
    path = save_checkpoint(tmp_path, module, engine, Progress(step=1), tiny_config)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../latest"] = {"bytes": 1, "sha256": []}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match=r"'\.\./latest', which is no file of a checkpoint"):
        read_checkpoint(path)


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(trained: tuple[TrainModule, Engine]) -> None:
    module, engine = trained
    before = [p.detach().clone() for p in module.parameters()]
    run_micro_batches(engine)
    first = next(p for p in module.parameters() if p.requires_grad)
    assert first.grad is not None
    first.grad.view(-1)[0] = torch.nan
    result = engine.step()
    assert not result.applied
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert first.grad is None


def test_what_is_collected_is_a_copy(trained: tuple[TrainModule, Engine]) -> None:
    """On a CPU ``.cpu()`` copies nothing, and training goes on in place while the thread writes."""
    module, engine = trained
    snapshot = collect(module, engine, HostMemory())
    everything = [*snapshot.pieces, *snapshot.buffers]
    before = [piece.values.clone() for piece in everything]
    assert {piece.name for piece in snapshot.pieces} == snapshot.tensors.keys()
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.add_(1)
    for state in engine.optimizer.state.values():
        for value in state.values():
            value.add_(1)
    changed = [p.name for p, value in zip(everything, before, strict=True) if not torch.equal(p.values, value)]
    assert changed == []


def test_training_goes_on_while_a_slow_disk_writes(
    trained: tuple[TrainModule, Engine], tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk waits for what happens here, so that no clock decides."""
    module, engine = trained
    disk_works = Event()

    def slow(*arguments: Any) -> None:
        assert disk_works.wait(60), "the training waited for the disk"
        write_rank(*arguments)

    monkeypatch.setattr("mfm_dist.checkpoint.writer.write_rank", slow)
    saved: list[Saved] = []
    writes = CheckpointWriter(tmp_path, engine, tiny_config, data_fingerprints={}, written=saved.append)
    expected = module.student.state_dict()
    expected = {name: value.clone() for name, value in expected.items()}
    progress = Progress(step=1)
    writes.save(module, progress)
    returned = time.perf_counter()
    assert not saved
    progress.step = 9  # the trainer counts on in the same object
    step_on_random_gradients(module, engine)
    assert not writes.failed()
    held = time.perf_counter() - returned
    Timer(0.2, disk_works.set).start()
    writes.save(module, Progress(step=2))
    assert disk_works.is_set(), "it had to wait for the one before"
    assert [one.step for one in saved] == [1]
    writes.wait()
    writes.close()
    assert saved[0].write_seconds > held
    written = read_checkpoint(tmp_path / "step_00000001").tensors("student")
    assert [name for name in written if not torch.equal(written[name], expected[name])] == []
    tiny_config.checkpoint.background = False
    at_once = CheckpointWriter(tmp_path, engine, tiny_config, data_fingerprints={}, written=saved.append)
    at_once.save(module, Progress(step=3))
    assert saved[2].step == 3
    assert saved[2].stall_seconds > saved[2].write_seconds > 0
    at_once.close()


def test_what_is_written_may_be_read_as_widely_as_other_files(
    trained: tuple[TrainModule, Engine], tiny_config: RunConfig, tmp_path: Path
) -> None:
    module, engine = trained
    path = save_checkpoint(tmp_path, module, engine, Progress(step=1), tiny_config)
    (tmp_path / "other").touch()
    assert {file.stat().st_mode for file in path.iterdir()} == {(tmp_path / "other").stat().st_mode}


def test_the_state_of_an_optimiser_of_other_parameters_is_refused(
    trained: tuple[TrainModule, Engine], tiny_config: RunConfig, tmp_path: Path
) -> None:
    module, engine = trained
    save_checkpoint(tmp_path, module, engine, Progress(step=1, applied=1), tiny_config)
    found = find_latest(tmp_path, report=pytest.fail)
    assert found is not None
    module.rebuilder = None
    with pytest.raises(ConfigError, match=r"optimiser's state .* e\.g\. rebuilder"):
        load_state(found, module, engine)
