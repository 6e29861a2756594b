"""Reads of States in transforms of libraries that do not know States, where the result would be lost without a word."""

import os
import sys

import jax

from .._arrays import owns_states
from .._compat import is_recording
from .._errors import TraceContextError
from .local_states import frames_in

__all__ = ["is_kept", "refuse_lost"]

_EQUINOX = os.path.join("equinox", "_ad.py")


def is_kept(state) -> bool:
    """Tell whether a program of JAX's own, traced outside of every scope, keeps the value of ``state`` that is read."""
    refuse_lost(state)
    return is_recording()


def refuse_lost(state) -> None:
    """Refuse a read of ``state`` in a derivative of Equinox with respect to the Module that holds it.

    Equinox differentiates the arrays among the leaves of an argument. A Module is one leaf, and not an array: Equinox
    asks it nothing, and would return None as its gradient.

    Raises
    ------
    TraceContextError
        If that is so.
    """
    for frame in frames_in(_EQUINOX) if "equinox._ad" in sys.modules else ():
        for leaf in jax.tree.leaves((frame.f_locals.get("x"), frame.f_locals.get("primals"))):
            if owns_states(leaf) and state in leaf.states().values():
                raise TraceContextError(
                    f"{state.describe()} is read in a derivative of Equinox with respect to its Module "
                    f"({type(leaf).__name__}), which would be None: Equinox sees no array in a Module. Use "
                    f"brainstate.transform.grad(fun, grad_states=module)."
                )
