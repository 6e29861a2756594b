"""debug_nan where the derivative is a map that is applied later, and where a program is rewritten on its way."""

import inspect
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import test_nan as planted
from _unchanged import unchanged
from brainstate import NonFiniteError, ParamState, State, nn
from brainstate import random as R
from brainstate import transform as T
from test_nan import ROWS, STATES, b, marked, raised, seen, tree, w


@pytest.fixture(autouse=True)
def anew():
    planted.as_at_the_start()


# ------------------------------------------------------------------------------------------ every planted program


def read_of(row):
    """The States of a row that its program reads, by name."""
    found = T.StateFinder(row.fun, return_type="list")()
    return {name: state for name, state in row.states.items() if any(state is other for other in found)}


def ones(states):
    def one(leaf):
        return jnp.ones_like(leaf) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) else None

    return {name: jax.tree.map(one, state.value) for name, state in states.items()}


def pulled(fun, states):
    out, pull = T.vjp(fun, grad_states=states, argnums=None, debug_nan=True)
    return pull(jnp.ones_like(out))


def pushed(fun, states):
    return T.linearize(fun, grad_states=states, debug_nan=True)[1](ones(states))


def transposed(fun, states):
    out, jacobian = T.linearize(fun, grad_states=states, debug_nan=True)
    return jacobian.T @ jnp.ones_like(out)


def series(fun, states):
    return T.taylor(fun, (), (), 1, grad_states=states, state_directions=ones(states), debug_nan=True)


WAYS: dict[str, Any] = {
    "pulled": pulled,
    "pushed": pushed,
    "transposed": transposed,
    "series": series,
    "sparse jacobian": lambda fun, states: T.sparse_jacobian(fun, states, dense=True, debug_nan=True)(),
    "sparse hessian": lambda fun, states: T.sparse_hessian(fun, states, debug_nan=True)(),
    "norms": lambda fun, states: T.per_example_norms(lambda x: fun() * x, states, debug_nan=True)(jnp.ones(2)),
    "operator": lambda fun, states: T.hvp(fun, states, debug_nan=True).operator().trace(),
}
SOME = [
    planted.root_of_negative,
    planted.root_at_zero,
    planted.overflow,
    planted.norm_at_zero,
    planted.where_trap_log,
    planted.where_trap_exp,
    planted.inside_scan,
    planted.inside_cond,
    planted.inside_our_vmap,
    planted.second_call_of_library,
    planted.backward_of_remat,
    planted.forward_rule,
    planted.fraction_of_powers,
]
FORWARD = ("pushed", "series")  # masks work there: nothing is multiplied by zero
# JAX traces a rule of the user's as a part of the line that calls the function, if a traced program calls it.
REWRITTEN = ("series", "sparse jacobian", "sparse hessian", "norms")


def expected(row, way):
    """The line, and the pass."""
    if row.fun is planted.forward_rule and way in REWRITTEN:
        lines, first = inspect.getsourcelines(row.fun)
        return first + len(lines) - 1, row.phase
    return row.line, row.phase


@pytest.mark.long
@pytest.mark.parametrize("compiled", [False, True], ids=["at once", "jit"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.fun.__name__)
def test_a_pullback_names_the_first_operation(row, compiled):
    def call():
        return pulled(row.fun, states)

    states = read_of(row)
    error = raised(T.jit(call) if compiled else call)
    assert (error.file, error.line, error.phase) == (planted.__file__, row.line, row.phase), error
    assert row.primitive in (None, error.primitive) and row.kind in (None, error.kind), error
    assert row.iteration in (None, error.iteration) and row.branch in (None, error.branch), error


@pytest.mark.crossing
@pytest.mark.parametrize("way", [way for way in WAYS if way != "pulled"])
@pytest.mark.parametrize("row", [row for row in ROWS if row.fun in SOME], ids=lambda row: row.fun.__name__)
def test_other_ways_do_so_too(row, way):
    states = read_of(row)
    if row.fun.__name__.startswith("where_trap") and way in FORWARD:
        with unchanged(*STATES):
            assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(WAYS[way](row.fun, states)))
        return
    error = raised(WAYS[way], row.fun, states)
    assert (error.file, error.line, error.phase) == (planted.__file__, *expected(row, way)), error


