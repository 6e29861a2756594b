"""A function with States as a pure function of the differentiated values, packed into one pytree.

`PureFunction.open` reads the States and packs the differentiated values as ``G``, the structure of the table in
`GradientTransform`; JAX traces `PureFunction.pure`. Of a State only the inexact leaves are differentiated: for another
leaf (an integer, a key) the packed tree, and so the gradient, holds ``None``.
"""

import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend.core import valid_jaxtype

from ..._arrays import differentiable, layout, owns_states
from ..._errors import StateTypeError, StateValueError, a_type
from ..._functions import check_function
from ..._seam.packing import Carried
from ..._seam.scope import Scope, frozen_here, gather, read, refuse_states, run
from .._select_states import Selection, is_live, select_states

__all__ = [
    "DerivativeCall",
    "PureFunction",
    "check_argnums",
    "from_front",
    "function_name",
    "names_of",
    "pick",
    "place",
    "positions",
]


def _index(number) -> int:
    """Return ``number`` as an int; refuse a bool, which most likely is an option in the wrong place."""
    if isinstance(number, bool):
        raise TypeError
    return operator.index(number)


def check_argnums(argnums):
    """Return ``argnums`` as None, an int or a tuple of distinct ints; raise an error that names it otherwise."""
    if argnums is None:
        return None
    many = isinstance(argnums, Sequence) or (isinstance(argnums, np.ndarray) and argnums.ndim == 1)
    try:
        numbers = tuple(map(_index, argnums if many else (argnums,)))
    except TypeError:
        raise StateValueError(
            f"argnums={argnums!r}: positions are Python ints or NumPy's, one or a list or tuple of them."
        ) from None
    if len(set(numbers)) != len(numbers):
        raise StateValueError(f"argnums={argnums!r} names an argument twice: name each position once.")
    return numbers if many else numbers[0]


def from_front(argnums, count):
    """Return ``argnums`` for a call with ``count`` positional arguments, with negative positions made positive."""
    if argnums is None:
        return None
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    for n in numbers:
        if not -count <= n < count:
            raise StateTypeError(
                f"argnums={argnums!r} selects argument {n}, but the call has {count} positional "
                f"argument{'' if count == 1 else 's'}. Pass differentiated arguments by position, not by keyword; "
                f"States go into grad_states."
            )
    found = tuple(n % count for n in numbers)
    if len(set(found)) != len(found):
        raise StateValueError(f"argnums={argnums!r} names an argument twice: name each position once.")
    return found if isinstance(argnums, tuple) else found[0]


def pick(args, argnums):
    """Return the arguments at ``argnums``, in that structure, and the list of all arguments with None for these."""
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    picked, rest = tuple(args[n] for n in numbers), list(args)
    for n in numbers:
        rest[n] = None
    return (picked if isinstance(argnums, tuple) else picked[0]), rest


def place(rest, argnums, picked) -> tuple:
    """Undo `pick`."""
    args = list(rest)
    if isinstance(argnums, tuple):
        for n, value in zip(argnums, picked, strict=True):
            args[n] = value
    elif argnums is not None:
        args[argnums] = picked
    return tuple(args)


def positions(name: str, grad_states: Any, argnums: Any) -> Any:
    """Return the positions of the differentiated arguments, by the rules of the table in `GradientTransform`."""
    numbers = check_argnums(argnums)
    if grad_states is None and numbers == ():
        raise StateValueError(f"{name}: argnums=() and no grad_states: there is nothing to differentiate.")
    return 0 if grad_states is None and numbers is None else numbers


@jax.tree_util.register_static
@dataclass(frozen=True)
class DerivativeCall:
    """The States and positions that one call differentiates; static, so that a custom transform may jit `pure`."""

    selection: Selection | None
    argnums: Hashable
    mixed: tuple[int, ...]  # positions of the States with leaves that are not differentiated
    frozen: bool


