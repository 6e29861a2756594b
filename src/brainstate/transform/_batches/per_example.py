"""``per_example_grad`` and ``per_example_norms``: the gradient of the loss of each example of a batch.

Both are a derivative of the loss of one example under `vmap`, and follow its rules: States that the examples write
(statistics, counters) need a declaration, each example draws its own random numbers, and the function is staged on one
example. With ``chunk_size`` a loop runs over chunks of lanes. The keys of all lanes are drawn before the loop, and
written values are reduced after it, so that chunks change memory and time only.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..._seam.run_time_errors import original_errors
from .._control.vmap import Mapped
from .._first_order.chunked_jacobians import check_chunk_size
from .._first_order.gradient_transform import GradientTransform
from .._wrapper import or_decorator
from .per_example_norms import check_loss, norms_transform

__all__ = ["per_example_grad", "per_example_norms"]


class _Examples(Mapped):
    """A derivative for each example of a batch, ``chunk_size`` of them at a time."""

    remedy = "give the argument that holds the examples an axis in in_axes, or declare a State in in_states"

    def __init__(self, fn, *, name, chunk_size, **mapping):
        super().__init__(fn, **mapping)
        self._given |= {"name": name, "chunk_size": chunk_size}
        self.name, self.chunk_size = name, chunk_size

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the derivative on all examples and commit its writes."""
        with original_errors():  # outside of `jit` nobody else asks for those of `debug_nan`
            return super().__call__(*args, **kwargs)

    def _lanes(self, lane, out_axes, options):
        if self.chunk_size is None or self.chunk_size >= options["axis_size"]:
            return super()._lanes(lane, out_axes, options)
        return functools.partial(_in_chunks, lane, options["in_axes"], out_axes, options["axis_size"], self.chunk_size)


def _is_none(leaf):
    return leaf is None


def _in_chunks(lane, in_axes, out_axes, count, size, *inputs):
    """Return ``jax.vmap(lane, in_axes, out_axes)(*inputs)``, where ``out_axes`` is 0 and a list of int or None."""
    leaves, treedef = jax.tree.flatten(inputs)
    axes = jax.tree.leaves(jax.tree.broadcast(in_axes, inputs, is_leaf=_is_none), is_leaf=_is_none)
    # Mapped leaves get their axis of lanes in front; all others are shared.
    mapped = {i: jnp.moveaxis(leaves[i], axis, 0) for i, axis in enumerate(axes) if axis is not None}

    def run(parts):
        values = [parts.get(i, leaf) for i, leaf in enumerate(leaves)]
        axes = [0 if i in parts else None for i in range(len(leaves))]
        ends = [None if axis is None else 0 for axis in out_axes[1]]
        return jax.vmap(lambda *v: lane(*treedef.unflatten(v)), in_axes=axes, out_axes=(0, ends))(*values)

    # Full chunks run in one loop; the remainder, if any, in a second, smaller call.
    full = count // size * size
    cut = {i: leaf[:full].reshape(-1, size, *leaf.shape[1:]) for i, leaf in mapped.items()}
    _, (out, new) = jax.lax.scan(lambda _, parts: (None, run(parts)), None, cut)
    rest = run({i: leaf[full:] for i, leaf in mapped.items()}) if full < count else (None, new)

    def join(chunks, last=None):
        chunks = chunks.reshape(full, *chunks.shape[2:])
        return chunks if last is None else jnp.concatenate([chunks, last])

    def join_written(value, last, axis):
        if axis is None:  # the same in all lanes, and so in all chunks
            return jax.tree.map(lambda leaf: leaf[0], value)
        whole = jax.tree.map(join, value, last) if full < count else jax.tree.map(join, value)
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, axis), whole)

    out = jax.tree.map(join, out, rest[0]) if full < count else jax.tree.map(join, out)
    return out, [join_written(*each) for each in zip(new, rest[1], out_axes[1], strict=True)]


def _per_example_grad_transform(fun, *, argnums, has_aux):
    def scalar(*args, **kwargs):
        value, aux = fun(*args, **kwargs)
        check_loss("per_example_grad", value)
        return value, aux

    return jax.grad(scalar, argnums=argnums, has_aux=has_aux)


def _examples(fun, transform, options, mapping) -> Any:
    """Return the map over examples, or a decorator if ``fun`` is None."""
    return or_decorator(
        fun, lambda f: _Examples(GradientTransform(f, transform, name=mapping["name"], **options), **mapping)
    )


