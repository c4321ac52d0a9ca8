"""The README.md of an export, as the Hugging Face Hub reads it: for who has the weights and not the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mfm_dist.config.schema import RunConfig
from mfm_dist.inference.segmentor import ModelCard

HEAD = """---
library_name: mfm_dist
pipeline_tag: image-segmentation
tags: [semantic-segmentation, unsupervised-domain-adaptation, masked-feature-modeling]
---
"""
TERMS = """The weights follow from images, labels and start weights of others. Whose terms apply to them is for whoever
passes them on to find out and to write here: many data sets of streets, and weights trained on them, are for
non-commercial research alone. This file grants nothing."""


def readme_text(card: ModelCard, config: RunConfig | None = None, scores: Mapping[str, Any] | None = None) -> str:
    """Return Markdown: what it is, what it was trained on, figures, terms, how to load it.

    Args:
        config: of the run; None for weights of elsewhere.
        scores: the evaluation at ``card.step`` as read from its file, which is not trusted; None if there is none.
    """
    parts = [HEAD, f"# {_plain(card.run)}\n", _what(card), "\n## Trained on\n", _data(card, config)]
    parts += ["\n## Figures\n", _figures(card, scores), "\n## Terms\n", TERMS, "\n## Load it\n", _loading(card)]
    return "\n".join(parts)


def _what(card: ModelCard) -> str:
    decoder = card.decoder + (f" at two resolutions (HRDA, {card.attention})" if card.attention else "")
    kind = "the EMA teacher" if card.weights == "teacher" else "the student"
    return (
        f"Semantic segmentation into {len(card.class_names)} classes: {_plain(', '.join(card.class_names))}.\n"
        f"Encoder `{card.backbone}`, decoder {decoder}; {kind} after {card.step:,} steps of {_plain(card.method)}"
        f"{f', code revision {_plain(card.revision)}' if card.revision else ''}."
    )


def _data(card: ModelCard, config: RunConfig | None) -> str:
    if config is None:
        return "Not known here: the weights were converted, and come from elsewhere."
    data, model = config.data, config.model
    start = model.weights.name if model.weights else "timm's weights" if model.pretrained else "random weights"
    crop = " x ".join(map(str, card.crop))
    oracle = config.method.name == "oracle"  # which never opens the source
    rows = [
        *([] if oracle else [("source, with labels", data.source)]),
        ("target, with labels" if oracle else "target, without labels", data.target),
        *([("target, with labels", data.target_labelled)] if data.target_labelled else []),
        ("scored on", data.validation or "nothing: the target has no labels"),
        ("start of the encoder", start),
        ("crops, height x width", crop),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_plain(_listed(value))} |" for name, value in rows)])


def _figures(card: ModelCard, scores: Mapping[str, Any] | None) -> str:
    if card.miou is None or scores is None:
        return "These weights were not scored by their run."
    iou, boundary = (
        {} if not isinstance(part := scores.get(key), Mapping) else part for key in ("iou", "boundary_iou")
    )
    rows: list[tuple[str, object, object]] = [("**mean**", card.miou, scores.get("boundary_miou"))]
    rows += [(_plain(name), iou.get(name), boundary.get(name)) for name in card.class_names]
    lines = [f"| {name} | {_percent(inside)} | {_percent(edge)} |" for name, inside, edge in rows]
    protocol = _plain(str(scores.get("protocol", "not noted")))
    table = ["| class | IoU, % | Boundary IoU, % |", "|---|---|---|", *lines]
    return "\n".join([*table, "", f"On {scores.get('images', '?')} images; {protocol}."])


def _loading(card: ModelCard) -> str:
    return (
        "```python\n"
        "import mfm_dist\n\n"
        'model = mfm_dist.load("FOLDER")    # this folder; nothing is unpickled\n'
        "labels = model.predict(image)      # uint8 RGB [3, H, W] -> index of a class for every pixel [H, W]\n"
        "logits = model(model.normalise(images))  # uint8 [B, 3, H, W] -> [B, C, H, W]\n"
        "```\n"
        f"`config.json` has the names, colours and normalisation (mean {list(card.mean)}, deviation "
        f"{list(card.std)}, RGB of 0 to 255);\n`model.safetensors` the weights.\n"
    )


def _listed(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} ({share})" for name, share in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _percent(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "–"  # noqa: RUF001  an en dash is meant


def _plain(text: str) -> str:
    """Keep text of others from being Markdown or HTML."""
    for letter in "\\`*_<>|[]#":
        text = text.replace(letter, f"\\{letter}")
    return " ".join(text.split())
