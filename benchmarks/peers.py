"""The step of `ratios.py` in Flax NNX and Equinox, beside pure JAX and us, in turns in one process.

    make bench-peers          in an environment of its own; with ARGS=1000, 1000 parameters as well

Each is written as its documentation does it, and all compute the same values, which is checked first. Flax has
two rows: `nnx.jit` on the model, and `nnx.cached_partial`, which its guide on performance recommends.
"""

import sys
from functools import partial
from importlib.metadata import version
from statistics import median

import _timing
import equinox as eqx
import jax
import numpy as np
from flax import nnx
from ratios import RATE, arrays, our_step, pure_step

SIZES = (2, 10, 100)
HEAD = ("", "pure JAX", "ours", "Flax NNX", "NNX, cached", "Equinox")
NOTES = """\
A duration is that of the fastest round (of a first call: the median), followed in brackets by the median ratio to
pure JAX in the same round."""


class FlaxModel(nnx.Module):
    def __init__(self, values):
        self.weights = nnx.List([nnx.Param(w) for w in values])

    def __call__(self, x, y):
        return sum(((w[...] * x - y) ** 2).mean() for w in self.weights)


@nnx.jit
def flax_update(model, x, y):
    value, grads = nnx.value_and_grad(lambda model: model(x, y))(model)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda w, g: w - RATE * g, params, grads))
    return value


def flax_step(n, cached=False):
    values, x, y = arrays(n)
    model = FlaxModel(values)
    update = nnx.jit(flax_update.__wrapped__)  # compiled anew for each
    if cached:
        update = nnx.cached_partial(update, model)
        return lambda: update(x, y)
    return lambda: update(model, x, y)


class EquinoxModel(eqx.Module):
    weights: list

    def __call__(self, x, y):
        return sum(((w * x - y) ** 2).mean() for w in self.weights)


def equinox_step(n):
    values, x, y = arrays(n)
    model = EquinoxModel(values)

    @eqx.filter_jit
    def update(model, x, y):
        value, grads = eqx.filter_value_and_grad(lambda model: model(x, y))(model)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -RATE * g, grads)), value

    def call():
        nonlocal model
        model, value = update(model, x, y)
        return value

    return call


MAKERS = pure_step, our_step, flax_step, partial(flax_step, cached=True), equinox_step


def check():
    """Make sure that all take the same steps."""
    losses = [[float(step()) for _ in range(5)] for step in (make(3) for make in MAKERS)]
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-5)


def cells(times, typical):
    pure = times[0]
    ratios = [f" ({_timing.ratios(other, pure)[0]:.2f})" for other in times[1:]]
    return [_timing.duration(typical(t)) + r for t, r in zip(times, ["", *ratios], strict=True)]


def main(sizes):
    jax.config.update("jax_enable_compilation_cache", False)
    check()
    firsts, steadies = [], []
    for n in sizes:
        times, steps = _timing.first(*(partial(make, n) for make in MAKERS), rounds=5 if n < 1000 else 1)
        firsts.append([f"SGD step, {n} parameters: first call", *cells(times, median)])
        steadies.append([f"SGD step, {n} parameters: steady", *cells(_timing.steady(*steps), min)])
    about = _timing.machine(("flax", version("flax")), ("equinox", version("equinox")))
    _timing.publish("Peers", f"{about}.\n\n{_timing.table(HEAD, firsts + steadies)}\n\n{NOTES}")


if __name__ == "__main__":
    main([*SIZES, *map(int, sys.argv[1:])])
