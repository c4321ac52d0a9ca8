"""The 19 evaluation classes of Cityscapes, which GTA5, SYNTHIA, ACDC, Dark Zurich and the scenes share."""

from __future__ import annotations

CLASS_NAMES: tuple[str, ...] = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
    "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
"""Index = train id."""

PALETTE: tuple[tuple[int, int, int], ...] = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
    (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0),
    (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip
"""RGB colour of each train id (Cityscapes scripts)."""

CLASS_SETS: dict[str, tuple[int, ...]] = {
    "synthia16": (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18),
    "synthia13": (0, 1, 2, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18),
}
"""Train ids that results on SYNTHIA are means over: it has no terrain, truck and train (16), and wall, fence and pole
are often left out as well (13)."""

IGNORE_INDEX = 255
"""Label of a pixel that no loss and no metric may count."""
