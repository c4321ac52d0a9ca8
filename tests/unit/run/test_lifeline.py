"""Who ends with its launcher and who does not, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.processes import is_running

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")

RANK = """
import signal, sys, time
from mfm_dist.distributed.launch import Launch
from mfm_dist.run.signals import end_with_launcher
signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked to stop"))
end_with_launcher(Launch.from_environment())
print("ready", flush=True)
time.sleep(30)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


def after_the_launcher_died(tmp_path: Path, environment: dict[str, str], *names: str) -> str:
    """What became of a rank within two seconds: "killed", "alive", or the last line it wrote."""
    log = tmp_path / "log"
    with log.open("w") as file:
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, RANK, *names],
            stdout=file, stderr=file, env={**os.environ, **environment},
        )  # fmt: skip
    deadline = time.monotonic() + 20
    while "ready" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    (rank,) = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        if not is_running(int(rank)):
            return log.read_text().replace("ready", "").strip() or "killed"
        time.sleep(0.02)
    os.kill(int(rank), signal.SIGKILL)
    return "alive"


def test_a_rank_of_torchrun_is_killed(tmp_path: Path) -> None:
    assert after_the_launcher_died(tmp_path, {"TORCHELASTIC_RUN_ID": "x"}) == "killed"


def test_a_lone_process_of_accelerate_is_asked_to_stop(tmp_path: Path) -> None:
    """Its launcher is known by its command line."""
    assert after_the_launcher_died(tmp_path, {"ACCELERATE_USE_CPU": "True"}, "accelerate") == "asked to stop"


def test_a_plain_start_outlives_its_shell(tmp_path: Path) -> None:
    """As under nohup, also where accelerate's variables are exported."""
    assert after_the_launcher_died(tmp_path, {"ACCELERATE_USE_CPU": "True"}) == "alive"


def test_a_launcher_that_died_first_is_noticed() -> None:
    """The rank is an orphan before it asks: it waits until its parent has gone."""
    rank = (
        "import os, time\n"
        "from mfm_dist.distributed.launch import Launch\n"
        "from mfm_dist.run.signals import end_with_launcher\n"
        "parent = os.getppid()\n"
        "print('ready', flush=True)\n"
        "while os.getppid() == parent: time.sleep(0.02)\n"
        "end_with_launcher(Launch(2, 0, None, launcher='torchrun'))\n"
        "print('went on', flush=True)\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, rank], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "ready\n"
    launcher.kill()
    assert launcher.stdout.read() == ""  # to the end, which is that of the rank
    launcher.wait()
