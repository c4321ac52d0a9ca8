"""Shards that can only be read from end to end: ``pipe:``, ``s3:``, ``hf:`` and ``http:`` sources, through webdataset.

There is no index to check against, no random access and no exact resume. Shards are divided between ranks and their
workers anew in every epoch and shuffled through a buffer; a run that resumes begins a new pass in a new order, so it
may see some samples sooner again and others later. World size and workers change the order too. Where any of this
matters, stage the shards instead (``data.scratch``) or read them in lanes.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, groupby, islice
from operator import attrgetter
from typing import IO, Any, NamedTuple

import numpy as np
from torch.utils.data import get_worker_info
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls

from mfm_dist.data.blocks import REPLACEMENT_TRIES, DrawnSample, nothing_to_use
from mfm_dist.data.decoding import jpeg_decoder
from mfm_dist.data.index import IMAGE_EXTENSIONS, LABEL_EXTENSION, split_name, wrong_name
from mfm_dist.data.reader import Sample, decode_sample
from mfm_dist.errors import BadSample, CorruptFileError, DataError
from mfm_dist.rng import Stream, keyed_generator
from mfm_dist.storage import CHUNK_BYTES

SHUFFLE_BUFFER = 200
"""Samples of a consumer that are shuffled among themselves, still encoded: about 30 MB."""


class ShardStream:
    """Shards behind a URL in which braces stand for several: ``s3://bucket/{000000..000099}.tar``."""

    def __init__(self, url: str, *, samples: int, num_classes: int, decoder: str = "torchvision") -> None:
        """
        Args:
            samples: how many there are in all; nothing but the share of bad ones depends on it.
            decoder: as for ``jpeg_decoder``, which raises ConfigError where it is not installed.
        """
        self.url = url
        self.samples = samples
        self.num_classes = num_classes
        self._decode_jpeg = jpeg_decoder(decoder)

    def __len__(self) -> int:
        return self.samples

    @property
    def fingerprint(self) -> str:
        """Of the URL; what lies behind it is not known before it is read."""
        return hashlib.sha256(self.url.encode()).hexdigest()

    @property
    def shards(self) -> list[str]:
        """A URL for each shard, as webdataset opens it: it has no client for s3, but Amazon's command does as well."""
        urls = expand_urls(self.url)
        return [f"pipe:aws s3 cp '{url}' -" if url.startswith("s3:") else url for url in urls]

    def decode(self, members: dict[str, Any], *, with_label: bool) -> Sample | BadSample:
        """Decode one sample of ``stream_samples``; a ``BadSample`` if it cannot be used."""
        key = str(members["__key__"])
        formats = [extension for extension in IMAGE_EXTENSIONS if extension in members]
        try:
            if len(formats) != 1:
                raise CorruptFileError("it needs exactly one image (.jpg or .png)")
            image = _array(members, formats[0], "image")
            label = _array(members, LABEL_EXTENSION, "label") if with_label else None
            return decode_sample(key, formats[0], image, label, self.num_classes, self._decode_jpeg)
        except CorruptFileError as error:
            return _bad(members["__url__"], key, str(error))


def _bad(url: str, key: str, reason: str) -> BadSample:
    """Name what is wrong in a stream; its samples have no numbers, so their keys make some."""
    return BadSample(shard=url, key=key, number=zlib.crc32(key.encode()) if key else -1, reason=reason)


def _array(members: dict[str, Any], extension: str, what: str) -> np.ndarray:
    """Return a member as uint8 [size]. Raises CorruptFileError."""
    if extension not in members:
        raise CorruptFileError(f"it has no {what}")
    if not members[extension]:
        raise CorruptFileError(f"its {what} is empty")
    return np.frombuffer(bytearray(members[extension]), dtype=np.uint8)  # a copy that torch may write to, or it warns


