"""``vmap`` and ``map``: lanes, declared axes, reductions, random numbers, and what is refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _unchanged import unchanged
from brainstate import (
    BatchAxisError,
    HiddenState,
    ParamState,
    ShortTermState,
    State,
    StateTypeError,
    StateValueError,
    nn,
)
from brainstate import random as R
from brainstate import transform as T
from transforms import EXACT

XS = jnp.array([1.0, 2.0, 3.0])


def close(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert jnp.shape(a) == jnp.shape(b) and jnp.result_type(a) == jnp.result_type(b)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


class Cell(nn.Module):
    def __init__(self, lanes=3):
        super().__init__()
        self.w = ParamState(jnp.array([0.5, -1.0]), name="w")
        self.h = HiddenState(jnp.zeros((lanes, 2)), name="h")
        self.count = State(jnp.int32(0), name="count")

    def __call__(self, x):
        self.h.value = jnp.tanh(self.w.value * x + self.h.value)
        self.count.value += 1
        return self.h.value.sum()


def twin(w, h, x):
    h = jnp.tanh(w * x + h)
    return h.sum(), h


# ------------------------------------------------------------------------------------------ declared States


DECLARATIONS = {
    "state": lambda c: c.h,
    "list": lambda c: [c.h],
    "dict": lambda c: {"hidden": [c.h]},
    "collection": lambda c: c.states(HiddenState),
    "type": lambda c: HiddenState,
    "filter": lambda c: lambda path, s: s.name == "h",
    "axis": lambda c: {0: c.h},
    "axis and type": lambda c: {0: HiddenState},
    "axis and list": lambda c: {0: [c.h, "no such tag"]},
    "negative": lambda c: {-2: c.h},
}


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "jit"])
@pytest.mark.parametrize("declare", DECLARATIONS.values(), ids=DECLARATIONS)
def test_each_lane_has_its_own(declare, compiled):
    cell = Cell()
    run = T.vmap(cell, in_states=declare(cell))
    run = T.jit(run) if compiled else run
    h = cell.h.value
    with unchanged(cell.w):
        for i in range(2):
            y, h = jax.vmap(twin, (None, 0, 0))(cell.w.value, h, XS)
            close(run(XS), y)
            close(cell.h.value, h)
            assert cell.count.value == i + 1


def test_a_module():
    """All of its States are declared; those that are shared are not."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = HiddenState(jnp.zeros(3)), ShortTermState(jnp.ones(3))

    pair, scale = Pair(), ParamState(jnp.array(2.0))

    def f(x):
        pair.a.value += scale.value * x
        return pair.a.value * pair.b.value

    assert T.vmap(f, in_states=pair)(XS).tolist() == [2.0, 4.0, 6.0]
    assert pair.a.value.tolist() == [2.0, 4.0, 6.0] and pair.b.value.tolist() == [1.0] * 3


@pytest.mark.parametrize(("into", "out_of"), [*itertools.product([0, 1, -1, -2], repeat=2)])
def test_axes_of_states(into, out_of):
    start = jnp.arange(24.0).reshape(2, 3, 4)
    s = State(jnp.moveaxis(start, 0, into), name="s")

    def f(x):
        s.value = s.value * x
        return s.value.sum()

    y = T.vmap(f, in_states={into: s}, out_states={out_of: s})(XS[:2])
    expected = start * XS[:2, None, None]
    close(y, expected.sum((1, 2)))
    close(s.value, jnp.moveaxis(expected, 0, out_of))
    s.value = jnp.moveaxis(start, 0, into)
    T.vmap(f, in_states={into: s})(XS[:2])
    close(s.value, jnp.moveaxis(expected, 0, into))


def test_a_container_in_a_state():
    s = State({"a": jnp.zeros((3, 2)), "b": [jnp.ones(3)]}, name="s")

    def f(x):
        s.value["a"] = s.value["a"] + x
        s.value["b"].append(x)

    T.vmap(f, in_states=s)(XS)
    close(s.value, {"a": jnp.stack([XS, XS], 1), "b": [jnp.ones(3), XS]})


REDUCTIONS = {
    "mean": lambda v: v.mean(0),
    "sum": lambda v: v.sum(0),
    "last": lambda v: v[-1],
    "stack": lambda v: v,
    0: lambda v: v,
    1: lambda v: jnp.moveaxis(v, 0, 1),
    -1: lambda v: jnp.moveaxis(v, 0, -1),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "jit"])
