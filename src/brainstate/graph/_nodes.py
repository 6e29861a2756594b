"""``Node``: the base of Modules, and the containers that a Node owns.

A compiled function knows the States it met. If one of them is replaced on its Module, the function must
look again, and for this it is enough that the replacement is announced (``_scope.invalidate``): a counter
goes up, which compiled calls compare. So the places where a State can enter or leave the graph have to
notice:

* attributes of a Node, in ``__setattr__`` and ``__delattr__``. The first assignment of a name replaces
  nothing and is not announced; nor is assigning the same object again.
* lists and dicts in attributes. A plain list cannot notice anything, so a Node keeps an equal ``NodeList``
  (``NodeDict``) of it whenever the list is empty or holds States. Since that is a copy, a later change of
  the original would be lost; the walk over the graph compares the two and raises instead.

The same places refuse objects in which nobody would find a State (`adopt`).
"""

import sys
from collections.abc import Callable
from operator import is_
from typing import Any

import jax

from .._errors import StateTypeError, StateValueError, TraceContextError, a_type
from .._scope import invalidate
from .._state import State
from ._parts import DICT, LIST, Attributes, Kind, hides_state, holds_state, kind_of, register_kind
from ._paths import in_order

__all__ = ["NODE", "Node", "NodeDict", "NodeList", "Owned", "adopt", "own"]


class Node:
    """An object whose attributes are parts of the graph: States, Nodes, containers, or static data.

    Use ``nn.Module`` unless you want nothing but that.
    """

    @property
    def __jax_array__(self) -> Any:
        raise _no_array(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(getattr(type(self), name, None), "__set__"):
            object.__setattr__(self, name, value)
            return
        value = adopt(value, f"{type(self).__name__}.{name}")
        old = self.__dict__.get(name, value)
        object.__setattr__(self, name, value)
        if old is not value and holds_state(old):
            invalidate(f"{type(self).__name__}.{name} was replaced")

    def __delattr__(self, name: str) -> None:
        old = self.__dict__.get(name)
        object.__delattr__(self, name)
        if holds_state(old):
            invalidate(f"{type(self).__name__}.{name} was deleted")


def _no_array(node) -> Exception:
    """Return the answer to whoever asks ``node`` for an array.

    Only what ``jax.typeof`` is told reaches the user: JAX asks by it where it takes nothing but arrays. To all others,
    ``hasattr`` and operators with arrays among them, the answer is that of any object. A TypeError is a no to JAX's
    ``valid_jaxtype`` and would be lost where JAX asks by that one, as ``jax.grad`` does, and then says less.
    """
    asking: Any = sys._getframe(2)
    if not _is_jax(asking) or asking.f_code.co_name != "typeof":
        return AttributeError("__jax_array__")
    hidden = asking.f_back.f_code.co_name == "valid_jaxtype" and _is_jax(asking.f_back.f_back)
    return (TraceContextError if hidden else StateTypeError)(
        f"{a_type(node)} was given to JAX in the place of an array. A Module is not an argument, its arrays are in "
        f"States: let the function refer to it by name, and differentiate with respect to it by "
        f"brainstate.transform.grad(fun, grad_states=module), or by another transform from there."
    )


def _is_jax(frame) -> bool:
    return frame.f_globals.get("__name__", "").startswith("jax.")


def own(state: State, where: str) -> None:
    """Tell a State its place, for messages; the first one counts."""
    if state._owner is None:
        state._owner = where  # pyright: ignore[reportAttributeAccessIssue]


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
    if owned and (not parts or any(map(holds_state, parts.values())) or any(map(_is_owned, parts.values()))):
        return owned._adopted(value, parts)
    if isinstance(value, tuple) and any(map(_is_owned, parts.values())):
        return jax.tree.unflatten(kind.spec(value), parts.values())
    return value


def _is_owned(x):
    return isinstance(x, Owned) or (type(x) is tuple and any(map(_is_owned, x)))


# ---------------------------------------------------------------------------------------- owned containers


class Owned:
    """What NodeList and NodeDict share: a look at the original, and pickling that survives cycles."""

    __slots__ = ()
    _kind: Kind
    _origin: tuple | None  # what this was copied from, and its parts then; None after a change of this one

    def __new__(cls, *args, **kwargs):
        new = super().__new__(cls, *args, **kwargs)
        new._origin = None
        return new

    @classmethod
    def _adopted(cls, original, parts):
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
        return type(self).__new__, (type(self),), self._kind.parts(self).copy()

    def __setstate__(self, parts):
        self._kind.fill(self, parts)


def _noticing(base: type, name: str, kind: Kind) -> Callable:
    """Return method ``name`` of ``base`` so that what enters is adopted and announced."""
    method = getattr(base, name)

    def change(self, *args, **kwargs):
        before, moved = kind.parts(self).copy(), []
        try:
            result = method(self, *args, **kwargs)
            for key, x in list(kind.parts(self).items()):
                if key not in before or before[key] is not x:
                    base.__setitem__(self, key, adopt(x, f"{type(self).__name__}[{key!r}]"))
                    moved.append(x)
        except Exception:
            base.clear(self)
            kind.fill(self, before)
            raise
        after = kind.parts(self)
        moved += [x for key, x in before.items() if key not in after or after[key] is not x]
        self._origin = None
        if any(map(holds_state, moved)):
            invalidate(f"a {base.__name__} of States or Modules was changed by `{name}`")
        return result

    change.__name__ = name
    change.__doc__ = f"Do what ``{base.__name__}.{name}`` does; announce it if States move."
    return change


class NodeList(Owned, list):
    """The list that a Node keeps in place of a plain one; it notices when States enter or leave."""

    __slots__ = ("_origin",)
    _kind = LIST


class NodeDict(Owned, dict):
    """The dict that a Node keeps in place of a plain one; it notices when States enter or leave."""

    __slots__ = ("_origin",)
    _kind = DICT


def _prepare(cls, base, mutators):
    """Make the mutating methods notice, and let JAX and the graph know the class."""
    kind, key = cls._kind, jax.tree_util.SequenceKey if base is list else jax.tree_util.DictKey
    for name in mutators.split():
        setattr(cls, name, _noticing(base, name, kind))

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


_prepare(
    NodeList,
    list,
    "append extend insert remove pop clear sort reverse __setitem__ __delitem__ __iadd__ __imul__",
)
_prepare(NodeDict, dict, "update setdefault pop popitem clear __setitem__ __delitem__ __ior__")

NODE = Attributes()
register_kind(Node, NODE, subclasses=True)