def per_example_grad(
    fun: Callable | None = None,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = None,
    *,
    in_axes: Any = 0,
    has_aux: bool | None = False,
    return_value: bool = False,
    check_states: bool = True,
    chunk_size: int | None = None,
    in_states: Any = None,
    out_states: Any = None,
    debug_nan: bool = False,
) -> Any:
    """Gradient of the loss of each example of a batch: `grad` under `vmap`.

    Parameters
    ----------
    fun : callable, optional
        The loss of one example, a function of arguments without the axis of examples. It runs abstractly, once.
        Left out: a decorator is returned.
    grad_states, argnums, has_aux, return_value, check_states, debug_nan
        See `GradientTransform`.
    in_axes : int, None, or sequence of these
        Where the examples are in each argument, as in ``jax.vmap``; None for an argument that all share.
    chunk_size : int, optional
        Number of examples to evaluate at once, one chunk after the other, to bound memory. Nothing else changes:
        random numbers, reductions and results are the same. Without it, all at once.
    in_states, out_states : State, container, Module, type or filter, or {axis: any of these}, optional
        The States of which each example has its own, and the treatment of those that the examples write: see `vmap`.
        Statistics and counters are reduced with ``out_states={'mean': ...}``, ``'sum'`` or ``'last'``.

    Returns
    -------
    callable
        A function of batched arguments (those by keyword along axis 0). It returns the result of `grad`, with the
        examples along axis 0 of each array.

    Raises
    ------
    BatchAxisError
        If examples write different values to a State that is not declared.
    StateTypeError, StateValueError
        If the loss is not a scalar, the numbers of examples disagree, nothing is batched, or ``chunk_size`` is not a
        positive int; and as `GradientTransform`.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> w = brainstate.ParamState(jnp.array([1.0, 2.0]))
    >>> gradient = brainstate.transform.per_example_grad(lambda x, y: (w.value @ x - y) ** 2, w, in_axes=(0, None))
    >>> gradient(jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), 1.0).tolist()
    [[0.0, 0.0], [0.0, 2.0], [4.0, 4.0]]
    """
    check_chunk_size("per_example_grad", chunk_size)
    options = {"grad_states": grad_states, "argnums": argnums}
    options |= {"has_aux": has_aux, "return_value": return_value, "check_states": check_states, "debug_nan": debug_nan}
    mapping = {"name": "per_example_grad", "in_axes": in_axes, "in_states": in_states, "out_states": out_states}
    mapping["chunk_size"] = chunk_size
    return _examples(fun, _per_example_grad_transform, options, mapping)


def per_example_norms(
    fun: Callable | None = None,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = None,
    *,
    in_axes: Any = 0,
    has_aux: bool | None = False,
    return_value: bool = False,
    check_states: bool = True,
    chunk_size: int | None = None,
    in_states: Any = None,
    out_states: Any = None,
    per_leaf: bool = False,
    debug_nan: bool = False,
) -> Any:
    """Norm of the gradient of the loss of each example, without the gradients of linear layers.

    For a weight that is used once, in a product of matrices, the norm is computed from the inputs and the cotangent
    of that product (Goodfellow 2015; Li et al. 2022), which takes memory for activations, not for gradients. It
    is exact for every function; where this is not possible or no cheaper the gradient of that array is computed. For
    products with several rows (sequences) rounding is that of the squared norm: a norm below
    ``sqrt(eps) * |inputs| * |cotangents|`` is not resolved.

    Parameters
    ----------
    fun, grad_states, argnums, in_axes, has_aux, return_value, check_states, chunk_size
        As in `per_example_grad`.
    in_states, out_states, debug_nan
        As in `per_example_grad`.
    per_leaf : bool
        Return a norm for each differentiated array, instead of one over all of them.

    Returns
    -------
    callable
        A function of batched arguments. It returns the 2-norms along axis 0, or with ``per_leaf`` the structure of a
        gradient that holds them; then value and aux, as `per_example_grad` does.

    Raises
    ------
    BatchAxisError, StateTypeError, StateValueError
        As `per_example_grad`.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> w = brainstate.ParamState(jnp.array([3.0, 4.0]))
    >>> norms = brainstate.transform.per_example_norms(lambda x: (w.value * x).sum(), w)
    >>> norms(jnp.array([[3.0, 4.0], [1.0, 0.0]])).tolist()
    [5.0, 1.0]
    """
    check_chunk_size("per_example_norms", chunk_size)
    options = {"grad_states": grad_states, "argnums": argnums}
    options |= {"has_aux": has_aux, "return_value": return_value, "check_states": check_states, "debug_nan": debug_nan}
    mapping = {"name": "per_example_norms", "in_axes": in_axes, "in_states": in_states, "out_states": out_states}
    mapping["chunk_size"] = chunk_size
    options["transform_params"] = {"per_leaf": per_leaf, "name": "per_example_norms"}
    return _examples(fun, norms_transform, options, mapping)
