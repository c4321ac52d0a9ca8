"""Configuration: precedence, types, and messages that say what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from mfm_dist.config.loader import changed_keys, describe, dump_config, load_config, to_tree
from mfm_dist.config.schema import RunConfig
from mfm_dist.config.validate import problems, range_of
from mfm_dist.errors import ConfigError
from mfm_dist.train import parse_arguments


def hints_by_key(kind: type = RunConfig, prefix: str = "") -> dict[str, Any]:
    """The type of every field, with its range, by dotted key."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        found |= hints_by_key(hint, f"{prefix}{name}.") if is_dataclass(hint) else {prefix + name: hint}
    return found


KEYS = hints_by_key()
RANGED = [key for key, hint in KEYS.items() if range_of(hint)]
SHARES = ("data.source", "data.target")
"""Keys that name shard sets, and a number for each."""


def value_of(config: RunConfig, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def problems_of(*overrides: str, path: Path | Sequence[Path] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.problems


def write(folder: Path, *texts: str) -> list[Path]:
    """Configuration files a.yaml, b.yaml, ... with these texts."""
    files = [folder / f"{name}.yaml" for name, _ in zip("abc", texts, strict=False)]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    return files


def test_precedence_is_default_then_yaml_then_override(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train: {steps: 7, micro_batch: 4, global_batch: 8}\noptim: {lr: 6e-5}\n")
    config = load_config(file, ["train.steps=9"])
    assert (config.train.steps, config.train.micro_batch, config.train.clip_norm) == (9, 4, 0.0)
    assert config.optim.lr == 6e-5  # YAML reads 6e-5 as text


def test_later_files_win_key_by_key_and_overrides_over_all(tmp_path: Path) -> None:
    files = write(
        tmp_path,
        "train: {steps: 7, micro_batch: 4, global_batch: 8}\ndata: {rare_class_sampling: {enabled: true}}\n",
        "train: {steps: 8, global_batch: 16}\ndata: {rare_class_sampling: {temperature: 0.5}}\noptim:\n",
        "train: {global_batch: 4}\n",
    )
    config = load_config(files, ["train.steps=9"])
    assert (config.train.steps, config.train.micro_batch, config.train.global_batch) == (9, 4, 4)
    assert (config.data.rare_class_sampling.enabled, config.data.rare_class_sampling.temperature) == (True, 0.5)
    assert load_config(files[::-1]).train.steps == 7
    assert load_config([]) == load_config(None) == RunConfig()
    assert load_config(files[:1]) == load_config(files[0])


def test_a_mapping_is_replaced_whole_and_an_override_of_one_entry_keeps_the_others(tmp_path: Path) -> None:
    files = write(
        tmp_path,
        "model: {backbone_options: {output_stride: 8, out_indices: [1, 2]}}\n",
        "model: {backbone_options: {output_stride: 16}}\n",
    )
    assert load_config(files).model.backbone_options == {"output_stride": 16}
    config = load_config(files[0], ["model.backbone_options.output_stride=16", "hrda.attention_options.dilations=[6]"])
    assert config.model.backbone_options == {"output_stride": 16, "out_indices": [1, 2]}
    assert config.hrda.attention_options == {"width": 256, "dilations": [6]}  # the default's entry, too
    assert load_config(files[0], ["model.backbone_options={}"]).model.backbone_options == {}
    assert RunConfig().hrda.attention_options == {"width": 256}


def test_problems_name_the_file_they_come_from(tmp_path: Path) -> None:
    first, second, third = write(
        tmp_path,
        "train: {global_batch: 4, stepz: 3}\nmodel: {pretrained: true}\n",
        "optim: {lr: fast}\n",
        "train: {micro_batch: 3, global_batch: 4}\n",
    )
    assert problems_of(path=[first, second]) == [
        f"unknown key 'train.stepz' ({first}): did you mean 'train.steps'?",
        f"optim.lr: expected a number, got 'fast' ({second})",
    ]
    first.write_text("model: {pretrained: true}\ntrain: {steps: 0}\n")
    assert problems_of("model.weights=x.pth", "mfm.mask_ratio=2", path=[first, third]) == [
        "mfm.mask_ratio=2.0: must lie between 0 and 1 (command line)",
        f"train.steps=0: must lie between 1 and 1,000,000,000 ({first})",
        f"train.global_batch=4 is not a multiple of train.micro_batch=3 ({third})",
        "model.pretrained and model.weights are both set: keep one, they both start the encoder "
        f"({first}, command line)",
    ]
    missing = tmp_path / "d.yaml"
    assert [text.partition(":")[0] for text in problems_of("=", path=[first, missing])] == [
        str(missing),
        "override '='",
    ]


def test_what_a_later_source_sets_right_is_no_problem(tmp_path: Path) -> None:
    files = write(tmp_path, "train: {steps: many}\n", "train: {steps: 3}\n")
    assert load_config(files).train.steps == 3
    assert load_config(files[0], ["train.steps=4"]).train.steps == 4
    assert "got 'many'" in problems_of(path=files[::-1])[0]


def test_a_variant_is_defaults_that_files_and_overrides_change(tmp_path: Path) -> None:
    plain = load_config(None)
    assert (plain.rebuilder.readout, plain.mfm.loss_on, plain.optim.rebuilder_base_width) == (0, "all", 0)
    [file] = write(tmp_path, "rebuilder: {variant: stable, peri_norm: off}")
    stable = load_config(file, ["mfm.gradient_budget=0"])
    assert (stable.rebuilder.readout, stable.mfm.loss_on, stable.optim.rebuilder_base_width) == (2, "hidden", 512)
    assert (stable.rebuilder.peri_norm, stable.mfm.gradient_budget) == (False, 0.0)
    assert load_config(file, ["rebuilder.variant=paper"]) == load_config(None, ["rebuilder.peri_norm=false"])
    assert load_config(write(tmp_path, dump_config(stable))) == stable


def test_what_a_variant_needs_is_refused_when_it_is_taken_away() -> None:
    assert problems_of("rebuilder.variant=stable", "mfm.mask=bernoulli") == [
        "rebuilder.readout=2 reads the same number of visible cells of every image: choose mfm.mask=exact"
        " (command line)"
    ]
    assert problems_of("mfm.mask_block_cells=3") == [
        "mfm.mask_block_cells=3 does not divide rebuilder.grid=16x16: choose a divisor of both (command line)"
    ]


def test_the_command_takes_several_files_anywhere_and_none() -> None:
    arguments = parse_arguments(["--config", "a.yaml", "seed=1", "--config", "b.yaml", "--check", "seed=2"])
    assert (arguments.config, arguments.overrides) == ([Path("a.yaml"), Path("b.yaml")], ["seed=1", "seed=2"])
    assert parse_arguments([]).config == [Path("configs/quickstart.yaml")]


ON_TOP = """
data: {lanes: 0, rare_class_sampling: {enabled: yes}, source: {gta/train: 3, synthia/train: 1}}
model: {weights: null, pretrained: on}
mfm: {reconstruction: pixels, view: context, trained_parts: both, use_rebuilder: on}
train: {cuda_graph: on}
memory: {checkpoint_backbone: off, checkpoint_rebuilder: off}
debug: {check_gradients: off}
"""
"""Keys that do not go together with others of every_key.yaml, and what lets them go."""


def test_every_key_can_be_set_from_yaml_text(tmp_path: Path) -> None:
    """Overrides are split before YAML reads them, so only a file shows a key that YAML takes for a boolean."""
    most = Path(__file__).with_name("every_key.yaml")
    configs = [load_config(most), load_config([most, *write(tmp_path, ON_TOP)])]
    as_by_default = [
        key for key in KEYS if all(value_of(config, key) == value_of(RunConfig(), key) for config in configs)
    ]
    assert as_by_default == []


def test_no_key_is_a_word_that_yaml_reads_as_something_else() -> None:
    words = {part for key in KEYS for part in key.split(".")}
    assert [word for word in words if yaml.safe_load(word) != word] == []
    assert yaml.safe_load("on") is True  # what the test is about


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


def test_shard_sets_are_a_name_a_list_or_shares(tmp_path: Path) -> None:
    for text, expected in [("a/b", "a/b"), ("[a, b]", ("a", "b")), ("{a: 2, b: 1e0}", {"a": 2.0, "b": 1.0})]:
        config = load_config(None, [f"data.source={text}"])
        assert config.data.source == expected
        assert load_config(write(tmp_path, dump_config(config))) == config
    assert load_config(None, ["data.source={a: 2, b: 1}", "data.source.a=3"]).data.source == {"a": 3.0, "b": 1.0}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.source=3"], "data.source: expected text or a list, each text or a mapping, each a number, got 3"),
        (["data.source=null"], "data.source: expected text"),
        (["data.target={a: much}"], "data.target: expected text"),
        (["data.source={a: 0, b: 1}"], "data.source.a=0.0: must be above 0"),
        (["data.source=[]"], "data.source names no shard set"),
        (["data.target=[a, b, a]"], "data.target names a twice: give it a share instead"),
        (["data.source=[a, 's3://b']", "data.stream_samples=9"], "data.source names s3://b among others"),
        (["data.target={a: 1, b: 1}", "data.lanes=2"], "name the sets in a list, which is one sequence"),
        (["data.target_labelled='s3://b'"], "data.target_labelled is a URL"),
        (["data.target_labelled=a", "data.validation=a"], "cannot be scored on labels that it trains on"),
    ],
)
def test_shard_sets_that_cannot_be_are_refused(overrides: list[str], said: str) -> None:
    (problem,) = problems_of(*overrides)
    assert said in problem


def test_unknown_keys_are_named_with_the_nearest_valid_one() -> None:
    assert problems_of("train.stepz=3") == ["unknown key 'train.stepz' (command line): did you mean 'train.steps'?"]
    assert "did you mean 'train.steps'" in problems_of("steps=3")[0]
    assert "did you mean 'rebuilder.width'" in problems_of("rebuilder.widht=3")[0]
    assert "allowed are log.every, log.trackers" in problems_of("log.foo=3")[0]


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("mic.on=daformer", "mic.base_method"),  # by its value
        ("mic.block=32", "mic.mask_block_pixels"),  # by a word
        ("mfm.rebuild=false", "mfm.use_rebuilder"),  # by its likeness
        ("mfm.rebuilds=pixels", "mfm.reconstruction"),  # like use_rebuilder, which does not take it
        ("mfm.trains=both", "mfm.trained_parts"),  # a value of several
        ("stability.rollbacks=2", "recovery"),  # the only section with this key
        ("trian.every=5", "train"),  # a key of several sections, the nearest of which has none
        ("rebuilder.widht=3.5", "rebuilder.width"),  # the value does not fit either
    ],
)
def test_an_unknown_key_is_understood_by_name_word_or_value(override: str, meant: str) -> None:
    (problem,) = problems_of(override)
    assert f"did you mean '{meant}'?" in problem


