"""``hvp`` and ``ggn``: products of a matrix of second derivatives with a vector; the matrix itself is never built.

Each transform is a product ``h(v, *args)`` and, as ``h.operator(*args)``, a `LinearOperator` that is evaluated at
one point and multiplies many vectors. Both have the same three beats as every derivative; here the differentiated
function is itself a derivative of `PureFunction.pure`.

The Hessian of a scalar ``L(w)`` is taken forward over reverse: ``H v`` is the derivative of ``∇L`` along ``v``
(Pearlmutter 1994, "Fast exact multiplication by the Hessian"), so ``∇L`` and ``L`` come out of the same pass.

The generalized Gauss-Newton matrix of ``L(w) = l(f(w))`` leaves out the curvature of ``f`` (Schraudolph 2002, "Fast
curvature matrix-vector products for second-order gradient descent")::

    ∇²L = Jᵀ (∇²l) J + Σᵢ (∂l/∂fᵢ) ∇²fᵢ          J = ∂f/∂w
    G v = Jᵀ (∇²l (J v))                          positive semi-definite where l is convex

``f`` is linearized once; the transpose of that linear map is ``Jᵀ``. `Through` is the base class of all matrices
``Jᵀ C J``; the Fisher matrix is another.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial, keystr, tree_leaves_with_path

from ..._arrays import differentiable, is_real_scalar, layout, scalar_in_words
from ..._copies import Remade
from ..._errors import StateTypeError, StateValueError, a_type
from ..._functions import Unbound, boundary
from ..._seam.packing import Carried
from ..._seam.scope import Scope, commit, run
from .._first_order.pure_function import PureFunction, pick, place, positions
from .._first_order.vector_space import Space
from .._nonfinite.check import DerivativeCheck
from .._wrapper import or_decorator, resemble
from .linear_operator import LinearOperator, operator_check

__all__ = ["Curvature", "Point", "Product", "Through", "ggn", "hvp"]


@dataclass(frozen=True)
class Point:
    """The point of evaluation: the arguments, the differentiated values and their space, the pure function of these."""

    args: tuple
    kwargs: dict
    argnums: Any
    diff: Any
    space: Space
    states: tuple  # the differentiated ones
    pure: Callable


@dataclass(frozen=True)
class Curvature:
    """A curvature at a point: its product with a vector, the gradient (a function, as it may cost), value and aux."""

    product: Callable
    gradient: Callable
    value: Any
    aux: Any


class Product(Remade):
    """A curvature as a function ``h(v, *args)``; subclasses define it in ``_linearize``."""

    name: str

    def __init__(self, fun, grad_states, argnums, *, has_aux, return_value, return_grad, check_states, debug_nan):
        self.fun, self.grad_states, self.argnums = fun, grad_states, argnums
        self.has_aux, self.check_states, self.debug_nan = bool(has_aux), bool(check_states), bool(debug_nan)
        self.return_value, self.return_grad = bool(return_value), bool(return_grad)
        numbers = positions(self.name, grad_states, argnums)
        self._target = PureFunction(
            fun, self.name, grad_states, numbers, has_aux=self.has_aux, keep_value=True, check_states=self.check_states
        )
        resemble(self, fun)

    @boundary
    def __call__(self, v: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Return the product with ``v`` at these arguments, with the other results asked for; commit the writes."""
        check = DerivativeCheck(self._derive_product, repr(self), self._target.inputs)
        return self._arrange(*(check.run(args, kwargs, v) if self.debug_nan else check.call(v, *args, **kwargs)))

    def operator(self, /, *args: Any, **kwargs: Any) -> Any:
        """Return the results of a call, with a `LinearOperator` instead of the product."""
        check = operator_check(self._derive_operator, repr(self), self._target.inputs)
        return self._arrange(*(check.run(args, kwargs) if self.debug_nan else check.call(*args, **kwargs)))

    def _derive_product(self, v, /, *args, **kwargs):
        def multiply(point):
            point.space.check(f"{self.name}: the vector", v)
            return self._multiply(point, v)

        return self._derive(multiply, args, kwargs)

    def _derive_operator(self, /, *args, **kwargs):
        def linearize(point):
            found = self._linearize(point)
            return LinearOperator(found.product, point.space), found

        return self._derive(linearize, args, kwargs)

    def _derive(self, at_point, args, kwargs):
        """Run ``at_point`` at the arguments and the States, commit the writes; return derivatives, value and aux."""

        def derive():
            diff, call, rest = self._target.open(args, kwargs)
            states = () if call.selection is None else call.selection.states
            pure = functools.partial(_of_diff, self._target.pure, call, rest, kwargs)
            first, found = at_point(Point(args, kwargs, call.argnums, diff, Space.from_diff(diff, call), states, pure))
            gradient = (found.gradient(),) if self.return_grad else ()
            return (first, *gradient), found.value, found.aux

        # Model, loss and targets run one after the other in one scope: each sees the writes of those before it.
        result, writes = run(Scope(self.name), derive)
        commit(writes)
        return result

    def _arrange(self, derivatives: tuple, value, aux):
        """Return the result of a call, from its parts."""
        result = [*derivatives, *((value,) if self.return_value else ()), *((aux,) if self.has_aux else ())]
        return tuple(result) if len(result) > 1 else result[0]

    def _linearize(self, point: Point) -> Curvature:
        raise NotImplementedError

    def _multiply(self, point, v):
        found = self._linearize(point)
        return found.product(v), found

    def __repr__(self) -> str:
        return repr(self._target)


