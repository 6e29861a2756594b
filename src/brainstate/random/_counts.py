"""Samplers of integers that ``jax.random`` does not have, or has only for moderate parameters.

Each is a function of a key, parameters, a shape and a dtype, as in ``jax.random``. It is compiled and works under
every JAX transform, but numbers accepted in a loop have no reverse derivative. Probabilities and means are of one
floating dtype; numbers of trials are integers, since float32 has no odd number above 2**24. A parameter outside its
domain ends every loop at once and gives -1.

Where the law is wide, ``jax.random`` subtracts logarithms of factorials of which float32 keeps too few digits, and
its candidates are floating numbers. There the *offset* from the mode is drawn, as in `_offset`, and added to the mode
as an integer. Elsewhere the numbers are those of ``jax.random``.

References
----------
Stadlober, *The ratio of uniforms approach for generating discrete random variates*, J. Comput. Appl. Math. 31, 1990.
Loader, *Fast and accurate computation of binomial probabilities*, 2000 (the sum for the deviance in `_log_rising`).
Lemire, *Fast random integer generation in an interval*, ACM TOMACS 29, 2019.
Devroye, *Non-Uniform Random Variate Generation*, Springer 1986 (Zipf: X.6; inversion: III).
Kemp, *Efficient generation of logarithmically distributed pseudo-random variables*, Applied Statistics 30, 1981.
"""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.scipy.special import gammaln

__all__ = [
    "binomial",
    "hypergeometric",
    "integers",
    "logseries",
    "multinomial",
    "negative_binomial",
    "poisson",
    "rejection",
    "sampler",
    "zipf",
]

sampler = partial(jax.jit, static_argnames=("shape", "dtype"))


def rejection(key, propose, initial, valid):
    """Call ``propose(key) -> (candidate, accepted)`` until every valid element has accepted a candidate."""

    def body(carry):
        key, value, done = carry
        key, sub = jr.split(key)
        candidate, accepted = propose(sub)
        return key, jnp.where(done, value, candidate), done | accepted

    return jax.lax.while_loop(lambda carry: ~carry[2].all(), body, (key, initial, ~valid))[1]


# ------------------------------------------------------------------------------------------------ wide laws


def _log_rising(c, j):
    """Return log((c + j)! / c!) - j log(c), of size j**2 / 2c: a difference that would cancel is never formed.

    By Stirling's formula it is the deviance (c + j) log(1 + j/c) - j, a sum of odd powers of v = j / (2 c + j), plus
    log(1 + j/c) / 2 and the difference of 1/12x - 1/360x^3. Below c = 256 logarithms of factorials are small enough.
    """
    v = j / (2 * c + j)
    odd = sum(v ** (2 * i) / (2 * i + 1) for i in range(1, 8))
    top = jnp.maximum(c + j, 1)
    tails = [1 / (12 * x) - 1 / (360 * x**3) for x in (top, c)]
    large = j * v + 2 * (c + j) * v * odd + jnp.log(top / c) / 2 + tails[0] - tails[1]
    return jnp.where(c < 256, gammaln(top + 1) - gammaln(c + 1) - j * jnp.log(c), large)


def _offset(key, signed, drift, centre, variance, wide):
    """Draw offsets j from the mode by the ratio of uniforms, where ``wide``; elsewhere 0.

    The weight of j relative to the mode is exp(drift j) prod c! / (c + s j)! over the pairs (s, c) in ``signed``;
    ``centre`` is the mean less the mode. Stadlober's table mountain of half the width
    sqrt(2 (variance + 1/2) / e) + 3/2 - sqrt(3/e) covers Poisson, binomial and hypergeometric laws.
    """
    real = variance.dtype
    width = 2 * jnp.sqrt((2 / np.e) * (variance + 0.5)) + np.asarray(3 - 2 * (3 / np.e) ** 0.5, real)

    def propose(key):
        first, second = jr.split(key)
        u = 1 - jr.uniform(first, wide.shape, real)
        j = jnp.floor(centre + 0.5 + width * (jr.uniform(second, wide.shape, real) - 0.5) / u)
        weight = drift * j - sum(_log_rising(c, s * j) for s, c in signed)
        inside = jnp.array([c + s * j >= 0 for s, c in signed]).all(0)
        return j, inside & (2 * jnp.log(u) <= weight)

    return rejection(key, propose, jnp.zeros(wide.shape, real), wide)


