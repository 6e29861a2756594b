"""Keys for transforms that return random estimates; the only module of `transform` that imports `random`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from .. import random
from .._seam.scope import Scope, commit, run

__all__ = ["Estimate", "first_key", "with_key"]


class Estimate(NamedTuple):
    """A random estimate: ``mean`` of the samples, and ``error``, the standard deviation of this mean."""

    mean: Any
    error: Any


def first_key(key: Any) -> Any:
    """Return the key of a user's ``key=``, an int or a key; for None, a new one from ``brainstate.random``."""
    return random.split_key() if key is None else random.RandomState(key).get_key()


def with_key(name: str, key: Any, call: Callable) -> Any:
    """Return ``call(first_key(key))``; a generator from which the key is drawn advances only if ``call`` returns.

    The function under transformation runs inside ``call``, and finds the generator advanced.
    """
    if key is not None:
        return call(first_key(key))
    out, writes = run(Scope(name), lambda: call(first_key(None)))
    commit(writes)
    return out
