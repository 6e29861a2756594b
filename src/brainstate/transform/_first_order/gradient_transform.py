"""One class does the state handling of every derivative; the derivative itself is an argument.

``GradientTransform`` turns a function that reads and writes States into a pure one, hands it to a JAX transform
and gives the result the structure of the table in `GradientTransform`. The code has no such table of cases: the
differentiated values are packed into *one* pytree that already has the wanted structure ``G``, and JAX, asked for
``argnums=0``, returns its derivative in that structure, whatever the transform (a Hessian gives ``G`` of ``G``).

The three beats: `PureFunction.open` reads the States and packs ``G``; JAX differentiates `PureFunction.pure`; the
written values come back beside the derivative and are committed once.

Only the inexact leaves of a State are differentiated. For another leaf (an integer, a key) the packed tree, and so
the gradient, holds ``None``.
"""

from collections.abc import Callable
from typing import Any

from ..._copies import Remade
from ..._errors import StateTypeError, StateValueError, a_type
from ..._functions import Unbound, boundary
from ..._seam.packing import Carried
from ..._seam.scope import commit
from .._nonfinite.check import DerivativeCheck
from .._wrapper import resemble
from .pure_function import PureFunction, check_argnums

__all__ = ["GradientTransform"]


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
        The States to differentiate. A Module stands for its ParamStates at the time of the call, a pair for those of
        them that the filter selects then: ``(model, Not("frozen"))`` leaves out States with this tag, which have no
        entry in the result. A State with two names in the Module goes by the first, and has one gradient: the sum.
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
        Raise an error if the derivative or a scalar value holds NaN or infinities, or any other result holds NaN. The
        error names the line of the first operation that made it, forward or backward, in loops and branches too.
        Outside of other transforms the function runs a second time to find it; inside, it is traced, without Python
        control flow on values, and the check is made at run time. Costs nothing if False.
    name : str, optional
        The name of the derivative in messages; by default that of ``transform``.

    Raises
    ------
    NonFiniteError
        With ``debug_nan`` only, and also out of `jit`; under a raw JAX transform, and out of loops, maps and other
        derivatives that are not compiled, JAX raises an error of its own that ends in the same text.
    StateTypeError, StateValueError
        When built, for unusable arguments; when called, for faults that only a call shows. No State has changed then.

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
        name: str | None = None,
    ):
        numbers = check_argnums(argnums)
        self.target, self.transform, self.grad_states, self.argnums = target, transform, grad_states, numbers
        self.return_value, self.has_aux = bool(return_value), bool(has_aux)
        self.check_states, self.debug_nan = bool(check_states), bool(debug_nan)
        self.transform_params = dict(transform_params or {})
        if grad_states is None:
            numbers = 0 if numbers is None else numbers
            if numbers == ():
                raise StateValueError("argnums=() and no grad_states: there is nothing to differentiate.")
        if not callable(transform):
            raise StateTypeError(f"the transform is {a_type(transform)}, which cannot be called.")
        self._name = getattr(transform, "__name__", type(transform).__name__) if name is None else name
        self._pure = PureFunction(
            target,
            self._name,
            grad_states,
            numbers,
            has_aux=self.has_aux,
            keep_value=self.return_value or self.debug_nan,
            check_states=self.check_states,
            allow_int=self.transform_params.get("allow_int", False),
        )
        # Argument 0 of `pure` holds all differentiated values, of States and arguments.
        self._derivative = transform(self._pure.pure, argnums=0, has_aux=True, **self.transform_params)
        resemble(self, target)

    @boundary
    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Return the derivative in the structure of the table; commit the writes of the function."""
        return self.arrange(*self.parts(*args, **kwargs))

    def parts(self, /, *args: Any, **kwargs: Any) -> tuple:
        """Return ``(derivative, value, aux)``, None for each not asked for; commit the writes of the function."""
        if self.debug_nan:
            return DerivativeCheck(self._parts, repr(self), self._pure.inputs).run(args, kwargs)
        return self._parts(*args, **kwargs)

    def _parts(self, /, *args, **kwargs):
        diff, call, rest = self._pure.open(args, kwargs)
        out = self._derivative(diff, call, *rest, **kwargs)
        # A custom transform that loses the aux would lose the writes of the function with it.
        if not (isinstance(out, tuple | list) and len(out) == 2 and isinstance(out[1], Carried)):
            raise StateTypeError(
                f"the transform {self._pure.name} returned {type(out).__name__} instead of (derivative, aux): it is "
                f"called with has_aux=True and has to pass the aux that its function returns on untouched."
            )
        value, aux, writes = out[1].tree()
        commit(writes)
        return out[0], value, aux

    def arrange(self, derivative: Any, value: Any, aux: Any) -> Any:
        """Return the result of a call, from its parts."""
        result = (derivative, *((value,) if self.return_value else ()), *((aux,) if self.has_aux else ()))
        return result if len(result) > 1 else derivative

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind as a method: the derivative of the bound method."""
        if instance is None:
            return Unbound(self, owner)
        make, (_, *options) = self._recipe()
        return make(self.target.__get__(instance, owner), *options)

    def _recipe(self) -> tuple[Any, tuple]:
        selected, wanted = (self.grad_states, self.argnums), (self.return_value, self.has_aux)
        checks = self.check_states, self.debug_nan
        return type(self), (self.target, self.transform, *selected, *wanted, self.transform_params, *checks, self._name)

    def __repr__(self) -> str:
        return repr(self._pure)
