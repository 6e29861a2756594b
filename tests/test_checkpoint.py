"""``checkpoint``: the same results, one run, one commit, the same draw in the replay, and what is saved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _unchanged import unchanged
from brainstate import HiddenState, ParamState, ShortTermState, State, StateValueError, nn
from brainstate import random as R
from brainstate import transform as T

POLICIES = {
    "none": None,
    "everything": jax.checkpoint_policies.everything_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "states": T.save_states(HiddenState),
    "tag": T.save_states("keep"),
    "all": T.save_states(...),
}


class Layer:
    def __init__(self):
        self.w = ParamState(jnp.array([0.3, -0.7]), name="w")
        self.h = HiddenState(jnp.array([0.1, 0.2]), name="h", tag="keep")
        self.log = State({"n": jnp.array(0)}, name="log")
        self.rng = R.RandomState(jax.random.key(2, impl="unsafe_rbg"))  # quickly compiled
        self.runs = 0

    def __call__(self, x):
        self.runs += 1
        self.h.value = jnp.tanh(self.w.value * self.h.value + x)
        self.log.value["n"] = self.log.value["n"] + 1
        return jnp.sin(self.h.value * self.rng.normal(size=2)).sum()

    def values(self):
        return self.h.value, dict(self.log.value), self.rng.value


CASES = [(name, T.grad) for name in POLICIES] + [(name, t) for name in ("none", "tag") for t in (T.jacfwd, T.hessian)]


@pytest.mark.crossing
@pytest.mark.parametrize(("name", "transform"), CASES)
def test_the_same_as_without(name, transform):
    policy = POLICIES[name]
    plain, layer = Layer(), Layer()
    expected = transform(plain, [plain.w, plain.h], argnums=0)(0.5)
    got = transform(T.checkpoint(layer, policy=policy), [layer.w, layer.h], argnums=0)(0.5)
    for a, b in zip(jax.tree.leaves((got, layer.values())), jax.tree.leaves((expected, plain.values())), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert layer.runs == 1 and layer.log.value["n"] == 1


def test_without_a_derivative():
    layer, plain = Layer(), Layer()
    assert T.remat is T.checkpoint
    np.testing.assert_allclose(T.jit(T.checkpoint(layer))(0.5), plain(0.5), rtol=1e-6)
    assert (layer.rng.value == plain.rng.value).all()


# ------------------------------------------------------------------------------------------ what is saved


def recomputed(policy):
    """Return how many sines and logarithms a gradient computes."""
    h, g = HiddenState(jnp.ones(3), name="h"), ShortTermState(jnp.ones(3), name="g", tag="slow")

    def block(x):
        h.value = jnp.sin(x)
        g.value = jnp.log(h.value + 2.0)
        return jnp.cos(g.value).sum()

    jaxpr, _ = T.make_jaxpr(T.grad(T.checkpoint(block, policy=policy)))(jnp.ones(3))
    counts = {"sin": 0, "log": 0}

    def count(jaxpr):
        for e in jaxpr.eqns:
            counts[e.primitive.name] = counts.get(e.primitive.name, 0) + 1
            for part in jax.tree.leaves(list(e.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
                if hasattr(part, "eqns"):
                    count(part)

    count(jaxpr)
    return counts["sin"], counts["log"]


def test_states_save_what_they_were_written_with():
    """The derivatives are cos(x), 1 / (h + 2) and sin(g): h and g are needed again."""
    assert recomputed(jax.checkpoint_policies.nothing_saveable) == (3, 2)
    assert recomputed(jax.checkpoint_policies.everything_saveable) == (2, 1)
    assert recomputed(T.save_states("no such tag")) == (3, 2)
    assert recomputed(T.save_states(HiddenState)) == (2, 2)
    assert recomputed(T.save_states("slow")) == (3, 1)
    assert recomputed(T.save_states((HiddenState, "slow"))) == (2, 1)


def test_memory():
    """A loop whose body is checkpointed keeps the States it is told to, and only those."""

    def bytes_of(policy):
        w, h = ParamState(jnp.ones(256)), HiddenState(jnp.ones(256))
        body = T.checkpoint(lambda x: _deep(w, h, x), policy=policy)

        def loss():
            return T.for_loop(body, jnp.ones(64)).sum()

        return T.jit(T.grad(loss, w)).lower().compile().memory_analysis().temp_size_in_bytes

    nothing = bytes_of(None)
    everything = bytes_of(jax.checkpoint_policies.everything_saveable)
    saved = bytes_of(T.save_states(HiddenState))
    assert nothing <= saved < everything / 2


def _deep(w, h, x):
    y = h.value * x
    for _ in range(6):
        y = jnp.tanh(w.value * jnp.sin(y))
    h.value = y
    return y.sum()


def test_a_value_that_is_no_array_is_not_named():
    h = HiddenState(jnp.ones(2))
    note = State({"x": jnp.ones(()), "n": 1}, tag="keep")

    def f(x):
        note.value = {"x": x, "n": note.value["n"] + 1}
        return (h.value * x).sum()

    assert T.grad(T.checkpoint(f, policy=POLICIES["tag"]))(2.0) == 2.0
    assert note.value == {"x": 2.0, "n": 2}


# ------------------------------------------------------------------------------------------ how it is called


def test_methods_and_arguments_that_are_no_arrays():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.calls = ParamState(jnp.array(2.0)), State(jnp.array(0))

        @T.checkpoint
        def __call__(self, x, mode="sin", *, scale=1.0):
            self.calls.value += 1
            return getattr(jnp, mode)(self.w.value * x) * scale

        @functools.partial(T.checkpoint, static_argnums=(1,))
        def power(self, x, n):
            return self.w.value * x ** (2 if n > 1 else 1)

        @T.checkpoint(prevent_cse=False)
        def plain(self, x):
            return self.w.value * x

    m = Model()
    np.testing.assert_allclose(T.grad(m, m)(0.5)[("w",)], 0.5 * np.cos(1.0), rtol=1e-6)
    np.testing.assert_allclose(T.grad(lambda x: m(x, "cos", scale=3.0))(0.5), -6 * np.sin(1.0), rtol=1e-6)
    assert m.calls.value == 2
    assert T.grad(m.power)(3.0, 2) == 12.0 and T.grad(m.power)(3.0, 1) == 2.0
    assert T.grad(m.plain)(3.0) == 2.0
    with pytest.raises(StateValueError, match=r"static_argnums=\(2,\) names argument 2 of 1 positional"):
        T.checkpoint(lambda x: x, static_argnums=(2,))(1.0)


def test_a_static_argument_steers_python():
    seen = State(jnp.array(0.0))

    def f(x, deep):
        seen.value = x
        return jnp.sin(x) if deep else x

    run = T.checkpoint(f, static_argnums=1)
    assert T.grad(run)(1.0, False) == 1.0
    np.testing.assert_allclose(T.grad(run)(1.0, True), np.cos(1.0), rtol=1e-6)
    assert T.grad(T.checkpoint(f, static_argnums=-1))(1.0, False) == 1.0


def test_a_failure_changes_nothing():
    layer = Layer()

    def f(x):
        layer(x)
        raise ZeroDivisionError

    with unchanged(layer.h, layer.log, layer.rng), pytest.raises(ZeroDivisionError):
        T.grad(T.checkpoint(f))(1.0)


def test_a_state_made_inside():
    made = []

    def f(x):
        made.append(State(x * 2.0))
        return made[-1].value ** 2

    assert T.grad(T.checkpoint(f))(1.0) == 8.0
    assert made[0].value == 2.0
