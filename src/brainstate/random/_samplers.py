r"""The samplers as a table: a name, the parameters, a function of ``jax.random``, what it samples, and rules.

A call of a sampler is *bind* → *check* → *prepare* → *draw*: arguments are matched with the parameters, rules
about concrete values are checked, values are cast and broadcast, and only then a key is taken from the
generator and handed to the function, so a refused call leaves the generator as it was. `Sampler` does all but
the key; ``RandomState`` and the functions of ``brainstate.random`` are made from the table and add it.

Rows come in three kinds. A *real* sampler returns floating numbers, a *count* sampler integers; both have
parameters that broadcast against each other, as in NumPy. For a *special* one a function says how arguments
become those of ``jax.random``.
"""

import ast
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from . import _algorithms as alg
from ._arguments import broadcast, cast, check_rule, default_dtype, to_array, to_dtype, to_shape, to_size

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
            raise TypeError(f"{self.name}{self.shown}: {error}.") from None
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
    def shown(self) -> inspect.Signature:
        """The signature of the function, which has no ``self``."""
        return self.signature.replace(parameters=list(self.signature.parameters.values())[1:])

    @property
    def doc(self) -> str:
        """The docstring, in numpy's style."""
        lines = [f"Sample {self.about}.", "", ".. math:: " + self.formula, "", "Parameters", "----------"]
        for name, parameter in self.shown.parameters.items():
            rules = ", ".join(f"``{rule}``" for rule in self.rules if name in rule.replace("<=", "").split())
            kind, about = _PARAMETERS.get(name, ("number or array", "Broadcast against the others."))
            optional = ", optional" if parameter.default is not parameter.empty else ""
            lines += [f"{name} : {kind}{optional}", f"    {about}{rules and f' The rule: {rules}.'}"]
        lines += ["", "Returns", "-------", "jax.Array", "    The samples.", "", "Examples", "--------"]
        given, shape = self.example.split(" -> ")
        lines += [">>> import brainstate", f">>> brainstate.random.{self.name}({given}).shape", shape]
        return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------- from arguments to those of `draw`


def _as_real(function, size, dtype, **parameters):
    dtype = to_dtype(function, dtype, float, jnp.inexact)
    values, shape = broadcast(function, parameters, size, dtype)
    return *values, shape, dtype


def _as_count(function, size, dtype, **parameters):
    dtype = to_dtype(function, dtype, int, jnp.number)
    values, shape = broadcast(function, parameters, size, default_dtype(float))
    return *values, shape, dtype


def _as_integers(function, low, high, size, dtype, inclusive=False):
    dtype = to_dtype(function, dtype, int, jnp.integer)
    width = dtype if jnp.iinfo(dtype).bits >= 32 else jnp.dtype(jnp.int32)  # what jax.random.randint computes in
    if high is None:
        low, high = np.asarray(int(inclusive)), low
    check_rule(function, "low <= high" if inclusive else "low < high", {"low": low, "high": high})
    if inclusive:
        high = (high if isinstance(high, np.ndarray) else cast(function, "high", high, width)) + 1
    (low, high), shape = broadcast(function, {"low": low, "high": high}, size, width)
    return shape, low, high, dtype


def _as_shape(function, dn, dtype):
    return to_size(function, dn), to_dtype(function, dtype, float, jnp.inexact)


def _as_like(function, input, dtype):
    return np.shape(input), to_dtype(function, dtype, float, jnp.inexact)


def _as_integers_like(function, input, low, high, dtype):
    return _as_integers(function, low, high, np.shape(input), dtype)


def _as_bernoulli(function, p, size):
    (p,), shape = broadcast(function, {"p": p}, size, default_dtype(float))
    return p, shape


def _as_logits(function, logits, axis, size):
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        logits = cast(function, "logits", logits, default_dtype(float))
    return logits, axis, to_shape(function, size, [tuple(np.delete(logits.shape, axis).tolist())])


def _as_multinomial(function, n, pvals, size, dtype):
    real, dtype = default_dtype(float), to_dtype(function, dtype, int, jnp.number)
    n, pvals = cast(function, "n", n, real), cast(function, "pvals", pvals, real)
    batch = to_shape(function, size, [n.shape, pvals.shape[:-1]])
    return jnp.broadcast_to(n, batch), jnp.broadcast_to(pvals, (*batch, pvals.shape[-1])), dtype


