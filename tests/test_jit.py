"""``jit``: each option of ``jax.jit``, methods, ahead-of-time compilation, donation, and what States may hold."""

import functools
import gc
import inspect
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from brainstate import State, StateTypeError, StateValueError
from brainstate import transform as T
from transforms import EXACT, ROW


@pytest.fixture
def total():
    return State(jnp.array(0.0), name="total")


@pytest.fixture
def mesh():
    return jax.make_mesh((4,), ("d",))


# ------------------------------------------------------------------------------------------ as a decorator


def test_decorates_with_and_without_arguments(total):
    @T.jit
    def first(x):
        """Say so."""
        total.value += x

    @T.jit(inline=True)
    def second(x):
        total.value += x

    @functools.partial(T.jit, static_argnames="n")
    def third(x, n):
        total.value += x * n

    first(1.0), second(2.0), third(3.0, n=2)
    assert float(total.value) == 9.0
    assert (first.__name__, first.__doc__) == ("first", "Say so.")
    assert inspect.signature(third) == inspect.signature(lambda x, n: None)
    assert "first" in repr(first)


@pytest.mark.parametrize("make", [lambda f: functools.partial(f, 2.0), lambda f: type("C", (), {"__call__": f})()])
def test_takes_any_callable(make, total):
    def f(_, x):
        total.value += x
        return 2 * x

    assert float(T.jit(make(f))(3.0)) == 6.0
    assert float(total.value) == 3.0


def test_of_another_transform_is_not_mistaken_for_it():
    def cube(x):
        return x**3

    assert float(T.jit(T.grad(T.jit(cube)))(3.0)) == 27.0
    assert float(T.grad(T.grad(cube))(3.0)) == 18.0
    assert float(T.jit(jax.grad(T.jit(T.grad(cube))))(3.0)) == 18.0


def test_keeps_custom_derivatives():
    @jax.custom_jvp
    def f(x):
        return x * 2

    f.defjvp(lambda primals, tangents: (primals[0] * 2, tangents[0] * 10))
    assert float(T.jit(T.grad(T.jit(f)))(1.0)) == 10.0


def test_refuses_what_is_no_function():
    with pytest.raises(StateTypeError, match="int"):
        T.jit(3)
    with pytest.raises(TypeError, match="bogus"):
        T.jit(lambda: 1, bogus=1)


@pytest.mark.parametrize("name", ["self", "args", "kwargs", "values", "fun", "diff", "call", "states", "_states"])
@pytest.mark.parametrize("row", [ROW["jit"], *(row for row in EXACT.values() if row.mode == "reverse")], ids=str)
def test_any_name_of_a_keyword_will_do(row, name):
    scope = {}
    exec(f"def f(x, {name}): return x ** 3 * {name}", scope)
    got = row.transform(scope["f"])(2.0, **{name: 0.5})
    assert float(got) == row.jax(lambda x: x**3)(2.0) * 0.5


# ------------------------------------------------------------------------------------------ static arguments


def weigh(x, n, *, flag=False):
    return x * (n if isinstance(n, int) else 100) + (1000 if flag is True else 0)


@pytest.mark.parametrize(
    "options",
    [
        {"static_argnums": 1},
        {"static_argnums": (1,)},
        {"static_argnums": -1},
        {"static_argnums": [1], "static_argnames": ["flag"]},
        {"static_argnames": "n"},
        {"static_argnames": ("n", "flag")},
        {"static_argnums": 1, "static_argnames": ("n", "flag")},
        {"static_argnums": ()},
        {},
    ],
    ids=str,
)
def test_static_arguments_are_those_of_jax(options, total):
    def f(x, n, *, flag=False):
        total.value += 1
        return weigh(x, n, flag=flag)

    ours, pure = T.jit(f, **options), jax.jit(weigh, **options)
    for call in (lambda j: j(2.0, 3), lambda j: j(2.0, n=3), lambda j: j(2.0, 4, flag=True)):
        assert float(call(ours)) == float(call(pure))
    assert float(total.value) == 3.0