def test_a_key_that_yaml_reads_as_a_boolean_is_explained(tmp_path: Path) -> None:
    files = write(tmp_path, "mic: {on: daformer}\n", "mic: {on: daformer, 5: 3}\n")
    assert problems_of(path=files[0]) == [
        f"unknown key 'mic.True' ({files[0]}): did you mean 'mic.base_method'?; YAML reads on, yes, off and no as true "
        "and false, and digits as a number: in quotes they are text"
    ]
    assert len(problems_of(path=files[1])) == 2


def test_every_number_has_a_range() -> None:
    numbers = [key for key, hint in KEYS.items() if "int" in str(hint) or "float" in str(hint)]
    assert numbers == RANGED


@pytest.mark.parametrize("key", RANGED)
def test_a_number_out_of_its_range_is_refused(key: str) -> None:
    key += ".some" if key in SHARES else ""
    found = problems_of(f"{key}=-1")
    assert [text for text in found if text.startswith(f"{key}=-1") and ": must " in text and "(command line)" in text]


def test_no_number_is_without_end() -> None:
    """Seeds have 64 bits, and no larger integer is read at all."""
    limited = [f"{key}.some" if key in SHARES else key for key in RANGED if not key.endswith("seed")]
    text = "\n".join(problems_of(*(f"{key}=10000000000" for key in limited)))
    assert [key for key in limited if f"{key}=10000000000" not in text] == []


