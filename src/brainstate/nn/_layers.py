"""A few layers, enough to build a network: `Linear`, `Dropout`, `Sequential`."""

import inspect
from collections.abc import Callable, Iterable
from inspect import Parameter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import random
from .._errors import StateTypeError, StateValueError
from .._functions import positional_parameters
from .._state import ParamState
from ._module import InputError, Module, as_shape

__all__ = ["Dropout", "Linear", "Sequential"]


def _lecun_normal(shape):
    return random.normal(size=shape) * shape[0] ** -0.5


def _initial(what, init, shape):
    """Return the first value that ``init`` makes: from the shape, or as the initialisers of JAX from key and shape."""
    if not callable(init):
        raise StateTypeError(f"{what} is a function that makes the first value from its shape, not {init!r}.")
    try:
        signature = inspect.signature(init)
        names, _ = positional_parameters(signature)
        required = [name for name in names if signature.parameters[name].default is Parameter.empty]
    except (TypeError, ValueError):  # a function that is not written in Python
        required = []
    value: Any = init(*(shape,) if len(required) < 2 else (random.split_key(), shape, float)[: len(required)])
    if jnp.shape(value) != shape:
        raise StateValueError(f"{what} made a value of shape {jnp.shape(value)}, where {shape} is needed.")
    return value


class Linear(Module):
    """``x @ weight + bias`` along the last axis.

    Parameters
    ----------
    in_size, out_size : int or tuple of int
        The shapes of input and output without batch axes; they differ in the last axis only.
    w_init : callable, optional
        Makes the weight from its shape ``(in, out)``, or from a key, the shape and, if it has no default, a dtype, as
        those of ``jax.nn.initializers`` do; by default normal with variance ``1 / in``.
    b_init : callable or None, optional
        Makes the bias from its shape ``(out,)`` in the same way; by default zeros. With None there is no bias.
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
        w_init: Callable[..., Any] = _lecun_normal,
        b_init: Callable[..., Any] | None = jnp.zeros,
        name: str | None = None,
    ):
        super().__init__(name)
        self.in_size = shape = as_shape(in_size)
        self.out_size = out_shape = as_shape(out_size)
        if shape[:-1] != out_shape[:-1]:
            raise StateValueError(f"in_size {shape} and out_size {out_shape} may differ in the last axis only.")
        self.weight = ParamState(_initial("w_init", w_init, (shape[-1], out_shape[-1])))
        if b_init is not None:
            self.bias = ParamState(_initial("b_init", b_init, (out_shape[-1],)))

    def update(self, x: jax.Array) -> jax.Array:
        """Return the output for a batch, or a single, ``x``."""
        self._check(jnp.shape(x), self.weight.value.shape)
        y = jnp.dot(x, self.weight.value)
        return y + jnp.expand_dims(self.bias.value, range(y.ndim - 1)) if hasattr(self, "bias") else y

    def _check(self, given, shape):
        """Refuse an input of another shape, and States that were stacked."""
        if len(shape) != 2:
            raise InputError(
                self,
                f"its weight has shape {shape}, one layer has two axes. If it was stacked by vmap_new_states, call it "
                f"under brainstate.transform.vmap with in_states=<the Module>, which gives each lane its own weight.",
            )
        size = self.in_size or ()
        if given[-len(size) :] != size:
            raise InputError(
                self,
                f"the last {'axis' if len(size) == 1 else f'{len(size)} axes'} of the input must be in_size={size}, "
                f"after any batch axes; the input has shape {given}.",
            )


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
    Whether to drop is an argument of the call and not a flag of the layer: a flag that changes means that compiled
    functions are traced again.

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
        if not (isinstance(rate, int | float) or (hasattr(rate, "dtype") and np.shape(rate) == ())):
            raise StateTypeError(f"rate is a number, the probability to drop an entry, not {rate!r}.")
        if not 0 <= rate < 1:
            raise StateValueError(f"rate is the probability to drop an entry, 0 <= rate < 1, not {rate!r}.")
        self.rate = rate

    def update(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Return ``x`` with entries dropped, or as it is if not in training."""
        if not train or self.rate == 0:
            return x
        kept = random.bernoulli(1 - self.rate, jnp.shape(x))
        return jnp.where(kept, x / (1 - self.rate), 0.0)


class _Taker(NamedTuple):
    """The parameters of a layer of `Sequential`: ``places`` go by position, ``names`` by name."""

    places: tuple[str, ...]
    most: float  # arguments by position
    names: tuple[str, ...]
    any_name: bool
    names_others: bool  # whether its places name further arguments: those of a function mean something else

    def takes(self, name):
        return self.any_name or name in self.names


