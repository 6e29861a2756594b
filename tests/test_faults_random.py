"""Random numbers at awkward parameters: each law against SciPy, each refusal by name, and what a failed draw leaves."""

import threading

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

import brainstate.random as R
from brainstate import transform
from brainstate._errors import BrainStateError, StateValueError

N = 20_000
inf, nan = np.inf, np.nan
HUGE = 2**31


# --- A13: the law ---------------------------------------------------------------------------------------------


def distance(x, cdf):
    """Return the Kolmogorov-Smirnov distance from a law rounded to the type of ``x``, times the root of the size."""
    values, counts = np.unique(np.asarray(x), return_counts=True)
    assert not np.isnan(values).any()
    edges = values.astype(float)
    if values.dtype.kind == "f":  # rounding takes what is up to half a step above
        finite = np.isfinite(values) & (values < np.finfo(values.dtype).max)
        edges[finite] += (np.nextafter(values[finite], values.dtype.type(inf)).astype(float) - edges[finite]) / 2
        edges[values == 0] = np.finfo(values.dtype).tiny
    return np.abs(np.cumsum(counts) / x.size - cdf(edges)).max() * x.size**0.5


def gamma_like(law, *shapes):
    return [((np.float32(s),), law(float(np.float32(s)))) for s in shapes]


