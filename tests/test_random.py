"""Random numbers: each sampler against its distribution and against `jax.random`; generators; bad input."""

import copy
import doctest
import inspect
import os
import pickle
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

import brainstate
import brainstate.random as R
from _covering import few
from brainstate import ParamState, State, transform
from brainstate._errors import StateTypeError, StateValueError, TraceContextError

N = 20_000

# The record: parameters of every sampler. SKD stands for size, key, dtype.
SKD = "size=None, key=None, dtype=None"
SIGNATURES = {
    "rand": "*dn, key=None, dtype=None",
    "randn": "*dn, key=None, dtype=None",
    **dict.fromkeys(["random", "random_sample", "ranf", "sample", "standard_normal"], SKD),
    **dict.fromkeys(["standard_exponential", "standard_cauchy", "maxwell"], SKD),
    "randint": f"low, high=None, {SKD}",
    "random_integers": f"low, high=None, {SKD}",
    "poisson": f"lam=1.0, {SKD}",
    "binomial": f"n, p, {SKD}, check_valid=True",
    "geometric": f"p, {SKD}",
    "hypergeometric": f"ngood, nbad, nsample, {SKD}",
    "logseries": f"p, {SKD}",
    "negative_binomial": f"n, p, {SKD}",
    "multinomial": f"n, pvals, {SKD}, check_valid=True",
    "zipf": f"a, {SKD}",
    "bernoulli": "p=0.5, size=None, key=None, check_valid=True",
    "categorical": "logits, axis=-1, size=None, key=None",
    **dict.fromkeys(["normal", "gumbel", "laplace", "logistic"], f"loc=None, scale=None, {SKD}"),
    "lognormal": f"mean=None, sigma=None, {SKD}",
    "uniform": f"low=0.0, high=1.0, {SKD}",
    "truncated_normal": "lower, upper, size=None, loc=0.0, scale=1.0, key=None, dtype=None, check_valid=True",
    "triangular": f"left=0.0, mode=0.5, right=1.0, {SKD}",
    "exponential": f"scale=None, {SKD}",
    "rayleigh": f"scale=1.0, {SKD}",
    **dict.fromkeys(["pareto", "power", "weibull", "loggamma"], f"a, {SKD}"),
    "weibull_min": f"a, scale=None, {SKD}",
    "standard_gamma": f"shape, {SKD}",
    **dict.fromkeys(["standard_t", "t", "chisquare"], f"df, {SKD}"),
    "dirichlet": f"alpha, {SKD}",
    "orthogonal": f"n, {SKD}",
    "beta": f"a, b, {SKD}",
    "gamma": f"shape, scale=None, {SKD}",
    "f": f"dfnum, dfden, {SKD}",
    "noncentral_f": f"dfnum, dfden, nonc, {SKD}",
    "noncentral_chisquare": f"df, nonc, {SKD}",
    "vonmises": f"mu, kappa, {SKD}",
    "wald": f"mean, scale, {SKD}",
    "multivariate_normal": "mean, cov, size=None, method='cholesky', key=None, dtype=None",
    "choice": "a, size=None, replace=True, p=None, key=None",
    "permutation": "x, axis=0, independent=False, key=None",
    "shuffle": "x, axis=0, key=None",
    "rand_like": "input, *, dtype=None, key=None",
    "randn_like": "input, *, dtype=None, key=None",
    "randint_like": "input, low=0, high=None, *, dtype=None, key=None",
}
SEEDS = {
    "seed": "seed_or_key=None",
    "set_key": "k",
    "get_key": "",
    "get_key_data": "",
    "default_rng": "s=None",
    "clone_rng": "s=None, clone=True",
    "split_key": "n=None, backup=False",
    "split_keys": "n, backup=False",
    "seed_context": "s",
    "restore_key": "",
    "self_assign_multi_keys": "n, backup=True",
}

