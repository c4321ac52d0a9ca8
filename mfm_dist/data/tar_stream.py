"""The samples of a tar that can only be read from end to end, and what is lost of it.

``webdataset`` opens the sources. It is not asked for their samples, because it takes a damaged header for the end of
the shard and says nothing of what lies behind.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from operator import attrgetter
from typing import IO, Any, NamedTuple

from webdataset.gopen import gopen

from mfm_dist.batch import BadSample
from mfm_dist.data.files import CHUNK_BYTES
from mfm_dist.data.tar_scan import split_name, wrong_name

_NO_SAMPLE = re.compile(r"__[^/]*__($|/)")
"""Names that webdataset keeps for descriptions of the whole."""


class _Member(NamedTuple):
    """A file in the tar, or (without a key) a place where reading ends."""

    key: str
    extension: str
    content: bytes
    trouble: str


def stream_samples(url: str) -> Iterator[dict[str, Any] | BadSample]:
    """Every sample as webdataset gives it: members by extension, ``__key__`` and ``__url__``.

    Raises nothing: what cannot be read is a ``BadSample``, with the key where it is known.
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
            yield BadSample(shard=url, key=key, number=zlib.crc32(key.encode()) if key else -1, reason=trouble)
        seen.add(key)


def _members(url: str) -> Iterator[_Member]:
    stream: Any = None
    try:
        stream = gopen(url)
        yield from _tar_members(stream)
        stream.close()
    except Exception as error:  # whatever the tool behind the URL fails with
        yield _Member("", "", b"", _reason(error, stream))


def _reason(error: Exception, stream: Any) -> str:
    """The same for the same failure. The message of a command holds its process id and may hold secrets."""
    if isinstance(error, OSError) and (status := getattr(stream, "status", None)):
        return f"the command behind it ended with exit code {status}"
    return f"{type(error).__name__}: {error}"


def _tar_members(stream: IO[bytes]) -> Iterator[_Member]:
    """Raises whatever ``tarfile`` and the stream raise."""
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
    """Reads to the end; bytes up to the last that is not zero. Only zeros may follow the end mark."""
    count = last = 0
    while chunk := stream.read(CHUNK_BYTES):
        if kept := len(chunk.rstrip(b"\0")):
            last = count + kept
        count += len(chunk)
    return last
