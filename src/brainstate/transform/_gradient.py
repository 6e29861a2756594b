"""One class does the state handling of every derivative; the derivative itself is an argument.

``GradientTransform`` turns a function that reads and writes States into a pure one, hands it to a JAX transform
and gives the result the structure of the table in `GradientTransform`. It needs no table of cases for that: what
is differentiated is packed into *one* pytree that already has the wanted structure ``G``, and JAX, asked for
``argnums=0``, returns its derivative in that structure, whatever the transform (a Hessian gives ``G`` of ``G``).

The three beats: `Target.open` reads the States and packs ``G``; `Target.pure` is what JAX traces; the written
values come back beside the derivative and are committed once.

Only the inexact leaves of a State are differentiated. In the place of another leaf (an integer, a key) the
packed tree, and so the gradient, holds ``None``.
"""

import operator
from collections.abc import Callable, Hashable, Iterator, Sequence, ValuesView
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import valid_jaxtype

from .._boundary import Unbound, boundary, check_function
from .._carry import Carried
from .._errors import StateTypeError, StateValueError, a_type
from .._remade import Remade
from .._scope import Scope, commit, frozen_here, gather, read, refuse_states
from .._state import ParamState, State
from ._choice import is_pair, narrowed, owns_states
from ._nan import Watch, watched
from ._wrapper import resemble

__all__ = [
    "Call",
    "GradientTransform",
    "Selection",
    "Target",
    "check_argnums",
    "differentiable",
    "from_front",
    "function_name",
    "names_of",
    "pick",
    "place",
    "select",
]


# ------------------------------------------------------------------------------------------ which States


@dataclass(frozen=True)
class Selection:
    """The States of a container: ``treedef`` of the container, each State once, and where each one is."""

    treedef: Any
    states: tuple[State, ...]
    paths: tuple[str, ...]

    def locate(self, state) -> str:
        """Name ``state`` by its path in the container."""
        return f"grad_states{self.paths[self.states.index(state)]} ({state.describe()})"


def _is_snapshot(leaf) -> bool:
    return callable(getattr(type(leaf), "to_state", None))


def _is_leaf(leaf) -> bool:
    """Tell whether `select` judges ``leaf`` as a whole, whatever JAX would make of it."""
    return owns_states(leaf) or is_pair(leaf) or _is_snapshot(leaf) or isinstance(leaf, Iterator | ValuesView)


def _walk(states, what="grad_states") -> tuple[list, Any]:
    """Return the leaves as `select` takes them, with their paths, and the structure of the container."""
    try:
        return jax.tree_util.tree_flatten_with_path(states, is_leaf=_is_leaf)
    except (TypeError, ValueError) as error:
        raise StateTypeError(
            f"{what} is no container that JAX can walk: {error}. The keys of a dict must be of one sortable kind."
        ) from error


def _is_live(grad_states) -> bool:
    """Tell whether a Module is among ``grad_states``: its States are looked up at each call."""
    return any(owns_states(leaf) or is_pair(leaf) for _, leaf in _walk(grad_states)[0])


def _looked_up(what, leaf, kind):
    """Return the States of a kind that a Module, alone or with a filter, stands for; anything else as it is."""
    if is_pair(leaf):
        return narrowed(what, leaf, kind)
    return leaf.states(kind) if owns_states(leaf) else leaf


def _meant(leaf) -> str:
    """Say how to write what was probably meant by a ``leaf`` that is not a State."""
    if isinstance(leaf, bool):
        return ""
    if isinstance(leaf, int | np.integer):
        return f"The positions of arguments go by name: argnums={int(leaf)}. "
    if isinstance(leaf, str) or callable(leaf):
        return "A tag or filter narrows a Module: (model, filter). "
    if valid_jaxtype(leaf):
        return "An array is differentiated as an argument, by argnums, and the value of a State by its State. "
    return ""


