"""UrbanSyn (Gómez et al., arXiv 2312.12176): rendered streets with the 19 classes, in Cityscapes' size. CC BY-SA 4.0.

Labels hold train ids, the same number in every channel, and 19 for what is none of the classes. Pictures of the labels
(``ss_colour``), depth and instances are not packed.
"""

import re

from mfm_dist.classes import IGNORE_INDEX, LabelMapping
from mfm_dist.shards.card import Card, Split, labels_of

CARD = Card(
    name="urbansyn",
    title="UrbanSyn",
    download=(
        "rgb and ss from https://www.urbansyn.org, or https://huggingface.co/datasets/UrbanSyn/UrbanSyn, "
        "into one folder; unpacking is not needed"
    ),
    splits=(
        Split(
            name="train",
            image=re.compile(r"(?:^|/)rgb_(?P<key>\d{4})\.png$"),
            label=re.compile(r"(?:^|/)ss_(?P<key>\d{4})\.png$"),
            samples=7539,
            numbers=range(1, 7540),
        ),
    ),
    size=(1024, 2048),
    label_kinds=("8-bit grey", "8-bit RGB", "8-bit RGBA"),
    labels=LabelMapping(classes={**labels_of("cityscapes19").classes, 19: IGNORE_INDEX}),
)
