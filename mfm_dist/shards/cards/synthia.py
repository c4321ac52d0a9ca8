"""SYNTHIA-RAND-CITYSCAPES (Ros et al., CVPR 2016): rendered streets with 16 of the 19 classes.

Labels are 16-bit RGB PNGs: red is the class, green the instance. Readers that make 8 bits of them keep the high byte,
which turns every class into 0 without a word. Terrain, truck and train do not occur.
"""

import re

from mfm_dist.classes import IGNORE_INDEX, LabelMapping
from mfm_dist.shards.card import Card, Split

CARD = Card(
    name="synthia",
    title="SYNTHIA-RAND-CITYSCAPES",
    download="SYNTHIA_RAND_CITYSCAPES.rar from http://synthia-dataset.net/downloads/ and unpack it",
    splits=(
        Split(
            name="train",
            image=re.compile(r"(?:^|/)RGB/(?P<key>\d{7})\.png$"),
            label=re.compile(r"(?:^|/)GT/LABELS/(?P<key>\d{7})\.png$"),
            samples=9400,
            numbers=range(9400),
        ),
    ),
    size=(760, 1280),
    label_kinds=("16-bit RGB", "16-bit RGBA"),
    labels=LabelMapping(classes={
        3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13, 18: 14, 19: 15,
        20: 16, 12: 17, 11: 18,
        **dict.fromkeys((0, 13, 14, 22), IGNORE_INDEX),  # void, parking, road work, lane marking
    }),
)  # fmt: skip
