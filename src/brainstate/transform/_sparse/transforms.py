"""Sparse Jacobians and Hessians: one product for each color of the pattern, however large the matrix.

The three steps are those of Curtis, Powell and Reid (1974): find the entries that can be other than zero
(`dependence` reads them off the jaxpr), group the columns that one product tells apart (the coloring of `pattern`),
and compute the products, whose numbers are put in their places here. The States are handled by `GradientTransform` as
for every derivative.

Detection needs a program, so the function is traced abstractly, once; values, products and writes then come from that
same trace, and the user's Python runs once a call, with a given pattern as without.

The program that is analyzed is the one that is evaluated: the JVP, the pullback, or the JVP of the gradient, linear
in its tangents. So a custom derivative rule counts, not the function it belongs to: a surrogate gradient has the
pattern of the surrogate.
"""

import functools
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from ..._arrays import is_scalar, layout, shapes_of
from ..._errors import StateTypeError, StateValueError
from ..._functions import boundary
from ..._program.interpret import trace_flat
from ..._seam.scope import Scope, frozen_here, is_tracer
from .._first_order.gradient_transform import GradientTransform
from .._first_order.gradients import derivative
from .dependence import dependencies, primitives
from .pattern import SparsityPattern

__all__ = ["hessian_sparsity", "jacobian_sparsity", "sparse_hessian", "sparse_jacobian"]

_MODES = ("auto", "forward", "reverse")


# ------------------------------------------------------------------------------------------ the function as a program


class _TracedFunction:
    """A function of a pytree that was traced once; called, it returns value and aux, and runs no Python of the user."""

    def __init__(self, name, fun, diff):
        frozen = frozen_here()

        def run(leaves):
            # A State read during this trace is a constant of one call only, so the read does not freeze it.
            with Scope(name, frozen=frozen):
                return fun(treedef.unflatten(leaves))

        leaves, treedef = jax.tree.flatten(diff)
        try:
            self.closed, self.out_tree = trace_flat(run, leaves)
        except jax.errors.ConcretizationTypeError as error:
            error.add_note(
                "A sparse derivative traces the function abstractly, as jit does: Python cannot branch on the values "
                "that are differentiated. Use jnp.where or brainstate.transform.cond."
            )
            raise

    def __call__(self, diff):
        return self.out_tree.unflatten(jaxpr_as_fun(self.closed)(*jax.tree.leaves(diff)))

    def value(self, diff):
        """Return the value without the aux."""
        return self(diff)[0]


def _sizes(tree) -> list[int]:
    return [int(np.prod(jnp.shape(leaf))) for leaf in jax.tree.leaves(tree)]


