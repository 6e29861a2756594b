"""``functional`` and ``substituted``: a function of States as a pure function, and a block that runs on other values.

Both open a scope whose values come from the caller, and all code inside sees them: transforms of this package, code
compiled by it, and JAX's own transforms. Writes to these States are a result (`functional`) or are dropped
(`substituted`); the States themselves keep their values.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jax.extend.core import valid_jaxtype

from ..._errors import StateTypeError, StateValueError
from ..._functions import named_after
from ..._seam.packing import Writes
from ..._seam.scope import Scope, commit, gather, refuse_states, run
from ..._seam.staging import stage
from ..._state import State
from .._select_states import select_states

__all__ = ["functional", "substituted"]


def _values_by_state(name, selection, values) -> dict:
    """Return {State: value} for ``values`` in the structure of the selected container."""
    try:
        flat = selection.treedef.flatten_up_to(values)
    except (TypeError, ValueError) as error:
        raise StateValueError(
            f"{name}: the values must have the structure of the States, {selection.treedef}: {error}"
        ) from None
    refuse_states(flat, f"values of {name}")
    return dict(zip(selection.states, flat, strict=True))


def functional(f: Callable, states: Any = None, /, *args: Any, **kwargs: Any) -> tuple[Callable, Any]:
    """Return a function with States as a pure function of their values, and the present values.

    Parameters
    ----------
    f : callable
        The function; it may read and write States.
    states : State, Module, (Module, filter), or pytree of these, optional
        The States whose values go in and out, in this container. A Module stands for all its States by path. Left out:
        all States that ``f`` reads or writes with the example arguments, in a tuple in the order of their first use; it
        is staged once for that, and no State changes.
    *args, **kwargs
        Example arguments, if ``states`` is left out.

    Returns
    -------
    pure : callable
        ``pure(values, *args, **kwargs)`` returns ``(out, new_values)`` and changes no State. It may be used in any
        transform, ``jax.jit``, ``jax.grad``, ``jax.vmap``, ``jax.lax.scan`` and solvers included.
    values : pytree
        The present values, in the structure of ``states``.

    Raises
    ------
    StateValueError
        If values of another structure are given, or ``f`` writes or creates a State that is not among ``states``.
        Its value would be lost.
    StateTypeError
        If there is nothing to select, or an object other than a State among ``states``.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, brainstate
    >>> w, count = brainstate.ParamState(jnp.array(2.0)), brainstate.State(0)
    >>> def loss(x):
    ...     count.value += 1
    ...     return (w.value * x) ** 2
    >>> pure, values = brainstate.transform.functional(loss, {"w": w, "count": count})
    >>> (slope, new) = jax.grad(lambda w: pure({**values, "w": w}, 3.0), has_aux=True)(values["w"])
    >>> float(slope), int(new["count"]), count.value
    (36.0, 1, 0)
    """
    name = "functional"
    if not callable(f):
        raise StateTypeError(f"{name} takes a function; got {type(f).__name__}, which cannot be called.")
    if states is None:
        refuse_states((args, kwargs), f"arguments of {name}")
        staged = stage(f, args, kwargs, name=name, dynamic=valid_jaxtype)
        # A State that the function creates is not an input: it belongs to the call that created it.
        born = set(staged.born)
        selection = select_states(tuple(state for state in staged.used if state not in born), "states", State)
    elif args or kwargs:
        raise StateTypeError(f"{name}: example arguments are for finding the States; here `states` says which.")
    else:
        selection = select_states(states, "states", State)

    def pure(values, /, *args, **kwargs):
        given = _values_by_state(name, selection, values)
        refuse_states((args, kwargs), f"arguments of a function made by {name}")
        out, writes = run(Scope(name, given), f, *args, **kwargs)
        new = dict(zip(writes.states, writes.values, strict=True))
        lost = [state.describe() for state in new if state not in given]
        if lost:
            raise StateValueError(
                f"{name}: the function writes or creates {', '.join(lost)}, not among `states`: the value would be "
                f"lost. Add it to `states`, or make it outside."
            )
        return out, selection.treedef.unflatten([new.get(state, value) for state, value in given.items()])

    return named_after(pure, f), selection.treedef.unflatten(gather(selection.states))


@contextmanager
def substituted(states: Any, values: Any) -> Iterator[None]:
    """Run a ``with`` block with other values of some States; afterwards they have their own values again.

    Parameters
    ----------
    states : State, Module, (Module, filter), or pytree of these
        The States, as in `functional`.
    values : pytree
        Their values in the block, in the same structure. They may be traced, and of other types.

    Notes
    -----
    Writes of the block to these States are visible in the block only; its writes to other States stay. If it raises, no
    State changes. Other threads see none of this.

    Raises
    ------
    StateValueError
        If the values have another structure.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, brainstate
    >>> from brainstate.transform import grad, substituted
    >>> w = brainstate.ParamState(jnp.array(2.0))
    >>> loss = lambda: (w.value - 1.0) ** 2
    >>> def after_a_step():  # the loss after one step of gradient descent, as in MAML
    ...     with substituted(w, w.value - 0.1 * grad(loss, w)()):
    ...         return loss()
    >>> round(float(grad(after_a_step, w)()), 6), float(w.value)
    (1.28, 2.0)
    """
    given = _values_by_state("substituted", select_states(states, "states", State), values)
    with Scope("substituted", given) as scope:
        yield
        writes = scope.close()
    kept = [(state, value) for state, value in zip(writes.states, writes.values, strict=True) if state not in given]
    commit(Writes(tuple(state for state, _ in kept), [value for _, value in kept]))
