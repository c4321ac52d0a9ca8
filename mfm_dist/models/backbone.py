"""Encoders: any timm model that offers feature maps, behind one interface."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from timm.models._features import FeatureGetterNet  # timm.models has the other wrappers, and not this one
from torch import Tensor, nn

from mfm_dist.config.shipped import find_shipped
from mfm_dist.errors import ConfigError
from mfm_dist.models.dropout import replace_drop_path

MIT_OPTIONS: Mapping[str, object] = {"mlp_ratios": (4, 4, 4, 4), "drop_path_rate": 0.1}
"""What turns timm's PVTv2 into SegFormer's Mix Transformer (MiT), with the drop-path rate that DAFormer trains with."""

OWN_ARGUMENTS = {
    "features_only",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "in_chans",
    "num_classes",
}
"""Arguments of ``timm.create_model`` that ``Backbone`` sets by itself, or that follow from RGB images."""

WRAPPER_OPTIONS = {"out_indices", "feature_cls"}
"""Options of timm's feature wrapper, which the plain model does not have."""

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""Where timm's weights are in a repository of the Hugging Face Hub, in the order that timm tries."""
HUB_SECONDS = 10.0
"""To wait for the hub's answer."""


class Backbone(nn.Module):
    """An encoder that turns an image into feature maps, fine to coarse.

    ==========================  ===================================================================================
    name                        is
    ==========================  ===================================================================================
    mit_b0 ... mit_b5           timm pvt_v2_b0 ... b5 with ``MIT_OPTIONS``: the encoder of DAFormer, HRDA and MIC
    resnet101c, resnet50c       DeepLab's encoder, given the options output_stride=8, out_indices=(1, 2, 3, 4)
    any other                   the timm model of that name, untouched
    ==========================  ===================================================================================

    A plain vision transformer (ViT, DINOv2 and their like) has maps of one stride, of its patches alone: class and
    register tokens are left out. The option pyramid=true takes its last one, of which decoders make four at a quarter
    to twice the stride (``SimplePyramid``). Positions are made for one image size: dynamic_img_size=true interpolates
    them for others. DINOv2 has patches of 14 pixels: patch_size=16 resamples its weights. All maps of DINOv2 and
    DINOv3 go through the final LayerNorm, as where they are published for dense tasks. Swin takes other sizes than
    img_size with strict_img_size=false.

    Args:
        name: one of the above; ``timm.list_models()`` lists the rest.
        pretrained: fetch timm's own weights (needs a network or a filled cache; there are none for MiT).
        weights: a local file instead, safetensors or torch, in timm's names or those of the original release (such
            as SegFormer's ``mit_b5.pth``). A classifier in it is left out. Pickled code is never run.
        options: ``pyramid``, and further arguments of ``timm.create_model``, which win over ``MIT_OPTIONS``.

    Attributes:
        channels: channels of each map, fine to coarse.
        strides: image pixels for each position of each map; odd sizes round up.
        multiple: sides of an image must be multiples of so many pixels, a patch; 1 where any will do.
        pyramid: whether decoders make a pyramid of the last map, which is the only one then.
        frozen: whether the encoder keeps its weights (``freeze``).

    Raises:
        ConfigError: an unknown name, a model without feature maps, a wrong option, weights that cannot be used.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        weights: Path | None = None,
        options: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        architecture, arguments = _resolve(name, dict(options or {}))
        pyramid = arguments.pop("pyramid", False)
        if not isinstance(pyramid, bool):
            raise ConfigError(f"model.backbone_options: pyramid must be true or false, got {pyramid!r}")
        if pretrained and weights is not None:
            raise ConfigError(f"model.pretrained is true and model.weights is {weights}: choose one of them")
        if pretrained and (problem := pretrained_problem(name)):  # timm would try five times, and print each
            raise ConfigError(problem)
        if pyramid:
            arguments.setdefault("out_indices", 1)  # the last map alone
        state = None if weights is None else _read_weights(Path(weights))
        wrapper = {"feature_cls": partial(FeatureGetterNet, norm=True)} if re.search("dinov[23]", architecture) else {}
        try:
            net = timm.create_model(architecture, features_only=True, pretrained=pretrained, **wrapper, **arguments)
            if state is not None:
                _load(net, architecture, arguments, state)
        except ConfigError:
            raise
        except Exception as error:  # timm raises nearly every kind
            raise ConfigError(_explain(architecture, arguments, error, weights=weights, state=state)) from error
        replace_drop_path(net)
        self.net = net
        self.channels: tuple[int, ...] = tuple(net.feature_info.channels())
        self.strides: tuple[int, ...] = tuple(net.feature_info.reduction())
        # Swin and its like compute in [B, H, W, C]; the purely convolutional families do not even say.
        self._channels_come_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
        if isinstance(net, FeatureGetterNet):
            # timm's wrapper calls this method past the model's own call, in which alone ZeRO-3 gathers the parameters
            # that the model holds itself: class token and positions. A bound method: a copy gets one of its own.
            net.model.forward = net.model.forward_intermediates
        is_plain = isinstance(net, FeatureGetterNet) and len(set(self.strides)) == 1
        self.multiple = self.strides[0] if is_plain else 1
        self.pyramid = pyramid
        self.frozen = False
        if pyramid:
            self.channels, self.strides = self.channels[-1:], self.strides[-1:]

    def freeze(self) -> None:
        """Keep all weights as they are from now on, and compute as in evaluation, without drop-path."""
        self.frozen = True
        self.net.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode, but leave a frozen encoder in evaluation: BatchNorm statistics stay, too."""
        super().train(mode)
        if self.frozen:
            self.net.eval()
        return self

    def forward(self, image: Tensor) -> list[Tensor]:
        """Turn a normalised image [B, 3, H, W] into maps, the i-th [B, channels[i], H / strides[i], W / strides[i]]."""
        if isinstance(self.net, FeatureGetterNet):
            net = self.net
            options = {"indices": net.out_indices, "norm": net.norm, "output_fmt": net.output_fmt}
            maps = net.model(image, **options, intermediates_only=True)
        else:
            maps = self.net(image)
        if self._channels_come_last:
            maps = [feature.permute(0, 3, 1, 2).contiguous() for feature in maps]
        return maps[-1:] if self.pyramid else maps


