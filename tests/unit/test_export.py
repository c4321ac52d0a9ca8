"""What leaves the trainer is the plain segmentor, bit for bit, in a folder that is whole or not there."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

import mfm_dist
from mfm_dist import evaluate, export, predict
from mfm_dist.build import build_student, build_train_module
from mfm_dist.checkpoint.contents import load_modules, load_teacher
from mfm_dist.checkpoint.files import find_latest
from mfm_dist.config.loader import load_config
from mfm_dist.data.reader import ShardReader
from mfm_dist.errors import ConfigError
from mfm_dist.inference.predict_labels import predict_labels
from mfm_dist.inference.readme import readme_text
from mfm_dist.inference.segmentor import TrainedSegmentor, read_card
from mfm_dist.methods.mfm import rebuild
from mfm_dist.models.preprocessing import normalise
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.train_module import TrainModule
from tests.helpers.classes import CLASSES

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exported(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "model"
    assert export.main(["--run", str(trained_run), "--output", str(folder)]) == 0
    return folder


def plain_segmentor(run: Path) -> Segmentor:
    """The network before anything is trained, built from the run's configuration alone."""
    return build_student(load_config(run / "config.yaml"), CLASSES)


def trained_module(run: Path) -> TrainModule:
    """All that was trained, Rebuilder included, from the run's last checkpoint."""
    module = build_train_module(load_config(run / "config.yaml"), CLASSES)
    checkpoint = find_latest(run / "checkpoints", report=pytest.fail)
    assert checkpoint is not None
    load_modules(checkpoint, module)
    return module.eval()