# Floating samplers: arguments and the distribution.
CONTINUOUS = [
    ("random", (), stats.uniform()),
    ("random_sample", (), stats.uniform()),
    ("ranf", (), stats.uniform()),
    ("sample", (), stats.uniform()),
    ("uniform", (-1.0, 3.0), stats.uniform(-1, 4)),
    ("standard_normal", (), stats.norm()),
    ("standard_exponential", (), stats.expon()),
    ("standard_cauchy", (), stats.cauchy()),
    ("maxwell", (), stats.maxwell()),
    ("normal", (1.0, 2.0), stats.norm(1, 2)),
    ("gumbel", (1.0, 2.0), stats.gumbel_r(1, 2)),
    ("laplace", (1.0, 2.0), stats.laplace(1, 2)),
    ("logistic", (1.0, 2.0), stats.logistic(1, 2)),
    ("lognormal", (0.5, 0.7), stats.lognorm(0.7, scale=np.exp(0.5))),
    ("truncated_normal", (-1.0, 2.0), stats.truncnorm(-1, 2)),
    ("triangular", (-1.0, 0.0, 3.0), stats.triang(0.25, -1, 4)),
    ("exponential", (2.0,), stats.expon(scale=2)),
    ("rayleigh", (2.0,), stats.rayleigh(scale=2)),
    ("pareto", (3.0,), stats.pareto(3)),
    ("power", (0.3,), stats.powerlaw(0.3)),
    ("power", (3.0,), stats.powerlaw(3)),
    ("weibull", (1.5,), stats.weibull_min(1.5)),
    ("weibull_min", (1.5, 2.0), stats.weibull_min(1.5, scale=2)),
    ("standard_gamma", (0.5,), stats.gamma(0.5)),
    ("gamma", (3.0, 2.0), stats.gamma(3, scale=2)),
    ("loggamma", (3.0,), stats.loggamma(3)),
    ("standard_t", (3.0,), stats.t(3)),
    ("t", (3.0,), stats.t(3)),
    ("chisquare", (3.0,), stats.chi2(3)),
    ("noncentral_chisquare", (0.7, 2.0), stats.ncx2(0.7, 2)),
    ("noncentral_chisquare", (5.0, 30.0), stats.ncx2(5, 30)),
    ("f", (5.0, 9.0), stats.f(5, 9)),
    ("noncentral_f", (5.0, 9.0, 2.0), stats.ncf(5, 9, 2)),
    ("beta", (2.0, 3.0), stats.beta(2, 3)),
    ("vonmises", (0.0, 4.0), stats.vonmises(4)),
    ("vonmises", (0.0, 0.0), stats.uniform(-np.pi, 2 * np.pi)),
    ("vonmises", (0.0, 1e-3), stats.vonmises(1e-3)),
    ("vonmises", (0.0, 1e5), stats.norm(0, 1e-5**0.5)),
    ("wald", (1.5, 2.0), stats.invgauss(0.75, scale=2)),
]

# Samplers of integers: arguments and the distribution.
DISCRETE = [
    ("randint", (3, 9), stats.randint(3, 9)),
    ("randint", (9,), stats.randint(0, 9)),
    ("random_integers", (3, 9), stats.randint(3, 10)),
    ("random_integers", (6,), stats.randint(1, 7)),
    ("poisson", (3.0,), stats.poisson(3)),
    ("poisson", (), stats.poisson(1)),
    ("binomial", (10, 0.3), stats.binom(10, 0.3)),
    ("geometric", (0.3,), stats.geom(0.3)),
    ("hypergeometric", (7, 5, 4), stats.hypergeom(12, 7, 4)),
    ("hypergeometric", (30, 10, 25), stats.hypergeom(40, 30, 25)),
    ("hypergeometric", (400_000, 600_000, 1_000), stats.hypergeom(1_000_000, 400_000, 1_000)),
    ("hypergeometric", (1, 0, 1), stats.randint(1, 2)),
    ("logseries", (0.3,), stats.logser(0.3)),
    ("logseries", (0.97,), stats.logser(0.97)),
    ("negative_binomial", (0.5, 0.2), stats.nbinom(0.5, 0.2)),
    ("negative_binomial", (5, 0.4), stats.nbinom(5, 0.4)),
    ("zipf", (1.5,), stats.zipf(1.5)),
    ("zipf", (2.0,), stats.zipf(2)),
    ("zipf", (6.0,), stats.zipf(6)),
    ("zipf", (300.0,), stats.randint(1, 2)),
]

