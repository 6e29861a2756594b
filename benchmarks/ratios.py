"""What we cost, as a ratio to the same thing written by hand in JAX: one table, also put into RESULTS.md.

    make bench          or          python benchmarks/ratios.py

The step is one of gradient descent on N independent small arrays, so nearly all of it is what surrounds the
arithmetic: finding the inputs, the call, keeping the results. Its hand-written twin keeps its parameters in a list
that each call replaces, as a loop without States does. The *null* step runs through the same dispatch and
computes nothing.
"""

import os
import subprocess
import sys
import timeit
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median

import _timing
import jax
import jax.numpy as jnp

import brainstate
from brainstate import nn

SIZES = (2, 10, 100, 1000)
STEADY = dict(zip(SIZES, (1.5, 1.25, 1.1, 1.0), strict=True))  # the targets, as ratio to pure JAX
FIRST, EAGER, TRIVIAL = 1.25, 1.1, 1.4
READ, WRITE, CREATE, IMPORT = 1.2e-6, 1.5e-6, 1e-6, 0.1  # the targets in seconds

ROUNDS = dict(zip(SIZES, (12, 10, 6, 2), strict=True))  # of first calls, which get long
RATE = 0.1
HEAD = ("", "pure JAX", "ours", "ratio", "of minima", "null", "traces", "target", "")
NOTES = """\
Durations are those of the fastest round, first calls and the import the median. `ratio` is the median of the ratios
within a round, in which pure JAX and we take turns, and what the target is held against; `of minima` compares the
fastest rounds. `null`: the same dispatch around a compiled identity. `traces`: how often Python ran through a step,
from its first call to its last."""

traces = Counter()


# --- the subjects: what each returns is called without arguments --------------------------------------------


def arrays(n):
    """Return n different starting values, the input and what the output should be."""
    return [jnp.full(4, 1 + i / n) for i in range(n)], jnp.arange(4.0), jnp.ones(4)


def pure_step(n):
    """Return one step on n parameters, written by hand."""
    params, x, y = arrays(n)

    @jax.jit
    def step(params, x, y):
        def loss(params):
            return sum(((w * x - y) ** 2).mean() for w in params)

        value, grads = jax.value_and_grad(loss)(params)
        return value, [w - RATE * g for w, g in zip(params, grads, strict=True)]

    def call():
        nonlocal params
        value, params = step(params, x, y)
        return value

    return call


def our_step(n):
    """Return one step on n States."""
    params, x, y = arrays(n)
    params = [brainstate.ParamState(w) for w in params]

    @brainstate.transform.jit
    def step(x, y):
        traces[n] += 1

        def loss():
            return sum(((w.value * x - y) ** 2).mean() for w in params)

        grads, value = brainstate.transform.grad(loss, params, return_value=True)()
        for w, g in zip(params, grads, strict=True):
            w.value = w.value - RATE * g
        return value

    return lambda: step(x, y)


def null_step(n):
    """Return a step that reads and writes n States and computes nothing."""
    params, x, y = arrays(n)
    params = [brainstate.ParamState(w) for w in params]

    @brainstate.transform.jit
    def step(x, y):
        for w in params:
            w.value = w.value
        return x

    return lambda: step(x, y)


def pure_trivial():
    count = jnp.float32(0)
    add = jax.jit(lambda count: count + 1)

    def call():
        nonlocal count
        count = add(count)

    return call


def our_trivial():
    count = brainstate.State(jnp.float32(0))

    @brainstate.transform.jit
    def call():
        count.value = count.value + 1

    return call


def pure_layers(n):
    """Return a gradient through n layers that is not compiled; the layers compute what `nn.Linear` computes."""
    params = [(jnp.eye(16), jnp.zeros(16)) for _ in range(n)]
    x = jnp.ones((8, 16))

    def loss(params):
        h = x
        for weight, bias in params:
            h = jnp.dot(h, weight)
            h = jnp.tanh(h + jnp.broadcast_to(bias, h.shape))
        return h.mean()

    gradient = jax.grad(loss)
    return lambda: gradient(params)