def flops_of(forward: Callable[[Tensor], object], image: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(image)
    return counter.get_total_flops()


def test_it_has_exactly_the_parameters_of_the_plain_segmentor(exported: Path, trained_run: Path) -> None:
    def shapes(module: nn.Module) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in module.state_dict().items()}

    model, plain = mfm_dist.load(exported), plain_segmentor(trained_run)
    assert shapes(model.segmentor) == shapes(plain)
    assert [n for n, _ in model.segmentor.named_parameters()] == [n for n, _ in plain.named_parameters()]
    count = sum(p.numel() for p in model.parameters())
    assert count == sum(p.numel() for p in plain.parameters())
    rebuilder = trained_module(trained_run).rebuilder
    assert rebuilder is not None  # the run had one, and the file has nothing of it
    with safe_open(exported / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(plain.state_dict())


def test_it_costs_exactly_the_operations_of_the_plain_segmentor(exported: Path, trained_run: Path) -> None:
    image = torch.randn(1, 3, 64, 128)
    model, plain, trained = mfm_dist.load(exported), plain_segmentor(trained_run).eval(), trained_module(trained_run)

    def with_rebuilder(image: Tensor) -> Tensor:
        assert trained.rebuilder is not None
        mask = torch.ones(1, *trained.rebuilder.grid, dtype=torch.bool)
        return trained.student.decode(rebuild(trained.student, trained.rebuilder, trained.student.encode(image), mask))

    assert 0 < flops_of(plain, image) < flops_of(with_rebuilder, image)
    assert flops_of(model, image) == flops_of(plain, image)


def test_its_logits_are_those_of_the_trained_student_bit_for_bit(exported: Path, trained_run: Path) -> None:
    model, trained, plain = mfm_dist.load(exported), trained_module(trained_run), plain_segmentor(trained_run).eval()
    assert not model.training
    for size in ((64, 128), (64, 64), (50, 77)):
        image = torch.randn(2, 3, *size)
        with torch.no_grad():
            logits = model(image)
            assert logits.shape == (2, 19, *size)
            assert torch.equal(logits, trained.student(image))
            assert not torch.equal(logits, plain(image))  # training did change it


def test_normalise_and_predict_are_those_of_evaluation(exported: Path, trained_run: Path, scenes: Path) -> None:
    model, trained = mfm_dist.load(exported), trained_module(trained_run)
    image = ShardReader(scenes / "camera_val").read(0).image
    assert torch.equal(model.normalise(image[None]), normalise(image[None]))
    assert torch.equal(model.predict(image), predict_labels(trained.student, image, CPU))


def test_the_box_of_evaluation_goes_with_it(trained_run: Path, tmp_path: Path, scenes: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "model"
    shutil.copytree(trained_run, run)
    config = (run / "config.yaml").read_text()
    assert config.count("\n  resize: null\n") == 1
    (run / "config.yaml").write_text(config.replace("\n  resize: null\n", "\n  resize: [32, 48]\n"))
    assert export.main(["--run", str(run), "--output", str(folder)]) == 0
    model, image = mfm_dist.load(folder), ShardReader(scenes / "camera_val").read(0).image
    assert model.card.resize == (32, 48)
    predicted = model.predict(image)
    assert torch.equal(predicted, predict_labels(model.segmentor, image, CPU, fit_into=(32, 48)))
    assert not torch.equal(predicted, predict_labels(model.segmentor, image, CPU))
    (folder / "config.json").write_text(re.sub(r' "resize": [^"]*', "", (folder / "config.json").read_text()))
    assert mfm_dist.load(folder).card.resize is None  # an export of before there was a box


@pytest.fixture
def _fp32_as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("_fp32_as_before")
def test_the_commands_compute_fp32_as_the_run_did(trained_run: Path, tmp_path: Path, scenes: Path) -> None:
    run, folder, photo = tmp_path / "run", tmp_path / "model", tmp_path / "photo.png"
    shutil.copytree(trained_run, run)
    config = (run / "config.yaml").read_text()
    assert config.count("fp32_math: ieee") == 1
    (run / "config.yaml").write_text(config.replace("fp32_math: ieee", "fp32_math: tf32"))
    assert export.main(["--run", str(run), "--output", str(folder)]) == 0
    Image.new("RGB", (64, 32)).save(photo)
    predicting = ["--input", str(photo), "--output", str(tmp_path / "predicted")]
    scoring = ["--data", str(scenes / "camera_val"), "--json"]
    for model, expected in (
        (["--run", str(run)], True),
        (["--model", str(folder)], True),
        (["--run", str(trained_run)], False),
    ):
        for command, words in ((predict.main, predicting), (evaluate.main, scoring)):
            torch.backends.cudnn.allow_tf32 = not expected
            torch.set_float32_matmul_precision("medium")
            assert command([*model, *words]) == 0
            assert torch.backends.cudnn.allow_tf32 == expected
            assert torch.get_float32_matmul_precision() == ("high" if expected else "highest")


def test_a_run_folder_loads_as_its_export(exported: Path, trained_run: Path) -> None:
    of_run, of_export = mfm_dist.load(str(trained_run)), mfm_dist.load(exported)
    assert of_run.card == of_export.card
    states = of_run.state_dict(), of_export.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] | states[1])


def test_the_config_says_what_it_is(exported: Path, trained_run: Path) -> None:
    card = json.loads((exported / "config.json").read_text())
    scores = json.loads((trained_run / "eval" / "step_00000004.json").read_text())
    assert card["miou"] == scores["miou"]
    assert (card["step"], card["crop"], card["method"], card["weights"]) == (4, [64, 64], "dacs + MFM", "student")
    assert card["class_names"][13] == "car"
    assert card["palette"][13] == [0, 0, 142]
    assert card["mean"] == [123.675, 116.28, 103.53]


