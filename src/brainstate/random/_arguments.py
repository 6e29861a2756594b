"""The arguments of a sampler before a key is drawn: they are looked at, checked, cast and broadcast.

Rules are checked where values are known; a tracer is never looked at. Casting and broadcasting are explicit,
so they hold under ``jax_numpy_dtype_promotion='strict'`` and ``jax_numpy_rank_promotion='raise'``. The
functions take the name of the sampler first, for their messages.
"""

import operator
import re
import warnings
from functools import cache, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._errors import StateTypeError, StateValueError, a_type
from .._state import State

__all__ = [
    "broadcast",
    "cast",
    "check_fits",
    "check_rule",
    "concrete",
    "default_dtype",
    "to_array",
    "to_axis",
    "to_dtype",
    "to_ends",
    "to_shape",
    "to_size",
    "to_vectors",
    "to_whole",
]


def to_array(function, name, value) -> Any:
    """Return a parameter as an array of numbers; ``None`` stays ``None``."""
    if value is None or isinstance(value, jax.Array):
        return value
    if isinstance(value, State):
        raise StateTypeError(
            f"{function}(): {name} is {value.describe()}, not the value that it holds: write `.value`."
        )
    array = jnp.asarray(value) if isinstance(value, list | tuple) else np.asarray(value)
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise StateTypeError(f"{function}(): {name} must be a number or an array of numbers, got {a_type(value)}.")
    return array


def to_size(function, size):
    """Return ``size`` as a tuple of ints; ``None`` stays ``None``."""
    if size is None:
        return None
    try:
        shape = tuple(operator.index(n) for n in (size if isinstance(size, list | tuple) else (size,)))
    except TypeError:
        raise StateTypeError(f"{function}(): size must be an int or a tuple of ints, got {size!r}.") from None
    if any(n < 0 for n in shape):
        raise StateValueError(f"{function}(): size must not be negative, got {size!r}.")
    return shape


def to_axis(function, axis, ndim):
    """Return ``axis`` counted from the front; the array must have it."""
    if not isinstance(axis, int | np.integer) or not -ndim <= axis < ndim:
        raise StateValueError(f"{function}(): axis must be an int from {-ndim} to {ndim - 1}, got {axis!r}.")
    return int(axis) % ndim


def to_vectors(function, name, value, axes=1):
    """Return ``value``, which must have at least this many axes."""
    if value.ndim < axes:
        raise StateValueError(f"{function}(): {name} must have {axes} axes or more, got the shape {value.shape}.")
    return value


# ------------------------------------------------------------------------------------------------------ rules


def concrete(value) -> bool:
    """Tell whether the numbers in ``value`` can be looked at now."""
    known = value is not None and not isinstance(value, Tracer)
    return known and getattr(value, "is_fully_addressable", True)


_ORDERS = {"<": np.less, "<=": np.less_equal, "==": np.equal}


def check_rule(function, rule, values) -> None:
    """Raise unless ``rule``, a chain such as ``0 <= p <= 1``, ``n <= a + b`` or ``n == floor(n)``, holds.

    A term may also be the ``sum(p)`` or ``max(p)`` along the last axis.
    """
    terms, names = _parse_rule(rule)
    if not all(concrete(values[name]) for name in names):
        return
    sides = [_term_value(term, values) for term in terms[::2]]
    for left, order, right in zip(sides, terms[1::2], sides[1:], strict=False):
        holds = _ORDERS[order](left, right)
        if not np.all(holds):
            found = ", ".join(f"{name}={_find_offender(values[name], holds)}" for name in names)
            rounded = any(np.any(_as_jax_value(values[name]) != values[name]) for name in names)
            hint = f" in {default_dtype(float)}" if rounded else ""
            raise StateValueError(f"{function}(): the rule is {rule}{hint}, got {found}.")


@cache
def _parse_rule(rule):
    names = dict.fromkeys(re.findall(r"\b(?!sum\b|max\b|floor\b|inf\b)[a-z]\w*", rule))
    return re.split(r" (<=|<|==) ", rule), tuple(names)


def _term_value(term, values):
    name, _, inner = term.rstrip(")").partition("(")
    if inner:
        value = _as_jax_value(values[inner])
        return np.floor(value) if name == "floor" else getattr(np, name)(value, -1)
    if " + " in term:  # of whole numbers, which could overflow
        return reduce(np.add, [np.asarray(values[part], float) for part in term.split(" + ")])
    return _as_jax_value(values[term]) if term in values else float(term)


def _as_jax_value(value):
    """Return a value as JAX uses it: a number next to the end of its range may be rounded to that end."""
    value = np.asarray(value)
    with np.errstate(over="ignore"):
        return value.astype(default_dtype(value.dtype)) if value.dtype.kind in "fc" else value