# Where jax.random has the distribution: our call and theirs, which give the same numbers.
float32 = jnp.float32
SAME = [
    ("normal", (), lambda k: jr.normal(k, (N,))),
    ("random", (), lambda k: jr.uniform(k, (N,))),
    ("uniform", (-1.0, 2.0), lambda k: jr.uniform(k, (N,), float32, -1.0, 2.0)),
    ("standard_exponential", (), lambda k: jr.exponential(k, (N,))),
    ("exponential", (), lambda k: jr.exponential(k, (N,))),
    ("standard_cauchy", (), lambda k: jr.cauchy(k, (N,))),
    ("maxwell", (), lambda k: jr.maxwell(k, (N,))),
    ("gumbel", (), lambda k: jr.gumbel(k, (N,))),
    ("laplace", (), lambda k: jr.laplace(k, (N,))),
    ("logistic", (), lambda k: jr.logistic(k, (N,))),
    ("lognormal", (None, 2.0), lambda k: jr.lognormal(k, float32(2.0), (N,))),
    ("truncated_normal", (-1.0, 2.0), lambda k: jr.truncated_normal(k, float32(-1.0), float32(2.0), (N,))),
    ("triangular", (0.0, 1.0, 2.0), lambda k: jr.triangular(k, float32(0), float32(1), float32(2), (N,))),
    ("rayleigh", (2.0,), lambda k: jr.rayleigh(k, float32(2.0), (N,))),
    ("pareto", (3.0,), lambda k: jr.pareto(k, float32(3.0), (N,))),
    ("weibull_min", (3.0,), lambda k: jr.weibull_min(k, float32(1.0), float32(3.0), (N,))),
    ("gamma", (3.0,), lambda k: jr.gamma(k, float32(3.0), (N,))),
    ("standard_gamma", (3.0,), lambda k: jr.gamma(k, float32(3.0), (N,))),
    ("loggamma", (3.0,), lambda k: jr.loggamma(k, float32(3.0), (N,))),
    ("standard_t", (3.0,), lambda k: jr.t(k, float32(3.0), (N,))),
    ("chisquare", (3.0,), lambda k: jr.chisquare(k, float32(3.0), (N,))),
    ("f", (3.0, 4.0), lambda k: jr.f(k, float32(3.0), float32(4.0), (N,))),
    ("beta", (3.0, 4.0), lambda k: jr.beta(k, float32(3.0), float32(4.0), (N,))),
    ("wald", (2.0, 1.0), lambda k: jr.wald(k, float32(2.0), (N,))),
    ("randint", (2, 9), lambda k: jr.randint(k, (N,), 2, 9)),
    ("poisson", (3.0,), lambda k: jr.poisson(k, float32(3.0), (N,))),
    ("binomial", (9, 0.5), lambda k: jr.binomial(k, float32(9), float32(0.5), (N,)).astype(int)),
    ("geometric", (0.5,), lambda k: jr.geometric(k, float32(0.5), (N,))),
    ("bernoulli", (0.3,), lambda k: jr.bernoulli(k, float32(0.3), (N,))),
    ("categorical", ([0.0, 1.0], -1), lambda k: jr.categorical(k, jnp.array([0.0, 1.0]), shape=(N,))),
    ("dirichlet", ([1.0, 2.0],), lambda k: jr.dirichlet(k, jnp.array([1.0, 2.0]), (N,))),
    (
        "multivariate_normal",
        ([0.0, 1.0], np.eye(2)),
        lambda k: jr.multivariate_normal(k, jnp.arange(2.0), jnp.eye(2), (N,)),
    ),
    ("orthogonal", (3,), lambda k: jr.orthogonal(k, 3, (N,))),
    ("choice", ([3, 1, 4],), lambda k: jr.choice(k, jnp.array([3, 1, 4]), (N,))),
    ("choice", (9,), lambda k: jr.choice(k, 9, (N,))),
]
# The first row of each sampler.
FLOATS = {case[0]: case for case in reversed(CONTINUOUS)}
INTS = {case[0]: case for case in reversed(DISCRETE)}
ELEMENTWISE = [*FLOATS.values(), *INTS.values()]


def names(cases):
    return [f"{name}{args}" for name, args, *_ in cases]


# --- distributions ------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("name", "args", "dist"), CONTINUOUS, ids=names(CONTINUOUS))
def test_continuous(name, args, dist):
    x = getattr(R, name)(*args, size=N, key=1)
    assert x.shape == (N,) and x.dtype == jnp.float32
    assert stats.kstest(np.asarray(x, float), dist.cdf).pvalue > 1e-3


@pytest.mark.long
@pytest.mark.parametrize(("name", "args", "dist"), DISCRETE, ids=names(DISCRETE))
def test_discrete(name, args, dist):
    x = np.asarray(getattr(R, name)(*args, size=N, key=1))
    assert x.dtype == np.int32 and x.min() >= dist.support()[0] and x.max() <= dist.support()[1]
    edges = np.unique(dist.ppf(np.linspace(0, 1, 25)[1:-1]))  # bins (-inf, e0], (e0, e1], ...
    expected = np.diff(np.concatenate([[0], dist.cdf(edges), [1]])) * N
    observed = np.bincount(np.searchsorted(edges, x), minlength=len(expected))
    keep = expected > 5
    assert observed[~keep].sum() <= 25
    if keep.sum() > 1:
        scaled = expected[keep] * (observed[keep].sum() / expected[keep].sum())
        assert stats.chisquare(observed[keep], scaled).pvalue > 1e-3


def test_truncated_normal_bounds_are_those_of_the_result():
    x = R.truncated_normal(1.0, 4.0, size=N, loc=2.0, scale=3.0, key=0)
    assert stats.kstest(np.asarray(x, float), stats.truncnorm(-1 / 3, 2 / 3, 2, 3).cdf).pvalue > 1e-3
    assert x.min() >= 1 and x.max() <= 4


def test_vonmises_is_an_angle_around_mu():
    x = R.vonmises(3.0, 4.0, size=N, key=0)
    assert jnp.abs(x).max() <= jnp.pi
    assert stats.kstest(np.asarray((x - 3 + np.pi) % (2 * np.pi) - np.pi, float), stats.vonmises(4).cdf).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int16])
