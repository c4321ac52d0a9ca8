"""What a rank holds and sends, by formula: beside what real processes were counted to hold, and by hand."""

from __future__ import annotations

import json

import pytest

from mfm_dist.config.loader import load_config
from mfm_dist.distributed.launch import ZERO_SETTINGS
from mfm_dist.distributed.memory import StateSizes, ZeroBuffers, exchanged_bytes, rank_bytes
from mfm_dist.distributed.start import BUCKET
from mfm_dist.optim import state_sizes
from mfm_dist.profiling.counting import build_without_storage
from tests.helpers.runs import REPOSITORY

RECORDS = sorted((REPOSITORY / "docs" / "benchmarks").glob("memory_ranks*.json"))
BESIDE = {"gathered_parameters", "reduction_bucket", "unreduced_gradients", "frozen", "buffers"}
"""Components that are no state of ``bench_ranks``."""
PLAIN = ZeroBuffers()


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_a_rank_holds_what_was_counted(path: str) -> None:
    """Within 5 %, on networks, stages, precisions and numbers of ranks that were measured by ``bench_ranks``."""
    record = json.loads(REPOSITORY.joinpath(path).read_text())
    # "key: default -> value", as ``changed_keys`` writes them
    changed = [line.partition(": ")[::2] for line in record["changed"]]
    overrides = [f"{key}={rest.partition(' -> ')[2]}".replace("=None", "=null") for key, rest in changed]
    config = load_config(None, overrides)
    sizes = state_sizes(build_without_storage(config), config.optim)
    assert record["results"]
    for found in record["results"]:
        stage = found["launch"][-1] if "zero" in found["launch"] else "0"
        held = rank_bytes(sizes, stage=stage, ranks=found["processes"], precision=found["precision"])
        counted = dict(found["after backward"]["state"])
        buffers = found["after backward"]["buffers"]
        if bucket := buffers.get("reduction bucket"):
            counted["reduction_bucket"] = bucket
        for name, size in counted.items():
            assert held.get(name, 0) == pytest.approx(size, rel=0.05, abs=1e6), (found["launch"], name)
        # What was seen gathered is the most of samples, so it may be less than there was.
        counted["gathered_parameters"] = found["gathered_peak_bytes"]
        assert held.get("gathered_parameters", 0) >= 0.999 * counted["gathered_parameters"]
        assert sum(held.get(name, 0) for name in counted) == pytest.approx(sum(counted.values()), rel=0.05)
        state = sum(size for name, size in held.items() if name not in BESIDE)
        assert state == pytest.approx(found["rank_bytes"], rel=0.001)


def sizes(*groups: list[int], teacher: int = 0, frozen: int = 0) -> StateSizes:
    return StateSizes(groups=groups, teacher=[teacher], frozen=[frozen], buffer_bytes=0, moments=2)


def test_a_parameter_that_a_cut_runs_through_is_kept_whole() -> None:
    """Of 10 + 6 elements on two ranks each has 8: the first holds the whole first gradient, the second both."""
    held = rank_bytes(sizes([10, 6]), stage="2", ranks=2, precision="fp32")
    assert held["gradients"] == 4 * 16
    assert held["master"] == 4 * 8
    assert rank_bytes(sizes([8, 8]), stage="2", ranks=2, precision="fp32")["gradients"] == 4 * 8


def test_shards_are_rounded_up_and_a_node_shares_a_second_copy() -> None:
    run = sizes([10, 3], teacher=10, frozen=7)
    held = rank_bytes(run, stage="3_hpz", ranks=4, node_ranks=2, precision="fp32")
    assert held["parameters"] == 4 * (3 + 1)
    assert (held["teacher"], held["frozen"]) == (4 * 3, 4 * 2)
    assert held["hpz_copies"] == 4 * 15
    assert "hpz_copies" not in rank_bytes(run, stage="3", ranks=4, precision="fp32")


def test_one_backward_a_term_holds_whole_gradients() -> None:
    run = sizes([1000])
    plain, lean = (rank_bytes(run, stage="3", ranks=4, precision="fp32", lean=lean) for lean in (False, True))
    assert "unreduced_gradients" not in plain
    assert lean["unreduced_gradients"] == 4 * 1000


def test_what_zero_3_gathers_is_bounded_by_its_settings() -> None:
    run = sizes([100] * 10, teacher=100)
    bounded = ZeroBuffers(prefetch=50, live=200, reuse=300)
    everything = rank_bytes(run, stage="3", ranks=2, precision="fp32")["gathered_parameters"]
    assert everything == 4 * 1100
    held = rank_bytes(run, stage="3", ranks=2, precision="fp32", zero=bounded)
    assert held["gathered_parameters"] == 4 * (150 + 50 + 100)


@pytest.mark.parametrize(
    ("stage", "accumulation", "over_all", "within"),
    [
        ("0", 4, 2 * 4 * 100, 0),  # the gradient once, summed everywhere
        ("1", 4, 3 * 4 * 100, 0),  # and the weights
        ("2", 4, (4 * 2 + 1) * 4 * 100, 0),
        ("3", 2, 2 * (150 + 100 + 100) * 4, 0),  # weights there, weights back, gradient
        ("3_hpz", 2, (150 + 2 * 100) * 4, (150 + 2 * 100) * 4),  # the first gather of a step crosses nodes
    ],
)
def test_what_is_sent(stage: str, accumulation: int, over_all: int, within: int) -> None:
    run, zero = sizes([60, 40], teacher=50), ZeroBuffers(reuse=50)
    found = exchanged_bytes(run, stage=stage, ranks=5, precision="fp32", accumulation=accumulation, zero=zero)
    assert found == (over_all * 4 // 5, within * 4 // 5)
    assert exchanged_bytes(run, stage=stage, ranks=1, precision="fp32", accumulation=1, zero=zero) == (0, 0)


def test_weights_that_stay_gathered_are_not_sent_again() -> None:
    run = sizes([100])
    kept, released = (
        exchanged_bytes(run, stage="3", ranks=2, precision="fp32", accumulation=1, zero=ZeroBuffers(reuse=reuse))[0]
        for reuse in (200, 199)
    )
    assert released - kept == 4 * 100 // 2


def test_the_buckets_are_those_of_a_launch() -> None:
    assert ZeroBuffers.of({}).reduce_bucket == ZeroBuffers.of({}).prefetch == BUCKET
    given = {"reduce_bucket_size": 1, "stage3_prefetch_bucket_size": 2, "stage3_max_live_parameters": 3,
             "stage3_max_reuse_distance": 4}  # fmt: skip
    assert ZeroBuffers.of(given) == ZeroBuffers(reduce_bucket=1, prefetch=2, live=3, reuse=4)
    assert given.keys() <= ZERO_SETTINGS