def check_fits(function, bound, values, dtype) -> None:
    """Raise if the largest numbers to be expected, of which ``bound(np, *values)`` tells, do not fit ``dtype``."""
    if not all(map(concrete, values.values())):
        return
    top = np.max(bound(np, *(np.asarray(value, float) for value in values.values())), initial=0)
    if top > jnp.iinfo(dtype).max:
        shown = ", ".join(f"{name}={np.array2string(np.asarray(v), threshold=8)}" for name, v in values.items())
        raise StateValueError(
            f"{function}(): numbers as large as {top:.2g} are to be expected with {shown}, and {dtype} ends at "
            f"{jnp.iinfo(dtype).max}. Choose other parameters or a wider dtype (int64 needs jax_enable_x64)."
        )


def _find_offender(value, holds):
    value = np.asarray(value)
    if value.ndim == 0:
        return value.item()
    if value.shape != np.shape(holds):
        return np.array2string(value, threshold=8)
    where = np.argwhere(~holds)[0].tolist()
    return f"{value[tuple(where)].item()} at index {where if len(where) > 1 else where[0]}"


# ------------------------------------------------------------------------------------ dtypes and broadcasting


def default_dtype(kind):
    """Return the dtype that JAX uses at present for the Python type ``kind``."""
    return jax.dtypes.canonicalize_dtype(kind)


def to_dtype(function, dtype, default, kind):
    """Return the dtype that JAX really uses for ``dtype``; it must be of ``kind``."""
    if dtype is None:
        return default_dtype(default)
    wanted = default_dtype(dtype) if dtype in (bool, int, float, complex) else np.dtype(dtype)
    dtype = default_dtype(wanted)
    if dtype != wanted:
        warnings.warn(f"{function}(): {wanted} is truncated to {dtype}; set jax_enable_x64 for it.", stacklevel=6)
    if not jnp.issubdtype(dtype, kind):
        raise StateTypeError(f"{function}(): dtype must be {kind.__name__}, got {dtype}.")
    return dtype


def cast(function, name, value, dtype) -> Any:
    """Cast a parameter, but not from floating to integer, from complex to real, or out of range."""
    if value is None or value.dtype == dtype:
        return value
    for kind in (jnp.inexact, jnp.complexfloating):
        if jnp.issubdtype(value.dtype, kind) and not jnp.issubdtype(dtype, kind):
            raise StateTypeError(f"{function}(): {name} has dtype {value.dtype}, which {dtype} cannot hold: cast it.")
    new = value.astype(dtype)
    if jnp.issubdtype(dtype, jnp.integer) and concrete(value) and np.any(np.asarray(new) != np.asarray(value)):
        raise StateValueError(f"{function}(): {name}={value} is out of the range of {dtype}.")
    return new


def to_whole(function, name, value, dtype) -> Any:
    """Cast a number of things to an integer type; a traced one that is not whole, or too large, becomes -1."""
    if jnp.issubdtype(value.dtype, jnp.integer) or value.dtype == bool:
        return cast(function, name, value, dtype)
    if concrete(value) and np.all(np.abs(value) < 2.0**63):
        return cast(function, name, np.asarray(value).astype(np.int64), dtype)
    whole = (value == jnp.floor(value)) & (value >= 0) & (value < 2.0 ** (jnp.iinfo(dtype).bits - 1))
    return jnp.where(whole, value, -1).astype(dtype)


def to_ends(function, low, high, dtype, inclusive):
    """Return the ends of a range of integers of ``dtype``, in a type of 32 bits or more.

    The upper end that is not included may be one more than the type holds: then the last number is known instead.
    """
    info = jnp.iinfo(dtype)
    for name, value, most in (("low", low, info.max), ("high", high, info.max + (not inclusive))):
        if concrete(value) and (np.any(np.asarray(value) < info.min) or np.any(np.asarray(value) > most)):
            raise StateValueError(f"{function}(): {name}={value} is out of the range of {dtype}.")
    width = dtype if info.bits >= 32 else jnp.dtype(jnp.int32)
    known = concrete(high)
    last = np.asarray(np.asarray(high) - 1) if known and not inclusive else high
    return cast(function, "low", low, width), cast(function, "high", last, width), known or inclusive


def to_shape(function, size, shapes):
    """Return the shape of the result: ``size``, which the ``shapes`` must fit, or the shape that these broadcast to."""
    try:
        shape = np.broadcast_shapes(*shapes)
    except ValueError:
        raise StateValueError(f"{function}(): parameters of shapes {shapes} do not broadcast.") from None
    if size is None:
        return shape
    try:
        fits = np.broadcast_shapes(size, shape) == size
    except ValueError:
        fits = False
    if not fits:
        raise StateValueError(f"{function}(): size={size} does not fit the shape {shape} of the parameters.")
    return size


def broadcast(function, parameters, size, dtype) -> tuple[list[Any], tuple[int, ...]]:
    """Cast parameters to ``dtype``, if any, and all but scalars to the shape of the result; return values, shape."""
    values = [cast(function, name, v, dtype) if dtype else v for name, v in parameters.items()]
    shape = to_shape(function, size, [v.shape for v in values if v is not None])
    return [v if v is None or v.shape in ((), shape) else jnp.broadcast_to(v, shape) for v in values], shape