def _taker(layer) -> _Taker:
    if type(layer) is Sequential:
        inside = list(map(_taker, layer.layers))
        names = tuple(dict.fromkeys(name for taker in inside for name in taker.names))
        first = inside[0] if inside else _Taker((), 1, (), False, False)
        return _Taker(first.places, first.most, names, any(taker.any_name for taker in inside), True)
    module = isinstance(layer, Module)
    try:
        found = inspect.signature(layer.update if module and type(layer).__call__ is Module.__call__ else layer)
    except (TypeError, ValueError):  # a function that is not written in Python
        return _Taker((), 1, (), False, module)
    kinds = {name: p.kind for name, p in found.parameters.items()}
    places, more = positional_parameters(found)
    most = float("inf") if more else len(places)
    names = tuple(
        name for name, kind in kinds.items() if kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    )
    return _Taker(tuple(places), most, names, Parameter.VAR_KEYWORD in kinds.values(), module)


class Sequential(Module):
    """Modules and functions, one after the other.

    Parameters
    ----------
    *layers : callable
        Called in turn, each with the output of the one before.
    name : str, optional
        A name.

    Raises
    ------
    StateTypeError
        If a layer cannot be called; and by a call with an argument that no layer takes.

    Notes
    -----
    A call hands its first argument to the first layer, and each keyword to all layers whose signature has it. Further
    positional arguments go to the first layer if it takes that many, and to all others by their names there,
    or else in the first Module that takes that many. A layer that takes any keyword gets all of them.

    Examples
    --------
    >>> import jax
    >>> from brainstate import nn
    >>> net = nn.Sequential(nn.Linear(4, 8), jax.nn.relu, nn.Dropout(0.5), nn.Linear(8, 2))
    >>> net(jax.numpy.ones((5, 4)), train=False).shape
    (5, 2)
    >>> [name for name, _ in net.named_parameters()]
    ['layers.0.bias', 'layers.0.weight', 'layers.3.bias', 'layers.3.weight']
    """

    def __init__(self, *layers: Callable, name: str | None = None):
        super().__init__(name)
        for i, layer in enumerate(layers):
            if not callable(layer):
                raise StateTypeError(
                    f"layer {i} of Sequential is a {type(layer).__name__}, which cannot be called: give Modules and "
                    f"functions, one argument each."
                )
        self.layers = list(layers)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of the last layer, or the argument if there is no layer."""
        layers = list(self.layers)
        if len(args) == 1 and not kwargs:
            (x,) = args
            for layer in layers:
                x = layer(x)
            return x
        if not args and not kwargs:
            raise StateTypeError("Sequential needs an argument, the input of its first layer.")
        takers = list(map(_taker, layers))
        front = args if takers and takers[0].most >= len(args) else args[:1]  # go to the first layer by position
        for i, (layer, given) in enumerate(zip(layers, self._deal_keywords(takers, front, args, kwargs), strict=True)):
            front = (layer(*front, **given),) if i == 0 else (layer(front[0], **given),)
        return front[0]

    def _deal_keywords(self, takers, front, args, kwargs):
        """Return the keywords for each layer."""
        namers = [t for i, t in enumerate(takers) if (i == 0 or t.names_others) and len(t.places) >= len(args)]
        more = dict(zip(namers[0].places[1:], args[1:], strict=False)) if namers else {}
        if len(more) < len(args[len(front) :]) or more.keys() & kwargs.keys():
            raise StateTypeError(
                f"Sequential got {len(args)} positional arguments, and no Module in it takes that many, or one of them "
                f"was given by name as well: give all but the first by name."
            )
        by_place = [takers[0].places[: len(front)] if i == 0 else taker.places[:1] for i, taker in enumerate(takers)]
        dealt = [
            {name: x for name, x in (more | kwargs).items() if taker.takes(name) and name not in filled}
            for taker, filled in zip(takers, by_place, strict=True)
        ]
        left = [name for name in kwargs if not any(name in given for given in dealt)]
        if left:
            known = sorted(
                {name for taker in takers for name in taker.names} - {n for names in by_place for n in names}
            )
            raise StateTypeError(
                f"no layer of Sequential takes the argument {left[0]!r}; by name, its layers take "
                f"{', '.join(map(repr, known)) or 'nothing'}."
            )
        return dealt

    def __getitem__(self, index: int | slice) -> Any:
        return Sequential(*self.layers[index]) if isinstance(index, slice) else self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)
