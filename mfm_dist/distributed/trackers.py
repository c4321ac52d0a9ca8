"""Accelerate's trackers: the numbers of a run for TensorBoard, Weights & Biases and the like to show, and overlays."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from PIL import Image

from mfm_dist.config.loader import flatten, to_tree
from mfm_dist.config.schema import RunConfig
from mfm_dist.errors import ConfigError, StorageError
from mfm_dist.storage import read_whole

PROJECT = "mfm_dist"
"""What a tracking service files the runs under; the run itself is called as its folder."""
PACKAGES = {"comet_ml": "comet-ml"}
"""Package of a tracker where it is not called as the tracker."""
WIDEST_PICTURE = 1600
"""Pixels."""
WRITERS = "tensorboard.summary.writer.event_file_writer"
"""The module of TensorBoard's threads."""


def tracker_problems(config: RunConfig) -> list[str]:
    """List trackers that are asked for and not installed, each with the fix."""
    available = {str(tracker) for tracker in get_available_trackers()}
    return [
        f"log.trackers: {name} is not installed: pip install {PACKAGES.get(name, name)}, or leave it out"
        for name in config.log.trackers
        if name not in available
    ]


class Trackers:
    """The trackers of a run on rank 0; on the other ranks every call does nothing.

    Started here and not by ``Accelerator.init_trackers``, which knows one project name for all of them (TensorBoard
    takes it for a folder), and where one that fails ends the run.
    """

    def __init__(self, config: RunConfig, *, enabled: bool, step: int) -> None:
        """Start them.

        Args:
            step: last step whose numbers stand. TensorBoard hides what an earlier start wrote beyond it.

        Raises:
            StorageError: if a tracker cannot write its files.
            ConfigError: if it cannot be started otherwise, e.g. for want of a login.
        """
        self._started: list[GeneralTracker] = []
        self._excepthook = threading.excepthook
        threading.excepthook = self._pass_over_writers
        for name in dict.fromkeys(config.log.trackers) if enabled else ():
            try:
                self._started.append(_start(name, config, step))
            except OSError as error:
                raise StorageError(f"log.trackers: {name} cannot write its files: {error}") from error
            except Exception as error:  # each service has errors of its own
                reason = f"{type(error).__name__}: {error}"
                problem = f"log.trackers: {name} could not be started ({reason}); mend it or leave it out"
                raise ConfigError(problem) from error
        self._trackers = list(self._started)  # without those that have failed

    def log(self, values: Mapping[str, float], step: int) -> list[str]:
        """Hand on numbers by name. A tracker that fails is dropped, for no run should end by it.

        Returns:
            a line for each tracker that failed.
        """
        return self._each(self._trackers, lambda tracker: tracker.log(dict(values), step=step))

    def show(self, folder: Path, step: int) -> list[str]:
        """Hand on the PNGs of a folder, if it is there, to TensorBoard alone, each under its name.

        Returns:
            as ``log``.
        """
        chosen = [tracker for tracker in self._trackers if tracker.name == "tensorboard"]
        paths = sorted(folder.glob("*.png")) if chosen else []
        return self._each(chosen, lambda tracker: _show(tracker, paths, step))

    def _each(self, trackers: Sequence[GeneralTracker], send: Callable[[GeneralTracker], object]) -> list[str]:
        problems = []
        for tracker in list(trackers):
            try:
                send(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                problems.append(f"{tracker.name} failed and is left out from here: {type(error).__name__}: {error}")
        return problems

    def close(self) -> None:
        """Let them write what they still hold, one that failed later what it took before."""
        for tracker in self._started:
            try:
                tracker.finish()
            except Exception as error:
                if tracker in self._trackers:  # of the others it has been told
                    print(f"{tracker.name} could not finish: {type(error).__name__}: {error}", flush=True)
        self._started, self._trackers = [], []
        threading.excepthook = self._excepthook

    def _pass_over_writers(self, arguments: threading.ExceptHookArgs) -> None:
        """Print the traceback of a thread, but not of TensorBoard's writer, whose error the next ``log`` meets."""
        if type(arguments.thread).__module__ != WRITERS:
            self._excepthook(arguments)


def _show(tracker: GeneralTracker, paths: Sequence[Path], step: int) -> None:
    """Hand pictures on, no wider than ``WIDEST_PICTURE``: event files keep every one of a run."""
    for path in paths:
        with Image.open(io.BytesIO(read_whole(path))) as picture:
            picture.thumbnail((WIDEST_PICTURE, WIDEST_PICTURE))
            pixels = np.array(picture.convert("RGB"))
        tracker.writer.add_image(f"overlays/{path.stem}", pixels, step, dataformats="HWC")


def _start(name: str, config: RunConfig, step: int) -> GeneralTracker:
    kind, folder = LOGGER_TYPE_TO_CLASS[name], config.run.folder
    if name == "tensorboard":
        tracker = kind("tensorboard", folder, purge_step=step + 1 if step else 0)
        tracker.start()
        return tracker  # its page for settings wants a folder a start; they stand in config.yaml
    if name == "wandb":
        tracker = kind(PROJECT, name=folder.name, dir=str(folder))
    elif kind.requires_logging_directory:
        tracker = kind(PROJECT, folder)
    else:
        tracker = kind(PROJECT)
    tracker.start()
    settings = flatten(to_tree(config)).items()
    tracker.store_init_configuration({key: str(value) if isinstance(value, list) else value for key, value in settings})
    return tracker
