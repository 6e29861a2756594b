"""Tokens: keys that keep JAX from using a trace of its own again after a State in it has changed.

JAX caches a trace by the identity of the function and the types of its arguments. A State that is read while
``jax.jit``, ``jax.lax.scan`` or another staging transform of JAX traces a function is not in that key: its value, or
the tracer that stands for it, is part of the cached trace. The key of every cache of JAX also holds the values of *user
contexts*, and this module owns one of them. Its value is called the *token*::

    token, everywhere        None, until a State was met; then one number for all threads outside of scopes
    token, in a scope        one for each scope that shows other values of States than its surroundings, or is opened
                             while a scope of another thread is open

A State is *met* when such a read happens. From then on

* a change of a State that was met outside of every scope of ours brings a new token for everywhere;
* a scope in which the value of a State that was met may differ from the value outside has a token of its own, and a
  write to such a State brings it another;
* a trace with values of a scope that had no token yet (the first meeting is in it) lies under a token that nobody
  uses again.

So a trace is found again only where the States that it has read have the values that it has seen. A program that never
meets a State pays for one question to an empty list; for the price of the others see ``docs/explanation/how-it-works``.
The programs of `jit` itself know their States, and are looked up `without_token`.
"""

import contextlib
import itertools
import os
import warnings
import weakref
from pathlib import Path
from threading import get_ident
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import set_current_trace

from .._compat import AT_ONCE, current_trace, stages_within
from .._errors import FrozenReadWarning, TraceContextError
from .local_states import frames_in, local_trace, users_frame
from .other_libraries import refuse_lost

__all__ = [
    "announce_replacement",
    "announce_values",
    "announce_write",
    "any_met",
    "forget",
    "is_deferred",
    "meet",
    "outside_rule",
    "read_inside",
    "refuse_leak",
    "separate",
    "token",
    "without_token",
]

any_met: list[bool] = []  # not empty from the first meeting on: asked wherever a State changes

_token = jax.make_user_context(None)
_number = itertools.count(1)
_open_slots: dict[int, int] = {}  # {number: thread} of scopes that are open in several threads at once
_TIDY = 512  # after this many tokens JAX's caches are emptied; a small program compiled for a CPU takes about 1 MB
_spent = [0]
_told: list[Any] = []  # the trace, by weak reference, and the line of the user of which the last warning spoke

_STEP = str(Path(__file__).with_name("step.py"))
_RULES = os.sep + "custom_derivatives.py"  # of JAX, which calls functions with rules there


_in_rules: Any = weakref.WeakKeyDictionary()  # States that a function or rule of JAX's own has read while traced


class _Met:
    """A State that was met: by which trace, and who was warned."""

    __slots__ = ("first", "outside", "told")

    def __init__(self, first):
        self.first = first  # weak reference to the trace that met it first
        self.outside = False  # whether a program outside of every scope holds its value
        self.told: set = set()  # lines of the user that were warned of


_states: Any = weakref.WeakKeyDictionary()  # State -> _Met


def token() -> int | None:
    """Return the present token."""
    return _token.value


def without_token() -> Any:
    """Return a context manager in which JAX looks for programs that hold no value of a State."""
    return contextlib.nullcontext() if _token.value is None else _token(None)


def announce_values(states) -> None:
    """Announce that ``states`` may have other values now, outside of every scope."""
    if any(state in _states and _states[state].outside for state in states):
        _everywhere()


def _everywhere() -> None:
    """Let nobody outside of a scope find a present trace again."""
    _token.set_global(next(_number))
    _spend()


def announce_replacement(scope) -> None:
    """Announce that an attribute that held a State may hold another one, in ``scope`` too if there is one."""
    _everywhere()
    if scope is not None:
        _renew(scope)


def _spend():
    """Count a token under which JAX may have compiled: programs that nobody can find again keep their memory."""
    _spent[0] += 1
    if _spent[0] >= _TIDY and current_trace() is AT_ONCE:
        _spent[0] = 0
        jax.clear_caches()


class _Slot:
    """A token that no other thread has while a scope is open; it is used again, as long as no State was met."""

    def __init__(self, number):
        self.number, self.context = number, _token(-number)
        self.context.__enter__()

    def __exit__(self, *error):
        self.context.__exit__(*error)
        if _open_slots.get(self.number) == get_ident():
            del _open_slots[self.number]


def _part_threads(scope):
    # JAX lets a thread wait for the trace of another one under the same key, and gives it the values read there.
    if any_met:
        _renew(scope)
        _spend()
        return
    thread = get_ident()
    number = next(n for n in itertools.count(1) if _open_slots.setdefault(n, thread) == thread)
    scope.context = _Slot(number)


def separate(scope, threads: bool) -> None:
    """Give ``scope``, which is being opened, a token of its own if it may show other values than its surroundings.

    So it does if ``threads``: then scopes of other threads are open.
    """
    if threads and scope.parent is None:
        _part_threads(scope)
    elif any_met and (scope.stages or scope.opaque or any(state in _states for state in scope.given)):
        _renew(scope)
        if not scope.stages:
            _spend()


