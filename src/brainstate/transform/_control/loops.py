"""Loops: JAX's ``scan``, ``while_loop`` and relatives, for bodies that read and write States.

A body is staged once, which shows the States it uses. States that it writes are carried, next to the user's own
carry; States that it only reads are closed over. A random generator is written by every draw, so each iteration
draws new numbers. JAX's trace only evaluates the staged body: the user's Python runs once. (Once more where a
number without a dtype of its own, such as ``0``, becomes a float in the body: JAX, too, traces such a loop twice.)

Each loop refuses, with the name of the State, a carry that JAX would refuse without a name:
a value that changes shape or dtype, a State created in the body that outlives it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import valid_jaxtype

from ..._arrays import at_least, layout
from ..._compat import jit_disabled, varying_axes
from ..._errors import StateTypeError, StateValueError
from ..._functions import boundary, check_function, named_after
from ..._seam.packing import Writes
from ..._seam.scope import Scope, commit, gather, is_tracer, refuse_states, run
from ..._seam.staging import Restart, catch_restart, stage
from .progress import ProgressBar, with_progress

__all__ = [
    "agree",
    "bounded_while_loop",
    "checkpointed_for_loop",
    "checkpointed_scan",
    "device_axes",
    "for_loop",
    "layouts",
    "loop_length",
    "loop_over_slices",
    "named_scan",
    "named_while",
    "probe",
    "run_in_python",
    "scan",
    "spread",
    "types_of",
    "while_loop",
]


def probe(name, fun, call):
    """Stage ``fun`` on the arguments that JAX gives to a function in ``call(function)``, and leave JAX's transform."""
    check_function(f"{name} takes functions", fun)

    def stage_fun(*args):
        raise Restart(stage(fun, args, {}, name=name))

    staged = catch_restart(call, stage_fun)
    if staged.born:
        raise StateValueError(
            f"{staged.born[0].describe()} is created inside {name} and outlives it: each iteration or branch would "
            f"make another one. Create it before, and assign its value inside."
        )
    return staged


def run_in_python(name, fun, *args):
    """Return ``fun(*args)`` of a transform that runs in Python under ``jax.disable_jit``; commit its writes."""
    out, writes = run(Scope(name), fun, *args)
    commit(writes)
    return out


def types_of(value):
    """Return the type of each leaf of ``value``: that of JAX, or else the Python class."""
    return jax.tree.map(lambda leaf: jax.typeof(leaf) if valid_jaxtype(leaf) else type(leaf), value)


def agree(before, after) -> bool:
    """Tell whether two trees of types have the same structure, shapes and dtypes."""
    return jax.tree.structure(before) == jax.tree.structure(after) and all(
        not isinstance(a, type) and not isinstance(b, type) and a.shape == b.shape and a.dtype == b.dtype
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )


def device_axes(types) -> tuple[str, ...]:
    """Return the axes of a device mesh along which values of these types may differ, inside `shard_map`."""
    return tuple(dict.fromkeys(axis for leaf in jax.tree.leaves(types) for axis in varying_axes(leaf)))


def _cast(value, types):
    """Return ``value`` with each number of no dtype of its own in the dtype that it has after an iteration."""

    def cast(leaf, after):
        weak = valid_jaxtype(leaf) and jax.typeof(leaf).weak_type and jax.typeof(leaf).dtype != after.dtype
        if not weak or jnp.issubdtype(after.dtype, jax.dtypes.extended):
            return leaf
        return jax.lax.convert_element_type(leaf, jnp.result_type(leaf, after.dtype))

    same = jax.tree.structure(value) == jax.tree.structure(types)
    return jax.tree.map(cast, value, types) if same else value


def _blank(state, staged):
    """Return a first value for ``state``, which no iteration reads: to take its own would be a use of it."""

    def zeros(aval):
        value, axes = jnp.zeros(aval.shape, aval.dtype), varying_axes(aval)
        return jax.lax.pcast(value, axes, to="varying") if axes else value

    types = staged.written_types[state]
    if any(jnp.issubdtype(t.dtype, jax.dtypes.extended) or any(t.sharding.spec) for t in jax.tree.leaves(types)):
        return gather([state])[0]
    return jax.tree.map(zeros, types)