# name: [(arguments, law)]
LAWS = {
    "truncated_normal": [
        ((6.0, 7.0), stats.truncnorm(6, 7)),
        ((5.0, 50.0), stats.truncnorm(5, 50)),
        ((-7.0, -6.0), stats.truncnorm(-7, -6)),
        ((-50.0, -5.0), stats.truncnorm(-50, -5)),
        ((10.0, inf), stats.truncnorm(10, inf)),
        ((-inf, -3.0), stats.truncnorm(-inf, -3)),
        ((-inf, inf), stats.norm()),
        ((-inf, 2.0), stats.truncnorm(-inf, 2)),
        ((2.99, 50.0), stats.truncnorm(float(np.float32(2.99)), 50)),
        ((-30.0, 30.0), stats.norm()),
        ((0.0, inf, N, -50.0, 1.0), stats.truncnorm(50, inf, -50, 1)),
        ((-inf, 0.0, N, 90.0, 3.0), stats.truncnorm(-inf, -30, 90, 3)),
        ((100.0, 160.0, N, 40.0, 10.0), stats.truncnorm(6, 12, 40, 10)),
    ],
    "gamma": gamma_like(stats.gamma, 1e-6, 1e-3, 0.1, 1e6, 1e10, 1e13),
    "standard_gamma": gamma_like(stats.gamma, 1e-3, 1e8),
    "loggamma": gamma_like(stats.loggamma, 1e-6, 1e-3, 1e6),
    "chisquare": gamma_like(stats.chi2, 1e-3, 0.1, 3e4, 1e10),
    "t": gamma_like(stats.t, 0.1, 0.5, 1.0, 1e8),
    "beta": [
        ((a, b), stats.beta(float(np.float32(a)), float(np.float32(b))))
        for a, b in [(1e-3, 1e-3), (1e-3, 5.0), (1e6, 1e6), (1e12, 1e12), (1e8, 1.0), (0.5, 1e5), (1e-10, 1e-10)]
    ],
    "f": [((a, b), stats.f(a, b)) for a, b in [(0.015625, 0.015625), (0.125, 5.0), (1e6, 1e6), (3.0, 1e8)]],
    "noncentral_chisquare": [
        ((0.125, 3.0), stats.ncx2(0.125, 3)),
        ((1.0, 5e3), stats.ncx2(1, 5e3)),
        ((5.0, 1e8), stats.norm(1e8 + 5, (2 * (5 + 2e8)) ** 0.5)),
        ((5.0, 1e12), stats.norm(1e12 + 5, (2 * (5 + 2e12)) ** 0.5)),
    ],
    "noncentral_f": [
        ((0.015625, 0.015625, 0.0), stats.f(0.015625, 0.015625)),
        ((3.0, 1e5, 500.0), stats.ncf(3, 1e5, 500)),
    ],
    "wald": [
        ((m, s), stats.invgauss(m / s, scale=s))
        for m, s in [(2.0**-20, 1.0), (1.0, 2.0**-13), (2.0**13, 1.0), (2.0**60, 1.0), (4.5, 1.0), (1e3, 1e3)]
    ],
    "vonmises": [
        ((0.0, 0.0), stats.uniform(-np.pi, 2 * np.pi)),
        ((0.0, 1e-4), stats.vonmises(1e-4)),
        ((0.0, 1e6), stats.norm(0, 1e-3)),
        ((0.0, 1e20), stats.norm(0, 1e-10)),
        ((1e3, 1e6), stats.norm((1e3 + np.pi) % (2 * np.pi) - np.pi, 1e-3)),
    ],
    "triangular": [
        ((0.0, 0.0, 1.0), stats.triang(0)),
        ((0.0, 1.0, 1.0), stats.triang(1)),
        ((-1e30, 0.0, 1e30), stats.triang(0.5, -1e30, 2e30)),
        ((0.0, 1e-25, 4e-25), stats.triang(0.25, 0, 4e-25)),
        ((-3e38, 0.0, 3e38), stats.triang(0.5, -3e38, 6e38)),
    ],
    "uniform": [((-3e38, 3e38), stats.uniform(-3e38, 6e38)), ((0.0, 1e-30), stats.uniform(0, 1e-30))],
    "lognormal": [((m, 5.0), stats.lognorm(5, scale=np.exp(m))) for m in (-90.0, 90.0)],
    "gumbel": [((-3.0, 1e20), stats.gumbel_r(-3, 1e20))],
    "laplace": [((1e6, 0.125), stats.laplace(1e6, 0.125))],
    "logistic": [((0.0, 1e-20), stats.logistic(0, 1e-20))],
    "weibull": gamma_like(stats.weibull_min, 0.1, 1e6),
    "weibull_min": [((0.5, 1e10), stats.weibull_min(0.5, scale=1e10))],
    "pareto": gamma_like(stats.pareto, 0.1, 1e6),
    "power": gamma_like(stats.powerlaw, 1e-3, 1e6),
    "rayleigh": [((1e20,), stats.rayleigh(scale=1e20))],
    "exponential": [((1e-30,), stats.expon(scale=1e-30))],
    "maxwell": [((), stats.maxwell())],
    "standard_cauchy": [((), stats.cauchy())],
    "poisson": gamma_like(stats.poisson, 1e-4, 9.99, 10.0, 1023.0, 1025.0, 3e4, 1e6, 16777217.0, 1e8, 2e9),
    "binomial": [
        ((n, p), stats.binom(n, float(np.float32(p))))
        for n, p in [
            (10**9, 0.5),
            (10**9, 0.999),
            (10**9, 1e-8),
            (10**9, 1e-9),
            (65536, 0.0005),
            (10**7, 1e-5),
            (10**6, 0.9),
            (HUGE - 1, 0.5),
            (20, 0.7),
        ]
    ],
    "hypergeometric": [
        ((g, b, n), stats.hypergeom(g + b, g, n))
        for g, b, n in [(10**6, 10**6, 2000), (5000, 3000, 7500), (10**5, 10**3, 5 * 10**4), (10, 10**9, 5 * 10**8)]
    ],
    "geometric": gamma_like(stats.geom, 1e-7, 1e-4, 0.9999),
    "negative_binomial": [
        ((n, p), stats.nbinom(n, p)) for n, p in [(2.0**-8, 0.5), (1e8, 0.5), (1.0, 2.0**-20), (5.0, 0.5)]
    ],
    "logseries": gamma_like(stats.logser, 1e-6, 0.1, 0.999),
}