@pytest.mark.parametrize(
    "options",
    [
        {"static_argnums": 5},
        {"static_argnames": "other"},
        {"donate_argnums": 7},
        {"static_argnums": 0, "donate_argnums": 0},
        {"static_argnums": "x"},
    ],
    ids=str,
)
def test_bad_options_are_refused_as_by_jax(options):
    def f(x):
        return x

    with pytest.raises((ValueError, TypeError)) as theirs:
        jax.jit(f, **options)
    with pytest.raises(theirs.type):
        T.jit(f, **options)


def test_an_unhashable_static_argument_is_an_error(total):
    def f(x, n):
        total.value += x

    with pytest.raises((TypeError, ValueError), match="hash"):
        T.jit(f, static_argnums=1)(1.0, [1])
    assert float(total.value) == 0.0


def test_a_static_argument_arrives_as_it_is():
    seen, given = [], (1, "text", None, (2,))
    T.jit(lambda x, n: seen.append(n), static_argnums=1)(1.0, given)
    assert seen == [given]


# ------------------------------------------------------------------------------------------ donated arguments


@pytest.mark.parametrize("states", [False, True], ids=["", "donate_states"])
@pytest.mark.parametrize(
    "options", [{"donate_argnums": 0}, {"donate_argnums": (0,)}, {"donate_argnames": "x"}, {"donate_argnames": ["x"]}]
)
def test_donated_arguments_are_given_away(options, states):
    s = State(jnp.ones(2))

    def f(x, y):
        s.value = s.value + y
        return x + y

    step = T.jit(f, donate_states=states, **options)
    for _ in range(2):
        x, y, old = jnp.ones(2), jnp.ones(2), s.value
        step(x, y)
        assert (x.is_deleted(), y.is_deleted(), old.is_deleted()) == (True, False, states)
    np.testing.assert_array_equal(s.value, [3.0, 3.0])


@pytest.mark.parametrize("states", [False, True], ids=["", "donate_states"])
def test_a_donated_argument_may_be_a_keyword_only(states):
    s = State(jnp.ones(2))

    def f(x, *, y):
        s.value = s.value + x
        return y + x

    y = jnp.ones(2)
    T.jit(f, donate_states=states, donate_argnames="y")(jnp.ones(2), y=y)
    assert y.is_deleted()


# ------------------------------------------------------------------------------------------ other options


def test_keep_unused_keeps_arguments():
    s = State(jnp.ones(2))

    def f(x, unused):
        s.value = s.value + x
        return x

    def inputs(**options):
        text = T.jit(f, **options).lower(jnp.ones(2), jnp.ones(3)).compile().as_text()
        return text.split("entry_computation_layout={(")[1].split(")->")[0].count("f32[")

    assert (inputs(), inputs(keep_unused=True)) == (2, 3)


@pytest.mark.parametrize("inline", [False, True])
def test_inline_is_that_of_jax(inline, total):
    def f(x):
        total.value += x
        return x

    def pure(total, x):
        return total + x, x

    def inner_programs(traced):
        return [e.params.get("inline") for e in traced.jaxpr.jaxpr.eqns if e.primitive.name in ("jit", "pjit")]

    inner, pure_inner = T.jit(f, inline=inline), jax.jit(pure, inline=inline)
    ours = T.jit(lambda x: inner(x)).trace(1.0)
    theirs = jax.jit(lambda total, x: pure_inner(total, x)).trace(0.0, 1.0)
    assert inner_programs(ours) == inner_programs(theirs)


def test_compiler_options_reach_the_compiler(total):
    def f(x):
        total.value += x

    T.jit(f, compiler_options={"xla_backend_optimization_level": 0})(1.0)
    assert float(total.value) == 1.0
    with pytest.raises(Exception, match="xla_no_such_option"):
        T.jit(f, compiler_options={"xla_no_such_option": 1})(1.0)
    assert float(total.value) == 1.0


