"""What is wrong with the ``data`` section: values out of range, and values that do not go together."""

from __future__ import annotations

from mfm_dist.config.schema import DataSection, is_stream


def data_problems(data: DataSection) -> list[str]:
    """Each with the fix."""
    return [*_range_problems(data), *_sampling_problems(data), *_stream_problems(data)]


def _range_problems(data: DataSection) -> list[str]:
    rare, (low, high) = data.rare_class_sampling, data.scale_range
    positive = {
        "lane_window": data.lane_window,
        "rare_class_sampling.temperature": rare.temperature,
        "source_resize": min(data.source_resize or (1,)),
        "target_resize": min(data.target_resize or (1,)),
    }
    not_negative = {
        "lanes": data.lanes,
        "scratch_gib": data.scratch_gib,
        "stream_samples": data.stream_samples,
        "target_margins": min(data.target_margins),
        "rare_class_sampling.min_pixels": rare.min_pixels,
        "rare_class_sampling.min_crop_ratio": rare.min_crop_ratio,
    }
    problems = [
        *(f"data.{key}={value}: must be above 0" for key, value in positive.items() if not value > 0),
        *(f"data.{key}={value}: must not be negative" for key, value in not_negative.items() if not value >= 0),
    ]
    if not 0 < low <= high:
        problems.append(f"data.scale_range={low}, {high}: must be two factors above 0, the smaller one first")
    return problems


def _sampling_problems(data: DataSection) -> list[str]:
    problems = []
    rare = data.rare_class_sampling
    if rare.enabled and data.lanes:
        problems.append(
            "data.rare_class_sampling needs any sample at any time, and data.lanes reads them in sequence: turn one off"
        )
    if rare.enabled and is_stream(data.source):
        problems.append(
            "data.rare_class_sampling needs any sample at any time, and a stream cannot be read at random: turn it "
            "off, or download the shards and name their folder in data.source"
        )
    most = rare.min_pixels * rare.min_crop_ratio
    if rare.enabled and most >= data.crop[0] * data.crop[1]:
        problems.append(
            f"data.rare_class_sampling: min_pixels x min_crop_ratio are {most:g} pixels, no crop of "
            f"{data.crop[0]}x{data.crop[1]} can hold more of one class: lower one of them"
        )
    return problems


def _stream_problems(data: DataSection) -> list[str]:
    problems = []
    streams = [name for name in (data.source, data.target) if is_stream(name)]
    if is_stream(data.validation):
        problems.append("data.validation is a URL: evaluation covers each sample once, so it needs a folder of shards")
    if streams and not data.stream_samples:
        problems.append("data.stream_samples=0: say how many samples there are behind the URL, if only roughly")
    if streams and data.lanes:
        problems.append("data.lanes orders shards that have an index, and a URL has none: leave it 0")
    if len(streams) == 2 and data.source == data.target:
        problems.append("data.source and data.target are the same URL")
    if data.scratch_gib and data.scratch is None:
        problems.append(f"data.scratch_gib={data.scratch_gib:g} limits data.scratch, which is not set")
    return problems
