"""Filters: short ways to say which States, snapshots or Modules are meant.

A *filter* is written by a user; a *predicate* is a function ``(path, x) -> bool``; `to_predicate` turns
the one into the other:

=========================  =====================  ==============================================
filter                     predicate              selects
=========================  =====================  ==============================================
a class                    ``OfType(cls)``        instances, and snapshots of instances
a string                   ``WithTag(tag)``       States that carry the tag
``...`` or ``True``        ``Everything()``       all
``None`` or ``False``      ``Nothing()``          none
a list or tuple            ``Any(*filters)``      States that at least one of them selects
a function of (path, x)    itself                 where it returns true
=========================  =====================  ==============================================

`All`, `Not` and `PathContains` are written out. Predicates compare, hash and print, so they can be static
arguments and dictionary keys. Where several filters are given (``states(ParamState, ...)``), each thing
goes to the first that selects it; one that selects everything therefore comes last.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import EllipsisType
from typing import Any as _Any

from ._errors import StateTypeError, StateValueError

__all__ = [
    "All",
    "Any",
    "Everything",
    "Not",
    "Nothing",
    "OfType",
    "PathContains",
    "WithTag",
    "to_predicate",
    "to_predicates",
]

Predicate = Callable[[tuple, _Any], bool]
Filter = type | str | bool | EllipsisType | None | list | tuple | Predicate


@dataclass(frozen=True)
class OfType:
    """Select instances of a class, and snapshots of such instances.

    Examples
    --------
    >>> from brainstate import ParamState, State
    >>> from brainstate.filters import OfType
    >>> OfType(State)(("w",), ParamState(1.0))
    True
    """

    type: type

    def __call__(self, path: tuple, x: _Any) -> bool:
        """Tell whether ``x`` is selected."""
        if isinstance(x, self.type):
            return True
        kind = getattr(x, "type", None)
        return isinstance(kind, type) and issubclass(kind, self.type)


@dataclass(frozen=True)
class WithTag:
    """Select States that carry a tag.

    Examples
    --------
    >>> from brainstate import State
    >>> from brainstate.filters import WithTag
    >>> WithTag("slow")(("w",), State(1.0, tag="slow"))
    True
    """

    tag: str

    def __post_init__(self):
        if not isinstance(self.tag, str):
            raise StateTypeError(f"WithTag takes the tag as a string, not {self.tag!r}.")

    def __call__(self, path: tuple, x: _Any) -> bool:
        """Tell whether ``x`` is selected."""
        return self.tag in (getattr(x, "tag", None) or ())


@dataclass(frozen=True)
class PathContains:
    """Select by one part of the path, which must match exactly.

    Examples
    --------
    >>> from brainstate.filters import PathContains
    >>> PathContains("encoder")(("encoder", "weight"), None)
    True
    """

    key: Hashable

    def __call__(self, path: tuple, x: _Any) -> bool:
        """Tell whether ``x`` is selected."""
        return self.key in path


@dataclass(frozen=True)
class Everything:
    """Select all; written ``...`` for short."""

    def __call__(self, path: tuple, x: _Any) -> bool:
        """Return True."""
        return True


@dataclass(frozen=True)
class Nothing:
    """Select none; written ``None`` for short."""

    def __call__(self, path: tuple, x: _Any) -> bool:
        """Return False."""
        return False


@dataclass(frozen=True, init=False, repr=False)
class _Combined:
    predicates: tuple

    def __init__(self, *filters: Filter):
        object.__setattr__(self, "predicates", tuple(map(to_predicate, filters)))

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(map(repr, self.predicates))})"


class Any(_Combined):
    """Select States that at least one of the filters selects.

    Examples
    --------
    >>> from brainstate import HiddenState, ParamState, State
    >>> from brainstate.filters import Any
    >>> Any(HiddenState, "slow")(("w",), State(1.0, tag="slow"))
    True
    """

    def __call__(self, path: tuple, x: _Any) -> bool:
        """Tell whether ``x`` is selected."""
        return any(p(path, x) for p in self.predicates)


class All(_Combined):
    """Select States that every one of the filters selects.

    Examples
    --------
    >>> from brainstate import ParamState
    >>> from brainstate.filters import All, Not, PathContains
    >>> All(ParamState, Not(PathContains("bias")))(("head", "weight"), ParamState(1.0))
    True
    """

    def __call__(self, path: tuple, x: _Any) -> bool:
        """Tell whether ``x`` is selected."""
        return all(p(path, x) for p in self.predicates)


@dataclass(frozen=True, init=False, repr=False)
class Not:
    """Select States that a filter does not select; see `All` for an example."""

    predicate: Predicate

    def __init__(self, filter: Filter):
        object.__setattr__(self, "predicate", to_predicate(filter))

    def __call__(self, path: tuple, x: _Any) -> bool:
        """Tell whether ``x`` is selected."""
        return not self.predicate(path, x)

    def __repr__(self):
        return f"Not({self.predicate!r})"


def to_predicate(filter: _Any) -> Predicate:
    """Return the predicate that a filter stands for.

    Raises
    ------
    StateTypeError
        If ``filter`` is not in the table of this module.

    Examples
    --------
    >>> from brainstate import ParamState
    >>> from brainstate.filters import to_predicate
    >>> to_predicate([ParamState, "slow"])
    Any(OfType(type=<class 'brainstate._state.ParamState'>), WithTag(tag='slow'))
    """
    if filter is Everything or filter is Nothing:
        return filter()
    if isinstance(filter, type):
        return OfType(filter)
    if isinstance(filter, str):
        return WithTag(filter)
    if filter is Ellipsis or filter is True:
        return Everything()
    if filter is None or filter is False:
        return Nothing()
    if isinstance(filter, list | tuple):
        return Any(*filter)
    if callable(filter):
        return filter  # pyright: ignore[reportReturnType]
    raise StateTypeError(
        f"{filter!r} is not a filter. A filter is a class, a tag (string), `...`, None, a function of "
        f"(path, x), or a list of filters."
    )


def to_predicates(filters: tuple[Filter, ...]) -> tuple[Predicate, ...]:
    """Return the predicates of filters that are tried in turn.

    Raises
    ------
    StateValueError
        If a filter that selects everything stands before another one.
    """
    predicates = tuple(map(to_predicate, filters))
    for i, predicate in enumerate(predicates[:-1]):
        if predicate == Everything():
            raise StateValueError(
                f"filter {i} selects everything, so the filters after it can select nothing: put `...` last."
            )
    return predicates
