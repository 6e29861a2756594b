"""Generators: a random number generator is a State that holds a key, and a draw reads and replaces it.

A draw is ``key, sub = jax.random.split(key)``: ``sub`` is used, ``key`` is the new value. Since that is an
ordinary read and write of a State, numbers inside a transform are those outside, a loop makes a new draw at each
iteration, and whatever replays a function replays its draws. Every draw takes its key in ``_advance``, the
only place where a generator advances; a sampler that is given ``key=`` uses that and leaves the State alone.
A sampler that raises after it took a key hands it back to ``_withdraw``: the generator is as it was.

The value is raw key data (``uint32[2]``), because a typed key as an input leaves the fast path of
``jax.jit``; ``impl``, the name of the algorithm, is static. Nothing is computed before the first draw.
"""

import inspect
import operator
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer

from .._compat import varying_axes
from .._errors import StateTypeError, StateValueError, a_type
from .._seam.scope import claim, claim_lock, innermost
from .._state import State
from ._samplers import SAMPLERS, Sampler

__all__ = ["DEFAULT", "RandomState", "clone_rng", "default_rng", "on_default", "seed", "seed_context"]

_FAR = 2**32 - 1  # folded into a key, it makes one that no split makes


def _split_key(data, impl, n):
    keys = jr.split(jr.wrap_key_data(data, impl=impl), 2 if n is None else n + 1)
    return jr.key_data(keys[0]), keys[1] if n is None else keys[1:]


_split_at_once = jax.jit(_split_key, static_argnums=(1, 2))


