"""Leaves of a pytree: their types in words, and which of them have derivatives."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import valid_jaxtype

from ._errors import a_type

__all__ = ["differentiable", "layout", "promoted", "tangent_type"]


def differentiable(leaf) -> bool:
    """Tell whether ``leaf`` is of a floating or complex type."""
    if isinstance(leaf, bool | int):
        return False
    return valid_jaxtype(leaf) and jnp.issubdtype(jax.typeof(leaf).dtype, jnp.inexact)


def tangent_type(leaf) -> jax.ShapeDtypeStruct:
    """Return the type of a tangent of ``leaf``: its own, and float0 if it has no derivative."""
    aval: Any = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype if differentiable(leaf) else jax.dtypes.float0)


def promoted(dtypes) -> np.dtype:
    """Return the dtype that holds numbers of all ``dtypes``; float0 has none."""
    with jax.numpy_dtype_promotion("standard"):
        numbers = [dtype for dtype in dtypes if dtype != jax.dtypes.float0]
        return functools.reduce(jnp.promote_types, numbers) if numbers else jax.dtypes.float0


def layout(leaf) -> str:
    """Write the dtype and shape of an array, or the type of what is none, for a message."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        if not valid_jaxtype(leaf):
            return a_type(leaf)
        leaf = jax.typeof(leaf)
    dtype = "float0" if leaf.dtype == jax.dtypes.float0 else leaf.dtype
    return f"{dtype}[{','.join(map(str, leaf.shape))}]"
