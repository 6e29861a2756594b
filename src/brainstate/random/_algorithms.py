"""Samplers for distributions that ``jax.random`` does not have.

Each is a function of a key, parameters of one floating dtype, a shape and a dtype, as in ``jax.random``. It
is compiled and works under every JAX transform, except that what a loop accepted has no reverse derivative.
Parameters outside their domain end every loop at once, with NaN, or -1 among the integers.

References
----------
Devroye, *Non-Uniform Random Variate Generation*, Springer 1986 (Zipf: X.6; inversion: III).
Best and Fisher, *Efficient simulation of the von Mises distribution*, Applied Statistics 28, 1979.
Kemp, *Efficient generation of logarithmically distributed pseudo-random variables*, Applied Statistics 30,
1981.
Johnson, Kotz and Balakrishnan, *Continuous Univariate Distributions 2*, Wiley 1995 (chapters 29, 30).
"""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

__all__ = [
    "hypergeometric",
    "logseries",
    "multinomial",
    "negative_binomial",
    "noncentral_chisquare",
    "noncentral_f",
    "power",
    "vonmises",
    "zipf",
]

_sampler = partial(jax.jit, static_argnames=("shape", "dtype"))


def _rejection(key, propose, initial, valid):
    """Call ``propose(key) -> (candidate, accepted)`` until every valid element has accepted a candidate."""

    def body(carry):
        key, value, done = carry
        key, sub = jr.split(key)
        candidate, accepted = propose(sub)
        return key, jnp.where(done, value, candidate), done | accepted

    return jax.lax.while_loop(lambda carry: ~carry[2].all(), body, (key, initial, ~valid))[1]


def _largest(integer, real):
    """Return the largest number of the floating type ``real`` that the type ``integer`` holds."""
    top = jnp.iinfo(integer).max
    bound = np.asarray(top, real)
    return bound if int(bound) <= top else np.nextafter(bound, np.zeros_like(bound))


@_sampler
def power(key, a, shape, dtype):
    """U**(1/a): the inverse of the distribution function x**a, with -log(U) drawn as an exponential."""
    return jnp.exp(-jr.exponential(key, shape, dtype) / a)


@_sampler
def noncentral_chisquare(key, df, nonc, shape, dtype):
    """Chi-square with ``df + 2 N`` degrees of freedom, N a Poisson number of mean ``nonc / 2``."""
    first, second = jr.split(key)
    extra = jr.poisson(first, jnp.broadcast_to(nonc / 2, shape)).astype(dtype)
    valid = (df > 0) & (nonc >= 0)
    return jnp.where(valid, 2 * jr.gamma(second, jnp.broadcast_to(df / 2, shape) + extra, shape, dtype), jnp.nan)


@_sampler
def noncentral_f(key, dfnum, dfden, nonc, shape, dtype):
    """(noncentral chi-square / dfnum) / (chi-square / dfden)."""
    first, second = jr.split(key)
    numerator = noncentral_chisquare(first, dfnum, nonc, shape, dtype) / dfnum
    return numerator / (jr.chisquare(second, jnp.broadcast_to(dfden, shape), shape, dtype) / dfden)


@_sampler
def vonmises(key, mu, kappa, shape, dtype):
    """Best-Fisher: rejection from a wrapped Cauchy of concentration rho.

    With r = 1 + sqrt(1 + 4 kappa^2) and rho = (r - sqrt(2 r)) / (2 kappa), an angle t of the wrapped Cauchy
    is accepted with probability Y exp(1 - Y), Y = kappa ((1 + rho^2) / (2 rho) - cos t). Both are rewritten
    such that nothing cancels for small or large kappa: r - 2 = 4 kappa^2 / (q + 1), q = sqrt(1 + 4 kappa^2),
    and Y = kappa (1 - rho)^2 / (2 rho) + 2 kappa sin(t / 2)^2.
    """
    mu, kappa = jnp.broadcast_to(mu, shape), jnp.broadcast_to(kappa, shape)
    q = jnp.sqrt(1 + 4 * kappa**2)
    root = jnp.sqrt(1 + q)
    half = 2 * root / ((q + 1) * (root + 2**0.5))  # rho / kappa
    rho = half * kappa
    offset = (1 - rho) ** 2 / (2 * half)

    def propose(key):
        first, second = jr.split(key)
        tangent = (1 - rho) / (1 + rho) * jnp.tan(jnp.pi * (jr.uniform(first, shape, dtype) - 0.5))
        y = offset + 2 * kappa * tangent**2 / (1 + tangent**2)
        return 2 * jnp.arctan(tangent), jr.uniform(second, shape, dtype) <= y * jnp.exp(1 - y)

    angle = mu + _rejection(key, propose, jnp.full(shape, jnp.nan, dtype), (kappa >= 0) & jnp.isfinite(kappa))
    return angle - 2 * jnp.pi * jnp.round(angle / (2 * jnp.pi))