@pytest.mark.parametrize(
    ("key", "most"), [("data.crop", "32,768"), ("eval.resize", "32,768"), ("rebuilder.grid", "1,024")]
)
def test_each_number_of_a_pair_has_the_range(key: str, most: str) -> None:
    assert f"{key}=0: must lie between 1 and {most} (command line)" in problems_of(f"{key}=[32, 0]")


@pytest.mark.parametrize(
    ("key", "allowed", "refused"),
    [
        ("train.steps", ["1"], "0"),
        ("optim.lr", ["0"], "-1e-9"),
        ("optim.warmup_ratio", ["0", "1"], "1.001"),
        ("rebuilder.mlp_ratio", ["0.1"], "0"),
        ("recovery.spike_factor", ["0", "1.1"], "1"),
        ("optim.betas", ["0", "0.999999"], "1"),
        ("optim.eps", ["1e-30", "1"], "0"),
        ("watchdog.seconds", ["0", "1"], "1e-9"),
        ("train.threads", ["1024"], "100000"),
        ("seed", ["9223372036854775807"], "-1"),
        ("data.crop", ["8192x8192"], "8192x8193"),
        ("recovery.spike_window", ["1", "10000"], "10001"),
    ],
)
def test_the_edges_of_a_range(key: str, allowed: list[str], refused: str) -> None:
    for text in allowed:
        assert problems(load_config(None, [f"{key}={text}"])) == []
    assert len(problems_of(f"{key}={refused}")) == 1


