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
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mfm_dist.build import Readers
from mfm_dist.checkpoint.contents import PARTS
from mfm_dist.checkpoint.files import Checkpoint, Snapshot, find_latest, read_checkpoint, step_folder, write_rank
from mfm_dist.checkpoint.pieces import CHUNK_BYTES, Piece, TensorSpec, write_pieces
from mfm_dist.checkpoint.progress import Progress
from mfm_dist.checkpoint.resume import load_newest
from mfm_dist.checkpoint.writer import CheckpointWriter
from mfm_dist.config.schema import RunConfig
from mfm_dist.errors import ConfigError, StorageError
from mfm_dist.profiling.step import build_trainer
from mfm_dist.run.folder import RunFolder
from mfm_dist.run.watchdog import SLOW_FACTOR
from mfm_dist.storage import temporary_folder
from mfm_dist.train import set_aside
from tests.helpers.classes import CLASSES
from tests.helpers.modules import config_with
from tests.helpers.mutations import vouch
from tests.helpers.ranks import on_ranks
from tests.helpers.runs import DEFAULTS, REPOSITORY, result_of, run_train, tiny_overrides

KILLED = 77
Cross = Callable[[str], None]


def content(step: int) -> dict[str, dict[str, Tensor]]:
    """Tensors that tell the step they are of."""
    return {part: {"a": torch.full((3, 5), float(step)), "b": torch.arange(4) + step} for part in PARTS}


def module_at(step: int) -> Any:
    """What a writer asks of a module, at a step."""
    return SimpleNamespace(step=step, classes=CLASSES)


ONE_RANK: Any = SimpleNamespace(
    rank=0, is_main=True, world_size=1, gather_objects=lambda value: [value], from_main=lambda work: work()
)


def writer(
    folder: Path, *, keep: int = 2, background: bool = False, engine: Any = None, **settings: Any
) -> CheckpointWriter:
    """A real writer, of a run of one rank unless told otherwise."""
    config = RunConfig()
    config.checkpoint.keep, config.checkpoint.background = keep, background
    return CheckpointWriter(
        folder, engine or ONE_RANK, config, data_fingerprints={}, written=lambda _: None, **settings
    )


