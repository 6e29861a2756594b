"""The likely cause of a NaN or an infinity at an operation, and the usual repair.

``REMEDIES`` is the table by primitive; derivatives and overflows, which no single primitive shows, are read off around
it.
"""

from collections.abc import Callable

import numpy as np

from .search import Origin

__all__ = ["likely", "shown"]

_EPS = "keep away from there: add a small number before, as in jnp.sqrt(x + eps)"
_SAFE = "make the operand safe before it is used: jnp.where(x > 0, x, 1.0), besides the mask on the result"
_TRAP = (
    "the derivative here is infinite, and it is multiplied by zero: the value is masked later (jnp.where and the "
    "like), or nothing goes this way. Zero times infinity is NaN"
)
_EXPLODES = (
    "the derivative grows on its way back, as from step to step of a loop, until it is too large for its dtype",
    "clip it on the way, begin with smaller weights, go back fewer steps, or use a wider dtype",
)
_GROWING = {
    "mul",
    "add",
    "add_any",
    "sub",
    "dot_general",
    "conv_general_dilated",
    "reduce_sum",
    "cumsum",
    "scatter-add",
}
_NORM = (
    "the derivative of a root is infinite at zero, and times zero it is NaN: a norm, or a sum of squares, of zero",
    "add a small number under the root, or replace the zero before: x = jnp.where(is_zero, 1.0, x)",
)


def shown(array) -> str:
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


def likely(origin: Origin) -> tuple[str, str]:
    """Return the likely cause and the usual repair."""
    if origin.phase == "backward" and (found := _of_derivative(origin)):
        return found
    return _of_operation(origin) or _elsewhere(origin)


def _at_fault(origin) -> list[np.ndarray]:
    """Return the operands where the result is not finite, as far as they line up with it."""
    bad = ~np.isfinite(origin.result)
    return [x[bad] if x.shape == bad.shape else x.ravel() for x in origin.operands]


def _overflows(origin) -> bool:
    """Tell whether what is not finite is a product or sum of finite numbers, which then were too large."""
    return origin.primitive in _GROWING and all(np.isfinite(x).all() for x in _at_fault(origin) if x.dtype.kind in "fc")


def _of_derivative(origin) -> tuple[str, str] | None:
    called, spoilt = origin.where.called or "", origin.spoilt
    at = _at_fault(origin)
    if _overflows(origin):
        return _EXPLODES
    if called == "norm":
        return _NORM
    if origin.primitive == "div" and origin.kind == "NaN" and all((x == 0).any() for x in at):
        return _TRAP, _SAFE  # the cotangent is zero, and so is what it is divided by
    if spoilt is not None and origin.direct:
        return _TRAP, _SAFE
    rooted = "sqrt" in origin.makers
    if rooted and spoilt is not None:
        return _NORM
    if rooted or origin.primitive in ("rsqrt", "pow", "integer_pow") or (origin.primitive == "div" and not at[1].all()):
        edge = "zero" if rooted else "the edge of its domain"
        return f"the derivative of {'sqrt' if rooted else called or 'this function'} is infinite at {edge}", _EPS
    return None


# ------------------------------------------------------------------------------------------ the table of operations


def _logarithm(origin, at):
    edge = -1 if origin.primitive == "log1p" else 0
    if (at[0] < edge).any():
        return "the logarithm of a negative number", "keep the operand positive: jnp.maximum(x, eps), or a softplus"
    return "the logarithm of zero", "keep the operand positive: jnp.log(x + eps), or jnp.maximum(x, eps)"


def _root(origin, at):
    if (at[0] < 0).any():
        return "the root of a negative number", "clip what rounding made negative: jnp.sqrt(jnp.maximum(x, 0.0))"
    if origin.primitive == "rsqrt":
        return "one over the root of zero", "add a small number: jax.lax.rsqrt(x + eps)"
    return None


def _division(origin, at):
    cause = "zero divided by zero" if origin.kind == "NaN" and (at[0] == 0).any() else "a division by zero"
    if (at[1] == 0).any():
        return cause, "make the divisor safe before: x / jnp.where(y == 0, 1.0, y), or y + eps"
    return None


def _power(origin, at):
    return "a power outside its domain (of zero or of a negative number), or too large", "make the base safe before"


def _exponential(origin, at):
    return (
        f"{origin.primitive} overflows: exp is finite up to 11 in float16, 88 in float32, 709 in float64",
        "subtract the maximum first, as jax.nn.softmax and jax.nn.logsumexp do, or clip the operand",
    )


def _domain(origin, at):
    return f"{origin.primitive} outside its domain", "clip the operand to the domain, a little inside of it"


def _singular(origin, at):
    return "a matrix that is singular, or not positive definite", "add a small multiple of the identity matrix"


#: {primitive: remedy(origin, at)}: the likely cause and the usual repair, or None if the operands do not say so; `at`
#: are the operands, real, at the entries where the result is not finite.
REMEDIES: dict[str, Callable[[Origin, list[np.ndarray]], tuple[str, str] | None]] = {
    **dict.fromkeys(("log", "log1p"), _logarithm),
    **dict.fromkeys(("sqrt", "rsqrt"), _root),
    **dict.fromkeys(("div", "rem"), _division),
    **dict.fromkeys(("pow", "integer_pow"), _power),
    **dict.fromkeys(("exp", "exp2", "expm1", "sinh", "cosh"), _exponential),
    **dict.fromkeys(("acos", "asin", "atanh", "acosh", "erf_inv"), _domain),
    **dict.fromkeys(
        ("cholesky", "custom_linear_solve", "triangular_solve", "lu", "eigh", "svd", "qr"),
        _singular,
    ),
}


def _of_operation(origin) -> tuple[str, str] | None:
    at = _at_fault(origin)
    if origin.primitive not in REMEDIES or (at and np.iscomplexobj(at[0])):
        return None
    return REMEDIES[origin.primitive](origin, at)


def _elsewhere(origin) -> tuple[str, str]:
    if origin.primitive in ("shard_map", "pallas_call", "pure_callback"):
        return f"something inside {origin.primitive}, which is looked at as one operation", "call what is inside alone"
    infinite = [np.isinf(x).any() for x in origin.operands if x.dtype.kind in "fcV"]
    if any(infinite):
        if origin.primitive == "mul":
            return "zero times infinity", "do not multiply by a mask where a value may be infinite: use jnp.where"
        return "infinities that cancel (inf - inf)", "mask with a large finite number in place of infinity"
    if origin.kind == "Inf" or _overflows(origin):
        return "the result is too large for its dtype", "scale the values down, or use a wider dtype"
    return "an operation outside its domain", "look at the ranges of the operands"
