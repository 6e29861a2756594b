"""What a prepared call costs, as a ratio to ``jax.jit(...).lower(...).compile()``; also put into RESULTS.md.

    python benchmarks/prepare.py

The step is that of ``ratios.py``: gradient descent on N independent small arrays, so nearly all of its time is what
surrounds the arithmetic. Both sides are compiled ahead of time, and take turns. A step that donates is compared with a
hand-written one that donates its parameters; memory is that of the compiled program (``memory_analysis``).
"""

from functools import partial

import _timing
import jax
import jax.numpy as jnp

import brainstate
from brainstate.transform import grad, prepare

PLAIN = {2: 1.15, 10: 1.15, 100: 1.15}  # number of States -> the target
DONATING = {10: 1.3, 100: 1.15}
RATE = 0.1
HEAD = ("", "pure JAX", "ours", "ratio", "of minima", "target", "")
NOTES = """\
Durations are those of the fastest round; `ratio` is the median of the ratios within a round, in which both take turns,
and what the target is held against; `of minima` compares the fastest rounds. Memory is at its peak: arguments, output
and temporaries, less what is donated. A call adds one to two microseconds, whatever the step, and a few hundredths of
one for each State; before States are donated they are looked through for arrays that something else holds."""


def arrays(n, size=4):
    """Return n different parameters, the input and what the output should be."""
    return [jnp.full(size, 1 + i / n) for i in range(n)], jnp.arange(size) / size, jnp.ones(size)


def loss(params, x, y):
    return sum(((w * x - y) ** 2).mean() for w in params)


def pure_step(n, donate=False, size=4):
    """Return one step on n parameters, written by hand, and its program."""
    params, x, y = arrays(n, size)

    def step(params, x, y):
        value, grads = jax.value_and_grad(loss)(params, x, y)
        return value, [w - RATE * g for w, g in zip(params, grads, strict=True)]

    compiled = jax.jit(step, donate_argnums=(0,) if donate else ()).lower(params, x, y).compile()

    def call():
        nonlocal params
        value, params = compiled(params, x, y)
        return value

    return call, compiled


def our_step(n, donate=False, size=4):
    """Return one step on n States."""
    params, x, y = arrays(n, size)
    params = [brainstate.ParamState(w) for w in params]

    def step(x, y):
        grads, value = grad(lambda: loss([w.value for w in params], x, y), params, return_value=True)()
        for w, g in zip(params, grads, strict=True):
            w.value = w.value - RATE * g
        return value

    prepared = prepare(step, x, y, donate_states=donate)
    return partial(prepared, x, y), prepared


def rows():
    for donate, targets in ((False, PLAIN), (True, DONATING)):
        for n, target in targets.items():
            pure, ours = _timing.steady(pure_step(n, donate)[0], our_step(n, donate)[0], rounds=120, length=3e-3)
            ratio, of_minima = _timing.ratios(ours, pure)
            name = f"prepared SGD step, {n} States{', donated' * donate}"
            times = _timing.duration(min(pure)), _timing.duration(min(ours))
            yield named(name, *times, ratio, f"{of_minima:.2f}", target)


def memory_row():
    """Return the peak memory of a step on 32 MiB of parameters."""
    pure, ours = pure_step(8, True, 2**20)[1].memory_analysis(), our_step(8, True, 2**20)[1].memory()
    theirs = pure.argument_size_in_bytes + pure.output_size_in_bytes + pure.temp_size_in_bytes
    theirs -= pure.alias_size_in_bytes
    mine = ours.peak
    return named("peak memory, 32 MiB, donated", f"{theirs:,} B", f"{mine:,} B", mine / theirs, "", 1.0)


def named(name, theirs, mine, ratio, of_minima, target):
    held = "met" if ratio <= target else "MISSED"
    return name, theirs, mine, f"{ratio:.2f}", of_minima, f"{target:.2f}", held


def main():
    jax.config.update("jax_enable_compilation_cache", False)
    table = _timing.table(HEAD, [*rows(), memory_row()])
    _timing.publish("Prepared and compiled ahead of time", f"{_timing.machine()}.\n\n{table}\n\n{NOTES}")


if __name__ == "__main__":
    main()
