"""The norm of a gradient without computing the gradient, for weights of linear layers.

Let a weight ``W`` be used once, in a product ``y = x W`` with ``T`` rows (the steps of a sequence, say), and let ``g``
be the cotangent of ``y``. The gradient is ``xᵀ g``, and its squared norm::

    |xᵀ g|² = Σ_cf (Σ_t x_tc g_tf)² = Σ_ts (Σ_c x_tc x_sc) (Σ_f g_tf g_sf) = Σ_ts (x xᵀ)_ts (g gᵀ)_ts

which needs two matrices of ``T²`` entries instead of one of the size of ``W``; for a single row it is
``|x|² |g|²`` (Goodfellow 2015, "Efficient per-example gradient computations"; Li et al. 2022, "Large language models
can be strong differentially private learners"). To get the cotangent ``g``, a zero is added to ``y``, and reverse mode
differentiates with respect to this zero.

The traced program shows the weights with such a product: those that are used exactly once, in a real ``dot_general``,
after at most reshaping, transposing or casting. The formula is used if ``2 T² < size of W``. For every other leaf (a
bias, a tied weight, one in a loop or a convolution) the gradient is computed, and then its norm.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from ..._arrays import is_real_scalar, scalar_in_words
from ..._errors import StateTypeError
from ..._program.control_flow import inline_calls
from ..._program.interpret import bind, interpret, trace_flat
from ..._program.source_lines import at_line

__all__ = ["check_loss", "norms_transform"]

_SAME_ENTRIES = {"reshape", "transpose", "squeeze", "copy", "convert_element_type"}


class _Product(NamedTuple):
    """An equation ``x · W`` or ``W · x``, and the layout of the axes of ``x`` and of the result."""

    eqn: Any
    weight: int  # which operand is W
    order: tuple[int, ...]  # the axes of x: batch, rows, contracted
    batch: int
    rows: int
    contracted: int
    free: int  # the size of the axes of the result that come from W

    def squared_norm(self, factors, g, dtype):
        """Return the squared norm of the gradient of W, from the operands and the cotangent ``g`` of the result."""
        x = jnp.transpose(factors[1 - self.weight], self.order)
        x = x.reshape(self.batch, self.rows, self.contracted).astype(dtype)
        g = g.reshape((self.batch, self.rows, self.free) if self.weight else (self.batch, self.free, self.rows))
        g = (g if self.weight else jnp.swapaxes(g, 1, 2)).astype(dtype)
        if self.rows == 1:
            return ((x**2).sum((1, 2)) * (g**2).sum((1, 2))).sum()
        # Where large terms cancel, rounding may leave a negative number.
        return jnp.maximum((_gram(x) * _gram(g)).sum(), 0)


def _gram(rows):
    return jnp.einsum("bti,bsi->bts", rows, rows, precision=jax.lax.Precision.HIGHEST)


def _product(eqn, weight):
    """Return an equation as a `_Product`, or None if the norm does not cost less than the derivative."""
    avals = [v.aval for v in eqn.invars]
    if not all(jnp.issubdtype(a.dtype, jnp.floating) for a in (*avals, eqn.outvars[0].aval)):
        return None
    contracting, batch = eqn.params["dimension_numbers"]
    shape, over, along = avals[1 - weight].shape, contracting[1 - weight], batch[1 - weight]
    rows = [i for i in range(len(shape)) if i not in (*over, *along)]
    used = {*contracting[weight], *batch[weight]}
    free = [n for i, n in enumerate(avals[weight].shape) if i not in used]

    def size(axes):
        return int(np.prod([shape[i] for i in axes]))

    t = size(rows)
    found = _Product(eqn, weight, (*along, *rows, *over), size(along), t, size(over), int(np.prod(free)))
    return found if 2 * t * t < found.contracted * found.free else None


def _find_products(jaxpr):
    """Return {number of an input: `_Product` with this input as the weight}."""
    uses: dict[Any, list] = {}
    for eqn, atoms in [*((eqn, eqn.invars) for eqn in jaxpr.eqns), (None, jaxpr.outvars)]:
        for place, atom in enumerate(atoms):
            if not isinstance(atom, Literal):
                uses.setdefault(atom, []).append((eqn, place))
    found = {number: _only_product(var, uses) for number, var in enumerate(jaxpr.invars)}
    return {number: product for number, product in found.items() if product is not None}


def _only_product(var, uses):
    """Return the `_Product` that is the only use of ``var``, or None if it has others."""
    while len(uses.get(var, ())) == 1 and jnp.issubdtype(var.aval.dtype, jnp.floating):
        eqn, place = uses[var][0]
        if eqn is None or eqn.primitive.name not in _SAME_ENTRIES:
            return _product(eqn, place) if eqn is not None and eqn.primitive.name == "dot_general" else None
        var = eqn.outvars[0]
    return None


def norms_transform(fun, *, argnums, has_aux, per_leaf, name):
    """Return the norm of the gradient, as a transform for `GradientTransform`; with ``per_leaf``, that of each leaf."""
    del argnums, has_aux  # argument 0 with aux, by the contract of GradientTransform

    def gradient_norm(diff, /, *rest, **kwargs):
        leaves, treedef = jax.tree.flatten(diff)

        def one(leaves):
            value, aux = fun(treedef.unflatten(leaves), *rest, **kwargs)
            check_loss(name, value)
            return value, aux

        closed, out_tree = trace_flat(one, leaves)
        closed = inline_calls(closed, leaves)
        products = _find_products(closed.jaxpr)
        # {equation: type of its result}, by equation since both factors of one may be weights.
        points = {id(p.eqn): p.eqn.outvars[0].aval for p in products.values()}
        others = [i for i in range(len(leaves)) if i not in products]

        def shifted_value(zeros, moved):
            inputs, factors = list(leaves), {}
            for i, leaf in zip(others, moved, strict=True):
                inputs[i] = leaf

            def rule(eqn, values):
                with at_line(eqn):
                    if id(eqn) not in zeros:
                        return bind(eqn, values)
                    factors[id(eqn)] = values
                    return [bind(eqn, values)[0] + zeros[id(eqn)]]

            value, *aux = interpret(closed.jaxpr, closed.consts, inputs, rule)
            return value, (factors, aux)

        zeros = {point: jnp.zeros(aval.shape, aval.dtype) for point, aval in points.items()}
        value, pull, (factors, aux) = jax.vjp(shifted_value, zeros, [leaves[i] for i in others], has_aux=True)
        along, grads = pull(jnp.ones_like(value))
        dtype = _norm_dtype(leaves)
        squares = {i: _squared_norm(g, dtype) for i, g in zip(others, grads, strict=True)}
        for i, product in products.items():
            with at_line(product.eqn):
                squares[i] = product.squared_norm(factors[id(product.eqn)], along[id(product.eqn)], dtype)
        in_order = [squares[i] for i in range(len(leaves))]
        norm = treedef.unflatten(map(jnp.sqrt, in_order)) if per_leaf else jnp.sqrt(sum(in_order))
        return norm, out_tree.unflatten([value, *aux])[1]

    return gradient_norm


def check_loss(name, value) -> None:
    """Raise if ``value`` cannot be the loss of one example: a real scalar."""
    if not is_real_scalar(value):
        raise StateTypeError(
            f"{name}: the function is called with one example, and returns its loss, a real scalar; it returned one "
            f"that is {scalar_in_words(value)}. Sum or average within the example; examples are mapped over."
        )


def _norm_dtype(leaves):
    """Return the dtype to sum norms in: double precision only if a leaf has it."""
    return jnp.float64 if any(jnp.finfo(jax.typeof(leaf).dtype).dtype.itemsize == 8 for leaf in leaves) else jnp.float32


def _squared_norm(gradient, dtype):
    parts = (gradient.real, gradient.imag) if jnp.iscomplexobj(gradient) else (gradient,)
    squares = [jnp.sum(part.astype(dtype) ** 2) for part in parts]
    return sum(squares[1:], squares[0])