def _trace_function(name, fun, diff, rest, kwargs):
    """Return the differentiated values as arrays, and the function of them as a program."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(diff):
        if not jnp.issubdtype(jax.typeof(leaf).dtype, jnp.floating):
            raise StateTypeError(
                f"{name} takes derivatives with respect to real values, and {layout(leaf)}, at "
                f"{jax.tree_util.keystr(path) or 'the argument'}, is complex: split it into real and imaginary parts."
            )
    diff = jax.tree.map(jnp.asarray, diff)
    return diff, _TracedFunction(name, lambda d: fun(d, *rest, **kwargs), diff)


def _real_outputs(name, program, diff):
    """Return the shapes and dtypes of the value; raise if it is not real."""
    value = jax.eval_shape(program.value, diff)
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            where = jax.tree_util.keystr(path)
            raise StateTypeError(
                f"{name} takes derivatives of real values, and the function returned {leaf.dtype}{list(leaf.shape)}"
                f"{' at ' + where if where else ''}. Return it as auxiliary data (has_aux=True)."
            )
    return value


def _pushforward(fun, diff):
    """Return the JVP of ``fun`` at ``diff``, a function of the tangent that returns (slope, (value, aux))."""

    def product(tangent):
        value, slope, aux = jax.jvp(fun, (diff,), (tangent,), has_aux=True)
        return slope, (value, aux)

    return product


def _gradient(name, program):
    """Return the gradient of the value of ``program``, which has to be a real number; it returns the aux as well."""

    def value(diff):
        out, aux = program(diff)
        if not is_scalar(out):
            raise StateTypeError(
                f"{name} is for functions that return one number; the output has shape {shapes_of(out)}. Use "
                f"sparse_jacobian for the derivatives of an array."
            )
        _real_outputs(name, program, diff)
        return out, aux

    return jax.grad(value, has_aux=True)


# ------------------------------------------------------------------------------------------ detection


def _linear_pattern(linear, diff, like, sizes) -> SparsityPattern:
    """Return the pattern of ``linear(diff, t)`` as a matrix that multiplies ``t``, which has the shapes of ``like``."""
    closed = jax.make_jaxpr(linear)(diff, like)
    outs = dependencies(closed, len(jax.tree.leaves(diff)))
    starts = np.cumsum([0, *sizes])
    rows = np.concatenate([start + rows for start, (rows, _) in zip(starts, outs, strict=False)])
    return SparsityPattern(rows, np.concatenate([cols for _, cols in outs]), (int(starts[-1]), sum(_sizes(like))))


def _detect_jacobian(program, diff, out, mode):
    """Return the pattern of the Jacobian, read from its JVP or its pullback; ``out`` are the shapes of the outputs."""
    if mode == "reverse":
        turned = _linear_pattern(lambda d, ct: jax.vjp(program.value, d)[1](ct), diff, out, _sizes(diff))
        return SparsityPattern(turned.cols, turned.rows, turned.shape[::-1])
    return _linear_pattern(lambda d, t: _pushforward(program, d)(t)[0], diff, diff, _sizes(out))


def _detect_hessian(gradient, diff):
    return _linear_pattern(lambda d, t: _pushforward(gradient, d)(t)[0], diff, diff, _sizes(diff)).symmetrized()


def _choose_mode(name, program, mode) -> str:
    """Return the mode, or for ``"auto"`` the only one that the function's primitives allow, if one does not."""
    if mode not in _MODES:
        raise StateValueError(f"{name}: mode={mode!r} is not one of {', '.join(map(repr, _MODES))}.")
    found = primitives(program.closed.jaxpr)
    custom = "custom_vjp_call" in found
    if custom and mode == "forward":
        raise StateTypeError(
            f"{name}: the function uses a custom_vjp, which has no forward mode. Use mode='reverse', or 'auto'."
        )
    if mode != "auto":
        return mode
    return "reverse" if custom else "forward" if "while" in found else "auto"


def _cheaper_mode(pattern) -> str:
    """Return the mode that needs fewer products, forward if both need as many."""
    kinds = sorted(("column", "row"), key=pattern.at_least)
    if pattern.colors(kinds[0]) > pattern.at_least(kinds[1]):
        kinds.sort(key=lambda kind: (pattern.colors(kind), kind))
    return "forward" if kinds[0] == "column" else "reverse"


# ------------------------------------------------------------------------------------------ products and their places


def _products(multiply, like, pattern, kind) -> tuple[list, Any]:
    """Apply ``multiply`` to the sum of the unit vectors of each color.

    ``multiply(vector)`` returns a product, and a rest that does not depend on the vector. Returned are the leaves of
    the products, with one row for each color, and the rest.
    """
    colors, count = pattern.coloring(kind), pattern.colors(kind)
    leaves, treedef = jax.tree.flatten(like)
    if count == 0:
        product, rest = multiply(jax.tree.map(jnp.zeros_like, like))
        return [jnp.zeros((0, leaf.size), leaf.dtype) for leaf in jax.tree.leaves(product)], rest
    seeds = []
    for leaf, part in zip(leaves, np.split(colors, np.cumsum(_sizes(like))[:-1]), strict=True):
        hot = (part == np.arange(count)[:, None]).reshape(count, *leaf.shape)
        seeds.append(jnp.asarray(hot, leaf.dtype))
    products, rest = jax.vmap(multiply, out_axes=(0, None))(treedef.unflatten(seeds))
    return [leaf.reshape(count, -1) for leaf in jax.tree.leaves(products)], rest


