"""Copies of functions: a function that refers to something that was copied is made again for the copy.

For Python a function is one thing: ``copy.deepcopy`` and the graph hand on the same. But ``jit(self.forward)``, or
``grad(loss, self)``, kept in an attribute, refers to the object and its States, and in a copy has to refer to the copy.
`remade` looks into bound methods, closures, partials, plain containers and the transforms of this package.
"""

import copy
from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import jax

from ._errors import StateTypeError

__all__ = ["Remade", "deep_copied", "remade", "things_reached"]


class Remade:
    """Base of the transforms, which hold functions: a deep copy of one acts on the copies of States and Modules."""

    def _recipe(self) -> tuple[Callable, tuple] | None:
        """Return ``(make, args)`` if ``make(*args)`` is a copy; otherwise its attributes are copied."""
        return None

    def __reduce_ex__(self, protocol):
        return self._recipe() or super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        recipe = self._recipe()
        if recipe is None:
            new = memo[id(self)] = object.__new__(type(self))
            new.__dict__.update(deep_copied(vars(self), memo))
            return new
        make, args = recipe
        args = deep_copied(args, memo)
        return memo[id(self)] if id(self) in memo else make(*args)


def _parts(x) -> list:
    """Return the parts of ``x``, as far as they are looked into."""
    match x:
        case MethodType():
            return [x.__func__, x.__self__]
        case partial():
            return [x.func, *x.args, *x.keywords.values()]
        case FunctionType():
            cells = [cell.cell_contents for cell in x.__closure__ or () if _has_contents(cell)]
            return [*cells, *(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values(), x.__dict__.get("__wrapped__")]
        case Remade() if (recipe := x._recipe()) is not None:
            return list(recipe[1])
    if type(x) in (list, tuple, set, frozenset) or (isinstance(x, tuple) and hasattr(x, "_fields")):
        return list(x)
    if type(x) is dict:
        return list(x.values())
    if _is_ours(x):
        return list(vars(x).values()) if hasattr(x, "__dict__") else []
    hidden: Any = x
    return [hidden.__wrapped__] if _is_foreign(x) else []


def _is_foreign(x):
    """Tell whether ``x`` hides a function, as ``jax.jit`` does."""
    return hasattr(x, "__wrapped__") and callable(x) and not isinstance(x, type | FunctionType | MethodType | Remade)


def _is_ours(x):
    """Tell whether ``x`` is a part of a transform, or an object of JAX that consists of functions."""
    kinds = Remade, jax.custom_jvp, jax.custom_vjp
    return isinstance(x, kinds) or type(x).__module__.startswith("brainstate.transform.")


def _has_contents(cell):
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _reach(x, table) -> tuple[dict, dict]:
    """Return the things that ``x`` leads to, by id, and who refers to each; it ends at those in ``table``."""
    things, owners, stack = {id(x): x}, {}, [x]
    while stack:
        owner = stack.pop()
        for part in () if id(owner) in table else _parts(owner):
            owners.setdefault(id(part), []).append(id(owner))
            if id(part) not in things:
                things[id(part)] = part
                stack.append(part)
    return things, owners


def deep_copied(x: Any, memo: dict[int, Any]) -> Any:
    """Return a deep copy of ``x``, the state of an object, with functions that refer to the copies."""
    foreign = [thing for thing in _reach(x, memo)[0].values() if _is_foreign(thing)]
    memo.update((id(thing), thing) for thing in foreign)  # Python would copy a half of them
    new = copy.deepcopy(x, memo)
    for thing in foreign:
        memo.pop(id(thing), None)
    return remade(new, memo)


def things_reached(x: Any, table: dict[int, Any]) -> list:
    """Return the things with an id in ``table`` that the function ``x`` refers to."""
    return [thing for key, thing in _reach(x, table)[0].items() if key in table]


def remade(x: Any, table: dict[int, Any]) -> Any:
    """Return ``x``, a function or a container of some, with the copy in ``table`` for each thing whose id is there.

    Raises
    ------
    StateTypeError
        If a ``jax.jit`` or the like leads there: it cannot be made again.
    """
    things, owners = _reach(x, table)
    stale, stack = set(), [key for key in things if key in table]
    while stack:  # from the copied things up to those that lead there
        for owner in owners.get(stack.pop(), ()):
            if owner not in stale:
                stale.add(owner)
                stack.append(owner)
    return _Maker(table, stale).make(x)


class _Maker:
    """One run of `remade`: only ``stale`` things are made again, each once."""

    def __init__(self, table, stale):
        self.table, self.stale, self.made = table, stale, {}

    def make(self, x) -> Any:
        if id(x) in self.table:
            return self.table[id(x)]
        if id(x) not in self.stale:
            return x
        if id(x) not in self.made:
            new = self._copy(x)
            self.made.setdefault(id(x), new)
        return self.made[id(x)]

    def _all(self, xs) -> list:
        return [self.make(x) for x in xs]

    def _make_values(self, xs) -> dict:
        return {name: self.make(x) for name, x in xs.items()}

    def _copy(self, x) -> Any:
        match x:
            case MethodType():
                return MethodType(self.make(x.__func__), self.make(x.__self__))
            case partial():
                return type(x)(self.make(x.func), *self._all(x.args), **self._make_values(x.keywords))
            case FunctionType():
                return self._function(x)
            case Remade() if (recipe := x._recipe()) is not None:
                return recipe[0](*self._all(recipe[1]))
            case dict():
                return self._make_values(x)
            case list() | tuple() | set() | frozenset():
                return type(x)(*self._all(x)) if hasattr(x, "_fields") else type(x)(self._all(x))
        if _is_ours(x):
            new = self.made[id(x)] = object.__new__(type(x))
            for name, part in vars(x).items():
                object.__setattr__(new, name, self.make(part))
            return new
        raise StateTypeError(
            f"{getattr(x, '__name__', x)!r} is a {type(x).__name__} of a function that refers to a copied thing, and "
            f"it would go on with the States of the original. Use the transform of the same name of "
            f"brainstate.transform, or take it away before and make it again for the copy."
        )

    def _function(self, x):
        cells = tuple(CellType() for _ in x.__closure__ or ())
        new = self.made[id(x)] = FunctionType(x.__code__, x.__globals__, x.__name__, None, cells)
        new.__qualname__, new.__doc__, new.__module__ = x.__qualname__, x.__doc__, x.__module__
        new.__annotations__ = x.__annotations__
        for cell, old in zip(cells, x.__closure__ or (), strict=True):
            if _has_contents(old):
                cell.cell_contents = self.make(old.cell_contents)
        new.__defaults__ = x.__defaults__ and tuple(self._all(x.__defaults__))
        new.__kwdefaults__ = x.__kwdefaults__ and self._make_values(x.__kwdefaults__)
        new.__dict__.update(x.__dict__)
        if "__wrapped__" in x.__dict__:
            new.__dict__["__wrapped__"] = self.make(x.__dict__["__wrapped__"])
        return new