def _stage_body(name, fun, call, init, known, pairs):
    """Return the staged body, the first carry, and {written State: first value}, starting at ``known``."""
    with Scope(name, known):
        staged = probe(name, fun, lambda run: call(run, init))
        before = [init, [gather([s])[0] if s in staged.reads else _blank(s, staged) for s in staged.writes]]
    result = staged.result_types
    if pairs:
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise StateTypeError(f"{name}: the function returns a pair (carry, y); it returned {layouts(result)}.")
        result = result[0]
    types = [staged.written_types[s] for s in staged.writes]
    start = [_cast(init, result), [_cast(v, t) for v, t in zip(before[1], types, strict=True)]]
    values = dict(zip(staged.writes, start[1], strict=True))
    if all(a is b for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(start), strict=True)):
        return staged, init, values
    return _stage_body(name, fun, call, start[0], values, pairs)


class _Body:
    """A staged loop body as a pure function of ``(carry, values of the written States)``.

    ``call(run, init)`` is JAX's loop with ``run`` as its body; ``first`` is the carry that the loop starts with.
    """

    pairs = True  # whether the function returns the carry and an output, or the carry alone

    def __init__(self, name, fun, call, init):
        self.name, self.fun, self.call = name, fun, call
        self.staged, self.first, self.values = _stage_body(name, fun, call, init, {}, self.pairs)
        self.carried, self.closed = self.staged.writes, {}
        self.close_over(self.staged.reads)

    def close_over(self, reads):
        """Take the present values of those States that the loop reads and does not write."""
        fixed = [s for s in reads if s not in self.values]
        self.closed.update(zip(fixed, gather(fixed), strict=True))

    def start(self, at_least_once):
        """Return the first carry and the values that the written States have before the first iteration."""
        return self.first, [self._compatible(s, v, at_least_once) for s, v in self.values.items()]

    def __call__(self, values, *args):
        out, writes = self.staged(self.inputs_from(values), args, {})
        return out, list(writes.values)

    def inputs_from(self, values):
        """Return {State: value} for all States that are read, of one iteration."""
        return {**self.closed, **dict(zip(self.carried, values, strict=True))}

    def finish(self, values):
        """Commit the values after the last iteration."""
        commit(Writes(self.carried, list(values)))

    def run(self, loop):
        """Return ``loop()``; if JAX refuses the carry, raise its error for the user's own carry, without States."""
        try:
            return loop()
        except TypeError:
            given = self.inputs_from(self.values.values())
            own = named_after(lambda *args: self.staged(given, args, {})[0], self.fun, same_arguments=True)
            jax.eval_shape(lambda: self.call(own, self.first))
            raise

    def _compatible(self, state, value, at_least_once):
        after = self.staged.written_types[state]
        if state not in self.staged.reads and not at_least_once:  # it may keep its value
            value = _cast(gather([state])[0], after)
        before = types_of(value)
        if agree(before, after) and device_axes(value) != device_axes(after):
            raise StateTypeError(
                f"{state.describe()} {spread(value)} before an iteration of {self.name} and {spread(after)} after it. "
                f"Reduce the assigned value with jax.lax.psum or pmean; or, for a State with a value per device, "
                f"declare it in state_specs of shard_map."
            )
        if agree(before, after):
            return value
        raise StateTypeError(
            f"{state.describe()} is {layouts(before)} before an iteration of {self.name} and {layouts(after)} after "
            f"it: a carried value keeps its structure, shape and dtype. Cast the value that is assigned, or the one "
            f"it starts with."
        )


def spread(types) -> str:
    """Say the result of `device_axes` in words."""
    axes = device_axes(types)
    return f"may differ between the devices of {', '.join(axes)}" if axes else "is the same on all devices"


def layouts(types):
    """Return ``types`` in the short form for a message."""
    return jax.tree.map(layout, types)


def loop_length(name, xs, length):
    """Return the number of iterations; raise an error if it is unknown or there are two."""
    if is_tracer(length):
        raise StateTypeError(
            f"{name}: length is a traced value, and a compiled loop has a fixed number of iterations. Make it a static "
            f"argument of jit, or use while_loop (bounded_while_loop for reverse mode) or fori_loop."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(xs):
        if not jnp.ndim(leaf):
            where = jax.tree_util.keystr(path)
            raise StateValueError(
                f"{name}: the value to loop over{where and ', at ' + where + ','} is {layouts(types_of(leaf))}, which "
                f"has no axis to loop over. Let the function refer to it by name, or give an array."
            )
    sizes = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(xs)}
    sizes |= {length} if length is not None else set()
    if len(sizes) != 1:
        what = f"the lengths {sorted(sizes)} disagree" if sizes else "nothing says how long the loop is"
        raise StateValueError(f"{name}: {what}: give arrays with one leading axis to loop over, or length.")
    return sizes.pop()


