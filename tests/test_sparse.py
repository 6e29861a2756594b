"""Sparse Jacobians and Hessians: patterns that miss nothing, colourings that can be read, values that are right.

The patterns are held against dense derivatives of random programs: chains of operations drawn from a list that has
every rule in it, compared at random points in double precision. What a pattern misses would also put numbers in wrong
places, so the sparse values are compared with the dense ones as well.
"""

import re

import jax
import jax.experimental.sparse as jsparse
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

import brainstate
from brainstate import HiddenState, ParamState, State, StateTypeError, StateValueError
from brainstate import transform as T
from brainstate.transform import SparsityPattern

N = 6

# ------------------------------------------------------------------------------------------ random programs

rng = np.random.default_rng(1)
A = rng.normal(size=(N, N))
A_SPARSE = jsparse.BCOO.fromdense(np.where(rng.random((N, N)) < 0.3, A, 0.0).astype(np.float32))
ORDER = rng.permutation(N)
SOME = np.array([4, 0, 4])
MASK = np.array([True, False, True, True, False, False])
KERNEL = np.array([0.5, -1.0, 2.0])


def c(values, like):
    return jnp.asarray(values, like.dtype)


@jax.custom_jvp
def spike(x):
    return jnp.floor(x)


@spike.defjvp
def _(primals, tangents):
    return spike(*primals), tangents[0] * jnp.cos(primals[0])


@jax.custom_vjp
def twice(x):
    return 2 * x


twice.defvjp(lambda x: (2 * x, jnp.cos(x)), lambda residual, ct: (ct * residual,))


def scanned(x, y):
    """Carry a number along the elements, and read a constant."""
    return jax.lax.scan(lambda h, t: (jnp.tanh(h * t[0]), h + t[1] * y[2]), x[0], (x, y))[1]


def shifted(x, y):
    """Carry an array, so that the dependencies grow from step to step, backwards."""
    return jax.lax.scan(lambda h, t: (jnp.roll(h, 1) * t, None), x, y[:3], reverse=True)[0]


def looped(x, y):
    """Run a loop whose number of steps is not known."""
    return jax.lax.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1].at[s[0]].set(s[1][s[0] + 1] * 0.5)), (0, x)
    )[1]


def counted(x, y):
    """Write one element after the other by the counter of a loop."""
    return jax.lax.fori_loop(0, N - 1, lambda i, h: h.at[i].set(y[i] * h[i + 1]), x)


def blocked(x, y):
    """Solve two small systems, one for each half."""
    matrices = jnp.eye(3, dtype=x.dtype)[None] * 3 + jnp.sin(y).reshape(2, 3, 1) * 0.1
    return jax.vmap(jnp.linalg.solve)(matrices, x.reshape(2, 3)).ravel()


def factored(x, y):
    m = jnp.outer(x, x) * 0.01 + jnp.eye(N, dtype=x.dtype) * 4
    return jnp.linalg.cholesky(m)[:, 1] + jnp.linalg.eigh(m)[0] * y


