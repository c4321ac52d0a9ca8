"""Files that come with the package: those of the working folder win, and nothing else is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from mfm_dist.config.loader import load_config
from mfm_dist.config.shipped import find_shipped, main
from mfm_dist.distributed.launch import Launch
from mfm_dist.errors import ConfigError
from mfm_dist.models.backbone import Backbone
from tests.helpers.runs import REPOSITORY

QUICKSTART = Path("configs/quickstart.yaml")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_file_of_the_working_folder_wins_then_the_shipped_one() -> None:
    assert find_shipped(QUICKSTART) == REPOSITORY / QUICKSTART
    assert load_config(QUICKSTART) == load_config(REPOSITORY / QUICKSTART)
    QUICKSTART.parent.mkdir()
    assert find_shipped(QUICKSTART) == REPOSITORY / QUICKSTART
    QUICKSTART.write_text("train: {steps: 7}\n")
    assert find_shipped(QUICKSTART) == QUICKSTART
    assert load_config(QUICKSTART).train.steps == 7


@pytest.mark.parametrize("path", ["configs/none.yaml", "setup.py", "configs/../setup.py", "", ".", "/etc/passwd"])
def test_what_is_not_shipped_stays_what_it_is(path: str) -> None:
    assert find_shipped(Path(path)) == Path(path)


def test_paths_inside_shipped_files_are_found_too() -> None:
    config = load_config(QUICKSTART)
    assert config.model.weights is not None
    assert not config.model.weights.exists()
    Backbone(config.model.backbone, weights=config.model.weights, options=config.model.backbone_options)
    settings = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "configs/deepspeed/zero3.json"}
    assert Launch.from_environment(settings).zero_stage == 3


def test_a_name_that_is_nearly_one_of_them_is_told_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"configs/scenes/dac.yaml: no such.*there are: configs/scenes/dacs.yaml, "):
        load_config(Path("configs/scenes/dac.yaml"))


def test_the_command_tells_where_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm/train_mfm.sh"]) == 0
    assert capsys.readouterr().out == f"{REPOSITORY}/slurm/train_mfm.sh\n"
    assert main([]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert {"configs/quickstart.yaml", "configs/deepspeed/zero2.json", "slurm/sweep.sh"} <= set(listed)
    assert main(["setup.py"]) == 2
    assert "neither here nor shipped" in capsys.readouterr().err
