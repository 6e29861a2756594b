"""The columns of the scenario table: transforms around each function, alone, in pairs and six deep.

Result, States afterwards and the numbers drawn are those of the twin in pure JAX, and the function runs once. Cells
with `shard_map` are compiled, and no others, see `interpreted`.
"""

import pytest

from _interpreter import interpreted
from scenarios import (
    CALL,
    COLUMNS,
    COMPILED,
    CONTEXTS,
    OPERATORS,
    SCENARIOS,
    close,
    columns,
    compare,
    expectation,
    nested,
)

OPERATOR = {operator.name: operator for operator in OPERATORS}
PLAIN, JIT, _ = CONTEXTS


def check(scenario, nest, derivative):
    """Compare one cell.

    A reverse pass goes through no while loop, and JAX cannot lower that of a `shard_map` in another; a forward one can.
    """
    names, inside = [column.name for column in nest], derivative == "inside"
    around = OPERATOR["jvp" if "while" in names or names.count("shard_map") > 1 else "grad"]
    operator = around if derivative == "around" else CALL
    lanes = not inside and scenario.name != "inner_step"  # which has a derivative of its own
    scenario = nested(scenario, nest, inside, lanes)
    if "shard_map" not in names:
        interpreted(lambda: compare(scenario, operator, PLAIN, "float32"))
    elif lanes:
        interpreted(lambda: expectation(scenario, operator, JIT.reference, "float32"))  # kept for `compare`
        compare(scenario, operator, JIT, "float32")
    else:
        compare(scenario, operator, COMPILED, "float32")


def cell_id(scenario, nest, derivative):
    return "-".join([str(scenario), *map(str, nest), derivative])


def cells():
    """Yield the cells as parameters."""
    for cell in columns():
        yield pytest.param(*cell, id=cell_id(*cell))


@pytest.mark.crossing
@pytest.mark.parametrize(("scenario", "nest", "derivative"), list(cells()))
def test_agrees_with_jax_on_the_twin(scenario, nest, derivative):
    check(scenario, nest, derivative)


@pytest.mark.parametrize("derivative", ["none", "around"])
@pytest.mark.parametrize("name", ["array", "noise"])
def test_the_lanes_of_the_twin_are_what_shard_map_computes(name, derivative):
    scenario = next(s for s in SCENARIOS if (s.name, s.wrt) == (name, "both"))
    operator = OPERATOR["grad"] if derivative == "around" else CALL
    lanes, devices = (nested(scenario, COLUMNS[-1:], lanes=lanes) for lanes in (True, False))
    got = interpreted(lambda: expectation(lanes, operator, PLAIN.reference, "float32"))
    close(got, expectation(devices, operator, COMPILED.reference, "float32"), "float32")


def deep():
    """Return six columns beginning with each, in the order of the table.

    `shard_map` is followed by no `vmap`, since JAX 0.10 fails at a loop with States within both, written by hand too.
    """
    *others, shard_map = COLUMNS
    turns = [(COLUMNS[i:] + COLUMNS[:i])[:6] for i in range(len(others))]
    return [*turns, (shard_map, *others[1:6])]


@pytest.mark.crossing
@pytest.mark.parametrize("derivative", ["inside", "around"])
@pytest.mark.parametrize("nest", deep(), ids=lambda nest: nest[0].name)
@pytest.mark.parametrize("name", ["array", "noise"])
def test_six_deep(name, nest, derivative):
    scenario = next(s for s in SCENARIOS if (s.name, s.wrt) == (name, "both"))
    check(scenario, nest, derivative)
