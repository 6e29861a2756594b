"""The path of a compiled call: gather the values, call the program, commit its writes.

This is where Python adds to the price of a call, so it belongs to the seam and reads and assigns
``State._value`` without a function in between. A call that writes holds one lock from reading to committing; a call
that only reads gathers under the lock of a commit, so that it sees no half of one.

A signal may come at any time. Locks are taken by ``with`` only, as CPython looks for no signal between the lock and
the block; a commit that is interrupted is completed; the results of a program that took buffers are kept (see
`with_donation`).

`Launcher` is a function that JAX traces when it must; `Ready` is a program that was compiled ahead of time for one kind
of call. JAX runs such a program at once, under a raw transform as well, and its results then look like any others. So
`Ready` asks beforehand where it is called; `Launcher` can tell by the tracers that it gets back.
"""

import contextlib
from functools import partial
from itertools import compress, starmap
from operator import not_
from typing import Any

import jax

from .._compat import AT_ONCE, current_trace, jit_disabled
from .._errors import StateValueError, TraceContextError
from .._functions import shorten
from .donation import donors, is_deleted, taken_error
from .packing import ABSENT, Writes
from .scope import (
    _assign_all,
    _commit_lock,
    _generation,
    _open,
    _plain,
    _raw_transform,
    _step_lock,
    claim,
    commit,
    eager,
    gather,
    innermost,
    is_tracer,
)
from .staging import Restart
from .tokens import announce_values, any_met, refuse_leak, without_token

__all__ = ["Launcher", "Ready", "generators", "give", "is_outside", "launch", "with_donation"]

# Errors that may come from a State without a value, or from a State among the arguments.
_NO_VALUE = AttributeError, TypeError, StateValueError, TraceContextError


def is_outside() -> bool:
    """Tell whether no transform is in progress in this thread, neither of this package nor of JAX."""
    return innermost() is None and eager()


def generators(states) -> list[int]:
    """Return the positions of random generators among ``states``."""
    return [i for i, state in enumerate(states) if state.branch is not None]


def _refuse_taken(states, error, by=None) -> None:
    """Name those of ``states`` whose arrays are gone: a call failed because of that, or ``by`` took them."""
    gone = [s.describe() for s in states if is_deleted(getattr(s, "_value", None))]
    if not gone or innermost() is not None or isinstance(error, StateValueError):
        return
    words = taken_error(gone, by, error)
    if isinstance(error, Exception):
        raise words from error
    error.add_note(str(words))


@contextlib.contextmanager
def _marked_as_launch(scope):
    """Run a compiled function that ``scope`` calls: until it ends, reads of States are not those of the user."""
    with without_token():
        if scope is not None:
            scope.launches += 1
        try:
            yield
        finally:
            if scope is not None:
                scope.launches -= 1


def _writes_of(written, values) -> Writes:
    """Return the values that a program gives to the States in ``written``, without those that it left alone."""
    new = {s: v for s, v in zip(written, values, strict=False) if v is not ABSENT}
    return Writes(tuple(new), list(new.values()))


def launch(jitted, states, generators, written, args, kwargs):
    """Call ``jitted`` with the values of ``states`` and the arguments, and commit the values that it returns.

    It returns its result and a list with the new value, or ``ABSENT``, of each State in ``written``. ``generators`` are
    the positions of random generators among the States.
    """
    locked = bool(written)
    with _step_lock if locked else contextlib.nullcontext():
        given = gather(states, generators)
        try:
            with _marked_as_launch(innermost()):
                out, values = jitted(given, *args, **kwargs)
        except (RuntimeError, ValueError) as error:
            if innermost() is not None or not is_deleted(given):
                raise
            with _step_lock:  # a call in another thread takes them, and has committed when it lets us in
                _refuse_taken(states, error)
                return launch(jitted, states, generators, written, args, kwargs)
        if values and not locked and not jit_disabled():
            # Another thread has found out meanwhile that this function writes: again, alone, and this never happened.
            return launch(jitted, states, generators, written, args, kwargs)
        commit(_writes_of(written, values))
    return out


