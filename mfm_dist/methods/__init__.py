"""UDA methods. ``method.name: dacs`` is the file dacs.py here: adding a method is adding a file with ``build``."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from mfm_dist.config.schema import RunConfig
from mfm_dist.errors import ConfigError
from mfm_dist.methods.base import Method


def method_names() -> list[str]:
    """Return the names that ``method.name`` may take: the files of this folder that have a ``build``."""
    modules = [module.name for module in pkgutil.iter_modules(__path__)]
    return [name for name in modules if hasattr(importlib.import_module(f"{__name__}.{name}"), "build")]


def build_method(config: RunConfig) -> Method:
    """Build the method that ``config.method.name`` asks for.

    Raises:
        ConfigError: if there is no such method; names those that exist.
    """
    name = config.method.name
    names = method_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"method.name={name!r}: no such method{hint} There are: {', '.join(names)}")
    method: Method = importlib.import_module(f"{__name__}.{name}").build(config)
    return method
