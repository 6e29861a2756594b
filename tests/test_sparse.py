"""Sparse Jacobians and Hessians: patterns that miss nothing, colorings that can be read, values that are right.

The patterns are held against dense derivatives of random programs: chains of operations drawn from a list that has
every rule in it, compared at random points in double precision. What a pattern misses would also put numbers in wrong
places, so the sparse values are compared with the dense ones as well.
"""

import jax
import jax.experimental.sparse as jsparse
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from _unchanged import unchanged
from brainstate import HiddenState, ParamState, State, StateTypeError, StateValueError
from brainstate import transform as T
from brainstate.transform import SparsityPattern
from brainstate.transform._sparse.pattern import _star_coloring
from brainstate.transform._sparse.transforms import _cheaper_mode
from scenarios import CONTEXTS, SCENARIOS, Operator, total
from scenarios import compare as compare_scenario

N = 6

# ------------------------------------------------------------------------------------------ random programs

rng = np.random.default_rng(1)
A = rng.normal(size=(N, N))
A_SPARSE = jsparse.BCOO.fromdense(jnp.asarray(np.where(rng.random((N, N)) < 0.3, A, 0.0), "float32"))
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
    m = jnp.outer(x, x) * 0.01 + jnp.diag(jnp.arange(2, N + 2, dtype=x.dtype))
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


def weighed(run):
    """Return a number in which everything that ``run`` returns enters in a way of its own."""

    def loss(x):
        out = run(x)
        return (c(np.arange(1, out.size + 1), out) * jnp.sin(out)).sum()

    return loss


def compare(programs, *, hessian=False, values=None):
    """Compare the patterns of many programs with dense derivatives, and of some the values; all compiled at once."""
    if hessian:
        programs = {name: weighed(run) for name, run in programs.items()}
    find, sparse, dense = (
        (T.hessian_sparsity, T.sparse_hessian, jax.hessian)
        if hessian
        else (T.jacobian_sparsity, T.sparse_jacobian, jax.jacfwd)
    )
    patterns = {name: find(run)(point(0)) for name, run in programs.items()}
    checked = list(programs)[:values]

    def everything(x):
        got = {name: sparse(programs[name], pattern=patterns[name], dense=True)(x) for name in checked}
        return {name: dense(run)(x) for name, run in programs.items()}, got

    expected, got = jax.jit(everything)(point(1))
    for name, matrix in expected.items():
        # A zero that is computed as a difference is none in floating numbers.
        assert patterns[name].contains(places(np.abs(matrix) > 1e-13 * np.abs(matrix).max(initial=1))), name
    finite = {name: np.isfinite(matrix).all() for name, matrix in expected.items()}  # eigenvalues may coincide
    assert sum(finite.values()) > 0.8 * len(finite)
    for name in checked:
        if finite[name]:
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-8, atol=1e-9, err_msg=str(name))


OPERATIONS = {**UNARY, **{name: lambda x, run=run: run(x, x[::-1] * c(0.5, x)) for name, run in BINARY.items()}}


def portion(i, of, without=()):
    names = [name for name in OPERATIONS if name not in without][i::of]
    return {name: OPERATIONS[name] for name in names}


@pytest.mark.parametrize("i", range(4))
def test_pattern_of_each_operation(i, double):
    compare(portion(i, 4))


@pytest.mark.long
@pytest.mark.parametrize("i", range(6))
def test_hessian_pattern_of_each_operation(i, double):
    compare(portion(i, 6, FORWARD_ONLY), hessian=True, values=5)


def drawn(first, count, **options):
    return {(seed, *names): run for seed, (run, names) in programs(first, count, **options)}


@pytest.mark.long
@pytest.mark.parametrize("batch", range(3))
def test_patterns_of_random_programs_miss_nothing(batch, double):
    compare(drawn(25 * batch, 25), values=3)


@pytest.mark.long
@pytest.mark.parametrize("batch", range(2))
def test_hessian_patterns_of_random_programs_miss_nothing(batch, double):
    compare(drawn(1000 + 15 * batch, 15, length=2, without=FORWARD_ONLY), hessian=True, values=4)


