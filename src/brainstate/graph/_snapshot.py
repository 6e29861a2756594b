"""Snapshots: States as plain data.

A ``TreefyState`` is a State at one moment: its value, which is the only child of the pytree, and its class
and metadata, which are static. It has no identity and is not tracked, so a tree of snapshots is ordinary
input and output of any JAX function, and two snapshots of one State have equal treedefs (a compiled
function is not traced again). ``to_state`` makes a new State of it. Transforms that select States want the
States themselves.
"""

from typing import Any, Self

import jax
import numpy as np

from .._errors import article
from .._seam.scope import read
from .._state import State, rebuild, strings, value_in_words

__all__ = ["Static", "TreefyState", "same"]


def same(a: Any, b: Any) -> bool:
    """Tell whether two objects are identical, or equal beyond doubt; arrays are compared by identity."""
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, jax.Array | np.ndarray):
        return False
    if type(a) is dict:
        return a.keys() == b.keys() and all(same(x, b[key]) for key, x in a.items())
    equal = a == b
    return isinstance(equal, bool | np.bool_) and bool(equal)


class Static:
    """Any object as static data of a pytree: hashable, and equal by `same`."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other):
        return same(self.value, other.value) if isinstance(other, Static) else NotImplemented

    def __hash__(self):
        try:
            return hash(self.value)
        except TypeError:
            return hash(type(self.value))

    def __repr__(self):
        return repr(self.value)


_Class = type[State]


class TreefyState:
    """The value, class and metadata of a State as a pytree node.

    Parameters
    ----------
    type : type
        The class of the State.
    value : pytree
        Its value.
    **metadata
        Its name, tag and further metadata.

    Examples
    --------
    >>> import jax
    >>> from brainstate import ParamState, graph
    >>> tree = graph.treefy_states({"w": ParamState(2.0, name="w")})
    >>> doubled = jax.tree.map(lambda x: 2 * x, tree)
    >>> doubled.w
    TreefyState(ParamState, 4.0, name='w')
    >>> doubled.w.to_state()
    ParamState(4.0, name='w')
    """

    __slots__ = ("_metadata", "type", "value")
    type: _Class
    value: Any
    _metadata: dict[str, Any]

    def __init__(self, type: _Class, value: Any, /, **metadata: Any):
        metadata["tag"] = frozenset(strings(metadata.get("tag") or ()))
        self.type, self.value, self._metadata = type, value, metadata

    @classmethod
    def of(cls, state: State) -> Self:
        """Take a snapshot. Containers in the value are copied, arrays are shared."""
        value = read(state)  # as it is stored, whatever a subclass shows as ``value``
        if not isinstance(value, jax.Array):
            value = jax.tree.map(lambda leaf: leaf, value)
        new = cls.__new__(cls)
        new.type, new.value, new._metadata = type(state), value, state.metadata()
        new._metadata["tag"] = frozenset(new._metadata["tag"])
        return new

    @property
    def name(self) -> str | None:
        """The name of the State."""
        return self._metadata.get("name")

    @property
    def tag(self) -> frozenset[str]:
        """The tags of the State."""
        return self._metadata["tag"]

    def metadata(self) -> dict[str, Any]:
        """Return name, tags and all other metadata."""
        return dict(self._metadata)

    def replace(self, value: Any) -> Self:
        """Return a snapshot with another value."""
        return type(self)(self.type, value, **self.metadata())

    def copy(self) -> Self:
        """Return another snapshot of the same."""
        return self.replace(self.value)

    def to_state(self) -> State:
        """Return a new State with this value and metadata."""
        return rebuild(self.type, self.value, self.metadata())

    def __getattr__(self, name: str) -> Any:
        try:
            return object.__getattribute__(self, "_metadata")[name]
        except KeyError:
            raise AttributeError(f"a snapshot of {article(self.type.__name__)} has no attribute {name!r}.") from None

    def __reduce__(self):
        return _restore, (self.type, self.value, self.metadata())

    def __repr__(self):
        extra = [
            f"{k}={set(v) if k == 'tag' else v!r}" for k, v in self._metadata.items() if v is not None and v != set()
        ]
        return f"TreefyState({', '.join([self.type.__name__, value_in_words(self.value), *extra])})"


def _restore(cls, value, metadata):
    return TreefyState(cls, value, **metadata)


jax.tree_util.register_pytree_with_keys(
    TreefyState,
    lambda x: ([(jax.tree_util.GetAttrKey("value"), x.value)], (x.type, Static(x._metadata))),
    lambda aux, children: TreefyState(aux[0], *children, **aux[1].value),
    lambda x: ([x.value], (x.type, Static(x._metadata))),
)
