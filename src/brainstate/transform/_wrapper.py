"""The look of a transformed function: name, docstring, signature and attributes are those of the user's."""

import functools
from types import FunctionType, MethodType
from typing import Any

__all__ = ["resemble"]


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
