"""A table of bits against the lists of rows that it stands for."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from mfm_dist.data import bit_table
from mfm_dist.data.bit_table import BitTable


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 19])
def test_every_row_that_is_true_is_found_in_its_place(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bit_table, "BLOCK", 16)
    generator = np.random.default_rng(columns)
    often = np.linspace(0, 1, columns + 1)[:columns]  # a column that is never true, and others that mostly are
    truths = generator.random((500, columns)) < often
    truths[100:200] = False
    table = BitTable(columns)
    for part in np.split(truths, [1, 16, 33, 33, 290]):
        table.extend(part)
    assert len(table) == 500
    for column in range(columns):
        rows = np.flatnonzero(truths[:, column]).tolist()
        assert table.count(column) == len(rows)
        assert [table.select(column, k) for k in range(len(rows))] == rows
        for outside in (-1, len(rows)):
            with pytest.raises(IndexError):
                table.select(column, outside)


def test_a_million_rows_take_little_more_than_their_bits() -> None:
    """Held and at the most while it grows: 3 bytes a row for 19 columns, of which lists would take up to 76."""
    part = np.ones((4096, 19), dtype=bool)
    table = BitTable(19)
    tracemalloc.start()
    for _ in range(256):
        table.extend(part)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == 1 << 20
    assert 3 << 20 < peak < 4 << 20
