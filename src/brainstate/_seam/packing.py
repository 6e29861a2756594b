"""Pytrees that carry results and written values out of a traced function; the static part has structure and States."""

import jax
from jax.extend.core import valid_jaxtype

from .._arrays import combine, partition

__all__ = ["ABSENT", "Absent", "Carried", "Writes"]


class Writes:
    """Written States (the static part) and their values (the children), as a pytree."""

    __slots__ = ("states", "values")

    def __init__(self, states, values):
        self.states, self.values = states, values


class Absent:
    """A placeholder for the value of a State that one trace of a compiled function writes and another does not."""

    __slots__ = ()


ABSENT = Absent()

jax.tree_util.register_pytree_node(Writes, lambda w: (w.values, w.states), Writes)
jax.tree_util.register_pytree_node(Absent, lambda _: ((), None), lambda *_: ABSENT)


class Carried:
    """A pytree of any objects, of which JAX sees the arrays only: text and the like travel in the static part."""

    __slots__ = ("arrays", "rest")

    def __init__(self, arrays, rest):
        self.arrays, self.rest = arrays, rest

    @classmethod
    def pack(cls, tree):
        """Pack ``tree``."""
        return cls(*partition(tree, valid_jaxtype))

    def tree(self):
        """Return the tree that was packed."""
        return combine(self.arrays, self.rest)


jax.tree_util.register_pytree_node(Carried, lambda c: (c.arrays, c.rest), lambda rest, arrays: Carried(arrays, rest))
