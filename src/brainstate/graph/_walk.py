"""The walk: every State and Node below a root, each once.

Parts are visited in the order of their keys, depth first, so States come out sorted by path. A State or
Node that is reached in several ways is listed under the first path; cycles end there too. A Node follows
its parts, so children come before parents. The *level* of a Node is the number of Nodes above it; a State
has the level of the Node that it belongs to, however many lists and dicts lie between.
"""

import reprlib
from collections.abc import Iterator
from typing import Any, TypeVar, overload

from .._errors import StateTypeError, StateValueError
from .._seam.module_reads import STRUCTURE, note
from .._state import State
from ..filters import Filter
from ._mappings import FlattedDict, NestedDict, select
from ._nodes import NODE, Node, Owned
from ._parts import Kind, kind_of
from ._paths import Path, in_order
from ._snapshot import TreefyState

__all__ = ["check_root", "iter_leaf", "iter_node", "nodes", "snapshots", "states", "survey", "treefy_states", "walk"]

_ALL_LEVELS = (0, float("inf"))
_S = TypeVar("_S", bound=State)
_N = TypeVar("_N", bound=Node)


def walk(root: Any, last: float = float("inf")) -> Iterator[tuple[Path, Any, Kind | None, int]]:
    """Yield ``(path, x, kind, above)`` of each State (kind None), and of things with parts after their parts.

    ``above`` is the number of Nodes above; Nodes below level ``last`` are left out with all that they have.
    """
    check_root(root)
    seen: dict[int, Any] = {}  # the objects are kept, so that no id is used again
    stack: list[tuple] = [((), root, 0, None)]
    while stack:
        path, x, above, kind = stack.pop()
        if kind is not None:  # its parts are done
            yield path, x, kind, above
            continue
        if isinstance(x, State):
            if id(x) not in seen:
                seen[id(x)] = x
                yield path, x, None, above
            continue
        kind = kind_of(x)
        if kind is None or id(x) in seen or (kind is NODE and above > last):
            continue
        if kind.identity:
            seen[id(x)] = x
            if isinstance(x, Owned):
                x.check_origin()
        if kind is NODE:
            note(x, STRUCTURE)
        stack.append((path, x, above, kind))
        parts = kind.parts(x)
        below = above + (kind is NODE)
        stack += [((*path, key), parts[key], below, None) for key in reversed(in_order(parts))]


def check_root(root: Any) -> None:
    """Refuse to look for States where there can be none."""
    if not isinstance(root, State) and kind_of(root) is None:
        raise StateTypeError(
            f"States are looked for in a Module, or in a list, dict or other pytree of Modules and States, not in "
            f"{reprlib.repr(root)}."
        )


def survey(root: Any, levels: tuple[float, float] = _ALL_LEVELS) -> tuple[dict[Path, State], dict[Path, Node]]:
    """Return the States and the Nodes below ``root`` by path, of the given first to last level."""
    states: dict[Path, State] = {}
    nodes: dict[Path, Node] = {}
    first, last = _check_levels(levels)
    for path, x, kind, above in walk(root, last):
        if kind is NODE and above >= first:
            nodes[path] = x
        elif kind is None and max(above - 1, 0) >= first:
            states[path] = x
    return states, nodes


def _check_levels(levels):
    try:
        first, last = levels
    except (TypeError, ValueError):
        first, last = 1, 0
    if not 0 <= first <= last:
        raise StateValueError(
            f"allowed_hierarchy is a pair (first, last) of levels with 0 <= first <= last, not {levels!r}."
        )
    return first, last