@pytest.mark.parametrize("form", ["one", "tuple", "list", "none"])
@pytest.mark.parametrize("donates", [False, True], ids=["", "donate_states"])
def test_in_shardings_are_those_of_jax(form, donates, mesh):
    s, split = State(jnp.zeros(4)), NamedSharding(mesh, P("d"))
    given = {"one": split, "tuple": (split, None), "list": [split, None], "none": None}[form]

    def pure(x, y=None):
        return x * 2

    def f(x, y=None):
        s.value = s.value + x
        return x * 2

    x = jnp.arange(4.0)
    rest = (jnp.ones(4),) if form in ("tuple", "list") else ()
    step = T.jit(f, in_shardings=given, donate_states=donates)
    for _ in range(2):
        got, expected = step(x, *rest), jax.jit(pure, in_shardings=given)(x, *rest)
        np.testing.assert_array_equal(got, expected)
        assert got.sharding.is_equivalent_to(expected.sharding, 1)
    np.testing.assert_array_equal(s.value, 2 * x)


def test_in_shardings_with_static_arguments(mesh):
    s, split = State(jnp.zeros(4)), NamedSharding(mesh, P("d"))

    def f(x, n):
        s.value = s.value + x * n
        return x

    for options in ({"static_argnums": 1}, {"static_argnames": "n"}):
        assert T.jit(f, in_shardings=split, **options)(jnp.arange(4.0), 2).sharding.is_equivalent_to(split, 1)
    np.testing.assert_array_equal(s.value, 4 * np.arange(4.0))


def test_one_sharding_for_any_number_of_arguments(mesh):
    s, split = State(jnp.zeros(4)), NamedSharding(mesh, P("d"))

    def f(*xs, n=1):
        s.value = s.value + sum(xs) * n
        return xs

    x = jnp.arange(4.0)
    step = T.jit(f, in_shardings=split, static_argnames="n")
    for count in (1, 3, 1):
        assert all(y.sharding.is_equivalent_to(split, 1) for y in step(*[x] * count))
    np.testing.assert_array_equal(s.value, 5 * np.arange(4.0))
    assert step.lower(x, x).compile()(x, x)[1].sharding.is_equivalent_to(split, 1)
    np.testing.assert_array_equal(s.value, 7 * np.arange(4.0))
    with pytest.raises(ValueError, match="kwargs"):  # JAX's own rule
        step(x, n=2)


def test_out_shardings_concern_the_result(mesh):
    s, split = State(jnp.zeros(4)), NamedSharding(mesh, P("d"))

    @T.jit(out_shardings={"y": split, "z": None})
    def f(x):
        s.value = s.value + x
        return {"y": x, "z": x.sum()}

    assert f(jnp.arange(4.0))["y"].sharding.is_equivalent_to(split, 1)
    np.testing.assert_array_equal(s.value, np.arange(4.0))


def test_states_keep_their_sharding(mesh):
    split = NamedSharding(mesh, P("d"))
    s = State(jax.device_put(jnp.zeros(4), split))

    @T.jit(donate_states=True)
    def f():
        s.value = s.value + 1

    f(), f()
    assert s.value.sharding.is_equivalent_to(split, 1)
    np.testing.assert_array_equal(s.value, np.full(4, 2.0))


# ------------------------------------------------------------------------------------------ methods


class Counter:
    def __init__(self):
        self.n = State(jnp.array(0.0))

    @T.jit
    def add(self, x):
        """Add."""
        self.n.value += x
        return self.n.value

    @functools.partial(T.jit, static_argnums=1)
    def times(self, x, n):
        self.n.value += x * n

    @functools.partial(T.jit, static_argnames="n")
    def named(self, x, n):
        self.n.value += x * n

    @T.jit
    @T.grad
    def slope(self, x):
        self.n.value += 1
        return x**3

    @T.grad
    @T.jit
    def slope_of_jit(self, x):
        self.n.value += 1
        return x**3

    @staticmethod
    @T.jit
    def static(x):
        return x * 2


