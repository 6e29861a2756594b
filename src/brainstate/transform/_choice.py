"""Which States a declaration means: States by identity, Modules by what they hold, all else as a filter."""

from collections.abc import Callable
from typing import Any

import jax

from .._errors import StateTypeError
from .._state import State
from ..filters import to_predicate

__all__ = ["chooser", "draws", "listed", "owns_states"]


def owns_states(leaf: Any) -> bool:
    """Tell whether ``leaf`` is a Module: what holds States offers them by a method ``states``."""
    return callable(getattr(type(leaf), "states", None))


def draws(state: State) -> bool:
    """Tell whether ``state`` is a random generator, which gives lanes values of their own."""
    return type(state).lanes is not State.lanes


def listed(what: str, states: Any) -> tuple[set[State], Callable[[State], bool]]:
    """Return the States that a declaration lists itself, and the filter that stands for all others it means."""
    exact, filters = set(), []
    for leaf in jax.tree.leaves(states, is_leaf=owns_states):
        if isinstance(leaf, State):
            exact.add(leaf)
        elif owns_states(leaf):
            exact.update(leaf.states().values())
        else:
            try:
                filters.append(to_predicate(leaf))
            except TypeError as error:
                raise StateTypeError(
                    f"{what}: {leaf!r} is neither a State nor a filter. Give a State, a container of States, a Module, "
                    f"a type or a filter."
                ) from error
    return exact, lambda state: any(holds((), state) for holds in filters)


def chooser(what: str, states: Any) -> Callable[[State], bool]:
    """Return a predicate for a State, container of States, Module, type or filter; ``what`` names it in errors."""
    exact, matches = listed(what, states)
    return lambda state: state in exact or matches(state)