@sampler
def poisson(key, lam, shape, dtype):
    """Poisson numbers of any dtype; from a mean of 1,024 on the mode plus an offset."""
    lam = jnp.broadcast_to(lam, shape)
    valid = (lam >= 0) & jnp.isfinite(lam)
    wide = valid & (lam >= 1024)
    mean = jnp.where(wide, lam, 1024)
    mode = jnp.floor(mean)
    offset = _offset(key, [(1, mode)], jnp.log1p((mean - mode) / mode), mean - mode, mean, wide)
    integer = dtype if jnp.issubdtype(dtype, jnp.integer) else jnp.dtype(jnp.int32)
    few = jr.poisson(key, jnp.where(valid & ~wide, lam, 0), shape, integer)
    value = jnp.where(wide, mode.astype(dtype) + offset.astype(dtype), few.astype(dtype))
    return jnp.where(valid, value, -1)


@sampler
def binomial(key, n, p, shape, dtype):
    """Numbers of successes; from 65,536 trials with a mean above 10 on, the mode plus an offset.

    More likely successes than failures are drawn as failures.
    """
    n, p = (jnp.broadcast_to(x, shape) for x in (n, p))
    valid = (n >= 0) & (p >= 0) & (p <= 1)
    n, p = jnp.where(valid, n, 0), jnp.where(valid, p, 0)
    small = jnp.where(p > 0.5, 1 - p, p)
    trials = n.astype(p.dtype)
    wide = (n >= 65536) & (trials * small > 10)
    n_, p_, real = jnp.where(wide, n, 65536), jnp.where(wide, small, 0.5), p.dtype
    mean = n_.astype(real) * p_
    mode = jnp.floor(mean + p_)
    rest = (n_ - mode.astype(n.dtype)).astype(real)
    drift = jnp.log1p((mean - mode) / (mode * (1 - p_)))
    offset = _offset(key, [(1, mode), (-1, rest)], drift, mean - mode, mean * (1 - p_), wide)
    few = jr.binomial(key, jnp.where(wide, 0, trials), small, shape, real).astype(n.dtype)
    value = jnp.where(wide, mode.astype(n.dtype) + offset.astype(n.dtype), few)
    return jnp.where(valid, jnp.where(p > 0.5, n - value, value), -1).astype(dtype)


@partial(jax.jit, static_argnames="dtype")
def multinomial(key, n, p, dtype):
    """One binomial number after another: of the trials that are left, those of an outcome or those of all later ones.

    It is the less likely of the two that is drawn, since 1 - p has lost the digits of a small p.
    """
    valid, p = (n >= 0) & (p >= 0).all(-1), jnp.moveaxis(p, -1, 0)
    left = jax.lax.cumsum(p, 0, reverse=True)
    later = jnp.concatenate([left[1:], jnp.zeros_like(left[:1])])
    most = p > later
    ratios = jnp.minimum(p, later) / jnp.where(left == 0, 1, left)

    def body(n, given):
        key, ratio, most = given
        count = binomial(key, n, ratio, n.shape, n.dtype)
        count = jnp.where(most, n - count, count)
        return n - count, count

    counts = jax.lax.scan(body, n, (jr.split(key, len(p)), ratios, most))[1]
    return jnp.moveaxis(jnp.where(valid, counts, -1), 0, -1).astype(dtype)


