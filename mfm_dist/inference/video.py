"""Read the frames of a video and write a new one of the same times, through PyAV (FFmpeg's libraries)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mfm_dist.data.photographs import LARGEST_PICTURE
from mfm_dist.errors import ConfigError, CorruptFileError

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
TIME_BASE = Fraction(1, 90_000)
"""Seconds; the clock of MPEG, fine enough for every rate of frames."""

TOLERANCE = 1.0
"""Seconds; a container's length is that of its longest stream, which may be the sound."""


class Frame(NamedTuple):
    """One picture of a video."""

    image: Tensor
    """uint8 RGB [3, H, W], upright."""
    seconds: float
    """When it is shown."""


def require_pyav() -> None:
    """Raise ConfigError where PyAV is not installed."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise ConfigError("videos need PyAV: pip install av") from error


def frames_of(path: Path) -> Iterator[Frame]:
    """Decode the first video stream of a file, frame by frame.

    Raises:
        CorruptFileError: for a file that cannot be decoded, or not to its end, or with too large frames.
    """
    import av

    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise CorruptFileError("holds no video")
            stream = container.streams.video[0]
            if not 0 < stream.width * stream.height <= LARGEST_PICTURE:
                raise CorruptFileError(f"frames of {stream.width} x {stream.height} pixels: make it smaller")
            stream.thread_type = "AUTO"
            for number, frame in enumerate(container.decode(stream)):
                # Phones store frames lying on their side and say by how much to turn them.
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                seconds = frame.time if frame.time is not None else number / float(stream.average_rate or 25)
                yield Frame(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).contiguous(), seconds)
    except av.FFmpegError as error:
        raise CorruptFileError(f"cannot be decoded ({error.strerror})") from error


class Length(NamedTuple):
    """How long a file says that its video is; None where it does not, or cannot be read."""

    frames: int | None = None
    seconds: float | None = None

    def cut_short(self, times: Sequence[float]) -> str | None:
        """Say that frames shown at these seconds end well before the video should; None where they do not."""
        longest = max((after - before for before, after in pairwise(times)), default=0.0)
        if self.seconds is None or not times or times[-1] + longest + TOLERANCE >= self.seconds:
            return None
        return f"breaks off {times[-1]:.1f} s into {self.seconds:.1f} s"


def length_of(path: Path) -> Length:
    """Read from a file's head how long it should be."""
    import av

    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            seconds = container.duration and container.duration / av.time_base
            if stream.duration is not None and stream.time_base is not None:
                seconds = float(stream.duration * stream.time_base)
            return Length(stream.frames or None, seconds)
    except (av.FFmpegError, IndexError):
        return Length()


class VideoWriter:
    """Writes frames as H.264 in MP4, which browsers and players read. Close it by leaving its ``with`` block."""

    def __init__(self, file: BinaryIO) -> None:
        import av

        self._container = av.open(file, "w", format="mp4")
        self._stream: Any = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None and self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()

    def write(self, picture: npt.NDArray[np.uint8], seconds: float) -> None:
        """Add a frame, RGB [H, W, 3] of the same size as the others. A side of odd length gets one pixel more."""
        import av

        height, width = picture.shape[:2]
        even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=25, options={"crf": "20"})
            self._stream.width, self._stream.height = even.shape[1], even.shape[0]
            self._stream.pix_fmt, self._stream.codec_context.time_base = "yuv420p", TIME_BASE
        frame = av.VideoFrame.from_ndarray(even, format="rgb24")
        frame.pts, frame.time_base = round(seconds / TIME_BASE), TIME_BASE
        self._container.mux(self._stream.encode(frame))
