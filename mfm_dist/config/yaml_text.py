"""The part of YAML that a configuration is written in, read from text of any origin.

Plain values, lists and mappings; no dates, sets or objects. Small, not nested deep, no key twice, no anchor that makes
a little text large or refers to itself, no number beyond 64 bits, no text that no file name could hold.
"""

from __future__ import annotations

import io
from typing import Any, ClassVar

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

LARGEST_TEXT = 1 << 20
"""Characters."""
DEEPEST = 16
MOST_NODES = 20_000
"""Values, those behind an alias counted wherever it stands. The largest real configuration has some hundred."""
_KNOWN = ("null", "bool", "int", "float", "str", "seq", "map")


class _Loader(yaml.SafeLoader):
    """Reads the plain kinds of values and refuses the rest."""

    yaml_constructors: ClassVar = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in _KNOWN
    }

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        """Compose no more values than are allowed; to read on would take seconds and end in a refusal as well."""
        self.values = getattr(self, "values", 0) + 1
        if self.values > MOST_NODES:
            raise ValueError(f"line {self.line + 1}: it holds more than {MOST_NODES:,} values")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that stands twice; YAML's own merge key adds only what is not there."""
        plain = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys: set[Any] = set()
        for part in plain:
            if isinstance(part, ScalarNode) and (key := self.construct_object(part)) in keys:
                raise _refused(part, "is a key that stands there twice")
            elif isinstance(part, ScalarNode):
                keys.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: ScalarNode) -> int:
        """Construct an integer of 64 bits."""
        try:
            value = self.construct_yaml_int(node)
        except (ValueError, IndexError):
            raise _refused(node, "is no integer") from None
        if not -(2**63) <= value < 2**63:
            raise _refused(node, "is an integer beyond 64 bits")
        return value

    def construct_real(self, node: ScalarNode) -> float:
        """Construct a floating point number."""
        try:
            return self.construct_yaml_float(node)
        except (ValueError, IndexError):
            raise _refused(node, "is no number") from None

    def construct_word(self, node: ScalarNode) -> bool:
        """Construct true or false."""
        try:
            return bool(self.construct_yaml_bool(node))
        except KeyError:
            raise _refused(node, "is neither true nor false") from None

    def construct_text(self, node: ScalarNode) -> str:
        """Construct text that a file and a file name can hold."""
        text = str(self.construct_scalar(node))
        if "\0" in text or not _is_encodable(text):
            raise _refused(node, "holds a character that no file can hold")
        return text


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_real)
_Loader.add_constructor("tag:yaml.org,2002:bool", _Loader.construct_word)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)


def parse_yaml(text: str) -> Any:
    """Return the value that a text holds. Raises ValueError, with one sentence that says what is wrong and where."""
    if len(text) > LARGEST_TEXT:
        raise ValueError(f"it is longer than {LARGEST_TEXT:,} characters")
    loader = None
    try:
        loader = _Loader(io.StringIO(text))
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, 0)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:600]) from error
    except RecursionError as error:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from error
    finally:
        if loader is not None:
            loader.dispose()


def dump_yaml(tree: Any) -> str:
    """Write plain values as text that ``parse_yaml`` reads back to equal ones."""
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110)


def _count(node: Node, known: dict[int, int], depth: int) -> int:
    """Count the values below a node as often as they stand there. 0 is noted of one that is not yet counted."""
    if depth > DEEPEST:
        raise ValueError(f"line {node.start_mark.line + 1}: it is nested more than {DEEPEST} deep")
    if id(node) in known:
        if known[id(node)] == 0:
            raise ValueError(f"line {node.start_mark.line + 1}: it holds an alias of itself")
        return known[id(node)]
    known[id(node)], total = 0, 1
    parts = [part for pair in node.value for part in pair] if isinstance(node, MappingNode) else node.value
    for part in parts if isinstance(node, MappingNode | SequenceNode) else ():
        total += _count(part, known, depth + 1)
        if total > MOST_NODES:
            raise ValueError(f"line {node.start_mark.line + 1}: it holds more than {MOST_NODES:,} values")
    known[id(node)] = total
    return total


def _refused(node: ScalarNode, why: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, f"{str(node.value)[:80]!r} {why}", node.start_mark)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
