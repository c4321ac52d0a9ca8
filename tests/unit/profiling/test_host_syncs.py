"""Where a step waits for the device: in one place, and others are seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mfm_dist.distributed.engine import Engine
from mfm_dist.methods.dacs import DACS
from mfm_dist.profiling.counting import blank_batch
from mfm_dist.profiling.host_syncs import OPTIMIZER, OURS, HostSync, HostSyncs, count_host_syncs
from mfm_dist.trainer import Trainer
from tests.helpers.methods import EXTRA, METHODS
from tests.helpers.modules import config_with


def syncs_of(*overrides: str) -> HostSyncs:
    config = config_with(*EXTRA, "train.micro_batch=1", "train.global_batch=1", *overrides)
    return count_host_syncs(config, [blank_batch(config, block) for block in range(2)])


def ours(syncs: HostSyncs) -> list[HostSync]:
    return [sync for sync in syncs.found.elements() if sync.whose == OURS]


@pytest.mark.parametrize("overrides", METHODS.values(), ids=METHODS)
def test_a_step_reads_what_became_of_the_one_before_and_nothing_else(overrides: list[str]) -> None:
    syncs = syncs_of(*overrides)
    [only] = ours(syncs)
    assert only.kind == "tolist"
    assert only.place.startswith("distributed/engine.py")
    assert syncs.of(OPTIMIZER) > 0, "torch's AdamW counts its steps on a CPU"


def before(work: Callable[..., Any], planted: Callable[[], Any]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        planted()
        return work(*args, **kwargs)

    return both


@pytest.mark.parametrize(
    ("owner", "name"), [(Trainer, "train_step"), (Engine, "step"), (DACS, "terms")], ids=["trainer", "engine", "method"]
)
@pytest.mark.parametrize(
    ("kind", "plant"),
    [
        ("item", lambda device: device.item()),
        ("__bool__", lambda device: bool(device > 0)),
        ("tensor", lambda _: torch.tensor([1.0, 2.0])),
    ],
    ids=["item", "bool", "tensor"],
)
def test_a_planted_one_is_seen(
    owner: type, name: str, kind: str, plant: Callable[[torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.ones(())
    monkeypatch.setattr(owner, name, before(getattr(owner, name), lambda: plant(device)))
    assert sorted(sync.kind for sync in ours(syncs_of())) == sorted([kind, "tolist"])


def test_what_is_on_the_host_is_no_wait_to_read() -> None:
    with HostSyncs() as syncs:
        host = torch.zeros(3)
        host[host > 0].tolist()
        assert not syncs.found
        device = host.to(torch.device("cpu"), non_blocking=True) + 1  # as a batch goes there
        assert not syncs.found
        device[device > 0]
        torch.zeros(3).to(torch.device("cpu"))
        device[[0, 1]]
        device.cpu()
    kinds = [sync.kind for sync in syncs.found.elements()]
    assert kinds == ["boolean index", "moved to the device", "index made of Python's numbers", "cpu"]