def _of_diff(pure, call, rest, kwargs, diff):
    return pure(diff, call, *rest, **kwargs)


def _real_scalar(name, what, value):
    """Return ``value`` if it is one real number; raise an error otherwise."""
    if not is_real_scalar(value):
        raise StateTypeError(
            f"{name}: {what} returns one real number, a loss; its output is {scalar_in_words(value)}. Sum or average "
            f"it, or use hessian for the second derivatives of every output."
        )
    return value


# ------------------------------------------------------------------------------------------ the Hessian


class _Hessian(Product):
    name = "hvp"

    def _gradient(self, point):
        def scalar(diff):
            value, carried = point.pure(diff)
            return _real_scalar(self.name, "the function", value), carried

        return jax.grad(scalar, has_aux=True)

    def _linearize(self, point):
        point.space.require_real(self.name)
        grad, product, carried = jax.linearize(self._gradient(point), point.diff, has_aux=True)
        return _with_gradient(product, grad, carried)

    def _multiply(self, point, v):
        # `jvp` rather than `linearize`: a single product needs no stored residuals.
        grad, product, carried = jax.jvp(self._gradient(point), (point.diff,), (v,), has_aux=True)
        return product, _with_gradient(None, grad, carried)

    def __get__(self, instance, owner=None):
        """Bind as a method: the product of the bound method."""
        if instance is None:
            return Unbound(self, owner)
        options = {"has_aux": self.has_aux, "return_value": self.return_value, "return_grad": self.return_grad}
        options["debug_nan"] = self.debug_nan
        fun = self.fun.__get__(instance, owner)
        return type(self)(fun, self.grad_states, self.argnums, check_states=self.check_states, **options)


def _with_gradient(product, grad, carried):
    value, aux, writes = carried.tree()
    commit(writes)
    return Curvature(product, lambda: grad, value, aux)


