"""The boundary to the user's code: errors without the frames of this package, and functions under their own names.

Nothing here is on the path of a call that succeeds. An error that leaves a `boundary` loses our frames, as it loses
JAX's own when it leaves JAX; the JAX option ``jax_traceback_filtering="off"`` keeps both. JAX traces a function
of ours that calls the user's: `named_after` makes JAX write the name, the place and the arguments of the user's.
"""

import functools
import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
from jax.extend.source_info_util import register_exclusion

from ._errors import StateTypeError

__all__ = [
    "LAYERS",
    "OURS",
    "Unbound",
    "boundary",
    "check_function",
    "named_after",
    "positional_parameters",
    "shorten",
    "signature_of",
    "with_leading",
]

_F = TypeVar("_F", bound=Callable)

#: Where the files of this package are, and those of its layers.
OURS = str(Path(__file__).parent) + os.sep
LAYERS = OURS + "nn" + os.sep

# Where JAX names the line of the user that an operation or a trace comes from, it passes over our lines.
register_exclusion(OURS)


def _of_others(trace: TracebackType | None) -> TracebackType | None:
    entries, kept, layer = [], None, False
    while trace is not None:
        entries.append(trace)
        trace = trace.tb_next
    for entry in reversed(entries):
        file = entry.tb_frame.f_code.co_filename
        innermost_layer = file.startswith(LAYERS) and not layer  # the user did not write it, and wants to know which
        if innermost_layer or not file.startswith(OURS):
            kept = TracebackType(kept, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
            layer = layer or innermost_layer
    return kept


# Beginnings of JAX's messages, and the remedies that we add.
_REMEDIES = {
    "Reverse-mode differentiation does not work for lax.while_loop": "brainstate.transform.bounded_while_loop has a "
    "reverse mode: it takes the largest number of iterations, max_steps."
}


def _advise(error: BaseException) -> None:
    text = error.args[0] if error.args else None
    for beginning, remedy in _REMEDIES.items():
        if isinstance(text, str) and text.startswith(beginning) and remedy not in text:
            error.args = (f"{text} {remedy}", *error.args[1:])


def shorten(error: BaseException) -> None:
    """Cut the frames of this package out of the traceback of ``error``, and of the errors it comes from."""
    _advise(error)
    if jax.config.jax_traceback_filtering == "off":  # pyright: ignore[reportAttributeAccessIssue]
        return
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        link.__traceback__ = _of_others(link.__traceback__)
        chain.append(link)
        link = link.__cause__ or link.__context__


def boundary(fun: _F) -> _F:
    """Return ``fun``, whose errors show no frame of this package."""

    @functools.wraps(fun)
    def call(*args, **kwargs):
        try:
            return fun(*args, **kwargs)
        except Exception as error:
            shorten(error)
            raise  # as it stands: this adds no frame

    return call  # pyright: ignore[reportReturnType]


def check_function(what: str, fun: Any) -> None:
    """Refuse anything but a function that can be traced; ``what`` names its use in the message."""
    if isinstance(fun, staticmethod):
        got = "a staticmethod: put @staticmethod above the transform, not below"
    elif not callable(fun):
        got = f"{type(fun).__name__}, which cannot be called"
    elif inspect.isgeneratorfunction(fun):
        name = getattr(fun, "__qualname__", fun)
        got = f"the generator function {name}, whose call runs nothing: return a list or an array in place of yielding"
    else:
        return
    raise StateTypeError(f"{what}; got {got}.")


class Unbound:
    """A transformed method looked up on its class: called with an instance first, it is the method of this instance.

    So ``Base.step(self, x)`` works in a subclass. An instance that is a pytree stays an argument.
    """

    def __init__(self, method: Any, owner: type | None):
        self.method, self._owner = method, owner
        functools.update_wrapper(self, method, updated=())

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the method of the instance that is the first argument; without one, the function as it stands."""
        if self._owner and args and isinstance(args[0], self._owner) and jax.tree_util.all_leaves(args[:1]):
            return self.method.__get__(args[0], type(args[0]))(*args[1:], **kwargs)
        return self.method(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.method, name)

    def __repr__(self):
        return repr(self.method)


def signature_of(fun: Callable) -> inspect.Signature | None:
    """Return the signature of ``fun``, if it has one."""
    try:
        return inspect.signature(fun)
    except (TypeError, ValueError):
        return None


def positional_parameters(signature: inspect.Signature | None) -> tuple[list[str], bool]:
    """Return the names of the parameters that go by position, and whether there may be any number of others."""
    known = list(signature.parameters.values()) if signature else []
    names = [p.name for p in known if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return names, signature is None or any(p.kind is p.VAR_POSITIONAL for p in known)


def with_leading(signature: inspect.Signature, names: Iterable[str]) -> inspect.Signature:
    """Return ``signature`` behind positional parameters that end in ``names``, longer than any name of the user."""
    longest = max(map(len, signature.parameters), default=0)
    mine = [inspect.Parameter(f"{'_' * longest}_{name}", inspect.Parameter.POSITIONAL_ONLY) for name in names]
    return signature.replace(parameters=[*mine, *signature.parameters.values()])


def named_after(inner: Callable, fun: Callable, *, same_arguments: bool = False) -> Any:
    """Return ``inner``, which calls ``fun``, under its name and place; also with its signature if that is the same."""
    named: Any = inner
    signature = signature_of(fun if same_arguments else inner)
    while isinstance(fun, functools.partial):
        fun = fun.func
    fun = inspect.unwrap(fun)
    fun = fun if hasattr(fun, "__code__") else type(fun).__call__  # of a Module, say
    if hasattr(fun, "__code__") and signature is not None:
        named.__name__, named.__qualname__, named.__wrapped__ = fun.__name__, fun.__qualname__, fun
        named.__signature__ = signature
    return named
