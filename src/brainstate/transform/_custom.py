"""Custom derivative rules, and no derivative at all, for functions that read States.

A rule cannot see what a function closes over, so the States that take part are declared. Their values come to the
rule as its first argument, in the container in which they were declared, and their cotangents or tangents go back
in the same place: what JAX sees is ``jax.custom_vjp`` of a function of ``(values, *args)``.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from .._boundary import boundary, check_function
from .._errors import StateTypeError, StateValueError
from .._scope import Scope, commit, differentiated, gather
from ._choice import chooser
from ._gradient import select

__all__ = ["CustomJVP", "CustomVJP", "custom_jvp", "custom_vjp", "stop_gradient"]


class _Ruled(Scope):
    """A scope that refuses to read a State for which the rule would have to give a derivative and cannot."""

    def _inherit(self, state):
        if differentiated(state):
            raise StateValueError(
                f"{state.describe()} is differentiated and read by a function under {self.name} that does not declare "
                f"it, so the rule cannot give its derivative. Add it to states=, and take its value from the first "
                f"argument of the rule."
            )
        return super()._inherit(state)


class _Custom:
    """What `custom_vjp` and `custom_jvp` share: the declared States as the first argument of a JAX function."""

    name: str
    rule_method: str

    def __init__(self, fun, states, jax_custom, nondiff_argnums):
        check_function(f"{self.name} takes a function", fun)
        self.fun, self.states = fun, states
        if states is not None:
            select(states)
        nondiff = tuple(n + 1 for n in nondiff_argnums)
        self._ruled = jax_custom(self._pure, nondiff_argnums=nondiff)
        self._has_rule = False
        functools.update_wrapper(self, fun, updated=())

    def _pure(self, values, *args):
        if self.states is None:
            return self._guarded(self.fun)(*args)
        selection = select(self.states)
        flat = selection.treedef.flatten_up_to(values)
        return self._guarded(self.fun, dict(zip(selection.states, flat, strict=True)))(*args)

    def _guarded(self, fun, values=None):
        """Return ``fun`` in a scope with these values of the declared States, refusing what no rule can handle."""

        def run(*args):
            with _Ruled(self.name, values or {}) as scope:
                out, writes = fun(*args), scope.close()
            for state in writes.states:
                raise StateValueError(
                    f"{state.describe()} is written by a function under {self.name}: a rule has no place for writes. "
                    f"Return the value, and assign it outside."
                )
            return out

        return run

    @boundary
    def __call__(self, *args):
        """Call the function; its derivative is the rule's."""
        if not self._has_rule:
            raise StateValueError(f"no rule is defined yet: call {self.rule_method} of the function first.")
        if self.states is None:
            return self._ruled(None, *args)
        selection = select(self.states)
        return self._ruled(selection.treedef.unflatten(gather(selection.states)), *args)


class CustomVJP(_Custom):
    """A function with its own reverse-mode rule; made by `custom_vjp`."""

    name, rule_method = "custom_vjp", "defvjp(fwd, bwd)"

    def defvjp(self, fwd: Callable, bwd: Callable) -> None:
        """Set the rule: ``fwd(values, *args) -> (out, residuals)``, ``bwd(residuals, ct) -> (state cts, *arg cts)``."""
        self._ruled.defvjp(self._guarded(fwd), self._guarded(bwd))
        self._has_rule = True


class CustomJVP(_Custom):
    """A function with its own forward-mode rule; made by `custom_jvp`."""

    name, rule_method = "custom_jvp", "defjvp(rule)"

    def defjvp(self, rule: Callable) -> Callable:
        """Set the rule: ``rule((values, *args), tangents of these) -> (out, tangent of out)``."""
        self._ruled.defjvp(self._guarded(rule))
        self._has_rule = True
        return rule