UNARY = {
    "sin": jnp.sin,
    "square": lambda x: x**2,
    "relu": jax.nn.relu,
    "floor": lambda x: x + jnp.floor(x) ** 2,
    "integers": lambda x: x * x.astype(int).astype(x.dtype),
    "comparison": lambda x: jnp.where(x > 0, x, jnp.sin(x)),
    "stopped": lambda x: x[::-1] * jax.lax.stop_gradient(x),
    "spike": spike,
    "reverse": lambda x: x[::-1],
    "roll": lambda x: jnp.roll(x, 2),
    "pad": lambda x: jax.lax.pad(x[:2], c(0, x), ((1, 1, 1),))[:N].sum() * x[:1].repeat(N),
    "slice": lambda x: jnp.concatenate([x[1::2], x[:3]]),
    "clip": lambda x: jnp.clip(x, -0.5, 0.5),
    "tile": lambda x: jnp.tile(x[:2], 3),
    "stack": lambda x: jnp.stack([x[:3], x[3:]], axis=1).ravel(),
    "split": lambda x: jnp.split(x, [1, 3])[2].repeat(2)[:N],
    "known gather": lambda x: x[ORDER],
    "table gather": lambda x: x.reshape(3, 2)[jnp.array([2, 0, 2])].ravel(),
    "unknown gather": lambda x: x.reshape(3, 2)[jnp.argsort(x[:3])].ravel(),
    "element": lambda x: x * x[jnp.argmax(x)],
    "outside": lambda x: x.at[jnp.array([1, 9])].get(mode="fill", fill_value=0.0).sum() + x,
    "known scatter": lambda x: x.at[SOME].add(x[:3]),
    "scatter set": lambda x: x.at[SOME[:2]].set(x[1:3] ** 2),
    "scatter dropped": lambda x: x.at[jnp.array([0, 9])].set(x[1:3], mode="drop"),
    "scatter max": lambda x: x.at[1].max(x[0]),
    "scatter multiply": lambda x: x.at[2].multiply(x[0]),
    "unknown scatter": lambda x: x.at[jnp.argsort(x)].add(x**2),
    "unknown rows": lambda x: x.reshape(3, 2).at[jnp.argmin(x[:3])].set(x[4:]).ravel(),
    "dynamic slice": lambda x: jax.lax.dynamic_slice(jnp.tile(x, 2), (jnp.argmax(x),), (N,)),
    "dynamic update": lambda x: jax.lax.dynamic_update_slice(x, x[:2] ** 2, (jnp.argmin(x),)),
    "known update": lambda x: jax.lax.dynamic_update_slice(x, x[:2] ** 2, (3,)),
    "where known": lambda x: jnp.where(MASK, x, x[::-1] ** 2),
    "sum": lambda x: x + x.reshape(2, 3).sum(1).repeat(3),
    "max": lambda x: x * x.reshape(3, 2).max(1).repeat(2),
    "prod": lambda x: x.reshape(3, 2).prod(0).repeat(3),
    "logsumexp": lambda x: jax.nn.logsumexp(x.reshape(2, 3), axis=0).repeat(2),
    "softmax": lambda x: jax.nn.softmax(x.reshape(2, 3)).ravel(),
    "mean": lambda x: x - x.mean(),
    "cumsum": lambda x: jnp.cumsum(x.reshape(2, 3), 1).ravel(),
    "cumsum back": lambda x: jax.lax.cumsum(x, reverse=True),
    "cumprod": lambda x: jnp.cumprod(x.reshape(3, 2), 0).ravel(),
    "cummax": lambda x: jax.lax.cummax(x),
    "sort": lambda x: jnp.sort(x.reshape(2, 3), 1).ravel(),
    "top": lambda x: jax.lax.top_k(x, 3)[0].repeat(2),
    "window": lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (3,), (1,), "SAME"),
    "pool": lambda x: jax.lax.reduce_window(x, -np.inf, jax.lax.max, (2,), (2,), "VALID").repeat(2),
    "convolve": lambda x: jnp.convolve(x, c(KERNEL, x), mode="same"),
    "convolve 2": lambda x: (
        jax.lax.conv_general_dilated(
            x.reshape(1, 2, 3),
            c(np.ones((4, 1, 2)), x),
            (2,),
            [(2, 1)],
            lhs_dilation=(2,),
            rhs_dilation=(2,),
            feature_group_count=2,
        )
        .ravel()[: 2 * N]
        .reshape(-1)[:N]
    ),
    "matrix": lambda x: c(A, x) @ x,
    "small matrix": lambda x: (x.reshape(2, 3) @ c(A[:3, :3], x)).ravel(),
    "batched": lambda x: jnp.einsum("bi,bij->bj", x.reshape(2, 3), c(A.ravel()[:18].reshape(2, 3, 3), x)).ravel(),
    "sparse matrix": lambda x: jsparse.BCOO((c(A_SPARSE.data, x), A_SPARSE.indices), shape=(N, N)) @ x,
    "fft": lambda x: jnp.fft.fft(x.reshape(2, 3)).real.ravel(),
    "branches": lambda x: jax.lax.cond(x.sum() > 0, lambda y: y[::-1], jnp.sin, x),
    "switch": lambda x: jax.lax.switch(2, [jnp.sin, lambda y: y * y[0], lambda y: y.at[0].set(0.0)], x),
    "map": lambda x: jax.lax.map(lambda t: t[0] * t[1], x.reshape(3, 2)).repeat(2),
    "jit": jax.jit(lambda x: x[::-1] * x),
    "checkpoint": jax.checkpoint(lambda x: jnp.sin(x) * x[1]),
    "norm": lambda x: x / jnp.sqrt(1 + (x.reshape(2, 3) ** 2).sum(1).repeat(3)),
    "associative": lambda x: jax.lax.associative_scan(jnp.add, x),
    "diagonal": lambda x: jnp.diag(jnp.outer(x, x[::-1]), 0),
    "triangle": lambda x: jnp.tril(jnp.outer(x, x)).sum(1),
    "callback": lambda x: x * jax.lax.optimization_barrier(x[::-1]),
}
BINARY = {
    "product": lambda x, y: x * y,
    "quotient": lambda x, y: x / (2 + y**2),
    "maximum": jnp.maximum,
    "concatenate": lambda x, y: jnp.concatenate([x[:2], y[2:]]),
    "select": lambda x, y: jnp.where(y > 0.1, x, y),
    "outer": lambda x, y: (x.reshape(2, 3).T @ y.reshape(2, 3)).ravel()[:N],
    "inner": lambda x, y: x * (x @ y),
    "gather by y": lambda x, y: jnp.take_along_axis(x.reshape(2, 3), jnp.argsort(y.reshape(2, 3)), 1).ravel(),
    "convolution": lambda x, y: jnp.convolve(x, y[:3], mode="same"),
    "scanned": scanned,
    "shifted": shifted,
    "looped": looped,
    "counted": counted,
    "blocked": blocked,
    "factored": factored,
    "triangular": lambda x, y: jax.scipy.linalg.solve_triangular(
        jnp.eye(3, dtype=x.dtype) * 2 + jnp.tril(jnp.outer(y[:3], y[3:])), x.reshape(3, 2), lower=True
    ).ravel(),
}
REVERSE_ONLY = {"twice": twice}
FORWARD_ONLY = {"looped"}


