"""Photographs in, id pictures out: what is read how, what is named, and that nothing else is touched."""

from __future__ import annotations

import json
import os
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import mfm_dist
from mfm_dist import export, predict
from mfm_dist.data.reader import ShardReader
from mfm_dist.errors import CorruptFileError
from mfm_dist.inference.overlays import overlay, read_image
from mfm_dist.inference.segmentor import TrainedSegmentor
from mfm_dist.inference.video import frames_of
from mfm_dist.predict import picture_names
from tests.helpers.classes import CLASSES


@pytest.fixture(scope="module")
def exported(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "model"
    assert export.main(["--run", str(trained_run), "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def model(exported: Path) -> TrainedSegmentor:
    return mfm_dist.load(exported)


@pytest.fixture
def street(scenes: Path) -> Image.Image:
    return Image.fromarray(ShardReader(scenes / "camera_val").read(0).image.permute(1, 2, 0).numpy())


@pytest.fixture
def photos(street: Image.Image, tmp_path: Path) -> Path:
    """Good images, two of one stem, one in a subfolder; a damaged one; a file that is no image by its name."""
    folder = tmp_path / "photos"
    (folder / "day 1").mkdir(parents=True)
    street.save(folder / "a.png")
    street.save(folder / "a.jpg")
    street.resize((65, 33)).save(folder / "day 1" / "B.WEBP", format="WEBP", lossless=True)
    (folder / "bad.jpg").write_bytes((folder / "a.jpg").read_bytes()[:600])
    (folder / "notes.txt").write_text("not an image")
    return folder


def files_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_every_good_image_is_done_and_the_bad_one_named(
    photos: Path, exported: Path, model: TrainedSegmentor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    output = tmp_path / "out"
    arguments = ["--model", str(exported), "--input", str(photos), "--output", str(output), "--device", "cpu"]
    assert predict.main(arguments) == 3
    printed = capsys.readouterr()
    assert "bad.jpg" in printed.err
    assert printed.out.startswith("3 of 4 images")
    pictures = {"a.jpg.png", "a.png.png", "day 1/B.png"}
    expected_files = {f"{kind}/{picture}" for kind in ("ids", "overlays") for picture in pictures}
    assert files_below(output) == expected_files | {"predictions.json", "legend.png"}
    summary = json.loads((output / "predictions.json").read_text())
    assert summary["ids"]["a.jpg"] == "ids/a.jpg.png"
    assert list(summary["bad"]) == ["bad.jpg"]
    for name, picture in summary["ids"].items():
        image = read_image(photos / name)
        expected = model.predict(image)
        with Image.open(output / picture) as stored:
            assert torch.equal(torch.from_numpy(np.array(stored)).long(), expected)
            palette = stored.getpalette()
            assert palette is not None
            assert palette[: 3 * len(CLASSES.palette)] == [value for colour in CLASSES.palette for value in colour]
        shown = Image.open(output / picture.replace("ids", "overlays", 1))
        assert np.array_equal(np.array(shown), overlay(image.permute(1, 2, 0).numpy(), expected, CLASSES.palette))
    assert before == {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    assert predict.main([*arguments, "--no-overlays"]) == 3  # again into its own output


def test_a_run_predicts_as_its_export_and_one_file_will_do(
    photos: Path, trained_run: Path, model: TrainedSegmentor, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    one = ["--input", str(photos / "a.png"), "--output", str(output), "--no-overlays", "--device", "cpu"]
    assert predict.main(["--run", str(trained_run), *one]) == 0
    assert files_below(output) == {"ids/a.png", "predictions.json"}
    ids = torch.from_numpy(np.array(Image.open(output / "ids" / "a.png")))
    assert torch.equal(ids.long(), model.predict(read_image(photos / "a.png")))


@pytest.fixture
def film(street: Image.Image, tmp_path: Path) -> Path:
    """Five frames of 127 x 63 pixels, the third of which stands for a second, without loss; a text that is no video."""
    av = pytest.importorskip("av")
    folder = tmp_path / "films"
    folder.mkdir()
    with av.open(folder / "a.mkv", "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 127, 63, "bgr0"
        for number, tenths in enumerate((0, 1, 2, 12, 13)):
            picture = np.roll(np.array(street)[:63, :127], 9 * number, axis=1)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = 100 * tenths, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (folder / "bad.mp4").write_text("not a video")
    street.save(folder / "a.png")
    return folder


def test_a_video_becomes_a_video_of_the_same_times_and_a_folder_of_ids(
    film: Path, street: Image.Image, exported: Path, model: TrainedSegmentor, tmp_path: Path
) -> None:
    arguments = ["--model", str(exported), "--input", str(film), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert predict.main(arguments) == 3
    summary = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert summary["ids"] == {"a.mkv": "ids/a.mp4", "a.png": "ids/a.png"}
    assert list(summary["bad"]) == ["bad.mp4"]
    assert {f"ids/a.mp4/{number:06d}.png" for number in range(5)} < files_below(tmp_path / "out")
    frames = list(frames_of(tmp_path / "out" / "overlays" / "a.mp4"))
    assert [round(frame.seconds, 3) for frame in frames] == [0.0, 0.1, 0.2, 1.2, 1.3]
    for number, frame in enumerate(frames):
        picture = np.ascontiguousarray(np.roll(np.array(street)[:63, :127], 9 * number, axis=1))
        ids = model.predict(torch.from_numpy(picture).permute(2, 0, 1))
        with Image.open(tmp_path / "out" / "ids" / "a.mp4" / f"{number:06d}.png") as stored:
            assert torch.equal(torch.from_numpy(np.array(stored)).long(), ids)
        assert frame.image.shape == (3, 64, 128)
        shown = frame.image.permute(1, 2, 0).numpy()[:63, :127]
        assert np.abs(shown.astype(float) - overlay(picture, ids, CLASSES.palette)).mean() < 12  # colour is halved


def test_a_video_alone_and_no_ids(film: Path, exported: Path, tmp_path: Path) -> None:
    one = ["--model", str(exported), "--input", str(film / "a.mkv"), "--output", str(tmp_path / "out"), "--no-ids"]
    assert predict.main([*one, "--device", "cpu"]) == 0
    assert files_below(tmp_path / "out") == {"overlays/a.mp4", "legend.png", "predictions.json"}
    with pytest.raises(SystemExit, match="2"):
        predict.main([*one, "--no-overlays"])


def test_of_a_video_that_breaks_off_nothing_half_is_left(film: Path, model: TrainedSegmentor, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def predict_frame(image: Tensor) -> Tensor:
        seen.append(image)
        if len(seen) == 3:
            torch.empty(1 << 60)
        return model.predict(image)

    careless: Any = SimpleNamespace(predict=predict_frame, card=model.card)
    done, bad, _ = predict.predict_all(careless, film, [Path("a.mkv")], tmp_path / "out")
    assert (done, bad) == ({}, {"a.mkv": "frame 2: 127 x 63 pixels are too many for the device's memory"})
    ids = {"ids/a.mp4/000000.png", "ids/a.mp4/000001.png"}
    assert files_below(tmp_path / "out") == ids | {"legend.png", "predictions.json"}


def test_a_video_that_lost_its_end_is_done_as_far_as_it_goes_and_named(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its head says how long it was; the decoder just ends."""
    av = pytest.importorskip("av")
    whole, folder = tmp_path / "whole.mp4", tmp_path / "films"
    folder.mkdir()
    with av.open(whole, "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        noise = np.random.default_rng(0)
        for _ in range(20):
            picture = noise.integers(256, size=(48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    content = whole.read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
    (folder / "whole.mp4").write_bytes(content)
    arguments = ["--model", str(exported), "--input", str(folder), "--output", str(tmp_path / "out"), "--no-overlays"]
    assert predict.main([*arguments, "--device", "cpu"]) == 0
    ((name, reason),) = json.loads((tmp_path / "out" / "predictions.json").read_text())["cut_short"].items()
    assert name == "cut.mp4"
    assert reason.endswith("s into 4.0 s")
    assert f"done as far as it goes: {folder / name}: breaks off " in capsys.readouterr().err
    assert 0 < len(list((tmp_path / "out" / "ids" / name).iterdir())) < 20


def test_without_pyav_a_video_is_refused_with_the_fix(
    film: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)  # as if it could not be imported
    one = ["--model", str(exported), "--input", str(film / "a.mkv"), "--output", str(tmp_path / "out")]
    assert predict.main(one) == 2
    assert "videos need PyAV: pip install av" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_output_below_the_input_is_not_taken_for_images(photos: Path, exported: Path) -> None:
    (photos / "bad.jpg").unlink()
    arguments = ["--model", str(exported), "--input", str(photos), "--output", str(photos / "out"), "--device", "cpu"]
    assert predict.main(arguments) == 0
    first = files_below(photos)
    assert predict.main(arguments) == 0
    assert files_below(photos) == first


def test_unsafe_folders_are_refused_before_anything_is_written(
    photos: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_below(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.png").write_text("mine")
    empty = tmp_path / "empty"
    empty.mkdir()

    def refused(source: Path, output: Path, *rest: str) -> str:
        assert predict.main(["--model", str(exported), "--input", str(source), "--output", str(output), *rest]) == 2
        return capsys.readouterr().err

    assert "lies in it" in refused(photos, photos)
    assert "lies in it" in refused(photos, tmp_path)
    assert "holds other files" in refused(photos, other)
    assert "there is a file" in refused(photos, photos / "notes.txt")
    assert "no such file" in refused(tmp_path / "nothing", tmp_path / "out")
    assert "no images" in refused(empty, tmp_path / "out")
    assert "not an image" in refused(photos / "notes.txt", tmp_path / "out")
    assert "--device quantum" in refused(photos, tmp_path / "out", "--device", "quantum")
    assert "neither an export" in _no_model(photos, tmp_path, capsys)
    assert files_below(tmp_path) == before | {"other/precious.png"}


def _no_model(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    code = predict.main(["--model", str(photos), "--input", str(photos), "--output", str(tmp_path / "out")])
    assert code == 2
    return capsys.readouterr().err


def test_a_link_in_the_output_is_replaced_and_not_followed(photos: Path, exported: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "ids").mkdir(parents=True)
    (output / "predictions.json").write_text("{}")
    (output / "ids" / "a.png").symlink_to(photos / "a.png")
    before = (photos / "a.png").read_bytes()
    arguments = ["--model", str(exported), "--input", str(photos / "a.png"), "--output", str(output)]
    assert predict.main([*arguments, "--device", "cpu"]) == 0
    assert (photos / "a.png").read_bytes() == before
    assert not (output / "ids" / "a.png").is_symlink()


def test_a_full_disk_ends_with_4(photos: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    arguments = ["--model", str(exported), "--input", str(photos / "a.png"), "--output", str(tmp_path / "out")]
    assert predict.main([*arguments, "--device", "cpu"]) == 4


def test_picture_names_never_meet() -> None:
    files = ("a.jpg", "a.png", "a.jpg.png", "b.jpg", "B.png", "c.jpg", "s/a.jpg", "s.t.jpg", "s.u.jpg")
    names = [Path(file) for file in files]
    names += [Path("v.mp4"), Path("v.mov"), Path("w.avi")]
    pictures = picture_names(names)
    assert pictures[Path("w.avi")] == Path("w.mp4")
    assert len({str(p).lower() for p in pictures.values()}) == len(names)
    assert pictures[Path("c.jpg")] == Path("c.png")
    assert pictures[Path("s/a.jpg")] == Path("s/a.png")
    assert pictures[Path("s.t.jpg")] == Path("s.t.png")
    assert pictures[Path("a.png")] == Path("a.png.png")


def _rgb(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_exif_orientation_is_respected(orientation: int, street: Image.Image, tmp_path: Path) -> None:
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = street.transpose(turns[orientation]) if orientation in turns else street
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "turned.png"), _rgb(street))


def test_other_modes_become_rgb(street: Image.Image, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    grey = street.convert("L")
    for image in (grey, street.convert("P"), street.convert("1")):
        image.save(file)
        assert torch.equal(read_image(file), _rgb(image))
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(file)
    assert torch.equal(read_image(file), _rgb(grey))
    street.save(tmp_path / "cmyk.jpg")
    street.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    assert (read_image(tmp_path / "cmyk.jpg").int() - _rgb(street)).abs().float().mean() < 3


def test_transparent_pixels_are_black_and_opaque_ones_as_they_are(street: Image.Image, tmp_path: Path) -> None:
    layered = street.convert("RGBA")
    alpha = np.full((street.height, street.width), 255, dtype=np.uint8)
    alpha[:10] = 0
    layered.putalpha(Image.fromarray(alpha))
    layered.save(tmp_path / "layered.png")
    image = read_image(tmp_path / "layered.png")
    assert image[:, :10].eq(0).all()
    assert torch.equal(image[:, 10:], _rgb(street)[:, 10:])


def test_a_huge_image_is_refused(street: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    street.save(tmp_path / "huge.png")
    pixels = street.width * street.height
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    assert read_image(tmp_path / "huge.png").shape == (3, street.height, street.width)
    for limit in (pixels - 1, pixels // 4):  # where PIL warns, and where it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(CorruptFileError, match="make it smaller"):
            read_image(tmp_path / "huge.png")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_no_image_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.png").write_bytes(content)
    with pytest.raises(CorruptFileError):
        read_image(tmp_path / "file.png")


def test_what_is_no_file_or_too_large_costs_no_other_image(
    photos: Path, model: TrainedSegmentor, tmp_path: Path
) -> None:
    os.mkfifo(photos / "pipe.png")  # whoever reads it waits for ever

    def predict_image(image: Tensor) -> Tensor:
        if image.shape[-2:] == (33, 65):
            torch.empty(1 << 60)  # as torch says it of a picture that is too large
        return model.predict(image)

    careless: Any = SimpleNamespace(predict=predict_image, card=model.card)
    names = [Path("a.png"), Path("day 1/B.WEBP"), Path("pipe.png")]
    done, bad, _ = predict.predict_all(careless, photos, names, tmp_path / "out", overlays=False)
    assert list(done) == ["a.png"]
    assert bad == {
        "day 1/B.WEBP": "65 x 33 pixels are too many for the device's memory",
        "pipe.png": "pipe.png is no regular file",
    }
