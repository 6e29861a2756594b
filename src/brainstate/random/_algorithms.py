"""Samplers of real numbers that ``jax.random`` does not have, or has only for moderate parameters.

Each is a function of a key, parameters of one floating dtype, a shape and a dtype, as in ``jax.random``. It is
compiled and works under every JAX transform, but numbers accepted in a loop have no reverse derivative. A parameter
outside its domain ends every loop at once, most with NaN. For moderate parameters the numbers are those of
``jax.random``, where it has the law.

References
----------
Best and Fisher, *Efficient simulation of the von Mises distribution*, Applied Statistics 28, 1979.
Johnson, Kotz and Balakrishnan, *Continuous Univariate Distributions 2*, Wiley 1995 (chapters 29, 30).
Michael, Schucany and Haas, *Generating random variates using transformations with multiple roots*, The American
Statistician 30, 1976 (inverse Gaussian).
"""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from ._arguments import concrete
from ._counts import poisson, rejection, sampler

__all__ = [
    "bernoulli",
    "beta",
    "chisquare",
    "dirichlet",
    "f",
    "gamma",
    "multivariate_normal",
    "noncentral_chisquare",
    "noncentral_f",
    "power",
    "rayleigh",
    "t",
    "triangular",
    "truncated_normal",
    "uniform",
    "vonmises",
    "wald",
]

_LARGE = 1e4  # from here on, the logarithm of a gamma variate has too few digits


@partial(jax.jit, static_argnames=("near", "other", "shape", "dtype"))
def _draw_either(far, near, other, key, parameters, shape, dtype):
    def both():
        x = near(key, *parameters, shape, dtype)
        return jnp.where(jnp.broadcast_to(far, x.shape), other(key, *parameters, shape, dtype), x)

    return jax.lax.cond(far.any(), both, lambda: near(key, *parameters, shape, dtype))


def _draw_with_fallback(far, near, other, key, parameters, shape, dtype):
    """Draw by ``near``, and by ``other`` where ``far``, which is only computed if there is such an element.

    Both are functions of a module, so a second call compiles nothing. Known moderate parameters leave no trace of
    this: the call is that of ``jax.random``.
    """
    if concrete(far) and not np.any(far):
        return near(key, *parameters, shape, dtype)
    if concrete(far) and np.all(far):
        return other(key, *parameters, shape, dtype)
    return _draw_either(jnp.asarray(far), near, other, key, parameters, shape, dtype)


# ------------------------------------------------------------------------------------------- bounded intervals


def _uniform(key, low, high, shape, dtype):
    return jr.uniform(key, shape, dtype, low, high)


@sampler
def _halved_uniform(key, low, high, shape, dtype):
    return 2 * jr.uniform(key, shape, dtype, low / 2, high / 2)


@jax.jit
def _clip_below(x, low, high):
    """Bring numbers that were rounded up to ``high`` back under it."""
    return jnp.where(x < high, x, jnp.maximum(low, jnp.nextafter(high, jnp.full_like(high, -np.inf))))


def uniform(key, low, high, shape, dtype):
    """``jax.random.uniform`` without its upper end; ends whose distance overflows are halved, the numbers doubled."""
    far = high / 2 - low / 2 > jnp.finfo(dtype).max / 2
    return _clip_below(_draw_with_fallback(far, _uniform, _halved_uniform, key, (low, high), shape, dtype), low, high)


@sampler
def triangular(key, left, mode, right, shape, dtype):
    """``jax.random.triangular`` on [0, 1], stretched in halves: products of distances, and distances, overflow."""
    left, mode, right = left / 2, mode / 2, right / 2
    width = right - left
    zero, one = np.zeros((), dtype), np.ones((), dtype)
    x = left + width * jr.triangular(key, zero, (mode - left) / width, one, shape, dtype)
    return 2 * jnp.clip(x, left, right)


