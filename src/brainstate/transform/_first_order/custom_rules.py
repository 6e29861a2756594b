"""Custom derivative rules for functions that read States.

A rule cannot see the closure of its function, so the States that take part are declared. Their values are the first
argument of the rule, in the container in which they were declared, and their cotangents or tangents have the same
place: JAX sees ``jax.custom_vjp`` of a function of ``(values, *args)``. Without declared States it sees a function of
``args``, and a rule that was written for JAX works unchanged.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ..._copies import Remade
from ..._errors import StateValueError
from ..._functions import boundary, check_function, positional_parameters, signature_of, with_leading
from ..._seam.scope import Scope, gather, is_differentiated, run
from ..._seam.tokens import is_deferred, outside_rule
from .._select_states import select_states
from .._wrapper import or_decorator, resemble
from .pure_function import check_argnums

__all__ = ["CustomJVP", "CustomVJP", "custom_jvp", "custom_vjp"]


class _Ruled(Scope):
    """A scope that refuses to read a differentiated State that is not declared: the rule cannot give its derivative."""

    opaque = True

    def _inherit(self, state):
        if is_differentiated(state):
            raise StateValueError(
                f"{state.describe()} is differentiated and read by a function under {self.name} that does not declare "
                f"it, so the rule cannot give its derivative. Add it to states=, and take its value from the first "
                f"argument of the rule."
            )
        if is_deferred(self.parent):
            raise outside_rule(state)
        return super()._inherit(state)


class _Custom(Remade):
    """Common base of `custom_vjp` and `custom_jvp`: a JAX function whose first argument holds the declared values."""

    name: str
    rule_method: str
    of_jax: Any  # the class of JAX with this name

    def __init__(self, fun, states, nondiff_argnums, nondiff_argnames):
        check_function(f"{self.name} takes a function", fun)
        numbers = _nondiff_positions(self.name, nondiff_argnums, fun)
        self.fun, self.states = fun, states
        if states is not None:
            select_states(states)
            numbers = tuple(n + 1 for n in numbers)  # JAX counts the declared values as argument 0
        # Without declared States, JAX sees the signature of `fun` itself.
        pure = self._guard(fun) if states is None else _with_values(fun, self._pure)
        self._ruled = self.of_jax(pure, nondiff_argnums=numbers, nondiff_argnames=nondiff_argnames)
        self._has_rule = False
        resemble(self, fun)

    def _pure(self, values, *args):
        selection = select_states(self.states)  # the States that a Module has now
        flat = selection.treedef.flatten_up_to(values)
        return self._guard(self.fun, dict(zip(selection.states, flat, strict=True)))(*args)

    def _guard(self, fun, values=None):
        """Return ``fun`` in a scope with these values of the declared States; reads of others and writes are errors."""

        @functools.wraps(fun, updated=())
        def call(*args, **kwargs):
            out, writes = run(_Ruled(self.name, values or {}, frozen=False), fun, *args, **kwargs)
            for state in writes.states:
                raise StateValueError(
                    f"{state.describe()} is written by a function under {self.name}: a rule has no place for writes. "
                    f"Return the value, and assign it outside."
                )
            return out

        return call

    @boundary
    def __call__(self, *args, **kwargs):
        """Call the function; its derivative comes from the rule."""
        if not self._has_rule:
            raise StateValueError(f"no rule is defined yet: call {self.rule_method} of the function first.")
        if self.states is None:
            return self._ruled(*args, **kwargs)
        selection = select_states(self.states)
        return self._ruled(selection.treedef.unflatten(gather(selection.states)), *args, **kwargs)


def _nondiff_positions(name, numbers, fun) -> tuple[int, ...]:
    """Return ``nondiff_argnums`` as a tuple; JAX takes no negative ones."""
    try:
        found = check_argnums(numbers)
    except StateValueError:
        found = None
    found = (found,) if isinstance(found, int) else found
    names, more = positional_parameters(signature_of(fun))
    if found is None or any(n < 0 or (n >= len(names) and not more) for n in found):
        raise StateValueError(
            f"{name}: nondiff_argnums={numbers!r}: give the positions of the arguments that have no derivative, ints "
            f"from 0 up in a tuple, each once and none beyond the arguments of the function."
        )
    return found


def _with_values(fun, pure):
    """Return ``pure`` with a signature, by which JAX resolves keywords: its first argument, then those of ``fun``."""
    renamed: Any = functools.update_wrapper(lambda values, /, *args: pure(values, *args), fun, updated=())
    signature = signature_of(fun)
    if signature is not None:  # a built-in function may have none; then JAX takes positional arguments only
        renamed.__signature__ = with_leading(signature, ["values"])
    return renamed


class CustomVJP(_Custom):
    """A function with its own reverse-mode rule; made by `custom_vjp`."""

    name, rule_method, of_jax = "custom_vjp", "defvjp(fwd, bwd)", jax.custom_vjp

    def defvjp(
        self, fwd: Callable, bwd: Callable, symbolic_zeros: bool = False, optimize_remat: bool = False, **options: Any
    ) -> None:
        """Set the rule, as ``defvjp`` of ``jax.custom_vjp``, which has the same options; see `custom_vjp`."""
        options = {"symbolic_zeros": symbolic_zeros, "optimize_remat": optimize_remat, **options}
        self._ruled.defvjp(self._guard(fwd), self._guard(bwd), **options)
        self._has_rule = True


class CustomJVP(_Custom):
    """A function with its own forward-mode rule; made by `custom_jvp`."""

    name, rule_method, of_jax = "custom_jvp", "defjvp(rule)", jax.custom_jvp

    def defjvp(self, rule: Callable, symbolic_zeros: bool = False) -> Callable:
        """Set the rule, as ``defjvp`` of ``jax.custom_jvp``; see `custom_jvp`. Returns the rule."""
        self._ruled.defjvp(self._guard(rule), symbolic_zeros=symbolic_zeros)
        self._has_rule = True
        return rule

    def defjvps(self, *rules: Callable | None) -> None:
        """Set one rule an argument, ``rule(tangent, out, *args)`` or None for zero, as ``defjvps`` of JAX.

        With States the first rule is for their values, and each rule gets ``(tangent, out, values, *args)``.
        """
        self._ruled.defjvps(*(rule and self._guard(rule) for rule in rules))
        self._has_rule = True


def custom_vjp(
    fun: Callable | None = None,
    nondiff_argnums: Sequence[int] = (),
    nondiff_argnames: Sequence[str] = (),
    *,
    states: Any = None,
) -> Any:
    """Give a function its own reverse-mode rule: ``jax.custom_vjp`` that knows States.

    Without ``states`` the rule is exactly that of ``jax.custom_vjp``. With them it gets their values as well.

    Parameters
    ----------
    fun : callable, optional
        The function; it may read States, not write them. Left out: a decorator is returned.
    nondiff_argnums, nondiff_argnames
        As in ``jax.custom_vjp``: the arguments of ``fun`` that have no derivative.
    states : State, Module, (Module, filter), or pytree of these, optional
        The States whose values the rule receives, and whose derivatives it gives.

    Returns
    -------
    CustomVJP
        The function, with a method ``defvjp(fwd, bwd)``: ``fwd(*args)`` returns ``(out, residuals)`` and
        ``bwd(residuals, cotangent)`` a tuple with the cotangent of each argument. With ``states`` it is
        ``fwd(values, *args)``, and ``bwd`` returns ``(cotangents of the States, *cotangents of args)``, where the
        values and cotangents of the States stand in the container of ``states``.

    Raises
    ------
    StateValueError
        If the function is called without a rule, writes a State, or reads a differentiated one that is not declared.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> f = brainstate.transform.custom_vjp(lambda x: x**2)
    >>> f.defvjp(lambda x: (x**2, x), lambda x, ct: (10.0 * ct * x,))
    >>> float(brainstate.transform.grad(f)(3.0))
    30.0
    >>> w = brainstate.ParamState(jnp.array(2.0))
    >>> @brainstate.transform.custom_vjp(states=w)
    ... def f(x):
    ...     return w.value * x
    >>> f.defvjp(lambda w, x: (w * x, (w, x)), lambda kept, ct: (10.0 * ct * kept[1], ct * kept[0]))
    >>> [float(g) for g in brainstate.transform.grad(f, w, 0)(3.0)]
    [30.0, 2.0]
    """
    return or_decorator(fun, lambda fun: CustomVJP(fun, states, nondiff_argnums, nondiff_argnames))


def custom_jvp(
    fun: Callable | None = None,
    nondiff_argnums: Sequence[int] = (),
    nondiff_argnames: Sequence[str] = (),
    *,
    states: Any = None,
) -> Any:
    """Give a function its own forward-mode rule: ``jax.custom_jvp`` that knows States.

    Without ``states`` the rule is exactly that of ``jax.custom_jvp``. With them it gets their values as well.

    Parameters
    ----------
    fun, nondiff_argnums, nondiff_argnames, states
        As in `custom_vjp`.

    Returns
    -------
    CustomJVP
        The function, with a method ``defjvp(rule)``: ``rule(primals, tangents)`` returns ``(out, tangent)``; both
        arguments are tuples of the arguments, and with ``states`` ``(values of the States, *args)``. ``defjvps`` takes
        one rule an argument, as in JAX.

    Raises
    ------
    StateValueError
        As `custom_vjp`.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> spike = brainstate.transform.custom_jvp(lambda x: (x > 0) * 1.0)
    >>> _ = spike.defjvp(lambda p, t: (spike(*p), t[0] / (1.0 + p[0] ** 2)))
    >>> float(brainstate.transform.grad(spike)(1.0))
    0.5
    >>> w = brainstate.ParamState(jnp.array(2.0))
    >>> f = brainstate.transform.custom_jvp(lambda x: w.value * x, states=w)
    >>> _ = f.defjvp(lambda p, t: (p[0] * p[1], 10.0 * t[0] * p[1] + p[0] * t[1]))
    >>> [float(g) for g in brainstate.transform.grad(f, w, 0)(3.0)]
    [30.0, 2.0]
    """
    return or_decorator(fun, lambda fun: CustomJVP(fun, states, nondiff_argnums, nondiff_argnames))
