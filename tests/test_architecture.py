"""Who may import whom (the design's walls), read from the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "mfm_dist"
FILES = sorted(PACKAGE.rglob("*.py"))

FORBIDDEN = {
    "data": ("models", "distributed", "methods", "trainer", "train_module"),
    "models": ("data", "distributed", "methods", "trainer", "train_module"),
    "distributed": ("data", "models", "methods", "trainer", "train_module"),
    "methods": ("data", "distributed", "trainer", "train_module"),
    "config": ("data", "models", "distributed", "methods", "trainer", "train_module"),
}
"""Folder of the package -> parts of the package it must not see."""

DOORS = {
    "accelerate": ("mfm_dist/distributed/",),
    "deepspeed": ("mfm_dist/distributed/", "tools/raw_loops.py"),
    "webdataset": ("mfm_dist/data/",),
    "timm": ("mfm_dist/models/",),
    "yaml": ("mfm_dist/config/loader.py",),
    "fvcore": ("tools/",),
    "jinja2": ("mfm_dist/report/",),
    "matplotlib": ("mfm_dist/report/",),
    "torch.distributed": ("mfm_dist/distributed/", "mfm_dist/cluster/preflight.py", "tools/raw_loops.py"),
}
"""Library -> the only places that may import it."""


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module or ""


def inside(module: str, parent: str) -> bool:
    return module == parent or module.startswith(parent + ".")


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_parts_that_know_nothing_of_one_another(folder: str) -> None:
    wrong = [
        f"{path.relative_to(REPOSITORY)} imports {module}"
        for path in (PACKAGE / folder).rglob("*.py")
        for module in imports(path)
        for part in FORBIDDEN[folder]
        if inside(module, f"mfm_dist.{part}")
    ]
    assert wrong == []


@pytest.mark.parametrize("library", DOORS)
def test_one_door_for_each_library(library: str) -> None:
    importers = {
        str(path.relative_to(REPOSITORY))
        for path in [*FILES, *(REPOSITORY / "tools").glob("*.py")]
        if any(inside(module, library) for module in imports(path))
    }
    assert {i for i in importers if not i.startswith(DOORS[library])} == set()


def test_the_package_needs_neither_tools_nor_tests() -> None:
    needs = {m for path in FILES for m in imports(path) if inside(m, "tools") or inside(m, "tests")}
    assert needs == set()


def test_files_stay_short() -> None:
    long = {str(p.relative_to(REPOSITORY)): n for p in FILES if (n := len(p.read_text().splitlines())) > 330}
    assert long == {}


def test_nothing_is_unpickled_and_yaml_is_safe() -> None:
    for path in [*FILES, *(REPOSITORY / "tools").glob("*.py")]:
        text = path.read_text()
        assert not re.search(r"\bpickle\b|yaml\.load\(|yaml\.unsafe", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, f"{path}: {call}"
