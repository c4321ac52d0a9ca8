"""Samples come back as they were written, and damaged ones are named while no other suffers."""

from __future__ import annotations

import errno
import os
import pickle
import re
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from mfm_dist.data import decoding as decoding_module
from mfm_dist.data import reader as reader_module
from mfm_dist.data.decoding import decode_image, decode_label, header_size
from mfm_dist.data.manifest import Manifest, index_path
from mfm_dist.data.reader import ShardReader
from mfm_dist.data.shard_records import ShardRecords
from mfm_dist.errors import BadSample, ConfigError, CorruptFileError
from mfm_dist.shards.pictures import read_label
from mfm_dist.shards.writer import encode_jpeg, encode_label_png, write_index
from mfm_dist.storage import sha256_of
from tests.helpers import crafted_pngs
from tests.helpers.crafted_pngs import SIZE
from tests.helpers.shards import ShardFolder, flip_bit, raw_sample

JPEG = encode_jpeg(raw_sample(0).image)
GOOD_LABEL = raw_sample(0).label
assert GOOD_LABEL is not None


def repack(folder: Path, members: dict[str, bytes]) -> ShardReader:
    """Puts one hand-made sample ``odd`` into a folder whose manifest believes it."""
    tar, manifest_file = folder / "000000.tar", folder / "dataset.json"
    with webdataset.TarWriter(str(tar), encoder=False) as writer:
        writer.write({"__key__": "odd", **members})
    write_index(tar)
    manifest = Manifest.read(manifest_file)
    record = replace(
        manifest.shards[0],
        bytes=tar.stat().st_size,
        sha256=sha256_of(tar),
        index_sha256=sha256_of(index_path(tar)),
        pixel_counts={},
    )
    manifest_file.write_text(replace(manifest, shards=ShardRecords([record])).to_json())
    return ShardReader(folder)


def png(pixels: np.ndarray, tmp_path: Path) -> bytes:
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return (tmp_path / "picture.png").read_bytes()


def unusable(reader: ShardReader, number: int) -> BadSample:
    """A sample that must not be delivered."""
    found = reader.read(number)
    assert isinstance(found, BadSample)
    return found


def test_samples_come_back_as_they_were_written(shard_folder: ShardFolder) -> None:
    reader = ShardReader(shard_folder(count=10, shard_size=4))
    assert len(reader) == 10
    for number in (9, 0, 4, 3):
        raw, sample = raw_sample(number), reader.read(number)
        assert sample.key == raw.key
        assert sample.image.shape == (3, 32, 48)
        assert sample.label is not None
        assert np.array_equal(sample.label.numpy(), raw.label)
        error = sample.image.permute(1, 2, 0).numpy().astype(int) - raw.image
        assert np.abs(error).mean() < 15  # chroma is halved, and these pictures are made of hard colour edges


def test_the_image_is_what_pillow_decodes(shard_folder: ShardFolder, tmp_path: Path) -> None:
    image = ShardReader(shard_folder()).read(0).image.permute(1, 2, 0).numpy().astype(int)
    (tmp_path / "a.jpg").write_bytes(JPEG)
    assert np.abs(image - np.asarray(Image.open(tmp_path / "a.jpg"))).max() <= 2


def test_a_png_image_is_read_without_loss(shard_folder: ShardFolder, tmp_path: Path) -> None:
    picture = raw_sample(0).image
    sample = repack(shard_folder(count=1), {"png": png(picture, tmp_path)}).read(0, with_label=False)
    assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), picture)


def test_the_label_is_left_alone_when_it_is_not_asked_for(shard_folder: ShardFolder) -> None:
    reader = ShardReader(shard_folder(labelled=False))
    assert reader.read(0, with_label=False).label is None
    assert re.search(r"000000\.tar, sample 'sample_0000': it has no label", str(unusable(reader, 0)))


