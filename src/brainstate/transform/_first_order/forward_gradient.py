"""``fwd_grad``: an unbiased estimate of a gradient from directional derivatives, with no reverse pass.

For ``v`` with independent standard normal entries, ``E[(∇f·v) v] = ∇f`` (Baydin et al. 2022, "Gradients without
backpropagation"). Averaged over ``n`` directions, entry ``i`` has the variance ``(|∇f|² + (∂ᵢf)²) / n``: the estimate
suits few parameters or many directions. A complex entry ``x + iy`` is two real ones: with ``v = a + ib`` the mean of
``(∇f·v) conj(v)`` is ``∂f/∂x - i ∂f/∂y``, as ``jax.grad`` returns it.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..._arrays import at_least, is_real_scalar, scalar_in_words
from ..._errors import StateValueError
from .._random_keys import with_key
from .gradients import derivative

__all__ = ["fwd_grad"]


def _fwd_grad_transform(fun, *, argnums, has_aux, tangent_size, drct_der_clip, key):
    del argnums, has_aux  # argument 0 with aux, by the contract of GradientTransform

    def estimator(diff, /, *rest, **kwargs):
        leaves, treedef = jax.tree.flatten(diff)

        def sample(key):
            keys = jax.random.split(key, len(leaves))
            tangents = [_normal(k, leaf) for k, leaf in zip(keys, leaves, strict=True)]
            primals, directions = (diff,), (treedef.unflatten(tangents),)
            value, slope, aux = jax.jvp(lambda d: fun(d, *rest, **kwargs), primals, directions, has_aux=True)
            if not is_real_scalar(value):
                kind = scalar_in_words(value)
                raise StateValueError(f"fwd_grad needs a real scalar output of a floating type, the output is {kind}.")
            if drct_der_clip is not None:
                slope = jnp.clip(slope, -drct_der_clip, drct_der_clip)
            # One sample of the estimate, (∇f·v) conj(v).
            return [jnp.asarray(slope, t.dtype) * jnp.conj(t) for t in tangents], aux

        def average(key):
            if tangent_size is None:
                return sample(key)
            # The function itself does not depend on the direction: only the tangents are mapped.
            samples, aux = jax.vmap(sample, out_axes=(0, None))(jax.random.split(key, tangent_size))
            return [jnp.mean(s, axis=0) for s in samples], aux

        estimate, aux = with_key("fwd_grad", key, average)
        return treedef.unflatten(estimate), aux

    return estimator


def _normal(key, leaf):
    """Return standard normal numbers like ``leaf``; if complex, each part has variance 1 (JAX gives each 1/2)."""
    normal = jax.random.normal(key, jnp.shape(leaf), jax.typeof(leaf).dtype)
    return normal * jnp.asarray(math.sqrt(2), normal.dtype) if jnp.iscomplexobj(normal) else normal


def fwd_grad(
    fun: Callable | None = None,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = None,
    *,
    has_aux: bool | None = False,
    return_value: bool = False,
    check_states: bool = True,
    tangent_size: int | None = None,
    drct_der_clip: float | None = None,
    key: Any = None,
    debug_nan: bool = False,
) -> Any:
    """Unbiased random estimate of the gradient of a scalar function, by forward mode only.

    The mean of ``(g . v) v`` over ``n`` random directions ``v ~ N(0, I)``, where ``g`` is the gradient. Entry ``i`` has
    the variance ``(|g|**2 + g[i]**2) / n`` (Baydin et al. 2022, "Gradients without backpropagation").

    Parameters
    ----------
    fun : callable, optional
        The function; it returns a real scalar. Left out: a decorator is returned.
    grad_states, argnums, has_aux, return_value, check_states, debug_nan
        See `GradientTransform`. Complex values are differentiated as `grad` does: ``∂f/∂x - i ∂f/∂y``.
    tangent_size : int, optional
        Average over this many random directions, the ``n`` of the variance; without it, one.
    drct_der_clip : float, optional
        Clip each directional derivative to ``[-drct_der_clip, drct_der_clip]`` (the estimate is then biased).
    key : int or key, optional
        Fixes the directions; without it each call draws new ones from ``brainstate.random``.

    Returns
    -------
    GradientTransform
        A function of the arguments of ``fun``.

    Raises
    ------
    StateTypeError, StateValueError
        If ``tangent_size`` is not a positive int, or the output not a scalar.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> estimate = brainstate.transform.fwd_grad(lambda x: (x**2).sum(), tangent_size=4000, key=0)
    >>> bool(jnp.allclose(estimate(jnp.array([1.0, -2.0])), jnp.array([2.0, -4.0]), atol=0.5))
    True
    """
    at_least("fwd_grad: tangent_size", tangent_size, 1, "the number of directions", none="one")
    params = {"tangent_size": tangent_size, "drct_der_clip": drct_der_clip, "key": key}
    options = {"has_aux": has_aux, "return_value": return_value, "check_states": check_states, "debug_nan": debug_nan}
    return derivative("fwd_grad", _fwd_grad_transform, fun, grad_states, argnums, params, **options)