def give(name, returned, jitted, states, generators, written, args, kwargs):
    """Do as `launch` for the function ``name`` that takes the arrays of States: results must be committed or are lost.

    ``jitted`` comes from `with_donation`, which puts the results of the program into the list ``returned``.
    """
    donors[name] = None
    with _step_lock:
        try:
            given = gather(states, generators)
            with _marked_as_launch(innermost()):
                out, values = jitted(given, *args, **kwargs)
            if returned:
                with _commit_lock:
                    _assign_all(written, values)
            else:  # inside a transform nothing is given away
                commit(_writes_of(written, values))
        except BaseException as error:
            if returned:
                _assign_all(written, returned[-1][1])
            else:
                _refuse_taken(states, error, name)
            raise
        finally:
            returned.clear()
            if any_met:
                announce_values(written)
    return out


def with_donation(compiled, gives, returned):
    """Return ``compiled``, whose first argument is donated, as a function of the values of all States in one list.

    ``gives`` says of each State whether its value is to be donated. A result is also put into ``returned``, by C: no
    signal comes between the end of the program, which has taken the arrays, and that.
    """

    def call(values, /, *args, **kwargs):
        given, kept = list(compress(values, gives)), list(compress(values, map(not_, gives)))
        if not given:
            return compiled(given, kept, *args, **kwargs)
        if not is_outside():  # the transform around may fail yet, and then the States are as they were
            with jax.ensure_compile_time_eval():
                given = jax.tree.map(_copy, given)
            return compiled(given, kept, *args, **kwargs)
        leaves = jax.tree.leaves((given, kept, args, kwargs))
        if len(set(map(id, leaves))) < len(leaves):
            given = _copy_shared(given, (kept, args, kwargs))
        returned.extend(starmap(partial(compiled, **kwargs), [(given, kept, *args)]))
        return returned[-1]

    return call


def _copy(leaf):
    return jax.numpy.copy(leaf) if isinstance(leaf, jax.Array) and not is_tracer(leaf) else leaf


def _copy_shared(given: list, others: Any) -> list:
    """Return ``given``, which is to be donated, with a copy of each array that stands there twice or in ``others``."""
    seen, (leaves, treedef) = set(map(id, jax.tree.leaves(others))), jax.tree.flatten(given)
    for i, leaf in enumerate(leaves):
        if id(leaf) in seen:
            leaves[i] = jax.numpy.copy(leaf)
        seen.add(id(leaf))
    return treedef.unflatten(leaves)


