"""The norm of a gradient without the gradient, for weights of linear layers.

Let a weight ``W`` be used once, in a product ``y = x W`` whose ``T`` rows are, say, the moments of a sequence, and let
``g`` be the cotangent of ``y``. The gradient is ``xᵀ g``, and its squared norm::

    |xᵀ g|² = Σ_cf (Σ_t x_tc g_tf)² = Σ_ts (Σ_c x_tc x_sc) (Σ_f g_tf g_sf) = Σ_ts (x xᵀ)_ts (g gᵀ)_ts

which needs two matrices of ``T²`` entries in place of one of the size of ``W``; for a single row it is
``|x|² |g|²`` (Goodfellow 2015, "Efficient per-example gradient computations"; Li et al. 2022, "Large language models
can be strong differentially private learners"). The cotangent ``g`` is what reverse mode finds for a zero that is
added to ``y``.

Which weights this is true for is read off the traced program: those that are used exactly once, in a real
``dot_general``, after at most reshaping, transposing or casting. It is done where ``2 T² < size of W``. Every other
leaf (a bias, a tied weight, one in a loop or a convolution) has its gradient made, and then its norm.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from ..._errors import StateTypeError
from ..._program.interpret import bind, inlined, interpret, program
from ..._program.source_lines import at_line
from .._first_order.gradients import is_scalar, shapes_of

__all__ = ["check_loss", "norms_transform"]

_SAME_ENTRIES = {"reshape", "transpose", "squeeze", "copy", "convert_element_type"}


class _Product(NamedTuple):
    """An equation ``x · W`` or ``W · x``, and how the axes of ``x`` and of the result are laid out."""

    eqn: Any
    weight: int  # which operand is W
    order: tuple[int, ...]  # the axes of x: batch, rows, contracted
    batch: int
    rows: int
    contracted: int
    free: int  # the size of what W adds to the result

    def square(self, factors, g, dtype):
        """Return the squared norm of the derivative by W."""
        x = jnp.transpose(factors[1 - self.weight], self.order)
        x = x.reshape(self.batch, self.rows, self.contracted).astype(dtype)
        g = g.reshape((self.batch, self.rows, self.free) if self.weight else (self.batch, self.free, self.rows))
        g = (g if self.weight else jnp.swapaxes(g, 1, 2)).astype(dtype)
        if self.rows == 1:
            return ((x**2).sum((1, 2)) * (g**2).sum((1, 2))).sum()
        # Where large terms cancel, rounding may leave less than nothing.
        return jnp.maximum((_gram(x) * _gram(g)).sum(), 0)


def _gram(rows):
    return jnp.einsum("bti,bsi->bts", rows, rows, precision=jax.lax.Precision.HIGHEST)


def _product(eqn, weight):
    """Return the `_Product` that an equation is, if its norm is cheaper than its derivative; else None."""
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
    """Return {number of an input: its `_Product`} of the inputs that are the weight of one."""
    uses: dict[Any, list] = {}
    for eqn, atoms in [*((eqn, eqn.invars) for eqn in jaxpr.eqns), (None, jaxpr.outvars)]:
        for place, atom in enumerate(atoms):
            if not isinstance(atom, Literal):
                uses.setdefault(atom, []).append((eqn, place))
    found = {number: _only_product(var, uses) for number, var in enumerate(jaxpr.invars)}
    return {number: product for number, product in found.items() if product is not None}


def _only_product(var, uses):
    """Follow the one use of ``var``, if it is used once, to a `_Product`; else return None."""
    while len(uses.get(var, ())) == 1 and jnp.issubdtype(var.aval.dtype, jnp.floating):
        eqn, place = uses[var][0]
        if eqn is None or eqn.primitive.name not in _SAME_ENTRIES:
            return _product(eqn, place) if eqn is not None and eqn.primitive.name == "dot_general" else None
        var = eqn.outvars[0]
    return None


def norms_transform(fun, *, argnums, has_aux, per_leaf, name):
    """Return the norm of the gradient, as a transform for `GradientTransform`; of each leaf with ``per_leaf``."""
    del argnums, has_aux  # argument 0 with aux, by the contract of GradientTransform

    def wrapped(diff, /, *rest, **kwargs):
        leaves, treedef = jax.tree.flatten(diff)

        def one(leaves):
            value, aux = fun(treedef.unflatten(leaves), *rest, **kwargs)
            check_loss(name, value)
            return value, aux

        closed, out_tree = program(one, leaves)
        closed = inlined(closed, leaves)
        products = _find_products(closed.jaxpr)
        # By equation, since both factors of a product may be differentiated.
        points = {id(p.eqn): p.eqn.outvars[0].aval for p in products.values()}
        others = [i for i in range(len(leaves)) if i not in products]

        def shifted(zeros, moved):
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
        value, pull, (factors, aux) = jax.vjp(shifted, zeros, [leaves[i] for i in others], has_aux=True)
        along, grads = pull(jnp.ones_like(value))
        dtype = _wide(leaves)
        squares = {i: _square(g, dtype) for i, g in zip(others, grads, strict=True)}
        for i, product in products.items():
            with at_line(product.eqn):
                squares[i] = product.square(factors[id(product.eqn)], along[id(product.eqn)], dtype)
        in_order = [squares[i] for i in range(len(leaves))]
        norm = treedef.unflatten(map(jnp.sqrt, in_order)) if per_leaf else jnp.sqrt(sum(in_order))
        return norm, out_tree.unflatten([value, *aux])[1]

    return wrapped


def check_loss(name, value) -> None:
    """Refuse what is not the loss of one example."""
    if not is_scalar(value) or not jnp.issubdtype(jax.typeof(value).dtype, jnp.floating):
        kind = jax.typeof(value).dtype if is_scalar(value) else f"of shape {shapes_of(value)}"
        raise StateTypeError(
            f"{name}: the function is called with one example, and returns its loss, a real scalar; it returned one "
            f"that is {kind}. Sum or average over what is within an example, not over examples."
        )


def _wide(leaves):
    """Return the type that norms are summed in: double precision only where a leaf has it."""
    return jnp.float64 if any(jnp.finfo(jax.typeof(leaf).dtype).dtype.itemsize == 8 for leaf in leaves) else jnp.float32


def _square(gradient, dtype):
    parts = (gradient.real, gradient.imag) if jnp.iscomplexobj(gradient) else (gradient,)
    squares = [jnp.sum(part.astype(dtype) ** 2) for part in parts]
    return sum(squares[1:], squares[0])
