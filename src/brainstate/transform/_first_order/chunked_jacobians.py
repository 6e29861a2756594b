"""Jacobians in chunks: a fixed number of rows (reverse mode) or columns (forward mode) at once.

The function itself runs once, outside the loop: reverse mode keeps its pullback, forward mode its linearization. A
loop applies this linear map to one chunk of unit vectors after the other. Memory holds the result, the residuals of
the linear map, and the intermediate values of one chunk.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._arrays import at_least, combine, differentiable, layout, partition
from ..._errors import StateTypeError

__all__ = ["check_chunk_size", "chunked_jacfwd", "chunked_jacrev", "count", "unit"]


def check_chunk_size(name: str, chunk_size: Any) -> None:
    """Refuse a ``chunk_size`` that is neither None nor an int from 1 up."""
    at_least(f"{name}: chunk_size", chunk_size, 1, "the number of directions or examples at once", none="all")


def count(leaves) -> int:
    """Return the number of entries of all leaves together."""
    return sum(int(np.size(leaf)) for leaf in leaves)


def unit(leaves, i) -> list:
    """Return unit vector ``i`` in the shapes of ``leaves``: zeros, and a one in entry ``i`` counted across all leaves.

    For ``i`` from `count` up, all entries are zero.
    """
    parts, begin = [], 0
    for leaf in leaves:
        size = np.size(leaf)
        one = jnp.arange(size) == i - begin
        parts.append(one.reshape(jnp.shape(leaf)).astype(jax.typeof(leaf).dtype))
        begin += size
    return parts


def _map_units(line, over, size):
    """Return ``line(unit vector)`` for each unit vector of the space of ``over``, at most ``size`` at once."""
    return jax.lax.map(lambda i: line(unit(over, i)), jnp.arange(count(over)), batch_size=size)


def _cut_rows(lines, like):
    """Cut the leading axis of ``lines`` into one array for each leaf of ``like``, in its shape."""
    ends = np.cumsum([np.size(leaf) for leaf in like])
    return [
        lines[end - np.size(leaf) : end].reshape(*jnp.shape(leaf), *lines.shape[1:])
        for leaf, end in zip(like, ends, strict=True)
    ]


def _cut_columns(lines, like):
    """Cut as `_cut_rows` does, and move the axes of each leaf to the end of its shape."""
    return [
        jnp.moveaxis(part, range(jnp.ndim(leaf)), range(-jnp.ndim(leaf), 0))
        for leaf, part in zip(like, _cut_rows(lines, like), strict=True)
    ]


def _zeros(out, leaf, dtype):
    return jnp.zeros((*jnp.shape(out), *jnp.shape(leaf)), dtype)


def _check_kind(name, what, leaves, wanted):
    for leaf in leaves:
        if not jnp.issubdtype(jax.typeof(leaf).dtype, wanted):
            holomorphic = ", as holomorphic=True promises" if wanted is jnp.complexfloating else ""
            raise StateTypeError(
                f"{name} wants {what} of a {'complex' if holomorphic else 'real floating'} type{holomorphic}; one is "
                f"{layout(leaf)}."
            )


def chunked_jacrev(fun, *, chunk_size, holomorphic, allow_int):
    """Return ``jax.jacrev(fun, has_aux=True)`` that pulls back ``chunk_size`` unit cotangents at once."""
    del allow_int  # the selection was checked; the derivative by an integer is a zero of its type, as in JAX

    def jacobian(diff, /, *rest, **kwargs):
        leaves, treedef = jax.tree.flatten(diff)
        # An integer leaf has no cotangent that a loop can stack: it stays fixed, and its blocks are zeros.
        moving, fixed = partition(diff, differentiable)
        if holomorphic:
            _check_kind("jacrev", "inputs", leaves, jnp.complexfloating)
        value, pull, aux = jax.vjp(lambda moved: fun(combine(moved, fixed), *rest, **kwargs), moving, has_aux=True)
        outs, out_tree = jax.tree.flatten(value)
        _check_kind("jacrev", "outputs", outs, jnp.complexfloating if holomorphic else jnp.floating)
        # For each moving leaf, one row of the Jacobian for each entry of the output.
        rows = _map_units(lambda row: pull(out_tree.unflatten(row))[0], outs, chunk_size)
        cut = {i: _cut_rows(lines, outs) for i, lines in zip(fixed.places, rows, strict=True)}
        blocks = [
            treedef.unflatten(
                [cut[i][k] if i in cut else _zeros(out, leaf, jax.typeof(leaf).dtype) for i, leaf in enumerate(leaves)]
            )
            for k, out in enumerate(outs)
        ]
        return out_tree.unflatten(blocks), aux

    return jacobian


def chunked_jacfwd(fun, *, chunk_size, holomorphic, name="jacfwd"):
    """Return ``jax.jacfwd(fun, has_aux=True)`` that pushes ``chunk_size`` unit tangents forward at once."""

    def jacobian(diff, /, *rest, **kwargs):
        leaves, treedef = jax.tree.flatten(diff)
        _check_kind(name, "inputs", leaves, jnp.complexfloating if holomorphic else jnp.floating)
        value, push, aux = jax.linearize(lambda d: fun(d, *rest, **kwargs), diff, has_aux=True)
        outs, out_tree = jax.tree.flatten(value)
        if holomorphic:
            _check_kind(name, "outputs", outs, jnp.complexfloating)
        # The tangent of an integer output is of dtype float0, which no loop can stack.
        moved = [k for k, out in enumerate(outs) if differentiable(out)]

        def line(column):
            slopes = jax.tree.leaves(push(treedef.unflatten(column)))
            return {k: slopes[k] for k in moved}

        columns = _map_units(line, leaves, chunk_size)
        blocks = [
            _cut_columns(columns[k], leaves)
            if k in columns
            else [_zeros(out, leaf, jax.typeof(out).dtype) for leaf in leaves]  # an integer, as in JAX
            for k, out in enumerate(outs)
        ]
        blocks = [treedef.unflatten(block) for block in blocks]
        return out_tree.unflatten(blocks), aux

    return jacobian
