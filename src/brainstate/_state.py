"""``State``: a named place for a value that functions may read and replace.

A State holds any pytree (arrays, numbers, nested containers; outside transforms any object at all) in
``value``. Reading and assigning ``value`` is all there is: both go through the seam (``_seam``), so the same
line of code works outside and inside every transform. A State has identity: it compares and hashes by ``is``,
is a leaf for ``jax.tree``, and holds no other State. Where ``.value`` was forgotten, it says so.

A subclass may override ``value``, to show something else than the seam keeps. Copies, snapshots, loading and
derivatives go by the *stored* value.

The kinds differ in meaning only; filters select by them::

    State
    ├── LongTermState           kept from one run to the next
    │   ├── ParamState          trained
    │   └── BatchState          statistics of batches
    └── ShortTermState          lives within a run
        └── HiddenState         the activity of a recurrent or spiking layer: one array

Nobody but the seam changes a State, there are no hooks, and no source trace is recorded. Tags decide what a filter
selects, and so the compiled program: a change of them is announced as the replacement of a State is.
"""

import copy as _copy
import functools
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Generic, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import valid_jaxtype

from ._errors import StateTypeError, StateValueError, a_type
from ._seam import scope as _scope

__all__ = [
    "BatchState",
    "HiddenState",
    "LongTermState",
    "ParamState",
    "ShortTermState",
    "State",
    "fit",
    "rebuild",
    "strings",
    "value_in_words",
]


class _Tags(set):
    """The tags of a State; compiled functions look up again, after a change, the States that they selected by tag."""

    __slots__ = ("_state",)

    def __repr__(self):
        return repr(set(self))

    def __reduce__(self):
        return set, (list(self),)  # a copy belongs to no State


def _announce_after(method: Callable) -> Callable:
    @functools.wraps(method)
    def change(self, *others):
        before = set(self)
        try:
            result = method(self, *others)
            strings(self)
            return result
        except StateTypeError:
            set.clear(self)
            set.update(self, before)
            raise
        finally:
            if self != before:
                _announce(self._state())

    return change


def strings(tags: Any) -> list[str]:
    """Return one tag or several as a list, and refuse anything but strings."""
    tags = [tags] if isinstance(tags, str) or not isinstance(tags, Iterable) else list(tags)
    if not all(isinstance(tag, str) for tag in tags):
        raise StateTypeError(f"the tags of a State are strings; give one, or several in a list, not {tags!r}.")
    return tags


def _announce(state) -> None:
    if hasattr(state, "_value"):  # one that a transform creates, and tags, is new to all that was compiled
        _scope.retag(f"the tags of {state.describe()} changed")


_CHANGES = "add clear discard pop remove update difference_update intersection_update symmetric_difference_update"
for _name in (*_CHANGES.split(), "__iand__", "__ior__", "__isub__", "__ixor__"):
    setattr(_Tags, _name, _announce_after(getattr(set, _name)))


_V = TypeVar("_V")