@pytest.mark.parametrize("how", REDUCTIONS)
def test_what_becomes_of_written_values(how, compiled):
    s = State({"v": jnp.zeros(2), "m": [jnp.zeros(2)]}, name="s")

    def f(x):
        s.value = {"v": s.value["v"] + jnp.stack([x, 2 * x]), "m": [jnp.stack([x, x**2])]}
        return x

    run = T.vmap(f, out_states={how: s})
    (T.jit(run) if compiled else run)(XS)
    v, m = jnp.stack([XS, 2 * XS], 1), jnp.stack([XS, XS**2], 1)
    close(s.value, {"v": REDUCTIONS[how](v), "m": [REDUCTIONS[how](m)]})


def test_batch_statistics():
    """A running mean, of which every lane computes its own and the mean is kept."""
    mean = State(jnp.float32(1.0), name="mean")

    def normed(x):
        mean.value = 0.9 * mean.value + 0.1 * x
        return x - mean.value

    T.vmap(normed, out_states={"mean": mean})(XS)
    np.testing.assert_allclose(mean.value, 1.1, rtol=1e-6)


def test_reductions_keep_the_dtype():
    n, h = State(jnp.int8(0), name="n"), State(jnp.float16(0), name="h")

    def f(x):
        n.value, h.value = x.astype(jnp.int8), x.astype(jnp.float16)

    T.vmap(f, out_states={"sum": [n, h]})(XS)
    assert (n.value, n.value.dtype, h.value.dtype) == (6, jnp.int8, jnp.float16)
    T.vmap(f, out_states={"mean": h, "last": n})(XS)
    assert (h.value, h.value.dtype, n.value) == (2.0, jnp.float16, 3)
    with unchanged(n, h), pytest.raises(StateTypeError, match=r"the mean of State 'n' is taken over int8.*'last'"):
        T.vmap(f, out_states={"mean": [n, h]})(XS)


# ------------------------------------------------------------------------------------------ not declared


def test_undeclared_lane_by_lane_writes():
    s, t = State(jnp.zeros(2), name="the activity"), State(jnp.float32(0.0), name="t")

    def f(x):
        t.value += 1.0
        s.value = s.value + x
        return x

    message = r"State 'the activity' was written with a value per lane, float32\[3,2\].*out_states=\{0: \[state\]\}"
    for run in (T.vmap(f), T.jit(T.vmap(f)), T.grad(lambda x: T.vmap(f)(x).sum()), T.vmap(f, out_states={"last": t})):
        with unchanged(s, t), pytest.raises(BatchAxisError, match=message):
            run(XS)


def test_the_same_value_in_all_lanes():
    s, n = State(jnp.float32(0.0)), State(0)

    def f(x):
        n.value += 1
        s.value = jax.lax.psum(x, "i") + s.value
        return s.value * x

    close(T.vmap(f, axis_name="i")(XS), 6.0 * XS)
    assert s.value == 6.0 and n.value == 1
    T.jit(T.vmap(f, axis_name="i"))(XS)
    assert s.value == 12.0 and n.value == 2


def test_a_state_that_is_only_read_is_shared():
    w = ParamState(jnp.arange(3.0), name="w")
    with unchanged(w):
        close(T.vmap(lambda x: w.value.sum() * x)(XS), 3.0 * XS)
        close(T.vmap(lambda x: w.value * x, in_states=w)(XS), XS * jnp.arange(3.0))


# ------------------------------------------------------------------------------------------ as jax.vmap


AXES = {
    "default": ({}, (XS, XS)),
    "none": ({"in_axes": (0, None)}, (XS, jnp.float32(2.0))),
    "list": ({"in_axes": [None, 0]}, (jnp.float32(2.0), XS)),
    "pytree": ({"in_axes": ({"a": 0, "b": None}, 0)}, ({"a": XS, "b": jnp.float32(2.0)}, XS)),
    "negative": ({"in_axes": (-1, 1)}, (jnp.ones((2, 3)), jnp.ones((2, 3)))),
    "out": ({"in_axes": (1, 1), "out_axes": 1}, (jnp.ones((2, 3)), jnp.ones((2, 3)))),
    "out negative": ({"in_axes": (1, 1), "out_axes": -1}, (jnp.ones((2, 3)), jnp.ones((2, 3)))),
    "size": ({"axis_size": 3}, (XS, XS)),
    "only size": ({"axis_size": 3, "in_axes": None}, (jnp.float32(1.0), jnp.float32(2.0))),
    "name": ({"axis_name": "i", "axis_size": 3}, (XS, XS)),
    "spmd": ({"spmd_axis_name": "i", "axis_name": "i"}, (XS, XS)),
}