def select(states, what: str = "grad_states", kind: type[State] = ParamState) -> Selection:
    """Find the States in a State, a Module (its States of this kind), a pair (Module, filter) or any pytree of these.

    ``what`` names the argument in messages.

    Raises
    ------
    StateTypeError
        If something else is found.
    StateValueError
        If nothing is selected, by a pair or at all, or a State is listed twice.
    """
    outer, treedef = _walk(states, what)
    found = [_looked_up(f"{what}{jax.tree_util.keystr(path)}", leaf, kind) for path, leaf in outer]
    found, treedef = _walk(treedef.unflatten(found), what)
    paths = {}
    for path, state in found:
        where = jax.tree_util.keystr(path)
        if _is_snapshot(state):
            raise StateTypeError(
                f"{what}{where} is a snapshot, which no function reads: differentiate the States themselves, "
                f"model.states(...) in place of treefy_states(model, ...)."
            )
        if not isinstance(state, State):
            raise StateTypeError(
                f"{what}{where} is {a_type(state)}, not a State. {_meant(state)}Pass a State, a list, "
                f"tuple or dict of States (a set or an iterator is none), a Module, (Module, filter), or "
                f"model.states(...)."
            )
        if state in paths:
            raise StateValueError(
                f"{what} lists {state.describe()} twice, as {what}{paths[state]} and {what}{where}: "
                f"a loop over the gradients would step twice. List it once."
            )
        paths[state] = where
    if not paths:
        raise StateValueError(
            f"{what} selects no State: the container is empty (does the filter match?)."
            + (" Leave grad_states out to differentiate an argument." if what == "grad_states" else "")
        )
    return Selection(treedef, tuple(paths), tuple(paths.values()))


def differentiable(leaf) -> bool:
    """Tell whether ``leaf`` is of a floating or complex type."""
    if isinstance(leaf, bool | int):
        return False
    return valid_jaxtype(leaf) and jnp.issubdtype(jax.typeof(leaf).dtype, jnp.inexact)


# ------------------------------------------------------------------------------------------ which arguments


def _index(number) -> int:
    """Return ``number`` as an int; a bool is none, most likely an option in the wrong place."""
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
    """Return ``argnums`` of a call with ``count`` positional arguments, where negative ones count from the end."""
    if argnums is None:
        return None
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    for n in numbers:
        if not -count <= n < count:
            raise StateTypeError(
                f"argnums={argnums!r} selects argument {n}, but the call has {count} positional "
                f"argument{'' if count == 1 else 's'}. Pass what is differentiated by position, not by keyword; "
                f"States go into grad_states."
            )
    found = tuple(n % count for n in numbers)
    if len(set(found)) != len(found):
        raise StateValueError(f"argnums={argnums!r} names an argument twice: name each position once.")
    return found if isinstance(argnums, tuple) else found[0]


def pick(args, argnums):
    """Return the arguments at ``argnums``, in that structure, and all of them with None in their places."""
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


# ------------------------------------------------------------------------------------------ the pure function


@jax.tree_util.register_static
@dataclass(frozen=True)
class Call:
    """What one call differentiates; a static pytree, so that a custom transform may jit the pure function."""

    selection: Selection | None
    argnums: Hashable
    mixed: tuple[int, ...]  # positions of the States with leaves that are not differentiated
    frozen: bool


