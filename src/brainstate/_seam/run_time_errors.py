"""Programs that may raise an error while they run: how they are known, and how the error reaches the caller.

A program may hold a callback that raises: a check of ``debug_nan``, or a solver that found no solution. Whoever traces
one calls `announce_error`, and puts `mark` into the program, for one that JAX has traced before and takes from its
caches. ``jit`` asks `is_marked`, gives no buffer of such a program away and runs it by `await_errors`. Outside of
``jit``, ``commit`` asks `await_announced`. So no State has changed when the error comes.

A callback raises by `raise_on_host`. JAX wraps such an error into one of its own, with the text inside;
`original_errors` raises the first one again. Where a program runs on several devices a callback that raises would let
the others wait for ever: the error is kept instead, and raised when the program has ended. In a ``shard_map`` without
``jit``, where nobody looks afterwards, it is logged.
"""

import collections
import contextlib
import copy
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from .._compat import AT_ONCE, current_trace, nans_checked
from .._program.interpret import all_equations

__all__ = [
    "announce_error",
    "await_announced",
    "await_errors",
    "is_marked",
    "mark",
    "original_errors",
    "raise_on_host",
]


# ------------------------------------------------------------------------------------------ which programs


class _Thread(threading.local):
    def __init__(self):
        self.announced = False


_thread = _Thread()
_any_marked = [False]  # whether this process has ever marked a program: else nobody needs to look into one

# An identity: the mark.
_may_raise = Primitive("may_raise")
_may_raise.def_impl(lambda flag: flag)
_may_raise.def_abstract_eval(lambda flag: flag)
batching.defvectorized(_may_raise)
mlir.register_lowering(_may_raise, lambda _, flag: [flag])


def announce_error() -> None:
    """Announce that the program which is being traced may raise while it runs."""
    _thread.announced = True


def mark(flag: Any) -> Any:
    """Return ``flag``, a boolean array; the program which is being traced is marked as one that may raise for it."""
    announce_error()
    _any_marked[0] = True
    return _may_raise.bind(flag)


def is_marked(closed: Any) -> bool:
    """Tell whether a program, or one that it calls, may raise while it runs."""
    if not _any_marked[0]:
        return False
    return any(eqn.primitive is _may_raise for eqn in all_equations(closed))


def await_announced(values: Any) -> None:
    """Wait for ``values`` if an error was announced in this thread before: it then comes before they are used."""
    if _thread.announced:
        _thread.announced = False
        jax.block_until_ready(values)


# ------------------------------------------------------------------------------------------ the way of an error


_raised: collections.deque = collections.deque(maxlen=16)  # by callbacks, for `original_errors` to find again
_kept: collections.deque = collections.deque(maxlen=16)  # errors that were not raised, for the sake of other devices
_asked = [False]  # whether a call that has its turn looks into `_kept` afterwards
_turn = threading.RLock()  # held by such a call


def raise_on_host(error: Exception, several: bool) -> None:
    """Raise ``error`` in a callback; or keep it, if ``several`` devices run this program and would wait for ever."""
    if several or _asked[0]:
        _kept.append(error)
        if not _asked[0]:
            logging.getLogger(__name__).error("%s", error)
        return
    _raised.append(copy.copy(error))  # not with the frames of this call
    raise error


@contextlib.contextmanager
def original_errors() -> Iterator[None]:
    """Raise the error that a callback raised inside, in place of the one that JAX made of it."""
    try:
        yield
    except Exception as failure:
        for error in tuple(_raised):
            if not isinstance(failure, type(error)) and str(error) in str(failure):
                with contextlib.suppress(ValueError):  # another thread had the same
                    _raised.remove(error)
                raise error from None
        raise


def await_errors(jitted: Callable) -> Callable:
    """Return ``jitted`` with a call that ends when the program has, and raises the error of a callback in it."""

    def call(*args, **kwargs):
        if current_trace() is not AT_ONCE:
            announce_error()  # JAX may have the inner program in its caches, and then nobody traces the callback
            return jitted(*args, **kwargs)
        # Which devices a program uses, nobody can tell beforehand. JAX's own check would see the NaN that is returned.
        several = jax.device_count() > 1 and not nans_checked()
        with _turn if several else contextlib.nullcontext(), original_errors():
            _kept.clear()
            before, _asked[0] = _asked[0], several
            try:
                out = jax.block_until_ready(jitted(*args, **kwargs))
            finally:
                _asked[0] = before
            if _kept:
                raise _kept.popleft()
            return out

    return call