def test_zipf_stays_on_the_numbers_of_its_dtype(dtype):
    x = np.asarray(R.zipf(1.2, size=N, key=0, dtype=dtype))
    top = np.iinfo(dtype).max
    k = np.arange(1, top + 1.0)
    weights = k**-1.2 / np.sum(k**-1.2)
    assert x.min() >= 1
    assert abs((x == 1).mean() - weights[0]) < 0.02 and abs((x > top // 2).mean() - weights[top // 2 :].sum()) < 0.02


def test_bernoulli():
    x = R.bernoulli(jnp.array([0.2, 0.9]), size=(N, 2), key=0)
    assert x.dtype == bool
    assert np.allclose(x.mean(0), [0.2, 0.9], atol=0.02)
    assert R.bernoulli(key=0).shape == ()


def test_categorical():
    logits = jnp.log(jnp.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]))
    x = R.categorical(logits, size=(N, 2), key=0)
    assert np.allclose((np.asarray(x)[..., None] == np.arange(3)).mean(0), jnp.exp(logits), atol=0.02)
    assert R.categorical(logits, axis=0, key=0).shape == (3,)
    assert R.categorical([1, 2], key=0).shape == ()


def test_multinomial():
    p = np.array([0.2, 0.3, 0.5])
    x = R.multinomial(10, p, size=N, key=0)
    assert x.shape == (N, 3) and x.dtype == jnp.int32 and (x.sum(1) == 10).all()
    assert np.allclose(x.mean(0), 10 * p, atol=0.05)
    assert np.allclose(np.cov(x.T), 10 * (np.diag(p) - np.outer(p, p)), atol=0.1)
    assert R.multinomial(jnp.array([3, 4]), p, key=0).sum(1).tolist() == [3, 4]
    assert R.multinomial(3, jnp.array([p, p]), key=0).shape == (2, 3)


def test_dirichlet():
    alpha = np.array([1.0, 2.0, 3.0])
    x = R.dirichlet(alpha, size=N, key=0)
    assert np.allclose(x.mean(0), alpha / 6, atol=0.01) and np.allclose(x.sum(1), 1, atol=1e-5)
    assert np.allclose(x.var(0), stats.dirichlet(alpha).var(), atol=0.002)
    assert R.dirichlet(alpha, key=0).shape == (3,)


@pytest.mark.parametrize("method", ["cholesky", "eigh", "svd"])
def test_multivariate_normal(method):
    mean, cov = np.array([1.0, -1.0]), np.array([[2.0, 0.6], [0.6, 1.0]])
    x = R.multivariate_normal(mean, cov, N, method, key=0)
    assert np.allclose(x.mean(0), mean, atol=0.05) and np.allclose(np.cov(x.T), cov, atol=0.1)
    assert R.multivariate_normal(jnp.zeros((3, 2)), cov, key=0).shape == (3, 2)


def test_orthogonal():
    x = R.orthogonal(3, size=2, key=0)
    assert np.allclose(x @ x.mT, np.broadcast_to(np.eye(3), (2, 3, 3)), atol=1e-5)


def test_choice():
    x = R.choice([1.0, 2.0, 3.0], N, p=[0.2, 0.3, 0.5], key=0)
    assert np.allclose([(x == v).mean() for v in (1, 2, 3)], [0.2, 0.3, 0.5], atol=0.02)
    assert sorted(R.choice(5, 5, replace=False, key=0).tolist()) == [0, 1, 2, 3, 4]
    assert R.choice(5, key=0).shape == ()
    assert R.choice(jnp.ones((4, 2)), (3, 2), key=0).shape == (3, 2, 2)


def test_permutation_and_shuffle():
    x = jnp.arange(12).reshape(3, 4)
    assert sorted(R.permutation(5, key=0).tolist()) == [0, 1, 2, 3, 4]
    assert (jnp.sort(R.permutation(x, 1, True, key=0), 1) == x).all()
    columns = R.shuffle(x, 1, key=0)
    assert (columns - columns[:1] == x - x[:1]).all() and sorted(columns[0].tolist()) == [0, 1, 2, 3]
    given = np.arange(5)
    R.shuffle(given, key=1)
    assert given.tolist() == [0, 1, 2, 3, 4]
    assert R.shuffle([3, 4], key=0).shape == (2,)


def test_like():
    x = jnp.zeros((2, 3), jnp.int8)
    assert (R.rand_like(x, key=3) == R.rand(2, 3, key=3)).all()
    assert (R.randn_like(x, key=3) == R.randn(2, 3, key=3)).all()
    assert (R.randint_like(x, 2, 9, key=3) == R.randint(2, 9, (2, 3), key=3)).all()
    assert (R.randint_like(x, 9, key=3) == R.randint(9, size=(2, 3), key=3)).all()
    assert R.randint_like(x, 9, dtype=jnp.uint8, key=3).dtype == jnp.uint8
    assert R.rand(key=0).shape == ()


