"""``laplacian``: the trace of a Hessian, from second derivatives along directions; the Hessian itself is never built.

``vᵀ H v`` is the second derivative of ``t -> f(x + t v)`` at 0, computed by forward over forward mode. The sum over the
unit vectors ``v`` is the trace of ``H``, and so is the mean over random signs, as ``E[v vᵀ] = I`` (Hutchinson 1990).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from ..._arrays import at_least, differentiable, layout
from ..._errors import StateTypeError, StateValueError
from ..._program.interpret import trace_flat
from .._first_order.chunked_jacobians import check_chunk_size, count, unit
from .._first_order.gradients import derivative
from .._random_keys import Estimate, with_key

__all__ = ["laplacian"]


def _laplacian_transform(fun, *, argnums, has_aux, chunk_size, samples, key):
    del argnums, has_aux  # argument 0 with aux, by the contract of GradientTransform

    def laplacian_at(diff, /, *rest, **kwargs):
        leaves, treedef = jax.tree.flatten(diff)
        for leaf in leaves:
            if jnp.iscomplexobj(leaf):
                raise StateTypeError(
                    f"laplacian is with respect to real values, one is {layout(leaf)}: differentiate "
                    f"with respect to its real and imaginary parts."
                )

        def of_leaves(leaves):
            value, aux = fun(treedef.unflatten(leaves), *rest, **kwargs)
            _check_outputs(value)
            return value, aux

        if samples is None:
            return _exact(of_leaves, leaves, chunk_size)
        return with_key("laplacian", key, lambda key: _estimate(of_leaves, leaves, chunk_size, samples, key))

    return laplacian_at


def _check_outputs(value) -> None:
    for path, leaf in jax.tree.leaves_with_path(value):
        if not differentiable(leaf):
            raise StateTypeError(
                f"laplacian: the output{jax.tree_util.keystr(path)} is {layout(leaf)}, and a "
                f"differentiated output must be of a floating type. Return integers as aux."
            )


def _curvature(fun, leaves, along):
    """Return the second derivative of ``t -> fun(leaves + t along)`` at 0, and aux."""

    def slope(leaves):
        _, out, aux = jax.jvp(fun, (leaves,), (along,), has_aux=True)
        return out, aux

    try:
        # The derivative along v of the derivative along v: vᵀ H v for each entry of the output.
        _, out, aux = jax.jvp(slope, (leaves,), (along,), has_aux=True)
    except NotImplementedError as error:
        if "custom_lin" not in str(error):
            raise
        raise StateTypeError(
            "laplacian: the function calls one with a derivative for reverse mode only (custom_vjp), and the Laplacian "
            "goes forward. Give that one a rule with custom_jvp."
        ) from error
    return out, aux


def _trace(fun, leaves):
    """Return ``fun`` as a traced program that a loop may run again, without aux, and the aux of one run."""
    closed, tree = trace_flat(fun, leaves)
    run = jaxpr_as_fun(closed)
    _, aux = tree.unflatten(run(*leaves))
    return lambda leaves: (tree.unflatten(run(*leaves))[0], None), aux


def _exact(fun, leaves, chunk_size):
    size = count(leaves)
    if chunk_size is None:
        # The function itself does not depend on the direction: only the tangents are mapped.
        each = jax.vmap(lambda i: _curvature(fun, leaves, unit(leaves, i)), out_axes=(0, None))
        curvatures, aux = each(jnp.arange(size))
        return _sum(curvatures), aux
    staged, aux = _trace(fun, leaves)
    each = jax.vmap(lambda i: _curvature(staged, leaves, unit(leaves, i))[0])
    # The numbers that fill up the last chunk belong to no entry: `unit` gives zeros, which add nothing.
    chunks = jnp.arange(-(-size // chunk_size) * chunk_size).reshape(-1, chunk_size)
    # The loop adds up, so that no more than one chunk is held; its carry starts as zeros of the right types.
    types = jax.eval_shape(lambda: _sum(each(chunks[:1, 0])))
    start = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), types)
    total, _ = jax.lax.scan(lambda total, i: (jax.tree.map(jnp.add, total, _sum(each(i))), None), start, chunks)
    return total, aux


def _sum(curvatures):
    return jax.tree.map(lambda c: jnp.sum(c, axis=0, dtype=c.dtype), curvatures)


def _estimate(fun, leaves, chunk_size, samples, key):
    def one(fun, key):
        keys = jax.random.split(key, len(leaves))
        signs = [
            jax.random.rademacher(k, jnp.shape(leaf), jax.typeof(leaf).dtype)
            for k, leaf in zip(keys, leaves, strict=True)
        ]
        return _curvature(fun, leaves, signs)

    # All keys are drawn before the loop, so that the estimate does not depend on the size of the chunks.
    keys = jax.random.split(key, samples)
    if chunk_size is None:
        found, aux = jax.vmap(lambda key: one(fun, key), out_axes=(0, None))(keys)
    else:
        staged, aux = _trace(fun, leaves)
        found = jax.lax.map(lambda key: one(staged, key)[0], keys, batch_size=chunk_size)
    mean = jax.tree.map(lambda s: jnp.mean(s, axis=0), found)
    error = jax.tree.map(lambda s: jnp.std(s, axis=0, ddof=1) / math.sqrt(samples), found)
    return Estimate(mean, error), aux


def laplacian(
    fun: Callable | None = None,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = None,
    *,
    has_aux: bool | None = False,
    return_value: bool = False,
    check_states: bool = True,
    chunk_size: int | None = None,
    samples: int | None = None,
    key: Any = None,
    debug_nan: bool = False,
) -> Any:
    """Trace of the Hessian with respect to all selected values: the sum of the unmixed second derivatives.

    Exactly, by a second derivative along each unit vector (forward over forward mode), or as an estimate from random
    directions ``v`` of signs: the mean of ``v . H v`` has the expectation ``trace(H)`` and, over ``n`` samples, the
    variance ``2 (|H|² - |diag(H)|²) / n`` (Hutchinson 1990, "A stochastic estimator of the trace of the influence
    matrix"); it is exact where ``H`` is diagonal. The Hessian is never built. A function with a derivative for reverse
    mode only (``custom_vjp``) cannot be differentiated so.

    Parameters
    ----------
    fun : callable, optional
        The function; it returns an array or a pytree of arrays. Left out: a decorator is returned.
    grad_states, argnums, has_aux, return_value, check_states, debug_nan
        See `GradientTransform`. The differentiated values must be real.
    chunk_size : int, optional
        Number of directions to evaluate at once, one chunk after the other, to bound memory. The function is then
        traced, as in a loop: Python cannot branch on values in it.
    samples : int, optional
        Estimate from this many random directions, from 2 up; without it, exact.
    key : int or key, optional
        Fixes the directions; without it each call draws new ones from ``brainstate.random``.

    Returns
    -------
    GradientTransform
        A function of the arguments of ``fun``. Instead of a gradient it returns the Laplacian of each entry of the
        output, in the structure of the output; with ``samples`` an `Estimate` of two such structures.

    Raises
    ------
    StateTypeError, StateValueError
        If ``samples`` or ``chunk_size`` is out of range, or an input or output of a wrong type.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> float(brainstate.transform.laplacian(lambda x: (x**2).sum())(jnp.ones(5)))
    10.0
    >>> mean, error = brainstate.transform.laplacian(lambda x: x.sum() ** 2, samples=1000, key=0)(jnp.ones(5))
    >>> bool(abs(mean - 10.0) < 4 * error), bool(error < 0.6)
    (True, True)
    """
    check_chunk_size("laplacian", chunk_size)
    at_least("laplacian: samples", samples, 2, "the number of directions", none="the exact sum")
    if key is not None and samples is None:
        raise StateValueError("laplacian: a key is given and no samples: without samples nothing is random.")
    params = {"chunk_size": chunk_size, "samples": samples, "key": key}
    options = {"has_aux": has_aux, "return_value": return_value, "check_states": check_states, "debug_nan": debug_nan}
    return derivative("laplacian", _laplacian_transform, fun, grad_states, argnums, params, **options)
