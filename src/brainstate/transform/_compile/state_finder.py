"""``StateFinder``: which States does a function use? The function is staged, nothing is computed or written."""

from collections.abc import Callable
from typing import Any

from jax.extend.core import valid_jaxtype

from ..._errors import StateTypeError, StateValueError
from ..._functions import boundary
from ..._seam.scope import refuse_states
from ..._seam.staging import stage
from ...filters import to_predicate

__all__ = ["StateFinder"]

_USAGES = ("all", "read", "write", "both")
_CONTAINERS = {"dict": dict, "list": list, "tuple": tuple}


class StateFinder:
    """Find the States that a function reads or writes, in the order of first use.

    Parameters
    ----------
    fn : callable
        The function. It runs once per call of the finder, abstractly: no State changes.
    filter : filter, optional
        Which States to keep; anything that `brainstate.util.filter.to_predicate` accepts.
    usage : {'all', 'read', 'write', 'both'}
        States that are used at all; read and never written; written; or the last two as a dict with the keys
        ``'read'`` and ``'write'``.
    return_type : {'dict', 'list', 'tuple'}
        The container of the States. The live States are returned, fit for ``grad_states``.
    key_fn : callable, optional
        ``key_fn(position, state)`` gives the keys of the dict; without it they are the positions. A key that is
        None or taken is replaced by the State's name, else by ``'state_<position>'``, made unique by a suffix; an
        unhashable one by its text. If kinds of keys would mix, all become text, so that they can be sorted.

    Raises
    ------
    StateTypeError
        If ``fn`` cannot be called, or the filter is none.
    StateValueError
        For an unknown ``usage`` or ``return_type``.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> scale, cache = brainstate.ParamState(jnp.array(2.0)), brainstate.State(jnp.array(0.0))
    >>> def energy(x):
    ...     cache.value = x * scale.value
    ...     return cache.value
    >>> brainstate.transform.StateFinder(energy, usage="both", return_type="list")(1.0)
    {'read': [ParamState(float32[])], 'write': [State(float32[])]}
    """

    def __init__(
        self,
        fn: Callable,
        filter: Any = None,
        *,
        usage: str = "all",
        return_type: str = "dict",
        key_fn: Callable[[int, Any], Any] | None = None,
    ):
        if not callable(fn):
            raise StateTypeError(f"StateFinder looks into a function; got {type(fn).__name__}, which cannot be called.")
        if usage not in _USAGES:
            raise StateValueError(f"usage={usage!r}: choose one of {', '.join(map(repr, _USAGES))}.")
        if return_type not in _CONTAINERS:
            raise StateValueError(f"return_type={return_type!r}: choose one of {', '.join(map(repr, _CONTAINERS))}.")
        self.fn, self.usage, self.return_type, self.key_fn = fn, usage, return_type, key_fn
        self._keep = to_predicate(... if filter is None else filter)

    @boundary
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the States that ``fn(*args, **kwargs)`` uses; arrays and numbers are traced, all else is passed on."""
        refuse_states((args, kwargs), "arguments of StateFinder")
        staged = stage(self.fn, args, kwargs, name="StateFinder", dynamic=valid_jaxtype)
        born = set(staged.born)
        used = [s for s in staged.used if s not in born and self._keep((), s)]
        written = set(staged.writes)
        if self.usage == "both":
            return {
                "read": self._pack([s for s in used if s not in written]),
                "write": self._pack([s for s in used if s in written]),
            }
        wanted = {"all": lambda s: True, "read": lambda s: s not in written, "write": lambda s: s in written}
        return self._pack([s for s in used if wanted[self.usage](s)])

    find = __call__

    def _pack(self, states):
        if self.return_type != "dict":
            return _CONTAINERS[self.return_type](states)
        keys = []
        for position, state in enumerate(states):
            key = position if self.key_fn is None else self.key_fn(position, state)
            try:
                hash(key)
            except TypeError:
                key = str(key)
            keys.append(_unique(key, keys, state.name or f"state_{position}"))
        if len({type(key) for key in keys}) > 1:
            keys = [str(key) for key in keys]
        return dict(zip(keys, states, strict=True))


def _unique(key, taken, name):
    if key is not None and key not in taken:
        return key
    key, suffix = name, 0
    while key in taken:
        suffix += 1
        key = f"{name}_{suffix}"
    return key
