"""The path of a compiled call: gather the values, call the program, commit its writes.

This is where Python adds to the price of a call, so it belongs to the seam and reads and assigns
``State._value`` without a function in between. A call that writes holds one lock from reading to committing; a call
that only reads gathers under the lock of a commit, so that it sees no half of one.

A signal may come at any time. Locks are taken by ``with`` only, as CPython looks for no signal between the lock and
the block; a commit that is interrupted is completed; what a program returns that was given buffers is kept (`box`).

`Launcher` calls what JAX traces when it must, and `Ready` a program that was compiled ahead of time and knows one
kind of call. JAX runs such a program at once, under a raw transform as well, and what it returns then looks like
any other result. So `Ready` asks beforehand where it is called; `Launcher` can tell by the tracers that it gets back.
"""

import contextlib
from functools import partial
from itertools import starmap
from typing import Any

import jax

from .._compat import AT_ONCE, current_trace, jit_disabled
from .._errors import StateValueError, TraceContextError
from .._functions import shorten
from .donation import donors, is_deleted, taken
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
from .tokens import apart, changed, refuse_leak, switched, token

__all__ = ["Launcher", "Ready", "Sealed", "box", "generators", "give", "launch", "outside"]

# Errors that a State without a value, or one among the arguments, may cause; they have other causes, too.
_NO_VALUE = AttributeError, TypeError, StateValueError, TraceContextError


def outside() -> bool:
    """Tell whether no transform is in progress in this thread, neither of this package nor of JAX."""
    return innermost() is None and eager()


def generators(states) -> list[int]:
    """Return the positions of random generators among ``states``."""
    return [i for i, state in enumerate(states) if state.branch is not None]


def _refuse_taken(states, error, by=None) -> None:
    """Say which of ``states`` have arrays that are gone, if that is why a call failed or if it took them."""
    gone = [s.describe() for s in states if is_deleted(getattr(s, "_value", None))]
    if not gone or innermost() is not None or isinstance(error, StateValueError):
        return
    words = taken(gone, by, error)
    if isinstance(error, Exception):
        raise words from error
    error.add_note(str(words))


@contextlib.contextmanager
def _called_in(scope):
    """Run a compiled function that ``scope`` calls: what reads a State there meanwhile is not the user's function."""
    with apart():
        if scope is not None:
            scope.launches += 1
        try:
            yield
        finally:
            if scope is not None:
                scope.launches -= 1


def _new(written, values) -> Writes:
    """Return what a program says of the States in ``written``, without those that it left alone."""
    new = {s: v for s, v in zip(written, values, strict=False) if v is not ABSENT}
    return Writes(tuple(new), list(new.values()))


def launch(jitted, states, generators, written, args, kwargs):
    """Call ``jitted`` with the values of ``states`` and the arguments, commit the new values, and return the result.

    ``jitted`` returns its result and a list with the new value, or ``ABSENT``, of each State in ``written``.
    ``generators`` are the positions of random generators among the States.
    """
    locked = bool(written)
    with _step_lock if locked else contextlib.nullcontext():
        given = gather(states, generators)
        try:
            with _called_in(innermost()):
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
        commit(_new(written, values))
    return out


def give(name, returned, jitted, states, generators, written, args, kwargs):
    """Do as `launch` for the function ``name``, where values are given away: what is not committed would be lost.

    C puts what the program returns into the list ``returned`` (`box`), so no signal comes between its end and that.
    """
    donors[name] = None
    with _step_lock:
        try:
            given = gather(states, generators)
            with _called_in(innermost()):
                out, values = jitted(given, *args, **kwargs)
            if returned:
                with _commit_lock:
                    _assign_all(written, values)
            else:  # inside a transform nothing is given away
                commit(_new(written, values))
        except BaseException as error:
            if returned:
                _assign_all(written, returned[-1][1])
            else:
                _refuse_taken(states, error, name)
            raise
        finally:
            returned.clear()
            if switched:
                changed(written)
    return out


def box(returned, compiled, args, kwargs):
    """Return ``compiled(*args, **kwargs)``, which is also the last element of ``returned``."""
    returned.extend(starmap(partial(compiled, **kwargs), [args]))
    return returned[-1]


def _stored_all(states) -> bool:
    return innermost() is not None or all(hasattr(s, "_value") for s in states)


