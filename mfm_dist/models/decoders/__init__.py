"""Decoders, one file each; the folder is the registry.

A decoder file ``<name>.py`` has ``build(channels, strides, num_classes, *, option=default, ...)``. What it returns
is an ``nn.Module`` with two attributes, ``inputs`` (indices of the encoder maps it reads, which are the maps that the
Rebuilder rebuilds) and ``stride`` (image pixels for each logit), called with the list of *all* encoder maps.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from pkgutil import iter_modules

from torch import nn

from mfm_dist.errors import ConfigError

WIDEST = 1 << 16
"""Channels."""


def decoder_names() -> list[str]:
    """List every value that ``model.decoder`` can take: the names of the files of this folder."""
    return sorted(module.name for module in iter_modules(__path__))


def build_decoder(
    name: str,
    channels: Sequence[int],
    strides: Sequence[float],
    num_classes: int,
    options: Mapping[str, object] | None = None,
) -> nn.Module:
    """Build ``mfm_dist/models/decoders/<name>.py``.

    Args:
        channels: channels of all encoder maps, fine to coarse.
        strides: image pixels for each position of these maps.
        num_classes: channels of the logits.
        options: further arguments of the file's ``build``, by name.

    Raises:
        ConfigError: no such decoder, an option it does not have, or a value it cannot use.
    """
    names = decoder_names()
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ConfigError(f"model.decoder: no decoder is called {name!r}; there are {', '.join(names)}.{hint}")
    build = import_module(f"{__name__}.{name}").build
    options = dict(options or {})
    parameters = inspect.signature(build).parameters.values()
    allowed = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    unknown = [option for option in options if option not in allowed]
    if unknown:
        raise ConfigError(
            f"model.decoder_options: decoder {name!r} has no option {', '.join(map(repr, unknown))}; "
            f"it has {', '.join(allowed)}"
        )
    try:
        return build(channels, strides, num_classes, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.decoder_options: decoder {name!r} cannot use {options}: {error}") from error


def number_problems(
    decoder: str, *, width: int = 1, dropout: float = 0.0, dilations: Sequence[int] = (1,)
) -> list[str]:
    """List what is out of its range among the numbers that several decoders have."""
    problems = []
    if not 1 <= width <= WIDEST:
        problems.append(f"decoder {decoder}: width must be at least 1 and at most {WIDEST:,}, got {width}")
    if not 0 <= dropout < 1:
        problems.append(f"decoder {decoder}: dropout must lie in [0, 1), got {dropout}")
    if not dilations or min(dilations) < 1:
        problems.append(f"decoder {decoder}: dilations must be positive integers, at least one; got {dilations}")
    return problems
