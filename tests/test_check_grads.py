"""check_grads: agreement with JAX's on the twins, planted errors, and what it leaves behind."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jax.test_util import check_grads as jax_check_grads

from _unchanged import unchanged
from brainstate import GradientCheckError, ParamState, State, StateTypeError, StateValueError, nn
from brainstate import random as R
from brainstate import transform as T
from brainstate.transform import check_grads
from scenarios import COLUMNS, SCENARIOS, nested, values_of

COLUMN = {column.name: column for column in COLUMNS}
BOTH = [s for s in SCENARIOS if s.wrt == "both"]


@pytest.fixture
def w():
    return ParamState(jnp.array([0.6, -1.2, 0.3]), name="w")


def fails(fun, *args, match, **options):
    """Check that the check fails, that the message says so, and that it changes nothing."""
    with pytest.raises(GradientCheckError, match=match) as caught:
        check_grads(fun, *args, **options)
    return str(caught.value)


# ------------------------------------------------------------------------------------------ against JAX


def tilted(fun, factor):
    """Return ``fun`` with a derivative that is ``factor`` times the right one, by a rule on its output."""

    @jax.custom_jvp
    def same(x):
        return x

    same.defjvp(lambda primals, tangents: (primals[0], factor * tangents[0]))

    def wrong(*args):
        out, rest = fun(*args)
        return jax.tree.map(same, out), rest

    return wrong


@pytest.mark.crossing
@pytest.mark.parametrize("factor", [1.0, 1.01], ids=["right", "wrong"])
@pytest.mark.parametrize(
    "scenario", [pytest.param(s, marks=[pytest.mark.long] * (s in BOTH), id=str(s)) for s in SCENARIOS]
)
def test_agrees_with_jax_on_the_twin(scenario, factor):
    with jax.enable_x64(True):
        states, args = scenario.prepare("float64")
        before = values_of(states)
        options = {k: v for k, v in scenario.options(states).items() if v is not None}
        order = 2 if factor == 1 and scenario.wrt == "both" else 1

        def pure(diff):
            values, moved = scenario.unpack(diff, before, args)
            return tilted(scenario.twin, factor)(values, *moved)[0]

        def ours(*moved):
            return tilted(lambda *a: (scenario.function(states, *a), None), factor)(*moved)[0]

        def both():
            yield lambda: jax_check_grads(pure, (scenario.pack(before, args),), order, eps=1e-5)
            yield lambda: check_grads(ours, *args, order=order, **options)

        with unchanged(*states.values()):
            for check in both():
                if factor == 1:
                    check()
                else:
                    with pytest.raises(AssertionError):
                        check()


@pytest.mark.long
@pytest.mark.parametrize("column", ["vmap", "scan", "while", "cond", "checkpoint"])
@pytest.mark.parametrize("name", ["noise", "pytree"])
def test_nested_scenarios(name, column):
    scenario = nested(next(s for s in BOTH if s.name == name), (COLUMN[column],))
    with jax.enable_x64(True):
        states, args = scenario.prepare("float64")
        with unchanged(*states.values()):
            modes = "fwd" if column == "while" else ("fwd", "rev")
            run = T.jit(lambda *a: scenario.function(states, *a))
            check_grads(run, *args, modes=modes, **scenario.options(states))


def test_a_complex_function():
    w = ParamState(jnp.array([1.0 + 0.5j, -0.3j]))
    check_grads(lambda x: w.value**2 * jnp.conj(x) + jnp.cos(w.value), 0.3 + 1j, grad_states=w, argnums=0, float64=True)


# ------------------------------------------------------------------------------------------ planted errors


def wrong_vjp(factor):
    f = jax.custom_vjp(jnp.sin)
    f.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (factor * ct * jnp.cos(x),))
    return f


@pytest.mark.parametrize("float64", [False, True])
def test_a_wrong_reverse_rule(w, float64):
    b = ParamState(jnp.array([1.0, 2.0, 0.5]), name="b")

    def fun(x):
        return {"y": wrong_vjp(1.1)(w.value) + b.value * x, "n": 3}

    with unchanged(w, b):
        message = fails(
            fun, 2.0, grad_states={"w": w, "b": b}, modes="rev", float64=float64, match="reverse derivative"
        )
    assert "grad_states['w'] (ParamState 'w')" in message and "'b'" not in message
    assert "custom rule" in message or not float64
    assert "seed 0" in message
    with unchanged(w, b):
        check_grads(fun, 2.0, grad_states={"b": b}, argnums=0, modes="rev", float64=float64)


def test_a_wrong_rule_of_ours_and_the_numbers(w):
    f = T.custom_jvp(lambda x: (w.value * x).sum(), states=w)
    f.defjvp(lambda p, t: ((p[0] * p[1]).sum(), 10.0 * (t[0] * p[1]).sum() + (p[0] * t[1]).sum()))
    with unchanged(w):
        message = fails(f, jnp.ones(3), grad_states=w, argnums=0, float64=True, match="forward derivative is wrong")
    line = next(line for line in message.splitlines() if "differences" in line)
    got, wanted = (float(word.strip(",")) for word in line.split() if word[-2].isdigit() or word[-1].isdigit())
    assert "grad_states" in message and "argument 0" not in message
    np.testing.assert_allclose(got, 10 * wanted, rtol=1e-4)


def test_only_one_mode_is_wrong(w):
    twisted = Primitive("twisted")  # the identity, whose transpose is twice that
    twisted.def_impl(lambda x: x)
    twisted.def_abstract_eval(lambda x: x)
    ad.deflinear2(twisted, lambda ct, x: [2.0 * ct])
    batching.defvectorized(twisted)
    message = fails(lambda: twisted.bind(w.value**2), grad_states=w, float64=True, match="reverse derivative")
    assert "the forward derivative is right" in message


def test_a_wrong_second_derivative(w):
    @jax.custom_jvp
    def cosine(x):
        return jnp.cos(x)

    cosine.defjvp(lambda p, t: (jnp.cos(p[0]), -1.2 * jnp.sin(p[0]) * t[0]))
    sine = jax.custom_jvp(jnp.sin)
    sine.defjvp(lambda p, t: (jnp.sin(p[0]), cosine(p[0]) * t[0]))
    check_grads(lambda: sine(w.value), grad_states=w, float64=True)
    with unchanged(w):
        fails(
            lambda: sine(w.value),
            grad_states=w,
            order=2,
            float64=True,
            match="derivative of the (forward|reverse) derivative is wrong",
        )


def test_a_detached_value(w):
    message = fails(lambda x: jax.lax.stop_gradient(w.value) * x, 2.0, grad_states=w, match="is wrong")
    assert "stop_gradient" in message and "derivative 0," in message


def under_trace(x):
    return isinstance(x, Tracer)


def broken_transform(change):
    """Return a hand-written transform that, differentiated itself, does ``change`` to what it passes on."""

    def transform(fun, *, argnums, has_aux):
        base = jax.grad(fun, argnums=argnums, has_aux=has_aux)

        def wrapped(diff, *rest):
            gradient, carried = base(diff, *rest)
            return gradient, change(carried) if under_trace(jax.tree.leaves(diff)[0]) else carried

        return wrapped

    return transform


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda aux: type(aux).pack((None, None, type(aux.tree()[2])((), []))), "dropped"),
        (lambda aux: jax.tree.map(lambda a: a + 2.0, aux), "twice"),
        (lambda aux: jax.tree.map(lambda a: a * 7.0, aux), "custom transform or rule does not pass on"),
    ],
)
@pytest.mark.parametrize("modes", ["fwd", "rev"])
def test_writes_of_a_faulty_transform(w, change, cause, modes):
    count = State(jnp.float32(1), name="count")

    def loss():
        count.value = count.value + 2.0
        return (w.value**3).sum()

    inner = T.GradientTransform(loss, broken_transform(change), w)
    with unchanged(w, count):
        message = fails(inner, grad_states=w, modes=modes, match="State 'count'")
    assert cause in message
    check_grads(T.grad(loss, w), grad_states=w, modes=modes, order=2)


@pytest.mark.parametrize("times", [0, 2])
def test_writes_that_depend_on_being_traced(w, times):
    count = State(jnp.int32(5), name="count")

    def fun():
        for _ in range(times if under_trace(w.value) else 1):
            count.value = count.value + 1
        return w.value**2

    with unchanged(w, count):
        fails(fun, grad_states=w, match="dropped" if times == 0 else "write happens twice")


def test_a_write_only_when_traced(w):
    extra = State(0.0, name="extra")

    def fun():
        if under_trace(w.value):
            extra.value = 1.0
        return w.value

    fails(fun, grad_states=w, match="'extra' is written when differentiated.*not by a plain call")


def test_a_value_that_depends_on_being_traced(w):
    fails(lambda: w.value * (2.0 if under_trace(w.value) else 1.0), grad_states=w, match="something else when")


def test_noise_from_outside(w):
    rng, counter, log = np.random.default_rng(0), itertools.count(), State(0, name="log")

    def count():
        log.value = next(counter)
        return w.value

    with unchanged(w, log):
        fails(lambda: w.value * rng.normal(), grad_states=w, match="two calls with the same States.*\n.*NumPy")
        fails(count, grad_states=w, match="State 'log' is left with another value by a second call")


@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_fresh_noise_in_a_replay(w, mode):
    """A hand-written checkpoint whose replay draws anew: calls agree, derivatives do not."""
    rng = np.random.default_rng(0)

    def noisy(x, noise):
        return jnp.sin(x) * (1 + jnp.asarray(noise, x.dtype))

    if mode == "rev":
        f = jax.custom_vjp(lambda x: noisy(x, 0.1))
        f.defvjp(lambda x: (noisy(x, 0.1), x), lambda x, ct: jax.vjp(lambda x: noisy(x, rng.normal()), x)[1](ct))
    else:
        f = jax.custom_jvp(lambda x: noisy(x, 0.1))
        f.defjvp(lambda p, t: (noisy(p[0], 0.1), jax.jvp(lambda x: noisy(x, rng.normal()), p, t)[1]))
    with unchanged(w):
        fails(lambda: f(w.value), grad_states=w, modes=mode, match="computed again.*\n.*fresh noise.*replay")


def test_fresh_noise_in_a_compiled_replay(w):
    rng = np.random.default_rng(0)

    @jax.checkpoint
    def f(x):
        noise = jax.pure_callback(lambda: np.float32(rng.normal()), jax.ShapeDtypeStruct((), jnp.float32))
        return jnp.sin(x * noise)

    fails(lambda: f(w.value), grad_states=w, modes="rev", match="two calls with the same States")


def test_noise_of_a_generator_is_frozen(w):
    rng = R.RandomState(3)

    @T.checkpoint
    def fun(x):
        return jnp.sin(w.value * rng.normal(size=3, dtype=w.value.dtype)) * x * R.uniform()

    with unchanged(w, rng, R.DEFAULT):
        check_grads(fun, 0.7, grad_states=w, argnums=0, order=2)


@pytest.mark.crossing
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("float64", [False, True])
@pytest.mark.parametrize("kink", [jax.nn.relu, jnp.abs, lambda x: jnp.maximum(x, -x), lambda x: jnp.clip(x, 0, 1)])
def test_a_kink(kink, order, float64):
    w = ParamState(jnp.array([1.0, 0.0]), name="w")

    def fun(x):
        return kink(w.value)[1] * x if order == 1 else (kink(w.value) * w.value)[1] * x

    message = fails(fun, 2.0, grad_states=w, argnums=0, order=order, float64=float64, match="slopes.*differ")
    assert "kink" in message and "'w'" in message and "argument 0" not in message
    w.value = jnp.array([0.0, 0.7])
    check_grads(fun, 2.0, grad_states=w, argnums=0, order=order, float64=float64)


@pytest.mark.parametrize("distance", [2e-7, 4e-7, 1e-6, 2e-6, 4e-6, 1e-5])
def test_a_kink_nearby_is_passed_by_in_double_precision(distance):
    check_grads(jax.nn.relu, jnp.array([1.0, distance]), float64=True, seed=1)
    wrong = tilted(lambda x: (jax.nn.relu(x), None), 1.01)
    fails(lambda x: wrong(x)[0], jnp.array([1.0, distance]), float64=True, seed=1, match="is wrong")
    fails(jax.nn.relu, jnp.array([1.0, distance]), seed=1, match="a kink")


def test_a_jump():
    fails(lambda x: jnp.where(x > 1, x, 0.0), jnp.array([1.0, 2.0]), match="kink.*or a jump", float64=True)


def test_the_edge_of_the_domain():
    message = fails(lambda x: jnp.sqrt(x["a"]), {"a": jnp.array([0.0, 1.0])}, match="not finite")
    assert "argument 0['a']" in message and "domain" in message


@pytest.mark.parametrize("fault", ["raises", "mixes"])
def test_a_pullback_that_does_not_batch(w, fault):
    f = jax.custom_vjp(lambda x: x**2)

    def shuffled(ct):
        shape = jax.ShapeDtypeStruct(ct.shape, ct.dtype)
        if fault == "raises":
            return jax.pure_callback(np.asarray, shape, ct)
        mix = jax.custom_batching.custom_vmap(lambda c: c)
        mix.def_vmap(lambda size, batched, c: (c[::-1], True))
        return mix(ct)

    f.defvjp(lambda x: (x**2, x), lambda x, ct: (2 * x * shuffled(ct),))
    match = "fails under vmap" if fault == "raises" else "pullback under vmap.*ParamState 'w'"
    fails(lambda: f(w.value), grad_states=w, modes="rev", match=match)


def test_all_guilty_leaves_are_named():
    params = [ParamState(jnp.ones(2) * i, name=f"p{i}") for i in range(9)]
    f = tilted(lambda x: (jnp.sin(x), None), 3.0)
    message = fails(lambda: sum(f(p.value)[0] for p in params), grad_states=params, match="wrong")
    assert "'p0'" in message and "'p4'" in message and "'p5'" not in message and "and 4 more" in message


# ------------------------------------------------------------------------------------------ what is left behind


def test_everything_stays_also_after_a_failure(w):
    rng = R.RandomState(0)
    tree = State({"a": jnp.ones(2), "n": 3, "what": "text"}, name="tree")

    def fun(x, fail=False):
        value = tree.value
        value["a"] = value["a"] * x
        tree.value["n"] += 1
        w.value = w.value * x
        if fail:
            raise KeyError
        return w.value * value["a"][:1] * rng.normal(dtype=w.value.dtype)

    for float64 in (False, True):
        with unchanged(w, tree, rng):
            check_grads(fun, 0.5, grad_states=[w], argnums=0, float64=float64)
            with pytest.raises(KeyError):
                check_grads(lambda x: fun(x, True), 0.5, grad_states=w)
    assert jnp.zeros(1).dtype == jnp.float32


def test_mixed_leaves():
    s = State({"w": jnp.array([1.0, 2.0]), "n": jnp.array(2), "key": jax.random.key(0)})
    with unchanged(s):
        check_grads(lambda x: s.value["w"] ** s.value["n"] * x, 2.0, grad_states=s, argnums=(0,), float64=True)


def test_arguments_that_hold_no_floats_are_left_out():
    check_grads(lambda x, kind, n: x**2 * n if kind == "a" else x, jnp.ones(2), "a", 3)
    fails(lambda n, x: tilted(lambda x: (x, 0), 2.0)(x)[0] * n, 3, jnp.ones(2), match="argument 1")


def test_a_lazy_model_is_as_after_a_plain_call():
    class Lazy(nn.Module):
        def update(self, x):
            if not hasattr(self, "w"):
                self.w = ParamState(R.normal(size=2))
            return self.w.value * x

    model = Lazy()
    with unchanged(R.DEFAULT):
        check_grads(model, jnp.ones(2), float64=True)
    assert model.w.value.dtype == jnp.float32


def test_a_model_that_makes_states_in_each_call_is_refused():
    kept = []

    def fun(x):
        kept.append(State(x, name="new"))
        return x

    with pytest.raises(StateValueError, match="creates a new State 'new' in each call"):
        check_grads(fun, 1.0)
    assert kept[-1].value == 1.0


def test_calls_are_few():
    calls = []
    check_grads(lambda x: calls.append(1) or x**2, 3.0, modes="fwd")
    assert len(calls) <= 16


def test_under_a_transform_it_is_refused(w):
    with pytest.raises(StateTypeError, match="call it outside"):
        T.jit(lambda x: check_grads(lambda x: x**2, x))(1.0)


# ------------------------------------------------------------------------------------------ misuse


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"order": 0}, StateValueError, "order=0"),
        ({"order": 1.0}, StateTypeError, "order=1.0"),
        ({"directions": 0}, StateValueError, "directions=0"),
        ({"modes": "reverse"}, StateValueError, "'fwd', 'rev', or both"),
        ({"modes": ()}, StateValueError, "'fwd', 'rev', or both"),
        ({"argnums": 3}, StateTypeError, "selects argument 3"),
        ({"argnums": 1}, StateTypeError, "argument 1 is int"),
        ({"grad_states": []}, StateValueError, "selects no State"),
        ({"grad_states": State(3)}, StateTypeError, "holds nothing of a floating"),
    ],
)
def test_misuse(options, error, match):
    with pytest.raises(error, match=match):
        check_grads(lambda x, n: x, 1.0, 2, **options)


def test_misuse_of_the_function():
    with pytest.raises(StateTypeError, match="returns nothing of a floating"):
        check_grads(lambda x: 3, 1.0)
    with pytest.raises(StateValueError, match="nothing to differentiate"):
        check_grads(lambda n: n, 1)
    with pytest.raises(StateTypeError, match="cannot be called"):
        check_grads(3, 1.0)
    with pytest.raises(StateValueError, match="results of a function under check_grads"):
        check_grads(lambda x: State(x), 1.0)
