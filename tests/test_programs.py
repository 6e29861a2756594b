"""Random programs agree with the same programs in pure JAX; see ``programs``."""

import os
from collections import Counter

import jax
import pytest
from hypothesis import HealthCheck, given, settings

from programs import compare, generate, interpreted

COUNT = int(os.environ.get("BRAINSTATE_PROGRAMS", "2000"))
ANY = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=COUNT, **ANY)
@given(generate())
def test_agree_with_pure_jax(program):
    with jax.enable_x64(True), interpreted():
        compare(program)


@settings(max_examples=max(1, COUNT // 20), **ANY)
@given(generate())
def test_agree_when_compiled(program):
    with jax.enable_x64(True):
        compare(program, compiled=True)
