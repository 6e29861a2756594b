"""The object graph: the States and Modules below a root, and the paths to them.

``states`` and ``nodes`` find them; ``treefy_split`` and ``treefy_merge`` take a graph apart into structure
and data and back; ``update_states``, ``pop_states`` and ``clone`` change or copy it. `FlattedDict` and
`NestedDict` are the two forms of a collection, `TreefyState` is a State as plain data. The sources, from the
bottom up: ``_paths`` (order), ``_snapshot``, ``_mappings``, ``_parts`` (objects with parts), ``_nodes`` (objects
that notice changes), ``_walk``, ``_split``.
"""

from ._mappings import FlattedDict, NestedDict
from ._nodes import Node
from ._snapshot import TreefyState
from ._split import (
    GraphDef,
    clone,
    flatten,
    graphdef,
    pop_states,
    treefy_merge,
    treefy_split,
    unflatten,
    update_states,
)
from ._walk import iter_leaf, iter_node, nodes, states, treefy_states

__all__ = [
    "FlattedDict",
    "GraphDef",
    "NestedDict",
    "Node",
    "TreefyState",
    "clone",
    "flatten",
    "graphdef",
    "iter_leaf",
    "iter_node",
    "nodes",
    "pop_states",
    "states",
    "treefy_merge",
    "treefy_split",
    "treefy_states",
    "unflatten",
    "update_states",
]
