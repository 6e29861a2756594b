"""``stop_gradient``: States as constants for derivatives, by a scope whose inherited values are constants."""

from collections.abc import Callable
from typing import Any

import jax

from ..._errors import StateTypeError
from ..._functions import boundary
from ..._seam.scope import Scope, commit, run
from .._select_states import chooser
from .._wrapper import resemble

__all__ = ["stop_gradient"]


class _Stopped(Scope):
    """A scope in which the initial values of chosen States are constants for derivatives."""

    opaque = True

    def __init__(self, chosen):
        super().__init__("stop_gradient")
        self.chosen = chosen

    def _inherit(self, state):
        value = super()._inherit(state)
        return jax.tree.map(jax.lax.stop_gradient, value) if self.chosen(state) else value


def stop_gradient(fun: Callable, states: Any = ...) -> Callable:
    """Stop derivatives at the values that a function reads from States.

    Parameters
    ----------
    fun : callable
        The function, such as a Module; it may read and write States.
    states : State, Module, (Module, filter), container of these, or filter
        Which States are constants inside: by default all. A Module stands for all States that it has at the time of
        the call, a pair for those of them that the filter selects then.

    Returns
    -------
    callable
        The function, with the same results and effects. A derivative with respect to such a State has an entry, to
        which this function adds zero. Values that the function itself writes have their derivatives.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> a, b = brainstate.ParamState(jnp.array(2.0)), brainstate.ParamState(jnp.array(3.0))
    >>> f = brainstate.transform.stop_gradient(lambda x: a.value * b.value * x, a)
    >>> [float(g) for g in brainstate.transform.grad(f, [a, b])(1.0)]
    [0.0, 2.0]
    """
    if not callable(fun):
        raise StateTypeError(f"stop_gradient takes a function; got {type(fun).__name__}, which cannot be called.")
    chooser("stop_gradient", states)  # refuses unusable declarations here rather than at the first call

    @boundary
    def call(*args, **kwargs):
        out, writes = run(_Stopped(chooser("stop_gradient", states)), fun, *args, **kwargs)
        commit(writes)
        return out

    return resemble(call, fun)
