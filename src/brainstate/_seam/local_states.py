"""Where code runs: in the trace that a State was made under, and on which line of the user."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from .._compat import current_trace

__all__ = ["frames_in", "is_local", "local_trace", "users_frame"]

_NOT_USERS = (
    str(Path(__file__).parents[1]) + os.sep,
    str(Path(jax.__file__).parent) + os.sep,
)  # frames that a warning skips


def is_local(state: Any) -> bool:
    """Tell whether ``state`` was made under the raw transform of JAX that is in progress, the innermost one."""
    return hasattr(state, "_local") and state._local[0]() is current_trace()


def local_trace(state: Any, outer: Any = None) -> Any:
    """Return the trace that ``state`` was made under, if it is in progress inside of the trace ``outer``; else None."""
    made = state._local[0]() if hasattr(state, "_local") else None
    trace: Any = current_trace() if made is not None else None
    while trace is not None and trace is not outer:
        if trace is made:
            return trace
        trace = getattr(trace, "parent_trace", None)
    return None


def frames_in(file: str, frame: Any = None) -> Iterator[Any]:
    """Yield the frames of code in a file whose path ends in ``file``, from ``frame`` or the caller outwards."""
    frame = frame or sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.endswith(file):
            yield frame
        frame = frame.f_back


def users_frame() -> tuple[Any, int]:
    """Return the innermost frame of the user, and the ``stacklevel`` that shows it in a warning of the caller."""
    level, frame = 0, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_USERS):
        level, frame = level + 1, frame.f_back
    return frame, level
