"""Random programs with States agree with the same programs in pure JAX; see ``programs``.

`make test` runs fifty of them without XLA. `make test-all` runs 3000, or as many as the environment variable
``BRAINSTATE_PROGRAMS`` says, which takes about five minutes on one core. One for every fifty is run compiled as well.
"""

import gc
import itertools
import os

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings

from _interpreter import interpreted
from brainstate import State
from brainstate import transform as T
from programs import compare, generate

# Programs read States in functions of JAX's own as well; each of these says so once.
pytestmark = pytest.mark.filterwarnings("ignore::brainstate.FrozenReadWarning")
# How many programs, and the seed where they are the same in each run; in parts, for several processes.
PARTS = 8
PART = int(os.environ.get("BRAINSTATE_PROGRAMS", "3000")) // PARTS
COUNTS = [(50, 0), *(pytest.param(PART, part, marks=pytest.mark.long) for part in range(1, PARTS + 1))]
ANY = {"suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]}
turn = itertools.count(1)


def check(program, **how):
    """Compare, and hide what JAX keeps from the collections that a surviving State brings about: they get longer."""
    compare(program, **how)
    if next(turn) % 25 == 0:
        gc.collect()
        gc.freeze()


@pytest.mark.timeout(0)
@pytest.mark.parametrize("compiled", [False, True], ids=["interpreted", "compiled"])
@pytest.mark.parametrize(("count", "part"), COUNTS)
def test_agrees_with_pure_jax(count, part, compiled):
    @seed(part if settings.default.derandomize else None)
    @settings(max_examples=max(1, count // 50) if compiled else count, **ANY)
    @given(generate())
    def agrees(program):
        with jax.enable_x64(True):
            check(program, compiled=compiled)

    agrees()


def test_numpy_draws_what_jax_draws():
    """What both ways of running have in common cannot be wrong without their knowing."""

    def draws():
        for key in (jax.random.key(7), jax.random.split(jax.random.key(3), (2, 3))):
            lanes = key[None] if key.ndim == 0 else key.reshape(-1)
            yield jax.random.key_data(jax.vmap(jax.random.fold_in, (0, None))(lanes, 5))
            yield jax.random.key_data(jax.vmap(lambda k: jax.random.split(k, (2, 2)))(lanes))
            for dtype in (jax.numpy.float32, jax.numpy.float64):
                yield jax.vmap(lambda k, dtype=dtype: jax.random.normal(k, (3,), dtype))(lanes)
                yield jax.jit(lambda k, dtype=dtype: jax.random.uniform(k, (2, 2), dtype))(lanes[0])

    with jax.enable_x64(True):
        expected, got = list(draws()), interpreted(lambda: list(draws()))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=3e-7 if a.dtype == jax.numpy.float32 else 1e-13)


# ------------------------------------------------------------------------------------------ found by them


@pytest.mark.parametrize("on", [True, 2, jax.numpy.array(True), 0.5], ids=repr)
def test_a_condition_of_any_kind_under_strict_promotion(on):
    up, down = (lambda: 1.0), (lambda: 0.0)
    assert T.cond(on, up, down) == 1.0
    assert T.ifelse([on, True], [up, down], check_cond=False) == 1.0


def test_a_local_state_that_a_map_declares_does_not_outlive_the_body():
    shared = State(jax.numpy.ones(3))

    def body(x):
        local = State(x * jax.numpy.ones(3))
        lanes = T.vmap(lambda y: shared.value + y, in_states=[shared, local], out_states={0: [local]})
        T.make_jaxpr(lambda x: (lanes(local.value) * x).sum())(x)
        return local.value.sum()

    assert T.while_loop(lambda x: x < 9.0, body, 1.0) == 9.0