# --- numbers, shapes, dtypes --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "args", "theirs"), SAME, ids=names(SAME))
def test_same_numbers_as_jax(name, args, theirs):
    key = jr.key(7)
    ours = getattr(R, name)(*args, size=N, key=key)
    expected = theirs(key)
    assert ours.dtype == expected.dtype and np.array_equal(ours, expected)


def traced(name, *args, key=0, **options):
    """Return shape and dtype of a draw without compiling it."""
    return jax.eval_shape(lambda: getattr(R, name)(*args, key=key, **options))


@pytest.mark.parametrize(("name", "args", "dist"), ELEMENTWISE, ids=names(ELEMENTWISE))
def test_shapes(name, args, dist):
    assert traced(name, *args).shape == ()
    assert traced(name, *args, size=3).shape == traced(name, *args, size=(3,)).shape == (3,)
    assert traced(name, *args, size=np.int64(2)).shape == (2,)
    assert traced(name, *args, size=(0, 2)).shape == (0, 2)
    if args:
        column, row = np.full((2, 1), args[0]), [jnp.full(3, a) for a in args[1:]]
        assert traced(name, column, *row).shape == ((2, 3) if row else (2, 1))
        assert traced(name, column, *row, size=(4, 2, 3)).shape == (4, 2, 3)
        assert traced(name, [args[0]] * 2, *args[1:]).shape == (2,)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("normal", (0.0, 1.0), (9.0, 1.0)),
        ("vonmises", (0.0, 1e6), (2.0, 1e6)),
        ("randint", (0, 9), (100, 109)),
        ("hypergeometric", (5, 5, 3), (500, 5, 400)),
        ("zipf", (60.0,), (1.01,)),
        ("logseries", (1e-9,), (0.99999,)),
    ],
)
def test_each_element_has_its_own_parameters(name, low, high):
    parameters = [np.array([[a], [b]]) for a, b in zip(low, high, strict=True)]
    x = getattr(R, name)(*parameters, size=(2, 50), key=0)
    assert np.median(x[0]) < np.median(x[1])