@boundary
def scan(
    f: Callable,
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    pbar: ProgressBar | int | None = None,
) -> tuple[Any, Any]:
    """Loop over the leading axis of ``xs`` with a carry: ``jax.lax.scan`` that carries States.

    Parameters
    ----------
    f : callable
        ``f(carry, x) -> (carry, y)``; it may read and write States.
    init : pytree
        The first carry.
    xs : pytree of arrays, optional
        The arrays to loop over, along axis 0.
    length : int, optional
        The number of iterations; needed if ``xs`` is None.
    reverse, unroll
        As in ``jax.lax.scan``.
    pbar : ProgressBar or int, optional
        Shows progress, from inside the compiled loop; an int is the number of iterations between two movements.

    Returns
    -------
    tuple
        The last carry, and the ``y`` of all iterations stacked along axis 0.

    Raises
    ------
    StateTypeError
        If a State that the body reads changes structure, shape or dtype in it. One that each iteration overwrites
        unread may: it has the value of the last one.
    StateValueError
        If a State created in the body outlives it, or the number of iterations is unknown.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> total = brainstate.State(jnp.array(0.0))
    >>> def body(carry, x):
    ...     total.value += x
    ...     return carry + 1, total.value
    >>> count, sums = brainstate.transform.scan(body, 0, jnp.array([1.0, 2.0, 3.0]))
    >>> int(count), sums.tolist(), float(total.value)
    (3, [1.0, 3.0, 6.0], 6.0)
    """
    return named_scan("scan", f, init, xs, length, reverse, partial(jax.lax.scan, unroll=unroll), pbar)


def named_scan(name, f, init, xs, length=None, reverse=False, loop=jax.lax.scan, pbar=None) -> tuple[Any, Any]:
    """Run a `scan` that messages call ``name``, by ``loop(step, start, xs, length=, reverse=)``."""
    refuse_states((init, xs), f"arguments of {name}")
    count = loop_length(name, xs, length)
    if pbar is not None:
        f, xs = with_progress(f, xs, count, reverse, pbar)
    plain = partial(jax.lax.scan, length=count, reverse=reverse)
    if jit_disabled():
        return run_in_python(name, plain, partial(run_in_python, name, f), init, xs)
    body = _Body(name, f, lambda run, init: plain(run, init, xs), init)

    def step(carry, x):
        (carry, y), values = body(carry[1], carry[0], x)
        return (carry, values), y

    start, step = body.start(count > 0), named_after(step, f)
    (carry, values), ys = body.run(lambda: loop(step, start, xs, length=count, reverse=reverse))
    body.finish(values)
    return carry, ys


def loop_over_slices(name: str, f: Callable, xs: tuple, *options: Any) -> Any:
    """Call ``f`` on each slice of ``xs``: the loop of `for_loop` and `map`; the last ``options`` of `named_scan`."""
    check_function(f"{name} takes functions", f)

    def body(_, x):
        return None, f(*x)

    return named_scan(name, named_after(body, f), None, xs, *options)[1]


@boundary
def for_loop(
    f: Callable,
    *xs: Any,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    pbar: ProgressBar | int | None = None,
) -> Any:
    """Call ``f`` on each slice of the arguments: a `scan` whose only carry are the States.

    Parameters
    ----------
    f : callable
        ``f(*slices) -> y``; it may read and write States.
    *xs : pytree of arrays
        The arrays to loop over, along axis 0.
    length, reverse, unroll, pbar
        As in `scan`.

    Returns
    -------
    pytree
        The results of all calls, stacked along axis 0.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> h = brainstate.HiddenState(jnp.zeros(2))
    >>> def cell(x):
    ...     h.value = 0.5 * h.value + x
    ...     return h.value.sum()
    >>> brainstate.transform.for_loop(cell, jnp.ones(3)).tolist()
    [2.0, 3.0, 3.5]
    """
    return loop_over_slices("for_loop", f, xs, length, reverse, partial(jax.lax.scan, unroll=unroll), pbar)


