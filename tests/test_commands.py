"""Every command line of the documentation: its files exist, its options and settings are known, and it runs.

Read are README.md, CONTRIBUTING.md, docs/*.md and the heads of configs/. What takes longer than a few seconds, or needs
what is not here, stands in docs/commands.md with the record of its last run; everything else is run in a small folder.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser

from mfm_dist.config.loader import load_config, to_tree
from mfm_dist.config.schema import RunConfig
from mfm_dist.errors import ConfigError
from tests.helpers.downloads import picture, save_picture
from tests.helpers.runs import REPOSITORY

RECORDS = REPOSITORY / "docs" / "commands.md"
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted(path for path in (REPOSITORY / "docs").glob("*.md") if path != RECORDS),
]
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
FOLDERS = ("mfm_dist", "tools", "tests", "slurm")
SETUP = (REPOSITORY / "setup.py").read_text()
CONSOLE = dict(re.findall(r'"(mfm-\w+) = ([\w.]+):', SETUP))
"""Console command -> its module."""
FILE_NAMES = {"setup.py"} | {path.name for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*")}

COMMAND = re.compile(
    r"(\w+=\S+ )*((\.venv/bin/)?(python|accelerate launch|pip install) |(sbatch|make) (?!──)"
    r"|(tools/\w+\.py|slurm/\w+\.sh|mfm-\w+) |-m mfm_dist\.)"
)
SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)+=.*")
FILE = re.compile(r"(configs|tools|slurm|tests|docs|mfm_dist)/[a-z0-9_./-]*\.[a-z]+")

STAND_INS = {
    "check DIR": "check data/scenes",
    "--config FILE": "--config configs/quickstart.yaml",
    "--config …": "--config configs/quickstart.yaml",
    "RUN.yaml": "configs/quickstart.yaml",
    "LAUNCH.yaml": "configs/accelerate/cpu_zero2.yaml",
    "METHOD.yaml": "dacs.yaml",
    "FILE_OR_DIR": "images",
    "SHARD_SET": "data/scenes/camera_val",
    "--images N": "--images 1",
    "--device D": "--device cpu",
    "EXPORT": "runs/export",
    "CONFIG.yaml": "configs/quickstart.yaml",
    "CONFIG": "configs/quickstart.yaml",
    "FOLDER": "out/folder",
    "FILE": "out/file",
    "DIR": "out/dir",
    "RUN ...": "",
    "RUN": "runs/quickstart",
    "...": "",
    "…": "",
    "section.key=value": "",
    "ROW": "",
    "SECTION": "data",
}
"""What the documentation leaves open -> what stands for it in the small folder; the first that fits is taken."""

SBATCH = {"--nodes", "--parsable", "--dependency", "--signal", "--gpus-per-node", "--time"}
"""Options of Slurm's own that the documentation may use; Slurm need not be installed to test."""


def code_of(page: str) -> Iterator[str]:
    """Yield the lines of fenced blocks and the inline code of a Markdown page, table cells among it."""
    fence = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
    for block in fence.findall(page):
        yield from block.replace("\\\n", " ").splitlines()
    yield from (code.replace(r"\|", "|") for code in re.findall(r"`([^`]+)`", fence.sub("", page)))


def commands_of(lines: Iterator[str]) -> Iterator[str]:
    """Yield those lines that are commands, without comments, ``.venv/bin/`` and the variable that takes the output."""
    for line in lines:
        command = " ".join(re.sub(r"\s#.*", "", line).split())
        command = re.sub(r"^\w+=\$\((.*)\)$", r"\1", command)
        if COMMAND.match(command):
            yield command.replace(".venv/bin/", "")


def head_of(config: Path) -> Iterator[str]:
    """Yield the leading comments of a configuration file."""
    for line in config.read_text().splitlines():
        if not line.startswith("#"):
            return
        yield line.lstrip("# ")


def all_commands() -> list[str]:
    """Return every command of the documentation once."""
    pages = [commands_of(code_of(page.read_text())) for page in PAGES]
    heads = [commands_of(head_of(config)) for config in CONFIGS]
    return list(dict.fromkeys(chain(*pages, *heads)))


def records() -> list[list[str]]:
    """Return the rows of docs/commands.md: command, date, seconds, what came out."""
    rows = [line for line in RECORDS.read_text().splitlines() if line.startswith("| `")]
    cells = [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows]
    return [[cell.strip().strip("`").replace(r"\|", "|") for cell in row] for row in cells]


COMMANDS = all_commands()
LISTED = {row[0] for row in records()}


def spelled_out(command: str) -> list[list[str]]:
    """Return the words of a command for each of its alternatives, with all that stands in brackets."""
    if group := re.search(r"(?<= )\(([^()]*)\)|(?<= )(\w+(?:\|\w+)+)", command):
        choices = (group[1] or group[2]).split("|")
        parts = [command[: group.start()] + choice + command[group.end() :] for choice in choices]
        return [words for part in parts for words in spelled_out(part)]
    command = re.sub(r"(?<= )\[([^\[\]]*)\]", r"\1", command)
    stand_in = re.compile("|".join(rf"(?<!\w){re.escape(open_word)}(?!\w)" for open_word in STAND_INS))
    return [shlex.split(stand_in.sub(lambda found: STAND_INS[found[0]], command))]


class Parsed(Exception):  # noqa: N818 - it is no error
    """A command line was understood."""


def main_of(module: str) -> Callable[[Sequence[str]], Any]:
    """Return the ``main`` of a module, or of a package that runs as a program."""
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")
    main: Callable[[Sequence[str]], Any] = found.main
    return main