@overload
def states(  # pyright: ignore[reportOverlappingOverload]
    node: Any, kind: type[_S], /, *, allowed_hierarchy: tuple[float, float] = ...
) -> FlattedDict[_S]: ...
@overload
def states(node: Any, *, allowed_hierarchy: tuple[float, float] = ...) -> FlattedDict[State[Any]]: ...
@overload
def states(
    node: Any, filter: Filter, /, *, allowed_hierarchy: tuple[float, float] = ...
) -> FlattedDict[State[Any]]: ...
@overload
def states(
    node: Any, filter: Filter, other: Filter, /, *filters: Filter, allowed_hierarchy: tuple[float, float] = ...
) -> tuple[FlattedDict[State[Any]], ...]: ...
def states(node: Any, *filters: Filter, allowed_hierarchy: tuple[float, float] = _ALL_LEVELS) -> Any:
    """Return the States below ``node``: a Module, or any container of Modules and States.

    Parameters
    ----------
    node : Module or pytree
        Where to look.
    *filters : filter
        The States to select, see `brainstate.filters`. With several, a tuple comes back, and a State goes to the
        first that selects it; a State that none selects is dropped.
    allowed_hierarchy : (int, int)
        The first and last level of Modules to look in. The States of ``node`` itself have level 0.

    Returns
    -------
    FlattedDict, or tuple of FlattedDict
        ``{path: State}``, sorted by path.

    Examples
    --------
    >>> from brainstate import ParamState, State, graph
    >>> w = ParamState(1.0)
    >>> graph.states([w, {"again": w, "n": State(0)}], ParamState, ...)
    (FlattedDict({
      (0,): ParamState(1.0),
    }), FlattedDict({
      (1, 'n'): State(0),
    }))
    """
    return _deal_out(survey(node, allowed_hierarchy)[0], filters, FlattedDict._from_paths)


@overload
def nodes(node: Any, kind: type[_N], /, *, allowed_hierarchy: tuple[float, float] = ...) -> FlattedDict[_N]: ...
@overload
def nodes(node: Any, *, allowed_hierarchy: tuple[float, float] = ...) -> FlattedDict[Any]: ...
@overload
def nodes(node: Any, filter: Filter, /, *, allowed_hierarchy: tuple[float, float] = ...) -> FlattedDict[Any]: ...
@overload
def nodes(
    node: Any, filter: Filter, other: Filter, /, *filters: Filter, allowed_hierarchy: tuple[float, float] = ...
) -> tuple[FlattedDict[Any], ...]: ...
def nodes(node: Any, *filters: Filter, allowed_hierarchy: tuple[float, float] = _ALL_LEVELS) -> Any:
    """Return the Modules in ``node``, itself included, as ``{path: Module}`` with children before parents.

    The parameters are those of `states`.

    Examples
    --------
    >>> from brainstate import graph, nn
    >>> model = nn.Module()
    >>> model.inner = nn.Module()
    >>> list(graph.nodes(model))
    [('inner',), ()]
    """
    return _deal_out(survey(node, allowed_hierarchy)[1], filters, FlattedDict._from_paths)


def treefy_states(node: Any, *filters: Filter) -> Any:
    """Return snapshots of the States below ``node``, as a `NestedDict` or a tuple of them; see `states`.

    Raises
    ------
    StateValueError
        If ``node`` is a State, which has no path.

    Examples
    --------
    >>> from brainstate import ParamState, graph
    >>> graph.treefy_states({"layer": {"w": ParamState(1.0)}}).layer.w
    TreefyState(ParamState, 1.0)
    """
    return _deal_out(survey(node)[0], filters, snapshots)


def iter_leaf(node: Any) -> Iterator[tuple[Path, State]]:
    """Iterate over ``(path, State)`` of the States below ``node``."""
    yield from survey(node)[0].items()


def iter_node(node: Any) -> Iterator[tuple[Path, Node]]:
    """Iterate over ``(path, Module)`` of the Modules in ``node``, children first."""
    yield from survey(node)[1].items()


def snapshots(states: dict[Path, State]) -> NestedDict:
    """Return snapshots of States as a tree."""
    return NestedDict._from_paths({path: TreefyState.of(state) for path, state in states.items()})


def _deal_out(flat, filters, form):
    parts = tuple(map(form, select(flat, filters) if filters else [flat]))
    return parts[0] if len(parts) == 1 else parts
