"""Random programs with States agree with the same programs in pure JAX; see ``programs``.

The environment variable ``BRAINSTATE_PROGRAMS`` says how many are run without XLA, 3000 unless it is set; one for
every fifty of these is run compiled as well. They take about five minutes on one core.
"""

import gc
import itertools
import os

import jax
import pytest
from hypothesis import HealthCheck, given, settings

from brainstate import State
from brainstate import transform as T
from programs import compare, generate, interpreted

COUNT = int(os.environ.get("BRAINSTATE_PROGRAMS", "3000"))
ANY = {"suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]}
turn = itertools.count(1)


def check(program, **how):
    """Compare, and hide what JAX keeps from the collections that a surviving State brings about: they get longer."""
    compare(program, **how)
    if next(turn) % 25 == 0:
        gc.collect()
        gc.freeze()


@pytest.mark.slow
@pytest.mark.timeout(0)
@settings(max_examples=COUNT, **ANY)
@given(generate())
def test_agrees_with_pure_jax(program):
    with jax.enable_x64(True), interpreted():
        check(program)


@pytest.mark.slow
@pytest.mark.timeout(0)
@settings(max_examples=max(1, COUNT // 50), **ANY)
@given(generate())
def test_agrees_when_compiled(program):
    with jax.enable_x64(True):
        check(program, compiled=True)


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
