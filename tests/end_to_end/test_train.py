"""The real command on real shards: determinism, resume, the run folder, and how mistakes are told."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mfm_dist import evaluate, export, train
from mfm_dist.data.reader import ShardReader
from mfm_dist.errors import BadSample
from tests.helpers.runs import DEFAULTS, REPOSITORY, assert_equal_bits, metrics_of, result_of, run_train, tiny_overrides


@pytest.fixture(scope="module")
def finished(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps in one process."""
    run = tmp_path_factory.mktemp("finished") / "run"
    completed = run_train(tiny_overrides(scenes, run))
    assert completed.returncode == 0, completed.stderr
    assert result_of(completed.stdout)["step"] == 4
    return run


def test_run_folder_holds_what_is_promised(finished: Path) -> None:
    names = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "outcome.json", "checkpoints/latest"} <= names
    assert {"eval/step_00000000.json", "eval/step_00000004.json", "eval/step_00000004/camera_val_000000.png"} <= names
    assert json.loads((finished / "outcome.json").read_text()) == {"code": 0, "reason": "done", "step": 4}
    scores = json.loads((finished / "eval" / "step_00000004.json").read_text())
    assert scores["images"] == 5
    assert len(scores["iou"]) == 19
    lines = metrics_of(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss/total", "loss/source", "loss/mixed", "loss/mfm", "grad_norm/total", "lr/encoder"} <= set(lines[0])
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["latest", "step_00000002", "step_00000004"]


def remove_labels(folder: Path) -> None:
    """Overwrite every label of a shard set with zeros, and remove what was counted of them."""
    index = ShardReader(folder).index
    for record, rows in zip(index.manifest.shards, index.rows, strict=True):
        with (folder / record.file).open("r+b") as tar:
            for label in rows["label"]:
                tar.seek(int(label["offset"]))
                tar.write(bytes(int(label["size"])))
    for statistics in folder.glob("*.classes.npy"):
        statistics.unlink()


def test_the_same_seed_gives_the_same_bits_and_training_reads_no_target_label(
    finished: Path, scenes: Path, tmp_path: Path
) -> None:
    again, unlabelled = tmp_path / "again", tmp_path / "scenes"
    shutil.copytree(scenes, unlabelled)
    remove_labels(unlabelled / "camera_train")
    assert isinstance(ShardReader(unlabelled / "camera_train").read(0), BadSample), "a label that is read is refused"
    otherwise = ["data.workers=2", "log.profile.start=1", "log.profile.steps=2"]
    assert run_train([*tiny_overrides(unlabelled, again), *otherwise]).returncode == 0
    assert_equal_bits(finished, again)
    assert metrics_of(finished) == metrics_of(again)
    with gzip.open(again / "trace_00000001.json.gz") as file:
        traced = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    assert traced.count("update") == 2
    assert traced.count("micro-batch") == 4
    assert not list(finished.glob("*trace*"))


def test_a_run_killed_after_a_checkpoint_resumes_to_the_same_bits(finished: Path, scenes: Path, tmp_path: Path) -> None:
    """What a kill leaves: the checkpoint of step 2, later metrics, no later checkpoint, a damaged newest one."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "eval")
    weights = run / "checkpoints" / "step_00000004" / "rank_00000.safetensors"
    payload = bytearray(weights.read_bytes())
    payload[len(payload) // 2] ^= 1
    weights.write_bytes(payload)
    resumed = run_train(tiny_overrides(scenes, run))
    assert "step_00000004 is damaged (rank_00000.safetensors differs from what was written)" in resumed.stdout
    assert "resuming" in resumed.stdout
    assert_equal_bits(finished, run)
    assert metrics_of(finished) == metrics_of(run)


def test_a_finished_run_started_again_only_says_so(finished: Path, scenes: Path) -> None:
    before = (finished / "checkpoints" / "step_00000004" / "manifest.json").stat().st_mtime_ns
    again = run_train(tiny_overrides(scenes, finished))
    assert result_of(again.stdout)["step"] == 4
    assert (finished / "checkpoints" / "step_00000004" / "manifest.json").stat().st_mtime_ns == before


def test_a_finished_run_whose_last_score_is_damaged_is_scored_again(
    finished: Path, scenes: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    score = run / "eval/step_00000004.json"
    before = score.read_text()
    score.write_text(before[:20])
    completed = run_train(tiny_overrides(scenes, run))
    assert completed.returncode == 0, completed.stderr
    assert json.loads(score.read_text())["iou"] == json.loads(before)["iou"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends_with_75(number: signal.Signals, scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*tiny_overrides(scenes, run), "train.steps=100000", "checkpoint.every=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mfm_dist.train", *DEFAULTS, *arguments],
        cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["code"] == 75
    saved = (run / "checkpoints" / "latest").read_text().strip()
    assert saved == f"step_{outcome['step']:08d}"


def test_evaluate_agrees_with_the_run(finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert evaluate.main(["--run", str(finished), "--json", "--overlays", str(tmp_path / "all")]) == 0
    scores = json.loads(capsys.readouterr().out)
    during = json.loads((finished / "eval" / "step_00000004.json").read_text())
    assert scores == during
    assert len(list((tmp_path / "all").glob("*.png"))) == 5


def test_evaluate_scores_an_export_as_the_run(
    finished: Path, scenes: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = ["--model", str(tmp_path / "model")]
    assert export.main(["--run", str(finished), "--output", model[1]]) == 0
    capsys.readouterr()
    assert evaluate.main([*model, "--data", str(scenes / "camera_val"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((finished / "eval" / "step_00000004.json").read_text())
    about = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**about, "resize": [32, 64]}))
    assert evaluate.main([*model, "--data", str(scenes / "camera_val"), "--json", "--class-sets", "synthia13"]) == 0
    resized = json.loads(capsys.readouterr().out)
    assert "fitted into 32x64" in resized["protocol"]
    assert "miou_synthia13" in resized["means"]
    for wrong in (model, [*model, "--split", "camera_val"], ["--run", str(finished), *model]):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main(wrong)
    assert "--model needs --data" in capsys.readouterr().err
    assert evaluate.main(["--model", str(tmp_path), "--data", str(scenes / "camera_val")]) == 2


def test_check_finds_mistakes_without_training(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = ["--check", *DEFAULTS, *tiny_overrides(scenes, tmp_path / "run")]
    assert train.main(good) == 0
    assert capsys.readouterr().out.startswith("ok: dacs + MFM")
    assert train.main([*good, "model.backbone=test_resnt", "method.name=dac"]) == 2
    message = capsys.readouterr().err
    assert "test_resnet" in message
    assert "did you mean 'dacs'" in message
    assert train.main([*good, "data.source=gta", "data.validation=nothing"]) in (2, 3)
    message = capsys.readouterr().err
    assert "gta" in message
    assert "nothing" in message
    more = tmp_path / "more.yaml"
    more.write_text("mfm: {enabled: off}\n")
    assert train.main([*[word for word in good if word != "mfm.enabled=true"], "--config", str(more)]) == 0
    assert "+ MFM" not in capsys.readouterr().out
    more.write_text("train: {stepz: 3}\n")
    assert train.main([*good, "--config", str(more)]) == 2
    assert f"unknown key 'train.stepz' ({more})" in capsys.readouterr().err
    launched = [*good, "--launch", "configs/accelerate/cpu_ddp.yaml"]
    assert train.main([*launched, "train.global_batch=2", "memory.offload_optimizer=true"]) == 2
    message = capsys.readouterr().err
    assert "train.global_batch" in message
    assert "memory.offload_optimizer needs ZeRO" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("launch", [None, "cpu_ddp"])
def test_a_mistake_is_told_once_without_a_traceback(launch: str | None, tmp_path: Path) -> None:
    run = tmp_path / "run"
    completed = run_train([f"run.folder={run}", "train.stepz=3", "optim.lr=fast"], launch=launch)
    assert completed.returncode == (2 if launch is None else 1)
    ours = completed.stderr.split("torch.distributed.elastic")[0].split("Traceback")[0]
    assert completed.stderr.count("did you mean 'train.steps'") == 1
    assert "2 configuration errors" in ours
    assert not run.exists()


def test_a_truncated_shard_is_told_and_nothing_is_lost(scenes: Path, tmp_path: Path) -> None:
    data = tmp_path / "scenes"
    shutil.copytree(scenes, data)
    tar = next((data / "camera_train").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-5000])
    completed = run_train(tiny_overrides(data, tmp_path / "run"))
    assert completed.returncode == 3
    assert str(tar.name) in completed.stderr
    assert "Traceback" not in completed.stderr


def test_bad_samples_beyond_the_limit_stop_with_3_and_below_it_are_counted(scenes: Path, tmp_path: Path) -> None:
    data = tmp_path / "scenes"
    shutil.copytree(scenes, data)
    tar = data / "game_train" / "000000.tar"
    payload = bytearray(tar.read_bytes())
    payload[1500] ^= 0xFF  # inside the first sample's image
    tar.write_bytes(payload)
    strict = run_train([*tiny_overrides(data, tmp_path / "strict"), "train.steps=8"])
    assert strict.returncode == 3, strict.stderr
    assert "game_train_000000" in strict.stderr
    assert json.loads((tmp_path / "strict" / "outcome.json").read_text())["code"] == 3
    lenient = run_train([*tiny_overrides(data, tmp_path / "lenient"), "train.steps=8", "data.bad_sample_limit=0.1"])
    assert lenient.returncode == 0, lenient.stderr
    events = [json.loads(line) for line in (tmp_path / "lenient" / "events.jsonl").read_text().splitlines()]
    assert [event["key"] for event in events if event["event"] == "bad_sample"] == ["game_train_000000"]


def test_a_checkpoint_of_another_network_is_refused(finished: Path, scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    other = run_train([*tiny_overrides(scenes, run), "rebuilder.width=64"])
    assert other.returncode == 2
    assert "is of another network" in other.stderr
    assert_equal_bits(finished, run)
    assert evaluate.main(["--run", str(run)]) == 0  # the refused start left the run as it was
    smaller = run_train([*tiny_overrides(scenes, run), "train.micro_batch=1"])
    assert smaller.returncode == 2
    assert "counts its data in micro-batches of 2" in smaller.stderr


def test_a_run_folder_that_cannot_be_written_is_told(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    completed = run_train(tiny_overrides(scenes, tmp_path / "file" / "run"))
    assert completed.returncode == 4
    assert "cannot be written" in completed.stderr
