"""Saving a run: pieces are copied while training waits, and written (``files.write_rank``) while it goes on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotDoneError
from concurrent.futures import wait as wait_for
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from mfm_dist.checkpoint.contents import collect
from mfm_dist.checkpoint.files import (
    Snapshot,
    begin_checkpoint,
    complete_checkpoint,
    discard_checkpoint,
    step_folder,
    write_rank,
)
from mfm_dist.checkpoint.host_memory import HostMemory
from mfm_dist.checkpoint.progress import Progress
from mfm_dist.classes import ClassSet
from mfm_dist.config.loader import to_tree
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.engine import Engine
from mfm_dist.errors import CorruptFileError, StorageError
from mfm_dist.train_module import TrainModule

PATIENCE = 1500.0
"""Seconds given to a write where no watchdog says how long; a disk that takes longer is taken for one that hangs."""
PATIENCE_AT_THE_END = 60.0
"""Seconds that rank 0 waits for the others' pieces when a run ends in an error: they may be gone."""


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
    """Writes the checkpoints of a run one after another, in one thread of each rank or, if told so, at once.

    With the thread, each rank holds a copy of what it writes in main memory, from its first checkpoint on. The threads
    exchange nothing: rank 0 learns from files that the others have written, and names the checkpoint then.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        config: RunConfig,
        *,
        data_fingerprints: Mapping[str, str],
        written: Callable[[Saved], None],
        patience: float = PATIENCE,
    ) -> None:
        """
        Args:
            folder: where checkpoints go.
            data_fingerprints: of what the run has to find again when it goes on.
            written: told on rank 0, in the thread that trains, about every checkpoint that is on disk.
            patience: seconds after which a write is given up, and who has not written is named.
        """
        self.folder = folder
        self.engine = engine
        self.config = config
        self.data_fingerprints = data_fingerprints
        self.patience = patience
        self._written = written
        self._memory = HostMemory()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Saved] | None = None
        self._problem: str | None = None
        self._abandoned = Event()
        self._saving = folder

    def save(self, module: TrainModule, progress: Progress) -> None:
        """Begin a checkpoint, after the one before is written. Collective.

        Raises:
            StorageError: on every rank, if the one before could not be written; without a thread, also this one.
        """
        began = time.perf_counter()
        following = step_folder(self.folder, progress.step)
        self._settle(following)
        self._saving = following
        snapshot = collect(module, self.engine, self._memory if self.config.checkpoint.background else None)
        collected = time.perf_counter()
        self._pending = self._thread.submit(self._write, snapshot, copy(progress), module.classes, began, collected)
        if not self.config.checkpoint.background:
            self.wait()

    def failed(self) -> bool:
        """Tell whether a write of this rank has failed by now, without waiting; ``wait`` then tells all."""
        if self._pending is not None and self._pending.done():
            self._finish()
        return self._problem is not None

    def wait(self) -> None:
        """Wait until what was begun is on disk. Collective.

        Raises:
            StorageError: on every rank, if a disk is full or not writable, or a rank has not written its pieces in
                time. Nothing half is left under a final name.
        """
        self._settle()

    def close(self) -> None:
        """Let the write that was begun end, whatever became of the run. Not collective, raises nothing."""
        if self._pending is not None and self.engine.world_size > 1:
            wait_for([self._pending], min(self.patience, PATIENCE_AT_THE_END))
        self._give_up()
        self._thread.shutdown(wait=False)
        self._memory = HostMemory()

    def _settle(self, next_folder: Path | None = None) -> None:
        """Wait for all ranks' writes, then make the next folder if there is one; raise on all what failed on any."""
        # First the others, so that rank 0 does not wait for the pieces of one that has failed.
        if not self.engine.is_main:
            self._finish()
        self._agree()
        self._finish()
        if self.engine.is_main and self._problem is None and next_folder is not None:
            try:
                begin_checkpoint(next_folder)
            except OSError as error:
                self._problem = self._why(next_folder, error)
        self._agree()

    def _agree(self) -> None:
        """Raise on every rank what one of them has met with. Collective."""
        problems = [problem for problem in self.engine.gather_objects(self._problem) if problem]
        if problems:
            self._give_up()
            raise StorageError(problems[0])

    def _give_up(self) -> None:
        """Have rank 0 wait for nobody any more, and remove what there is."""
        self._abandoned.set()
        self._finish()
        if self.engine.is_main and self._problem is not None:
            discard_checkpoint(self._saving)

    def _finish(self) -> None:
        """Wait for the thread and note what became of its write."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            saved = pending.result(self.patience)
        except StorageError as error:
            self._problem = str(error)
        except NotDoneError:
            self._problem = (
                f"{self._saving} is not complete: rank {self.engine.rank} has not written its pieces within "
                f"{self.patience:g} s"
            )
        else:
            if self.engine.is_main:
                self._written(saved)

    def _write(
        self, snapshot: Snapshot, progress: Progress, classes: ClassSet, began: float, collected: float
    ) -> Saved:
        """Write; this may run beside training, for it sees copies only."""
        path = step_folder(self.folder, progress.step)
        try:
            write_rank(path, self.engine.rank, snapshot)
            if self.engine.is_main:
                complete_checkpoint(
                    path,
                    snapshot.tensors,
                    progress=progress,
                    config=to_tree(self.config),
                    classes=classes,
                    data=self.data_fingerprints,
                    world_size=self.engine.world_size,
                    keep=self.config.checkpoint.keep,
                    patience=self.patience,
                    abandoned=self._abandoned,
                )
        except (OSError, CorruptFileError) as error:
            raise StorageError(self._why(path, error)) from error
        ended = time.perf_counter()
        return Saved(
            path=path,
            step=progress.step,
            gib=sum(spec.nbytes for spec in snapshot.tensors.values()) / 2**30,
            stall_seconds=(collected if self.config.checkpoint.background else ended) - began,
            write_seconds=ended - collected,
        )

    def _why(self, path: Path, error: Exception) -> str:
        """Say why a checkpoint could not be written, and what to do."""
        if not self.folder.exists():
            return f"{path} could not be written: {self.folder} is gone, somebody removed it"
        if isinstance(error, FileNotFoundError):  # whoever removes a folder empties it first
            return f"{path} could not be written: {error.filename} is gone, somebody removed it"
        return (
            f"{path} could not be written: {error}. Earlier checkpoints are intact; free some space "
            f"({shutil.disk_usage(self.folder).free / 2**30:.2f} GiB are free) and start the same command again"
        )