@sampler
def truncated_normal(key, lower, upper, loc, scale, shape, dtype):
    """Inversion: ``jax.random.truncated_normal`` in the middle, `_distance_beyond` if all of the interval is far out.

    In the middle an end beyond which erf is 1 counts as that place. An end more than 50 standard deviations from
    both the mean and the other end does not matter, so infinite ends become finite.
    """
    edge, end = (5, 8) if dtype == jnp.float64 else (3, 5.2)
    low = jnp.maximum(lower, jnp.minimum(loc, upper) - 50 * scale)
    high = jnp.minimum(upper, jnp.maximum(loc, lower) + 50 * scale)
    a, b = (low - loc) / scale, (high - loc) / scale
    above, far = a >= edge, (a >= edge) | (b <= -edge)
    lowest, highest = (jnp.where(far, side, jnp.clip(x, -end, end)) for side, x in ((-1, a), (1, b)))
    near = jr.truncated_normal(key, lowest, highest, shape, dtype) * scale + loc
    start = jnp.where(far, jnp.where(above, a, -b), edge)
    distance = scale * _distance_beyond(jr.uniform(key, shape, dtype), start, (high - low) / scale)
    x = jnp.where(far, jnp.where(above, low + distance, high - distance), near)
    return jnp.clip(x, lower, upper)


def _distance_beyond(u, start, width):
    """Return y in [0, width] at which the normal tail beyond ``start`` has lost the part ``u`` of its mass.

    The tail is S(x) = phi(x) / r(x) with the continued fraction r(x) = x + 1/(x + 2/(x + 3/...)), the hazard. So
    log S(start) / S(start + y) = y (start + y/2) + log1p(d/r), where d = r(start + y) - r(start) has a recursion
    of its own, in which nothing cancels. It is convex with slope r + d: Newton's method converges from below T/r.
    """

    def fall(y):
        r, d = start + y * 0, y
        for k in range(40, 0, -1):
            r, d = start + k / r, y - k * d / (r * (r + d))
        return y * (start + y / 2) + jnp.log1p(d / r), r, d

    wanted = -jnp.log1p(u * jnp.expm1(-fall(width)[0]))
    hazard = fall(width * 0)[1]
    y = 2 * wanted / (hazard + jnp.sqrt(hazard**2 + 2 * wanted))
    for _ in range(3):
        value, r, d = fall(jax.lax.stop_gradient(y))
        y = jax.lax.stop_gradient(y) - (value - wanted) / (r + d)
    return jnp.clip(y, 0, width)


@sampler
def rayleigh(key, scale, shape, dtype):
    """``jax.random.rayleigh``, of which one number in 2^23 (2^52) is infinite, bounded by the largest other one."""
    largest = float(2 * np.log(2) * (jnp.finfo(dtype).nmant + 1)) ** 0.5
    return jnp.minimum(jr.rayleigh(key, np.ones((), dtype), shape, dtype), largest) * scale


@sampler
def power(key, a, shape, dtype):
    """U**(1/a): the inverse of the distribution function x**a, with -log(U) drawn as an exponential."""
    return jnp.exp(-jr.exponential(key, shape, dtype) / a)


def _rare(key, p, shape, dtype):
    return jr.bernoulli(key, p, shape, mode="high")


def _common(key, p, shape, dtype):
    return jr.bernoulli(key, p, shape)


def bernoulli(key, p, shape):
    """``jax.random.bernoulli``, and for p < 10^-3 with twice the digits, which the comparison with p asks for."""
    return _draw_with_fallback((p > 0) & (p < 1e-3), _common, _rare, key, (p,), shape, None)


# ------------------------------------------------------------------------------------- functions of gamma variates


@sampler
def _excess(key, a, shape, dtype):
    """Return gamma variates less their mean ``a``, divided by it, as numbers that do not lose digits for large ``a``.

    Marsaglia and Tsang accept d (1 + c x)^3, d = a - 1/3, c = 1 / (3 sqrt(d)), of normal x, and above a = 10^6 refuse
    fewer than one in 10^7: there everything is accepted, and the power multiplied out.
    """
    a = jnp.broadcast_to(a, shape)
    large = a > 1e6
    x = jr.normal(key, shape, dtype)
    d = jnp.where(large, a, 1) - 1 / 3
    c = x / (3 * jnp.sqrt(d))
    wide = (x * jnp.sqrt(d) * (1 + c + c**2 / 3) - 1 / 3) / a
    return jnp.where(large, wide, jr.gamma(key, jnp.where(large, 1, a), shape, dtype) / a - 1)


def _log_unit_gamma(key, a, shape, dtype):
    """Return logarithms of gamma variates divided by their mean ``a``, exact for small and for large ``a``."""
    small = a < 1
    low = jr.loggamma(key, jnp.where(small, a, 0.5), shape, dtype) - jnp.log(a)
    return jnp.where(small, low, jnp.log1p(_excess(key, jnp.where(small, 1, a), shape, dtype)))


