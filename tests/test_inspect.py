"""Looking without running: shapes, jaxprs, checks inside compiled code, progress, and States made on the way."""

import gc
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify as jax_checkify
from jax.extend.core import jaxpr_as_fun

from _unchanged import unchanged
from brainstate import HiddenState, ParamState, State, nn
from brainstate import random as R
from brainstate import transform as T

# ------------------------------------------------------------------------------------------ eval_shape


class Big(nn.Module):
    def __init__(self, n, act=jnp.tanh):
        super().__init__()
        self.layers = [nn.Linear(n, n) for _ in range(3)]
        self.seen = State({"n": 0, "last": jnp.zeros((n, n))})
        self.act = act

    def __call__(self, x):
        for layer in self.layers:
            x = self.act(layer(x))
        self.seen.value = {"n": self.seen.value["n"] + 1, "last": self.seen.value["last"]}
        return x


def test_a_model_without_memory():
    """Three weights of 10^10 numbers each."""
    with R.seed_context(0):
        before = R.get_key_data()
        model = T.eval_shape(Big, 100_000, act=jnp.sin)
        assert (R.get_key_data() == before).all()
    shapes = {path: state.value for path, state in model.states(ParamState).items()}
    assert shapes["layers", 0, "weight"] == jax.ShapeDtypeStruct((100_000, 100_000), jnp.float32)
    assert len(shapes) == 6 and model.act is jnp.sin
    assert model.seen.value["last"].shape == (100_000, 100_000)
    assert model.layers[0].in_size == (100_000,)


def test_shapes_of_a_call_change_nothing():
    model = Big(3)
    x = jax.ShapeDtypeStruct((5, 3), jnp.float32)
    with unchanged(*model.states().values()):
        assert T.eval_shape(model, x) == x
        out = T.eval_shape(lambda x, text, k: {"y": model(x), "t": text * k}, jnp.ones((5, 3)), "text", 2)
    assert out == {"y": x, "t": "texttext"}


def test_shapes_inside_transforms():
    model = Big(3)

    def f(x):
        shape = T.eval_shape(model, x).shape
        return x.sum() * shape[0]

    with unchanged(*model.states().values()):
        assert T.jit(f)(jnp.ones((5, 3))) == 75.0
        assert T.grad(f)(jnp.ones((5, 3))).sum() == 75.0


# ------------------------------------------------------------------------------------------ make_jaxpr


def test_order_of_inputs_and_outputs():
    a, b = State({"x": jnp.ones(2), "y": jnp.ones(3)}, name="a"), State(jnp.float32(1.0), name="b")
    c = State(jnp.ones(4), name="c")

    def f(p, q):
        b.value = p["k"] + b.value
        c.value = jnp.full(5, q)
        return a.value["x"] * q, {"r": a.value["y"]}

    with unchanged(a, b, c):
        jaxpr, states, shapes = T.make_jaxpr(f, return_shape=True)({"k": jnp.float32(2.0)}, 3.0)
    assert states.reads == (b, a) and states.writes == (b, c)
    assert [v.aval.shape for v in jaxpr.jaxpr.invars] == [(), (2,), (3,), (), ()]
    assert [v.aval.shape for v in jaxpr.jaxpr.outvars] == [(2,), (3,), (), (5,)]
    assert shapes == (jax.ShapeDtypeStruct((2,), jnp.float32), {"r": jax.ShapeDtypeStruct((3,), jnp.float32)})
    inputs = [*jax.tree.leaves([s.value for s in states.reads]), 2.0, 3.0]
    x, y, new_b, new_c = jaxpr_as_fun(jaxpr)(*map(jnp.float32, inputs))
    assert x.tolist() == [3.0, 3.0] and y.tolist() == [1.0] * 3 and new_b == 3.0 and new_c.tolist() == [3.0] * 5


def test_jaxpr_with_arguments_that_are_no_arrays():
    runs = []

    def f(x, mode, *, scale):
        runs.append(mode)
        return getattr(jnp, mode)(x) * scale

    jaxpr, states = T.make_jaxpr(f)(1.0, "sin", scale=jnp.float32(2.0))
    assert jaxpr.eqns[0].primitive.name == "sin" and len(jaxpr.jaxpr.invars) == 2
    assert states == ((), ()) and runs == ["sin"]


# ------------------------------------------------------------------------------------------ checkify


