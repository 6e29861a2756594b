"""What this package needs of JAX and what JAX spells differently, or does not spell, from version to version.

Features are found by presence, never by version number. Everything here is public JAX.
"""

import functools
import inspect
from typing import Any

import jax
from jax.extend.core import (
    find_top_trace,
    unsafe_am_i_under_a_jit_DO_NOT_USE,  # pyright: ignore[reportPrivateImportUsage]
)

__all__ = [
    "UNSPECIFIED",
    "current_trace",
    "jit_disabled",
    "nans_checked",
    "scan_inputs",
    "stages_within",
    "staging",
    "varying_axes",
]

#: The default of ``in_shardings``: "decide from the arguments". Not exported by JAX, but it is a default of
#: a public signature.
UNSPECIFIED = inspect.signature(jax.jit).parameters["in_shardings"].default


#: ``current_trace()`` is the trace that takes the next operation, to be made current again with ``set_current_trace``.
#: Every read and write of a State asks it, so it is no function of Python's.
current_trace = functools.partial(find_top_trace, ())


def staging() -> bool:
    """Tell whether what runs now is being recorded into a program (by a jit, a scan, ...)."""
    return unsafe_am_i_under_a_jit_DO_NOT_USE()


def stages_within(outer) -> bool:
    """Tell whether what runs now is being recorded into a program inside the trace ``outer``."""
    trace = current_trace()
    while trace is not None and trace is not outer:
        if type(trace) is _recording():
            return True
        trace = getattr(trace, "parent_trace", None)
    return False


@functools.cache
def _recording() -> type:
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
    """Return the axes of a device mesh along which ``value``, or what has this type, may differ in ``shard_map``."""
    aval = value if hasattr(value, "manual_axis_type") else jax.typeof(value)
    return tuple(aval.manual_axis_type.varying)


def scan_inputs(params, inputs) -> tuple[list, list, list]:
    """Cut the inputs of a ``scan`` equation into constants, first carry, and what it loops over."""
    if "num_consts" in params:
        constants, first = params["num_consts"], params["num_consts"] + params["num_carry"]
        return inputs[:constants], inputs[constants:first], inputs[first:]
    consts, carry, xs = params["ft_in"].update(range(len(inputs))).unpack()
    return [inputs[i] for i in consts], [inputs[i] for i in carry], [inputs[i] for i in xs]
