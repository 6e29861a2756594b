"""``checkpoint`` (``remat``): trade memory for computation, for functions that read and write States.

The function runs in a scope of its own inside ``jax.checkpoint``; States that it reads are closed over and what
it writes is an output, so writes are committed once however often JAX replays it, and a replay draws the same
random numbers.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import valid_jaxtype

from .._boundary import boundary
from .._errors import StateTypeError, StateValueError
from .._scope import Scope, commit, refuse_states
from ..filters import to_predicate

__all__ = ["checkpoint", "remat", "save_states"]

_NAME = "brainstate.saved"


class _Saving(Scope):
    """A scope that names what is written to the chosen States, so that the policy finds it."""

    def __init__(self, keep):
        super().__init__("checkpoint")
        self.keep = keep

    def write(self, state, value):
        """Keep ``value``, named."""
        if self.keep((), state):
            value = jax.tree.map(lambda leaf: checkpoint_name(leaf, _NAME) if valid_jaxtype(leaf) else leaf, value)
        super().write(state, value)


class save_states:
    """Policy for `checkpoint`: save what is written to these States, recompute all else.

    Parameters
    ----------
    filter : filter
        Which States; anything that `brainstate.util.filter.to_predicate` accepts, such as a type or a tag.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> h = brainstate.HiddenState(jnp.array(1.0))
    >>> def step(x):
    ...     h.value = jnp.sin(h.value * x)
    ...     return jnp.cos(h.value)
    >>> saving = brainstate.transform.save_states(brainstate.HiddenState)
    >>> round(float(brainstate.transform.grad(brainstate.transform.checkpoint(step, policy=saving))(0.5)), 4)
    -0.4048
    """

    def __init__(self, filter: Any):
        self.keep = to_predicate(filter)
        self.policy = jax.checkpoint_policies.save_only_these_names(_NAME)


def checkpoint(
    fun: Callable | None = None,
    *,
    prevent_cse: bool = True,
    policy: Any = None,
    static_argnums: int | tuple[int, ...] = (),
) -> Any:
    """Recompute the intermediate values of ``fun`` in the reverse pass: ``jax.checkpoint`` that knows States.

    Parameters
    ----------
    fun : callable, optional
        The function. Left out: a decorator is returned.
    prevent_cse
        As in ``jax.checkpoint``.
    static_argnums : int or tuple of int
        The positions of arguments that are passed on as they are, like all that is no JAX type (``self`` of a method,
        text).
    policy : callable or save_states, optional
        What to save: one of ``jax.checkpoint_policies``, or `save_states`.

    Returns
    -------
    callable
        The function, with the same results and effects.

    Raises
    ------
    StateTypeError
        If ``fun`` cannot be called, or ``policy`` is no policy.
    StateValueError
        If ``static_argnums`` names an argument that is not there, or a State is passed or returned.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> f = brainstate.transform.checkpoint(lambda x: jnp.sin(jnp.sin(x)))
    >>> round(float(brainstate.transform.grad(f)(1.0)), 4)
    0.36
    """
    if fun is None:
        return functools.partial(checkpoint, prevent_cse=prevent_cse, policy=policy, static_argnums=static_argnums)
    if not callable(fun):
        raise StateTypeError(f"checkpoint takes a function; got {type(fun).__name__}, which cannot be called.")
    keep = policy.keep if isinstance(policy, save_states) else None
    if isinstance(policy, type) or not (policy is None or keep or callable(policy)):
        raise StateTypeError(
            f"checkpoint: policy={policy!r} is no policy. Give one of jax.checkpoint_policies, or save_states(filter)."
        )
    options = {"prevent_cse": prevent_cse, "policy": policy.policy if isinstance(policy, save_states) else policy}

    @boundary
    @functools.wraps(fun)
    def wrapped(*args, **kwargs):
        refuse_states((args, kwargs), "arguments of checkpoint")
        inputs, rebuild = _arrays(args, kwargs, static_argnums)

        def pure(*inputs):
            args, kwargs = rebuild(inputs)
            with _Saving(keep) if keep else Scope("checkpoint") as scope:
                out = fun(*args, **kwargs)
                refuse_states(out, "results of a function under checkpoint")
                return out, scope.close()

        out, writes = jax.checkpoint(pure, **options)(*inputs)
        commit(writes)
        return out

    return wrapped


def _arrays(args, kwargs, static_argnums):
    """Return the leaves to recompute from, and a function that puts others in their places."""
    numbers = static_argnums if isinstance(static_argnums, tuple | list) else (static_argnums,)
    for n in numbers:
        if not -len(args) <= n < len(args):
            raise StateValueError(
                f"checkpoint: static_argnums={static_argnums!r} names argument {n} of {len(args)} positional arguments."
            )
    static = {n % len(args): args[n] for n in numbers}
    leaves, treedef = jax.tree.flatten(([None if i in static else a for i, a in enumerate(args)], kwargs))
    places = [i for i, leaf in enumerate(leaves) if valid_jaxtype(leaf)]

    def rebuild(inputs):
        filled = dict(zip(places, inputs, strict=True))
        args, kwargs = treedef.unflatten([filled.get(i, leaf) for i, leaf in enumerate(leaves)])
        return [static.get(i, a) for i, a in enumerate(args)], kwargs

    return [leaves[i] for i in places], rebuild


remat = checkpoint
