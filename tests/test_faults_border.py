"""Fault A1: JAX's own transforms, and what is built on them, around functions that live long and read a State.

JAX finds again what it has traced by the identity of the function. Each row of ``KINDS`` is such a function, defined
once and used by all tests of this file, beside the same computation without States. It has to be right however it is
used, whatever it was used for before, with the value of the State changed in between.
"""

import threading
import warnings

import diffrax
import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest

from _covering import few
from brainstate import FrozenReadWarning, ParamState, State, StateTypeError, StateValueError, TraceContextError, nn
from brainstate import transform as T
from brainstate._seam import tokens as border

pytestmark = pytest.mark.filterwarnings("ignore::brainstate.FrozenReadWarning")

w = ParamState(jnp.array(2.0), name="w")
tree = ParamState({"a": jnp.array(2.0)}, name="tree")


class Holder(nn.Module):
    """A Module that keeps a function compiled by JAX."""

    def __init__(self):
        super().__init__()
        self.w = w
        self.kernel = jax.jit(lambda x: x * self.w.value)


def times(x):
    return x * w.value


def step(carry, _):
    return carry * w.value, None


@jax.custom_jvp
def ruled_forward(x):
    return x * w.value


ruled_forward.defjvp(lambda primals, tangents: (ruled_forward(*primals), tangents[0] * w.value))


@jax.custom_vjp
def ruled_backward(x):
    return x * w.value


ruled_backward.defvjp(lambda x: (x * w.value, None), lambda _, ct: (ct * w.value,))

kernel = Holder().kernel
compiled, filtered, remembered, lanes = jax.jit(times), eqx.filter_jit(times), jax.checkpoint(times), jax.vmap(times)
of_compiled = jax.jit(lambda x: compiled(x) * w.value)
of_remembered = jax.checkpoint(lambda x: compiled(x) * w.value)
of_lanes = jax.jit(jax.vmap(lambda x: x * w.value))
of_derivative = jax.jit(lambda x: T.grad(lambda y: y * w.value)(x) * x)
of_ours = jax.jit(lambda x: T.for_loop(lambda y: y * w.value, jnp.stack([x, x])).sum())
of_remat = jax.jit(T.checkpoint(times))
residual = lambda y, args: y**3 - w.value  # noqa: E731


def power(n):
    return lambda w, x: x * w**n


# name: (a function that reads w, the same of w and x)
KINDS = {
    "jit": (compiled, power(1)),
    "jit in jit": (of_compiled, power(2)),
    "jit in a Module": (kernel, power(1)),
    "filter_jit": (filtered, power(1)),
    "checkpoint": (remembered, power(1)),
    "jit in checkpoint": (of_remembered, power(2)),
    "vmap": (lambda x: lanes(jnp.stack([x, 2 * x])).sum(), lambda w, x: 3 * x * w),
    "vmap in jit": (lambda x: of_lanes(jnp.stack([x, 2 * x])).sum(), lambda w, x: 3 * x * w),
    "scan": (lambda x: jax.lax.scan(step, x, None, length=3)[0], power(3)),
    "map": (lambda x: jax.lax.map(times, jnp.stack([x, x])).sum(), lambda w, x: 2 * x * w),
    "cond": (lambda x: jax.lax.cond(x > 0, times, jnp.sin, x), power(1)),
    "switch": (lambda x: jax.lax.switch(1, [jnp.sin, times], x), power(1)),
    "fori_loop": (lambda x: jax.lax.fori_loop(0, 3, lambda i, c: times(c), x), power(3)),
    "our derivative in jit": (of_derivative, power(1)),
    "our loop in jit": (of_ours, lambda w, x: 2 * x * w),
    "our checkpoint in jit": (of_remat, power(1)),
    "a container": (jax.jit(lambda x: x * tree.value["a"]), power(1)),
    "optimistix": (
        lambda x: optimistix.root_find(residual, optimistix.Newton(1e-6, 1e-6), x).value,
        lambda w, x: w ** (1 / 3) + 0.0 * x,
    ),
}


