"""Kernels, bytes and FLOP of a step, counted on fake tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mfm_dist.profiling.counting import count_step
from mfm_dist.profiling.kernels import CARDS, Count, Counter, CudaAutocast, count_kernels, main, roofline_ms
from tests.helpers.methods import EXTRA
from tests.helpers.modules import config_with

MIT = [*EXTRA, "model.backbone=mit_b0", "model.backbone_options={}", "data.crop=64"]


def counted(*overrides: str) -> dict[str, Count]:
    return count_kernels(config_with(*MIT, *overrides)).parts


def whole(*overrides: str) -> Count:
    return count_kernels(config_with(*MIT, *overrides)).whole


def test_each_operator_is_counted_with_what_it_reads_and_writes() -> None:
    counter = Counter()
    with FakeTensorMode(), counter:
        x, weight = torch.empty(4, 8), torch.empty(3, 8)
        with counter.within("product"):
            product = F.linear(x, weight)  # a transposed view, and one product
        with counter.within("in place"):
            product.add_(1.0)
        with counter.within("cast"):
            product.to(torch.bfloat16).view(-1)
    assert counter.parts["product"] == Count(kernels=1, bytes=4 * (4 * 8 + 3 * 8 + 4 * 3), flop=2 * 4 * 8 * 3)
    assert counter.parts["in place"] == Count(kernels=1, bytes=4 * (12 + 12))
    assert counter.parts["cast"] == Count(kernels=1, bytes=12 * (4 + 2), casts=1)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_convolution_costs_forward_once_and_backward_for_each_gradient(groups: int) -> None:
    counter = Counter()
    with FakeTensorMode(), counter:
        image, weight = (
            torch.empty(2, 4, 8, 8, requires_grad=True),
            torch.empty(8, 4 // groups, 3, 3, requires_grad=True),
        )
        with counter.within("forward"):
            found = F.conv2d(image, weight, padding=1, groups=groups).sum()
        with counter.within("backward"):
            found.backward()
    forward = 2 * (2 * 8 * 8 * 8) * (4 // groups) * 9
    assert counter.parts["forward"].flop == forward
    assert counter.parts["backward"].flop == 2 * forward


def test_types_are_those_of_autocast_on_cuda_and_a_weight_is_cast_once() -> None:
    """Unlike on a CPU, norms and interpolation are in fp32."""
    layer, norm = nn.Linear(4, 4), nn.LayerNorm(4)
    x = torch.randn(2, 4)
    counter = Counter()
    with counter, CudaAutocast():
        once, twice = layer(x), layer(x)
        assert once.dtype == twice.dtype == torch.bfloat16
        assert norm(once).dtype == torch.float32
        assert F.interpolate(once.view(1, 1, 2, 4), scale_factor=2, mode="bilinear").dtype == torch.float32
        assert torch.cat([once, x]).dtype == torch.float32
        assert (once + once).dtype == torch.bfloat16
    [part] = counter.parts.values()
    assert part.casts == 2 + 2 + 1 + 1 + 1  # weight and bias; x twice; to norm, interpolation and cat
    assert layer(x).dtype == torch.float32


def test_one_call_of_the_encoder_needs_fewer_kernels_and_the_same_flop() -> None:
    once, each = counted(), counted("train.encode_once=never")
    assert each["encoder"].kernels == 3 * once["encoder"].kernels  # source, mixed, MFM
    assert each["backward"].kernels > 1.5 * once["backward"].kernels
    assert each["encoder"].flop == once["encoder"].flop
    assert {"teacher", "decoder", "rebuilder", "clipping", "optimiser", "EMA"} <= once.keys()


def test_the_flop_are_those_that_are_counted_by_term() -> None:
    """Of the forward; its rule for the backward is twice the forward of what is trained, which is one product too many
    for the first layer and one too few for attention."""
    config = config_with(*MIT)
    terms = count_step(config)
    parts = count_kernels(config).parts
    forward = 2 * sum(term.forward.total() for term in terms.values())
    names = ("teacher", "encoder", "decoder", "rebuilder", "losses, mixing and the rest")
    assert sum(parts[name].flop for name in names) == pytest.approx(forward, rel=0.01)
    backward = 2 * sum(term.backward.total() for term in terms.values())
    assert parts["backward"].flop == pytest.approx(backward, rel=0.1)


def test_bf16_casts_and_moves_less() -> None:
    fp32, bf16 = whole("data.crop=128"), whole("data.crop=128", "train.precision=bf16")
    assert bf16.casts > 100 > fp32.casts
    assert bf16.kernels - bf16.casts == pytest.approx(fp32.kernels - fp32.casts, rel=0.1)
    assert fp32.flop == bf16.flop


def test_the_bound_is_the_longer_of_bytes_and_flop() -> None:
    bandwidth, bf16, fp32 = CARDS["h100"]
    assert roofline_ms(Count(bytes=int(bandwidth)), "h100", "bf16") == 1000
    assert roofline_ms(Count(bytes=1, flop=int(2 * bf16)), "h100", "bf16") == 2000
    assert roofline_ms(Count(flop=int(fp32)), "h100", "fp32") == 1000


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernels.json"
    options = ["model.backbone=mit_b0", "--precision", "bf16", "data.crop=64", "--json", str(path), "rebuilder.grid=4"]
    assert main([*options, "mfm.enabled=true"]) == 0
    record = json.loads(path.read_text())
    whole = {"kernels", "bytes", "flop", "casts", "saved_bytes", "roofline_ms", "parts"}
    assert whole <= record.keys()
    assert record["kernels"] == sum(part["kernels"] for part in record["parts"].values())
    assert record["saved_bytes"] > 0
    assert "whole step" in capsys.readouterr().out
    assert main(["memory.lean=true"]) == 2
    assert "memory.lean=false" in capsys.readouterr().err
    assert main(["memory.checkpoint_rebuilder=true", "--precision", "bf16"]) == 2
    assert "memory.checkpoint_rebuilder=false" in capsys.readouterr().err


def test_the_stable_variant_is_counted_too() -> None:
    """Its budget adds up gradients at the encoder's last map."""
    assert whole("rebuilder.variant=stable").kernels > whole().kernels


def saved(*overrides: str) -> int:
    return count_kernels(config_with(*MIT, *overrides)).saved_bytes


def test_what_is_saved_for_the_backward_shrinks_with_checkpointing() -> None:
    assert saved("memory.checkpoint_backbone=true") < 0.8 * saved()
