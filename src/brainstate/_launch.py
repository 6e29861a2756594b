"""The path of a compiled call: gather the values, call the program, commit what it writes.

This is where Python adds to the price of a call, so it belongs to the seam (``_scope``) and reads and assigns
``State._value`` without a function in between. A call that writes holds one lock from reading to committing; a call
that only reads gathers under the lock of a commit, so that it sees no half of one.

`Launcher` calls what JAX traces when it must, and `Ready` a program that was compiled ahead of time and knows one
kind of call. JAX runs such a program at once, under a raw transform as well, and what it returns then looks like
any other result. So `Ready` asks beforehand where it is called; `Launcher` can tell by the tracers that it gets back.
"""

import contextlib
from typing import Any

import jax

from ._carry import ABSENT, Writes
from ._compat import current_trace, jit_disabled
from ._errors import StateValueError, TraceContextError
from ._scope import (
    AT_ONCE,
    Restart,
    _commit_lock,
    _generation,
    _open,
    _plain,
    _raw_transform,
    _step_lock,
    commit,
    eager,
    gather,
    innermost,
    is_tracer,
)

__all__ = ["Launcher", "Ready", "Sealed", "launch", "outside"]

# Bound once: looking a method up on a lock costs as much as calling it.
_begin_step, _end_step = _step_lock.acquire, _step_lock.release
_begin_commit, _end_commit = _commit_lock.acquire, _commit_lock.release


def outside() -> bool:
    """Tell whether no transform is in progress in this thread, neither of this package nor of JAX."""
    return innermost() is None and eager()


def launch(jitted, states, written, args, kwargs, touched):
    """Call ``jitted`` with the values of ``states`` and the arguments, and commit what it returns.

    It returns its result and a list with the new value, or ``ABSENT``, of each State in ``written``. A trace around it
    reads what its traces have ``touched``.
    """
    locked = bool(written)
    with _step_lock if locked else contextlib.nullcontext():
        out, values = jitted(gather(states), *args, **kwargs)
        if values and not locked and not jit_disabled():
            # Another thread has found out meanwhile that this function writes: again, alone, and this never happened.
            return launch(jitted, states, written, args, kwargs, touched)
        changed = {s: v for s, v in zip(written, values, strict=False) if v is not ABSENT}
        commit(Writes(tuple(changed), list(changed.values())))
    if _open:
        touched.pass_on()
    return out


def _stored_all(states) -> bool:
    return innermost() is not None or all(hasattr(s, "_value") for s in states)


class Launcher:
    """A compiled function whose call does nothing but what must be done: gather, call, commit.

    ``_program`` has what `launch` takes; ``_retry`` does the calls that trace, ``_begin(why)`` begins a new program,
    ``_look(program)`` does if something changed that concerns it, and ``_explain`` has the words for arguments that JAX
    refuses.
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
            if not program.written or (_open and innermost() is not None):
                out = launch(program.jitted, program.states, program.written, args, kwargs, program.touched)
            else:
                # What `launch` does, in this frame, with loops that cost least for few States.
                written, values, i = program.written, [], 0
                _begin_step()
                try:
                    for state in program.states:
                        values.append(state._value)
                    out, values = program.jitted(values, *args, **kwargs)
                    for value in values:
                        # A plain array is no tracer, whatever is around; only otherwise ask which trace is on.
                        if type(value) not in _plain:
                            if not eager():
                                raise _raw_transform(written[0])
                            break
                    _begin_commit()
                    try:
                        for value in values:  # `written` may have grown in the meantime
                            if value is not ABSENT:
                                written[i]._value = value
                            i += 1
                    finally:
                        _end_commit()
                finally:
                    _end_step()
            if not program.newborn:
                return out
            program.adopt()
            return out
        except Restart as restart:
            staged = restart.staged
        except (AttributeError, TypeError, StateValueError, TraceContextError):
            if _stored_all(program.states):
                self._explain(args, kwargs)
                raise
            # An input was created by a call that failed, or by an enclosing transform that has ended.
            program, staged = self._begin("a State that is an input had no value"), None
        return self._retry(program, staged, args, kwargs)


class Sealed(Exception):
    """JAX was about to trace or compile a program that is ready."""


class Ready:
    """A program compiled ahead of time: a call gathers, computes and commits, and asks nothing that JAX will ask.

    ``_run(values, *args, **kwargs)`` gives the result and the values of ``_written``, or raises `Sealed`. Then
    ``_run_any``, which is slower and takes all that can be run, does it, and takes its place if it can. ``_refused``
    has the words for a call that failed, ``_renew`` looks again after a replacement, and ``_donates`` says whether
    values are given away.
    """

    _run: Any
    _run_any: Any
    _states: tuple
    _written: tuple
    _generation: int
    _touched: Any
    _donates: bool
    _renew: Any
    _refused: Any

    def __call__(self, /, *args, **kwargs):
        """Run the program on the present values of the States and commit what it writes."""
        if self._generation != _generation[0]:
            self._renew()
        if current_trace() is not AT_ONCE or (_open and innermost() is not None):
            return self._call_within(args, kwargs)
        try:
            if not self._written:
                with _commit_lock:
                    values = [s._value for s in self._states]
                return self._run(values, *args, **kwargs)[0]
            written, values, i = self._written, [], 0
            _begin_step()
            try:
                for state in self._states:
                    values.append(state._value)
                out, values = self._run(values, *args, **kwargs) if kwargs else self._run(values, *args)  # cheaper
                _begin_commit()
                try:
                    for value in values:
                        written[i]._value = value
                        i += 1
                finally:
                    _end_commit()
            finally:
                _end_step()
        except Sealed:
            fast, self._run = self._run, self._run_any
        except Exception:
            self._refused(args, kwargs)
            raise
        else:
            return out
        try:
            return self(*args, **kwargs)
        except BaseException:
            self._run = fast
            raise

    def _call_within(self, args, kwargs):
        """Do a call inside a transform: right as long as nothing that goes in is traced."""
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