def _to_key(seed):
    """Return the typed key that a seed, a key or raw key data stands for."""
    dtype = getattr(seed, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return seed
    if dtype == np.uint32 and np.ndim(seed) == 1:
        return jr.wrap_key_data(jnp.asarray(seed), impl="threefry2x32" if len(seed) == 2 else None)
    whole = isinstance(seed, int) and not isinstance(seed, bool)
    if whole or (dtype is not None and jnp.issubdtype(dtype, jnp.integer) and np.ndim(seed) == 0):
        return jr.key(seed)
    raise StateTypeError(
        f"a seed is an int, a key (jax.random.key) or raw key data (uint32[2]), got {a_type(seed)}: {seed!r}."
    )


class RandomState(State):
    """A random number generator: a State that holds a key, with every sampler as a method.

    Parameters
    ----------
    seed_or_key : int, key or uint32[2], optional
        Where to start; an int makes a key of JAX's default kind. Without it the operating system chooses.

    Attributes
    ----------
    impl : str
        The algorithm of the key, ``'threefry2x32'`` unless JAX's default or a key given says otherwise.

    Notes
    -----
    A copy of a generator draws the same numbers once more; `clone_rng` gives an independent one. Threads may share a
    generator and get different numbers; which, depends on who comes first.

    Examples
    --------
    >>> import jax
    >>> import brainstate
    >>> rng = brainstate.random.RandomState(42)
    >>> sub = jax.random.split(jax.random.key(42))[1]
    >>> bool((rng.normal(size=2) == jax.random.normal(sub, 2)).all())
    True
    """

    __slots__ = ("_backup", "claimed")

    impl: str

    def __new__(cls, *args, **kwargs):
        """Make the generator without a value; a copy or an unpickled generator starts without backup, too."""
        self = super().__new__(cls)
        self._backup = State(None, name="the backup of a RandomState")
        self.claimed = None  # the value that a thread computes with, and which; see `scope.claim`
        return self

    def __init__(self, seed_or_key: Any = None):
        data, impl = _to_data(seed_or_key)
        super().__init__(data, impl=impl)

    # ----------------------------------------------------------------------------------------- seeds and keys

    def seed(self, seed_or_key: Any = None) -> None:
        """Restart from a seed or key; without one the operating system chooses.

        Raises
        ------
        StateTypeError
            If the seed is not an int, a key or raw key data, for example a float.
        """
        data, impl = _to_data(seed_or_key)
        if impl != self.impl and isinstance(data, Tracer):
            raise StateValueError(
                f"{self.describe()} holds a key of kind {self.impl}, which cannot become {impl} inside a "
                f"transform: seed it before."
            )
        self.value, self.impl = data, impl

    def set_key(self, k: Any) -> None:
        """Set the key; the same as `seed` with a key."""
        self.seed(k)

    def get_key(self) -> jax.Array:
        """Return the present key. The generator does not advance."""
        return jr.wrap_key_data(jnp.asarray(self.value), impl=self.impl)

    def get_key_data(self) -> jax.Array:
        """Return the data of the present key. The generator does not advance."""
        return jnp.asarray(self.value)

    def split_key(self, n: int | None = None, backup: bool = False) -> jax.Array:
        """Return a new key, or an array of `n` keys, and advance the generator once.

        Parameters
        ----------
        n : int, optional
            How many keys: ``n + 1`` are made, the first is kept.
        backup : bool, optional
            Whether to remember the present key for `restore_key`.
        """
        if n is not None and not (isinstance(n, int | np.integer) and n >= 1):
            raise StateValueError(f"split_key(): n must be an int and at least 1, got {n!r}.")
        before, _, keys = self._advance(None if n is None else int(n))
        if backup:
            self._backup.value = before
        return keys

    def split_keys(self, n: int, backup: bool = False) -> jax.Array:
        """Return an array of `n` keys and advance the generator once; see `split_key`."""
        return self.split_key(operator.index(n), backup)

    def self_assign_multi_keys(self, n: int, backup: bool = True) -> None:
        """Hold `n` keys, one a lane, for a function that is mapped over the value; `restore_key` ends it."""
        self.value = jr.key_data(self.split_keys(n, backup))

    def restore_key(self) -> None:
        """Go back to the key that ``backup=True`` remembered, and forget it.

        Raises
        ------
        StateValueError
            If nothing was remembered.
        """
        if self._backup.value is None:
            raise StateValueError(f"{self.describe()} has no backup: call split_key(..., backup=True) first.")
        self.value, self._backup.value = self._backup.value, None

    @contextmanager
    def seed_context(self, s: Any) -> Iterator[None]:
        """Draw from a seed or key inside a ``with`` block; then go on as if nothing had been drawn."""
        value, impl = self.value, self.impl
        self.seed(s)
        try:
            yield
        finally:
            self.value, self.impl = value, impl

    def _advance(self, n: int | None = None) -> tuple[Any, Any, jax.Array]:
        """Advance, and return the value before, the value after, and one fresh key or `n` of them."""
        before = self.value
        with nullcontext() if innermost() is not None else claim_lock:
            if innermost() is None:
                before = claim(self)
            split = _split_key if isinstance(before, Tracer) else _split_at_once
            after, keys = split(before, self.impl, n)
            self.value = after
        return before, after, keys

    def _withdraw(self, before: Any, after: Any) -> None:
        """Undo an `_advance` whose key was not used, unless somebody has drawn, claimed or seeded since."""
        with nullcontext() if innermost() is not None else claim_lock:
            if self.value is after and (self.claimed is None or self.claimed[0] is not after):
                self.value = before

    def branch(self, value: Any) -> Any:
        """Return other key data to go on with, while another thread computes with ``value``."""
        with jax.ensure_compile_time_eval():
            return jr.key_data(jr.fold_in(jr.wrap_key_data(value, impl=self.impl), _FAR))

    def lanes(self, value: Any, size: int) -> tuple[Any, Any]:
        """Return raw key data for each of ``size`` lanes, and the generator's own after one draw.

        A lane folds its index into the key of that draw, so its numbers do not depend on how many lanes there are.
        """
        after, key = _split_key(value, self.impl, None)
        numbers = jnp.arange(size, dtype=jnp.uint32)
        axes = varying_axes(value)  # within shard_map, JAX wants both to vary along the same axes of the mesh
        numbers = jax.lax.pcast(numbers, axes, to="varying") if axes else numbers
        keys = jax.vmap(jr.fold_in, (None, 0))(key, numbers)
        return jr.key_data(keys), after


def _to_data(seed):
    """Return the raw data and the kind of a key; without a seed, numbers of the operating system."""
    if seed is None:
        return np.frombuffer(os.urandom(8), np.uint32), "threefry2x32"
    key = _to_key(seed)
    return jr.key_data(key), str(jr.key_impl(key))


# ----------------------------------------------------------------------------------------------- the samplers


def _method(sampler: Sampler) -> Callable[..., jax.Array]:
    def method(self, *args, **kwargs):
        key, arguments = sampler.bind(args, kwargs)
        if key is not None:
            return sampler.draw(_to_key(key), *arguments)
        before, after, key = self._advance()
        try:
            return sampler.draw(key, *arguments)
        except BaseException:  # an interrupt, too
            self._withdraw(before, after)
            raise

    method.__name__, method.__qualname__, method.__doc__ = (
        sampler.name,
        f"RandomState.{sampler.name}",
        sampler.doc,
    )
    method.__signature__ = sampler.signature  # pyright: ignore[reportFunctionMemberAccess]
    return method


for _sampler in SAMPLERS.values():
    setattr(RandomState, _sampler.name, _method(_sampler))


# -------------------------------------------------------------------------------------- the default generator

DEFAULT = RandomState()
DEFAULT.name = "brainstate.random.DEFAULT"


def on_default(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of ``brainstate.random`` that calls ``method`` on the default generator."""

    def function(*args, **kwargs):
        return method(DEFAULT, *args, **kwargs)

    signature = inspect.signature(method)
    function.__name__ = function.__qualname__ = method.__name__
    function.__module__, function.__doc__ = "brainstate.random", method.__doc__
    parameters = list(signature.parameters.values())[1:]
    function.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return function


def seed(seed_or_key: Any = None) -> None:
    """Restart the default generator, and NumPy's global one, from a seed or key.

    Parameters
    ----------
    seed_or_key : int, key or uint32[2], optional
        Without it the operating system chooses.
    """
    DEFAULT.seed(seed_or_key)
    if isinstance(seed_or_key, int | np.integer):
        np.random.seed(int(seed_or_key) % 2**32)
    elif not isinstance(DEFAULT.value, Tracer):
        np.random.seed(np.asarray(DEFAULT.value))


@contextmanager
def seed_context(s: Any) -> Iterator[None]:
    """Seed the default generator and NumPy's for a ``with`` block; then both go on as before it."""
    state = np.random.get_state()
    with DEFAULT.seed_context(s):
        try:
            seed(s)
            yield
        finally:
            np.random.set_state(state)


def default_rng(s: Any = None) -> RandomState:
    """Return the default generator, a new one that starts from the seed or key `s`, or `s`, a generator."""
    return DEFAULT if s is None else s if isinstance(s, RandomState) else RandomState(s)


def clone_rng(s: Any = None, clone: bool = True) -> RandomState:
    """Return a generator independent of `s`.

    Parameters
    ----------
    s : RandomState, int or key, optional
        A generator, by default the default one: it advances once, and the new one starts from the key drawn.
        From a seed or key a new generator starts there.
    clone : bool, optional
        If false, a generator is returned as is.
    """
    rng = default_rng(s)
    return RandomState(rng.split_key()) if clone and (s is None or rng is s) else rng