@boundary
def while_loop(cond_fun: Callable, body_fun: Callable, init_val: Any) -> Any:
    """Repeat ``body_fun`` while ``cond_fun`` holds: ``jax.lax.while_loop`` that carries States.

    Parameters
    ----------
    cond_fun : callable
        ``cond_fun(val) -> bool``; it may read States, not write them.
    body_fun : callable
        ``body_fun(val) -> val``; it may read and write States.
    init_val : pytree
        The first value.

    Returns
    -------
    pytree
        The last value. Forward-mode derivatives only; see `bounded_while_loop` for reverse mode.

    Raises
    ------
    StateValueError
        If ``cond_fun`` writes a State.
    StateTypeError
        As in `scan`.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> n = brainstate.State(jnp.array(0))
    >>> def halve(x):
    ...     n.value += 1
    ...     return x / 2
    >>> float(brainstate.transform.while_loop(lambda x: x > 1.0, halve, 10.0)), int(n.value)
    (0.625, 4)
    """
    return named_while("while_loop", cond_fun, body_fun, init_val)


def named_while(name: str, cond_fun: Callable, body_fun: Callable, init_val: Any) -> Any:
    """Run a `while_loop` under this name."""
    if jit_disabled():
        return run_in_python(name, jax.lax.while_loop, *_in_python(name, cond_fun, body_fun), init_val)
    condition, body = _while_parts(name, cond_fun, body_fun, init_val)
    start = body.start(False)
    val, values = body.run(lambda: jax.lax.while_loop(condition, body.step, start))
    body.finish(values)
    return val


class _WhileBody(_Body):
    pairs = False

    def step(self, carry):
        """Return the next ``(value, values of the States)``."""
        return self(carry[1], carry[0])


def _while_parts(name, cond_fun, body_fun, init_val):
    """Return the condition and the body as functions of ``(value, values of the written States)``."""
    refuse_states(init_val, f"arguments of {name}")
    body = _WhileBody(name, body_fun, lambda run, init: jax.lax.while_loop(lambda _: False, run, init), init_val)
    with Scope(name, body.values):
        test = probe(f"the condition of {name}", cond_fun, lambda run: jax.lax.while_loop(run, lambda v: v, body.first))
    if test.writes:
        raise StateValueError(
            f"{test.writes[0].describe()} is written in the condition of {name}: a condition may only read States. "
            f"Write it in the body."
        )
    body.close_over(test.reads)
    return (lambda carry: test(body.inputs_from(carry[1]), (carry[0],), {})[0]), body


@boundary
def bounded_while_loop(cond_fun: Callable, body_fun: Callable, init_val: Any, *, max_steps: int, base: int = 16) -> Any:
    """Repeat ``body_fun`` while ``cond_fun`` holds, at most ``max_steps`` times; reverse mode works.

    Nested scans of ``base`` steps, each behind a condition, so that no further step is computed, and each
    rematerialised, so that memory grows with ``base * log(max_steps)``.

    Parameters
    ----------
    cond_fun, body_fun, init_val
        As in `while_loop`.
    max_steps : int
        The bound on the number of iterations.
    base : int
        How many steps a scan has, from 2 up.

    Returns
    -------
    pytree
        The last value.

    Raises
    ------
    StateValueError
        If ``max_steps`` or ``base`` is out of range, or ``cond_fun`` writes a State.

    Examples
    --------
    >>> import brainstate
    >>> halve = lambda x: brainstate.transform.bounded_while_loop(lambda y: y > 1.0, lambda y: y / 2, x, max_steps=20)
    >>> float(halve(10.0)), float(brainstate.transform.grad(halve)(10.0))
    (0.625, 0.0625)
    """
    _check_base("bounded_while_loop", base)
    at_least("bounded_while_loop: max_steps", max_steps, 0, "the largest number of iterations")
    if jit_disabled():
        functions = _in_python("bounded_while_loop", cond_fun, body_fun)
        return run_in_python("bounded_while_loop", _repeat_in_python, *functions, init_val, max_steps)
    condition, body = _while_parts("bounded_while_loop", cond_fun, body_fun, init_val)

    def active(carry):
        return (carry[1] < max_steps) & condition(carry[0])

    def step(carry):
        return body.step(carry[0]), carry[1] + 1

    for _ in range(_levels(max_steps, base) if max_steps else 0):
        step = _repeat_step(step, active, base)
    start = body.start(False)
    (val, values), _ = step((start, jnp.int32(0))) if max_steps else (start, 0)
    body.finish(values)
    return val


