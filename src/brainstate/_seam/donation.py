"""Arrays that a compiled function was given and took (donation), and the words for those who meet one afterwards."""

from collections.abc import Iterable
from typing import Any

import jax
from jax.core import Tracer

from .._errors import StateValueError

__all__ = ["donors", "is_deleted", "taken_error"]

#: The names of the functions that were given arrays. While there are none, nobody looks for taken arrays.
donors: dict[str, None] = {}


def is_deleted(tree: Any) -> bool:
    """Tell whether ``tree`` holds an array that was taken."""
    return any(map(_is_gone, jax.tree.leaves(tree)))


def _is_gone(leaf):
    return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted()


def taken_error(names: Iterable[str], by: str | None = None, why: Any = "") -> StateValueError:
    """Return the error for States of these names whose arrays are gone: ``by`` took them and then failed, or any."""
    whose = f"the arrays of {', '.join(names)}"
    if by is not None:
        last = (str(why).strip().splitlines() or [type(why).__name__])[-1]  # JAX puts the traceback before
        return StateValueError(
            f"{by} failed ({last}) after it had taken {whose} (donate_states=True), which are "
            f"gone. Assign new values, from a checkpoint for example, and look for the error without donate_states."
        )
    known = ", ".join(donors) or "a function of JAX"
    return StateValueError(
        f"{whose} are gone: given to {known} (donate_states or donate_argnums) while this State referred to them too, "
        f"as that of a clone does. Copy the arrays beforehand (copy.deepcopy(model), jnp.copy(state.value)), or assign "
        f"new values."
    )