def _named(prefix, tree) -> list[str]:
    return [f"{prefix}{jax.tree_util.keystr(path)}" for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def names_of(call, diff: Any) -> tuple[list[str], list]:
    """Return the name of each leaf of ``diff``, and the State that it belongs to, or None."""
    names, owners, numbers = [], [], call.argnums
    if call.selection is not None:
        diff, picked = diff if numbers is not None else (diff, ())
        for state, value in zip(call.selection.states, call.selection.treedef.flatten_up_to(diff), strict=True):
            names += _named(call.selection.locate(state), value)
            owners += [state] * (len(names) - len(owners))
        diff = picked
    if isinstance(numbers, int):
        numbers, diff = (numbers,), (diff,)
    for n, value in zip(numbers or (), diff, strict=True):
        names += _named(f"argument {n}", value)
    return names, owners + [None] * (len(names) - len(owners))


def function_name(fun) -> str:
    """Name a function, or the kind of a callable object."""
    return getattr(fun, "__qualname__", type(fun).__name__)


class Target:
    """A function with States as a pure function of what is differentiated.

    ``open(args)`` gives ``(diff, call, rest)`` and ``pure(diff, call, *rest, **kwargs)`` returns
    ``(value, Carried((value or None, aux, Writes)))``. With ``allow_int`` integers have derivatives, of dtype float0,
    in States and arguments; with ``allow_int="arguments"`` in these only.
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
        self._selection = None if grad_states is None or _is_live(grad_states) else select(grad_states)

    def open(self, args, kwargs):
        """Read what is differentiated and pack it as ``diff``."""
        refuse_states((args, kwargs), f"arguments of {self.name}")
        selection = self._selection
        if selection is None and self.grad_states is not None:
            selection = select(self.grad_states)
        numbers = from_front(self.argnums, len(args))
        picked, rest = (None, args) if numbers is None else pick(args, numbers)
        if numbers is not None:
            self._check_argument(picked, numbers)
        if selection is None:
            return picked, Call(None, numbers, (), frozen_here()), rest
        values = gather(selection.states)
        mixed = () if self.allow_int is True else self._strip(selection, values)
        diff = selection.treedef.unflatten(values)
        return (
            diff if numbers is None else (diff, picked),
            Call(selection, numbers, mixed, frozen_here()),
            rest,
        )

    def inputs(self, args, kwargs) -> tuple[list[str], Any]:
        """Return the name of each array that a call differentiates, and the structure ``G``."""
        diff, call, _ = self.open(args, kwargs)
        return names_of(call, diff)[0], jax.tree.structure(diff)

    def __repr__(self) -> str:
        return f"{self.name}({function_name(self.fun)})"

    def pure(self, diff, call, /, *rest, **kwargs):
        """Run the function with ``diff`` in place; JAX traces this."""
        picked, values = diff, {}
        if call.selection is not None:
            diff, picked = diff if call.argnums is not None else (diff, None)
            values = dict(zip(call.selection.states, call.selection.treedef.flatten_up_to(diff), strict=True))
            for i in call.mixed:
                state = call.selection.states[i]
                with Scope(self.name, frozen=call.frozen):  # a transform may trace this: the read is of this call
                    values[state] = _fill(read(state), values[state])
        args = place(rest, call.argnums, picked)
        with Scope(self.name, values, frozen=call.frozen) as scope:
            out = self.fun(*args, **kwargs)
            refuse_states(out, f"results of a function under {self.name}")
            writes = scope.close()
        if self.check_states and (scope.unused or scope.overwritten):
            raise self._unused(call.selection, scope.unused, scope.overwritten)
        value, aux = self._parts(out)
        if not jax.tree.leaves(value):
            raise StateTypeError(
                f"{self.name} differentiates what the function returns, and it returned {value!r}: return an array "
                f"or a number."
            )
        return value, Carried.of((value if self.keep_value else None, aux, writes))

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
                kind = jax.typeof(leaf).str_short() if valid_jaxtype(leaf) else type(leaf).__name__
                number, inner = (numbers[path[0].idx], path[1:]) if isinstance(numbers, tuple) else (numbers, path)
                if owns_states(leaf):
                    raise StateTypeError(
                        f"argument {number}{jax.tree_util.keystr(inner)} is a Module ({kind}), which is not an "
                        f"argument: give it as grad_states, and let the function refer to it by name."
                    )
                raise StateTypeError(
                    f"argument {number}{jax.tree_util.keystr(inner)} is {kind}: {self.name} differentiates with "
                    f"respect to floating or complex values only. Convert it, choose another argnums, or "
                    f"(grad, jacrev) set allow_int=True."
                )

    def _strip(self, selection, values):
        """Put None for the leaves of ``values`` that are not differentiable; return which values have such."""
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

    def _unused(self, selection, unused, overwritten):
        idle = ", ".join(selection.locate(s) for s in selection.states if s in unused)
        lost = ", ".join(selection.locate(s) for s in selection.states if s in overwritten)
        faults = [f"never reads {idle}"] if idle else []
        faults += [f"writes {lost} before it reads it, so that the value at the start has no influence"] if lost else []
        fixes = ["Remove from grad_states what is not used"] if idle else []
        fixes += ["Write (reset) outside of the function, or read first"] if lost else []
        return StateValueError(
            f"the function {', and '.join(faults)}: the gradient would be zero. {'. '.join(fixes)}, or set "
            f"check_states=False to get zeros."
        )


def _fill(value, floats):
    """Return ``value`` with its differentiable leaves taken from ``floats``, which has None elsewhere."""
    return jax.tree.map(lambda leaf, new: leaf if new is None else new, value, floats)


# ------------------------------------------------------------------------------------------ the class


class GradientTransform(Remade):
    """Differentiate a function with States by any transform with the interface of ``jax.grad``.

    ===========  ==========  =============================================
    grad_states  argnums     ``G``
    ===========  ==========  =============================================
    None         None        gradient of argument 0
    None         int         gradient of that argument
    None         sequence    tuple of gradients, in the order given
    given        None        ``SG``: gradients in the container of the States
    given        int         ``(SG, gradient)``
    given        sequence    ``(SG, tuple of gradients)``
    ===========  ==========  =============================================

    The call returns ``G``, ``(G, aux)`` with ``has_aux``, ``(G, value)`` with ``return_value``, and
    ``(G, value, aux)`` with both. Where a transform puts structure around a derivative (the output's, for a
    Jacobian; a second ``G``, for a Hessian) it does so as JAX does for a single argument of structure ``G``.

    Parameters
    ----------
    target : callable
        The function. It may read and write any States; writes are committed once, after the derivative.
    transform : callable
        Called once as ``transform(fun, argnums=0, has_aux=True, **transform_params)`` with a pure function. It
        returns a function of the same arguments that returns ``(derivative, aux)``, aux passed on untouched.
    grad_states : State, Module, (Module, filter), or pytree of these, optional
        What to differentiate. A Module stands for its ParamStates at the time of the call, a pair for those of them
        that the filter selects then: ``(model, Not("frozen"))`` leaves out what is tagged so, which has no entry in
        the result. A State with two names in the Module goes by the first, and has one gradient: the sum.
    argnums : int or sequence of int, optional
        Positions of the arguments to differentiate; -1 is the last positional argument of the call. On a method they
        count the arguments after ``self``.
    return_value, has_aux : bool
        See above. With ``has_aux`` the function returns ``(value, aux)``.
    transform_params : dict, optional
        Further keyword arguments of ``transform``.
    check_states : bool
        Refuse States that the function never reads, or writes before it reads them (their gradient would be zero).
    debug_nan : bool
        Raise an error if the derivative, or a value that is one number, holds NaN or infinities, or anything else that
        comes out holds NaN. It names the first operation that made it, forward or backward, in loops and branches
        too, by its line. Outside of other transforms the function runs a second time for that; inside, it is traced,
        without Python control flow on values, and the check is made at run time. Costs nothing if False.

    Raises
    ------
    NonFiniteError
        With ``debug_nan`` only, and also out of `jit`; under a raw JAX transform, and out of loops, maps and other
        derivatives that are not compiled, JAX raises an error of its own that ends in the same text.
    StateTypeError, StateValueError
        When built, for unusable arguments; when called, for what the call shows. No State has changed then.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, brainstate
    >>> def doubled(fun, *, argnums, has_aux):
    ...     base = jax.grad(fun, argnums=argnums, has_aux=has_aux)
    ...     def wrapped(*args, **kwargs):
    ...         grads, aux = base(*args, **kwargs)
    ...         return jax.tree.map(lambda g: 2 * g, grads), aux
    ...     return wrapped
    >>> w = brainstate.ParamState(jnp.array(3.0))
    >>> float(brainstate.transform.GradientTransform(lambda: w.value**2, doubled, grad_states=w)())
    12.0
    """

    def __init__(
        self,
        target: Callable,
        transform: Callable,
        grad_states: Any = None,
        argnums: int | tuple[int, ...] | list[int] | None = None,
        return_value: bool = False,
        has_aux: bool | None = False,
        transform_params: dict[str, Any] | None = None,
        check_states: bool = True,
        debug_nan: bool = False,
    ):
        numbers = check_argnums(argnums)
        self.target, self.transform, self.grad_states, self.argnums = target, transform, grad_states, numbers
        self.return_value, self.has_aux, self.check_states = (
            bool(return_value),
            bool(has_aux),
            bool(check_states),
        )
        self.transform_params = dict(transform_params or {})
        if grad_states is None:
            numbers = 0 if numbers is None else numbers
            if numbers == ():
                raise StateValueError("argnums=() and no grad_states: there is nothing to differentiate.")
        if not callable(transform):
            raise StateTypeError(f"the transform is {a_type(transform)}, which cannot be called.")
        name = getattr(transform, "__name__", type(transform).__name__).removesuffix("_transform").strip("_")
        self._pure = Target(
            target,
            name,
            grad_states,
            numbers,
            has_aux=self.has_aux,
            keep_value=self.return_value,
            check_states=self.check_states,
            allow_int=self.transform_params.get("allow_int", False),
        )
        self._derivative = transform(self._pure.pure, argnums=0, has_aux=True, **self.transform_params)
        # What runs in place of this one: its value is part of the result, and so says what is forward and what not.
        self._watched = self._like(target, return_value=True) if debug_nan else None
        resemble(self, target)

    @boundary
    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Return the derivative in the structure of the table; commit what the function wrote."""
        return self.arranged(*self.parts(*args, **kwargs))

    def parts(self, /, *args: Any, **kwargs: Any) -> tuple:
        """Return ``(derivative, value, aux)``, with None for what is not asked for; commit what the function wrote."""
        if self._watched is not None:
            return watched(Watch(repr(self), self._watched.parts, self._pure.inputs), args, kwargs)
        diff, call, rest = self._pure.open(args, kwargs)
        out = self._derivative(diff, call, *rest, **kwargs)
        if not (isinstance(out, tuple | list) and len(out) == 2 and isinstance(out[1], Carried)):
            raise StateTypeError(
                f"the transform {self._pure.name} returned {type(out).__name__} in place of (derivative, aux): it is "
                f"called with has_aux=True and has to pass the aux that its function returns on untouched."
            )
        value, aux, writes = out[1].tree()
        commit(writes)
        return out[0], value, aux

    def arranged(self, derivative: Any, value: Any, aux: Any) -> Any:
        """Return what a call returns, from its parts."""
        result = (derivative, *((value,) if self.return_value else ()), *((aux,) if self.has_aux else ()))
        return result if len(result) > 1 else derivative

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind as a method: the derivative of the bound method."""
        if instance is None:
            return Unbound(self, owner)
        return self._like(self.target.__get__(instance, owner), self.return_value, self._watched is not None)

    def _like(self, target, return_value, debug_nan=False):
        return type(self)(*self._arguments(target, return_value, debug_nan))

    def _arguments(self, target, return_value, debug_nan):
        selected, more = (self.grad_states, self.argnums), (self.has_aux, self.transform_params, self.check_states)
        return target, self.transform, *selected, return_value, *more, debug_nan

    def _recipe(self):
        return type(self), self._arguments(self.target, self.return_value, self._watched is not None)

    def __repr__(self) -> str:
        return repr(self._pure)
