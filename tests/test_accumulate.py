"""accumulate: against one large batch, and against a Python loop over the parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brainstate import ParamState, State, StateTypeError, StateValueError
from brainstate import random as R
from brainstate import transform as T
from brainstate.transform import accumulate, grad

N = 12


@pytest.fixture
def w():
    return ParamState({"w": jnp.array([0.5, -1.0]), "n": jnp.int32(3)}, name="w")


@pytest.fixture
def batch():
    x = jnp.sin(jnp.arange(2.0 * N)).reshape(N, 2)
    return x, jnp.cos(jnp.arange(float(N)))


def squares(w, x, y):
    return (x @ w.value["w"] - y) ** 2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 12])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_agrees_with_the_whole_batch(w, batch, steps, reduction, compiled):
    reduce = getattr(jnp, reduction)
    gradient = grad(lambda x, y: reduce(squares(w, x, y)), w, return_value=True)
    parts = accumulate(gradient, steps, reduction=reduction)
    (got, value), (wanted, expected) = (T.jit(parts) if compiled else parts)(*batch), gradient(*batch)
    assert got["n"] is None
    np.testing.assert_allclose(got["w"], wanted["w"], rtol=1e-5)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_states_and_random_numbers_are_those_of_a_loop_over_the_parts(w, batch):
    seen, runs = State({"mean": jnp.zeros(2), "count": jnp.int32(0)}), []

    def loss(x, y):
        runs.append(1)
        noise = R.normal(size=2)
        seen.value = {"mean": 0.9 * seen.value["mean"] + 0.1 * x.mean(0), "count": seen.value["count"] + 1}
        return squares(w, x + noise[None], y).mean() * jnp.sum(seen.value["mean"] ** 2), noise

    gradient = grad(loss, w, has_aux=True, return_value=True)
    parts = [jax.tree.map(lambda a, i=i: a[3 * i : 3 * i + 3], batch) for i in range(4)]
    start = seen.value
    with R.seed_context(7):
        looped = [gradient(*part) for part in parts]
        key = R.get_key_data()
    after, seen.value = seen.value, start
    runs.clear()
    with R.seed_context(7):
        got, value, noise = accumulate(gradient, 4)(*batch)
        np.testing.assert_array_equal(R.get_key_data(), key)
    assert len(runs) == 1
    np.testing.assert_allclose(got["w"], sum(g["w"] for g, *_ in looped) / 4, rtol=1e-5)
    np.testing.assert_allclose(value, sum(v for _, v, _ in looped) / 4, rtol=1e-5)
    np.testing.assert_allclose(noise, jnp.stack([n for *_, n in looped]), rtol=1e-6)
    assert seen.value["count"] == 4
    np.testing.assert_allclose(seen.value["mean"], after["mean"], rtol=1e-6)


def test_differentiated_arguments_are_not_split(w, batch):
    x, y = batch

    def loss(scale, x, y):
        return jnp.mean(squares(w, x * scale[None], y))

    gradient = grad(loss, w, argnums=(0,))
    got, wanted = accumulate(gradient, 3)(jnp.ones(2), x, y), gradient(jnp.ones(2), x, y)
    np.testing.assert_allclose(got[1][0], wanted[1][0], rtol=1e-5)
    np.testing.assert_allclose(got[0]["w"], wanted[0]["w"], rtol=1e-5)
    alone = grad(lambda scale, x: jnp.mean(x * scale))
    np.testing.assert_allclose(accumulate(alone, 3)(2.0, y), jnp.mean(y), rtol=1e-5)


def test_keyword_arguments_are_shared(w, batch):
    gradient = grad(lambda x, y, *, power: jnp.mean(squares(w, x, y) * power), w)
    got = accumulate(gradient, 2)(*batch, power=jnp.arange(1.0, 2.0))
    np.testing.assert_allclose(got["w"], gradient(*batch, power=1.0)["w"], rtol=1e-5)


def test_the_mean_by_weight_is_that_of_a_masked_batch(w, batch):
    mask = jnp.arange(N) % 5 < 3

    def loss(x, y, mask):
        return jnp.sum(squares(w, x, y), where=mask) / mask.sum().astype(jnp.float32)

    gradient = grad(loss, w, return_value=True)
    got, value = accumulate(gradient, 3, weight=lambda x, y, mask: mask.sum())(*batch, mask)
    wanted, expected = gradient(*batch, mask)
    np.testing.assert_allclose(got["w"], wanted["w"], rtol=1e-5)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_methods_and_vector_valued_functions(batch):
    class Model:
        def __init__(self):
            self.w = ParamState(jnp.array([1.0, 2.0]))

        def outputs(self, x):
            return (x * self.w.value[None]).mean(0)

        def step(self, x):
            return accumulate(T.jacrev(self.outputs, self.w), 4)(x)

    np.testing.assert_allclose(Model().step(batch[0]), np.diag(batch[0].mean(0)), rtol=1e-5)


def test_memory_is_that_of_one_part():
    w = ParamState(jnp.eye(64))

    def loss(x):
        h = x
        for _ in range(4):
            h = jnp.tanh(h @ w.value)
        return jnp.mean(h**2)

    x, gradient = jnp.ones((4096, 64)), grad(loss, w)

    def temporaries(f):
        return T.jit(f).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(accumulate(gradient, 16)) < temporaries(gradient) / 6


def test_a_failure_leaves_the_states_as_they_were(w, batch):
    count = State(jnp.int32(0))
    before = count.value

    def loss(x, y):
        count.value = count.value + 1
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        accumulate(grad(loss, w), 3)(*batch)
    assert count.value is before


def gradient_of(w):
    return grad(lambda x, y=None: jnp.sum(w.value["w"]) * jnp.mean(x), w)


MISUSE = {
    "no gradient": (lambda w: accumulate(jnp.sum, 2), StateTypeError, r"takes the result of grad\(\.\.\.\), not"),
    "jit inside": (lambda w: accumulate(T.jit(gradient_of(w)), 2), StateTypeError, "not Jit: put jit around"),
    "steps": (lambda w: accumulate(gradient_of(w), 0), StateValueError, "steps=0: give the number of parts"),
    "steps of another type": (lambda w: accumulate(gradient_of(w), 2.0), StateTypeError, r"steps=2\.0"),
    "reduction": (lambda w: accumulate(gradient_of(w), 2, reduction="max"), StateValueError, "'max' is neither"),
    "weight of a sum": (
        lambda w: accumulate(gradient_of(w), 2, reduction="sum", weight=jnp.sum),
        StateValueError,
        "a weight is for the mean",
    ),
    "remainder": (
        lambda w: accumulate(gradient_of(w), 5)(jnp.ones(3), {"y": jnp.ones(10)}),
        StateValueError,
        r"argument 0 has 3 examples, which do not divide into 5 equal parts",
    ),
    "scalar": (
        lambda w: accumulate(gradient_of(w), 2)(jnp.ones(2), {"y": 1.0}),
        StateTypeError,
        r"argument 1\['y'\] has no axis of examples",
    ),
    "nothing to split": (lambda w: accumulate(gradient_of(w), 2)(x=jnp.ones(2)), StateValueError, "no positional"),
    "weights": (
        lambda w: accumulate(gradient_of(w), 2, weight=lambda x: x)(jnp.ones(4)),
        StateValueError,
        r"one number, not of shape \(2,\)",
    ),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse(case, w):
    call, kind, text = MISUSE[case]
    with pytest.raises(kind, match=text):
        call(w)
