"""Whatever happens to checkpoints, written or being written, a whole one is found or the start says why not."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mfm_dist.checkpoint import files as checkpoint_files
from mfm_dist.checkpoint.contents import PARTS
from mfm_dist.checkpoint.files import find_latest, read_checkpoint
from mfm_dist.checkpoint.progress import Progress
from mfm_dist.checkpoint.resume import find_resumable
from mfm_dist.checkpoint.writer import CheckpointWriter
from mfm_dist.config.schema import RunConfig
from mfm_dist.errors import ConfigError, CorruptFileError, StorageError
from mfm_dist.run.folder import RunFolder
from mfm_dist.train import set_aside
from tests.helpers.classes import CLASSES
from tests.helpers.runs import DEFAULTS, REPOSITORY, result_of, run_train, tiny_overrides

KILLED = 77
Cross = Callable[[str], None]


def content(step: int) -> dict[str, dict[str, Tensor]]:
    """Tensors that tell the step they are of."""
    return {part: {"a": torch.full((3, 5), float(step)), "b": torch.arange(4) + step} for part in PARTS}


def module_at(step: int) -> Any:
    """What a writer asks of a module, at a step."""
    return SimpleNamespace(step=step, classes=CLASSES)


def writer(folder: Path, *, keep: int = 2, background: bool = False) -> CheckpointWriter:
    """A real writer, of a run of one rank."""
    config = RunConfig()
    config.checkpoint.keep, config.checkpoint.background = keep, background
    rank: Any = SimpleNamespace(is_main=True, world_size=1, gather_objects=lambda value: [value])
    return CheckpointWriter(folder, rank, config, data_fingerprints={}, written=lambda _: None)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder for hundreds of saves: in main memory where Linux offers it."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _content_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step saves, without a network."""
    monkeypatch.setattr("mfm_dist.checkpoint.writer.collect", lambda module, _: content(module.step))


def save(folder: Path, *steps: int, keep: int = 2, background: bool = False) -> None:
    folder.mkdir(exist_ok=True)
    writes = writer(folder, keep=keep, background=background)
    for step in steps:
        writes.save(module_at(step), Progress(step=step))
    writes.wait()
    writes.close()


