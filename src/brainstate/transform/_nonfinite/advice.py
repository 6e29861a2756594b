"""The table of remedies: the likely cause and the usual repair, for an operation that made NaN or an infinity.

A remedy is one row. `remedy_for` goes through `BACKWARD` in the backward pass, `REAL` for operations on real numbers,
and `ANY`, and returns the first row that applies; so a row stands before those that are more general. To add one: write
the row, and plant the fault in the tests. A condition gets the `Origin`, and its operands where the result is not
finite.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .search import Origin

__all__ = ["ANY", "BACKWARD", "REAL", "Remedy", "describe_array", "remedy_for"]


class Remedy(NamedTuple):
    """A row: the names of primitives (none: all), the cause, the repair, and the condition under which it applies.

    The texts may hold ``{name}``, the primitive, and ``{called}``, the library function that the user called.
    """

    primitives: str
    cause: str
    repair: str
    applies: Callable[[Origin, list], Any] = lambda origin, at: True


# ------------------------------------------------------------------------------------------ conditions


_GROWING = "mul add add_any sub dot_general conv_general_dilated reduce_sum cumsum scatter-add"


def _overflows(origin, at) -> bool:
    """Tell whether a product or a sum of finite numbers is not finite: it was too large."""
    return origin.primitive in _GROWING.split() and all(np.isfinite(x).all() for x in at if x.dtype.kind in "fc")


def _is_rooted(origin) -> bool:
    return "sqrt" in origin.makers


def _is_norm(origin, at) -> bool:
    return origin.where.called == "norm"


def _divides_zero(origin, at) -> bool:
    """Tell whether a cotangent of zero is divided by zero."""
    return origin.kind == "NaN" and all((x == 0).any() for x in at)


def _divides_by_zero(origin, at) -> bool:
    return (at[1] == 0).any()


def _has_infinity(origin, at) -> bool:
    return any(np.isinf(x).any() for x in origin.operands if x.dtype.kind in "fcV")


# ------------------------------------------------------------------------------------------ the table


_EPS = "keep away from there: add a small number before, as in jnp.sqrt(x + eps)"
_INFINITE = "the derivative of {called} is infinite at the edge of its domain"
_TRAP = (
    "the derivative here is infinite, and it is multiplied by zero: the value is masked later (jnp.where and the "
    "like), or nothing goes this way. Zero times infinity is NaN",
    "make the operand safe before it is used: jnp.where(x > 0, x, 1.0), in addition to the mask on the result",
)
_NORM = (
    "the derivative of a root is infinite at zero, and times zero it is NaN: a norm, or a sum of squares, of zero",
    "add a small number under the root, or replace the zero before: x = jnp.where(is_zero, 1.0, x)",
)
_POSITIVE = "keep the operand positive: jnp.log(x + eps), or jnp.maximum(x, eps)"
_DIVISOR = "make the divisor safe before: x / jnp.where(y == 0, 1.0, y), or y + eps"

BACKWARD = [
    Remedy(
        "",
        "the derivative grows on its way back, as from step to step of a loop, until it is too large for its dtype",
        "clip it on the way, begin with smaller weights, go back fewer steps, or use a wider dtype",
        _overflows,
    ),
    Remedy("", *_NORM, _is_norm),
    Remedy("div", *_TRAP, _divides_zero),
    Remedy("", *_TRAP, lambda origin, at: origin.spoilt is not None and origin.direct),
    Remedy("", *_NORM, lambda origin, at: origin.spoilt is not None and _is_rooted(origin)),
    Remedy("", "the derivative of sqrt is infinite at zero", _EPS, lambda origin, at: _is_rooted(origin)),
    Remedy("rsqrt pow integer_pow", _INFINITE, _EPS),
    Remedy("div", _INFINITE, _EPS, _divides_by_zero),
]

REAL = [
    Remedy(
        "log log1p",
        "the logarithm of a negative number",
        "keep the operand positive: jnp.maximum(x, eps), or a softplus",
        lambda origin, at: (at[0] < (0 if origin.primitive == "log" else -1)).any(),
    ),
    Remedy("log log1p", "the logarithm of zero", _POSITIVE),
    Remedy(
        "sqrt rsqrt",
        "the root of a negative number",
        "clip values that rounding made negative: jnp.sqrt(jnp.maximum(x, 0.0))",
        lambda origin, at: (at[0] < 0).any(),
    ),
    Remedy("rsqrt", "one over the root of zero", "add a small number: jax.lax.rsqrt(x + eps)"),
    Remedy(
        "div rem",
        "zero divided by zero",
        _DIVISOR,
        lambda origin, at: origin.kind == "NaN" and (at[0] == 0).any() and (at[1] == 0).any(),
    ),
    Remedy("div rem", "a division by zero", _DIVISOR, _divides_by_zero),
    Remedy(
        "pow integer_pow",
        "a power outside its domain (of zero or of a negative number), or too large",
        "make the base safe before",
    ),
    Remedy(
        "lgamma digamma polygamma",
        "{name} has poles at 0, -1, -2, …",
        "keep the operand positive: jnp.maximum(x, eps)",
        lambda origin, at: (at[-1] <= 0).any(),
    ),
    Remedy(
        "exp exp2 expm1 sinh cosh",
        "{name} overflows: exp is finite up to 11 in float16, 88 in float32, 709 in float64",
        "subtract the maximum first, as jax.nn.softmax and jax.nn.logsumexp do, or clip the operand",
    ),
    Remedy(
        "acos asin atanh acosh erf_inv",
        "{name} outside its domain",
        "clip the operand to the domain, a little inside of it",
    ),
    Remedy(
        "cholesky custom_linear_solve triangular_solve lu eigh svd qr",
        "a matrix that is singular, or not positive definite",
        "add a small multiple of the identity matrix",
    ),
]

ANY = [
    Remedy(
        "shard_map pallas_call pure_callback",
        "something inside {name}, which is looked at as one operation",
        "call the function inside alone",
    ),
    Remedy(
        "mul",
        "zero times infinity",
        "do not multiply by a mask where a value may be infinite: use jnp.where",
        _has_infinity,
    ),
    Remedy(
        "",
        "infinities that cancel (inf - inf)",
        "mask with a large finite number in place of infinity",
        _has_infinity,
    ),
    Remedy(
        "",
        "the result is too large for its dtype",
        "scale the values down, or use a wider dtype",
        lambda origin, at: origin.kind == "Inf" or _overflows(origin, at),
    ),
    Remedy("", "an operation outside its domain", "look at the ranges of the operands"),
]


def remedy_for(origin: Origin) -> tuple[str, str]:
    """Return the likely cause and the usual repair: those of the first row that applies."""
    bad = ~np.isfinite(origin.result)
    at = [x[bad] if x.shape == bad.shape else x.ravel() for x in origin.operands]  # as far as they line up with it
    real = not (at and np.iscomplexobj(at[0]))
    rows = [*(BACKWARD if origin.phase == "backward" else ()), *(REAL if real else ()), *ANY]
    found = next(row for row in rows if _applies(row, origin, at))
    names = {"name": origin.primitive, "called": origin.where.called or "this function"}
    return found.cause.format(**names), found.repair.format(**names)


def _applies(row, origin, at) -> bool:
    return (not row.primitives or origin.primitive in row.primitives.split()) and bool(row.applies(origin, at))


# ------------------------------------------------------------------------------------------ an array in words


def describe_array(array: Any) -> str:
    """Return dtype, shape and range of ``array``, and how many entries are not finite."""
    array = np.asarray(array)
    text = f"{array.dtype.name}[{','.join(map(str, array.shape))}]"
    if array.dtype.kind in "bO" or not array.size:
        return text
    if np.iscomplexobj(array):
        return f"{text} of size up to {np.max(np.abs(array)):.4g}"
    numbers = array.astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    parts = []
    if finite.size:
        low, high = finite.min(), finite.max()
        parts.append(f"{low:.4g}" if low == high else f"{low:.4g} .. {high:.4g}")
    for name, count in (("NaN", np.isnan(numbers).sum()), ("Inf", np.isinf(numbers).sum())):
        if count:
            parts.append(f"{count} {name}" if numbers.size > 1 else name)
    return f"{text}: {', '.join(parts)}"
