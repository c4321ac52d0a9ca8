"""What is wrong with a configuration: values out of range, and values that do not go together."""

from __future__ import annotations

from mfm_dist.config.schema import DataSection, RunConfig, is_stream

LONGEST_WINDOW = 10_000
"""Steps; ``checkpoint.files`` reads no JSON beyond 4 MiB, of which these take about 0.4."""


def problems(config: RunConfig) -> list[str]:
    """Every value out of range and every contradiction between fields, each with the fix."""
    return [*_range_problems(config), *_cross_field_problems(config), *data_problems(config.data)]


def _range_problems(config: RunConfig) -> list[str]:
    """Values outside what their field allows."""
    at_least_one = {
        "data.crop": min(config.data.crop),
        "scenes.train": config.scenes.train,
        "scenes.val": config.scenes.val,
        "scenes.size": min(config.scenes.size),
        "rebuilder.depth": config.rebuilder.depth,
        "rebuilder.width": config.rebuilder.width,
        "rebuilder.heads": config.rebuilder.heads,
        "rebuilder.grid": min(config.rebuilder.grid),
        "train.steps": config.train.steps,
        "train.micro_batch": config.train.micro_batch,
        "train.global_batch": config.train.global_batch,
        "train.threads": config.train.threads,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "eval.every": config.eval.every,
        "eval.resize": min(config.eval.resize or (1,)),
        "mic.mask_block_pixels": 1 if config.mic.mask_block_pixels is None else config.mic.mask_block_pixels,
        "log.every": config.log.every,
        "recovery.spike_window": config.recovery.spike_window,
    }
    not_negative = {
        "seed": config.seed,
        "scenes.seed": config.scenes.seed,
        "data.workers": config.data.workers,
        "mfm.loss_weight": config.mfm.loss_weight,
        "mfm.ramp_from": config.mfm.ramp_from,
        "self_training.jitter_strength": config.self_training.jitter_strength,
        "self_training.pseudo_weight_ignore_top": config.self_training.pseudo_weight_ignore_top,
        "self_training.pseudo_weight_ignore_bottom": config.self_training.pseudo_weight_ignore_bottom,
        "daformer.feature_distance_weight": config.daformer.feature_distance_weight,
        "mic.loss_weight": config.mic.loss_weight,
        "optim.lr": config.optim.lr,
        "optim.decoder_lr_factor": config.optim.decoder_lr_factor,
        "optim.rebuilder_lr": config.optim.rebuilder_lr,
        "optim.weight_decay": config.optim.weight_decay,
        "optim.warmup_steps": config.optim.warmup_steps,
        "train.clip_norm": config.train.clip_norm,
        "debug.audit_every": config.debug.audit_every,
        "eval.overlays": config.eval.overlays,
        "watchdog.seconds": config.watchdog.seconds,
        "recovery.rollback_after": config.recovery.rollback_after,
        "recovery.rollbacks": config.recovery.rollbacks,
        "recovery.spike_factor": config.recovery.spike_factor,
    }
    shares = {
        "data.bad_sample_limit": config.data.bad_sample_limit,
        "self_training.ema_decay": config.self_training.ema_decay,
        "self_training.pseudo_threshold": config.self_training.pseudo_threshold,
        "self_training.jitter_prob": config.self_training.jitter_prob,
        "self_training.blur_prob": config.self_training.blur_prob,
        "mfm.mask_ratio": config.mfm.mask_ratio,
        "daformer.feature_distance_share": config.daformer.feature_distance_share,
        "hrda.detail_loss_weight": config.hrda.detail_loss_weight,
        "mic.mask_ratio": config.mic.mask_ratio,
        "mic.pseudo_threshold": config.mic.pseudo_threshold or 0.0,
        "optim.warmup_ratio": config.optim.warmup_ratio,
    }
    return [
        *(f"{key}={value}: must be at least 1" for key, value in at_least_one.items() if value < 1),
        *(f"{key}={value}: must not be negative" for key, value in not_negative.items() if not value >= 0),
        *(f"{key}={value}: must lie between 0 and 1" for key, value in shares.items() if not 0 <= value <= 1),
    ]


def _cross_field_problems(config: RunConfig) -> list[str]:
    """Values that are allowed one by one but not together."""
    problems = []
    train, mfm, rebuilder, model = config.train, config.mfm, config.rebuilder, config.model
    if train.micro_batch >= 1 and train.global_batch % train.micro_batch:
        problems.append(
            f"train.global_batch={train.global_batch} is not a multiple of train.micro_batch={train.micro_batch}"
        )
    for part, limit in train.clip_parts.items():
        if part not in ("encoder", "decoder", "rebuilder"):
            problems.append(f"train.clip_parts names {part!r}: there are encoder, decoder and rebuilder")
        elif isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
            problems.append(f"train.clip_parts.{part}={limit}: must be a number above 0, or left out")
    margins = config.self_training.pseudo_weight_ignore_top + config.self_training.pseudo_weight_ignore_bottom
    if margins >= config.data.crop[0]:
        problems.append(
            f"self_training.pseudo_weight_ignore_top and _bottom are {margins} rows together, all of data.crop="
            f"{config.data.crop[0]}x{config.data.crop[1]}: leave some"
        )
    if mfm.view != "context" and not config.two_resolutions:
        problems.append(
            f"mfm.view={mfm.view} is about HRDA's crops: keep context, or train method.name=hrda or mic on it"
        )
    if not mfm.use_rebuilder and mfm.reconstruction != "classes":
        problems.append(
            f"mfm.use_rebuilder=false leaves nothing to compare with mfm.reconstruction={mfm.reconstruction}: "
            "choose mfm.reconstruction=classes"
        )
    if mfm.reconstruction != "classes" and mfm.trained_parts != "both":
        problems.append(
            f"mfm.trained_parts={mfm.trained_parts} is about the decoder, "
            f"which mfm.reconstruction={mfm.reconstruction} does not use: choose both"
        )
    if 0 < config.recovery.spike_factor <= 1:
        problems.append(f"recovery.spike_factor={config.recovery.spike_factor}: must be above 1, or 0 for never")
    if config.recovery.spike_window > LONGEST_WINDOW:
        problems.append(
            f"recovery.spike_window={config.recovery.spike_window}: at most {LONGEST_WINDOW}, for every checkpoint "
            "holds the losses and gradient norms of these steps"
        )
    if mfm.ramp_to < mfm.ramp_from:
        problems.append(f"mfm.ramp_to={mfm.ramp_to} lies before mfm.ramp_from={mfm.ramp_from}: swap or equal them")
    if rebuilder.heads >= 1 and rebuilder.width % rebuilder.heads:
        problems.append(f"rebuilder.width={rebuilder.width} is not a multiple of rebuilder.heads={rebuilder.heads}")
    if rebuilder.width % 4:
        problems.append(f"rebuilder.width={rebuilder.width} is not a multiple of 4, which its projectors need")
    if model.pretrained and model.weights is not None:
        problems.append("model.pretrained and model.weights are both set: keep one, they both start the encoder")
    return problems


def data_problems(data: DataSection) -> list[str]:
    """Each with the fix."""
    return [*_data_range_problems(data), *_sampling_problems(data), *_stream_problems(data)]


def _data_range_problems(data: DataSection) -> list[str]:
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
