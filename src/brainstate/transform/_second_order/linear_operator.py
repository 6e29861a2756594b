"""A matrix of derivatives at one point as an object: its products with vectors, diagonal, trace, blocks and entries.

The object holds one linear map, evaluated once, and the `Space` of its rows and of its columns, which for a curvature
are the same. Everything is computed from products with vectors: ``n`` of them for the exact diagonal, with at most
``chunk_size`` vectors in memory at a time; a few random ones for an estimate. Only ``dense``, ``tree`` and blocks build
the matrix, or a part of it, by products from the side that needs fewer.

The estimates probe with signs ``z``, +1 or -1 with equal chance: ``E[z zᵀ] = I``, so ``E[zᵀ H z] = tr H`` (Hutchinson
1990, "A stochastic estimator of the trace of the influence matrix") and ``E[z * H z] = diag H`` (Bekas, Kokiopoulou and
Saad 2007, "An estimator for the diagonal of a matrix"; the division by ``z * z`` that they need is one by 1 here).
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ..._arrays import at_least, layout, promoted_dtype
from ..._errors import StateTypeError, StateValueError
from ..._functions import boundary
from ..._seam.run_time_errors import await_errors
from .._first_order.chunked_jacobians import check_chunk_size
from .._first_order.vector_space import Space
from .._nonfinite.linear_maps import CheckedMap, LinearMap, LinearMapCheck
from .._random_keys import Estimate, with_key

__all__ = ["LinearOperator", "operator_check"]

_CHUNK = 32


@jax.tree_util.register_pytree_node_class
class LinearOperator:
    """A Jacobian or a curvature at one point; made by `linearize`, and by ``operator`` of `hvp`, `ggn` and `fisher`.

    A vector ``v`` is a pytree in the structure of the gradient (``G`` of the table in `GradientTransform`), and the
    product is one in the structure of the output, for a curvature ``G`` again. Or ``v`` is a flat array of length
    ``n``, and the product one of length ``m``. The operator is a constant: it does not change when the States do. It is
    a pytree, so it may be passed to a compiled function, which is compiled again for each operator. With ``debug_nan``,
    each product that is not finite is a `NonFiniteError`, in ``H @ v`` as in ``H.trace()``.

    Attributes
    ----------
    shape : tuple
        ``(m, n)``, with m numbers in the output and n in a vector.
    dtype : dtype
        The dtype of the matrix, to which the dtypes of all leaves promote.
    structure : pytree
        The structure of a vector, with a ``jax.ShapeDtypeStruct`` for each array; of the output: ``J.T.structure``.
    T : LinearOperator
        The transpose; a curvature is its own.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, brainstate
    >>> a, b = brainstate.ParamState(jnp.array([1.0, 2.0])), brainstate.ParamState(jnp.array(3.0))
    >>> states = {"a": a, "b": b}
    >>> H = brainstate.transform.hvp(lambda: (a.value**2).sum() * b.value, states).operator()
    >>> H.dense().tolist()
    [[6.0, 0.0, 2.0], [0.0, 6.0, 4.0], [2.0, 4.0, 0.0]]
    >>> H["a", "b"].tolist(), float(H.trace())
    ([2.0, 4.0], 12.0)
    >>> v = {"a": jnp.array([1.0, 0.0]), "b": jnp.array(1.0)}
    >>> jax.tree.map(lambda leaf: leaf.tolist(), H @ v)
    {'a': [8.0, 4.0], 'b': 2.0}
    >>> _, J = brainstate.transform.linearize(lambda: {"y": a.value * b.value}, grad_states=states)
    >>> J, J["y", "b"].tolist(), (J.T @ jnp.array([1.0, 0.0])).tolist()
    (LinearOperator(2 x 3, float32), [1.0, 2.0], [3.0, 0.0, 1.0])
    """

    def __init__(self, linear: Callable, columns: Space, rows: Space | None = None, transpose: Callable | None = None):
        self._linear, self._columns = linear, columns
        self._symmetric, self._rows = rows is None, rows or columns
        self._transpose = transpose  # with debug_nan: a check has no transpose, so there are two linear maps

    def tree_flatten(self) -> tuple:
        """Return the children, the linear map and its transpose if that is given, and the static spaces."""
        return (self._linear, self._transpose), (self._columns, None if self._symmetric else self._rows)

    @classmethod
    def tree_unflatten(cls, spaces: tuple, children: tuple) -> "LinearOperator":
        """Undo `tree_flatten`."""
        (linear, transpose), (columns, rows) = children, spaces
        return cls(linear, columns, rows, transpose)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix."""
        return self._rows.size, self._columns.size

    @property
    def dtype(self) -> Any:
        """The dtype of the matrix."""
        return promoted_dtype((*self._rows.dtypes, *self._columns.dtypes))

    @property
    def structure(self) -> Any:
        """The structure of a vector."""
        return self._columns.structure

    @property
    def T(self) -> "LinearOperator":
        """The transpose, which multiplies vectors in the structure of the output."""
        if self._symmetric:
            return self
        self._require_real()
        if self._transpose is not None:
            return LinearOperator(self._transpose, self._rows, self._columns, self._linear)
        return LinearOperator(Partial(_multiply_transposed, self._columns, self._linear), self._rows, self._columns)

    def __repr__(self) -> str:
        return f"LinearOperator({self.shape[0]} x {self.shape[1]}, {self.dtype})"

    # -------------------------------------------------------------------------------------------- products

    def matvec(self, v: Any) -> Any:
        """Return the product with ``v``: a pytree for a pytree, a flat vector for a flat one.

        A ``v`` in the structure of the gradient is never taken for a flat one, even if it is one array.

        Raises
        ------
        StateValueError
            If ``v`` has another structure, shape or dtype; the message names the leaf by its path.
        """
        if not self._columns.fits(v):
            flat = isinstance(v, jax.Array | np.ndarray)
            if flat and (v.shape, v.dtype) == (self.shape[1:], self._columns.dtype):
                return self._flat(v)
            flat = layout(jax.ShapeDtypeStruct(self.shape[1:], self._columns.dtype))
            self._columns.check(f"the vector given to an operator (a flat one is {flat})", v)
        return self._linear(v)

    @boundary
    def __call__(self, v: Any) -> Any:
        """Return ``matvec(v)``: an operator is a function, like the result of ``jax.linearize``."""
        return self.matvec(v)

    def __matmul__(self, v: Any) -> Any:
        """Return ``matvec(v)``."""
        return self.matvec(v)

    def ravel(self, tree: Any) -> jax.Array:
        """Return a pytree vector as a flat one, in the order of the columns of `dense`."""
        self._columns.check("the vector given to ravel", tree)
        return self._columns.ravel(tree)

    def unravel(self, vector: jax.Array) -> Any:
        """Return a flat vector as a pytree in the structure of the gradient."""
        if jnp.shape(vector) != self.shape[1:]:
            raise StateValueError(
                f"unravel takes a flat vector of {self.shape[1]} numbers, the shape given is {jnp.shape(vector)}."
            )
        return self._columns.unravel(vector)

    def _flat(self, v):
        self._require_real()
        return self._rows.ravel(self._linear(self._columns.unravel(v)))

    def _run(self, compute):
        """Return ``compute()``, a program of many products; wait for its end if one of them may raise."""
        return await_errors(compute)() if isinstance(self._linear, CheckedMap) else compute()

    def _require_real(self):
        for space in (self._columns, self._rows):
            space.require_real("operator")

    # -------------------------------------------------------------------------------------------- exact entries

    def dense(self, *, chunk_size: int | None = None) -> jax.Array:
        """Return the matrix, of shape ``(m, n)``; ``chunk_size`` of its rows or columns are computed at a time."""
        return self._entries(slice(0, self.shape[0]), slice(0, self.shape[1]), chunk_size)

    def tree(self, *, chunk_size: int | None = None) -> Any:
        """Return the matrix in nested blocks as `jacrev` and `hessian` do: a ``G`` for each row leaf."""
        return self._blocks(self._rows.leaf_numbers, self._columns.leaf_numbers, chunk_size)

    def __getitem__(self, paths: tuple[str | int, str | int]) -> Any:
        """Return the block of the rows and the columns that two paths name, ``H["layer.weight", "layer.bias"]``.

        A path of a State is the keys of ``grad_states`` joined by dots; it may go on into a State that holds a
        container, and ``""`` means all of ``grad_states``. An int is the position of an argument. The rows of a
        Jacobian are named by the keys of the output, ``J["logits", "layer.weight"]``, ``""`` for all of it. Where a
        path names several arrays, the block is nested as in `tree`.

        Raises
        ------
        StateValueError
            If a path names nothing; the message lists the paths that exist.
        """
        if not isinstance(paths, tuple) or len(paths) != 2:
            raise StateTypeError(
                f"a block of an operator has two paths, one of its rows and one of its columns; got {paths!r}."
            )
        return self._blocks(self._rows.part(paths[0]), self._columns.part(paths[1]), None)

    def _blocks(self, rows, columns, chunk_size):
        """Return the entries at ``rows`` and ``columns``, two pytrees of numbers of leaves, nested."""
        # The arrays that a path names lie side by side: one rectangle is computed, and cut into the blocks.
        down, along = self._rows.span(rows), self._columns.span(columns)
        entries = self._entries(down, along, chunk_size)

        def block(i, j):
            inner = entries[_relative_span(self._rows.spans[i], down), _relative_span(self._columns.spans[j], along)]
            return inner.reshape(self._rows.shapes[i] + self._columns.shapes[j]).astype(self._rows.dtypes[i])

        return jax.tree.map(lambda i: jax.tree.map(lambda j: block(i, j), columns), rows)

    def _entries(self, rows, columns, chunk_size):
        """Return the entries in these rows and columns, by products with the fewer of them."""
        self._require_real()
        # A product with the map gives a column, one with the transpose a row.
        if rows.stop - rows.start < columns.stop - columns.start:
            found = self.T._lines(rows, columns, chunk_size)
        else:
            found = self._lines(columns, rows, chunk_size).T
        return found.astype(self.dtype)

    def _lines(self, columns, rows, chunk_size):
        """Return the entries in these rows of one column after the other."""
        return self._each(lambda i: self._flat(self._unit(i))[rows], columns, chunk_size)

    def _each(self, entry, span, chunk_size):
        """Map ``entry`` over the numbers in ``span``, some at a time."""
        check_chunk_size("operator", chunk_size)
        count = span.stop - span.start
        chunks = max(1, math.ceil(count / (chunk_size or _CHUNK)))
        size = math.ceil(count / chunks)
        # Chunks of one size, with a few numbers past the end: a smaller last chunk would be compiled separately.
        numbers = span.start + jnp.arange(chunks * size)
        return self._run(lambda: jax.lax.map(entry, numbers, batch_size=size)[:count])

    def _unit(self, i):
        return (jnp.arange(self.shape[1]) == i).astype(self._columns.dtype)

    # -------------------------------------------------------------------------------------------- diagonal and trace

    def diagonal(self, *, chunk_size: int | None = None, samples: int | None = None, key: Any = None) -> Any:
        """Return the diagonal of a square matrix, exactly or as an estimate, in the structure of a vector.

        Parameters
        ----------
        chunk_size : int, optional
            Number of products, of the n for the exact diagonal, to compute at a time; 32 if not given.
        samples : int, optional
            Estimate the diagonal from this many random products instead.
        key : int or key, optional
            Fixes the random vectors; without it each call draws new ones from ``brainstate.random``.

        Returns
        -------
        pytree, or Estimate of two
            The diagonal; with ``samples``, the unbiased estimate and its standard error, entry by entry.

        Raises
        ------
        StateValueError
            If ``chunk_size`` and ``samples`` are given together, or ``samples`` is less than 2; or if the matrix is
            not square.
        """
        if not self._is_estimate(chunk_size, samples, key):
            return self.unravel(self._diagonal(chunk_size))
        estimate = self._estimate(lambda z, product: z * product, self.shape[1:], samples, key)
        return Estimate(self.unravel(estimate.mean), self.unravel(estimate.error))

    def trace(self, *, chunk_size: int | None = None, samples: int | None = None, key: Any = None) -> Any:
        """Return the trace, exactly or as an estimate with its standard error; the parameters are those of `diagonal`.

        Returns
        -------
        array, or Estimate of two
            The trace; with ``samples``, the unbiased estimate and its standard error.
        """
        if not self._is_estimate(chunk_size, samples, key):
            return self._diagonal(chunk_size).sum()
        return self._estimate(lambda z, product: z @ product, (), samples, key)

    def _diagonal(self, chunk_size):
        if not self.shape[1]:
            return jnp.zeros((0,), self.dtype)
        return self._each(lambda i: self._flat(self._unit(i))[i], slice(0, self.shape[1]), chunk_size)

    def _is_estimate(self, chunk_size, samples, key) -> bool:
        if self.shape[0] != self.shape[1]:
            raise StateValueError(f"an operator of shape {self.shape} is not square, it has no diagonal and no trace.")
        self._require_real()
        if samples is None:
            if key is not None:
                raise StateValueError("key is given and samples is not: say how many random vectors to draw.")
            return False
        if chunk_size is not None:
            raise StateValueError("chunk_size is for the exact result, samples for an estimate: give one of them.")
        at_least("samples", samples, 2, "the number of random vectors (one has no standard error)")
        return True

    def _estimate(self, probe, shape, samples, key):
        """Return the mean of ``probe(z, H z)`` over random signs, and its standard error."""

        def step(carry, inputs):
            # One sample at a time, so that no more than these sums is held (Welford 1962): exact to rounding, as the
            # squares of deviations from the running mean are summed, not of the numbers.
            (mean, squares), (count, key) = carry, inputs
            z = jax.random.rademacher(key, self.shape[1:], self._columns.dtype)
            value = probe(z, self._flat(z))
            deviation = value - mean
            mean = mean + deviation / count
            return (mean, squares + deviation * (value - mean)), None

        zero = jnp.zeros(shape, self.dtype)
        counts = jnp.arange(1, samples + 1).astype(self.dtype)

        def run(key):
            inputs = counts, jax.random.split(key, samples)
            return self._run(lambda: jax.lax.scan(step, (zero, zero), inputs)[0])

        mean, squares = with_key("operator", key, run)
        return Estimate(mean, jnp.sqrt(squares / (samples * (samples - 1))))


def operator_check(derive: Callable, name: str, inputs: Callable) -> LinearMapCheck:
    """Return the check of a derivative whose map is an operator; see `LinearMapCheck` for ``derive``."""

    def parts(operator, _):
        if operator._symmetric:
            return [LinearMap(operator._linear, operator.structure, inputs)]
        found = [LinearMap(operator._linear, jax.tree.map(_stand_in, operator.structure))]
        with contextlib.suppress(StateTypeError):  # over complex numbers there is no transpose
            found.append(LinearMap(operator.T._linear, operator.T.structure, inputs))
        return found

    def rebuild(operator, linear, transpose=None):
        return LinearOperator(linear, operator._columns, None if operator._symmetric else operator._rows, transpose)

    return LinearMapCheck(derive, name, parts=parts, rebuild=rebuild)


def _stand_in(leaf):
    """Return a stand-in for an array of a vector; a float0 array, which holds nothing, stands for itself."""
    return np.zeros(leaf.shape, leaf.dtype) if leaf.dtype == jax.dtypes.float0 else leaf


def _multiply_transposed(columns, linear, v):
    return jax.linear_transpose(linear, columns.structure)(v)[0]


def _relative_span(span, outer):
    return slice(span.start - outer.start, span.stop - outer.start)