def _leaf_names(prefix, tree) -> list[str]:
    return [f"{prefix}{jax.tree_util.keystr(path)}" for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def names_of(call, diff: Any) -> tuple[list[str], list]:
    """Return the name of each leaf of ``diff``, and the State that it belongs to, or None."""
    names, owners, numbers = [], [], call.argnums
    if call.selection is not None:
        diff, picked = diff if numbers is not None else (diff, ())
        for state, value in zip(call.selection.states, call.selection.treedef.flatten_up_to(diff), strict=True):
            names += _leaf_names(call.selection.locate(state), value)
            owners += [state] * (len(names) - len(owners))
        diff = picked
    if isinstance(numbers, int):
        numbers, diff = (numbers,), (diff,)
    for n, value in zip(numbers or (), diff, strict=True):
        names += _leaf_names(f"argument {n}", value)
    return names, owners + [None] * (len(names) - len(owners))


def function_name(fun) -> str:
    """Name a function, or the kind of a callable object."""
    return getattr(fun, "__qualname__", type(fun).__name__)


class PureFunction:
    """A function with States as a pure function of the differentiated values.

    ``open(args)`` gives ``(diff, call, rest)`` and ``pure(diff, call, *rest, **kwargs)`` returns
    ``(value, Carried((value or None, aux, Writes)))``. With ``allow_int`` integers have derivatives, of dtype float0,
    in States and arguments; with ``allow_int="arguments"`` in arguments only.
    """

    def __init__(
        self,
        fun,
        name,
        grad_states,
        argnums,
        *,
        has_aux=False,
        keep_value=False,
        check_states=True,
        allow_int: bool | str = False,
    ):
        check_function(f"{name} differentiates a function", fun)
        self.fun, self.name, self.argnums = fun, name, argnums
        self.has_aux, self.keep_value = has_aux, keep_value
        self.check_states, self.allow_int = check_states, allow_int
        self.grad_states = grad_states
        self._selection = None if grad_states is None or is_live(grad_states) else select_states(grad_states)

    def open(self, args, kwargs):
        """Read the differentiated values and pack them as ``diff``."""
        refuse_states((args, kwargs), f"arguments of {self.name}")
        selection = self._selection
        if selection is None and self.grad_states is not None:
            selection = select_states(self.grad_states)  # the States that a Module has now
        numbers = from_front(self.argnums, len(args))
        picked, rest = (None, args) if numbers is None else pick(args, numbers)
        if numbers is not None:
            self._check_argument(picked, numbers)
        if selection is None:
            return picked, DerivativeCall(None, numbers, (), frozen_here()), rest
        values = gather(selection.states)
        mixed = () if self.allow_int is True else self._strip(selection, values)
        diff = selection.treedef.unflatten(values)
        # `frozen_here` is asked now: inside `pure`, JAX traces in any case, for the derivative.
        return (
            diff if numbers is None else (diff, picked),
            DerivativeCall(selection, numbers, mixed, frozen_here()),
            rest,
        )

    def inputs(self, args, kwargs) -> tuple[list[str], Any]:
        """Return the names of the differentiated arrays of a call, and the structure ``G``."""
        diff, call, _ = self.open(args, kwargs)
        return names_of(call, diff)[0], jax.tree.structure(diff)

    def __repr__(self) -> str:
        return f"{self.name}({function_name(self.fun)})"

    def pure(self, diff, call, /, *rest, **kwargs):
        """Run the function with the values in ``diff``; JAX traces this method."""
        picked, values = diff, {}
        if call.selection is not None:
            diff, picked = diff if call.argnums is not None else (diff, None)
            values = dict(zip(call.selection.states, call.selection.treedef.flatten_up_to(diff), strict=True))
            for i in call.mixed:
                state = call.selection.states[i]
                # Leaves without a derivative are in neither `diff` nor the static `call`: they are read here.
                with Scope(self.name, frozen=call.frozen):
                    values[state] = _fill(read(state), values[state])
        args = place(rest, call.argnums, picked)
        scope = Scope(self.name, values, frozen=call.frozen)
        out, writes = run(scope, self.fun, *args, **kwargs)
        if self.check_states and (scope.unused or scope.overwritten):
            raise self._unused_error(call.selection, scope.unused, scope.overwritten)
        # JAX differentiates the first output. It returns no value beside the derivative, so that travels as aux.
        value, aux = self._parts(out)
        if not jax.tree.leaves(value):
            raise StateTypeError(
                f"{self.name} differentiates the result of the function, and it returned {value!r}: return an array "
                f"or a number."
            )
        return value, Carried.pack((value if self.keep_value else None, aux, writes))

    def _parts(self, out):
        if not self.has_aux:
            return out, None
        if not isinstance(out, tuple | list) or len(out) != 2:
            got = "an array" if valid_jaxtype(out) else a_type(out)
            got += f" of {len(out)}" if isinstance(out, tuple | list) else ""
            raise StateTypeError(f"with has_aux=True the function returns a pair (value, aux); it returned {got}.")
        return out

    def _check_argument(self, picked, numbers):
        for path, leaf in jax.tree_util.tree_leaves_with_path(picked):
            usable = valid_jaxtype(leaf) if self.allow_int else differentiable(leaf)
            if not usable:
                number, inner = (numbers[path[0].idx], path[1:]) if isinstance(numbers, tuple) else (numbers, path)
                where = f"argument {number}{jax.tree_util.keystr(inner)}"
                if owns_states(leaf):
                    raise StateTypeError(
                        f"{where} is a Module ({type(leaf).__name__}), which is not an argument: give it as "
                        f"grad_states, and let the function refer to it by name."
                    )
                raise StateTypeError(
                    f"{where} is {layout(leaf)}: {self.name} differentiates with respect to floating or complex values "
                    f"only. Convert it, choose another argnums, or (grad, jacrev) set allow_int=True."
                )

    def _strip(self, selection, values):
        """Replace the leaves of ``values`` without a derivative by None; return the positions of values with such."""
        mixed = []
        for i, value in enumerate(values):
            flags = [differentiable(leaf) for leaf in jax.tree.leaves(value)]
            if not any(flags):
                raise StateTypeError(
                    f"{selection.locate(selection.states[i])} holds nothing of a floating or complex type, so "
                    f"{self.name} cannot differentiate with respect to it. Leave it out, or (grad, jacrev) set "
                    f"allow_int=True."
                )
            if not all(flags):
                mixed.append(i)
                values[i] = jax.tree.map(lambda leaf: leaf if differentiable(leaf) else None, value)
        return tuple(mixed)

    def _unused_error(self, selection, unused, overwritten):
        idle = ", ".join(selection.locate(s) for s in selection.states if s in unused)
        lost = ", ".join(selection.locate(s) for s in selection.states if s in overwritten)
        faults = [f"never reads {idle}"] if idle else []
        faults += [f"writes {lost} before it reads it, so that the value at the start has no influence"] if lost else []
        fixes = ["Remove unused States from grad_states"] if idle else []
        fixes += ["Write (reset) outside of the function, or read first"] if lost else []
        return StateValueError(
            f"the function {', and '.join(faults)}: the gradient would be zero. {'. '.join(fixes)}, or set "
            f"check_states=False to get zeros."
        )


def _fill(value, floats):
    """Return ``value`` with its differentiable leaves taken from ``floats``, which has None elsewhere."""
    return jax.tree.map(lambda leaf, new: leaf if new is None else new, value, floats)