def test_methods_belong_to_their_instance():
    a, b = Counter(), Counter()
    a.add(1.0), a.add(2.0), b.add(10.0)
    assert (float(a.n.value), float(b.n.value)) == (3.0, 10.0)
    assert a.add.__doc__ == "Add." and a.add.__self__ is a


def test_methods_count_arguments_after_self():
    a = Counter()
    a.times(1.0, 2), a.times(1.0, n=3), a.named(1.0, n=4), a.named(1.0, 5)
    assert float(a.n.value) == 14.0


def test_static_methods():
    assert float(Counter.static(1.0)) == float(Counter().static(1.0)) == 2.0


def test_methods_combine_with_grad():
    a = Counter()
    assert float(a.slope_of_jit(2.0)) == 12.0
    assert float(a.slope(2.0)) == 12.0
    assert float(a.n.value) == 2.0


def test_methods_compile_once_per_instance():
    runs = []

    class C:
        @T.jit
        def f(self, x):
            runs.append(1)
            return x

    a, b = C(), C()
    for _ in range(3):
        a.f(1.0), b.f(1.0)
    assert len(runs) == 2


def test_a_method_does_not_keep_its_instance_alive():
    a = Counter()
    a.add(1.0)
    alive, state = weakref.ref(a), weakref.ref(a.n)
    del a
    gc.collect()
    assert alive() is None and state() is None


def test_a_bound_method_keeps_its_instance_alive():
    add = Counter().add
    gc.collect()
    assert [float(add(1.0)), float(add(1.0))] == [1.0, 2.0]


def test_methods_have_all_of_jit():
    a = Counter()
    assert a.add.lower(2.0).compile()(2.0) == 2.0
    assert a.add.eval_shape(1.0).shape == ()
    a.add.clear_cache()
    assert float(a.add(1.0)) == 3.0


# ------------------------------------------------------------------------------------------ ahead of time


def test_trace_lower_compile_and_call():
    runs, s = [], State(jnp.array(1.0))

    @T.jit
    def f(x, *, k=2.0):
        runs.append(1)
        s.value = s.value + x
        return {"y": x * k}

    traced = f.trace(1.0, k=3.0)
    assert float(s.value) == 1.0
    assert set(traced.out_info[0] if isinstance(traced.out_info, tuple) else traced.out_info) == {"y"}
    for compiled in (f.lower(1.0, k=3.0).compile(), traced.lower().compile()):
        before = float(s.value)
        assert float(compiled(1.0, k=3.0)["y"]) == 3.0
        assert float(s.value) == before + 1.0
        assert "HloModule" in compiled.as_text() and compiled.cost_analysis()
    assert len(runs) == 1
    f(1.0, k=3.0)
    assert len(runs) == 1 and float(s.value) == 4.0


def test_what_was_compiled_sees_present_values():
    s = State(jnp.array(1.0))
    compiled = T.jit(lambda x: s.value * x).lower(1.0).compile()
    s.value = jnp.array(5.0)
    assert float(compiled(2.0)) == 10.0


def test_compiled_with_static_arguments():
    s = State(jnp.array(1.0))

    def f(x, n):
        s.value = s.value + x * n

    T.jit(f, static_argnums=1).lower(1.0, 3).compile()(1.0)
    assert float(s.value) == 4.0


def test_compiled_with_donated_states():
    s = State(jnp.ones(2))

    @T.jit(donate_states=True)
    def f(x):
        s.value = s.value + x

    compiled, old = f.lower(1.0).compile(), s.value
    compiled(1.0)
    assert old.is_deleted()
    np.testing.assert_array_equal(s.value, [2.0, 2.0])


