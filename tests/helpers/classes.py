"""The class set of the scenes, which most tests train on."""

from __future__ import annotations

from mfm_dist.config.class_files import DEFAULT, load_class_set

CLASSES = load_class_set(DEFAULT)