@pytest.mark.long
@pytest.mark.parametrize("batch", range(4))
def test_patterns_of_longer_programs_miss_nothing(batch, double):
    compare(drawn(2000 + 20 * batch, 20, length=8), values=2)
    compare(drawn(3000 + 10 * batch, 10, length=3, without=FORWARD_ONLY), hessian=True, values=2)


@pytest.mark.long
@pytest.mark.parametrize("i", range(4))
def test_reverse_mode_of_each_operation(i, double):
    """The pattern read off the pullback, and the rows that it gives."""
    runs = portion(i, 4, FORWARD_ONLY)

    def everything(x):
        return {
            name: (T.sparse_jacobian(run, mode="reverse", dense=True)(x), jax.jacfwd(run)(x))
            for name, run in runs.items()
        }

    for name, (got, expected) in jax.jit(everything)(point(1)).items():
        np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-9, err_msg=name)


# ------------------------------------------------------------------------------------------ one primitive at a time


def draw_convolution(draw):
    """Any layout, strides, dilations, groups, and padding that may also cut."""
    axes, groups = draw(1, 3), draw(1, 3)
    few = [[draw(1, 3) for _ in range(axes)] for _ in range(3)]
    layout = [tuple(np.random.default_rng(draw(0, 99)).permutation(axes + 2).tolist()) for _ in range(3)]
    shapes = np.zeros((2, axes + 2), int)
    shapes[0, list(layout[0])] = [draw(1, 3), groups * draw(1, 3), *(draw(2, 6) for _ in range(axes))]
    shapes[1, list(layout[1])] = [
        groups * draw(1, 3),
        shapes[0, layout[0][1]] // groups,
        *(draw(1, 4) for _ in range(axes)),
    ]
    kernel = np.random.default_rng(0).normal(size=shapes[1])
    options = {
        "window_strides": few[0],
        "padding": [(draw(-1, 3), draw(-1, 3)) for _ in range(axes)],
        "lhs_dilation": few[1],
        "rhs_dilation": few[2],
        "dimension_numbers": jax.lax.ConvDimensionNumbers(*layout),
        "feature_group_count": groups,
    }
    return lambda x: jax.lax.conv_general_dilated(x, c(kernel, x), **options), shapes[0]


def draw_product(draw):
    """Any order of batch, contracted and free axes on either side."""
    batch, contracted = [draw(1, 3) for _ in range(draw(0, 2))], [draw(1, 3) for _ in range(draw(0, 3))]
    sides = []
    for _ in range(2):
        lengths = batch + contracted + [draw(1, 4) for _ in range(draw(0, 3))]
        order = np.random.default_rng(draw(0, 99)).permutation(len(lengths))
        where = np.argsort(order)
        at = tuple(where[: len(batch)].tolist()), tuple(where[len(batch) : len(batch) + len(contracted)].tolist())
        sides.append(([lengths[i] for i in order], *at))
    (left, batch_l, over_l), (right, batch_r, over_r) = sides
    other = np.random.default_rng(1).normal(size=right)
    return lambda x: jax.lax.dot_general(x, c(other, x), ((over_l, over_r), (batch_l, batch_r))), left


def draw_windows(draw):
    n = draw(1, 3)
    sizes, strides, base, step = ([draw(1, 4) for _ in range(n)] for _ in range(4))
    padding = [(draw(0, 3), draw(0, 3)) for _ in range(n)]
    return (
        lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, sizes, strides, padding, base, step),
        [draw(2, 6) for _ in range(n)],
    )


def draw_padding(draw):
    config = [(draw(-2, 3), draw(-2, 3), draw(0, 3)) for _ in range(draw(1, 3))]
    return lambda x: jax.lax.pad(x, c(0, x), config), [draw(3, 5) for _ in config]


def draw_update(draw):
    shape = [draw(1, 5) for _ in range(draw(1, 4))]
    sizes, starts = [draw(1, n + 1) for n in shape], [draw(-2, 6) for _ in shape]

    def run(x):
        part = jax.lax.dynamic_slice(x, starts, sizes)
        return jax.lax.dynamic_update_slice(x, 2 * jnp.flip(part, 0), starts[::-1])

    return run, shape


