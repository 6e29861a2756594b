"""A function with States as a pure function of a flat list of arrays, for tools that examine derivatives.

`settle` calls the function as a user does and commits only the States that it creates; `subject_of` packs it. A
derivative of a `Subject` is a subject again. Its writes are a result, ``effects`` (`Carried`), and are not committed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._arrays import differentiable, owns_states
from ..._errors import StateTypeError, StateValueError
from ..._seam.packing import Writes
from ..._seam.scope import Cell, Scope, commit, is_tracer, run
from .._first_order.pure_function import PureFunction, check_argnums, names_of

__all__ = ["Subject", "call_plainly", "is_python", "pull_back", "random_like", "settle", "subject_of", "wide"]


def is_python(leaf) -> bool:
    """Tell whether ``leaf`` is a Python number."""
    return type(leaf) in (float, complex)


def wide(leaf) -> np.ndarray:
    """Return ``leaf`` in the double precision of NumPy."""
    array = np.asarray(leaf)
    return array.astype(np.complex128 if jnp.iscomplexobj(array) else np.float64)


def random_like(rng: np.random.Generator, leaves: list) -> list:
    """Return numbers of random sign between 2/3 and 4/3 in the types of ``leaves``; for both parts of complex ones."""

    def sample(leaf):
        numbers = (rng.choice((-1, 1), jnp.shape(leaf)) * rng.uniform(2 / 3, 4 / 3, jnp.shape(leaf)) for _ in "xy")
        value = next(numbers) + (1j * next(numbers) if jnp.iscomplexobj(leaf) else 0)
        return type(leaf)(value) if is_python(leaf) else jnp.asarray(value, jnp.result_type(leaf))

    return [sample(leaf) for leaf in leaves]


# ------------------------------------------------------------------------------------------ plain calls


def call_plainly(name, fun, args) -> tuple[Any, Writes, int]:
    """Call ``fun`` as a user does, commit nothing, and return ``(out, Writes, number of States born)``."""
    scope = Scope(name)
    out, writes = run(scope, fun, *args)
    return out, writes, len(scope.born)


def settle(name, fun, args) -> tuple[Any, Writes]:
    """Call ``fun`` until it creates no more States, and return the last call; only created States get their values."""
    out, writes, born = call_plainly(name, fun, args)
    if not born:
        return out, writes
    commit(Writes(writes.states[-born:], writes.values[-born:]))
    out, writes, born = call_plainly(name, fun, args)
    if not born:
        return out, writes
    commit(Writes(writes.states[-born:], writes.values[-born:]))
    raise StateValueError(
        f"the function creates a new {writes.states[-1].describe()} in each call, and keeps it: no two calls have the "
        f"same States, which {name} needs. Create the State outside of the function."
    )


# ------------------------------------------------------------------------------------------ the pure function


@dataclass(frozen=True)
class Subject:
    """A pure function ``call(leaves) -> (arrays, effects)`` at the point ``leaves``, with names for both ends."""

    label: str
    call: Callable
    leaves: list
    inputs: list[str]
    owners: list  # the State that an input belongs to, or None
    outputs: list[str]

    def value_at(self, step, direction) -> list[np.ndarray]:
        """Return the value a step away along ``direction``."""
        moved = [_move_leaf(leaf, step, v) for leaf, v in zip(self.leaves, direction, strict=True)]
        return [wide(out) for out in self.call(moved)[0]]

    def forward(self, direction):
        """Return ``(value, derivative along direction, effects)``."""
        return jax.jvp(self.call, (self.leaves,), (direction,), has_aux=True)

    def reverse(self, *cotangents):
        """Return ``(value, the gradient for each of the cotangents, effects, pullback)``."""
        out, pull, effects = jax.vjp(self.call, self.leaves, has_aux=True)
        return out, [pull_back(pull, c) for c in cotangents], effects, pull

    def derivatives(self, modes, direction, cotangent) -> "Iterator[Subject]":
        """Return the derivatives in this direction as subjects of their own."""

        def tangent(leaves):
            _, out, effects = replace(self, leaves=leaves).forward(direction)
            return out, effects

        def gradient(leaves):
            _, (out,), effects, _ = replace(self, leaves=leaves).reverse(cotangent)
            return out, effects

        if "fwd" in modes:
            yield replace(self, label=f" of the forward derivative{self.label}", call=tangent)
        if "rev" in modes:
            label = f" of the reverse derivative{self.label}"
            yield replace(self, label=label, call=gradient, outputs=[f"gradient: {name}" for name in self.inputs])


def pull_back(pull, cotangent) -> list:
    """Return the gradient; conjugated, so that for complex values too <gradient, v> = <cotangent, J v>."""
    return [jnp.conj(g) for g in pull([jnp.conj(c) for c in cotangent])[0]]


def _move_leaf(leaf, step, v):
    return leaf + step * v if is_python(v) else jnp.asarray(leaf) + step * v


def _refuse_states(name, args) -> None:
    """Refuse States and Modules among the arguments: here they have most likely been given for ``grad_states``."""
    for i, arg in enumerate(args):
        for leaf in jax.tree.leaves(arg):
            if isinstance(leaf, Cell) or owns_states(leaf):
                what = leaf.describe() if isinstance(leaf, Cell) else f"a {type(leaf).__name__}, which has States"
                raise StateValueError(
                    f"{name}: argument {i} is or holds {what}, and States are not arguments. Name the States "
                    f"to differentiate: {name}(f, ..., grad_states=...)."
                )


def _positions(name, args, grad_states, argnums):
    """Return ``argnums``; without it, and without States, every argument that can be differentiated."""
    argnums = check_argnums(argnums)
    if argnums is not None or grad_states is not None:
        return argnums
    found = []
    for i, arg in enumerate(args):
        leaves = jax.tree.leaves(arg)
        if leaves and all(map(differentiable, leaves)):
            found.append(i)
    if not found:
        raise StateValueError(
            f"{name}: no argument is of a floating or complex type, and grad_states is not given: there is "
            "nothing to differentiate."
        )
    return tuple(found)


def subject_of(name, fun, args, grad_states, argnums) -> Subject:
    """Return ``fun``, called with ``args``, as a function of the differentiated leaves."""
    _refuse_states(name, args)
    target = PureFunction(fun, name, grad_states, _positions(name, args, grad_states, argnums), check_states=False)
    diff, call, rest = target.open(args, {})
    leaves, treedef = jax.tree.flatten(diff)
    if any(map(is_tracer, jax.tree.leaves((leaves, rest)))):
        raise StateTypeError(f"{name} looks at numbers, and there are none inside a transform: call it outside.")
    names, owners = names_of(call, diff)
    outputs = []

    def flat(leaves):
        value, effects = target.pure(treedef.unflatten(leaves), call, *rest)
        found = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(value) if differentiable(leaf)]
        if not found:
            raise StateTypeError(f"{name}: the function returns nothing of a floating or complex type.")
        outputs[:] = [f"result{jax.tree_util.keystr(path)}" for path, _ in found]
        return [leaf for _, leaf in found], effects

    return Subject("", flat, leaves, names, owners, outputs)