# ------------------------------------------------------------------------------------------ when it is applied


def root_of(x):
    return jnp.sqrt(x * b.value)  # <- here


def test_the_product_is_that_of_the_moment_the_map_was_made():
    weight = ParamState(jnp.array([0.0, 1.0]), name="weight")

    def loss():
        return jnp.sqrt(weight.value)  # <- here

    out, pull = T.vjp(loss, grad_states=weight, argnums=None, debug_nan=True)
    _, jacobian = T.linearize(loss, grad_states=weight, debug_nan=True)
    weight.value = jnp.ones(2)
    for call in (pull, jacobian, lambda v: jacobian.T @ v):
        with unchanged(weight), pytest.raises(NonFiniteError) as caught:
            call(jnp.ones_like(out))
        assert caught.value.line == marked(loss) and "float32[2]: 0 .. 1" in str(caught.value)
    weight.value = jnp.ones(2)
    _, pull = T.vjp(loss, grad_states=weight, argnums=None, debug_nan=True)
    weight.value = jnp.zeros(2)
    assert pull(jnp.ones(2)).tolist() == [0.5, 0.5]


def test_each_product_is_judged_alone():
    _, pull = T.vjp(root_of, jnp.array([1.0, 0.0]), argnums=0, debug_nan=True)
    for _ in range(2):
        error = raised(pull, jnp.array([1.0, 1.0]))
        assert error.reached == ("argument 0",) and error.line == marked(root_of)
    _, jacobian = T.linearize(lambda x, y: jnp.sqrt(x) * y, jnp.array(0.0), 2.0, argnums=(0, 1), debug_nan=True)
    assert raised(jacobian, (jnp.array(1.0), jnp.array(0.0))).kind == "Inf"
    error = raised(jacobian.T, jnp.array(1.0))
    assert error.reached == ("argument 0",)


