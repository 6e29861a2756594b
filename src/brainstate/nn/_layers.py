"""A few layers, enough to build a network: `Linear`, `Dropout`, `Sequential`."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from .. import random
from .._errors import StateValueError
from .._state import ParamState
from ._module import Module, as_shape

__all__ = ["Dropout", "Linear", "Sequential"]


def _lecun_normal(shape):
    return random.normal(size=shape) * shape[0] ** -0.5


class Linear(Module):
    """``x @ weight + bias`` along the last axis.

    Parameters
    ----------
    in_size, out_size : int or tuple of int
        The shapes of input and output without batch axes; they differ in the last axis only.
    w_init : callable, optional
        Makes the weight from its shape ``(in, out)``; by default normal with variance ``1 / in``.
    b_init : callable or None, optional
        Makes the bias from its shape ``(out,)``; by default zeros. With None there is no bias.
    name : str, optional
        A name.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from brainstate import nn
    >>> layer = nn.Linear(2, 3, w_init=jnp.ones)
    >>> layer(jnp.array([1.0, 2.0])).tolist()
    [3.0, 3.0, 3.0]
    """

    def __init__(
        self,
        in_size: int | Iterable[int],
        out_size: int | Iterable[int],
        w_init: Callable[[tuple], Any] = _lecun_normal,
        b_init: Callable[[tuple], Any] | None = jnp.zeros,
        name: str | None = None,
    ):
        super().__init__(name)
        self.in_size = shape = as_shape(in_size)
        self.out_size = out_shape = as_shape(out_size)
        if shape[:-1] != out_shape[:-1]:
            raise StateValueError(f"in_size {shape} and out_size {out_shape} may differ in the last axis only.")
        self.weight = ParamState(w_init((shape[-1], out_shape[-1])))
        if b_init is not None:
            self.bias = ParamState(b_init((out_shape[-1],)))

    def update(self, x: jax.Array) -> jax.Array:
        """Return the output for a batch, or a single, ``x``."""
        y = jnp.dot(x, self.weight.value)
        return y + jnp.expand_dims(self.bias.value, range(y.ndim - 1)) if hasattr(self, "bias") else y


class Dropout(Module):
    """Set entries to zero at random and scale the others up, so that the mean stays.

    Parameters
    ----------
    rate : float
        The probability that an entry is set to zero, at least 0 and below 1.
    name : str, optional
        A name.

    Notes
    -----
    Whether to drop is an argument of the call and no flag of the layer: a compiled function would not notice
    that a flag has changed.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from brainstate import nn
    >>> drop = nn.Dropout(0.5)
    >>> sorted(set(drop(jnp.ones(100)).tolist()))
    [0.0, 2.0]
    >>> drop(jnp.ones(3), train=False).tolist()
    [1.0, 1.0, 1.0]
    """

    def __init__(self, rate: float = 0.5, name: str | None = None):
        super().__init__(name)
        if not 0 <= rate < 1:
            raise StateValueError(f"rate is the probability to drop an entry, 0 <= rate < 1, not {rate!r}.")
        self.rate = rate

    def update(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Return ``x`` with entries dropped, or as it is if not in training."""
        if not train or self.rate == 0:
            return x
        kept = random.bernoulli(1 - self.rate, jnp.shape(x))
        return jnp.where(kept, x / (1 - self.rate), 0.0)


class Sequential(Module):
    """Modules and functions, one after the other.

    Parameters
    ----------
    *layers : callable
        Called in turn, each with the output of the one before; the first gets all arguments.
    name : str, optional
        A name.

    Examples
    --------
    >>> import jax
    >>> from brainstate import nn
    >>> net = nn.Sequential(nn.Linear(4, 8), jax.nn.relu, nn.Linear(8, 2))
    >>> net(jax.numpy.ones((5, 4))).shape
    (5, 2)
    >>> [name for name, _ in net.named_parameters()]
    ['layers.0.bias', 'layers.0.weight', 'layers.2.bias', 'layers.2.weight']
    """

    def __init__(self, *layers: Callable, name: str | None = None):
        super().__init__(name)
        self.layers = list(layers)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the last layer returns."""
        first, *others = self.layers
        x = first(*args, **kwargs)
        for layer in others:
            x = layer(x)
        return x

    def __getitem__(self, index: int | slice) -> Any:
        return Sequential(*self.layers[index]) if isinstance(index, slice) else self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)