@sampler
def hypergeometric(key, ngood, nbad, nsample, shape, dtype):
    """The number of good ones in a sample.

    With good and bad exchanged, and the sample and the rest of the urn, the good are no more than the bad, the
    sample no more than half, and the mean is no more than four variances. From a mean of 256 on, this is the mode
    plus an offset; else a few steps of inversion.
    """
    g, b, n = (jnp.broadcast_to(x, shape) for x in (ngood, nbad, nsample))
    valid = (g >= 0) & (b >= 0) & (n >= 0) & (n - b <= g)
    g, b, n = (jnp.where(valid, x, 0) for x in (g, b, n))
    large = n - b > g - n  # more than half, and nothing overflows
    fewer, less, more = jnp.where(large, g - (n - b), n), jnp.minimum(g, b), jnp.maximum(g, b)
    value = _few_good(key, less, more, fewer)
    value = jnp.where(g > b, fewer - value, value)
    return jnp.where(valid, jnp.where(large, g - value, value), -1).astype(dtype)


def _few_good(key, g, b, n):
    whole, real = g.dtype, jnp.dtype(f"float{8 * g.dtype.itemsize}")
    good, bad, drawn = (x.astype(real) for x in (g, b, n))
    total = jnp.maximum(good + bad, 1)
    mean = drawn * (good / total)
    mode = jnp.floor((drawn + 1) * ((good + 1) / (total + 2)))
    variance = mean * (bad / total) * ((total - drawn) / jnp.maximum(total - 1, 1))
    wide = mean >= 256
    first = jnp.where(wide, mode, 1)
    m = first.astype(whole)
    counts = [jnp.maximum(x, 1).astype(real) for x in (g - m, n - m, b - n + m)]
    drift = jnp.log1p((mean - first) * (total / counts[2]) / first)
    signed = [(1, first), (-1, counts[0]), (-1, counts[1]), (1, counts[2])]
    offset = _offset(key, signed, jnp.where(wide, drift, 0), mean - first, variance, wide)
    return jnp.where(wide, m + offset.astype(whole), _walk_from_mode(key, good, bad, drawn, mode, ~wide).astype(whole))


def _walk_from_mode(key, g, b, n, mode, narrow):
    """Inversion from the mode: weights relative to that of the mode follow from ratios of neighbours.

    P(k+1) / P(k) = (g - k) (n - k) / ((k + 1) (b - n + k + 1)). One loop adds up the weights outwards, a
    second walks the same way until U times the total is used up: a few standard deviations of steps each.
    """
    mode = jnp.minimum(mode, jnp.minimum(n, g))
    start = narrow.astype(g.dtype)

    def widen(i, up, down):
        k = mode + i
        up = up * ((g - k) * (n - k)) / ((k + 1) * (b - n + k + 1))
        k = mode - i
        return up, down * (k * (b - n + k)) / ((g - k + 1) * (n - k + 1))

    def add(carry):
        i, up, down, total = carry
        up, down = widen(i, up, down)
        return i + 1, up, down, total + up + down

    def walk(carry):
        i, up, down, rest, value = carry
        up, down = widen(i, up, down)
        above = (rest >= 0) & (rest < up)
        below = (rest >= up) & (rest < up + down)
        value = jnp.where(above, mode + i + 1, jnp.where(below, mode - i - 1, value))
        return i + 1, up, down, rest - up - down, value

    tiny = jnp.finfo(g.dtype).eps / 16
    zero = jnp.zeros((), g.dtype)
    total = jax.lax.while_loop(lambda c: (c[1] + c[2] > tiny * c[3]).any(), add, (zero, start, start, start))[3]
    rest = jr.uniform(key, mode.shape, g.dtype) * total - start
    return jax.lax.while_loop(
        lambda c: ((c[3] >= 0) & (c[1] + c[2] > tiny * total)).any(), walk, (zero, start, start, rest, mode)
    )[4]


# ------------------------------------------------------------------------------------------------ other laws


def _high_product(a, b):
    """Return the upper half of the product of two unsigned integers, from products of their halves."""
    half = np.asarray(a.dtype.itemsize * 4, a.dtype)
    low = np.asarray((1 << int(half)) - 1, a.dtype)
    a1, a0, b1, b0 = a >> half, a & low, b >> half, b & low
    middle = a1 * b0 + ((a0 * b0) >> half)
    return a1 * b1 + (middle >> half) + ((a0 * b1 + (middle & low)) >> half)


