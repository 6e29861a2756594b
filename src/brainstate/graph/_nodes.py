"""``Node``: the base of Modules, and the containers that a Node owns.

A compiled function keeps a record of its reads of Modules (``_seam/module_reads``). If one of these changes, the
function must look again, and for this it is enough that the change is announced (``announce_change``): a counter goes
up, which compiled calls compare. So the places where something can enter or leave the graph have to notice:

* attributes of a Node, in ``__setattr__`` and ``__delattr__``.
* lists and dicts in attributes. A plain list cannot notice anything, so a Node keeps an equal ``NodeList``
  (``NodeDict``) of it whenever the list is empty or holds States, Modules or functions. Since that is a copy, a later
  change of the original would be lost; the walk over the graph compares the two and raises instead.

The same places refuse objects in which nobody would find a State (`adopt`).
"""

import pickle
import reprlib
import sys
from collections.abc import Callable
from functools import partial
from operator import is_
from types import FunctionType
from typing import Any, Self

import jax

from .._copies import deep_copied
from .._errors import StateTypeError, StateValueError, TraceContextError, a_type
from .._seam.module_reads import (
    ALL,
    STRUCTURE,
    Container,
    Watched,
    announce_change,
    is_watched,
    note,
    register_container,
)
from .._state import State
from ._parts import DICT, LIST, Attributes, Kind, hides_state, holds_state, kind_of, pack, register_kind, unpack
from ._paths import in_order

__all__ = ["NODE", "Node", "NodeDict", "NodeList", "Owned", "adopt", "own"]


_NOTHING = object()


def _name_of(x) -> str:
    return "nothing" if x is _NOTHING else getattr(x, "__qualname__", None) or reprlib.repr(x)


