"""``debug_nan=True``: a derivative whose result has to be finite, and when the result is looked at.

A transform gives its call to a `DerivativeCheck` and runs that in place of the call. Called at once, the derivative is
computed as always and the result is looked at. Only if it is not finite the same call is staged, on the same States
and keys, and its program, forward and backward in one, is searched (`report`, `search`). Nothing has been committed by
then.

Inside a transform there are no numbers to look at. The call is staged right away, so that the user's function runs
once, and its program is evaluated in place; the result is looked at when that runs (`callback`).
"""

import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..._errors import NonFiniteError
from ..._program.source_lines import site_of
from ..._seam.packing import Carried
from ..._seam.scope import Scope, commit, eager, gather, is_tracer, run
from ..._seam.staging import Staged, stage
from .callback import check_at_run_time
from .report import Program, describe_line, facts_of, is_input, untraceable_reason
from .search import inexact

__all__ = ["DerivativeCheck", "find_faults"]


@dataclass(frozen=True)
class DerivativeCheck:
    """A derivative that has to be finite: ``call(*vector, *args, **kwargs)`` returns ``(derivative, value, *aux)``.

    ``call`` commits the writes of the user's function. The operations that the value depends on are the forward pass,
    so the value is part of the result even where the user does not ask for it. ``name`` is the transform with its
    function, ``grad(loss)``. ``inputs(args, kwargs)`` returns the names of the differentiated values and the structure
    of a gradient, where the derivative has that. A product with a matrix has one ``vector``, ``vector_name`` in
    messages.
    """

    call: Callable
    name: str
    inputs: Callable = lambda args, kwargs: ([], None)
    vector_name: str = "the vector"

    @property
    def transform(self) -> str:
        """The name without that of the function."""
        return self.name.partition("(")[0]

    def run(self, args: tuple, kwargs: dict, *vector: Any) -> tuple:
        """Return the result of the call and commit its writes; raise `NonFiniteError` if they are not finite."""
        if not eager():
            return self._run_in_program(args, kwargs, vector)
        out, writes, again = self.first_run(args, kwargs, vector)
        if any(map(bool, find_faults(out, writes))):
            with again:
                raise self._diagnose(args, kwargs, vector) from None
        commit(writes)
        return out

    def first_run(self, args: tuple, kwargs: dict, vector: tuple = ()) -> tuple:
        """Return the result of the call, its writes, and a scope in which it may run a second time.

        A function that keeps the States that it makes, in an attribute say, makes them in the first run only. In that
        scope they have the values that they were made with, as the first run may have written others.
        """
        scope = Scope(self.transform)
        scope.initial = weakref.WeakKeyDictionary()
        out, writes = run(scope, self.call, *vector, *args, **kwargs)
        last = dict(zip(writes.states, writes.values, strict=True))
        first = {state: scope.initial.get(state, last[state]) for state in scope.born}
        # A State that was made in a trace of the first run was made with a tracer, which is of no use now.
        first = {s: last[s] if any(map(is_tracer, jax.tree.leaves(value))) else value for s, value in first.items()}
        return out, writes, Scope(self.transform, first)

    def stage(self, args: tuple, kwargs: dict, vector: tuple) -> Staged:
        """Stage the call; tracers, and arrays that are not known yet, become inputs."""

        def call_packed(args, kwargs, vector):
            return Carried.pack(self.call(*vector, *args, **kwargs))

        return stage(call_packed, (args, kwargs, vector), {}, name=self.transform, dynamic=is_input)

    def program(self, args: tuple, kwargs: dict, vector: tuple, of_map: bool = False) -> tuple[Program, tuple, Staged]:
        """Return the staged call as a program, its inputs, and the `Staged`."""
        staged = self.stage(args, kwargs, vector)
        return *Program.from_staged(self, staged, args, kwargs, vector, of_map), staged

    def _run_in_program(self, args, kwargs, vector):
        program, inputs, staged = self.program(args, kwargs, vector)
        values = dict(zip(staged.reads, gather(staged.reads), strict=True))
        carried, writes = staged(values, (args, kwargs, vector), {})
        derivative, *rest = carried.tree()
        derivative = check_at_run_time(program, inputs, derivative, find_faults((derivative, *rest), writes))
        commit(writes)
        return (derivative, *rest)

    def _diagnose(self, args, kwargs, vector) -> NonFiniteError:
        try:
            program, inputs, _ = self.program(args, kwargs, vector)
        except Exception as problem:  # the function has just run well, so it is being abstract that it cannot do
            return self._diagnose_by_python(args, kwargs, vector, problem)
        return program.search(*inputs)

    def _diagnose_by_python(self, args, kwargs, vector, problem) -> NonFiniteError:
        """Report the finding of JAX's own check: the first NaN, which is not always the one that matters."""
        head, why = f"{self.name}: the result is not finite.", untraceable_reason(problem)
        for check, what in ((jax.debug_nans, "NaN"), (jax.debug_infs, "Inf")):
            try:
                with check(True), Scope(self.transform):
                    self.call(*vector, *args, **kwargs)
            except FloatingPointError as error:
                frames = [(f.filename, f.lineno, f.name) for f in reversed(traceback.extract_tb(error.__traceback__))]
                site = site_of(frames)
                if site is None:
                    return NonFiniteError(
                        f"{head}\n  {why}, and {what} appears in the backward pass, whose lines are not known then. "
                        f"Use jnp.where or brainstate.transform.cond in place of Python's if to have them.",
                        kind=what,
                        phase="backward",
                    )
                return NonFiniteError(
                    f"{head} The first {what} at all is at {describe_line(site)}\n  {str(error).strip()}\n  {why}, so "
                    f"that it is not known whether this one reaches the result. Use jnp.where or "
                    f"brainstate.transform.cond in place of Python's if to have that.",
                    kind=what,
                    phase="forward",
                    **facts_of(site),
                )
        return NonFiniteError(f"{head}\n  {why}, and a run with jax.debug_nans and jax.debug_infs finds nothing.")


@jax.jit
def _not_finite(x):
    return ~jnp.isfinite(x).all()


@jax.jit
def _has_nan(x):
    return jnp.isnan(x).any()


def find_faults(out: tuple, writes: Any) -> list:
    """Return boolean arrays for a result ``(derivative, value, *aux)``: any true one means that it is not finite.

    That is NaN anywhere, or an infinity in the derivative or in a value that is one number. Elsewhere an infinity is
    often meant: a mask, the best loss so far.
    """
    derivative, value, *aux = out
    single = [x for x in jax.tree.leaves(value) if jnp.shape(x) == ()]
    arrays = [x for x in jax.tree.leaves(value) if jnp.shape(x) != ()]
    return [
        *(_not_finite(x) for x in jax.tree.leaves((derivative, single)) if inexact(x)),
        *(_has_nan(x) for x in jax.tree.leaves((arrays, aux, writes)) if inexact(x)),
    ]