@pytest.mark.parametrize(("name", "args", "dist"), FLOATS.values(), ids=FLOATS)
def test_floating_dtypes(name, args, dist):
    assert traced(name, *args, dtype=jnp.float16).dtype == jnp.float16
    assert traced(name, *args, dtype=float).dtype == jnp.float32
    with pytest.raises(TypeError, match=rf"{name}\(\): dtype"):
        traced(name, *args, dtype=int)
    with jax.enable_x64(True):
        assert traced(name, *args).dtype == jnp.float64
        assert traced(name, *args, dtype=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize(("name", "args", "dist"), INTS.values(), ids=INTS)
def test_integer_dtypes(name, args, dist):
    assert traced(name, *args, dtype=jnp.int16).dtype == jnp.int16
    with jax.enable_x64(True):
        assert traced(name, *args).dtype == jnp.int64
        assert traced(name, *args, dtype=jnp.int32).dtype == jnp.int32
    if name not in ("randint", "random_integers"):
        assert traced(name, *args, dtype=jnp.float32).dtype == jnp.float32
    with pytest.raises(TypeError, match=rf"{name}\(\): dtype"):
        traced(name, *args, dtype=bool)


@pytest.mark.parametrize("name", ["zipf", "hypergeometric", "vonmises"])
def test_double_precision(name):
    _, args, dist = {**INTS, **FLOATS}[name]
    with jax.enable_x64(True):
        x = np.asarray(getattr(R, name)(*args, size=1000, key=1))
        assert x.dtype == (jnp.int64 if name in INTS else jnp.float64)
        if name in FLOATS:
            assert stats.kstest(x, dist.cdf).pvalue > 1e-3
        else:
            assert abs((x <= dist.median()).mean() - dist.cdf(dist.median())) < 0.05


def test_complex_normal():
    x = R.normal(1j, size=N, key=0, dtype=jnp.complex64)
    assert np.allclose(x.mean(), 1j, atol=0.03)


def test_unavailable_dtype_warns_as_in_jax():
    with pytest.warns(UserWarning, match=r"normal\(\): float64 is truncated"):
        assert R.normal(key=0, dtype="float64").dtype == jnp.float32


@pytest.mark.parametrize("name", few(["normal", "vonmises", "zipf", "hypergeometric"], 2))
def test_jit_and_vmap(name):
    _, args, _ = {**INTS, **FLOATS}[name]

    def draw(key, *args):
        return getattr(R, name)(*args, size=4, key=key)

    keys = jr.split(jr.key(0), 2)
    one_by_one = np.stack([draw(key, *args) for key in keys])
    assert np.allclose(jax.jit(draw)(keys[0], *args), one_by_one[0], rtol=1e-5, atol=1e-6)
    assert np.allclose(jax.vmap(lambda key: draw(key, *args))(keys), one_by_one, rtol=1e-5, atol=1e-6)


def test_derivative_of_location_and_scale():
    z = R.normal(size=3, key=0)
    jacobian = jax.jacobian(lambda p: R.normal(p[0], p[1], size=3, key=0))((jnp.float32(1), jnp.float32(2)))
    assert np.allclose(jacobian[0], 1) and np.allclose(jacobian[1], z)


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: R.bernoulli(2.0), ["bernoulli()", "0 <= p <= 1", "p=2.0"]),  # D23
        (lambda: R.bernoulli(jnp.array([0.5, np.nan])), ["p=nan at index 1"]),
        (lambda: R.binomial(-1, 0.5), ["0 <= n", "n=-1"]),
        (lambda: R.normal(0.0, [[1.0, -1.0]]), ["0 <= scale", "scale=-1.0 at index [0, 1]"]),
        (lambda: R.uniform(2.0, 1.0), ["low <= high", "low=2.0, high=1.0"]),
        (lambda: R.randint(5, 5), ["low < high", "low=5, high=5"]),
        (lambda: R.randint(0), ["low < high", "low=0, high=0"]),
        (lambda: R.randint_like(jnp.zeros(2)), ["low < high"]),
        (lambda: R.randint(0, 2**40), ["randint()", "high=1099511627776", "int32"]),
        (lambda: R.random_integers(2**31), ["high=2147483648", "int32"]),
        (lambda: R.hypergeometric(3, 4, 8), ["0 <= nsample <= ngood + nbad", "nsample=8", "ngood=3"]),
        (lambda: R.triangular(0.0, 2.0, 1.0), ["left <= mode <= right"]),
        (lambda: R.truncated_normal(2.0, 1.0), ["lower < upper"]),
        (lambda: R.multinomial(3, [0.5, 0.3]), ["sum(pvals)", "0.5"]),
        (lambda: R.zipf(1.0), ["1 < a"]),
        (lambda: R.gamma(-1.0), ["0 < shape", "shape=-1.0"]),
        (lambda: R.normal(size=-1), ["size", "-1"]),
        (lambda: R.normal(jnp.zeros(2), size=3), ["size=(3,)", "(2,)"]),
        (lambda: R.normal(jnp.zeros(2), jnp.ones(3)), ["(2,)", "(3,)", "broadcast"]),
        (lambda: R.dirichlet(jnp.ones((2, 3)), size=3), ["size=(3,)"]),
    ],
)
def test_bad_value(call, parts):
    before = R.get_key_data()
    with pytest.raises(StateValueError) as error:
        call()
    assert all(part in str(error.value) for part in parts), error.value
    assert (R.get_key_data() == before).all()


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: R.normal(size=2.5), ["size", "2.5"]),
        (lambda: R.normal(size="a"), ["size", "'a'"]),
        (lambda: R.normal(State(1.0)), ["loc", "State", ".value"]),
        (lambda: R.normal("a"), ["loc", "str"]),
        (lambda: R.randint(0, 2.5), ["high", "float"]),
        (lambda: R.normal(1j), ["loc", "complex"]),
        (lambda: R.normal(key=1.5), ["seed", "float", "1.5"]),
    ],
)
def test_bad_type(call, parts):
    with pytest.raises(StateTypeError) as error:
        call()
    assert all(part in str(error.value) for part in parts), error.value


def test_wrong_arguments_name_the_function():
    with pytest.raises(TypeError, match=r"gamma\(shape, scale=None.*missing a required argument: 'shape'"):
        R.gamma()
    with pytest.raises(TypeError, match=r"normal.*'mean'"):
        R.normal(mean=1.0)


def test_no_check_if_traced_or_unwanted():
    assert jax.jit(lambda p: R.bernoulli(p, key=0))(2.0)
    assert R.bernoulli(2.0, key=0, check_valid=False)
    R.multinomial(3, [0.5, 0.3], key=0, check_valid=False)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("zipf", (1.0,), -1),
        ("zipf", (np.nan,), -1),
        ("logseries", (1.0,), -1),
        ("hypergeometric", (3.0, 4.0, 8.0), -1),
        ("hypergeometric", (np.nan, 4.0, 2.0), -1),
        ("negative_binomial", (-1.0, 0.5), -1),
        ("vonmises", (0.0, -1.0), np.nan),
        ("vonmises", (0.0, np.nan), np.nan),
        ("noncentral_chisquare", (1.0, -1.0), np.nan),
    ],
)
def test_traced_bad_parameters_end(name, args, expected):
    drawn = jax.jit(lambda *args: getattr(R, name)(*args, size=3, key=0))(*args)
    assert np.array_equal(drawn, np.full(3, expected), equal_nan=True)


