"""What `make test` keeps of a crossing shows all of its rows and columns, and `make test-all` runs the others."""

import itertools
import re
from pathlib import Path

import pytest

from _covering import covering, few
from scenarios import cells, columns

TABLES = {
    "scenarios": [tuple(map(str, cell)) for cell in cells()],
    "nesting": [tuple(map(str, cell)) for cell in columns()],
    "a column": [(name,) for name in "abca"],
    "nothing": [],
}


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("name", TABLES)
def test_all_that_stands_together_is_kept(name, together):
    def shown(cells):
        return {pair for cell in cells for pair in itertools.combinations(enumerate(cell), min(together, len(cell)))}

    table = TABLES[name]
    kept = [cell for cell, keep in zip(table, covering(table, together), strict=True) if keep]
    assert shown(kept) == shown(table)
    assert len(kept) < len(table) or not table


def test_few_loses_none():
    parameters = few("abc", 2)
    assert [p.values for p in parameters] == [("a",), ("b",), ("c",)]
    assert [len(p.marks) for p in parameters] == [0, 0, 1]


def test_the_two_runs_are_all_tests():
    """They select by one mark, and by nothing else."""
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert re.findall(r"^\t\$\(PYTEST\) (.*)", makefile, re.MULTILINE) == ["-m 'not long' $(ARGS)", "-m long $(ARGS)"]
    common = re.search(r"^PYTEST := (.*)", makefile, re.MULTILINE)[1].split(" -q ")[1]
    assert (
        common == "-n 2 --dist worksteal --durations=10 --ignore=tests/test_formalities.py"
    )  # which `test` runs first