@pytest.mark.parametrize("name", LAWS)
def test_a13_law_at_awkward_parameters(name):
    """The Kolmogorov-Smirnov distance, and mean and spread where they exist, at parameters far from ordinary ones."""
    for args, law in LAWS[name]:
        x = np.asarray(getattr(R, name)(*args, **({} if N in args else {"size": N}), key=3))
        assert distance(x, law.cdf) < 1.9, args
        fourth = float(law.stats("k")) if name not in ("f", "noncentral_f", "t", "pareto", "wald") else inf
        if np.isfinite(fourth) and abs(fourth) < 50 and law.std() > 1e-30 and law.var() < 1e70:
            rounding = np.abs(np.spacing(x)).max() if x.dtype.kind == "f" else 0
            if law.std() > 10 * rounding:
                assert abs(x.astype(float).mean() - law.mean()) < 4.5 * law.std() / N**0.5, args
                assert abs(x.astype(float).std() / law.std() - 1) < 4.5 * ((fourth + 2) / 4 / N) ** 0.5 + 1e-4, args


RANGES = [
    (-(2**30), 2**29, jnp.int32),  # 3 * 2^29 values
    (0, 3 * 2**30, jnp.uint32),
    (-HUGE, HUGE, jnp.int32),
    (-HUGE, HUGE - 1, jnp.int32),
    (0, 2**32, jnp.uint32),
    (-128, 128, jnp.int8),
    (0, 256, jnp.uint8),
    (-100, 28, jnp.int8),
    (-(2**15), 2**15, jnp.int16),
    (0, 65537, jnp.int32),
    (5, 10**6 + 5, jnp.int32),
]