def test_help_shows_types_and_ranges() -> None:
    heads = {line.partition("=")[0]: line.partition("\n")[0] for line in describe()}
    assert list(heads) == list(KEYS)
    assert heads["train.steps"] == "train.steps=40000  [an integer, must lie between 1 and 1,000,000,000]"
    assert heads["eval.resize"] == "eval.resize=None  [2 x an integer or null, must lie between 1 and 32,768]"
    assert heads["mfm.enabled"] == "mfm.enabled=False  [true or false]"
    assert all(("must" in heads[key]) == (key in RANGED) for key in KEYS)


def test_every_problem_is_reported_at_once_with_its_origin(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train: {steps: many}\nmfm: {loss_on: visible}\nseed: no\n")
    found = problems_of("optim.lr=fast", "data.crop=3x4x5", "=1", path=file)
    text = "\n".join(found)
    assert len(found) == 6
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
    assert "recovery.spike_window=100000: must be 1 to 10000 steps" in text


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
    assert load_config(None, ["run.folder=2024-13-45"]).run.folder == Path("2024-13-45")  # no date


HOSTILE = {
    "not UTF-8": (b"# caf\xe9\ntrain: {steps: 3}\n", r"is not UTF-8 \(byte 5 is 0xe9\)"),
    "a tag of a date": (b"seed: !!timestamp x", "could not determine a constructor"),
    "a tag of a set": (b"seed: !!set {1}", "could not determine a constructor"),
    "an empty integer": (b"seed: !!int ''", "is no integer"),
    "an integer of text": (b"seed: !!int x", "is no integer"),
    "a truth of text": (b"seed: !!bool x", "is neither true nor false"),
    "a number of text": (b"seed: !!float x", "is no number"),
    "400 digits": (b"seed: " + b"9" * 400, "an integer beyond 64 bits"),
    "5000 digits": (b"seed: " + b"9" * 5000, "is no integer"),
    "hexadecimal digits": (b"seed: 0x" + b"f" * 5000, "an integer beyond 64 bits"),
    "itself": (b"model: {backbone_options: &a {x: *a}}", "holds an alias of itself"),
    "deep": (b"model: {backbone_options: {x: " + b"[" * 5000 + b"]" * 5000 + b"}}", "nested more than 16 deep"),
    "deeper than 16": (b"model: {backbone_options: {x: " + b"[" * 17 + b"]" * 17 + b"}}", "nested more than 16 deep"),
    "aliases": (
        b"a: &a [1,1,1,1,1,1,1,1,1]\n"
        + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 108)),
        "more than 20,000 values",
    ),
    "a long list": (b"seed: [" + b"1234567890," * 19000 + b"]", "expected an integer, got"),
    "too many values": (b"seed: [" + b"1," * 30000 + b"]", "more than 20,000 values"),
    "too many values before anything else": (b"seed: [" + b"1," * 30000 + b"@", "more than 20,000 values"),
    "too long": (b"#" * (1 << 21), "is larger than 1 MiB"),
    "a long key": (b"? " + b"k" * 100_000 + b"\n: 3", "unknown key"),
    "a key twice": (b"train: {steps: 3}\nseed: 1\ntrain: {steps: 4}", "'train' is a key that stands there twice"),
    "a key twice below": (b"train: {steps: 3, steps: 4}", "'steps' is a key that stands there twice"),
    "half a character": (b'run: {folder: "\\ud800"}', "a character that no file can hold"),
    "a zero byte": (b'run: {folder: "a\\0b"}', "a character that no file can hold"),
    "a number too large": (b"seed: 1.0e+300", "expected an integer"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_text_that_no_configuration_is_gets_a_short_answer(kind: str, tmp_path: Path) -> None:
    content, reason = HOSTILE[kind]
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_config(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 4096


def test_many_problems_are_told_shortly(tmp_path: Path) -> None:
    (file,) = write(tmp_path, "".join(f"key_{number}: 3\n" for number in range(500)))
    with pytest.raises(ConfigError, match=r"500 configuration errors:(?s:.)* and \d+ more$") as caught:
        load_config(file)
    assert len(str(caught.value)) < 4096
    assert len(caught.value.problems) == 500
    for override in ("." * 100_000 + "=1", "seed=" + "[" * 5000, "seed=" + "9" * 5000, "x" * 100_000):
        with pytest.raises(ConfigError) as caught:
            load_config(None, [override])
        assert len(str(caught.value)) < 4096


def test_of_two_overrides_of_a_key_the_last_wins_and_merge_keys_add(tmp_path: Path) -> None:
    assert load_config(None, ["seed=1", "seed=2"]).seed == 2
    (file,) = write(tmp_path, "model: {backbone_options: &a {x: 1, y: 2}, decoder_options: {<<: *a, y: 3}}\n")
    assert load_config(file).model.decoder_options == {"x": 1, "y": 3}


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
