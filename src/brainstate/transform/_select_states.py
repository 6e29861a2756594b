"""The States that a declaration stands for: States by identity, Modules by their States, anything else as a filter.

A pair ``(Module, filter)`` may stand wherever a Module may, and means those States of the Module that the filter
selects. A tuple whose second entry is a State or a Module, or holds one, is a container of both.
"""

from collections.abc import Callable, Iterator, ValuesView
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend.core import valid_jaxtype

from .._arrays import owns_states
from .._errors import StateTypeError, StateValueError, a_type
from .._state import ParamState, State
from ..filters import All, to_predicate

__all__ = [
    "Selection",
    "chooser",
    "draws",
    "is_live",
    "is_pair",
    "list_states",
    "narrow",
    "select_states",
]


def _is_filter(x) -> bool:
    try:
        to_predicate(x)
    except StateTypeError:
        return False
    return not any(map(owns_states, jax.tree.leaves(x, is_leaf=owns_states)))  # a Module can be called, as a filter can


def is_pair(leaf: Any) -> bool:
    """Tell whether ``leaf`` is ``(Module, filter)``."""
    return type(leaf) is tuple and len(leaf) == 2 and owns_states(leaf[0]) and _is_filter(leaf[1])


def narrow(what: str, pair: tuple, kind: type[State] = State) -> Any:
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
    # The message shows the paths to select from, and the way to States of other kinds.
    other = "" if kind is State else f" The filter narrows the {kinds}: for others give module.states(SomeKind)."
    raise StateValueError(
        f"{what}: the filter {to_predicate(filter)!r} selects none of the {len(every)} {kinds} of "
        f"{type(module).__name__}{names and f' ({names})'}. A string is a tag, and filters.PathContains(key) goes by "
        f"path.{other}"
    )


def draws(state: State) -> bool:
    """Tell whether ``state`` is a random generator, which gives lanes values of their own."""
    return type(state).lanes is not State.lanes


def list_states(what: str, states: Any) -> tuple[set[State], Callable[[State], bool]]:
    """Return the States that a declaration names one by one, and a predicate for those that it selects by filter."""
    exact, filters = set(), []
    for leaf in jax.tree.leaves(states, is_leaf=lambda x: owns_states(x) or is_pair(x)):
        if isinstance(leaf, State):
            exact.add(leaf)
        elif is_pair(leaf):
            exact.update(narrow(what, leaf).values())
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
    exact, matches = list_states(what, states)
    return lambda state: state in exact or matches(state)


# ------------------------------------------------------------------------------------------ States to differentiate


@dataclass(frozen=True)
class Selection:
    """The States of a container: the ``treedef`` of the container, each State once, and its path."""

    treedef: Any
    states: tuple[State, ...]
    paths: tuple[str, ...]

    def locate(self, state) -> str:
        """Name ``state`` by its path in the container."""
        return f"grad_states{self.paths[self.states.index(state)]} ({state.describe()})"


def _is_snapshot(leaf) -> bool:
    return callable(getattr(type(leaf), "to_state", None))


def _is_leaf(leaf) -> bool:
    """Tell whether `select_states` judges ``leaf`` as a whole, whatever JAX would make of it."""
    return owns_states(leaf) or is_pair(leaf) or _is_snapshot(leaf) or isinstance(leaf, Iterator | ValuesView)


def _flatten_container(states, what="grad_states") -> tuple[list, Any]:
    """Return the leaves as `select_states` takes them, with their paths, and the structure of the container."""
    try:
        return jax.tree_util.tree_flatten_with_path(states, is_leaf=_is_leaf)
    except (TypeError, ValueError) as error:
        raise StateTypeError(
            f"{what} is not a container that JAX can walk: {error}. The keys of a dict must be of one sortable kind."
        ) from error


def is_live(grad_states) -> bool:
    """Tell whether a Module is among ``grad_states``: its States are looked up at each call."""
    return any(owns_states(leaf) or is_pair(leaf) for _, leaf in _flatten_container(grad_states)[0])


def _look_up(what, leaf, kind):
    """Return the States of a kind that a Module, alone or with a filter, stands for; anything else unchanged."""
    if is_pair(leaf):
        return narrow(what, leaf, kind)
    return leaf.states(kind) if owns_states(leaf) else leaf


def _hint(leaf) -> str:
    """Return the likely fix for a ``leaf`` that is not a State, in words."""
    if isinstance(leaf, bool):
        return ""
    if isinstance(leaf, int | np.integer):
        return f"The positions of arguments go by name: argnums={int(leaf)}. "
    if isinstance(leaf, str) or callable(leaf):
        return "A tag or filter narrows a Module: (model, filter). "
    if valid_jaxtype(leaf):
        return "An array is differentiated as an argument, by argnums, and the value of a State by its State. "
    return ""


def select_states(states, what: str = "grad_states", kind: type[State] = ParamState) -> Selection:
    """Find the States in a State, a Module (its States of this kind), a pair (Module, filter) or any pytree of these.

    ``what`` names the argument in messages.

    Raises
    ------
    StateTypeError
        If something else is found.
    StateValueError
        If nothing is selected, by a pair or at all, or a State is listed twice.
    """
    outer, treedef = _flatten_container(states, what)
    found = [_look_up(f"{what}{jax.tree_util.keystr(path)}", leaf, kind) for path, leaf in outer]
    found, treedef = _flatten_container(treedef.unflatten(found), what)
    paths = {}
    # `paths` keeps the order of the leaves: the gradients have it too.
    for path, state in found:
        where = jax.tree_util.keystr(path)
        if _is_snapshot(state):
            raise StateTypeError(
                f"{what}{where} is a snapshot, which no function reads: differentiate the States themselves, "
                f"model.states(...) instead of treefy_states(model, ...)."
            )
        if not isinstance(state, State):
            raise StateTypeError(
                f"{what}{where} is {a_type(state)}, not a State. {_hint(state)}Pass a State, a list, "
                f"tuple or dict of States (not a set or an iterator), a Module, (Module, filter), or "
                f"model.states(...)."
            )
        if state in paths:
            raise StateValueError(
                f"{what} lists {state.describe()} twice, as {what}{paths[state]} and {what}{where}: "
                f"a loop over the gradients would step twice. List it once."
            )
        paths[state] = where
    if not paths:
        raise StateValueError(
            f"{what} selects no State: the container is empty (does the filter match?)."
            + (" Leave grad_states out to differentiate an argument." if what == "grad_states" else "")
        )
    return Selection(treedef, tuple(paths), tuple(paths.values()))