@pytest.mark.parametrize(("low", "high", "dtype"), RANGES)
def test_a13_integers_are_equally_likely(low, high, dtype):
    x = np.asarray(R.randint(low, high, N, key=1, dtype=dtype)).astype(float)
    assert x.min() >= low and x.max() < high
    assert distance(x.astype(np.int64), stats.randint(low, high).cdf) < 1.9
    parts = np.bincount(((x - low) * 12 // (high - low)).astype(int), minlength=12)
    assert high - low < 1000 or stats.chisquare(parts).pvalue > 1e-3
    for part in (16, 17):  # and the last digits
        if high - low > 60_000:
            assert stats.chisquare(np.bincount(((x - low) % part).astype(int), minlength=part)).pvalue > 1e-3


def test_a13_integers_of_64_bits(double):
    for low, high, dtype in [(-(2**63), 2**63, jnp.int64), (0, 3 * 2**61, jnp.int64), (0, 3 * 2**62, jnp.uint64)]:
        x = np.asarray(R.randint(low, high, N, key=1, dtype=dtype))
        part = np.array([(int(v) - low) * 12 // (high - low) for v in x])
        assert stats.chisquare(np.bincount(part, minlength=12)).pvalue > 1e-3
        assert stats.chisquare(np.bincount((x % 17).astype(int), minlength=17)).pvalue > 1e-3


def test_a13_ends_of_integers_that_are_traced():
    @jax.jit
    def draw(low, high):
        return R.randint(low, high, N, key=1), R.random_integers(low, high, N, key=1)

    for low, high in [(-(2**30), 2**29), (-HUGE, HUGE - 1), (3, 9)]:
        assert (draw(low, high)[0] == R.randint(low, high, N, key=1)).all()
        assert (draw(low, high)[1] == R.random_integers(low, high, N, key=1)).all()
    assert (R.random_integers(-HUGE, HUGE - 1, N, key=1) == R.randint(-HUGE, HUGE, N, key=1)).all()


def test_a13_counts_are_integers_far_out():
    """Every number occurs, not only those that float32 holds, and certain results are exact."""
    for x in (
        R.poisson(1e9, size=N, key=0),
        R.binomial(10**9, 0.5, size=N, key=0),
        R.hypergeometric(10**9, 10**9, 10**9, size=N, key=0),
    ):
        assert stats.chisquare(np.bincount(np.asarray(x) % 16, minlength=16)).pvalue > 1e-3
    assert R.binomial(2**30 + 1, 1.0, key=0) == R.hypergeometric(2**30 + 1, 0, 2**30 + 1, key=0) == 2**30 + 1
    assert R.binomial(HUGE - 1, [0.0, 1.0], key=0).tolist() == [0, HUGE - 1]


def test_a13_multinomial_far_out():
    p = np.array([0.3, 0.0, 0.2, 0.5, 1e-9], np.float32)
    x = np.asarray(R.multinomial(10**9, p, size=N, key=0), float)
    assert (x.sum(1) == 10**9).all() and (x[:, 1] == 0).all()
    for k in (0, 2, 3, 4):
        assert distance(x[:, k].astype(int), stats.binom(10**9, float(p[k]) / float(p.sum())).cdf) < 1.9


def test_a13_dirichlet_far_out():
    for alpha in ([1e-3, 1e-3, 2e-3], [1e10, 3e10], [1e6, 2.0, 1e-2], [1e-8, 1e-8]):
        x = np.asarray(R.dirichlet(alpha, size=N, key=0))
        assert np.allclose(x.sum(1), 1, atol=1e-5)
        assert distance(x[:, 1], stats.beta(alpha[1], sum(alpha) - alpha[1]).cdf) < 1.9


def test_a13_each_element_far_out_or_not():
    """Elements with ordinary parameters have their numbers whatever their neighbours' are."""
    lam, df = np.array([3.0, 1e8, 3.0]), np.array([3.0, 1e-2, 1e6])
    assert (R.poisson(lam, key=0)[::2] == R.poisson([3.0, 3.0, 3.0], key=0)[::2]).all()
    for name in ("t", "chisquare", "gamma"):
        same = getattr(R, name)(df, key=0)[0], getattr(R, name)([3.0, 3.0, 3.0], key=0)[0]
        assert np.allclose(*same, rtol=1e-5)
    x = R.truncated_normal([6.0, -1.0, -inf], [7.0, 1.0, -9.0], size=(N, 3), key=0)
    for column, ends in zip(np.asarray(x).T, [(6, 7), (-1, 1), (-inf, -9)], strict=True):
        assert distance(column, stats.truncnorm(*ends).cdf) < 1.9


@pytest.mark.parametrize(
    ("name", "args"),
    [("truncated_normal", (6.0, 7.0)), ("poisson", (1e8,)), ("t", (0.1,)), ("beta", (1e6, 1e6)), ("wald", (1e4, 1.0))],
)
def test_a13_numbers_under_jit_and_vmap_are_those_outside(name, args):
    def draw(key, *args):
        return getattr(R, name)(*args, size=5, key=key)

    keys = jr.split(jr.key(0), 2)
    outside = np.stack([draw(key, *args) for key in keys])
    assert np.allclose(jax.jit(draw)(keys[0], *args), outside[0], rtol=1e-4)
    assert np.allclose(jax.vmap(lambda key: draw(key, *args))(keys), outside, rtol=1e-4)


def test_a13_truncated_normal_in_double_precision(double):
    for ends in [(6, 7), (5, 50), (-inf, -9), (4.9, inf), (40, inf), (-1, 2)]:
        x = R.truncated_normal(*map(float, ends), size=N, key=0)
        assert x.dtype == jnp.float64 and distance(x, stats.truncnorm(*ends).cdf) < 1.9
    assert distance(R.poisson(1e12, size=N, key=0), stats.poisson(1e12).cdf) < 1.9
    assert distance(R.binomial(10**14, 0.3, size=N, key=0), stats.norm(3e13, (0.21e14) ** 0.5).cdf) < 1.9


@pytest.mark.parametrize("ends", [(8.0, 9.0), (-1.0, 2.0), (-inf, -8.0), (0.5, inf)])
def test_a13_derivative_of_truncated_normal(ends, double):
    """Reparametrised: the derivative of a sample is that of the inverse distribution function."""

    def draw(p):
        return R.truncated_normal(*ends, size=4, loc=p[0], scale=p[1], key=5)

    p, h = (0.1, 1.2), 1e-6
    forward, reverse = jax.jacfwd(draw)(p), jax.jacrev(draw)(p)
    steps = [[(0.1 + s * h, 1.2) for s in (1, -1)], [(0.1, 1.2 + s * h) for s in (1, -1)]]
    for one, other, (above, below) in zip(forward, reverse, steps, strict=True):
        finite = (draw(above) - draw(below)) / (2 * h)
        assert np.allclose(one, finite, atol=1e-6) and np.allclose(other, finite, atol=1e-6)


def test_a13_no_infinity_from_a_uniform_zero():
    """Of 2^23 uniform numbers one is 0: here the key whose uniform number is 0 is drawn."""
    keys = jr.split(jr.key(0), 2**16)
    found = jax.vmap(lambda key: R.uniform(size=256, key=key).min())(keys)
    key = keys[np.argmin(found)]
    assert found.min() == 0
    for name in ("rayleigh", "geometric", "exponential", "laplace", "gumbel", "logistic", "standard_cauchy"):
        args = {"geometric": (0.5,), "rayleigh": (2.0,)}.get(name, ())
        assert np.isfinite(getattr(R, name)(*args, size=256, key=key)).all()
    assert np.abs(R.truncated_normal(-inf, inf, size=256, key=key)).max() < 10
    assert R.uniform(1e8, 1e8 + 16, size=N, key=0).max() < 1e8 + 16


def test_a13_rare_events():
    assert R.bernoulli(2.0**-28, size=2**22, key=0).sum() <= 1  # of a mean of 1/64; numbers of 23 bits give 1/2
    assert not R.bernoulli([0.0, 1e-30], size=(N, 2), key=0).any()
    assert abs(int(R.bernoulli(1e-4, size=2**20, key=0).sum()) - 105) < 45


def test_a13_sixteen_bits():
    for dtype in (jnp.float16, jnp.bfloat16):
        assert abs(float(R.normal(size=N, key=0, dtype=dtype).astype(jnp.float32).std()) - 1) < 0.02
        x = R.truncated_normal(6.0, 7.0, size=N, key=0, dtype=dtype).astype(jnp.float32)
        assert abs(float(x.mean()) - stats.truncnorm(6, 7).mean()) < 0.01


def test_a13_covariance_that_is_singular():
    cov = np.array([[1.0, 1.0], [1.0, 1.0]])
    for method in ("eigh", "svd"):
        x = np.asarray(R.multivariate_normal([0.0, 0.0], cov, N, method, key=0))
        assert np.allclose(np.cov(x.T), cov, atol=0.05)


# --- A13: what is refused -------------------------------------------------------------------------------------

COV = np.array([[1.0, 2.0], [2.0, 1.0]])
REFUSED = {
    "fewer weights than draws": (lambda: R.choice(3, 2, replace=False, p=[1, 0, 0]), "choice.*2 elements.*p has 1"),
    "weights that are all 0": (lambda: R.choice(3, p=[0.0, 0.0, 0.0]), r"choice.*0 < sum\(p\)"),
    "a negative weight": (lambda: R.choice(3, p=[1.0, -1.0, 1.0]), "choice.*0 <= p < inf.*p=-1.0 at index 1"),
    "a weight that is NaN": (lambda: R.choice(3, p=[1.0, nan, 1.0]), "choice.*p=nan at index 1"),
    "an infinite weight": (lambda: R.choice(3, p=[1.0, inf, 1.0]), "choice.*p=inf"),
    "too many draws": (lambda: R.choice(3, 4, replace=False), "choice.*4 of the 3"),
    "nothing to choose from": (lambda: R.choice(0, size=3), "choice.*3 of the 0"),
    "weights of another shape": (lambda: R.choice(3, p=[0.5, 0.5]), r"choice.*p must have the shape \(3,\)"),
    "half an element": (lambda: R.choice(2.5), "choice.*a must be"),
    "half a permutation": (lambda: R.permutation(2.5), "permutation.*x must be"),
    "a negative permutation": (lambda: R.permutation(-1), "permutation.*x must be"),
    "an axis that is not there": (lambda: R.shuffle(jnp.ones(3), 1), "shuffle.*axis"),
    "half a trial": (lambda: R.binomial(2.5, 0.5), r"binomial.*n == floor\(n\), got n=2.5"),
    "half a trial of many": (lambda: R.multinomial(2.5, [0.5, 0.5]), r"multinomial.*n == floor\(n\)"),
    "half a ball": (lambda: R.hypergeometric(7.5, 5, 4), r"hypergeometric.*ngood == floor\(ngood\)"),
    "an indefinite covariance": (lambda: R.multivariate_normal([0.0, 0.0], COV), "cov.*negative eigenvalue.*-1"),
    "an indefinite covariance, svd": (
        lambda: R.multivariate_normal([0.0, 0.0], COV, method="svd"),
        "cov.*negative eigenvalue",
    ),
    "a singular covariance": (lambda: R.multivariate_normal([0.0, 0.0], np.ones((2, 2))), "singular.*eigh"),
    "an asymmetric covariance": (lambda: R.multivariate_normal([0.0, 0.0], [[2.0, 1.0], [0.0, 2.0]]), "symmetric"),
    "a covariance with NaN": (lambda: R.multivariate_normal([0.0, 0.0], [[1.0, nan], [nan, 1.0]]), "finite"),
    "a covariance of another shape": (lambda: R.multivariate_normal([0.0, 0.0], np.eye(3)), r"cov.*\(3, 3\)"),
    "an unknown method": (lambda: R.multivariate_normal([0.0], [[1.0]], method="qr"), "method must be"),
    "no logits": (lambda: R.categorical(jnp.zeros(0)), "categorical.*nothing to draw from"),
    "logits that are NaN": (lambda: R.categorical([0.0, nan]), "categorical.*logits < inf"),
    "logits of probability 0": (lambda: R.categorical([-inf, -inf]), r"categorical.*-inf < max\(logits\)"),
    "logits without this axis": (lambda: R.categorical(jnp.zeros(3), 1), "categorical.*axis"),
    "a number of trials that is no int32": (lambda: R.binomial(10**10, 0.5), "binomial.*int32"),
    "a number of events that is no int32": (lambda: R.poisson(1e12), "poisson.*lam=.*int32"),
    "numbers that are no int8": (lambda: R.poisson(100.0, dtype=jnp.int8), "poisson.*int8 ends at 127"),
    "a success that never comes": (lambda: R.geometric(1e-12), "geometric.*int32"),
    "a range that is no int8": (lambda: R.randint(0, 300, dtype=jnp.int8), "randint.*high=300.*int8"),
    "a range below uint8": (lambda: R.randint(-1, 3, dtype=jnp.uint8), "randint.*low=-1.*uint8"),
    "a range below uint32, as an array": (lambda: R.randint(jnp.int32(-1), 3, dtype=jnp.uint32), "low=-1.*uint32"),
    "an infinite range": (lambda: R.uniform(0.0, inf), "uniform.*high < inf"),
    "an infinite scale": (lambda: R.normal(0.0, inf), "normal.*scale < inf.*scale=inf"),
    "a location that is NaN": (lambda: R.gumbel(nan, 1.0), "gumbel.*loc < inf.*loc=nan"),
    "an infinite shape": (lambda: R.gamma(inf), "gamma.*shape < inf"),
    "a parameter that float32 rounds to its end": (lambda: R.zipf(1 + 1e-12), "zipf.*1 < a in float32"),
    "an interval at infinity": (lambda: R.truncated_normal(inf, inf), "truncated_normal.*lower < upper"),
    "a vector that is none": (lambda: R.dirichlet(1.0), "dirichlet.*alpha must have 1 axes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a13_refused_by_name(name):
    call, pattern = REFUSED[name]
    before = R.get_key_data()
    with pytest.raises(StateValueError, match=pattern):
        call()
    assert (R.get_key_data() == before).all()


def test_a13_choice_leaves_out_what_has_no_weight():
    p = np.array([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    x = jax.vmap(lambda key: R.choice(6, 3, replace=False, p=p, key=key))(jr.split(jr.key(0), 500))
    assert (np.sort(x) == [1, 3, 4]).all()
    assert set(np.unique(R.choice(6, N, p=p, key=0))) == {1, 3, 4}
    assert R.choice(6, 0, p=np.zeros(6), key=0).shape == (0,)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("poisson", (inf,)),
        ("poisson", (nan,)),
        ("poisson", (1e12,)),
        ("binomial", (2.5, 0.5)),
        ("binomial", (5, 1.5)),
        ("multinomial", (-1, jnp.array([0.5, 0.5]))),
        ("geometric", (1e-12,)),
    ],
)
def test_a13_traced_counts_outside_their_range_are_minus_one(name, args):
    assert (jax.jit(lambda *args: getattr(R, name)(*args, size=2, key=0))(*args) == -1).all()


# --- B6: a draw that fails --------------------------------------------------------------------------------------

FAILING = {
    "choice": lambda rng, **key: rng.choice(0, size=3, **key),
    "multivariate_normal": lambda rng, **key: rng.multivariate_normal(jnp.zeros((3, 2)), jnp.eye(3), **key),
    "categorical": lambda rng, **key: rng.categorical(jnp.zeros(0), **key),
    "permutation": lambda rng, **key: rng.permutation(jnp.zeros((2, 3)), axis=4, **key),
    "shuffle": lambda rng, **key: rng.shuffle(jnp.zeros(3), axis="a", **key),
    "size": lambda rng, **key: rng.normal(size=(2, -1), **key),
    "dtype": lambda rng, **key: rng.normal(dtype=int, **key),
    "shapes": lambda rng, **key: rng.gamma(jnp.ones(2), jnp.ones(3), **key),
    "orthogonal": lambda rng, **key: rng.orthogonal(-1, **key),
    "key": lambda rng, **key: rng.normal(key="a"),
    "choice of a string": lambda rng, **key: rng.choice("abc", **key),
    "split_key": lambda rng, **key: rng.split_key(0, backup=True),
}


@pytest.mark.parametrize("name", FAILING)
@pytest.mark.parametrize("key", [{}, {"key": 3}], ids=["", "key"])
def test_b6_a_draw_that_raises_leaves_the_generator(name, key):
    rng = R.RandomState(1)
    rng.normal()
    before = rng.value
    with pytest.raises(Exception):  # noqa: B017 - JAX's own errors, too
        FAILING[name](rng, **key)
    assert rng.value is before
    with pytest.raises(BrainStateError, match="no backup"):
        rng.restore_key()


def failing(monkeypatch, error):
    """Make uniform numbers of size 7 fail after their key was drawn."""
    sampler = R.RandomState.random.__closure__[0].cell_contents

    def draw(key, shape, dtype):
        if shape == (7,):
            raise error
        return jr.uniform(key, shape, dtype)

    monkeypatch.setitem(sampler.__dict__, "draw", draw)


@pytest.mark.parametrize("error", [ValueError("late"), KeyboardInterrupt()])
def test_b6_a_draw_that_fails_late(monkeypatch, error):
    failing(monkeypatch, error)
    rng, twin = R.RandomState(1), R.RandomState(1)
    before = rng.value
    with pytest.raises(type(error)):
        rng.random(7)
    assert rng.value is before and rng.random() == twin.random()


def test_b6_caught_inside_a_transform(monkeypatch):
    failing(monkeypatch, ValueError("late"))
    rng, twin = R.RandomState(1), R.RandomState(1)

    def f():
        try:
            rng.random(7)
        except ValueError:
            return rng.random()

    expected = twin.random()
    assert transform.jit(f)() == expected and (rng.value == twin.value).all()
    with pytest.raises(ValueError, match="late"):
        transform.jit(lambda: rng.random(7))()
    assert (rng.value == twin.value).all()


def test_b6_a_failed_draw_takes_back_no_key_of_another_thread(monkeypatch):
    failing(monkeypatch, ValueError("late"))
    rng, seen = R.RandomState(0), []

    def work(fails):
        for _ in range(60):
            if fails:
                with pytest.raises(ValueError, match="late"):
                    rng.random(7)
            else:
                seen.append(float(rng.random()))

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == len(set(seen)) == 180
