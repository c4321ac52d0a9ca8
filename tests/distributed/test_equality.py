"""One step function, several ways to run it: one process, DDP, ZeRO 0 to 3. Same samples, same losses, same weights.

Rates are high enough that weights move far above rounding, or such a test could not fail; that it can is tested too.
And low enough that what rounding leaves does not grow from step to step: at ten times the rate it does. AdamW's epsilon
is 1e-4: at its default it would enlarge the noise of gradients that are 0.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from mfm_dist.build import build_train_module
from mfm_dist.checkpoint.files import read_checkpoint
from mfm_dist.config.loader import load_config
from mfm_dist.distributed.launch import ZERO_SETTINGS
from mfm_dist.shards.scene_shards import write_scenes
from tests.helpers.classes import CLASSES
from tests.helpers.runs import KEEPS_NOTHING, LARGE_REBUILDER, ON_TWO_NODES, run_module, run_train, tiny_overrides

CAMPAIGN = pytest.mark.campaign
WIDE = "data.crop=64x128"
"""Wider crops than those of ``tiny_overrides``: on 64 x 64 a single ReLU that a last bit turns on may be 1e-4 of a
weight's movement, also from one process to itself (``test_how_far_last_bits_lead``)."""
# A random teacher is sure of nothing: above a threshold of 0 the MFM term, and the Rebuilder's gradient, would be 0.
SGD = ["optim.name=sgd", "optim.lr=0.025", "optim.decoder_lr_factor=1", "optim.rebuilder_lr=0.25",
       "train.clip_norm=1.0", "self_training.pseudo_threshold=0", WIDE]  # fmt: skip
ADAMW = ["optim.name=adamw", "optim.eps=1e-4", "optim.lr=1e-3", "optim.rebuilder_lr=0.5", "train.clip_norm=0.001",
         "self_training.pseudo_threshold=0", WIDE]  # fmt: skip
"""Clipped hard, so that gradients stay below epsilon: above it AdamW raises small ones to the size of large ones."""
STABLE = [*ADAMW, "rebuilder.variant=stable", "mfm.loss_weight=4", "rebuilder.depth=3",
          "optim.rebuilder_lr=0.05", "train.steps=6", "rebuilder.qk_norm=true"]  # fmt: skip
"""The variant that grows and what can be added to it, with a gradient budget that binds."""
INSTRUMENTS = ("mfm/loss_hidden", "mfm/loss_visible", "mfm/grad_ratio", "mfm/lambda_eff", "rebuilder/max_logit",
               "rebuilder/token_variation", "rebuilder/update_rms", "rebuilder/update_over_weight")  # fmt: skip
LARGER = [*SGD, "train.global_batch=8"]
"""Four micro-batches a step, so that gradients add up within a process too."""
PAPERS = ["model.backbone=mit_b0", "model.backbone_options={drop_path_rate: 0.1}", "model.decoder_options={width: 256}",
          "train.global_batch=8"]  # fmt: skip
"""The paper's kind of network, with its BatchNorm, Dropout2d and drop-path."""


State = dict[str, dict[str, torch.Tensor]]
"""Tensors by name of student, teacher and Rebuilder."""


def trained(
    scenes: Path,
    folder: Path,
    *overrides: str,
    launch: str | None,
    processes: int = 2,
    steps: int = 4,
    otherwise: str | None = None,
    environment: dict[str, str] | None = None,
    timeout: float = 600,
) -> dict[str, Any]:
    """Train; the last checkpoint's tensors and the metrics."""
    completed = run_train(
        [*tiny_overrides(scenes, folder), f"train.steps={steps}", *overrides],
        launch=launch,
        processes=processes,
        module="tests.distributed.train_otherwise" if otherwise else "mfm_dist.train",
        environment={**({"OTHERWISE": otherwise} if otherwise else {}), **(environment or {})},
        timeout=timeout,
    )
    assert completed.returncode == 0, completed.stderr[-4000:]
    checkpoint = read_checkpoint(folder / "checkpoints" / f"step_{steps:08d}")
    state = {name: checkpoint.tensors(name) for name in ("student", "teacher", "rebuilder")}
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = json.loads((folder / "eval" / "step_00000000.json").read_text())
    return {"state": state, "metrics": metrics, "scores": scores, "checkpoint": checkpoint}


