"""``retraces()``: in words, why a compiled function was traced again.

A `Journal` belongs to one compiled function and is written while JAX traces, so a call that is not traced pays
nothing. Each trace leaves a record: its signature as text, its context (options of JAX, the mesh), and its causes. They
are found at once by comparison with the *nearest* earlier trace that could have served, the latest of several:

* a trace that was left with an exception served nobody, and is only mentioned;
* a new program (a State was replaced on a Module, ``clear_cache``) has no earlier traces;
* the inputs of a trace include the States that it met itself. A State that a later trace met is an input from then
  on, and one that a trace created and left behind as well: kinds of calls that were traced before are traced again.

Where no recorded thing differs, the record says so and names the causes that remain: it never guesses.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax

from ..._seam.scope import is_tracer
from .._tap import listeners
from .signature import NOTHING, Comparison, Part, argument_names, argument_parts, compare

__all__ = ["Journal", "Retrace", "Retraces", "TraceRecord", "options"]

_KEPT = 32  # records

_UNSEEN = (
    "nothing that is recorded here: JAX's caches were cleared, a context around the call is another (an axis of a map, "
    "a device, an option of JAX), or two threads traced at once"
)

# Options on which JAX's cache of traces depends.
_OPTIONS = (
    "jax_check_static_indices",
    "jax_debug_key_reuse",
    "jax_default_device",
    "jax_default_matmul_precision",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_random_seed_offset",
    "jax_softmax_custom_jvp",
    "jax_threefry_partitionable",
)


@dataclass(frozen=True)
class Retrace:
    """One trace of a compiled function and why JAX asked for it.

    Attributes
    ----------
    trace : int
        Its number, counted from 1.
    causes : tuple of str
        All differences from the nearest trace before it.
    """

    trace: int
    causes: tuple[str, ...]

    def __str__(self) -> str:
        return f"trace {self.trace}: {'; '.join(self.causes)}"


class Retraces(tuple[Retrace, ...]):
    """The traces of a compiled function, in order; written one a line."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "\n".join(map(str, self)) or "not traced yet"


@dataclass(eq=False)
class TraceRecord:
    """A trace: its call, and once it is finished the States that it takes in and has created."""

    number: int
    arguments: dict[Any, Part]
    inputs: dict[Any, Part]  # by the id of the State, which is alive while the program is
    options: dict[str, str]
    causes: tuple[str, ...] = ()
    born: frozenset = frozenset()  # ids of the States that the trace created and left behind
    finished: bool = False
    error: str = ""

    def fail(self, error: BaseException) -> None:
        """Note that the function raised while it was traced."""
        self.error = type(error).__name__

    def finish(self, inputs: dict[Any, Part], born: frozenset) -> None:
        """Note which further States the trace takes in, and which it created."""
        self.inputs = {**self.inputs, **inputs}
        self.born, self.finished = born, True


class Journal:
    """Why one compiled function was traced."""

    def __init__(self):
        self._count = 0
        self._records: deque[TraceRecord] = deque(maxlen=_KEPT)
        self._serving: list[TraceRecord] = []  # those of this program, the only ones that can have served
        self._why = "first call"

    def begin(self, why: str) -> None:
        """Note that a new program begins, and why: nothing that was traced serves it."""
        if self._count:
            self._why, self._serving = why, []

    def open(self, fun: Any, inputs: dict[Any, Part], args: tuple, kwargs: dict[str, Any]) -> TraceRecord:
        """Note that ``fun`` is about to be traced for these States and arguments."""
        arguments = argument_parts(argument_names(fun, len(args)), args, kwargs, lambda _, arg: _is_static(arg))
        self._count += 1
        record = TraceRecord(self._count, arguments, inputs, options())
        record.causes = tuple(self._causes(record))
        self._why = ""
        self._records.append(record)
        self._serving = [*self._serving[1 - _KEPT :], record]
        return record

    def entries(self) -> Retraces:
        """Return the causes of each recorded trace."""
        return Retraces(Retrace(record.number, record.causes) for record in self._records)

    # -------------------------------------------------------------------------------------- causes

    def _causes(self, new) -> Iterator[str]:
        if self._why:
            yield self._why
            new = replace(new, inputs={})  # the id of a State means nothing to another program
            earlier = [self._of_call(old, new) for old in reversed(self._records) if old.finished]
            yield from min(earlier, key=len, default=[])
            return
        found = [(self._of_call(old, new), self._of_inputs(old, new), old) for old in reversed(self._serving)]
        failed = [old for of_call, of_inputs, old in found if old.error and not of_call and not of_inputs]
        if failed:
            yield f"trace {failed[0].number}, of the same kind, raised {failed[0].error}"
            return
        seen = [(of_call, of_inputs) for of_call, of_inputs, old in found if old.finished]
        if not seen:
            yield "no trace before it was finished"
            return
        # Differences of the call count first: a user who repeats a call asks for the other causes.
        of_call, of_inputs = min(seen, key=lambda differences: tuple(map(len, differences)))
        yield from (of_call + of_inputs) or [_UNSEEN]

    def _of_call(self, old, new) -> list[str]:
        """Return the differences in arguments, types of the States that both know, and options."""
        known = {key: part for key, part in new.inputs.items() if key in old.inputs}
        alike = {key: old.inputs[key]._replace(form=part.form) for key, part in known.items()}
        differing = [
            _words(row) for row in (*compare(old.arguments, new.arguments), *compare(alike, known)) if not row.same
        ]
        options = ((name, was, new.options[name]) for name, was in old.options.items())
        return differing + [f"{name}: {was} → {now}" for name, was, now in options if was != now]

    def _of_inputs(self, old, new) -> list[str]:
        """Return the States that became inputs since, or are given away now."""
        return [
            f"{part.name} became an input: {self._origin(key)}"
            if key not in old.inputs
            else f"{part.name} is now {part.form or 'not donated'}"
            for key, part in new.inputs.items()
            if key not in old.inputs or part.form != old.inputs[key].form
        ]

    def _origin(self, key) -> str:
        for record in self._serving:
            if key in record.born:
                return f"it was created in trace {record.number}"
            if key in record.inputs:
                return f"it was first met in trace {record.number}"
        return "it was met since"


def _is_static(arg) -> bool:
    return not all(map(is_tracer, jax.tree.leaves(arg)))


def _words(row: Comparison) -> str:
    was, now = ("not given" if text == NOTHING else text for text in (row.was, row.now))
    return f"{row.name}: {was} → {now}"


def options() -> dict[str, str]:
    options = {f"the JAX option {name}": str(getattr(jax.config, name, None)) for name in _OPTIONS}
    return options | {"the mesh": str(jax.sharding.get_abstract_mesh()), "listeners to taps": str(listeners())}
