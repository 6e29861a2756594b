"""The marker of staging: an operation in a staged program that stands for one leaf of a State's value."""

import threading
from typing import Any

from jax.extend.core import Primitive

__all__ = ["state_read", "thread"]


class _GivenLeaves(threading.local):
    def __init__(self):
        self.given: Any = None  # while a staged function is evaluated: {State: leaves that replace its markers}


thread = _GivenLeaves()


class _StateRead(Primitive):
    """``state_read[state=… leaf=… aval=…]``: stands for one leaf of a State's value in a staged program.

    The State is named by its ``id``, since JAX's caches keep the parameters of a primitive, and would keep a State.
    """

    def bind(self, *, state, leaf, aval):
        given = thread.given
        if given is not None and state in given:
            return given[state][leaf]
        return super().bind(state=state, leaf=leaf, aval=aval)


state_read = _StateRead("state_read")
state_read.def_abstract_eval(lambda *, state, leaf, aval: aval)
