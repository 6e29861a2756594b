"""A hostile environment for the tests; documents and docstrings run under the defaults of JAX, if not of XLA."""

import gc
from collections import defaultdict

import jax
import pytest

from _covering import covering
from brainstate import random
from brainstate._seam import tokens as _tokens

random.seed(0)  # of what a file draws when it is imported


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Let go of what a file has compiled, and of the States that JAX's own code has met: a file begins as a process."""
    _tokens.any_met.clear()
    _tokens._states.clear()
    _tokens._token.set_global(None)
    yield
    jax.clear_caches()
    gc.unfreeze()
    gc.collect()


@pytest.fixture(autouse=True)
def little_garbage():
    """Hide what there was before the test from the garbage collector, which a trace that leaves States behind calls."""
    gc.freeze()


@pytest.fixture(autouse=True)
def hostile():
    """Refuse implicit promotion of dtypes and ranks."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True)
def seeded():
    """Give every test the same numbers, whatever ran before it."""
    random.seed(0)


@pytest.fixture
def double():
    """Compute in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def no_leaks():
    """Refuse a tracer that survives its trace. Opt-in, since it switches off JAX's caches."""
    with jax.checking_leaks():
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as long the cells of a crossing whose rows and columns other cells show; begin with the longest test."""
    crossings = defaultdict(list)
    for item in items:
        if item.get_closest_marker("crossing"):
            crossings[item.function].append(item)
    for cells in crossings.values():
        values = [[str(value) for _, value in sorted(cell.callspec.params.items())] for cell in cells]
        for cell, kept in zip(cells, covering(values, *cells[0].get_closest_marker("crossing").args), strict=True):
            if not kept:
                cell.add_marker("long")
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)