def both(f):
    """Return what a call gives that uses ``f`` between two writes, all of which are undone."""

    def run(x):
        before = w.value, tree.value
        first = f(x)
        w.value, tree.value = w.value * 2, {"a": tree.value["a"] * 2}
        second = f(x)
        w.value, tree.value = before
        return first, second

    return run


def two(g):
    return lambda w, x: (g(w, x), g(2 * w, x))


def slope(g):
    return lambda w, x: (jax.grad(g)(w, x), jax.grad(g, 1)(w, x))


def states(f):
    return tree if f is KINDS["a container"][0] else w


def of(gradient, f):
    """Return the gradient of a State with respect to which ``f`` is differentiated, without its container."""
    by_state, by_argument = gradient
    return (by_state["a"] if states(f) is tree else by_state), by_argument


# name: (what a user makes of the function, what it has to give)
USES = {
    "plainly": (lambda f: f, lambda g: g),
    "jit": (lambda f: T.jit(lambda x: f(x)), lambda g: g),
    "jit, twice with a derivative between": (
        lambda f: T.jit(lambda x: (f(x), of(T.grad(f, states(f), 0)(x), f), f(x))),
        lambda g: lambda w, x: (g(w, x), slope(g)(w, x), g(w, x)),
    ),
    "jit, with a write between": (lambda f: T.jit(both(f)), two),
    "with a write between": (both, two),
    "grad": (lambda f: lambda x: of(T.grad(f, states(f), 0)(x), f), slope),
    "jit of grad": (lambda f: T.jit(lambda x: of(T.grad(f, states(f), 0)(x), f)), slope),
    "for_loop": (
        lambda f: lambda x: T.for_loop(lambda y: f(y), jnp.stack([x, 2 * x])),
        lambda g: lambda w, x: jnp.stack([g(w, x), g(w, 2 * x)]),
    ),
    "jit in jit": (lambda f: T.jit(lambda x: T.jit(lambda y: f(y))(x) + f(x)), lambda g: lambda w, x: 2 * g(w, x)),
    "vmap": (lambda f: lambda x: T.vmap(lambda y: f(y))(x[None]), lambda g: lambda w, x: g(w, x)[None]),
    "jax.grad": (lambda f: jax.grad(f), lambda g: jax.grad(g, 1)),
    "jax.jit": (lambda f: jax.jit(lambda x: f(x)), lambda g: g),
}


def put(value):
    w.value, tree.value = jnp.float32(value), {"a": jnp.float32(value)}


@pytest.mark.parametrize("every", few([6, 1]))
@pytest.mark.parametrize("kind", KINDS)
def test_a1_long_lived_functions_of_jax(kind, every):
    """One function in all uses, or every sixth, those made before a change of the value included, in both orders."""
    f, g = KINDS[kind]
    x = jnp.float32(1.5)
    uses = [*USES][[*KINDS].index(kind) % every :: every]
    made = {use: USES[use][0](f) for use in uses}
    for value, order in ((2.0, uses), (3.0, uses[::-1])):
        put(value)
        for use in order:
            want = USES[use][1](g)(jnp.float32(value), x)
            got = made[use](x)
            np.testing.assert_allclose(
                jax.tree.leaves(got), jax.tree.leaves(want), rtol=2e-5, err_msg=f"{kind}, {use}, {value}"
            )


@pytest.mark.parametrize("first", ["plainly", "grad", "jit", "for_loop", "jax.jit"])
@pytest.mark.parametrize("second", ["plainly", "grad", "jit, with a write between"])
def test_a1_the_first_meeting_may_be_anywhere(first, second):
    f = jax.jit(lambda x: x * w.value)
    for use, value in ((first, 2.0), (second, 2.0), (second, 5.0), (first, 5.0)):
        put(value)
        want = USES[use][1](power(1))(jnp.float32(value), jnp.float32(1.5))
        got = USES[use][0](f)(jnp.float32(1.5))
        np.testing.assert_allclose(jax.tree.leaves(got), jax.tree.leaves(want), err_msg=use)


