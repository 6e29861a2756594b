"""``fori_loop`` and ``associative_scan``: loops over a range and over an associative operation, with States."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import valid_jaxtype

from ..._arrays import layout
from ..._compat import jit_disabled
from ..._errors import StateTypeError, StateValueError
from ..._functions import boundary, check_function, named_after
from ..._seam.scope import Scope, is_tracer, refuse_states, run
from .loops import named_scan, named_while

__all__ = ["associative_scan", "fori_loop"]


def _bounds(lower, upper):
    """Return the bounds as they are, and the dtype that the index of a loop between them has."""
    for name, bound in (("lower", lower), ("upper", upper)):
        if not valid_jaxtype(bound) or jnp.ndim(bound) or not jnp.issubdtype(jax.typeof(bound).dtype, jnp.integer):
            raise StateTypeError(f"fori_loop: {name} is {layout(bound)}, an integer scalar is needed.")
    types = jax.typeof(lower), jax.typeof(upper)
    strong = {t.dtype for t in types if not t.weak_type} or {t.dtype for t in types}
    if len(strong) > 1 or not all(jnp.issubdtype(t.dtype, jnp.signedinteger) or t.dtype in strong for t in types):
        raise StateTypeError(
            f"fori_loop: lower is {layout(types[0])} and upper is {layout(types[1])}: give both one dtype."
        )
    return strong.pop()


@boundary
def fori_loop(lower: Any, upper: Any, body_fun: Callable, init_val: Any, *, unroll: int | bool | None = None) -> Any:
    """Repeat ``body_fun(i, val)`` for i from ``lower`` to ``upper - 1``: ``jax.lax.fori_loop`` that carries States.

    Parameters
    ----------
    lower, upper : int scalars
        The range. Where both are known it is a `scan`, which has a reverse mode; else a `while_loop`, which has none.
    body_fun : callable
        ``body_fun(i, val) -> val``; it may read and write States.
    init_val : pytree
        The first value.
    unroll : int or bool, optional
        As in `scan`; only where both bounds are known.

    Returns
    -------
    pytree
        The last value.

    Raises
    ------
    StateTypeError
        If a bound is not an integer scalar, or their dtypes differ; and as `scan`.
    StateValueError
        If ``unroll`` is given and a bound is not known.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> total = brainstate.State(jnp.array(0))
    >>> def body(i, x):
    ...     total.value += i
    ...     return 2.0 * x
    >>> float(brainstate.transform.fori_loop(0, 5, body, 1.0)), int(total.value)
    (32.0, 10)
    """
    check_function("fori_loop takes a function", body_fun)
    refuse_states(init_val, "arguments of fori_loop")
    dtype = _bounds(lower, upper)
    if not is_tracer(lower) and not is_tracer(upper):
        length = max(int(upper) - int(lower), 0)
        if jit_disabled() and not length:
            return init_val

        def step(carry, _):
            return (carry[0] + 1, body_fun(*carry)), None

        step = named_after(step, body_fun)
        start, unroll = (int(lower), init_val), 1 if unroll is None else unroll
        loop = partial(jax.lax.scan, unroll=unroll)
        return named_scan("fori_loop", step, start, None, length, False, loop)[0][1]
    if unroll not in (None, False, 1):
        raise StateValueError(
            f"fori_loop: unroll={unroll!r}, and a bound is a traced value. Unroll only a loop whose range is known."
        )

    def next_carry(carry):
        i, end, val = carry
        return i + 1, end, body_fun(i, val)

    start = jnp.asarray(lower, dtype), jnp.asarray(upper, dtype), init_val
    return named_while("fori_loop", lambda carry: carry[0] < carry[1], named_after(next_carry, body_fun), start)[2]


@boundary
def associative_scan(fn: Callable, elems: Any, reverse: bool = False, axis: int = 0) -> Any:
    """Combine all prefixes by an associative function, in parallel: ``jax.lax.associative_scan`` with States.

    Parameters
    ----------
    fn : callable
        ``fn(a, b) -> c``, associative, on slices with any number of elements along ``axis``. It may read States, not
        write them: how often it runs is not defined. For the same reason it cannot draw.
    elems : pytree of arrays
        The elements to combine, along ``axis``.
    reverse : bool
        Whether to combine from the end.
    axis : int
        The axis.

    Returns
    -------
    pytree
        As ``elems``: element k along the axis combines the first k + 1.

    Raises
    ------
    StateValueError
        If ``fn`` writes a State, draws, or leaves one behind.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> top = brainstate.State(jnp.array(4.0))
    >>> bounded = lambda a, b: jnp.minimum(a + b, top.value)
    >>> brainstate.transform.associative_scan(bounded, jnp.array([1.0, 2.0, 3.0])).tolist()
    [1.0, 3.0, 4.0]
    """
    check_function("associative_scan takes a function", fn)
    refuse_states(elems, "arguments of associative_scan")

    def combine(a, b):
        out, writes = run(Scope("associative_scan"), fn, a, b)
        for state in writes.states:
            raise StateValueError(
                f"{state.describe()} is written in associative_scan, whose function runs an undefined number of times: "
                f"it may only read States. Write it outside, or use scan."
            )
        return out

    return jax.lax.associative_scan(named_after(combine, fn), elems, reverse=reverse, axis=axis)