@pytest.mark.parametrize("what", ["image", "label"])
def test_one_flipped_bit_is_noticed_and_no_other_sample_suffers(shard_folder: ShardFolder, what: str) -> None:
    folder = shard_folder(count=4)
    member = ShardReader(folder).index.rows[0][2][what]
    flip_bit(folder / "000000.tar", int(member["offset"]) + int(member["size"]) // 2)
    reader = ShardReader(folder)
    bad = unusable(reader, 2)
    assert re.search(rf"000000\.tar, sample 'sample_0002': its {what} differs", str(bad))
    assert bad.number == 2
    assert [reader.read(number).key for number in (0, 1, 3)] == ["sample_0000", "sample_0001", "sample_0003"]


def test_a_shard_that_shrinks_while_it_is_used_is_told(shard_folder: ShardFolder) -> None:
    folder = shard_folder(count=4)
    reader = ShardReader(folder)
    reader.read(0)
    os.truncate(folder / "000000.tar", 2000)
    assert re.search("the shard ends inside its image", str(unusable(reader, 3)))
    os.remove(folder / "000000.tar")
    assert re.search("cannot be read", str(unusable(_fresh(reader), 3)))


def test_a_disk_that_fails_once_costs_no_sample(shard_folder: ShardFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ShardReader(shard_folder())
    expected = [reader.read(number).image for number in range(2)]
    original, failures = os.preadv, [1, 0, 2]  # failing reads at each reading

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if failures[0]:
            failures[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    for number in range(2):
        assert torch.equal(reader.read(number).image, expected[number])
        failures.pop(0)
    assert re.search("its image cannot be read", str(unusable(reader, 2)))


def _fresh(reader: ShardReader) -> ShardReader:
    """The same reader as another process would get it."""
    fresh: ShardReader = pickle.loads(pickle.dumps(reader))
    return fresh


def test_an_index_cannot_name_a_place_outside_of_a_folder(shard_folder: ShardFolder) -> None:
    """Overlays and predictions are files named by the key."""
    folder = shard_folder(count=2)
    tar, manifest_file = folder / "000000.tar", folder / "dataset.json"
    rows = np.load(index_path(tar))
    longer = rows.astype([(name, "S40" if name == "key" else kind) for name, kind in rows.dtype.descr])
    longer["key"][1] = b"../../../outside"
    np.save(index_path(tar), longer)
    manifest = Manifest.read(manifest_file)
    record = replace(manifest.shards[0], index_sha256=sha256_of(index_path(tar)))
    manifest_file.write_text(replace(manifest, shards=ShardRecords([record])).to_json())
    reader = ShardReader(folder)
    assert not isinstance(reader.read(0), BadSample)
    assert "leads out of the folder" in str(unusable(reader, 1))


def test_a_copy_for_another_thread_holds_indexes_of_its_own(shard_folder: ShardFolder) -> None:
    reader = ShardReader(shard_folder())
    reader.read(0)
    other = copy(reader)
    assert torch.equal(other.read(0).image, reader.read(0).image)
    assert list(other.index.rows._held) == [0], "what it read itself, not what is in the other's hands"


def test_a_pickled_reader_opens_its_own_files(shard_folder: ShardFolder) -> None:
    reader = ShardReader(shard_folder())
    reader.read(0)
    other = _fresh(reader)
    assert torch.equal(other.read(5).image, reader.read(5).image)
    reader.close()
    assert torch.equal(other.read(5).image, reader.read(5).image)


def test_a_forked_process_may_go_on_with_open_files(shard_folder: ShardFolder) -> None:
    reader = ShardReader(shard_folder(count=8))
    expected = [reader.read(number).image.sum() for number in range(8)]
    child = os.fork()
    if child == 0:
        same = all(reader.read(number).image.sum() == expected[number] for number in reversed(range(8)))
        os._exit(0 if same else 1)
    same = all(reader.read(number).image.sum() == expected[number] for _ in range(5) for number in range(8))
    assert same
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_more_shards_than_may_be_open(shard_folder: ShardFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "OPEN_FILES", 2)
    reader = ShardReader(shard_folder(count=5, shard_size=1))
    before = len(os.listdir("/proc/self/fd"))
    assert [reader.read(number).key for number in (0, 1, 2, 0, 4, 3)][-1] == "sample_0003"
    assert len(os.listdir("/proc/self/fd")) == before + 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def wrong_label(value: int) -> np.ndarray:
    label = GOOD_LABEL.copy()
    label[:3, :5] = value
    return label


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda _: {"jpg": JPEG, "label.png": encode_label_png(wrong_label(33))},
            r"ids 33; allowed are 0 to 18 and 255",
        ),
        (lambda _: {"jpg": JPEG, "label.png": encode_label_png(GOOD_LABEL[:-8])}, "label is 24x48 .* image 32x48"),
        (lambda _: {"jpg": JPEG, "label.png": encode_label_png(GOOD_LABEL.T)}, "label is 48x32 .* image 32x48"),
        (lambda _: {"jpg": JPEG}, "it has no label"),
        (lambda _: {"jpg": JPEG, "label.png": b""}, "its label is empty"),
        (lambda _: {"jpg": JPEG, "label.png": b"no png"}, "its label is no readable png"),
        (lambda tmp: {"jpg": JPEG, "label.png": png(raw_sample(0).image, tmp)}, "label is 8-bit RGB; 8-bit grey"),
        (lambda tmp: {"jpg": JPEG, "label.png": png(GOOD_LABEL.astype(np.uint16), tmp)}, "label is 16-bit grey; 8-bit"),
        (lambda _: {"jpg": b"no jpeg", "label.png": encode_label_png(GOOD_LABEL)}, "its image is no readable jpg"),
        (lambda _: {"jpg": JPEG[:200], "label.png": encode_label_png(GOOD_LABEL)}, "its image is no readable jpg"),
        (lambda _: {"png": JPEG, "label.png": encode_label_png(GOOD_LABEL)}, "its image is no readable png"),
    ],
)
def test_unusable_samples_are_named_with_the_reason(
    shard_folder: ShardFolder, tmp_path: Path, make: object, reason: str
) -> None:
    assert callable(make)
    reader = repack(shard_folder(count=1), make(tmp_path))
    bad = unusable(reader, 0)
    assert re.search(rf"(?s)000000\.tar, sample 'odd': .*{reason}", str(bad))
    assert pickle.loads(pickle.dumps(bad)) == bad


