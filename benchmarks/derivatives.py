"""What products with second derivatives cost, as a ratio to one gradient: one table, also put into RESULTS.md.

    python benchmarks/derivatives.py

The model is a perceptron of the size that one trains on small images. All subjects are compiled, and take turns in
one process with the gradient that they are compared with.
"""

import itertools

import _timing
import jax
import jax.numpy as jnp

import brainstate
from brainstate import nn
from brainstate.transform import fisher, ggn, grad, hvp, jit

SIZES, BATCH = (784, 512, 512, 10), 256
HEAD = ("", "time", "gradients", "of minima", "target", "")
NOTES = """\
Durations are those of the fastest round. `gradients` is the median of the ratios to the gradient within a round, and
what the target is held against; `of minima` compares the fastest rounds. The matrix products of the gradient come up to
three times in a Hessian product, forward over reverse, since the derivative of one product is two; a Gauss-Newton or
Fisher product runs the model forward, along the vector, and back."""


class Perceptron(nn.Module):
    """Dense layers with tanh in between."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(a, b) for a, b in itertools.pairwise(SIZES)]

    def update(self, x):
        *hidden, last = self.layers
        for layer in hidden:
            x = jnp.tanh(layer(x))
        return last(x)


def cross_entropy(out, x, y):
    return -(jax.nn.log_softmax(out) * jax.nn.one_hot(y, SIZES[-1])).sum(axis=-1).mean()


def subjects():
    """Return {name: (call, target)}; the first is the gradient."""
    model = Perceptron()
    params = model.states(brainstate.ParamState)
    x = jax.random.normal(jax.random.key(0), (BATCH, SIZES[0]))
    y = jnp.arange(BATCH) % SIZES[-1]

    def outputs(x, y):
        return model(x)

    def loss(x, y):
        return cross_entropy(model(x), x, y)

    gradient = jit(grad(loss, params))
    v = gradient(x, y)

    def along(product):
        compiled = jit(product)
        return lambda: compiled(v, x, y)

    everything = {"return_grad": True, "return_value": True}
    return {
        "gradient": (lambda: gradient(x, y), None),
        "Hessian product": (along(hvp(loss, params)), 3.0),
        "Hessian product, gradient and value": (along(hvp(loss, params, **everything)), 3.3),
        "Gauss-Newton product": (along(ggn(outputs, cross_entropy, params)), 3.0),
        "Gauss-Newton product, gradient and value": (along(ggn(outputs, cross_entropy, params, **everything)), 3.3),
        "Fisher product": (along(fisher(outputs, "categorical", params)), 3.0),
    }


def main():
    jax.config.update("jax_enable_compilation_cache", False)
    found = subjects()
    times = _timing.steady(*(call for call, _ in found.values()), length=2e-2, rounds=40)
    rows = [("gradient", _timing.duration(min(times[0])), "", "", "", "")]
    for (name, (_, target)), spent in list(zip(found.items(), times, strict=True))[1:]:
        ratio, of_minima = _timing.ratios(spent, times[0])
        verdict = "met" if ratio <= target else "MISSED"
        rows.append((name, _timing.duration(min(spent)), f"{ratio:.2f}", f"{of_minima:.2f}", f"{target:.1f}", verdict))
    layers = "-".join(map(str, SIZES))
    text = f"{_timing.machine()}. Perceptron {layers}, {BATCH} examples.\n\n{_timing.table(HEAD, rows)}\n\n{NOTES}"
    _timing.publish("Derivatives", text)


if __name__ == "__main__":
    main()
