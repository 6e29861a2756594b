"""Power series through a traced program: the Taylor coefficients of ``f(x + t v)`` in ``t``.

A value in the program is a `Series`: ``primal + Σ_k terms[k-1] t^k``, or ``terms=None`` where it does not depend on
``t``. An equation takes series to a series; there is one rule for each kind of equation:

1. An equation whose operands are all constant is computed as it is.
2. ``jit`` and rematerialized parts are entered; ``scan``, ``while`` and ``cond`` become the same loop or branch on
   series. (Everything floating in their carry is a series then, perhaps of zeros.)
3. A real primitive with a rule in ``jax.experimental.jet`` follows that rule (Griewank and Walther 2008, "Evaluating
   Derivatives", chapter 13): the cost grows with the square of the order.
4. Everything else, custom derivatives included, is one primitive differentiated by nested ``jvp`` along its series.
   This cost doubles with each order, so there is a bound, `NESTED`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.jet import jet, jet_rules
from jax.extend.core import jaxpr_as_fun

from ..._arrays import differentiable
from ..._errors import StateTypeError, StateValueError
from ..._program.control_flow import Call, Cond, Scan, While, control_flow
from ..._program.interpret import bind, interpret
from ..._program.source_lines import at_line

__all__ = ["NESTED", "Series", "push_series"]

NESTED = 8  # the highest order of nested jvp's
# The rules of jet for these do not take a scalar beside an array. (Those for complex values have gaps as well.)
_UNFIT = {"clamp", "max", "min"}


class Series(NamedTuple):
    """``primal + terms[0] t + terms[1] t² + …``; no ``terms``: a constant."""

    primal: Any
    terms: list | None = None


def push_series(closed, inputs, order) -> list[Series]:
    """Return the series of the results of a program for series of its inputs."""
    return _Rule(order).run(closed, inputs)


class _Rule:
    """The rule of `interpret` for series with ``order`` terms."""

    def __init__(self, order):
        self.order = order

    def run(self, closed, inputs):
        """Return the series of the results of a program."""
        return interpret(closed.jaxpr, map(Series, closed.consts), inputs, self, Series)

    def __call__(self, eqn, inputs):
        with at_line(eqn):
            return self._push(eqn, inputs)

    def _push(self, eqn, inputs):
        name, primals = eqn.primitive.name, [x.primal for x in inputs]
        if name == "stop_gradient" or all(x.terms is None for x in inputs):
            return [Series(out) for out in bind(eqn, primals)]
        match control_flow(eqn):
            case Call(body=body, adds="" | "memory"):
                return self.run(body, inputs)
            case Scan() as loop:
                return self._scan(loop, *loop.split(inputs))
            case While() as loop:
                return self._while(loop, *loop.split(inputs))
            case Cond(branches=branches):
                return self._cond(branches, *inputs)
        if name == "custom_vjp_call":
            raise StateTypeError(
                "taylor: the function calls one with a derivative for reverse mode only (custom_vjp), and a series "
                "goes forward. Give that one a rule with custom_jvp."
            )
        if eqn.primitive in jet_rules and name not in _UNFIT and not any(jnp.iscomplexobj(p) for p in primals):
            return self._by_jet(eqn, inputs)
        return self._by_nested_jvp(eqn, inputs)

    def zeros(self, x):
        """Return ``x`` with terms, zeros where it has none; as it is if its type is not differentiable."""
        if x.terms is not None or not differentiable(x.primal):
            return x
        return Series(x.primal, [jnp.zeros_like(x.primal)] * self.order)

    def _by_jet(self, eqn, inputs):
        moving = [i for i, x in enumerate(inputs) if x.terms is not None]

        def of_moving(*values):
            full = [x.primal for x in inputs]
            for i, value in zip(moving, values, strict=True):
                full[i] = value
            return bind(eqn, full)

        primals, terms = [inputs[i].primal for i in moving], [inputs[i].terms for i in moving]
        # The rules of jet rely on promotion, which the user may have made strict.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            outs, series = jet(of_moving, primals, terms, factorial_scaled=False)
        return [self._result(out, terms) for out, terms in zip(outs, series, strict=True)]

    def _by_nested_jvp(self, eqn, inputs):
        if self.order > NESTED:
            raise StateValueError(
                f"taylor: order={self.order}, and there is no rule for the series of {eqn.primitive.name!r}: nested "
                f"derivatives take its place up to order {NESTED}, as their cost doubles with each order. Choose a "
                f"lower order, or write this part of the function otherwise."
            )
        kept: list = []  # for each result if it is differentiable

        def values_along(t):
            full = [x.primal if x.terms is None else _sum_series(x, t) for x in inputs]
            outs = bind(eqn, full)
            kept[:] = [differentiable(out) for out in outs]
            return [[out for out, keep in zip(outs, kept, strict=True) if keep]]

        t = jnp.zeros((), jnp.result_type(*(_real_dtype(x.primal) for x in inputs if x.terms is not None)))
        derivatives = values_along
        for _ in range(self.order):
            derivatives = _append_derivative(derivatives)
        primals, (_, *rest) = bind(eqn, [x.primal for x in inputs]), derivatives(t)
        scaled = [[d / math.factorial(k) for d in level] for k, level in enumerate(rest, 1)]
        columns = iter(zip(*scaled, strict=True))
        return [
            self._result(out, list(next(columns)) if keep else None) for out, keep in zip(primals, kept, strict=True)
        ]

    def _result(self, out, terms):
        if terms is None or not differentiable(out):
            return Series(out)
        return Series(out, [jnp.asarray(term, jax.typeof(out).dtype) for term in terms])

    def _scan(self, loop, constants, carry, xs):
        def step(carry, xs):
            out = self.run(loop.body, [*constants, *carry, *xs])
            return [self.zeros(x) for x in out[: len(carry)]], out[len(carry) :]

        carry, length = [self.zeros(x) for x in carry], loop.length
        last, ys = jax.lax.scan(step, carry, xs, length=length, reverse=loop.reverse, unroll=loop.unroll)
        return [*last, *ys]

    def _while(self, loop, test_constants, constants, carry):
        def active(carry):
            return jaxpr_as_fun(loop.test)(*(x.primal for x in (*test_constants, *carry)))[0]

        def step(carry):
            return [self.zeros(x) for x in self.run(loop.body, [*constants, *carry])]

        return jax.lax.while_loop(active, step, [self.zeros(x) for x in carry])

    def _cond(self, branches, number, *operands):
        def on_series(branch):
            return lambda *operands: [self.zeros(x) for x in self.run(branch, operands)]

        return jax.lax.switch(number.primal, list(map(on_series, branches)), *operands)


def _real_dtype(x):
    return jnp.finfo(jax.typeof(x).dtype).dtype


def _sum_series(x, t):
    """Return the value of a series at ``t``."""
    t = t.astype(jax.typeof(x.primal).dtype)
    total = jnp.zeros_like(x.primal)
    for term in reversed(x.terms):
        total = (total + term) * t
    return x.primal + total


def _append_derivative(derivatives):
    """Return a function of ``t``: the list that ``derivatives`` returns, and the derivative of its last item."""

    def longer(t):
        found, slopes = jax.jvp(derivatives, (t,), (jnp.ones_like(t),))
        return [*found, slopes[-1]]

    return longer
