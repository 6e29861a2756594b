"""``taylor``: the coefficients of ``t -> f(x + t v)``, by a power series that is pushed through the traced function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..._arrays import at_least, differentiable
from ..._functions import boundary
from ..._program.interpret import trace_flat
from ..._seam.scope import commit
from .._first_order.pure_function import PureFunction
from .._first_order.vjp_jvp import all_positions, direction
from .._nonfinite.check import DerivativeCheck
from .power_series import Series, push_series

__all__ = ["taylor"]


@boundary
def taylor(
    fun: Callable,
    primals: tuple | list = (),
    directions: tuple | list = (),
    order: int | None = None,
    *,
    grad_states: Any = None,
    state_directions: Any = None,
    has_aux: bool = False,
    debug_nan: bool = False,
) -> tuple:
    """Taylor coefficients of ``t -> fun(x + t v)`` at 0, where ``x`` are arguments and States.

    ``fun(x + t v) = value + c[0] t + c[1] t² + …``: coefficient ``k`` is the ``k``-th derivative divided by ``k!``.

    A power series is pushed through the function, once (Griewank and Walther 2008, chapter 13): by the rules of
    ``jax.experimental.jet``, through loops and branches, and by nested derivatives for primitives without a rule, up to
    order 8. The function is traced: Python cannot branch on values in it.

    Parameters
    ----------
    fun : callable
        A function of ``primals``; it returns a pytree of arrays, or ``(output, aux)`` with ``has_aux``.
    primals, directions : tuple or list
        The arguments, and a direction like each of them. Both may be left out if States are differentiated.
    order : int
        The number of coefficients, from 1 up.
    grad_states : State, Module, (Module, filter), or pytree of these, optional
        The States that move; see `GradientTransform`. All others are constants; writes are committed as in a call of
        ``fun``.
    state_directions : pytree, optional
        A direction for each, in the container of ``grad_states`` (None where a leaf is not differentiable).
    has_aux : bool
        Whether the function returns auxiliary data.
    debug_nan : bool
        As in `GradientTransform`.

    Returns
    -------
    tuple
        ``(value, coefficients)`` or ``(value, coefficients, aux)``: a list with the structure of the output for each
        power from 1 to ``order``; None for a leaf that is not differentiable.

    Raises
    ------
    StateTypeError, StateValueError
        If ``order`` is not a positive int, a primitive has no rule and the order is too high for nested derivatives, or
        ``fun`` has a derivative for reverse mode only; and as `jvp`.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> rate = brainstate.ParamState(jnp.array(2.0))
    >>> value, coefficients = brainstate.transform.taylor(lambda t: jnp.exp(rate.value * t), (0.0,), (1.0,), 3)
    >>> [round(float(c), 3) for c in coefficients]
    [2.0, 2.0, 1.333]
    """
    count: int = at_least("taylor: order", order, 1, "the number of coefficients")
    target = PureFunction(fun, "taylor", grad_states, all_positions("taylor", primals), has_aux=has_aux)

    def derive(primals, directions, state_directions):
        diff, call, rest = target.open(tuple(primals), {})
        along = direction("taylor", "directions", diff, directions, grad_states, state_directions)
        leaves, treedef = jax.tree.flatten(diff)
        closed, tree = trace_flat(lambda leaves: target.pure(treedef.unflatten(leaves), call, *rest), leaves)
        series = [
            Series(jnp.asarray(leaf), [jnp.asarray(v), *[jnp.zeros_like(leaf)] * (count - 1)])
            for leaf, v in zip(leaves, jax.tree.leaves(along), strict=True)
        ]
        out = push_series(closed, series, count)
        value, carried = tree.unflatten([x.primal for x in out])
        _, aux, writes = carried.tree()
        commit(writes)
        return [_coefficient(tree, out, k) for k in range(count)], value, aux

    inputs = {"primals": primals, "directions": directions, "state_directions": state_directions}
    terms, value, aux = DerivativeCheck(derive, repr(target)).run((), inputs) if debug_nan else derive(**inputs)
    return (value, terms, aux) if has_aux else (value, terms)


def _coefficient(tree, out, k):
    """Return coefficient ``k`` of the value, from the series of all outputs."""

    # A series without terms is that of a constant.
    def term(x):
        if not differentiable(x.primal):
            return None
        return jnp.zeros_like(x.primal) if x.terms is None else x.terms[k]

    return tree.unflatten([term(x) for x in out])[0]