def test_compiling_other_shapes_with_other_states_leaves_what_was_compiled():
    a, b = State(jnp.array(1.0)), State(jnp.array(10.0))

    def f(x):
        a.value += 1
        if x.ndim:
            b.value += 1

    step = T.jit(f)
    scalar = step.lower(1.0 * jnp.ones(())).compile()
    step(jnp.ones(2))
    scalar(jnp.ones(()))
    assert (float(a.value), float(b.value)) == (3.0, 11.0)


def test_eval_shape_computes_nothing(total):
    @T.jit
    def f(x):
        total.value += x
        return {"y": jnp.zeros((2, 3))}

    shape = f.eval_shape(1.0)
    assert shape["y"].shape == (2, 3)
    assert float(total.value) == 0.0
    f(1.0)
    assert float(total.value) == 1.0


def test_lowering_a_function_that_creates_a_state(total):
    cache = {}

    @T.jit
    def f(x):
        if "s" not in cache:
            cache["s"] = State(jnp.array(0.0))
        cache["s"].value += x
        return cache["s"].value

    for _ in range(2):
        cache.clear()
        with pytest.raises(StateValueError, match=r"created by the function and outlives it.*Call the function once"):
            f.lower(1.0)
    cache.clear()
    assert f.eval_shape(1.0).shape == ()
    cache.clear()
    assert [float(f(1.0)), float(f(1.0)), float(f.lower(1.0).compile()(1.0))] == [1.0, 2.0, 3.0]


def test_clear_cache_traces_again(total):
    runs = []

    @T.jit
    def f(x):
        runs.append(1)
        total.value += x

    f(1.0)
    f.clear_cache()
    f(1.0), f(1.0)
    assert len(runs) == 2 and float(total.value) == 3.0


# ------------------------------------------------------------------------------------------ disable_jit


def test_disable_jit_runs_plain_python(total):
    seen = []

    @T.jit(static_argnums=1)
    def f(x, name):
        seen.append(type(x).__name__)
        total.value = total.value * x if total.value > 2 else total.value + x
        return name == "a"

    with jax.disable_jit():
        results = [f(2.0, "a") for _ in range(3)]
    assert results == [True] * 3 and float(total.value) == 8.0
    assert len(seen) == 3 and "Tracer" not in "".join(seen)


@pytest.mark.parametrize("donates", [False, True])
def test_disable_jit_in_between(donates):
    s = State(jnp.array(0.0))

    @T.jit(donate_states=donates)
    def f(x):
        s.value = s.value + x

    f(1.0)
    with jax.disable_jit():
        f(2.0), f(3.0)
    f(4.0)
    assert float(s.value) == 10.0


def test_disable_jit_with_a_gradient_that_writes():
    w, c = State(jnp.array(2.0)), State(jnp.array(0.0))

    def f(x):
        c.value = c.value + x * w.value
        return w.value**2 * x

    with jax.disable_jit():
        by_state, by_argument = T.jit(T.grad(f, w, 0))(3.0)
    assert (float(by_state), float(by_argument), float(c.value)) == (12.0, 4.0, 6.0)


# ------------------------------------------------------------------------------------------ donate_states


def test_donate_states_deletes_the_old_buffer():
    s = State(jnp.ones(4))

    @T.jit(donate_states=True)
    def f():
        s.value = s.value + 1

    for k in range(3):
        old = s.value
        f()
        assert old.is_deleted()
        np.testing.assert_array_equal(s.value, np.full(4, k + 2.0))


def test_read_only_states_are_not_donated():
    s, r = State(jnp.ones(2)), State(jnp.ones(2))

    @T.jit(donate_states=True)
    def f():
        s.value = s.value + r.value

    kept = r.value
    f(), f()
    assert r.value is kept and not kept.is_deleted()


