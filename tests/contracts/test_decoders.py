"""What every decoder must do; a new file in the folder is tested here before it has tests of its own."""

from __future__ import annotations

import copy
import inspect
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mfm_dist.models.decoders as folder
from mfm_dist.errors import ConfigError
from mfm_dist.models.decoders import build_decoder, decoder_names

NAMES = sorted(path.stem for path in Path(folder.__file__).parent.glob("*.py") if path.stem != "__init__")
CHANNELS, STRIDES, NUM_CLASSES = (6, 8, 10, 12), (4, 8, 16, 32), 7


def features(rows: int, cols: int, batch: int = 2) -> list[Tensor]:
    """Encoder maps of a rows x cols image; odd sizes round up, as in every encoder."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, channels, -(-rows // stride), -(-cols // stride), generator=generator)
        for channels, stride in zip(CHANNELS, STRIDES, strict=True)
    ]


@pytest.fixture(params=NAMES)
def decoder(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return build_decoder(request.param, CHANNELS, STRIDES, NUM_CLASSES)


def test_the_folder_is_the_registry() -> None:
    assert decoder_names() == NAMES
    assert {"daformer", "deeplabv2"} <= set(NAMES)


@pytest.mark.parametrize(("rows", "cols"), [(64, 128), (96, 96), (65, 129)])
def test_logits_have_the_promised_shape(decoder: nn.Module, rows: int, cols: int) -> None:
    logits = decoder(features(rows, cols))
    assert logits.shape == (2, NUM_CLASSES, -(-rows // decoder.stride), -(-cols // decoder.stride))
    assert logits.isfinite().all()


def test_inputs_are_exactly_the_maps_that_are_read(decoder: nn.Module) -> None:
    decoder.eval()
    maps = features(64, 64)
    logits = decoder(maps)
    assert decoder.inputs == tuple(sorted(set(decoder.inputs)))
    for index in range(len(maps)):
        changed = [feature + 1 if i == index else feature for i, feature in enumerate(maps)]
        assert torch.equal(decoder(changed), logits) == (index not in decoder.inputs)


def test_gradients_reach_every_parameter_and_every_input(decoder: nn.Module) -> None:
    maps = [feature.requires_grad_() for feature in features(64, 64)]
    decoder(maps).square().mean().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    for index in decoder.inputs:
        assert maps[index].grad is not None
        assert maps[index].grad.any()


def test_features_are_left_alone(decoder: nn.Module) -> None:
    maps = features(64, 64)
    before = copy.deepcopy(maps)
    decoder(maps)
    assert all(torch.equal(a, b) for a, b in zip(maps, before, strict=True))


def test_evaluation_treats_images_one_by_one(decoder: nn.Module) -> None:
    decoder.eval()
    maps = features(64, 64)
    alone = decoder([feature[:1] for feature in maps])
    torch.testing.assert_close(decoder(maps)[:1], alone)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_weights(name: str) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_decoder(name, CHANNELS, STRIDES, NUM_CLASSES).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_named_together_with_the_allowed_ones(name: str) -> None:
    build = import_module(f"{folder.__name__}.{name}").build
    allowed = [p.name for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY]
    with pytest.raises(ConfigError) as caught:
        build_decoder(name, CHANNELS, STRIDES, NUM_CLASSES, {"nonsense": 1})
    assert "'nonsense'" in str(caught.value)
    assert all(option in str(caught.value) for option in allowed)


@pytest.mark.parametrize("name", NAMES)
def test_a_value_of_the_wrong_type_is_a_config_error(name: str) -> None:
    build = import_module(f"{folder.__name__}.{name}").build
    for parameter in inspect.signature(build).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            with pytest.raises(ConfigError, match=name):
                build_decoder(name, CHANNELS, STRIDES, NUM_CLASSES, {parameter.name: "text"})


def test_an_unknown_name_lists_all_and_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        build_decoder("daformr", CHANNELS, STRIDES, NUM_CLASSES)
    assert "Did you mean 'daformer'?" in str(caught.value)
    assert all(name in str(caught.value) for name in NAMES)
    with pytest.raises(ConfigError, match="there are"):
        build_decoder("../backbone", CHANNELS, STRIDES, NUM_CLASSES)
