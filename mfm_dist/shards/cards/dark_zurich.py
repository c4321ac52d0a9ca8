"""Dark Zurich (Sakaridis et al., ICCV 2019): Zurich by night.

The training pictures have no labels; those of the 50 validation pictures hold train ids. Day and twilight are not
packed: the target of the published runs is the night alone. Test labels are withheld.
"""

import re

from mfm_dist.shards.card import Card, Split, labels_of

CARD = Card(
    name="dark_zurich",
    title="Dark Zurich",
    download=(
        "Dark_Zurich_train_anon.zip and Dark_Zurich_val_anon.zip from "
        "https://www.trace.ethz.ch/publications/2019/GCMA_UIoU/ into one folder; unpacking is not needed"
    ),
    splits=(
        Split(
            name="train",
            image=re.compile(r"(?:^|/)rgb_anon/train/night/[^/]+/(?P<key>[^/]+)_rgb_anon\.png$"),
            label=None,
            samples=2416,
        ),
        Split(
            name="val",
            image=re.compile(r"(?:^|/)rgb_anon/val/(?:[^/]+/)*(?P<key>[^/]+)_rgb_anon\.png$"),
            label=re.compile(r"(?:^|/)gt/val/(?:[^/]+/)*(?P<key>[^/]+)_gt_labelTrainIds\.png$"),
            samples=50,
        ),
    ),
    size=(1080, 1920),
    labels=labels_of("cityscapes19"),
)
