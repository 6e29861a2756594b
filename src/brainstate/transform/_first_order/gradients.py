"""`grad`, `vector_grad`, Jacobians and the Hessian: `GradientTransform`, each with another JAX transform.

All share one signature: the function, ``grad_states`` and ``argnums`` by position or name, then options by name.
Without a function they return a decorator. Called outside ``jit`` they compile nothing: Python control flow on
concrete values, strings and callables as arguments, and live closures work as under the JAX function.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._arrays import differentiable, is_scalar, shapes_of
from ..._errors import StateTypeError
from .._wrapper import or_decorator
from .chunked_jacobians import check_chunk_size, chunked_jacfwd, chunked_jacrev
from .gradient_transform import GradientTransform

__all__ = [
    "derivative",
    "grad",
    "hessian",
    "jacfwd",
    "jacobian",
    "jacrev",
    "value_and_grad",
    "vector_grad",
]


def derivative(name, transform, fun, grad_states, argnums, params=None, kind=GradientTransform, **options) -> Any:
    """Return the `GradientTransform` of this name, or a decorator if ``fun`` is None."""
    options |= {"name": name, "transform_params": params}
    return or_decorator(fun, lambda fun: kind(fun, transform, grad_states, argnums, **options))


def _grad_transform(fun, *, argnums, has_aux, **params):
    def scalar(*args, **kwargs):
        value, aux = fun(*args, **kwargs)
        if not is_scalar(value):
            raise StateTypeError(
                f"Gradient only defined for scalar-output functions: the output has shape {shapes_of(value)}. Use "
                f"vector_grad to sum over the outputs, or jacrev for all of their gradients."
            )
        return value, aux

    return jax.grad(scalar, argnums=argnums, has_aux=has_aux, **params)


def _vector_grad_transform(fun, *, argnums, has_aux):
    def gradient(diff, /, *rest, **kwargs):
        value, pull, aux = jax.vjp(lambda d: fun(d, *rest, **kwargs), diff, has_aux=has_aux)
        if not any(map(differentiable, jax.tree.leaves(value))):
            raise StateTypeError(
                f"vector_grad sums over outputs of a floating or complex type, and there is none among the outputs "
                f"(shapes {shapes_of(value)}): the gradient would be zero."
            )
        return pull(jax.tree.map(_one, value))[0], aux  # ∇ Σᵢ yᵢ = Jᵀ 1

    return gradient


def _one(leaf):
    """Return a cotangent of ones for an output; that of an integer is zero, of dtype float0."""
    return jnp.ones_like(leaf) if differentiable(leaf) else np.zeros(jnp.shape(leaf), jax.dtypes.float0)


def _jacrev_transform(fun, *, argnums, has_aux, chunk_size, **params):
    if chunk_size is not None:
        return chunked_jacrev(fun, chunk_size=chunk_size, **params)
    return jax.jacrev(fun, argnums=argnums, has_aux=has_aux, **params)


def _jacfwd_transform(fun, *, argnums, has_aux, chunk_size, **params):
    if chunk_size is not None:
        return chunked_jacfwd(fun, chunk_size=chunk_size, **params)
    return jax.jacfwd(fun, argnums=argnums, has_aux=has_aux, **params)


def _hessian_transform(fun, *, argnums, has_aux, chunk_size, **params):
    if chunk_size is not None:
        # Forward over reverse: a column of the Hessian is the derivative of the gradient along a unit vector.
        inner = jax.jacrev(fun, argnums=argnums, has_aux=has_aux, **params)
        return chunked_jacfwd(inner, chunk_size=chunk_size, name="hessian", **params)
    return jax.hessian(fun, argnums=argnums, has_aux=has_aux, **params)


def grad(
    fun: Callable | None = None,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = None,
    *,
    has_aux: bool | None = False,
    return_value: bool = False,
    check_states: bool = True,
    holomorphic: bool = False,
    allow_int: bool = False,
    debug_nan: bool = False,
) -> Any:
    """Gradient of a scalar function with respect to States, arguments, or both: ``jax.grad`` that knows States.

    Parameters
    ----------
    fun : callable, optional
        The function; it returns a scalar, or ``(scalar, aux)`` with ``has_aux``. Left out: a decorator is returned.
    grad_states, argnums, has_aux, return_value, check_states, debug_nan
        See `GradientTransform`, which also has the table of results.
    holomorphic : bool
        Promise that the function is holomorphic, as in ``jax.grad``.
    allow_int : bool
        Accept integer leaves; their gradient has dtype float0, as in ``jax.grad``.

    Returns
    -------
    GradientTransform
        A function of the arguments of ``fun``.

    Raises
    ------
    StateTypeError
        At the call, if the output is not a scalar; and as `GradientTransform`.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> w = brainstate.ParamState(jnp.array([1.0, 2.0]))
    >>> gradient, value = brainstate.transform.grad(lambda x: (w.value * x).sum(), w, return_value=True)(3.0)
    >>> gradient.tolist(), float(value)
    ([3.0, 3.0], 9.0)
    """
    options = {"has_aux": has_aux, "return_value": return_value, "check_states": check_states, "debug_nan": debug_nan}
    params = {"holomorphic": holomorphic, "allow_int": allow_int}
    return derivative("grad", _grad_transform, fun, grad_states, argnums, params, **options)


class _ValueFirst(GradientTransform):
    """A gradient that returns ``(value, G)`` or ``((value, aux), G)``, as ``jax.value_and_grad`` does."""

    def arrange(self, derivative, value, aux):
        return ((value, aux) if self.has_aux else value), derivative


def value_and_grad(
    fun: Callable | None = None,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = None,
    *,
    has_aux: bool | None = False,
    check_states: bool = True,
    holomorphic: bool = False,
    allow_int: bool = False,
    debug_nan: bool = False,
) -> Any:
    """Value of a scalar function and its gradient, in one pass: ``jax.value_and_grad`` that knows States.

    Parameters
    ----------
    fun, grad_states, argnums, has_aux, check_states, holomorphic, allow_int, debug_nan
        As in `grad`.

    Returns
    -------
    GradientTransform
        A function of the arguments of ``fun`` that returns ``(value, G)``, or ``((value, aux), G)`` with ``has_aux``.

    Raises
    ------
    StateTypeError
        At the call, if the output is not a scalar; and as `GradientTransform`.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> w = brainstate.ParamState(jnp.array([1.0, 2.0]))
    >>> value, gradient = brainstate.transform.value_and_grad(lambda x: (w.value * x).sum(), w)(3.0)
    >>> float(value), gradient.tolist()
    (9.0, [3.0, 3.0])
    """
    options = {"has_aux": has_aux, "return_value": True, "check_states": check_states, "debug_nan": debug_nan}
    params = {"holomorphic": holomorphic, "allow_int": allow_int}
    return derivative("value_and_grad", _grad_transform, fun, grad_states, argnums, params, _ValueFirst, **options)


def vector_grad(
    fun: Callable | None = None,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = None,
    *,
    has_aux: bool | None = False,
    return_value: bool = False,
    check_states: bool = True,
    debug_nan: bool = False,
) -> Any:
    """Gradient of the sum of all outputs: one reverse pass with a cotangent of ones.

    Parameters
    ----------
    fun : callable, optional
        The function; it returns an array or a pytree of arrays. Left out: a decorator is returned.
    grad_states, argnums, has_aux, return_value, check_states, debug_nan
        See `GradientTransform`. The value is the whole output.

    Returns
    -------
    GradientTransform
        A function of the arguments of ``fun``.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> brainstate.transform.vector_grad(lambda x: x**2)(jnp.array([1.0, 2.0])).tolist()
    [2.0, 4.0]
    """
    options = {"has_aux": has_aux, "return_value": return_value, "check_states": check_states, "debug_nan": debug_nan}
    return derivative("vector_grad", _vector_grad_transform, fun, grad_states, argnums, **options)


def jacrev(
    fun: Callable | None = None,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = None,
    *,
    has_aux: bool | None = False,
    return_value: bool = False,
    check_states: bool = True,
    holomorphic: bool = False,
    allow_int: bool = False,
    chunk_size: int | None = None,
    debug_nan: bool = False,
) -> Any:
    """Jacobian by reverse mode, one pass per output: the choice for few outputs and many inputs.

    Parameters
    ----------
    fun : callable, optional
        The function; it returns an array or a pytree of arrays. Left out: a decorator is returned.
    grad_states, argnums, has_aux, return_value, check_states, debug_nan
        See `GradientTransform`.
    holomorphic, allow_int : bool
        As in ``jax.jacrev``.
    chunk_size : int, optional
        Number of rows (output entries) to evaluate at once, one chunk after the other, to bound memory. Without it,
        all at once.

    Returns
    -------
    GradientTransform
        A function of the arguments of ``fun``. A leaf of shape ``v`` in ``G`` and an output of shape ``o`` give a
        leaf of shape ``o + v``; for a function that returns a pytree, that pytree with a ``G`` in each leaf.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> w = brainstate.ParamState(jnp.ones((2, 3)), name="w")
    >>> brainstate.transform.jacrev(lambda x: {"y": x @ w.value}, [w])(jnp.ones(2))["y"][0].shape
    (3, 2, 3)
    """
    options = {"has_aux": has_aux, "return_value": return_value, "check_states": check_states, "debug_nan": debug_nan}
    check_chunk_size("jacrev", chunk_size)
    params = {"holomorphic": holomorphic, "allow_int": allow_int, "chunk_size": chunk_size}
    return derivative("jacrev", _jacrev_transform, fun, grad_states, argnums, params, **options)


jacobian = jacrev


def jacfwd(
    fun: Callable | None = None,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = None,
    *,
    has_aux: bool | None = False,
    return_value: bool = False,
    check_states: bool = True,
    holomorphic: bool = False,
    chunk_size: int | None = None,
    debug_nan: bool = False,
) -> Any:
    """Jacobian by forward mode, one pass per input: the choice for many outputs and few inputs.

    Parameters
    ----------
    fun, grad_states, argnums, has_aux, return_value, check_states, holomorphic, debug_nan
        As in `jacrev`.
    chunk_size : int, optional
        Number of columns (entries of the differentiated values) to evaluate at once, one chunk after the other. The
        linearized function is kept meanwhile, as for reverse mode.

    Returns
    -------
    GradientTransform
        As in `jacrev`.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> brainstate.transform.jacfwd(lambda x: x**2)(jnp.array([1.0, 2.0])).tolist()
    [[2.0, 0.0], [0.0, 4.0]]
    """
    check_chunk_size("jacfwd", chunk_size)
    options = {"has_aux": has_aux, "return_value": return_value, "check_states": check_states, "debug_nan": debug_nan}
    params = {"holomorphic": holomorphic, "chunk_size": chunk_size}
    return derivative("jacfwd", _jacfwd_transform, fun, grad_states, argnums, params, **options)


def hessian(
    fun: Callable | None = None,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = None,
    *,
    has_aux: bool | None = False,
    return_value: bool = False,
    check_states: bool = True,
    holomorphic: bool = False,
    chunk_size: int | None = None,
    debug_nan: bool = False,
) -> Any:
    """Matrix of second derivatives, by forward over reverse mode.

    Parameters
    ----------
    fun, grad_states, argnums, has_aux, return_value, check_states, holomorphic, debug_nan
        As in `jacrev`.
    chunk_size : int, optional
        As in `jacfwd`; a column is the product of the Hessian with a unit vector.

    Returns
    -------
    GradientTransform
        A function of the arguments of ``fun``. Its result is a ``G`` that holds a ``G`` instead of each leaf:
        ``H[a][b]`` has shape ``v_a + v_b``. With States and an argument, ``((H_ss, H_sa), (H_as, H_aa))``.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> w = brainstate.ParamState(jnp.array([1.0, 2.0]))
    >>> (ss, sa), (as_, aa) = brainstate.transform.hessian(lambda x: x**2 * (w.value**2).sum(), w, 0)(3.0)
    >>> ss.tolist(), sa.tolist(), as_.tolist(), float(aa)
    ([[18.0, 0.0], [0.0, 18.0]], [12.0, 24.0], [12.0, 24.0], 10.0)
    """
    check_chunk_size("hessian", chunk_size)
    options = {"has_aux": has_aux, "return_value": return_value, "check_states": check_states, "debug_nan": debug_nan}
    params = {"holomorphic": holomorphic, "chunk_size": chunk_size}
    return derivative("hessian", _hessian_transform, fun, grad_states, argnums, params, **options)