def announce_write(scope, state) -> None:
    """Announce that ``state`` may have another value from now on in ``scope``, or outside of all (None)."""
    if scope is None:
        announce_values((state,))
    elif state in _states:
        _renew(scope)


def _renew(scope):
    context = _token(next(_number))
    context.__enter__()
    if scope.context is None:  # restores, when the scope is closed, the token around
        scope.context = context


def _differs(scope, state) -> bool:
    """Tell whether ``state`` may have another value in ``scope`` than around it."""
    return scope.stages or scope.opaque or any(state in x for x in (scope.given, scope.written, scope.lent))


def _note(scope, state) -> "_Met | None":
    """Note that a program of JAX's own, traced in ``scope`` or outside of all (None), holds the value of ``state``.

    Returns the record of the State if the program is one outside: each change of the value will cost a trace.
    """
    bare = []  # scopes that share the present token, from inside out
    while scope is not None and scope.context is None:
        bare.append(scope)
        scope = scope.parent
    bare = [s for s in bare if _differs(s, state)]
    any_met[:] = [True]
    met = _states.get(state)
    if met is None:
        met = _states[state] = _Met(weakref.ref(current_trace()))
    if bare:
        # The trace in progress will lie under the present token, with a value that is seen in these scopes only.
        _everywhere() if scope is None else _renew(scope)
        for inner in reversed(bare):
            _renew(inner)
    elif scope is None:
        met.outside = True
        return met
    return None


def forget(trace) -> None:
    """Take back the meetings of which ``trace`` was the first: it ends in an error, and JAX will keep nothing of it."""
    for state in [state for state, met in _states.items() if met.first() is trace]:
        del _states[state]


# ------------------------------------------------------------------------- reads under transforms of JAX's own


def _source(scope, state) -> Any:
    """Return the scope whose value ``state`` has in ``scope``, or None if that is the stored one."""
    while scope is not None and not _differs(scope, state):
        scope = scope.parent
    return scope


def read_inside(scope, state, value):
    """Return ``value`` of a State that a transform of JAX's own within ``scope`` reads, if it can be had there."""
    outer = getattr(_source(scope, state), "trace", None)  # where the value belongs
    traced = outer is not None and any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))
    if (is_deferred(scope) and current_trace() is not AT_ONCE) or (traced and stages_within(outer) is None):
        raise outside_rule(state)
    refuse_lost(state)
    if not stages_within(scope.trace):
        return value
    meet(scope, state)
    if not traced or not any(frames_in(_RULES)):
        return value
    _in_rules[state] = None
    # JAX drops the derivative of a value that a function with a rule closes over: refuse it, where there is one.
    with set_current_trace(outer):
        return jax.tree.map(lambda leaf: _undifferentiable(state, leaf) if isinstance(leaf, Tracer) else leaf, value)


def _undifferentiable(state, leaf):
    same = jax.custom_jvp(lambda x: x)

    def refuse(primals, tangents):
        raise outside_rule(state)

    same.defjvp(refuse)
    return same(leaf)


def refuse_leak(error) -> None:
    """Name a State that a function or rule has read, if JAX met a tracer where none may be."""
    leaked = isinstance(error, jax.errors.UnexpectedTracerError) or "No constant handler" in str(error)
    for state in list(_in_rules) if leaked else ():
        raise outside_rule(state) from error


def outside_rule(state) -> TraceContextError:
    """Return the error for a read of ``state`` in code that JAX runs outside of the transform in progress."""
    return TraceContextError(
        f"{state.describe()} is read in a function or rule of jax.custom_jvp or jax.custom_vjp, or of a library that "
        f"defines an operation with them, which JAX runs outside of the transform in progress: a derivative would be "
        f"lost, or the value compiled in. Pass `state.value` to that function as an argument, or declare the State: "
        f"brainstate.transform.custom_vjp(fun, states=...)."
    )


def is_deferred(scope, frame: Any = None) -> bool:
    """Tell whether JAX runs a rule, or lowers, for a compiled function that was called in ``scope`` and has ended."""
    if scope is not None:
        return scope.launches > 0
    return any(frames_in(_STEP, frame))


def meet(scope, state) -> None:
    """Note that a program of JAX's own holds the value of ``state``; warn once for each line that reads it outside."""
    if local_trace(state) is not None:
        return  # the State lives and dies with that program
    met = _note(scope, state)
    if met is None:
        return
    (frame, level), trace = users_frame(), current_trace()
    if is_deferred(None, frame.f_back):
        raise outside_rule(state)
    line = frame.f_code.co_filename, frame.f_lineno
    if line in met.told or (_told and _told[0]() is trace and _told[1] == line):
        return  # a line that reads a whole model is told of the first State
    met.told.add(line)
    _told[:] = weakref.ref(trace), line
    warnings.warn(
        f"{state.describe()} was read under a raw staging transform (jax.jit, jax.lax.scan, ...): its value is a "
        f"constant of that program, so after each change JAX traces and compiles again whatever is called outside of "
        f"brainstate.transform. Use the transform of the same name from brainstate.transform.",
        FrozenReadWarning,
        stacklevel=level,
    )
