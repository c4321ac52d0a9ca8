"""Files changed at random, by bytes or by their structure, and made to look as written where there are checksums."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mfm_dist.checkpoint.pieces import CHUNK_BYTES

YAML_PIECES = [
    b"&a {x: *a}", b"*a", b"!!int ''", b"!!timestamp x", b"!!python/object/apply:os.system [touch executed]",
    b"9" * 400, b"[" * 400, b"\xff\xfe", b"\xe9", b"2024-13-45", b"1e400", b"-1", b".nan", b"{}", b"[]", b"null", b"? ",
    b": ", b"<<: *a", b"\t", b"'", b'"\\ud800"', b"0x" + b"f" * 300, b"&a [1, 1, 1]", b"- ", b"# ", b"|",
    b"%YAML 9.9\n", b"---\n", b"...\n", b"[" + b"1, " * 300_000 + b"]",
    b"".join(b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 30)).replace(
        b"*a0", b"x"),
]  # fmt: skip
"""What is put into the text of a configuration; the last are a long list and an alias bomb."""
JSON_PIECES = [b"null", b"3", b"[]", b"{}", b"9" * 5000, b"[" * 100_000, b"\xff", b"NaN", b'"x"', b"-1", b"1e999"]
ODD_VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**400, 0.5, -0.5, 1e38, float("nan"), float("inf"), "", "x", "../../x",
    "/etc/passwd", "\ud800", "<b>&", "x" * 100_000, [], {}, [1, 2], {"x": 1}, [[]], "rm -rf /", "3", "1e9",
]  # fmt: skip
"""What is put into JSON in the place of something else."""
ODD_DTYPES = ["I8", "BOOL", "U8", "F16", "F64", "I64", "BF16", "F8_E5M2", "C64", "X", ""]


def mutated(content: bytes, generator: np.random.Generator, pieces: Sequence[bytes]) -> bytes:
    """Change a few places: bits, bytes, cuts, copies and foreign pieces."""
    data = bytearray(content)
    for _ in range(int(generator.integers(1, 5))):
        at, length = int(generator.integers(len(data) + 1)), int(generator.integers(1, 40))
        kind = int(generator.integers(6))
        if kind == 0 and at < len(data):
            data[at] ^= 1 << int(generator.integers(8))
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length] * int(generator.integers(1, 30))
        elif kind == 3:
            data[at : at + length] = generator.bytes(length)
        else:
            data[at : at + length * (kind - 4)] = pieces[int(generator.integers(len(pieces)))]
    return bytes(data)


def change_value(tree: Any, generator: np.random.Generator, values: Sequence[Any] = ODD_VALUES) -> str:
    """Put something odd at a place of JSON or YAML that was read, or take something away; return what was done."""
    places = list(_places(tree, ()))
    path = places[int(generator.integers(len(places)))]
    inner = tree
    for step in path[:-1]:
        inner = inner[step]
    what = int(generator.integers(6))
    if what == 0:
        del inner[path[-1]]
        return f"{path} taken away"
    if what == 1 and isinstance(inner, dict):
        inner["odd"] = inner[path[-1]]
        return f"{path[:-1]} has a key odd"
    value = values[int(generator.integers(len(values)))]
    inner[path[-1]] = value
    return f"{path} = {value!s:.20}"


def _places(tree: Any, path: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """List the way to every value in a tree."""
    steps = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
    found = [(*path, step) for step in steps]
    return found + [place for step in steps for place in _places(tree[step], (*path, step))]


def change_file(path: Path, generator: np.random.Generator) -> str:
    """Change a file by what it holds, by its bytes, or make something else of it; return what was done."""
    way = int(generator.integers(10))
    if way == 0:
        return _something_else(path, generator)
    content, suffix = path.read_bytes(), path.suffix
    if way < 7 and suffix == ".json":
        tree = json.loads(content)
        done = change_value(tree, generator)
        path.write_text(json.dumps(tree, indent=1))
        return done
    if way < 7 and suffix == ".yaml":
        tree = yaml.safe_load(content)
        done = change_value(tree, generator)
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return done
    if way < 7 and suffix == ".safetensors":
        return change_tensors(path, generator)
    if way < 7 and suffix == ".npy":
        return change_array(path, generator)
    text = suffix in (".json", ".jsonl", ".yaml", "")
    pieces = YAML_PIECES if suffix == ".yaml" else JSON_PIECES if text else [b"\0" * 9, b"\xff" * 8]
    path.write_bytes(mutated(content, generator, pieces))
    return "bytes"


def _something_else(path: Path, generator: np.random.Generator) -> str:
    """Put what is no such file in the place of one."""
    what = ("missing", "empty", "pipe", "folder", "link to itself", "link to zeros", "half")[int(generator.integers(7))]
    content = path.read_bytes()
    path.unlink()
    if what == "empty":
        path.touch()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "link to itself":
        path.symlink_to(path.name)
    elif what == "link to zeros":
        path.symlink_to("/dev/zero")
    elif what == "half":
        path.write_bytes(content[: len(content) // 2])
    return what


def change_tensors(path: Path, generator: np.random.Generator) -> str:
    """Change a tensor of a safetensors file, or what its header says of one; return what was done."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    names = sorted(name for name, entry in header.items() if name != "__metadata__" and entry["dtype"] == "F32")
    name = names[int(generator.integers(len(names)))]
    entry = header[name]
    begin, end = entry["data_offsets"]
    what = int(generator.integers(7))
    if what == 0 and end > begin:
        data[begin : begin + 4] = struct.pack("<f", (float("nan"), float("inf"))[int(generator.integers(2))])
        done = f"not finite: {name}"
    elif what == 1:
        count = (end - begin) // 4
        data = data[:begin] + bytes(count) + data[end:]
        for other in header.values():
            if other is not entry and "data_offsets" in other and other["data_offsets"][0] >= end:
                other["data_offsets"] = [offset - 3 * count for offset in other["data_offsets"]]
        entry["dtype"], entry["data_offsets"] = ("I8", "BOOL")[int(generator.integers(2))], [begin, begin + count]
        done = f"other type: {name}"
    elif what == 2:
        header[f"{name}.odd"] = header.pop(name)
        done = f"renamed: {name}"
    elif what == 3:
        entry["shape"] = [int(np.prod(entry["shape"]))]
        done = f"flat: {name}"
    elif what == 4:
        entry["dtype"] = ODD_DTYPES[int(generator.integers(len(ODD_DTYPES)))]
        done = f"type of {name}: {entry['dtype']}"
    elif what == 5:
        done = change_value(header, generator)
    else:
        data[begin:end] = generator.bytes(end - begin)
        done = f"noise: {name}"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return done


