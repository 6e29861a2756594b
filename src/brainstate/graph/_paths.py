"""Paths: tuples of attribute names, positions and keys that lead from a root to a part of it.

Paths sort under one total order: numbers before text before tuples before anything else, so that positions
count up (2 before 10) and keys of different types never meet in a comparison.
"""

from collections.abc import Hashable, Iterable
from numbers import Real
from typing import Any

__all__ = ["Path", "in_order", "join_path", "rank"]

Path = tuple[Hashable, ...]

_PLAIN = {str, int, tuple}


def rank(key: Any) -> tuple:
    """Return the sort key of ``key``."""
    if isinstance(key, str):
        return 1, key
    if isinstance(key, Real):
        return 0, key
    if isinstance(key, tuple):
        return 2, tuple(map(rank, key))
    return 3, type(key).__qualname__, repr(key)


def in_order(keys: Iterable) -> list:
    """Return ``keys`` sorted under the total order.

    Where Python's own comparison gets through, it agrees with the total order and is faster.
    """
    keys = list(keys)
    if all(type(key) in _PLAIN for key in keys):
        try:
            return sorted(keys)
        except TypeError:
            pass
    return sorted(keys, key=rank)


def join_path(path: Path) -> str:
    """Write a path as in ``layers.0.weight``."""
    return ".".join(map(str, path))