def draw_index(draw):
    shape = [draw(1, 5) for _ in range(draw(1, 4))]
    index = [[slice(None), slice(0, None, 2), draw(-n, n), np.array([0, draw(-n, n), -1])][draw(0, 4)] for n in shape]
    index = tuple(index[: draw(1, len(shape) + 1)])
    kinds = [lambda x: x[index], lambda x: x.at[index].set(x[index] * 3), lambda x: x.at[index].add(x[index] * 3)]
    return kinds[draw(0, 3)], shape


@pytest.mark.parametrize(
    "make",
    [draw_convolution, draw_product, draw_windows, draw_padding, draw_update, draw_index],
    ids=lambda f: f.__name__,
)
def test_linear_primitives_are_exact(make, double):
    """The pattern of a linear map is that of its matrix, for any parameters of the primitive."""
    runs = {}
    for seed in range(12):
        draws = np.random.default_rng(seed)
        run, shape = make(lambda low, high, draws=draws: int(draws.integers(low, high)))
        x = jnp.asarray(draws.normal(size=shape))
        runs[seed] = run, x
    matrices = jax.jit(lambda xs: {seed: jax.jacfwd(run)(xs[seed]) for seed, (run, _) in runs.items()})(
        {seed: x for seed, (_, x) in runs.items()}
    )
    for seed, (run, x) in runs.items():
        matrix = np.reshape(matrices[seed], (-1, x.size))
        assert T.jacobian_sparsity(run)(x) == SparsityPattern.of(matrix), seed


def test_a_missing_place_would_be_seen(double):
    """What the comparison is worth: without one of its places, a pattern fails it."""
    run = OPERATIONS["roll"]
    pattern = T.jacobian_sparsity(run)(point(0))
    fewer = SparsityPattern(pattern.rows[1:], pattern.cols[1:], pattern.shape)
    assert not fewer.contains(places(jax.jacfwd(run)(point(1))))


# ------------------------------------------------------------------------------------------ exact patterns


def tridiagonal(x):
    return jnp.concatenate([x[:1], x[1:] * x[:-1]]) - jnp.concatenate([x[1:], x[-1:]]) ** 2


def banded(x):
    padded = jnp.pad(x, 3)
    return sum(c(k + 1, x) * padded[k : k + x.size] for k in range(7)) * x


def laplacian(x):
    side = int(x.size**0.5)
    u = jnp.pad(x.reshape(side, side), 1)
    return (u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * u[1:-1, 1:-1]).ravel()


def blocks(x):
    return jnp.tanh(x.reshape(-1, 5) @ jnp.ones((5, 5), x.dtype)).ravel()


def distances(n):
    i = np.arange(n)
    return np.abs(i[:, None] - i)


def neighbors(n):
    side = int(n**0.5)
    i, j = np.divmod(np.arange(n), side)
    return np.abs(i[:, None] - i) + np.abs(j[:, None] - j)


