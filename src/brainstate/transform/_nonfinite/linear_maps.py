"""``debug_nan=True`` where a transform returns a linear map: the pullback of `vjp`, or a `LinearOperator`.

Its products come later, when the States may have moved on, and perhaps in another program. So the whole, function and
product, is staged when the map is made, for a vector that is yet to come, and kept with the inputs that it had then:
that is a `CheckedMap`. A product that is not finite is found by the same search, with its vector filled in.

The function runs once more for that, abstractly, and once again for a Jacobian, whose transpose is a second map.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from ..._seam.scope import commit, eager, is_tracer
from .callback import check_at_run_time
from .check import DerivativeCheck, find_faults
from .report import Untraceable
from .search import inexact

__all__ = ["CheckedMap", "LinearMap", "LinearMapCheck"]


class LinearMap(NamedTuple):
    """A linear function, a pytree, of vectors like ``vector``; ``inputs`` as in `DerivativeCheck`."""

    function: Callable
    vector: Any
    inputs: Callable = DerivativeCheck.inputs


@dataclass(frozen=True)
class LinearMapCheck(DerivativeCheck):
    """A derivative with a linear map: ``call(*args, **kwargs)`` returns ``((map, *derivatives), value, *aux)``.

    ``parts(map, value)`` returns the linear functions that the map is made of, a `LinearMap` each, and
    ``rebuild(map, *functions)`` a map that is made of checked ones.
    """

    parts: Callable = lambda linear, value: [linear]
    rebuild: Callable = lambda linear, checked: checked

    def run(self, args: tuple, kwargs: dict, *vector: Any) -> tuple:
        """Return the result of the call, its map checked, and commit its writes.

        Raises `NonFiniteError` if a result beside the map is not finite; the map does so for its products.
        """
        out, writes, again = self.first_run(args, kwargs)
        (linear, *others), value, *aux = out
        with again:
            checked = [
                CheckedMap.from_check(self, number, part, args, kwargs)
                for number, part in enumerate(self.parts(linear, value))
            ]
        (others, value), faults = checked[0].check_others((others, value), aux, writes)
        commit(writes)
        linear = self.rebuild(linear, *(part.with_faults(faults) for part in checked))
        return (linear, *others), value, *aux

    def product(self, number: int, inputs: Callable) -> DerivativeCheck:
        """Return the product with a part of the map as a derivative: ``((product, derivatives), value, *aux)``."""

        def call(v, *args, **kwargs):
            (linear, *others), value, *aux = self.call(*args, **kwargs)
            return (self.parts(linear, value)[number].function(v), others), value, *aux

        return DerivativeCheck(call, self.name, inputs, self.vector_name)


def _placeholder(leaf):
    """Return a placeholder for a ``leaf`` of a vector that is unknown yet; in a program, a tracer of its very type."""
    return leaf * 0 if is_tracer(leaf) and inexact(leaf) else _type_of(leaf)


def _type_of(leaf):
    if _is_unknown(leaf) or not inexact(leaf):
        return leaf
    aval = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _copy_array(leaf):
    """Return an array that stays as it is when a State gives its own away, or the user changes his in place."""
    return leaf.copy() if isinstance(leaf, jax.Array | np.ndarray) and not is_tracer(leaf) else leaf


def _is_unknown(leaf) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


@jax.tree_util.register_pytree_node_class
class CheckedMap:
    """A linear function whose products have to be finite; for JAX a pytree, with the inputs of its program.

    ``leaves`` are these inputs, with types in the places of the vector. ``faults`` are boolean arrays, true if a
    result beside the map was not finite: in a traced program it is possible that nobody uses that result, and then
    nothing is raised for it.
    """

    def __init__(self, function: Callable, program: Any, treedef: Any, leaves: list, faults: Sequence = ()):
        self._function, self._program, self._treedef = function, program, treedef
        self._leaves, self._faults = leaves, faults

    @classmethod
    def from_check(
        cls, check: LinearMapCheck, number: int, linear: LinearMap, args: tuple, kwargs: dict
    ) -> "CheckedMap":
        """Stage the function of the user and a product in one, for a vector that is yet to come."""
        vector = (jax.tree.map(_placeholder, linear.vector),)
        first = len(jax.tree.leaves((args, kwargs)))  # the number of the first leaf of the vector
        try:
            product = check.product(number, linear.inputs)
            program, (constants, states, given), staged = product.program(args, kwargs, vector, of_map=True)
            pairs = zip(staged.places, given, strict=True)
            parts = constants, states, [_type_of(leaf) if i >= first else leaf for i, leaf in pairs]
        except Exception as problem:
            # It has just run well, so it is being abstract that it cannot do: no matter as long as all is finite.
            program, parts = Untraceable(check.name, problem), ([], [], [])
        leaves, treedef = jax.tree.flatten(parts)
        return cls(linear.function, program, treedef, list(map(_copy_array, leaves)))

    def tree_flatten(self) -> tuple:
        """Return the linear function with the inputs, and the static part."""
        unknown = tuple((i, leaf) for i, leaf in enumerate(self._leaves) if _is_unknown(leaf))
        known = [leaf for leaf in self._leaves if not _is_unknown(leaf)]
        return (self._function, known, self._faults), (self._program, self._treedef, unknown)

    @classmethod
    def tree_unflatten(cls, static: tuple, children: tuple) -> "CheckedMap":
        """Undo `tree_flatten`."""
        program, treedef, unknown = static
        function, known, faults = children
        leaves = list(known)
        for i, leaf in unknown:
            leaves.insert(i, leaf)
        return cls(function, program, treedef, leaves, faults)

    def __call__(self, v: Any) -> Any:
        """Return the product with ``v``; raise if it is not finite."""
        product = self._function(v)
        vector = [leaf for leaf in jax.tree.leaves(v) if inexact(leaf)]
        return self._check(self._program, vector, product, [*find_faults((product, ()), ()), *self._faults])

    def check_others(self, found: tuple, aux: Any, writes: Any) -> tuple[tuple, list]:
        """Return ``found``, derivatives and a value that came out beside the map; raise if they are not finite.

        Returns also boolean arrays, true if that will be raised when the program runs.
        """
        zeros = [np.zeros(leaf.shape, leaf.dtype) for leaf in self._leaves if _is_unknown(leaf)]
        faults = find_faults((*found, *aux), writes)
        found = self._check(self._program.without_product(), zeros, found, faults)
        return found, [] if eager() else faults

    def with_faults(self, faults: Sequence) -> "CheckedMap":
        """Return a map that also raises if one of ``faults`` is true."""
        return CheckedMap(self._function, self._program, self._treedef, self._leaves, faults)

    def _check(self, program, vector, found, faults):
        given = iter(vector)
        inputs = self._treedef.unflatten([next(given) if _is_unknown(leaf) else leaf for leaf in self._leaves])
        if not eager():
            return check_at_run_time(program, inputs, found, faults)
        if any(map(bool, faults)):
            raise program.search(*inputs)
        return found