PLACES: dict[str, Any] = {
    "at once": lambda pull: pull(jnp.ones(2)),
    "jit": lambda pull: T.jit(pull)(jnp.ones(2)),
    "vmap": lambda pull: T.jit(T.vmap(pull))(jnp.eye(2)),
    "scan": lambda pull: T.jit(lambda: T.for_loop(pull, jnp.eye(2)))(),
    "cond": lambda pull: T.jit(lambda yes: T.cond(yes, pull, lambda ct: ct, jnp.ones(2)))(True),
    "grad": lambda pull: T.grad(lambda ct: pull(ct).sum())(jnp.ones(2)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("within", [False, True], ids=["made outside", "made inside"])
def test_where_it_is_applied(place, within):
    def bad():
        return PLACES[place](T.vjp(root_of, jnp.array([1.0, 0.0]), debug_nan=True)[1])

    def good():
        return PLACES[place](T.vjp(root_of, jnp.array([1.0, 4.0]), debug_nan=True)[1])

    wanted = PLACES[place](T.vjp(root_of, jnp.array([1.0, 4.0]))[1])
    got = (T.jit(good) if within else good)()
    assert jax.tree.all(jax.tree.map(np.allclose, got, wanted))
    if place == "grad":  # of which only a derivative is used, and that is not watched
        if not within:
            with unchanged(*STATES), pytest.raises((RuntimeError, ValueError), match="the first Inf appears"):
                jax.block_until_ready(bad())
    else:
        error = raised(T.jit(bad) if within else bad)
        assert (error.line, error.phase) == (marked(root_of), "backward")


def test_what_comes_out_beside_the_map_is_judged_when_it_is_made():
    def loss(x):
        seen.value = x
        y = jnp.log(x)  # <- here
        return y, {"kept": x, "text": "t"}

    for make in (
        lambda x: T.vjp(loss, x, has_aux=True, debug_nan=True)[0],
        lambda x: T.linearize(loss, x, has_aux=True, debug_nan=True)[0],
        lambda x: T.hvp(loss, argnums=0, has_aux=True, return_value=True, debug_nan=True).operator(x)[1],
        lambda x: T.hvp(loss, argnums=0, has_aux=True, return_grad=True, debug_nan=True).operator(x)[1],
    ):
        for call in (make, T.jit(make)):
            error = raised(call, -1.0)
            assert (error.line, error.phase) == (marked(loss), "forward") and "the value" in str(error)


def test_a_gradient_beside_an_operator():
    h = T.hvp(lambda x: root_of(x).sum(), argnums=0, return_grad=True, debug_nan=True)
    for call in (h.operator, T.jit(lambda x: h.operator(x)[1])):
        error = raised(call, jnp.array([1.0, 0.0]))
        assert (error.line, error.phase, error.reached) == (marked(root_of), "backward", ("argument 0",))


def test_a_value_that_nobody_uses_is_judged_with_the_product():
    def flat(x):
        return x * 0.0 + jax.lax.stop_gradient(jnp.log(x - 5.0))  # <- here

    def product(x):
        return T.vjp(flat, x, debug_nan=True)[1](1.0)

    assert raised(T.jit(product), 1.0).line == marked(flat)
    assert raised(T.jit(lambda x: T.linearize(flat, x, debug_nan=True)[1].dense()), 1.0).line == marked(flat)


def test_a_vector_that_is_not_finite_is_named():
    _, pull = T.vjp(lambda x: {"y": x * b.value}, 2.0, debug_nan=True)
    error = raised(pull, {"y": jnp.array(jnp.nan)})
    assert error.phase == "input" and "the cotangent['y'] already holds NaN" in str(error)
    _, jacobian = T.linearize(lambda x: x * b.value, 2.0, debug_nan=True)
    error = raised(jacobian, jnp.array(jnp.inf))
    assert error.phase == "input" and "the vector already holds NaN or infinities" in str(error)
    error = raised(T.hvp(lambda x: x**3, debug_nan=True), jnp.array(jnp.nan), 2.0)
    assert "the vector already holds NaN" in str(error)


# ------------------------------------------------------------------------------------------ what it leaves alone


def watched(on):
    """Everything that returns a map, run on one function that writes, draws and returns text."""

    def fun(x, y):
        seen.value = x.sum() * R.uniform()
        return {"a": x * b.value * tree.value["u"], "n": 3}, {"text": "t", "y": y}

    R.seed(5)
    states = {"b": b, "tree": tree}
    out, pull, aux = T.vjp(fun, jnp.ones(2), 1.0, grad_states=states, argnums=(0,), has_aux=True, debug_nan=on)
    cotangent = {"a": jnp.arange(2.0), "n": np.zeros((), jax.dtypes.float0)}
    results = [out, aux, pull(cotangent), seen.value]
    out, jacobian, aux = T.linearize(fun, jnp.ones(2), 1.0, grad_states=states, has_aux=True, debug_nan=on)
    direction = {"b": 1.0, "tree": {"u": 2.0, "v": 0.0, "n": None}}
    results += [out, aux, jacobian(jax.tree.map(jnp.float32, direction))["a"], seen.value]

    def cube(x):
        seen.value = seen.value + R.normal()
        return (x**3 * b.value).sum()

    found = T.hvp(cube, b, 0, return_grad=True, return_value=True, debug_nan=on).operator(jnp.arange(1.0, 3.0))
    results += [found[0].dense(), found[0].trace(samples=3, key=1), found[0].T.diagonal(), *found[1:], seen.value]
    g = T.ggn(lambda x: x * b.value, lambda out, x: (out**2).sum(), b, debug_nan=on).operator(jnp.arange(3.0))
    f = T.fisher(lambda x: jnp.outer(x, x * b.value), "categorical", b, debug_nan=on).operator(jnp.arange(3.0))
    return [*results, g.dense(), f.dense(), R.DEFAULT.value]


def test_finite_maps_are_what_they_always_are():
    wanted = watched(False)
    before = seen.value
    got = watched(True)
    assert np.array_equal(before, seen.value)
    assert jax.tree.structure(wanted) == jax.tree.structure(got)
    for one, other in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
        assert one == other if isinstance(one, str) else np.allclose(one, other, rtol=1e-6)


def test_without_it_the_program_is_the_same():
    def products(x, **options):
        out, pull = T.vjp(root_of, x, grad_states=b, **options)
        _, jacobian = T.linearize(root_of, x, **options)
        h = T.hvp(lambda x: root_of(x).sum(), argnums=0, **options).operator(x)
        return pull(out), jacobian.dense(), jacobian.T @ out, h.diagonal()

    x = jnp.ones(3)
    plain, off = (str(T.make_jaxpr(lambda x, o=o: products(x, **o))(x)) for o in ({}, {"debug_nan": False}))
    assert plain == off and "callback" not in off
    assert "callback" in str(T.make_jaxpr(lambda x: products(x, debug_nan=True))(x))


def test_operators_go_through_jit():
    traced = []

    @T.jit
    def apply(operator, v):
        traced.append(1)
        return operator @ v, operator.T.dense()

    _, jacobian = T.linearize(root_of, jnp.array([1.0, 0.0]), debug_nan=True)
    _, fine = T.linearize(root_of, jnp.array([1.0, 4.0]), debug_nan=True)
    for _ in range(2):
        product, dense = apply(fine, jnp.ones(2))
        np.testing.assert_allclose(product, jnp.diagonal(dense), rtol=1e-6)
    assert len(traced) == 1
    assert raised(apply, jacobian, jnp.ones(2)).line == marked(root_of)
    made = T.jit(lambda x: T.linearize(root_of, x, debug_nan=True)[1])(jnp.array([1.0, 0.0]))
    assert raised(made, jnp.ones(2)).line == marked(root_of)
    np.testing.assert_allclose(made.shape, (2, 2))


def test_maps_that_are_made_in_lanes():
    def slope(x):
        seen.value = seen.value * 2.0
        return T.linearize(root_of, x, debug_nan=True)[1] @ jnp.ones(())

    np.testing.assert_allclose(T.vmap(slope)(jnp.array([2.0, 8.0])), jnp.array([0.5, 0.25]), rtol=1e-6)
    error = raised(T.jit(T.vmap(slope)), jnp.array([2.0, 0.0]))
    assert error.lane == (1,) and error.line == marked(root_of)


def test_derivatives_of_what_is_watched():
    def cubic(x):
        return T.vjp(lambda y: b.value * y**3, x, debug_nan=True)[1](1.0)

    for derivative in (T.grad(cubic), T.jacfwd(cubic), T.jit(T.grad(cubic))):
        np.testing.assert_allclose(derivative(2.0), 6.0 * b.value * 2.0, rtol=1e-6)


def test_taps_are_heard_once():
    def tapped(x):
        return T.vjp(lambda y: jnp.sqrt(T.tap("h", y)), x, debug_nan=True)[1](1.0)

    for number, call in enumerate((tapped, T.jit(tapped)), 1):
        with T.taps() as heard:
            call(4.0)
            jax.effects_barrier()
        assert len(heard["h"]) == 1, number


def test_solvers_take_them():
    h = T.hvp(lambda x: (x**4).sum() + (x**2).sum(), debug_nan=True).operator(jnp.arange(3.0))
    found, _ = jax.scipy.sparse.linalg.cg(h, jnp.ones(3), tol=1e-6)
    np.testing.assert_allclose(found, 1.0 / (12.0 * jnp.arange(3.0) ** 2 + 2.0), rtol=1e-4)


def test_a_state_that_the_first_call_makes_and_writes():
    class Lazy:
        h: Any = None

    def loss(x):
        if Lazy.h is None:
            Lazy.h = State(jnp.zeros(2), name="h")
        y = jnp.sqrt(x * Lazy.h.value)  # <- here
        Lazy.h.value = Lazy.h.value + 1.0
        return y

    _, pull = T.vjp(loss, jnp.ones(2), debug_nan=True)
    assert Lazy.h.value.tolist() == [1.0, 1.0]
    assert raised(pull, jnp.ones(2)).line == marked(loss)
    Lazy.h = None
    error = raised(T.grad(lambda x: loss(x).sum(), debug_nan=True), jnp.ones(2))
    assert error.line == marked(loss)


def test_arrays_that_are_given_away_or_changed_in_place():
    weight, x = ParamState(jnp.array([1.0, 4.0]), name="weight"), np.zeros(2, np.float32)

    def double():
        weight.value = weight.value * 2.0

    _, jacobian = T.linearize(lambda: jnp.sqrt(weight.value), grad_states=weight, debug_nan=True)
    _, pull = T.vjp(root_of, x, grad_states=b, debug_nan=True)
    T.jit(double, donate_states=True)()
    np.testing.assert_allclose(jacobian.dense(), [[0.5, 0.0], [0.0, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(jacobian @ jnp.ones(2), [0.5, 0.25], rtol=1e-6)
    assert raised(jacobian, jnp.array([jnp.nan, 0.0])).inputs == ("the vector",)
    x[:] = 1.0
    assert raised(pull, jnp.ones(2)).line == marked(root_of)


def test_keys_of_random_numbers():
    key = State(jax.random.key(3), name="key")

    def noisy(x):
        return jnp.sqrt(x) * jax.random.uniform(jax.random.split(key.value)[0])  # <- here

    def dense(x):
        return T.linearize(noisy, x, debug_nan=True)[1].dense()

    grad = T.grad(noisy, debug_nan=True)
    norms = T.per_example_norms(lambda x: noisy(x) * b.value, b, debug_nan=True)
    for call, x in ((dense, 0.0), (T.jit(dense), 0.0), (T.jit(grad), 0.0), (T.vmap(grad), jnp.zeros(2))):
        with unchanged(key), pytest.raises((RuntimeError, ValueError), match=f"py:{marked(noisy)}, in"):
            jax.block_until_ready(call(x))
    assert jnp.isfinite(norms(jnp.ones(2))).all()
    assert raised(norms, -jnp.ones(2)).line == marked(noisy)


def test_an_estimate_that_fails_draws_nothing():
    h = T.hvp(lambda x: (x**1.5).sum(), debug_nan=True).operator(jnp.array([0.0, 1.0]))
    for estimate in (h.trace, h.diagonal):
        assert raised(lambda estimate=estimate: estimate(samples=3)).phase == "backward"


def test_results_that_are_numbers_of_python():
    def fun(x):
        return {"a": x, "n": 3.0}

    for call in (lambda f: f, T.jit):
        assert call(lambda x: T.vjp(fun, x, debug_nan=True)[0])(2.0) == fun(2.0)
        assert call(lambda x: T.linearize(fun, x, debug_nan=True)[1](jnp.array(1.0)))(2.0) == {"a": 1.0, "n": 0.0}


@pytest.mark.parametrize("name", ["vjp", "linearize", "sparse_jacobian", "grad"])
def test_a_program_on_several_devices_does_not_hang(name):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("d",))
    spec = jax.sharding.PartitionSpec("d")
    root = T.shard_map(jnp.sqrt, mesh=mesh, in_specs=spec, out_specs=spec)
    call = {
        "vjp": lambda x: T.vjp(root, x, debug_nan=True)[1](jnp.ones(2)),
        "linearize": lambda x: T.linearize(root, x, debug_nan=True)[1].dense(),
        "sparse_jacobian": T.sparse_jacobian(root, dense=True, debug_nan=True),
        "grad": T.grad(lambda x: root(x).sum(), debug_nan=True),
    }[name]
    assert "the result is not finite" in str(raised(T.jit(call), jnp.array([1.0, 0.0])))


def test_on_each_device():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("d",))
    spec = jax.sharding.PartitionSpec("d")

    def lane(x):
        return T.vjp(root_of, x, debug_nan=True)[1](x * 0.0 + 1.0)

    mapped = T.jit(T.shard_map(lane, mesh=mesh, in_specs=spec, out_specs=spec))
    np.testing.assert_allclose(mapped(jnp.array([2.0, 8.0])), [0.5, 0.25], rtol=1e-6)
    assert raised(mapped, jnp.array([2.0, 0.0])).line == marked(root_of)


def test_a_watched_derivative_in_a_series():
    def cubic(x):
        return T.vjp(lambda y: y**3, x, debug_nan=True)[1](1.0)

    for inner in (cubic, T.grad(lambda x: x**3, debug_nan=True)):
        value, terms = T.taylor(inner, (2.0,), (1.0,), 2)
        assert (value, *terms) == (12.0, 12.0, 3.0)


def test_no_state_and_no_tracer_is_kept():
    def run():
        weight = ParamState(jnp.ones(2))

        @T.jit
        def slope(x):
            _, pull = T.vjp(lambda z: weight.value * z, x, grad_states=weight, debug_nan=True)
            _, jacobian = T.linearize(lambda z: weight.value * z, x, grad_states=weight, debug_nan=True)
            return pull(x), jacobian.dense()

        slope(jnp.ones(2))
        return weakref.ref(weight)

    planted.assert_let_go(run)


# ------------------------------------------------------------------------------------------ functions of all kinds


def test_a_function_that_looks_at_values():
    def loss(x):
        return jnp.sqrt(x) if x >= 0 else x

    for make in (T.vjp, T.linearize):
        value, product = make(loss, 4.0, debug_nan=True)
        assert value == 2.0 and product(jnp.array(1.0)) == 0.25
        error = raised(make(loss, 0.0, debug_nan=True)[1], jnp.array(1.0))
        assert error.line is None and "it looks at values in Python" in str(error) and "transform.cond" in str(error)
        error = raised(lambda make=make: make(lambda x: jnp.log(x) if x < 0 else x, -1.0, debug_nan=True))
        assert "the result is not finite" in str(error)


def test_functions_that_go_one_way_only():
    def loop(x):
        return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.sqrt(c[1])), (0, x))[1]

    for call in (lambda f: f, T.jit):
        push = call(lambda x: T.linearize(loop, x, debug_nan=True)[1](jnp.array(1.0)))
        np.testing.assert_allclose(push(16.0), 1.0 / 32.0, rtol=1e-6)
        error = raised(push, 0.0)
        assert error.phase == "backward" and "while loop" in str(error)

    @jax.custom_vjp
    def halved(x):
        return x

    halved.defvjp(lambda x: (x, x), lambda x, g: (jnp.divide(g, x),))
    for call in (lambda f: f, T.jit):
        pull = call(lambda x: T.vjp(halved, x, debug_nan=True)[1](1.0))
        assert pull(2.0) == 0.5
        assert raised(pull, 0.0).phase == "backward"


def test_complex_numbers():
    def power(z):
        return z**0.5  # <- here

    _, pull = T.vjp(power, jnp.array(1.0 + 0.0j), debug_nan=True)
    np.testing.assert_allclose(pull(jnp.array(1.0 + 0.0j)), 0.5, rtol=1e-6)
    _, jacobian = T.linearize(power, jnp.array(4.0 + 0.0j), debug_nan=True)
    np.testing.assert_allclose(jacobian(jnp.array(1.0 + 0.0j)), 0.25, rtol=1e-6)
    _, jacobian = T.linearize(power, jnp.array(0.0 + 0.0j), debug_nan=True)
    assert raised(jacobian, jnp.array(1.0 + 0.0j)).line == marked(power)


def test_a_model():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def update(self, x):
            h = self.first(x)
            h = h / jnp.linalg.norm(h)  # <- here
            return self.second(h)

    net = Net()
    net.first.weight.value = net.first.weight.value * 0.0
    with unchanged(*net.states().values()), pytest.raises(NonFiniteError) as caught:
        T.vjp(net, jnp.ones(3), grad_states=net, argnums=None, debug_nan=True)
    assert caught.value.line == marked(Net.update) and caught.value.phase == "forward"
    net.first.bias.value = jnp.ones(4)
    _, pull = T.vjp(net, jnp.ones(3), grad_states=net, argnums=None, debug_nan=True)
    error = raised(pull, jnp.array([1.0, jnp.nan]))
    assert str(error).startswith("vjp(Net): the cotangent already holds NaN") and error.inputs == ("the cotangent",)
    assert any("'first', 'weight'" in name for name in error.reached)


def test_wrong_vectors_are_refused_as_always():
    _, pull = T.vjp(lambda x: x * w.value, 2.0, debug_nan=True)
    for wrong in (jnp.ones(7), 1, None, "text"):
        with unchanged(*STATES), pytest.raises((TypeError, ValueError), match=r"VJP function|JAX type"):
            pull(wrong)
    _, jacobian = T.linearize(lambda x: x * w.value, 2.0, debug_nan=True)
    with pytest.raises(ValueError, match="the vector given to an operator"):
        jacobian(jnp.ones(7))