@pytest.mark.parametrize("case", AXES.values(), ids=AXES)
def test_arguments_are_mapped_as_in_jax(case):
    options, args = case
    w = ParamState(jnp.float32(3.0))

    def f(x, y):
        total = sum(jax.tree.leaves((x, y)), jnp.float32(0.0))
        return total * w.value

    def pure(x, y):
        return sum(jax.tree.leaves((x, y)), jnp.float32(0.0)) * 3.0

    close(T.vmap(f, **options)(*args), jax.vmap(pure, **options)(*args))


def test_keywords_are_mapped_along_axis_zero():
    close(T.vmap(lambda x, *, y: x * y["k"])(XS, y={"k": XS}), XS**2)


def test_outputs_with_axes_of_their_own():
    s = State(jnp.float32(2.0))
    got = T.vmap(lambda x: (x * s.value, {"k": s.value}), out_axes=(1, None))(jnp.ones((3, 2)))
    close(got, (jnp.full((2, 3), 2.0), {"k": jnp.float32(2.0)}))


def test_collectives_know_the_number_of_lanes():
    """Also if only a State says how many there are."""
    for declare in (lambda h: h, lambda h: HiddenState, lambda h: {-1: [h]}):
        h = HiddenState(jnp.arange(3.0), name="h")
        run = T.vmap(lambda h=h: jax.lax.pmean(h.value, "i"), in_states=declare(h), axis_name="i")
        close(run(), jnp.ones(3))
        close(T.vmap(lambda h=h: jax.lax.psum(1, "i") * h.value, in_states=declare(h), axis_name="i")(), 3 * h.value)
        gathered = T.vmap(lambda h=h: jax.lax.all_gather(h.value, "i"), in_states=declare(h), axis_name="i")()
        close(gathered, jnp.tile(h.value, (3, 1)))


def test_only_states_are_mapped():
    h = HiddenState(XS, name="h")
    assert T.vmap(lambda: h.value**2, in_states=h)().tolist() == [1.0, 4.0, 9.0]
    T.vmap(lambda x: setattr(h, "value", h.value + x), in_axes=None, in_states=h)(1.0)
    assert h.value.tolist() == [2.0, 3.0, 4.0]


def test_decorators_and_methods():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.h = ParamState(jnp.float32(2.0)), HiddenState(jnp.zeros(3))

        @T.vmap
        def twice(self, x):
            return self.w.value * x

        @T.vmap(in_axes=(None, 0), in_states=HiddenState)
        def step(self, scale, x):
            """Add."""
            self.h.value += scale * x
            return self.h.value

    m, other = Model(), Model()
    assert m.twice(XS).tolist() == [2.0, 4.0, 6.0]
    assert m.step(2.0, XS).tolist() == [2.0, 4.0, 6.0] == m.h.value.tolist()
    assert other.h.value.tolist() == [0.0] * 3
    assert Model.step.__name__ == "step" and Model.step.__doc__ == "Add."


# ------------------------------------------------------------------------------------------ random numbers


def test_each_lane_draws_its_own_and_the_generator_advances_once():
    rng, alone = R.RandomState(0), R.RandomState(0)
    alone.split_key()
    y = T.vmap(lambda x: rng.normal() + 0.0 * x)(XS)
    assert len(set(y.tolist())) == 3
    assert (rng.value == alone.value).all()
    longer = R.RandomState(0)
    assert (T.vmap(lambda x: longer.normal() + 0.0 * x)(jnp.arange(5.0))[:3] == y).all()
    key, sub = jax.random.split(jax.random.key(0))
    expected = [jax.random.normal(jax.random.split(jax.random.fold_in(sub, i))[1]) for i in range(3)]
    np.testing.assert_allclose(y, expected)
    assert (jax.random.key_data(key) == rng.value).all()


