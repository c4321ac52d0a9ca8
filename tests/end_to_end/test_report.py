"""The page about a real run: what it says, what it says is missing, and that it is safe and small."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mfm_dist.config.loader import load_config
from mfm_dist.data.reader import ShardReader
from mfm_dist.report.__main__ import main
from mfm_dist.report.gallery import Subject, first_prediction, load_networks, masked_pass, pseudo_label
from mfm_dist.report.page import render
from mfm_dist.report.picture import label_map
from mfm_dist.report.run import read_runs
from tests.helpers.runs import run_train, tiny_overrides

VIEWS = ["Image", "Truth", "First prediction", "Last prediction", "Mistakes", "Hidden cells", "From rebuilt features",
         "Teacher's pseudo-label"]  # fmt: skip


class Page(HTMLParser):
    """Elements, and the text that a person sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def finished(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with MFM, evaluated at 0 and 4."""
    run = tmp_path_factory.mktemp("reported") / "tiny"
    completed = run_train(tiny_overrides(scenes, run))
    assert completed.returncode == 0, completed.stderr
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def check_it_stands_alone(text: str) -> Page:
    """No script, no frame, nothing loaded; ids are unique, pictures have words, tables have headers."""
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "image"}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            if (address := attributes.get(name)) is not None:
                assert address.startswith(("#", "data:image/")), address
    assert not re.search(r"@import|url\((?!#)", text)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(attributes.get("alt") for attributes in page.all("img"))
    assert all(attributes.get("aria-label") for attributes in page.all("svg"))
    # The table of names and values has its headers in rows.
    assert len(page.all("thead")) + text.count('<table class="pairs"') == len(page.all("table"))
    return page


def test_the_page_of_a_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(finished), "--images", "3"]) == 0
    output = finished / "report.html"
    assert str(output) in capsys.readouterr().out
    page = check_it_stands_alone(output.read_text(encoding="utf-8"))
    scores = [json.loads((finished / "eval" / f"step_{step:08d}.json").read_text()) for step in (0, 4)]
    for expected in (
        "tiny", "dacs + MFM", f"{scores[1]['miou']:.1f} %", f"({scores[0]['miou']:.1f} %)", "finished",
        "1 process on cpu", "Pseudo-weight", "Learning rate", "Throughput", "traffic light",
        "Nothing out of the ordinary was noted", "camera_val_000000", "camera_val_000002", "camera_val_000004",
        "The teacher sees one image at a time", "one draw of MFM's mask", "teacher below the threshold", "hidden cell",
        " right ", " wrong ", "Not measured yet: python tools/probe_rebuilder.py",
    ):  # fmt: skip
        assert expected in page.text.replace(" %", " %"), expected
    alts = [str(attributes["alt"]) for attributes in page.all("img")]
    assert [alt.partition(" of camera_val")[0] for alt in alts] == VIEWS * 3
    assert ", step 0: " in alts[2]
    assert len(page.all("svg")) == 6
    output.unlink()


def test_the_first_prediction_made_from_the_seed_is_the_one_that_was_saved(run: Path) -> None:
    config = load_config(run / "config.yaml")
    networks = load_networks(read_runs([run])[0], config)
    reader = ShardReader(config.data.root / config.data.validation)
    subject = Subject(0, reader.read(0))
    (saved,) = first_prediction(networks, subject)
    (run / "eval" / "step_00000000" / f"{subject.sample.key}.png").unlink()
    (again,) = first_prediction(networks, subject)
    assert "from the seed" not in saved.note
    assert "from the seed" in again.note
    assert saved.address == again.address
    other = np.zeros_like(subject.truth)
    assert saved.address != label_map(other, networks.classes.palette)


def test_networks_are_shown_images_of_the_size_that_training_has(run: Path) -> None:
    """Where they are stored larger, and data.target_resize fits them into a box."""
    config = load_config(run / "config.yaml")
    networks = load_networks(read_runs([run])[0], config)
    stored = Subject(0, ShardReader(config.data.root / config.data.validation).read(0))
    height, width = stored.truth.shape
    smaller = stored.as_trained((height // 2, width // 2))
    assert smaller.photo.shape == (height // 2, width // 2, 3)
    assert smaller.truth.shape == (height // 2, width // 2)
    expected = [view(networks, smaller) for view in (masked_pass, pseudo_label)]
    assert expected != [view(networks, stored) for view in (masked_pass, pseudo_label)]
    networks.config.data.target_resize = (height // 2, width // 2)
    assert expected == [view(networks, stored) for view in (masked_pass, pseudo_label)]


def test_the_networks_of_a_compiled_run_are_shown_uncompiled(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.compile", lambda *_, **__: pytest.fail("compiled"))
    config = load_config(run / "config.yaml", ["train.compile=true"])
    networks = load_networks(read_runs([run])[0], config)
    assert networks.module is not None, networks.notes
    assert networks.first is not None


def spoil_all_but_config(run: Path) -> None:
    for path in run.iterdir():
        if path.name != "config.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def spoil_checkpoints(run: Path) -> None:
    for path in (run / "checkpoints").glob("*/manifest.json"):
        path.write_text("{}")


def spoil_config(run: Path) -> None:
    (run / "config.yaml").write_text("no_such: {key: 1}\n")


def spoil_shards(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"root: \S+", "root: /nowhere", text))


def spoil_network(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("width: 32", "width: 64"))


def spoil_start(run: Path) -> None:
    """As after a start from ImageNet weights, with no overlay kept."""
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("weights: null", "weights: gone.pth"))
    shutil.rmtree(run / "eval" / "step_00000000")


def spoil_one_overlay(run: Path) -> None:
    """As after a start from ImageNet weights, for an image that was not among those saved."""
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("pretrained: false", "pretrained: true"))
    next((run / "eval" / "step_00000000").iterdir()).rename(run / "eval" / "step_00000000" / "other.png")


def spoil_metrics(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss/total": null, "loss/source": 1e999, "grad_norm/total": NaN}\n{"step": 6, "lo')


CASES = {
    spoil_all_but_config: ["There is no evaluation yet", "no curves", "no environment.json", "no complete checkpoint"],
    spoil_checkpoints: ["There is no complete checkpoint", "is damaged"],
    spoil_config: ["config.yaml does not fit this version", "There are no pictures", "no settings to show"],
    spoil_shards: ["There are no pictures, because the validation images cannot be read"],
    spoil_network: ["The networks of this run cannot be loaded"],
    spoil_start: ["The first prediction is not there", "Last prediction"],
    spoil_one_overlay: ["First prediction: not saved (eval.overlays=1)"],
    spoil_metrics: ["2 not finite and left out"],
}  # fmt: skip


@pytest.mark.parametrize("spoil", CASES, ids=lambda spoil: spoil.__name__)
def test_what_is_missing_is_said(spoil, run: Path) -> None:  # type: ignore[no-untyped-def]
    spoil(run)
    assert main([str(run), "--images", "1"]) == 0
    page = check_it_stands_alone((run / "report.html").read_text(encoding="utf-8"))
    assert [sentence for sentence in CASES[spoil] if sentence not in page.text] == []
    for figure in re.findall(r"<figure.*?</figure>", (run / "report.html").read_text(encoding="utf-8"), re.DOTALL):
        assert "<svg" in figure or "<img" in figure


def test_a_run_without_teacher_and_rebuilder_says_so(scenes: Path, tmp_path: Path) -> None:
    """Configuration and evaluations of a source-only run; its networks are those of the seed."""
    run = tmp_path / "source_only"
    overrides = [*tiny_overrides(scenes, run), "method.name=source_only", "mfm.enabled=false"]
    assert run_train(overrides).returncode == 0
    page = check_it_stands_alone(render(read_runs([run]), images=1))
    assert "There is no pseudo-label: source_only without MFM has no teacher." in page.text
    assert "There are no rebuilt features: this run has no Rebuilder." in page.text
    assert "Hidden cells" not in page.text
    assert "teacher below the threshold" not in page.text
    assert "What the Rebuilder does" not in page.text
    assert len(page.all("img")) == 5


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'{{ 7*7 }}$\\frac{"


def test_text_of_others_stays_text(run: Path) -> None:
    odd = HOSTILE + "\x00\x1b\ud800"
    events = [{"step": 1, "event": odd, "reason": HOSTILE, "key": HOSTILE, HOSTILE: HOSTILE}]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (run / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE, "revision": HOSTILE, "gpus": [HOSTILE]}))
    (run / "outcome.json").write_text(json.dumps({"code": 3, "reason": HOSTILE}))
    (run / "probe.json").write_text(json.dumps({"step": HOSTILE, "agreement": [1], "calibration": {"accuracy": "x"}}))
    lines = (run / "metrics.jsonl").read_text().replace('"loss/mfm"', json.dumps(f"loss/\x00\ud800{HOSTILE}"))
    (run / "metrics.jsonl").write_text(lines)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        text.replace("backbone_options: {", "backbone_options: {'" + HOSTILE[:25] + "': 1, ")
    )
    hostile = run.rename(run.with_name("<b>{{ x }}&"))
    for folders in ([hostile], [hostile, Path(shutil.copytree(hostile, hostile.with_name("other")))]):
        page = check_it_stands_alone(render(read_runs(folders), images=1))
        assert HOSTILE in page.text
        page.text.encode()
        assert "49" not in page.text.split("alert(1)")[1][:60]


def long_metrics(steps: int) -> Iterator[str]:
    generator = np.random.default_rng(0)
    for step, noise in zip(range(1, steps + 1), generator.normal(size=(steps, 8)), strict=True):
        names = ("loss/total", "loss/source", "loss/mixed", "loss/mfm", "pseudo_weight", "grad_norm/total",
                 "lr/encoder", "images_per_second")  # fmt: skip
        values = np.exp(noise) / np.sqrt(step)
        yield json.dumps({"step": step} | dict(zip(names, values.tolist(), strict=True))) + "\n"


def test_the_page_of_a_long_run_is_small_and_shows_its_spike(run: Path) -> None:
    lines = list(long_metrics(40_000))
    spike = json.loads(lines[20_000]) | {"grad_norm/total": 98765.0}
    lines[20_000] = json.dumps(spike) + "\n"
    (run / "metrics.jsonl").write_text("".join(lines))
    scores = json.loads((run / "eval" / "step_00000004.json").read_text())
    for step in range(4_000, 40_001, 4_000):
        (run / "eval" / f"step_{step:08d}.json").write_text(json.dumps(scores | {"step": step}))
    text = render(read_runs([run]), images=4)
    page = check_it_stands_alone(text)
    assert len(text.encode()) < 2 * 2**20
    assert "All 12 evaluations" in page.text
    (norm,) = (str(one["aria-label"]) for one in page.all("svg") if str(one["aria-label"]).startswith("Gradient norm"))
    assert "highest 98,765" in norm


def test_several_runs_side_by_side(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(run, run.with_name("other")))
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(
        text.replace("seed: 0\n", "seed: 5\n", 1).replace("loss_weight: 1.0", "loss_weight: 0.5")
    )
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line | {"lr/encoder": 1.0}) + "\n" for line in lines))
    assert main([str(run), str(other), "--images", "2"]) == 0
    assert str(run / "comparison.html") in capsys.readouterr().out
    page = check_it_stands_alone((run / "comparison.html").read_text(encoding="utf-8"))
    for expected in ("2 runs side by side", "Settings that differ", "mfm. loss_ weight", "Learning rate: encoder"):
        assert expected in page.text, expected
    assert "Learning rate: decoder" not in page.text
    titles = [str(one["alt"]).partition(" of camera_val")[0] for one in page.all("img")]
    assert titles == ["Image", "Truth", "run", "other"] * 2


def test_mistakes_on_the_command_line(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing")]) == 2
    assert "no run folder (it has no config.yaml)" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([str(run), "--images", "-1"])
    (tmp_path / "file").write_text("")
    assert main([str(run), "--images", "0", "--output", str(tmp_path / "file" / "x.html")]) == 4
    assert "--output" in capsys.readouterr().err
