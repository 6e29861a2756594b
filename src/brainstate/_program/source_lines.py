"""Which line of the user an equation of a traced program belongs to.

JAX keeps the Python stack with each equation. What is traced while a program is run by a rule of ours belongs to the
equation that it stands for: `at_line`. The body of a ``jit`` is traced once and then kept, without the lines that call
it; those are with the equation that calls it.
"""

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend.source_info_util import current_name_stack, user_context

__all__ = ["Site", "at_line", "called_at", "frames_of", "is_part", "site_of"]

_OURS, _JAX = str(Path(__file__).parents[1]) + os.sep, str(Path(jax.__file__).parent) + os.sep
_LOOPS = str(Path(__file__).parents[1] / "transform/_control/loops.py")
_PARTS = "checkpointed_scan.<locals>.part", "_repeated.<locals>.<lambda>"  # what calls the scans of a loop that is cut
_LAYERS = _OURS + "nn" + os.sep
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
    """Return the innermost of ``frames`` that is neither ours nor JAX's."""
    layer = None
    for file, line, function in frames:
        if file.startswith(_LAYERS):
            layer = layer or f"{file}:{line}, in {function}"
        elif not file.startswith((_OURS, _JAX)):
            return Site(file, line, function, layer)
    return None


def called_at(frames) -> str | None:
    """Return the name of the public function of a library that the user's line calls, if the frames show it."""
    name = None
    for file, _, function in frames:
        if not file.startswith((_OURS, _JAX)):
            break
        short = function.rpartition(".")[2]
        if file.startswith(_LIBRARIES) and not short.startswith("_") and "<" not in function:
            name = short
    return name


def is_part(eqn) -> bool:
    """Tell whether an equation is a part of a loop that is cut into parts, as the frames of it show."""
    ours = (function for file, _, function in frames_of(eqn) if file == _LOOPS)
    return eqn.primitive.name == "scan" and next(ours, "").endswith(_PARTS)


def at_line(eqn) -> Any:
    """Return a context in which what is traced belongs to the line of ``eqn``, or if it has none to that around it."""
    if site_of(frames_of(eqn)) is None:
        return contextlib.nullcontext()
    source = eqn.source_info
    return user_context(source.traceback, name_stack=current_name_stack() + source.name_stack)
