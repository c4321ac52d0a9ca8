"""What ``mfm-profile data`` runs and reports; how long anything takes is never asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from mfm_dist.config.schema import RunConfig
from mfm_dist.profiling.data import BareDecoder, PlainWebDataset, Source
from mfm_dist.profiling.throughput import main
from tests.helpers.runs import DEFAULTS, tiny_overrides


def test_the_command_reports_rates_parts_and_ratios(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.json"
    arguments = ["data", *DEFAULTS, "--rounds", "2", "--blocks", "2", "--workers", "1", "--json", str(path)]
    assert main([*arguments, *tiny_overrides(scenes, tmp_path / "run")]) == 0
    assert "| bare decode and crop |" in capsys.readouterr().out
    found = json.loads(path.read_text())
    one = found["one_core"]
    for name in ("bare", "pipeline", "webdataset"):
        assert len(one["seconds_per_block"][name]) == 2
        assert one[f"{name}_images_per_second"] > 0
    assert set(found["workers"]) == {"1"}
    assert {"read", "decode", "geometry", "the rest"} <= set(found["parts_ms_per_block"])
    assert found["first_batch_seconds"]["apart"] == pytest.approx(
        found["first_batch_seconds"]["step_1000000"] - found["first_batch_seconds"]["step_0"]
    )
    assert found["augmentation"]["difference_grey_levels"] > 0


def test_a_folder_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *DEFAULTS, "data.root=/nowhere"]) == 2
    assert "/nowhere" in capsys.readouterr().err


def test_all_ways_take_as_many_images_of_the_same_size(tiny_config: RunConfig) -> None:
    source = Source(tiny_config)
    size = (tiny_config.train.micro_batch, 3, *tiny_config.data.crop)
    ours = next(iter(source.pipeline(0)))
    (image, label), (target,) = next(iter(PlainWebDataset(source)))
    assert ours.source_image.shape == ours.target_image.shape == image.shape == target.shape == size
    assert label.shape == ours.source_label.shape


def test_the_bare_decoder_decodes_the_samples_of_the_blocks(tiny_config: RunConfig) -> None:
    """A crop as large as the image, or larger, shows all that was decoded."""
    tiny_config.data = replace(tiny_config.data, crop=tiny_config.scenes.size)
    source = Source(tiny_config)
    bare = BareDecoder(source, 2)
    for number, block in enumerate(islice(source.pipeline(0), 2)):
        for (encoded, _), image in zip(bare.encoded[number], [*block.source_image, *block.target_image], strict=True):
            decoded = source.decode(encoded)
            height, width = decoded.shape[1:]
            shown = image[:, :height, :width]
            assert torch.equal(shown, decoded) or torch.equal(shown, decoded.flip(-1))
        bare.block(number)
