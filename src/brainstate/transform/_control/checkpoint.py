"""``checkpoint`` (``remat``): trade memory for computation, for functions that read and write States.

The function runs in a scope of its own inside ``jax.checkpoint``; States that it reads are closed over and the
values that it writes are outputs, so they are committed once however often JAX replays it, and a replay draws the same
random numbers.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import valid_jaxtype

from ..._arrays import combine, partition
from ..._errors import StateTypeError, StateValueError
from ..._functions import Unbound, boundary, check_function, named_after, positional_parameters, signature_of
from ..._seam.scope import Scope, commit, frozen_here, refuse_states, run
from ..._seam.staging import traced_part
from ...filters import to_predicate
from .._wrapper import or_decorator, resemble

__all__ = ["Checkpointed", "checkpoint", "remat", "save_states"]

_NAME = "brainstate.saved"


class _Saving(Scope):
    """A scope that names the values written to the chosen States, so that the policy finds them."""

    def __init__(self, keep, frozen):
        super().__init__("checkpoint", frozen=frozen)
        self.keep = keep

    def write(self, state, value):
        """Keep ``value``, named."""
        if self.keep((), state):
            value = jax.tree.map(lambda leaf: checkpoint_name(leaf, _NAME) if valid_jaxtype(leaf) else leaf, value)
        super().write(state, value)


class save_states:
    """Policy for `checkpoint`: save the values written to these States, recompute all others.

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


class Checkpointed:
    """A function whose intermediate values are computed again in the reverse pass; made by `checkpoint`."""

    def __init__(self, fun, static_argnums, static_argnames, options, keep):
        check_function("checkpoint takes a function", fun)
        self._fun, self._options, self._keep = fun, options, keep
        self._static_argnums, self._static_argnames = static_argnums, static_argnames  # as given
        self._numbers = static_argnums if isinstance(static_argnums, tuple | list) else (static_argnums,)
        names = (static_argnames,) if isinstance(static_argnames, str) else tuple(static_argnames)
        self._names, self._signature = frozenset(names), signature_of(fun)
        self._check()
        resemble(self, fun)

    def _check(self):
        """Complete numbers and names of static arguments from each other, and refuse names without a parameter."""
        known = list(self._signature.parameters.values()) if self._signature else []
        places, self._open = positional_parameters(self._signature)
        for n in self._numbers:
            if not isinstance(n, int) or (not self._open and not -len(places) <= n < len(places)):
                raise self._out_of_range(n, len(places))
        unknown = self._names - {p.name for p in known if p.kind is not p.POSITIONAL_ONLY}
        if unknown and self._signature and not any(p.kind is p.VAR_KEYWORD for p in known):
            given = f"static_argnames={self._static_argnames!r}"
            raise StateValueError(f"checkpoint: {given}: the function has no parameter {sorted(unknown)[0]!r}.")
        self._places = {i for i, name in enumerate(places) if name in self._names}
        self._names |= {places[n] for n in self._numbers if -len(places) <= n < len(places)}

    def _out_of_range(self, n, count) -> StateValueError:
        numbers = f"static_argnums={self._static_argnums!r}"
        return StateValueError(f"checkpoint: {numbers} names argument {n} of {count} positional arguments.")

    def _static_places(self, args):
        """Return the positions of the static arguments of a call."""
        for n in self._numbers:
            if self._open and not -len(args) <= n < len(args):
                raise self._out_of_range(n, len(args))
        return self._places | {n % len(args) for n in self._numbers if -len(args) <= n < len(args)}

    @boundary
    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the function and commit its writes."""
        refuse_states((args, kwargs), "arguments of checkpoint")
        static, fixed = self._static_places(args), {k: v for k, v in kwargs.items() if k in self._names}
        dynamic = [a for i, a in enumerate(args) if i not in static], {k: kwargs[k] for k in kwargs.keys() - fixed}
        (_, rest), frozen = partition(dynamic, valid_jaxtype), frozen_here()

        def pure(*inputs, **named):
            given, named = combine(jax.tree.leaves((inputs, named)), rest)
            given = iter(given)
            given = [a if i in static else next(given) for i, a in enumerate(args)]
            scope = _Saving(self._keep, frozen) if self._keep else Scope("checkpoint", frozen=frozen)
            return run(scope, self._fun, *given, **named, **fixed)

        self._name(pure)
        named = {key: traced_part(arg, valid_jaxtype) for key, arg in dynamic[1].items()}
        replayed = jax.checkpoint(pure, **self._options)
        out, writes = replayed(*(traced_part(arg, valid_jaxtype) for arg in dynamic[0]), **named)
        commit(writes)
        return out

    def _name(self, pure):
        named_after(pure, self._fun)
        if self._signature is not None:
            dynamic = [p for p in self._signature.parameters.values() if p.name not in self._names]
            pure.__signature__ = self._signature.replace(parameters=dynamic)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind as a method; positions count the arguments after ``self``."""
        if instance is None:
            return Unbound(self, owner)
        bound, static = self._fun.__get__(instance, owner), (self._static_argnums, self._static_argnames)
        return type(self)(bound, *static, self._options, self._keep)


def checkpoint(
    fun: Callable | None = None,
    *,
    prevent_cse: bool | tuple = True,
    policy: Any = None,
    static_argnums: int | tuple[int, ...] = (),
    static_argnames: str | tuple[str, ...] = (),
) -> Any:
    """Recompute the intermediate values of ``fun`` in the reverse pass: ``jax.checkpoint`` that knows States.

    Parameters
    ----------
    fun : callable, optional
        The function. Left out: a decorator is returned.
    prevent_cse
        As in ``jax.checkpoint``.
    static_argnums, static_argnames : int or str, or tuple of these
        Arguments that are passed on as they are, like text and other values that are not of JAX's types. As in `jit` a
        position means the parameter, however it is given, and on a method it counts the arguments after ``self``.
    policy : callable or save_states, optional
        Choice of the saved values: one of ``jax.checkpoint_policies``, or `save_states`.

    Returns
    -------
    callable
        The function, with the same results and effects. Each call that is not compiled traces it.

    Raises
    ------
    StateTypeError
        If ``fun`` cannot be called, or ``policy`` is not a policy.
    StateValueError
        If a static argument is named that is not there, or a State is passed or returned.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> f = brainstate.transform.checkpoint(lambda x: jnp.sin(jnp.sin(x)))
    >>> round(float(brainstate.transform.grad(f)(1.0)), 4)
    0.36
    """
    keep = policy.keep if isinstance(policy, save_states) else None
    if isinstance(policy, type) or not (policy is None or keep or callable(policy)):
        raise StateTypeError(
            f"checkpoint: policy={policy!r} is not a policy. Give one of jax.checkpoint_policies, or "
            f"save_states(filter)."
        )
    options = {"prevent_cse": prevent_cse, "policy": policy.policy if isinstance(policy, save_states) else policy}
    return or_decorator(fun, lambda fun: Checkpointed(fun, static_argnums, static_argnames, options, keep))


remat = checkpoint
