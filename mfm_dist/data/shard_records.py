"""What a manifest says of each shard."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import overload


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One finished shard."""

    file: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str
    """Of the sidecar index, which is checked whenever the folder is opened; being small, that costs little."""
    image_sizes: dict[str, int]
    """Number of images by size, keyed ``"<height>x<width>"``."""
    pixel_counts: dict[str, int]
    """Labelled pixels by class name, and those that carry no class under ``"ignore"``; empty without labels."""
    classes_sha256: str = ""
    """Of the class statistics (``class_statistics``); empty without labels, and where never counted."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Samples that were to be here and cannot be used: key -> reason."""

    @property
    def has_classes(self) -> bool:
        """Whether any pixel carries a class."""
        return any(count for name, count in self.pixel_counts.items() if name != "ignore")


class ShardRecords(Sequence[ShardRecord]):
    """The records of all shards, each made when it is asked for out of columns: a tenth of what they take themselves.

    Every rank holds them, of 100,000 shards with 19 classes in 40 MB.
    """

    def __init__(self, records: Iterable[ShardRecord] = ()) -> None:
        """Raise ValueError or OverflowError for a record whose checksums are none, or with numbers beyond 63 bits."""
        self.samples = array("q")
        """Of each shard."""
        self._bytes = array("q")
        self._files = _Texts()
        self._sha256, self._index_sha256, self._classes_sha256 = (_Checksums() for _ in range(3))
        self._image_sizes, self._pixel_counts = _Counts(), _Counts()
        self._left_out: dict[int, dict[str, str]] = {}
        for record in records:
            if record.left_out:
                self._left_out[len(self.samples)] = record.left_out
            self.samples.append(record.samples)
            self._bytes.append(record.bytes)
            self._files.append(record.file)
            self._sha256.append(record.sha256)
            self._index_sha256.append(record.index_sha256)
            self._classes_sha256.append(record.classes_sha256)
            self._image_sizes.append(record.image_sizes)
            self._pixel_counts.append(record.pixel_counts)

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, which: int) -> ShardRecord: ...
    @overload
    def __getitem__(self, which: slice) -> tuple[ShardRecord, ...]: ...
    def __getitem__(self, which: int | slice) -> ShardRecord | tuple[ShardRecord, ...]:
        if isinstance(which, slice):
            return tuple(self[number] for number in range(len(self))[which])
        shard = range(len(self))[which]
        return ShardRecord(
            file=self._files[shard],
            samples=self.samples[shard],
            bytes=self._bytes[shard],
            sha256=self._sha256[shard],
            index_sha256=self._index_sha256[shard],
            image_sizes=self._image_sizes[shard],
            pixel_counts=self._pixel_counts[shard],
            classes_sha256=self._classes_sha256[shard],
            left_out=self._left_out.get(shard, {}),
        )

    @property
    def sha256s(self) -> str:
        """Those of all shards, end to end."""
        return self._sha256.digits()

    @property
    def image_sizes(self) -> dict[str, int]:
        """Of all shards together."""
        return self._image_sizes.total()

    @property
    def pixel_counts(self) -> dict[str, int]:
        """Of all shards together."""
        return self._pixel_counts.total()

    @property
    def left_out(self) -> dict[str, str]:
        """Of all shards together."""
        return {key: reason for one in self._left_out.values() for key, reason in one.items()}


class _Texts:
    """Texts, end to end."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("q", [0])

    def append(self, text: str) -> None:
        self._text += text.encode()
        self._ends.append(len(self._text))

    def __getitem__(self, number: int) -> str:
        return self._text[self._ends[number] : self._ends[number + 1]].decode()


class _Checksums:
    """SHA-256s in hex digits, held in 32 bytes each; "" is held as 32 zeros, which is the checksum of nothing known."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def append(self, digits: str) -> None:
        checksum = bytes.fromhex(digits) if digits else bytes(32)
        if len(checksum) != 32:
            raise ValueError(f"{digits:.80} is not 64 hex digits")
        self._bytes += checksum

    def __getitem__(self, number: int) -> str:
        checksum = self._bytes[32 * number : 32 * number + 32]
        return checksum.hex() if any(checksum) else ""

    def digits(self) -> str:
        """Return all, end to end."""
        return self._bytes.hex()


class _Counts:
    """Dictionaries of numbers by name, end to end; a name is held once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        """Of the names, which are numbered as they come."""
        self._names: list[str] = []
        self._which = array("I")
        """Number of the name of each count."""
        self._counts = array("q")
        self._ends = array("q", [0])

    def append(self, counts: dict[str, int]) -> None:
        for name, count in counts.items():
            if name not in self._numbers:
                self._numbers[name] = len(self._names)
                self._names.append(name)
            self._which.append(self._numbers[name])
            self._counts.append(count)
        self._ends.append(len(self._counts))

    def __getitem__(self, number: int) -> dict[str, int]:
        part = slice(self._ends[number], self._ends[number + 1])
        return {self._names[which]: count for which, count in zip(self._which[part], self._counts[part], strict=True)}

    def total(self) -> dict[str, int]:
        """Return the sums, name by name, keeping names whose count is 0."""
        sums = [0] * len(self._names)
        for which, count in zip(self._which, self._counts, strict=True):
            sums[which] += count
        return dict(zip(self._names, sums, strict=True))