class _Blocks:
    """The entries of a pattern, by *block*: one output leaf by one input leaf. Reads them from the products."""

    def __init__(self, pattern, kind, outs, ins):
        self.pattern, self.kind, self.outs, self.ins = pattern, kind, jax.tree.leaves(outs), jax.tree.leaves(ins)
        self.product, self.mirrored = pattern.sources(kind)
        row_starts, col_starts = (np.cumsum([0, *_sizes(tree)]) for tree in (outs, ins))
        # {block: numbers of its entries, and their rows and columns in it}
        self.places = {
            (i, j): self._entries(row_starts[i : i + 2], col_starts[j : j + 2])
            for i, j in itertools.product(range(len(self.outs)), range(len(self.ins)))
        }

    def _entries(self, row_range, col_range):
        rows, cols = self.pattern.rows, self.pattern.cols
        first, last = np.searchsorted(rows, row_range)
        inside = (cols[first:last] >= col_range[0]) & (cols[first:last] < col_range[1])
        entries = first + np.flatnonzero(inside)
        return entries, rows[entries] - row_range[0], cols[entries] - col_range[0]

    def data(self, products, i, j):
        """Return the numbers of block ``(i, j)``."""
        entries, rows, cols = self.places[i, j]
        product, mirrored = self.product[entries], self.mirrored[entries]
        if self.kind == "row":
            return products[j][product, cols].astype(self.outs[i].dtype)
        data = products[i][product, rows]
        if mirrored.any():
            data = jnp.where(mirrored, products[j][product, cols].astype(data.dtype), data)
        return data

    def matrix(self, data, i, j, dense):
        """Return block ``(i, j)`` in the shapes of its output and its input."""
        out, into = self.outs[i].shape, self.ins[j].shape
        _, rows, cols = self.places[i, j]
        if dense:
            zeros = jnp.zeros((self.outs[i].size, self.ins[j].size), data.dtype)
            return zeros.at[rows, cols].set(data, unique_indices=True).reshape(out + into)
        places = [*_unravel(rows, out), *_unravel(cols, into)]
        indices = np.stack(places, 1) if places else np.zeros((len(rows), 0))
        return _bcoo()(
            (data, jnp.asarray(indices, jnp.int32)), shape=out + into, indices_sorted=True, unique_indices=True
        )

    def result(self, products, dense):
        """Return the numbers of each block, and the rows of blocks."""
        data = {(i, j): self.data(products, i, j) for i, j in self.places}
        matrices = [self.matrix(data[i, j], i, j, dense) for i, j in self.places]
        columns = len(self.ins)
        return data, [matrices[i * columns : (i + 1) * columns] for i in range(len(self.outs))]


def _unravel(places, shape):
    return np.unravel_index(places, shape) if shape else ()


@functools.cache
def _bcoo():
    # Imports SciPy: 0.2 s that `import brainstate` does not pay.
    return importlib.import_module("jax.experimental.sparse").BCOO


def _check_given_pattern(name, pattern, outs, ins) -> SparsityPattern:
    pattern = SparsityPattern.of(pattern)
    wanted = sum(_sizes(outs)), sum(_sizes(ins))
    if pattern.shape != wanted:
        raise StateValueError(
            f"{name}: the pattern is {pattern.shape[0]}x{pattern.shape[1]}, and the function has {wanted[0]} outputs "
            f"and {wanted[1]} inputs that are differentiated (all leaves counted): give a pattern of {wanted[0]}x"
            f"{wanted[1]}."
        )
    return pattern


