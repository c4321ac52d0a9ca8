"""The files of one run and how they come about; rank 0 writes, the other ranks hold the same paths."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mfm_dist.classes import ClassSet
from mfm_dist.config.loader import dump_config, load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.errors import EXIT_DONE, CorruptFileError, StorageError
from mfm_dist.storage import DISK_FULL, JsonLines, read_json, read_text, write_atomically

RECORDED_PACKAGES = ("torch", "deepspeed", "accelerate", "webdataset", "timm", "numpy")
OUTCOME = "outcome.json"
"""How the last start of a run ended, for scripts that cannot see a rank's exit code: ``accelerate launch`` turns every
one into 1. It is not there while a run goes on."""
REFUSED = "refused.json"
"""The same of a start that ended before the folder was its own, beside another's lease."""
LEASE = "lease.json"
"""Who has the folder (``cluster.lease``)."""
CLASSES = "classes.json"
"""The class set of a run, for who reads its scores and pictures."""
SEEN_SECONDS = 30.0
"""Within which a file that one machine writes is seen on the others."""
PROBE = "probe.json"
"""What tools/probe_rebuilder.py measured of a run, at the ``step`` that it names."""


class RunFolder:
    """Paths of a run folder; see the README for what each file holds."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path = path
        self.writes = writes
        self.metrics = JsonLines(path / "metrics.jsonl")
        self.checkpoints = path / "checkpoints"
        self._events = JsonLines(path / "events.jsonl")

    def create(self) -> None:
        """Make the folder.

        Raises:
            StorageError: if it cannot be written.
        """
        if not self.writes:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for name in (OUTCOME, REFUSED):
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"run.folder={self.path} cannot be written: {error}") from error

    def check_shared(self, lease: str, rank: int, patience: float = SEEN_SECONDS) -> None:
        """Find out whether this rank's machine sees the folder that rank 0 holds.

        Args:
            lease: what rank 0 reads in the lease file, which no other start has.
            patience: seconds; network file systems may show a new file late.

        Raises:
            StorageError: if it does not.
        """
        until = time.monotonic() + patience
        while True:
            with suppress(OSError, CorruptFileError):
                if read_text(self.path / LEASE) == lease:
                    return
            if time.monotonic() > until:
                raise StorageError(
                    f"run.folder={self.path} on {platform.node()} (rank {rank}) is not the folder that rank 0 has "
                    "under this name: all ranks write checkpoints, so put it on storage that all machines share"
                )
            time.sleep(0.1)

    def begin(self, config: RunConfig, classes: ClassSet, world: dict[str, Any], step: int) -> None:
        """Write what the run is made of, and forget what an earlier start wrote beyond ``step``, or at all if it is 0.

        Raises:
            StorageError: if the folder cannot be written.
        """
        if not self.writes:
            return
        environment = {
            "command": sys.argv,
            "started_in": str(Path.cwd()),
            "python": platform.python_version(),
            "machine": platform.platform(),
            "packages": {name: version(name) for name in RECORDED_PACKAGES},
            "revision": _revision(),
            **world,
        }
        try:
            self.forget_after(step)
            write_atomically(self.path / "config.yaml", dump_config(config))
            write_atomically(self.path / CLASSES, json.dumps(classes.to_tree(), indent=1) + "\n")
            write_atomically(self.path / "environment.json", json.dumps(environment, indent=1) + "\n")
        except OSError as error:
            raise StorageError(f"run.folder={self.path} cannot be written: {error}") from error

    def forget_after(self, step: int) -> None:
        """Drop the numbers of later steps, and at step 0 all: the run is about to write them again."""
        if not self.writes:
            return
        self.metrics.forget_after(step)
        for path in (self.path / "eval").glob("step_*.json"):
            if step == 0 or path.name > self.evaluation(step).name:
                path.unlink()

    def evaluation(self, step: int) -> Path:
        """Return the JSON file of the evaluation at a step; its overlays lie in the folder of the same name."""
        return self.path / "eval" / f"step_{step:08d}.json"

    def best_evaluation(self) -> tuple[int, float] | None:
        """Return step and mIoU, in percent, of the best evaluation, the first of equals; None where none has a mIoU."""
        found: list[tuple[int, float]] = []
        for path in sorted((self.path / "eval").glob("step_*.json")):
            with suppress(OSError, CorruptFileError, KeyError, TypeError, ValueError):
                content = read_json(path)
                found.append((int(content["step"]), float(content["miou"])))
        return max(found, key=lambda one: one[1], default=None)

    def event(self, kind: str, *, step: int, **details: Any) -> None:
        """Note something out of the ordinary: a skipped step, a bad sample, a signal."""
        if self.writes:
            self._events.append({"step": step, "event": kind, **details})

    def events(self) -> Iterator[dict[str, Any]]:
        """Read everything noted so far, by earlier starts too."""
        return iter(self._events)

    def end(self, code: int, reason: str, step: int, miou: float | None = None) -> None:
        """Say how this start of the run ended: in outcome.json, and in the last line for whoever started it.

        Args:
            step: global batches consumed.
            miou: the score of the last step in percent, where that was reached and measured.
        """
        if not self.writes:
            return
        if code == EXIT_DONE:
            last = None if miou is None or miou != miou else round(miou, 4)  # NaN, of a set without a label, is no JSON
            best_step, best = self.best_evaluation() or (None, None)
            best = None if best is None else round(best, 4)
            scores = {"miou": last, "best_miou": best, "best_step": best_step}
            print("RESULT " + json.dumps({"run": str(self.path), "step": step, **scores}))
        else:
            print(f"{reason}; the same command goes on from step {step}")
        write_outcome(self.path, code=code, reason=reason, step=step, owned=True)


def read_config(path: Path) -> RunConfig:
    """Read the configuration of a run folder, whose data is found again from any working folder.

    A relative ``data.root`` is that of the folder which the run was started in, as long as it is there.

    Raises:
        ConfigError: it cannot be read, or does not fit this version.
    """
    config = load_config(path / "config.yaml")
    with suppress(OSError, CorruptFileError, KeyError, TypeError):  # environment.json is for people, and may be missing
        root = Path(read_json(path / "environment.json")["started_in"]) / config.data.root
        if root.is_dir():
            config.data.root = root
    return config


def storage_error(error: OSError, folder: Path) -> StorageError | None:
    """Tell what an error means that a run met: a full disk anywhere, or a folder of its own that is not writable.

    Returns:
        None for what has nothing to do with either.
    """
    named = [Path(str(name)) for name in (error.filename, error.filename2) if name is not None]
    if error.errno not in DISK_FULL and not any(name.is_relative_to(folder) for name in named):
        return None
    if not folder.is_dir():
        return StorageError(f"run.folder={folder} is gone: somebody removed it while the run went on")
    if isinstance(error, FileNotFoundError):  # whoever removes a folder empties it first
        return StorageError(f"run.folder={folder}: {error.filename} is gone, somebody removed it while the run went on")
    return StorageError(
        f"run.folder={folder}: {error}. Checkpoints are intact; make room, or mend what keeps it from being written, "
        "and start the same command again"
    )


def _revision() -> str | None:
    """Ask git for the revision of the code, with a plus sign where files differ from it; None outside a clone."""
    command, here = ["git", "describe", "--always", "--dirty=+"], Path(__file__).parent
    with suppress(OSError, subprocess.SubprocessError):
        described = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True, timeout=10)
        return described.stdout.strip()
    return None


def write_outcome(folder: Path, *, code: int, reason: str, step: int, owned: bool) -> None:
    """Say how it ended. A full disk must not hide the reason, which the console tells too.

    Args:
        folder: the run folder.
        step: global batches consumed, -1 if training did not begin.
        owned: whether this start has, or had, the folder's lease. What another says there is not written over.
    """
    text = json.dumps({"code": code, "reason": reason, "step": step, **slurm_job_tag()}) + "\n"
    with suppress(OSError):
        write_atomically(folder / (OUTCOME if owned or not (folder / LEASE).exists() else REFUSED), text)


def slurm_job_tag() -> dict[str, str]:
    """Name the Slurm job that says it, if any: one that is refused the folder of another leaves its word there too."""
    job = os.environ.get("SLURM_JOB_ID")
    return {"job": job} if job else {}
