"""``linearize``: the value of a function and its derivative at one point, a linear map that can be applied many times.

It is the forward-mode counterpart of ``vjp``: the function runs once, at call time, and its writes are committed then.
The linear map is a `LinearOperator`: a function of tangents, a pytree of its residuals, and the Jacobian.
"""

from collections.abc import Callable
from typing import Any

import jax

from ..._functions import boundary
from ..._seam.scope import commit
from .._first_order.pure_function import PureFunction, positions
from .._first_order.vector_space import Outputs, Space
from .linear_operator import LinearOperator, operator_check

__all__ = ["linearize"]


@boundary
def linearize(
    fun: Callable,
    *primals: Any,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = None,
    has_aux: bool = False,
    debug_nan: bool = False,
) -> tuple:
    """Evaluate ``fun`` and return its derivative there as a linear map of State and argument tangents.

    Parameters
    ----------
    fun : callable
        A function of ``primals``; it returns a pytree of arrays, or ``(output, aux)`` with ``has_aux``.
    *primals : pytree
        The arguments.
    grad_states, argnums
        The States and arguments that have tangents; see `GradientTransform`. The tangent of an integer argument has
        dtype float0.
    has_aux : bool
        Whether the function returns auxiliary data.
    debug_nan : bool
        As in `vjp`, for each product with the map or its transpose, of all its methods.

    Returns
    -------
    tuple
        ``(out, J)`` or ``(out, J, aux)``. ``J(tangents)`` returns the tangent of the output; ``tangents`` has the
        structure ``G`` of the table in `GradientTransform`. ``J`` is a `LinearOperator`: ``J.T @ cotangents``,
        ``J.dense()``, ``J["logits", "layer.weight"]``.

    Notes
    -----
    The linear map of ``jax.linearize(fun, x, y)`` takes a tangent for each argument, ``J(dx, dy)``; here that is
    ``argnums=(0, 1)`` and ``J((dx, dy))``, and without ``argnums`` and ``grad_states`` it is ``x`` alone, ``J(dx)``.

    Raises
    ------
    StateTypeError, StateValueError
        As `GradientTransform`; and by ``J``, for tangents of another structure, shape or dtype.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> w = brainstate.ParamState(jnp.array([1.0, 2.0]))
    >>> out, J = brainstate.transform.linearize(lambda x: w.value * x, 3.0, grad_states=w, argnums=0)
    >>> out.tolist(), J((jnp.array([1.0, 0.0]), 1.0)).tolist()
    ([3.0, 6.0], [4.0, 2.0])
    >>> J.dense().tolist()
    [[3.0, 0.0, 1.0], [0.0, 3.0, 2.0]]
    """
    numbers = positions("linearize", grad_states, argnums)
    target = PureFunction(fun, "linearize", grad_states, numbers, has_aux=has_aux, allow_int="arguments")

    def derive(*primals):
        diff, call, rest = target.open(primals, {})
        out, linear, carried = jax.linearize(lambda d: target.pure(d, call, *rest), diff, has_aux=True)
        _, aux, writes = carried.tree()
        commit(writes)
        return (LinearOperator(linear, Space.from_diff(diff, call), Outputs.from_output(out)),), out, aux

    check = operator_check(derive, repr(target), target.inputs)
    (jacobian,), out, aux = check.run(primals, {}) if debug_nan else derive(*primals)
    return (out, jacobian, aux) if has_aux else (out, jacobian)
