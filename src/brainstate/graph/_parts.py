"""Parts: how the things that States can live in come apart and are put together again.

The object graph consists of

==================  =======================  ==========================================================
kind                keys of its parts        things
==================  =======================  ==========================================================
``ATTRIBUTES``      attribute names          Nodes (Modules), instances of dataclasses
``LIST``            positions                lists
``DICT``            keys                     dicts, OrderedDicts
``PYTREE``          as JAX names them        tuples, namedtuples and all other registered pytrees
==================  =======================  ==========================================================

A State is a leaf, and so is everything else. Things of the first three kinds have identity: they may be
shared and may contain themselves; a pytree is a value. Anything else that could hold a State unseen (`hides_state`)
is refused where it would enter the graph.
"""

import collections
import dataclasses
import importlib
import sys
import types
from typing import Any

import jax
import numpy as np

from .._state import State

__all__ = [
    "ATTRIBUTES",
    "DICT",
    "LIST",
    "PYTREE",
    "Attributes",
    "Kind",
    "hides_state",
    "holds_state",
    "kind_of",
    "pack",
    "register_kind",
    "unpack",
]


class Kind:
    """How things of one kind come apart (`parts`, `spec`) and are put together (`create`, `fill`)."""

    identity = True

    def parts(self, x: Any) -> dict:
        """Return the parts of ``x`` by key, in their natural order."""
        raise NotImplementedError

    def spec(self, x: Any) -> Any:
        """Return the data, beyond class and parts, that it takes to make ``x`` again."""
        return None

    def create(self, cls: type) -> Any:
        """Make an empty thing, for `fill`."""
        return cls.__new__(cls)  # pyright: ignore[reportCallIssue]

    def fill(self, x: Any, parts: dict) -> None:
        """Put the parts into an empty thing."""
        raise NotImplementedError

    def mutable(self, x: Any) -> bool:
        """Tell whether `remove` works for ``x``."""
        return True

    def remove(self, x: Any, key: Any) -> None:
        """Take one part away."""
        del x[key]


class Attributes(Kind):
    """Things whose parts are their attributes."""

    def parts(self, x):
        if hasattr(x, "__slots__") and dataclasses.is_dataclass(x):
            slots = {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if hasattr(x, f.name)}
            return slots | getattr(x, "__dict__", {})
        return object.__getattribute__(x, "__dict__")  # no read of an attribute: who looks notes it

    def create(self, cls):
        return object.__new__(cls)

    def fill(self, x, parts):
        for name, part in parts.items():
            object.__setattr__(x, name, part)

    def mutable(self, x):
        return not getattr(getattr(x, "__dataclass_params__", None), "frozen", False)

    def remove(self, x, key):
        delattr(x, key)


class _List(Kind):
    def parts(self, x):
        return dict(enumerate(x))

    def fill(self, x, parts):
        list.extend(x, parts.values())


class _Dict(Kind):
    def parts(self, x):
        return x

    def fill(self, x, parts):
        for key, part in parts.items():
            dict.__setitem__(x, key, part)


class _Pytree(Kind):
    identity = False

    def parts(self, x):
        children, _ = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)
        return {_plain_key(path[0]): child for path, child in children}

    def spec(self, x):
        return jax.tree.structure(x, is_leaf=lambda y: y is not x)

    def build(self, spec, parts):
        """Make the thing, which is complete at once."""
        return jax.tree.unflatten(spec, parts.values())

    def mutable(self, x):
        return False


def _plain_key(entry):
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return str(entry)


ATTRIBUTES, LIST, DICT, PYTREE = Attributes(), _List(), _Dict(), _Pytree()

_atoms = (
    *(bool, int, float, complex, str, bytes, type(None), type(...), type, np.ndarray),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
)
_by_class: dict[type, Kind | None] = {
    **dict.fromkeys(_atoms),
    list: LIST,
    dict: DICT,
    collections.OrderedDict: DICT,
}
_UNKNOWN = Kind()
_by_base: dict[type, Kind | None] = {State: None}


def register_kind(cls: type, kind: Kind, *, subclasses: bool = False) -> None:
    """Declare of which kind the instances of ``cls`` are."""
    (_by_base if subclasses else _by_class)[cls] = kind


def kind_of(x: Any) -> Kind | None:
    """Return the kind of ``x``, or None for a leaf."""
    kind = _by_class.get(type(x), _UNKNOWN)
    if kind is not _UNKNOWN:
        return kind
    for base, kind in _by_base.items():
        if isinstance(x, base):
            return kind
    if not jax.tree_util.all_leaves((x,)):
        return PYTREE
    return ATTRIBUTES if dataclasses.is_dataclass(x) and not isinstance(x, type) else None


class _ByName:
    """Stands in a pickle for a function that pickle cannot refer to, such as ``jax.nn.relu``, and its module can."""

    def __init__(self, module, name):
        self.module, self.name = module, name


def pack(x: Any) -> Any:
    """Return ``x``, or a reference by name to a function that is known by that in a module."""
    name = getattr(x, "__qualname__", getattr(x, "__name__", None))
    if not callable(x) or isinstance(x, (*_atoms, State)) or not isinstance(name, str):
        return x
    for module in ("jax.nn", "jax.numpy", "jax.lax", str(getattr(x, "__module__", None))):
        if getattr(sys.modules.get(module), name, None) is x:
            return _ByName(module, name)
    return x


def unpack(x: Any) -> Any:
    """Undo `pack`."""
    return getattr(importlib.import_module(x.module), x.name) if isinstance(x, _ByName) else x


def holds_state(x: Any) -> bool:
    """Tell whether ``x`` is a State or has one, or a Node, among its parts."""
    stack, seen = [x], {}
    while stack:
        x = stack.pop()
        if isinstance(x, tuple(_by_base)):
            return True
        kind = kind_of(x)
        if kind is not None and id(x) not in seen:
            seen[id(x)] = x
            stack += kind.parts(x).values()
    return False


def hides_state(x: Any) -> bool:
    """Tell whether a leaf holds a State or Node where nothing will find it: in a set, or an unknown object.

    Objects of this library are exempt: a compiled function knows States, and does not own them.
    """
    if type(x) in _by_class or isinstance(x, State | type | jax.Array) or type(x).__module__.startswith("brainstate."):
        return False
    inside = list(getattr(x, "__dict__", {}).values())
    if isinstance(x, list | tuple | set | frozenset):
        inside += x
    elif isinstance(x, dict):
        inside += x.values()
    return any(map(holds_state, inside))
