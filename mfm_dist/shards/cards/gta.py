"""GTA5, "Playing for Data" (Richter et al., ECCV 2016): frames of a game with labels in the ids of Cityscapes.

Labels are palette PNGs whose index is the id; read as colours they are useless. Most frames have 1914 x 1052 pixels,
not all. A few labels have another size than their image. Copies with 24,941 pairs are about.
"""

import re

from mfm_dist.classes import IGNORE_INDEX, LabelMapping
from mfm_dist.shards.card import Card, Split, labels_of

CARD = Card(
    name="gta",
    title="GTA5",
    download=(
        "01_images.zip to 10_images.zip and 01_labels.zip to 10_labels.zip "
        "from https://download.visinf.tu-darmstadt.de/data/from_games/ into one folder; unpacking is not needed"
    ),
    splits=(
        Split(
            name="train",
            image=re.compile(r"(?:^|/)images/(?P<key>\d{5})\.png$"),
            label=re.compile(r"(?:^|/)labels/(?P<key>\d{5})\.png$"),
            samples=24966,
            numbers=range(1, 24967),
        ),
    ),
    size=(1052, 1914),
    sizes_vary=True,
    leaves_out_unequal_pairs=True,
    label_kinds=("8-bit palette", "8-bit grey"),
    # 34 stands for licence plates, which Cityscapes numbers -1.
    labels=LabelMapping(classes={**labels_of("cityscapes19_ids").classes, 34: IGNORE_INDEX}),
)
