"""A private Slurm cluster of several nodes on this machine: the real daemons, in a folder of their own.

    python -m tests.slurm.cluster [--nodes 2]      starts one, says how to use it, and stops it on Ctrl-C

It needs Debian's packages (apt-get install slurm-wlm munge), whose slurmd may run several times on one host; no root,
no configuration below /etc, nothing that outlives ``stop``. Nodes are called n1, n2, ...
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.helpers.processes import family, kill

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}


def missing() -> str | None:
    """Why there can be no cluster on this machine, None if there can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge"
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        return f"this host's name {socket.gethostname()} does not resolve: add it to /etc/hosts"
    return None


class Cluster:
    """Starts at once; ``stop`` ends it. Every command runs with ``environment``."""

    def __init__(self, nodes: int = 2, *, node_timeout: int = 15) -> None:
        """
        Args:
            nodes: how many.
            node_timeout: seconds of silence after which Slurm gives a node up (its own default is 300).
        """
        # Not below pytest's folder: a path of a socket holds 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "PATH": PATH,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._start(node_timeout)
        except BaseException:
            self.stop()
            raise

    def _start(self, node_timeout: int) -> None:
        controller, *ports = _free_ports(len(self.nodes) + 1)
        (self.folder / "slurm.conf").write_text(
            f"""ClusterName=private
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={_user()}
SlurmdUser={_user()}
AuthType=auth/munge
# A requeued job waits until its old credential has expired: 2 minutes unless told otherwise.
AuthInfo=socket={self.folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout={node_timeout}
KillWait=20
# The port of a training follows from its job's number: those of two clusters on one machine must not be the same.
FirstJobId={random.randrange(1, 60000)}
SchedulerParameters=sched_interval=5,batch_sched_delay=0
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool-%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd-%n.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/slurmd-%n.log
"""
            + "".join(
                f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=1\n"
                for name, port in zip(self.nodes, ports, strict=True)
            )
            + "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
        )
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        paths = {name: f"{self.folder}/munge.{name}" for name in ("socket", "log", "pid", "seed")}
        self._daemon(
            "munged", "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={paths['socket']}",
            f"--log-file={paths['log']}", f"--pid-file={paths['pid']}", f"--seed-file={paths['seed']}",
        )  # fmt: skip
        _wait(lambda: Path(paths["socket"]).exists(), 10, "munged")
        (self.folder / "state").mkdir()
        self._daemon("slurmctld", "slurmctld", "-D")
        for name in self.nodes:
            self.start_node(name)
        _wait(lambda: self.idle() == self.nodes, 30, "all nodes idle")

    def start_node(self, name: str) -> None:
        """Start a node's daemon, also again after ``kill_node``."""
        (self.folder / f"spool-{name}").mkdir(exist_ok=True)
        self._daemon(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """What a power cut does: the node's daemon, its steps and all their processes are gone at once."""
        daemon = self._daemons.pop(name)
        victims = family(daemon.pid)
        for step in steps_of(name, self.folder):  # they have detached themselves from the daemon
            victims += family(step)
        for process in victims:
            kill(process)
        daemon.wait()

    def stop(self) -> None:
        """End all jobs and daemons, and remove the folder."""
        if {"slurmctld", *self.nodes} & set(self._daemons):
            self.run("scancel", f"--user={_user()}", check=False)
        for name in self.nodes:
            if name in self._daemons:
                self.kill_node(name)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def idle(self) -> list[str]:
        """Names of the nodes that wait for work."""
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %t", check=False).splitlines()
        return sorted(line.split()[0] for line in lines if line.split()[1] == "idle")

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        """A command of Slurm's; returns what it prints."""
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
        )
        assert not check or done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments: str, cwd: Path, **environment: str) -> int:
        """``sbatch`` with these arguments, in ``cwd``; returns the job's number."""
        before = self.environment
        self.environment = {**before, **environment}
        try:
            return int(self.run("sbatch", "--parsable", *arguments, cwd=cwd).strip().split(";")[0])
        finally:
            self.environment = before

    def job(self, number: int | str) -> dict[str, str]:
        """What Slurm knows about a job, or a task ``ARRAY_TASK``, e.g. JobState, Restarts, NodeList, ExitCode."""
        text = self.run("scontrol", "show", "job", str(number), "--oneliner", check=False)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, number: int | str, states: Sequence[str] | set[str] = ENDED, *, seconds: float = 120) -> str:
        """Until a job is in one of the states; returns it."""
        _wait(lambda: self.job(number).get("JobState") in states, seconds, f"job {number} in one of {states}")
        return self.job(number)["JobState"]

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )


def steps_of(node: str, folder: Path) -> list[int]:
    """The slurmstepd processes of one node: their sockets lie in its spool folder."""
    steps = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "comm").read_text().strip() != "slurmstepd":
                continue
            environment = (entry / "environ").read_bytes().split(b"\0")
            files = [os.readlink(link) for link in (entry / "fd").iterdir()]
        except OSError:
            continue
        if f"SLURM_CONF={folder}/slurm.conf".encode() in environment and any(f"slurmd-{node}.log" in f for f in files):
            steps.append(int(entry.name))
    return steps


def _wait(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def main() -> None:
    """Start a cluster, wait for Ctrl-C, stop it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    arguments = parser.parse_args()
    if reason := missing():
        raise SystemExit(reason)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cluster = Cluster(arguments.nodes)
    try:
        print(f"{arguments.nodes} nodes are idle. In another terminal, in this folder:\n")
        print(f"  export SLURM_CONF={cluster.environment['SLURM_CONF']}")
        print("  sbatch --nodes=2 slurm/train_mfm.sh && squeue\n\nCtrl-C stops them.", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        print("stopping")
    finally:
        cluster.stop()


if __name__ == "__main__":
    main()