@sampler
def integers(key, low, last, shape, dtype):
    """Integers from ``low`` to ``last``, both included.

    Up to 2^16 values (2^32 in 64 bits) they are those of ``jax.random.randint``, which is biased beyond. There
    the integer part of ``count * R / 2^64`` is taken, R of 64 bits (128), so no probability is off by 2^-32.
    """
    low, last = (jnp.broadcast_to(x, shape) for x in (low, last))
    unsigned = jnp.dtype(f"uint{8 * low.dtype.itemsize}")
    span = jnp.where(last < low, 0, last.astype(unsigned) - low.astype(unsigned))
    near = span < 1 << (4 * low.dtype.itemsize)
    few = jr.randint(key, shape, 0, jnp.where(near, span + 1, 1).astype(low.dtype), low.dtype)
    upper, lower = (jr.bits(k, shape, unsigned) for k in jr.split(key))
    count = span + 1  # 0 stands for all numbers of the dtype
    product = upper * count
    carry = product + _high_product(lower, count) < product
    many = jnp.where(count == 0, upper, _high_product(upper, count) + carry.astype(unsigned))
    return (low + jnp.where(near, few, many.astype(low.dtype))).astype(dtype)


@sampler
def negative_binomial(key, n, p, shape, dtype):
    """A Poisson number whose mean is a gamma variate of shape ``n`` and scale ``(1 - p) / p``."""
    first, second = jr.split(key)
    mean = jr.gamma(first, jnp.broadcast_to(n, shape), shape, n.dtype) * ((1 - p) / p)
    valid = (n > 0) & (p > 0) & (p <= 1)
    return poisson(second, jnp.where(valid, mean, -1), shape, dtype)


def _largest(integer, real):
    """Return the largest number of the floating type ``real`` that the type ``integer`` holds."""
    top = jnp.iinfo(integer).max
    bound = np.asarray(top, real)
    return bound if int(bound) <= top else np.nextafter(bound, np.zeros_like(bound))


@sampler
def logseries(key, p, shape, dtype):
    """Kemp's LK: geometric on 1, 2, ... with ratio 1 - (1 - p)**U."""
    first, second = jr.split(key)
    log_ratio = jax.nn.log1mexp(-jnp.log1p(-p) * jr.uniform(first, shape, p.dtype))
    value = 1 + jnp.floor(-jr.exponential(second, shape, p.dtype) / log_ratio)
    return jnp.where((p >= 0) & (p < 1), jnp.minimum(value, _largest(dtype, p.dtype)), -1).astype(dtype)


@sampler
def zipf(key, a, shape, dtype):
    """Devroye's rejection from ``floor(U**(-1/(a-1)))``, on the numbers that ``dtype`` holds.

    With T = (1 + 1/X)^(a-1) and b = 2^(a-1), X is accepted if V X (T - 1) / (b - 1) <= T / b. Above a = 64
    the probability of anything but 1 is below 2^-63.
    """
    real = a.dtype
    bound = _largest(dtype, real)
    s = jnp.broadcast_to(jnp.minimum(a, 64) - 1, shape)
    least = jnp.expm1(-s * np.log(bound).astype(real))  # the U of the largest X, less 1

    def propose(key):
        first, second = jr.split(key)
        x = jnp.floor(jnp.exp(-jnp.log1p(least * jr.uniform(first, shape, real)) / s))
        excess = jnp.expm1(s * jnp.log1p(1 / x))  # T - 1
        left = jr.uniform(second, shape, real) * x * excess * jnp.exp2(s)
        return x, (left <= (1 + excess) * jnp.expm1(s * np.log(2.0).astype(real))) & (x >= 1) & (x <= bound)

    return rejection(key, propose, jnp.full(shape, -1, real), s > 0).astype(dtype)
