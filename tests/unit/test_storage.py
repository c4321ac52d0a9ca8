"""Files appear whole or not at all, and a full disk is told with what to do about it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from mfm_dist import storage
from mfm_dist.errors import CorruptFileError, StorageError
from mfm_dist.storage import JsonLines, atomic_file, read_json, read_json_in_parts, whole_folder, write_atomically


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


def test_a_link_in_the_place_of_a_temporary_file_or_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("precious")
    (tmp_path / ".latest.unfinished").symlink_to(tmp_path / "precious" / "file")
    (tmp_path / ".step.tmp").symlink_to(tmp_path / "precious")
    write_atomically(tmp_path / "latest", "new")
    with whole_folder(tmp_path / "step") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "precious" / "file").read_text() == "precious"
    assert [(tmp_path / name).read_text() for name in ("latest", "step/file")] == ["new", "new"]


ODD_LINES = [b"null", b"3", b'"text"', b"[1]", b'{"step": "4"}', b'{"step": 3.5}', b'{"step": true}', b'{"step": null}']
ODD_LINES += [b'{"step": 2, "reason": "\xff"}', b"\xff\xfe\x00", b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}", b""]
ODD_LINES += [b'{"step": 2, "loss/to', b"{}}"]


def test_odd_lines_are_passed_over_and_cost_no_other(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    steps = range(len(ODD_LINES))
    lines.path.write_bytes(b"".join(b'{"step": %d}\n%s\n' % (step, odd) for step, odd in enumerate(ODD_LINES)))
    assert [record["step"] for record in lines] == [*steps]
    lines.forget_after(5)
    assert lines.path.read_text() == "".join(f'{{"step": {step}}}\n' for step in range(6))


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe.json", "folder.json"):
        with pytest.raises(CorruptFileError, match="is no regular file"):
            read_json(tmp_path / name)
        with pytest.raises(StorageError, match="is no regular file; move it away"):
            list(JsonLines(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": "\xe9"}', r"file is not UTF-8 \(byte 7 is 0xe9\): save it as UTF-8"),
        (b"[" * 100_000, "is no JSON .maximum recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is no JSON .Exceeds the limit"),
        (b"[3]", "is not a mapping"),
        (b'{"a": "' + b"x" * 1000 + b'"}', "is larger than 0.000953674 MiB"),
        (b"", "is no JSON"),
    ],
)
def test_json_that_is_none_is_told_with_the_reason(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CorruptFileError, match=reason):
        read_json(tmp_path / "file", 1000 if len(content) == 1009 else 1 << 20)


LONG = {
    "a": [1, {"b": []}],
    "many": [12345, -1.5e-7, '\\ "}],:', {"x": {"y": [None, True]}}, [[]], ""],
    "é": "ü𝄞",
    "z": 6,
}
ODD = [{"many": []}, {}, {"many": [[], {}, 1]}, {"a": {"many": [1]}}]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_json_read_in_parts_is_what_is_read_whole(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever what was read so far ends: in a number, a name, an escape."""
    monkeypatch.setattr(storage, "CHUNK_BYTES", chunk)
    for content in (LONG, *ODD):
        for text in (json.dumps(content), json.dumps(content, indent=3, ensure_ascii=False) + "\n\n"):
            (tmp_path / "file").write_text(text, encoding="utf-8")
            parts = list(read_json_in_parts(tmp_path / "file", "many", 1000))
            many = [value for key, value in parts if key == "many"]
            others = {key: value for key, value in parts if key != "many"}
            assert {**others, **({"many": many} if "many" in content else {})} == content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"many": [1, 2', "no value at '2'"),
        (b'{"many": [1, 2 ', "'' where , or ] belongs"),
        (b'{"many": [1, 2}', "'}' where , or ] belongs"),
        (b'{"many": 3}', r"'3' where \[ belongs"),
        (b'{"many": [1 2]}', "'2' where , or ] belongs"),
        (b'{"many": [1,]}', "Expecting value"),
        (b'{"a": nul}', "Expecting value"),
        (b'{"a": "x', "Unterminated string"),
        (b'{"a" 1}', "'1' where : belongs"),
        (b'{"a": 12x}', "no value at '12x}'"),
        (b'{"a": 1} {', "'{' behind its end"),
        (b"[1]", r"'\[' where \{ belongs"),
        (b"", "'' where { belongs"),
        (b'{"many": [' + b"[" * 100_000, "maximum recursion"),
        (b'{"many": [' + b"9" * 5000 + b"]}", "Exceeds the limit"),
        (b'{"many": ["\xe9"]}', "can't decode byte 0xe9"),
        (b'{"many": [' + b"1, " * 100_000 + b"1]}", "it is too large"),
    ],
)
def test_json_in_parts_that_is_none_is_told(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CorruptFileError, match=f"file is no JSON .*{reason}"):
        list(read_json_in_parts(tmp_path / "file", "many", 200_000))