@pytest.mark.parametrize("around", [lambda f: f, T.jit, lambda f: T.jit(lambda x: T.for_loop(f, jnp.stack([x, x])))])
def test_checks(around):
    level = State(jnp.float32(5.0), name="level")

    def drain(x):
        level.value -= x
        jax_checkify.check(level.value >= 0.0, "empty by {v}", v=level.value)
        return 2 * level.value

    run = T.checkify(around(drain))
    error, y = run(jnp.float32(1.0))
    error.throw()
    assert error.get() is None and (y >= 6.0).all()
    before = level.value
    error, _ = run(jnp.float32(10.0))
    assert "empty by" in error.get() and level.value < before
    with pytest.raises(jax_checkify.JaxRuntimeError, match="empty"):
        error.throw()


def test_checks_of_jax_and_inside_jit():
    s = State(jnp.float32(0.0))

    def f(x):
        s.value = x
        return jnp.log(x) / x

    run = T.jit(T.checkify(f, errors=jax_checkify.float_checks | jax_checkify.user_checks))
    assert run(1.0)[0].get() is None and s.value == 1.0
    assert "nan" in run(-1.0)[0].get() and s.value == -1.0


# ------------------------------------------------------------------------------------------ the progress bar


pytest.importorskip("tqdm")


@pytest.fixture
def shown(capsys):
    """Return what was written to the terminal since the last call."""

    def read():
        jax.effects_barrier()
        return capsys.readouterr().err

    return read


def _body(c, x):
    return c + x, c


