"""``vjp`` and ``jvp``: one product with the Jacobian, by the same pure function as every gradient.

Both run the function once, at call time, and commit its writes then; the pullback that ``vjp`` returns may be called
any number of times. It is a pytree of its residuals, as JAX's is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ..._arrays import differentiable, layout, tangent_type
from ..._errors import StateTypeError, StateValueError, a_type
from ..._functions import boundary
from ..._seam.scope import commit
from .._nonfinite.check import DerivativeCheck
from .._nonfinite.linear_maps import LinearMap, LinearMapCheck
from .pure_function import PureFunction, check_argnums, from_front

__all__ = ["all_positions", "direction", "jvp", "vjp"]


@boundary
def vjp(
    fun: Callable,
    *primals: Any,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = 0,
    has_aux: bool = False,
    debug_nan: bool = False,
) -> tuple:
    """Evaluate ``fun`` and return its pullback, with respect to States, arguments, or both.

    Parameters
    ----------
    fun : callable
        A function of ``primals``; it returns a pytree of arrays, or ``(output, aux)`` with ``has_aux``.
    *primals : pytree
        The arguments.
    grad_states : State, Module, (Module, filter), or pytree of these, optional
        The States to differentiate; see `GradientTransform`.
    argnums : int or sequence of int, or None
        The arguments to differentiate; negative positions count from the end. By default the first, and none if there
        are no arguments: ``vjp(fun, grad_states=w)``. None: States only.
    has_aux : bool
        Whether the function returns auxiliary data.
    debug_nan : bool
        As in `GradientTransform`, for the value at once and for each product of the pullback when it is made. The
        function runs a second time, abstractly.

    Returns
    -------
    tuple
        ``(out, pull)`` or ``(out, pull, aux)``. ``pull(cotangent of out)`` returns ``G`` of the table in
        `GradientTransform`: ``(state cotangents, argument cotangents)``, or the one that is differentiated. The
        cotangent of an integer argument has dtype float0. ``pull`` is a pytree of arrays: it can be returned by a
        compiled or mapped function, and be passed to one.

    Notes
    -----
    ``jax.vjp(fun, x, y)`` is with respect to all arguments and its pullback returns a tuple; here that is
    ``argnums=(0, 1)``, and without ``argnums`` ``pull`` returns the cotangent of ``x`` alone.

    Raises
    ------
    StateValueError
        For an argument out of range or named twice, a State that is not used, or nothing to differentiate.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> w = brainstate.ParamState(jnp.array([1.0, 2.0]))
    >>> out, pull = brainstate.transform.vjp(lambda x: w.value * x, 3.0, grad_states=w)
    >>> state_ct, arg_ct = pull(jnp.array([1.0, 1.0]))
    >>> out.tolist(), state_ct.tolist(), float(arg_ct)
    ([3.0, 6.0], [3.0, 3.0], 3.0)
    """
    numbers = check_argnums(argnums)
    if numbers == 0 and not primals and grad_states is not None:  # the default, for a function without arguments
        numbers = None
    if grad_states is None and numbers in (None, ()):
        raise StateValueError("vjp: neither grad_states nor argnums is given, there is nothing to differentiate.")
    try:
        numbers = from_front(numbers, len(primals))
    except StateTypeError as error:
        raise StateValueError(str(error)) from None
    target = PureFunction(fun, "vjp", grad_states, numbers, has_aux=has_aux, allow_int="arguments")

    def derive(*primals):
        diff, call, rest = target.open(primals, {})
        out, pull, carried = jax.vjp(lambda d: target.pure(d, call, *rest), diff, has_aux=True)
        _, aux, writes = carried.tree()
        commit(writes)
        return (Partial(_pull_back, pull),), out, aux

    def parts(pull, out):
        return [LinearMap(pull, jax.tree.map(_cotangent, out), target.inputs)]

    check = LinearMapCheck(derive, repr(target), vector_name="the cotangent", parts=parts)
    (pull,), out, aux = check.run(primals, {}) if debug_nan else derive(*primals)
    return (out, pull, aux) if has_aux else (out, pull)


@boundary
def _pull_back(pull, cotangent):
    """Return the cotangents of the differentiated values for a cotangent of the output."""
    return pull(cotangent)[0]


def _cotangent(leaf):
    """Return an example of the cotangent of an output; only its type matters."""
    return leaf if differentiable(leaf) else np.zeros(jnp.shape(leaf), jax.dtypes.float0)


def _check_tangents(name, what, primals, tangents) -> None:
    wanted, given = jax.tree.structure(primals), jax.tree.structure(tangents)
    if wanted != given:
        raise StateValueError(
            f"{name}: {what} has the structure {given}, and the primals have {wanted}: give one tangent for each array."
        )
    for (path, primal), tangent in zip(
        jax.tree_util.tree_leaves_with_path(primals), jax.tree.leaves(tangents), strict=True
    ):
        wanted, given = layout(tangent_type(primal)), layout(tangent)
        if wanted != given:
            fix = "a tangent has the shape and dtype of its array"
            if not differentiable(primal):
                fix = f"its tangent is {wanted}, np.zeros({jnp.shape(primal)}, jax.dtypes.float0)"
            raise StateValueError(
                f"{name}: {what}{jax.tree_util.keystr(path)} is {given}, and its primal is {layout(primal)}: {fix}."
            )


def direction(name, what, diff, along, grad_states, state_along) -> Any:
    """Return the tangent of ``diff``, made of the tangents of arguments and States; refuse tangents that do not fit.

    ``what`` is the name of the parameter with those of the arguments; the other one has the prefix ``state_``.
    """
    _check_sequence(name, what, along)
    if (grad_states is None) != (state_along is None):
        raise StateValueError(f"{name}: grad_states and state_{what} belong together, give both or neither.")
    if grad_states is None:
        _check_tangents(name, what, diff, tuple(along))
        return tuple(along)
    _check_tangents(name, f"state_{what}", diff[0], state_along)
    _check_tangents(name, what, diff[1], tuple(along))
    return state_along, tuple(along)


def all_positions(name, primals) -> tuple:
    """Return the positions of all ``primals``."""
    _check_sequence(name, "primals", primals)
    return tuple(range(len(primals)))


def _check_sequence(name, what, value) -> None:
    if not isinstance(value, tuple | list):
        raise StateTypeError(f"{name}: {what} is {a_type(value)}; give a tuple or list, one entry an argument.")


@boundary
def jvp(
    fun: Callable,
    primals: tuple | list = (),
    tangents: tuple | list = (),
    *,
    grad_states: Any = None,
    state_tangents: Any = None,
    has_aux: bool = False,
    debug_nan: bool = False,
) -> tuple:
    """Evaluate ``fun`` and its derivative along tangents of the arguments and of States.

    Parameters
    ----------
    fun : callable
        A function of ``primals``; it returns a pytree of arrays, or ``(output, aux)`` with ``has_aux``.
    primals, tangents : tuple or list
        The arguments, and a tangent like each of them, of dtype float0 for integers. Both may be left out if States
        are differentiated.
    grad_states : State, Module, (Module, filter), or pytree of these, optional
        The States that have tangents; see `GradientTransform`.
    state_tangents : pytree, optional
        A tangent for each, in the container of ``grad_states`` (None where a leaf is not differentiable).
    has_aux : bool
        Whether the function returns auxiliary data.
    debug_nan : bool
        As in `GradientTransform`.

    Returns
    -------
    tuple
        ``(out, tangent of out)`` or ``(out, tangent of out, aux)``.

    Raises
    ------
    StateTypeError
        If ``primals`` or ``tangents`` is not a tuple or list.
    StateValueError
        If tangents are missing, or have another structure, shape or dtype than their primals.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> w = brainstate.ParamState(jnp.array([1.0, 2.0]))
    >>> out, tangent = brainstate.transform.jvp(
    ...     lambda x: w.value * x, (3.0,), (1.0,), grad_states=w, state_tangents=jnp.array([1.0, 0.0])
    ... )
    >>> out.tolist(), tangent.tolist()
    ([3.0, 6.0], [4.0, 2.0])
    """
    target = PureFunction(
        fun, "jvp", grad_states, all_positions("jvp", primals), has_aux=has_aux, allow_int="arguments"
    )

    def derive(primals, tangents, state_tangents):
        diff, call, rest = target.open(tuple(primals), {})
        along = direction("jvp", "tangents", diff, tangents, grad_states, state_tangents)
        out, tangent, carried = jax.jvp(lambda d: target.pure(d, call, *rest), (diff,), (along,), has_aux=True)
        _, aux, writes = carried.tree()
        commit(writes)
        return tangent, out, aux

    inputs = {"primals": primals, "tangents": tangents, "state_tangents": state_tangents}
    tangent, out, aux = DerivativeCheck(derive, repr(target)).run((), inputs) if debug_nan else derive(**inputs)
    return (out, tangent, aux) if has_aux else (out, tangent)
