"""The keys of the transforms that estimate something by chance; the one place of `transform` that knows `random`."""

from typing import Any

from .. import random

__all__ = ["first_key"]


def first_key(key: Any) -> Any:
    """Return the key of a user's ``key=``, an int or a key; for None, a new one from ``brainstate.random``."""
    return random.split_key() if key is None else random.RandomState(key).get_key()