# --- generators ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def default_generator():
    """Leave the default generator as it was."""
    with R.seed_context(0):
        yield


def test_a_draw_splits_and_uses_the_second_key():
    R.seed(42)
    key, sub = jr.split(jr.key(42))
    assert (R.normal(size=2) == jr.normal(sub, (2,))).all()
    assert R.get_key() == key
    key, sub = jr.split(key)
    assert R.DEFAULT.uniform() == jr.uniform(sub)
    assert (R.get_key_data() == jr.key_data(key)).all()


def test_generator_is_a_state_of_raw_data():
    rng = R.RandomState(0)
    assert isinstance(rng, State) and rng.value.dtype == np.uint32 and rng.value.shape == (2,)
    assert rng.impl == "threefry2x32"


@pytest.mark.parametrize(
    "seed", [7, np.int32(7), np.uint32(7), jr.key(7), jr.key_data(jr.key(7)), np.array([0, 7], np.uint32)]
)
def test_seeds(seed):
    assert R.RandomState(seed).get_key() == jr.key(7)
    R.seed(seed)
    assert R.get_key() == jr.key(7)
    assert R.normal(key=seed) == jr.normal(jr.key(7))
    assert R.get_key() == jr.key(7)


@pytest.mark.parametrize("seed", [1.5, "a", True, [1, 2], np.float32(1), np.zeros(2), jnp.zeros(2, int)])
def test_bad_seeds(seed):
    for call in (R.seed, R.set_key, R.RandomState, R.default_rng, lambda s: R.normal(key=s)):
        with pytest.raises(TypeError, match="seed"):
            call(seed)


def test_seed_none_differs():
    R.seed()
    first = R.get_key_data()
    R.seed()
    assert (R.get_key_data() != first).any()
    assert (R.RandomState().value != R.RandomState().value).any()


def test_seed_seeds_numpy():
    R.seed(3)
    first = np.random.random()
    R.seed(3)
    assert np.random.random() == first
    R.seed(jr.key(5))
    first = np.random.random()
    R.seed(jr.key(5))
    assert np.random.random() == first
    R.seed(-1)
    R.seed(2**33)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_other_kinds_of_keys(impl):
    rng = R.RandomState(jr.key(1, impl=impl))
    assert rng.impl == impl and rng.value.shape == (4,)
    key, sub = jr.split(jr.key(1, impl=impl))
    assert rng.normal() == jr.normal(sub) and rng.get_key() == key
    assert copy.deepcopy(rng).impl == impl
    rng.seed(1)
    assert rng.impl == "threefry2x32"


def test_default_kind_of_key_is_that_of_jax():
    with jax.default_prng_impl("rbg"):
        assert R.RandomState(1).impl == "rbg"
        assert R.RandomState(np.arange(4, dtype=np.uint32)).impl == "rbg"


def test_split_key():
    R.seed(1)
    keys = jr.split(jr.key(1), 4)
    assert (R.split_key(3) == keys[1:]).all()
    assert R.get_key() == keys[0]
    assert R.split_key().shape == ()
    assert R.split_keys(2).shape == (2,)
    for bad in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"n must be .* got {bad}"):
            R.split_key(bad)


def test_backup():
    rng = R.RandomState(1)
    with pytest.raises(ValueError, match=r"RandomState.*no backup"):
        rng.restore_key()
    rng.self_assign_multi_keys(3)
    assert rng.value.shape == (3, 2)
    rng.restore_key()
    assert rng.get_key() == jr.key(1)
    rng.split_key(2, backup=True)
    rng.restore_key()
    assert rng.get_key() == jr.key(1)
    with pytest.raises(ValueError, match="no backup"):
        rng.restore_key()


def test_seed_context():
    R.seed(1)
    before, numpy_before = R.get_key(), np.random.get_state()[1].copy()
    with pytest.raises(ZeroDivisionError), R.seed_context(5):
        assert R.get_key() == jr.key(5)
        R.normal()
        np.random.random()
        raise ZeroDivisionError
    assert R.get_key() == before and (np.random.get_state()[1] == numpy_before).all()
    rng = R.RandomState(1)
    with rng.seed_context(jr.key(2, impl="rbg")):
        assert rng.impl == "rbg"
    assert rng.get_key() == jr.key(1)


def test_default_rng_and_clone():
    rng = R.RandomState(3)
    assert R.default_rng() is R.DEFAULT and R.default_rng(rng) is rng
    assert R.default_rng(3).get_key() == jr.key(3)
    assert R.clone_rng(rng, clone=False) is rng and R.clone_rng(clone=False) is R.DEFAULT
    clone = R.clone_rng(rng)
    assert [rng.get_key(), clone.get_key()] == list(jr.split(jr.key(3)))
    assert R.clone_rng(3).get_key() == jr.key(3)
    assert R.clone_rng().get_key() != R.get_key()


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r)), State.copy])
def test_copies_draw_the_same(twin):
    rng = R.RandomState(3)
    rng.split_key(backup=True)
    other = twin(rng)
    assert rng.normal() == other.normal()
    rng.restore_key()
    with pytest.raises(ValueError, match="no backup"):
        other.restore_key()


