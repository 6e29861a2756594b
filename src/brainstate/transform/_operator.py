"""A curvature at one point as an object: products with it, its diagonal, trace, blocks, and all of it as a matrix.

The object holds one linear map, evaluated once, and the `Space` of its vectors. Whatever is asked for is made of
products with vectors: ``n`` of them for the exact diagonal, with at most ``chunk_size`` vectors in memory at a time; a
few random ones for an estimate. No matrix is made unless ``dense``, ``tree`` or a block is asked for.

The estimates probe with signs ``z``, +1 or -1 with equal chance: ``E[z zᵀ] = I``, so ``E[zᵀ H z] = tr H`` (Hutchinson
1990, "A stochastic estimator of the trace of the influence matrix") and ``E[z * H z] = diag H`` (Bekas, Kokiopoulou and
Saad 2007, "An estimator for the diagonal of a matrix"; the division by ``z * z`` that they need is one by 1 here).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import StateTypeError, StateValueError
from ._chunks import check_chunk_size
from ._draws import Estimate, first_key
from ._space import Space

__all__ = ["CurvatureOperator"]

_CHUNK = 32


@jax.tree_util.register_pytree_node_class
class CurvatureOperator:
    """A symmetric linear operator on vectors with the structure of a gradient; made by ``operator`` of a product.

    A vector ``v`` is either a pytree in the structure of the gradient (``G`` of the table in `GradientTransform`) or a
    flat array of length ``n``, and the product comes back in the same form. The operator is a constant: it does not
    change when the States do. It is a pytree, so it may be passed to a compiled function, which is compiled anew for
    each operator.

    Attributes
    ----------
    shape : tuple
        ``(n, n)``, with n numbers in a vector.
    dtype : dtype
        The dtype of flat vectors and matrices: that to which the dtypes of the leaves promote.
    structure : pytree
        The structure of a vector, with a ``jax.ShapeDtypeStruct`` for each array.

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
    """

    def __init__(self, linear: Callable, space: Space):
        self._linear, self._space = linear, space

    def tree_flatten(self) -> tuple:
        """Return the linear map, which JAX goes through, and what is static."""
        return (self._linear,), self._space

    @classmethod
    def tree_unflatten(cls, space: Space, children: tuple) -> "CurvatureOperator":
        """Undo `tree_flatten`."""
        return cls(children[0], space)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix."""
        return self._space.size, self._space.size

    @property
    def dtype(self) -> Any:
        """The dtype of the matrix."""
        return self._space.dtype

    @property
    def structure(self) -> Any:
        """The structure of a vector."""
        return self._space.structure

    def __repr__(self) -> str:
        return f"CurvatureOperator({self._space.size} x {self._space.size}, {self.dtype})"

    # -------------------------------------------------------------------------------------------- products

    def matvec(self, v: Any) -> Any:
        """Return the product with ``v``, a pytree like the gradient or a flat vector, in the form of ``v``.

        Raises
        ------
        StateValueError
            If ``v`` has another structure, shape or dtype; the message names the leaf by its path.
        """
        if isinstance(v, jax.Array | np.ndarray) and (v.shape, v.dtype) == (self.shape[:1], self.dtype):
            return self._flat(v)
        self._space.check(f"the vector given to an operator (a flat one is {self.dtype}[{self.shape[0]}])", v)
        return self._linear(v)

    def __matmul__(self, v: Any) -> Any:
        """Return ``matvec(v)``."""
        return self.matvec(v)

    def ravel(self, tree: Any) -> jax.Array:
        """Return a vector that is a pytree as a flat one, in the order of rows and columns of `dense`."""
        self._space.check("the vector given to ravel", tree)
        return self._space.ravel(tree)

    def unravel(self, vector: jax.Array) -> Any:
        """Return a flat vector as a pytree in the structure of the gradient."""
        if jnp.shape(vector) != self.shape[:1]:
            raise StateValueError(
                f"unravel takes a flat vector of {self.shape[0]} numbers, the shape given is {jnp.shape(vector)}."
            )
        return self._space.unravel(vector)

    def _flat(self, v):
        return self._space.ravel(self._linear(self._space.unravel(v)))

    # -------------------------------------------------------------------------------------------- exact entries

    def dense(self, *, chunk_size: int | None = None) -> jax.Array:
        """Return the matrix, of shape ``(n, n)``."""
        return self._columns(slice(0, self.shape[0]), slice(0, self.shape[0]), chunk_size).T

    def tree(self, *, chunk_size: int | None = None) -> Any:
        """Return the matrix in nested blocks as `hessian` does, a ``G`` in the place of each leaf of a ``G``."""
        every = self._space.treedef.unflatten(range(len(self._space.shapes)))
        return self._blocks(every, every, chunk_size)

    def __getitem__(self, paths: tuple[str | int, str | int]) -> Any:
        """Return the block of the rows and the columns that two paths name, ``H["layer.weight", "layer.bias"]``.

        A path of a State is the keys of ``grad_states`` joined by dots; it may go on into a State that holds a
        container, and ``""`` means all of ``grad_states``. An int is the position of an argument. Where a path names
        several arrays, the block is nested as in `tree`.

        Raises
        ------
        StateValueError
            If a path names nothing; the message lists what there is.
        """
        if not isinstance(paths, tuple) or len(paths) != 2:
            raise StateTypeError(
                f"a block of an operator has two paths, one of its rows and one of its columns; got {paths!r}."
            )
        return self._blocks(self._space.part(paths[0]), self._space.part(paths[1]), None)

    def _blocks(self, rows, columns, chunk_size):
        """Return the entries at ``rows`` and ``columns``, two pytrees of numbers of leaves, nested."""
        spans, shapes, dtypes = self._space.spans, self._space.shapes, self._space.dtypes
        down, along = self._span(rows), self._span(columns)
        # The matrix is symmetric: the products are with the fewer of rows and columns.
        if down.stop - down.start < along.stop - along.start:
            entries = self._columns(along, down, chunk_size)
        else:
            entries = self._columns(down, along, chunk_size).T

        def block(i, j):
            inner = entries[_within(spans[i], down), _within(spans[j], along)]
            return inner.reshape(shapes[i] + shapes[j]).astype(dtypes[i])

        return jax.tree.map(lambda i: jax.tree.map(lambda j: block(i, j), columns), rows)

    def _span(self, part):
        """Return where the leaves of a part stand in the flat vector: side by side."""
        numbers, spans = jax.tree.leaves(part), self._space.spans
        return slice(spans[numbers[0]].start, spans[numbers[-1]].stop)

    def _columns(self, rows, columns, chunk_size):
        """Return the entries of these rows, one column after the other."""
        return self._each(lambda i: self._flat(self._unit(i))[rows], columns, chunk_size)

    def _each(self, entry, span, chunk_size):
        """Map ``entry`` over the numbers in ``span``, some at a time."""
        check_chunk_size("operator", chunk_size)
        count = span.stop - span.start
        chunks = max(1, math.ceil(count / (chunk_size or _CHUNK)))
        size = math.ceil(count / chunks)
        # Chunks of one size, a few numbers past the end among them: a remainder would be a program of its own.
        return jax.lax.map(entry, span.start + jnp.arange(chunks * size), batch_size=size)[:count]

    def _unit(self, i):
        return (jnp.arange(self.shape[0]) == i).astype(self.dtype)

    # -------------------------------------------------------------------------------------------- diagonal and trace

    def diagonal(self, *, chunk_size: int | None = None, samples: int | None = None, key: Any = None) -> Any:
        """Return the diagonal, exactly or as an estimate, in the structure of the gradient.

        Parameters
        ----------
        chunk_size : int, optional
            How many of the n products of the exact diagonal to compute at a time; 32 if not given.
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
            If ``chunk_size`` and ``samples`` are given together, or ``samples`` is less than 2.
        """
        if not self._sampled(chunk_size, samples, key):
            return self.unravel(self._diagonal(chunk_size))
        estimate = self._estimate(lambda z, product: z * product, self.shape[:1], samples, key)
        return Estimate(self.unravel(estimate.mean), self.unravel(estimate.error))

    def trace(self, *, chunk_size: int | None = None, samples: int | None = None, key: Any = None) -> Any:
        """Return the trace, exactly or as an estimate with its standard error; the parameters are those of `diagonal`.

        Returns
        -------
        array, or Estimate of two
            The trace; with ``samples``, the unbiased estimate and its standard error.
        """
        if not self._sampled(chunk_size, samples, key):
            return self._diagonal(chunk_size).sum()
        return self._estimate(lambda z, product: z @ product, (), samples, key)

    def _diagonal(self, chunk_size):
        return self._each(lambda i: self._flat(self._unit(i))[i], slice(0, self.shape[0]), chunk_size)

    def _sampled(self, chunk_size, samples, key) -> bool:
        if samples is None:
            if key is not None:
                raise StateValueError("key is given and samples is not: say how many random vectors to draw.")
            return False
        if chunk_size is not None:
            raise StateValueError("chunk_size is for the exact result, samples for an estimate: give one of them.")
        if type(samples) is not int or samples < 2:
            raise StateValueError(f"samples={samples!r}: give an int from 2 up, as one sample has no standard error.")
        return True

    def _estimate(self, probe, shape, samples, key):
        """Return the mean of ``probe(z, H z)`` over random signs, and its standard error."""

        def step(carry, inputs):
            # One sample at a time, so that no more than these sums is held (Welford 1962): exact to rounding, as the
            # squares of deviations from the running mean are summed, not of the numbers.
            (mean, squares), (count, key) = carry, inputs
            z = jax.random.rademacher(key, self.shape[:1], self.dtype)
            value = probe(z, self._flat(z))
            deviation = value - mean
            mean = mean + deviation / count
            return (mean, squares + deviation * (value - mean)), None

        zero = jnp.zeros(shape, self.dtype)
        keys = jax.random.split(first_key(key), samples)
        counts = jnp.arange(1, samples + 1).astype(self.dtype)
        (mean, squares), _ = jax.lax.scan(step, (zero, zero), (counts, keys))
        return Estimate(mean, jnp.sqrt(squares / (samples * (samples - 1))))


def _within(span, outer):
    return slice(span.start - outer.start, span.stop - outer.start)
