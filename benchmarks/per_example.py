"""Gradients of single examples, and derivatives in chunks: time and memory as ratios, put into RESULTS.md.

    python benchmarks/per_example.py

Norms of the gradients of a batch are compared with what one would write in pure JAX: a Python loop over a compiled
gradient, and ``jax.vmap`` of the gradient with the norm after it. Then what chunks save of the memory of all at
once, and what they cost in time. Memory is the temporary memory of the compiled program (``memory_analysis``).
"""

import _timing
import jax
import jax.numpy as jnp

import brainstate
from brainstate import transform

BATCH, WIDTH, STEPS, ROUNDS = 64, 512, 16, 7
HEAD = ("", "pure JAX", "ours", "ratio", "of minima")
HEAD_MEMORY = ("", "all at once", "in chunks", "ratio", "time", "of minima")
NOTES = f"""\
Batches of {BATCH} examples and two layers of width {WIDTH}; in a sequence an example has {STEPS} rows. Durations are
those of the fastest round; `ratio` and `time` are the median of the ratios within a round, ours to theirs or in chunks
to all at once; `of minima` compares the fastest rounds. Memory is that of temporary values."""


def loss(params, x):
    """Return the loss of one example, of one row or several."""
    first, bias, second = params
    return (jnp.tanh(x @ first + bias) @ second).mean() ** 2


def problem(*rows):
    """Return parameters, and a batch of examples."""
    keys = jax.random.split(jax.random.key(0), 3)
    first, second = (jax.random.normal(k, (WIDTH, WIDTH)) / WIDTH**0.5 for k in keys[:2])
    return [first, jnp.zeros(WIDTH), second], jax.random.normal(keys[2], (BATCH, *rows, WIDTH))


def norm(gradient):
    return jnp.sqrt(sum((g**2).sum() for g in gradient))


def by_loop(params, xs):
    one = jax.jit(lambda params, x: norm(jax.grad(loss)(params, x)))
    return lambda: [one(params, x) for x in xs]


def by_vmap(params, xs):
    every = jax.jit(jax.vmap(lambda params, x: norm(jax.grad(loss)(params, x)), in_axes=(None, 0)))
    return (lambda: every(params, xs)), temporary(every.lower(params, xs))


def ours(params, xs):
    states = [brainstate.ParamState(p) for p in params]
    norms = transform.per_example_norms(lambda x: loss([s.value for s in states], x), states)
    every = transform.jit(norms)
    return (lambda: every(xs)), temporary(every.lower(xs))


def temporary(lowered):
    return lowered.compile().memory_analysis().temp_size_in_bytes


def megabytes(size):
    return f"{size / 1e6:#.3g} MB".replace(". MB", " MB")


def norm_rows():
    for what, rows in (("", ()), (" of sequences", (STEPS,))):
        params, xs = problem(*rows)
        (vmapped, theirs), (norms, mine) = by_vmap(params, xs), ours(params, xs)
        loop_times, vmap_times, our_times = _timing.steady(by_loop(params, xs), vmapped, norms, rounds=ROUNDS)
        yield compared(f"norms{what}, and a Python loop", loop_times, our_times)
        yield compared(f"norms{what}, and vmap of the gradient", vmap_times, our_times)
        ratio = f"{mine / theirs:.3f}"
        yield f"… memory, and vmap of the gradient{what}", megabytes(theirs), megabytes(mine), ratio, ""


def compared(name, theirs, mine):
    ratio, of_minima = _timing.ratios(mine, theirs)
    return (
        name,
        _timing.duration(min(theirs)),
        _timing.duration(min(mine)),
        f"{ratio:.3f}",
        f"{of_minima:.3f}",
    )


def wide(x):
    """Return 100 numbers by way of intermediate values of 20,000."""
    h = jnp.linspace(0.0, 1.0, 20_000)
    for _ in range(2):
        h = jnp.sin(jnp.cumsum(h) * x.sum() + h[::-1])
    return h[:100] * x


def chunk_subjects():
    """Return for each name a function of a chunk size that gives a transformed function and its arguments."""
    x = jnp.linspace(0.0, 1.0, 100)
    tied = brainstate.ParamState(problem()[0][0])

    def of_tied(x):
        return (jnp.tanh(x @ tied.value) @ tied.value).mean() ** 2

    return {
        "jacrev": lambda size: (transform.jacrev(wide, chunk_size=size), x),
        "jacfwd": lambda size: (transform.jacfwd(wide, chunk_size=size), x),
        "hessian": lambda size: (transform.hessian(lambda x: wide(x).sum(), chunk_size=size), x),
        "laplacian": lambda size: (transform.laplacian(lambda x: wide(x).sum(), chunk_size=size), x),
        "norms of a tied weight": lambda size: (
            transform.per_example_norms(of_tied, tied, chunk_size=size),
            problem()[1],
        ),
    }


def chunk_rows(size=8):
    for name, make in chunk_subjects().items():
        sizes, subjects = [], []
        for chunk in (None, size):
            function, argument = make(chunk)
            compiled = transform.jit(function)
            sizes.append(temporary(compiled.lower(argument)))
            subjects.append(lambda compiled=compiled, argument=argument: compiled(argument))
        whole, chunks = _timing.steady(*subjects, rounds=ROUNDS)
        ratio, of_minima = _timing.ratios(chunks, whole)
        memory = (*map(megabytes, sizes), f"{sizes[1] / sizes[0]:.3f}")
        yield f"{name}, {size} at a time", *memory, f"{ratio:.2f}", f"{of_minima:.2f}"


def main():
    norms, chunks = _timing.table(HEAD, list(norm_rows())), _timing.table(HEAD_MEMORY, list(chunk_rows()))
    _timing.publish("Per example and in chunks", f"{_timing.machine()}.\n\n{norms}\n\n{chunks}\n\n{NOTES}")


if __name__ == "__main__":
    main()
