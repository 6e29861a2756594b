"""The space of the vectors ``v`` that a Jacobian or a curvature multiplies: one array for each differentiated leaf.

A vector has the structure ``G`` of the table in `GradientTransform`, that of a gradient, with None for leaves that are
not differentiated. `Space` describes it without its numbers: structure, shapes, dtypes, and the names by which the
user knows its leaves. All of it is static for JAX.

A *path* names a part of ``G``. A string names States: the keys of ``grad_states`` joined by dots, ``"layer.weight"``,
going on into the value of a State that holds a container, ``"cell.kernel.0"``; the empty string means all States. An
int names the argument at that position.
"""

import contextlib
import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import valid_jaxtype
from jax.tree_util import keystr, tree_leaves_with_path

from ..._arrays import layout, promoted_dtype, tangent_type
from ..._errors import StateTypeError, StateValueError

__all__ = ["Outputs", "Space"]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Space:
    """Structure, shapes and dtypes of the differentiated values, as `PureFunction.open` packs them."""

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]
    has_states: bool
    argnums: int | tuple[int, ...] | None

    _model = "the gradient"  # has the structure of a vector; for messages
    _without_integers = "leave it out of argnums"

    @classmethod
    def from_diff(cls, diff, call) -> "Space":
        """Return the space of derivatives with respect to ``diff``."""
        return cls(*_types(diff), call.selection is not None, call.argnums)

    @property
    def structure(self) -> Any:
        """A vector with a ``jax.ShapeDtypeStruct`` for each array."""
        return self.treedef.unflatten(map(jax.ShapeDtypeStruct, self.shapes, self.dtypes))

    # -------------------------------------------------------------------------------------- checks of a vector

    def check(self, what: str, vector: Any) -> None:
        """Raise an error that names every leaf of ``vector`` that is missing, unexpected, or of another type."""
        if self.fits(vector):
            return
        wanted = {self._label(path): leaf for path, leaf in tree_leaves_with_path(self.structure)}
        given = {self._label(path): leaf for path, leaf in tree_leaves_with_path(vector)}
        # Leaves are matched by label rather than by place, so that the message names the ones at fault.
        if jax.tree.structure(vector) != self.treedef:
            faults = [f"{label} is missing" for label in wanted if label not in given]
            faults += [f"{label} is unexpected" for label in given if label not in wanted]
            faults = faults or [f"it is {jax.tree.structure(vector)}, not {self.treedef}"]
            raise StateValueError(
                f"{what} has the wrong structure: {', '.join(faults)}. It must have the structure of {self._model}."
            )
        unlike = "; ".join(
            f"at {label} is {layout(leaf)}, where {layout(wanted[label])} is expected"
            for label, leaf in given.items()
            if layout(leaf) != layout(wanted[label])
        )
        raise StateValueError(f"{what} {unlike}. It must have the shapes and dtypes of {self._model}.")

    def fits(self, vector: Any) -> bool:
        """Tell whether ``vector`` has the structure, shapes and dtypes of this space."""
        leaves, treedef = jax.tree.flatten(vector)
        if treedef != self.treedef or not all(map(valid_jaxtype, leaves)):
            return False
        types = [(t.shape, t.dtype) for t in map(jax.typeof, leaves)]
        return types == list(zip(self.shapes, self.dtypes, strict=True))

    def require_real(self, name: str) -> None:
        """Refuse leaves that are not of a real floating type: the matrix of a derivative is one over the reals."""
        for path, leaf in tree_leaves_with_path(self.structure):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                continue
            kind, fix = layout(leaf), "keep the real and the imaginary part as two real arrays"
            if leaf.dtype == jax.dtypes.float0:
                kind, fix = "of an integer type", self._without_integers
            raise StateTypeError(
                f"{name}: {self._label(path)} is {kind}, and the matrix of a derivative is one over the reals only: "
                f"{fix}."
            )

    def _label(self, path) -> str:
        """Name a leaf as the user does: ``grad_states['layer'].weight``, ``argument 1['x']``."""
        # With States and arguments, G is a pair: the first key of a path tells which.
        if self.has_states and self.argnums is not None and path:
            first, *path = path
            in_states = getattr(first, "idx", None) == 0
        else:
            in_states = self.has_states
        if in_states:
            return f"grad_states{keystr(tuple(path))}"
        if not isinstance(self.argnums, tuple) or not path:
            return f"argument {self.argnums}{keystr(tuple(path))}"
        place = getattr(path[0], "idx", None)
        number = self.argnums[place] if place is not None and place < len(self.argnums) else "?"
        return f"argument {number}{keystr(tuple(path[1:]))}"

    # -------------------------------------------------------------------------------------- as one flat vector

    @property
    def sizes(self) -> list[int]:
        """How many numbers each leaf has."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """How many numbers a vector has."""
        return sum(self.sizes)

    @property
    def dtype(self) -> np.dtype:
        """The dtype that holds every leaf."""
        return promoted_dtype(self.dtypes)

    @property
    def spans(self) -> list[slice]:
        """Where each leaf stands in the flat vector."""
        ends = np.cumsum([0, *self.sizes]).tolist()
        return [slice(a, b) for a, b in itertools.pairwise(ends)]

    def ravel(self, tree: Any) -> jax.Array:
        """Return the numbers of ``tree`` as one vector."""
        return jnp.concatenate([jnp.ravel(leaf).astype(self.dtype) for leaf in jax.tree.leaves(tree)])

    def unravel(self, vector: Any) -> Any:
        """Undo `ravel`."""
        parts = zip(self.spans, self.shapes, self.dtypes, strict=True)
        return self.treedef.unflatten([vector[span].reshape(shape).astype(dtype) for span, shape, dtype in parts])

    # -------------------------------------------------------------------------------------- a part of it

    @property
    def leaf_numbers(self) -> Any:
        """The number of each leaf in its place."""
        return self.treedef.unflatten(range(len(self.shapes)))

    def span(self, part: Any) -> slice:
        """Return where the leaves of a part of `leaf_numbers` stand in the flat vector: side by side."""
        numbers, spans = jax.tree.leaves(part), self.spans
        return slice(spans[numbers[0]].start, spans[numbers[-1]].stop)

    def part(self, path: str | int) -> Any:
        """Return the part of `leaf_numbers` that ``path`` names."""
        tree = self.leaf_numbers
        states, arguments = tree if self.has_states and self.argnums is not None else (tree, tree)
        if isinstance(path, str) and self.has_states:
            return self._walk(states, path, path)
        if type(path) is int and self.argnums == path:
            return arguments
        if type(path) is int and isinstance(self.argnums, tuple) and path in self.argnums:
            return arguments[self.argnums.index(path)]
        raise self._unknown(path)

    def _walk(self, tree, path, whole):
        if not path and jax.tree.leaves(tree):
            return tree
        found = []
        # A key may hold dots itself, so more than one child may fit.
        for key, child in _children(tree):
            if path == key or path.startswith(f"{key}."):
                with contextlib.suppress(StateValueError):
                    found.append(self._walk(child, path[len(key) + 1 :], whole))
        if len(found) > 1:
            raise StateValueError(f"{whole!r} names {len(found)} things, since a key has a dot in it: rename that key.")
        if not found:
            raise self._unknown(whole)
        return found[0]

    def _unknown(self, path) -> StateValueError:
        numbers = self.argnums if isinstance(self.argnums, tuple) else (self.argnums,)
        tree = self.structure[0] if self.has_states and self.argnums is not None else self.structure
        known = _paths(tree) if self.has_states else []
        known += [n for n in numbers if n is not None]
        return StateValueError(
            f"{path!r} names nothing that is differentiated; there are {', '.join(map(repr, known))}. A path is the "
            f"keys of grad_states joined by dots, or the position of an argument as an int."
        )


@jax.tree_util.register_static
@dataclass(frozen=True)
class Outputs(Space):
    """The space of the outputs of a function; a path is the keys of the output joined by dots."""

    _model = "the output"
    _without_integers = "return it as aux, with has_aux=True"

    @classmethod
    def from_output(cls, out) -> "Outputs":
        """Return the space of the tangents of ``out``."""
        return cls(*_types(out), False, None)

    def _label(self, path) -> str:
        return f"output{keystr(path)}"

    def part(self, path: str | int) -> Any:
        """Return the part of `leaf_numbers` that ``path`` names."""
        if isinstance(path, str):
            return self._walk(self.leaf_numbers, path, path)
        raise self._unknown(path)

    def _unknown(self, path) -> StateValueError:
        known = ", ".join(map(repr, _paths(self.structure)))
        return StateValueError(
            f"{path!r} names no output; there are {known}. A path of the output is its keys joined by dots, '' for all "
            f"of it."
        )


def _types(tree) -> tuple[Any, tuple, tuple]:
    """Return the structure of ``tree``, and the shapes and dtypes of the tangents of its leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    types = [tangent_type(leaf) for leaf in leaves]
    return treedef, tuple(t.shape for t in types), tuple(t.dtype for t in types)


def _paths(tree) -> list[str]:
    return [".".join(map(_key_text, where)) for where, _ in tree_leaves_with_path(tree)]


def _children(tree) -> list[tuple[str, Any]]:
    """Return the direct children of ``tree``, each with its key as a part of a path."""
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)[0]
    return [(_key_text(path[0]), child) for path, child in found if path]


def _key_text(key) -> str:
    """Write a key of JAX's as a part of a path."""
    inner = next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name))
    return ".".join(map(str, inner)) if isinstance(inner, tuple) else str(inner)
