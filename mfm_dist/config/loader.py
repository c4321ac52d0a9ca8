"""YAML files and ``section.key=value`` overrides into a checked ``RunConfig``, and back into YAML.

Precedence: default < ``rebuilder.variant`` < first file < later files < overrides. Sections are laid over one another
key by key; the value of a key is replaced as a whole, also where it is a mapping (``model.backbone_options``). Only an
override that names one entry of such a mapping (``model.backbone_options.output_stride=8``) keeps the others. All
problems are told at once.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import re
import reprlib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mfm_dist.config.schema import RunConfig
from mfm_dist.config.shipped import find_shipped
from mfm_dist.config.validate import problems as problems_of
from mfm_dist.config.validate import range_of
from mfm_dist.config.variants import VARIANTS
from mfm_dist.config.yaml_text import DEEPEST, LARGEST_TEXT, dump_yaml, parse_yaml
from mfm_dist.errors import ConfigError, CorruptFileError
from mfm_dist.storage import read_text

Config = TypeVar("Config")
YAML_WORDS = "; YAML reads on, yes, off and no as true and false, and digits as a number: in quotes they are text"


LONGEST_KEY = 80
"""Characters of a key, or of a value, that a message shows."""


def shown(value: Any) -> str:
    """Write a value as a message shows it: long ones cut."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = LONGEST_KEY
    return short.repr(value)