def test_an_array_shared_by_states_is_copied():
    x = jnp.ones(3)
    a, b, r = State(x), State({"x": x, "y": x}), State(x)

    @T.jit(donate_states=True)
    def f():
        a.value = a.value + 1
        b.value = {k: v + 2 for k, v in b.value.items()}
        return r.value * 1

    np.testing.assert_array_equal(f(), np.ones(3))
    np.testing.assert_array_equal(a.value, np.full(3, 2.0))
    np.testing.assert_array_equal(b.value["y"], np.full(3, 3.0))
    assert r.value is x and not x.is_deleted()


def test_what_a_derivative_around_may_still_undo_is_not_given_away():
    count, w = State({"n": jnp.ones(3)}, name="count"), State(jnp.array(2.0))
    before = count.value["n"]

    @T.jit(donate_states=True)
    def step():
        count.value = {"n": count.value["n"] + 1}

    def loss(fails):
        step()
        if fails:
            raise RuntimeError("boom")
        return w.value**2 * count.value["n"].sum()

    with pytest.raises(RuntimeError, match="boom"):
        T.grad(loss, w)(True)
    assert count.value["n"] is before and not before.is_deleted()
    assert T.grad(loss, w)(False) == 24.0 and count.value["n"].tolist() == [2.0] * 3
    step()
    assert count.value["n"].tolist() == [3.0] * 3


def test_a_donated_value_may_be_an_argument_too():
    s = State(jnp.ones(3))

    @T.jit(donate_states=True)
    def f(x):
        s.value = s.value + x

    f(jnp.ones(3))
    f(s.value)
    np.testing.assert_array_equal(s.value, np.full(3, 4.0))


def test_a_branch_that_does_not_write_leaves_a_donated_state():
    s, t = State(jnp.ones(3)), State(jnp.zeros(3))

    @T.jit(donate_states=True, static_argnums=0)
    def f(write):
        if write:
            s.value = s.value + 1
        else:
            t.value = t.value + s.value

    for write in (True, False, False, True, False):
        f(write)
    np.testing.assert_array_equal(s.value, np.full(3, 3.0))
    np.testing.assert_array_equal(t.value, np.full(3, 7.0))


def test_a_state_that_another_branch_writes_is_donated_from_then_on():
    s, t = State(jnp.ones(3)), State(jnp.zeros(3))

    @T.jit(donate_states=True, static_argnums=0)
    def f(write):
        if write:
            s.value = s.value + 1
        else:
            t.value = t.value + s.value

    f(False), f(True)
    old = s.value
    f(True)
    assert old.is_deleted()


def test_a_state_that_is_first_met_read_only_is_traced_once_more_when_it_is_donated():
    s, t, runs = State(jnp.ones(3)), State(jnp.zeros(3)), []

    @T.jit(donate_states=True, static_argnums=0)
    def f(write):
        runs.append(write)
        if write:
            s.value = s.value + 1
        else:
            t.value = t.value + s.value

    ahead = f.lower(False).compile()
    for write in (False, True, True, False, False):
        f(write)
    ahead()  # knows nothing of what was donated since
    np.testing.assert_array_equal(s.value, np.full(3, 3.0))
    np.testing.assert_array_equal(t.value, np.full(3, 10.0))
    assert runs == [False, True, False]


def test_donation_under_another_jit():
    s = State(jnp.ones(3))
    inner = T.jit(lambda: setattr(s, "value", s.value + 1), donate_states=True)

    @T.jit
    def outer():
        inner()
        between = s.value
        inner()
        return between

    np.testing.assert_array_equal(outer(), np.full(3, 2.0))
    np.testing.assert_array_equal(s.value, np.full(3, 3.0))


def test_donation_of_states_that_hold_no_arrays():
    s = State({"a": np.ones(3, "float32"), "b": 2.0, "n": None})

    @T.jit(donate_states=True)
    def f():
        v = s.value
        s.value = {"a": v["a"] * v["b"], "b": v["b"] + 1, "n": None}

    f(), f()
    np.testing.assert_array_equal(s.value["a"], np.full(3, 6.0))
    assert float(s.value["b"]) == 4.0


