"""Which States a declaration means: States by identity, Modules by what they hold, all else as a filter.

A pair ``(Module, filter)`` is narrower than the Module alone, wherever that may stand: those of its States that the
filter selects. What follows the Module is no filter if it is a State, a Module, or holds one: then the tuple is a
container of both.
"""

from collections.abc import Callable
from typing import Any

import jax

from .._errors import StateTypeError, StateValueError
from .._state import State
from ..filters import All, to_predicate

__all__ = ["chooser", "draws", "is_pair", "listed", "narrowed", "owns_states"]


def owns_states(leaf: Any) -> bool:
    """Tell whether ``leaf`` is a Module: what holds States offers them by a method ``states``."""
    return callable(getattr(type(leaf), "states", None))


def _is_filter(x) -> bool:
    try:
        to_predicate(x)
    except StateTypeError:
        return False
    return not any(map(owns_states, jax.tree.leaves(x, is_leaf=owns_states)))  # a Module can be called, as a filter can


def is_pair(leaf: Any) -> bool:
    """Tell whether ``leaf`` is ``(Module, filter)``."""
    return type(leaf) is tuple and len(leaf) == 2 and owns_states(leaf[0]) and _is_filter(leaf[1])


def narrowed(what: str, pair: tuple, kind: type[State] = State) -> Any:
    """Return ``{path: State}`` of the States of this kind that a pair stands for; ``what`` names it in errors.

    Raises
    ------
    StateValueError
        If there are none.
    """
    module, filter = pair
    found = module.states(All(kind, filter))
    if found:
        return found
    every, kinds = list(module.states(kind)), f"{kind.__name__}s" if kind is not State else "States"
    names = ", ".join(".".join(map(str, path)) for path in every[:8]) + (", ..." if len(every) > 8 else "")
    other = "" if kind is State else f" The filter narrows the {kinds}: for others give module.states(SomeKind)."
    raise StateValueError(
        f"{what}: the filter {to_predicate(filter)!r} selects none of the {len(every)} {kinds} of "
        f"{type(module).__name__}{names and f' ({names})'}. A string is a tag, and filters.PathContains(key) goes by "
        f"path.{other}"
    )


def draws(state: State) -> bool:
    """Tell whether ``state`` is a random generator, which gives lanes values of their own."""
    return type(state).lanes is not State.lanes


def listed(what: str, states: Any) -> tuple[set[State], Callable[[State], bool]]:
    """Return the States that a declaration lists itself, and the filter that stands for all others it means."""
    exact, filters = set(), []
    for leaf in jax.tree.leaves(states, is_leaf=lambda x: owns_states(x) or is_pair(x)):
        if isinstance(leaf, State):
            exact.add(leaf)
        elif is_pair(leaf):
            exact.update(narrowed(what, leaf).values())
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
    """Return a predicate for a State, Module, (Module, filter), container of these, or filter; ``what`` names it."""
    exact, matches = listed(what, states)
    return lambda state: state in exact or matches(state)