def assert_whole(folder: Path, *allowed: int) -> int:
    """A start finds a checkpoint of one of these steps, with every tensor of that step, and nothing to complain of."""
    found = find_latest(folder, report=pytest.fail)
    assert found is not None
    assert found.progress.step in allowed
    for part, tensors in content(found.progress.step).items():
        stored = found.tensors(part)
        assert stored.keys() == tensors.keys()
        assert all(torch.equal(stored[name], tensors[name]) for name in tensors)
    return found.progress.step


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Torn:
    """A text file whose writes can be interrupted half-way."""

    def __init__(self, file: Any, cross: Cross) -> None:
        self.file = file
        self.cross = cross

    def write(self, text: str) -> None:
        for part in (text[: len(text) // 2], text[len(text) // 2 :]):
            self.file.write(part)
            self.file.flush()
            self.cross("write")

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def watch(monkeypatch: pytest.MonkeyPatch, cross: Cross) -> None:
    """Call ``cross`` before every change of the file system, and half-way through the writing of a file."""

    def watched(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            cross(name)
            return work(*arguments, **settings)

        return call

    for name in ("rename", "replace", "mkdir", "rmdir", "unlink", "remove", "chmod"):
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
    # The page cache outlives a killed process, so nothing need reach a disk here.
    monkeypatch.setattr(os, "fsync", lambda _: cross("fsync"))
    really_open = io.open

    def opened(file: Any, mode: str = "r", *arguments: Any, **settings: Any) -> Any:
        if "w" not in mode:
            return really_open(file, mode, *arguments, **settings)
        cross("open")
        return Torn(really_open(file, mode, *arguments, **settings), cross)

    monkeypatch.setattr(io, "open", opened)

    def saved(tensors: dict[str, Tensor], path: Path) -> None:
        cross("save_file")
        save_file(tensors, path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        cross("save_file")
        path.write_bytes(whole)

    monkeypatch.setattr(checkpoint_files, "save_file", saved)


def killed_at(number: int, work: Callable[[], None]) -> bool:
    """Do ``work`` in a child process that dies at its ``number``-th change of the file system; False if it ended."""
    child = os.fork()
    if child == 0:
        crossed = 0

        def cross(_: str) -> None:
            nonlocal crossed
            crossed += 1
            if crossed == number:
                os._exit(KILLED)

        code = 1
        try:
            watch(pytest.MonkeyPatch(), cross)
            work()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


@pytest.mark.parametrize(
    ("before", "new", "keep", "background"), [((1, 2), 3, 2, False), ((2,), 2, 1, True), ((), 1, 1, False)]
)
def test_a_kill_at_any_moment_of_a_save_loses_nothing(
    before: tuple[int, ...], new: int, keep: int, background: bool, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later step, the same step again where it is the only one, and the first of all."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    start = memory / "start"
    start.mkdir()
    save(start, *before)
    number, found = 0, set()
    while True:
        number += 1
        folder = memory / str(number)
        shutil.copytree(start, folder)
        if not killed_at(number, lambda folder=folder: save(folder, new, keep=keep, background=background)):  # type: ignore[misc]
            break
        if before or find_latest(folder, report=pytest.fail):
            found.add(assert_whole(folder, *before[-1:], new))
        save(folder, 9, keep=1)
        assert names(folder) == ["latest", "step_00000009"]
        shutil.rmtree(folder)
    assert number > 40
    assert found == {*before[-1:], new}
    assert names(folder) == ["latest", *(f"step_{step:08d}" for step in sorted({*before, new})[-keep:])]


def test_nothing_is_named_before_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut loses what was not synchronised: files, their folder, the new name; only then may the old one go."""
    save(tmp_path, 1, keep=1)
    calls: list[tuple[str, str]] = []
    real = {name: getattr(os, name) for name in ("fsync", "rename", "unlink")}

    def noted(name: str) -> Callable[..., Any]:
        def call(target: Any, *arguments: Any, **settings: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{target}") if name == "fsync" else str(target)
            calls.append((name, path.replace(str(tmp_path), "")))
            return real[name](target, *arguments, **settings)

        return call

    for name in real:
        monkeypatch.setattr(os, name, noted(name))
    save(tmp_path, 2, keep=1)
    monkeypatch.undo()
    temporary = "/.step_00000002.tmp"
    named = calls.index(("rename", temporary))
    synchronised = {path for name, path in calls[:named] if name == "fsync"}
    files = [f"{temporary}/{part}.safetensors" for part in PARTS]
    assert synchronised == {temporary, *files, f"{temporary}/state.json", f"{temporary}/manifest.json"}
    assert calls[named + 1] == ("fsync", "")
    assert min(i for i, (name, path) in enumerate(calls) if "step_00000001" in path) > named + 1


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_is_full_at_any_moment_costs_no_checkpoint(
    background: bool, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"crossed": 0, "full_from": 0}

    def cross(name: str) -> None:
        state["crossed"] += 1
        if state["crossed"] >= state["full_from"] > 0 and name in ("open", "write", "fsync", "mkdir", "save_file"):
            raise OSError(errno.ENOSPC, "No space left on device")

    watch(monkeypatch, cross)
    number, found = 0, set()
    while True:
        number += 1
        folder = memory / str(number)
        save(folder, 1, 2)
        writes = writer(folder, background=background)
        state |= {"crossed": 0, "full_from": number}
        problem = problem_of(writes, 3)
        state["full_from"] = 0
        writes.close()
        if problem is None:
            break
        assert re.search("(?i)step_00000003 could not be written: .*no space left", str(problem))
        assert "start the same command again" in str(problem)
        assert problem.exit_code == 4
        found.add(assert_whole(folder, 2, 3))
        save(folder, 4)
        assert len(names(folder)) == 3, names(folder)
        assert assert_whole(folder, 4)
    assert number > 20
    assert found == {2, 3}


def problem_of(writes: CheckpointWriter, step: int) -> StorageError | None:
    """Save and wait."""
    try:
        writes.save(module_at(step), Progress(step=step))
        writes.wait()
    except StorageError as error:
        return error
    return None


def test_every_rank_hears_of_a_write_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 knows as soon as it looks; the others when all ask, in the words of rank 0."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    (tmp_path / "file").write_text("in the way")
    module = module_at(1)
    first, second = writer(tmp_path / "file", background=True), writer(tmp_path)
    told: list[Any] = []

    def gather_first(own: Any) -> list[Any]:
        told.append(own)
        return [own, None]

    ranks: list[Any] = [
        SimpleNamespace(is_main=True, world_size=1, gather_objects=gather_first),
        SimpleNamespace(is_main=False, gather_objects=lambda own: [told[-1], own]),
    ]
    first.engine, second.engine = ranks
    for writes in (first, second):
        writes.save(module, Progress(step=1))
    deadline = time.monotonic() + 10
    while not first.failed():
        assert time.monotonic() < deadline
    assert not second.failed()
    reasons = []
    for writes in (first, second):
        with pytest.raises(StorageError, match=r"step_00000001 could not be written.*0\.00 GiB are free") as raised:
            writes.save(module, Progress(step=2))
        reasons.append(str(raised.value))
        writes.close()
    assert reasons[0] == reasons[1]


def flips(path: Path, positions: Iterator[int] | range) -> Iterator[int]:
    """Turn one bit of a file after another, each back before the next."""
    whole = path.read_bytes()
    for position in positions:
        payload = bytearray(whole)
        payload[position % len(whole)] ^= 1 << position % 8
        path.write_bytes(payload)
        yield position
    path.write_bytes(whole)


@pytest.mark.parametrize("name", [*(f"{part}.safetensors" for part in PARTS), "state.json"])
def test_a_flipped_bit_in_any_file_is_noticed_and_the_checkpoint_before_is_used(name: str, tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    path = tmp_path / "step_00000002" / name
    for _ in flips(path, range(0, path.stat().st_size, 7)):
        lines: list[str] = []
        found = find_latest(tmp_path, report=lines.append)
        assert found is not None
        assert found.progress.step == 1
        assert [f"step_00000002 is damaged ({name} differs from what was written)" in line for line in lines] == [True]
    assert_whole(tmp_path, 2)


def test_any_flipped_bit_of_a_manifest_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step_00000001" / "manifest.json"
    meaning = json.loads(path.read_bytes())
    noticed = 0
    for _ in flips(path, range(path.stat().st_size)):
        try:
            read_checkpoint(path.parent)
        except CorruptFileError:
            noticed += 1
        else:
            assert json.loads(path.read_bytes())["files"] == meaning["files"]
    assert noticed > 0.9 * path.stat().st_size - 60


def rewrite(checkpoint: Path, name: str, payload: bytes) -> None:
    """Change a file and vouch for it, as a mistaken or hostile hand could."""
    (checkpoint / name).write_bytes(payload)
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    manifest["files"][name] = {"bytes": len(payload), "sha256": sha256(payload).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


class Trap:
    """What unpickling runs."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("something was unpickled",))


STATES = {
    "larger than the limit": b'{"format": 2, "x": "' + b"x" * (5 << 20) + b'"}',
    "no JSON": b"\xff\xfe not JSON",
    "a pickle": pickle.dumps(Trap()),
    "a list": b"[1, 2]",
    "nested too deep": b'{"config": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "empty": b"",
    "a format of text": {"format": "2"},
    "no processes": {"world_size": 0},
    "processes as text": {"world_size": "2"},
    "no progress": {"progress": {}},
    "progress as text": {"progress": {"step": "1", "applied": 0, "block": 0}},
    "progress as truth": {"progress": {"step": True, "applied": 0, "block": 0}},
    "negative progress": {"progress": {"step": 1, "applied": -1, "block": 0}},
    "endless progress": {"progress": {"step": float("inf"), "applied": 0, "block": 0}},
    "a number without end": b'{"format": 2, "progress": {"step": ' + b"9" * 100_000 + b"}}",
    "another step": {"progress": {"step": 10**30, "applied": 0, "block": 0}},
    "foreign progress": {"progress": {"step": 1, "applied": 0, "block": 0, "position": 3}},
    "config as a list": {"config": []},
    "config of text": {"config": {"train": "fast"}},
    "data as numbers": {"data": {"target": 3}},
    "classes without names": {"classes": {"palette": ["#000001"]}},
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_no_run_writes_is_told_in_one_line(kind: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoint, value = tmp_path / "step_00000001", STATES[kind]
    if isinstance(value, dict):
        state = json.loads((checkpoint / "state.json").read_bytes())
        value = json.dumps(state | value).encode()
    assert isinstance(value, bytes)
    rewrite(checkpoint, "state.json", value)
    assert_told_in_one_line(tmp_path)


@pytest.mark.parametrize("form", [1, 99])
def test_another_format_is_refused_by_name_and_never_passed_over(form: int, tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    newest = tmp_path / "step_00000002"
    state = json.loads((newest / "state.json").read_bytes())
    rewrite(newest, "state.json", json.dumps(state | {"format": form}).encode())
    with pytest.raises(ConfigError, match=rf"step_00000002 has format {form} of checkpoints, this code reads 2"):
        find_resumable(tmp_path, pytest.fail)


def test_another_format_may_have_other_files(tmp_path: Path) -> None:
    """All that every format keeps: an integer in state.json, and checksums in manifest*.json."""
    save(tmp_path, 1)
    newer = tmp_path / "step_00000002"
    newer.mkdir()
    files = {"state.json": b'{"format": 3, "progress": "elsewhere"}', "student-00001-of-00002.safetensors": b"x"}
    for name, payload in files.items():
        (newer / name).write_bytes(payload)
    written = {name: {"bytes": len(data), "sha256": sha256(data).hexdigest()} for name, data in files.items()}
    (newer / "manifest-00001.json").write_text(json.dumps({"files": written}))
    with pytest.raises(ConfigError, match="step_00000002 has format 3 of checkpoints"):
        find_resumable(tmp_path, pytest.fail)
    (newer / "state.json").write_bytes(b'{"format": 2, "progress": "elsewhere"}')  # a flipped bit is no other format
    lines: list[str] = []
    found = find_resumable(tmp_path, lines.append)
    assert found is not None
    assert found.progress.step == 1
    assert "step_00000002 is damaged (state.json differs from what was written)" in lines[0]


def test_damaged_checkpoints_are_set_aside_and_named_when_a_run_goes_on_before_them(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, writes=True)
    for _ in range(2):
        save(run.checkpoints, 4, 6, 8, keep=3)
        for step in (6, 8):
            os.truncate(run.checkpoints / f"step_{step:08d}" / "student.safetensors", 9)
        found = find_resumable(run.checkpoints, lambda _: None)
        assert found is not None
        assert found.progress.step == 4
        set_aside(found, run, lambda _: None)
        assert (run.checkpoints / "latest").read_text() == "step_00000004\n"
    kept = ["step_00000006", "step_00000006.1", "step_00000008", "step_00000008.1"]
    assert [event["path"] for event in run.events()] == [
        f"checkpoints/set_aside/{kept[number]}" for number in (0, 2, 1, 3)
    ]
    save(run.checkpoints, 6, 8, 10)
    assert names(run.checkpoints) == ["latest", "set_aside", "step_00000008", "step_00000010"]
    assert names(run.checkpoints / "set_aside") == kept
    assert assert_whole(run.checkpoints, 10)
    set_aside(find_latest(run.checkpoints, pytest.fail), RunFolder(tmp_path, writes=False), pytest.fail)  # other ranks


MANIFESTS = {
    "empty": b"",
    "no files": b'{"files": {}}',
    "a list": b'{"files": ["state.json", "student.safetensors"]}',
    "another shape": b'{"files": {"state.json": 3, "student.safetensors": "x"}}',
    "not a mapping": b"3",
    "path up": b'{"files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}',
    "absolute path": b'{"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}',
    "folder itself": b'{"files": {"..": {"bytes": 4096, "sha256": ""}}}',
    "no name": b'{"files": {"": {"bytes": 4096, "sha256": ""}}}',
    "null byte": b'{"files": {"a\\u0000.safetensors": {"bytes": 1, "sha256": ""}}}',
    "long name": b'{"files": {"' + b"x" * 100_000 + b'": {}}}',
    "lines": b'{"files": {"a\\nb\\nresuming": {}}}',
    "nested too deep": b'{"files": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_that_no_run_writes_is_told_in_one_line(kind: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step_00000001" / "manifest.json").write_bytes(MANIFESTS[kind])
    assert_told_in_one_line(tmp_path)


def replace_by_folder(path: Path) -> None:
    """An empty folder where something was."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.mkdir()


def rename_in_manifest(path: Path, name: str, other: str) -> None:
    """A manifest that says nothing of a file."""
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"{name}"', f'"{other}"'))


SPOILS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda f: os.truncate(f / "optimizer.safetensors", 20),
    "emptied": lambda f: os.truncate(f / "student.safetensors", 0),
    "missing": lambda f: (f / "buffers.safetensors").unlink(),
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "a folder for a file": lambda f: replace_by_folder(f / "teacher.safetensors"),
    "a state not vouched for": lambda f: rename_in_manifest(f, "state.json", "student.safetensors"),
    "a file too many": lambda f: shutil.copy(f / "teacher.safetensors", f / "other.safetensors"),
    "a pickle": lambda f: rewrite(f, "teacher.safetensors", pickle.dumps(Trap())),
    "a header too long": lambda f: rewrite(f, "teacher.safetensors", b"\xff" * 8 + b"{}"),
    "a header that lies": lambda f: rewrite(
        f, "teacher.safetensors", b"\x3b" + b"\0" * 7 + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,999999]}} '
    ),
    "all files gone": lambda f: replace_by_folder(f),
}


@pytest.mark.parametrize("kind", SPOILS)
def test_files_that_are_not_as_written_are_told_in_one_line(kind: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    SPOILS[kind](tmp_path / "step_00000001")
    assert_told_in_one_line(tmp_path)


def assert_told_in_one_line(folder: Path) -> None:
    """The newest is passed over with a line, or without another one the start is refused."""
    lines: list[str] = []
    with pytest.raises(StorageError, match=r"no checkpoint in .* remove .* to start over from step 0") as refused:
        find_resumable(folder, report=lines.append)
    assert refused.value.exit_code == 4
    assert len(lines) == 1
    assert "step_00000001 is damaged (" in lines[0]
    assert "\n" not in lines[0]
    assert len(lines[0]) < len(str(folder)) + 400
    save(folder.parent / f"{folder.name}_before", 0)
    shutil.move(folder.parent / f"{folder.name}_before" / "step_00000000", folder)
    earlier = find_resumable(folder, report=lines.append)
    assert earlier is not None
    assert earlier.progress.step == 0


def test_the_pointer_and_folders_of_other_names_do_not_matter(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    copy = tmp_path / "step_00000001_mine"
    shutil.copytree(tmp_path / "step_00000001", copy)
    (tmp_path / "latest").unlink()
    assert_whole(tmp_path, 2)
    for text in ("step_00000077\n", "", "../..\n"):
        (tmp_path / "latest").write_text(text)
        assert_whole(tmp_path, 2)
    save(tmp_path, 3, 123456789)
    assert (tmp_path / "latest").read_text() == "step_123456789\n"
    assert_whole(tmp_path, 123456789)  # nine digits come after eight
    assert names(tmp_path) == ["latest", "step_00000001_mine", "step_00000003", "step_123456789"]
    assert find_resumable(tmp_path / "nothing", report=pytest.fail) is None


def test_the_real_command_on_a_full_disk_and_over_damage(scenes: Path, tmp_path: Path) -> None:
    """Two ranks with files limited to 2 MiB in place of a full disk; space again; then every checkpoint damaged."""
    run = tmp_path / "run"
    endless = [*tiny_overrides(scenes, run), "train.steps=100000", "checkpoint.every=2"]
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    launcher += [str(REPOSITORY / "configs" / "accelerate" / "cpu_ddp.yaml"), "--main_process_port", "0"]
    command = [sys.executable, *launcher, "-m", "mfm_dist.train", *DEFAULTS, *endless]
    full = subprocess.run(
        ["bash", "-c", 'ulimit -f 2048; exec "$@"', "bash", *command],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert full.returncode != 0
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["code"] == 4
    assert "step_00000002 could not be written" in outcome["reason"]
    assert full.stderr.count("start the same command again") == 1, full.stderr
    assert names(run / "checkpoints") == []

    done = run_train([*tiny_overrides(scenes, run), "train.steps=2", "checkpoint.every=1"])
    assert result_of(done.stdout)["step"] == 2
    for path in (run / "checkpoints").glob("*/student.safetensors"):
        next(flips(path, range(path.stat().st_size - 1, path.stat().st_size)))
    before = (run / "metrics.jsonl").read_bytes()
    refused = run_train(tiny_overrides(scenes, run))
    assert refused.returncode == 4, refused.stderr
    assert refused.stdout.count("is damaged (student.safetensors differs from what was written)") == 2
    assert "to start over from step 0" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert json.loads((run / "outcome.json").read_text())["code"] == 4
    assert (run / "metrics.jsonl").read_bytes() == before
