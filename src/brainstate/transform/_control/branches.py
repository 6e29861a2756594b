"""Branches: ``cond``, ``switch`` and ``ifelse`` whose branches read and write States.

Each branch is staged once. Every branch returns the values of all States that any branch writes: one that does
not write a State hands its present value through, so branches may write different States.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import valid_jaxtype

from ..._arrays import layout
from ..._compat import jit_disabled
from ..._errors import StateTypeError, StateValueError, a_type
from ..._functions import boundary, named_after
from ..._seam.packing import Writes
from ..._seam.scope import commit, gather, is_tracer, refuse_states
from .loops import agree, device_axes, layouts, probe, run_in_python, spread, types_of

__all__ = ["cond", "ifelse", "switch"]


def _functions(name, branches):
    try:
        return tuple(branches)
    except TypeError:
        raise StateTypeError(f"{name}: branches is {a_type(branches)}: give a list or tuple of functions.") from None


def _check_pred(what, pred):
    """Refuse a condition that is not a scalar, or neither true nor false."""
    if not valid_jaxtype(pred) or jnp.ndim(pred) != 0:
        raise StateTypeError(
            f"{what} is {layout(pred)}, a scalar is needed. Reduce it with .any() or .all(), or use vmap."
        )
    dtype = jax.typeof(pred).dtype
    if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating)):
        raise StateTypeError(f"{what} is {layout(pred)}, which is neither true nor false. Compare it.")
    if jnp.issubdtype(dtype, jnp.floating) and not is_tracer(pred) and pred != pred:
        raise StateValueError(f"{what} is NaN, which is neither true nor false. Compare it, or test it with jnp.isnan.")


def _branches(name, branches, operands):
    """Return the branches as pure functions of the operands, and a function that commits their writes."""
    refuse_states(operands, f"arguments of {name}")
    staged = [probe(name, b, lambda run: jax.lax.cond(True, run, run, *operands)) for b in branches]
    written = tuple(dict.fromkeys(s for one in staged for s in one.writes))
    _check_results(name, staged)
    kept = [s for s in written if _is_partial(s, staged)]
    used = list(dict.fromkeys([s for one in staged for s in one.reads] + kept))
    given = dict(zip(used, gather(used), strict=True))
    for state in written:
        _check_types(name, state, staged, given)

    def pure(fun, one):
        def run(*operands):
            out, writes = one(given, operands, {})
            table = dict(zip(writes.states, writes.values, strict=True))
            return out, [table[s] if s in table else given[s] for s in written]

        return named_after(run, fun, same_arguments=True)

    def finish(result):
        out, values = result
        commit(Writes(written, values))
        return out

    return [pure(fun, one) for fun, one in zip(branches, staged, strict=True)], finish


def _is_partial(state, staged):
    return not all(state in one.writes for one in staged)


def _check_types(name, state, staged, given):
    """Refuse a State whose value differs in kind between the branches."""
    kinds = [(f"after branch {i}", one.written_types[state]) for i, one in enumerate(staged) if state in one.writes]
    if state in given and _is_partial(state, staged):
        kinds.append(("where no branch writes it", types_of(given[state])))
    _check_same(kinds, f"{state.describe()} is", f"all branches of {name} leave a State with")


def _check_results(name, staged):
    kinds = [(f"from branch {i}", one.result_types) for i, one in enumerate(staged)]
    _check_same(kinds, f"{name} returns", "all branches return")


def _check_same(kinds, what, rule):
    where, first = kinds[0]
    for elsewhere, other in kinds[1:]:
        if not agree(first, other):
            raise StateTypeError(
                f"{what} {layouts(first)} {where} and {layouts(other)} {elsewhere}: {rule} the same structure, shapes "
                f"and dtypes. Cast the parts that differ."
            )
        if device_axes(first) != device_axes(other):
            raise StateTypeError(
                f"{what} a value that {spread(first)} {where}, and one that {spread(other)} {elsewhere}. Reduce the "
                f"one that differs by jax.lax.psum or pmean, or make both differ by jax.lax.pcast(..., to='varying')."
            )


@boundary
def cond(pred: Any, true_fun: Callable, false_fun: Callable, *operands: Any) -> Any:
    """Call one of two functions: ``jax.lax.cond`` for branches that read and write States.

    Parameters
    ----------
    pred : bool, number, or scalar array
        Which one; a number is true unless zero.
    true_fun, false_fun : callable
        Functions of the operands with results of the same structure, shapes and dtypes. They may write different
        States.
    *operands : pytree
        The arguments.

    Returns
    -------
    pytree
        The result of the function that was called.

    Raises
    ------
    StateTypeError
        If ``pred`` is not a scalar, or complex, or the branches leave a State or return results of different kinds.
    StateValueError
        If ``pred`` is NaN, as far as its value is known, or a State created in a branch outlives it.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> ups = brainstate.State(jnp.array(0))
    >>> def up(x):
    ...     ups.value += 1
    ...     return x + 1.0
    >>> float(brainstate.transform.cond(True, up, lambda x: x - 1.0, 2.0)), int(ups.value)
    (3.0, 1)
    """
    _check_pred("cond: pred", pred)
    if jit_disabled() and not is_tracer(pred):
        return run_in_python("cond", true_fun if pred else false_fun, *operands)
    (yes, no), finish = _branches("cond", (true_fun, false_fun), operands)
    return finish(jax.lax.cond(jnp.asarray(pred).astype(bool), yes, no, *operands))


@boundary
def switch(index: Any, branches: Sequence[Callable], *operands: Any) -> Any:
    """Call one of several functions: ``jax.lax.switch`` for branches that read and write States.

    Parameters
    ----------
    index : int scalar
        Which one, clamped to the range of ``branches``.
    branches : sequence of callable
        As the two of `cond`. A single one is called directly.
    *operands : pytree
        The arguments.

    Returns
    -------
    pytree
        The result of the branch that was called.

    Raises
    ------
    StateValueError
        If there is no branch; and as `cond`.

    Examples
    --------
    >>> import brainstate
    >>> int(brainstate.transform.switch(5, [lambda x: x, lambda x: 10 * x], 3))
    30
    """
    branches = _functions("switch", branches)
    if not branches:
        raise StateValueError("switch: branches is empty, give at least one function.")
    if not valid_jaxtype(index) or jnp.ndim(index) != 0 or not jnp.issubdtype(jax.typeof(index).dtype, jnp.integer):
        raise StateTypeError(f"switch: index is {layout(index)}, an integer scalar is needed.")
    if len(branches) == 1:
        return run_in_python("switch", branches[0], *operands)
    if jit_disabled() and not is_tracer(index):
        return run_in_python("switch", branches[int(np.clip(index, 0, len(branches) - 1))], *operands)
    pure, finish = _branches("switch", branches, operands)
    return finish(jax.lax.switch(index, pure, *operands))


@boundary
def ifelse(conditions: Sequence[Any], branches: Sequence[Callable], *operands: Any, check_cond: bool = True) -> Any:
    """Call the function whose condition is true, of conditions that exclude each other.

    Parameters
    ----------
    conditions : sequence of bool scalars
        One for each branch, of which exactly one is true. The last may be True to mean "else": it then counts only
        if no other is true.
    branches : sequence of callable
        As the two of `cond`.
    *operands : pytree
        The arguments.
    check_cond : bool
        Whether conditions none or several of which are true are an error; when compiled, at run time. Without the
        check the first true condition counts, or the last branch.

    Returns
    -------
    pytree
        The result of the branch that was called.

    Raises
    ------
    StateValueError
        If numbers of conditions and branches differ, or not exactly one condition is true.

    Examples
    --------
    >>> import brainstate
    >>> sign = lambda x: brainstate.transform.ifelse([x < 0, x == 0, x > 0], [lambda: -1, lambda: 0, lambda: 1])
    >>> int(sign(-2.0)), int(sign(0.0)), int(sign(3.0))
    (-1, 0, 1)
    """
    conditions, branches = list(conditions), _functions("ifelse", branches)
    if len(conditions) != len(branches) or not branches:
        raise StateValueError(f"ifelse: {len(conditions)} conditions and {len(branches)} branches: give one for each.")
    for i, c in enumerate(conditions):
        _check_pred(f"ifelse: condition {i}", c)
    otherwise = conditions[-1] is True
    flags = jnp.stack([jnp.asarray(c).astype(bool) for c in conditions])
    if otherwise:
        flags = flags.at[-1].set(~flags[:-1].any())
    if check_cond and is_tracer(flags):
        jax.debug.callback(_exactly_one, flags)
    elif check_cond:
        _exactly_one(flags)
    return switch(jnp.where(flags.any(), jnp.argmax(flags), len(branches) - 1), branches, *operands)


def _exactly_one(flags):
    if np.sum(flags) != 1:
        raise StateValueError(f"ifelse: the conditions are {np.asarray(flags).tolist()}: exactly one has to be true.")
