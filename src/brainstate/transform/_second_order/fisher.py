"""``fisher``: products with the Fisher information of a model whose output are the parameters of a distribution.

Sums, not means, over the examples ``i``, with ``fᵢ`` the output for example ``i`` and ``J`` its Jacobian::

    exact       Σᵢ Jᵢᵀ Fᵢ Jᵢ                        Fᵢ = E[sᵢ sᵢᵀ],  sᵢ = ∂(-log p(y | fᵢ))/∂fᵢ,  y ~ p(· | fᵢ)
    sampled     Σᵢ Jᵢᵀ (mean of sᵢ sᵢᵀ over draws) Jᵢ    labels drawn from the model: unbiased for `exact`
    empirical   Σᵢ Jᵢᵀ sᵢ sᵢᵀ Jᵢ                     labels given: the outer products of the gradients of the examples

``Jᵢᵀ sᵢ`` is the gradient of one example, so the last two are sums of outer products of gradients. The gradients are
never computed: ``sᵢ sᵢᵀ`` acts at the output, on the rows of example ``i`` only. Away from a good fit the empirical
matrix does not approximate the other two (Kunstner, Balles and Hennig 2019, "Limitations of the empirical Fisher
approximation").

In closed form (Martens 2020, "New insights and perspectives on the natural gradient method"), ``Fᵢ`` is
``diag(p) - p pᵀ`` for logits of a categorical with probabilities ``p``, ``p (1 - p)`` for logits of Bernoullis, the
rate ``exp(f)`` for logarithms of the rates of Poissons, and ``I`` for the mean of a Gaussian of unit variance: each the
Hessian of its negative log-likelihood, so that `exact` is the generalized Gauss-Newton matrix of that loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import valid_jaxtype
from jax.tree_util import Partial

from ..._arrays import at_least, layout
from ..._errors import StateTypeError, StateValueError, a_type
from .._random_keys import first_key
from .hvp_ggn import Through

__all__ = ["fisher"]


# ------------------------------------------------------------------------------------------ the likelihoods


@dataclass(frozen=True)
class _Likelihood:
    """A distribution of targets ``y`` with the parameters ``f``, each of the shape of ``f`` or one dimension less."""

    mean: Callable  # f -> E[y]
    exact: Callable  # (E[y], u) -> F u
    draw: Callable  # (key, f, number) -> y
    classes: int  # 1 if the last axis of f has the classes, else 0
    encode: Callable = lambda y, f: y  # targets as the user has them -> y like f


def _one_hot(labels, f):
    hot = jax.nn.one_hot(labels, f.shape[-1], dtype=f.dtype)
    return hot / hot.sum(axis=-1, keepdims=True)  # NaN for a label that is not a class, rather than a row of zeros


def _softmax(f):
    return jax.nn.softmax(f, axis=-1)


def _draw_categorical(key, f, number):
    return jax.random.categorical(key, f, shape=(number, *f.shape[:-1]))


def _draw_bernoulli(key, f, number):
    return jax.random.bernoulli(key, jax.nn.sigmoid(f)[None], (number, *f.shape)).astype(f.dtype)


def _draw_gaussian(key, f, number):
    return f[None] + jax.random.normal(key, (number, *f.shape), f.dtype)


def _draw_poisson(key, f, number):
    return jax.random.poisson(key, jnp.exp(f)[None], (number, *f.shape)).astype(f.dtype)


def _exact_categorical(p, u):
    return p * u - p * (p * u).sum(axis=-1, keepdims=True)  # (diag(p) - p pᵀ) u


LIKELIHOODS = {
    "categorical": _Likelihood(_softmax, _exact_categorical, _draw_categorical, 1, _one_hot),
    "gaussian": _Likelihood(lambda f: f, lambda mean, u: u, _draw_gaussian, 0),
    "bernoulli": _Likelihood(jax.nn.sigmoid, lambda p, u: p * (1 - p) * u, _draw_bernoulli, 0),
    "poisson": _Likelihood(jnp.exp, lambda rate, u: rate * u, _draw_poisson, 0),
}


def _outer(scores, u):
    """Return the mean over the first axis of ``scores`` of ``sᵢ (sᵢᵀ uᵢ)``, for each example ``i`` of the second."""
    along = (scores * u[None]).sum(axis=tuple(range(2, scores.ndim)), keepdims=True)
    return (scores * along).mean(axis=0)


# ------------------------------------------------------------------------------------------ the transform


@dataclass(frozen=True)
class _Labels:
    """The source of labels: none (exact), the model (sampled) or a function of the user (empirical)."""

    kind: str
    targets: Callable | None
    samples: int
    key: Any


class _Fisher(Through):
    name = "fisher"

    def __init__(self, model_fn, likelihood, labels, grad_states, argnums, **options):
        self.likelihood, self.labels = likelihood, labels
        super().__init__(model_fn, grad_states, argnums, return_value=False, return_grad=False, **options)

    def _check_output(self, out):
        super()._check_output(out)
        rank = 1 + LIKELIHOODS[self.likelihood].classes
        if not valid_jaxtype(out) or jnp.ndim(out) < rank:
            got = f"an array of shape {jnp.shape(out)}" if valid_jaxtype(out) else a_type(out)
            axes = "examples first, classes last" if rank == 2 else "examples first"
            raise StateTypeError(
                f"fisher: the output of the model is {got}. For {self.likelihood!r} it is one array of {rank} or more "
                f"axes, {axes}. Return anything else as aux, with has_aux=True."
            )

    def _curve(self, point, out):
        law = LIKELIHOODS[self.likelihood]
        mean = law.mean(out)
        if self.labels.kind == "exact":
            return Partial(law.exact, mean), None, None
        if self.labels.kind == "sampled":
            targets = law.draw(first_key(self.labels.key), out, self.labels.samples)
        else:
            targets = self._read_targets(point, out, law)[None]
        # For each of the four, sᵢ = ∂(-log p(y | fᵢ))/∂fᵢ = E[y] - y, since fᵢ is its natural parameter.
        scores = jax.vmap(lambda y: mean - law.encode(y, out))(targets)
        return Partial(_outer, scores), None, None

    def _read_targets(self, point, out, law):
        targets = jnp.asarray(self.labels.targets(*point.args, **point.kwargs))
        shape, kind = (out.shape[:-1], jnp.integer) if law.classes else (out.shape, None)
        if targets.shape != shape or (kind and not jnp.issubdtype(targets.dtype, kind)):
            raise StateValueError(
                f"fisher: the targets are {layout(targets)}. For {self.likelihood!r} and an output of "
                f"shape {out.shape} they are {'integers' if kind else 'numbers'} of shape {shape}."
            )
        return targets if kind else targets.astype(out.dtype)


def fisher(
    model_fn: Callable,
    likelihood: str,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = None,
    *,
    kind: str = "exact",
    targets: Callable | None = None,
    samples: int | None = None,
    key: Any = None,
    has_aux: bool = False,
    check_states: bool = True,
    debug_nan: bool = False,
) -> Any:
    """Product of the Fisher information matrix with a vector: exact, sampled or empirical, summed over the examples.

    Parameters
    ----------
    model_fn : callable
        The model; ``model_fn(*args)`` returns one array with the examples on its first axis, or ``(output, aux)``.
    likelihood : str
        The meaning of the output: ``"categorical"``, logits with the classes on the last axis; ``"bernoulli"``,
        logits; ``"poisson"``, the logarithm of the rate; ``"gaussian"``, the mean, with unit variance. Further axes
        are independent parts of one example.
    grad_states, argnums, has_aux, check_states, debug_nan
        See `GradientTransform`, and for ``debug_nan`` and operators `hvp`.
    kind : str
        ``"exact"``, the expectation in closed form; ``"sampled"``, with labels drawn from the model's own
        distribution; ``"empirical"``, with the labels of ``targets``.
    targets : callable, optional
        ``targets(*args)`` returns the labels, for ``"empirical"``: class numbers without the axis of classes, or
        numbers of the shape of the output. A class number that does not exist makes the result NaN.
    samples : int, optional
        Number of labels to draw for each example, for ``"sampled"``; by default 1.
    key : int or key, optional
        Fixes the labels that are drawn; without it each call, or operator, draws new ones from ``brainstate.random``.

    Returns
    -------
    callable
        ``f(v, *args)`` returns the product, or ``(product, aux)``; ``f.operator(*args)`` the same with a
        `LinearOperator` instead of the product, for which labels are drawn once.

    Raises
    ------
    StateValueError
        For an unknown likelihood or kind, options that belong to another kind, labels of another shape or dtype, and a
        vector unlike the gradient.
    StateTypeError
        At the call, if the output is not an array as above; and as `GradientTransform`.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> w = brainstate.ParamState(jnp.array([0.0, 0.0]))
    >>> f = brainstate.transform.fisher(lambda x: x @ w.value, "bernoulli", w)
    >>> f.operator(jnp.array([[1.0, 2.0], [0.0, 2.0]])).dense().tolist()
    [[0.25, 0.5], [0.5, 2.0]]
    """
    _check_known("likelihood", likelihood, tuple(LIKELIHOODS))
    _check_known("kind", kind, ("exact", "sampled", "empirical"))
    for name, given, owner in (
        ("targets", targets, "empirical"),
        ("samples", samples, "sampled"),
        ("key", key, "sampled"),
    ):
        if given is not None and kind != owner:
            raise StateValueError(f"fisher: {name} is for kind={owner!r}, the kind is {kind!r}: leave it out.")
    if kind == "empirical" and not callable(targets):
        raise StateTypeError(
            f"fisher: kind='empirical' needs targets, a function of the arguments of the model that returns the "
            f"labels, such as lambda x, y: y; got {type(targets).__name__}."
        )
    samples = 1 if samples is None else samples
    at_least("fisher: samples", samples, 1, "how many labels to draw")
    labels = _Labels(kind, targets, samples, key)
    options = {"has_aux": has_aux, "check_states": check_states, "debug_nan": debug_nan}
    return _Fisher(model_fn, likelihood, labels, grad_states, argnums, **options)


def _check_known(name, given, known):
    if given not in known:
        raise StateValueError(f"fisher: {name}={given!r} is not known; there are {', '.join(map(repr, known))}.")