# ------------------------------------------------------------------------------------------ what States hold


@pytest.mark.parametrize(
    "value", [1, 1.5, True, 1j, np.float32(2), np.arange(3), jnp.arange(3), np.bool_(True)], ids=repr
)
def test_values_that_are_only_read_stay_what_they_are(value):
    s = State(value)
    np.testing.assert_array_equal(T.jit(lambda: jnp.asarray(s.value))(), value)
    assert s.value is value


def test_a_python_number_becomes_an_array_when_written():
    s = State(1)

    @T.jit
    def f():
        s.value += 1

    f(), f()
    assert isinstance(s.value, jax.Array) and int(s.value) == 3


def test_pytrees_may_change_their_structure():
    s = State({"a": jnp.ones(2)})

    @T.jit
    def grow():
        v = s.value
        s.value = {**v, str(len(v)): v["a"] * (len(v) + 1)}

    grow(), grow()
    assert sorted(s.value) == ["1", "2", "a"]
    np.testing.assert_array_equal(s.value["2"], np.full(2, 3.0))


def test_in_place_changes_of_a_container_count():
    s = State({"a": jnp.ones(2), "l": [jnp.array(1.0)]})

    @T.jit
    def f(x):
        s.value["a"] = s.value["a"] * x
        s.value["l"].append(x)

    f(3.0), f(2.0)
    np.testing.assert_array_equal(s.value["a"], np.full(2, 6.0))
    assert [float(v) for v in s.value["l"]] == [1.0, 3.0, 2.0]


def test_none_may_be_read_and_written():
    s = State(None)

    @T.jit
    def toggle(x):
        s.value = x if s.value is None else None
        return x

    seen = []
    for _ in range(4):
        toggle(2.0)
        seen.append(None if s.value is None else float(s.value))
    assert seen == [2.0, None, 2.0, None]


def test_a_key_may_be_held():
    s = State(jax.random.key(0))

    @T.jit
    def draw():
        s.value, sub = jax.random.split(s.value)
        return jax.random.normal(sub)

    key, sub = jax.random.split(jax.random.key(0))
    assert float(draw()) == float(jax.random.normal(sub))
    assert bool((jax.random.key_data(s.value) == jax.random.key_data(key)).all())


def test_text_cannot_be_an_input():
    s = State("text", name="label")
    with pytest.raises(StateTypeError, match="label"):
        T.jit(lambda: s.value)()
    assert s.value == "text"


def test_states_are_no_arguments_and_no_results(total):
    with pytest.raises(StateValueError, match="total"):
        T.jit(lambda x: x)(total)
    with pytest.raises(StateValueError, match="total"):
        T.jit(lambda: {"a": total})()
    assert float(total.value) == 0.0


def test_a_state_written_and_never_read_is_no_input(total):
    step = T.jit(lambda x: setattr(total, "value", x))
    step(jnp.array(3.0)), step(jnp.array(4.0))
    assert float(total.value) == 4.0
    assert len(step.trace(jnp.array(1.0)).jaxpr.jaxpr.invars) == 1


def test_recursion(total):
    @T.jit(static_argnums=0)
    def f(n):
        total.value += 1
        if n:
            f(n - 1)
        return total.value

    assert [float(f(3)), float(f(3)), float(f(1))] == [4.0, 8.0, 10.0]


def test_an_input_that_died_with_an_outer_call_is_forgotten():
    box = {}

    @T.jit
    def inner():
        box["s"].value += 1.0
        return box["s"].value

    @T.jit
    def outer():
        box["s"] = State(jnp.array(0.0))
        inner()
        raise KeyError("outer")

    with pytest.raises(KeyError, match="outer"):
        outer()
    box["s"] = State(jnp.array(5.0))
    assert [float(inner()), float(inner())] == [6.0, 7.0]