@sampler
def _large_gamma(key, a, shape, dtype):
    return a + a * _excess(key, a, shape, dtype)


def gamma(key, a, shape, dtype):
    """``jax.random.gamma``, and from 10^6 on the mean plus a deviation."""
    return _draw_with_fallback(a > 1e6, jr.gamma, _large_gamma, key, (a,), shape, dtype)


@sampler
def _large_chisquare(key, df, shape, dtype):
    return df + df * _excess(key, df / 2, shape, dtype)


def chisquare(key, df, shape, dtype):
    """``jax.random.chisquare``, and from 10^4 degrees of freedom on the mean plus a deviation."""
    return _draw_with_fallback(df > _LARGE, jr.chisquare, _large_chisquare, key, (df,), shape, dtype)


@sampler
def _heavy_t(key, df, shape, dtype):
    first, second = jr.split(key)
    z = jr.normal(first, shape, dtype)
    return jnp.sign(z) * jnp.exp(jnp.log(jnp.abs(z)) - _log_unit_gamma(second, df / 2, shape, dtype) / 2)


def t(key, df, shape, dtype):
    """``jax.random.t``, and below one degree of freedom with the logarithm of a gamma variate, which is never 0."""
    return _draw_with_fallback(df < 1, jr.t, _heavy_t, key, (df,), shape, dtype)


@sampler
def _log_f(key, dfnum, dfden, shape, dtype):
    second, first = jr.split(key)
    upper = _log_unit_gamma(first, dfnum / 2, shape, dtype)
    return jnp.exp(upper - _log_unit_gamma(second, dfden / 2, shape, dtype))


def f(key, dfnum, dfden, shape, dtype):
    """``jax.random.f``, and with few or many degrees of freedom a ratio formed of logarithms."""
    far = (dfnum < 1) | (dfden < 1) | (dfnum > _LARGE) | (dfden > _LARGE)
    return _draw_with_fallback(far, jr.f, _log_f, key, (dfnum, dfden), shape, dtype)


@sampler
def _large_beta(key, a, b, shape, dtype):
    first, second = jr.split(key)
    p, q = 1 / (1 + b / a), 1 / (1 + a / b)
    above, below = _excess(first, a, shape, dtype), _excess(second, b, shape, dtype)
    more = p * q * (above - below) / (1 + p * above + q * below)
    return jnp.clip(jnp.where(p > q, 1 - (q - more), p + more), 0, 1)


def beta(key, a, b, shape, dtype):
    """``jax.random.beta``, and with a large parameter the mean p = 1 - q plus a deviation."""
    return _draw_with_fallback((a > _LARGE) | (b > _LARGE), jr.beta, _large_beta, key, (a, b), shape, dtype)


@sampler
def _large_dirichlet(key, alpha, shape, dtype):
    means = jnp.broadcast_to(alpha / alpha.sum(-1, keepdims=True), (*shape, alpha.shape[-1]))
    above = _excess(key, alpha, means.shape, dtype)
    mean = (means * above).sum(-1, keepdims=True)
    return jnp.clip(means + means * (above - mean) / (1 + mean), 0, 1)


def dirichlet(key, alpha, shape, dtype):
    """``jax.random.dirichlet``, and with a large concentration the means plus deviations, as in `beta`."""
    far = (alpha > _LARGE).any(-1, keepdims=True)
    return _draw_with_fallback(far, jr.dirichlet, _large_dirichlet, key, (alpha,), shape, dtype)


@sampler
def noncentral_chisquare(key, df, nonc, shape, dtype):
    """Chi-square with ``df + 2 N`` degrees of freedom, N a Poisson number of mean ``nonc / 2``."""
    first, second = jr.split(key)
    extra = poisson(first, nonc / 2, shape, dtype)
    valid = (df > 0) & (nonc >= 0) & jnp.isfinite(nonc)
    return jnp.where(valid, 2 * gamma(second, df / 2 + extra, shape, dtype), jnp.nan)


