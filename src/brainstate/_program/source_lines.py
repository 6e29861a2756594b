"""The line of the user that an equation of a traced program belongs to.

JAX keeps the Python stack with each equation. An equation that is traced in place of another one, while a rule of ours
evaluates a program, gets the line of that other one: `at_line`. The body of a ``jit`` is traced once and then kept, so
its equations do not have the line of the call; the equation of the call does.
"""

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend.source_info_util import current_name_stack, user_context

from .._functions import LAYERS, OURS

__all__ = ["Site", "at_line", "called_at", "frames_of", "is_part", "site_of"]

_JAX = str(Path(jax.__file__).parent) + os.sep
_LOOPS = OURS + os.path.join("transform", "_control", "loops.py")
_PARTS = "_scan_in_parts", "_repeat_step.<locals>.<lambda>"  # they call the scans that a loop is cut into
_LIBRARIES = tuple(os.path.join(_JAX, "_src", part) for part in ("numpy", "nn", "scipy"))


class Site(NamedTuple):
    """A line of the user, and the line of a layer of ours that it led to, if any."""

    file: str
    line: int
    function: str
    layer: str | None


def frames_of(eqn) -> list[tuple[str, int, str]]:
    """Return the stack at which an equation was traced, innermost first: (file, line, function)."""
    traceback = eqn.source_info.traceback
    return [(f.file_name, f.line_num, f.function_name) for f in traceback.frames] if traceback else []


def site_of(frames) -> Site | None:
    """Return the innermost of ``frames`` that belongs neither to this package nor to JAX."""
    layer = None
    for file, line, function in frames:
        if file.startswith(LAYERS):
            layer = layer or f"{file}:{line}, in {function}"
        elif not file.startswith((OURS, _JAX)):
            return Site(file, line, function, layer)
    return None


def called_at(frames) -> str | None:
    """Return the name of the public function of JAX that the user's line calls, if the frames show it."""
    name = None
    for file, _, function in frames:
        if not file.startswith((OURS, _JAX)):
            break
        short = function.rpartition(".")[2]
        if file.startswith(_LIBRARIES) and not short.startswith("_") and "<" not in function:
            name = short
    return name


def is_part(eqn) -> bool:
    """Tell whether an equation is one of the scans that a checkpointed or bounded loop is cut into, by its frames."""
    ours = (function for file, _, function in frames_of(eqn) if file == _LOOPS)
    return eqn.primitive.name == "scan" and next(ours, "").endswith(_PARTS)


def at_line(eqn) -> Any:
    """Return a context in which new equations get the line of ``eqn``; if that has none, the line of the trace."""
    if site_of(frames_of(eqn)) is None:
        return contextlib.nullcontext()
    source = eqn.source_info
    return user_context(source.traceback, name_stack=current_name_stack() + source.name_stack)
