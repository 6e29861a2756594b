"""``Module``: the base class of everything that owns States.

A Module is an ordinary object. States, Modules and containers of them become part of it by being assigned
to attributes; nothing is declared or registered: States and Modules are looked up when asked for, through
``graph``. A Module is called by ``m(x)``, which is ``m.update(x)`` unless the class defines ``__call__``.

Names and order are those of ``graph``: attributes sorted by name, positions counting up, each State and
Module once. Dotted names join the parts of a path.
"""

import operator
import reprlib
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, overload

import jax
import numpy as np

from .. import graph
from .._errors import StateTypeError, StateValueError
from .._state import ParamState, State
from ..filters import Filter
from ..graph import Node

__all__ = ["InputError", "Module", "as_shape"]

_LEVELS = (0, float("inf"))
_S = TypeVar("_S", bound=State)
_N = TypeVar("_N", bound=Node)


class Module(Node):
    """Base class of models and layers.

    Parameters
    ----------
    name : str, optional
        A name, read-only afterwards.

    Notes
    -----
    Lists and dicts that are empty or hold States, Modules or functions are kept as equal copies, so change
    ``module.layers`` and not the list that was assigned. A compiled function that has read an attribute, or an
    element of such a list or dict, is traced again after it has changed; the inside of other objects, such as
    NumPy arrays, is not looked at. An object in which no State can be found
    (an ordinary class that holds one, a set) is refused with a `StateTypeError`.

    A Module is not a pytree and not an argument of a transform: a function refers to it by name, and
    ``grad(fun, grad_states=model)`` differentiates with respect to it. ``jax.grad(fun)(model)`` and
    ``equinox.filter_grad(fun)(model)`` are errors that say so.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from brainstate import ParamState, nn
    >>> class Scale(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.factor = ParamState(jnp.ones(2))
    ...
    ...     def update(self, x):
    ...         return x * self.factor.value
    >>> model = Scale()
    >>> model
    Scale(factor=ParamState(float32[2]))
    >>> model(3.0).tolist()
    [3.0, 3.0]
    >>> list(model.states())
    [('factor',)]
    """

    __array_ufunc__ = None  # so that `array >> module` comes here

    def __init__(self, name: str | None = None):
        self._name = name

    # All three are None in a subclass that does not call ``super().__init__()``.

    @property
    def name(self) -> str | None:
        """The name that was given, or None."""
        return getattr(self, "_name", None)

    @property
    def in_size(self) -> tuple[int, ...] | None:
        """The shape of one input without batch axes; an int may be assigned."""
        return getattr(self, "_in_size", None)

    @in_size.setter
    def in_size(self, size: int | Iterable[int]) -> None:
        self._in_size = as_shape(size)

    @property
    def out_size(self) -> tuple[int, ...] | None:
        """The shape of one output without batch axes; an int may be assigned."""
        return getattr(self, "_out_size", None)

    @out_size.setter
    def out_size(self, size: int | Iterable[int]) -> None:
        self._out_size = as_shape(size)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output; subclasses define this, or ``__call__``."""
        raise NotImplementedError(f"{type(self).__name__} defines neither `update` nor `__call__`.")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.update(*args, **kwargs)
        except InputError as error:
            error.locate(self)
            raise

    def __rrshift__(self, x: Any) -> Any:
        return self(x)

    # ------------------------------------------------------------------------------------ looking around

    @overload
    def states(  # pyright: ignore[reportOverlappingOverload]
        self, kind: type[_S], /, *, allowed_hierarchy: tuple[float, float] = ...
    ) -> graph.FlattedDict[_S]: ...
    @overload
    def states(self, *, allowed_hierarchy: tuple[float, float] = ...) -> graph.FlattedDict[State[Any]]: ...
    @overload
    def states(
        self, filter: Filter, /, *, allowed_hierarchy: tuple[float, float] = ...
    ) -> graph.FlattedDict[State[Any]]: ...
    @overload
    def states(
        self, filter: Filter, other: Filter, /, *filters: Filter, allowed_hierarchy: tuple[float, float] = ...
    ) -> tuple[graph.FlattedDict[State[Any]], ...]: ...
    def states(self, *filters: Filter, allowed_hierarchy: tuple[float, float] = _LEVELS) -> Any:
        """Return the States of this Module and those below by path; see `brainstate.graph.states`."""
        return graph.states(self, *filters, allowed_hierarchy=allowed_hierarchy)

    def state_trees(self, *filters: Filter) -> Any:
        """Return snapshots of the States as nested dicts; see `brainstate.graph.treefy_states`."""
        return graph.treefy_states(self, *filters)

    @overload
    def nodes(self, kind: type[_N], /, *, allowed_hierarchy: tuple[float, float] = ...) -> graph.FlattedDict[_N]: ...
    @overload
    def nodes(self, *, allowed_hierarchy: tuple[float, float] = ...) -> graph.FlattedDict[Any]: ...
    @overload
    def nodes(self, filter: Filter, /, *, allowed_hierarchy: tuple[float, float] = ...) -> graph.FlattedDict[Any]: ...
    @overload
    def nodes(
        self, filter: Filter, other: Filter, /, *filters: Filter, allowed_hierarchy: tuple[float, float] = ...
    ) -> tuple[graph.FlattedDict[Any], ...]: ...
    def nodes(self, *filters: Filter, allowed_hierarchy: tuple[float, float] = _LEVELS) -> Any:
        """Return this Module and those below, ``{path: Module}``; see `brainstate.graph.nodes`."""
        return graph.nodes(self, *filters, allowed_hierarchy=allowed_hierarchy)

    def named_children(self) -> Iterator[tuple[str, "Module"]]:
        """Iterate over the Modules directly below, with dotted names."""
        yield from _dotted_names("", self.nodes(allowed_hierarchy=(1, 1)))

    def children(self) -> Iterator["Module"]:
        """Iterate over the Modules directly below."""
        yield from self.nodes(allowed_hierarchy=(1, 1)).values()

    def named_modules(self, prefix: str = "", include_self: bool = True) -> Iterator[tuple[str, "Module"]]:
        """Iterate over all Modules with dotted names, children first; this one is named ``prefix``."""
        yield from _dotted_names(prefix, self.nodes(allowed_hierarchy=(0 if include_self else 1, float("inf"))))

    def modules(self, include_self: bool = True) -> Iterator["Module"]:
        """Iterate over all Modules, children before parents."""
        return (module for _, module in self.named_modules(include_self=include_self))

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, ParamState]]:
        """Iterate over the ParamStates with dotted names; without ``recurse`` only over this Module's own.

        Examples
        --------
        >>> from brainstate import nn
        >>> [name for name, _ in nn.Linear(2, 3).named_parameters(prefix="head")]
        ['head.bias', 'head.weight']
        """
        yield from _dotted_names(prefix, self.states(ParamState, allowed_hierarchy=_LEVELS if recurse else (0, 0)))

    def parameters(self, recurse: bool = True) -> Iterator[ParamState]:
        """Iterate over the ParamStates; without ``recurse`` only over this Module's own."""
        return (state for _, state in self.named_parameters(recurse=recurse))

    @reprlib.recursive_repr("<...>")
    def __repr__(self):
        return _show(self, (), {})