def _in_python(name, cond_fun, body_fun):
    return partial(run_in_python, f"the condition of {name}", cond_fun), partial(run_in_python, name, body_fun)


def _repeat_in_python(cond_fun, body_fun, val, max_steps):
    for _ in range(max_steps):
        if not cond_fun(val):
            break
        val = body_fun(val)
    return val


def _levels(count, base):
    """Return how many loops of ``base`` iterations in one another make ``count`` iterations, at least one."""
    levels = 1
    while base**levels < count:
        levels += 1
    return levels


def _repeat_step(step, active, base):
    """Return a function that does ``step`` up to ``base`` times while ``active``."""

    def iterate(carry, _):
        return jax.lax.cond(active(carry), step, lambda c: c, carry), None

    return jax.checkpoint(lambda carry: jax.lax.scan(iterate, carry, length=base)[0])


@boundary
def checkpointed_scan(
    f: Callable,
    init: Any,
    xs: Any = None,
    length: int | None = None,
    *,
    base: int = 16,
    pbar: ProgressBar | int | None = None,
) -> tuple[Any, Any]:
    """Loop as `scan`, with memory for the reverse pass that grows with the logarithm of the length.

    The loop is cut into at most ``base`` parts, each of which is rematerialised and cut again (Griewank and Walther
    2008, "Evaluating Derivatives", chapter 12, with equal parts): the reverse pass keeps ``base * log(length)``
    carries in place of ``length``, and runs the body ``log(length)`` times more often.

    Parameters
    ----------
    f, init, xs, length, pbar
        As in `scan`.
    base : int
        Into how many parts a loop is cut, from 2 up.

    Returns
    -------
    tuple
        The last carry, and the ``y`` of all iterations stacked along axis 0.

    Raises
    ------
    StateValueError
        If ``base`` is out of range; and as `scan`.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> power = lambda x: brainstate.transform.checkpointed_scan(lambda c, _: (c * x, None), 1.0, length=100)[0]
    >>> float(brainstate.transform.grad(power)(1.0))
    100.0
    """
    _check_base("checkpointed_scan", base)
    return named_scan("checkpointed_scan", f, init, xs, length, pbar=pbar, loop=partial(_scan_in_parts, base))


def _scan_in_parts(base, step, carry, xs, length, reverse=False):
    """Scan in up to ``base`` equal parts and a rest, each rematerialised and cut again; only forwards."""
    if length <= base:
        return jax.lax.scan(step, carry, xs, length=length)
    size = base ** (_levels(length, base) - 1)
    parts, rest = divmod(length, size)
    whole = parts * size

    def part(length):
        return jax.checkpoint(lambda carry, xs: _scan_in_parts(base, step, carry, xs, length))

    xs = jax.tree.map(jnp.asarray, xs)
    cut = jax.tree.map(lambda x: x[:whole].reshape(parts, size, *x.shape[1:]), xs)
    carry, ys = jax.lax.scan(part(size), carry, cut, length=parts)
    ys = jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys)
    if not rest:
        return carry, ys
    carry, more = part(rest)(carry, jax.tree.map(lambda x: x[whole:], xs))
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, more)


@boundary
def checkpointed_for_loop(
    f: Callable, *xs: Any, length: int | None = None, base: int = 16, pbar: ProgressBar | int | None = None
) -> Any:
    """Call ``f`` on each slice of the arguments, as `for_loop`, with the memory of `checkpointed_scan`.

    Parameters
    ----------
    f, *xs, length, pbar
        As in `for_loop`.
    base : int
        As in `checkpointed_scan`.

    Returns
    -------
    pytree
        The results of all calls, stacked along axis 0.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> brainstate.transform.checkpointed_for_loop(lambda x: 2 * x, jnp.arange(3.0)).tolist()
    [0.0, 2.0, 4.0]
    """
    _check_base("checkpointed_for_loop", base)
    return loop_over_slices("checkpointed_for_loop", f, xs, length, False, partial(_scan_in_parts, base), pbar)


def _check_base(name, base):
    at_least(f"{name}: base", base, 2, "the number of parts of a loop")
