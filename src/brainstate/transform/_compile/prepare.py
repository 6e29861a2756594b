"""``prepare``: compile any transform ahead of time, for one kind of call. The result is a `Prepared` (`ahead`)."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import valid_jaxtype
from jax.tree_util import keystr

from ..._compat import jit_disabled
from ..._errors import StateTypeError, StateValueError, TraceContextError, a_type
from ..._functions import boundary
from ..._seam.step import is_outside
from ..._seam.tokens import without_token
from .ahead import Prepared
from .jit import Jit, compiled_form
from .signature import argument_names

__all__ = ["prepare"]


@boundary
def prepare(transform: Callable, /, *args: Any, donate_states: bool = False, **kwargs: Any) -> Prepared:
    """Compile a function or transform ahead of time, for arguments like these.

    Parameters
    ----------
    transform : callable
        A function that reads and writes States, a derivative, a ``vmap``, …, or the result of `jit`, which keeps its
        options, such as static arguments.
    *args, **kwargs
        Example arguments: arrays, numbers, or ``jax.ShapeDtypeStruct`` where only the type is known. Static arguments
        of a `jit` are given as they are, here and in each call.
    donate_states : bool
        As for `jit`, where ``transform`` is not one yet.

    Returns
    -------
    Prepared
        To be called like ``transform``, with arguments of these types: it reads the present values of the States and
        commits the writes. It has ``cost()``, ``memory()`` and ``as_text(stage)``. Preparing changes no State and
        runs the function once; calls never run it.

    Raises
    ------
    StateTypeError
        If an argument has no type of JAX; and by a call whose arguments or States do not match the prepared ones, with
        a table of both.
    StateValueError
        If the function creates States that outlive it; and by a call after a State or Module was replaced on a Module
        and the function would mean another program. To find out, it is traced once more after such a replacement.
    TraceContextError
        If a transform is in progress; and by a call with a traced value.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, brainstate
    >>> weight = brainstate.ParamState(jnp.ones(3), name="weight")
    >>> def step(x):
    ...     weight.value -= 0.5 * brainstate.transform.grad(lambda: (weight.value @ x) ** 2, weight)()
    >>> prepared = brainstate.transform.prepare(step, jax.ShapeDtypeStruct((3,), "float32"))
    >>> prepared
    prepared step(x: float32[3]), States: 1 read, 1 written
    >>> prepared.memory().arguments
    24
    >>> prepared(jnp.array([1.0, 0.0, 0.0]))
    >>> weight.value.tolist()
    [0.0, 1.0, 1.0]
    >>> prepared(jnp.ones(4))
    Traceback (most recent call last):
    ...
    brainstate._errors.StateTypeError: step was prepared for another call (prepared → given):
      ❌ argument x           float32[3] → float32[4]
      ✅ ParamState 'weight'  float32[3]
    Call it as prepared, or prepare again for this call.
    """
    if not is_outside():
        raise TraceContextError("prepare compiles for calls outside of transforms: call it outside as well.")
    if jit_disabled():
        raise TraceContextError("prepare compiles, which jax.disable_jit forbids: call it outside of that.")
    if not callable(transform):
        raise StateTypeError(f"prepare compiles a function; got {type(transform).__name__}, which cannot be called.")
    jitted = compiled_form(transform)
    if jitted is None:
        jitted = Jit(transform, {}, donate_states)
    elif donate_states and not jitted.donates:
        raise StateValueError(
            "prepare: donate_states is an option of the jit that is prepared: jit(fun, donate_states=True)."
        )
    jitted = jitted.fresh_copy()  # calls of the jit itself do not change the prepared program
    _check_arguments(jitted, args, kwargs)
    source = jitted.trace(*args, **kwargs)._source
    with without_token():
        compiled = source.traced.lower().compile()
    return Prepared(source, compiled, transform)


def _check_arguments(jitted, args, kwargs):
    """Refuse example arguments that cannot be compiled for, by name."""
    static, names = jitted.statics(len(args)), argument_names(jitted, len(args))
    named = {names[i]: arg for i, arg in enumerate(args) if i not in static}
    named |= {name: arg for name, arg in kwargs.items() if name not in static}
    jitted.check_arguments((), named)
    for name, arg in named.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(arg):
            if not (valid_jaxtype(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)):
                raise StateTypeError(
                    f"prepare: argument {name}{keystr(path)} is {a_type(leaf)}. Give an array, a number or a "
                    f"jax.ShapeDtypeStruct, or make it static: prepare(jit(f, static_argnames={name!r}), ...)."
                )
