"""From the checked arguments of a call to those of its function of ``jax.random``, one function a kind of sampler.

Rules on more than one argument, or on a dtype, are checked here: whether a shape fits, whether there are
elements enough to draw from, whether a matrix is a covariance, whether a type holds the numbers to be expected.
"""

import math
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._errors import StateValueError
from ._arguments import (
    broadcast,
    cast,
    check_fits,
    check_rule,
    concrete,
    default_dtype,
    to_axis,
    to_dtype,
    to_ends,
    to_shape,
    to_size,
    to_vectors,
    to_whole,
)

__all__ = [
    "as_bernoulli",
    "as_choice",
    "as_count",
    "as_dirichlet",
    "as_integers",
    "as_integers_like",
    "as_like",
    "as_logits",
    "as_multinomial",
    "as_multivariate_normal",
    "as_orthogonal",
    "as_permutation",
    "as_real",
    "as_size",
    "integer_of",
]


def integer_of(dtype):
    """Return the type in which numbers of ``dtype`` are counted."""
    return dtype if jnp.issubdtype(dtype, jnp.integer) else default_dtype(int)


def _check_covariance(function, cov, method, tolerance):
    """Refuse a matrix that is not a covariance up to rounding, and for Cholesky's method a singular one."""
    size = np.abs(cov).max((-2, -1))
    if not np.all(np.isfinite(size) & (np.abs(cov - cov.mT).max((-2, -1)) <= tolerance * size)):
        raise StateValueError(f"{function}(): cov must be symmetric and finite, got {cov}.")
    least = np.linalg.eigvalsh(cov)[..., 0]
    if np.any(least < -tolerance * size):
        raise StateValueError(f"{function}(): cov must not have negative eigenvalues, got {least.min()}.")
    if method == "cholesky" and np.any(least <= tolerance / 100 * size):
        raise StateValueError(
            f"{function}(): cov is singular (its least eigenvalue is {least.min()}): give method='eigh' or 'svd'."
        )


def _to_items(function, name, value) -> Any:
    """Return an array with a first axis, or the int that stands for a range."""
    if value.ndim:
        return value
    if not jnp.issubdtype(value.dtype, jnp.integer) or (concrete(value) and value < 0):
        raise StateValueError(f"{function}(): {name} must be an array with an axis or an int from 0 on, got {value}.")
    return int(value)


def as_real(function, size, dtype, **parameters):
    dtype = to_dtype(function, dtype, float, jnp.inexact)
    values, shape = broadcast(function, parameters, size, dtype)
    return *values, shape, dtype


def as_count(function, size, dtype, whole=(), bound=None, **parameters):
    dtype = to_dtype(function, dtype, int, jnp.number)
    if bound is not None:
        check_fits(function, bound, parameters, integer_of(dtype))
    real, integer = default_dtype(float), default_dtype(int)
    for name, value in parameters.items():
        parameters[name] = (to_whole if name in whole else cast)(
            function, name, value, integer if name in whole else real
        )
    values, shape = broadcast(function, parameters, size, None)
    return *values, shape, dtype


def as_integers(function, low, high, size, dtype, inclusive=False):
    dtype = to_dtype(function, dtype, int, jnp.integer)
    if high is None:
        low, high = np.asarray(int(inclusive)), low
    check_rule(function, "low <= high" if inclusive else "low < high", {"low": low, "high": high})
    low, high, included = to_ends(function, low, high, dtype, inclusive)
    (low, high), shape = broadcast(function, {"low": low, "high": high}, size, None)
    return low, high if included else high - (high > low).astype(high.dtype), shape, dtype


def as_size(function, dn, dtype):
    return to_size(function, dn), to_dtype(function, dtype, float, jnp.inexact)


def as_like(function, input, dtype):
    return np.shape(input), to_dtype(function, dtype, float, jnp.inexact)


def as_integers_like(function, input, low, high, dtype):
    return as_integers(function, low, high, np.shape(input), dtype)