def _as_dirichlet(function, alpha, size, dtype):
    dtype = to_dtype(function, dtype, float, jnp.floating)
    return cast(function, "alpha", alpha, dtype), to_shape(function, size, [alpha.shape[:-1]]), dtype


def _as_multivariate_normal(function, mean, cov, size, method, dtype):
    dtype = to_dtype(function, dtype, float, jnp.floating)
    mean, cov = cast(function, "mean", mean, dtype), cast(function, "cov", cov, dtype)
    return mean, cov, to_shape(function, size, [mean.shape[:-1], cov.shape[:-2]]), dtype, method


def _as_orthogonal(function, n, size, dtype):
    return operator.index(n), size or (), to_dtype(function, dtype, float, jnp.inexact)


def _as_choice(function, a, size, replace, p):
    if p is not None and not jnp.issubdtype(p.dtype, jnp.floating):
        p = cast(function, "p", p, default_dtype(float))
    return a, size or (), replace, p


def _as_permutation(function, x, **how):
    return x if x.ndim else int(x), *how.values()


# ---------------------------------------------------------------- functions with jax.random's order of things


@jax.jit
def _affine(x, loc, scale):
    x = x if scale is None else x * scale
    return x if loc is None else x + loc


def _located(draw):
    """Give the standard ``draw(key, shape, dtype)`` a location and a scale."""

    def located(key, loc, scale, shape, dtype):
        x = draw(key, shape, dtype)
        return x if loc is None and scale is None else _affine(x, loc, scale)

    return located


def _scaled(draw):
    """Give ``draw(key, *parameters, shape, dtype)`` a scale, the last parameter."""

    def scaled(key, *args):
        *parameters, scale, shape, dtype = args
        x = draw(key, *parameters, shape, dtype)
        return x if scale is None else x * scale

    return scaled


def _counted(draw):
    """Let a sampler of integers serve a floating ``dtype`` too: what it draws is converted."""

    def counted(key, *args):
        *rest, dtype = args
        return draw(key, *rest, dtype if jnp.issubdtype(dtype, jnp.integer) else default_dtype(int)).astype(dtype)

    return counted


def _uniform(key, low, high, shape, dtype):
    return jr.uniform(key, shape, dtype, low, high)


def _lognormal(key, mean, sigma, shape, dtype):
    x = jr.lognormal(key, np.ones((), dtype) if sigma is None else sigma, shape, dtype)
    return x if mean is None else x * jnp.exp(mean)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _truncated_normal(key, lower, upper, loc, scale, shape, dtype):
    x = jr.truncated_normal(key, (lower - loc) / scale, (upper - loc) / scale, shape, dtype)
    return jnp.clip(x * scale + loc, lower, upper)


def _weibull(key, a, shape, dtype):
    return jr.weibull_min(key, np.ones((), dtype), a, shape, dtype)


def _wald(key, mean, scale, shape, dtype):
    return jr.wald(key, mean / scale, shape, dtype) * scale


def _binomial(key, n, p, shape, dtype):
    return jr.binomial(key, n, p, shape, p.dtype).astype(dtype)


def _multinomial(key, n, pvals, dtype):
    return alg.multinomial(key, n, pvals).astype(dtype)


# ---------------------------------------------------------------------------------- the table: what rows need

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
    "cov": ("array", "The covariance matrix, along the last two axes."),
    "method": (
        "{'cholesky', 'eigh', 'svd'}",
        "How to factor `cov`; a singular one needs the second or third.",
    ),
    "a": (
        "number or array",
        "Shape parameter; for ``choice`` what to draw from, an int meaning ``arange(a)``.",
    ),
    "replace": ("bool", "Whether an element may be drawn more than once."),
    "x": ("int or array", "What to permute, an int meaning ``arange(x)``."),
    "independent": ("bool", "Whether each slice along `axis` gets a permutation of its own."),
    "input": ("array", "The array whose shape the result has."),
}

SAMPLERS: dict[str, Sampler] = {}
_TAIL = "size=None, key=None, dtype=None"
_literal = cache(ast.literal_eval)  # there are few different ones, and importing should be cheap


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
            value = _literal(default) if default else inspect.Parameter.empty
            parameters.append(inspect.Parameter(name.lstrip("*"), own, default=value))
    return inspect.Signature(parameters)


def _special(names, parameters, draw, prepare, about, formula, example, *rules):
    for name in names.split():
        SAMPLERS[name] = Sampler(name, _parse(parameters), draw, prepare, about, formula, example, rules)


