"""What the page is made of: curves that lose no extreme, tables, pictures, and folders read with suspicion."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.config.loader import dump_config, load_config
from mfm_dist.errors import ConfigError
from mfm_dist.inference.overlays import save_overlay
from mfm_dist.report.charts import BUCKETS, Chart, Line, draw, envelope, short_number, spread
from mfm_dist.report.page import confusion_of, differing_settings, group_events, render, repeated, settings
from mfm_dist.report.picture import label_map, overlay_prediction
from mfm_dist.report.run import Run, read_runs
from mfm_dist.run.folder import CLASSES as CLASSES_FILE
from tests.helpers.classes import CLASSES


def make_run(folder: Path, *overrides: str, miou: tuple[float, ...] = ()) -> Run:
    """A run folder of a configuration and evaluations alone, read back."""
    (folder / "eval").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(load_config(None, [f"run.folder={folder}", *overrides])))
    (folder / CLASSES_FILE).write_text(json.dumps(CLASSES.to_tree()))
    for step, value in enumerate(miou):
        scores = {"step": step, "miou": value, "iou": dict.fromkeys(CLASSES.names, value), "images": 5}
        (folder / "eval" / f"step_{step:08d}.json").write_text(json.dumps(scores))
    return read_runs([folder])[0]


def test_an_envelope_keeps_every_extreme_and_leaves_gaps() -> None:
    values = np.sin(np.arange(10_001) / 700.0)
    values[[17, 5_003]] = [9.0, -9.0]
    values[7_000:7_200] = math.nan
    steps = np.arange(10_001.0) * 50
    drawn = envelope(steps, values)
    assert len(drawn.steps) == BUCKETS
    assert (drawn.steps[0], drawn.steps[-1]) == (0.0, 500_000.0)
    assert (np.nanmax(drawn.high), np.nanmin(drawn.low)) == (9.0, -9.0)
    assert np.isnan(drawn.mean).any()
    edges = np.linspace(0, len(values), BUCKETS + 1).astype(int)
    for bucket in (0, 100, BUCKETS - 1):
        part = values[edges[bucket] : edges[bucket + 1]]
        assert drawn.mean[bucket] == pytest.approx(part.mean())
        assert (drawn.low[bucket], drawn.high[bucket]) == (part.min(), part.max())


def test_a_short_curve_is_drawn_as_it_is() -> None:
    steps, values = np.arange(5.0), np.array([1.0, math.nan, 3.0, 2.0, 5.0])
    drawn = envelope(steps, values)
    np.testing.assert_array_equal(drawn.mean, values)


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.0, "0"), (6e-5, "6e-5"), (2.5e-4, "2.5e-4"), (0.0015, "0.0015"), (0.25, "0.25"), (24, "24"), (1234.5, "1,234")],
)
def test_numbers_are_short(value: float, words: str) -> None:
    assert short_number(value) == words


def test_a_chart_is_one_safe_element_with_ids_of_its_own() -> None:
    steps = np.arange(3.0)
    lines = [
        Line(label="</svg><script>", steps=steps, values=steps + 1, colour=0),
        Line(label=r"$\frac{", steps=steps, values=np.array([math.nan, 2.0, math.nan]), colour=9),
        Line(label="日本", steps=steps, values=steps, colour=2),
    ]
    ids: list[str] = []
    for identity in ("one", "two"):
        text = draw(Chart(title="A & B", caption="", lines=lines, scale="log"), identity)
        root = ElementTree.fromstring(text)  # well formed, so the label is escaped
        assert root.tag == "svg"
        assert {element.tag for element in root.iter()} <= {
            "svg",
            "defs",
            "style",
            "g",
            "path",
            "text",
            "use",
            "clipPath",
            "rect",
        }
        assert "</svg><script>" in "".join(root.itertext())
        assert "http" not in text
        assert root.get("aria-label", "").startswith("A & B. </svg><script>: 1 at step 0, 3 at step 2")
        ids += [element.get("id", "") for element in root.iter() if element.get("id")]
        links = {element.get("href", "")[1:] for element in root.iter() if element.get("href")}
        assert links <= set(ids)
    assert len(ids) == len(set(ids))


def test_the_label_of_a_shorter_curve_stands_at_its_end() -> None:
    long, short = np.arange(101.0), np.arange(51.0)
    curves = {"long": long, "short": short, "equal": long}
    lines = [Line(label=name, steps=steps, values=steps / 100, colour=0) for name, steps in curves.items()]
    root = ElementTree.fromstring(draw(Chart(title="", caption="", lines=lines), "x"))
    places = {}
    for text in root.iter("text"):
        found = re.search(r"translate\(([\d.]+) ([\d.]+)\)", text.get("transform", ""))
        places[text.text] = (float(text.get("x") or (found[1] if found else 0)), float(text.get("y") or 0))
    right = max(x for x, _ in places.values())
    assert places["long"][0] == places["equal"][0] == right
    assert places["short"][0] < 0.6 * right
    assert abs(places["long"][1] - places["equal"][1]) > 10


def test_labels_are_moved_apart_and_stay_in_the_chart() -> None:
    assert spread([0.1, 0.15, 0.6], 0.2) == pytest.approx([0.1, 0.3, 0.6])
    assert spread([0.9, 0.95, 1.0], 0.1) == pytest.approx([0.82, 0.92, 1.02])
    assert spread([], 0.1) == []


def test_confusions_are_shares_of_the_labelled_pixels_the_largest_first(tmp_path: Path) -> None:
    make_run(tmp_path, miou=(50.0,))
    counts = np.zeros((19, 19), dtype=int)
    counts[0, [0, 1]], counts[13, [13, 14, 2]] = (3, 1), (50, 30, 20)
    path = tmp_path / "eval" / "step_00000000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "confusion": counts.tolist(), "boundary_miou": 4.5}))
    (run,) = read_runs([tmp_path])
    found = confusion_of(run)
    assert found is not None
    assert [name for name, _ in found.columns] == ["road", "sidewalk", "building", "car", "truck"]
    assert [(name, shares) for name, _, shares in found.rows] == [
        ("road", [75.0, 25.0, 0.0, 0.0, 0.0]),
        ("car", [0.0, 0.0, 20.0, 50.0, 30.0]),
    ]
    assert found.pairs == [("car", "truck", 30.0), ("road", "sidewalk", 25.0), ("car", "building", 20.0)]
    page = render([run], images=0)
    assert "car for truck 30.0 %" in page
    assert '<td class="number">4.5</td>' in page
    for bad in ([[1]], [["x"] * 19] * 19, [[-1] * 19] * 19, "text", None, [[1], [1, 2]]):
        path.write_text(json.dumps({**json.loads(path.read_text()), "confusion": bad}))
        assert confusion_of(read_runs([tmp_path])[0]) is None


@pytest.mark.parametrize(("gain", "tone"), [(-0.2, ""), (0.2, ""), (-3.0, "down"), (3.0, "up")])
def test_a_change_within_the_noise_has_no_colour(gain: float, tone: str, tmp_path: Path) -> None:
    page = render([make_run(tmp_path, miou=(20.0, 20.0 + gain))], images=0)
    assert f'<strong class="{tone}">' in page
    assert f'<td class="number {tone}">' in page


def test_events_of_one_kind_and_cause_are_one_line() -> None:
    skipped = [{"step": step, "event": "skipped_step", "reason": "gradient not finite"} for step in range(100, 600)]
    bad = [{"step": 3, "event": "bad_sample", "reason": "empty", "shard": "a.tar", "key": f"k{n}"} for n in range(30)]
    ordinary = [{"event": "checkpoint", "step": 100, "gib": 0.1}]
    groups = group_events(
        [*ordinary, *bad, *skipped, {"event": "signal", "step": 9, "signal": "SIGTERM"}, {"odd": [1, None]}]
    )
    assert [(g.name, g.cause, g.count, g.first, g.last) for g in groups] == [
        ("Step skipped", "gradient not finite", 500, 100, 599),
        ("Sample left out", "empty", 30, 3, 3),
        ("Stopped by a signal", "SIGTERM", 1, 9, 9),
        ("unknown", "", 1, None, None),
    ]
    assert groups[0].examples == []
    assert len(groups[1].examples) == 20
    assert groups[1].examples[0] == "step 3: shard: a.tar, key: k0"


def test_settings_say_what_differs_from_the_defaults_and_between_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", "mfm.enabled=true"), make_run(tmp_path / "b", "mfm.enabled=true", "data.crop=64")]
    assert runs[0].config is not None
    changed = {one.key: (one.value, one.default) for one in settings(runs[0].config) if one.changed}
    assert changed == {"mfm.enabled": ("true", "false"), "run.folder": (str(tmp_path / "a"), "runs/quickstart")}
    assert dict(differing_settings([run.config for run in runs])) == {
        "data.crop": ["512, 512", "64, 64"],
    }


def test_runs_that_differ_in_the_seed_alone_are_one_group(tmp_path: Path) -> None:
    for seed, miou in enumerate((20.0, 22.0, 27.0)):
        make_run(tmp_path / "mfm" / str(seed), f"seed={seed}", "mfm.enabled=true", miou=(0.0, 24.0, miou))
    make_run(tmp_path / "plain", miou=(0.0, 24.0, 10.0))
    runs = read_runs([*(tmp_path / "mfm" / str(seed) for seed in range(3)), tmp_path / "plain"])
    (group,) = repeated(runs)
    assert (group.names, group.seeds) == (["mfm/0", "mfm/1", "mfm/2"], [0, 1, 2])
    assert (group.mean, group.lowest, group.highest) == (23.0, 20.0, 27.0)
    assert group.mean_best == (24.0 + 24.0 + 27.0) / 3
    assert group.deviation == pytest.approx(math.sqrt((9 + 1 + 16) / 2))


def test_a_folder_is_read_with_suspicion(tmp_path: Path) -> None:
    make_run(tmp_path, miou=(1.0, 2.0))
    lines = [
        '{"step": 2, "loss/total": null}',
        '{"step": 1, "loss/total": 5}',
        "[1]",
        '{"step": "x"}',
        '{"step": 3, "lo',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "eval" / "step_00000009.json").write_text('{"step": 9}')
    (tmp_path / "events.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "environment.json").write_text("[1, 2]")
    (run,) = read_runs([tmp_path])
    steps, values = run.series("loss/total")
    np.testing.assert_array_equal(steps, [1.0, 2.0])
    np.testing.assert_array_equal(values, [5.0, math.nan])
    assert (run.gain, run.step, run.environment, run.events) == (1.0, 2, {}, [])
    assert [problem.split()[0] for problem in run.problems] == [
        "eval/step_00000009.json",
        "environment.json",
        "outcome.json",
    ]


def test_folders_that_are_no_runs_are_all_named(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    with pytest.raises(ConfigError) as caught:
        read_runs([tmp_path / "a", tmp_path / "b", tmp_path, tmp_path / "a"])
    assert len(caught.value.problems) == 3


def test_a_prediction_is_read_back_from_its_overlay(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, 20, 30), generator=generator, dtype=torch.uint8)
    prediction = torch.randint(19, (20, 30), generator=generator)
    save_overlay(tmp_path / "x.png", image, torch.full((20, 30), IGNORE_INDEX), prediction, CLASSES)
    panels = np.asarray(Image.open(tmp_path / "x.png"))
    photo = image.permute(1, 2, 0).numpy()
    found = overlay_prediction(panels, photo, CLASSES.palette)
    assert found is not None
    np.testing.assert_array_equal(found, prediction.numpy())
    assert overlay_prediction(panels, 255 - photo, CLASSES.palette) is None
    assert overlay_prediction(panels[:, 1:], photo, CLASSES.palette) is None


def test_a_label_map_shows_classes_hatching_and_what_is_outside() -> None:
    label = np.repeat(np.arange(19, dtype=np.uint8), 27)[None].repeat(40, axis=0)  # 40 x 513: not enlarged
    label[0] = IGNORE_INDEX
    unsure, outside = np.zeros(label.shape, dtype=bool), np.zeros(label.shape, dtype=bool)
    unsure[20:30], outside[30:] = True, True
    address = label_map(label, CLASSES.palette, unsure=unsure, outside=outside)
    picture = Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))
    pixels = np.asarray(picture)
    assert not pixels[0].any()
    np.testing.assert_array_equal(pixels[1:20], np.array(CLASSES.palette, dtype=np.uint8)[label[1:20]])
    same = (pixels[20:30] == np.array(CLASSES.palette, dtype=np.uint8)[label[20:30]]).all(axis=-1)
    assert 0.3 < same.mean() < 0.45  # stripes of the class colour
    assert (pixels[30:] == 208).all()
