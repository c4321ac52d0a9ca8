"""Every method trains, with and without MFM, and with every ablation of it. A new file is tested by being there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mfm_dist.batch import UDABatch
from mfm_dist.build import build_train_module
from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.data.pipeline import TrainPipeline
from mfm_dist.data.reader import ShardReader
from mfm_dist.distributed.running_statistics import running_statistics
from mfm_dist.errors import ConfigError
from mfm_dist.methods import build_method
from mfm_dist.optim import build_optimizer
from mfm_dist.train_module import TrainModule
from tests.helpers.classes import CLASSES
from tests.helpers.methods import ABLATIONS, EXTRA, METHODS
from tests.helpers.runs import tiny_overrides


@pytest.fixture(scope="module")
def batches(scenes: Path) -> dict[str, list[UDABatch]]:
    """Three blocks of the scenes, by the domain that is labelled."""

    def read(labelled: str) -> Iterator[UDABatch]:
        config = load_config(None, tiny_overrides(scenes, Path("unused")))
        return iter(
            TrainPipeline(
                source=ShardReader(scenes / labelled), target=ShardReader(scenes / "camera_train"),
                target_labelled=ShardReader(scenes / "camera_train"), seed=0,
                data=config.data, micro_batch=2, rank=0, world_size=1, blocks_per_step=1,
            )
        )  # fmt: skip

    folders = {"source": "game_train", "target": "camera_train"}
    return {domain: [next(blocks) for _ in range(3)] for domain, folder in folders.items() for blocks in [read(folder)]}


def configured(scenes: Path, *overrides: str, mfm: bool) -> RunConfig:
    return load_config(None, [*tiny_overrides(scenes, Path("unused")), *EXTRA, f"mfm.enabled={mfm}", *overrides])


def assert_every_parameter_has_a_gradient(module: TrainModule) -> None:
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("mfm", [True, False], ids=["mfm", "plain"])
@pytest.mark.parametrize("name", METHODS)
def test_method_trains_three_steps(name: str, mfm: bool, scenes: Path, batches: dict[str, list[UDABatch]]) -> None:
    config = configured(scenes, *METHODS[name], mfm=mfm)
    module = build_train_module(config, CLASSES)
    optimizer = build_optimizer(module, config.optim)
    before = [p.detach().clone() for p in module.student.parameters()]
    for batch in batches[module.method.supervised_on]:
        output = module(batch, 1.0)
        assert torch.isfinite(output.total)
        assert set(module.term_names) <= set(output.losses)
        assert ("mfm" in output.losses) == mfm
        optimizer.zero_grad()
        output.total.backward()
        assert_every_parameter_has_a_gradient(module)
        optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, module.student.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("mfm", [True, False], ids=["mfm", "plain"])
@pytest.mark.parametrize("name", METHODS)
def test_terms_one_by_one_are_the_whole_and_the_last_reaches_every_parameter(
    name: str, mfm: bool, scenes: Path, batches: dict[str, list[UDABatch]]
) -> None:
    """memory.lean runs them so. The same module also says the same of the same batch twice."""
    module = build_train_module(configured(scenes, *METHODS[name], mfm=mfm), CLASSES)
    batch = batches[module.method.supervised_on][0]
    whole = module(batch, 0.5)
    again = module(batch, 0.5)
    assert_same_losses(whole.losses, again.losses)
    assert torch.equal(whole.total, again.total)
    alone: dict[str, Tensor] = {}
    inputs, total = None, torch.zeros(())
    for term in module.term_names:
        module.zero_grad(set_to_none=True)
        output = module(batch, 0.5, term, inputs)
        output.total.backward()
        inputs, total, alone = output.inputs, total + output.total.detach(), {**alone, **output.losses}
    assert_same_losses(whole.losses, alone)
    assert torch.isclose(total, whole.total)
    assert_every_parameter_has_a_gradient(module)


def assert_same_losses(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, loss in ours.items():
        assert torch.equal(loss, theirs[name]), name


@pytest.mark.parametrize("overrides", ABLATIONS, ids=lambda o: o[0])
@pytest.mark.parametrize("name", ["dacs", "hrda"])
def test_ablation_of_mfm_reaches_every_parameter(
    name: str, overrides: list[str], scenes: Path, batches: dict[str, list[UDABatch]]
) -> None:
    config = configured(scenes, f"method.name={name}", *overrides, mfm=True)
    module = build_train_module(config, CLASSES)
    statistics = [b.clone() for b in running_statistics(module.student)]
    output = module(batches["source"][0], 1.0, module.term_names[-1])
    assert torch.isfinite(output.total)
    output.total.backward()
    assert_every_parameter_has_a_gradient(module)
    assert not all(torch.equal(a, b) for a, b in zip(statistics, running_statistics(module.student), strict=True))
    if name == "dacs":
        encoder, decoder = (largest_gradient(part) for part in (module.student.backbone, module.student.decoder))
        trains = {"decoder": (False, True), "encoder": (True, False)}.get(config.mfm.trained_parts, (True, True))
        if config.mfm.reconstruction != "classes":
            trains = (True, False)
        assert (encoder > 0, decoder > 0) == trains


def largest_gradient(part: torch.nn.Module) -> float:
    return max(float(p.grad.abs().max()) for p in part.parameters() if p.grad is not None)


def test_the_detail_view_of_mfm_is_another_loss(scenes: Path, batches: dict[str, list[UDABatch]]) -> None:
    losses = [
        build_train_module(configured(scenes, "method.name=hrda", f"mfm.view={view}", mfm=True), CLASSES)(
            batches["source"][0], 1.0, "mfm"
        ).total.item()
        for view in ("context", "detail")
    ]
    assert losses[0] != losses[1]
    for view in ("detail", "fused"):
        with pytest.raises(ConfigError, match=rf"mfm\.view={view}"):
            configured(scenes, "method.name=dacs", f"mfm.view={view}", mfm=True)


def test_an_unknown_method_is_told_with_what_exists() -> None:
    there_are = r"did you mean 'dacs'\? There are: dacs, daformer, hrda, mic, oracle, source_only"
    with pytest.raises(ConfigError, match=there_are):
        build_method(load_config(None, ["method.name=dac"]))
