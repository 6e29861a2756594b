"""The cells of a crossing that show all its rows and columns, for a run that has little time."""

import itertools
from collections.abc import Hashable, Iterable, Sequence

import pytest


def covering(cells: Sequence[Sequence[Hashable]], together: int = 1) -> list[bool]:
    """
    Return for each cell whether it is kept.

    Any ``together`` values that stand in one cell (with 1, any row and any column) stand in a cell that is kept
    as well. Cells that show much for the first time are taken first, so that few are kept.
    """
    of = min(together, min(map(len, cells), default=0))
    shows = [set(itertools.combinations(enumerate(cell), of)) for cell in cells]
    shown, kept = set(), [False] * len(cells)
    for wanted in range(max(map(len, shows), default=0), 0, -1):
        for i, values in enumerate(shows):
            if len(values - shown) >= wanted:
                kept[i] = True
                shown |= values
    return kept


def few(values: Iterable, count: int = 1) -> list:
    """Return ``values`` as parameters, all but the first ``count`` for the long run."""
    return [pytest.param(value, marks=[pytest.mark.long] * (i >= count)) for i, value in enumerate(values)]