def resumable(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """What a start of one rank goes on from."""
    return load_newest(folder, ONE_RANK, Checkpoint.verify, report)


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
    monkeypatch.setattr("mfm_dist.checkpoint.writer.collect", lambda module, rank, _: pieces_of(module.step, rank))


def pieces_of(step: int, engine: Any) -> Snapshot:
    """A rank's even share of ``content``, and statistics of its own."""
    whole = {f"{part}/{name}": tensor for part, named in content(step).items() for name, tensor in named.items()}
    shares = {
        name: list(enumerate(tensor.flatten()))[engine.rank :: engine.world_size] for name, tensor in whole.items()
    }
    return Snapshot(
        tensors={name: TensorSpec(tensor.dtype, tensor.shape) for name, tensor in whole.items()},
        pieces=[Piece(name, first, value.view(1)) for name, share in shares.items() for first, value in share],
        buffers=[Piece("student/b", 0, whole["student/b"] + engine.rank)],
    )


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
    """A file whose writes can be interrupted half-way."""

    def __init__(self, file: Any, cross: Cross) -> None:
        self.file = file
        self.cross = cross

    def write(self, text: Any) -> None:
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
    files = ("rank_00000.safetensors", "buffers_00000.safetensors", "state.json", "manifest.json")
    assert synchronised >= {temporary, *(f"{temporary}/{name}" for name in files)}
    assert names(tmp_path / "step_00000002") == sorted(files)
    assert calls[named + 1] == ("fsync", "")
    assert min(i for i, (name, path) in enumerate(calls) if "step_00000001" in path) > named + 1


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_is_full_at_any_moment_costs_no_checkpoint(
    background: bool, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"crossed": 0, "full_from": 0}

    def cross(name: str) -> None:
        state["crossed"] += 1
        if state["crossed"] >= state["full_from"] > 0 and name in ("open", "write", "fsync", "mkdir"):
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


def test_what_somebody_removes_while_it_is_written_is_named(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(memory, 1)

    def remove(name: str) -> None:
        if name == "fsync":
            shutil.rmtree(temporary_folder(step_folder(memory, 2)))

    watch(monkeypatch, remove)
    problem = problem_of(writer(memory, background=False), 2)
    assert re.search(r"step_00000002 could not be written: .* is gone, somebody removed it$", str(problem))


def problem_of(writes: CheckpointWriter, step: int) -> StorageError | None:
    """Save and wait."""
    try:
        writes.save(module_at(step), Progress(step=step))
        writes.wait()
    except StorageError as error:
        return error
    return None


def told(work: Callable[[], object]) -> str:
    """What a StorageError of ``work`` says; empty without one."""
    try:
        work()
    except StorageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("background", [False, True])
def test_three_ranks_write_one_checkpoint(background: bool, tmp_path: Path) -> None:
    """Each its own file, which is safetensors; again over the same step."""

    def save_twice(engine: Any) -> str:
        writes = writer(tmp_path, background=background, engine=engine)
        for _ in range(2):
            writes.save(module_at(5), Progress(step=5))
        return told(writes.wait)

    assert on_ranks(3, save_twice) == ["", "", ""]
    assert_whole(tmp_path, 5)
    assert names(tmp_path) == ["latest", "step_00000005"]
    final = tmp_path / "step_00000005"
    files = [f"{kind}_{rank:05d}.safetensors" for kind in ("buffers", "rank") for rank in range(3)]
    assert names(final) == sorted([*files, "manifest.json", "state.json"])
    with safe_open(final / "rank_00001.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("student/b[1:2]"), content(5)["student"]["b"][1:2])
    assert torch.equal(read_checkpoint(final).buffers(2)["b"], content(5)["student"]["b"] + 2)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_hears_of_a_write_that_failed(
    rank: int, background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever rank meets with it, all raise it, in its words, and the checkpoint before is whole."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    save(tmp_path, 1)

    def full(final: Path, number: int, snapshot: Snapshot) -> None:
        if number == rank:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_rank(final, number, snapshot)

    monkeypatch.setattr("mfm_dist.checkpoint.writer.write_rank", full)

    def save_and_look(engine: Any) -> str:
        writes = writer(tmp_path, background=background, engine=engine)
        found = told(lambda: writes.save(module_at(2), Progress(step=2)))
        if background:
            deadline = time.monotonic() + 10
            while engine.rank == rank and not writes.failed():
                assert time.monotonic() < deadline
            found = told(writes.wait)
        writes.close()
        return found

    reasons = on_ranks(2, save_and_look)
    assert re.search(r"step_00000002 could not be written: .*No space left.*0\.00 GiB are free", reasons[0])
    assert reasons[0] == reasons[1]
    assert_whole(tmp_path, 1)
    assert names(tmp_path) == ["latest", "step_00000001"]


def test_a_rank_that_lags_is_named_and_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    late = Event()

    def slow(final: Path, number: int, snapshot: Snapshot) -> None:
        if number == 1:
            late.wait(30)
        write_rank(final, number, snapshot)

    monkeypatch.setattr("mfm_dist.checkpoint.writer.write_rank", slow)

    def save_and_wait(engine: Any) -> str:
        writes = writer(tmp_path, background=True, engine=engine, patience=0.3)
        writes.save(module_at(2), Progress(step=2))
        found = told(writes.wait)
        late.set()
        writes.close()
        return found

    reasons = on_ranks(2, save_and_wait)
    assert reasons[0] == reasons[1]
    assert re.fullmatch(r".*step_00000002 is not complete: rank 1 has not written its pieces within 0\.3 s", reasons[0])
    assert_whole(tmp_path, 1)
    assert not (tmp_path / "step_00000002").exists()


@pytest.mark.parametrize("seconds", [1, 60, 3600])
def test_a_slow_disk_is_told_before_it_counts_as_a_hang_and_not_much_before(seconds: float) -> None:
    config = config_with("train.micro_batch=1", "train.global_batch=1", f"watchdog.seconds={seconds}")
    no_data: Any = ()
    trainer = build_trainer(config, Readers(no_data, no_data, None, None, None, CLASSES))
    assert seconds * SLOW_FACTOR / 2 < trainer.writer.patience < seconds * SLOW_FACTOR


def flips(path: Path, positions: Iterator[int] | range) -> Iterator[int]:
    """Turn one bit of a file after another, each back before the next."""
    whole = path.read_bytes()
    for position in positions:
        payload = bytearray(whole)
        payload[position % len(whole)] ^= 1 << position % 8
        path.write_bytes(payload)
        yield position
    path.write_bytes(whole)


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "buffers_00000.safetensors", "state.json"])
def test_a_flipped_bit_in_any_file_is_noticed_and_the_checkpoint_before_is_used(name: str, tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    path = tmp_path / "step_00000002" / name
    for _ in flips(path, range(0, path.stat().st_size, 17)):
        lines: list[str] = []
        found = find_latest(tmp_path, report=lines.append)
        assert found is not None
        assert found.progress.step == 1
        assert [f"step_00000002 is damaged ({name} differs from what was written)" in line for line in lines] == [True]
    assert_whole(tmp_path, 2)


def test_what_the_campaign_vouches_for_counts_as_written(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    path = tmp_path / "step_00000002" / "buffers_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    vouch(path.parent)
    lines: list[str] = []
    found = find_latest(tmp_path, report=lines.append)
    assert (found is not None and found.progress.step, lines) == (2, [])

    sums = write_pieces(tmp_path / "long", [Piece("a", 0, torch.arange(3 * CHUNK_BYTES // 8, dtype=torch.float32))])
    assert len(sums.chunks) == 2
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {"long": {"bytes": 0, "sha256": []}}}))
    vouch(tmp_path)
    entry = json.loads((tmp_path / "manifest.json").read_text())["files"]["long"]
    assert (entry["bytes"], entry["sha256"]) == (sums.size, sums.chunks)


def test_any_flipped_bit_of_a_manifest_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step_00000001" / "manifest.json"
    meaning = json.loads(path.read_bytes())
    noticed = 0
    for _ in flips(path, range(path.stat().st_size)):
        try:
            read_checkpoint(path.parent)
        except StorageError:
            noticed += 1
        else:
            assert json.loads(path.read_bytes()) == meaning
    assert noticed > 0.9 * path.stat().st_size - 60


def rewrite(checkpoint: Path, name: str, payload: bytes) -> None:
    """Change a file and vouch for it, as a mistaken or hostile hand could."""
    (checkpoint / name).write_bytes(payload)
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    digest = sha256(payload).hexdigest()
    sums = [digest] if name.endswith(".safetensors") else digest
    manifest["files"][name] = {"bytes": len(payload), "sha256": sums}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


class Trap:
    """What unpickling runs."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("something was unpickled",))


STATES = {
    "larger than the limit": b'{"format": 3, "x": "' + b"x" * (5 << 20) + b'"}',
    "no JSON": b"\xff\xfe not JSON",
    "a pickle": pickle.dumps(Trap()),
    "a list": b"[1, 2]",
    "nested too deep": b'{"config": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "empty": b"",
    "a format of text": {"format": "3"},
    "no processes": {"world_size": 0},
    "processes as text": {"world_size": "2"},
    "no progress": {"progress": {}},
    "progress as text": {"progress": {"step": "1", "applied": 0, "block": 0}},
    "progress as truth": {"progress": {"step": True, "applied": 0, "block": 0}},
    "negative progress": {"progress": {"step": 1, "applied": -1, "block": 0}},
    "endless progress": {"progress": {"step": float("inf"), "applied": 0, "block": 0}},
    "a number without end": b'{"format": 3, "progress": {"step": ' + b"9" * 100_000 + b"}}",
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


@pytest.mark.parametrize("form", [1, 2, 99])
def test_another_format_is_refused_by_name_and_never_passed_over(form: int, tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    newest = tmp_path / "step_00000002"
    state = json.loads((newest / "state.json").read_bytes())
    rewrite(newest, "state.json", json.dumps(state | {"format": form}).encode())
    with pytest.raises(ConfigError, match=rf"step_00000002 has format {form} of checkpoints, this code reads 3"):
        resumable(tmp_path, pytest.fail)


def test_another_format_may_have_other_files(tmp_path: Path) -> None:
    """All that every format keeps: an integer in state.json, and checksums in manifest*.json."""
    save(tmp_path, 1)
    newer = tmp_path / "step_00000002"
    newer.mkdir()
    files = {"state.json": b'{"format": 4, "progress": "elsewhere"}', "student-00001-of-00002.safetensors": b"x"}
    for name, payload in files.items():
        (newer / name).write_bytes(payload)
    written = {name: {"bytes": len(data), "sha256": sha256(data).hexdigest()} for name, data in files.items()}
    (newer / "manifest-00001.json").write_text(json.dumps({"files": written}))
    with pytest.raises(ConfigError, match="step_00000002 has format 4 of checkpoints"):
        resumable(tmp_path, pytest.fail)
    (newer / "state.json").write_bytes(b'{"format": 3, "progress": "elsewhere"}')  # a flipped bit is no other format
    lines: list[str] = []
    found = resumable(tmp_path, lines.append)
    assert found is not None
    assert found.progress.step == 1
    assert "step_00000002 is damaged (state.json differs from what was written)" in lines[0]


def test_damaged_checkpoints_are_set_aside_and_named_when_a_run_goes_on_before_them(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, writes=True)
    for _ in range(2):
        save(run.checkpoints, 4, 6, 8, keep=3)
        for step in (6, 8):
            os.truncate(run.checkpoints / f"step_{step:08d}" / "rank_00000.safetensors", 9)
        found = resumable(run.checkpoints, lambda _: None)
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
    set_aside(read_checkpoint(run.checkpoints / "step_00000010"), RunFolder(tmp_path, writes=False), pytest.fail)


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


def entry(numel: int, start: int, end: int) -> dict[str, Any]:
    """Entry of a piece in a header."""
    return {"dtype": "F32", "shape": [numel], "data_offsets": [start, end]}


def rewrite_header(path: Path, header: Any, name: str = "rank_00000.safetensors") -> None:
    """A file of tensors that has a header alone, vouched for."""
    text = json.dumps(header).encode()
    rewrite(path, name, len(text).to_bytes(8, "little") + text)


SPOILS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda f: os.truncate(f / "rank_00000.safetensors", 20),
    "emptied": lambda f: os.truncate(f / "buffers_00000.safetensors", 0),
    "missing": lambda f: (f / "buffers_00000.safetensors").unlink(),
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "a folder for a file": lambda f: replace_by_folder(f / "rank_00000.safetensors"),
    "a state not vouched for": lambda f: rename_in_manifest(f, "state.json", "rank_00001.safetensors"),
    "a file too many": lambda f: shutil.copy(f / "rank_00000.safetensors", f / "rank_00001.safetensors"),
    "a pickle": lambda f: rewrite(f, "rank_00000.safetensors", pickle.dumps(Trap())),
    "nothing": lambda f: rewrite(f, "rank_00000.safetensors", b""),
    "a header too long": lambda f: rewrite(f, "rank_00000.safetensors", b"\xff" * 8 + b"{}"),
    "a header that is a list": lambda f: rewrite_header(f, []),
    "values beyond the file": lambda f: rewrite_header(f, {"student/a[0:15]": entry(15, 0, 60)}),
    "values before the file": lambda f: rewrite_header(f, {"student/a[0:15]": entry(15, -60, 0)}),
    "a piece beyond its tensor": lambda f: rewrite_header(f, {"student/a[16:16]": entry(0, 0, 0)}),
    "a piece of another type": lambda f: rewrite_header(f, {"student/a[0:0]": entry(0, 0, 0) | {"dtype": "I32"}}),
    "a piece of no tensor": lambda f: rewrite_header(f, {"student/c[0:0]": entry(0, 0, 0)}),
    "statistics of another type": lambda f: rewrite_header(
        f, {"student/b[0:0]": entry(0, 0, 0) | {"dtype": "I32"}}, "buffers_00000.safetensors"
    ),
    "half of the statistics": lambda f: rewrite_header(
        f, {"student/b[0:0]": entry(0, 0, 0)}, "buffers_00000.safetensors"
    ),
    "no place": lambda f: rewrite_header(f, {"student/a": entry(0, 0, 0)}),
    "half of it": lambda f: rewrite_header(f, {"student/a[0:0]": entry(0, 0, 0)}),
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
        resumable(folder, report=lines.append)
    assert refused.value.exit_code == 4
    assert len(lines) == 1
    assert "step_00000001 is damaged (" in lines[0]
    assert "\n" not in lines[0]
    assert len(lines[0]) < len(str(folder)) + 400
    save(folder.parent / f"{folder.name}_before", 0)
    shutil.move(folder.parent / f"{folder.name}_before" / "step_00000000", folder)
    earlier = resumable(folder, report=lines.append)
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
    assert resumable(tmp_path / "nothing", report=pytest.fail) is None


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
    for path in (run / "checkpoints").glob("*/rank_00000.safetensors"):
        next(flips(path, range(path.stat().st_size - 1, path.stat().st_size)))
    before = (run / "metrics.jsonl").read_bytes()
    refused = run_train(tiny_overrides(scenes, run))
    assert refused.returncode == 4, refused.stderr
    assert refused.stdout.count("is damaged (rank_00000.safetensors differs from what was written)") == 2
    assert "to start over from step 0" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert json.loads((run / "outcome.json").read_text())["code"] == 4
    assert (run / "metrics.jsonl").read_bytes() == before