def load_config(path: Path | Sequence[Path] | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read one file or several (None: the defaults), apply ``section.key=value`` overrides, check everything.

    Raises:
        ConfigError: with every unknown key, wrong type, value out of range and contradiction found, and where each
            was said.
    """
    config = RunConfig()
    problems: dict[str, str] = {}
    origins: dict[str, str] = {}
    trees: list[tuple[dict[str, Any], str]] = []
    sources: list[Path | str] = [path] if isinstance(path, Path) else [*(path or ())]
    for source in [*sources, *overrides]:
        origin = str(source) if isinstance(source, Path) else "command line"
        try:
            tree = read_yaml(find_shipped(source)) if isinstance(source, Path) else _read_override(source, config)
        except ConfigError as error:
            problems[str(source)] = error.problems[0]
            continue
        config = from_tree(RunConfig, tree, problems, base=config, origin=origin)
        origins |= dict.fromkeys(flatten(tree), origin)
        trees.append((tree, origin))
    if variant := VARIANTS[config.rebuilder.variant]:  # once more, over what the variant says
        config = from_tree(RunConfig, variant, {})
        for tree, origin in trees:
            config = from_tree(RunConfig, tree, {}, base=config, origin=origin)
    if found := list(problems.values()) or [_with_origin(problem, origins) for problem in problems_of(config)]:
        raise ConfigError(found)
    return config


def from_tree(
    kind: type[Config],
    tree: Mapping[str, Any],
    problems: dict[str, str],
    *,
    base: Config | None = None,
    origin: str = "",
    prefix: str = "",
) -> Config:
    """Build dataclass ``kind`` from nested mappings; keys that are not there are as in ``base``, or the default.

    What is wrong is added to ``problems`` by key, and goes from there again when a later tree has the key right.
    """
    hints = get_type_hints(kind)
    where = f" ({origin})" if origin else ""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{str(name)[:LONGEST_KEY]}"
        if name not in hints:
            problems[path] = f"unknown key {path!r}{where}{_suggestion(name, value, hints, prefix)}"
        elif is_dataclass(hints[name]):
            if isinstance(value, Mapping):
                below, keys = getattr(base, name, None), f"{path}."
                values[name] = from_tree(hints[name], value, problems, base=below, origin=origin, prefix=keys)
            elif value is not None:
                keys = ", ".join(get_type_hints(hints[name]))
                problems[path] = f"{path}: expected a section with keys {keys}, got {shown(value)}{where}"
        else:
            try:
                values[name] = _convert(value, hints[name])
                problems.pop(path, None)
            except (TypeError, ValueError, OverflowError):
                near = _nearest_choice(value, hints[name])
                problems[path] = f"{path}: expected {_type_name(hints[name])}, got {shown(value)}{where}{near}"
    return kind(**values) if base is None else replace(base, **values)  # type: ignore[type-var]


def to_tree(config: Any) -> dict[str, Any]:
    """Turn a dataclass into nested plain dictionaries that YAML can hold."""
    return asdict(config, dict_factory=lambda items: {name: _plain(value) for name, value in items})


def dump_config(config: RunConfig) -> str:
    """Write the whole configuration as YAML text that ``load_config`` reads back to an equal one."""
    return dump_yaml(to_tree(config))


def describe(kind: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Give for each field its key, default, type, range and meaning, read from the schema itself."""
    documents = _field_documents(kind)
    default = to_tree(kind())
    ranges = {name: range_of(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            yield from describe(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            must = f", must {allowed.rule}" if (allowed := ranges[name]) else ""
            yield f"{prefix}{name}={default[name]}  [{_type_name(hint)}{must}]\n      {documents[name]}"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML (or JSON) file. Raises ConfigError: there is no such file, or no mapping in it."""
    if not path.is_file():
        near = sorted(str(path.parent / file.name) for file in find_shipped(path.parent).glob("*.yaml"))
        there = f"; there are: {', '.join(near)}" if near else ""
        raise ConfigError(f"{path}: no such configuration file{there}")
    try:
        tree = parse_yaml(read_text(path, LARGEST_TEXT))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    except (OSError, CorruptFileError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as 'train:', got {shown(tree)}")
    return tree


def _read_override(override: str, config: RunConfig) -> dict[str, Any]:
    """Read ``section.key=value`` into the tree that sets it. Raises ConfigError: it is none."""
    key, found, text = override.partition("=")
    if not found or not key or key.count(".") > DEEPEST:
        raise ConfigError(f"override {shown(override)}: expected section.key=value")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        reason = f"{shown(text)} is not a YAML value ({error}); quote it"
        raise ConfigError(f"override {shown(override)}: {reason}") from None
    return dict(_nested(key.split("."), value, config))


def _nested(keys: Sequence[str], value: Any, there: Any) -> Any:
    """Make the tree that sets one dotted key; a mapping that is ``there`` in its way keeps its other entries."""
    if not keys:
        return value
    if isinstance(there, Mapping):
        return {**there, keys[0]: _nested(keys[1:], value, there.get(keys[0]))}
    return {keys[0]: _nested(keys[1:], value, getattr(there, keys[0], None))}


def _with_origin(problem: str, origins: Mapping[str, str]) -> str:
    """Add where the keys that a problem names were set."""
    said = dict.fromkeys(origins[key] for key in re.findall(r"[\w.]+", problem) if key in origins)
    return problem + (f" ({', '.join(said)})" if said else "")


def _suggestion(name: Any, value: Any, hints: Mapping[str, Any], prefix: str) -> str:
    """Name the key that was probably meant, or all there are.

    The first of: a key of this name elsewhere; one here with a like name, or a word of it, that takes the value; the
    only one here that has the value among its choices, or the only section with these keys; one with a like name.
    """
    text = str(name)[:LONGEST_KEY]
    likeness = {key: difflib.SequenceMatcher(None, text, key).ratio() for key in hints}
    ranked = sorted(hints, key=likeness.__getitem__, reverse=True)
    near = [key for key in ranked if likeness[key] >= 0.5 or set(text.split("_")) & set(key.split("_"))]
    choices = [key for key, hint in hints.items() if is_dataclass(hint) or get_origin(hint) is Literal]
    only = [key for key in choices if _takes(hints[key], value)]
    here = [key for key in near if _takes(hints[key], value)] + (only if len(only) == 1 else []) + near
    meant = [key for key in _all_keys(RunConfig) if key.split(".")[-1] == text] + [prefix + key for key in here]
    allowed = f": did you mean {meant[0]!r}?" if meant else f": allowed are {', '.join(prefix + key for key in hints)}"
    return allowed if isinstance(name, str) else allowed + YAML_WORDS


def _takes(hint: Any, value: Any) -> bool:
    """Tell whether a field, or a section with at least one of these keys, could have this value."""
    if is_dataclass(hint):
        return isinstance(value, Mapping) and bool(value.keys() & get_type_hints(hint).keys())
    try:
        _convert(value, hint)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _nearest_choice(value: Any, hint: Any) -> str:
    """Suggest for a misspelt word the one of a fixed few that was probably meant."""
    if get_origin(hint) is tuple:
        parts = value if isinstance(value, list) else [value]
        return next((near for part in parts if (near := _nearest_choice(part, get_args(hint)[0]))), "")
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if value in choices:
        return ""
    found = difflib.get_close_matches(str(value)[:LONGEST_KEY], [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f": did you mean {found[0]!r}?" if found else ""


def _all_keys(kind: type, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            yield from _all_keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}"


def _convert(value: Any, hint: Any) -> Any:
    """Convert ``value`` to type ``hint``.

    Raises:
        TypeError, ValueError: if it is of another kind. YAML reads 6e-5 as text, so a float field takes text that
            is a number; it reads `no` as False, so a text field does not take a bool.
    """
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        return None if value is None else _convert(value, options[0])
    if origin is Literal and value in get_args(hint):
        return value
    if origin is tuple:
        return _convert_tuple(value, get_args(hint))
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise TypeError
        return dict(value)
    if hint is float:
        if isinstance(value, bool) or not math.isfinite(float(value)):
            raise ValueError
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not hint:
        raise TypeError
    return value


def _convert_tuple(value: Any, hints: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make a tuple of a list, of text such as 128x256, or of one value meant for every place."""
    length = None if hints[-1] is Ellipsis else len(hints)
    if length and isinstance(value, str) and "x" in value:
        value = [int(part) for part in value.split("x")]
    elif not isinstance(value, list | tuple):
        value = [value] * (length or 1)
    if length and len(value) != length:
        raise TypeError
    return tuple(_convert(part, hints[0]) for part in value)


def _type_name(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if o is type(None) else _type_name(o) for o in get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if origin is tuple:
        of = _type_name(get_args(hint)[0])
        return f"a list, each {of}" if get_args(hint)[-1] is Ellipsis else f"{len(get_args(hint))} x {of}"
    if origin is dict:
        return "a mapping"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}[hint]


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return list(value)
    return value


def _field_documents(kind: type) -> dict[str, str]:
    """Read the docstring under each field of a dataclass, by field name."""
    body = ast.parse(inspect.getsource(kind)).body[0].body  # type: ignore[attr-defined]
    documents = {}
    for statement, following in pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            documents[statement.target.id] = ast.literal_eval(following.value)  # type: ignore[union-attr]
    return documents


def changed_keys(before: Mapping[str, Any], config: RunConfig) -> list[str]:
    """List as ``key: old -> new`` what differs between a stored configuration and this one, but for the folder."""
    old, new = flatten(before), flatten(to_tree(config))
    keys = [key for key in dict.fromkeys((*old, *new)) if key != "run.folder" and old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into one, by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
