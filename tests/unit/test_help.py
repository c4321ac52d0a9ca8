"""``train --help`` of everything, of a section, of a key, and of what there is not."""

from __future__ import annotations

import pytest

from mfm_dist import train


def printed(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        train.main(arguments)
    assert end.value.code == code
    output = capsys.readouterr()
    return output.err if code else output.out


def test_help_is_of_all_or_of_what_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    whole = printed(["--help"], 0, capsys)
    assert "usage: " in whole
    assert all(f"\n  {key}=" in whole for key in ("seed", "data.crop", "mfm.loss_weight"))
    section = printed(["--help", "data"], 0, capsys)
    keys = [line.partition("=")[0] for line in section.splitlines() if line.startswith("data.")]
    assert {"data.crop", "data.rare_class_sampling.enabled"} < set(keys)
    assert len(keys) == sum(not line.startswith(" ") for line in section.splitlines())
    assert printed(["--help", "data.crop"], 0, capsys).startswith("data.crop=")
    assert printed(["-h", "seed"], 0, capsys).startswith("seed=0")


def test_help_of_what_there_is_not_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    message = printed(["--help", "rebilder"], 2, capsys)
    assert "did you mean rebuilder? Sections: seed, run, data" in message
