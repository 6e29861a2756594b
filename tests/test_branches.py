"""``cond``, ``switch``, ``ifelse``: whichever branch is taken, its writes arrive, and nobody else's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _unchanged import unchanged
from brainstate import HiddenState, ParamState, State, StateTypeError, StateValueError
from brainstate import random as R
from brainstate import transform as T


def close(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert jnp.shape(a) == jnp.shape(b) and jnp.result_type(a) == jnp.result_type(b)
        np.testing.assert_allclose(a, b, rtol=1e-6)


class Branches:
    """Three functions that read one State, write different ones, and draw different numbers of times."""

    def __init__(self):
        self.w = ParamState(jnp.float32(0.5), name="w")
        self.a = State(jnp.float32(1.0), name="a")
        self.b = State({"n": jnp.int32(0), "x": jnp.float32(0.0)}, name="b")
        self.rng = R.RandomState(5)
        self.runs = []
        self.functions = (self.first, self.second, self.third)

    def first(self, x):
        self.runs.append(0)
        self.a.value = self.a.value + self.w.value * x
        return self.a.value**2

    def second(self, x):
        self.runs.append(1)
        b = self.b.value
        b["n"] = b["n"] + 1
        b["x"] = x + self.rng.normal() + self.rng.normal()
        return self.w.value * b["x"]

    def third(self, x):
        self.runs.append(2)
        return x * self.a.value

    def values(self):
        return {"w": self.w.value, "a": self.a.value, "b": dict(self.b.value), "rng": jnp.asarray(self.rng.value)}


def twin(which, v, x):
    if which == 0:
        a = v["a"] + v["w"] * x
        return a**2, {**v, "a": a}
    if which == 1:
        key, noise = v["rng"], 0.0
        for _ in range(2):
            key, sub = jax.random.split(jax.random.wrap_key_data(key))
            key, noise = jax.random.key_data(key), noise + jax.random.normal(sub)
        return v["w"] * (x + noise), {**v, "b": {"n": v["b"]["n"] + 1, "x": x + noise}, "rng": key}
    return x * v["a"], v


CALLS = {
    "cond": lambda f, i, x: T.cond(i == 0, f[0], f[1], x),
    "cond number": lambda f, i, x: T.cond(1.5 * (1 - i), f[0], f[1], x),
    "switch": lambda f, i, x: T.switch(i, f, x),
    "ifelse": lambda f, i, x: T.ifelse([i == 0, i == 1, i == 2], f, x),
    "ifelse else": lambda f, i, x: T.ifelse([i == 0, i == 1, True], f, x),
    "nested": lambda f, i, x: T.cond(i == 2, f[2], lambda x: T.cond(i == 0, f[0], f[1], x), x),
}


@pytest.mark.crossing
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "jit"])
@pytest.mark.parametrize("name", CALLS)
def test_each_branch_is_the_twin(name, compiled):
    s = Branches()
    call = CALLS[name]
    step = T.jit(lambda i, x: call(s.functions, i, x)) if compiled else lambda i, x: call(s.functions, i, x)
    for which in range(2 if name.startswith("cond") else 3):
        before, s.runs[:] = s.values(), []
        expected, values = twin(which, before, 0.3)
        close(step(jnp.array(which), 0.3), expected)
        close(s.values(), values)
        assert len(set(s.runs)) == len(s.runs) and not (compiled and which and s.runs)


@pytest.mark.parametrize("transform", [T.grad, T.jacrev, T.jacfwd])
@pytest.mark.parametrize("which", range(3))
def test_derivatives_around_a_branch(transform, which):
    s = Branches()
    v = s.values()

    def pure(diff):
        return twin(which, {**v, "w": diff[0]["w"], "a": diff[0]["a"]}, diff[1])

    got = transform(lambda x: T.switch(which, s.functions, x), {"w": s.w, "a": s.a}, argnums=0)(0.3)
    expected, values = jax.jacrev(pure, has_aux=True)(({"w": v["w"], "a": v["a"]}, 0.3))
    close(got, expected)
    close(s.values(), values)
    assert sorted(s.runs) == [0, 1, 2]


def test_a_derivative_inside_a_branch():
    s = Branches()

    def descend(x):
        g = T.grad(lambda: s.first(x), s.w)()
        s.w.value = s.w.value - 0.1 * g
        return g

    assert T.cond(True, descend, lambda x: jnp.array(0.0), 2.0) == 8.0  # 2 (a + w x) x
    np.testing.assert_allclose(s.w.value, 0.5 - 0.8, rtol=1e-6)
    assert s.a.value == 2.0


@pytest.mark.parametrize(("index", "taken"), [(-5, 0), (0, 0), (2, 2), (9, 2), (np.int8(1), 1)])
def test_the_index_is_clamped(index, taken):
    out = State(jnp.array(-1))

    def at(i):
        def f():
            out.value = jnp.array(i)

        return f

    T.switch(index, [at(i) for i in range(3)])
    assert out.value == taken


def test_a_single_branch_is_called_directly():
    s = State(jnp.array(1.0))
    assert T.switch(7, [lambda text: text.upper()], "text") == "TEXT"
    T.ifelse([True], [lambda: setattr(s, "value", s.value + 1)])
    assert s.value == 2.0


def test_a_state_that_every_branch_writes_need_not_have_a_value_of_that_kind():
    s = State(None, name="s")
    T.cond(True, lambda: setattr(s, "value", jnp.ones(2)), lambda: setattr(s, "value", jnp.zeros(2)))
    assert s.value.tolist() == [1.0, 1.0]


def test_numbers_without_a_dtype():
    s = State(1.0)
    T.cond(True, lambda: setattr(s, "value", jnp.float32(2.0)), lambda: None)
    assert s.value == 2.0
    T.cond(False, lambda: setattr(s, "value", 3.0), lambda: setattr(s, "value", s.value * 2))
    assert s.value == 4.0
    with (
        unchanged(s),
        pytest.raises(StateTypeError, match=r"is int32\[\] after branch 0 and float32\[\] where no branch"),
    ):
        T.cond(True, lambda: setattr(s, "value", 3), lambda: None)


def test_a_state_that_lives_in_a_branch_only():
    def f(x):
        inner = State(x)
        inner.value = inner.value * 2
        return inner.value

    assert T.cond(True, f, lambda x: x, 3.0) == 6.0


def test_a_state_that_outlives_its_branch():
    made = []

    def f(x):
        made.append(State(x, name="born"))
        return x

    with pytest.raises(StateValueError, match=r"State 'born' is created inside cond and outlives it.*Create it before"):
        T.cond(True, f, lambda x: x, 3.0)


def test_branches_in_lanes():
    """A predicate per lane computes both, and each lane has its own."""
    h = HiddenState(jnp.zeros(4), name="h")

    def cell(x):
        T.cond(x > 1.0, lambda: setattr(h, "value", h.value + x), lambda: None)
        return h.value

    T.vmap(cell, in_states=h)(jnp.arange(4.0))
    assert h.value.tolist() == [0.0, 0.0, 2.0, 3.0]


def test_without_jit():
    s = Branches()
    with jax.disable_jit():
        v = s.values()
        for which in range(3):
            expected, v = twin(which, v, 0.3)
            close(T.switch(which, s.functions, 0.3), expected)
            close(s.values(), v)
        assert s.runs == [0, 1, 2]
        with unchanged(s.a), pytest.raises(ZeroDivisionError):
            T.cond(True, lambda: (s.first(1.0), 1 / 0), lambda: (1.0, 1.0))


def test_conditions_that_do_not_exclude_each_other():
    s = State(jnp.array(0), name="s")
    branches = [lambda i=i: setattr(s, "value", jnp.array(i)) for i in range(3)]
    for flags in ([False] * 3, [True, True, False], [True, True, True]):
        with unchanged(s), pytest.raises(StateValueError, match="exactly one has to be true"):
            T.ifelse(flags, branches)
    T.ifelse([False, 2, True], branches, check_cond=False)
    assert s.value == 1
    T.ifelse([False] * 3, branches, check_cond=False)
    assert s.value == 2
    run = T.jit(lambda x: T.ifelse([x < 0, x > 0], [lambda: 1, lambda: 2]))
    assert run(1.0) == 2
    with pytest.raises(Exception, match="exactly one has to be true"):
        run(0.0)
        jax.effects_barrier()


def test_jaxpr_of_a_stateful_cond():
    a, b, w = State(jnp.float32(1.0)), State(jnp.float32(2.0)), ParamState(jnp.float32(3.0))

    def ours(p, x):
        def yes(x):
            a.value = a.value * x
            return w.value * x

        def no(x):
            b.value = b.value + x
            return x

        return T.cond(p, yes, no, x)

    def by_hand(values, p, x):
        a, w, b = values

        def yes(x):
            new = a * x
            return w * x, new, b

        def no(x):
            return x, a, b + x

        return jax.lax.cond(p, yes, no, x)

    p, x = jnp.array(True), jnp.float32(1.0)
    jaxpr, states = T.make_jaxpr(ours)(p, x)
    assert states.reads == (a, w, b) and states.writes == (a, b)
    assert str(jaxpr) == str(jax.make_jaxpr(by_hand)([s.value for s in states.reads], p, x))