@pytest.mark.parametrize("adjoint", ["RecursiveCheckpointAdjoint", "DirectAdjoint", "ForwardMode"])
def test_a1_diffrax_with_a_vector_field_of_a_module_level(adjoint):
    solve, g = solver(adjoint), lambda w, x: x * jnp.exp(-w)
    derivative = (jax.jacfwd, T.jacfwd) if adjoint == "ForwardMode" else (jax.grad, T.grad)
    compiled_solve, compiled_slope = T.jit(lambda x: solve(x)), T.jit(derivative[1](solve, w, 0))
    for value in (2.0, 3.0):
        put(value)
        x = jnp.float32(1.5)
        want = derivative[0](g, (0, 1))(jnp.float32(value), x)
        np.testing.assert_allclose([solve(x), compiled_solve(x)], [g(value, x)] * 2, rtol=1e-4)
        np.testing.assert_allclose(compiled_slope(x), want, rtol=1e-3)
    np.testing.assert_allclose(derivative[1](solve, w)(x), want[0], rtol=1e-3)


def test_a1_diffrax_backsolve_is_refused_by_name_where_the_state_is_differentiated():
    solve = solver("BacksolveAdjoint")
    put(2.0)
    np.testing.assert_allclose(T.grad(solve)(jnp.float32(1.5)), jnp.exp(-2.0), rtol=1e-3)
    for gradient in (T.grad(solve, w), T.jit(T.grad(solve, w)), T.jit(T.grad(solve))):
        with pytest.raises(TraceContextError, match=r"'w' is read in a function or rule of .*library.*state\.value"):
            gradient(jnp.float32(1.5))


field = diffrax.ODETerm(lambda t, y, args: -w.value * y)


def solver(adjoint):
    def solve(x):
        method = getattr(diffrax, adjoint)()
        return diffrax.diffeqsolve(field, diffrax.Tsit5(), 0.0, 1.0, 0.05, x, adjoint=method).ys[0]

    return solve


# ------------------------------------------------------------------------------------------ functions with rules


@pytest.mark.parametrize("ruled", [ruled_forward, ruled_backward], ids=["custom_jvp", "custom_vjp"])
def test_a1_what_a_custom_rule_of_jax_closes_over_has_no_derivative(ruled):
    """As in JAX, whose text would speak of a leak; with respect to the argument all is right."""
    slope = T.jit(T.grad(ruled))
    for value in (2.0, 3.0):
        put(value)
        assert ruled(1.5) == T.jit(ruled)(1.5) == 1.5 * value
        assert T.grad(ruled)(1.5) == slope(1.5) == value
        loops = (T.for_loop(ruled, jnp.ones(2)), T.vmap(ruled)(jnp.ones(2)))
        assert [y.tolist() for y in loops] == [[value] * 2] * 2
    for gradient in (T.grad(ruled, w), T.jit(T.grad(ruled, w)), T.grad(T.jit(lambda x: ruled(x)), w)):
        with pytest.raises(TraceContextError, match=r"'w' is read in a function or rule of jax.custom_jvp or .*states"):
            gradient(1.5)
    assert w.value == 3.0


@pytest.mark.parametrize("ruled", [ruled_forward, ruled_backward], ids=["custom_jvp", "custom_vjp"])
def test_a1_a_rule_that_jax_keeps_may_read_no_state(ruled):
    """JAX runs it when the compiled function has ended, and keeps what it read."""
    put(2.0)
    for outer in (T.grad, jax.grad, lambda f: T.jit(T.grad(f)), lambda f: jax.jit(jax.grad(f))):
        with pytest.raises(TraceContextError, match="'w' is read in a function or rule"):
            outer(T.jit(lambda x: ruled(x)))(1.5)


# ------------------------------------------------------------------------------------------ threads, copies, warnings


def test_a1_in_threads():
    """Each thread has a State of its own; the compiled function is one for all."""
    mine = threading.local()
    shared = jax.jit(lambda x: x * mine.state.value)
    wrong = []

    def work(n):
        mine.state = ParamState(jnp.float32(n))
        for k in range(3):
            value = mine.state.value
            got = T.grad(lambda x: shared(x) ** 2, mine.state)(3.0), T.jit(lambda x: shared(x))(1.0)
            if got != (18 * value, value):
                wrong.append((n, k, got))
            mine.state.value = value + 10

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a1_another_state_in_its_place():
    model = nn.Linear(1, 1, w_init=jnp.ones, b_init=None)
    f = jax.jit(lambda x: model(x))
    assert f(jnp.ones(1)) == 1.0
    model.weight = ParamState(jnp.full((1, 1), 5.0))
    assert f(jnp.ones(1)) == 5.0 == T.jit(f)(jnp.ones(1))


