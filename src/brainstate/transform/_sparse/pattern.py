"""Sparsity patterns and their colorings: sets of columns of a matrix whose entries one product gives separately.

*Columns* (and so rows) are colored such that no two of one color meet in a row: a product with the sum of the unit
vectors of a color then holds each of their entries by itself (Curtis, Powell and Reid 1974). A *symmetric* matrix
needs fewer colors, since an entry may be read on either side of the diagonal: a star coloring, in which neighbors
differ and every path of four vertices has three colors (Coleman and Moré 1984; Gebremedhin, Manne and Pothen 2005,
"What color is your Jacobian?", algorithm 4.1).

Both are greedy, and keep for each row the colors it has met as the bits of one Python integer, so that a color is
chosen by a few ``|`` and no graph of intersections is built: the time is proportional to the entries of the pattern.
"""

import os
import zipfile
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.extend.core import valid_jaxtype

from ..._errors import StateTypeError, StateValueError, a_type
from .index_sets import sort_unique

__all__ = ["KINDS", "SparsityPattern"]

KINDS = ("column", "row", "symmetric")


def _lowest_free(used: int) -> int:
    """Return the number of the lowest bit that is not set."""
    return (~used & (used + 1)).bit_length() - 1


def _neighbors(rows, cols, count) -> list[list[int]]:
    """Return for each of ``count`` rows its columns."""
    order = np.argsort(rows, kind="stable")
    bounds = np.searchsorted(rows[order], np.arange(1, count))
    return [part.tolist() for part in np.split(cols[order], bounds)] if count else []


def _column_coloring(rows_of: list[list[int]], count: int, order: Iterable[int]) -> list[int]:
    """Color columns so that no row meets a color twice; ``rows_of`` are the rows of each column."""
    met, colors = [0] * count, [-1] * len(rows_of)
    for column in order:
        used = 0
        for row in rows_of[column]:
            used |= met[row]
        color = colors[column] = _lowest_free(used)
        for row in rows_of[column]:
            met[row] |= 1 << color
    return colors


def _star_coloring(neighbors: list[list[int]], order: Iterable[int]) -> list[int]:
    """Color vertices so that neighbors differ and no path of four vertices has two colors.

    When ``v`` is colored, a path of two colors can only end in ``v``, never have it inside: ``v`` differs from all
    that its uncolored neighbors have met, so the neighbors of a vertex that are colored before it differ. So the colors
    that ``v`` must not get are those of its neighbors, those its uncolored neighbors have met, and for a colored
    neighbor ``w`` those of the hubs of ``w``: its neighbors that have another neighbor in the color of ``w``.
    """
    n = len(neighbors)
    met, hubs, colors = [0] * n, [0] * n, [-1] * n
    first: list[dict[int, int]] = [{} for _ in range(n)]  # for each vertex, a neighbor of each color
    for v in order:
        used = met[v]
        for w in neighbors[v]:
            used |= met[w] if colors[w] < 0 else hubs[w]
        color = colors[v] = _lowest_free(used)
        for w in neighbors[v]:
            met[w] |= 1 << color
            if colors[w] >= 0:
                first[v][colors[w]] = w
                other = first[w].setdefault(color, v)
                if other != v:
                    hubs[v] |= 1 << colors[w]
                    hubs[other] |= 1 << colors[w]
    return colors