def custom_vjp(fun: Callable | None = None, *, states: Any = None, nondiff_argnums: tuple[int, ...] = ()) -> Any:
    """Give a function that reads States its own reverse-mode rule: ``jax.custom_vjp`` that knows States.

    Parameters
    ----------
    fun : callable, optional
        The function; it may read States, not write them. Left out: a decorator is returned.
    states : State, Module, (Module, filter), or pytree of these, optional
        The States that the rule is about.
    nondiff_argnums : tuple of int
        As in ``jax.custom_vjp``, counting the arguments of ``fun``.

    Returns
    -------
    CustomVJP
        The function, with a method ``defvjp(fwd, bwd)``: ``fwd(values, *args)`` returns ``(out, residuals)`` and
        ``bwd(residuals, cotangent)`` returns ``(cotangents of the States, *cotangents of args)``, where the values
        and cotangents of the States stand in the container of ``states``.

    Raises
    ------
    StateValueError
        If the function is called without a rule, writes a State, or reads a differentiated one that is not declared.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> w = brainstate.ParamState(jnp.array(2.0))
    >>> @brainstate.transform.custom_vjp(states=w)
    ... def f(x):
    ...     return w.value * x
    >>> f.defvjp(lambda w, x: (w * x, (w, x)), lambda kept, ct: (10.0 * ct * kept[1], ct * kept[0]))
    >>> [float(g) for g in brainstate.transform.grad(f, w, 0)(3.0)]
    [30.0, 2.0]
    """
    if fun is None:
        return functools.partial(custom_vjp, states=states, nondiff_argnums=nondiff_argnums)
    return CustomVJP(fun, states, jax.custom_vjp, nondiff_argnums)


def custom_jvp(fun: Callable | None = None, *, states: Any = None, nondiff_argnums: tuple[int, ...] = ()) -> Any:
    """Give a function that reads States its own forward-mode rule: ``jax.custom_jvp`` that knows States.

    Parameters
    ----------
    fun, states, nondiff_argnums
        As in `custom_vjp`.

    Returns
    -------
    CustomJVP
        The function, with a method ``defjvp(rule)``: ``rule(primals, tangents)`` returns ``(out, tangent)``; both
        arguments are ``(values of the States, *args)``.

    Raises
    ------
    StateValueError
        As `custom_vjp`.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> w = brainstate.ParamState(jnp.array(2.0))
    >>> f = brainstate.transform.custom_jvp(lambda x: w.value * x, states=w)
    >>> _ = f.defjvp(lambda p, t: (p[0] * p[1], 10.0 * t[0] * p[1] + p[0] * t[1]))
    >>> [float(g) for g in brainstate.transform.grad(f, w, 0)(3.0)]
    [30.0, 2.0]
    """
    if fun is None:
        return functools.partial(custom_jvp, states=states, nondiff_argnums=nondiff_argnums)
    return CustomJVP(fun, states, jax.custom_jvp, nondiff_argnums)


class _Stopped(Scope):
    """A scope in which the values that chosen States have at its start are constants for derivatives."""

    def __init__(self, chosen):
        super().__init__("stop_gradient")
        self.chosen = chosen

    def _inherit(self, state):
        value = super()._inherit(state)
        return jax.tree.map(jax.lax.stop_gradient, value) if self.chosen(state) else value


def stop_gradient(fun: Callable, states: Any = ...) -> Callable:
    """Let no derivative pass through what a function reads from States.

    Parameters
    ----------
    fun : callable
        The function, such as a Module; it may read and write States.
    states : State, Module, (Module, filter), container of these, or filter
        Which States are constants inside: by default all. A Module stands for all States that it has at the time of
        the call, a pair for those of them that the filter selects then.

    Returns
    -------
    callable
        The function, with the same results and effects. Where a derivative is with respect to such a State, it has an
        entry, and what this function adds to it is zero. A value that the function writes itself has its derivative.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> a, b = brainstate.ParamState(jnp.array(2.0)), brainstate.ParamState(jnp.array(3.0))
    >>> f = brainstate.transform.stop_gradient(lambda x: a.value * b.value * x, a)
    >>> [float(g) for g in brainstate.transform.grad(f, [a, b])(1.0)]
    [0.0, 2.0]
    """
    if not callable(fun):
        raise StateTypeError(f"stop_gradient takes a function; got {type(fun).__name__}, which cannot be called.")
    chooser("stop_gradient", states)  # refuses what it cannot use

    @boundary
    @functools.wraps(fun, updated=())
    def wrapped(*args, **kwargs):
        with _Stopped(chooser("stop_gradient", states)) as scope:
            out, writes = fun(*args, **kwargs), scope.close()
        commit(writes)
        return out

    return wrapped