def test_random_numbers_of_nested_lanes_and_of_loops_in_lanes():
    rng = R.RandomState(0)
    draws = [
        T.vmap(lambda x: T.vmap(lambda y: rng.uniform() + 0.0 * y)(jnp.zeros(2)) + 0.0 * x)(XS),
        T.vmap(lambda x: T.for_loop(rng.uniform, length=2) + 0.0 * x)(XS),
        T.for_loop(lambda x: T.vmap(lambda y: rng.uniform() + 0.0 * y)(XS) + 0.0 * x, jnp.zeros(2)),
        T.vmap(lambda x: jnp.stack([rng.uniform(), rng.uniform()]) + 0.0 * x)(XS),
    ]
    assert len({float(d) for part in draws for d in part.ravel()}) == 24


@pytest.mark.parametrize("everything", [..., State, lambda path, s: True])
def test_a_filter_does_not_mean_generators(everything):
    rng, h = R.RandomState(0), HiddenState(jnp.zeros(2))
    before = R.RandomState(0)
    before.split_key()

    def f(x):
        h.value = h.value + x
        return rng.normal() + 0.0 * x

    for options in ({"in_states": everything}, {"in_states": h, "out_states": everything}):
        rng.seed(0)
        y = T.vmap(f, **options)(XS[:2])
        assert y[0] != y[1] and (rng.value == before.value).all() and h.value.shape == (2,)


def test_a_generator_with_a_key_per_lane():
    rng = R.RandomState(0)
    rng.self_assign_multi_keys(3)
    keys = rng.value
    y = T.vmap(rng.normal, in_states=rng)()
    expected = jax.vmap(lambda k: jax.random.normal(jax.random.split(jax.random.wrap_key_data(k))[1]))(keys)
    np.testing.assert_allclose(y, expected)
    assert rng.value.shape == (3, 2) and not (rng.value == keys).any()
    rng.restore_key()
    z = T.vmap(lambda x: rng.normal() + 0.0 * x, out_states=rng)(XS)
    assert rng.value.shape == (3, 2) and len(set(z.tolist())) == 3


@pytest.mark.parametrize("draw", [False, True])
def test_a_seed_in_a_lane_is_kept(draw):
    """It replaces what the lanes drew from, as it does outside; the other way round, the seed is drawn from."""
    rng, other = R.RandomState(0), R.RandomState(7)

    def f(x):
        y = rng.normal() if draw else 0.0
        rng.seed(7)
        return y + 0 * x

    y = T.vmap(f)(XS)
    assert (rng.value == other.value).all() and len(set(y.tolist())) == (3 if draw else 1)
    other.normal()
    T.vmap(lambda x: (rng.seed(7), rng.normal() + x)[1])(XS)
    assert (rng.value == other.value).all()


def test_a_seed_for_each_lane_is_an_error():
    rng = R.RandomState(0)

    def f(x):
        y = rng.normal()
        rng.seed(x)
        return y

    with unchanged(rng), pytest.raises(BatchAxisError, match=r"RandomState.*was written with a value per lane"):
        T.vmap(f)(jnp.arange(3))


# ------------------------------------------------------------------------------------------ States made inside


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_new_states_come_out_with_lanes(axis):
    made = []

    def build(x):
        made.append(HiddenState(jnp.stack([x, 2 * x]), name="new"))
        made.append(State(jnp.zeros(2)))
        return made[0].value.sum()

    y = T.vmap_new_states(build, axis=axis)(XS)
    close(y, 3 * XS)
    close(made[0].value, jnp.moveaxis(jnp.stack([XS, 2 * XS], 1), 0, axis))
    close(made[1].value, jnp.moveaxis(jnp.zeros((3, 2)), 0, axis))
    del made[:]
    T.vmap(build, out_states={1: HiddenState})(XS)
    assert made[0].value.shape == (2, 3) and made[1].value.shape == (3, 2)


def test_an_ensemble():
    """Models made in lanes are run in lanes: each has weights of its own."""
    models = []

    def build(x):
        models.append(nn.Linear(2, 3))
        return x

    R.seed(0)
    T.vmap_new_states(build, axis_size=4, in_axes=None)(0.0)
    (model,) = models
    assert model.weight.value.shape == (4, 2, 3) and len(np.unique(model.weight.value)) == 24
    y = T.vmap(model, in_states=model, in_axes=None)(jnp.ones(2))
    close(y, model.weight.value.sum(1))


def test_a_state_of_one_lane_only():
    def f(x):
        inner = State(x)
        inner.value = inner.value * 2
        return inner.value

    close(T.vmap(f)(XS), 2 * XS)


