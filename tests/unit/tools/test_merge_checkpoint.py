"""One file out of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mfm_dist.checkpoint.files import write_checkpoint
from mfm_dist.checkpoint.progress import Progress
from tests.helpers.classes import CLASSES
from tools.merge_checkpoint import main


def test_a_checkpoint_becomes_one_file_of_whole_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, output = tmp_path / "step_00000002", tmp_path / "all.safetensors"
    tensors = {
        "student": {"a": torch.randn(3, 5), "count": torch.tensor(7)},
        "optimizer": {"a/exp_avg": torch.rand(3, 5)},
    }
    write_checkpoint(
        checkpoint, tensors, progress=Progress(step=2), config={}, data={}, classes=CLASSES, keep=1
    )  # fmt: skip
    assert main([str(checkpoint), str(output)]) == 0
    assert "3 tensors of step 2" in capsys.readouterr().out
    merged = load_file(output)
    assert merged.keys() == {"student/a", "student/count", "optimizer/a/exp_avg"}
    assert all(torch.equal(merged[f"{part}/{n}"], one) for part, named in tensors.items() for n, one in named.items())

    assert main([str(checkpoint), str(tmp_path / "student.safetensors"), "--part", "student"]) == 0
    assert load_file(tmp_path / "student.safetensors").keys() == {"a", "count"}
    assert main([str(checkpoint), str(output)]) == 2
    assert main([str(tmp_path / "none"), str(tmp_path / "other")]) == 2
    assert main([str(checkpoint), str(tmp_path / "other"), "--part", "teacher"]) == 2
    assert "has no teacher" in capsys.readouterr().err
    payload = bytearray((checkpoint / "rank_00000.safetensors").read_bytes())
    payload[-1] ^= 1
    (checkpoint / "rank_00000.safetensors").write_bytes(payload)
    assert main([str(checkpoint), str(tmp_path / "other")]) == 4
    assert "is damaged" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
