"""The house rules, read from the source: who may import whom, how large things may be, and where tests stand."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "mfm_dist"

LAYERS = (
    ("errors", "rng", "classes", "batch", "storage"),
    ("config",),
    ("data", "models", "distributed", "scenes"),
    ("methods", "shards"),
    ("train_module",),
    ("optim", "schedules", "build", "checkpoint"),
    ("run", "inference"),
    ("report", "cluster", "trainer", "__init__"),
    ("train", "evaluate", "predict", "export", "profiling"),
)
"""Rooms, that is folders and files at the root, lowest first. Nothing may import what stands in a later line; what
stands in the same line may be imported as long as no circle comes of it. Imports inside functions count."""

STRANGERS = {
    "data": ("models", "distributed", "scenes"),
    "models": ("data", "distributed", "scenes"),
    "distributed": ("data", "models", "scenes"),
    "scenes": ("data", "models", "distributed"),
    "methods": ("data", "distributed", "shards", "scenes"),
    "train_module": ("data", "distributed", "shards", "scenes"),
}
"""Room -> rooms that stand lower or beside, and that it must know nothing of all the same."""

DOORS = {
    "accelerate": ("mfm_dist/distributed/",),
    "deepspeed": ("mfm_dist/distributed/", "tools/raw_loops.py"),
    "torch.distributed": ("mfm_dist/distributed/", "mfm_dist/cluster/preflight.py", "tools/raw_loops.py"),
    "webdataset": ("mfm_dist/data/", "mfm_dist/shards/", "mfm_dist/profiling/data.py"),
    "timm": ("mfm_dist/models/",),
    "peft": ("mfm_dist/models/lora.py",),
    "yaml": ("mfm_dist/config/yaml_text.py",),
    "fvcore": ("mfm_dist/profiling/counting.py",),
    "av": ("mfm_dist/inference/video.py",),
    "huggingface_hub": ("mfm_dist/export.py", "mfm_dist/models/backbone.py"),
    "jinja2": ("mfm_dist/report/",),
    "matplotlib": ("mfm_dist/report/", "mfm_dist/profiling/plan_command.py", "tools/lab_results.py"),
    "mfm_dist.shards": ("mfm_dist/shards/", "mfm_dist/build.py", "tools/"),
    "mfm_dist.scenes": ("mfm_dist/scenes/", "mfm_dist/shards/", "tools/"),
}
"""Library, or wing of the package -> the only places that may import it."""

LIGHT = ("mfm_dist", "mfm_dist.cluster.job", "mfm_dist.run.folder", "mfm_dist.run.signals")
"""What must not import torch: it runs before torch is there, or many times in a job."""

MOST_ROOT_ENTRIES = 29
LONGEST_FUNCTION = 65
"""Lines, decorators apart."""
LONGEST_OF_95_PERCENT = 30


def module_name(path: Path) -> str:
    """Return the dotted name of a file of the repository; a package's is that of its folder."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TOOLS = {module_name(path): path for path in sorted((REPOSITORY / "tools").glob("*.py"))}
TESTS = {module_name(path): path for path in sorted((REPOSITORY / "tests").rglob("*.py"))}


OPENERS = ("Image.open", "tarfile.open", "zipfile.ZipFile", "ZipFile", "av.open", "np.load", "np.fromfile", "np.memmap",
           "json.load", "torch.load", "load_file", "safe_open", "pickle.load", "gzip.open", "bz2.open")  # fmt: skip
"""Calls of libraries that open a file they are given by name."""
READERS = {"mfm_dist.storage": "it is the door"}
"""Who may read files without ``storage``, and why."""


@cache
def imports(path: Path) -> tuple[tuple[int, str], ...]:
    """Return line and dotted name of everything that a file imports, inside functions and for type checkers too."""
    return tuple(_read_imports(path))


def _read_imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node.lineno, "torch.distributed"  # reached without an import of its own


def inside(name: str, parent: str) -> bool:
    """Tell whether a dotted name is ``parent`` or lies below it."""
    return name == parent or name.startswith(parent + ".")


def module_of(name: str) -> str:
    """Return the module of the package that an imported name is or stands in; "" for anything else."""
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name


