"""YAML files and ``section.key=value`` overrides into a checked ``RunConfig``, and back into YAML.

Precedence: default < YAML < override. Every problem of a configuration is reported at once.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from mfm_dist.config.schema import RunConfig
from mfm_dist.config.validate import problems as problems_of
from mfm_dist.errors import ConfigError

Config = TypeVar("Config")


def load_config(path: Path | Sequence[Path] | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read files (defaults only if None), later ones win; apply ``section.key=value`` overrides, check everything.

    Raises:
        ConfigError: with every unknown key, wrong type, value out of range and contradiction found.
    """
    tree: dict[str, Any] = {}
    origin: dict[str, str] = {}
    problems: list[str] = []
    for file in [path] if isinstance(path, Path) else path or ():
        for key, value in flatten(read_yaml(file)).items():
            problems.extend(_put(tree, key.split("."), value, key))
            origin[key] = str(file)
    for override in overrides:
        key, found, text = override.partition("=")
        if not found or not key:
            problems.append(f"override {override!r}: expected section.key=value")
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            problems.append(f"override {override!r}: {text!r} is not a YAML value; quote it")
            continue
        problems.extend(_put(tree, key.split("."), value, override))
        origin[key] = "command line"
    config = from_tree(RunConfig, tree, problems, origin)
    if not problems:
        problems.extend(problems_of(config))
    if problems:
        raise ConfigError(problems)
    return config


def from_tree(
    kind: type[Config], tree: Mapping[str, Any], problems: list[str], origin: Mapping[str, str], prefix: str = ""
) -> Config:
    """Build dataclass ``kind`` from nested mappings, appending what is wrong to ``problems``."""
    hints = get_type_hints(kind)
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        where = _where(path, origin)
        if name not in names:
            problems.append(f"unknown key {path!r}{where}{_suggestion(str(name), names, prefix)}")
        elif is_dataclass(hints[name]):
            if value is None:
                continue
            if isinstance(value, Mapping):
                values[name] = from_tree(hints[name], value, problems, origin, f"{path}.")
            else:
                keys = ", ".join(f.name for f in fields(hints[name]))
                problems.append(f"{path}: expected a section with keys {keys}, got {value!r}{where}")
        else:
            try:
                values[name] = _convert(value, hints[name])
            except (TypeError, ValueError):
                near = _nearest_choice(value, hints[name])
                problems.append(f"{path}: expected {_type_name(hints[name])}, got {value!r}{where}{near}")
    return kind(**values)


def to_tree(config: Any) -> dict[str, Any]:
    """A dataclass as nested plain dictionaries that YAML can hold."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(config)}


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML text that ``load_config`` reads back to an equal one."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, default_flow_style=None, width=110)


def describe(kind: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """One line a field: key, default and meaning. Read from the schema's source, so it is never out of date."""
    documents = _field_documents(kind)
    default = kind()
    hints = get_type_hints(kind)
    for f in fields(kind):
        if is_dataclass(hints[f.name]):
            yield from describe(hints[f.name], f"{prefix}{f.name}.")
        else:
            value = _plain(getattr(default, f.name))
            yield f"{prefix}{f.name}={value}  [{_type_name(hints[f.name])}]\n      {documents[f.name]}"


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML (or JSON) file holds. Raises ConfigError: there is no such file, or it is none."""
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        there = f"; there are: {', '.join(near)}" if near else ""
        raise ConfigError(f"{path}: no such configuration file{there}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as 'train:', got {tree!r}")
    return tree


def _leaf_paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaf_paths(value, f"{prefix}{name}.")
        yield f"{prefix}{name}"


def _put(tree: dict[str, Any], keys: list[str], value: Any, override: str) -> list[str]:
    """Set one dotted key, making the sections on its way. Returns what is wrong."""
    for depth, key in enumerate(keys[:-1], 1):
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            return [f"override {override!r}: {'.'.join(keys[:depth])} is a value, not a section"]
    tree[keys[-1]] = value
    return []


def _where(path: str, origin: Mapping[str, str]) -> str:
    return f" ({origin[path]})" if path in origin else ""


def _suggestion(name: str, names: Sequence[str], prefix: str) -> str:
    elsewhere = [key for key in _all_keys(RunConfig) if key.split(".")[-1] == name]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if elsewhere or near:
        return f": did you mean {(elsewhere or [prefix + near[0]])[0]!r}?"
    return f": allowed are {', '.join(prefix + n for n in names)}"


def _nearest_choice(value: Any, hint: Any) -> str:
    """For a misspelt word among a fixed few, the one that was probably meant."""
    if get_origin(hint) is tuple:
        parts = value if isinstance(value, list) else [value]
        return next((near for part in parts if (near := _nearest_choice(part, get_args(hint)[0]))), "")
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if value in choices:
        return ""
    found = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f": did you mean {found[0]!r}?" if found else ""


def _all_keys(kind: type, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            yield from _all_keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}"


def _convert(value: Any, hint: Any) -> Any:
    """``value`` as type ``hint``.

    Raises:
        TypeError, ValueError: if it is of another kind. YAML reads 6e-5 as text, so a float field takes text that
            is a number; it reads `no` as False, so a text field does not take a bool.
    """
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        return None if value is None else _convert(value, options[0])
    if origin is Literal:
        if value not in get_args(hint):
            raise ValueError
        return value
    if origin is tuple and get_args(hint)[-1] is Ellipsis:
        parts = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(part, get_args(hint)[0]) for part in parts)
    if origin is tuple:
        return _convert_tuple(value, get_args(hint))
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise TypeError
        return dict(value)
    if hint is float:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not hint:
        raise TypeError
    return value


def _convert_tuple(value: Any, hints: tuple[Any, ...]) -> tuple[Any, ...]:
    """A pair from a list, from text such as 128x256, or from one number meant for both places."""
    if isinstance(value, str) and "x" in value:
        value = [int(part) for part in value.split("x")]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        value = [value] * len(hints)
    if not isinstance(value, list | tuple) or len(value) != len(hints):
        raise TypeError
    return tuple(_convert(part, hint) for part, hint in zip(value, hints, strict=True))


def _type_name(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if o is type(None) else _type_name(o) for o in get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if origin is tuple and get_args(hint)[-1] is Ellipsis:
        return f"a list, each {_type_name(get_args(hint)[0])}"
    if origin is tuple:
        return f"{len(get_args(hint))} x {_type_name(get_args(hint)[0])}"
    if origin is dict:
        return "a mapping"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}[hint]


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_tree(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return list(value)
    return value


def _field_documents(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, by field name."""
    body = ast.parse(inspect.getsource(kind)).body[0].body  # type: ignore[attr-defined]
    documents = {}
    for statement, following in pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            documents[statement.target.id] = ast.literal_eval(following.value)  # type: ignore[union-attr]
    return documents


def changed_keys(before: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Lines ``key: old -> new`` for what differs between a stored configuration and this one, but for the folder."""
    old, new = flatten(before), flatten(to_tree(config))
    keys = [key for key in dict.fromkeys((*old, *new)) if key != "run.folder" and old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