def pretrained_problem(name: str) -> str | None:
    """Say in one line why timm's weights for a model cannot be had from here; None where they can. Nothing is fetched.

    The Hugging Face Hub is asked once, for seconds at most, and not at all about what is in its cache.

    Raises:
        ConfigError: an unknown name.
    """
    architecture, _ = _resolve(name, {})
    if name != architecture or not timm.is_model_pretrained(architecture):
        return _without_weights(name, architecture)
    repository = timm.models.get_pretrained_cfg(architecture).hf_hub_id
    if repository is None or any(isinstance(try_to_load_from_cache(repository, file), str) for file in HUB_FILES):
        return None
    try:
        get_hf_file_metadata(hf_hub_url(repository, HUB_FILES[0]), timeout=HUB_SECONDS)
    except EntryNotFoundError:  # the hub has answered; timm knows other names
        return None
    except Exception as error:  # whatever stands between here and the hub
        return _not_fetched(architecture, error)
    return None


def _without_weights(name: str, architecture: str) -> str:
    other = f", or train model.backbone={architecture}, which is PVTv2 with weights of its own"
    return (
        f"model.pretrained: timm has no weights for {name!r}. Give a file with model.weights=PATH"
        f"{other if name != architecture else ', or start from random weights with model.pretrained=false'}"
    )


def _not_fetched(architecture: str, error: Exception) -> str:
    return (
        f"model.pretrained: timm's weights for {architecture!r} could not be fetched ({_brief(error)}). "
        "Without a network, copy the file here and give model.weights=PATH (safetensors or .pth), or start "
        "from random weights with model.pretrained=false"
    )


def build_classifier(name: str, num_classes: int) -> nn.Module:
    """Build the image classifier [B, 3, H, W] -> [B, num_classes] whose encoder ``Backbone(name)`` is; random weights.

    Its state dict is what ``Backbone(weights=...)`` reads, so this is the net to pre-train.

    Raises:
        ConfigError: an unknown name.
    """
    architecture, arguments = _resolve(name, {})
    return timm.create_model(architecture, num_classes=num_classes, **arguments)


def _resolve(name: str, options: dict[str, object]) -> tuple[str, dict[str, object]]:
    """Return the timm name and all arguments behind a name of ours."""
    reserved = sorted(OWN_ARGUMENTS & set(options))
    if reserved:
        raise ConfigError(
            f"model.backbone_options may not set {', '.join(reserved)}: images are RGB, and weights come by "
            "model.pretrained or model.weights"
        )
    if problems := list(_option_problems(options)):
        raise ConfigError([f"model.backbone_options: {problem}" for problem in problems])
    if re.fullmatch("mit_b[0-5]", name):
        return name.replace("mit", "pvt_v2"), {**MIT_OPTIONS, **options}
    if not timm.is_model(name):
        known = [f"mit_b{size}" for size in range(6)] + timm.list_models()
        nearest = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        hint = f"; the nearest are {', '.join(nearest)}" if nearest else ""
        raise ConfigError(
            f"model.backbone: timm {timm.__version__} has no model called {name!r}{hint}. timm.list_models() lists all"
        )
    return name, options


