"""Cityscapes (Cordts et al., CVPR 2016): streets of German cities, fine annotations.

The download holds labels in ids, not in train ids; the ids are looked up here, which gives the same map as drawing
the polygons anew. Test labels are withheld, so the test split is not packed.
"""

import re

from mfm_dist.shards.card import Card, Split, labels_of


def _split(name: str, parts: dict[str, int]) -> Split:
    return Split(
        name=name,
        image=re.compile(rf"(?:^|/)leftImg8bit/{name}/(?P<part>[^/]+)/(?P<key>[^/]+)_leftImg8bit\.png$"),
        label=re.compile(rf"(?:^|/)gtFine/{name}/(?P<part>[^/]+)/(?P<key>[^/]+)_gtFine_labelIds\.png$"),
        samples=sum(parts.values()),
        parts=parts,
    )


CARD = Card(
    name="cityscapes",
    title="Cityscapes",
    download=(
        "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com/downloads/ "
        "into one folder; unpacking is not needed"
    ),
    splits=(
        _split(
            "train",
            {
                "aachen": 174, "bochum": 96, "bremen": 316, "cologne": 154, "darmstadt": 85, "dusseldorf": 221,
                "erfurt": 109, "hamburg": 248, "hanover": 196, "jena": 119, "krefeld": 99, "monchengladbach": 94,
                "strasbourg": 365, "stuttgart": 196, "tubingen": 144, "ulm": 95, "weimar": 142, "zurich": 122,
            },
        ),
        _split("val", {"frankfurt": 267, "lindau": 59, "munster": 174}),
    ),
    size=(1024, 2048),
    labels=labels_of("cityscapes19_ids"),
)  # fmt: skip
