"""Is what others do wrong still wrong? A failure here is good news: what works around it may go.

docs/distributed.md names the place of each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.faults_of_others import FAULTS
from tests.helpers.processes import family, is_running, wait_until
from tests.helpers.runs import run_python

GONE = "{fault} does not show any more: what works around it, named in docs/distributed.md, can be removed"


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_that_is_worked_around_is_still_there(kind: str) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    found = run_python([*torchrun, "-m", "tests.distributed.faults_of_others", kind])
    (line,) = [line for line in found.stdout.splitlines() if line.startswith("FAULTS ")] or [found.stderr[-3000:]]
    shows = json.loads(line.removeprefix("FAULTS "))
    assert shows.keys() == {fault.__name__ for fault in FAULTS[kind]}
    assert [GONE.format(fault=fault) for fault, there in shows.items() if not there] == []


def test_multi_cpu_still_starts_one_process(tmp_path: Path) -> None:
    """Of the two that its launch file asks for."""
    file = tmp_path / "launch.yaml"
    file.write_text("{compute_environment: LOCAL_MACHINE, distributed_type: MULTI_CPU, use_cpu: true, num_processes: 2,"
                    " num_machines: 1, machine_rank: 0, mixed_precision: 'no'}")  # fmt: skip
    (tmp_path / "say.py").write_text("print('started')")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)]
    done = subprocess.run([*command, str(tmp_path / "say.py")], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count("started") == 1, GONE.format(fault="MULTI_CPU")


def test_usr1_still_kills_the_launcher_alone(tmp_path: Path) -> None:
    """Without PET_SIGNALS_TO_HANDLE torchrun dies of it and leaves its ranks behind."""
    script = tmp_path / "wait.py"
    script.write_text(f"import pathlib, time; pathlib.Path({str(tmp_path / 'here')!r}).touch(); time.sleep(60)")
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--standalone", str(script)]
    launcher = subprocess.Popen(command, env=plain, stderr=subprocess.DEVNULL)
    wait_until((tmp_path / "here").exists, seconds=60, what="the rank")
    ranks = [process for process in family(launcher.pid) if process != launcher.pid]
    try:
        os.kill(launcher.pid, 10)
        launcher.wait(timeout=30)
        assert any(map(is_running, ranks)), GONE.format(fault="SIGUSR1 and torchrun")
    finally:
        for process in ranks:
            if is_running(process):
                os.kill(process, 9)


def test_the_inference_kernel_is_still_compiled_at_the_first_start() -> None:
    import deepspeed

    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"], GONE.format(fault="deepspeed_shm_comm")
