"""What is wrong with a configuration: numbers out of their range, and values that do not go together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from mfm_dist.config.schema import DataSection, MFMSection, Range, RunConfig, Sets, is_stream, names_of

MOST_CROP_PIXELS = 1 << 26
"""As many as the largest picture that is decoded."""


def problems(config: RunConfig) -> list[str]:
    """List every number out of range and every contradiction between fields, each with the fix."""
    return [
        *range_problems(config),
        *_training_problems(config),
        *_mfm_problems(config.mfm, two_resolutions=config.two_resolutions),
        *_rebuilder_problems(config),
        *_set_problems("source", config.data.source, config.data),
        *_set_problems("target", config.data.target, config.data),
        *_data_problems(config.data),
        *_stream_problems(config.data),
    ]


def range_of(hint: Any) -> Range | None:
    """Find the range beside a field's type, be it of a single number, an optional one or each of a tuple."""
    if get_origin(hint) is Annotated:
        return next(note for note in hint.__metadata__ if isinstance(note, Range))
    return next((found for part in get_args(hint) if (found := range_of(part))), None)


def range_problems(section: Any, prefix: str = "") -> Iterator[str]:
    """Find numbers outside what their field allows."""
    for name, hint in get_type_hints(type(section), include_extras=True).items():
        value = getattr(section, name)
        if is_dataclass(value):
            yield from range_problems(value, f"{prefix}{name}.")
        elif value is not None and (allowed := range_of(hint)):
            key = f"{prefix}{name}"
            several = value.items() if isinstance(value, dict) else ((None, one) for one in _tuple(value))
            for place, number in dict.fromkeys(several):
                if not isinstance(number, str) and not allowed.allows(number):
                    yield f"{key if place is None else f'{key}.{place}'}={number}: must {allowed.rule}"


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _training_problems(config: RunConfig) -> Iterator[str]:
    """Find values that are allowed one by one but not together."""
    train, crop = config.train, config.data.crop
    if train.micro_batch >= 1 and train.global_batch % train.micro_batch:
        yield f"train.global_batch={train.global_batch} is not a multiple of train.micro_batch={train.micro_batch}"
    for part, limit in train.clip_parts.items():
        if part not in ("encoder", "decoder", "rebuilder"):
            yield f"train.clip_parts names {part!r}: there are encoder, decoder and rebuilder"
        elif isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit <= 1e9:
            yield f"train.clip_parts.{part}={limit}: must be a number above 0 and at most 1e9, or left out"
    if train.cuda_graph:
        yield from _graph_problems(config)
    margins = config.self_training.pseudo_weight_ignore_top + config.self_training.pseudo_weight_ignore_bottom
    if margins >= crop[0]:
        yield (
            f"self_training.pseudo_weight_ignore_top and _bottom are {margins} rows together, all of data.crop="
            f"{crop[0]}x{crop[1]}: leave some"
        )
    if config.model.pretrained and config.model.weights is not None:
        yield "model.pretrained and model.weights are both set: keep one, they both start the encoder"
    if config.model.lora.rank and not config.model.freeze:
        yield (
            f"model.lora.rank={config.model.lora.rank} trains additions in place of the encoder's own weights: set "
            "model.freeze=true, or model.lora.rank=0 to train all of it"
        )
    fixed = config.model.freeze and not config.model.lora.rank
    if fixed and config.mfm.enabled and config.mfm.trained_parts == "encoder":
        yield "mfm.trained_parts=encoder: model.freeze leaves nothing of it to train, choose both"


def _graph_problems(config: RunConfig) -> Iterator[str]:
    """Find what a micro-batch cannot have that is captured in a graph."""
    again = "saves and restores torch's random state, which cannot be read amid a capture"
    for key, on, reason in (
        ("memory.checkpoint_backbone", config.memory.checkpoint_backbone, again),
        ("memory.checkpoint_rebuilder", config.memory.checkpoint_rebuilder, again),
        (
            "debug.check_gradients",
            config.debug.check_gradients,
            "looks at each backward from Python, which a replay does not run",
        ),
    ):
        if on:
            yield f"train.cuda_graph and {key} are both on, and the latter {reason}: turn one off"


def _mfm_problems(mfm: MFMSection, *, two_resolutions: bool) -> Iterator[str]:
    """Find forms of the MFM term that do not go together, or not with the method."""
    if mfm.view != "context" and not two_resolutions:
        yield f"mfm.view={mfm.view} is about HRDA's crops: set mfm.view=context, or train method.name=hrda or mic on it"
    if not mfm.use_rebuilder and mfm.reconstruction != "classes":
        yield (
            f"mfm.use_rebuilder=false leaves nothing to compare with mfm.reconstruction={mfm.reconstruction}: "
            "choose mfm.reconstruction=classes"
        )
    if mfm.reconstruction != "classes" and mfm.trained_parts != "both":
        yield (
            f"mfm.trained_parts={mfm.trained_parts} is about the decoder, "
            f"which mfm.reconstruction={mfm.reconstruction} does not use: choose both"
        )
    if mfm.view != "context" and mfm.reconstruction != "classes":
        told = f"mfm.view={mfm.view} classifies, and mfm.reconstruction={mfm.reconstruction} does not"
        yield f"{told}: set mfm.view=context"
    if mfm.ramp_to < mfm.ramp_from:
        yield f"mfm.ramp_to={mfm.ramp_to} lies before mfm.ramp_from={mfm.ramp_from}: swap or equal them"


