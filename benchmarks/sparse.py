"""What sparse Jacobians and Hessians save: ours against the dense derivative of JAX, also put into RESULTS.md.

    python benchmarks/sparse.py

Both are compiled and called over and over; what is found once, pattern and colors, is timed by itself. A dense
matrix of 10,000 rows is computed in part: 100 of its columns, whose time is then multiplied by 100.
"""

import time

import _timing
import jax
import jax.numpy as jnp

from brainstate import transform as T

SIZES = (100, 1000, 10_000)
GRID = {100: 10, 1000: 25, 10_000: 100}  # rows of the grid
WHOLE = 1000  # up to here the dense matrix is computed as a whole
SAMPLE = 100
TARGET = 100  # times faster, for the tridiagonal Jacobian at the largest size
HEAD = ("", "n", "non-zeros", "products", "pattern and colors", "dense", "sparse", "dense / sparse", "target", "")
NOTES = f"""\
`products`: how many Jacobian-vector or Hessian-vector products the compressed matrix takes. `pattern and colors`:
what the first call pays once for finding them. Durations of `dense` and `sparse` are those of the fastest round, the
ratio is the median of the ratios within a round. Dense at n above {WHOLE:,} is {SAMPLE} columns, times n / {SAMPLE}."""


def tridiagonal(x):
    return jnp.sin(x) - jnp.pad(x[1:] ** 2, (0, 1)) + jnp.pad(x[:-1], (1, 0)) * x


def banded(x):
    padded = jnp.pad(x, 5)
    return sum((k + 1) * padded[k : k + x.size] for k in range(11)) * x


def laplacian(x):
    u = jnp.pad(x.reshape(GRID[x.size], -1), 1)
    flux = u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * u[1:-1, 1:-1] ** 3
    return flux.ravel()


def blocks(x):
    return jnp.tanh(x.reshape(-1, 10) @ jnp.linspace(0, 1, 100).reshape(10, 10)).ravel()


def energy(x):
    return ((x[1:] - x[:-1] ** 2) ** 2).sum() + ((1 - x) ** 2).sum()


JACOBIANS = {"tridiagonal": tridiagonal, "banded (5)": banded, "2-D Laplacian": laplacian, "blocks of 10": blocks}
CASES = [
    *((f"Jacobian, {name}", fun, False) for name, fun in JACOBIANS.items()),
    ("Hessian, tridiagonal", energy, True),
]


def columns(fun, count):
    """Return some columns of the Jacobian of ``fun``, compiled."""

    @jax.jit
    def some(x):
        seeds = jnp.eye(count, x.size, dtype=x.dtype)
        return jax.vmap(lambda t: jax.jvp(fun, (x,), (t,))[1])(seeds)

    return some


def row(name, fun, hessian, n):
    find, sparse, base = (
        (T.hessian_sparsity, T.sparse_hessian, jax.grad(fun))
        if hessian
        else (T.jacobian_sparsity, T.sparse_jacobian, fun)
    )
    x = jnp.linspace(0.0, 1.0, n)
    begin = time.perf_counter()
    pattern = find(fun)(x)
    products = pattern.colors("symmetric" if hessian else "column")
    found = time.perf_counter() - begin
    ours = jax.jit(lambda x: sparse(fun, pattern=pattern)(x).data)
    share = 1 if n <= WHOLE else n / SAMPLE
    dense = columns(base, n if n <= WHOLE else SAMPLE)
    times = _timing.steady(lambda: dense(x), lambda: ours(x), rounds=20, length=2e-2)
    ratio = _timing.ratios(*times)[0] * share
    aim = TARGET if name == "Jacobian, tridiagonal" and n == SIZES[-1] else None
    return (
        name,
        f"{n:,}",
        f"{pattern.nnz:,}",
        f"{products}",
        _timing.duration(found),
        _timing.duration(min(times[0]) * share),
        _timing.duration(min(times[1])),
        f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}",
        f"{aim}" if aim else "",
        "" if aim is None else "met" if ratio >= aim else "MISSED",
    )


def main():
    jax.config.update("jax_enable_compilation_cache", False)
    T.jacobian_sparsity(tridiagonal)(jnp.ones(10))  # what JAX sets up once
    rows = [row(*case, n) for case in CASES for n in SIZES]
    _timing.publish("Sparse and dense derivatives", f"{_timing.machine()}.\n\n{_timing.table(HEAD, rows)}\n\n{NOTES}")


if __name__ == "__main__":
    main()