def _real(names, parameters, draw, about, formula, example, *rules, tail=_TAIL):
    given, signature = (", ".join(filter(None, parts)) for parts in ([example, "size=4, key=0"], [parameters, tail]))
    _special(names, signature, draw, _as_real, about, formula, f"{given} -> (4,)", *rules)


def _count(names, parameters, draw, about, formula, example, *rules, tail=_TAIL):
    given, signature = f"{example}, size=4, key=0 -> (4,)", f"{parameters}, {tail}"
    _special(names, signature, _counted(draw), _as_count, about, formula, given, *rules)


# -------------------------------------------------------------------------------------------------- the table
# fmt: off

_U = ("uniform numbers from [0, 1)", r"f(x) = 1, \quad 0 \le x < 1")
_Z = ("the standard normal distribution", r"f(x) = e^{-x^2/2} / \sqrt{2 \pi}")
_T = ("Student's t distribution", r"f(x) \propto (1 + x^2 / df)^{-(df + 1)/2}")
_LIKE = "input, *, dtype=None, key=None"
_SCALE = "0 <= scale"

_real("random random_sample ranf sample", "", jr.uniform, *_U, "")
_special("rand", "*dn, key=None, dtype=None", jr.uniform, _as_shape, *_U, "2, 3, key=0 -> (2, 3)")
_special("rand_like", _LIKE, jr.uniform, _as_like, *_U, "[1.0, 2.0], key=0 -> (2,)")
_real("standard_normal", "", jr.normal, *_Z, "")
_special("randn", "*dn, key=None, dtype=None", jr.normal, _as_shape, *_Z, "2, 3, key=0 -> (2, 3)")
_special("randn_like", _LIKE, jr.normal, _as_like, *_Z, "[1.0, 2.0], key=0 -> (2,)")
_real("standard_exponential", "", jr.exponential, "the exponential distribution of mean 1", r"f(x) = e^{-x}",
    "")
_real("standard_cauchy", "", jr.cauchy, "the Cauchy distribution", r"f(x) = 1 / (\pi (1 + x^2))", "")
_real("maxwell", "", jr.maxwell, "the Maxwell distribution of scale 1",
    r"f(x) = \sqrt{2 / \pi} x^2 e^{-x^2/2}", "")
_real("normal", "loc=None, scale=None", _located(jr.normal), "the normal distribution",
    r"f(x) \propto e^{-(x - loc)^2 / (2 scale^2)}", "1.0, 2.0", _SCALE)
_real("gumbel", "loc=None, scale=None", _located(jr.gumbel), "the Gumbel distribution of maxima",
    r"F(x) = \exp(-e^{-z}), \quad z = (x - loc) / scale", "1.0, 2.0", _SCALE)
_real("laplace", "loc=None, scale=None", _located(jr.laplace), "the Laplace distribution",
    r"f(x) = e^{-|x - loc| / scale} / (2 scale)", "1.0, 2.0", _SCALE)
_real("logistic", "loc=None, scale=None", _located(jr.logistic), "the logistic distribution",
    r"F(x) = 1 / (1 + e^{-(x - loc) / scale})", "1.0, 2.0", _SCALE)
_real("lognormal", "mean=None, sigma=None", _lognormal,
    "numbers whose logarithm is normal, with this mean and sigma", r"x = e^{mean + sigma z}", "1.0, 2.0",
    "0 <= sigma")
_real("uniform", "low=0.0, high=1.0", _uniform, "uniform numbers from [low, high)",
    r"f(x) = 1 / (high - low)", "1.0, 2.0", "low <= high")
_real("truncated_normal", "lower, upper", _truncated_normal,
    "the normal distribution, restricted to [lower, upper]",
    r"f(x) \propto e^{-(x - loc)^2 / (2 scale^2)}, \quad lower \le x \le upper", "-1.0, 2.0",
    "lower < upper", "0 < scale",
    tail="size=None, loc=0.0, scale=1.0, key=None, dtype=None, check_valid=True")
_real("triangular", "left=0.0, mode=0.5, right=1.0", jr.triangular, "the triangular distribution",
    r"f(x) \propto \min\left(\frac{x - left}{mode - left}, \frac{right - x}{right - mode}\right)",
    "0.0, 1.0, 2.0", "left <= mode <= right", "left < right")