def change_array(path: Path, generator: np.random.Generator) -> str:
    """Write another array, or a header that says something else; return what was done."""
    array = np.load(path)
    what = int(generator.integers(6))
    file = io.BytesIO()
    if what == 0:
        np.save(file, np.array([{"x": 1}, "y"], dtype=object), allow_pickle=True)
        done = "objects"
    elif what == 1:
        np.save(file, np.zeros((3, 3)))
        done = "another array"
    elif what == 2:
        shape = f"({10 ** int(generator.integers(9, 15))},)" if array.ndim == 1 else f"({10**12}, {array.shape[-1]})"
        header = repr({"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": 0})
        text = header.replace("'shape': 0", f"'shape': {shape}").encode()
        text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
        file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + array.tobytes())
        done = f"claims {shape}"
    elif what == 3 and array.dtype.names and len(array):
        flat = array.view(np.uint8).reshape(-1).copy()
        for _ in range(4):
            flat[int(generator.integers(len(flat)))] = int(generator.integers(256))
        np.save(file, flat.view(array.dtype))
        done = "some numbers"
    elif what == 4:
        np.save(file, array[: len(array) // 2])
        done = "half the rows"
    else:
        np.save(file, np.concatenate([array, array]))
        done = "all rows twice"
    path.write_bytes(file.getvalue())
    return done


def vouch(folder: Path) -> None:
    """Let checksums and sizes beside files in a folder say what the files hold now."""
    for manifest in (*folder.rglob("manifest*.json"), *folder.rglob("dataset.json")):
        if manifest.is_symlink() or not manifest.is_file():  # it is what was changed, into a pipe for example
            continue
        try:
            content = json.loads(manifest.read_text())
            _vouch(content, manifest.parent)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # it is what was changed
            continue
        manifest.write_text(json.dumps(content, indent=1))


def _vouch(content: dict[str, Any], folder: Path) -> None:
    entries = dict(content.get("files", {}))
    for record in content.get("shards", []):
        entries[record["file"]] = record
        for kind in ("index", "classes"):
            entry = {"sha256": ""}
            sidecar = f"{record['file'].removesuffix('.tar')}.{kind}.npy"
            if f"{kind}_sha256" in record and _renew(entry, folder / sidecar):
                record[f"{kind}_sha256"] = entry["sha256"]
    for name, entry in entries.items():
        _renew(entry, folder / name)


def _renew(entry: dict[str, Any], path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    content = path.read_bytes()
    if isinstance(entry.get("sha256"), list):  # a checkpoint's tensors
        chunks = [content[start : start + CHUNK_BYTES] for start in range(0, len(content), CHUNK_BYTES)]
        entry["sha256"] = [sha256(chunk).hexdigest() for chunk in chunks]
    else:
        entry["sha256"] = sha256(content).hexdigest()
    if "bytes" in entry:
        entry["bytes"] = path.stat().st_size
    return True


def copy_fresh(original: Path, copy: Path) -> Path:
    """Make a copy of a folder, whatever lies there."""
    shutil.rmtree(copy, ignore_errors=True)
    return Path(shutil.copytree(original, copy))