@pytest.fixture(scope="module")
def alone(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trained(scenes, tmp_path_factory.mktemp("alone"), *SGD, "train.steps=4", launch=None)


def differences(run: dict[str, Any], reference: dict[str, Any], initial: State) -> dict[str, float]:
    """Of student, teacher and Rebuilder the largest difference over its largest movement, which is at least 1e-3."""
    found = {}
    for part, tensors in reference["state"].items():
        parameters = [name for name in tensors if "running_" not in name and "num_batches" not in name]
        movement = max(float((tensors[n] - initial[part][n]).abs().max()) for n in parameters)
        assert movement > 1e-3, part
        found[part] = max(float((tensors[n] - run["state"][part][n]).abs().max()) for n in parameters) / movement
    return found


def assert_same_training(run: dict[str, Any], reference: dict[str, Any], initial: State) -> dict[str, float]:
    """Student, teacher and Rebuilder each within 1e-4 of its largest movement; returns ``differences``."""
    found = differences(run, reference, initial)
    for part, difference in found.items():
        assert difference <= 1e-4, f"{part}: {difference} of its largest movement"
    for ours, theirs in zip(run["metrics"], reference["metrics"], strict=True):
        keys = ["loss/total", "loss/source", "loss/mixed", "loss/mfm", "grad_norm/total"]
        for key in [*keys, *(key for key in INSTRUMENTS if key in theirs)]:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    assert run["scores"] == reference["scores"], "of the initial weights, and so of the same bits"
    return found


def initial_state(scenes: Path, *overrides: str) -> State:
    """What a run starts from."""
    module = build_train_module(load_config(None, [*tiny_overrides(scenes, Path("unused")), *overrides]), CLASSES)
    assert module.teacher is not None
    assert module.rebuilder is not None
    parts = {"student": module.student, "teacher": module.teacher.segmentor, "rebuilder": module.rebuilder}
    return {name: part.state_dict() for name, part in parts.items()}


@pytest.fixture(scope="module")
def initial(scenes: Path) -> State:
    return initial_state(scenes)


@pytest.mark.parametrize("launch", ["cpu_ddp", "cpu_zero2", "cpu_zero3", pytest.param("cpu_zero0", marks=CAMPAIGN)])
def test_two_processes_train_as_one(
    launch: str, scenes: Path, tmp_path: Path, alone: dict[str, Any], initial: State
) -> None:
    run = trained(scenes, tmp_path, *SGD, launch=launch)
    assert_same_training(run, alone, initial)


@pytest.fixture(scope="module")
def stable_alone(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trained(scenes, tmp_path_factory.mktemp("stable"), *STABLE, launch=None)


@pytest.mark.parametrize("launch", ["cpu_ddp", "cpu_zero0", "cpu_zero1", "cpu_zero2", "cpu_zero3"])
def test_the_stable_variant_trains_as_one_at_every_stage(
    launch: str, scenes: Path, tmp_path: Path, stable_alone: dict[str, Any]
) -> None:
    """Its optimiser's groups, its budget and what is measured of it."""
    weights = [line["mfm/lambda_eff"] for line in stable_alone["metrics"]]
    assert weights[0] == 4.0
    assert weights[-1] < 3.0, "the budget has to bind, or nothing is said about it"
    assert all(key in stable_alone["metrics"][-1] for key in INSTRUMENTS)
    run = trained(scenes, tmp_path, *STABLE, launch=launch)
    assert_same_training(run, stable_alone, initial_state(scenes, *STABLE))


@pytest.mark.parametrize(
    ("precision", "launch"), [("bf16", None), ("bf16", "cpu_zero3"), ("bf16_weights", "cpu_zero2")]
)
def test_the_stable_variant_trains_in_bf16_as_in_fp32_to_its_rounding(
    precision: str, launch: str | None, scenes: Path, tmp_path: Path, stable_alone: dict[str, Any]
) -> None:
    """What it says of itself differs by less than ten of the 2^-8 that a bf16 number is rounded by."""
    run = trained(scenes, tmp_path, *STABLE, f"train.precision={precision}", launch=launch)
    for ours, theirs in zip(run["metrics"], stable_alone["metrics"], strict=True):
        for key in ("loss/total", "loss/mfm", *INSTRUMENTS):
            assert ours[key] == pytest.approx(theirs[key], rel=10 * 2**-8), key
    first, in_fp32 = run["metrics"][0]["mfm/grad_ratio"], stable_alone["metrics"][0]["mfm/grad_ratio"]
    assert first != pytest.approx(in_fp32, rel=1e-4), "nothing was rounded"


HOUR = 3600
"""Seconds for one start of the large preset, on cores that others may use too."""
LARGE = [*STABLE, *LARGE_REBUILDER, "data.crop=128x256", "rebuilder.grid=4x8", "train.global_batch=4",
         "checkpoint.every=10", "log.every=20", "eval.every=20", "train.steps=20",
         "optim.rebuilder_lr=0.005"]  # fmt: skip
"""A tenth of the Rebuilder's rate above, which 24 blocks do not bear: they enlarge what rounding leaves every step."""


@pytest.fixture(scope="module")
def large_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("large") / "scenes"
    write_scenes(data, train=12, val=2, size=(128, 256), seed=0, shard_size=6, workers=1, report=lambda _: None)
    return data


@pytest.fixture(scope="module")
def large_alone(large_data: Path) -> dict[str, Any]:
    return trained(large_data, large_data.with_name("alone"), *LARGE, launch=None, steps=20, timeout=HOUR)


@pytest.mark.campaign
@pytest.mark.parametrize("launch", ["cpu_zero2", "cpu_zero3"])
def test_the_large_preset_trains_as_one_and_resumes_bit_for_bit(
    launch: str,
    large_data: Path,
    large_alone: dict[str, Any],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """20 steps, with all that the smaller ones promise."""
    run = trained(large_data, tmp_path, *LARGE, launch=launch, steps=20, timeout=HOUR)
    peaks = {name: one["metrics"][-1]["memory_gib"] for name, one in (("alone", large_alone), (launch, run))}
    record_property("peak_gib", peaks)  # the resident size of the largest process
    found = assert_same_training(run, large_alone, initial_state(large_data, *LARGE))
    record_property("difference_over_movement", {launch: found})
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000020")
    again = trained(large_data, tmp_path, *LARGE, launch=launch, steps=20, timeout=HOUR)
    for part, tensors in run["state"].items():
        assert all(torch.equal(tensor, again["state"][part][name]) for name, tensor in tensors.items()), part


@pytest.mark.campaign
def test_the_large_preset_trains_as_one_on_two_nodes_that_keep_a_copy_each(
    large_data: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """hpZ, two "nodes" of two ranks, SGD at a constant rate, 10 steps: at most twice as far as last bits lead."""
    file = tmp_path / "hpz.json"
    settings = {"stage": 3, "overlap_comm": False, "zero_hpz_partition_size": 2, "stage3_max_live_parameters": 5e7}
    file.write_text(json.dumps({"zero_optimization": settings}))
    overrides = [*LARGE, *SGD, *ON_TWO_NODES, "train.steps=10"]
    said = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file), **KEEPS_NOTHING}
    nodes = {"launch": "cpu_zero3", "processes": 4, "environment": said}
    # First of all, while this process holds no states.
    run = trained(large_data, tmp_path / "nodes", *overrides, **nodes, steps=10, timeout=HOUR)
    alone, other = (
        trained(large_data, tmp_path / name, *overrides, launch=None, otherwise=otherwise, steps=10, timeout=HOUR)
        for name, otherwise in (("alone", None), ("other", "last_bits"))
    )
    initial = initial_state(large_data, *overrides)
    found = {"nodes": differences(run, alone, initial), "last_bits": differences(other, alone, initial)}
    record_property("difference_over_movement", found)
    record_property("peak_gib", [one["metrics"][-1]["memory_gib"] for one in (alone, run)])
    for part, difference in found["nodes"].items():
        assert difference <= 2 * found["last_bits"][part], part


@pytest.fixture(scope="module")
def larger_alone(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trained(scenes, tmp_path_factory.mktemp("larger"), *LARGER, launch=None)


@pytest.mark.parametrize("launch", ["cpu_zero2", pytest.param("cpu_ddp", marks=CAMPAIGN)])
def test_gradients_add_up_over_the_micro_batches_of_a_step(
    launch: str, scenes: Path, tmp_path: Path, larger_alone: dict[str, Any], initial: State
) -> None:
    """Four micro-batches a step: all in one process, or two in each of two."""
    assert_same_training(trained(scenes, tmp_path, *LARGER, launch=launch), larger_alone, initial)


@pytest.mark.parametrize(
    ("launch", "overrides"),
    [
        pytest.param("cpu_ddp", ["memory.lean=true"], marks=CAMPAIGN),
        ("cpu_zero2", ["memory.lean=true"]),
        ("cpu_zero3", ["memory.lean=true", "memory.checkpoint_backbone=true"]),
        pytest.param("cpu_zero0", ["memory.lean=true"], marks=CAMPAIGN),
        pytest.param("cpu_zero1", ["memory.lean=true"], marks=CAMPAIGN),
        pytest.param("cpu_zero3", ["memory.lean=true"], marks=CAMPAIGN),
        pytest.param("cpu_ddp", ["memory.checkpoint_backbone=true"], marks=CAMPAIGN),
        pytest.param("cpu_zero2", ["memory.checkpoint_backbone=true"], marks=CAMPAIGN),
        pytest.param("cpu_zero3", ["memory.checkpoint_backbone=true"], marks=CAMPAIGN),
        pytest.param("cpu_zero1", ["memory.offload_optimizer=true"], marks=CAMPAIGN),
        pytest.param("cpu_zero2", ["memory.offload_optimizer=true"], marks=CAMPAIGN),
        pytest.param("cpu_zero3", ["memory.offload_optimizer=true"], marks=CAMPAIGN),
        pytest.param("cpu_ddp", ["train.compile=true"], marks=CAMPAIGN),
        pytest.param("cpu_zero2", ["train.compile=true"], marks=CAMPAIGN),
    ],
)
def test_less_memory_trains_the_same(
    launch: str, overrides: list[str], scenes: Path, tmp_path: Path, larger_alone: dict[str, Any], initial: State
) -> None:
    """Six backwards a step in each process, most of which leave the Rebuilder out."""
    assert_same_training(trained(scenes, tmp_path, *LARGER, *overrides, launch=launch), larger_alone, initial)


def test_micro_batches_that_are_replayed_train_the_same(
    scenes: Path, tmp_path: Path, larger_alone: dict[str, Any], initial: State
) -> None:
    """train.cuda_graph over two processes, which average their gradients themselves; by recorded operators."""
    graph = [*LARGER, "train.cuda_graph=true", "debug.check_gradients=false"]
    assert_same_training(
        trained(scenes, tmp_path, *graph, launch="cpu_ddp", otherwise="replayed"), larger_alone, initial
    )


@pytest.mark.parametrize(
    ("fault", "launch"), [("swapped_sample", None), ("no_exchange", "cpu_ddp"), ("stale_shard", "cpu_zero3")]
)
def test_a_planted_fault_is_noticed(
    fault: str, launch: str | None, scenes: Path, tmp_path: Path, alone: dict[str, Any], initial: State
) -> None:
    """The comparison above can fail, and does for each of these."""
    audit_off = ["debug.audit_every=0"]  # it would notice the missing exchange first
    run = trained(scenes, tmp_path, *SGD, *audit_off, launch=launch, otherwise=fault)
    with pytest.raises(AssertionError, match="of its largest movement"):
        assert_same_training(run, alone, initial)


def test_where_mfm_is_off_no_old_gradient_is_used(scenes: Path, tmp_path: Path, initial: State) -> None:
    """Its weight is 1, 0, 1, 0. ZeRO-3 would update a Rebuilder that does not run with its gradient of before."""
    runs = [
        trained(scenes, tmp_path / str(launch), *SGD, launch=launch, otherwise="every_other_step_without_mfm")
        for launch in (None, "cpu_zero3")
    ]
    assert [line["grad_norm/rebuilder"] > 0 for line in runs[1]["metrics"]] == [True, False, True, False]
    assert_same_training(runs[1], runs[0], initial)


class Reference(NamedTuple):
    """A run in one process."""

    overrides: list[str]
    run: dict[str, Any]
    initial: State


@pytest.fixture(scope="module")
def references(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Reference]:
    """Runs by network and optimiser, made when they are asked for."""

    @cache
    def reference(network: str, optimizer: str) -> Reference:
        overrides = [*(PAPERS if network == "papers" else ["train.global_batch=8"]),
                     *(SGD if optimizer == "sgd" else ADAMW)]  # fmt: skip
        folder, initial = tmp_path_factory.mktemp("reference"), initial_state(scenes, *overrides)
        run = trained(scenes, folder, *overrides, launch=None)
        return Reference(overrides, run, initial)

    return reference


@pytest.mark.parametrize(
    ("network", "optimizer", "launch", "processes"),
    [("tiny", "sgd", "cpu_zero2", 4)]
    + [
        pytest.param(network, optimizer, f"cpu_{launch}", processes, marks=CAMPAIGN)
        for network, optimizer in (("tiny", "sgd"), ("tiny", "adamw"), ("papers", "sgd"))
        for launch in ("ddp", "zero0", "zero1", "zero2", "zero3")
        for processes in (2, 4)
        if (network, optimizer, launch, processes) != ("tiny", "sgd", "zero2", 4)
    ],
)
def test_any_number_of_processes_trains_any_network_as_one(
    network: str,
    optimizer: str,
    launch: str,
    processes: int,
    scenes: Path,
    tmp_path: Path,
    references: Callable[[str, str], Reference],
    record_property: Callable[[str, object], None],
) -> None:
    reference = references(network, optimizer)
    run = trained(scenes, tmp_path, *reference.overrides, launch=launch, processes=processes)
    record_property("difference_over_movement", differences(run, reference.run, reference.initial))
    assert_same_training(run, reference.run, reference.initial)


@pytest.mark.campaign
@pytest.mark.parametrize("network", ["tiny", "papers"])
def test_how_far_last_bits_lead(
    network: str,
    scenes: Path,
    tmp_path: Path,
    references: Callable[[str, str], Reference],
    record_property: Callable[[str, object], None],
) -> None:
    """One process against itself, its initial weights changed as rounding would: no promise, but what 1e-4 is worth.

    It stays below what a planted fault makes of it, which is above 1e-3.
    """
    reference = references(network, "sgd")
    other = trained(scenes, tmp_path, *reference.overrides, launch=None, otherwise="last_bits")
    found = differences(other, reference.run, reference.initial)
    record_property("difference_over_movement", found)
    assert max(found.values()) < 1e-3


@pytest.mark.campaign
def test_a_planted_fault_is_noticed_in_the_papers_network(
    scenes: Path,
    tmp_path: Path,
    references: Callable[[str, str], Reference],
    record_property: Callable[[str, object], None],
) -> None:
    reference = references("papers", "sgd")
    run = trained(scenes, tmp_path, *reference.overrides, launch="cpu_zero3", otherwise="swapped_sample")
    found = differences(run, reference.run, reference.initial)
    record_property("difference_over_movement", found)
    assert min(found.values()) > 1e-3


@pytest.fixture(scope="module")
def half(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under ZeRO-2 that lost its last checkpoint, so that step 2 is the newest."""
    folder = tmp_path_factory.mktemp("half") / "run"
    trained(scenes, folder, *SGD, launch="cpu_zero2")
    shutil.rmtree(folder / "checkpoints" / "step_00000004")
    return folder


@pytest.mark.parametrize("launch", [None, "cpu_ddp", "cpu_zero2", "cpu_zero3"])
def test_a_zero2_run_resumes_at_any_world_size_and_stage(
    launch: str | None,
    half: Path,
    scenes: Path,
    tmp_path: Path,
    alone: dict[str, Any],
    initial: State,
) -> None:
    """Checkpoints hold whole tensors by name, momentum included: nothing depends on who wrote them."""
    shutil.copytree(half, tmp_path / "run")
    assert_same_training(trained(scenes, tmp_path / "run", *SGD, launch=launch), alone, initial)


FORMS = {
    "alone": (None, 1),
    "ddp": ("cpu_ddp", 2),
    "zero0": ("cpu_zero0", 2),
    "zero1": ("cpu_zero1", 2),
    "zero2": ("cpu_zero2", 2),
    "zero3": ("cpu_zero3", 2),
    "zero2 of 4": ("cpu_zero2", 4),
    "zero3 of 4": ("cpu_zero3", 4),
}
"""Launch file and processes."""
TWELVE = [*ADAMW, "optim.lr=4e-4", "optim.rebuilder_lr=0.2", "train.global_batch=8", "checkpoint.keep=99"]
"""At lower rates, for there are more steps to move in."""


@pytest.fixture(scope="module")
def written(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole runs of twelve steps by form, made when they are asked for."""

    class Runs(dict[str, Path]):
        def __missing__(self, form: str) -> Path:
            launch, processes = FORMS[form]
            folder = tmp_path_factory.mktemp(form.replace(" ", "_")) / "run"
            trained(scenes, folder, *TWELVE, launch=launch, processes=processes, steps=12)
            self[form] = folder
            return folder

    return Runs()


@pytest.mark.campaign
@pytest.mark.parametrize("reader", FORMS)
@pytest.mark.parametrize("writer", FORMS)
def test_a_run_goes_on_in_any_form(
    writer: str,
    reader: str,
    written: dict[str, Path],
    scenes: Path,
    tmp_path: Path,
    initial: State,
    record_property: Callable[[str, object], None],
) -> None:
    """Two steps in one form, ten more in another, against twelve in one process."""
    alone = written["alone"]
    checkpoint = read_checkpoint(alone / "checkpoints" / "step_00000012")
    tensors = {part: checkpoint.tensors(part) for part in initial}
    lines = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    shutil.copytree(written[writer], tmp_path / "run")
    for later in (4, 6, 8, 10, 12):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{later:08d}")
    launch, processes = FORMS[reader]
    run = trained(scenes, tmp_path / "run", *TWELVE, launch=launch, processes=processes, steps=12)
    scores = json.loads((alone / "eval" / "step_00000000.json").read_text())
    reference = {"state": tensors, "metrics": lines, "scores": scores}
    record_property("difference_over_movement", differences(run, reference, initial))
    assert_same_training(run, reference, initial)


@pytest.mark.parametrize(
    ("stage", "knobs"),
    [
        (2, {"contiguous_gradients": False, "reduce_scatter": False, "allgather_partitions": False,
             "overlap_comm": True, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000}),
        (3, {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 1000, "sub_group_size": 500,
             "stage3_prefetch_bucket_size": 1000, "stage3_max_live_parameters": 1000,
             "stage3_max_reuse_distance": 1000}),
    ],
)  # fmt: skip
@pytest.mark.campaign
def test_what_a_deepspeed_file_may_say_changes_nothing(
    stage: int, knobs: dict[str, Any], scenes: Path, tmp_path: Path, larger_alone: dict[str, Any], initial: State
) -> None:
    """Each knob away from its default; checkpoints hold the optimiser's state of the right parameters."""
    assert {*knobs, "stage"} <= ZERO_SETTINGS
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, **knobs}}))
    said = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    run = trained(scenes, tmp_path / "run", *LARGER, launch=f"cpu_zero{stage}", environment=said)
    assert_same_training(run, larger_alone, initial)
    ours, theirs = (one["checkpoint"].tensors("optimizer") for one in (run, larger_alone))
    assert ours.keys() == theirs.keys()
    for name, momentum in theirs.items():
        torch.testing.assert_close(ours[name], momentum, rtol=1e-3, atol=1e-3 * float(momentum.abs().max()))


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        ([], None),
        pytest.param(["memory.lean=true"], None, marks=CAMPAIGN),
        pytest.param(["memory.checkpoint_backbone=true"], None, marks=CAMPAIGN),
        pytest.param(["train.encode_once=never"], "runs twice before a backward", marks=CAMPAIGN),
    ],
)
def test_leaf_modules_change_no_bit(overrides: list[str], refused: str | None) -> None:
    said = {"LEAVES": "Block"}
    completed = run_module("tests.distributed.train_with_leaves", overrides, launch="cpu_zero3", environment=said)
    assert completed.returncode == 0, completed.stderr[-3000:]
    (line,) = [line for line in completed.stdout.splitlines() if line.startswith("LEAVES ")]
    found = json.loads(line.removeprefix("LEAVES "))
    if refused:
        assert refused in found["refused"]
    else:
        assert found["same"], found
        plain, fewer = found["hooks"]
        assert fewer < 0.6 * plain


def test_a_parameter_that_deepspeed_keeps_resident_ends_the_run(scenes: Path, tmp_path: Path) -> None:
    """Its shard would take the teacher's update, and the forward go on with the copy."""
    arguments = [*tiny_overrides(scenes, tmp_path), *SGD]
    module, said = "tests.distributed.train_otherwise", {"OTHERWISE": "resident_parameters"}
    completed = run_train(arguments, launch="cpu_zero3", module=module, environment=said)
    assert completed.returncode != 0
    assert "DeepSpeed keeps parameters resident" in completed.stderr
