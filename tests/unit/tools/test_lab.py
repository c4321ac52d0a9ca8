"""tools/lab.py: plans are checked, runs are trained once and put on record, differences are paired by seed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from mfm_dist.config.loader import read_yaml
from mfm_dist.config.variants import VARIANTS
from mfm_dist.errors import ConfigError
from tests.helpers.runs import REPOSITORY, tiny_overrides
from tools.lab import build_parser, clean_commit, instruments_of, main, run, show_plan
from tools.lab_results import collect, draw, show_results, works
from tools.lab_runs import PLANS, Plan, Records, Run, read_plan

COMMIT = "0" * 40


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def write_plan(folder: Path, **changes: Any) -> Path:
    """A plan of two arms on one bed and two seeds."""
    tree = {
        "question": "?", "prediction": "!", "decision": "yes or no", "confirmed": True, "beds": ["stride8"],
        "seeds": [1, 2], "arms": {"dacs": [], "mfm": ["mfm.enabled=true"]}, "contrasts": [["mfm", "dacs"]],
    }  # fmt: skip
    path = folder / "question.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return path


def record(one: Run, figure: float | None, **changes: Any) -> dict[str, Any]:
    """What a run leaves on record."""
    base = {"bed": one.bed, "arm": one.arm, "settings": one.settings, "overrides": list(one.overrides)}
    base |= {"seed": one.seed, "figure": figure}
    said = {"code": 0, "device": "cpu", "seconds": 3600.0, "resumed": False, "commit": COMMIT, "machine": {"cpu": "x"}}
    said["evaluations"] = {"0": 1.0, "750": figure}  # half of the bed's steps
    return base | said | changes


SHIPPED = sorted((REPOSITORY / PLANS).glob("*.yaml"))
ENDED = [path.stem for path in SHIPPED if "ended" in read_yaml(path)]


@pytest.mark.parametrize("name", [path.stem for path in SHIPPED if path.stem not in ENDED])
def test_a_shipped_plan_can_be_run(name: str) -> None:
    plan = read_plan(name)
    assert plan.runs
    assert plan.contrasts
    said = [(one.bed, one.settings, one.seed) for one in plan.runs]
    assert len(set(said)) == len(said), "two arms are the same runs"


@pytest.mark.parametrize("name", ENDED)
def test_a_plan_whose_settings_are_gone_names_the_commit_that_has_them(name: str) -> None:
    with pytest.raises(ConfigError, match=r"run or collect it from commit [0-9a-f]{40}"):
        read_plan(name)


def test_all_that_is_wrong_with_a_plan_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_plan(str(write_plan(tmp_path, seeds="1", hope="a lot")))
    assert [problem.split(": ", 1)[1] for problem in caught.value.problems] == [
        "unknown key 'hope': allowed are question, prediction, decision, confirmed, beds, seeds, arms, contrasts, "
        "common, margin",
        "seeds: expected list",
    ]
    arms = {"dacs": ["train.steps=1505"], "mfm": ["mfm.enable=true"]}
    with pytest.raises(ConfigError) as caught:
        read_plan(str(write_plan(tmp_path, arms=arms, contrasts=[["mfm", "mic"], ["dacs"]])))
    told = str(caught.value)
    for part in ("no pair of arms", "no arm mic", "not evaluated", "mfm on stride8: unknown key 'mfm.enable'"):
        assert part in told


def test_runs_come_seed_by_seed_and_tasks_share_them(tmp_path: Path) -> None:
    runs = read_plan(str(write_plan(tmp_path, common=["log.every=9"]))).runs
    assert runs[1].overrides == ("log.every=9", "mfm.enabled=true")
    assert [(one.seed, one.arm) for one in runs] == [(1, "dacs"), (1, "mfm"), (2, "dacs"), (2, "mfm")]
    assert runs[0].scored_steps == [1200, 1350, 1500]
    other = Run(bed="stride8", arm="dacs", overrides=("log.every=8",), seed=1)
    assert runs[0].folder(tmp_path) != other.folder(tmp_path)


def test_runs_are_the_same_by_their_settings_whatever_said_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings_of(*overrides: str, seed: int = 1) -> str:
        return Run(bed="stride8", arm="any", overrides=overrides, seed=seed).settings

    assert settings_of("mfm.enabled=true") == settings_of("mfm.enabled=true", "mfm.mask=bernoulli", seed=2)
    assert settings_of("mfm.enabled=true") != settings_of("mfm.enabled=true", "mfm.mask=exact")
    before = settings_of("rebuilder.variant=stable")
    monkeypatch.setitem(VARIANTS, "stable", {"mfm": {"loss_on": "hidden"}})
    assert settings_of("rebuilder.variant=stable") != before, "a variant that changed is not what ran under its name"


def fill(plan: Plan, folder: Path, figures: dict[tuple[str, int], float | None]) -> Records:
    """Put runs on record; one without a figure has diverged."""
    records = Records(folder, gpu=False)
    for one in plan.runs:
        if (one.arm, one.seed) in figures:
            figure = figures[one.arm, one.seed]
            said = {"instruments": {}, "probe": None}
            if one.config.mfm.enabled:
                said["instruments"] = {"mfm/lambda_eff": {"mean": 0.5}, "mfm/loss_hidden": {"mean": 9.0, "late": 0.25}}
                hidden = {"rebuilder": 0.75, "diffusion": 0.5, "zero_fill": 0.625, "other_image": 0.25 * one.seed}
                agreement = {name: {"hidden": value} for name, value in hidden.items()}
                said["probe"] = {"agreement": agreement, "gradient_share": 0.5}
            records.append(record(one, figure, code=0 if figure is not None else 5, **said))
    return records


def test_differences_are_paired_by_seed_and_corrected_when_all_is_there(tmp_path: Path) -> None:
    plan = read_plan(str(write_plan(tmp_path, contrasts=[["mfm", "dacs"], ["dacs", "mfm"]])))
    figures: dict[tuple[str, int], float | None] = {("dacs", 1): 40.0, ("mfm", 1): 41.0, ("dacs", 2): 60.0}
    records = fill(plan, tmp_path / "a", figures)
    (row, _) = collect(plan, records)["contrasts"]
    assert (row["by_seed"], row["low"], row["p_holm"]) == ({1: 1.0}, None, None)
    assert "3 of 4 on record; the rest: 2.0 core-hours" in show_plan(plan, records)
    results = collect(plan, fill(plan, tmp_path / "b", figures | {("mfm", 2): 63.0}))
    row = results["contrasts"][0]
    assert (row["mean"], row["by_seed"]) == (2.0, {1: 1.0, 2: 3.0})
    assert row["high"] - row["mean"] == pytest.approx(12.706, rel=1e-4)
    assert row["p_holm"] == pytest.approx(2 * row["p"])
    assert (row["held"], row["works"]) == (None, {}), "there is no Rebuilder under DACS alone"
    assert "mfm - dacs" in show_results(results)
    without, with_mfm = (row["works"] for row in results["arms"])
    assert without == {}
    assert {name: said["mean"] for name, said in with_mfm.items()} == {
        "hidden": 0.75, "over_diffusion": 0.25, "over_controls": 0.125, "over_other": 0.375, "share": 0.5,
        "loss_hidden": 0.25, "lambda_eff": 0.5,
    }  # fmt: skip
    draw(results, tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()


def test_where_nothing_is_hidden_nothing_is_said_of_it() -> None:
    agreement = {name: {"hidden": None} for name in ("rebuilder", "diffusion", "zero_fill", "other_image")}
    found = works([{"probe": {"agreement": agreement, "gradient_share": 0.0}, "instruments": {}}])
    assert {name for name, values in found.items() if values} == {"share"}


@pytest.mark.parametrize(("least", "held"), [(0.4, True), (0.6, False)])
def test_where_every_contrast_has_to_hold_its_lower_bound_is_held_against_the_margin(
    tmp_path: Path, least: float, held: bool
) -> None:
    arms = {"dacs": [], "mfm": ["mfm.enabled=true"], "other": ["mfm.enabled=true", "mfm.mask=exact"]}
    contrasts = [["mfm", "dacs"], ["other", "mfm"]]
    plan = read_plan(str(write_plan(tmp_path, arms=arms, contrasts=contrasts, margin=-0.5, seeds=[1, 2, 3])))
    figures: dict[tuple[str, int], float | None] = {(arm, seed): 50.0 + seed for arm in arms for seed in plan.seeds}
    figures |= {("mfm", seed): 50.0 + seed - least for seed in plan.seeds}
    results = collect(plan, fill(plan, tmp_path / "whole", figures))
    rows = results["contrasts"]
    assert [(row["held"], row["p_holm"]) for row in rows] == [(held, None), (True, None)]
    assert rows[1]["works"]["hidden"]["mean"] == 0.0
    shown = {line.split()[1]: line.split() for line in show_results(results).splitlines() if " - " in line}
    assert ("yes" in shown["mfm"], "no" in shown["mfm"]) == (held, not held)
    lost = collect(plan, fill(plan, tmp_path / "lost", figures | {("other", 3): None}))
    assert [row["held"] for row in lost["contrasts"]] == [held, False], "an arm of which a run diverged has not held"


def test_four_arms_are_a_difference_of_differences(tmp_path: Path) -> None:
    arms = {name: ["mfm.enabled=true", f"rebuilder.depth={depth}"] for depth, name in enumerate("abcd", start=1)}
    plan = read_plan(str(write_plan(tmp_path, arms=arms, contrasts=[["a", "b", "c", "d"]])))
    figures = {("a", 1): 50.0, ("b", 1): 53.0, ("c", 1): 51.0, ("d", 1): 52.0, ("a", 2): 50.0, ("b", 2): 50.0}
    results = collect(plan, fill(plan, tmp_path, {**figures, ("c", 2): 50.0, ("d", 2): 51.0}))
    (row,) = results["contrasts"]
    assert row["by_seed"] == {1: -2.0, 2: 1.0}
    assert row["works"]["hidden"]["mean"] == 0.0
    assert "(a - b) - (c - d)" in show_results(results)


def test_a_run_that_diverged_is_named_and_a_claim_without_pairs_is_not_shown(tmp_path: Path) -> None:
    plan = read_plan(str(write_plan(tmp_path)))
    figures = {("dacs", 1): 40.0, ("mfm", 1): 41.0, ("dacs", 2): 60.0, ("mfm", 2): None}
    results = collect(plan, fill(plan, tmp_path, figures))
    assert results["diverged"] == ["stride8 mfm seed 2"]
    assert results["contrasts"][0]["p_holm"] == 1.0
    assert "diverged, and in no mean: stride8 mfm seed 2" in show_results(results)


def test_an_instrument_that_was_never_finite_is_left_out(tmp_path: Path) -> None:
    one = read_plan(str(write_plan(tmp_path))).runs[1]
    lines = [{"step": 1, "mfm/loss_hidden": None}, {"step": 1500, "mfm/loss_hidden": None, "mfm/lambda_eff": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert instruments_of(one, tmp_path) == {"mfm/lambda_eff": {"mean": 0.5, "late": 0.5}}


def test_gpu_and_cpu_and_what_failed_are_kept_apart(tmp_path: Path) -> None:
    runs = read_plan(str(write_plan(tmp_path))).runs
    records, on_gpu = (Records(tmp_path, gpu=gpu) for gpu in (False, True))
    records.append(record(runs[0], 40.0, device="cuda:0"))
    records.append(record(runs[1], None, code=2, device=None))
    records.append(record(runs[2], 41.0))
    assert set(records.of(runs)) == {runs[2]}
    assert set(on_gpu.of(runs)) == {runs[0]}


def test_runs_are_trained_once_and_a_failure_is_on_record_with_its_reason(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    tiny = [word for word in tiny_overrides(scenes, tmp_path) if not word.startswith(("run.folder", "mfm.", "eval."))]
    tiny += ["train.steps=10", "eval.every=1", "checkpoint.every=10", "data.render_scenes=false", "eval.overlays=0"]
    arms = {"mfm": [*tiny, "mfm.enabled=true"], "nowhere": [*tiny, "data.target=absent"]}
    path = write_plan(tmp_path, arms=arms, seeds=[1], contrasts=[])
    words = ["run", str(path), "--runs", str(tmp_path / "runs"), "--records", str(tmp_path), "--workers", "2", "--nice"]
    plan, arguments = read_plan(str(path)), build_parser().parse_args(words)
    assert run(plan, arguments, COMMIT) == 1, "one of them failed"
    lines = [json.loads(line) for line in (tmp_path / "lab_stride8.jsonl").read_text().splitlines()]
    trained, failed = sorted(lines, key=lambda line: line["code"])
    assert (trained["code"], trained["seed"], trained["commit"], trained["device"]) == (0, 1, COMMIT, "cpu")
    assert (trained["probe"]["step"], trained["probe"]["images"], failed["probe"]) == (10, 4, None)
    scores = trained["evaluations"]
    assert sorted(map(int, scores)) == list(range(11))
    assert trained["figure"] == pytest.approx((scores["8"] + scores["9"] + scores["10"]) / 3)
    assert trained["iou"] == json.loads(next((tmp_path / "runs").glob("*/mfm_*/*/eval/*10.json")).read_text())["iou"]
    assert (trained["events"]["checkpoint"], failed["iou"]) == (1, None)
    instruments = trained["instruments"]
    assert set(instruments["mfm/loss_hidden"]) == {"mean", "late"}
    logged = [json.loads(line) for line in next((tmp_path / "runs").glob("*/mfm_*/*/metrics.jsonl")).open()]
    late = [line["mfm/loss_hidden"] for line in logged if line["step"] > 8]
    assert instruments["mfm/loss_hidden"]["late"] == pytest.approx(sum(late) / len(late))
    assert (instruments["mfm/lambda_eff"]["mean"], failed["instruments"]) == (1.0, {})
    assert (failed["code"], failed["figure"], "absent" in failed["reason"]) == (2, None, True)
    assert not list((tmp_path / "runs").glob("stride8/mfm_*/*/checkpoints"))
    capsys.readouterr()
    again = build_parser().parse_args([*words, "--tasks", "2"])  # task 0 has the run that is on record
    assert run(plan, again, COMMIT) == 0
    assert "1 of 1 runs on record; 0 to go" in capsys.readouterr().out
    assert len((tmp_path / "lab_stride8.jsonl").read_text().splitlines()) == 2


def test_nothing_runs_from_changes_that_are_not_committed(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        said = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *said, *words], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "configs").mkdir()
    plan = write_plan(tmp_path / "configs")
    with pytest.raises(ConfigError, match="not a git repository"):
        clean_commit(tmp_path, plan)
    git("init", "-q")
    with pytest.raises(ConfigError, match="did not match any file"):
        clean_commit(tmp_path, plan)
    git("add", "-A")
    git("commit", "-qm", "a plan")
    with pytest.raises(ConfigError, match="mfm_dist is that of"):  # all is committed, but it is not this code that runs
        clean_commit(tmp_path, plan)
    write_plan(tmp_path / "configs", seeds=[3])
    with pytest.raises(ConfigError, match=r"(?s)uncommitted changes.*configs/question\.yaml"):
        clean_commit(tmp_path, plan)


def test_a_plan_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "E99"]) == 2
    assert "configs/lab/plans/E0.yaml" in capsys.readouterr().err
