"""Random numbers: generators that are States, and samplers with NumPy's names and parameters.

`RandomState` is a State that holds a key and has every sampler as a method; the functions here are those
methods on the generator `DEFAULT`. How a draw works is in ``_generator``, the table in ``_samplers``.

Each sampler holds its law for all parameters that its docstring allows, rounded to the dtype: numbers nearer to 0
than the dtype's smallest are 0, numbers beyond its largest are infinite. A tail of a probability below the
distance of two uniform numbers (2^-23 in float32, 2^-52 in float64) is lost.
"""

from ._generator import DEFAULT, RandomState, clone_rng, default_rng, seed, seed_context
from ._generator import on_default as _on_default
from ._samplers import SAMPLERS as _SAMPLERS

_KEY_METHODS = [
    "get_key",
    "get_key_data",
    "restore_key",
    "self_assign_multi_keys",
    "set_key",
    "split_key",
    "split_keys",
]
_METHODS = [*_KEY_METHODS, *_SAMPLERS]
globals().update({name: _on_default(getattr(RandomState, name)) for name in _METHODS})

__all__ = ["DEFAULT", "RandomState", "clone_rng", "default_rng", "seed", "seed_context"]
__all__ += _METHODS  # pyright: ignore[reportUnsupportedDunderAll]