def test_the_readme_says_what_it_is_and_cannot_be_more_than_text(exported: Path, trained_run: Path) -> None:
    text = (exported / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: mfm_dist\n")
    scores = json.loads((trained_run / "eval" / "step_00000004.json").read_text())
    assert f"| **mean** | {scores['miou']:.2f} | {scores['boundary_miou']:.2f} |" in text
    for expected in ("`test_resnet`", "student after 4 steps of dacs + MFM", "| source, with labels | game\\_train |"):
        assert expected in text, expected
    card = replace(read_card(exported), run="<img src=x>|`*", class_names=("<b>", *CLASSES.names[1:]))
    hostile = readme_text(card, None, {"iou": 3, "protocol": "<script>", "images": None})
    assert "<img" not in re.sub(r"\\.", "", hostile)
    assert "<script>" not in hostile
    assert "come from elsewhere" in hostile
    assert "not scored" in readme_text(replace(card, miou=None))


def test_the_readme_names_the_data_that_was_read(exported: Path) -> None:
    """With whose labels, too; an oracle never opens the source."""
    card = read_card(exported)
    few = readme_text(card, load_config(None, ["data.target_labelled=few"]))
    for row in ("source, with labels | game", "target, without labels | camera", "target, with labels | few"):
        assert f"| {row}" in few, row
    oracle = readme_text(card, load_config(None, ["method.name=oracle"]))
    assert "| target, with labels | camera" in oracle
    assert "source, with labels" not in oracle


def test_an_upload_that_fails_leaves_the_export(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    arguments = ["--run", str(trained_run), "--output", str(folder), "--push", "no/such/name"]
    assert export.main(arguments) == 2  # the Hub's own library refuses the name before it asks the network
    assert "could not be uploaded" in capsys.readouterr().err
    assert mfm_dist.load(folder).card.step == 4


def test_the_teacher_has_its_own_parameters_and_the_students_statistics(trained_run: Path, tmp_path: Path) -> None:
    assert export.main(["--run", str(trained_run), "--output", str(tmp_path / "t"), "--weights", "teacher"]) == 0
    model, trained = mfm_dist.load(tmp_path / "t"), trained_module(trained_run)
    assert model.card.weights == "teacher"
    assert model.card.miou is None
    assert trained.teacher is not None
    theirs = dict(trained.teacher.segmentor.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in model.segmentor.named_parameters())
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), trained.student.parameters(), strict=True))
    buffers = dict(trained.student.named_buffers())
    assert any(isinstance(layer, _BatchNorm) for layer in model.modules())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.segmentor.named_buffers())


def test_loading_needs_neither_network_nor_the_training_libraries(exported: Path) -> None:
    script = (
        "import sys, socket, mfm_dist\n"
        "assert 'torch' not in sys.modules\n"
        "def refuse(*a, **k): raise OSError('network')\n"
        "socket.socket.connect = socket.create_connection = refuse\n"
        f"mfm_dist.load({str(exported)!r})\n"
        "print([m for m in ('accelerate', 'deepspeed', 'webdataset') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_second_export_takes_the_place_of_the_first(trained_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()  # an empty folder is as good as none
    arguments = ["--run", str(trained_run), "--output", str(folder)]
    assert export.main([*arguments, "--weights", "teacher"]) == 0
    assert export.main(arguments) == 0
    assert mfm_dist.load(folder).card.weights == "student"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("stranger", ["notes.txt", "config.json"])
def test_a_folder_with_other_files_is_left_alone(
    stranger: str, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / stranger).write_text("{}")
    assert export.main(["--run", str(trained_run), "--output", str(tmp_path)]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [stranger]
    assert export.main(["--run", str(trained_run), "--output", str(tmp_path / stranger)]) == 2


def test_a_full_disk_leaves_the_earlier_export(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--run", str(trained_run), "--output", str(tmp_path / "model")]
    assert export.main(arguments) == 0
    before = (tmp_path / "model" / "model.safetensors").read_bytes()

    def full(_: Path, __: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert export.main([*arguments, "--weights", "teacher"]) == 4
    assert "No space left" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_mistakes_are_told_with_exit_code_2(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main(["--run", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "no run folder" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text((trained_run / "config.yaml").read_text())
    assert export.main(["--run", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_teacher_says_so(trained_run: Path) -> None:
    checkpoint = find_latest(trained_run / "checkpoints", report=pytest.fail)
    assert checkpoint is not None
    lonely = replace(checkpoint, specs={name: spec for name, spec in checkpoint.specs.items() if "teacher" not in name})
    with pytest.raises(ConfigError, match="has no teacher"):
        load_teacher(lonely, plain_segmentor(trained_run))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "export the run again"),
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), "export the run again"),
        (lambda f: (f / "config.json").unlink(), "neither an export"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "config.json").write_text("{}"), "format is None"),
        (lambda f: _change(f, decoder="daformr"), "'daformer'"),
        (lambda f: _change(f, mean="grey"), "mean: expected"),
        (lambda f: _change(f, resize=[0, 9]), "resize=0: must lie between 1 and 32,768"),
        (
            lambda f: _change(f, palette=[[2**31, 0, 0], *_palette(f)[1:]]),
            "palette: .2147483648, 0, 0. of .* is no colour",
        ),
        (lambda f: _change(f, palette=_palette(f)[1:]), "palette: 18 colours for 19 classes"),
        (lambda f: _change(f, crop=[1e30, 64]), "crop: expected"),
        (lambda f: _change(f, std=[1, 0, 1]), "std=0.0: must be above 0"),
        (lambda f: _change(f, decoder_options={"width": 10**8}), "width must be at least 1 and at most 65,536"),
        (
            lambda f: _change(f, backbone="resnet50c", backbone_options={"layers": [10**7] * 4}),
            "more than 20,000 layers",
        ),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "cannot be read"),
        (lambda f: _change(f, decoder_options={"width": 32}), "export the run again"),
        (lambda f: _change_weights(f, lambda tensor: tensor.to(torch.int8)), "is int8"),
        (lambda f: _change_weights(f, lambda tensor: tensor * torch.nan), "not finite"),
        (lambda f: _pipe(f / "model.safetensors"), "model.safetensors is no regular file"),
        (lambda f: _pipe(f / "config.json"), "neither an export"),
    ],
)
def test_a_damaged_export_is_told(damage: Callable[[Path], None], message: str, exported: Path, tmp_path: Path) -> None:
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert isinstance(mfm_dist.load(tmp_path), TrainedSegmentor)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message):
        mfm_dist.load(tmp_path)


def _palette(folder: Path) -> list[list[int]]:
    palette: list[list[int]] = json.loads((folder / "config.json").read_text())["palette"]
    return palette


def _change(folder: Path, **values: object) -> None:
    card = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**card, **values}))


