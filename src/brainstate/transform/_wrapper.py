"""The look of a transformed function (its name, docstring, signature and attributes), and the decorator form."""

import functools
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

__all__ = ["or_decorator", "resemble"]


def or_decorator(fun: Callable | None, make: Callable[[Callable], Any]) -> Any:
    """Return ``make(fun)``; where the user gave no function, ``make`` itself, which is the decorator."""
    return make if fun is None else make(fun)


def resemble(wrapper: Any, fun: Any) -> Any:
    """Do as ``functools.update_wrapper``, and return ``wrapper``; attributes that it has itself stay."""
    functools.update_wrapper(wrapper, fun, updated=())
    for name, value in _attributes(fun).items():
        if not hasattr(wrapper, name):
            setattr(wrapper, name, value)
    return wrapper


def _attributes(fun) -> dict[str, Any]:
    """Return the attributes that a user gave a function, also through other transforms of it."""
    held = getattr(fun, "__dict__", {})
    if isinstance(fun, FunctionType | MethodType | functools.partial):
        return held
    # Other attributes of an object are its own: the States of a Module, the programs of a jit.
    return _attributes(held["__wrapped__"]) if "__wrapped__" in held else {}