@jax.tree_util.register_static
class SparsityPattern:
    """The entries of a matrix that may be other than zero (its *places*), with colorings of it.

    The matrix is the Jacobian of all outputs, flattened and put one after the other, with respect to all inputs,
    likewise: the leaves in the order of ``jax.tree.leaves``, each in row-major order. For JAX it is a constant: it may
    be passed to a compiled function, and returned.

    Parameters
    ----------
    rows, cols : array_like of int
        The places, in any order; repeated ones count once.
    shape : tuple of int
        ``(rows, columns)`` of the matrix.

    Raises
    ------
    StateTypeError, StateValueError
        If these are not integers, differ in length, or reach outside of the shape.

    Examples
    --------
    >>> from brainstate.transform import SparsityPattern
    >>> pattern = SparsityPattern([0, 0, 1, 1, 2], [0, 1, 1, 2, 2], (3, 3))
    >>> pattern
    SparsityPattern(3x3, 5 non-zeros)
    >>> pattern.coloring("column").tolist()
    [0, 1, 0]
    >>> pattern
    SparsityPattern(3x3, 5 non-zeros, 2 column colors)
    """

    def __init__(self, rows: Any, cols: Any, shape: tuple[int, ...]):
        rows, cols = np.asarray(rows), np.asarray(cols)
        integer = all(a.size == 0 or np.issubdtype(a.dtype, np.integer) for a in (rows, cols))
        if not integer or len(shape) != 2 or any(type(n) is not int and not isinstance(n, np.integer) for n in shape):
            raise StateTypeError(
                f"SparsityPattern(rows, cols, shape): rows and cols are integers (they are {rows.dtype} and "
                f"{cols.dtype}), and shape a pair of them (it is {shape!r})."
            )
        m, n = self.shape = (int(shape[0]), int(shape[1]))
        if rows.ndim != 1 or rows.shape != cols.shape:
            raise StateValueError(
                f"SparsityPattern: rows and cols are two lists of one length; they have the shapes {rows.shape} and "
                f"{cols.shape}."
            )
        for name, places, size in (("rows", rows, m), ("cols", cols, n)):
            if places.size and not 0 <= places.min() <= places.max() < size:
                raise StateValueError(
                    f"SparsityPattern: {name} reach from {places.min()} to {places.max()}, outside of {m}x{n}."
                )
        places = sort_unique(rows.astype(np.int64) * max(n, 1) + cols.astype(np.int64))
        self.rows, self.cols = np.divmod(places, max(n, 1))
        self._colors: dict[str, np.ndarray] = {}

    @classmethod
    def of(cls, matrix: Any) -> "SparsityPattern":
        """Return the pattern of a matrix: a pattern, a BCOO or SciPy sparse matrix, or a dense array of two axes.

        Parameters
        ----------
        matrix : SparsityPattern, sparse matrix or array
            Of a sparse matrix all stored places count, of a dense one those that are not zero.

        Returns
        -------
        SparsityPattern

        Raises
        ------
        StateTypeError
            If it is none of these.

        Examples
        --------
        >>> import numpy as np
        >>> from brainstate.transform import SparsityPattern
        >>> SparsityPattern.of(np.eye(4))
        SparsityPattern(4x4, 4 non-zeros)
        """
        if isinstance(matrix, cls):
            return matrix
        if hasattr(matrix, "tocoo"):
            matrix = matrix.tocoo()
            return cls(matrix.row, matrix.col, matrix.shape)
        if hasattr(matrix, "indices") and np.ndim(matrix.indices) == 2 and len(matrix.shape) == 2:
            rows, cols = np.asarray(matrix.indices).T
            inside = (rows < matrix.shape[0]) & (cols < matrix.shape[1])  # BCOO pads with places outside
            return cls(rows[inside], cols[inside], matrix.shape)
        if valid_jaxtype(matrix) and np.ndim(matrix) == 2:
            rows, cols = np.nonzero(np.asarray(matrix))
            return cls(rows, cols, np.shape(matrix))
        kind = f"an array of {np.ndim(matrix)} axes" if valid_jaxtype(matrix) else a_type(matrix)
        raise StateTypeError(
            f"{kind} is not a sparsity pattern: give a SparsityPattern, a BCOO or SciPy sparse matrix, or a dense "
            f"array of two axes."
        )

    @property
    def nnz(self) -> int:
        """The number of places."""
        return len(self.rows)

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether the matrix is square, and each place has its mirror image."""
        n = self.shape[0]
        mirrored = np.sort(self.cols * n + self.rows)
        return self.shape == (n, n) and np.array_equal(mirrored, self.rows * n + self.cols)

    def symmetrized(self) -> "SparsityPattern":
        """Return the places together with their mirror images."""
        if self.is_symmetric:
            return self
        rows, cols = np.concatenate([self.rows, self.cols]), np.concatenate([self.cols, self.rows])
        return SparsityPattern(rows, cols, self.shape)

    def contains(self, other: "SparsityPattern") -> bool:
        """Tell whether all places of ``other``, a pattern of the same shape, are places of this one."""
        theirs, ours = (p.rows * p.shape[1] + p.cols for p in (other, self))
        return self.shape == other.shape and bool(np.isin(theirs, ours).all())

    def coloring(self, kind: str) -> np.ndarray:
        """Return the color of each column (or row), numbered from 0, and -1 for an empty one. The pattern keeps it.

        Parameters
        ----------
        kind : str
            ``"column"``, ``"row"``, or ``"symmetric"`` (the same for rows and columns, read on either side).

        Returns
        -------
        numpy.ndarray of int

        Raises
        ------
        StateValueError
            If the kind is another, or symmetric and the pattern is not.
        """
        if kind not in KINDS:
            raise StateValueError(f"a coloring is of the kind {', '.join(map(repr, KINDS))}; got {kind!r}.")
        if kind not in self._colors:
            self._colors[kind] = self._color(kind)
        return self._colors[kind]

    def colors(self, kind: str) -> int:
        """Return the number of colors, which is the number of products that the matrix takes; see `coloring`."""
        return int(self.coloring(kind).max(initial=-1)) + 1

    def at_least(self, kind: str) -> int:
        """Return a lower bound for `colors`: the number of entries in the fullest row, or for ``"row"`` column."""
        along = self.rows if kind == "column" else self.cols
        return int(np.bincount(along, minlength=1).max(initial=0))

    def _color(self, kind):
        if kind == "symmetric":
            if not self.is_symmetric:
                raise StateValueError(
                    f"{self} is not symmetric, so it has no symmetric coloring: a Hessian's pattern has with each "
                    f"place its mirror image. Use pattern.symmetrized()."
                )
            aside = self.rows != self.cols
            near = _neighbors(self.rows[aside], self.cols[aside], self.shape[0])
            present = np.bincount(self.rows, minlength=self.shape[0]) > 0
            # Columns that a row tells apart need no mirror image; on wide bands that takes fewer colors.
            star = self._best(lambda order: _star_coloring(near, order), near, present, 1)
            return min(star, self.coloring("column"), key=np.max) if self.nnz else star
        across, along, sizes = self.rows, self.cols, self.shape
        if kind == "row":
            across, along, sizes = along, across, sizes[::-1]
        met = _neighbors(along, across, sizes[1])
        present = np.bincount(along, minlength=sizes[1]) > 0
        return self._best(lambda order: _column_coloring(met, sizes[0], order), met, present, self.at_least(kind))

    def _best(self, color, near, present, enough):
        """Color in the natural order, best for bands; if fewer colors are possible, also with the fullest first."""
        natural = np.flatnonzero(present)
        fullest = natural[np.argsort([-len(near[i]) for i in natural], kind="stable")]
        best = None
        for order in (natural, fullest):
            colors = np.array(color(order.tolist()), np.int64)
            if best is None or colors.max(initial=-1) < best.max(initial=-1):
                best = colors
            if best.max(initial=-1) < enough:
                break
        return best

    def sources(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Return for each entry the number of the product that holds it, and if it is read at its mirror image.

        Product ``k`` is the matrix (for ``"row"``, its transpose) times the sum of the unit vectors of color ``k``.
        """
        colors = self.coloring(kind)
        if kind == "row":
            return colors[self.rows], np.zeros(self.nnz, bool)
        product = colors[self.cols]
        if kind == "column":
            return product, np.zeros(self.nnz, bool)
        met = self.rows * (self.shape[1] + 1) + product  # one number for each pair (row, color)
        _, place, count = np.unique(met, return_inverse=True, return_counts=True)
        mirrored = count[place] > 1  # its row meets the color of its column again; then the mirror image is alone
        return np.where(mirrored, colors[self.rows], product), mirrored

    def _is_readable(self, kind) -> bool:
        """Tell whether every entry can be read: its product holds no other entry at that place."""
        colors = self._colors[kind]
        rows, cols = (self.cols, self.rows) if kind == "row" else (self.rows, self.cols)
        if colors.shape != (self.shape[kind != "row"],) or (self.nnz and colors[cols].min() < 0):
            return False
        product, mirrored = self.sources(kind)
        width = int(colors.max(initial=0)) + 1
        met = np.sort(rows * width + colors[cols])
        read = np.where(mirrored, cols, rows) * width + product
        return bool((np.searchsorted(met, read, "right") - np.searchsorted(met, read) == 1).all())

    def save(self, path: str | os.PathLike) -> None:
        """Write the pattern and the colorings made so far to ``path``, a file of the kind ``.npz``."""
        arrays: dict[str, Any] = {f"color_{kind}": value for kind, value in self._colors.items()}
        with open(path, "wb") as file:
            np.savez_compressed(file, rows=self.rows, cols=self.cols, shape=self.shape, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SparsityPattern":
        """Return the pattern that `save` wrote.

        Raises
        ------
        StateValueError
            If the file does not hold a pattern.
        """
        try:
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                pattern = cls(file["rows"], file["cols"], tuple(file["shape"].tolist()))
                pattern._colors.update((kind, file[f"color_{kind}"]) for kind in KINDS if f"color_{kind}" in file)
            for kind in pattern._colors:
                if not pattern._is_readable(kind):
                    raise ValueError(f"its {kind} colors are not a coloring of this pattern.")
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise StateValueError(f"{os.fspath(path)!r} does not hold a SparsityPattern: {error}") from error
        return pattern

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparsityPattern):
            return NotImplemented
        return (
            self.shape == other.shape
            and np.array_equal(self.rows, other.rows)
            and np.array_equal(self.cols, other.cols)
        )

    def __hash__(self) -> int:
        return hash((self.shape, self.nnz))

    def __repr__(self) -> str:
        m, n = self.shape
        colors = "".join(f", {self.colors(kind)} {kind} colors" for kind in KINDS if kind in self._colors)
        return f"SparsityPattern({m}x{n}, {self.nnz} non-zeros{colors})"