# ------------------------------------------------------------------------------------------ derivatives


def test_gradients_in_lanes():
    w, n = ParamState(jnp.array([1.0, 2.0]), name="w"), State(0)

    def loss(x):
        n.value += 1
        return (w.value**2 * x).sum()

    close(T.vmap(T.grad(loss, w))(XS), 2 * jnp.outer(XS, w.value))
    close(T.vmap(T.grad(loss, w, argnums=0))(XS), (2 * jnp.outer(XS, w.value), jnp.full(3, 5.0)))
    assert n.value == 2


@pytest.mark.parametrize("row", EXACT.values(), ids=str)
def test_derivatives_around_lanes(row):
    cell, runs = Cell(), []

    def loss(x):
        runs.append(1)
        return T.vmap(cell, in_states=cell.h)(x).sum()

    got = row.derive(loss, [cell.w], argnums=0)(XS)
    pure = row.jax(lambda d: jax.vmap(twin, (None, 0, 0))(d[0][0], jnp.zeros((3, 2)), d[1])[0].sum())
    expected = pure(([jnp.array([0.5, -1.0])], XS))
    close(got, expected)
    assert runs == [1] and cell.count.value == 1


def test_gradient_of_a_state_with_lanes():
    cell = Cell()
    g = T.grad(lambda: T.vmap(cell, in_states=cell.h)(XS).sum(), cell.h)()
    close(g, jax.grad(lambda h: jax.vmap(twin, (None, 0, 0))(cell.w.value, h, XS)[0].sum())(jnp.zeros((3, 2))))


def test_nested_lanes():
    s = State(jnp.zeros((2, 3)), name="s")

    def f(x, y):
        s.value = s.value + x * y
        return s.value

    inner = T.vmap(f, in_axes=(None, 0), in_states=s)
    T.vmap(inner, in_axes=(0, None), in_states=s)(XS[:2], XS)
    close(s.value, jnp.outer(XS[:2], XS))


# ------------------------------------------------------------------------------------------ the same program


@pytest.mark.parametrize("axis", [0, 1])
def test_jaxpr_of_stateful_lanes(axis):
    w, h = ParamState(jnp.ones(2), name="w"), HiddenState(jnp.moveaxis(jnp.zeros((3, 2)), 0, axis), name="h")

    def f(x):
        h.value = jnp.tanh(w.value * x + h.value)
        return h.value.sum()

    def by_hand(values, x):
        w, h = values

        def lane(x, h):
            h = jnp.tanh(w * x + h)
            return h.sum(), h

        return jax.vmap(lane, (0, axis), (0, axis))(x, h)

    jaxpr, states = T.make_jaxpr(T.vmap(f, in_states={axis: h}))(XS)
    assert states.reads == (w, h) and states.writes == (h,)
    assert str(jaxpr) == str(jax.make_jaxpr(by_hand)([w.value, h.value], XS))


# ------------------------------------------------------------------------------------------ map


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 5, 7])
def test_map(batch_size):
    w, n, rng, runs = ParamState(jnp.float32(2.0)), State(0), R.RandomState(0), []

    def f(x, y):
        runs.append(1)
        n.value += 1
        return x * w.value + y["k"], rng.normal()

    xs = jnp.arange(5.0)
    (y, noise) = T.map(f, xs, {"k": xs}, batch_size=batch_size)
    close(y, 3.0 * xs)
    assert len(set(noise.tolist())) == 5 and len(runs) == 1
    calls = {None: 5, 1: 5, 2: 3, 3: 2, 5: 1, 7: 1}[batch_size]
    assert n.value == calls
    close(T.map(lambda x: x + 1, jnp.zeros((0, 2)), batch_size=batch_size), jnp.zeros((0, 2)))


def test_map_without_batches_carries_states():
    s = State(jnp.float32(0.0), name="s")
    assert T.map(lambda x: (setattr(s, "value", s.value + x), s.value)[1], XS).tolist() == [1.0, 3.0, 6.0]
    with unchanged(s), pytest.raises(BatchAxisError, match="State 's'"):
        T.map(lambda x: setattr(s, "value", s.value + x), XS, batch_size=2)
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(StateValueError if wrong in (0, -1) else StateTypeError, match=r"batch_size=.*int from 1"):
            T.map(lambda x: x, XS, batch_size=wrong)
