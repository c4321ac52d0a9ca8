"""Who may write to a run folder: one start at a time, also after kills, requeues and on other hosts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfm_dist import train
from mfm_dist.cluster import lease
from mfm_dist.cluster.lease import LEASE, Lease
from mfm_dist.errors import ConfigError, StorageError
from tests.helpers.processes import wait_until
from tests.helpers.runs import DEFAULTS, tiny_overrides

SLURM_7 = {"SLURM_JOB_ID": "7"}
SLURM_8 = {"SLURM_JOB_ID": "8"}
AT_ONCE = 1.0
"""Seconds; whoever waits for a heartbeat needs ``STALE_SECONDS`` of them."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "STALE_SECONDS", 1.5)


@pytest.fixture
def lost() -> Iterator[list[str]]:
    """What leases said that were taken over."""
    told: list[str] = []
    yield told
    assert told == []


def leave_behind(folder: Path, **owner: object) -> None:
    """A lease whose holder was killed just now."""
    folder.mkdir(exist_ok=True)
    (folder / LEASE).write_text(json.dumps({"job": None, "host": "elsewhere", "process": 1, "token": "x"} | owner))


def take(folder: Path, environment: dict[str, str] | None = None, told: list[str] | None = None) -> Lease:
    told = [] if told is None else told

    def on_lost(reason: str, code: int) -> None:
        told.append(f"{reason} ({code})")

    return Lease.take(folder, on_lost=on_lost, say=lambda _: None, environment=environment or {})


def test_a_lease_is_there_while_it_is_held(tmp_path: Path, lost: list[str]) -> None:
    with take(tmp_path / "run", SLURM_7, lost):
        assert json.loads((tmp_path / "run" / LEASE).read_text())["job"] == "7"
    assert not (tmp_path / "run" / LEASE).exists()
    take(tmp_path / "run", SLURM_8, lost).release()


@pytest.mark.parametrize(("first", "second"), [({}, {}), (SLURM_7, SLURM_8), (SLURM_7, {}), ({}, SLURM_8)])
def test_a_second_start_is_refused(
    first: dict[str, str], second: dict[str, str], tmp_path: Path, lost: list[str]
) -> None:
    with take(tmp_path, first, lost):
        before = (tmp_path / LEASE).read_text()
        with pytest.raises(ConfigError, match=r"is in use by (Slurm job 7|process \d+) on .*: wait until"):
            take(tmp_path, second)
        assert (tmp_path / LEASE).read_text() == before


def test_a_requeued_job_takes_over_at_once_and_its_former_start_ends(tmp_path: Path) -> None:
    told: list[str] = []
    take(tmp_path, SLURM_7, told)
    began = time.monotonic()
    with take(tmp_path, SLURM_7):
        assert time.monotonic() - began < AT_ONCE
        deadline = time.monotonic() + 5
        while not told and time.monotonic() < deadline:
            time.sleep(0.02)
    assert told == [f"Slurm job 7 on {os.uname().nodename} has taken over {tmp_path}; this start ends (2)"]


def test_a_folder_that_somebody_removed_is_told_as_that(tmp_path: Path) -> None:
    told: list[str] = []
    take(tmp_path / "run", told=told)
    shutil.rmtree(tmp_path / "run")
    wait_until(lambda: told, seconds=5, what="the next heartbeat")
    assert told == [f"run.folder={tmp_path / 'run'} is gone: somebody removed it; this start ends (4)"]


@pytest.fixture
def gone() -> int:
    """The number of a process that has ended."""
    process = os.fork()
    if process == 0:
        os._exit(0)
    os.waitpid(process, 0)
    return process


HOST = os.uname().nodename


def test_a_killed_process_of_this_host_is_followed_at_once(tmp_path: Path, lost: list[str], gone: int) -> None:
    leave_behind(tmp_path, host=HOST, process=gone, place=lease._pid_namespace(), began=1)
    began = time.monotonic()
    take(tmp_path, told=lost).release()
    assert time.monotonic() - began < AT_ONCE


def test_a_process_that_has_its_number_now_is_not_taken_for_it(tmp_path: Path, lost: list[str]) -> None:
    """Not even this one, as where every start is process 1 of a container that stays."""
    for process in (os.getpid(), os.getppid()):
        leave_behind(tmp_path, host=HOST, process=process, place=lease._pid_namespace(), began=1)
        began = time.monotonic()
        take(tmp_path, told=lost).release()
        assert time.monotonic() - began < AT_ONCE


def test_a_killed_process_that_nobody_waits_for_is_gone(tmp_path: Path, lost: list[str]) -> None:
    zombie = subprocess.Popen(["sleep", "60"])
    leave_behind(
        tmp_path,
        host=HOST,
        process=zombie.pid,
        place=lease._pid_namespace(),
        began=lease._process_start_time(zombie.pid),
    )
    with pytest.raises(ConfigError, match="is in use by process"):
        take(tmp_path)
    os.kill(zombie.pid, signal.SIGKILL)
    time.sleep(0.2)
    take(tmp_path, told=lost).release()
    zombie.wait()


@pytest.mark.parametrize("place", ["of another container", None])
def test_a_live_holder_in_a_container_with_this_host_name_is_not_robbed(
    place: str | None, tmp_path: Path, gone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number means nothing here, nor does anybody's where the system does not tell one place from another."""
    leave_behind(tmp_path, host=HOST, process=gone, place=place, began=1)
    if place is None:
        monkeypatch.setattr(os, "readlink", lambda _: "1")  # /proc/self is not this process
    beats = threading.Timer(0.7, os.utime, [tmp_path / LEASE])
    beats.start()
    with pytest.raises(ConfigError, match=rf"is in use by process {gone} on {HOST}"):
        take(tmp_path)
    beats.join()
    assert json.loads((tmp_path / LEASE).read_text())["process"] == gone


@pytest.mark.parametrize("owner", [{"job": "3"}, {}])
def test_elsewhere_a_heartbeat_that_stands_still_is_waited_for(
    owner: dict[str, str], tmp_path: Path, lost: list[str]
) -> None:
    leave_behind(tmp_path, **owner)
    began = time.monotonic()
    take(tmp_path, SLURM_8, lost).release()
    assert AT_ONCE < time.monotonic() - began < 10


def test_an_old_heartbeat_is_not_waited_for(tmp_path: Path, lost: list[str]) -> None:
    leave_behind(tmp_path)
    os.utime(tmp_path / LEASE, (time.time() - 100, time.time() - 100))
    began = time.monotonic()
    take(tmp_path, SLURM_8, lost).release()
    assert time.monotonic() - began < AT_ONCE


def test_a_lease_that_cannot_be_read_counts_by_its_age(tmp_path: Path, lost: list[str]) -> None:
    (tmp_path / LEASE).write_text("")
    began = time.monotonic()
    take(tmp_path, SLURM_8, lost).release()
    assert time.monotonic() - began > AT_ONCE


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        take(tmp_path / "file" / "run")


def test_release_leaves_the_lease_of_another(tmp_path: Path) -> None:
    first = take(tmp_path, SLURM_7)
    with take(tmp_path, SLURM_7):
        first.release()
        assert (tmp_path / LEASE).exists()


def test_the_command_refuses_a_folder_in_use(
    scenes: Path, tmp_path: Path, lost: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = tiny_overrides(scenes, tmp_path / "run")
    with take(tmp_path / "run", SLURM_7, lost):
        assert train.main([*DEFAULTS, *overrides]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"configuration error: run.folder={tmp_path / 'run'} is in use by Slurm job 7 on ")
    assert not (tmp_path / "run" / "checkpoints").exists()
