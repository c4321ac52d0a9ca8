"""The commands of docs/data.md mean what the guide says of them."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from mfm_dist.build import rendered_sets
from mfm_dist.config.loader import load_config
from mfm_dist.shards.make import build_parser
from mfm_dist.train import parse_arguments

ROOT = Path(__file__).parents[3]
COMMANDS = [
    words
    for line in (ROOT / "docs/data.md").read_text(encoding="utf-8").splitlines()
    if (words := shlex.split(line) if line.startswith("mfm-") else [])
]


def test_the_guide_packs_what_it_trains_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    packed = set()
    for words in COMMANDS:
        if words[:2] == ["mfm-shards", "make"]:
            arguments = build_parser().parse_args(words[2:])
            packed.add(arguments.name if "folder" in words else arguments.card.name)
    trained = [words for words in COMMANDS if words[0] == "mfm-train" and "configs/own_data.yaml" not in words]
    assert len(trained) == 2
    for words in trained:
        given = parse_arguments(words[1:])
        assert given.launch.is_file()
        config = load_config(given.config, given.overrides)
        data = config.data
        assert data.validation is not None
        assert {str(Path(name).parent) for name in (data.source, data.target, data.validation)} <= packed
        assert data.root == Path("data")
        assert not data.render_scenes
        assert config.model.weights is None  # there is no such file before tools/convert_weights.py
        assert config.model.pretrained
        assert config.run.folder != Path("runs/quickstart")
        assert config.train.steps == 40_000


def test_pictures_without_labels_are_packed_where_the_run_looks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    pack, train, predict = (words for words in COMMANDS if "own" in words or "own_data" in " ".join(words))
    arguments = build_parser().parse_args(pack[2:])
    config = load_config(Path(train[-1]))
    assert config.data.root / config.data.target == Path("data") / arguments.name / arguments.split
    assert (arguments.labels, config.data.validation) == (None, None)
    assert rendered_sets(config) == [config.data.source, config.data.source_validation]
    assert predict[predict.index("--run") + 1] == str(config.run.folder)