def as_bernoulli(function, p, size):
    (p,), shape = broadcast(function, {"p": p}, size, default_dtype(float))
    return p, shape


def as_logits(function, logits, axis, size):
    axis = to_axis(function, axis, to_vectors(function, "logits", logits).ndim)
    if logits.shape[axis] == 0:
        raise StateValueError(
            f"{function}(): logits of shape {logits.shape} have nothing to draw from along axis {axis}."
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        logits = cast(function, "logits", logits, default_dtype(float))
    if concrete(logits):
        for rule in ("logits < inf", "-inf < max(logits)"):
            check_rule(function, rule, {"logits": np.moveaxis(np.asarray(logits), axis, -1)})
    return logits, axis, to_shape(function, size, [tuple(np.delete(logits.shape, axis).tolist())])


def as_multinomial(function, n, pvals, size, dtype):
    real, dtype = default_dtype(float), to_dtype(function, dtype, int, jnp.number)
    check_fits(function, lambda _, n: n, {"n": n}, integer_of(dtype))
    n = to_whole(function, "n", n, default_dtype(int))
    pvals = cast(function, "pvals", to_vectors(function, "pvals", pvals), real)
    batch = to_shape(function, size, [n.shape, pvals.shape[:-1]])
    return jnp.broadcast_to(n, batch), jnp.broadcast_to(pvals, (*batch, pvals.shape[-1])), dtype


def as_dirichlet(function, alpha, size, dtype):
    dtype = to_dtype(function, dtype, float, jnp.floating)
    alpha = cast(function, "alpha", to_vectors(function, "alpha", alpha), dtype)
    return alpha, to_shape(function, size, [alpha.shape[:-1]]), dtype


def as_multivariate_normal(function, mean, cov, size, method, dtype):
    dtype = to_dtype(function, dtype, float, jnp.floating)
    mean = cast(function, "mean", to_vectors(function, "mean", mean), dtype)
    cov = cast(function, "cov", to_vectors(function, "cov", cov, 2), dtype)
    if method not in ("cholesky", "eigh", "svd"):
        raise StateValueError(f"{function}(): method must be 'cholesky', 'eigh' or 'svd', got {method!r}.")
    if cov.shape[-2:] != 2 * mean.shape[-1:]:
        raise StateValueError(f"{function}(): cov of shape {cov.shape} does not fit a mean of shape {mean.shape}.")
    if concrete(cov) and cov.size:
        _check_covariance(function, np.asarray(cov, float), method, 10 * cov.shape[-1] * float(jnp.finfo(dtype).eps))
    return mean, cov, to_shape(function, size, [mean.shape[:-1], cov.shape[:-2]]), dtype, method


def as_orthogonal(function, n, size, dtype):
    return operator.index(n), size or (), to_dtype(function, dtype, float, jnp.inexact)


def as_choice(function, a, size, replace, p):
    size, a = size or (), _to_items(function, "a", a)
    count, drawn = a.shape[0] if np.ndim(a) else a, math.prod(size)
    if drawn > (count if not replace else count and drawn):
        raise StateValueError(f"{function}(): cannot draw {drawn} of the {count} elements of a, replace={replace}.")
    if p is None:
        return a, size, replace, p
    if p.shape != (count,):
        raise StateValueError(f"{function}(): p must have the shape ({count},), one weight an element, got {p.shape}.")
    narrow = not jnp.issubdtype(p.dtype, jnp.floating) or p.dtype.itemsize < 4
    p = cast(function, "p", p, default_dtype(float if narrow else p.dtype))
    if drawn:
        check_rule(function, "0 < sum(p) < inf", {"p": p})
    if concrete(p) and not replace and drawn > np.count_nonzero(p):
        raise StateValueError(
            f"{function}(): cannot draw {drawn} elements with replace=False: p has {np.count_nonzero(p)} above 0."
        )
    return a, size, replace, p


def as_permutation(function, x, axis, **how):
    x = _to_items(function, "x", x)
    return x, to_axis(function, axis, np.ndim(x) or 1), *how.values()
