"""``vmap`` and ``map``: run a function on many lanes at once, with States.

A State is shared by the lanes unless it is declared to have an axis. The rules for a State that the lanes write:

===================================  =====================================================================
declared in ``out_states``           its lanes are stacked along the axis, or reduced (mean, sum, last)
declared in ``in_states`` only       keeps its axis
a random generator                   each lane draws from a key of its own; it advances once, or is seeded
undeclared, same value in all lanes  that value
undeclared, a value per lane         `BatchAxisError`, which names the State and the declarations that would do
created inside, outlives the call    as if declared with axis 0
===================================  =====================================================================

The function is staged on one lane, which shows the States it uses, and the staged function is handed to ``jax.vmap``.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import mapped_aval

from ..._arrays import at_least, layout, owns_states
from ..._copies import Remade
from ..._errors import BatchAxisError, StateTypeError, StateValueError
from ..._functions import Unbound, boundary, check_function, named_after
from ..._seam.packing import Writes
from ..._seam.scope import Scope, commit, gather, is_tracer, read, refuse_states
from ..._seam.staging import Restart, catch_restart, stage
from .._select_states import draws, list_states
from .._wrapper import or_decorator, resemble
from .loops import for_loop, loop_length, loop_over_slices

__all__ = ["Mapped", "map", "vmap", "vmap_new_states"]

_REDUCTIONS = {
    "stack": lambda lanes: lanes,
    "mean": lambda lanes: jnp.mean(lanes, axis=0),
    "sum": lambda lanes: jnp.sum(lanes, axis=0, dtype=lanes.dtype),
    "last": lambda lanes: lanes[-1],
}
_NEEDS = {"mean": jnp.inexact, "sum": jnp.number}


class _Axes:
    """A declaration of axes for States, as a function ``State -> axis, reduction or None``."""

    def __init__(self, what, declared, reductions=()):
        self.what, self.rules = what, []
        axes = [k for k in declared if type(k) is int or k in _REDUCTIONS] if isinstance(declared, dict) else []
        if axes and len(axes) < len(declared):
            other = next(k for k in declared if k not in axes)
            raise StateValueError(f"{what}: {other!r} is neither an int axis nor one of {', '.join(_REDUCTIONS)}.")
        self.named = {}  # State -> axis, of those that are declared themselves, not by a filter
        for axis, states in (declared if axes else {0: declared}).items():
            if isinstance(axis, str) and axis not in reductions:
                raise StateValueError(f"{what}: {axis!r} is a reduction of written values, give an int axis here.")
            if states is not None:
                self.rules.append((axis, self._predicate(axis, states)))

    def __call__(self, state):
        axes = [axis for axis, holds in self.rules if holds(state)]
        if len(set(axes)) > 1:
            raise StateValueError(f"{self.what} declares {state.describe()} with the axes {axes}: give one.")
        return axes[0] if axes else None

    def _predicate(self, axis, states):
        exact, matches = list_states(self.what, states)
        self.named.update(dict.fromkeys(exact, axis))
        return lambda state: state in exact or (not draws(state) and matches(state))  # see `vmap` for generators


class _Lane(Scope):
    """A staging scope that shows one lane of the States that have an axis."""

    def __init__(self, name, axis_of):
        super().__init__(name, stages=True)
        self.axis_of = axis_of

    def _types(self, state, leaves):
        axis = self.axis_of(state)
        types = super()._types(state, leaves)
        return types if axis is None else [_remove_axis(state, axis, t) for t in types]


def _remove_axis(state, axis, aval):
    if not -aval.ndim <= axis < aval.ndim:
        raise StateValueError(
            f"{state.describe()} is declared with axis {axis} and holds {layout(aval)}, which has no such axis."
        )
    axis %= aval.ndim
    return mapped_aval(aval.shape[axis], axis, aval)


class _Returned:
    """A Module among the results, of which the lanes are in its States: a pytree without leaves."""

    def __init__(self, module):
        self.module = module

    @classmethod
    def wrap(cls, leaf):
        """Wrap a Module, which may hold lanes nowhere else, and leave all else as it is."""
        if not owns_states(leaf):
            return leaf
        for module in leaf.nodes().values():
            for name, value in vars(module).items():
                if any(is_tracer(x) for x in jax.tree.leaves(value)):
                    raise StateValueError(
                        f"the {type(leaf).__name__} that is returned under vmap has an array in the attribute {name!r} "
                        f"of {type(module).__name__}: only States get the lanes. Make it a State, or a NumPy array."
                    )
        return cls(leaf)

    @staticmethod
    def unwrap(leaf):
        """Undo `wrap`."""
        return leaf.module if _is_returned(leaf) else leaf


def _is_returned(leaf) -> bool:
    return isinstance(leaf, _Returned)


jax.tree_util.register_pytree_node(_Returned, lambda returned: ((), returned), lambda returned, _: returned)


NO_AXES = {"axis_name": None, "axis_size": None, "spmd_axis_name": None}  # the options of `vmap` left out


class Mapped(Remade):
    """A function on many lanes; made by `vmap`."""

    name, remedy = "vmap", "give axis_size"  # for messages

    def __init__(self, fn, *, in_axes=0, out_axes=0, in_states=None, out_states=None, new_axis=0, **options):
        check_function("vmap maps a function", fn)
        in_axes = tuple(in_axes) if isinstance(in_axes, list) else in_axes
        jax.vmap(fn, in_axes=in_axes, out_axes=out_axes)  # checks them
        self._given = {"in_axes": in_axes, "out_axes": out_axes, "in_states": in_states, "out_states": out_states}
        self._given |= {"new_axis": new_axis, **options}
        self.fn, self.in_axes, self.out_axes, self.new_axis = fn, in_axes, out_axes, new_axis
        self.options = {"axis_name": None, "axis_size": None, "spmd_axis_name": None} | options
        self.axis_in = _Axes("in_states", in_states)
        self.axis_out = _Axes("out_states", out_states, _REDUCTIONS)
        resemble(self, fn)

    @boundary
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function on all lanes and commit its writes."""
        refuse_states((args, kwargs), f"arguments of {self.name}")
        unknown = -1  # and not 0: there may be no lane at all
        guess: Any = self._size(args, kwargs, (), default=unknown)
        guess = self._first_lanes() if guess == unknown else guess
        staged = self._stage(args, kwargs, guess)
        mapped = [s for s in staged.reads if self.axis_in(s) is not None]
        size = self._size(args, kwargs, mapped)
        if size != guess and self.options["axis_name"] is not None:  # a collective may depend on it
            staged = self._stage(args, kwargs, size)
        random, after = self._random(staged, size)
        closed = [s for s in staged.reads if s not in mapped and s not in random]
        closed = dict(zip(closed, gather(closed), strict=True))

        def lane(args, kwargs, values):
            out, writes = staged({**closed, **dict(zip((*mapped, *random), values, strict=True))}, args, kwargs)
            table = dict(zip(writes.states, writes.values, strict=True))
            return out, [table[s] for s in written]

        written = [s for s in staged.writes if s not in after]
        axes = [self._axis_written(s, staged.born) for s in written]
        values = [*gather(mapped), *random.values()]
        axes_in = (self.in_axes, 0, [*(self.axis_in(s) for s in mapped), *[0] * len(random)])
        options: dict[str, Any] = {**self.options, "in_axes": axes_in, "axis_size": size}
        numbers = [0 if isinstance(a, str) else a for a in axes]
        lane = named_after(lane, self.fn)
        try:
            out, new = self._lanes(lane, (self.out_axes, numbers), options)(args, kwargs, values)
        except ValueError:
            self._explain(lane, written, axes, options, (args, kwargs, values))
            raise
        new = [_reduce_lanes(s, a, v) if isinstance(a, str) else v for s, a, v in zip(written, axes, new, strict=True)]
        commit(Writes((*written, *after), [*new, *after.values()]))
        return jax.tree.map(_Returned.unwrap, out, is_leaf=_is_returned)

    def _lanes(self, lane, out_axes, options):
        """Return JAX's map of ``lane``."""
        return jax.vmap(lane, out_axes=out_axes, **options)

    def copy_with(self, fn: Callable, **changes: Any) -> "Mapped":
        """Return the same map of ``fn``, but for ``changes`` of its options."""
        return type(self)(fn, **self._given | changes)

    def _stage(self, args, kwargs, size):
        def wrap_results(*args, **kwargs):
            out = self.fn(*args, **kwargs)
            return jax.tree.map(_Returned.wrap, out, is_leaf=lambda x: owns_states(x) or isinstance(x, Iterator))

        wrap_results = named_after(wrap_results, self.fn, same_arguments=True)

        def probe(args, kwargs):
            raise Restart(stage(wrap_results, args, kwargs, name=self.name, scope=_Lane(self.name, self.axis_in)))

        options = {**self.options, "axis_size": size}
        return catch_restart(lambda fun: jax.vmap(fun, in_axes=(self.in_axes, 0), **options)(args, kwargs), probe)

    def _size(self, args, kwargs, mapped, default=None):
        """Return the number of lanes; raise an error that names two arguments or States that disagree."""
        sizes = {"axis_size": self.options["axis_size"]} if self.options["axis_size"] is not None else {}
        try:
            axes = jax.tree.broadcast(self.in_axes, args, is_leaf=lambda a: a is None)
        except ValueError as error:
            raise StateValueError(
                f"{self.name}: in_axes={self.in_axes!r} does not fit the {len(args)} positional arguments: give one "
                f"number, or a tuple with an entry for each argument."
            ) from error
        flat = jax.tree.leaves(axes, is_leaf=lambda a: a is None)
        for axis, (path, leaf) in zip(flat, jax.tree_util.tree_leaves_with_path(args), strict=True):
            if axis is not None and -jnp.ndim(leaf) <= axis < jnp.ndim(leaf):
                sizes[f"argument {jax.tree_util.keystr(path)}"] = jnp.shape(leaf)[axis]
        for path, leaf in jax.tree_util.tree_leaves_with_path(kwargs):
            if jnp.ndim(leaf):
                sizes[f"argument {jax.tree_util.keystr(path)}"] = jnp.shape(leaf)[0]
        for state in mapped:
            axis: Any = self.axis_in(state)
            for path, leaf in jax.tree_util.tree_leaves_with_path(read(state)):
                key = f"{state.describe()}{jax.tree_util.keystr(path)}"
                sizes[f"{key} (number {len(sizes)})" if key in sizes else key] = jnp.shape(leaf)[axis]
        if len(set(sizes.values())) > 1:
            raise StateValueError(
                f"{self.name}: the numbers of lanes disagree: {sizes}. All mapped axes have one size."
            )
        if not sizes and default is None:
            raise StateValueError(f"{self.name}: nothing is mapped, so the number of lanes is unknown: {self.remedy}.")
        return next(iter(sizes.values()), default)

    def _first_lanes(self):
        """Return the number of lanes of the first State that is declared itself, to stage with; else one."""
        for state, axis in self.axis_in.named.items():
            for leaf in jax.tree.leaves(read(state)):
                if -jnp.ndim(leaf) <= axis < jnp.ndim(leaf):
                    return jnp.shape(leaf)[axis]
        return 1

    def _random(self, staged, size):
        """Return {State: a value for each lane} of the generators, and {State: its value afterwards}."""
        lanes, after = {}, {}
        for state in staged.writes:
            own = state.lanes(*gather([state]), size) if state in staged.reads and self.axis_in(state) is None else None
            if own is not None:
                lanes[state] = own[0]
                if self.axis_out(state) is None and not staged.replaces(state):  # a new seed is an ordinary write
                    after[state] = own[1]
        return lanes, after

    def _axis_written(self, state, born):
        axis = self.axis_out(state)
        if axis is None:
            axis = self.axis_in(state)
        return self.new_axis if axis is None and state in born else axis

    def _explain(self, lane, written, axes, options, inputs):
        """Find the State that JAX refused, and raise an error that names it."""

        def types(i, axis):
            return jax.eval_shape(jax.vmap(lambda *a: lane(*a)[1][i], out_axes=axis, **options), *inputs)

        for i, (state, axis) in enumerate(zip(written, axes, strict=True)):
            try:
                types(i, 0 if isinstance(axis, str) else axis)
            except ValueError as error:
                lanes = jax.tree.map(layout, types(i, 0))
                if axis is not None:
                    raise StateValueError(
                        f"{state.describe()} is declared with axis {axis}, and the written value has no such axis: "
                        f"it is {lanes} with the lanes first."
                    ) from error
                raise BatchAxisError(
                    f"{state.describe()} was written with a value per lane, {lanes} in all, and no axis is declared "
                    f"for it. Declare one: out_states={{0: [state]}} keeps all lanes, out_states={{'mean': [state]}} "
                    f"(or 'sum', 'last') reduces them; in_states gives each lane its own value to begin with."
                ) from None

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind as a method; axes count the arguments after ``self``."""
        if instance is None:
            return Unbound(self, owner)
        return self.copy_with(self.fn.__get__(instance, owner))


def _reduce_lanes(state, reduction, lanes):
    """Return the lanes that were written to ``state`` as one value."""
    for leaf in jax.tree.leaves(lanes):
        if not jnp.issubdtype(leaf.dtype, _NEEDS.get(reduction, jnp.generic)) and reduction in _NEEDS:
            raise StateTypeError(
                f"out_states: the {reduction} of {state.describe()} is taken over {leaf.dtype} values and would be no "
                f"{leaf.dtype}. Choose 'last' or 'stack', or write floats."
            )
    return jax.tree.map(_REDUCTIONS[reduction], lanes)


def vmap(
    fn: Callable | None = None,
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_name: Any = None,
    axis_size: int | None = None,
    spmd_axis_name: Any = None,
    *,
    in_states: Any = None,
    out_states: Any = None,
) -> Any:
    """Run a function on many lanes at once: ``jax.vmap`` that knows States.

    Parameters
    ----------
    fn : callable, optional
        The function of one lane. Left out: a decorator is returned.
    in_axes, out_axes, axis_name, axis_size, spmd_axis_name
        As in ``jax.vmap``.
    in_states : State, container, Module, type or filter, or {axis: any of these}, optional
        The States of which each lane has its own; without an axis, along axis 0. A filter does not mean random
        generators, whose lanes have keys of their own anyway; a generator that holds a key per lane is named itself.
    out_states : the same, where the axis may also be 'stack', 'mean', 'sum' or 'last', optional
        Axis or reduction of the values that the lanes write. Without it a State of ``in_states`` keeps its axis.

    Returns
    -------
    callable
        The function on arrays with one more axis.

    Raises
    ------
    BatchAxisError
        If lanes write different values to a State without a declared axis.
    StateValueError
        If sizes disagree, or a declared axis does not exist.
    StateTypeError
        If a declaration holds anything but States and filters.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> h, seen = brainstate.HiddenState(jnp.zeros((3, 2))), brainstate.State(jnp.array(0.0))
    >>> def cell(x):
    ...     h.value += x
    ...     seen.value = x
    ...     return h.value.sum()
    >>> run = brainstate.transform.vmap(cell, in_states=h, out_states={0: h, "mean": seen})
    >>> run(jnp.array([1.0, 2.0, 3.0])).tolist(), h.value.shape, float(seen.value)
    ([2.0, 4.0, 6.0], (3, 2), 2.0)
    """
    options: dict[str, Any] = {"axis_name": axis_name, "axis_size": axis_size, "spmd_axis_name": spmd_axis_name}
    options |= {"in_axes": in_axes, "out_axes": out_axes, "in_states": in_states, "out_states": out_states}
    return or_decorator(fn, lambda fn: Mapped(fn, **options))


def vmap_new_states(fn: Callable | None = None, *, axis: int = 0, **options: Any) -> Any:
    """Run a function on many lanes; the States it creates come out with the lanes along ``axis``.

    Parameters
    ----------
    fn : callable, optional
        The function of one lane, such as the class of a model. Left out: a decorator is returned. A Module that it
        returns, here and under `vmap`, comes back as one Module whose States have the lanes.
    axis : int
        Where the lanes go in the values of the new States; plain `vmap` puts them first.
    **options
        As in `vmap`.

    Returns
    -------
    callable
        As `vmap`.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> layers = brainstate.transform.vmap_new_states(lambda: brainstate.nn.Linear(2, 3), axis_size=5)()
    >>> layers.weight.value.shape
    (5, 2, 3)
    >>> run = brainstate.transform.vmap(layers, in_axes=None, in_states=layers)
    >>> run(jnp.ones(2)).shape
    (5, 3)
    """
    return or_decorator(fn, lambda fn: vmap(fn, **options).copy_with(fn, new_axis=axis))


class _MappedAgain(Mapped):
    """Lanes of a function that is staged by the first call only: all calls are alike but for the number of lanes."""

    name = "map"
    _staged = None

    def _stage(self, args, kwargs, size):
        self._staged = self._staged or super()._stage(args, kwargs, size)
        return self._staged


@boundary
def map(f: Callable, *xs: Any, batch_size: int | None = None) -> Any:
    """Call ``f`` on each slice of the arguments, one after the other or in batches: ``jax.lax.map`` with States.

    Parameters
    ----------
    f : callable
        ``f(*slices) -> y``.
    *xs : pytree of arrays
        The arrays to map over, along axis 0.
    batch_size : int, optional
        How many slices at once (then the rules of `vmap` hold for States); without it, a `for_loop`.

    Returns
    -------
    pytree
        The results, stacked along axis 0.

    Raises
    ------
    StateTypeError, StateValueError
        If ``batch_size`` is not a positive int.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> brainstate.transform.map(lambda x: x**2, jnp.arange(5.0), batch_size=2).tolist()
    [0.0, 1.0, 4.0, 9.0, 16.0]
    """
    if batch_size is None:
        return loop_over_slices("map", f, xs)
    at_least("map: batch_size", batch_size, 1, "the number of slices at once")
    count = loop_length("map", xs, None)
    full = count // batch_size * batch_size
    if not count:
        return loop_over_slices("map", f, xs)
    lanes = _MappedAgain(f)
    if not full:
        return lanes(*xs)
    cut = jax.tree.map(lambda x: jnp.reshape(x[:full], (-1, batch_size, *x.shape[1:])), xs)
    ys = jax.tree.map(lambda y: y.reshape(full, *y.shape[2:]), for_loop(lanes, *cut))
    if full == count:
        return ys
    rest = lanes(*jax.tree.map(lambda x: x[full:], xs))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, rest)