def hvp(
    fun: Callable | None = None,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = None,
    *,
    has_aux: bool = False,
    return_value: bool = False,
    return_grad: bool = False,
    check_states: bool = True,
    debug_nan: bool = False,
) -> Any:
    """Product of the Hessian of a scalar function with a vector, by forward over reverse mode.

    Parameters
    ----------
    fun : callable, optional
        The function; it returns a real scalar, or ``(scalar, aux)`` with ``has_aux``. Left out: a decorator is
        returned.
    grad_states, argnums, has_aux, return_value, check_states, debug_nan
        See `GradientTransform`.
    return_grad : bool
        Return the gradient as well, which the same pass computes.

    Returns
    -------
    callable
        ``h(v, *args)``, where ``v`` has the structure of the gradient. It returns the product in that structure, or a
        tuple ``(product[, gradient][, value][, aux])``. ``h.operator(*args)`` returns the same with a
        `LinearOperator` instead of the product. With complex values, the product is the derivative of ``grad``
        along ``v``, linear over the reals, and there is no operator. With ``debug_nan``, every product that the
        operator makes is checked; for that the function runs a second time, abstractly.

    Raises
    ------
    StateTypeError
        At the call, if the output is not a real scalar; and as `GradientTransform`.
    StateValueError
        At the call, if ``v`` has another structure, shape or dtype than the gradient; the message names the leaf.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> w = brainstate.ParamState(jnp.array([1.0, 2.0]))
    >>> h = brainstate.transform.hvp(lambda x: (w.value**3).sum() * x, w, return_grad=True, return_value=True)
    >>> product, gradient, value = h(jnp.array([1.0, 0.0]), 2.0)
    >>> product.tolist(), gradient.tolist(), float(value)
    ([12.0, 0.0], [6.0, 24.0], 18.0)
    """
    options = {"has_aux": has_aux, "return_value": return_value, "return_grad": return_grad}
    options["debug_nan"] = debug_nan
    return or_decorator(fun, lambda f: _Hessian(f, grad_states, argnums, check_states=check_states, **options))


# ------------------------------------------------------------------------------------------ through the output


class Through(Product):
    """A curvature ``Jᵀ C J`` with the Jacobian ``J`` of a model; subclasses give ``C`` at the output in ``_curve``."""

    def _linearize(self, point):
        point.space.require_real(self.name)

        def model(diff):
            out, carried = point.pure(diff)
            self._check_output(out)
            return out, carried

        out, push, carried = jax.linearize(model, point.diff, has_aux=True)
        pull = jax.linear_transpose(push, point.diff)
        _, aux, writes = carried.tree()
        commit(writes)
        # With u = J v the product is Jᵀ (C u), and the gradient is Jᵀ (∂l/∂f).
        curve, slope, value = self._curve(point, out)
        return Curvature(Partial(_sandwich, push, curve, pull), lambda: pull(slope)[0], value, aux)

    def _check_output(self, out):
        for path, leaf in tree_leaves_with_path(out):
            if not differentiable(leaf) or jnp.issubdtype(jax.typeof(leaf).dtype, jnp.complexfloating):
                raise StateTypeError(
                    f"{self.name}: output{keystr(path)} of the model is {layout(leaf)}, and every output is real and "
                    f"floating. Return the rest as aux, with has_aux=True."
                )

    def _curve(self, point: Point, out: Any) -> tuple:
        """Return the product with ``C`` at the output, the gradient of the loss there and the loss."""
        raise NotImplementedError


def _sandwich(push, curve, pull, v):
    return pull(curve(push(v)))[0]


class _OfOutput(Scope):
    """The scope of a loss of the output. It refuses differentiated States: ``Jᵀ C J`` has no term for such a read."""

    opaque = True

    def __init__(self, name, refused):
        super().__init__(name)
        self.refused = refused

    def _inherit(self, state):
        if state in self.refused:
            raise StateValueError(
                f"{state.describe()} is differentiated and read by the loss of {self.name}: the product has no term "
                f"for that. Let the model return the value that the loss needs, or add that term's own curvature (hvp)."
            )
        return super()._inherit(state)


@jax.custom_vjp
def _not_differentiated(x):
    """Return ``x``; its derivative is an error. Reverse mode asks for it only where the loss depends on ``x``."""
    return x


