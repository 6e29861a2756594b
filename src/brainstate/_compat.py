"""What this package needs of JAX and what JAX spells differently, or does not spell, from version to version.

Features are found by presence, never by version number. Everything here is public JAX.
"""

import inspect

import jax
from jax.extend.core import get_opaque_trace_state, take_current_trace, unsafe_am_i_under_a_jit_DO_NOT_USE

__all__ = ["UNSPECIFIED", "current_trace", "staging", "trace_state"]

#: The default of ``in_shardings``: "decide from the arguments". Not exported by JAX, but it is a default of
#: a public signature.
UNSPECIFIED = inspect.signature(jax.jit).parameters["in_shardings"].default


#: ``trace_state()`` names the trace that takes the next operation; two names compare equal if it is the same one.
#: It is the cheapest such question there is, and every read and write of a State asks it.
trace_state = get_opaque_trace_state


def current_trace():
    """Return the trace that takes the next operation, to be made current again with ``set_current_trace``."""
    with take_current_trace() as trace:
        return trace


def staging() -> bool:
    """Tell whether what runs now is being recorded into a program (by a jit, a scan, ...)."""
    return unsafe_am_i_under_a_jit_DO_NOT_USE()
