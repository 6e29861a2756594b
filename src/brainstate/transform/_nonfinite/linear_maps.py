"""``debug_nan=True`` where a transform returns a linear map: a pullback, or a `LinearOperator`.

Its products come later, when the States may have moved on, and perhaps in another program. So the whole, function and
product, is staged when the map is made, for a vector that is yet to come, and kept with the inputs that it had then:
that is a `Guard`. A product that is not finite is found by the search that `check` makes, with its vector filled in.

The function runs once more for that, abstractly, and once again for a Jacobian, whose transpose is a second map.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ..._seam.scope import Scope, commit, eager, is_tracer
from .check import Program, Untraceable, Watch, checks, guarded, leaving_out, made
from .search import inexact

__all__ = ["Guard", "Way", "watched_map"]


class Way(NamedTuple):
    """A way to multiply with a linear map: ``product(map, v)`` for a ``v`` like ``vector``.

    ``what`` are the words for ``v``, and ``inputs`` that of `Watch`.
    """

    product: Callable
    vector: Any
    what: str
    inputs: Callable


def watched_map(name, run: Callable, ways: Callable, args: tuple, kwargs: dict) -> tuple:
    """Return what ``run(*args, **kwargs)`` does, and a `Guard` for each way, and commit what it writes.

    That is ``(map, gradient or (), value, *aux)``, and ``ways(map, value)`` are the ways to multiply. Raises if what
    comes out beside the map is not finite.
    """
    transform = name.partition("(")[0]
    with Scope(transform) as scope:
        scope.firsts = weakref.WeakKeyDictionary()
        linear, more, value, *aux = run(*args, **kwargs)
        writes = scope.close()
    with Scope(transform, made(scope, writes)):
        guards = [Guard.of(name, run, way, args, kwargs) for way in ways(linear, value)]
    (more, value), failed = guards[0].besides((more, value), aux, writes)
    commit(writes)
    return (linear, more, value, *aux), tuple(guard.after(failed) for guard in guards)


def _placeholder(leaf):
    """Return what stands for ``leaf`` of a vector while it is unknown; in a program, a tracer of its very type."""
    return leaf * 0 if is_tracer(leaf) and inexact(leaf) else _type_of(leaf)


def _type_of(leaf):
    if _is_unknown(leaf) or not inexact(leaf):
        return leaf
    aval = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _own(leaf):
    """Return an array that stays as it is when a State gives its own away, or the user changes his in place."""
    return leaf.copy() if isinstance(leaf, jax.Array | np.ndarray) and not is_tracer(leaf) else leaf


def _is_unknown(leaf) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


@jax.tree_util.register_pytree_node_class
class Guard:
    """Watches the products with a linear map; for JAX a pytree of the inputs of its program.

    ``failed`` holds what is true if already that which came out beside the map was not finite: in a traced program it
    is possible that nobody uses it, and then nothing is raised for it.
    """

    def __init__(self, program, treedef, leaves, failed: Sequence = ()):
        self._program, self._treedef, self._leaves, self._failed = program, treedef, leaves, failed

    @classmethod
    def of(cls, name, run, way, args, kwargs) -> "Guard":
        """Stage the function and its product in one, for a vector that is yet to come."""

        def product_first(*args, **kwargs):
            v = kwargs.pop(way.what)
            linear, more, value, *aux = run(*args, **kwargs)
            return (way.product(linear, v), more), value, *aux

        watch = Watch(name, product_first, leaving_out(way.what, way.inputs), of_map=True)
        kwargs = {**kwargs, way.what: jax.tree.map(_placeholder, way.vector)}
        mine = jax.tree.map(lambda _: False, (args, kwargs))
        mine[1][way.what] = jax.tree.map(lambda _: True, kwargs[way.what])
        mine = jax.tree.leaves(mine)
        try:
            staged = watch.staged(args, kwargs)
            program, (constants, states, given) = Program.of(watch, staged, args, kwargs)
            pairs = zip(staged.places, given, strict=True)
            parts = constants, states, [_type_of(leaf) if mine[i] else leaf for i, leaf in pairs]
        except Exception as problem:
            # It has just run well, so it is being abstract that it cannot do: no matter as long as all is finite.
            program, parts = Untraceable(name, problem), ([], [], [])
        leaves, treedef = jax.tree.flatten(parts)
        return cls(program, treedef, list(map(_own, leaves)))

    def tree_flatten(self) -> tuple:
        """Return the inputs, and what is static."""
        unknown = tuple((i, leaf) for i, leaf in enumerate(self._leaves) if _is_unknown(leaf))
        known = [leaf for leaf in self._leaves if not _is_unknown(leaf)]
        return (known, self._failed), (self._program, self._treedef, unknown)

    @classmethod
    def tree_unflatten(cls, static: tuple, children: tuple) -> "Guard":
        """Undo `tree_flatten`."""
        program, treedef, unknown = static
        known, failed = children
        leaves = list(known)
        for i, leaf in unknown:
            leaves.insert(i, leaf)
        return cls(program, treedef, leaves, failed)

    def __call__(self, v: Any, product: Any) -> Any:
        """Return ``product``, which is that with ``v``; raise if it is not finite."""
        vector = [leaf for leaf in jax.tree.leaves(v) if inexact(leaf)]
        return self._judged(self._program, vector, product, [*checks((product, ()), ()), *self._failed])

    def besides(self, found: tuple, aux: Any, writes: Any) -> tuple[tuple, list]:
        """Return ``found``, a gradient and a value, which came out beside the map; raise if they are not finite.

        Returns also what is true if that will be raised when the program runs.
        """
        zeros = [np.zeros(leaf.shape, leaf.dtype) for leaf in self._leaves if _is_unknown(leaf)]
        bad = checks((*found, *aux), writes)
        found = self._judged(self._program.without_product(), zeros, found, bad)
        return found, [] if eager() else bad

    def after(self, failed: Sequence) -> "Guard":
        """Return a guard that also raises if one of ``failed`` is true."""
        return Guard(self._program, self._treedef, self._leaves, failed)

    def _judged(self, program, vector, found, bad):
        given = iter(vector)
        inputs = self._treedef.unflatten([next(given) if _is_unknown(leaf) else leaf for leaf in self._leaves])
        if not eager():
            return guarded(program, inputs, found, bad)
        if any(map(bool, bad)):
            raise program.search(*inputs)
        return found
