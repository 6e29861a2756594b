"""``retraces()``: the words for each reason to trace again, none for a call that is not, and nothing kept alive."""

import contextlib
import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brainstate import ParamState, State, nn
from brainstate import transform as T
from brainstate.transform._compile import retraces as _retraces

X = jnp.arange(3.0)


def causes(jitted):
    return [entry.causes for entry in jitted.retraces()]


def last(jitted):
    return jitted.retraces()[-1].causes


# ------------------------------------------------------------------------------------------ arguments


def f(x, y=1.0, *more, n=2, mode="a", **rest):
    return jax.tree.leaves((x, y, more))[0] * n


class Thing:
    """A static argument that looks like every other."""

    def __repr__(self):
        return "Thing"


THINGS = Thing(), Thing()
MESH = jax.sharding.get_abstract_mesh()

# options of jit; two calls as (arguments, keywords); what is said of the second
ARGUMENTS = {
    "shape": ({}, ((X,), {}), ((jnp.ones(4),), {}), ["argument x: float32[3] → float32[4]"]),
    "dtype": ({}, ((X,), {}), ((jnp.arange(3),), {}), ["argument x: float32[3] → int32[3]"]),
    "weak": ({}, ((jnp.float32(1),), {}), ((1.0,), {}), ["argument x: float32[] → float32[] (weak)"]),
    "two": (
        {},
        ((X, X), {}),
        ((X[:2], 1), {}),
        ["argument x: float32[3] → float32[2]", "argument y: float32[3] → int32[] (weak)"],
    ),
    "inside": ({}, (({"a": X, "b": [X]},), {}), (({"a": X, "b": [X > 0]},), {}), ["x['b'][0]: float32[3] → bool[3]"]),
    "more leaves": ({}, (([X],), {}), (([X, X],), {}), ["argument x[1]: not given → float32[3]"]),
    "fewer leaves": ({}, (({"a": X, "b": X},), {}), (({"a": X},), {}), ["argument x['b']: float32[3] → not given"]),
    "structure": ({}, (([X],), {}), (((X,),), {}), ["argument x: PyTreeDef([*]) → PyTreeDef((*,))"]),
    "None": ({}, ((X, None), {}), ((X, X), {}), ["argument y: None → float32[3]"]),
    "more": ({}, ((X, X), {}), ((X, X, X), {}), ["argument more[0]: not given → float32[3]"]),
    "default": ({}, ((X,), {}), ((X, 1.0), {}), ["argument y: not given → float32[] (weak)"]),
    "keyword": ({}, ((X, 1.0), {}), ((X,), {"y": 1.0}), ["argument y: by position → by keyword"]),
    "new keyword": ({}, ((X,), {}), ((X,), {"other": X}), ["argument other: not given → float32[3]"]),
    "static": ({"static_argnames": "mode"}, ((X,), {"mode": "a"}), ((X,), {"mode": "b"}), ["mode: str 'a' → str 'b'"]),
    "static keyword": (
        {"static_argnums": 1},
        ((X, 1), {}),
        ((X,), {"y": 1}),
        ["static argument y: by position → by keyword"],
    ),
    "static number": ({"static_argnums": 1}, ((X, 1), {}), ((X, 2), {}), ["static argument y: int 1 → int 2"]),
    "static that looks the same": (
        {"static_argnames": "mode"},
        ((X,), {"mode": THINGS[0]}),
        ((X,), {"mode": THINGS[1]}),
        ["static argument mode: Thing → another Thing"],
    ),
    "static and shape": (
        {"static_argnames": "mode"},
        ((X,), {"mode": "a"}),
        ((X[:1],), {"mode": "b"}),
        ["argument x: float32[3] → float32[1]", "static argument mode: str 'a' → str 'b'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name, donate):
    options, first, second, expected = ARGUMENTS[name]
    s = State(jnp.array(0), name="s")

    def counted(*args, **kwargs):
        s.value += 1
        return f(*args, **kwargs)

    counted.__wrapped__ = f
    jitted = T.jit(counted, donate_states=donate, **options)
    for args, kwargs in (first, first, second, second, first):
        jitted(*args, **kwargs)
    found = causes(jitted)
    assert found[0] == ("first call",)
    assert len(found) == 2 and len(found[1]) == len(expected)
    assert all(words in cause for words, cause in zip(expected, found[1], strict=True)), found


def test_the_nearest_trace_is_compared():
    jitted = T.jit(lambda x, y: x * y.sum())
    jitted(X, X), jitted(X[:1], jnp.ones(7)), jitted(X, X[:2])
    assert last(jitted) == ("argument y: float32[3] → float32[2]",)
    jitted(X[:1], jnp.ones(8))
    assert last(jitted) == ("argument y: float32[7] → float32[8]",)


# ------------------------------------------------------------------------------------------ States


def test_a_state_of_another_type():
    s = State(X, name="s")
    jitted = T.jit(lambda: jax.tree.map(lambda v: v + 1, s.value))
    for value in (X, jnp.ones(2), {"a": X}, {"a": X, "b": X}, {"a": jnp.ones(2), "b": X}, 1.0, X):
        s.value = value
        jitted(), jitted()
    assert causes(jitted)[1:3] == [
        ("State 's': float32[3] → float32[2]",),
        ("State 's': float32[2] → not given", "State 's'['a']: not given → float32[3]"),
    ]
    assert causes(jitted)[3:5] == [
        ("State 's'['b']: not given → float32[3]",),
        ("State 's'['a']: float32[3] → float32[2]",),
    ]
    assert causes(jitted)[5][0].endswith("→ float32[] (weak)") and len(causes(jitted)) == 6


def test_a_state_that_was_met_since():
    a, b = State(jnp.float32(0), name="a"), State(jnp.float32(0), name="b")

    def g(x):
        a.value = a.value + x.sum()
        if x.ndim:
            b.value = b.value + 1

    jitted = T.jit(g)
    jitted(X[0]), jitted(X), jitted(X[0]), jitted(X)
    assert causes(jitted)[1:] == [
        ("argument x: float32[] → float32[3]",),
        ("State 'b' became an input: it was first met in trace 2",),
    ]


def test_a_state_that_was_created():
    memory = {}

    @T.jit
    def g(x):
        if "s" not in memory:
            memory["s"] = State(0.0 * x, name="memory")
        memory["s"].value = memory["s"].value + x

    g(X), g(X), g(X)
    assert causes(g) == [("first call",), ("State 'memory' became an input: it was created in trace 1",)]


def test_a_state_that_is_donated_since():
    s, t = State(X + 0, name="s"), State(X + 0, name="t")

    @T.jit(donate_states=True, static_argnums=0)
    def g(write):
        if write:
            s.value = s.value + 1
        else:
            t.value = t.value + s.value

    g(False), g(True), g(False), g(True)
    assert causes(g)[1:] == [
        ("static argument write: bool False → bool True",),
        ("State 's' is now donated",),
    ]


# ------------------------------------------------------------------------------------------ programs begun anew


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = ParamState(X)
        self.layers = [nn.Linear(3, 3)]

    @T.jit
    def step(self, x):
        for layer in self.layers:
            x = layer(x.astype(float))
        return x.astype(float) * self.weight.value


def test_what_was_replaced_is_named():
    model = Model()
    model.step(X)
    model.weight = ParamState(X)
    model.step(X)
    model.layers.append(nn.Linear(3, 3))
    model.step(X), model.step(X > 0)
    assert causes(model.step)[1:] == [
        ("Model.weight was replaced",),
        ("a list of States or Modules was changed by `append`",),
        ("argument x: float32[3] → bool[3]",),
    ]
    other = Model()
    other.weight = ParamState(X)
    model.step(jnp.ones(3, int))
    assert last(model.step) == ("argument x: bool[3] → int32[3]",)
    model.weight = ParamState(X)
    model.step(X)
    assert last(model.step) == ("Model.weight was replaced",)
    assert causes(other.step) == [] and repr(other.step.retraces()) == "not traced yet"


def test_clear_cache():
    jitted = T.jit(lambda x: x)
    jitted.clear_cache()
    jitted(X), jitted.clear_cache(), jitted(X)
    assert causes(jitted) == [("first call",), ("clear_cache() was called",)]


def test_a_failed_trace_is_told():
    bad = [True]

    @T.jit
    def g(x):
        if bad:
            raise KeyError
        return x

    for _ in range(2):
        with pytest.raises(KeyError):
            g(X)
    bad.clear()
    g(X), g(X)
    assert causes(g) == [
        ("first call",),
        ("trace 1, of the same kind, raised KeyError",),
        ("trace 2, of the same kind, raised KeyError",),
    ]


def test_a_function_that_calls_itself():
    s = State(jnp.float32(0), name="s")

    @T.jit(static_argnums=1)
    def g(x, n):
        s.value = s.value + x
        if n < 0:
            raise KeyError
        return x if n == 0 else g(x * 2, n - 1)

    x = jnp.float32(1)
    assert float(g(x, 2)) == float(g(x, 2)) == 4.0
    assert float(s.value) == 14.0
    traces = len(g.retraces())
    assert all(record.finished for record in g._journal._records)
    with pytest.raises(KeyError):
        g(x, -1)
    g(x, 2), g(x, 1), g(x, 0)
    assert last(g)[0].startswith("static argument n") and len(g.retraces()) == traces + 1


def test_ahead_of_time_traces_count():
    jitted = T.jit(lambda x: x * 2)
    jitted.lower(jax.ShapeDtypeStruct((3,), "float32")), jitted(X), jitted.eval_shape(X[:1])
    assert causes(jitted) == [("first call",), ("argument x: float32[3] → float32[1]",)]


# ------------------------------------------------------------------------------------------ JAX itself


@contextlib.contextmanager
def changed(name, value=None):
    before = getattr(jax.config, name)
    jax.config.update(name, not before if value is None else value)
    yield
    jax.config.update(name, before)


OPTIONS = {
    "jax_enable_x64": lambda: jax.enable_x64(True),
    "jax_default_matmul_precision": lambda: jax.default_matmul_precision("float32"),
    "jax_numpy_dtype_promotion": lambda: jax.numpy_dtype_promotion("standard"),
    "jax_numpy_rank_promotion": lambda: jax.numpy_rank_promotion("allow"),
    "jax_default_device": lambda: jax.default_device(jax.devices()[0]),
    "jax_softmax_custom_jvp": lambda: changed("jax_softmax_custom_jvp"),
    "jax_random_seed_offset": lambda: changed("jax_random_seed_offset", 7),
    "jax_debug_key_reuse": lambda: jax.debug_key_reuse(True),
    "jax_check_static_indices": lambda: changed("jax_check_static_indices"),
    "jax_threefry_partitionable": lambda: jax.threefry_partitionable(not jax.config.jax_threefry_partitionable),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option):
    jitted = T.jit(lambda x: x * 2)
    jitted(X)
    with OPTIONS[option]():
        jitted(X), jitted(X)
    jitted(X)
    (only,) = causes(jitted)[1:]
    assert only[0].startswith(f"the JAX option {option}: ") and len(only) == 1


def test_disable_jit_traces_nothing():
    jitted = T.jit(lambda x: x * 2)
    jitted(X)
    with jax.disable_jit():
        jitted(X), jitted(X[:1])
    jitted(X)
    assert len(jitted.retraces()) == 1


def test_what_is_not_known_is_not_guessed():
    jitted = T.jit(lambda x: x * 2)
    jitted(X)
    jax.clear_caches()
    jitted(X)
    assert causes(jitted)[1][0].startswith("nothing that is recorded here: JAX's caches were cleared")


def test_within_other_transforms():
    """A kind of call is traced once, wherever it comes from."""
    s = State(jnp.array(2.0), name="s")
    inner = T.jit(lambda x: s.value * x)
    outer = T.jit(lambda x: T.grad(inner)(x) + T.vmap(inner)(jnp.ones(2)).sum())
    outer(1.0), outer(2.0)
    assert len(outer.retraces()) == 1
    assert [len(c) for c in causes(inner)] == [1] * len(causes(inner))
    assert all(c[0].startswith(("first", "argument x")) for c in causes(inner))


# ------------------------------------------------------------------------------------------ what it keeps


def test_a_call_that_is_not_traced_records_nothing(monkeypatch):
    s = State(X, name="s")
    jitted = T.jit(lambda x: setattr(s, "value", s.value + x))
    jitted(X)
    for name in ("begin", "open", "entries"):
        monkeypatch.setattr(_retraces.Journal, name, None)
    jitted(X), jitted(X)


def test_nothing_is_kept_alive(no_leaks):
    model, array, static = Model(), X + 1, Thing()
    jitted = T.jit(lambda x, thing, weight=model.weight: x * weight.value, static_argnums=1)
    jitted(array, static)
    journal, alive = jitted._journal, [weakref.ref(o) for o in (model, model.weight, array, static)]
    del jitted, model, array, static
    jax.clear_caches()
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4
    assert str(journal.entries()[0]) == "trace 1: first call"


def test_the_number_of_records_is_bounded():
    jitted = T.jit(lambda x: x)
    for n in range(40):
        jitted(np.ones(n))
    told = jitted.retraces()
    assert [entry.trace for entry in told] == list(range(9, 41))
    assert told[-1].causes == ("argument x: float32[38] → float32[39]",)


def test_threads():
    jitted = T.jit(lambda x: x * 2)
    threads = [threading.Thread(target=lambda n=n: jitted(np.ones(n))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(jitted.retraces()) == 4
    assert all(record.finished for record in jitted._journal._records)


def test_how_it_is_written():
    s = State(X, name="s")
    jitted = T.jit(lambda x: s.value * x)
    jitted(X)
    s.value = X[:1]
    jitted(X[:1])
    assert repr(jitted.retraces()) == (
        "trace 1: first call\ntrace 2: argument x: float32[3] → float32[1]; State 's': float32[3] → float32[1]"
    )
    assert jitted.retraces()[1].trace == 2