def _dotted_names(prefix, flat):
    for path, x in flat.items():
        yield ".".join([*([prefix] if prefix else []), *map(str, path)]), x


def as_shape(size: int | Iterable[int]) -> tuple[int, ...]:
    """Return a size as a tuple of ints.

    Raises
    ------
    StateTypeError, StateValueError
        If it holds anything but ints from 1 up.
    """
    sizes = size if isinstance(size, Iterable) else (size,)
    try:
        shape = tuple(map(operator.index, sizes))
    except TypeError:
        raise StateTypeError(f"a size is an int or a tuple of ints, not {size!r}.") from None
    if not shape:
        raise StateValueError(f"a size has at least one int, not {size!r}.")
    if any(n < 1 for n in shape):
        raise StateValueError(f"a size has ints from 1 up, not {size!r}.")
    return shape


class InputError(StateValueError):
    """A layer was called with an unusable argument; the message names the layer by path, once a Module above is met."""

    def __init__(self, layer: Module, problem: str):
        self._layer, self._problem = layer, problem
        super().__init__(f"{type(layer).__name__}: {problem}")

    def locate(self, root: Module) -> None:
        """Name the layer by its path from ``root``."""
        for path, module in graph.nodes(root).items():
            if module is self._layer and path:
                where = ".".join(map(str, path))
                self.args = (f"{type(module).__name__} at {where} of {type(root).__name__}: {self._problem}",)


def _show(x, path, seen):
    """Write ``x``, which is found under ``path``; an object ``seen`` before is only referred to."""
    if isinstance(x, Node | State | list | dict):
        if id(x) in seen:
            return f"<same as {seen[id(x)]}>"
        seen[id(x)] = ".".join(map(str, path)) or "the root"
    if isinstance(x, Node):
        shown = [(_attribute_name(type(x), name, v), name, v) for name, v in sorted(vars(x).items())]
        items = [f"{label}={_show(v, (*path, name), seen)}" for label, name, v in shown if label]
        return _enclose(f"{type(x).__name__}(", items, ")")
    if isinstance(x, list | tuple) and not hasattr(x, "_fields"):
        items = [_show(v, (*path, i), seen) for i, v in enumerate(x)]
        return _enclose("[", items, "]") if isinstance(x, list) else _enclose("(", items, ",)" if len(x) == 1 else ")")
    if isinstance(x, dict):
        return _enclose("{", [f"{k!r}: {_show(v, (*path, k), seen)}" for k, v in x.items()], "}")
    if isinstance(x, jax.Array | np.ndarray):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    return getattr(x, "__qualname__", None) or repr(x)


def _attribute_name(cls, name, value):
    """Return the name to show an attribute by, or None for one that tells nothing."""
    if value is None:
        return None
    if not name.startswith("_") or isinstance(value, Node | State):
        return name
    return name[1:] if isinstance(getattr(cls, name[1:], None), property) else None


def _enclose(head, items, tail, width=100):
    line = f"{head}{', '.join(items)}{tail}"
    if len(line) <= width and "\n" not in line:
        return line
    return "\n".join([head, textwrap.indent(",\n".join(items), "  ") + ",", tail])
