"""The check of a derivative inside a program: a flag that is computed at run time, and a callback where it is true.

The callback gets the inputs of the program that computed the derivative, runs the search on the host and raises its
error. The derivative depends on the callback, so no compiler leaves it out. How the error leaves the compiled code, and
who waits for it, is told in `run_time_errors`.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._compat import varying_axes
from ..._seam.run_time_errors import mark, raise_on_host
from ..._seam.scope import is_tracer
from .search import inexact

__all__ = ["check_at_run_time"]


def check_at_run_time(program: Any, inputs: tuple, result: Any, faults: list) -> Any:
    """Return ``result`` of a program that is being traced; if one of ``faults`` is true when it runs, that raises.

    ``program.search(*inputs, lane)`` then returns the error.
    """
    if not faults:
        return result
    fine = ~_gate(program, jnp.stack(faults).any(), inputs)
    # NaN is seen only where nothing is raised. It is added, as a compiler that knows the derivative to be NaN would
    # drop a choice between the two, and the check with it; x + -0.0 is x, for every x.
    return jax.tree.map(lambda x: x + _nan_unless(fine, jax.typeof(x).dtype) if inexact(x) else x, result)


def _nan_unless(fine, dtype):
    return jnp.where(fine, -np.zeros((), dtype), np.asarray(np.nan, dtype))


def _gate(program, bad, inputs):
    """Return False; or at run time, if ``bad`` is true, raise the error of the search (or keep it and return True)."""
    leaves = [leaf for part in inputs for leaf in part]
    ends = list(itertools.accumulate(map(len, inputs)))
    # Every array is an operand, since JAX's caches keep all that a callback refers to. Keys would arrive as numbers.
    places = [i for i, leaf in enumerate(leaves) if is_tracer(leaf) or isinstance(leaf, jax.Array | np.ndarray)]
    operands = [jax.lax.stop_gradient(leaves[i]) if inexact(leaves[i]) else leaves[i] for i in places]
    keys = {i: jax.random.key_impl(leaf) for i, leaf in zip(places, operands, strict=True) if _is_key(leaf)}
    operands = [jax.random.key_data(leaf) if i in keys else leaf for i, leaf in zip(places, operands, strict=True)]
    kept = [None if i in set(places) else leaf for i, leaf in enumerate(leaves)]
    several = any(varying_axes(leaves[i]) for i in places)  # in a shard_map

    def on_host(bad, *operands):
        bad = np.asarray(bad)
        sizes = np.broadcast_shapes(bad.shape, *(operand.shape[: bad.ndim] for operand in operands))
        if not bad.any():
            return np.zeros(sizes, bool)
        lane = tuple(int(i) for i in np.argwhere(np.broadcast_to(bad, sizes))[0])
        filled = list(kept)
        for i, operand in zip(places, operands, strict=True):
            part = operand[tuple(min(n, size - 1) for n, size in zip(lane, operand.shape, strict=False))]
            filled[i] = jax.random.wrap_key_data(jnp.asarray(part), impl=keys[i]) if i in keys else part
        parts = (filled[start:end] for start, end in itertools.pairwise([0, *ends]))
        # Another device may be waiting for this callback, and would compute nothing meanwhile.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            error = program.search(*parts, lane)
        raise_on_host(error, several)
        return np.ones(sizes, bool)

    def call_host(bad, operands):
        # Under vmap both branches run; lanes come together, along leading axes that are 1 for arrays without lanes.
        return jax.pure_callback(on_host, jax.ShapeDtypeStruct((), bool), bad, *operands, vmap_method="expand_dims")

    bad = mark(bad)
    return jax.lax.cond(bad, call_host, lambda *_: jnp.zeros((), bool), bad, operands)


def _is_key(leaf) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
