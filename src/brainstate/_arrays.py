"""Leaves of a pytree: the cut of a tree by a predicate, their types in words, and which of them have derivatives."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import AbstractValue
from jax.extend.core import valid_jaxtype

from ._errors import StateTypeError, StateValueError, a_type

__all__ = [
    "Rest",
    "at_least",
    "combine",
    "differentiable",
    "is_real_scalar",
    "is_scalar",
    "layout",
    "owns_states",
    "partition",
    "promoted_dtype",
    "scalar_in_words",
    "shapes_of",
    "tangent_type",
]


class Rest(NamedTuple):
    """A pytree without some of its leaves: None in their ``places``, counted through all leaves."""

    leaves: tuple
    places: tuple[int, ...]
    treedef: Any


def partition(tree: Any, chosen: Callable[[Any], bool]) -> tuple[list, Rest]:
    """Return the leaves of ``tree`` for which ``chosen`` holds, and the rest; `combine` puts them together."""
    leaves, treedef = jax.tree.flatten(tree)
    places = tuple(i for i, leaf in enumerate(leaves) if chosen(leaf))
    picked = [leaves[i] for i in places]
    for i in places:
        leaves[i] = None
    return picked, Rest(tuple(leaves), places, treedef)


def combine(picked: Any, rest: Rest) -> Any:
    """Return the tree that `partition` has cut, with ``picked`` in the places of the chosen leaves."""
    leaves = list(rest.leaves)
    for i, leaf in zip(rest.places, picked, strict=True):
        leaves[i] = leaf
    return rest.treedef.unflatten(leaves)


def owns_states(leaf: Any) -> bool:
    """Tell whether ``leaf`` is a Module: an object whose class has a method ``states``."""
    return callable(getattr(type(leaf), "states", None))


def differentiable(leaf) -> bool:
    """Tell whether ``leaf`` is of a floating or complex type."""
    if isinstance(leaf, bool | int):
        return False
    return valid_jaxtype(leaf) and jnp.issubdtype(jax.typeof(leaf).dtype, jnp.inexact)


def tangent_type(leaf) -> jax.ShapeDtypeStruct:
    """Return the type of a tangent of ``leaf``: its own, and float0 if it has no derivative."""
    aval: Any = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype if differentiable(leaf) else jax.dtypes.float0)


def promoted_dtype(dtypes) -> np.dtype:
    """Return the dtype that holds numbers of all ``dtypes``; float0 has none."""
    with jax.numpy_dtype_promotion("standard"):
        numbers = [dtype for dtype in dtypes if dtype != jax.dtypes.float0]
        return functools.reduce(jnp.promote_types, numbers) if numbers else jax.dtypes.float0


def is_scalar(value: Any) -> bool:
    """Tell whether ``value`` is one number."""
    return valid_jaxtype(value) and jnp.shape(value) == ()


def is_real_scalar(value: Any) -> bool:
    """Tell whether ``value`` is one real number of a floating type."""
    return is_scalar(value) and jnp.issubdtype(jax.typeof(value).dtype, jnp.floating)


# ------------------------------------------------------------------------------------------ in words


def layout(leaf: Any) -> str:
    """Write dtype and shape of an array or of its type, ``float32[3]``; of anything else the class, for a message."""
    if isinstance(leaf, type):
        return leaf.__name__
    if not (valid_jaxtype(leaf) or isinstance(leaf, jax.ShapeDtypeStruct | AbstractValue)):
        return a_type(leaf)
    aval: Any = jax.typeof(leaf) if valid_jaxtype(leaf) else leaf
    dtype = "float0" if aval.dtype == jax.dtypes.float0 else aval.dtype
    return f"{dtype}[{','.join(map(str, aval.shape))}]"


def shapes_of(value: Any) -> Any:
    """Return ``value`` with the shape of each array, or the class of anything else, for a message."""
    return jax.tree.map(lambda leaf: jnp.shape(leaf) if valid_jaxtype(leaf) else type(leaf).__name__, value)


def scalar_in_words(value: Any) -> str:
    """Describe for a message a ``value`` that is not a real scalar: its dtype if it is one number, else its shape."""
    return f"of dtype {jax.typeof(value).dtype}" if is_scalar(value) else f"of shape {shapes_of(value)}"


def at_least(argument: str, value: Any, least: int, meaning: str, none: str | None = None) -> Any:
    """Return ``value`` if it is an int from ``least`` up; ``none`` says the meaning of None, if it may be given.

    Raises
    ------
    StateValueError
        If the int is too small.
    StateTypeError
        If it is not an int; a bool is not one here.
    """
    if (value is None and none is not None) or (type(value) is int and value >= least):
        return value
    kind = StateValueError if type(value) is int else StateTypeError
    alternative = f", or None for {none}" if none is not None else ""
    raise kind(f"{argument}={value!r}: give {meaning}, an int from {least} up{alternative}.")
