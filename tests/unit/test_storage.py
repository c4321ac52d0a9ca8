"""Files appear whole or not at all, and a full disk is told with what to do about it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mfm_dist.errors import StorageError
from mfm_dist.storage import atomic_file, write_atomically


def full(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("content", ["new text", b"\x00\xff"])
def test_text_and_bytes_replace_what_was_there(content: str | bytes, tmp_path: Path) -> None:
    for before in ("old", content):
        write_atomically(tmp_path / "file", before)
    expected = content.encode() if isinstance(content, str) else content
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", expected)]


def test_a_full_disk_keeps_the_old_file_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"no space left for .*file: .* MiB are free\. Make room, then") as caught:
        write_atomically(tmp_path / "file", "new")
    assert isinstance(caught.value, OSError)  # so whoever names the folder and the option may do so
    assert caught.value.exit_code == 4
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    with atomic_file(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "link").read_text() == "new"