def _change_weights(folder: Path, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: change(tensor) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()},
              folder / "model.safetensors")  # fmt: skip


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def test_a_segmentor_of_two_resolutions_is_exported_with_its_attention_and_window(
    exported: Path, tmp_path: Path
) -> None:
    options = ["method.name=hrda", "hrda.attention_options={width: 8}", "data.crop=32", "model.backbone=test_resnet"]
    options += ["model.backbone_options={out_indices: [1, 2, 3, 4]}", "model.decoder_options={width: 16}"]
    student = build_student(load_config(None, options), CLASSES).eval()
    card = replace(read_card(exported), attention="segformer", attention_options={"width": 8}, crop=(32, 32))
    hrda = TrainedSegmentor(card)
    hrda.segmentor.load_state_dict(student.state_dict())
    export.write_export(hrda, tmp_path / "hrda", readme_text(card))
    model = mfm_dist.load(tmp_path / "hrda")
    image = torch.randint(0, 256, (3, 40, 70), dtype=torch.uint8)
    assert torch.equal(model.predict(image), predict_labels(student, image, CPU))
    with torch.no_grad():
        assert torch.equal(model(normalise(image[None])), student(normalise(image[None])))
    assert {name for name, _ in model.segmentor.named_children()} == {"backbone", "decoder", "attention"}


def test_onnx_gives_the_same_logits_at_any_size(trained_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    assert export.main(["--run", str(trained_run), "--output", str(tmp_path / "model"), "--onnx"]) == 0
    model = mfm_dist.load(tmp_path / "model")
    session = onnxruntime.InferenceSession(tmp_path / "model" / "model.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["mfm_dist"])["step"] == 4
    for shape in ((2, 3, 64, 64), (1, 3, 64, 128), (3, 3, 101, 75)):
        image = torch.randn(shape)
        with torch.no_grad():
            expected = model(image)
        logits = torch.from_numpy(session.run(None, {"image": image.numpy()})[0])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_onnx_without_its_packages_says_what_to_install(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda _: None)
    assert export.main(["--run", str(trained_run), "--output", str(tmp_path / "model"), "--onnx"]) == 2
    assert "pip install onnx onnxscript" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