def program(seed, length=4, without=()):
    """Return a random chain of operations on two vectors, and the names of these."""
    draw = np.random.default_rng(seed)
    unary = [name for name in UNARY if name not in without]
    binary = [name for name in BINARY if name not in without]
    steps = []
    for i in range(length):
        names = unary if draw.random() < 0.6 else binary
        steps.append((names[draw.integers(len(names))], draw.integers(i + 2), draw.integers(i + 2)))

    def run(x):
        pool = [x, x[::-1] * c(0.5, x)]
        for name, i, j in steps:
            pool.append(UNARY[name](pool[i]) if name in UNARY else BINARY[name](pool[i], pool[j]))
        return jnp.concatenate([pool[-1], pool[-2][:2]])

    return run, [name for name, *_ in steps]


def programs(first, count, **options):
    return [(seed, program(seed, **options)) for seed in range(first, first + count)]


def point(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=N))


def places(matrix):
    return SparsityPattern.of(np.asarray(matrix) != 0)


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def weighed(run):
    """Return a number in which everything that ``run`` returns enters in a way of its own."""

    def loss(x):
        out = run(x)
        return (c(np.arange(1, out.size + 1), out) * jnp.sin(out)).sum()

    return loss


def compare(programs, *, hessian=False):
    """Compare patterns and values of many programs with dense derivatives at two points; all is compiled at once."""
    if hessian:
        programs = {name: weighed(run) for name, run in programs.items()}
    find, sparse, dense = (
        (T.hessian_sparsity, T.sparse_hessian, jax.hessian)
        if hessian
        else (T.jacobian_sparsity, T.sparse_jacobian, jax.jacfwd)
    )
    patterns = {name: find(run)(point(0)) for name, run in programs.items()}

    def everything(x, y):
        return {
            name: (dense(run)(x), dense(run)(y), sparse(run, pattern=patterns[name], dense=True)(y))
            for name, run in programs.items()
        }

    results = jax.jit(everything, compiler_options=QUICK)(point(0), point(1))
    for name, (first, second, got) in results.items():
        for expected in (first, second):
            # A zero that is computed as a difference is none in floating numbers.
            real = np.abs(expected) > 1e-13 * np.abs(expected).max(initial=1)
            assert patterns[name].contains(places(real)), name
        np.testing.assert_allclose(got, second, rtol=1e-8, atol=1e-9, err_msg=str(name))


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


OPERATIONS = {**UNARY, **{name: lambda x, run=run: run(x, x[::-1] * c(0.5, x)) for name, run in BINARY.items()}}


def portion(i, of, without=()):
    names = [name for name in OPERATIONS if name not in without][i::of]
    return {name: OPERATIONS[name] for name in names}


@pytest.mark.parametrize("i", range(4))
def test_pattern_of_each_operation(i, double):
    compare(portion(i, 4))


@pytest.mark.parametrize("i", range(6))
def test_hessian_pattern_of_each_operation(i, double):
    compare(portion(i, 6, FORWARD_ONLY), hessian=True)


@pytest.mark.parametrize("batch", range(10))
def test_patterns_of_random_programs_miss_nothing(batch, double):
    compare({(seed, *names): run for seed, (run, names) in programs(30 * batch, 30)})


@pytest.mark.parametrize("batch", range(5))
def test_hessian_patterns_of_random_programs_miss_nothing(batch, double):
    drawn = programs(1000 + 20 * batch, 20, length=2, without=FORWARD_ONLY)
    compare({(seed, *names): run for seed, (run, names) in drawn}, hessian=True)