class Node(Watched):
    """An object whose attributes are parts of the graph: States, Nodes, containers, or static data.

    Use ``nn.Module`` unless you want nothing but that.
    """

    @property
    def __jax_array__(self) -> Any:
        raise _no_array(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        reduced: Any = self.__reduce_ex__(4)
        make, args, state, *_ = reduced
        new = memo[id(self)] = make(*args)
        state = deep_copied(state, memo)
        if hasattr(new, "__setstate__"):
            new.__setstate__(state)
        else:
            new.__dict__.update(state or {})
        return new

    def __reduce_ex__(self, protocol) -> Any:
        if _pickles_by_name(sys._getframe(1)):
            _refuse_nameless(self)
        return super().__reduce_ex__(protocol)

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(getattr(type(self), name, None), "__set__"):
            object.__setattr__(self, name, value)
            return
        where = f"{type(self).__name__}.{name}"
        value = adopt(value, where)
        old = object.__getattribute__(self, "__dict__").get(name, _NOTHING)
        if old is not _NOTHING:
            _refuse_loss(old, value, where)
        object.__setattr__(self, name, value)
        if old is not value:
            self._announce_change(name, old, value)

    def __delattr__(self, name: str) -> None:
        old = object.__getattribute__(self, "__dict__").get(name, _NOTHING)
        object.__delattr__(self, name)
        self._announce_change(name, old, _NOTHING)

    def __getstate__(self):
        note(self)
        state: Any = super().__getstate__()
        return {name: pack(x) for name, x in state.items()} if isinstance(state, dict) else state

    def __setstate__(self, state):
        attributes, slots = state if isinstance(state, tuple) else (state, {})
        for name, x in {**(attributes or {}), **slots}.items():
            object.__setattr__(self, name, unpack(x))

    def _announce_change(self, name, old, new):
        """Announce a change to compiled functions that have read the attribute."""
        cls = type(self).__name__
        if old is not _NOTHING and holds_state(old):
            announce_change(self, name, f"{cls}.{name} was {'deleted' if new is _NOTHING else 'replaced'}", True)
        elif is_watched(self):
            change = f": {_name_of(old)} → {_name_of(new)}" if old is not _NOTHING else f", it is {_name_of(new)} now"
            announce_change(self, name, f"attribute `{name}` of {cls} changed{change}", False)
            if new is not _NOTHING and holds_state(new):
                announce_change(self, STRUCTURE, f"{cls}.{name} was added", False)


def _no_array(node) -> Exception:
    """Return the answer to whoever asks ``node`` for an array.

    Only the answer to ``jax.typeof`` reaches the user: JAX asks by it where it takes nothing but arrays. To all others,
    ``hasattr`` and operators with arrays among them, the answer is that of any object. A TypeError is a no to JAX's
    ``valid_jaxtype`` and would be lost where JAX asks by that one, as ``jax.grad`` does, and then says less.
    """
    asking: Any = sys._getframe(2)
    if not _is_jax(asking) or asking.f_code.co_name != "typeof":
        return AttributeError("__jax_array__")
    hidden = asking.f_back.f_code.co_name == "valid_jaxtype" and _is_jax(asking.f_back.f_back)
    return (TraceContextError if hidden else StateTypeError)(
        f"{a_type(node)} was given to JAX instead of an array. A Module is not an argument, its arrays are in "
        f"States: let the function refer to it by name, and differentiate with respect to it by "
        f"brainstate.transform.grad(fun, grad_states=module), or by another transform from there."
    )


def _is_jax(frame) -> bool:
    return frame.f_globals.get("__name__", "").startswith("jax.")


def _pickles_by_name(asking) -> bool:
    """Tell whether a Node is reduced for ``pickle``, written in C, and not for a copy or a pickler written in Python.

    One that is written in Python, such as cloudpickle, may take functions apart; it is the caller, or calls itself.
    """
    pickler = asking.f_locals.get("self")
    by_copy = asking.f_globals.get("__name__") in ("copy", __name__)
    return not by_copy and not isinstance(pickler, pickle.Pickler | pickle._Pickler)


def _refuse_nameless(node: Node) -> None:
    """Refuse functions that pickle cannot refer to by name, such as those in an optax transformation."""
    stack, seen = [(type(node).__name__, x, f".{name}") for name, x in vars(node).items()], {}
    while stack:
        owner, x, place = stack.pop()
        where = owner + place
        if isinstance(x, FunctionType) and "<" in x.__qualname__ and pack(x) is x:
            raise StateTypeError(
                f"{where} is {x.__qualname__}, and pickle knows functions by their name in a module only: "
                f"{type(node).__name__} cannot be pickled with it. Take it away before, and make it again after "
                f"loading, as an optax transformation can be; or keep the values only, states().to_dict_values(). "
                f"copy.deepcopy takes it."
            )
        if id(x) in seen:
            continue
        seen[id(x)] = x
        if isinstance(x, partial):
            parts = {".func": x.func, ".args": x.args, ".keywords": x.keywords}
        elif isinstance(x, dict):
            parts = {f"[{key!r}]": part for key, part in x.items()}
        elif isinstance(x, list | tuple):
            names = getattr(x, "_fields", None)
            parts = {f".{names[i]}" if names else f"[{i}]": part for i, part in enumerate(x)}
        else:
            parts = {}
        stack += [(where, part, key) for key, part in parts.items()]


def own(state: State, where: str) -> None:
    """Tell a State its place, for messages; the first one counts."""
    if state._owner is None:
        state._owner = where  # pyright: ignore[reportAttributeAccessIssue]


def _refuse_loss(old: Any, new: Any, where: str) -> None:
    """Refuse that something else takes the place of a State, at any depth of a container: ``.value`` was forgotten.

    Another State, a Module and containers of them replace it, and None takes it away: nobody assigns that by mistake.
    """
    if isinstance(old, State):
        if new is not None and not holds_state(new):
            given = "array" if hasattr(new, "shape") else type(new).__name__
            raise StateTypeError(
                f"{where} is a {type(old).__name__}, which `... = <{given}>` would drop: write `{where}.value = ...` "
                f"to change its value, or first `del {where}` (or assign a new State) to replace it."
            )
        return
    kind = None if old is new or isinstance(old, Node) else kind_of(old)
    if kind is None:
        return
    parts, kind = kind.parts(old), None if isinstance(new, Node) else kind_of(new)
    if kind is not None:
        others = kind.parts(new)
        for key in parts.keys() & others.keys():
            _refuse_loss(parts[key], others[key], f"{where}[{key!r}]")
    elif hasattr(new, "shape"):
        for key, part in parts.items():
            _refuse_loss(part, new, f"{where}[{key!r}]")


def adopt(value: Any, where: str, within: tuple[int, ...] = ()) -> Any:
    """Return ``value`` as a Node keeps it: with owned containers, and nothing hidden.

    Raises
    ------
    StateTypeError
        If a State is hidden in ``value``; ``where`` names the place.
    """
    if isinstance(value, State):
        own(value, where)
        return value
    kind = kind_of(value)
    if kind is None:
        if hides_state(value):
            raise StateTypeError(
                f"{where}: States inside {a_type(value)} would not be found. Make that class a "
                f"dataclass or a Module, register it as a pytree, or use a list, tuple or dict."
            )
        return value
    if isinstance(value, Node | Owned) or id(value) in within:
        return value
    within = (*within, id(value))
    parts = {key: adopt(part, f"{where}[{key!r}]", within) for key, part in kind.parts(value).items()}
    owned = {list: NodeList, dict: NodeDict}.get(type(value))
    if owned and (not parts or any(holds_state(x) or _is_owned(x) or callable(x) for x in parts.values())):
        return owned._adopt_copy(value, parts)
    if isinstance(value, tuple) and any(map(_is_owned, parts.values())):
        return jax.tree.unflatten(kind.spec(value), parts.values())
    return value


def _is_owned(x):
    return isinstance(x, Owned) or (type(x) is tuple and any(map(_is_owned, x)))


# ---------------------------------------------------------------------------------------- owned containers


class Owned(Container):
    """Common base of NodeList and NodeDict: a look at the original, and pickling that survives cycles."""

    __slots__ = ()
    _kind: Kind
    _origin: tuple | None  # the original, and its parts at the time of the copy; None after a change of this one

    def __new__(cls, *args, **kwargs):
        new = super().__new__(cls, *args, **kwargs)
        new._origin = None
        return new

    @classmethod
    def _adopt_copy(cls, original, parts):
        new = cls.__new__(cls)
        cls._kind.fill(new, parts)
        new._origin = original, cls._kind.parts(original).copy()
        return new

    def check_origin(self):
        """Raise if the original was changed since it was copied."""
        if self._origin is not None:
            original, then = self._origin
            if len(original) != len(then) or not all(map(is_, self._kind.parts(original).values(), then.values())):
                raise StateValueError(
                    f"{a_type(original)} was changed after it was assigned to an attribute of a "
                    f"Module, which keeps a copy: change the Module's own, as in `module.layers.append(x)`."
                )

    def __reduce_ex__(self, protocol):
        parts = self._kind.parts(self).copy()
        return type(self).__new__, (type(self),), {key: pack(x) for key, x in parts.items()}

    def __setstate__(self, parts):
        self._kind.fill(self, {key: unpack(x) for key, x in parts.items()})


def _refuse_lost(before, after, entered):
    """Refuse a value that took the very place of a State in a container."""
    left, new = set(map(id, before.values())) - set(map(id, after.values())), set(map(id, entered))
    for key in before.keys() & after.keys():
        old, x = before[key], after[key]
        if id(old) in left and id(x) in new:
            _refuse_loss(old, x, getattr(old, "_owner", None) or f"[{key!r}]")


def _notice_changes(base: type, name: str, kind: Kind) -> Callable:
    """Return method ``name`` of ``base`` so that new entries are adopted and announced."""
    method = getattr(base, name)

    def change(self, *args, **kwargs):
        before, moved = kind.parts(self).copy(), []
        try:
            result = method(self, *args, **kwargs)
            for key, x in list(kind.parts(self).items()):
                if key not in before or before[key] is not x:
                    base.__setitem__(self, key, adopt(x, f"{type(self).__name__}[{key!r}]"))
                    moved.append(x)
            _refuse_lost(before, kind.parts(self), moved)
        except Exception:
            base.clear(self)
            kind.fill(self, before)
            raise
        after = kind.parts(self)
        moved += [x for key, x in before.items() if key not in after or after[key] is not x]
        self._origin = None
        if moved:
            structure = any(map(holds_state, moved))
            of = " of States or Modules" if structure else ""
            announce_change(self, ALL, f"a {base.__name__}{of} was changed by `{name}`", structure)
        return result

    change.__name__ = name
    change.__doc__ = f"As ``{base.__name__}.{name}``; announces States that move."
    return change


class NodeList(Owned, list):
    """The list that a Node keeps in place of a plain one; it notices when States enter or leave."""

    __slots__ = ("__weakref__", "_origin")
    _kind = LIST


class NodeDict(Owned, dict):
    """The dict that a Node keeps in place of a plain one; it notices when States enter or leave."""

    __slots__ = ("__weakref__", "_origin")
    _kind = DICT


def _prepare(cls, base, mutators):
    """Make the mutating methods notice, and let JAX and the graph know the class."""
    kind, key = cls._kind, jax.tree_util.SequenceKey if base is list else jax.tree_util.DictKey
    for name in mutators.split():
        setattr(cls, name, _notice_changes(base, name, kind))

    def flatten(x):
        parts = kind.parts(x)
        keys = tuple(in_order(parts))
        return [(key(k), parts[k]) for k in keys], keys

    def unflatten(keys, children):
        new = cls.__new__(cls)
        kind.fill(new, dict(zip(keys, children, strict=True)))
        return new

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    register_kind(cls, kind)
    register_container(cls)


_prepare(
    NodeList,
    list,
    "append extend insert remove pop clear sort reverse __setitem__ __delitem__ __iadd__ __imul__",
)
_prepare(NodeDict, dict, "update setdefault pop popitem clear __setitem__ __delitem__ __ior__")

NODE = Attributes()
register_kind(Node, NODE, subclasses=True)