_real("exponential", "scale=None", _scaled(jr.exponential), "the exponential distribution",
    r"f(x) = e^{-x / scale} / scale", "2.0", _SCALE)
_real("rayleigh", "scale=1.0", jr.rayleigh, "the Rayleigh distribution",
    r"f(x) = x e^{-x^2 / (2 scale^2)} / scale^2", "2.0", _SCALE)
_real("pareto", "a", jr.pareto, "the classical Pareto distribution (NumPy's, shifted to start at 1)",
    r"f(x) = a x^{-a - 1}, \quad x \ge 1", "3.0", "0 < a")
_real("power", "a", alg.power, "the power function distribution", r"f(x) = a x^{a - 1}, \quad 0 \le x \le 1",
    "3.0", "0 < a")
_real("weibull", "a", _weibull, "the Weibull distribution of scale 1", r"F(x) = 1 - e^{-x^a}", "3.0",
    "0 < a")
_real("weibull_min", "a, scale=None", _scaled(_weibull), "the Weibull distribution",
    r"F(x) = 1 - e^{-(x / scale)^a}", "3.0, 2.0", "0 < a", _SCALE)
_real("standard_gamma", "shape", jr.gamma, "the gamma distribution of scale 1",
    r"f(x) \propto x^{shape - 1} e^{-x}", "3.0", "0 < shape")
_real("gamma", "shape, scale=None", _scaled(jr.gamma), "the gamma distribution",
    r"f(x) \propto x^{shape - 1} e^{-x / scale}", "3.0, 2.0", "0 < shape", _SCALE)
_real("loggamma", "a", jr.loggamma, "logarithms of gamma variates of scale 1", r"f(x) \propto e^{a x - e^x}",
    "3.0", "0 < a")
_real("standard_t t", "df", jr.t, *_T, "5.0", "0 < df")
_real("chisquare", "df", jr.chisquare, "the chi-square distribution", r"f(x) \propto x^{df/2 - 1} e^{-x/2}",
    "3.0", "0 < df")
_real("noncentral_chisquare", "df, nonc", alg.noncentral_chisquare, "the noncentral chi-square distribution",
    r"x = \sum_{i=1}^{df} (z_i + m_i)^2, \quad nonc = \sum m_i^2", "3.0, 1.0", "0 < df", "0 <= nonc")
_real("f", "dfnum, dfden", jr.f, "the F distribution",
    r"x = (\chi^2_{dfnum} / dfnum) / (\chi^2_{dfden} / dfden)", "3.0, 9.0", "0 < dfnum", "0 < dfden")
_real("noncentral_f", "dfnum, dfden, nonc", alg.noncentral_f, "the noncentral F distribution",
    r"x = (\chi^2_{dfnum}(nonc) / dfnum) / (\chi^2_{dfden} / dfden)", "3.0, 9.0, 1.0", "0 < dfnum",
    "0 < dfden", "0 <= nonc")
_real("beta", "a, b", jr.beta, "the beta distribution", r"f(x) \propto x^{a - 1} (1 - x)^{b - 1}",
    "2.0, 3.0", "0 < a", "0 < b")
_real("vonmises", "mu, kappa", alg.vonmises, "the von Mises distribution of angles in [-pi, pi]",
    r"f(x) \propto e^{kappa \cos(x - mu)}", "0.0, 4.0", "0 <= kappa")
_real("wald", "mean, scale", _wald, "the inverse Gaussian distribution",
    r"f(x) \propto x^{-3/2} e^{-scale (x - mean)^2 / (2 mean^2 x)}", "1.0, 2.0", "0 < mean", "0 < scale")
_special("randint", f"low, high=None, {_TAIL}", jr.randint, _as_integers,
    "integers from [low, high), equally likely", r"P(x) = 1 / (high - low)", "3, size=4, key=0 -> (4,)")
_special("randint_like", "input, low=0, high=None, *, dtype=None, key=None", jr.randint, _as_integers_like,
    "integers from [low, high), equally likely", r"P(x) = 1 / (high - low)",
    "[1.0, 2.0], 0, 9, key=0 -> (2,)")
_special("random_integers", f"low, high=None, {_TAIL}", jr.randint, partial(_as_integers, inclusive=True),
    "integers from low to high, both included (from 1 to `low` without `high`)",
    r"P(x) = 1 / (high - low + 1)", "6, size=4, key=0 -> (4,)")
