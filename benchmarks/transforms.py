"""What States cost in loops, lanes and branches, as a ratio to the twin written by hand, and over depth of nesting.

    make bench          or          python benchmarks/transforms.py

A recurrent cell with three States is stepped 200 times, mapped over 100 lanes, and stepped in a branch. The twins
hand the three values through ``jax.lax.scan``, ``jax.vmap`` and ``jax.lax.cond`` themselves. Everything is compiled;
the first call traces and compiles, which is nearly all of it.

The picture shows how long a trace takes over the depth of nesting: linear, since each function runs once.
"""

import contextlib
import io
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import _timing
import jax
import jax.numpy as jnp
from ratios import HEAD, NOTES, compared

import brainstate
from brainstate import transform

STEPS, LANES, UNITS = 200, 100, 64
STEADY, FIRST, ACCUMULATED = 1.1, 1.3, 1.05  # the targets, as ratio to pure JAX
PARTS = 8  # of the batch that `accumulate` splits
DEPTHS = range(1, 9)
PICTURE = Path(__file__).parent / "trace_over_depth.png"


# --- a cell with three States, and its twin -------------------------------------------------------------------


def weights():
    return jnp.eye(UNITS) * 0.9


def cell(h, trace, count, x):
    """Return the new values, written by hand."""
    h = jnp.tanh(h @ weights() + x)
    return h, 0.9 * trace + 0.1 * h, count + 1


def values(*lanes):
    return jnp.zeros((*lanes, UNITS)), jnp.zeros((*lanes, UNITS)), jnp.zeros(lanes, jnp.int32)


def make_cell(*lanes):
    """Return the same as a function of ``x`` with States, and the States."""
    h, trace, count = (brainstate.HiddenState(value) for value in values(*lanes))

    def step(x):
        h.value = jnp.tanh(h.value @ weights() + x)
        trace.value = 0.9 * trace.value + 0.1 * h.value
        count.value = count.value + 1
        return trace.value.sum()

    return step, (h, trace, count)


def inputs():
    return jnp.sin(jnp.arange(STEPS * UNITS, dtype=jnp.float32)).reshape(STEPS, UNITS)


def looped(carry, xs):
    def body(carry, x):
        carry = cell(*carry, x)
        return carry, carry[1].sum()

    return jax.lax.scan(body, carry, xs)


def keeping(step, *lanes):
    """Return a call of ``step(carry, xs) -> (carry, result)`` that replaces the carry, as a loop without States."""
    run, carry, xs = jax.jit(lambda carry, xs: step(carry, xs)), values(*lanes), inputs()

    def call():
        nonlocal carry
        carry, out = run(carry, xs)
        return out

    return call


# --- the subjects: what each returns is called without arguments ---------------------------------------------


def pure_loop():
    return keeping(looped)


def our_loop():
    step, _ = make_cell()
    run, xs = transform.jit(lambda xs: transform.for_loop(step, xs)), inputs()
    return lambda: run(xs)


def pure_lanes():
    def mapped(carry, xs):
        def lane(carry, x):
            carry = cell(*carry, x)
            return carry, carry[1].sum()

        return jax.vmap(lane)(carry, xs[:LANES])

    return keeping(mapped, LANES)


def our_lanes():
    step, states = make_cell(LANES)
    run, xs = transform.jit(lambda xs: transform.vmap(step, in_states=list(states))(xs[:LANES])), inputs()
    return lambda: run(xs)


def pure_branch():
    def branch(carry, xs):
        return jax.lax.cond(xs.sum() < 1e9, looped, lambda carry, xs: (carry, jnp.zeros(STEPS)), carry, xs)

    return keeping(branch)


def our_branch():
    step, _ = make_cell()

    @transform.jit
    def run(xs):
        return transform.cond(xs.sum() < 1e9, lambda: transform.for_loop(step, xs), lambda: jnp.zeros(STEPS))

    xs = inputs()
    return lambda: run(xs)


def batch():
    return jnp.sin(jnp.arange(1024.0 * UNITS)).reshape(1024, UNITS)


def pure_accumulated():
    """Return the gradient of a batch in parts, by a scan written by hand."""

    def loss(w, x):
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    @jax.jit
    def run(w, x):
        def step(total, part):
            value, gradient = jax.value_and_grad(loss)(w, part)
            return jax.tree.map(jnp.add, total, (gradient, value)), None

        parts = x.reshape(PARTS, -1, UNITS)
        total, _ = jax.lax.scan(step, (jnp.zeros_like(w), jnp.float32(0)), parts)
        return jax.tree.map(lambda leaf: leaf / PARTS, total)

    w, x = jnp.eye(UNITS), batch()
    return lambda: run(w, x)


