"""``tap``: look at a cotangent on its way back, without changing the program when nobody looks.

``tap(name, x)`` is ``x`` itself while nobody listens, so the traced program is the same to the last operation. While
somebody does (`taps`) it is an identity whose tangent goes through a linear primitive, ``tap``; the transpose of that
hands the cotangent to a second one, ``tap_record``, which computes a few statistics and passes them to Python. Both
are identities for all other purposes: forward mode, second derivatives, loops, branches, rematerialisation.

Whether somebody listens is decided when a function is traced. It is a *user context* of JAX and so a part of the key
of every compiled program: one from before is not used while somebody listens, and is used again, not compiled
again, afterwards. The value of the context are the *slots* of the listeners of this thread, small numbers that are
free again when a listener has left; so a second one finds the programs compiled for the first, and no program keeps a
listener alive. A record goes to all that listen in its slots when it arrives. (Making the context, when this module is
imported, changes the key once: programs that ``jax.jit`` has compiled before the import are compiled once more.)

Under ``vmap`` the record keeps its lanes apart, and there is one call to Python for all of them.
"""

import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from .._arrays import differentiable
from .._errors import StateTypeError, StateValueError, a_type

__all__ = ["Record", "listeners", "tap", "taps"]


@dataclass(frozen=True)
class Record:
    """One recorded cotangent: norm, extremes and mean of its entries, fraction of zeros, how many are not finite.

    Of complex entries, ``min`` and ``max`` are those of the absolute values.
    """

    norm: float
    min: float
    max: float
    mean_abs: float
    zeros: float
    nonfinite: int


_slots = jax.make_user_context(())
_listeners: dict[int, "taps"] = {}  # slot -> who listens
_slots_lock = threading.Lock()


def listeners() -> int:
    """Return how many listen in this thread."""
    return len(_slots.value)


# ------------------------------------------------------------------------------------------ records


def _statistics(ct, lanes):
    """Return the fields of a `Record` along the last axis, for each of the leading ``lanes``."""
    ct = ct.astype(jnp.float32) if jnp.finfo(ct.dtype).bits < 32 else ct
    inner = tuple(range(lanes, ct.ndim))
    size = jnp.abs(ct)
    signed = size if jnp.iscomplexobj(ct) else ct
    if not ct.size:
        return jnp.zeros((*ct.shape[:lanes], 6), size.dtype)
    # Squares of large entries are not finite and of small ones zero, so the entries are scaled first.
    largest = jnp.max(size, axis=inner, keepdims=True)
    usable = jnp.isfinite(largest) & (largest > 0)
    scale = jnp.where(usable, largest, 1.0)
    length = scale * jnp.sqrt(jnp.sum(jnp.square(size / scale), axis=inner, keepdims=True))
    found = [
        jnp.where(usable, length, largest),
        *(f(signed, axis=inner, keepdims=True) for f in (jnp.min, jnp.max)),
        jnp.mean(size, axis=inner, keepdims=True),
        jnp.mean(size == 0, axis=inner, keepdims=True, dtype=size.dtype),
        jnp.sum(~jnp.isfinite(size), axis=inner, keepdims=True, dtype=size.dtype),
    ]
    return jnp.stack([jnp.reshape(x, ct.shape[:lanes]) for x in found], axis=-1)


def _arrive(statistics, name, slots) -> None:
    rows = np.asarray(statistics, np.float64).reshape(-1, 6).tolist()
    records = [Record(*numbers, nonfinite=int(count)) for *numbers, count in rows]
    for listener in map(_listeners.get, slots):
        if listener is not None:
            listener._records.setdefault(name, []).extend(records)


# ------------------------------------------------------------------------------------------ the two identities

_record = Primitive("tap_record")
_effects = jax.make_jaxpr(lambda: jax.debug.callback(lambda: None))().effects


def _record_by_callback(ct, *, name, slots, lanes):
    jax.debug.callback(lambda statistics: _arrive(statistics, name, slots), _statistics(ct, lanes))
    return ct


def _record_now(ct, *, name, slots, lanes):
    _arrive(_statistics(ct, lanes), name, slots)
    return ct


def _record_lanes(args, axes, *, name, slots, lanes):
    ct = jnp.moveaxis(args[0], axes[0], 0)
    return _record.bind(ct, name=name, slots=slots, lanes=lanes + 1), 0


_record.def_impl(_record_now)
_record.def_effectful_abstract_eval(lambda ct, **_: (ct, _effects))
ad.primitive_jvps[_record] = lambda primals, tangents, **place: (_record.bind(*primals, **place), *tangents)
batching.primitive_batchers[_record] = _record_lanes
mlir.register_lowering(_record, mlir.lower_fun(_record_by_callback, multiple_results=False))

_tap = Primitive("tap")
_tap.def_impl(lambda t, **_: t)
_tap.def_abstract_eval(lambda t, **_: t)
ad.deflinear2(_tap, lambda ct, _, *, name, slots: [_record.bind(ct, name=name, slots=slots, lanes=0)])
# The derivative of a tangent is not tapped, see `_tap_jvp`.
ad.primitive_jvps[_tap] = lambda primals, tangents, **place: (_tap.bind(*primals, **place), *tangents)
batching.defvectorized(_tap)
mlir.register_lowering(_tap, lambda _, t, **__: [t])


