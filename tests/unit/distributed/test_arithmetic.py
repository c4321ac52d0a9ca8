"""What numbers are computed in: fp32 on a GPU, types under autocast, sums of bf16 gradients, how weights lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mfm_dist.build import build_train_module
from mfm_dist.config.loader import load_config
from mfm_dist.distributed.arithmetic import set_fp32_math
from mfm_dist.distributed.engine import Engine
from mfm_dist.distributed.start import start_engine
from mfm_dist.optim import build_optimizer
from mfm_dist.profiling.kernels import CudaAutocast
from tests.helpers.classes import CLASSES
from tests.helpers.modules import SMALL, block

MIT = [*SMALL, "model.backbone=mit_b0", "model.backbone_options={drop_path_rate: 0.1}"]
EVERY_PIXEL = "self_training.pseudo_threshold=0"
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
CPU_AND_GPU = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.fixture(autouse=True)
def _fp32_as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def prepared(*overrides: str) -> Engine:
    config = load_config(None, [EVERY_PIXEL, *overrides])
    module = build_train_module(config, CLASSES)
    engine = start_engine(config)
    engine.prepare(module, build_optimizer(module, config.optim, fused=engine.fuses_optimizer))
    return engine


def gradients(*overrides: str) -> dict[str, Tensor]:
    engine = prepared(*overrides)
    engine.forward_backward(block().to(engine.device), 0.5)
    return {name: p.grad for name, p in engine.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_is_left_out_by_whatever_optimiser_was_built(fused: bool) -> None:
    """The fused one looks itself whether all is finite, and only it can be told to."""
    config = load_config(None, SMALL)
    module = build_train_module(config, CLASSES)
    engine = start_engine(config)
    engine.prepare(module, build_optimizer(module, config.optim, fused=fused))
    weight = next(p for p in module.student.parameters() if p.requires_grad)
    before = weight.detach().clone()
    for good in (False, True):
        weight.grad = torch.ones_like(weight)
        engine._update(torch.tensor(good, device=engine.device), [])
        assert torch.equal(weight.detach(), before) != good


@pytest.mark.parametrize("math", ["ieee", "tf32"])
def test_matrices_and_convolutions_are_computed_alike_and_it_is_recorded(math: str) -> None:
    """torch's own defaults are TF32 for convolutions alone."""
    engine = start_engine(load_config(None, [*SMALL, f"train.fp32_math={math}"]))
    assert engine.environment["tf32"] == {"matmul": math == "tf32", "convolution": math == "tf32"}
    if engine.device.type == "cpu":
        assert engine.arithmetic == "fp32", "a CPU has one kind"
    else:
        assert engine.arithmetic == f"fp32, fp32 as {math}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_ieee_is_exact_to_fp32_and_tf32_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator, dtype=torch.float64) for _ in range(2))
    image = torch.randn(2, 64, 32, 32, generator=generator, dtype=torch.float64)
    kernel = torch.randn(64, 64, 3, 3, generator=generator, dtype=torch.float64)
    exact = [a @ b, F.conv2d(image, kernel)]

    def errors() -> list[float]:
        a32, b32, image32, kernel32 = (x.float().cuda() for x in (a, b, image, kernel))
        found = [a32 @ b32, F.conv2d(image32, kernel32)]
        return [float((f.cpu() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]

    set_fp32_math("ieee")
    assert all(error < 2e-6 for error in errors())
    if torch.cuda.get_device_capability() >= (8, 0):
        set_fp32_math("tf32")
        assert all(1e-5 < error < 1e-2 for error in errors())


@pytest.mark.parametrize("device", CPU_AND_GPU)
def test_what_autocast_on_a_gpu_makes_of_each_module(device: str) -> None:
    """What is counted without a GPU casts as one does, module by module; a CPU's own autocast has other lists."""

    def types(context: AbstractContextManager[object], device: str) -> dict[str, list[torch.dtype]]:
        module = build_train_module(load_config(None, [*MIT, EVERY_PIXEL]), CLASSES).to(device)
        seen: dict[str, list[torch.dtype]] = {}
        for name, layer in module.named_modules():
            layer.register_forward_hook(
                lambda _, __, out, name=name: (
                    seen.setdefault(name, []).append(out.dtype) if isinstance(out, Tensor) else None
                )
            )
        with context:
            output = module(block().to(torch.device(device)), 0.5)
        assert {loss.dtype for loss in output.losses.values()} == {torch.float32}
        return seen

    counted = types(CudaAutocast(), "cpu")
    stages = [f"student.backbone.net.stages_{stage}" for stage in range(4)]
    assert {dtype for stage in stages for dtype in counted[stage]} == {torch.float32}, "a LayerNorm comes last"
    assert set(counted["student.decoder"]) == set(counted["student.decoder.bottleneck"]) == {torch.bfloat16}
    if device == "cuda":
        assert types(torch.autocast("cuda", dtype=torch.bfloat16), "cuda") == counted
    else:
        of_cpu = types(torch.autocast("cpu", dtype=torch.bfloat16), "cpu")
        assert {dtype for stage in stages for dtype in of_cpu[stage]} == {torch.bfloat16}


def test_terms_added_up_in_bf16_differ_far_less_than_bf16_itself_does() -> None:
    """A weight's bf16 copy collects the gradients of all terms before they become fp32; of each alone with memory.lean.

    So on a GPU, where the test runs alike.
    """
    fixed = [*SMALL, "train.encode_once=never"]
    bf16 = "train.precision=bf16"
    exact, together, lean = (gradients(*fixed, *more) for more in ([], [bf16], [bf16, "memory.lean=true"]))

    def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return float(torch.stack([(one[name] - other[name]).norm() for name in exact]).norm())

    assert 0.0 < apart(together, lean) < 0.2 * apart(together, exact)


@pytest.mark.parametrize("device", CPU_AND_GPU)
def test_what_is_loaded_lies_in_memory_as_the_weights_do(device: str) -> None:
    """On a GPU convolution weights lie channels last, and a fused optimiser takes all its tensors to lie alike."""
    engine = prepared(*SMALL)
    if engine.device.type != device:
        pytest.skip("there is a GPU")
    if device == "cpu":
        engine.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    (name, weight), *_ = [
        (n, p) for n, p in engine.module.named_parameters() if p.requires_grad and p.ndim == 4 and min(p.shape) > 1
    ]
    assert weight.is_contiguous(memory_format=torch.channels_last), name

    def step(number: int) -> None:
        engine.forward_backward(block(number).to(engine.device), 0.5)
        assert engine.step().applied

    step(3)
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in parameters]
    states = [
        {key: piece.clone().view(p.shape) for key, [(_, piece)] in engine.optimizer_pieces(p).items()}
        for p in parameters
    ]
    step(4)
    went_on = [p.detach().clone() for p in parameters]
    for parameter, whole in zip(parameters, kept, strict=True):
        engine.set_parameter(parameter, whole)
    engine.reset_optimizer(states[0], applied=1)
    for parameter, state in zip(parameters, states, strict=True):
        for key, whole in state.items():
            engine.set_optimizer_state(parameter, key, whole, applied=1)
    loaded = [value for key, value in engine.optimizer.state[weight].items() if key != "step"]
    assert {value.stride() for value in loaded} == {weight.stride()}
    step(4)
    for parameter, expected in zip(parameters, went_on, strict=True):
        # A gradient that is rounding alone, as that of the keys' bias, is other rounding in the next pass on a GPU.
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)