class State(_scope.Cell, Generic[_V]):
    """A place for a value that transforms know how to read, differentiate, carry and commit.

    For type checkers it is generic in its value: ``State[jax.Array]``.

    Parameters
    ----------
    value : pytree
        The first value. A State given here is unwrapped.
    name : str, optional
        A name for messages and for ``StateFinder``.
    tag : str or iterable of str, optional
        Marks to select by with filters.
    **metadata
        Anything else to remember; each becomes an attribute.

    Raises
    ------
    TraceContextError
        If ``value`` is a tracer of a transform that does not know States.
    StateValueError
        If ``value`` contains a State.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from brainstate import State
    >>> count = State(jnp.zeros(2), name="count")
    >>> count.value += 1.0
    >>> count
    State(float32[2], name='count')
    """

    __slots__ = ("__dict__", "__orig_class__", "_owner")  # State[X](...) sets __orig_class__: it is not metadata

    def __init__(
        self, value: "_V | State[_V]", name: str | None = None, tag: str | Iterable[str] | None = None, **metadata: Any
    ):
        if name is not None and not isinstance(name, str):
            raise StateTypeError(f"the name of a State is a string, not a {type(name).__name__}: {name!r}.")
        self.name = name
        self._owner = None
        if tag is None:  # nearly always: the setter would be a quarter of the price of a State
            tags = self.__dict__["tag"] = _Tags()
            tags._state = weakref.ref(self)
        else:
            self.tag = tag
        if metadata:
            _refuse_reserved(type(self), metadata)
            self.__dict__.update(metadata)
        _scope.create(self, value.value if isinstance(value, State) else value)

    @property
    def value(self) -> _V:
        """The present value, as the function that runs now sees it."""
        return _scope.read(self)

    @value.setter
    def value(self, value: _V) -> None:
        _scope.write(self, value)

    @property
    def tag(self) -> set[str]:
        """The marks to select by; may be changed or assigned at any time: compiled functions notice."""
        return self.__dict__["tag"]

    @tag.setter
    def tag(self, tags: str | Iterable[str]) -> None:
        old = self.__dict__.get("tag")
        new = self.__dict__["tag"] = _Tags(strings(tags))
        new._state = weakref.ref(self)
        if old is not None and old != new:
            _announce(self)

    def restore_value(self, value: _V) -> None:
        """Assign the stored value, which must have the structure, shapes and dtypes of the present one.

        A Python number takes the dtype of a scalar array, if that can hold it.

        Raises
        ------
        StateValueError
            If they differ; the State is unchanged.
        """
        value, problem = fit(_scope.glance(self), value)
        if problem:
            raise StateValueError(f"{self.describe()}: the value to restore is {problem}; they must agree.")
        _scope.write(self, value)

    def value_call(self, fun: Callable[[Any], Any]) -> Any:
        """Return ``jax.tree.map(fun, self.value)``; the State is unchanged."""
        return jax.tree.map(fun, self.value)

    def numel(self) -> int:
        """Return the number of elements of all leaves together."""
        return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(self.value))

    def add_tag(self, tag: str) -> None:
        """Add a mark to select by."""
        self.tag.add(tag)

    def metadata(self) -> dict[str, Any]:
        """Return name, tags and all other attributes: with the class and a value, all that makes this State."""
        return {**self.__dict__, "tag": set(self.tag)}

    def copy(self) -> Self:
        """Return a new State with the same value and a copy of the metadata."""
        return rebuild(type(self), _scope.read(self), self.metadata())

    def replace(self, value: _V, **metadata: Any) -> Self:
        """Return a copy with another value and, if given, other ``name``, ``tag`` or metadata."""
        _refuse_reserved(type(self), metadata)
        return rebuild(type(self), value, {**self.metadata(), **metadata})

    def copy_from(self, other: Self) -> None:
        """Take over value and name of a State of the same class.

        Raises
        ------
        StateValueError
            If ``other`` is of another class.
        """
        if type(other) is not type(self):
            raise StateValueError(f"{self.describe()} cannot take over {a_type(other)}: the classes differ.")
        _scope.write(self, _scope.read(other))
        self.name = other.name

    def lanes(self, value: Any, size: int) -> tuple[Any, Any] | None:
        """Return ``(one value for each lane, the value afterwards)`` for a map that writes this State undeclared.

        None, as here, says that lanes have no values of their own: they all see ``value``.
        """
        return None

    def describe(self) -> str:
        """Name this State for an error message, without reading its value."""
        where = f" {self.name!r}" if self.name else f" at {self._owner}" if self._owner else ""
        return f"{type(self).__name__}{where}" if where else f"an unnamed {type(self).__name__}{_layout(self)}"

    def __eq__(self, other):
        if isinstance(other, _VALUES):
            raise _no_value(self)
        return NotImplemented  # by identity

    __hash__ = _scope.Cell.__hash__

    def __format__(self, spec):
        if spec:
            raise _no_value(self, f":{spec}")
        return repr(self)

    @property
    def __jax_array__(self):
        if sys._getframe(1).f_code.co_name == "bind":  # JAX asks in C, where only this may be raised
            raise _NoAttribute("__jax_array__")
        raise StateValueError(str(_no_value(self)))  # JAX has words of its own for a TypeError

    def __copy__(self) -> Self:
        return self.copy()

    def __deepcopy__(self, memo) -> Self:
        value, metadata = _copy.deepcopy((_scope.read(self), self.metadata()), memo)
        return rebuild(type(self), value, metadata)

    def __reduce__(self):
        return rebuild, (type(self), _scope.read(self), self.metadata())

    def __repr__(self) -> str:
        extra = {k: v for k, v in self.__dict__.items() if v is not None and v != set()}
        return f"{type(self).__name__}({', '.join([_layout(self)[1:-1], *(f'{k}={v!r}' for k, v in extra.items())])})"


# For type checkers the property is as above. It runs the functions of the seam themselves, with no frame in between.
_value_property = property(_scope.read, _scope.write, doc=State.value.__doc__)
type.__setattr__(State, "value", _value_property)


def _layout(state) -> str:
    """Write the shapes and dtypes that ``state`` holds, without a tracked read."""
    value = getattr(state, "_value", _scope.Cell)
    return "(no value yet)" if value is _scope.Cell else f"({value_in_words(value)})"


def value_in_words(value) -> str:
    """Write a value with shapes and dtypes in place of arrays."""

    def short(leaf):
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        return repr(leaf) if isinstance(leaf, str | bool | int | float | complex) else type(leaf).__name__

    return repr(jax.tree.map(lambda leaf: _Word(short(leaf)), value))


class _Word(str):
    __slots__ = ()
    __repr__ = str.__str__


# ------------------------------------------------------------------------------------------ values that are loaded

_NUMBERS = {bool: 0, int: 1, float: 2, complex: 3}
_ORDER = (np.bool_, np.integer, np.floating, np.complexfloating)