def test_a1_a_container_changed_in_place():
    put(2.0)
    f = KINDS["a container"][0]
    assert f(1.0) == 2.0
    tree.value["a"] = jnp.float32(7.0)
    assert f(1.0) == 7.0 == T.jit(f)(1.0)

    @T.jit
    def step(x):
        before = f(x)
        tree.value["a"] = tree.value["a"] + 1
        return before, f(x)

    assert step(1.0) == (7.0, 8.0) and f(1.0) == 8.0


def test_a1_compiled_steps_and_prepared_programs_are_not_traced_again():
    runs = []

    def step(x):
        runs.append(1)
        w.value = w.value + x
        return compiled(x)

    put(1.0)
    compiled(1.0)
    jitted, prepared = T.jit(step), T.prepare(step, jnp.float32(1.0))
    for n in range(4):
        jitted(jnp.float32(1.0)), prepared(jnp.float32(1.0))
        assert compiled(1.0) == w.value == 3.0 + 2 * n
    assert len(runs) == 2


def test_a1_the_user_is_told_once_a_line():
    s, read = State(jnp.float32(1.0), name="s"), []

    def reads(x):
        return x * s.value

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for outer in (jax.jit(reads), jax.jit(lambda x: reads(x) + 1)):
            for value in (1.0, 2.0):
                s.value = jnp.float32(value)
                read.append(float(outer(1.0)))
        for _ in range(2):
            T.jit(lambda x: jax.jit(reads)(x))(1.0)
    assert read == [1.0, 2.0, 2.0, 3.0]
    assert [w.category for w in caught] == [FrozenReadWarning] and "State 's' was read" in str(caught[0].message)


def test_a1_an_error_leaves_nothing_behind():
    """A State that only a failed trace of JAX's own has met costs nothing later."""
    s = State(jnp.float32(1.0), name="s")

    def bad(x):
        s.value = s.value + x

    with pytest.raises(TraceContextError, match="'s' was written inside a raw JAX transform"):
        jax.jit(bad)(1.0)
    before = border.token()
    s.value = 2.0
    assert border.token() == before


def test_a1_memory_of_dead_programs_is_given_back(monkeypatch):
    cleared = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(1))
    monkeypatch.setattr(border, "_TIDY", 3)
    f = jax.jit(lambda: w.value)
    for n in range(9):
        f()
        put(n)
    assert len(cleared) >= 2


# ------------------------------------------------------------------------------------------ functional, substituted


def world():
    a, b = ParamState(jnp.array([1.0, 2.0]), name="a"), State({"n": 0, "sum": jnp.zeros(2)}, name="b")

    def f(x):
        b.value = {"n": b.value["n"] + 1, "sum": b.value["sum"] + a.value * x}
        return (a.value * x).sum()

    return a, b, f


def twin(values, x):
    a, b = values
    return (a * x).sum(), (a, {"n": b["n"] + 1, "sum": b["sum"] + a * x})


RAW = {
    "plainly": lambda f: f,
    "jit": jax.jit,
    "grad": lambda f: lambda v, x: jax.grad(lambda a: f((a, v[1]), x), has_aux=True)(v[0]),
    "vmap": lambda f: lambda v, x: jax.vmap(lambda x: f(v, x))(jnp.stack([x, 2 * x])),
    "scan": lambda f: lambda v, x: jax.lax.scan(lambda v, x: f(v, x)[::-1], v, jnp.stack([x, x])),
    "checkpoint": jax.checkpoint,
    "ours": lambda f: T.jit(T.checkpoint(f)),
}


@pytest.mark.parametrize("raw", RAW)
@pytest.mark.parametrize("found", [False, True])
def test_functional_is_pure(raw, found):
    a, b, f = world()
    pure, values = T.functional(f, None, 1.0) if found else T.functional(f, (a, b))
    values = values if values[0] is a.value else values[::-1]
    ordered = pure if not found or T.functional(f, None, 1.0)[1][0] is a.value else swapped(pure)
    got, want = (RAW[raw](g)(values, jnp.float32(3.0)) for g in (ordered, twin))
    jax.tree.map(np.testing.assert_allclose, got, want)
    assert a.value.tolist() == [1.0, 2.0] and b.value["n"] == 0