def _check_by_product(name, multiply, like, blocks, data):
    """Compare one more product with that of the sparse matrix: a given pattern that misses entries is an error."""
    if any(map(is_tracer, jax.tree.leaves((data, like)))):
        return
    turned = blocks.kind == "row"
    rng = np.random.default_rng(0)
    leaves, treedef = jax.tree.flatten(like)
    probe = [np.asarray(rng.uniform(1, 2, leaf.shape), leaf.dtype) for leaf in leaves]
    true = jax.tree.leaves(multiply(treedef.unflatten(map(jnp.asarray, probe)))[0])
    got, size = ([np.zeros(leaf.size) for leaf in true] for _ in range(2))
    for (i, j), entries in data.items():
        _, rows, cols = blocks.places[i, j]
        rows, cols, i, j = (cols, rows, j, i) if turned else (rows, cols, i, j)
        terms = np.asarray(entries, np.float64) * probe[j].ravel()[cols]
        got[i] += np.bincount(rows, terms, len(got[i]))
        size[i] += np.bincount(rows, np.abs(terms), len(got[i]))
    expected = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in true])
    error = np.abs(np.concatenate(got) - expected)
    coarsest = max(jnp.finfo(leaf.dtype).eps for leaf in (*true, *leaves))
    wrong = np.flatnonzero(error > 10 * np.sqrt(coarsest) * (np.concatenate(size) + np.abs(expected)))
    if wrong.size:
        raise StateValueError(
            f"{name}: the given pattern misses non-zeros: {wrong.size} {'columns' if turned else 'rows'} of the "
            f"matrix, {wrong[:5].tolist()} among them, differ from one product computed without it. Leave pattern "
            f"out to have it detected, or, if this is rounding, set check_pattern=False."
        )


# ------------------------------------------------------------------------------------------ the transforms


def _evaluate(name, multiply, like, blocks, dense, check):
    products, rest = _products(multiply, like, blocks.pattern, blocks.kind)
    data, rows = blocks.result(products, dense)
    if check:
        _check_by_product(name, multiply, like, blocks, data)
    return rows, rest


def _sparse_jacobian_transform(fun, *, argnums, has_aux, pattern, mode, dense, check_pattern):
    del argnums, has_aux  # argument 0 with aux, by the contract of GradientTransform
    name = "sparse_jacobian"

    def jacobian(diff, /, *rest, **kwargs):
        diff, program = _trace_function(name, fun, diff, rest, kwargs)
        chosen, given, out = _choose_mode(name, program, mode), pattern is not None, _real_outputs(name, program, diff)
        found = (
            _check_given_pattern(name, pattern, out, diff) if given else _detect_jacobian(program, diff, out, chosen)
        )
        chosen = _cheaper_mode(found) if chosen == "auto" else chosen
        if chosen == "forward":
            blocks = _Blocks(found, "column", out, diff)
            rows, (_, aux) = _evaluate(name, _pushforward(program, diff), diff, blocks, dense, given and check_pattern)
        else:
            out, pull, aux = jax.vjp(program, diff, has_aux=True)
            blocks = _Blocks(found, "row", out, diff)
            rows, _ = _evaluate(name, lambda ct: (pull(ct)[0], None), out, blocks, dense, given and check_pattern)
        inner, outer = jax.tree.structure(diff), jax.tree.structure(out)
        return outer.unflatten([inner.unflatten(row) for row in rows]), aux

    return jacobian


def _sparse_hessian_transform(fun, *, argnums, has_aux, pattern, dense, check_pattern):
    del argnums, has_aux  # argument 0 with aux, by the contract of GradientTransform
    name = "sparse_hessian"

    def hessian(diff, /, *rest, **kwargs):
        diff, program = _trace_function(name, fun, diff, rest, kwargs)
        gradient, given = _gradient(name, program), pattern is not None
        found = _check_given_pattern(name, pattern, diff, diff) if given else _detect_hessian(gradient, diff)
        blocks = _Blocks(found, "symmetric", diff, diff)
        rows, (_, aux) = _evaluate(name, _pushforward(gradient, diff), diff, blocks, dense, given and check_pattern)
        structure = jax.tree.structure(diff)
        return structure.unflatten([structure.unflatten(row) for row in rows]), aux

    return hessian


