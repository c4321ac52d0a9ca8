"""HRDA's two resolutions, against a slow fusion and forwards put together by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mfm_dist.errors import ConfigError
from mfm_dist.models.decoders import build_decoder
from mfm_dist.models.hrda import HRDASegmentor, TwoResolutions, build_segmentor, fuse
from mfm_dist.models.windows import Window


def small(decoder: str = "daformer", attention: str = "segformer", window: tuple[int, int] = (64, 64)) -> HRDASegmentor:
    torch.manual_seed(0)
    options = {"daformer": {"width": 8}, "segformer": {"width": 8}, "deeplabv2": {}}
    stages = {"out_indices": (1, 2, 3, 4), **({"output_stride": 8} if decoder == "deeplabv2" else {})}
    segmentor = build_segmentor(
        backbone="test_resnet", decoder=decoder, num_classes=5, backbone_options=stages,
        decoder_options=options[decoder], attention=attention, attention_options=options.get(attention), window=window,
    )  # fmt: skip
    assert isinstance(segmentor, HRDASegmentor)
    return segmentor


def doubled(map_: Tensor) -> Tensor:
    """Bilinear, place by place: a new place lies a quarter beside the centre of an old one."""
    rows, columns = map_.shape[-2:]
    result = torch.zeros(*map_.shape[:-2], 2 * rows, 2 * columns, dtype=map_.dtype)

    def neighbours(index: int, length: int) -> list[tuple[int, float]]:
        own, other = index // 2, index // 2 + (1 if index % 2 else -1)
        return [(own, 0.75), (min(max(other, 0), length - 1), 0.25)]

    for y in range(2 * rows):
        for x in range(2 * columns):
            for row, down in neighbours(y, rows):
                for column, across in neighbours(x, columns):
                    result[..., y, x] += down * across * map_[..., row, column]
    return result


def both(model: HRDASegmentor, image: Tensor, box: Window) -> TwoResolutions:
    return model.decode_crops(map(model.encode, (model.context(image), box.crop(image))), box)


def test_the_fusion_is_the_published_one() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, 3, 4, 5, generator=generator)
    attention = torch.rand(2, 3, 4, 5, generator=generator)
    detail = torch.randn(2, 3, 8, 10, generator=generator)
    expected = doubled((1 - attention) * coarse) + doubled(attention) * detail
    assert torch.allclose(fuse(coarse, attention, detail), expected, atol=1e-6)


@pytest.mark.parametrize(("decoder", "attention"), [("daformer", "segformer"), ("deeplabv2", "deeplabv2")])
def test_a_look_is_context_and_detail_put_together(decoder: str, attention: str) -> None:
    model = small(decoder, attention).eval()
    assert model.box_step == {"daformer": 8, "deeplabv2": 16}[decoder]
    box = Window(model.box_step, 0, 32, 32)
    image = torch.randn(2, 3, 64, 64)
    seen = both(model, image, box)

    half = F.interpolate(image, size=(32, 32), mode="bilinear", align_corners=False)
    features = model.encode(half)
    coarse, weight = model.decode(features), torch.sigmoid(model.attention(features))
    detail = model.decode(model.encode(image[:, :, box.top : box.top + 32, :32]))
    stride, grid = model.stride, 2 * model.stride
    inside = torch.zeros_like(weight)
    inside[..., box.top // grid : (box.top + 32) // grid, : 32 // grid] = 1
    pasted = torch.zeros(2, 5, 64 // stride, 64 // stride)
    pasted[..., box.top // stride : (box.top + 32) // stride, : 32 // stride] = detail
    expected = doubled((1 - weight * inside) * coarse) + doubled(weight * inside) * pasted
    assert torch.equal(seen.detail, detail)
    assert torch.allclose(seen.fused, expected, atol=1e-6)


def test_far_from_the_window_the_context_speaks_alone() -> None:
    model = small().eval()
    image = torch.randn(1, 3, 64, 64)
    seen = both(model, image, Window(0, 0, 32, 32))
    alone = doubled(model.decode(model.encode(model.context(image))))
    # One cell of the context beside the window still mixes, by interpolation.
    assert torch.allclose(seen.fused[..., 10:, :], alone[..., 10:, :], atol=1e-6)
    assert not torch.allclose(seen.fused[..., :6, :6], alone[..., :6, :6], atol=1e-4)


def test_prediction_slides_the_detail_over_all_of_the_image() -> None:
    model = small().eval()
    image = torch.randn(2, 3, 64, 96)
    features = model.encode(F.interpolate(image, size=(32, 48), mode="bilinear", align_corners=False))
    total, count = torch.zeros(2, 5, 16, 24), torch.zeros(16, 24)
    for top in (0, 16, 32):
        for left in (0, 16, 32, 48, 64):
            patch = model.decode(model.encode(image[:, :, top : top + 32, left : left + 32]))
            total[:, :, top // 4 : top // 4 + 8, left // 4 : left // 4 + 8] += patch
            count[top // 4 : top // 4 + 8, left // 4 : left // 4 + 8] += 1
    fused = fuse(model.decode(features), torch.sigmoid(model.attention(features)), total / count)
    expected = F.interpolate(fused, size=(64, 96), mode="bilinear", align_corners=False)
    with torch.no_grad():
        assert torch.allclose(model(image), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (50, 77), (20, 20), (65, 130), (8, 8)])
def test_any_size_is_predicted(size: tuple[int, int]) -> None:
    with torch.no_grad():
        logits = small().eval()(torch.randn(1, 3, *size))
    assert logits.shape == (1, 5, *size)
    assert torch.isfinite(logits).all()


def test_a_forward_is_five_calls_whatever_the_size() -> None:
    """As many calls of each part on every rank, because ZeRO-3 gathers their parameters together."""
    model = small().eval()
    calls: list[str] = []
    for name in ("backbone", "decoder", "attention"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    for size in ((64, 64), (32, 64), (128, 192)):
        calls.clear()
        with torch.no_grad():
            model(torch.zeros(1, 3, *size))
        assert calls == ["backbone", "decoder", "attention", "backbone", "decoder"]


def test_the_attention_has_the_published_number_of_parameters() -> None:
    attention = build_decoder("segformer", (64, 128, 320, 512), (4, 8, 16, 32), 19, {"width": 256})
    assert sum(p.numel() for p in attention.parameters()) == 530_707


def test_what_does_not_fit_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"hrda\.attention has stride 4, model\.decoder 8"):
        small("deeplabv2", "segformer")
    with pytest.raises(ConfigError, match=r"data\.crop=64x72.*multiples of 16"):
        small(window=(64, 72))
    with pytest.raises(ConfigError, match=r"hrda\.attention=segfrmer"):
        small(attention="segfrmer")