def room_of(module: str) -> str:
    """Return the folder or file at the root that a module of the package belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def imports_within() -> Iterator[tuple[str, str, str]]:
    """Yield importer, imported module and a line that says where, for all imports from one module to another."""
    for importer, path in FILES.items():
        for line, name in imports(path):
            imported = module_of(name)
            if imported and imported != importer:
                yield importer, imported, f"{path.relative_to(REPOSITORY)}:{line} imports {name}"


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return one circle of a graph, its first node again at the end; [] if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found[::-1]
    return []


def assert_none(wrong: Sequence[str]) -> None:
    """Fail with every line of ``wrong`` in full."""
    assert not wrong, "\n".join(["", *wrong])


def test_every_room_has_its_layer() -> None:
    rooms = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert rooms == {room for layer in LAYERS for room in layer}


def test_no_import_climbs() -> None:
    level = {room: number for number, layer in enumerate(LAYERS) for room in layer}
    climbing = [
        f"{where}: {room_of(importer)} stands lower than {room_of(imported)}"
        for importer, imported, where in imports_within()
        if level.get(room_of(importer), len(LAYERS)) < level.get(room_of(imported), len(LAYERS))
    ]
    assert_none(climbing)


@pytest.mark.parametrize("of", ["modules", "rooms"])
def test_no_circles(of: str) -> None:
    graph: dict[str, set[str]] = {}
    said: dict[tuple[str, str], str] = {}
    for importer, imported, where in imports_within():
        start, end = (importer, imported) if of == "modules" else (room_of(importer), room_of(imported))
        if start != end:
            graph.setdefault(start, set()).add(end)
            said.setdefault((start, end), where)
    round_trip = circle(graph)
    assert_none([said[step] for step in pairwise(round_trip)])


@pytest.mark.parametrize("room", STRANGERS)
def test_rooms_that_know_nothing_of_one_another(room: str) -> None:
    wrong = [
        where
        for importer, imported, where in imports_within()
        if room_of(importer) == room and room_of(imported) in STRANGERS[room]
    ]
    assert_none(wrong)


@pytest.mark.parametrize("library", DOORS)
def test_one_door_for_each_library(library: str) -> None:
    beside_the_door = [
        f"{file}:{line} imports {name}"
        for path in [*FILES.values(), *TOOLS.values()]
        for line, name in imports(path)
        if inside(name, library) and not (file := path.relative_to(REPOSITORY).as_posix()).startswith(DOORS[library])
    ]
    assert_none(beside_the_door)


def test_the_package_needs_neither_tools_nor_tests() -> None:
    needs = [
        f"{path.relative_to(REPOSITORY)}:{line} imports {name}"
        for path in FILES.values()
        for line, name in imports(path)
        if inside(name, "tools") or inside(name, "tests")
    ]
    assert_none(needs)


def test_no_test_module_is_imported() -> None:
    """What several modules share stands in tests/helpers; the fixtures of a conftest.py come by their names."""
    of_tests = re.compile(r"tests\.(\w+\.)*(test_\w+|conftest)(\.\w+)*")
    imported = [
        f"{path.relative_to(REPOSITORY)}:{line} imports {name}"
        for path in [*TESTS.values(), *TOOLS.values()]
        for line, name in imports(path)
        if of_tests.fullmatch(name)
    ]
    assert_none(imported)


def test_the_unit_tests_have_the_folders_of_the_package() -> None:
    folders = {name for name in TESTS if name.startswith("tests.unit.") and TESTS[name].stem == "__init__"}
    others = {name.removeprefix("tests.unit.") for name in folders} - {room_of(name) for name in FILES} - {"tools"}
    assert not others


def test_every_file_of_tests_says_what_it_is_about() -> None:
    silent = [
        str(path.relative_to(REPOSITORY))
        for path in TESTS.values()
        if (text := path.read_text()) and ast.get_docstring(ast.parse(text)) is None
    ]
    assert_none(silent)


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import {module}"  # the traceback shows who wanted it
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def reads(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of every call that opens a file to read, whatever stands in it, and not by ``storage``."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        first, text = (ast.unparse(node.args[0]) if node.args else ""), ast.unparse(node)
        by_name = called == "open" or re.search(r"(^|[._])path\.open$", called)
        if (
            (by_name and not re.search(r"'[wax]b?\+?'", text))
            or (called == "os.open" and "RDONLY" in text)
            or called.endswith((".read_text", ".read_bytes"))
            or (called in OPENERS and first and not first.startswith(("require_regular(", "io.BytesIO(", "file")))
        ):
            yield node.lineno, text[:80]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("open(path)", True), ("open(path, 'rb')", True), ("path.open()", True), ("open(path, 'w')", False),
        ("path.read_text()", True), ("Path(a, b).read_bytes()", True), ("read_text(path)", False),
        ("os.open(a, os.O_RDONLY)", True), ("os.open(a, os.O_WRONLY)", False), ("load_file(path)", True),
        ("load_file(require_regular(path))", False), ("Image.open(path)", True),
        ("Image.open(io.BytesIO(content))", False), ("tarfile.open(fileobj=file, mode='r:')", False),
        ("torch.load(path, weights_only=True)", True),
    ],
)  # fmt: skip
def test_a_read_is_seen(code: str, found: bool) -> None:
    assert bool(list(reads(ast.parse(code)))) == found


def test_every_file_is_read_through_one_door() -> None:
    """``storage`` opens only regular files and bounds what it reads whole; nothing else reads a file of any origin."""
    around = [
        f"{name}:{line} {call}"
        for name, path in FILES.items()
        if name not in READERS
        for line, call in reads(ast.parse(path.read_text()))
    ]
    assert_none(around)


def test_the_root_is_read_at_a_glance() -> None:
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert len(entries) <= MOST_ROOT_ENTRIES, sorted(entries)


def test_no_file_is_called_utils() -> None:
    vague = re.compile(r"_*(utils?|helpers?|misc|common)")
    assert_none([str(path.relative_to(REPOSITORY)) for path in FILES.values() if vague.fullmatch(path.stem)])


def test_what_runs_as_a_program_stands_last() -> None:
    """Where a definition follows, the program ends without it, though an import of the same file has it."""
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{statement.lineno}"
        for path in [*FILES.values(), *TOOLS.values()]
        for statement in ast.parse(path.read_text()).body[:-1]
        if isinstance(statement, ast.If) and ast.unparse(statement.test).startswith("__name__")
    ]
    assert_none(wrong)


def test_functions_stay_short() -> None:
    lengths = sorted(
        (node.end_lineno - node.lineno + 1, f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.name}")
        for path in FILES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    )
    assert_none([f"{where}: {lines} lines" for lines, where in lengths if lines > LONGEST_FUNCTION])
    assert lengths[int(0.95 * len(lengths))][0] <= LONGEST_OF_95_PERCENT


def test_nothing_is_unpickled_and_yaml_is_safe() -> None:
    for path in [*FILES.values(), *TOOLS.values()]:
        text = path.read_text()
        assert not re.search(r"\bpickle\b|yaml\.load\(|yaml\.unsafe", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, f"{path}: {call}"