def _refuse_derivative(_, cotangent):
    raise StateValueError(
        "the loss of ggn depends on an argument that is differentiated, and the product has no term for that. Let the "
        "model return the value that the loss needs, or pass it a second time, as an argument that argnums does not "
        "name."
    )


_not_differentiated.defvjp(lambda x: (x, None), _refuse_derivative)


class _GaussNewton(Through):
    name = "ggn"

    def __init__(self, model_fn, loss_fn, grad_states, argnums, **options):
        if not callable(loss_fn):
            raise StateTypeError(f"ggn: loss_fn is {a_type(loss_fn)}, which cannot be called.")
        self.loss_fn = loss_fn
        super().__init__(model_fn, grad_states, argnums, **options)

    def _curve(self, point, out):
        picked, rest = (None, point.args) if point.argnums is None else pick(point.args, point.argnums)

        def loss(out, picked):
            args = place(rest, point.argnums, jax.tree.map(_not_differentiated, picked))
            value, writes = run(_OfOutput(self.name, point.states), self.loss_fn, out, *args, **point.kwargs)
            return _real_scalar(self.name, "loss_fn", value), Carried.pack((value, writes))

        def slope_at(out):
            (slope, _), carried = jax.grad(loss, argnums=(0, 1), has_aux=True)(out, picked)
            return slope, carried

        # Of the gradient ∇l at the output: its value is the slope, its derivative the product with C = ∇²l.
        slope, curve, carried = jax.linearize(slope_at, out, has_aux=True)
        value, writes = carried.tree()
        commit(writes)
        return curve, slope, value


def ggn(
    model_fn: Callable,
    loss_fn: Callable,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = None,
    *,
    has_aux: bool = False,
    return_value: bool = False,
    return_grad: bool = False,
    check_states: bool = True,
    debug_nan: bool = False,
) -> Any:
    """Product of the generalized Gauss-Newton matrix of a loss of a model's output with a vector.

    Parameters
    ----------
    model_fn : callable
        The model; ``model_fn(*args)`` returns a pytree of real arrays, or ``(output, aux)`` with ``has_aux``.
    loss_fn : callable
        ``loss_fn(output, *args)`` returns a real scalar. The matrix is positive semi-definite if the loss is convex in
        the output. It may depend on the differentiated values through the output only.
    grad_states, argnums, check_states, debug_nan
        See `GradientTransform`; they are about ``model_fn``. For ``debug_nan`` and operators see `hvp`.
    has_aux, return_value, return_grad : bool
        Return the aux of ``model_fn``, the loss, and its gradient as well.

    Returns
    -------
    callable
        As by `hvp`: ``g(v, *args)`` returns ``(product[, gradient][, loss][, aux])``, and so does ``g.operator(*args)``
        with an operator instead of the product.

    Raises
    ------
    StateTypeError
        At the call, if the output of the model is not real, or the loss is not a real scalar; and as
        `GradientTransform`.
    StateValueError
        At the call, for a vector unlike the gradient, or a loss that reads one of ``grad_states`` or depends on an
        argument of ``argnums``.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> w = brainstate.ParamState(jnp.array([1.0, 2.0]))
    >>> model, loss = lambda x, y: jnp.tanh(x @ w.value), lambda out, x, y: ((out - y) ** 2).sum()
    >>> x, y = jnp.array([[0.5, 0.0], [0.0, 0.0]]), jnp.array([1.0, 0.0])
    >>> g = brainstate.transform.ggn(model, loss, w).operator(x, y)
    >>> [[round(float(entry), 4) for entry in row] for row in g.dense()]
    [[0.3092, 0.0], [0.0, 0.0]]
    """
    options = {"has_aux": has_aux, "return_value": return_value, "return_grad": return_grad, "debug_nan": debug_nan}
    return _GaussNewton(model_fn, loss_fn, grad_states, argnums, check_states=check_states, **options)