LOOPS = {
    "scan": lambda p, n: T.scan(_body, 0.0, jnp.ones(n), pbar=p)[0],
    "reverse": lambda p, n: T.scan(_body, 0.0, jnp.ones(n), reverse=True, pbar=p)[0],
    "length": lambda p, n: T.scan(lambda c, _: (c + 1.0, None), 0.0, length=n, pbar=p)[0],
    "for_loop": lambda p, n: T.for_loop(lambda x: x, jnp.ones(n), pbar=p).sum(),
    "checkpointed": lambda p, n: T.checkpointed_scan(_body, 0.0, jnp.ones(n), pbar=p)[0],
    "checkpointed for_loop": lambda p, n: T.checkpointed_for_loop(lambda x: x, jnp.ones(n), pbar=p).sum(),
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_progress(loop, shown):
    n = 30
    run = T.jit(lambda: loop(T.ProgressBar(freq=7, desc="loop"), n))
    for _ in range(2):
        assert run() == n
        out = shown()
        assert "loop" in out and "30/30" in out and "100%" in out


def test_progress_without_compilation_around(shown):
    assert T.scan(_body, 0.0, jnp.ones(1000), pbar=T.ProgressBar())[0] == 1000.0
    assert "1000/1000" in shown()
    assert T.scan(_body, 0.0, jnp.ones(0), pbar=T.ProgressBar())[0] == 0.0
    assert not shown()
    with jax.disable_jit():
        T.scan(_body, 0.0, jnp.ones(3), pbar=T.ProgressBar())
    assert "3/3" in shown()


@pytest.mark.parametrize(
    "around",
    [
        lambda f: lambda: T.grad(f)(1.0),
        lambda f: lambda: T.jit(T.grad(f))(1.0),
        lambda f: lambda: T.vmap(f)(jnp.ones(3)),
        lambda f: lambda: T.grad(T.checkpoint(f))(1.0),
        lambda f: lambda: T.jit(T.vmap(T.grad(f)))(jnp.ones(3)),
    ],
    ids=["grad", "jit grad", "vmap", "checkpoint", "jit vmap grad"],
)
def test_progress_under_transforms(around, shown):
    s = HiddenState(jnp.float32(0.0))

    def f(x):
        def body(t):
            s.value = jnp.float32(0.5) * jax.lax.stop_gradient(t)
            return jnp.sin(x * t)

        return T.for_loop(body, jnp.ones(20), pbar=T.ProgressBar(freq=5)).sum()

    around(f)()
    assert "20/20" in shown()


def test_progress_calls_back_rarely(monkeypatch):
    from brainstate.transform._control import progress as _progress

    calls = []
    monkeypatch.setattr(_progress._Bar, "move", lambda self, done: calls.append(int(done)))
    T.scan(_body, 0.0, jnp.ones(5000), pbar=T.ProgressBar())
    jax.effects_barrier()
    assert calls == list(range(50, 5001, 50))
    calls.clear()
    T.scan(_body, 0.0, jnp.ones(10), pbar=T.ProgressBar(freq=4))
    jax.effects_barrier()
    assert calls == [4, 8, 10]


def test_progress_without_tqdm(monkeypatch):
    """The error comes where the loop is called, not from inside the compiled program."""
    for name in ("tqdm", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="tqdm"):
        T.scan(_body, 0.0, jnp.ones(3), pbar=T.ProgressBar())


# ------------------------------------------------------------------------------------------ States made on the way


class Lazy(nn.Module):
    """Makes its weight when it sees its first input."""

    def __init__(self):
        super().__init__()
        self.calls = State(jnp.int32(0))
        self.runs = 0

    def __call__(self, x):
        self.runs += 1
        if not hasattr(self, "w"):
            self.w = ParamState(R.normal(size=x.shape))
        self.calls.value += 1
        return (self.w.value * x).sum()


def test_lazy_initialisation_in_jit():
    model = Lazy()
    run = T.jit(model)
    with R.seed_context(0):
        expected = R.normal(size=(3,))
    with R.seed_context(0):
        first = run(jnp.ones(3))
    np.testing.assert_allclose(model.w.value, expected)
    np.testing.assert_allclose(first, expected.sum(), rtol=1e-6)
    model.w.value = jnp.full(3, 2.0)
    assert run(jnp.ones(3)) == 6.0
    assert model.calls.value == 2 and set(model.states()) == {("calls",), ("w",)}
    runs = model.runs
    model.w.value = jnp.full(3, 3.0)
    assert run(jnp.ones(3)) == 9.0 and model.runs == runs


@pytest.mark.parametrize("around", [T.grad, T.checkpoint, T.checkify, lambda f: T.jit(T.grad(f)), T.jacrev])
def test_lazy_initialisation_elsewhere(around):
    model = Lazy()
    run = around(model)
    run(jnp.ones(3))
    assert isinstance(model.w.value, jax.Array) and model.w.value.shape == (3,) and model.calls.value == 1
    model.w.value = jnp.full(3, 2.0)
    out = run(jnp.ones(3))
    out = out[1] if isinstance(out, tuple) else out
    assert np.sum(out) == 6.0 and model.calls.value == 2


def test_lazy_initialisation_in_lanes():
    model = Lazy()
    T.vmap(model)(jnp.ones((4, 3)))
    assert model.w.value.shape == (4, 3) and len(np.unique(model.w.value)) == 12


def test_collections_made_inside():
    """A dictionary of States that grows while it is traced."""
    table = {}

    def look(key, x):
        if key not in table:
            table[key] = State(jnp.zeros(()), name=key)
        table[key].value += x
        return table[key].value

    run = T.jit(look, static_argnums=0)
    assert [float(run(k, 1.0)) for k in ("a", "b", "a", "b", "a")] == [1.0, 1.0, 2.0, 2.0, 3.0]
    assert {k: float(s.value) for k, s in table.items()} == {"a": 3.0, "b": 2.0}


def test_a_state_that_dies_leaves_nothing():
    def f(x):
        inner = [State(x), State(2 * x)]
        inner.append(inner)  # a cycle
        return inner[0].value + inner[1].value

    T.grad(f)(1.0)
    for run in (T.jit(f), T.vmap(f), T.checkpoint(f), lambda x: T.for_loop(f, x)):
        run(jnp.ones(2))
    gc.collect()
    jaxpr, states = T.make_jaxpr(f)(1.0)
    assert states == ((), ()) and len(jaxpr.jaxpr.outvars) == 1


def test_a_state_that_was_made_for_other_arguments():
    """What one trace left behind and another does not use is no reason to make States anew at each call."""
    table, runs = {}, []

    def look(x):
        runs.append(1)
        if x.shape not in table:
            table[x.shape] = State(jnp.zeros(x.shape))
        table[x.shape].value += x
        return table[x.shape].value.sum()

    run = T.jit(look)
    sizes = [1, 2, 3, 1, 2, 3, 1, 2, 3]
    assert [float(run(jnp.ones(n))) for n in sizes] == [1.0, 2.0, 3.0, 2.0, 4.0, 6.0, 3.0, 6.0, 9.0]
    traced = len(runs)
    assert [float(run(jnp.ones(n))) for n in (1, 2, 3)] == [4.0, 8.0, 12.0] and len(runs) == traced


def test_named_scopes_reach_the_program_through_staging():
    w = State(jnp.array(2.0))

    def body(x):
        with T.named_scope("inner_part"):
            w.value = w.value * x
        return w.value

    @T.jit
    def f(xs):
        with T.named_scope("outer_part"):
            return T.for_loop(body, xs)

    text = f.lower(jnp.ones(3)).as_text(debug_info=True)
    assert "outer_part/while/body/" in text and "inner_part/mul" in text
