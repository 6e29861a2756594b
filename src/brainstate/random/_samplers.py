r"""The samplers as a table: a name, the parameters, a function of ``jax.random``, the distribution, and rules.

A call of a sampler is *bind* → *check* → *prepare* → *draw*: arguments are matched with the parameters, rules
about concrete values are checked, values are cast and broadcast, and only then a key is taken from the
generator and handed to the function. `Sampler` does all but
the key; ``RandomState`` and the functions of ``brainstate.random`` are made from the table and add it.

Rows come in three kinds. A *real* sampler returns floating numbers, a *count* sampler integers; both have
parameters that broadcast against each other, as in NumPy. For a *special* one a function says how arguments
become those of ``jax.random``.
"""

import ast
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from . import _algorithms as alg
from . import _counts as counts
from ._arguments import check_rule, default_dtype, to_array, to_size
from ._prepare import (
    as_bernoulli,
    as_choice,
    as_count,
    as_dirichlet,
    as_integers,
    as_integers_like,
    as_like,
    as_logits,
    as_multinomial,
    as_multivariate_normal,
    as_orthogonal,
    as_permutation,
    as_real,
    as_size,
    integer_of,
)

__all__ = ["SAMPLERS", "Sampler"]

_NO_ARRAYS = frozenset(
    ["size", "dtype", "dn", "replace", "method", "axis", "independent", "input"]  # left as they are
)


@dataclass(frozen=True, eq=False)
class Sampler:
    """A row of the table."""

    name: str
    signature: inspect.Signature
    draw: Callable[..., jax.Array]  # called draw(key, *prepare(name, **arguments))
    prepare: Callable[..., tuple]
    about: str
    formula: str
    example: str  # the arguments, an arrow, the shape that comes out
    rules: tuple[str, ...]

    def bind(self, args, kwargs) -> tuple[Any, tuple]:
        """Return the ``key`` argument of a call and the other arguments of ``draw``, all checked."""
        try:
            bound = self.signature.bind(None, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}{self.public_signature}: {error}.") from None
        bound.apply_defaults()
        values = bound.arguments
        del values["self"]
        key, checked = values.pop("key"), values.pop("check_valid", True)
        for name, value in values.items():
            if name not in _NO_ARRAYS:
                values[name] = to_array(self.name, name, value)
        if "size" in values:
            values["size"] = to_size(self.name, values["size"])
        if checked:
            for rule in self.rules:
                check_rule(self.name, rule, values)
        return key, self.prepare(self.name, **values)

    @property
    def public_signature(self) -> inspect.Signature:
        """The signature of the function, which has no ``self``."""
        return self.signature.replace(parameters=list(self.signature.parameters.values())[1:])

    @property
    def doc(self) -> str:
        """The docstring, in numpy's style."""
        lines = [f"Sample {self.about}.", "", ".. math:: " + self.formula, "", "Parameters", "----------"]
        for name, parameter in self.public_signature.parameters.items():
            rules = ", ".join(f"``{rule}``" for rule in self.rules if name in re.split(r"\W+", rule))
            kind, about = _PARAMETERS.get(name, ("number or array", "Broadcast against the others."))
            optional = ", optional" if parameter.default is not parameter.empty else ""
            lines += [f"{name} : {kind}{optional}", f"    {about}{rules and f' The rule: {rules}.'}"]
        lines += ["", "Returns", "-------", "jax.Array", "    The samples.", "", "Raises", "------", "StateValueError"]
        lines += ["    If a value breaks a rule and is not being traced. The generator is then as it was."]
        lines += ["", "Examples", "--------"]
        given, shape = self.example.split(" -> ")
        lines += [">>> import brainstate", f">>> brainstate.random.{self.name}({given}).shape", shape]
        return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- functions with jax.random's order of things


@jax.jit
def _affine(x, loc, scale):
    x = x if scale is None else x * scale
    return x if loc is None else x + loc


