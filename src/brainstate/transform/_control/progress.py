"""A progress bar that moves from inside a compiled loop.

The body calls back at most about a hundred times per loop, whatever its length, by ``jax.debug.callback``, which
is the one callback that survives ``grad``, ``vmap`` and rematerialisation. A call costs 0.1 to 0.6 ms.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..._arrays import at_least
from ..._compat import optional
from ..._errors import StateValueError
from ..._functions import named_after

__all__ = ["ProgressBar", "with_progress"]


@dataclass(frozen=True)
class ProgressBar:
    """How to show the progress of a loop; needs the optional package tqdm.

    Parameters
    ----------
    freq : int, optional
        Iterations between two movements; by default a hundredth of the loop.
    desc : str, optional
        A text in front of the bar.

    Raises
    ------
    StateTypeError, StateValueError
        If ``freq`` is not a positive int.

    Examples
    --------
    >>> import brainstate
    >>> brainstate.transform.ProgressBar(desc="simulate")
    ProgressBar(freq=None, desc='simulate')
    """

    freq: int | None = None
    desc: str | None = None

    def __post_init__(self):
        at_least("ProgressBar: freq", self.freq, 1, "a number of iterations", none="a hundredth of the loop")


class _Bar:
    """The bar of one run of one loop: opens at the first call, closes at the last."""

    def __init__(self, length, spec):
        tqdm = optional("tqdm.auto", "a ProgressBar", "progress").tqdm  # it is missed where the loop is called
        self.make, self.length, self.spec, self.bar, self.done = tqdm, length, spec, None, 0

    def move(self, done):
        """Show that ``done`` iterations are done."""
        if self.bar is None or done < self.done:
            self.bar, self.done = self.make(total=self.length, desc=self.spec.desc), 0
        self.bar.update(int(done) - self.done)
        self.done = int(done)
        if self.done >= self.length:
            self.bar.close()
            self.bar, self.done = None, 0


def with_progress(f: Callable, xs: Any, length: int, reverse: bool, spec: ProgressBar | int) -> tuple[Callable, Any]:
    """Return ``f`` and ``xs`` of a scan with a counter among ``xs`` that moves the bar."""
    spec = ProgressBar(spec) if type(spec) is int else spec
    if not isinstance(spec, ProgressBar):
        raise StateValueError(f"pbar={spec!r}: give a ProgressBar(), or the number of iterations between movements.")
    every, bar = spec.freq or max(1, length // 100), _Bar(length, spec)
    count = jnp.arange(1, length + 1)

    def body(carry, counted):
        done, x = counted
        jax.lax.cond(
            (done % every == 0) | (done == length),
            lambda d: jax.debug.callback(bar.move, d, ordered=False),
            lambda d: None,
            done,
        )
        return f(carry, x)

    return named_after(body, f), (count[::-1] if reverse else count, xs)
