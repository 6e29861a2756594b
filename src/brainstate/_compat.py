"""Names of JAX that differ from version to version, or lie beside its documented interface.

Features are found by presence, never by version number. Everything here is public JAX.
"""

import functools
import importlib
import inspect
from typing import Any

import jax
from jax.extend.core import (
    find_top_trace,
    unsafe_am_i_under_a_jit_DO_NOT_USE,  # pyright: ignore[reportPrivateImportUsage]
)

__all__ = [
    "AT_ONCE",
    "UNSPECIFIED",
    "current_trace",
    "is_recording",
    "jit_disabled",
    "nans_checked",
    "optional",
    "scan_counts",
    "stages_within",
    "varying_axes",
]

#: The default of ``in_shardings``: "decide from the arguments". Not exported by JAX, but it is a default of
#: a public signature.
UNSPECIFIED = inspect.signature(jax.jit).parameters["in_shardings"].default


#: ``current_trace()`` is the trace that takes the next operation, to be made current again with ``set_current_trace``.
#: A `partial` of a C++ function rather than a Python function: every State access calls it.
current_trace = functools.partial(find_top_trace, ())


with jax.ensure_compile_time_eval():
    AT_ONCE = current_trace()  # the trace that computes at once; one object for all threads


def is_recording() -> bool:
    """Tell whether a program is being recorded (by a jit, a scan, ...)."""
    return unsafe_am_i_under_a_jit_DO_NOT_USE()


def stages_within(outer) -> bool | None:
    """Tell whether a program is being recorded inside the trace ``outer``; None if ``outer`` is not in progress.

    A recording trace does not always know the trace around it, so inside a recording ``outer`` the answer is not None.
    """
    trace, staged = current_trace(), False
    while trace is not outer:
        if trace is None:
            return staged if type(outer) is _recording_type() else None
        staged = staged or type(trace) is _recording_type()
        trace = getattr(trace, "parent_trace", None)
    return staged


@functools.cache
def _recording_type() -> type:
    kinds = []
    jax.make_jaxpr(lambda: kinds.append(type(current_trace())))()
    return kinds[0]


def jit_disabled() -> bool:
    """Tell whether ``jax.disable_jit`` is on."""
    return bool(jax.config.jax_disable_jit)  # pyright: ignore[reportAttributeAccessIssue]


def nans_checked() -> bool:
    """Tell whether ``jax.debug_nans`` or ``jax.debug_infs`` is on."""
    config: Any = jax.config
    return bool(config.jax_debug_nans or config.jax_debug_infs)


def varying_axes(value) -> tuple:
    """Return the axes of a device mesh along which ``value``, or an array of this type, may differ in ``shard_map``."""
    aval = value if hasattr(value, "manual_axis_type") else jax.typeof(value)
    return tuple(aval.manual_axis_type.varying)


def optional(module: str, user: str, extra: str) -> Any:
    """Return an optional library, or say who needs it and how it is installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ModuleNotFoundError(
            f"{user} needs {package}, and there is no module {error.name!r}: pip install {package}, or install this "
            f"package with its extra, brainstate[{extra}].",
            name=error.name,
        ) from None


def scan_counts(params, operands: int) -> tuple[int, int]:
    """Return the numbers of constants and of carries among the operands of a ``scan`` equation."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].update(range(operands)).unpack()
    return len([*constants]), len([*carry])
