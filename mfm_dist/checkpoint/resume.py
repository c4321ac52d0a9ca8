"""Whether a run may go on from what is in its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mfm_dist.checkpoint.files import Checkpoint, DamagedCheckpointError, newest_first
from mfm_dist.classes import ClassSet
from mfm_dist.config.loader import changed_keys, to_tree
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.engine import Engine
from mfm_dist.errors import ConfigError, StorageError

_NETWORK = "{path} is of another network, one with {before}"
_SHARDS = (
    "shards are not those that {path} was trained on, or not in the same shares, so its place in them means nothing: "
    "put the former shards back"
)

IMMUTABLE_KEYS = {
    "seed": "the order of the data and every draw of {path} follow from {before}",
    "method.name": "{path} holds the networks that {before} trains",
    "mfm.enabled": "the Rebuilder is part of the networks in {path} or not (mfm.loss_weight=0 switches the term off)",
    "mfm.use_rebuilder": "the Rebuilder is part of the networks in {path} or not",
    "mfm.reconstruction": _NETWORK,
    "mic.base_method": "{path} holds the networks of {before}",
    "hrda.attention": _NETWORK,
    "hrda.attention_options": _NETWORK,
    "optim.name": "the optimiser's state in {path} is of {before}",
    "train.micro_batch": "{path} counts its data in micro-batches of {before}",
    "model.backbone": _NETWORK,
    "model.backbone_options": _NETWORK,
    "model.freeze": "the optimiser's state in {path} is of the parameters that {before} trains",
    "model.lora": _NETWORK,
    "model.decoder": _NETWORK,
    "model.decoder_options": _NETWORK,
    "rebuilder.depth": _NETWORK,
    "rebuilder.width": _NETWORK,
    "rebuilder.heads": _NETWORK,
    "rebuilder.mlp_ratio": _NETWORK,
    "rebuilder.grid": _NETWORK,
    "rebuilder.qk_norm": _NETWORK,
    "rebuilder.peri_norm": _NETWORK,
    "rebuilder.depth_scaling": _NETWORK,
    "rebuilder.readout": _NETWORK,
}
"""Settings that a run keeps for good, and why. With another value the state of a checkpoint would not fit, or fit and
mean something else. Everything else may change between two starts, and is listed when it does: world size, ZeRO stage
and workers change nothing but speed; rates, weights, crops, the global batch and the number of steps hold from then on.
Of the data sets not the name counts but the content."""


def load_newest(
    folder: Path,
    engine: Engine,
    load: Callable[[Checkpoint], object],
    report: Callable[[str], None],
    order: Callable[[Path, Callable[[str], None]], Iterator[Checkpoint]] = newest_first,
) -> Checkpoint | None:
    """Load the first checkpoint that turns out to be whole; None where none was ever saved. Collective.

    Rank 0 looks for all, so that no rank starts from another step. What is in the files is verified while it is read.

    Args:
        load: puts a checkpoint in place; collective, and raises ``DamagedCheckpointError`` on every rank or on none.
        report: told on every rank about those passed over.
        order: opens the checkpoints of a folder in the order to try them, and reports those that cannot be.

    Raises:
        StorageError: if there are checkpoints and none is whole. A new run in their place would lose what may still
            be mended, and nobody would notice.
    """
    damaged: list[str] = []

    def note(line: str) -> None:
        damaged.append(line)
        report(line)

    checkpoints = order(folder, note)  # on other ranks nothing is asked of it
    while (checkpoint := engine.from_main(lambda: next(checkpoints, None))) is not None:
        try:
            load(checkpoint)
        except DamagedCheckpointError as error:
            note(f"{error}; looking for an earlier one")
        else:
            return checkpoint
    if number := engine.from_main(lambda: len(damaged)):
        raise StorageError(
            f"no checkpoint in {folder} is whole ({number} damaged, see above), and nothing was started: put a "
            f"copy of one back, or choose another run.folder, or remove {folder} to start over from step 0"
        )
    return None


def check_resumable(
    checkpoint: Checkpoint,
    config: RunConfig,
    data_fingerprints: Mapping[str, str],
    classes: ClassSet,
    report: Callable[[str], None] = lambda _: None,
) -> None:
    """Report what changed since a checkpoint was written.

    Raises:
        ConfigError: if the run cannot go on from it, with every reason.
    """
    for line in changed_keys(checkpoint.config, config):
        report(f"  changed since: {line}")
    if problems := resume_problems(checkpoint, config, data_fingerprints, classes):
        raise ConfigError(problems)


FINGERPRINT_MISMATCH = {
    "labelled": "the labelled " + _SHARDS,
    "target": "the target " + _SHARDS,
    "target_labelled": "the labelled target " + _SHARDS,
    "relabelling": "data.classes makes other classes of the labels than {path} was trained on: put the former back",
    "initial_encoder": "the encoder does not start from the weights that {path} keeps close to: give model.weights or "
    "model.pretrained as before",
}
"""What it means when something that a run rests on is not what it was, and what to do."""


def resume_problems(
    checkpoint: Checkpoint, config: RunConfig, data_fingerprints: Mapping[str, str], classes: ClassSet
) -> list[str]:
    """List why the run cannot go on from ``checkpoint``, each with the way out.

    Args:
        data_fingerprints: fingerprints of what it would go on with, each by a name of ``FINGERPRINT_MISMATCH``.
        classes: of the data that it would go on with.
    """
    path, problems = checkpoint.path, []
    if difference := checkpoint.classes.difference(classes):
        problems.append(
            f"{path} and the data do not agree, {difference}\n    Put the former shards and data.classes back, "
            "or choose another run.folder"
        )
    for key, reason in IMMUTABLE_KEYS.items():
        before, now = _value(checkpoint.config, key), _value(to_tree(config), key)
        # None: written by a version that had no such setting, and trained as its default does.
        if before not in (None, now) and not _unused(key, config):
            why = reason.format(path=path, before=before)
            problems.append(f"{key}={now}, but {why}: keep {before}, or choose another run.folder")
    problems += [
        f"{FINGERPRINT_MISMATCH[role].format(path=path)}, or choose another run.folder"
        for role, fingerprint in data_fingerprints.items()
        if checkpoint.data.get(role, fingerprint) != fingerprint
    ]
    if config.train.steps < checkpoint.progress.step:
        problems.append(
            f"train.steps={config.train.steps}, but {path} is at step {checkpoint.progress.step} already: ask for as "
            "many at least, or choose another run.folder"
        )
    return problems


def _unused(key: str, config: RunConfig) -> bool:
    """Tell whether a setting has no effect on this run."""
    if key.startswith("rebuilder.") or key in ("mfm.use_rebuilder", "mfm.reconstruction"):
        left_out = key.startswith("rebuilder.") and not config.mfm.use_rebuilder
        return not config.mfm.enabled or (left_out and key != "rebuilder.grid")  # which the mask has too
    return (key == "mic.base_method" and config.method.name != "mic") or (
        key.startswith("hrda.") and not config.two_resolutions
    )


def _value(tree: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key; None where there is no such section or field."""
    section, _, name = key.rpartition(".")
    values = tree.get(section, {}) if section else tree
    return values.get(name) if isinstance(values, Mapping) else None