def _option_problems(options: Mapping[str, object]) -> Iterator[str]:
    """Find values that timm takes without a word and that fail, or mean something else, later."""
    for name, value in options.items():
        if name.endswith("_rate") and isinstance(value, int | float) and not 0 <= value < 1:
            yield f"{name}={value}: must be at least 0 and below 1"
    indices = options.get("out_indices")
    if isinstance(indices, list | tuple):
        whole = [index for index in indices if type(index) is int and index >= 0]
        if not whole or len(whole) < len(indices) or sorted(set(whole)) != whole:
            yield f"out_indices={str(indices)[:80]}: must be numbers of stages from 0 on, at least one, in rising order"


def _load(net: nn.Module, architecture: str, options: Mapping[str, object], state: dict[str, Tensor]) -> None:
    """Copy a weights file into timm's feature wrapper; raises whatever timm and torch raise when it does not fit.

    The file goes into the plain model first. Only there does timm translate the names of the original release and
    check every key; behind the wrapper, which drops layers, it would accept a file from which nothing fits.
    """
    heads = timm.models.get_pretrained_cfg(architecture).classifier or ()
    names = [f"{head}.weight" for head in ([heads] if isinstance(heads, str) else heads)]
    plain_options = {key: value for key, value in options.items() if key not in WRAPPER_OPTIONS}
    plain_options["num_classes"] = next((len(state[name]) for name in names if name in state), 0)
    # Were a classifier named here, timm would allow for a different one by not checking any key.
    overlay = {"state_dict": state, "classifier": None}
    plain = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay, **plain_options)
    # The wrappers rename stages.0 to stages_0, or put a prefix in front.
    tensors = {name.replace(".", "_"): value for name, value in plain.state_dict().items()}
    bare_name = {name: name.removeprefix("model.").removeprefix("body.") for name in net.state_dict()}
    net.load_state_dict({name: tensors[bare.replace(".", "_")] for name, bare in bare_name.items()})


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file by name. Never unpickle anything but tensors and plain containers."""
    path = find_shipped(path)
    if not path.is_file():
        raise ConfigError(
            f"model.weights: there is no file {path}; tools/convert_weights.py makes one of published weights"
        )
    try:
        content: object
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(
            f"model.weights: {path} cannot be read as safetensors or as a torch file that holds tensors only "
            f"({_brief(error)}). A file with other objects is not opened, because that can run code"
        ) from error
    for wrapper in ("state_dict", "model"):  # where training scripts keep the weights
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ConfigError(f"model.weights: {path} holds no state dict (names and tensors)")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _builds(architecture: str, **options: object) -> bool:
    """Tell whether timm accepts this at all, weights aside."""
    try:
        timm.create_model(architecture, **options)
    except Exception:
        return False
    return True


def _explain(
    architecture: str,
    options: dict[str, object],
    error: Exception,
    *,
    weights: Path | None,
    state: Mapping[str, Tensor] | None,
) -> str:
    """Say why timm refused. Its own messages often name no cause, so find it by leaving things out."""
    if _builds(architecture, features_only=True, **options):
        if state is not None:
            chosen = f" with {options}" if options else ""
            names = [name for name, tensor in state.items() if tensor.is_floating_point()]
            return (
                f"model.weights: {weights} does not fit timm's {architecture!r}{chosen}; the file holds "
                f"{', '.join(names[:3])} and {len(names[3:])} more. {_brief(error)}"
            )
        return _not_fetched(architecture, error)
    if _builds(architecture, features_only=True):
        rest = {key: {k: v for k, v in options.items() if k != key} for key in options}
        guilty = [key for key in options if _builds(architecture, features_only=True, **rest[key])] or list(options)
        named = ", ".join(f"{key}={options[key]!r}" for key in guilty)
        return f"model.backbone_options: timm's {architecture!r} does not accept {named} ({_brief(error)})"
    if _builds(architecture):
        return (
            f"model.backbone: timm's {architecture!r} offers no feature maps (features_only): {_brief(error)}. "
            "Choose another model"
        )
    return f"model.backbone: timm cannot build {architecture!r}: {_brief(error)}"


def _brief(error: Exception) -> str:
    """Return an error's kind and the first lines of its message, long ones cut: enough for a few keys of each kind."""
    lines = [textwrap.shorten(line, 240, placeholder=" ...") for line in str(error).splitlines() if line.strip()]
    return " ".join([f"{type(error).__name__}:", *lines[:4]]) if lines else type(error).__name__