def swapped(pure):
    def run(values, x):
        out, new = pure(values[::-1], x)
        return out, new[::-1]

    return run


def test_functional_of_a_module_takes_all_its_states_by_path():
    model = nn.Sequential(nn.Linear(2, 3), jnp.tanh, nn.Linear(3, 1))
    pure, values = T.functional(model, model)
    assert set(values) == set(model.states())
    ones = jax.tree.map(jnp.ones_like, values)
    out, new = jax.jit(pure)(ones, jnp.ones(2))
    np.testing.assert_allclose(out, 3 * jnp.tanh(3.0) + 1, rtol=1e-6)
    assert jax.tree.structure(new) == jax.tree.structure(values)


def test_jax_export_takes_a_pure_and_a_compiled_function():
    a, b, f = world()
    pure, values = T.functional(f, {"a": a, "b": b})
    exported = jax.export.export(jax.jit(pure))(values, jnp.float32(3.0))
    out, new = exported.call(values, jnp.float32(3.0))
    assert exported.fun_name == "f" and out == 9.0 and new["b"]["n"] == 1
    exported = jax.export.export(T.jit(f))(jnp.float32(3.0))
    out, (new,) = exported.call([b.value, a.value], jnp.float32(3.0))
    assert exported.fun_name == "f" and out == 9.0 and new["n"] == 1 and b.value["n"] == 0


def test_functional_draws_random_numbers_from_the_values_given():
    model = nn.Dropout(0.5)
    pure, values = T.functional(model, None, jnp.ones(8))
    first, new = pure(values, jnp.ones(8))
    assert (pure(values, jnp.ones(8))[0] == first).all() and not (pure(new, jnp.ones(8))[0] == first).all()


def test_functional_refuses_what_would_be_lost():
    a, b, f = world()
    pure, values = T.functional(f, [a])
    with pytest.raises(StateValueError, match=r"writes or creates State 'b'.*Add it to `states`"):
        pure(values, 1.0)
    kept = []
    pure, values = T.functional(lambda: kept.append(State(1.0, name="new")), [a])
    with pytest.raises(StateValueError, match="creates State 'new'"):
        pure(values)
    for wrong in ({"a": 1.0}, [1.0], a.value):
        with pytest.raises(StateValueError, match="must have the structure of the States"):
            T.functional(f, [a, b])[0](wrong, 1.0)
    with pytest.raises(StateTypeError, match="takes a function; got int"):
        T.functional(3)
    with pytest.raises(StateTypeError, match="example arguments"):
        T.functional(f, [a], 1.0)
    with pytest.raises(StateTypeError, match=r"states\[0\] is an? int"):
        T.functional(f, [3])
    assert b.value["n"] == 0


def test_substituted_inside_and_outside_of_transforms():
    a, b, f = world()

    def inner(x):
        with T.substituted({"a": a}, {"a": a.value * 2}):
            f(x)
            a.value = a.value + 1
        return (a.value * x).sum()

    for run in (inner, T.jit(inner)):
        before = b.value["sum"]
        assert run(1.0) == 3.0 and a.value.tolist() == [1.0, 2.0]
        assert (b.value["sum"] - before).tolist() == [2.0, 4.0]
    with pytest.raises(KeyError), T.substituted(a, jnp.zeros(2)):
        b.value = None
        raise KeyError
    assert b.value["n"] == 2 and a.value.tolist() == [1.0, 2.0]
    with pytest.raises(StateValueError, match="structure of the States"), T.substituted([a], a.value[0]):
        pass
    compiled = T.jit(lambda: a.value.sum())
    assert compiled() == 3.0
    with T.substituted(a, jnp.ones(3)):
        assert compiled() == 3.0 and a.value.shape == (3,)
    with T.substituted(w, jnp.float32(9.0)):
        assert KINDS["jit"][0](1.0) == 9.0
    put(4.0)
    assert KINDS["jit"][0](1.0) == 4.0
