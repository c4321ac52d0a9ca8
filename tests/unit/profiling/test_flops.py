"""The counts of ``mfm-profile flops``, against torch's own counter and the published figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mfm_dist.batch import UDABatch
from mfm_dist.build import build_train_module
from mfm_dist.config.loader import load_config
from mfm_dist.models.hrda import build_segmentor
from mfm_dist.models.rebuilder import Rebuilder
from mfm_dist.profiling.counting import TermCost, count_forward, count_step, torch_mac, with_zeros
from mfm_dist.profiling.flops import forward_lines, main
from tests.helpers.classes import CLASSES

NETWORKS = {
    "mit_b0": ("daformer", {}),
    "mit_b5": ("daformer", {}),
    "resnet101c": ("deeplabv2", {"output_stride": 8, "out_indices": [1, 2, 3, 4]}),
}
RESNET = [
    "data.crop=64x96", "model.backbone=test_resnet", "model.backbone_options={output_stride: 8}",
    "model.decoder=deeplabv2", "rebuilder.width=32", "rebuilder.heads=2", "rebuilder.grid=4",
]  # fmt: skip


@pytest.mark.parametrize("backbone", NETWORKS)
def test_fvcore_with_our_handles_agrees_with_torchs_counter(backbone: str) -> None:
    decoder, options = NETWORKS[backbone]
    with torch.device("meta"):
        network = build_segmentor(backbone=backbone, decoder=decoder, num_classes=19, backbone_options=options)
    counted = count_forward(with_zeros(network), torch.zeros(1, 3, 64, 64))

    image = torch.empty(1, 3, 64, 64, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(image)
    assert counted.total.flop == counter.get_total_flops() == 2 * torch_mac(network, image)
    # fvcore's own sum has the norms, the interpolation and the pointwise operations on top.
    assert counted.fvcore_total == pytest.approx(counter.get_total_flops() / 2, rel=0.02)
    assert counted.unsupported == {}
    assert counted.total.parameters == sum(p.numel() for p in network.parameters())
    if backbone != "resnet101c":  # there torch sees attention as two batched products, and nothing else as one
        products = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
        assert 2 * counted.operators["attention"] == products > 0


def test_modules_add_up_to_their_parents() -> None:
    network = build_segmentor(backbone="mit_b0", decoder="daformer", num_classes=19)
    modules = count_forward(network, torch.zeros(1, 3, 64, 64)).modules
    assert modules["backbone"].mac + modules["decoder"].mac == modules[""].mac
    assert modules["backbone"].parameters + modules["decoder"].parameters == modules[""].parameters
    assert modules["decoder.classifier"].mac == 19 * 256 * 16 * 16


@pytest.mark.parametrize(("depth", "gflop", "parameters"), [(2, 11.84, 14_545_280), (8, 22.31, None)])
def test_the_rebuilder_costs_what_the_paper_notes_say(depth: int, gflop: float, parameters: int | None) -> None:
    channels, strides = (64, 128, 320, 512), (4, 8, 16, 32)
    rebuilder = Rebuilder(channels=channels, strides=strides, embed_channels=512, depth=depth)
    maps = [torch.zeros(1, c, 512 // s, 512 // s) for c, s in zip(channels, strides, strict=True)]
    counted = count_forward(rebuilder, maps[-1], maps, torch.zeros(1, 16, 16, dtype=torch.bool))
    assert counted.total.flop / 1e9 == pytest.approx(gflop, abs=0.01)
    assert parameters in (None, counted.total.parameters)


class _Strange(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) @ x.T


def test_what_nothing_counts_is_named() -> None:
    counted = count_forward(_Strange(), torch.zeros(3, 4))
    assert counted.unsupported == {"aten::cumsum": 1}
    found = {
        "modules": {"": {"parameters": 0, "mac": 36, "flop": 72, "other": 0}}, "operators": counted.operators,
        "flop": 72, "fvcore_total": 36, "torch_counter_flop": 72, "unsupported": counted.unsupported,
    }  # fmt: skip
    assert "operators that nothing counts: aten::cumsum (1 calls)" in list(forward_lines("a title", found, depth=1))


def forward_of(cost: TermCost) -> dict[str, int]:
    return dict(cost.forward)


def test_a_step_runs_the_parts_that_the_paper_says() -> None:
    config = load_config(None, [*RESNET, "mfm.enabled=true"])
    terms = count_step(config)
    assert list(terms) == ["teacher", "source", "mixed", "mfm"]
    encoder, decoder = terms["source"].forward["encoder"], terms["source"].forward["decoder"]
    assert forward_of(terms["teacher"]) == {"teacher": encoder + decoder}
    assert forward_of(terms["mixed"]) == {"encoder": encoder, "decoder": decoder}
    rebuilder = terms["mfm"].forward["rebuilder"]
    assert forward_of(terms["mfm"]) == {"encoder": encoder, "decoder": decoder, "rebuilder": rebuilder}
    assert rebuilder > 0
    assert terms["teacher"].flop == 2 * (encoder + decoder)
    assert terms["mfm"].flop == 3 * 2 * (encoder + decoder + rebuilder)


@pytest.mark.parametrize(
    "more",
    [
        ["method.name=hrda", "hrda.attention=deeplabv2", "hrda.attention_options={}", "data.crop=128x192"],
        ["mfm.reconstruction=teacher_features"],
    ],
)
def test_all_networks_of_a_step_are_counted_with_their_part(more: list[str]) -> None:
    """HRDA's second head too, and the teacher's encoder where it alone is asked."""
    terms = count_step(load_config(None, [*RESNET, "mfm.enabled=true", *more]))
    assert "outside the networks" not in terms
    assert terms["mfm"].backward["decoder"] == 2 * terms["mfm"].forward["decoder"]
    assert ("teacher" in terms["mfm"].forward) == ("mfm.reconstruction=teacher_features" in more)


def test_the_rule_for_the_backward_against_a_real_one() -> None:
    """Without grouped convolutions, which torch's counter takes for full ones, and without attention."""
    config = load_config(None, RESNET)
    ruled = sum(cost.flop for cost in count_step(config).values())

    module = build_train_module(config, CLASSES)
    images = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    batch = UDABatch(
        source_image=images, source_label=images[:, 0], target_image=images, target_valid=images[:, 0] == 0, block=0
    )
    sizes: list[Tensor] = []
    first = next(m for m in module.student.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_hook(lambda *arguments: sizes.append(arguments[-1]))
    config.self_training.blur_prob = 0.0  # a blur is a convolution too
    with FlopCounterMode(display=False) as counter:
        module(batch, 0.0).total.backward()
    # The rule lets the first layer compute a gradient of the image, which no one asks for.
    images_gradient = sum(2 * output.numel() * first.weight[0].numel() for output in sizes)
    assert len(sizes) == 2
    assert ruled - counter.get_total_flops() == images_gradient


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "flops.json"
    arguments = ["--json", str(path), "--size", "32x64", *RESNET, "mfm.enabled=true", "train.global_batch=6"]
    assert main([*arguments, "model.weights=/nowhere.pth"]) == 0
    printed = capsys.readouterr().out
    assert "model.pretrained and model.weights are ignored" in printed
    assert "one image of 32x64" in printed
    found = json.loads(path.read_text())
    assert found["segmentor"]["flop"] == found["segmentor"]["torch_counter_flop"] == 2 * found["segmentor"]["mac"]
    assert found["rebuilder"]["flop"] == found["rebuilder"]["torch_counter_flop"]
    assert found["rebuilder"]["modules"]["blocks"]["parameters"] > 0
    step = found["step"]
    assert step["flop_global_batch"] == 3 * step["flop_micro_batch"]
    assert step["flop_micro_batch"] == sum(term["flop"] for term in step["terms"].values())


def test_the_command_without_a_rebuilder_and_with_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RESNET]) == 0
    assert "2. Rebuilder: none" in capsys.readouterr().out
    assert main(["model.bakbone=mit_b0"]) == 2
    assert "model.backbone" in capsys.readouterr().err