_count("poisson", "lam=1.0", jr.poisson, "the Poisson distribution", r"P(k) = lam^k e^{-lam} / k!", "3.0",
    "0 <= lam")
_count("binomial", "n, p", _binomial, "the number of successes in n trials",
    r"P(k) = \binom{n}{k} p^k (1 - p)^{n - k}", "10, 0.5", "0 <= n", "0 <= p <= 1",
    tail=f"{_TAIL}, check_valid=True")
_count("geometric", "p", jr.geometric, "the number of trials up to the first success",
    r"P(k) = (1 - p)^{k - 1} p", "0.5", "0 < p <= 1")
_count("hypergeometric", "ngood, nbad, nsample", alg.hypergeometric,
    "the number of good ones in a sample of an urn",
    r"P(k) = \binom{ngood}{k} \binom{nbad}{nsample - k} / \binom{ngood + nbad}{nsample}", "7, 5, 4",
    "0 <= ngood", "0 <= nbad", "0 <= nsample <= ngood + nbad")
_count("logseries", "p", alg.logseries, "the logarithmic series distribution",
    r"P(k) = -p^k / (k \ln(1 - p))", "0.5", "0 <= p < 1")
_count("negative_binomial", "n, p", alg.negative_binomial, "the number of failures before the n-th success",
    r"P(k) = \frac{\Gamma(k + n)}{k! \Gamma(n)} p^n (1 - p)^k", "3, 0.5", "0 < n", "0 < p <= 1")
_count("zipf", "a", alg.zipf, "Zipf's distribution, on the numbers that `dtype` holds",
    r"P(k) \propto k^{-a}", "3.0", "1 < a")
_special("bernoulli", "p=0.5, size=None, key=None, check_valid=True", jr.bernoulli, _as_bernoulli,
    "booleans that are true with probability p", r"P(x) = p^x (1 - p)^{1 - x}", "0.5, size=4, key=0 -> (4,)",
    "0 <= p <= 1")
_special("categorical", "logits, axis=-1, size=None, key=None", jr.categorical, _as_logits,
    "indices with probabilities softmax(logits)", r"P(k) = e^{logits_k} / \sum_j e^{logits_j}",
    "[0.0, 1.0], size=4, key=0 -> (4,)")
_special("multinomial", f"n, pvals, {_TAIL}, check_valid=True", _multinomial, _as_multinomial,
    "how often each outcome occurs in n trials", r"P(k) = n! \prod_i pvals_i^{k_i} / k_i!",
    "9, [0.2, 0.8], size=4, key=0 -> (4, 2)", "0 <= n", "0 <= pvals", "0.999 <= sum(pvals) <= 1.001")
_special("dirichlet", f"alpha, {_TAIL}", jr.dirichlet, _as_dirichlet,
    "the Dirichlet distribution of vectors of sum 1", r"f(x) \propto \prod_i x_i^{alpha_i - 1}",
    "[1.0, 2.0], size=4, key=0 -> (4, 2)", "0 < alpha")
_special("multivariate_normal", "mean, cov, size=None, method='cholesky', key=None, dtype=None",
    jr.multivariate_normal, _as_multivariate_normal, "the multivariate normal distribution",
    r"f(x) \propto e^{-\frac{1}{2} (x - mean)^T cov^{-1} (x - mean)}",
    "[0.0, 1.0], [[1.0, 0.0], [0.0, 2.0]], size=4, key=0 -> (4, 2)")
_special("orthogonal", f"n, {_TAIL}", jr.orthogonal, _as_orthogonal,
    "orthogonal n by n matrices, uniformly (Haar)", r"x^T x = 1", "3, size=4, key=0 -> (4, 3, 3)", "0 <= n")
_special("choice", "a, size=None, replace=True, p=None, key=None", jr.choice, _as_choice,
    "elements along the first axis of an array, with relative weights p", r"P(a_i) = p_i / \sum_j p_j",
    "5, size=4, key=0 -> (4,)", "0 <= p")
_special("permutation", "x, axis=0, independent=False, key=None", jr.permutation, _as_permutation,
    "a permutation of an array along an axis", r"P(\pi) = 1 / n!", "5, key=0 -> (5,)")
_special("shuffle", "x, axis=0, key=None", jr.permutation, _as_permutation,
    "a permuted copy of an array (the array itself stays as it is)", r"P(\pi) = 1 / n!",
    "[3, 4, 5], key=0 -> (3,)")