@dataclass(kw_only=True)
class StreamedSamples:
    """The part of a stream that one consumer, a worker of a rank, takes; every pass divides the stream anew."""

    origin: ShardStream
    with_label: bool
    seed: int
    stream: Stream
    start: int
    """Key of the first pass, another for every start of a run."""
    consumer: int
    """Number of this rank's first worker."""
    consumers: int
    """Workers of all ranks."""
    _members: Iterator[dict[str, Any] | BadSample] | None = field(default=None, init=False)

    def take(self, position: int, bad: list[BadSample]) -> DrawnSample:  # noqa: ARG002  a stream has no positions
        """Return the next sample of this consumer that can be used.

        Raises:
            DataError: ``REPLACEMENT_TRIES`` samples one after the other cannot be used, or a pass yields none.
        """
        if self._members is None:
            worker = get_worker_info()
            self._members = self._shuffled(self.consumer + (worker.id if worker else 0))
        refused: list[BadSample] = []
        while len(refused) < REPLACEMENT_TRIES:
            found = next(self._members)
            if isinstance(found, BadSample):
                bad.append(found)
                continue
            sample = self.origin.decode(found, with_label=self.with_label)
            if isinstance(sample, BadSample):
                refused.append(sample)
                continue
            bad += refused
            return DrawnSample(sample, None)
        raise nothing_to_use(refused)

    def _shuffled(self, consumer: int) -> Iterator[dict[str, Any] | BadSample]:
        """Yield all passes, through the buffer."""
        draws = keyed_generator(self.seed, Stream.STREAM_ORDER, self.start, consumer)
        passes = self._passes(consumer)
        buffer = list(islice(passes, SHUFFLE_BUFFER))
        for members in passes:
            place = int(draws.integers(len(buffer)))
            members, buffer[place] = buffer[place], members
            yield members

    def _passes(self, consumer: int) -> Iterator[dict[str, Any] | BadSample]:
        shards = self.origin.shards
        empty_passes = 0
        for epoch in count(self.start):
            order = keyed_generator(self.seed, self.stream, epoch).permutation(len(shards))
            empty_passes += 1
            for members in self._one_pass([shards[number] for number in order], consumer, epoch):
                if isinstance(members, dict):
                    empty_passes = 0
                yield members
            if empty_passes > self.consumers:
                raise DataError(f"{self.origin.url}: not one sample in a whole pass; does the command work by itself?")

    def _one_pass(self, shards: list[str], consumer: int, epoch: int) -> Iterator[dict[str, Any] | BadSample]:
        """Take whole shards where there are enough, else every n-th sample of one.

        Which n-th changes with the epoch, so that no consumer is without for long.
        """
        group = consumer % len(shards)
        step = len(range(group, self.consumers, len(shards))) if self.consumers > len(shards) else 1
        own = [shards[group]] if step > 1 else shards[consumer :: self.consumers]
        for url in own:
            number = epoch
            for found in stream_samples(url):
                if isinstance(found, BadSample):
                    yield found
                    continue
                if number % step == consumer // len(shards) % step:
                    yield found
                number += 1


_NO_SAMPLE = re.compile(r"__[^/]*__($|/)")
"""Names that webdataset keeps for descriptions of the whole."""


class _Member(NamedTuple):
    """A file in the tar, or (without a key) a place where reading ends."""

    key: str
    extension: str
    content: bytes
    trouble: str


def stream_samples(url: str) -> Iterator[dict[str, Any] | BadSample]:
    """Yield every sample as webdataset gives it: members by extension, ``__key__`` and ``__url__``.

    ``webdataset`` opens the source. It is not asked for the samples, because it takes a damaged header for the end of
    the shard and says nothing of what lies behind. Raises nothing: what cannot be read is a ``BadSample``, with the
    key where it is known.
    """
    seen: set[str] = set()
    for key, group in groupby(_members(url), attrgetter("key")):
        members = list(group)
        contents = {member.extension: member.content for member in members}
        troubles = [member.trouble for member in members if member.trouble]
        if key in seen:
            troubles.append("its key is used twice, or its members are not side by side")
        elif len(contents) < len(members):
            troubles.append("two of its members have the same name")
        if not troubles:
            yield {"__key__": key, "__url__": url, **contents}
        for trouble in troubles:
            yield _bad(url, key, trouble)
        seen.add(key)


def _members(url: str) -> Iterator[_Member]:
    stream: Any = None
    try:
        stream = gopen(url)
        yield from _tar_members(stream)
        stream.close()
    except Exception as error:  # whatever the tool behind the URL fails with
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and (status := getattr(stream, "status", None)):
            # The message of a command holds its process id and may hold secrets.
            reason = f"the command behind it ended with exit code {status}"
        yield _Member("", "", b"", reason)


def _tar_members(stream: IO[bytes]) -> Iterator[_Member]:
    """Yield the members of a tar, and what is wrong with it. Raises whatever ``tarfile`` and the stream raise."""
    with tarfile.open(fileobj=stream, mode="r|*") as archive:
        for info in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            key, extension = split_name(info.name)
            if not (info.isreg() and key and extension) or _NO_SAMPLE.match(info.name):
                continue
            file = archive.extractfile(info)
            assert file is not None  # it is a regular one
            yield _Member(key, extension.lower(), file.read(), wrong_name(info.name, key))
        rest: Any = archive.fileobj
        end = archive.offset
        if rest.tell() - end < tarfile.BLOCKSIZE:
            yield _Member("", "", b"", f"truncated after {rest.tell()} bytes, the end mark is missing")
        elif end == 0:
            yield _Member("", "", b"", "it holds nothing")
        elif lost := _bytes_but_zeros(rest):
            yield _Member("", "", b"", f"damaged header at byte {end}; the {lost} bytes behind it are lost")


def _bytes_but_zeros(stream: IO[bytes]) -> int:
    """Read to the end; count the bytes up to the last that is not zero. Only zeros may follow the end mark."""
    count = last = 0
    while chunk := stream.read(CHUNK_BYTES):
        if kept := len(chunk.rstrip(b"\0")):
            last = count + kept
        count += len(chunk)
    return last
