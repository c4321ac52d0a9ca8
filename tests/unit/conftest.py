"""Fixtures of the unit tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.shards import ShardFolder, write_set


@pytest.fixture
def shard_folder(tmp_path: Path) -> ShardFolder:
    """Makes ``<tmp_path>/<name>``; keywords as in ``write_set``."""
    return lambda name="source", **keywords: write_set(tmp_path / name, **keywords)
