"""How values leave a traced function: as pytrees whose static part says what they are; and when, if it may fail."""

import threading
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import valid_jaxtype

__all__ = ["ABSENT", "Absent", "Carried", "Writes", "awaited", "may_fail", "tracing"]


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

    __slots__ = ("leaves", "rest", "treedef")

    def __init__(self, leaves, rest, treedef):
        self.leaves, self.rest, self.treedef = leaves, rest, treedef

    @classmethod
    def of(cls, tree):
        """Pack ``tree``."""
        leaves, treedef = jax.tree.flatten(tree)
        rest = tuple((i, leaf) for i, leaf in enumerate(leaves) if not valid_jaxtype(leaf))
        for i, _ in rest:
            leaves[i] = None
        return cls(leaves, rest, treedef)

    def tree(self):
        """Return the tree that was packed."""
        leaves = list(self.leaves)
        for i, leaf in self.rest:
            leaves[i] = leaf
        return self.treedef.unflatten(leaves)


jax.tree_util.register_pytree_node(
    Carried, lambda c: (c.leaves, (c.rest, c.treedef)), lambda aux, leaves: Carried(leaves, *aux)
)


# ------------------------------------------------------------------------------------------ programs that may fail


class _Thread(threading.local):
    def __init__(self):
        self.may_fail = False


_thread = _Thread()


def may_fail() -> None:
    """Announce that the program which is being traced may end in an error while it runs."""
    _thread.may_fail = True


def tracing(call: Callable) -> tuple[Any, bool]:
    """Return ``call()`` and whether what it traced has announced that it `may_fail`."""
    before, _thread.may_fail = _thread.may_fail, False
    try:
        return call(), _thread.may_fail
    finally:
        _thread.may_fail |= before


def awaited(values: Any) -> None:
    """Wait for ``values`` if what was traced here before `may_fail`: its error then comes before they are used."""
    if _thread.may_fail:
        _thread.may_fail = False
        jax.block_until_ready(values)
