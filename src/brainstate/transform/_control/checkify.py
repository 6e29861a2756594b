"""``checkify``: failed checks in compiled code as a value, next to the result of the function."""

from collections.abc import Callable
from typing import Any

from jax.experimental import checkify as _checkify

from ..._functions import boundary, check_function
from ..._seam.scope import Scope, commit, frozen_here, run
from .._wrapper import resemble

__all__ = ["checkify"]


def checkify(fun: Callable, errors: Any = _checkify.user_checks) -> Callable:
    """Collect failed checks in compiled code as a value: ``jax.experimental.checkify.checkify`` with States.

    Parameters
    ----------
    fun : callable
        The function, with ``jax.experimental.checkify.check`` in it.
    errors : set of errors
        Which checks, as in JAX.

    Returns
    -------
    callable
        A function of the same arguments that returns ``(error, result)``; the writes of ``fun`` are committed.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> from jax.experimental.checkify import check
    >>> level = brainstate.State(jnp.array(1.0))
    >>> def drain(x):
    ...     level.value -= x
    ...     check(level.value >= 0.0, "empty")
    >>> error, _ = brainstate.transform.jit(brainstate.transform.checkify(drain))(2.0)
    >>> error.get().split(" (")[0], float(level.value)
    ('empty', -1.0)
    """
    check_function("checkify takes a function", fun)

    @boundary
    def run_checked(*args, **kwargs):
        frozen = frozen_here()

        def pure(*args, **kwargs):
            return run(Scope("checkify", frozen=frozen), fun, *args, **kwargs)

        error, (out, writes) = _checkify.checkify(pure, errors=errors)(*args, **kwargs)
        commit(writes)
        return error, out

    return resemble(run_checked, fun)
