"""What it costs to look for a wrong gradient, as a ratio to one gradient: one table, also put into RESULTS.md.

    python benchmarks/trust.py

The model is a small perceptron of the size of a digit classifier. Durations have no target, since these are called
once, to find a mistake. An unused tap has one: the program has to be the same.
"""

import _timing
import jax
import jax.numpy as jnp

import brainstate
from brainstate import nn
from brainstate.transform import check_grads, explain, grad, jit, make_jaxpr, tap, taps

SIZES, BATCH = (64, 128, 10), 64
HEAD = ("", "time", "compiled gradients", "gradients outside jit")
NOTES = """\
Durations are those of the fastest round, ratios the median of those within a round. `explain` and `check_grads` look
at the function as it is given, outside jit and compiled: the first calls it a few times and traces it once, the second
calls it some twenty times, also in double precision, and differentiates it in both modes, batched as well."""


class Perceptron(nn.Module):
    """Two dense layers with a point to look at in between."""

    def __init__(self, point):
        super().__init__()
        self.hidden, self.output, self.point = nn.Linear(*SIZES[:2]), nn.Linear(*SIZES[1:]), point

    def update(self, x):
        return self.output(self.point(jnp.tanh(self.hidden(x))))


def loss_of(point):
    """Return the loss of a model with this point, and its parameters."""
    brainstate.random.seed(0)
    model = Perceptron(point)

    def loss(x, y):
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(model(x)) * y, axis=-1))

    return loss, model


def sentence(gradients, *args):
    """Compare the programs of the gradient without and with a tap."""
    plain, tapped = (make_jaxpr(gradient)(*args)[0] for gradient in gradients)
    counts = [len(program.jaxpr.eqns) for program in (plain, tapped)]
    verdict = "met" if str(plain) == str(tapped) else "MISSED"
    return (
        f"The gradient is a program of {counts[0]} operations, with a tap that nobody listens to of {counts[1]}; "
        f"target: the same program, {verdict}."
    )


def looked_at(loss, params, x, y):
    """Return {name: call} of what is called once in a while."""
    compiled = jit(loss)
    return {
        "explain": lambda: explain(loss, x, y, grad_states=params),
        "explain, of a compiled function": lambda: explain(compiled, x, y, grad_states=params),
        "check_grads": lambda: check_grads(loss, x, y, grad_states=params),
        "check_grads, of a compiled function": lambda: check_grads(compiled, x, y, grad_states=params),
        "check_grads, compiled, float64": lambda: check_grads(compiled, x, y, grad_states=params, float64=True),
    }


def main():
    jax.config.update("jax_enable_compilation_cache", False)
    x = jax.random.normal(jax.random.key(0), (BATCH, SIZES[0]))
    y = jax.nn.one_hot(jnp.arange(BATCH) % SIZES[-1], SIZES[-1])
    loss, params = loss_of(lambda h: h)
    gradients = {"plain": grad(loss, params), "tapped": grad(*loss_of(lambda h: tap("hidden", h)))}
    plain, tapped = (jit(gradient) for gradient in gradients.values())

    def listened():
        with taps():
            return tapped(x, y)

    fast = _timing.steady(lambda: plain(x, y), lambda: tapped(x, y), listened, length=5e-3, rounds=40)
    slow = looked_at(loss, params, x, y)
    calls = (lambda: plain(x, y), lambda: gradients["plain"](x, y), *slow.values())
    base, outside, *times = _timing.steady(*calls, length=5e-3, rounds=6)

    def row(name, spent, *bases):
        ratios = [f"{_timing.ratios(spent, base)[0]:.3g}" for base in bases]
        return (name, _timing.duration(min(spent)), *ratios, *[""] * (2 - len(ratios)))

    rows = [
        row("gradient, compiled", fast[0]),
        row("… with a tap, unused", fast[1], fast[0]),
        row("… with a tap that is listened to", fast[2], fast[0]),
        row("gradient, outside jit", outside, base),
        *(row(name, spent, base, outside) for name, spent in zip(slow, times, strict=True)),
    ]
    layers = "-".join(map(str, SIZES))
    text = f"{_timing.machine()}. Perceptron {layers}, {BATCH} examples.\n\n{_timing.table(HEAD, rows)}\n\n{NOTES}"
    _timing.publish("Looking for a wrong gradient", f"{text}\n\n{sentence(gradients.values(), x, y)}")


if __name__ == "__main__":
    main()