def _with_location(draw):
    """Give the standard ``draw(key, shape, dtype)`` a location and a scale."""

    def draw_with_location(key, loc, scale, shape, dtype):
        x = draw(key, shape, dtype)
        return x if loc is None and scale is None else _affine(x, loc, scale)

    return draw_with_location


def _with_scale(draw):
    """Give ``draw(key, *parameters, shape, dtype)`` a scale, the last parameter."""

    def draw_with_scale(key, *args):
        *parameters, scale, shape, dtype = args
        x = draw(key, *parameters, shape, dtype)
        return x if scale is None else x * scale

    return draw_with_scale


def _for_every_dtype(draw, bound):
    """Let a sampler of integers serve every ``dtype``: parameters whose numbers it does not hold give -1.

    Without ``bound`` the law itself depends on the numbers that the type holds.
    """

    @counts.sampler
    def draw_count(key, parameters, shape, dtype):
        integer, real = integer_of(dtype), default_dtype(float)
        if bound is None:
            return draw(key, *parameters, shape, integer).astype(dtype)
        fits = bound(jnp, *(p.astype(real) for p in parameters)) <= jnp.iinfo(integer).max
        return jnp.where(fits, draw(key, *parameters, shape, default_dtype(int)), -1).astype(dtype)

    return lambda key, *args: draw_count(key, args[:-2], *args[-2:])


def _via_float32(draw):
    """Compute floating numbers of 16 bits in float32, and round: with so few bits most methods fail."""

    def draw_via_float32(key, *args):
        *parameters, shape, dtype = args
        if dtype.itemsize != 2:
            return draw(key, *args)
        parameters = [p if p is None else p.astype(jnp.float32) for p in parameters]
        return draw(key, *parameters, shape, jnp.dtype(jnp.float32)).astype(dtype)

    return draw_via_float32


def _lognormal(key, mean, sigma, shape, dtype):
    if mean is None:
        return jr.lognormal(key, np.ones((), dtype) if sigma is None else sigma, shape, dtype)
    return jnp.exp(_affine(jr.normal(key, shape, dtype), mean, sigma))


def _weibull(key, a, shape, dtype):
    return jr.weibull_min(key, np.ones((), dtype), a, shape, dtype)


# ---------------------------------------------------------------------------------- the table: helpers of its rows

_PARAMETERS = {
    "size": (
        "int or tuple of int",
        "Shape of the result; by default the shape to which the parameters broadcast.",
    ),
    "key": ("int or key", "Draw with this seed or key and leave the generator alone."),
    "dtype": ("dtype", "Type of the result; by default JAX's present floating or integer type."),
    "check_valid": ("bool", "Whether to check the rules. Values that are being traced are never checked."),
    "loc": ("number or array", "Shift of the samples; none by default."),
    "scale": ("number or array", "Factor of the samples; none by default."),
    "low": ("number or array", "Lower end, included."),
    "high": ("number or array", "Upper end; without it, integers are drawn from the range up to `low`."),
    "dn": ("int", "The lengths of the axes of the result."),
    "n": ("int or array", "Number of trials, of successes, or of rows."),
    "pvals": ("array", "Probabilities of the outcomes, along the last axis."),
    "alpha": ("array", "Concentrations, along the last axis."),
    "logits": ("array", "Logarithms of the probabilities, up to a constant."),
    "axis": ("int", "The axis that is drawn from or along which is permuted."),
    "mean": ("number or array", "The mean; of a multivariate distribution a vector along the last axis."),
    "cov": ("array", "The covariance matrix, along the last two axes: symmetric, without negative eigenvalues."),
    "method": (
        "{'cholesky', 'eigh', 'svd'}",
        "How to factor `cov`; a singular one needs the second or third.",
    ),
    "a": (
        "number or array",
        "Shape parameter; for ``choice`` the population, an int meaning ``arange(a)``.",
    ),
    "replace": ("bool", "Whether an element may be drawn more than once; else there must be weights above 0 for all."),
    "x": ("int or array", "The array to permute, an int meaning ``arange(x)``."),
    "independent": ("bool", "Whether each slice along `axis` gets a permutation of its own."),
    "input": ("array", "The array whose shape the result has."),
}

