"""What several ranks write and read of one checkpoint: an even share each, and every bit of it back."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mfm_dist.checkpoint.contents import collect, load_state
from mfm_dist.checkpoint.files import open_checkpoint, read_checkpoint
from mfm_dist.checkpoint.host_memory import HostMemory
from mfm_dist.checkpoint.pieces import CHUNK_BYTES
from mfm_dist.checkpoint.progress import Progress
from mfm_dist.checkpoint.writer import CheckpointWriter
from mfm_dist.errors import StorageError
from tests.helpers.classes import CLASSES
from tests.helpers.ranks import ThreadEngine, on_ranks

Written = Callable[[int], Path]


class Networks(nn.Module):
    """What a checkpoint looks for in a module, of 40 MiB with the optimiser's state; no size that four divides."""

    classes = CLASSES

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(511, 2049), nn.BatchNorm1d(2049), nn.Conv2d(3, 5, 3))
        self.teacher = nn.Module()
        self.teacher.segmentor = nn.Sequential(nn.Linear(511, 2049), nn.Linear(1, 1)).requires_grad_(False)
        self.rebuilder = nn.Sequential(*(nn.Linear(1023, 1025) for _ in range(2)), nn.Linear(3, 1))

    def teacher_pairs(self) -> list[Any]:
        return []


def prepared(engine: ThreadEngine, seed: int) -> Networks:
    """Networks and a state of their optimiser, all by the seed."""
    module, generator = Networks(), torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained, "part": "all", "base_lr": 1e-3}])
    engine.prepare(module, optimizer)
    for parameter in trained:
        optimizer.state[parameter] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.randn(parameter.shape, generator=generator),
            "exp_avg_sq": torch.rand(parameter.shape, generator=generator),
        }  # fmt: skip
    statistics = torch.Generator().manual_seed(engine.rank)
    module.student[1].running_mean = torch.randn(2049, generator=statistics)
    return module


def everything(engine: ThreadEngine, module: Networks) -> dict[str, Tensor]:
    """Copies of all tensors but BatchNorm's statistics."""
    found = {name: tensor.clone() for name, tensor in module.named_parameters()}
    for name, parameter in module.named_parameters():
        state = engine.optimizer.state.get(parameter, {})
        found |= {f"{name}/{key}": value.clone() for key, value in state.items()}
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A checkpoint by the number of ranks that write it."""

    @cache
    def write(world_size: int) -> Path:
        folder = tmp_path_factory.mktemp("written")

        def save(engine: ThreadEngine) -> None:
            module: Any = prepared(engine, 1)
            writes = CheckpointWriter(folder, engine, engine.config, data_fingerprints={}, written=lambda _: None)
            writes.save(module, Progress(step=3, applied=1))
            writes.wait()

        on_ranks(world_size, save)
        return folder / "step_00000003"

    return write


@pytest.mark.parametrize(("writers", "readers"), [(4, 4), (4, 2), (2, 4), (4, 1), (1, 2)])
def test_the_ranks_read_everything_once_between_them(writers: int, readers: int, written: Written) -> None:
    """Each at most its share, a tenth of it, and one chunk of each file it has a part of; each gets every bit."""
    checkpoint = open_checkpoint(written(writers))
    share = sum(spec.nbytes for spec in checkpoint.specs.values()) / readers
    means = read_checkpoint(written(writers)).tensors("student")

    def load(engine: ThreadEngine) -> int:
        expected = everything(engine, prepared(engine, 1))
        module: Any = prepared(engine, 2)
        read = load_state(checkpoint, module, engine)
        found = everything(engine, module)
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
        own = checkpoint.buffers(engine.rank) if writers == readers else means
        assert torch.equal(module.student[1].running_mean, own["1.running_mean"])
        return read

    read = on_ranks(readers, load)
    assert max(read) <= 1.1 * share + CHUNK_BYTES * max(1, writers // readers)
    assert sum(read) >= readers * share


def test_no_rank_copies_more_than_its_share() -> None:
    def copied(engine: ThreadEngine) -> tuple[int, int]:
        module: Any = prepared(engine, 1)
        snapshot = collect(module, engine, HostMemory())
        own = [piece.values.nbytes for piece in (*snapshot.pieces, *snapshot.buffers)]
        return sum(own), sum(spec.nbytes for spec in snapshot.tensors.values())

    for own, whole in on_ranks(4, copied):
        assert own < 1.01 * whole / 4


def test_what_is_damaged_for_one_rank_is_for_all(written: Written, tmp_path: Path) -> None:
    """In the middle of the exchange; none waits for another for ever."""
    checkpoint = tmp_path / "step_00000003"
    checkpoint.mkdir()
    for file in written(4).iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    payload = bytearray((checkpoint / "rank_00002.safetensors").read_bytes())
    payload[-9] ^= 4
    (checkpoint / "rank_00002.safetensors").write_bytes(payload)

    def refused(engine: ThreadEngine) -> str:
        module: Any = prepared(engine, 2)
        with pytest.raises(StorageError) as raised:
            load_state(open_checkpoint(checkpoint), module, engine)
        return str(raised.value)

    said = f"{checkpoint} is damaged (rank_00002.safetensors differs from what was written)"
    assert on_ranks(4, refused) == [said] * 4


def test_the_files_are_safetensors(written: Written) -> None:
    pieces = load_file(written(4) / "rank_00001.safetensors")
    weight = read_checkpoint(written(4)).tensors("rebuilder")["0.weight"].flatten()
    (name,) = [name for name in pieces if name.startswith("rebuilder/0.weight[")]
    first, _, stop = name.partition("[")[2].rstrip("]").partition(":")
    assert torch.equal(pieces[name], weight[int(first) : int(stop)])