STRUCTURES = {  # name: (function, dense pattern for n, colors of columns, colors of the Hessian of the squares)
    "tridiagonal": (tridiagonal, lambda n: distances(n) <= 1, 3),
    "banded": (banded, lambda n: distances(n) <= 3, 7),
    "laplacian": (laplacian, lambda n: neighbors(n) <= 1, 7),
    "blocks": (blocks, lambda n: np.kron(np.eye(n // 5), np.ones((5, 5))), 5),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_pattern_and_colors_are_exact(name):
    fun, dense, colors = STRUCTURES[name]
    assert T.jacobian_sparsity(fun)(jnp.ones(100)) == SparsityPattern.of(dense(100))
    for n in (100, 2500, 10000):
        pattern = T.jacobian_sparsity(fun)(jnp.ones(n))
        assert pattern.colors("column") == pattern.colors("row") == colors


def energy(x):
    return (x[1:] ** 2 * x[:-1]).sum() + (x**3).sum()


def test_hessian_pattern_and_colors_are_exact():
    assert T.hessian_sparsity(energy)(jnp.ones(50)) == SparsityPattern.of(distances(50) <= 1)
    for n in (50, 10000):
        assert T.hessian_sparsity(energy)(jnp.ones(n)).colors("symmetric") == 3


def test_linear_parts_have_no_second_derivative():
    pattern = T.hessian_sparsity(lambda x: (x[:3] ** 2).sum() + x.sum() + x[3] * x[5])(jnp.ones(6))
    assert list(zip(pattern.rows, pattern.cols, strict=True)) == [(0, 0), (1, 1), (2, 2), (3, 5), (5, 3)]


def test_arrow_takes_two_colors_and_is_read_on_either_side(double):
    def arrow(x):
        return (x[0] * x).sum() + (x**3).sum()

    x = jnp.linspace(1.0, 2.0, 40)
    assert T.hessian_sparsity(arrow)(x).colors("symmetric") == 2
    got, expected = jax.jit(lambda x: (T.sparse_hessian(arrow, dense=True)(x), jax.hessian(arrow)(x)))(x)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda x: jax.lax.stop_gradient(x) + jnp.floor(x) + jnp.sign(x), np.zeros((4, 4))),
        (lambda x: x * jax.lax.stop_gradient(x[::-1]), np.eye(4)),
        (lambda x: jnp.where(x[::-1] > 0, x, 2 * x), np.eye(4)),
        (lambda x: x[jnp.argsort(-x)], np.ones((4, 4))),
        (lambda x: x[np.array([1, 1, 3])], np.eye(4)[[1, 1, 3]]),
        (spike, np.eye(4)),
        (lambda x: jax.lax.cond(x[0] > 0, lambda y: y, lambda y: y[::-1], x), np.eye(4) + np.eye(4)[::-1]),
        (lambda x: jax.lax.fori_loop(1, 4, lambda i, h: h.at[i].add(h[i - 1]), x), np.tri(4)),
        (lambda x: jnp.convolve(x, jnp.ones(3), mode="same"), distances(4) <= 1),
        (lambda x: jnp.cumsum(x), np.tri(4)),
        (lambda x: jax.vmap(lambda a: a.at[0].set(a[1]))(x.reshape(2, 2)).ravel(), np.eye(4)[[1, 1, 3, 3]]),
        (lambda x: jax.lax.scan(lambda h, t: (t, h), x[0], x)[1], np.eye(4)[[0, 0, 1, 2]]),
    ],
)
def test_pattern_is_what_the_rule_lets_through(run, expected):
    """Zero derivatives are no places; either branch counts; a custom rule counts, and not its function."""
    assert T.jacobian_sparsity(run)(jnp.array([0.1, 0.2, -0.3, 0.4])) == SparsityPattern.of(expected)


def test_a_long_scan_is_taken_as_a_whole(double):
    def run(x):
        return jax.lax.scan(lambda h, t: (jnp.sin(h) * x[:2] + t, h), x[:2], jnp.tile(x, 5000))[0]

    pattern = T.jacobian_sparsity(run)(jnp.ones(4))
    assert pattern.contains(places(jax.jit(jax.jacfwd(run))(point(0)[:4])))


def test_indices_are_seen_and_traced_ones_are_not():
    order = np.array([2, 0, 1])
    assert T.jacobian_sparsity(lambda x, i: x[i])(jnp.ones(3), order).nnz == 3
    assert T.jit(lambda i: T.jacobian_sparsity(lambda x, i: x[i])(jnp.ones(3), i).nnz)(order) == 9


# ------------------------------------------------------------------------------------------ colorings


def assert_readable(pattern, kind):
    """Each place is alone in its row among the columns of its color; a symmetric one in its row or in its column."""
    colors = pattern.coloring(kind)
    rows, cols = (pattern.cols, pattern.rows) if kind == "row" else (pattern.rows, pattern.cols)
    met = {}
    for i, j in zip(rows.tolist(), cols.tolist(), strict=True):
        met.setdefault((i, colors[j]), []).append(j)
    for i, j in zip(rows.tolist(), cols.tolist(), strict=True):
        assert colors[i if kind == "symmetric" else j] >= 0
        here, there = met[i, colors[j]] == [j], kind == "symmetric" and met[j, colors[i]] == [i]
        assert here or there
    assert set(np.unique(colors)) - {-1} == set(range(pattern.colors(kind)))


@pytest.mark.parametrize("seed", range(20))
def test_colorings_can_be_read(seed):
    draw = np.random.default_rng(seed)
    m, n = draw.integers(1, 60, 2)
    pattern = SparsityPattern.of(draw.random((m, n)) < draw.choice([0.02, 0.1, 0.5]))
    for kind in ("column", "row"):
        assert_readable(pattern, kind)
        assert pattern.colors(kind) >= pattern.at_least(kind)
    square = SparsityPattern(pattern.rows, pattern.cols, (max(m, n),) * 2).symmetrized()
    assert_readable(square, "symmetric")
    assert square.colors("symmetric") <= square.colors("column")


def test_star_coloring_has_no_path_of_two_colors():
    """The definition itself, on all paths of four vertices of random graphs."""
    for seed in range(10):
        adjacency = np.triu(np.random.default_rng(seed).random((14, 14)) < 0.25, 1)
        near = [np.flatnonzero(row).tolist() for row in adjacency | adjacency.T]
        colors = _star_coloring(near, range(14))
        for b, c_ in zip(*np.nonzero(adjacency), strict=True):
            assert colors[b] != colors[c_]
            for a, d in ((a, d) for a in near[b] for d in near[c_] if a != c_ and d != b):
                assert len({colors[a], colors[b], colors[c_], colors[d]}) > 2


def test_products_are_as_many_as_colors():
    lanes = []

    @jax.custom_jvp
    def watched(x):
        return x

    @watched.defjvp
    def _(primals, tangents):
        jax.debug.callback(lambda _: lanes.append(1), tangents[0][0])
        return primals[0], tangents[0]

    for n in (10, 1000):
        jax.jit(lambda x: T.sparse_jacobian(lambda x: tridiagonal(watched(x)), mode="forward")(x).data)(jnp.ones(n))
        jax.effects_barrier()
        assert len(lanes) == 3
        lanes.clear()


def test_cheaper_mode_is_chosen():
    """One dense row needs as many columns' colors as there are columns, and one color of rows."""
    wide, tall = (lambda x: x.sum()[None] * 2), (lambda x: x[0] * jnp.ones(50))
    pattern = T.jacobian_sparsity(wide)(jnp.ones(30))
    assert _cheaper_mode(pattern) == "reverse"
    assert _cheaper_mode(T.jacobian_sparsity(tall)(jnp.ones(30))) == "forward"
    for fun in (wide, tall):
        got, expected = jax.jit(lambda x, f=fun: (T.sparse_jacobian(f, dense=True)(x), jax.jacrev(f)(x)))(jnp.ones(30))
        np.testing.assert_array_equal(got, expected)


# ------------------------------------------------------------------------------------------ States


def sparse_operators():
    for name, transform, reference in (
        ("sparse_jacobian", T.sparse_jacobian, jax.jacrev),
        ("sparse_hessian", T.sparse_hessian, jax.hessian),
    ):
        scalar = name == "sparse_hessian"

        def ours(scenario, states, run, args, holomorphic, transform=transform, scalar=scalar):
            fun = (lambda *a: total(run(*a))) if scalar else run
            return transform(fun, **scenario.options(states), dense=True)(*args)

        def against(pure, diff, holomorphic, reference=reference, scalar=scalar):
            def fun(d):
                out, new = pure(d)
                return (total(out) if scalar else out), new

            return reference(fun, has_aux=True)(diff)

        yield Operator(name, ours, against)


CELLS = [
    pytest.param(scenario, operator, context, id=f"{scenario}-{operator}-{context}")
    for scenario in SCENARIOS
    for operator in sparse_operators()
    for context in CONTEXTS
    if context.name == {"states": "plain", "both": "jit", "arguments": "nested"}[scenario.wrt]
    and (scenario.wrt == "both" or scenario.name in ("pytree", "in_place"))
    and (operator.name == "sparse_jacobian" or scenario.name in ("scalar", "pytree", "noise", "inner_step"))
]


@pytest.mark.crossing
@pytest.mark.parametrize(("scenario", "operator", "context"), CELLS)
def test_agrees_with_jax_on_the_twin(scenario, operator, context, double):
    """Structure, values and writes are those of jacobian and hessian, and the function ran once."""
    compare_scenario(scenario, operator, context, "float64")


def model():
    return {
        "w": ParamState(jnp.linspace(0.5, 1.5, 6), name="w"),
        "h": HiddenState(jnp.ones(6), name="h"),
        "count": State(jnp.array(0), name="count"),
    }


def step(states, x):
    states["count"].value += 1
    states["h"].value = tridiagonal(states["w"].value) * x
    return states["h"].value ** 2


@pytest.mark.parametrize("around", [lambda f: f, T.jit])
@pytest.mark.parametrize("given", [False, True])
def test_runs_once_and_commits_once(around, given):
    states, runs = model(), []

    def fun(x):
        runs.append(1)
        return step(states, x)

    options = {"pattern": distances(6) <= 1} if given else {}
    call = around(T.sparse_jacobian(fun, states["w"], **options))
    matrix = call(2.0)
    assert len(runs) == 1
    assert states["count"].value == 1
    np.testing.assert_allclose(states["h"].value, tridiagonal(states["w"].value) * 2, rtol=1e-6)
    expected = jax.jacfwd(lambda w: (tridiagonal(w) * 2) ** 2)(states["w"].value)
    assert isinstance(matrix, jsparse.BCOO)
    np.testing.assert_allclose(matrix.todense(), expected, rtol=1e-5, atol=1e-6)


def test_blocks_have_the_structure_of_the_jacobian():
    w, b = ParamState({"a": jnp.ones((2, 3)), "n": jnp.array(3)}), ParamState(jnp.array(0.5))

    def fun(x):
        y = w.value["a"] * x[:, None] + b.value
        return {"y": y, "z": (y[0, 0] ** 2, x)}

    x = jnp.array([1.0, 2.0])
    got = T.jit(T.sparse_jacobian(fun, [w, b], 0))(x)
    expected = T.jit(T.jacobian(fun, [w, b], 0))(x)
    is_sparse = {"is_leaf": lambda leaf: isinstance(leaf, jsparse.BCOO)}
    assert jax.tree.structure(got, **is_sparse) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(got, **is_sparse), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype and a.nse <= e.size
        np.testing.assert_allclose(a.todense(), e, rtol=1e-6)


def test_sparsity_changes_no_state():
    states = model()
    with unchanged(*states.values()):
        pattern = T.jacobian_sparsity(lambda x: step(states, x), states["w"])(2.0)
        energy = T.hessian_sparsity(lambda x: step(states, x).sum(), [states["w"], states["h"]], check_states=False)(
            2.0
        )
    assert pattern == SparsityPattern.of(distances(6) <= 1)
    assert energy.shape == (12, 12)


def test_options_and_decorators():
    states = model()

    @T.sparse_jacobian(grad_states=states["w"], has_aux=True, return_value=True)
    def fun(x):
        return step(states, x), "aux"

    matrix, value, aux = fun(2.0)
    assert matrix.shape == (6, 6) and value.shape == (6,) and aux == "aux"

    @T.sparse_hessian(argnums=(0, 1))
    def product(x, y):
        return (x * y**2).sum()

    (xx, xy), (yx, yy) = product(jnp.ones(3), jnp.ones(3))
    assert (xx.nse, xy.nse, yx.nse, yy.nse) == (0, 3, 3, 3)

    class Model:
        @T.jacobian_sparsity(argnums=0)
        def shift(self, x):
            return x[1:]

        @T.sparse_jacobian
        def shifted(self, x):
            return x[1:]

    assert Model().shift(jnp.ones(4)).nnz == 3
    assert Model().shifted(jnp.ones(4)).nse == 3


def test_custom_vjp_is_followed_backwards(double):

    def fun(x):
        return twice(x)[::-1] * x

    def loss(x):
        return (twice(x) ** 2).sum()

    got, square, expected, expected_square = jax.jit(
        lambda x: (T.sparse_jacobian(fun)(x), T.sparse_hessian(loss)(x), jax.jacrev(fun)(x), jax.hessian(loss)(x))
    )(point(0))
    assert (got.nse, square.nse) == (12, 6)
    np.testing.assert_allclose(got.todense(), expected, rtol=1e-12)
    np.testing.assert_allclose(square.todense(), expected_square, rtol=1e-12)


def test_derivative_of_a_sparse_jacobian(double):
    def norm(jacobian, x):
        return (jacobian(x) ** 2).sum()

    x, ours, dense = point(0), T.sparse_jacobian(tridiagonal, dense=True), jax.jacfwd(tridiagonal)
    got, expected = (jax.jit(jax.grad(lambda x, j=j: norm(j, x)))(x) for j in (ours, dense))
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    got, expected = jax.jit(lambda x: (T.vmap(ours)(x), jax.vmap(dense)(x)))(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_nothing_depends_on_anything():
    got = T.sparse_jacobian(lambda x: jnp.floor(x))(jnp.ones(3))
    assert got.nse == 0 and got.shape == (3, 3)
    assert T.sparse_jacobian(lambda x: x[:0])(jnp.ones(3)).shape == (0, 3)
    assert T.sparse_hessian(lambda x: x.sum(), dense=True)(jnp.ones(3)).tolist() == np.zeros((3, 3)).tolist()
    assert T.sparse_jacobian(lambda x: x**2, dense=True)(3.0) == 6.0
    assert T.sparse_jacobian(lambda x: x**2)(3.0).todense() == 6.0


def test_dtypes_are_those_of_the_outputs(double):
    def fun(x, y):
        return {"single": x * 2, "double": y * x.astype(y.dtype)}

    x, y = jnp.ones(3, jnp.float32), jnp.ones(3)
    for mode in ("forward", "reverse"):
        got = T.sparse_jacobian(fun, argnums=(0, 1), mode=mode)(x, y)
        assert {name: [m.dtype.name for m in row] for name, row in got.items()} == {
            "single": ["float32"] * 2,
            "double": ["float64"] * 2,
        }


# ------------------------------------------------------------------------------------------ patterns as objects


def test_pattern_is_made_of_many_things():
    dense = distances(5) <= 1
    pattern = SparsityPattern.of(dense)
    numbers = dense.astype(np.float32)
    for other in (jsparse.BCOO.fromdense(numbers, nse=20), scipy.sparse.csr_array(dense), jnp.asarray(dense), pattern):
        assert SparsityPattern.of(other) == pattern
    assert SparsityPattern(pattern.rows[::-1], pattern.cols[::-1], (5, 5)) == pattern
    assert pattern.is_symmetric and not SparsityPattern.of(np.tri(3)).is_symmetric
    assert SparsityPattern.of(np.tri(3)).symmetrized().nnz == 9


@pytest.mark.parametrize("kind", ["column", "row", "symmetric"])
def test_save_and_load(tmp_path, kind):
    pattern = SparsityPattern.of(distances(30) <= 2)
    pattern.coloring(kind)
    pattern.save(tmp_path / "pattern.npz")
    loaded = SparsityPattern.load(tmp_path / "pattern.npz")
    assert loaded == pattern and repr(loaded) == repr(pattern) and f"{kind} colors" in repr(loaded)
    assert loaded.coloring(kind).tolist() == pattern.coloring(kind).tolist()
    pattern._colors[kind] = np.zeros(30, np.int64)
    pattern.save(tmp_path / "wrong.npz")
    with pytest.raises(StateValueError, match=f"wrong.npz.*{kind} colors are not a coloring of this pattern"):
        SparsityPattern.load(tmp_path / "wrong.npz")


def test_a_saved_pattern_gives_the_same_derivative(tmp_path):
    x = jnp.linspace(0.0, 1.0, 20)
    found = T.jacobian_sparsity(tridiagonal)(x)
    found.save(tmp_path / "p")
    loaded = SparsityPattern.load(tmp_path / "p")
    a, b = (T.sparse_jacobian(tridiagonal, pattern=p)(x) for p in (None, loaded))
    np.testing.assert_array_equal(a.todense(), b.todense())


# ------------------------------------------------------------------------------------------ errors

x6 = jnp.linspace(0.0, 1.0, 6)
ERRORS = {
    "shape": (lambda s: T.sparse_jacobian(s, pattern=np.eye(5))(x6), StateValueError, "5x5.*6 outputs and 6 inputs"),
    "misses": (
        lambda s: T.sparse_jacobian(s, pattern=np.eye(6))(x6),
        StateValueError,
        "misses non-zeros: 6 rows.*pattern.*detected",
    ),
    "misses in reverse": (
        lambda s: T.sparse_jacobian(s, pattern=np.eye(6), mode="reverse")(x6),
        StateValueError,
        "misses non-zeros: 6 columns",
    ),
    "hessian misses": (
        lambda s: T.sparse_hessian(lambda x: s(x).prod(), pattern=np.eye(6))(x6 + 1),
        StateValueError,
        "sparse_hessian: the given pattern misses",
    ),
    "unsymmetric": (
        lambda s: T.sparse_hessian(lambda x: s(x).sum(), pattern=np.tri(6))(x6),
        StateValueError,
        "not symmetric.*symmetrized",
    ),
    "no pattern": (
        lambda s: T.sparse_jacobian(s, pattern="tri")(x6),
        StateTypeError,
        "a str is not a sparsity pattern",
    ),
    "one axis": (lambda s: T.sparse_jacobian(s, pattern=x6)(x6), StateTypeError, "an array of 1 axes is no"),
    "mode": (lambda s: T.sparse_jacobian(s, mode="back")(x6), StateValueError, "mode='back' is not one of 'auto'"),
    "custom_vjp forward": (
        lambda s: T.sparse_jacobian(lambda x: s(twice(x)), mode="forward")(x6),
        StateTypeError,
        "custom_vjp.*mode='reverse'",
    ),
    "integer input": (lambda s: T.sparse_jacobian(s)(jnp.arange(6)), StateTypeError, "argument 0 is int32.*Convert"),
    "complex input": (
        lambda s: T.sparse_jacobian(s)(x6.astype(complex)),
        StateTypeError,
        "complex64.*real and imaginary parts",
    ),
    "integer output": (
        lambda s: T.sparse_jacobian(lambda x: {"n": s(x).astype(int)})(x6),
        StateTypeError,
        r"int32\[6\] at \['n'\].*has_aux",
    ),
    "no scalar": (lambda s: T.sparse_hessian(s)(x6), StateTypeError, r"shape \(6,\).*sparse_jacobian"),
    "aux": (lambda s: T.sparse_jacobian(s, has_aux=True)(x6), StateTypeError, "pair .value, aux."),
    "unused": (
        lambda s: T.jacobian_sparsity(s, ParamState(x6, name="idle"), 0)(x6),
        StateValueError,
        "never reads grad_states .*idle",
    ),
    "branching": (
        lambda s: T.sparse_jacobian(lambda x: s(x) if x[0] > 0 else x)(x6),
        jax.errors.TracerBoolConversionError,
        "",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    trigger, kind, message = ERRORS[name]
    count = State(jnp.array(0), name="count")

    def fun(x):
        count.value += 1
        return tridiagonal(x)

    with unchanged(count), pytest.raises(kind, match=f"(?s){message}") as caught:
        trigger(fun)
    if name == "branching":
        assert any("transform.cond" in note for note in caught.value.__notes__)


def test_the_check_of_a_pattern_can_be_left_out():
    got = T.sparse_jacobian(tridiagonal, pattern=np.eye(6), check_pattern=False)(x6)
    assert got.nse == 6


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: SparsityPattern([0.5], [0], (1, 1)), StateTypeError, "float64"),
        (lambda: SparsityPattern([0], [0], (1,)), StateTypeError, "a pair"),
        (lambda: SparsityPattern([0, 1], [0], (2, 2)), StateValueError, "one length"),
        (lambda: SparsityPattern([0], [2], (2, 2)), StateValueError, "cols reach from 2 to 2, outside of 2x2"),
        (lambda: SparsityPattern([-1], [0], (2, 2)), StateValueError, "rows reach from -1"),
        (lambda: SparsityPattern.of(np.eye(2)).coloring("edge"), StateValueError, "'column', 'row', 'symmetric'"),
        (lambda: SparsityPattern.of(np.tri(2)).coloring("symmetric"), StateValueError, "symmetrized"),
    ],
)
def test_errors_of_patterns(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_a_file_that_holds_no_pattern(tmp_path):
    np.savez(tmp_path / "other.npz", rows=np.zeros(2))
    np.save(tmp_path / "other.npy", np.zeros(2))
    (tmp_path / "text").write_text("no pattern")
    (tmp_path / "empty").touch()
    (tmp_path / "broken").write_bytes((tmp_path / "other.npz").read_bytes()[:50])
    for name in ("other.npz", "other.npy", "text", "empty", "broken"):
        with pytest.raises(StateValueError, match=f"{name}.* does not hold a SparsityPattern"):
            SparsityPattern.load(tmp_path / name)
