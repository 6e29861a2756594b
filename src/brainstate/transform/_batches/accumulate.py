"""``accumulate``: the gradient of a large batch from small ones, one after the other, in constant memory.

The gradient of one part is staged once; a scan replays it on part after part and adds up. Each part starts with the
States and the generator as the part before left them. So the States afterwards and the random numbers are those of a
Python loop over the parts. A part of weight 0 is computed and then discarded, rather than multiplied by 0: it may hold
NaN, and 0 times NaN is NaN. The equivalent Python loop skips such a part.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import valid_jaxtype

from ..._arrays import at_least
from ..._errors import StateTypeError, StateValueError
from ..._functions import Unbound, boundary
from ..._seam.packing import Writes
from ..._seam.scope import commit, gather, glance, read
from ..._seam.staging import stage
from .._control.loops import scan
from .._first_order.gradient_transform import GradientTransform
from .._first_order.pure_function import from_front, positions
from .._wrapper import resemble

__all__ = ["accumulate"]


def _clear(dropped, leaf):
    """Return ``leaf``, or zeros if its part is dropped; a key stays as it is."""
    return jnp.where(dropped, jnp.zeros_like(leaf), leaf) if jnp.issubdtype(leaf.dtype, jnp.generic) else leaf


def _undo_writes(dropped, writes) -> Writes:
    """Return ``writes``, or the values before them if their part is dropped."""

    def undo(state, new):
        old = glance(state)
        if jax.tree.map(jnp.shape, old) != jax.tree.map(jnp.shape, new):
            return new  # the State had no such value before: `scan` refuses that in its own words
        return jax.tree.map(functools.partial(jnp.where, dropped), read(state), new)

    return Writes(writes.states, [undo(*each) for each in zip(writes.states, writes.values, strict=True)])


class _Accumulated:
    """A gradient of parts of a batch, added up; made by `accumulate`."""

    def __init__(self, grad_fn, steps, reduction, weight):
        self.grad_fn, self.steps, self.reduction, self.weight = grad_fn, steps, reduction, weight
        resemble(self, grad_fn)

    @boundary
    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Return the result of ``grad_fn``, reduced over the parts; commit the writes of the parts, in turn."""
        whole = self._whole(len(args))
        parts = [a if i in whole else self._cut(i, a) for i, a in enumerate(args)]
        if len(whole) >= len(args):
            raise StateValueError("accumulate: no positional argument is left to split into parts.")
        first = [a if i in whole else jax.tree.map(lambda x: x[0], a) for i, a in enumerate(parts)]
        # Staged on the first part: the loop replays this program, so the user's function runs once.
        staged = stage(self._one, first, kwargs, name="accumulate", dynamic=valid_jaxtype)
        shared = {i: args[i] for i in whole}

        def body(total, part):
            # Differentiated arguments are the same for all parts: they are closed over, not scanned.
            given = [shared.get(i, p) for i, p in enumerate(part)]
            reads = list(staged.reads)
            (added, aux), writes = staged(dict(zip(reads, gather(reads), strict=True)), given, kwargs)
            if self.weight is not None:
                added, aux = jax.tree.map(functools.partial(_clear, added[1] == 0), (added, aux))
                writes = _undo_writes(added[1] == 0, writes)
            commit(writes)
            return jax.tree.map(jnp.add, total, added), aux

        # The staged program knows the types of a gradient, from which the sums start.
        zeros = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), staged.result_types[0])
        (sums, weights), aux = scan(body, zeros, [None if i in whole else p for i, p in enumerate(parts)])
        # Without `weight` each part has weight 1: the mean divides by their number.
        if self.reduction == "mean":
            sums = jax.tree.map(lambda leaf: leaf / weights.astype(leaf.dtype), sums)
        return self.grad_fn.arrange(*sums, aux)

    def _one(self, *args, **kwargs):
        """Return ``((gradient and value, times their weight), weight), aux`` of one part."""
        *result, aux = self.grad_fn.parts(*args, **kwargs)
        weight = jnp.float32(1)
        if self.weight is not None:
            weight = jnp.asarray(self.weight(*args, **kwargs), jnp.float32)
            if weight.shape:
                raise StateValueError(f"accumulate: the weight of a part is one number, not of shape {weight.shape}.")
            result = jax.tree.map(lambda leaf: leaf * weight.astype(leaf.dtype), result)
        return (jax.tree.map(jnp.asarray, result), weight), aux

    def _whole(self, count):
        """Return the positions, among ``count``, of the differentiated arguments: parameters, which are not split."""
        numbers = from_front(positions("accumulate", self.grad_fn.grad_states, self.grad_fn.argnums), count)
        return {numbers} if isinstance(numbers, int) else set(numbers or ())

    def _cut(self, position, arg):
        for path, leaf in jax.tree_util.tree_leaves_with_path(arg):
            where = f"argument {position}{jax.tree_util.keystr(path)}"
            if not valid_jaxtype(leaf) or not jnp.ndim(leaf):
                raise StateTypeError(
                    f"accumulate: {where} has no axis of examples to split. Pass arguments that all parts share by "
                    f"keyword."
                )
            size = jnp.shape(leaf)[0]
            if size % self.steps or not size:
                raise StateValueError(
                    f"accumulate: {where} has {size} examples, which do not divide into {self.steps} equal parts. "
                    f"Choose another number of steps, or pad the batch and give the padding no weight."
                )
        return jax.tree.map(lambda x: jnp.reshape(x, (self.steps, -1, *jnp.shape(x)[1:])), arg)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind as a method."""
        if instance is None:
            return Unbound(self, owner)
        return type(self)(self.grad_fn.__get__(instance, owner), self.steps, self.reduction, self.weight)


def accumulate(
    grad_fn: GradientTransform, steps: int, *, reduction: str = "mean", weight: Callable | None = None
) -> Callable:
    """Compute a gradient in ``steps`` parts of the batch, in a compiled loop that needs the memory of one part.

    Parameters
    ----------
    grad_fn : GradientTransform
        The result of `grad` or another gradient transform. It may read and write States and draw random numbers; each
        part begins with the States that the one before left.
    steps : int
        The number of parts. The leading axis of every positional argument is split, except for arguments that
        are differentiated; these, and keyword arguments, are the same for all parts.
    reduction : 'mean' or 'sum'
        How gradients and values of the parts are combined. For parts of equal size, the mean is the gradient of the
        mean over all examples.
    weight : callable, optional
        ``weight(*args, **kwargs)`` of one part returns its weight in the mean: for a loss that is a mean over
        the examples of a mask, ``lambda x, y, mask: mask.sum()``. A part of weight 0 is dropped, whatever it holds: it
        adds nothing, its ``aux`` is zero, and States and random generators stay as the part before left them. If no
        part has weight, the mean is NaN.

    Returns
    -------
    callable
        A function of the arguments of ``grad_fn`` with its result; ``aux`` has a leading axis for the parts.

    Raises
    ------
    StateTypeError
        If ``grad_fn`` is not a gradient, or an argument has no axis to split.
    StateValueError
        If ``steps`` is not a positive int or does not divide the examples, for an unknown reduction, or for a weight of
        a sum or that is not a scalar.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> w = brainstate.ParamState(jnp.array(1.0))
    >>> gradient = brainstate.transform.grad(lambda x: jnp.mean((w.value * x) ** 2), w)
    >>> x = jnp.arange(6.0)
    >>> [round(float(g(x)), 3) for g in (gradient, brainstate.transform.accumulate(gradient, 3))]
    [18.333, 18.333]
    """
    if not isinstance(grad_fn, GradientTransform):
        raise StateTypeError(
            f"accumulate takes the result of grad(...), not {type(grad_fn).__name__}: put jit around the result of "
            f"accumulate, not inside."
        )
    at_least("accumulate: steps", steps, 1, "the number of parts")
    if reduction not in ("mean", "sum"):
        raise StateValueError(f"accumulate: reduction={reduction!r} is neither 'mean' nor 'sum'.")
    if weight is not None and reduction == "sum":
        raise StateValueError("accumulate: a weight is for the mean; a sum over parts has none.")
    return _Accumulated(grad_fn, steps, reduction, weight)
