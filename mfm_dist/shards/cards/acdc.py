"""ACDC (Sakaridis et al., ICCV 2021): Swiss streets in fog, night, rain and snow.

Labels hold train ids. The pictures of the same places in fine weather (``*_ref``) are not packed; test labels are
withheld. Training labels are packed and, the data set being a target, never read.
"""

import re

from mfm_dist.shards.card import Card, Split, labels_of


def _split(name: str, parts: dict[str, int]) -> Split:
    path = f"(?P<part>fog|night|rain|snow)/{name}/[^/]+/(?P<key>[^/]+)"
    return Split(
        name=name,
        image=re.compile(rf"(?:^|/)rgb_anon/{path}_rgb_anon\.png$"),
        label=re.compile(rf"(?:^|/)gt/{path}_gt_labelTrainIds\.png$"),
        samples=sum(parts.values()),
        parts=parts,
    )


CARD = Card(
    name="acdc",
    title="ACDC",
    download=(
        "rgb_anon_trainvaltest.zip and gt_trainval.zip from https://acdc.vision.ee.ethz.ch/download "
        "into one folder; unpacking is not needed"
    ),
    splits=(
        _split("train", {"fog": 400, "night": 400, "rain": 400, "snow": 400}),
        _split("val", {"fog": 100, "night": 106, "rain": 100, "snow": 100}),
    ),
    size=(1080, 1920),
    labels=labels_of("cityscapes19"),
)