def parse_only(main: Callable[[Sequence[str]], object], arguments: Sequence[str]) -> None:
    """Call a command's ``main`` up to the end of its parsing."""

    def and_stop(parse: Callable[..., Any]) -> Callable[..., None]:
        def parse_and_stop(*given: Any, **named: Any) -> None:
            raise Parsed(parse(*given, **named))

        return parse_and_stop

    with pytest.MonkeyPatch.context() as patch:
        for method in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, method, and_stop(getattr(argparse.ArgumentParser, method)))
        try:
            ended = main(arguments)
        except Parsed:
            return
        except SystemExit as end:
            ended = end.code
    assert ended == 0, "not understood"  # --help ends like this


def check_settings(words: Sequence[str]) -> None:
    """Read all ``section.key=value`` of a command, on top of its configuration file."""
    file = next((Path(word) for word in words if re.fullmatch(r"configs/(?!accelerate/).*\.yaml", word)), None)
    load_config(file, [word for word in words if SETTING.fullmatch(word)])


def program(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the module that Python is to run, named or as a file, and its arguments."""
    words = words[1:] if words[0] == "python" else words
    if words[0] in CONSOLE:
        return CONSOLE[words[0]], words[1:]
    if words[0] == "-m":
        return words[1], words[2:]
    return words[0].removesuffix(".py").replace("/", "."), words[1:]


def check_python(words: Sequence[str], known: pytest.Config) -> None:
    """Check the arguments of what Python is to run."""
    module, arguments = program(words)
    if module == "pytest":
        for option in (word for word in arguments if word.startswith("-")):
            known.getoption(option)  # raises ValueError where there is none
    elif module != "timeit":
        parse_only(main_of(module), arguments)


def check(words: list[str], known: pytest.Config) -> None:
    """Check the words of one command: files, options, settings."""
    while "=" in words[0]:
        words = words[1:]
    check_settings(words)
    for file in filter(FILE.fullmatch, words):
        assert (REPOSITORY / file).exists(), f"there is no {file}"
    if words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        check_python((["-m"] if launch.module else []) + [launch.training_script, *launch.training_script_args], known)
    elif words[0] == "sbatch":
        options = {word.split("=")[0] for word in words[1:] if word.startswith("-")}
        assert options <= SBATCH, f"unknown: {options - SBATCH}"
    elif words[0] == "make":
        for target in words[1:]:
            assert f"\n{target}:" in (REPOSITORY / "Makefile").read_text(), target
    elif words[:2] == ["pip", "install"]:
        package = re.fullmatch(r"(?:\.|PATH_TO_CLONE)(?:\[(\w+)\])?", words[-1])
        assert package is not None
        assert package[1] is None or f'"{package[1]}": [' in SETUP
    elif not words[0].startswith("slurm/"):
        check_python(words, known)


@pytest.mark.parametrize("command", COMMANDS)
def test_files_options_and_settings_are_known(
    command: str, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    for words in spelled_out(command):
        check(words, pytestconfig)


@pytest.fixture(scope="module")
def small_folder(scenes: Path, trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone looks like after the quickstart, in small."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    shutil.copytree(scenes, folder / "data" / "scenes")
    shutil.copytree(trained_run, folder / "runs" / "quickstart")
    save_picture(folder / "images" / "one.png", picture(1, (64, 128)))
    assert main_of("mfm_dist.export")(["--run", str(trained_run), "--output", str(folder / "runs" / "export")]) == 0
    return folder


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - LISTED))
def test_short_commands_run(command: str, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small_folder)
    if find_spec("onnx") is None:
        command = command.replace("[--onnx]", "")
    for number, words in enumerate(spelled_out(command)):
        short = words[0] in ("python", "-m", *CONSOLE) or words[0].startswith("tools/")
        assert short, "needs a record in docs/commands.md"
        module, arguments = program(words)
        output = str(tmp_path / str(number))
        try:
            code = main_of(module)([re.sub("^out(?=/)", output, argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        assert code in (0, None)


def test_long_commands_have_a_record() -> None:
    assert set(COMMANDS) >= LISTED, f"no longer in the documentation: {LISTED - set(COMMANDS)}"
    assert len(records()) == len(LISTED), "twice in docs/commands.md"
    for command, day, seconds, outcome in records():
        assert outcome, command
        if day != "not run":
            assert date.fromisoformat(day) <= date.today(), command
            assert re.fullmatch(r"[\d,.]+|not noted", seconds), command


def settings_of(code: str) -> list[str]:
    """Return the ``section.key=value`` that inline code consists of; [] where it is something else."""
    words = re.split(r" (?='?[a-z_]+\.[a-z_.]+=)", code)
    settings = [word[1:-1] if word.startswith("'") else word for word in words]
    return settings if all(map(SETTING.fullmatch, settings)) and not code.endswith("=value") else []


def problem_with(setting: str) -> str:
    """Return what is said of a setting on its own, which may lack others that go with it; "" where all is well."""
    try:
        load_config(None, [setting])
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_and_files_that_a_page_names_exist(page: Path) -> None:
    sections = to_tree(RunConfig())
    for code in code_of(page.read_text()):
        if FILE.fullmatch(code) and code != "slurm/site.env":  # the user's own
            assert (REPOSITORY / code).exists(), code
        if re.fullmatch(r"\w+\.(py|sh)", code):
            assert code in FILE_NAMES, code
        for setting in settings_of(code):
            assert not re.search(r"unknown key|expected", problem_with(setting)), setting
        key = re.fullmatch(r"(\w+)\.(\w+)", code)
        if key and key[1] in sections and key[2] not in ("py", "safetensors", "onnx"):
            assert key[2] in sections[key[1]], code