def our_layers(n):
    layers = [nn.Linear(16, 16, w_init=lambda shape: jnp.eye(*shape)) for _ in range(n)]
    x = jnp.ones((8, 16))

    def loss():
        h = x
        for layer in layers:
            h = jnp.tanh(layer(h))
        return h.mean()

    return brainstate.transform.grad(loss, [s for layer in layers for s in layer.parameters()])


def pure_many(n):
    """Return a gradient with respect to n parameters that is not compiled."""
    params, x, y = arrays(n)
    gradient = jax.grad(lambda params: sum(((w * x - y) ** 2).mean() for w in params))
    return lambda: gradient(params)


def our_many(n):
    params, x, y = arrays(n)
    params = [brainstate.ParamState(w) for w in params]
    return brainstate.transform.grad(lambda: sum(((w.value * x - y) ** 2).mean() for w in params), params)


# --- the rows -----------------------------------------------------------------------------------------------


def verdict(value, target):
    return "met" if value <= target else "MISSED"


def compared(name, pure, ours, target, *, typical=min, null=None, count=""):
    """Return a row that holds the ratio of ours to pure JAX against a target."""
    ratio, of_minima = _timing.ratios(ours, pure)
    times = (_timing.duration(typical(pure)), _timing.duration(typical(ours)), f"{ratio:.2f}", f"{of_minima:.2f}")
    return name, *times, "" if null is None else _timing.duration(null), count, f"{target:.2f}", verdict(ratio, target)


def absolute(name, seconds, target):
    """Return a row that holds a duration against a target."""
    ours = _timing.duration(seconds)
    return name, "", ours, "", "", "", "", _timing.duration(target), verdict(seconds, target)


def step_rows():
    for make in (pure_step, our_step):
        make(3)()  # what JAX sets up once
    rows = {"first call": [], "steady": []}
    for n in SIZES:
        traces.clear()
        first, steps = _timing.first(partial(pure_step, n), partial(our_step, n), rounds=ROUNDS[n])
        length = 2e-2 if n == 1000 else 5e-3
        steady = _timing.steady(*steps, length=length)
        (null,) = _timing.steady(null_step(n), length=length, rounds=30)
        runs = f"{traces[n] / ROUNDS[n]:g}"
        name = f"SGD step, {n} States: "
        rows["first call"].append(compared(name + "first call", *first, FIRST, typical=median, count=runs))
        rows["steady"].append(compared(name + "steady", *steady, STEADY[n], null=min(null), count=runs))
    return rows["first call"] + rows["steady"]


def other_rows():
    yield compared("jit, one State, one addition", *_timing.steady(pure_trivial(), our_trivial()), TRIVIAL)
    for n in (2, 10):
        times = _timing.steady(pure_layers(n), our_layers(n), length=2e-2, rounds=30)
        yield compared(f"grad without jit, {n} Linear layers", *times, EAGER)
    times = _timing.steady(pure_many(50), our_many(50), length=2e-2, rounds=30)
    yield compared("grad without jit, 50 parameters", *times, EAGER)


def state_rows():
    names = {"state": brainstate.State(jnp.zeros(3)), "x": jnp.ones(3), "State": brainstate.State}
    for what, statement, target in (
        ("read", "state.value", READ),
        ("write", "state.value = x", WRITE),
        ("creation", "State(x)", CREATE),
    ):
        times = timeit.Timer(statement, globals=names).repeat(40, 2000)
        yield absolute(f"State {what}", min(times) / 2000, target)


def import_row():
    """Return what `import brainstate` adds to `import jax`, in new processes; the bytecode is cached."""
    program = "import time, jax; t = time.perf_counter(); import brainstate; print(time.perf_counter() - t)"
    source = Path(brainstate.__file__).parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = str(source)
    command = [sys.executable, "-c", program]
    runs = [subprocess.run(command, env=environment, capture_output=True, check=True) for _ in range(7)]
    return absolute("import, on top of jax", median(float(run.stdout) for run in runs), IMPORT)


def main():
    jax.config.update("jax_enable_compilation_cache", False)
    rows = [*step_rows(), *other_rows(), *state_rows(), import_row()]
    _timing.publish("Ours and pure JAX", f"{_timing.machine()}.\n\n{_timing.table(HEAD, rows)}\n\n{NOTES}")


if __name__ == "__main__":
    main()