# Every reverse pass back through the value is heard, so for a derivative of this derivative the value is tapped again.
# A cotangent of a tangent (reverse over forward mode) is not one of the value, and is not heard.
_listened = jax.custom_jvp(lambda x, name, slots: x, nondiff_argnums=(1, 2))


@_listened.defjvp
def _tap_jvp(name, slots, primals, tangents):
    return _listened(primals[0], name, slots), _tap.bind(tangents[0], name=name, slots=slots)


# ------------------------------------------------------------------------------------------ for users


def tap(name: str, x: Any) -> Any:
    """Return ``x``; while somebody listens, record the cotangents that come back to this point.

    Parameters
    ----------
    name : str
        The key of the records, see `taps`. Places of the same name share their records.
    x : pytree
        Any value. Each floating or complex array is recorded, under its path behind ``name`` if ``x`` is a container.

    Returns
    -------
    pytree
        ``x`` itself, so that a program with a tap that nobody listens to is the program without it.

    Raises
    ------
    StateTypeError
        If ``name`` is not a string.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> from brainstate.transform import grad, tap, taps
    >>> with taps() as seen:
    ...     slope = grad(lambda x: jnp.sum(tap("h", x**2) * jnp.array([3.0, -4.0])))(jnp.ones(2))
    >>> slope.tolist(), seen["h"][0].norm, seen["h"][0].min
    ([6.0, -8.0], 5.0, -4.0)
    """
    if not isinstance(name, str):
        raise StateTypeError(f"tap takes a name and a value, as in tap('h', x); the name is {a_type(name)}.")
    slots = _slots.value
    if not slots:
        return x

    def tap_leaf(path, leaf):
        if not isinstance(leaf, jax.Array | np.ndarray) or not differentiable(leaf):
            return leaf
        return _listened(leaf, name + jax.tree_util.keystr(path), slots)

    return jax.tree_util.tree_map_with_path(tap_leaf, x)


class taps(Mapping):
    """Listen to the `tap` calls of this thread: a context manager, and the mapping of their records.

    ``{name: tuple of records}``, in the order in which the cotangents came. A record has ``norm``, ``min``, ``max`` and
    ``mean_abs`` of the entries, the fraction of ``zeros`` and the number of ``nonfinite`` entries. A name is there if a
    cotangent came: where the result does not depend on the value, none does. Printed, it is a table.

    Notes
    -----
    There is a record for each reverse pass through a point: in a loop one for each iteration, the last one first;
    under ``vmap`` one for each lane, or one for all where they share it; with ``checkpoint`` one. A derivative of a
    derivative has as many passes as it has reverse modes: `hessian` is forward over reverse, and has one.

    Listeners nest, and each hears the functions that are traced while it listens. A compiled function, of `jit` or of
    ``jax.jit``, has a program of its own for that, and uses the one from before afterwards. A pullback that was made
    before anybody listened stays silent.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> from brainstate.transform import grad, jit, scan, tap, taps
    >>> def rollout(x):
    ...     return scan(lambda h, _: (tap("h", jnp.tanh(0.5 * h)), None), x, None, length=3)[0]
    >>> with taps() as seen:
    ...     slope = jit(grad(rollout))(0.1)
    >>> [round(record.norm, 2) for record in seen["h"]]
    [1.0, 0.5, 0.25]
    >>> seen
    tap  records  first norm  last norm  min   max  zeros  nonfinite
    h    3        1           0.25       0.25  1    0%     0
    """

    def __init__(self):
        self._records: dict[str, list[Record]] = {}
        self._leave: ExitStack | None = None
        self._slot: int | None = None

    def __enter__(self) -> "taps":
        if self._leave is not None:
            raise StateValueError("these taps are open already: make new ones with taps() to listen twice.")
        with _slots_lock, ExitStack() as stack:
            slot = self._slot = next(n for n in itertools.count() if n not in _listeners)
            _listeners[slot] = self
            stack.callback(_listeners.pop, slot)
            stack.callback(jax.effects_barrier)  # running programs report before the slot is free
            stack.enter_context(_slots((*_slots.value, slot)))
            self._leave = stack.pop_all()
        return self

    def __exit__(self, *exc) -> None:
        if _slots.value[-1:] != (self._slot,):
            raise StateValueError("these taps are left before others that were opened later: leave those first.")
        leave, self._leave = self._leave, None
        assert leave is not None
        leave.close()

    def _all_records(self) -> dict[str, list[Record]]:
        if self._leave is not None:
            jax.effects_barrier()
        return self._records

    def __getitem__(self, name: str) -> tuple[Record, ...]:
        records = self._all_records()
        if name not in records:
            raise KeyError(f"no cotangent came to a tap named {name!r}; there are {sorted(records)}")
        return tuple(records[name])

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._all_records()))

    def __len__(self) -> int:
        return len(self._all_records())

    def __repr__(self) -> str:
        table = [["tap", "records", "first norm", "last norm", "min", "max", "zeros", "nonfinite"]]
        for name, records in self.items():
            _, low, high, _, zeros, nonfinite = np.array(list(map(astuple, records))).T
            ends = [records[0].norm, records[-1].norm, low.min(), high.max()]
            numbers = [f"{x:.3g}" for x in ends]
            table.append([name, str(len(records)), *numbers, f"{zeros.mean():.0%}", f"{nonfinite.sum():.0f}"])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)