def _jacobian_sparsity_transform(fun, *, argnums, has_aux):
    del argnums, has_aux  # as above
    name = "jacobian_sparsity"

    def jacobian_pattern(diff, /, *rest, **kwargs):
        diff, program = _trace_function(name, fun, diff, rest, kwargs)
        return _detect_jacobian(program, diff, _real_outputs(name, program, diff), _choose_mode(name, program, "auto"))

    return jacobian_pattern


def _hessian_sparsity_transform(fun, *, argnums, has_aux):
    del argnums, has_aux  # as above
    name = "hessian_sparsity"

    def hessian_pattern(diff, /, *rest, **kwargs):
        diff, program = _trace_function(name, fun, diff, rest, kwargs)
        return _detect_hessian(_gradient(name, program), diff)

    return hessian_pattern


class _Sparsity(GradientTransform):
    """An analysis of the function: it computes no values, and commits none."""

    def __call__(self, /, *args, **kwargs):
        diff, call, rest = self._pure.open(args, kwargs)
        return self._derivative(diff, call, *rest, **kwargs)


def sparse_jacobian(
    fun: Callable | None = None,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = None,
    *,
    has_aux: bool | None = False,
    return_value: bool = False,
    check_states: bool = True,
    pattern: Any = None,
    mode: str = "auto",
    dense: bool = False,
    check_pattern: bool = True,
    debug_nan: bool = False,
) -> Any:
    """Sparse Jacobian: computes only the structurally non-zero entries, with one product per color of the pattern.

    Parameters
    ----------
    fun : callable, optional
        The function; it returns a real array or a pytree of these. It is traced abstractly, as under ``jit``, once a
        call. Left out: a decorator is returned.
    grad_states, argnums, has_aux, return_value, check_states, debug_nan
        See `GradientTransform`. The differentiated values are real.
    pattern : SparsityPattern, sparse or dense matrix, optional
        The entries that may be other than zero, of all outputs and all inputs (see `SparsityPattern`), with its
        colorings, if known. Without it both are found at each call, or each trace of an enclosing ``jit``.
    mode : {"auto", "forward", "reverse"}
        Columns by JVPs, rows by VJPs, or the one of both that needs fewer products.
    dense : bool
        Return ordinary arrays instead of ``BCOO``.
    check_pattern : bool
        Outside ``jit``, spend one more product on a given pattern to see that it misses nothing.

    Returns
    -------
    GradientTransform
        A function of the arguments of ``fun``. Its result has the structure and shapes of `jacobian`, each leaf a
        ``BCOO`` with all axes sparse: shape ``o + v`` for an output of shape ``o`` and an input of shape ``v``.

    Raises
    ------
    StateTypeError, StateValueError
        For values that are not real, an unknown mode or one that the function does not have, and a given pattern that
        has another shape or, outside ``jit``, misses non-zeros.

    See Also
    --------
    jacobian_sparsity : the pattern, to be saved or given again.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> J = brainstate.transform.sparse_jacobian(lambda x: x[1:] - x[:-1] ** 2)(jnp.arange(1.0, 10001.0))
    >>> J.shape, J.nse, J.data[:4].tolist()
    ((9999, 10000), 19998, [-2.0, 1.0, -4.0, 1.0])
    """
    options = {"has_aux": has_aux, "return_value": return_value, "check_states": check_states, "debug_nan": debug_nan}
    params = {"pattern": pattern, "mode": mode, "dense": bool(dense), "check_pattern": bool(check_pattern)}
    return derivative("sparse_jacobian", _sparse_jacobian_transform, fun, grad_states, argnums, params, **options)