def fit(old: Any, new: Any) -> tuple[Any, str]:
    """Return ``new`` in a form that may replace ``old``, and the reason, in words, if it may not.

    Arrays need equal shapes, and equal dtypes as JAX has them: NumPy's float64 is float32 unless 64 bits are enabled. A
    Python number is converted to the dtype of a scalar that can hold it, and an array of one element may take the
    place of a Python number of its kind.
    """
    olds, treedef = jax.tree.flatten(old)
    news, other = jax.tree.flatten(new)
    if treedef == other:
        pairs = [_leaf_fitted(a, b) for a, b in zip(olds, news, strict=True)]
        if all(fits for _, fits in pairs):
            return treedef.unflatten([leaf for leaf, _ in pairs]), ""
    was, now = value_in_words(old), value_in_words(new)
    return new, f"{now} for {was}" if was != now else f"{now} in {other} for {treedef}"


def _leaf_fitted(old, new):
    if not (valid_jaxtype(old) and valid_jaxtype(new)):
        return new, valid_jaxtype(old) == valid_jaxtype(new)
    was, now = jax.typeof(old), jax.typeof(new)
    kinds = [_number_kind(was.dtype), _number_kind(now.dtype)]
    if type(new) in _NUMBERS:
        fits = was.shape == () and kinds[1] <= kinds[0]
        return (type(old)(new) if type(old) in _NUMBERS else jnp.asarray(new, was.dtype)) if fits else new, fits
    fits = was.shape == now.shape and (kinds[0] == kinds[1] if type(old) in _NUMBERS else was.dtype == now.dtype)
    if fits and isinstance(new, np.ndarray | np.generic) and new.dtype != now.dtype:
        new = np.asarray(new, now.dtype)
    return new, fits


def _number_kind(dtype) -> int:
    return next((i for i, kind in enumerate(_ORDER) if jnp.issubdtype(dtype, kind)), -1)


# -------------------------------------------------------------------------------------------- `.value` was forgotten

_VALUES = (int, float, complex, str, bytes, list, tuple, dict, np.ndarray, np.generic, jax.Array)
_BINARY = ["add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "matmul"]
_BINARY += ["lshift", "rshift", "and", "xor", "or"]
_OPERATORS = ["bool", "int", "float", "complex", "index", "len", "getitem", "setitem", "array", "array_ufunc"]
_OPERATORS += ["neg", "pos", "abs", "invert", "round", "trunc", "floor", "ceil", "lt", "le", "gt", "ge"]
_OPERATORS += [*_BINARY, *(f"r{name}" for name in _BINARY)]


class _NoAttribute(StateTypeError, AttributeError):
    """Of an array, but not of a State: an AttributeError as well, so that ``hasattr`` works."""


class _OfArrays:
    """An attribute that arrays have: a State has none, unless it is given one."""

    def __init__(self, name):
        self.name = name

    def __get__(self, state, owner):
        if state is None:
            raise AttributeError(self.name)
        raise _NoAttribute(str(_no_value(state, f".{self.name}")))


def _no_value(state, use="") -> StateTypeError:
    return StateTypeError(f"{state.describe()} is not the value that it holds: write `.value{use}` after the State.")


def _refuse(self, *args, **kwargs):
    raise _no_value(self)


for _name in _OPERATORS:
    setattr(State, f"__{_name}__", _refuse)
for _name in dir(jax.Array):
    if not _name.startswith("_") and not hasattr(State, _name):
        setattr(State, _name, _OfArrays(_name))


def _refuse_reserved(cls, metadata) -> None:
    clash = [k for k in metadata if k not in ("name", "tag") and hasattr(cls, k)]
    if clash:
        raise StateTypeError(
            f"{cls.__name__} has its own attribute {clash[0]!r}: choose another word for the metadata."
        )


def rebuild(cls: Any, value: Any, metadata: dict[str, Any]) -> Any:
    """Make a State of class ``cls`` from its parts without calling ``cls.__init__``."""
    state = cls.__new__(cls)
    state._owner = None
    state.__dict__.update(metadata)
    state.tag = metadata.get("tag", ())
    _scope.create(state, value)
    return state


class LongTermState(State[_V]):
    """A State that is kept from one run to the next; see `State`."""


class ParamState(LongTermState[_V]):
    """A trained parameter; ``grad_states=module`` selects these; see `State`."""


class BatchState(LongTermState[_V]):
    """Statistics of batches, such as a running mean; see `State`."""


class ShortTermState(State[_V]):
    """A State that lives within one run; see `State`."""


class HiddenState(ShortTermState[_V]):
    """The activity of a layer, held as one array; see `State`.

    Raises
    ------
    StateTypeError
        If the value is not one array (a pytree with one leaf that has a shape counts as one, so units work).
    """

    def __init__(
        self, value: "_V | State[_V]", name: str | None = None, tag: str | Iterable[str] | None = None, **metadata: Any
    ):
        leaves = jax.tree.leaves(value.value if isinstance(value, State) else value)
        if len(leaves) != 1 or not hasattr(leaves[0], "shape"):
            raise StateTypeError(f"HiddenState holds one array, not {type(value).__name__}: use ShortTermState.")
        super().__init__(value, name=name, tag=tag, **metadata)

    @property
    def varshape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(jax.tree.leaves(self.value)[0].shape)

    @property
    def num_state(self) -> int:
        """How many variables a unit has: one."""
        return 1