def our_accumulated():
    w = brainstate.ParamState(jnp.eye(UNITS))
    gradient = transform.grad(lambda x: jnp.mean(jnp.tanh(x @ w.value) ** 2), w, return_value=True)
    run, x = transform.jit(transform.accumulate(gradient, PARTS)), batch()
    return lambda: run(x)


# --- the rows -------------------------------------------------------------------------------------------------


def rows():
    subjects = {
        f"for_loop, {STEPS} steps of a cell": (pure_loop, our_loop),
        f"vmap, {LANES} lanes of a cell": (pure_lanes, our_lanes),
        "for_loop in cond": (pure_branch, our_branch),
    }
    for name, makers in subjects.items():
        for make in makers:
            make()()  # what JAX sets up once
        first, calls = _timing.first(*makers, rounds=15)
        yield compared(f"{name}: first call", *first, FIRST, typical=median)
        yield compared(f"{name}: steady", *_timing.steady(*calls, length=1e-2), STEADY)
    times = _timing.steady(pure_accumulated(), our_accumulated(), length=2e-2)
    yield compared(f"accumulate, {PARTS} parts of a batch: steady", *times, ACCUMULATED)


# --- the progress bar ------------------------------------------------------------------------------------------


def with_bar():
    """Measure what a progress bar adds to a long loop; return a sentence about it."""
    length = 20_000

    def make(pbar):
        step, _ = make_cell()
        x = inputs()[0]
        run = transform.jit(lambda: transform.for_loop(lambda _: step(x), jnp.arange(length), pbar=pbar))

        def call():
            out = run()
            jax.effects_barrier()
            return out

        return call

    with contextlib.redirect_stderr(io.StringIO()):
        plain, shown = _timing.steady(make(None), make(transform.ProgressBar()), rounds=8, length=1e-2)
    added = median(b - a for a, b in zip(plain, shown, strict=True))
    return (
        f"A progress bar, which moves 100 times, adds {_timing.duration(added)} to a loop of {length} steps that takes "
        f"{_timing.duration(median(plain))} without it."
    )


# --- over depth -----------------------------------------------------------------------------------------------


def pure_nest(depth):
    """Return a trace of ``depth`` loops, branches and lanes around the cell, written by hand."""

    def body(carry, x):
        carry = cell(*carry, x)
        return carry, carry[1].sum()

    def scan(body, carry, x):
        carry, ys = jax.lax.scan(body, carry, jnp.stack([x, x]))
        return carry, ys.sum()

    def cond(body, carry, x):
        return jax.lax.cond(x.sum() < 9, body, lambda carry, x: (carry, jnp.float32(0)), carry, x)

    def jit(body, carry, x):
        return jax.jit(body)(carry, x)

    for around in islice(cycle((scan, cond, jit)), depth):
        body = partial(around, body)
    return lambda: jax.make_jaxpr(body)(values(), inputs()[0])


def our_nest(depth):
    step, _ = make_cell()

    def scan(body, x):
        return transform.for_loop(body, jnp.stack([x, x])).sum()

    def cond(body, x):
        return transform.cond(x.sum() < 9, body, lambda x: jnp.float32(0), x)

    def jit(body, x):
        return transform.jit(body)(x)

    body = step
    for around in islice(cycle((scan, cond, jit)), depth):
        body = partial(around, body)
    return lambda: transform.make_jaxpr(body)(inputs()[0])


def over_depth():
    """Measure traces; return a sentence about them, and draw the picture."""
    times = {}
    for depth in DEPTHS:
        first, _ = _timing.first(partial(pure_nest, depth), partial(our_nest, depth), rounds=12)
        times[depth] = [median(rounds) for rounds in first]
    draw(times)
    low, high = min(DEPTHS), max(DEPTHS)
    each = [(times[high][i] - times[low][i]) / (high - low) for i in (0, 1)]
    return (
        f"Tracing the cell under {high} nested loops, branches and jits takes {_timing.duration(times[high][1])} "
        f"(pure JAX {_timing.duration(times[high][0])}), under one {_timing.duration(times[low][1])} "
        f"({_timing.duration(times[low][0])}): {_timing.duration(each[1])} a level ({_timing.duration(each[0])}), "
        f"whatever the depth.\n\n![Duration of a trace over depth]({PICTURE.name})"
    )


def draw(times):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for i, (name, marker) in enumerate((("pure JAX", "o"), ("BrainState", "s"))):
        axes.plot(list(times), [1e3 * pair[i] for pair in times.values()], marker=marker, label=name)
    axes.set(xlabel="nested transforms", ylabel="trace, ms", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(PICTURE, dpi=120)


def main():
    jax.config.update("jax_enable_compilation_cache", False)
    table = _timing.table(HEAD, list(rows()))
    _timing.publish(
        "Loops, lanes and branches", f"{_timing.machine()}.\n\n{table}\n\n{with_bar()}\n\n{over_depth()}\n\n{NOTES}"
    )


if __name__ == "__main__":
    main()
