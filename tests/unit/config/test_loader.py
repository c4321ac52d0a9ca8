"""Configuration: precedence, types, and messages that say what to do."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from mfm_dist.config.loader import changed_keys, describe, dump_config, load_config, to_tree
from mfm_dist.config.schema import RunConfig
from mfm_dist.errors import ConfigError


def problems_of(*overrides: str, path: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.problems


def test_precedence_is_default_then_yaml_then_override(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train: {steps: 7, micro_batch: 4, global_batch: 8}\noptim: {lr: 6e-5}\n")
    config = load_config(file, ["train.steps=9"])
    assert (config.train.steps, config.train.micro_batch, config.train.clip_norm) == (9, 4, 0.0)
    assert config.optim.lr == 6e-5  # YAML reads 6e-5 as text


def test_a_dumped_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(
        None, ["data.crop=64x96", "model.backbone_options={output_stride: 8}", "model.weights=a/b.pth"]
    )
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config
    assert config.data.crop == (64, 96)
    assert config.model.weights == Path("a/b.pth")


def test_one_number_means_a_square() -> None:
    assert load_config(None, ["rebuilder.grid=8"]).rebuilder.grid == (8, 8)


def test_unknown_keys_are_named_with_the_nearest_valid_one() -> None:
    assert problems_of("train.stepz=3") == ["unknown key 'train.stepz' (command line): did you mean 'train.steps'?"]
    assert "did you mean 'train.steps'" in problems_of("steps=3")[0]
    assert "did you mean 'rebuilder.width'" in problems_of("rebuilder.widht=3")[0]


def test_every_problem_is_reported_at_once_with_its_origin(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train: {steps: many}\nmfm: {loss_on: visible}\nseed: no\n")
    problems = problems_of("optim.lr=fast", "data.crop=3x4x5", "=1", path=file)
    text = "\n".join(problems)
    assert len(problems) == 6
    assert f"train.steps: expected an integer, got 'many' ({file})" in text
    assert "mfm.loss_on: expected one of all, hidden, got 'visible'" in text
    assert "seed: expected an integer, got False" in text  # YAML reads `no` as False
    assert "optim.lr: expected a number, got 'fast' (command line)" in text


@pytest.mark.parametrize("value", ["nan", ".inf", "true"])
def test_a_number_must_be_finite_and_no_bool(value: str) -> None:
    assert "optim.lr: expected a number" in problems_of(f"optim.lr={value}")[0]


def test_contradictions_are_found() -> None:
    overrides = [
        "train.micro_batch=4", "train.global_batch=6", "mfm.ramp_from=5", "rebuilder.width=100", "mfm.mask_ratio=1.5",
        "model.pretrained=true", "model.weights=x.pth", "recovery.spike_window=100000",
    ]  # fmt: skip
    text = "\n".join(problems_of(*overrides))
    assert "train.global_batch=6 is not a multiple of train.micro_batch=4" in text
    assert "mfm.ramp_to=0 lies before mfm.ramp_from=5" in text
    assert "rebuilder.width=100 is not a multiple of rebuilder.heads=16" in text
    assert "mfm.mask_ratio=1.5: must lie between 0 and 1" in text
    assert "model.pretrained and model.weights" in text
    assert "recovery.spike_window=100000: at most 10000" in text


def test_a_world_that_does_not_fit_is_refused_with_numbers_that_do() -> None:
    config = load_config(None, ["train.global_batch=8", "train.micro_batch=2"])
    assert config.world_problems(4) == []
    (problem,) = config.world_problems(3)
    assert "use 1, 2, 4 processes, or a global batch of 6, 12, 18, 24" in problem


def test_files_that_are_missing_or_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "there.yaml").write_text("- 1\n")
    assert "there.yaml" in problems_of(path=tmp_path / "missing.yaml")[0]
    assert "expected sections" in problems_of(path=tmp_path / "there.yaml")[0]
    (tmp_path / "broken.yaml").write_text("train: {steps: 3\n")
    assert "not valid YAML" in problems_of(path=tmp_path / "broken.yaml")[0]


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    file = tmp_path / "evil.yaml"
    file.write_text(f"run: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    problems_of(path=file)
    assert not (tmp_path / "made").exists()


def test_every_field_is_documented() -> None:
    def leaves(kind: type) -> int:
        hints = get_type_hints(kind)
        return sum(leaves(hints[f.name]) if is_dataclass(hints[f.name]) else 1 for f in fields(kind))

    lines = list(describe())
    assert len(lines) == leaves(RunConfig)
    assert all(len(line.split("\n")[1].strip()) > 10 for line in lines)


def test_changed_keys_names_old_and_new() -> None:
    before = to_tree(load_config(None))
    after = load_config(None, ["train.steps=5", "run.folder=elsewhere"])
    assert changed_keys(before, after) == ["train.steps: 40000 -> 5"]