@pytest.mark.parametrize("kind", ["label", "image"])
def test_every_flipped_bit_of_a_png_is_noticed(kind: str, tmp_path: Path) -> None:
    content = encode_label_png(GOOD_LABEL) if kind == "label" else png(raw_sample(0).image, tmp_path)
    size = header_size(np.frombuffer(content, dtype=np.uint8), "png", kind)
    for at in range(8, len(content), 1 if kind == "label" else 17):
        damaged = np.frombuffer(bytearray(content), dtype=np.uint8)
        damaged[at] ^= 1
        with pytest.raises(CorruptFileError):
            decode_label(damaged, 19, size) if kind == "label" else decode_image(damaged, "png")
    for length in range(len(content)):
        with pytest.raises(CorruptFileError):
            decode_label(np.frombuffer(bytearray(content[:length]), dtype=np.uint8), 19, size)


@pytest.mark.parametrize(("depth", "colour"), [(8, 0), (8, 3), (8, 2), (8, 4), (8, 6), (16, 0), (16, 2), (16, 6)])
def test_wrong_pixel_data_under_right_checksums_make_a_bad_sample(depth: int, colour: int) -> None:
    """libpng ended the process at these; so does any decoder that trusts a checksum."""
    for seed in range(5):
        for name, content in crafted_pngs.broken(np.random.default_rng(seed), depth=depth, colour=colour).items():
            payload = np.frombuffer(content, dtype=np.uint8)
            for decode in (lambda data: decode_image(data, "png"), lambda data: decode_label(data, 19, SIZE)):
                with pytest.raises(CorruptFileError, match=r"its (image|label) is "):
                    pytest.fail(f"{name}: {decode(payload)}")
            if depth == 16 and colour != 0:
                with pytest.raises(CorruptFileError):
                    read_label(content, ["16-bit RGB", "16-bit RGBA"], colours=False)


def test_unusual_labels_are_decoded_right() -> None:
    for name, (content, shown) in crafted_pngs.sound(np.random.default_rng(0)).items():
        label = decode_label(np.frombuffer(content, dtype=np.uint8), 19, SIZE)
        assert np.array_equal(label.numpy(), shown), name


def test_a_decoder_that_is_not_installed_is_told(shard_folder: ShardFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_module, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"data\.decoder=simplejpeg: it is not installed; pip install simplejpeg"):
        ShardReader(shard_folder(), decoder="simplejpeg")


def test_simplejpeg_decodes_the_same_pixels(shard_folder: ShardFolder) -> None:
    pytest.importorskip("simplejpeg")
    folder = shard_folder()
    one, other = ShardReader(folder), _fresh(ShardReader(folder, decoder="simplejpeg"))
    assert all(torch.equal(one.read(number).image, other.read(number).image) for number in range(4))


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (300, 20)])
def test_sizes_are_read_from_the_header_alone(size: tuple[int, int], tmp_path: Path) -> None:
    pixels = np.zeros((*size, 3), dtype=np.uint8)
    for encoded, kind in ((encode_jpeg(pixels), "jpg"), (png(pixels, tmp_path), "png")):
        assert header_size(np.frombuffer(encoded, dtype=np.uint8)[:-3], kind, "image") == size
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + bytes(3000), progressive=True)
    assert header_size(np.frombuffer((tmp_path / "a.jpg").read_bytes(), dtype=np.uint8), "jpg", "image") == size