def _rebuilder_problems(config: RunConfig) -> Iterator[str]:
    """Find sizes of the Rebuilder that do not go together, or not with the mask."""
    rebuilder, block = config.rebuilder, config.mfm.mask_block_cells
    if rebuilder.heads >= 1 and rebuilder.width % rebuilder.heads:
        yield f"rebuilder.width={rebuilder.width} is not a multiple of rebuilder.heads={rebuilder.heads}"
    if rebuilder.width % 4:
        yield f"rebuilder.width={rebuilder.width} is not a multiple of 4, which its table of positions needs"
    if block >= 1 and any(side % block for side in rebuilder.grid):
        rows, cols = rebuilder.grid
        yield f"mfm.mask_block_cells={block} does not divide rebuilder.grid={rows}x{cols}: choose a divisor of both"
    if rebuilder.readout and config.mfm.mask != "exact":
        yield (
            f"rebuilder.readout={rebuilder.readout} reads the same number of visible cells of every image: choose "
            "mfm.mask=exact"
        )


def _set_problems(key: str, sets: Sets, data: DataSection) -> Iterator[str]:
    """Find what several shard sets together cannot be."""
    names = names_of(sets)
    if not names or not all(names):
        yield f"data.{key} names no shard set"
    for name, times in Counter(names).items():
        if times > 1:
            yield f"data.{key} names {name} twice: give it a share instead, data.{key}={{{name}: 2, ...}}"
    if len(names) > 1 and (streams := [name for name in names if is_stream(name)]):
        yield (
            f"data.{key} names {streams[0]} among others, and a stream has no order in which its share could be drawn: "
            "name it alone, or folders of shards"
        )
    if data.lanes and isinstance(sets, dict):
        yield (
            f"data.lanes reads shards in sequence, and data.{key} draws from several sets at once: set data.lanes=0, "
            f"or name the sets in a list, which is one sequence, data.{key}=[{', '.join(names)}]"
        )


def _data_problems(data: DataSection) -> Iterator[str]:
    """Find sizes and sampling rules that do not go together."""
    rare, (low, high) = data.rare_class_sampling, data.scale_range
    if low > high:
        yield f"data.scale_range={low}, {high}: must be two factors above 0, the smaller one first"
    if data.crop[0] * data.crop[1] > MOST_CROP_PIXELS:
        yield f"data.crop={data.crop[0]}x{data.crop[1]}: a crop has at most {MOST_CROP_PIXELS:,} pixels"
    if data.scratch_gib and data.scratch is None:
        yield f"data.scratch_gib={data.scratch_gib:g} limits data.scratch, which is not set"
    if not rare.enabled:
        return
    if data.lanes:
        yield "data.rare_class_sampling needs samples in any order, and data.lanes reads them in sequence: turn one off"
    if any(map(is_stream, names_of(data.source))):
        yield (
            "data.rare_class_sampling needs any sample at any time, and a stream cannot be read at random: turn it "
            "off, or download the shards and name their folder in data.source"
        )
    most = rare.min_pixels * rare.min_crop_ratio
    if most >= data.crop[0] * data.crop[1]:
        yield (
            f"data.rare_class_sampling: min_pixels x min_crop_ratio are {most:g} pixels, no crop of "
            f"{data.crop[0]}x{data.crop[1]} can hold more of one class: lower one of them"
        )


def _stream_problems(data: DataSection) -> Iterator[str]:
    """Find what a shard set that is a URL cannot give."""
    source, target = names_of(data.source), names_of(data.target)
    streams = [name for name in (*source, *target) if is_stream(name)]
    for key, name in (("validation", data.validation), ("source_validation", data.source_validation)):
        if name is not None and is_stream(name):
            yield f"data.{key} is a URL: evaluation covers each sample once, so it needs a folder of shards"
    if data.target_labelled is not None and is_stream(data.target_labelled):
        yield "data.target_labelled is a URL: these are few images, name a folder of shards"
    if data.target_labelled is not None and data.target_labelled == data.validation:
        yield (
            f"data.target_labelled and data.validation are both {data.validation}: a run cannot be scored on labels "
            "that it trains on, name another set in one of them"
        )
    if data.validation is None and any(map(is_stream, target)):
        yield (
            "data.validation=null has evaluation look at the first images of data.target, and a stream cannot be read "
            "at random: name a folder of shards in one of them"
        )
    if streams and not data.stream_samples:
        yield "data.stream_samples=0: say how many samples there are behind the URL, if only roughly"
    if streams and data.lanes:
        yield "data.lanes orders shards that have an index, and a URL has none: leave it 0"
    if streams and source == target:
        yield "data.source and data.target are the same URL"