class Launcher:
    """A compiled function whose steady call only gathers, calls and commits.

    ``_program`` holds the arguments of `launch`, and calls it. ``_retry`` does the calls that trace, ``_begin(why)``
    begins a new program, ``_look(program)`` does so if a Module changed that the program has read, and
    ``check_arguments`` raises the error for arguments that JAX refuses.
    """

    _program: Any
    _retry: Any
    check_arguments: Any
    _begin: Any
    _look: Any

    def __call__(self, /, *args, **kwargs):
        """Run the compiled function on the present values of the States and commit its writes."""
        program = self._program
        if program.generation != _generation[0]:
            program = self._look(program)
        try:
            if program.donates or not program.written or any_met or (_open and innermost() is not None):
                out = program.launch(args, kwargs)
            else:
                # The steps of `launch`, in this frame, with the loops that cost least for few States.
                written, values, i = program.written, [], 0
                with _step_lock:
                    for state in program.states:
                        values.append(state._value)
                    for place in program.generators:
                        values[place] = claim(program.states[place])
                    # The shorter call is cheaper.
                    out, values = program.jitted(values, *args, **kwargs) if kwargs else program.jitted(values, *args)
                    for value in values:
                        # A plain array is not a tracer in any trace; only for others ask which trace is on.
                        # `continue`, as CPython 3.13 leaves the jump of a plain `if` here out of the `with` block:
                        # an interrupt at that jump would leave the lock held.
                        if type(value) in _plain:
                            continue
                        if not eager():
                            raise _raw_transform(written[0])
                        break
                    with _commit_lock:
                        try:
                            for value in values:  # `written` may have grown in the meantime
                                if value is not ABSENT:
                                    written[i]._value = value
                                i += 1
                        except BaseException:  # an interrupt between two of them
                            _assign_all(written, values)
                            raise
            if program.newborn:
                program.adopt()
            return out
        except Restart as restart:
            staged = restart.staged
        except Exception as error:
            shorten(error)
            if not self._lacks_value(program, error, args, kwargs):
                raise
            program, staged = self._begin("a State that is an input had no value"), None
        return self._retry(program, staged, args, kwargs)

    def _lacks_value(self, program, error, args, kwargs) -> bool:
        """Tell whether a call failed because a State had no value; for other causes raise a better error, if any."""
        _refuse_taken(program.states, error)
        if not isinstance(error, _NO_VALUE):
            return False
        if innermost() is not None or all(hasattr(s, "_value") for s in program.states):
            refuse_leak(error)
            self.check_arguments(args, kwargs)
            return False
        return True  # an input was created by a call that failed, or by an enclosing transform that has ended


class Ready:
    """A program compiled ahead of time: a call gathers, computes and commits, and leaves the checks of inputs to JAX.

    ``_run(values, *args, **kwargs)`` gives the result and the values of ``_written``, or refuses. ``_launch`` does a
    whole call by `launch` or `give`, for a program that donates or leaves some of ``_written`` alone (``_writes_all``
    is false). ``_refuse`` raises the error for a call that failed, and ``_renew`` looks again after a replacement.
    """

    _run: Any
    _states: tuple
    _generators: list
    _written: tuple
    _generation: int
    _touched: Any
    _writes_all: bool
    _launch: Any
    _renew: Any
    _refuse: Any

    def __call__(self, /, *args, **kwargs):
        """Run the program on the present values of the States and commit its writes."""
        if self._generation != _generation[0]:
            self._renew()
        if current_trace() is not AT_ONCE or (_open and innermost() is not None):
            return self._call_within(args, kwargs)
        written, values, i = self._written, [], 0
        try:
            if any_met or not self._writes_all:
                return self._launch(args, kwargs)
            if not written:
                with _commit_lock:
                    values = [s._value for s in self._states]
                return self._run(values, *args, **kwargs)[0]
            with _step_lock:
                for state in self._states:
                    values.append(state._value)
                for place in self._generators:
                    values[place] = claim(self._states[place])
                out, values = self._run(values, *args, **kwargs) if kwargs else self._run(values, *args)  # cheaper
                with _commit_lock:
                    try:
                        for value in values:
                            written[i]._value = value
                            i += 1
                    except BaseException:  # an interrupt between two of them
                        _assign_all(written, values)
                        raise
            return out
        except Exception as error:
            shorten(error)
            if not self._written and is_deleted(values):  # a call in another thread was taking them
                return self._launch(args, kwargs)
            _refuse_taken(self._states, error)
            if not isinstance(error, StateValueError):
                self._refuse(args, kwargs)
            raise

    def _call_within(self, args, kwargs):
        """Do a call inside a transform, which is right as long as no input is traced."""
        values = gather(self._states)
        try:
            if any(map(is_tracer, jax.tree.leaves((values, args, kwargs)))):
                raise TypeError
            if self._written and innermost() is None:
                raise _raw_transform(self._written[0])
            out, new = self._run(values, *args, **kwargs)
        except Exception:
            self._refuse(args, kwargs)
            raise
        commit(_writes_of(self._written, new))
        self._touched.pass_on()
        return out