@_sampler
def negative_binomial(key, n, p, shape, dtype):
    """A Poisson number whose mean is a gamma variate of shape ``n`` and scale ``(1 - p) / p``."""
    first, second = jr.split(key)
    mean = jr.gamma(first, jnp.broadcast_to(n, shape), shape, n.dtype) * ((1 - p) / p)
    valid = (n > 0) & (p > 0) & (p <= 1)
    return jr.poisson(second, jnp.where(valid, mean, -1), shape, dtype)


@_sampler
def logseries(key, p, shape, dtype):
    """Kemp's LK: geometric on 1, 2, ... with ratio 1 - (1 - p)**U."""
    first, second = jr.split(key)
    log_ratio = jnp.log1p(-jnp.exp(jnp.log1p(-p) * jr.uniform(first, shape, p.dtype)))
    value = 1 + jnp.floor(-jr.exponential(second, shape, p.dtype) / log_ratio)
    return jnp.where((p >= 0) & (p < 1), jnp.minimum(value, _largest(dtype, p.dtype)), -1).astype(dtype)


@_sampler
def zipf(key, a, shape, dtype):
    """Devroye's rejection from ``floor(U**(-1/(a-1)))``, on the numbers that ``dtype`` holds.

    With T = (1 + 1/X)^(a-1) and b = 2^(a-1), X is accepted if V X (T - 1) / (b - 1) <= T / b. Above a = 64
    the probability of anything but 1 is below 2^-63.
    """
    real = a.dtype
    bound = _largest(dtype, real)
    s = jnp.broadcast_to(jnp.minimum(a, 64) - 1, shape)
    least = jnp.exp(-s * np.log(bound).astype(real))  # the U of the largest X

    def propose(key):
        first, second = jr.split(key)
        u = least + (1 - least) * (1 - jr.uniform(first, shape, real))
        x = jnp.floor(jnp.exp(-jnp.log(u) / s))
        excess = jnp.expm1(s * jnp.log1p(1 / x))  # T - 1
        left = jr.uniform(second, shape, real) * x * excess * jnp.exp2(s)
        return x, (left <= (1 + excess) * jnp.expm1(s * np.log(2.0).astype(real))) & (x >= 1) & (x <= bound)

    return _rejection(key, propose, jnp.full(shape, -1, real), s > 0).astype(dtype)


@_sampler
def hypergeometric(key, ngood, nbad, nsample, shape, dtype):
    """Inversion from the mode: weights relative to that of the mode follow from ratios of neighbours.

    P(k+1) / P(k) = (g - k) (n - k) / ((k + 1) (b - n + k + 1)). One loop adds up the weights outwards, a
    second walks the same way until U times the total is used up: a few standard deviations of steps each.
    """
    g, b, n = (jnp.broadcast_to(x, shape) for x in (ngood, nbad, nsample))
    valid = (g >= 0) & (b >= 0) & (n >= 0) & (n <= g + b)
    mode = jnp.floor((n + 1) / (g + b + 2) * (g + 1))
    mode = jnp.clip(mode, jnp.maximum(0, n - b), jnp.minimum(n, g))
    start = valid.astype(g.dtype)

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
    rest = jr.uniform(key, shape, g.dtype) * total - start
    value = jax.lax.while_loop(
        lambda c: ((c[3] >= 0) & (c[1] + c[2] > tiny * total)).any(), walk, (zero, start, start, rest, mode)
    )[4]
    return jnp.where(valid, value, -1).astype(dtype)


@jax.jit
def multinomial(key, n, p):
    """``jax.random.multinomial`` on broadcast parameters, compiled."""
    return jr.multinomial(key, n, p, dtype=p.dtype)
