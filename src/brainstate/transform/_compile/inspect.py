"""``eval_shape``, ``make_jaxpr`` and ``named_scope``: a look at a function without running it, with States.

``named_scope`` is JAX's own: a staged program keeps the names, so States need nothing more.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import named_scope
from jax.extend.core import valid_jaxtype

from ..._arrays import combine, partition
from ..._functions import boundary, check_function, named_after
from ..._seam.packing import Carried, Writes
from ..._seam.scope import Scope, commit, gather, run
from ..._seam.staging import stage
from ..._state import State
from .._wrapper import resemble

__all__ = ["FoundStates", "eval_shape", "make_jaxpr", "named_scope"]


@boundary
def eval_shape(f: Callable, *args: Any, **kwargs: Any) -> Any:
    """Return the result of ``f`` with shapes and dtypes instead of arrays: ``jax.eval_shape`` with States.

    Parameters
    ----------
    f : callable
        A function, or a class: ``eval_shape(Model, 784, 10)`` builds a model whose States hold shapes and dtypes,
        without allocating memory.
    *args, **kwargs
        Its arguments. Arrays (or ``jax.ShapeDtypeStruct``) become abstract; numbers and all else are passed as is.

    Returns
    -------
    pytree
        The result. No State that existed before is changed; a random generator does not advance.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> brainstate.transform.eval_shape(lambda x: {"y": x @ x.T}, jnp.ones((2, 3)))
    {'y': ShapeDtypeStruct(shape=(2, 2), dtype=float32)}
    >>> brainstate.transform.eval_shape(brainstate.nn.Linear, 1000, 1000).weight
    ParamState(float32[1000,1000])
    """
    check_function("eval_shape takes a function", f)
    arrays, rest = partition((args, kwargs), lambda leaf: hasattr(leaf, "shape") and hasattr(leaf, "dtype"))

    def pure(*inputs):
        a, k = combine(inputs, rest)
        scope = Scope("eval_shape", frozen=False)
        out, writes = run(scope, f, *a, **k)
        values = dict(zip(writes.states, writes.values, strict=True))
        return Carried.pack(out), Writes(tuple(scope.born), [values[s] for s in scope.born])

    out, new = jax.eval_shape(named_after(pure, f), *arrays)
    commit(new)
    return out.tree()


class FoundStates(NamedTuple):
    """The States of a jaxpr: ``reads`` are its first inputs, ``writes`` its last outputs, leaf by leaf."""

    reads: tuple[State, ...]
    writes: tuple[State, ...]


def make_jaxpr(fun: Callable, *, return_shape: bool = False) -> Callable:
    """Return a function that shows the jaxpr of ``fun`` and the States it uses: ``jax.make_jaxpr`` with States.

    Parameters
    ----------
    fun : callable
        The function. Arrays and numbers among its arguments are traced, all else is passed as is.
    return_shape : bool
        Whether to return the shapes and dtypes of the result as well.

    Returns
    -------
    callable
        A function of the same arguments that returns ``(jaxpr, states)`` or ``(jaxpr, states, shapes)``. The jaxpr
        takes the values of ``states.reads`` and then the arguments; it returns the result and then the new values of
        ``states.writes``. No State changes.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> count = brainstate.State(jnp.zeros(()), name="count")
    >>> def add(x):
    ...     count.value += x
    >>> jaxpr, states = brainstate.transform.make_jaxpr(add)(jnp.ones(()))
    >>> print(jaxpr)
    { lambda ; a:f32[] b:f32[]. let c:f32[] = add a b in (c,) }
    >>> states.reads == states.writes == (count,)
    True
    """
    check_function("make_jaxpr takes a function", fun)

    @boundary
    def trace_pure(*args, **kwargs):
        arrays, rest = partition((args, kwargs), valid_jaxtype)
        staged = stage(fun, args, kwargs, name="make_jaxpr", dynamic=valid_jaxtype)
        reads = tuple(staged.reads)

        def pure(values, *inputs):
            a, k = combine(inputs, rest)
            out, writes = staged(dict(zip(reads, values, strict=True)), a, k)
            return out, writes.values

        jaxpr, shapes = jax.make_jaxpr(pure, return_shape=True)(gather(reads), *arrays)
        found = FoundStates(reads, staged.writes)
        return (jaxpr, found, shapes[0]) if return_shape else (jaxpr, found)

    return resemble(trace_pure, fun)
