"""Splitting a graph into structure and data, putting it together again, and changing States in place.

``flatten`` turns a graph into a ``GraphDef`` and ``{path: State}``; ``unflatten`` makes a new graph of
both. The ``GraphDef`` is a tree of five sorts of edges,

* ``_Made``     a Node, dataclass, container or other pytree, with its parts;
* ``_Leaf``     a State, whose data are found in the mapping under the path that leads here;
* ``_Ref``      something that came before: this is how sharing and cycles survive;
* ``_Bound``    a function or transform that refers to something of the graph, and in the new graph to its copy;
* ``Static``    anything else, kept as it is (arrays and functions by reference).

Numbers are given in the order of the walk (``_walk``), so equal structures have equal GraphDefs. A GraphDef
is hashable and a pytree without leaves: it can go in and out of any JAX function. The user-level functions
put snapshots in the mapping, and differ in nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from .._copies import remade, things_reached
from .._errors import StateTypeError, StateValueError, a_type
from .._seam.module_reads import note
from .._state import State
from ..filters import Filter
from ._mappings import FlattedDict, assign, complete, loadable, select, take_all
from ._nodes import Node, Owned, own
from ._parts import Kind, kind_of
from ._paths import Path, in_order, join_path
from ._snapshot import Static, TreefyState
from ._walk import check_root, snapshots, survey, walk

__all__ = [
    "GraphDef",
    "clone",
    "flatten",
    "graphdef",
    "pop_states",
    "treefy_merge",
    "treefy_split",
    "unflatten",
    "update_states",
]


@dataclass(frozen=True, slots=True)
class _Leaf:
    number: int


@dataclass(frozen=True, slots=True)
class _Ref:
    number: int


@dataclass(frozen=True, slots=True)
class _Bound:
    value: Static
    refers: dict[int, Any] = field(default_factory=dict, compare=False)  # number -> the original


@dataclass(frozen=True, slots=True)
class _Made:
    number: int
    cls: type
    kind: Kind
    spec: Any
    parts: tuple


@jax.tree_util.register_static
@dataclass(frozen=True, slots=True, repr=False)
class GraphDef:
    """The structure of a graph without its data: classes, attribute names, sharing, static attributes.

    Examples
    --------
    >>> from brainstate import graph, nn
    >>> graph.graphdef(nn.Linear(2, 3)) == graph.graphdef(nn.Linear(2, 3))
    True
    >>> graph.graphdef(nn.Linear(2, 3))
    GraphDef(Linear, paths=['bias', 'weight'])
    """

    root: Any
    paths: tuple[Path, ...]

    def __repr__(self):
        name = self.root.cls.__name__ if isinstance(self.root, _Made) else type(self.root).__name__
        return f"GraphDef({name}, paths={[join_path(path) for path in self.paths]})"


class _Flattener:
    """One run of `flatten`."""

    def __init__(self):
        self.states: dict[Path, State] = {}
        self.numbers: dict[int, int] = {}
        self.kept: dict[int, Any] = {}  # by id; so that no id is used again
        self.functions: list[_Bound] = []

    def number(self, x):
        self.kept[id(x)] = x
        return self.numbers.setdefault(id(x), len(self.numbers))

    def take(self, x, path):
        if id(x) in self.numbers:
            return _Ref(self.numbers[id(x)])
        if isinstance(x, State):
            self.states[path] = x
            return _Leaf(self.number(x))
        kind = kind_of(x)
        if kind is None:
            if not callable(x):
                return Static(x)
            self.functions.append(_Bound(Static(x)))
            return self.functions[-1]
        if isinstance(x, Owned):
            x.check_origin()
        if isinstance(x, Node):
            note(x)
        number = self.number(x) if kind.identity else -1
        parts = kind.parts(x)
        edges = {key: self.take(parts[key], (*path, key)) for key in in_order(parts)}
        return _Made(number, type(x), kind, kind.spec(x), tuple((key, edges[key]) for key in parts))

    def bind(self):
        """Note which parts of the graph the functions that were met refer to."""
        for function in self.functions:
            for x in things_reached(function.value.value, self.kept):
                function.refers[self.numbers[id(x)]] = x


def _waits(edge) -> bool:
    """Tell whether ``edge`` is a function that refers to the graph, or a value that holds one."""
    if isinstance(edge, _Made):
        return not edge.kind.identity and any(_waits(part) for _, part in edge.parts)
    return isinstance(edge, _Bound) and bool(edge.refers)


def _is_separate(x) -> bool:
    return (kind := kind_of(x)) is None or kind.identity


class _Builder:
    """One run of `unflatten`."""

    def __init__(self, states):
        self.states = states
        self.made: dict[int, Any] = {}
        self.late: list = []  # containers of functions, which wait until all else is there

    def whole(self, root):
        """Return the graph that ``root`` stands for, with functions that refer to it."""
        x = self.build(root, ())
        for kind, owner, parts in self.late:
            kind.fill(owner, {key: self.bind(part) for key, part in parts.items()})
        return self.bind(x)

    def bind(self, part):
        """Return ``part`` with functions in place of edges."""
        if isinstance(part, _Bound):
            table = {id(original): self.made[number] for number, original in part.refers.items()}
            return remade(part.value.value, table)
        return part if _is_separate(part) else jax.tree.map(self.bind, part, is_leaf=_is_separate)

    def build(self, edge, path):
        if isinstance(edge, Static):
            return edge.value
        if isinstance(edge, _Bound):
            return edge if edge.refers else edge.value.value
        if isinstance(edge, _Ref):
            return self.made[edge.number]
        if isinstance(edge, _Leaf):
            return self.made.setdefault(edge.number, self.states[path])
        x = self.made[edge.number] = edge.kind.create(edge.cls) if edge.kind.identity else None
        edges = dict(edge.parts)
        built = {key: self.build(edges[key], (*path, key)) for key in in_order(edges)}
        parts = {key: built[key] for key in edges}  # in their natural order
        if not edge.kind.identity:
            return edge.kind.build(edge.spec, parts)
        if any(map(_waits, edges.values())):
            self.late.append((edge.kind, x, parts))
        else:
            edge.kind.fill(x, parts)
        return x


def flatten(node: Any) -> tuple[GraphDef, FlattedDict]:
    """Return structure and States of a graph; `unflatten` is the inverse.

    Examples
    --------
    >>> from brainstate import State, graph
    >>> structure, states = graph.flatten({"a": State(1.0)})
    >>> graph.unflatten(structure, states)
    {'a': State(1.0)}
    """
    check_root(node)
    taker = _Flattener()
    root = taker.take(node, ())
    taker.bind()
    return GraphDef(root, tuple(taker.states)), FlattedDict(taker.states)


def unflatten(graphdef: GraphDef, states: Mapping[Path, State]) -> Any:
    """Make a new graph with the given structure around the given States; see `flatten`.

    Raises
    ------
    StateValueError
        If ``states`` lacks a path of the structure or has an unknown one.
    """
    _check_structure(graphdef)
    complete("the data to merge", dict.fromkeys(graphdef.paths), states)
    return _Builder(states).whole(graphdef.root)


def _check_structure(graphdef):
    if not isinstance(graphdef, GraphDef):
        raise StateTypeError(f"a GraphDef, which treefy_split returns, comes first, not a {type(graphdef).__name__}.")


def graphdef(node: Any) -> GraphDef:
    """Return the structure of a graph; see `GraphDef`."""
    return flatten(node)[0]


def treefy_split(node: Any, *filters: Filter) -> tuple:
    """Split a graph into its structure and trees of snapshots; `treefy_merge` is the inverse.

    Parameters
    ----------
    node : Module or pytree
        The graph.
    *filters : filter
        Which States go to which tree, see `brainstate.filters`; without filters there is one tree.

    Returns
    -------
    tuple
        A `GraphDef`, and a `NestedDict` for each filter.

    Raises
    ------
    StateValueError
        If a State is selected by no filter; ``...`` as the last filter takes the rest.

    Examples
    --------
    >>> from brainstate import ParamState, graph, nn
    >>> structure, params, others = graph.treefy_split(nn.Linear(2, 3), ParamState, ...)
    >>> graph.treefy_merge(structure, params, others)
    Linear(in_size=(2,), out_size=(3,), bias=ParamState(float32[3]), weight=ParamState(float32[2,3]))
    """
    structure, states = flatten(node)
    parts = take_all(states, filters) if filters else [states]
    return structure, *map(snapshots, parts)


def treefy_merge(graphdef: GraphDef, *trees: Mapping) -> Any:
    """Make a new graph from the parts that `treefy_split` returned, with new States.

    Raises
    ------
    StateValueError
        If the trees lack a State of the structure, or have an unknown one.
    StateTypeError
        If the trees hold anything but snapshots.
    """
    _check_structure(graphdef)
    for tree in trees:
        if not isinstance(tree, Mapping):
            raise StateTypeError(
                f"the trees to merge are mappings, as treefy_split returns, not a {type(tree).__name__}."
            )
    snapshots = FlattedDict().merge(*trees)
    for path, x in snapshots.items():
        if not isinstance(x, TreefyState):
            raise StateTypeError(f"{join_path(path)!r} is {a_type(x)}: the trees hold snapshots (TreefyState).")
    complete("the trees to merge", dict.fromkeys(graphdef.paths), snapshots)
    states = {path: x.to_state() for path, x in snapshots.items()}
    for path, state in states.items():
        own(state, join_path(path))
    return unflatten(graphdef, states)


def clone(node: Any) -> Any:
    """Return a copy of a graph with Modules, containers and States of its own; arrays are shared.

    Examples
    --------
    >>> from brainstate import graph, nn
    >>> layer = nn.Linear(2, 3)
    >>> copy = graph.clone(layer)
    >>> copy.weight is layer.weight, copy.weight.value is layer.weight.value
    (False, True)
    """
    structure, states = flatten(node)
    copies = {path: TreefyState.of(state).to_state() for path, state in states.items()}
    for path, state in copies.items():
        own(state, join_path(path))
    return unflatten(structure, copies)


def update_states(node: Any, tree: Mapping, *trees: Mapping) -> None:
    """Assign values to the States below ``node``, in place.

    Parameters
    ----------
    node : Module or pytree
        The graph.
    tree, *trees : mapping
        Flat or nested, of snapshots, States or values; States that are not mentioned stay as they are.

    Raises
    ------
    StateValueError
        If paths lead to no State, or values have another structure, shape or dtype than the States hold: all of them
        are named, and nothing is changed.

    Examples
    --------
    >>> from brainstate import State, graph
    >>> node = {"a": State(1.0), "b": State(2.0)}
    >>> graph.update_states(node, {"a": 5.0})
    >>> node
    {'a': State(5.0), 'b': State(2.0)}
    """
    states, _ = survey(node)
    new: dict = {}
    for i, data in enumerate((tree, *trees)):
        new.update(loadable(f"tree {i}", states, data))
    assign(states, new)


def pop_states(node: Any, *filters: Filter) -> Any:
    """Remove the States that the filters select, wherever they are referred to, and return snapshots of them.

    Returns
    -------
    NestedDict, or tuple of NestedDict
        One for each filter; positions in lists are those before the removal.

    Raises
    ------
    StateValueError
        If no filter is given.
    StateTypeError
        If a selected State is in something that cannot lose a part, such as a tuple; nothing is removed then.

    Examples
    --------
    >>> from brainstate import ParamState, State, graph
    >>> node = {"w": ParamState(1.0), "n": State(0)}
    >>> graph.pop_states(node, ParamState).w
    TreefyState(ParamState, 1.0)
    >>> node
    {'n': State(0)}
    """
    if not filters:
        raise StateValueError("pop_states needs at least one filter; `...` removes every State.")
    parts = select(survey(node)[0], filters)
    trees = tuple(map(snapshots, parts))
    places = _references(node, {id(state) for part in parts for state in part.values()})
    for x, kind, keys, path in places:
        if not kind.mutable(x):
            raise StateTypeError(
                f"{join_path((*path, keys[0]))!r} cannot be removed from {a_type(x)}, which is "
                f"immutable: keep States that are popped in attributes of Modules, lists or dicts."
            )
    for x, kind, keys, _ in places:
        for key in reversed(keys):
            kind.remove(x, key)
    return trees[0] if len(trees) == 1 else trees


def _references(root, wanted):
    """Return ``(owner, kind, keys, path)`` of all references to States whose id is wanted."""
    places = []
    for path, x, kind, _ in walk(root):
        parts = kind.parts(x) if kind else {}
        keys = [key for key in in_order(parts) if id(parts[key]) in wanted]
        if keys:
            places.append((x, kind, keys, path))
    return places
