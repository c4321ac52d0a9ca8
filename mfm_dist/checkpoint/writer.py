"""Saving a run: tensors are copied while training waits, and written (``files.write_checkpoint``) while it goes on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from mfm_dist.checkpoint.contents import collect
from mfm_dist.checkpoint.files import step_folder, write_checkpoint
from mfm_dist.checkpoint.progress import Progress
from mfm_dist.classes import ClassSet
from mfm_dist.config.loader import to_tree
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.engine import Engine
from mfm_dist.errors import StorageError
from mfm_dist.train_module import TrainModule


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that is on disk, and what it cost."""

    path: Path
    step: int
    gib: float
    """Size of its tensors in 2^30 bytes."""
    stall_seconds: float
    """How long training stood still: the rest of the write before, the copy, and without a thread the write itself."""
    write_seconds: float
    """From the first byte to the removal of old checkpoints."""


class CheckpointWriter:
    """Writes the checkpoints of a run one after another, in one thread of rank 0 or, if told so, at once.

    With the thread, rank 0's machine holds one copy of the run's state in main memory while it is written.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        config: RunConfig,
        *,
        data_fingerprints: Mapping[str, str],
        written: Callable[[Saved], None],
    ) -> None:
        """
        Args:
            folder: where checkpoints go.
            data_fingerprints: of what the run has to find again when it goes on.
            written: told on rank 0, in the thread that trains, about every checkpoint that is on disk.
        """
        self.folder = folder
        self.engine = engine
        self.config = config
        self.data_fingerprints = data_fingerprints
        self._written = written
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Saved] | None = None
        self._problem: str | None = None

    def save(self, module: TrainModule, progress: Progress) -> None:
        """Begin a checkpoint, after the one before is written. Collective.

        Raises:
            StorageError: on every rank, if the one before could not be written; without a thread, also this one.
        """
        began = time.perf_counter()
        self.wait()
        files = collect(module, self.engine)
        if self.engine.is_main:
            self._pending = self._thread.submit(
                self._write, files, copy(progress), module.classes, began, time.perf_counter()
            )
        if not self.config.checkpoint.background:
            self.wait()

    def failed(self) -> bool:
        """Tell whether a write has failed by now, without waiting. Only rank 0 knows; ``wait`` then tells all."""
        if self._pending is not None and self._pending.done():
            self._finish()
        return self._problem is not None

    def wait(self) -> None:
        """Wait until what was begun is on disk. Collective.

        Raises:
            StorageError: on every rank, if the disk is full or not writable. Nothing half is left under a final name.
        """
        self._finish()
        problem = self.engine.gather_objects(self._problem)[0]
        if problem:
            raise StorageError(problem)

    def close(self) -> None:
        """Let the write that was begun end, whatever became of the run. Not collective, raises nothing."""
        self._finish()
        self._thread.shutdown()

    def _finish(self) -> None:
        """Wait for the thread and note what became of its write."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            saved = pending.result()
        except StorageError as error:
            self._problem = str(error)
        else:
            self._written(saved)

    def _write(
        self,
        files: Mapping[str, Mapping[str, Tensor]],
        progress: Progress,
        classes: ClassSet,
        began: float,
        collected: float,
    ) -> Saved:
        """Write; this may run beside training, for it sees copies only."""
        path = step_folder(self.folder, progress.step)
        try:
            write_checkpoint(
                path,
                files,
                progress=progress,
                config=to_tree(self.config),
                classes=classes,
                data=self.data_fingerprints,
                world_size=self.engine.world_size,
                keep=self.config.checkpoint.keep,
            )
        except (OSError, SafetensorError) as error:
            if not self.folder.exists():
                raise StorageError(
                    f"{path} could not be written: {self.folder} is gone, somebody removed it"
                ) from error
            raise StorageError(
                f"{path} could not be written: {error}. Earlier checkpoints are intact; free some space "
                f"({shutil.disk_usage(self.folder).free / 2**30:.2f} GiB are free) and start the same command again"
            ) from error
        ended = time.perf_counter()
        return Saved(
            path=path,
            step=progress.step,
            gib=sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values()) / 2**30,
            stall_seconds=(collected if self.config.checkpoint.background else ended) - began,
            write_seconds=ended - collected,
        )