def test_threads_draw_different_numbers():
    rng, seen = R.RandomState(0), []
    threads = [threading.Thread(target=lambda: seen.extend(float(rng.random()) for _ in range(50))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 400


def test_importing_computes_nothing():
    """A backend that does not exist is not missed: the import, and the first seed, start none."""
    program = "import brainstate.random as r; assert type(r.DEFAULT.value).__name__ == 'ndarray'"
    environment = {**os.environ, "JAX_PLATFORMS": "none_such"}
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, env=environment, timeout=60)


# --- transforms ---------------------------------------------------------------------------------------------


def test_d22_raw_vmap_is_refused():
    with pytest.raises(TraceContextError, match=r"brainstate\.random\.DEFAULT.*brainstate\.transform"):
        jax.vmap(lambda x: x + R.normal())(jnp.zeros(3))
    assert jax.vmap(lambda k: R.normal(key=k))(jr.split(jr.key(0), 3)).shape == (3,)


@pytest.mark.filterwarnings("ignore::brainstate._errors.FrozenReadWarning")
def test_raw_jit_is_refused():
    with pytest.raises(TraceContextError, match=r"brainstate\.random\.DEFAULT.*brainstate\.transform"):
        jax.jit(lambda: R.normal())()


def draws():
    return R.normal(size=3), R.bernoulli(0.5, size=3), R.split_key(2), R.randint(9), R.gamma(2.0, size=2)


def test_same_numbers_inside_and_outside_jit():
    R.seed(5)
    outside = [draws() for _ in range(3)], R.get_key()
    R.seed(5)
    compiled = transform.jit(draws)
    inside = [compiled() for _ in range(3)], R.get_key()
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), outside, inside))


def test_seeding_inside_jit():
    @transform.jit
    def f(seed):
        R.DEFAULT.seed(seed)
        with R.DEFAULT.seed_context(8):
            inner = R.random()
        return inner, R.random()

    inner, outer = f(4)
    assert inner == R.RandomState(8).random() and outer == R.RandomState(4).random()
    with pytest.raises(StateValueError, match="kind threefry2x32, which cannot become rbg"):
        transform.jit(lambda: R.DEFAULT.seed(jr.key(0, impl="rbg")))()
    assert R.DEFAULT.impl == "threefry2x32"


def test_backup_inside_jit():
    @transform.jit
    def f():
        R.split_key(2, backup=True)
        R.restore_key()
        return R.random()

    expected = R.RandomState(R.get_key()).random()
    assert f() == expected


def test_grad_draws_once():
    w, rng = ParamState(jnp.float32(2.0)), R.RandomState(1)
    key, sub = jr.split(jr.key(1))
    gradient = transform.grad(lambda: w.value * rng.normal(), w)()
    assert gradient == jr.normal(sub) and rng.get_key() == key


# --- form ---------------------------------------------------------------------------------------------------


def written(signature):
    """Write a signature as the record does, without annotations."""
    parameters = [p.replace(annotation=p.empty) for n, p in signature.parameters.items() if n != "self"]
    return str(inspect.Signature(parameters))[1:-1]


def test_all_is_the_record():
    assert set(R.__all__) == {"DEFAULT", "RandomState", *SEEDS, *SIGNATURES} and len(R.__all__) == len(set(R.__all__))


@pytest.mark.parametrize("name", [*SIGNATURES, *SEEDS])
def test_signature_and_docstring(name):
    function = getattr(R, name)
    assert written(inspect.signature(function)) == {**SIGNATURES, **SEEDS}[name]
    assert function.__name__ == name and function.__doc__
    assert pickle.loads(pickle.dumps(function)) is function
    if name in SIGNATURES:
        method = getattr(R.RandomState, name)
        assert written(inspect.signature(method)) == SIGNATURES[name]
        assert method.__qualname__ == f"RandomState.{name}" and function.__module__ == "brainstate.random"


@pytest.mark.parametrize("name", SIGNATURES)
def test_examples_in_docstrings(name):
    """Each example has the shape that it shows; traced only, since compiling them all takes long."""
    setup, example = doctest.DocTestParser().get_examples(getattr(R, name).__doc__)
    call, attribute = example.source.strip().rsplit(".", 1)
    assert setup.source == "import brainstate\n" and attribute == "shape"
    shape = jax.eval_shape(lambda: eval(call, {"brainstate": brainstate})).shape
    assert f"{shape}\n" == example.want
