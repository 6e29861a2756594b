"""``prepare``: one trace, present values, one commit; what it says of itself; and a table for each misuse."""

import re
import threading
import weakref
from contextlib import contextmanager, nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainstate
from _unchanged import unchanged
from brainstate import ParamState, State, StateTypeError, StateValueError, TraceContextError, nn
from brainstate import transform as T

X = jnp.arange(3.0)
LIKE_X = jax.ShapeDtypeStruct((3,), jnp.float32)


@pytest.fixture
def w():
    return ParamState(jnp.ones(3), name="w")


@pytest.fixture
def step(w):
    """A step of gradient descent that counts how often Python runs it."""

    def step(x, rate=0.5):
        step.runs += 1
        gradient, value = T.grad(lambda: (w.value * x).sum() ** 2, w, return_value=True)()
        w.value = w.value - rate * gradient
        return {"loss": value}

    step.runs = 0
    return step


# ------------------------------------------------------------------------------------------ calls


@pytest.mark.parametrize("example", [X, LIKE_X], ids=["array", "ShapeDtypeStruct"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["function", "jit"])
@pytest.mark.parametrize("donate", [False, True], ids=["", "donated"])
def test_a_prepared_step_is_the_step(step, w, example, wrapped, donate):
    twin = ParamState(w.value * 1)
    prepared = (
        T.prepare(T.jit(step, donate_states=donate), example)
        if wrapped
        else T.prepare(step, example, donate_states=donate)
    )
    np.testing.assert_array_equal(w.value, np.ones(3))
    for k in range(3):
        w.value, twin.value = w.value + k, twin.value + k
        out = prepared(X)
        gradient, value = jax.value_and_grad(lambda v: (v * X).sum() ** 2)(twin.value)[::-1]
        twin.value = twin.value - 0.5 * gradient
        np.testing.assert_allclose(out["loss"], value, rtol=1e-6)
        np.testing.assert_allclose(w.value, twin.value, rtol=1e-6)
    assert step.runs == 1


def test_examples_may_be_pytrees_and_keywords():
    total = State(jnp.zeros(2))

    def f(batch, *more, scale, offset=None):
        total.value = total.value + batch["x"] * scale
        return [batch["y"], *more]

    batch = {"x": jnp.ones(2), "y": 3.0}
    like = {"x": jax.ShapeDtypeStruct((2,), jnp.float32), "y": 1.0}
    prepared = T.prepare(f, like, jnp.ones(1), scale=LIKE_X.update(shape=()), offset=None)
    out = prepared(batch, jnp.full(1, 7.0), scale=jnp.float32(2.0), offset=None)
    assert [float(leaf) for leaf in map(jnp.squeeze, out)] == [3.0, 7.0]
    np.testing.assert_array_equal(total.value, [2.0, 2.0])


def test_states_with_pytrees_and_numbers():
    s = State({"a": jnp.ones(2), "n": jnp.array(0), "k": jax.random.key(0), "f": 1.0, "none": None})
    other = State(5.0)

    def f():
        v = s.value
        s.value = {**v, "a": v["a"] * 2, "n": v["n"] + 1, "f": v["f"] + other.value}
        return v["f"]

    prepared = T.prepare(f)
    assert [float(prepared()), float(prepared())] == [1.0, 6.0]
    np.testing.assert_array_equal(s.value["a"], [4.0, 4.0])
    assert int(s.value["n"]) == 2 and s.value["none"] is None


def test_a_state_that_is_only_read_and_one_that_is_only_written():
    r, out = State(jnp.array(2.0)), State(None)

    def f(x):
        out.value = {"y": r.value * x}

    prepared = T.prepare(f, 1.0)
    prepared(3.0)
    r.value = jnp.array(10.0)
    prepared(3.0)
    assert float(out.value["y"]) == 30.0
    pure = T.prepare(lambda x: r.value * x, 1.0)
    assert float(pure(2.0)) == 20.0 and float(T.prepare(lambda x: x + 1, 1.0)(2.0)) == 3.0


def test_random_numbers_go_on():
    brainstate.random.seed(3)
    expected = [float(brainstate.random.normal()) for _ in range(3)]
    brainstate.random.seed(3)
    prepared = T.prepare(lambda: brainstate.random.normal())
    assert [float(prepared()) for _ in range(3)] == pytest.approx(expected)


def loss_of(w):
    return lambda x: (w.value**2 * x).sum()


TRANSFORMS = {
    "grad": lambda w: (T.grad(loss_of(w), w), (X,)),
    "grad of an argument": lambda w: (T.grad(loss_of(w), argnums=0), (X,)),
    "hessian": lambda w: (T.hessian(loss_of(w), w), (X,)),
    "jacrev": lambda w: (T.jacrev(lambda x: w.value * x, w), (X,)),
    "vmap": lambda w: (T.vmap(loss_of(w)), (jnp.ones((4, 3)),)),
    "jit of grad": lambda w: (T.jit(T.grad(loss_of(w), w)), (X,)),
    "partial": lambda w: (partial(loss_of(w), x=X), ()),
    "scan": lambda w: (lambda xs: T.scan(lambda c, x: (c + w.value.sum() * x, x), 0.0 * X[0], xs), (X,)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_any_transform(name, w):
    transform, args = TRANSFORMS[name](w)
    prepared = T.prepare(transform, *args)
    for value in (jnp.ones(3), jnp.full(3, 2.0)):
        w.value = value
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), prepared(*args), transform(*args))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.calls = State(jnp.array(0))
        self.spare = State(jnp.array(0.0))

    @T.jit(static_argnames="mode")
    def step(self, x, mode="train"):
        self.calls.value += 1
        return self.layer(x) if mode == "train" else x

    def plain(self, x):
        self.calls.value += 1
        return self.layer(x)


@pytest.mark.parametrize("method", ["step", "plain", "layer"])
def test_methods_and_modules(method):
    model = Model()
    prepared = T.prepare(getattr(model, method), LIKE_X)
    expected = model.layer(X)
    np.testing.assert_allclose(prepared(X), expected, rtol=1e-6)
    assert int(model.calls.value) == (method != "layer")


def test_a_prepared_method_keeps_its_instance_alive():
    prepared = T.prepare(Model().step, X)
    assert prepared(X).shape == (2,) and prepared.__name__ == "step"


def test_a_static_argument_is_given_as_it_was():
    prepared = T.prepare(T.jit(lambda x, n: x * n, static_argnames="n"), X, 3)
    with pytest.raises(StateTypeError, match=r"❌ static argument n +by position → by keyword"):
        prepared(X, n=3)


def test_static_arguments_are_given_in_each_call():
    model = Model()
    for mode in ("train", "test"):
        prepared = T.prepare(model.step, X, mode)
        np.testing.assert_allclose(prepared(X, mode), model.step(X, mode), rtol=1e-6)
        prepared = T.prepare(model.step, X, mode=mode)
        np.testing.assert_allclose(prepared(X, mode=mode), model.step(X, mode), rtol=1e-6)
    scale = T.prepare(T.jit(lambda m, x: m.layer(x), static_argnums=0), model, X)
    np.testing.assert_allclose(scale(model, X), model.layer(X), rtol=1e-6)
    with pytest.raises(TraceContextError, match=r": argument x is traced"):
        jax.grad(lambda x: scale(model, x).sum())(X)
    with pytest.raises(StateTypeError, match=r"❌ static argument m .* → "):
        scale(Model(), X)
    last = T.prepare(T.jit(lambda x, n: x * n, static_argnums=-1), 1.0, 3)
    assert float(last(2.0, 3)) == 6.0


def test_preparing_is_independent_of_the_jit(step, w):
    jitted = T.jit(step)
    prepared = T.prepare(jitted, X)
    jitted(X), jitted(jnp.ones(3)), jitted.clear_cache()
    prepared(X)
    assert step.runs == 2 and len(jitted.retraces()) == 1


@pytest.mark.parametrize("donate", [False, True])
def test_threads_lose_no_update(donate):
    c, d = State(jnp.array(0)), State(jnp.array(0))

    def add(x):
        c.value, d.value = c.value + x, d.value - x

    prepared = T.prepare(add, jnp.array(1), donate_states=donate)
    threads = [threading.Thread(target=lambda: [prepared(jnp.array(1)) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (int(c.value), int(d.value)) == (200, -200)


def test_inside_a_derivative_it_is_called_as_long_as_nothing_is_traced(w, step):
    """The write is committed with the derivative, and an error leaves the State as it was, donated or not."""
    for donate in (False, True):
        w.value = jnp.ones(3)
        prepared = T.prepare(step, X, donate_states=donate)
        T.grad(lambda y, prepared=prepared: (prepared(X), y)[1])(1.0)
        assert float(w.value[1]) == -2.0

        def fails(y, prepared=prepared):
            prepared(X)
            raise RuntimeError

        with unchanged(w), pytest.raises(RuntimeError):
            T.grad(fails)(1.0)
        assert not w.value.is_deleted()


# ------------------------------------------------------------------------------------------ what it says


def test_cost_memory_text_and_repr(w):
    def f(x):
        w.value = w.value + 1
        return jnp.sin(x) @ jnp.ones((8, 3)) @ w.value

    prepared = T.prepare(f, jax.ShapeDtypeStruct((100, 8), jnp.float32))

    def pure(v, x):
        return jnp.sin(x) @ jnp.ones((8, 3)) @ (v + 1), v + 1

    compiled = jax.jit(pure).lower(w.value, jnp.ones((100, 8))).compile()
    cost, theirs = prepared.cost(), compiled.cost_analysis()
    assert cost.flops == theirs["flops"] > 1000
    assert cost.bytes == theirs["bytes accessed"] > 3000
    assert cost.transcendentals == 800
    memory, theirs = prepared.memory(), compiled.memory_analysis()
    assert memory.arguments == theirs.argument_size_in_bytes == 3212
    assert memory.output == theirs.output_size_in_bytes
    assert memory.temporaries == theirs.temp_size_in_bytes
    assert memory.donated == 0 and memory.peak == memory.arguments + memory.output + memory.temporaries
    assert "arguments=3.137 KiB" in repr(memory) and "donated=0 B" in repr(memory)
    assert "HloModule" in prepared.as_text() and "stablehlo" in prepared.as_text("stablehlo")
    assert "lambda" in prepared.as_text("jaxpr")
    assert repr(prepared) == "prepared f(x: float32[100,8]), States: 1 read, 1 written"


def test_a_backend_that_says_nothing(w, monkeypatch):
    prepared = T.prepare(lambda: w.value)

    class Silent:
        cost_analysis = memory_analysis = as_text = lambda self: None

    monkeypatch.setattr(prepared, "_step", Silent())
    assert prepared.cost() is None and prepared.memory() is None and prepared.as_text() == ""
    Silent.cost_analysis = lambda self: [{"flops": -1.0, "bytes accessed": 8.0}]
    assert prepared.cost() == (None, 8.0, 0.0)


def big(n=8, size=2**20):
    return [jnp.full(size, 1.0 + i) for i in range(n)]


def big_loss(params, x):
    return sum(((p * x) ** 2).mean() for p in params)


def test_peak_memory_of_a_donating_step_is_that_of_pure_jax():
    """32 MiB of parameters: donated bytes and all the rest are those of the step written by hand."""
    x = jnp.linspace(0.0, 1.0, 2**20)

    def pure(params, x):
        value, grads = jax.value_and_grad(big_loss)(params, x)
        return value, [p - 0.1 * g for p, g in zip(params, grads, strict=True)]

    theirs = jax.jit(pure, donate_argnums=0).lower(big(), x).compile().memory_analysis()
    states = [ParamState(p) for p in big()]

    def step(x):
        grads, value = T.grad(lambda: big_loss([s.value for s in states], x), states, return_value=True)()
        for s, g in zip(states, grads, strict=True):
            s.value = s.value - 0.1 * g
        return value

    kept, donated = T.prepare(step, x), T.prepare(step, x, donate_states=True)
    ours = donated.memory()
    assert ours.donated == theirs.alias_size_in_bytes == 32 * 2**20
    assert (ours.arguments, ours.output) == (theirs.argument_size_in_bytes, theirs.output_size_in_bytes)
    assert ours.temporaries == theirs.temp_size_in_bytes
    assert kept.memory().donated == 0
    old = [s.value for s in states]
    donated(x)
    assert all(array.is_deleted() for array in old)
    assert not any(s.value.is_deleted() for s in states)


@pytest.mark.parametrize("nested", [False, True], ids=["arrays", "pytrees"])
def test_what_something_else_holds_is_copied_not_donated(nested):
    shared = jnp.ones(3)
    pack = (lambda v: {"v": v}) if nested else (lambda v: v)
    a, b, r = State(pack(shared)), State(pack(shared)), State(shared)

    def f(x):
        a.value, b.value = jax.tree.map(lambda v: v + x, a.value), jax.tree.map(lambda v: v - x, b.value)
        return r.value * 1

    prepared = T.prepare(f, X, donate_states=True)
    np.testing.assert_array_equal(prepared(shared), shared)
    assert not shared.is_deleted() and r.value is shared
    own = jax.tree.leaves((a.value, b.value))
    prepared(X)
    assert all(leaf.is_deleted() for leaf in own)
    again = jax.tree.leaves(a.value)[0]
    prepared(again)
    assert not again.is_deleted()
    np.testing.assert_array_equal(jax.tree.leaves(a.value)[0], 2 * again)


# ------------------------------------------------------------------------------------------ misuse of prepare


def makes_a_state(kept=[]):  # noqa: B006
    kept.append(State(jnp.zeros(2)))


def without_jit():
    with jax.disable_jit():
        T.prepare(lambda: 1.0)


MISUSE = {
    "not callable": (lambda: T.prepare(3), StateTypeError, r"prepare compiles a function; got int"),
    "text": (
        lambda: T.prepare(lambda x, mode: x, X, "train"),
        StateTypeError,
        r"argument mode is a str.*static_argnames='mode'",
    ),
    "text inside": (
        lambda: T.prepare(lambda x: x, x={"a": [None, "train"]}),
        StateTypeError,
        r"argument x\['a'\]\[1\] is a str",
    ),
    "a State": (lambda: T.prepare(lambda x: x, State(1.0, name="s")), StateValueError, r"'s' is among the arguments"),
    "a Module": (
        lambda: T.prepare(lambda m: m, Model()),
        StateTypeError,
        r"is a Module \(Model\).*refer to it by name",
    ),
    "donation of a jit": (
        lambda: T.prepare(T.jit(lambda: None), donate_states=True),
        StateValueError,
        r"jit\(fun, donate_states=True\)",
    ),
    "in a derivative": (
        lambda: T.grad(lambda x: T.prepare(lambda y: y, 1.0)(x))(1.0),
        TraceContextError,
        r"call it outside",
    ),
    "in a raw jit": (lambda: jax.jit(lambda x: T.prepare(lambda y: y, 1.0)(x))(1.0), TraceContextError, r"outside"),
    "creates a State": (
        lambda: T.prepare(makes_a_state),
        StateValueError,
        r"created by the function and outlives it.*Call the function once before",
    ),
    "jit is disabled": (without_jit, TraceContextError, r"jax.disable_jit forbids"),
    "unknown stage": (lambda: T.prepare(lambda: 1.0).as_text("asm"), StateValueError, r"'jaxpr', 'stablehlo' or 'hlo'"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_of_prepare(name):
    trigger, error, message = MISUSE[name]
    with pytest.raises(error, match=message):
        trigger()


# ------------------------------------------------------------------------------------------ calls that do not match


def many():
    """Return 100 States, and a function of them with arguments of each form."""
    states = [State(jnp.ones(2), name=f"s{i}") for i in range(100)]
    tree = State({"a": jnp.ones(2), "b": jnp.zeros(())}, name="tree")
    spare = State(jnp.ones(2), name="spare")

    @T.jit(static_argnames="mode")
    def f(x, batch, mode="train", *, scale=1.0):
        for s in states:
            s.value = s.value + scale
        tree.value = jax.tree.map(lambda v: v + 1, tree.value)
        return x * batch["y"]

    batch = {"y": jnp.ones(3), "z": 1}
    return states, tree, spare, T.prepare(f, X, batch, "train", scale=2.0), batch


STATES, TREE, SPARE, CALL, BATCH = many()
GOOD = (X, BATCH, "train")


def put(state, value):
    state.value = value


def call(*args, **kwargs):
    return lambda: CALL(*args, **{"scale": 2.0, **kwargs})


AGREE = r"✅ … and \d+ more that agree"
MISMATCHES = {
    "shape": (call(jnp.ones(4), BATCH, "train"), [r"❌ argument x +float32\[3\] → float32\[4\]", AGREE]),
    "dtype": (call(jnp.arange(3), BATCH, "train"), [r"❌ argument x +float32\[3\] → int32\[3\]"]),
    "rank": (call(1.0, BATCH, "train"), [r"❌ argument x +float32\[3\] → float32\[\]"]),
    "inside": (
        call(X, {"y": jnp.ones(1), "z": 1}, "train"),
        [r"❌ argument batch\['y'\] +float32\[3\] → float32\[1\]"],
    ),
    "two": (
        call(jnp.ones(4), {"y": 1.0, "z": 1}, "train"),
        [r"❌ argument x +float32\[3\] → float32\[4\]", r"❌ argument batch\['y'\] +float32\[3\] → float32\[\]"],
    ),
    "missing leaf": (call(X, {"y": X}, "train"), [r"❌ argument batch\['z'\] +int32\[\] → nothing"]),
    "additional leaf": (call(X, {**BATCH, "u": 1}, "train"), [r"❌ argument batch\['u'\] +nothing → int32\[\]"]),
    "another structure": (call(X, [X, 1], "train"), [r"❌ argument batch\[0\] +nothing → float32\[3\]", "y'"]),
    "missing": (call(X), [r"❌ argument batch\['y'\] +float32\[3\] → nothing", r"❌ static argument mode"]),
    "additional": (call(*GOOD, 5.0), [r"❌ argument 3 +nothing → float32\[\]"]),
    "unknown keyword": (call(*GOOD, other=X), [r"❌ argument other +nothing → float32\[3\]"]),
    "missing keyword": (lambda: CALL(*GOOD), [r"❌ argument scale +float32\[\] → nothing"]),
    "keyword for position": (
        lambda: CALL(X, batch=BATCH, mode="train", scale=2.0),
        [r"❌ argument batch +by position → by keyword"],
    ),
    "static value": (call(X, BATCH, "test"), [r"❌ static argument mode +str 'train' → str 'test'"]),
    "text": (call("x", BATCH, "train"), [r"❌ argument x +float32\[3\] → str 'x'"]),
    "a struct": (call(jax.ShapeDtypeStruct((4,), "int32"), BATCH, "train"), [r"float32\[3\] → int32\[4\]"]),
    "State": (lambda: (put(STATES[7], jnp.ones(5)), call(*GOOD)()), [r"❌ State 's7' +float32\[2\] → float32\[5\]"]),
    "State inside": (
        lambda: (put(TREE, {"a": jnp.ones(2), "b": jnp.array(1)}), call(*GOOD)()),
        [r"❌ State 'tree'\['b'\] +float32\[\] → int32\[\]"],
    ),
    "State and argument": (
        lambda: (put(STATES[0], None), call(jnp.ones(4), BATCH, "train")()),
        [r"❌ State 's0' +float32\[2\] → None", r"❌ argument x"],
    ),
    "State structure": (
        lambda: (put(STATES[7], [jnp.ones(2)]), call(*GOOD)()),
        [r"❌ State 's7' +float32\[2\] → nothing", r"❌ State 's7'\[0\] +nothing → float32\[2\]"],
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_call_that_does_not_match(name):
    trigger, expected = MISMATCHES[name]
    before = [(s, s.value) for s in (*STATES, TREE)]
    CALL(*GOOD, scale=2.0)
    values = [s.value for s in STATES]
    with pytest.raises(StateTypeError, match="was prepared for another call") as caught:
        trigger()
    message = str(caught.value)
    for words in expected:
        assert re.search(words, message), message
    assert len(message.splitlines()) < 12
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    changed = [i for i, (s, v) in enumerate(zip(STATES, values, strict=True)) if s.value is not v]
    assert changed in ([], [0], [7]), "only what the trigger assigned"
    for s, value in before:
        s.value = value
    CALL(*GOOD, scale=2.0)


def test_few_rows_are_all_shown(w):
    prepared = T.prepare(lambda x, y: w.value * x * y, X, X)
    with pytest.raises(StateTypeError) as caught:
        prepared(X, jnp.ones(4))
    rows = str(caught.value).splitlines()[1:-1]
    assert [row.split()[0] for row in rows] == ["✅", "❌", "✅"]
    assert rows[2].split() == ["✅", "ParamState", "'w'", "float32[3]"]


def test_weak_types_are_no_mismatch():
    s = State(0.0)
    prepared = T.prepare(lambda x: setattr(s, "value", s.value + x), 1.0)
    prepared(jnp.float32(1)), prepared(np.float32(1)), prepared(1.0)
    assert float(s.value) == 3.0


def test_another_precision_is_told(w):
    prepared = T.prepare(lambda x: w.value * x, np.ones(3, np.float32))
    with jax.enable_x64(True), pytest.raises(StateTypeError, match=r"❌ argument x +float32\[3\] → float64\[3\]"):
        prepared(np.ones(3))


@pytest.mark.parametrize("donate", [False, True])
def test_another_place_is_told(w, donate):
    other = State(jnp.ones(4), name="other")

    def f(x, y):
        other.value = other.value + 1
        return w.value.sum() * x["a"] * y

    first, second = jax.devices()[:2]
    x = {"a": jax.device_put(X, first)}
    prepared = T.prepare(f, x, y=2.0, donate_states=donate)
    with unchanged(other, w), pytest.raises(StateTypeError, match=r"❌ argument x\['a'\] .*CPU:0.* → .*CPU:1|id=1"):
        prepared({"a": jax.device_put(X, second)}, y=2.0)
    prepared(x, y=2.0)
    w.value = jax.device_put(w.value, second)
    with unchanged(other, w), pytest.raises(StateTypeError, match=r"❌ ParamState 'w' "):
        prepared(x, y=2.0)


# ------------------------------------------------------------------------------------------ nothing compiles


@pytest.fixture
def compilations():
    """Return a list with one entry for each program that XLA has compiled since."""
    found, on = [], [True]
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: found.append(event) if on and event.endswith("backend_compile_duration") else None
    )
    yield found
    on.clear()


def committed(place):
    return lambda: jax.device_put(X, jax.devices()[place])


@contextmanager
def forgotten():
    jax.clear_caches()
    yield


@pytest.mark.parametrize("donate", [False, True], ids=["", "donated"])
@pytest.mark.parametrize(
    "around, argument",
    [
        (nullcontext, lambda: X),
        (nullcontext, lambda: np.arange(3, dtype=np.float32)),
        (nullcontext, committed(0)),
        (lambda: jax.default_device(jax.devices()[1]), lambda: X),
        (lambda: jax.default_matmul_precision("float32"), lambda: X),
        (forgotten, lambda: X),
    ],
    ids=["as prepared", "NumPy", "committed", "default_device", "precision", "clear_caches"],
)
def test_a_call_never_compiles(step, w, compilations, around, argument, donate):
    """What JAX would trace or compile anew for, it computes all the same with what was prepared."""
    prepared = T.prepare(step, X, donate_states=donate)
    prepared(X)
    before, given = w.value + 0, argument()
    compilations.clear()
    with around():
        out = prepared(given)
    assert not compilations and step.runs == 1
    value, gradient = jax.value_and_grad(lambda v: (v * X).sum() ** 2)(before)
    np.testing.assert_allclose(out["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(w.value, before - 0.5 * gradient, rtol=1e-6)
    prepared(X)
    assert step.runs == 1


def test_what_jit_compiles_ahead_of_time_is_prepared(w, compilations):
    """``lower(...).compile()`` leads to a `Prepared`: the same table and check of Modules; no static arguments."""
    model = Chain()
    f = T.jit(lambda n, x, *, scale: model(x) * n * scale * w.value, static_argnums=0)
    f(1, X, scale=1)
    prepared = f.lower(2, X, scale=3.0).compile()
    assert isinstance(prepared, T.Prepared) and prepared.cost().flops > 0 and "HloModule" in prepared.as_text()
    np.testing.assert_allclose(prepared(X, scale=3.0), f(2, X, scale=3.0), rtol=1e-6)
    longer = jnp.ones(4)
    compilations.clear()
    with pytest.raises(StateTypeError, match=r"❌ argument x +float32\[3\] → float32\[4\]"):
        prepared(longer, scale=3.0)
    assert not compilations
    with pytest.raises(StateTypeError, match=r"✅ argument scale.*\n(.*\n)*  ❌ argument 2 +nothing → "):
        prepared(X, X, scale=3.0)
    with pytest.raises(TraceContextError, match="argument x is traced"):
        jax.grad(lambda x: prepared(x, scale=3.0).sum())(X)
    model.layers.append(nn.Linear(3, 3))
    with pytest.raises(StateValueError, match=r"stale.*changed by `append`.*now uses"):
        prepared(X, scale=3.0)


def test_what_another_trace_writes_keeps_its_value():
    a, b = State(jnp.array(1.0)), State(jnp.array(10.0))

    def f(x):
        (b if x.ndim else a).value = x.sum()

    f = T.jit(f)
    f(jnp.ones(2)), f(1.0 * jnp.ones(()))
    prepared = f.lower(jnp.float32(7)).compile()
    b.value = jnp.array(-1.0)
    prepared(jnp.float32(5))
    assert (float(a.value), float(b.value)) == (5.0, -1.0)


@pytest.mark.parametrize("made", [T.jit, lambda f, **options: T.prepare(f, X, **options)], ids=["jit", "prepare"])
def test_a_donating_program_that_may_fail_keeps_no_results(made, w):
    """Such a program keeps its States, and a result that was kept for an interrupt would never be dropped."""

    def step(x):
        w.value = w.value + x
        return T.grad(lambda x: (x * w.value).sum(), argnums=0, debug_nan=True)(x)

    call = made(step, donate_states=True)
    results = [weakref.ref(call(X)) for _ in range(3)]
    assert [result() for result in results[:2]] == [None, None]


def test_compilations_are_counted(compilations):
    jax.jit(lambda x: x * 17)(X)
    assert compilations


@pytest.mark.parametrize("donate", [False, True], ids=["", "donated"])
@pytest.mark.parametrize("given", [lambda: jnp.ones(4), committed(1), lambda: np.ones(3, np.int32)])
def test_a_refused_call_changes_nothing(step, w, compilations, given, donate):
    prepared = T.prepare(step, X, donate_states=donate)
    wrong = given()
    compilations.clear()
    with unchanged(w), pytest.raises(StateTypeError, match="❌ argument x"):
        prepared(wrong)
    assert not compilations and step.runs == 1
    prepared(X)
    assert step.runs == 1


def test_the_compiled_program_is_that_of_pure_jax(step, w):
    pure = jax.jit(lambda v, x: ({"loss": (v * x).sum() ** 2}, [v - 0.5 * jax.grad(lambda v: (v * x).sum() ** 2)(v)]))
    mine, theirs = T.prepare(step, X), pure.lower(w.value, X).compile()
    operations = re.compile(r"= \S+ ([a-z-]+)\(").findall
    assert "fusion" in operations(mine.as_text())
    assert operations(mine.as_text()) == operations(theirs.as_text())


def test_a_sharding_of_jit_is_kept():
    mesh = jax.make_mesh((4,), ("d",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    s = State(jnp.ones(()), name="s")
    prepared = T.prepare(T.jit(lambda x: s.value * x, in_shardings=spread), jnp.ones(8))
    assert prepared(jax.device_put(jnp.ones(8), spread)).sharding.is_equivalent_to(spread, 1)
    with pytest.raises(StateTypeError, match=r"❌ argument x"):
        prepared(jax.device_put(jnp.ones(8), jax.devices()[1]))


def test_what_jax_raises_for_another_reason_is_left_alone(w):
    prepared = T.prepare(lambda x: w.value * x, X)
    gone = X + 0
    gone.delete()
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        prepared(gone)


WITHIN = {
    "jit": (lambda prepared, w: T.jit(prepared)(X), r"'w', argument x are traced"),
    "grad": (lambda prepared, w: T.grad(lambda x: prepared(x)["loss"])(X), r"argument x is traced"),
    "grad of a State": (lambda prepared, w: T.grad(lambda: prepared(X)["loss"], w)(), r"ParamState 'w' is traced"),
    "vmap": (lambda prepared, w: T.vmap(prepared)(jnp.ones((2, 3))), r"is traced|are traced"),
    "scan": (lambda prepared, w: T.for_loop(prepared, jnp.ones((2, 3))), r"are traced"),
    "raw jit": (lambda prepared, w: jax.jit(prepared)(X), r"argument x is traced"),
    "raw vmap": (lambda prepared, w: jax.vmap(prepared)(jnp.ones((2, 3))), r"argument x is traced"),
    "raw jit, nothing traced": (lambda prepared, w: jax.jit(lambda: prepared(X))(), r"'w' was written inside a raw"),
    "raw vmap, nothing traced": (
        lambda prepared, w: jax.vmap(lambda y: prepared(X))(X),
        r"'w' was written inside a raw",
    ),
}


@pytest.mark.filterwarnings("ignore::brainstate.FrozenReadWarning")
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", WITHIN)
def test_inside_other_transforms(name, donate, step, w):
    trigger, message = WITHIN[name]
    prepared = T.prepare(step, X, donate_states=donate)
    with unchanged(w), pytest.raises(TraceContextError, match=message):
        trigger(prepared, w)
    assert not w.value.is_deleted()
    prepared(X)


# ------------------------------------------------------------------------------------------ replaced States


def grown(model):
    model.layers.append(nn.Linear(3, 3))


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(3, 3), nn.Linear(3, 3)]
        self.a, self.b = State(X, name="a"), State(X + 1, name="b")

    def update(self, x):
        for layer in self.layers:
            x = layer(x)
        self.a.value = self.b.value * x
        return x


def swapped(model):
    model.a, model.b = model.b, model.a


REPLACED = {
    "a layer": (
        lambda m: m.layers.__setitem__(0, nn.Linear(3, 3)),
        r"a list of States or Modules was changed by `__setitem__`.*no longer uses ParamState.*and now uses",
    ),
    "a State": (lambda m: setattr(m, "a", State(X, name="new")), r"Chain\.a was replaced.*'a' and now uses .*'new'"),
    "swapped": (swapped, r"Chain\.a was replaced; Chain\.b was replaced.*"),
    "a layer more": (grown, r"changed by `append`.*now uses"),
    "a layer less": (lambda m: m.layers.pop(), r"changed by `pop`.*no longer uses"),
    "the same layer twice": (lambda m: m.layers.append(m.layers[0]), r"is another program"),
    "deleted": (lambda m: delattr(m, "a"), r"Chain\.a was deleted.*now raises AttributeError"),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", REPLACED)
def test_a_replaced_state_is_never_silently_stale(name, donate):
    change, message = REPLACED[name]
    model = Chain()
    prepared = T.prepare(model, X, donate_states=donate)
    prepared(X)
    change(model)
    for _ in range(2):
        with pytest.raises(StateValueError, match=f"stale.*{message}.*Prepare it again"):
            prepared(X)
    if name != "deleted":
        T.prepare(model, X)(X)


def test_a_replacement_elsewhere_does_no_harm():
    model, other, runs = Chain(), Chain(), []

    def f(x):
        runs.append(1)
        return model(x)

    prepared = T.prepare(f, X)
    for _ in range(2):
        other.a = State(X)
        first, second = prepared(X), prepared(X)
        np.testing.assert_array_equal(first, second)
    assert len(runs) == 1, "it has read nothing of that"
    before, model.a = model.a, State(X)
    with pytest.raises(StateValueError, match="stale"):
        prepared(X)
    model.a = before
    prepared(X)


@pytest.mark.parametrize(
    "body",
    [
        jax.nn.relu,
        lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((3,), np.float32), x),
        lambda x: x + brainstate.random.normal(size=3),
        lambda x: T.scan(lambda c, y: (c + y, y), 0.0 * x[0], x)[1],
        lambda x: T.checkpoint(jnp.sin)(x),
    ],
    ids=["custom_jvp", "callback", "random", "scan", "checkpoint"],
)
def test_the_same_program_is_recognised(body, w):
    prepared, model = T.prepare(lambda x: body(x * w.value), X), Chain()
    model.a = State(X)
    prepared(X)
    model.a = State(X)
    T.grad(lambda y: (prepared(X), y)[1])(1.0)


def test_a_changed_state_after_a_replacement_elsewhere_is_told_by_the_table():
    model = Chain()
    prepared = T.prepare(model, X)
    Chain().layers.append(nn.Linear(2, 2))
    model.b.value = jnp.ones((3, 3))
    with pytest.raises(StateTypeError, match=r"❌ State 'b' +float32\[3\] → float32\[3,3\]"):
        prepared(X)


class Scaled(nn.Module):
    """A weight, and an array that is no State and so a constant of what is compiled."""

    def __init__(self, w, scale):
        super().__init__()
        self.w, self.scale = w, scale

    def update(self):
        return self.w.value * self.scale


@pytest.mark.parametrize("wrap", [lambda x: x, jnp.asarray], ids=["numpy", "jax"])
def test_a_constant_of_a_module_that_is_replaced_is_never_silently_stale(wrap):
    holder = nn.Module()
    holder.part = Scaled(ParamState(jnp.ones(2)), wrap(np.full(2, 2.0, np.float32)))
    prepared = T.prepare(lambda: holder.part())
    assert prepared().tolist() == [2.0, 2.0]
    holder.part = Scaled(holder.part.w, wrap(np.full(2, 2.0, np.float32)))  # another array, the same numbers
    assert prepared().tolist() == [2.0, 2.0]
    holder.part = Scaled(holder.part.w, wrap(np.full(2, 9.0, np.float32)))
    with pytest.raises(StateValueError, match=r"stale.*part was replaced.*is another program"):
        prepared()


def test_what_was_replaced_is_looked_at_under_the_same_options():
    model = nn.Module()
    model.w, model.unused = ParamState(jnp.ones(2)), nn.Module()
    prepared = T.prepare(lambda: (model.unused, model.w.value @ model.w.value)[1])
    model.unused = nn.Module()
    with (
        jax.default_matmul_precision("highest"),
        pytest.raises(
            StateValueError,
            match=r"unused was replaced.*under other options .*jax_default_matmul_precision: None → highest",
        ),
    ):
        prepared()
    with jax.default_device(jax.devices()[0]):  # an option that makes no other program of it
        assert prepared() == 2.0
    assert prepared() == 2.0