class Launcher:
    """A compiled function whose call does nothing but what must be done: gather, call, commit.

    ``_program`` has what `launch` takes, and calls it; ``_retry`` does the calls that trace, ``_begin(why)`` begins a
    new program, ``_look(program)`` does if something changed that concerns it, and ``_explain`` has the words for
    arguments that JAX refuses.
    """

    _program: Any
    _retry: Any
    _explain: Any
    _begin: Any
    _look: Any

    def __call__(self, /, *args, **kwargs):
        """Run the compiled function on the present values of the States and commit what it writes."""
        program = self._program
        if program.generation != _generation[0]:
            program = self._look(program)
        try:
            if program.donates or not program.written or switched or (_open and innermost() is not None):
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
                        # A plain array is not a tracer, whatever is around; only otherwise ask which trace is on.
                        if type(value) not in _plain:
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
            if not program.newborn:
                return out
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
        """Tell whether a call failed for want of a value, or find better words for what it failed of."""
        _refuse_taken(program.states, error)
        if not isinstance(error, _NO_VALUE):
            return False
        if _stored_all(program.states):
            refuse_leak(error)
            self._explain(args, kwargs)
            return False
        return True  # an input was created by a call that failed, or by an enclosing transform that has ended


class Sealed(Exception):
    """JAX was about to trace or compile a program that is ready."""


class Ready:
    """A program compiled ahead of time: a call gathers, computes and commits, and leaves the checks of inputs to JAX.

    ``_run(values, *args, **kwargs)`` gives the result and the values of ``_written``, or raises `Sealed`. Then
    ``_run_any``, which is slower and takes all that can be run, does it, and takes its place if it can. ``_refused``
    has the words for a call that failed, ``_renew`` looks again after a replacement, ``_donates`` says whether
    values are given away, and `give` has the use of ``_label`` and ``_returned``.
    """

    _run: Any
    _run_any: Any
    _states: tuple
    _generators: list
    _written: tuple
    _generation: int
    _touched: Any
    _donates: bool
    _label: str
    _returned: list
    _renew: Any
    _refused: Any

    def __call__(self, /, *args, **kwargs):
        """Run the program on the present values of the States and commit what it writes."""
        if self._generation != _generation[0]:
            self._renew()
        if current_trace() is not AT_ONCE or (_open and innermost() is not None):
            return self._call_within(args, kwargs)
        if switched and token() is not None:
            with apart():
                return self(*args, **kwargs)
        written, values, i = self._written, [], 0
        try:
            if not written:
                with _commit_lock:
                    values = [s._value for s in self._states]
                return self._run(values, *args, **kwargs)[0]
            if self._donates:
                return self._give(args, kwargs)
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
            if switched:
                changed(written)
            return out
        except Sealed:
            return self._call_any(args, kwargs)
        except Exception as error:
            shorten(error)
            if not self._written and is_deleted(values):  # a call in another thread was taking them
                return launch(self._run, self._states, (), (), args, kwargs)
            self._explain(error, args, kwargs)
            raise

    def _give(self, args, kwargs):
        more = self._run, self._states, self._generators, self._written, args, kwargs
        return give(self._label, self._returned, *more)

    def _call_any(self, args, kwargs):
        """Do a call that was not like those that run fast, and from then on all that are like it."""
        fast, self._run = self._run, self._run_any
        try:
            return self(*args, **kwargs)
        except BaseException:
            self._run = fast
            raise

    def _explain(self, error, args, kwargs):
        """Find better words for what a call failed of."""
        _refuse_taken(self._states, error)
        if not isinstance(error, StateValueError):
            self._refused(args, kwargs)

    def _call_within(self, args, kwargs):
        """Do a call inside a transform, which is right as long as no input is traced."""
        values = gather(self._states)
        try:
            if any(map(is_tracer, jax.tree.leaves((values, args, kwargs)))):
                raise TypeError
            if self._written and innermost() is None:
                raise _raw_transform(self._written[0])
            if self._donates:  # if the transform fails later on, the States must be as they were
                with jax.ensure_compile_time_eval():
                    values = jax.tree.map(jax.numpy.copy, values)
            out, new = self._run_any(values, *args, **kwargs)
        except Exception:
            self._refused(args, kwargs)
            raise
        commit(Writes(self._written, list(new)))
        self._touched.pass_on()
        return out
