"""Random programs with States agree with the same programs in pure JAX; see ``programs``.

The environment variable ``BRAINSTATE_PROGRAMS`` says how many are run without XLA, 1000 unless it is set; one for
every twenty of these is run compiled as well. A thousand take two to four minutes on two cores.
"""

import os

import jax
import pytest
from hypothesis import HealthCheck, given, settings

from programs import compare, generate, interpreted

COUNT = int(os.environ.get("BRAINSTATE_PROGRAMS", "1000"))
ANY = {"suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]


@settings(max_examples=COUNT, **ANY)
@given(generate())
def test_agrees_with_pure_jax(program):
    with jax.enable_x64(True), interpreted():
        compare(program)


@settings(max_examples=max(1, COUNT // 20), **ANY)
@given(generate())
def test_agrees_when_compiled(program):
    with jax.enable_x64(True):
        compare(program, compiled=True)