@sampler
def noncentral_f(key, dfnum, dfden, nonc, shape, dtype):
    """(noncentral chi-square / dfnum) / (chi-square / dfden), by logarithms."""
    first, second, third = jr.split(key, 3)
    extra = poisson(first, nonc / 2, shape, dtype)
    upper = _log_unit_gamma(second, dfnum / 2 + extra, shape, dtype) + jnp.log1p(2 * extra / dfnum)
    valid = (dfnum > 0) & (dfden > 0) & (nonc >= 0) & jnp.isfinite(nonc)
    return jnp.where(valid, jnp.exp(upper - _log_unit_gamma(third, dfden / 2, shape, dtype)), jnp.nan)


# ----------------------------------------------------------------------------------------------- other laws


def _moderate_wald(key, mean, scale, shape, dtype):
    return jr.wald(key, mean / scale, shape, dtype) * scale


@sampler
def _root_wald(key, mean, scale, shape, dtype):
    """Return a root of the quadratic without a difference.

    With w = mean z^2 / (2 scale), they are mean times r and 1/r, r = 1 + w + sqrt(w (w + 2)).
    """
    first, second = jr.split(key)
    w = mean / scale * jr.normal(first, shape, dtype) ** 2 / 2
    r = 1 + w + jnp.sqrt(w) * jnp.sqrt(w + 2)
    return mean * jnp.where(jr.uniform(second, shape, dtype) * (1 + 1 / r) <= 1, 1 / r, r)


def wald(key, mean, scale, shape, dtype):
    """``jax.random.wald`` for 10^-4 < mean/scale < 4, where few digits cancel."""
    far = (mean < 1e-4 * scale) | (mean > 4 * scale)
    return _draw_with_fallback(far, _moderate_wald, _root_wald, key, (mean, scale), shape, dtype)


@sampler
def vonmises(key, mu, kappa, shape, dtype):
    """Best-Fisher: rejection from a wrapped Cauchy of concentration rho.

    With r = 1 + sqrt(1 + 4 kappa^2) and rho = (r - sqrt(2 r)) / (2 kappa), an angle t of the wrapped Cauchy
    is accepted with probability Y exp(1 - Y), Y = kappa ((1 + rho^2) / (2 rho) - cos t). All is rewritten
    such that nothing cancels for small or large kappa: with s = 2 kappa / sqrt(r), rho = s / (sqrt(r) + sqrt(2)),
    1 - rho = (sqrt(2) + 2 / (sqrt(r) + s)) / (sqrt(r) + sqrt(2)), Y = kappa (1 - rho)^2 / (2 rho) + 2 kappa sin(t/2)^2.
    """
    mu, kappa = jnp.broadcast_to(mu, shape), jnp.broadcast_to(kappa, shape)
    root = jnp.sqrt(1 + jnp.hypot(jnp.ones_like(kappa), 2 * kappa))
    wide, s = root + 2**0.5, 2 * kappa / root
    rest = (2**0.5 + 2 / (root + s)) / wide  # 1 - rho
    offset = rest**2 * root * wide / 4

    def propose(key):
        first, second = jr.split(key)
        tangent = rest / (2 - rest) * jnp.tan(jnp.pi * (jr.uniform(first, shape, dtype) - 0.5))
        y = offset + 2 * kappa * tangent**2 / (1 + tangent**2)
        return 2 * jnp.arctan(tangent), jr.uniform(second, shape, dtype) <= y * jnp.exp(1 - y)

    angle = rejection(key, propose, jnp.full(shape, jnp.nan, dtype), (kappa >= 0) & jnp.isfinite(kappa))
    angle = jnp.arctan2(jnp.sin(mu), jnp.cos(mu)) + angle  # mu brought near 0, to all its digits
    return angle - 2 * jnp.pi * jnp.round(angle / (2 * jnp.pi))


def multivariate_normal(key, mean, cov, shape, dtype, method):
    """``jax.random.multivariate_normal``; 'eigh' takes an eigenvalue that rounding made negative for 0."""
    if method != "eigh":
        return jr.multivariate_normal(key, mean, cov, shape, dtype, method)
    values, vectors = jnp.linalg.eigh(cov)
    z = jr.normal(key, (*shape, mean.shape[-1]), dtype)
    with jax.numpy_rank_promotion("allow"):
        factor = vectors * jnp.sqrt(jnp.maximum(values, 0))[..., None, :]
        return mean + jnp.einsum("...ij,...j->...i", factor, z)
