"""The scenario table: each function, operator, dtype and context against JAX on the hand-written twin."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _interpreter import interpreted
from brainstate import transform as T
from scenarios import (
    OPERATORS,
    SCENARIOS,
    cells,
    compare,
    probe,
    total,
    values_of,
)

OPERATOR = {operator.name: operator for operator in OPERATORS}


def precision(dtype):
    """Allow 64 bits for the dtypes that have them."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


@pytest.mark.crossing(2)
@pytest.mark.parametrize(
    ("scenario", "operator", "dtype", "context"), [pytest.param(*c, id="-".join(map(str, c))) for c in cells()]
)
def test_agrees_with_jax_on_the_twin(scenario, operator, dtype, context):
    """Compare one cell; compiled where that is what the context is about."""
    run = functools.partial(compare, scenario, operator, context, dtype)
    with precision(dtype):
        run() if context.name == "jit" else interpreted(run)


# ------------------------------------------------------------------------------------------ finite differences


def lend(fun, states):
    """Return ``fun`` on copies of the containers that ``states`` hold, with the old values put back afterwards."""

    def run(*args):
        saved = values_of(states)
        try:
            for name, value in saved.items():
                states[name].value = jax.tree.map(lambda leaf: leaf, value)
            return fun(*args)
        finally:
            for name, value in saved.items():
                states[name].value = value

    return run


def central(scenario, states, args, run, h=1e-5):
    """Return the central difference of ``run`` along `probe`; neither a derivative nor the twin is involved."""
    before = values_of(states)
    diff = scenario.pack(before, args)

    def at(step):
        new, moved = scenario.unpack(jax.tree.map(lambda a, b: a + step * b, diff, probe(diff)), before, args)

        def set_and_run():
            for name, value in new.items():
                states[name].value = value
            return lend(run, states)(*moved)

        return lend(set_and_run, states)()

    return jax.tree.map(lambda up, down: (up - down) / (2 * h), at(h), at(-h))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_agrees_with_finite_differences(scenario):
    def run():
        states, args = scenario.prepare("float64")
        options = scenario.options(states)
        direction = jax.tree.leaves(probe(scenario.pack(values_of(states), args)))

        def loss(*a):
            return total(scenario.function(states, *a))

        gradient, treedef = jax.tree.flatten(lend(T.grad(loss, **options), states)(*args))
        slope = sum(jnp.vdot(g, d) for g, d in zip(gradient, direction, strict=True))
        np.testing.assert_allclose(slope, central(scenario, states, args, loss), rtol=1e-6, atol=1e-8)

        hessian = lend(T.hessian(loss, **options), states)(*args)
        bends = jax.tree.leaves(central(scenario, states, args, T.grad(loss, **options)))
        for row, bend in zip(treedef.flatten_up_to(hessian), bends, strict=True):
            blocks = zip(treedef.flatten_up_to(row), direction, strict=True)
            curvature = sum(jnp.tensordot(block, d, d.ndim) for block, d in blocks)
            np.testing.assert_allclose(curvature, bend, rtol=1e-5, atol=1e-7)

    with jax.enable_x64(True):
        interpreted(run)
