"""Staging: run a function once, abstractly, and keep its jaxpr with the States that it reads and writes.

The first read of a State leaves a marker in the jaxpr (``marker``); evaluating the jaxpr replaces the marker by the
value given for that State. This is how a transform that needs to know the States beforehand (jit, scan, cond) still
runs the user's function once.
"""

import jax
from jax.extend.core import jaxpr_as_fun

from .._arrays import combine, partition
from .._functions import named_after
from .marker import state_read
from .marker import thread as _thread
from .scope import Scope, is_tracer, refuse_foreign, run

__all__ = ["Restart", "Staged", "catch_restart", "stage", "traced_part"]


def catch_restart(call, fun) -> "Staged":
    """Return the `Staged` that ``fun`` raised as `Restart` when JAX called it in ``call(fun)``."""
    try:
        call(fun)
    except Restart as restart:
        return restart.staged
    raise AssertionError("JAX did not call the function")


class Restart(BaseException):
    """Ends a trace whose function met States that are not inputs yet, or writes for the first time.

    It is not an `Exception`: for each of these JAX walks the whole stack, which made traces half as long again.
    """

    def __init__(self, staged):
        super().__init__()
        self.staged = staged


class Staged:
    """A function that ran once, abstractly: ``reads``, ``writes`` and a pure function of both inputs."""

    def __init__(self, closed, places, out_tree, scope):
        self.closed, self.places, self.out_tree = closed, places, out_tree
        self.reads, self.born, self.used = scope.reads, scope.born, scope.used
        out, writes = out_tree.unflatten(closed.out_avals)
        # The outputs are `(out, Writes)`: their treedef names the States, their types are known without a run.
        self.writes, self.result_types = writes.states, out
        self.written_types = dict(zip(writes.states, writes.values, strict=True))  # State -> tree of avals

    def __call__(self, given, args, kwargs):
        """Evaluate with ``given`` = {State: value} for the reads, and arguments of the same structure.

        Returns ``(out, Writes)``. No Python code of the user runs.
        """
        leaves = jax.tree.leaves((args, kwargs))
        # Evaluating a marker asks this thread for the value; an evaluation may run inside that of another program.
        outer = _thread.given
        try:
            _thread.given = {id(s): jax.tree.leaves(given[s]) for s in self.reads}
            return self.out_tree.unflatten(jaxpr_as_fun(self.closed)(*(leaves[i] for i in self.places)))
        finally:
            _thread.given = outer

    def replaces(self, state) -> bool:
        """Tell whether the value written to ``state`` does not depend on the value read."""
        _, writes = self.out_tree.unflatten(self.closed.jaxpr.outvars)
        wanted = set(map(id, jax.tree.leaves(writes.values[writes.states.index(state)])))
        # Backwards, collecting the variables that the written value depends on.
        for eqn in reversed(self.closed.eqns):
            if wanted.isdisjoint(map(id, eqn.outvars)):
                continue
            if eqn.primitive is state_read and eqn.params["state"] == id(state):
                return False
            wanted.update(map(id, eqn.invars))
        return True


def traced_part(arg, dynamic):
    """Return the traced leaves of one argument; the argument itself if all are, for its names in messages."""
    leaves = jax.tree.leaves(arg)
    traced = [leaf for leaf in leaves if dynamic(leaf)]
    return arg if len(traced) == len(leaves) else traced


def stage(fun, args, kwargs, *, name, dynamic=is_tracer, scope=None) -> Staged:
    """Run ``fun(*args, **kwargs)`` once, abstractly, in a staging scope.

    Leaves of the arguments for which ``dynamic`` holds become inputs; the others are closed over as they are.
    """
    scope, trees = scope or Scope(name, stages=True), []
    _, rest = partition((args, kwargs), dynamic)
    explained = jax.config.jax_explain_cache_misses  # pyright: ignore[reportAttributeAccessIssue]

    def flat(*inputs, **named):
        a, k = combine(jax.tree.leaves((inputs, named)), rest)
        with jax.explain_cache_misses(explained):
            out, writes = run(scope, fun, *a, **k)
        refuse_foreign(out, lambda: f"{getattr(fun, '__qualname__', type(fun).__name__)} returned", name)
        for state, value in zip(writes.states, writes.values, strict=True):
            refuse_foreign(value, lambda state=state: f"{state.describe()} was given", name)
        out, tree = jax.tree.flatten((out, writes))
        trees.append(tree)
        return out  # JAX's caches keep the structure of a result, and that of `(out, writes)` holds States

    named_after(flat, fun, same_arguments=True)
    named = {key: traced_part(arg, dynamic) for key, arg in kwargs.items()}
    with jax.explain_cache_misses(False):  # `flat` is always a new function; what matters is the trace around it
        closed = jax.make_jaxpr(flat)(*(traced_part(arg, dynamic) for arg in args), **named)
    return Staged(closed, rest.places, trees[0], scope)