def sparse_hessian(
    fun: Callable | None = None,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = None,
    *,
    has_aux: bool | None = False,
    return_value: bool = False,
    check_states: bool = True,
    pattern: Any = None,
    dense: bool = False,
    check_pattern: bool = True,
    debug_nan: bool = False,
) -> Any:
    """Sparse Hessian: computes only the structurally non-zero entries, by forward over reverse mode.

    A star coloring of the symmetric pattern says which columns one product tells apart; an entry is read on either
    side of the diagonal.

    Parameters
    ----------
    fun : callable, optional
        The function; it returns a real number. As in `sparse_jacobian`.
    grad_states, argnums, has_aux, return_value, check_states, dense, check_pattern, debug_nan
        As in `sparse_jacobian`.
    pattern : SparsityPattern, sparse or dense matrix, optional
        As in `sparse_jacobian`, and symmetric.

    Returns
    -------
    GradientTransform
        A function of the arguments of ``fun``. Its result has the structure and shapes of `hessian`.

    Raises
    ------
    StateTypeError, StateValueError
        As `sparse_jacobian`; if the output is not a number; if a given pattern is not symmetric.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> w = brainstate.ParamState(jnp.ones(10000))
    >>> H = brainstate.transform.sparse_hessian(lambda: (w.value[1:] * w.value[:-1] ** 2).sum(), w)()
    >>> H.shape, H.nse, H.data[:4].tolist()
    ((10000, 10000), 29997, [2.0, 2.0, 2.0, 2.0])
    """
    options = {"has_aux": has_aux, "return_value": return_value, "check_states": check_states, "debug_nan": debug_nan}
    params = {"pattern": pattern, "dense": bool(dense), "check_pattern": bool(check_pattern)}
    return derivative("sparse_hessian", _sparse_hessian_transform, fun, grad_states, argnums, params, **options)


@boundary
def jacobian_sparsity(
    fun: Callable | None = None,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = None,
    *,
    has_aux: bool | None = False,
    check_states: bool = True,
) -> Any:
    """Detect which entries of a Jacobian can be other than zero.

    The pattern contains every entry that can be other than zero for any floating values, of the differentiated arrays
    and of all others. Shapes, and integers and booleans that are not traced (indices, masks, also as arguments and in
    States) are taken as they are: with other ones the pattern is another.

    Parameters
    ----------
    fun : callable, optional
        The function, which is traced once and changes no State. Left out: a decorator is returned.
    grad_states, argnums, has_aux, check_states
        As in `sparse_jacobian`.

    Returns
    -------
    callable
        A function of the arguments of ``fun`` that returns a `SparsityPattern`.

    Raises
    ------
    StateTypeError, StateValueError
        As `sparse_jacobian`.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> brainstate.transform.jacobian_sparsity(lambda x: x[1:] * x[:-1])(jnp.ones(1000))
    SparsityPattern(999x1000, 1998 non-zeros)
    """
    options = {"has_aux": has_aux, "check_states": check_states}
    return derivative(
        "jacobian_sparsity", _jacobian_sparsity_transform, fun, grad_states, argnums, None, _Sparsity, **options
    )


@boundary
def hessian_sparsity(
    fun: Callable | None = None,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = None,
    *,
    has_aux: bool | None = False,
    check_states: bool = True,
) -> Any:
    """Detect which entries of a Hessian can be other than zero; as `jacobian_sparsity`, for its gradient.

    Parameters
    ----------
    fun, grad_states, argnums, has_aux, check_states
        As in `jacobian_sparsity`; the function returns one real number.

    Returns
    -------
    callable
        A function of the arguments of ``fun`` that returns a symmetric `SparsityPattern`.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> brainstate.transform.hessian_sparsity(lambda x: (x[1:] * x[:-1] + x[1:]).sum())(jnp.ones(1000))
    SparsityPattern(1000x1000, 1998 non-zeros)
    """
    options = {"has_aux": has_aux, "check_states": check_states}
    return derivative(
        "hessian_sparsity", _hessian_sparsity_transform, fun, grad_states, argnums, None, _Sparsity, **options
    )