SAMPLERS: dict[str, Sampler] = {}
_TAIL = "size=None, key=None, dtype=None"
_literal_value = cache(ast.literal_eval)  # there are few different ones, and importing should be cheap


def _parse(text):
    """Return the signature of a method whose parameters read ``text``."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("self", kind)]
    for part in text.split(", "):
        name, _, default = part.partition("=")
        if name.startswith("*"):
            kind = inspect.Parameter.KEYWORD_ONLY
        if name != "*":
            own = inspect.Parameter.VAR_POSITIONAL if name.startswith("*") else kind
            value = _literal_value(default) if default else inspect.Parameter.empty
            parameters.append(inspect.Parameter(name.lstrip("*"), own, default=value))
    return inspect.Signature(parameters)


def _special(names, parameters, draw, prepare, about, formula, example, *rules):
    for name in names.split():
        SAMPLERS[name] = Sampler(name, _parse(parameters), draw, prepare, about, formula, example, rules)


def _real_sampler(names, parameters, draw, about, formula, example, *rules, tail=_TAIL):
    given, signature = (", ".join(filter(None, parts)) for parts in ([example, "size=4, key=0"], [parameters, tail]))
    draw = draw if draw in (jr.uniform, alg.uniform) else _via_float32(draw)
    _special(names, signature, draw, as_real, about, formula, f"{given} -> (4,)", *rules)


def _count(names, parameters, draw, about, formula, example, *rules, tail=_TAIL, bound=None):
    given, signature = f"{example}, size=4, key=0 -> (4,)", f"{parameters}, {tail}"
    prepare = partial(as_count, whole=[rule.split(" == ")[0] for rule in rules if "floor" in rule], bound=bound)
    _special(names, signature, _for_every_dtype(draw, bound), prepare, about, formula, given, *rules)


def _poisson_bound(mean):
    """Return a bound of a Poisson number of this mean, or of a narrower one: 10 standard deviations."""
    return mean + 10 * mean**0.5 + 20


# -------------------------------------------------------------------------------------------------- the table
# fmt: off

_U = ("uniform numbers from [0, 1)", r"f(x) = 1, \quad 0 \le x < 1")
_Z = ("the standard normal distribution", r"f(x) = e^{-x^2/2} / \sqrt{2 \pi}")
_T = ("Student's t distribution", r"f(x) \propto (1 + x^2 / df)^{-(df + 1)/2}")
_LIKE = "input, *, dtype=None, key=None"
_SCALE, _LOC = "0 <= scale < inf", "-inf < loc < inf"

_real_sampler("random random_sample ranf sample", "", jr.uniform, *_U, "")
_special("rand", "*dn, key=None, dtype=None", jr.uniform, as_size, *_U, "2, 3, key=0 -> (2, 3)")
_special("rand_like", _LIKE, jr.uniform, as_like, *_U, "[1.0, 2.0], key=0 -> (2,)")
_real_sampler("standard_normal", "", jr.normal, *_Z, "")
_special("randn", "*dn, key=None, dtype=None", _via_float32(jr.normal), as_size, *_Z, "2, 3, key=0 -> (2, 3)")
_special("randn_like", _LIKE, _via_float32(jr.normal), as_like, *_Z, "[1.0, 2.0], key=0 -> (2,)")
_real_sampler("standard_exponential", "", jr.exponential, "the exponential distribution of mean 1", r"f(x) = e^{-x}",
    "")
_real_sampler("standard_cauchy", "", jr.cauchy, "the Cauchy distribution", r"f(x) = 1 / (\pi (1 + x^2))", "")
_real_sampler("maxwell", "", jr.maxwell, "the Maxwell distribution of scale 1",
    r"f(x) = \sqrt{2 / \pi} x^2 e^{-x^2/2}", "")
_real_sampler("normal", "loc=None, scale=None", _with_location(jr.normal), "the normal distribution",
    r"f(x) \propto e^{-(x - loc)^2 / (2 scale^2)}", "1.0, 2.0", _LOC, _SCALE)
_real_sampler("gumbel", "loc=None, scale=None", _with_location(jr.gumbel), "the Gumbel distribution of maxima",
    r"F(x) = \exp(-e^{-z}), \quad z = (x - loc) / scale", "1.0, 2.0", _LOC, _SCALE)
_real_sampler("laplace", "loc=None, scale=None", _with_location(jr.laplace), "the Laplace distribution",
    r"f(x) = e^{-|x - loc| / scale} / (2 scale)", "1.0, 2.0", _LOC, _SCALE)
_real_sampler("logistic", "loc=None, scale=None", _with_location(jr.logistic), "the logistic distribution",
    r"F(x) = 1 / (1 + e^{-(x - loc) / scale})", "1.0, 2.0", _LOC, _SCALE)
_real_sampler("lognormal", "mean=None, sigma=None", _lognormal,
    "numbers whose logarithm is normal, with this mean and sigma", r"x = e^{mean + sigma z}", "1.0, 2.0",
    "-inf < mean < inf", "0 <= sigma < inf")
_real_sampler("uniform", "low=0.0, high=1.0", alg.uniform, "uniform numbers from [low, high)",
    r"f(x) = 1 / (high - low)", "1.0, 2.0", "-inf < low <= high < inf")
_real_sampler("truncated_normal", "lower, upper", alg.truncated_normal,
    "the normal distribution, restricted to [lower, upper]",
    r"f(x) \propto e^{-(x - loc)^2 / (2 scale^2)}, \quad lower \le x \le upper", "-1.0, 2.0",
    "lower < upper", "lower < inf", "-inf < upper", _LOC, "0 < scale < inf",
    tail="size=None, loc=0.0, scale=1.0, key=None, dtype=None, check_valid=True")
_real_sampler("triangular", "left=0.0, mode=0.5, right=1.0", alg.triangular, "the triangular distribution",
    r"f(x) \propto \min\left(\frac{x - left}{mode - left}, \frac{right - x}{right - mode}\right)",
    "0.0, 1.0, 2.0", "-inf < left <= mode <= right < inf", "left < right")
_real_sampler("exponential", "scale=None", _with_scale(jr.exponential), "the exponential distribution",
    r"f(x) = e^{-x / scale} / scale", "2.0", _SCALE)
_real_sampler("rayleigh", "scale=1.0", alg.rayleigh, "the Rayleigh distribution",
    r"f(x) = x e^{-x^2 / (2 scale^2)} / scale^2", "2.0", _SCALE)
_real_sampler("pareto", "a", jr.pareto, "the classical Pareto distribution (NumPy's, shifted to start at 1)",
    r"f(x) = a x^{-a - 1}, \quad x \ge 1", "3.0", "0 < a < inf")
_real_sampler("power", "a", alg.power, "the power function distribution", r"f(x) = a x^{a - 1}, \quad 0 \le x \le 1",
    "3.0", "0 < a < inf")
_real_sampler("weibull", "a", _weibull, "the Weibull distribution of scale 1", r"F(x) = 1 - e^{-x^a}", "3.0",
    "0 < a < inf")
_real_sampler("weibull_min", "a, scale=None", _with_scale(_weibull), "the Weibull distribution",
    r"F(x) = 1 - e^{-(x / scale)^a}", "3.0, 2.0", "0 < a < inf", _SCALE)
_real_sampler("standard_gamma", "shape", alg.gamma, "the gamma distribution of scale 1",
    r"f(x) \propto x^{shape - 1} e^{-x}", "3.0", "0 < shape < inf")
_real_sampler("gamma", "shape, scale=None", _with_scale(alg.gamma), "the gamma distribution",
    r"f(x) \propto x^{shape - 1} e^{-x / scale}", "3.0, 2.0", "0 < shape < inf", _SCALE)
_real_sampler("loggamma", "a", jr.loggamma, "logarithms of gamma variates of scale 1", r"f(x) \propto e^{a x - e^x}",
    "3.0", "0 < a < inf")
_real_sampler("standard_t t", "df", alg.t, *_T, "5.0", "0 < df < inf")
_real_sampler("chisquare", "df", alg.chisquare, "the chi-square distribution", r"f(x) \propto x^{df/2 - 1} e^{-x/2}",
    "3.0", "0 < df < inf")
_real_sampler("noncentral_chisquare", "df, nonc", alg.noncentral_chisquare, "the noncentral chi-square distribution",
    r"x = \sum_{i=1}^{df} (z_i + m_i)^2, \quad nonc = \sum m_i^2", "3.0, 1.0", "0 < df < inf", "0 <= nonc < inf")
_real_sampler("f", "dfnum, dfden", alg.f, "the F distribution",
    r"x = (\chi^2_{dfnum} / dfnum) / (\chi^2_{dfden} / dfden)", "3.0, 9.0", "0 < dfnum < inf", "0 < dfden < inf")
_real_sampler("noncentral_f", "dfnum, dfden, nonc", alg.noncentral_f, "the noncentral F distribution",
    r"x = (\chi^2_{dfnum}(nonc) / dfnum) / (\chi^2_{dfden} / dfden)", "3.0, 9.0, 1.0", "0 < dfnum < inf",
    "0 < dfden < inf", "0 <= nonc < inf")
_real_sampler("beta", "a, b", alg.beta, "the beta distribution", r"f(x) \propto x^{a - 1} (1 - x)^{b - 1}",
    "2.0, 3.0", "0 < a < inf", "0 < b < inf")
_real_sampler("vonmises", "mu, kappa", alg.vonmises, "the von Mises distribution of angles in [-pi, pi]",
    r"f(x) \propto e^{kappa \cos(x - mu)}", "0.0, 4.0", "-inf < mu < inf", "0 <= kappa < inf")
_real_sampler("wald", "mean, scale", alg.wald, "the inverse Gaussian distribution",
    r"f(x) \propto x^{-3/2} e^{-scale (x - mean)^2 / (2 mean^2 x)}", "1.0, 2.0", "0 < mean < inf", "0 < scale < inf")
_special("randint", f"low, high=None, {_TAIL}", counts.integers, as_integers,
    "integers from [low, high), equally likely", r"P(x) = 1 / (high - low)", "3, size=4, key=0 -> (4,)")
_special("randint_like", "input, low=0, high=None, *, dtype=None, key=None", counts.integers, as_integers_like,
    "integers from [low, high), equally likely", r"P(x) = 1 / (high - low)",
    "[1.0, 2.0], 0, 9, key=0 -> (2,)")
_special("random_integers", f"low, high=None, {_TAIL}", counts.integers, partial(as_integers, inclusive=True),
    "integers from low to high, both included (from 1 to `low` without `high`)",
    r"P(x) = 1 / (high - low + 1)", "6, size=4, key=0 -> (4,)")
_count("poisson", "lam=1.0", counts.poisson, "the Poisson distribution", r"P(k) = lam^k e^{-lam} / k!", "3.0",
    "0 <= lam < inf", bound=lambda _, lam: _poisson_bound(lam))
_count("binomial", "n, p", counts.binomial, "the number of successes in n trials",
    r"P(k) = \binom{n}{k} p^k (1 - p)^{n - k}", "10, 0.5", "0 <= n < inf", "n == floor(n)", "0 <= p <= 1",
    tail=f"{_TAIL}, check_valid=True", bound=lambda xp, n, p: xp.minimum(n, _poisson_bound(n * p)))
_count("geometric", "p", jr.geometric, "the number of trials up to the first success",
    r"P(k) = (1 - p)^{k - 1} p", "0.5", "0 < p <= 1", bound=lambda _, p: 20 / p)
_count("hypergeometric", "ngood, nbad, nsample", counts.hypergeometric,
    "the number of good ones in a sample of an urn",
    r"P(k) = \binom{ngood}{k} \binom{nbad}{nsample - k} / \binom{ngood + nbad}{nsample}", "7, 5, 4",
    "0 <= ngood < inf", "0 <= nbad < inf", "0 <= nsample <= ngood + nbad", "ngood == floor(ngood)",
    "nbad == floor(nbad)", "nsample == floor(nsample)", bound=lambda xp, good, bad, drawn: xp.minimum(good, drawn))
_count("logseries", "p", counts.logseries, "the logarithmic series distribution",
    r"P(k) = -p^k / (k \ln(1 - p))", "0.5", "0 <= p < 1", bound=lambda _, p: 20 / (1 - p))
_count("negative_binomial", "n, p", counts.negative_binomial, "the number of failures before the n-th success",
    r"P(k) = \frac{\Gamma(k + n)}{k! \Gamma(n)} p^n (1 - p)^k", "3, 0.5", "0 < n < inf",
    "0 < p <= 1", bound=lambda _, n, p: _poisson_bound((n + (40 * n) ** 0.5 + 20) * ((1 - p) / p)))
_count("zipf", "a", counts.zipf, "Zipf's distribution, on the numbers that `dtype` holds",
    r"P(k) \propto k^{-a}", "3.0", "1 < a")
_special("bernoulli", "p=0.5, size=None, key=None, check_valid=True", alg.bernoulli, as_bernoulli,
    "booleans that are true with probability p", r"P(x) = p^x (1 - p)^{1 - x}", "0.5, size=4, key=0 -> (4,)",
    "0 <= p <= 1")
_special("categorical", "logits, axis=-1, size=None, key=None", jr.categorical, as_logits,
    "indices with probabilities softmax(logits)", r"P(k) = e^{logits_k} / \sum_j e^{logits_j}",
    "[0.0, 1.0], size=4, key=0 -> (4,)")
_special("multinomial", f"n, pvals, {_TAIL}, check_valid=True", counts.multinomial, as_multinomial,
    "how often each outcome occurs in n trials", r"P(k) = n! \prod_i pvals_i^{k_i} / k_i!",
    "9, [0.2, 0.8], size=4, key=0 -> (4, 2)", "0 <= n < inf", "n == floor(n)", "0 <= pvals",
    "0.999 <= sum(pvals) <= 1.001")
_special("dirichlet", f"alpha, {_TAIL}", alg.dirichlet, as_dirichlet,
    "the Dirichlet distribution of vectors of sum 1", r"f(x) \propto \prod_i x_i^{alpha_i - 1}",
    "[1.0, 2.0], size=4, key=0 -> (4, 2)", "0 < alpha < inf")
_special("multivariate_normal", "mean, cov, size=None, method='cholesky', key=None, dtype=None",
    alg.multivariate_normal, as_multivariate_normal, "the multivariate normal distribution",
    r"f(x) \propto e^{-\frac{1}{2} (x - mean)^T cov^{-1} (x - mean)}",
    "[0.0, 1.0], [[1.0, 0.0], [0.0, 2.0]], size=4, key=0 -> (4, 2)")
_special("orthogonal", f"n, {_TAIL}", jr.orthogonal, as_orthogonal,
    "orthogonal n by n matrices, uniformly (Haar)", r"x^T x = 1", "3, size=4, key=0 -> (4, 3, 3)", "0 <= n")
_special("choice", "a, size=None, replace=True, p=None, key=None", jr.choice, as_choice,
    "elements along the first axis of an array, with relative weights p, not all of them 0",
    r"P(a_i) = p_i / \sum_j p_j",
    "5, size=4, key=0 -> (4,)", "0 <= p < inf")
_special("permutation", "x, axis=0, independent=False, key=None", jr.permutation, as_permutation,
    "a permutation of an array along an axis", r"P(\pi) = 1 / n!", "5, key=0 -> (5,)")
_special("shuffle", "x, axis=0, key=None", jr.permutation, as_permutation,
    "a permuted copy of an array (the array itself stays as it is)", r"P(\pi) = 1 / n!",
    "[3, 4, 5], key=0 -> (3,)")
