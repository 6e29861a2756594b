"""Backward taps: nothing when nobody listens, the right cotangent when somebody does, and no derivative changed."""

import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from brainstate import HiddenState, ParamState, StateTypeError, StateValueError
from brainstate import transform as T
from brainstate.transform import grad, jit, scan, tap, taps
from transforms import DERIVATIVES

XS = jnp.array([0.3, -1.2, 0.7])


@pytest.fixture
def w():
    return ParamState(jnp.array([0.6, -1.2, 0.3]), name="w")


def norms(seen, name="h"):
    return [record.norm for record in seen[name]]


# ------------------------------------------------------------------------------------------ nobody listens


@pytest.mark.parametrize("value", [XS, 1.0, {"a": XS, "n": 3, "s": "text"}, None, jnp.arange(3)])
def test_it_is_the_value_itself(value):
    assert tap("h", value) is value


def in_a_loop(w, point):
    def loss(x):
        h, sums = scan(lambda h, k: 2 * (point(jnp.tanh(w.value * h + k)),), point(x), XS)
        return jnp.sum(T.checkpoint(lambda h: point(h) ** 2)(h)) + sums.sum()

    return loss


@pytest.mark.parametrize("derivative", ["value", "grad", "hessian", "vmap of grad"])
def test_an_unused_tap_leaves_the_same_program(w, derivative):
    with taps():
        pass  # one that has left is nobody
    transform, x = {
        "value": (lambda f: f, XS),
        "grad": (lambda f: grad(f, w, 0), XS),
        "hessian": (lambda f: T.hessian(f, w), XS),
        "vmap of grad": (lambda f: T.vmap(grad(f, argnums=0)), jnp.stack([XS, XS])),
    }[derivative]
    plain, tapped = (transform(in_a_loop(w, point)) for point in (lambda h: h, lambda h: tap("h", h)))
    assert str(T.make_jaxpr(plain)(x)) == str(T.make_jaxpr(tapped)(x))
    assert jit(plain).lower(x).as_text() == jit(tapped).lower(x).as_text()


# ------------------------------------------------------------------------------------------ the right cotangent


def written(w, x):
    h = HiddenState(x)

    def step(k):
        h.value = tap("h", jnp.tanh(w.value * h.value + k))

    T.for_loop(step, XS)
    return h.value


def recurrent(w, x, rows):
    for k, row in zip(XS, rows[::-1], strict=True):
        x = jnp.tanh(w * x + jnp.full(3, k)) + row
    return x


def body(w):
    return lambda h, k: (tap("h", jnp.tanh(w.value * h + k)), None)


# name: (a program with taps of a State and x, the same in pure JAX with a row added at each point, last point first)
PROGRAMS = {
    "plain": (lambda w, x: jnp.sin(tap("h", w.value * x)), lambda w, x, r: jnp.sin(w * x + r[0])),
    "twice": (
        lambda w, x: jnp.sin(tap("h", w.value * tap("h", jnp.cos(x)))),
        lambda w, x, r: jnp.sin(w * (jnp.cos(x) + r[1]) + r[0]),
    ),
    "jit": (lambda w, x: jit(lambda x: jnp.sin(tap("h", w.value * x)))(x), lambda w, x, r: jnp.sin(w * x + r[0])),
    "cond": (
        lambda w, x: T.cond(x[0] > 0, lambda: jnp.sin(tap("h", w.value * x)), lambda: x),
        lambda w, x, r: jnp.sin(w * x + r[0]),
    ),
    "checkpoint": (
        lambda w, x: T.checkpoint(lambda x: jnp.sin(tap("h", w.value * x)) ** 2)(x),
        lambda w, x, r: jnp.sin(w * x + r[0]) ** 2,
    ),
    "scan": (lambda w, x: scan(body(w), x, XS)[0], recurrent),
    "for_loop": (written, recurrent),
    "checkpointed_scan": (lambda w, x: T.checkpointed_scan(body(w), x, XS)[0], recurrent),
    "raw scan": (lambda w, x: jax.lax.scan(body(w), x, XS)[0], recurrent),
}


@pytest.mark.crossing
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_cotangent_is_the_derivative_by_what_is_added_there(w, name, compiled):
    program, twin = PROGRAMS[name]
    count = {"plain": 1, "twice": 2, "jit": 1, "cond": 1, "checkpoint": 1}.get(name, 3)

    def oracle(rows, w, x):
        return jnp.sum(jnp.sin(twin(w, x, rows)))

    wanted, *derivatives = jax.grad(oracle, (0, 1, 2))(jnp.zeros((count, 3)), w.value, XS)
    gradient = grad(lambda x: jnp.sum(jnp.sin(program(w, x))), w, 0)
    gradient = jit(gradient) if compiled else gradient
    silent = gradient(XS)
    with taps() as seen:
        listened = gradient(XS)
    assert list(seen) == ["h"] and len(seen["h"]) == count
    for record, ct in zip(seen["h"], wanted, strict=True):
        expected = [jnp.linalg.norm(ct), ct.min(), ct.max(), jnp.abs(ct).mean()]
        np.testing.assert_allclose([record.norm, record.min, record.max, record.mean_abs], expected, rtol=1e-5)
    for a, b, c in zip(silent, listened, derivatives, strict=True):
        np.testing.assert_allclose(a, c, rtol=1e-5)
        np.testing.assert_allclose(b, c, rtol=1e-5)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("ct", "dtype", "wanted"),  # norm, min, max, mean_abs, zeros, nonfinite
    [
        ([3.0, -4.0, 0.0, 0.0], "float32", (5.0, -4.0, 3.0, 1.75, 0.5, 0)),
        ([3.0, -4.0, 0.0, 0.0], "float64", (5.0, -4.0, 3.0, 1.75, 0.5, 0)),
        ([3.0, -4.0, 0.0, 0.0], "bfloat16", (5.0, -4.0, 3.0, 1.75, 0.5, 0)),
        ([3.0 - 4.0j, 0.0], "complex64", (5.0, 0.0, 5.0, 2.5, 0.5, 0)),
        ([3e30, -4e30], "float32", (5e30, -4e30, 3e30, 3.5e30, 0.0, 0)),
        ([3e-30, -4e-30], "float32", (5e-30, -4e-30, 3e-30, 3.5e-30, 0.0, 0)),
        ([6e4, 0.0], "float16", (60000.0, 0.0, 60000.0, 30000.0, 0.5, 0)),
        ([NAN, 1.0], "float32", (NAN, NAN, NAN, NAN, 0.0, 1)),
        ([INF, -1.0], "float32", (INF, -1.0, INF, INF, 0.0, 1)),
        ([0.0, 0.0], "float32", (0.0, 0.0, 0.0, 0.0, 1.0, 0)),
        (2.5, "float32", (2.5, 2.5, 2.5, 2.5, 0.0, 0)),
        ([], "float32", (0.0, 0.0, 0.0, 0.0, 0.0, 0)),
    ],
)
def test_the_numbers_of_a_record(ct, dtype, wanted, compiled):
    with jax.enable_x64(dtype == "float64"), taps() as seen:
        ct = jnp.asarray(ct, dtype)
        pull = jax.vjp(lambda x: tap("h", x), ct)[1]
        (back,) = (jit(lambda c: pull(c)) if compiled else pull)(ct)
    assert np.array_equal(back, ct, equal_nan=dtype != "bfloat16")
    (record,) = seen["h"]
    got = (record.norm, record.min, record.max, record.mean_abs, record.zeros, record.nonfinite)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert type(record.nonfinite) is int and type(record.norm) is float


def test_containers_and_what_is_no_float(w):
    def loss(x):
        value = tap("in", {"x": x, "n": jnp.arange(3), "text": "a", "key": jax.random.key(0), "one": 2.0})
        assert value["text"] == "a" and value["one"] == 2.0
        return jnp.sum(value["x"] * value["n"].astype(x.dtype)) * value["one"]

    with taps() as seen:
        grad(loss)(XS)
    assert list(seen) == ["in['x']"] and seen["in['x']"][0].max == 4.0


@pytest.mark.parametrize("compiled", [False, True])
def test_lanes_of_vmap_have_records_of_their_own(w, compiled):
    factors = jnp.arange(6.0).reshape(2, 3)
    for depth, mapped in ((1, T.vmap), (2, lambda f: T.vmap(T.vmap(f)))):
        run = mapped(grad(lambda c: jnp.sum(tap("h", jnp.sin(c * XS)) * c)))
        with taps() as seen:
            (jit(run) if compiled else run)(factors[0] if depth == 1 else factors)
        wanted = [float(c) * 3**0.5 for c in (factors[0] if depth == 1 else factors).ravel()]
        np.testing.assert_allclose(norms(seen), wanted, rtol=1e-6)
    with taps() as seen:  # what all lanes share is recorded once
        T.vmap(grad(lambda c: jnp.sum(tap("h", c * XS))))(factors[0])
    assert len(seen["h"]) == 1


def test_one_call_to_python_for_all_lanes():
    with taps():
        program = jax.make_jaxpr(jax.vmap(jax.grad(lambda c: jnp.sum(jnp.sin(tap("h", c * XS))))))(jnp.ones(50))
    assert str(program).count("tap_record") == 1


def test_second_derivatives():
    """Forward over reverse: the inner pass. Reverse over forward: the outer one. Reverse over reverse: both."""

    def loss(x):
        return jnp.sum(tap("h", x**2) ** 2)

    inner = jnp.linalg.norm(2 * XS**2)
    with taps() as seen:
        hessian = T.hessian(loss)(XS)
    np.testing.assert_allclose(norms(seen), [inner], rtol=1e-6)
    with taps() as seen:
        got = jit(T.jacrev(T.jacfwd(loss)))(XS)
    np.testing.assert_allclose(got, hessian, rtol=1e-5)
    # the outer output is 4 x^3 = 2 h * dh/dx, so the cotangent of h is 2 * 2 x in entry i of lane i
    np.testing.assert_allclose(norms(seen), jnp.abs(4 * XS), rtol=1e-6)
    with taps() as seen:
        got = jit(T.jacrev(T.grad(loss)))(XS)
    np.testing.assert_allclose(got, hessian, rtol=1e-5)
    np.testing.assert_allclose(sorted(norms(seen)), sorted([inner, *jnp.abs(4 * XS)]), rtol=1e-6)


def test_no_cotangent_no_record():
    with taps() as seen:
        grad(lambda x: jnp.sum(x) + 0 * jax.lax.stop_gradient(tap("h", x)).sum() + tap("g", x).sum())(XS)
        T.jvp(lambda x: tap("forward", x), (XS,), (XS,))
        tap("plain", XS)
    assert list(seen) == ["g"] and len(seen) == 1 and "h" not in seen and seen.get("h") is None


def test_devices_of_shard_map_record_each():
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))

    def loss(x):
        return jax.lax.psum(jnp.sum(tap("h", x) ** 2), "d")

    with taps() as seen:
        got = grad(T.shard_map(loss, mesh=mesh, in_specs=P("d"), out_specs=P()))(jnp.array([3.0, 4.0]))
    assert sorted(norms(seen)) == [6.0, 8.0] and got.tolist() == [6.0, 8.0]


def test_sharded_arrays_are_recorded_as_a_whole():
    x = jax.device_put(jnp.array([3.0, 4.0]), NamedSharding(Mesh(np.array(jax.devices()[:2]), ("d",)), P("d")))
    with taps() as seen:
        got = jit(grad(lambda x: jnp.sum(tap("h", x) ** 2)))(x)
    assert norms(seen) == [10.0] and got.sharding == x.sharding


@pytest.mark.parametrize("around", [T.checkify, jax.disable_jit, jax.checking_leaks])
def test_debugging_tools_around(around):
    run = grad(lambda x: jnp.sum(scan(lambda h, k: (tap("h", h * k), None), x, XS)[0]))
    with taps() as seen:
        if around is T.checkify:
            jit(T.checkify(run))(XS)
        else:
            with around():
                jit(run)(XS)
    np.testing.assert_allclose(norms(seen), [3**0.5 * f for f in (1.0, 0.7, 0.84)], rtol=1e-6)


# ------------------------------------------------------------------------------------------ nothing else changes

POINT = {"loss": lambda w, x: jnp.sum(tap("h", jnp.sin(w.value * x)) ** 2), "out": lambda w, x: tap("h", w.value * x)}


def _derived(row):
    return lambda f, g, w: row.derive(row.call(f, g), w, **row.options)(XS)


LISTENED = {name: _derived(row) for name, row in DERIVATIVES.items()} | {
    "hessian": lambda f, g, w: T.hessian(f, w, 0)(XS),
    "jacrev, chunks": lambda f, g, w: T.jacrev(g, w, chunk_size=2)(XS),
    "check_grads": lambda f, g, w: T.check_grads(f, XS, grad_states=w, argnums=0, order=2),
    "explain": lambda f, g, w: [(row.norm, row.cause) for row in T.explain(f, XS, grad_states=w).rows],
    "eval_shape": lambda f, g, w: T.eval_shape(T.grad(f, w), XS).shape,
}


@pytest.mark.parametrize("name", LISTENED)
def test_every_derivative_is_the_same_while_somebody_listens(w, name):
    run = LISTENED[name]
    f, g = (lambda x, name=name: POINT[name](w, x) for name in POINT)
    silent = run(f, g, w)
    with taps():
        listened = run(f, g, w)
    assert jax.tree.structure(silent) == jax.tree.structure(listened)
    jax.tree.map(lambda a, b: a == b if isinstance(a, str) else np.testing.assert_array_equal(a, b), silent, listened)


# ------------------------------------------------------------------------------------------ who listens


@pytest.mark.parametrize("compile_", [jit, jax.jit], ids=["jit", "jax.jit"])
def test_a_compiled_function_is_traced_once_for_all_listeners(compile_):
    runs = []

    @compile_
    def gradient(x):
        runs.append(1)
        return jax.grad(lambda x: jnp.sum(tap("h", jnp.sin(x))))(x)

    gradient(XS)
    for expected in (2, 2, 2):
        with taps() as seen:
            gradient(XS), gradient(2 * XS)
        gradient(XS)
        assert len(seen["h"]) == 2 and len(runs) == expected


def test_a_compiled_function_that_has_made_states_is_traced_anew():
    made = {}

    @jit
    def step(x):
        if not made:
            made["w"] = ParamState(jnp.ones(3))
        gradient = grad(lambda: jnp.sum(tap("h", made["w"].value * x) ** 2), made["w"])()
        made["w"].value = made["w"].value - 0.1 * gradient
        return gradient

    step(XS)
    with taps() as seen:
        step(XS)
    step(XS)
    assert len(seen["h"]) == 1


def test_reading_waits_for_what_runs():
    gradient = jit(grad(lambda x: jnp.sum(tap("h", jnp.sin(x)))))
    with taps() as seen:
        for n in range(1, 6):
            gradient(XS)
            assert len(seen["h"]) == n


def test_listeners_nest_and_each_hears_what_runs_while_it_listens():
    gradient = grad(lambda x: jnp.sum(tap("h", x)))
    compiled = jit(gradient)
    with taps() as outer:
        compiled(XS)
        with taps() as inner:
            compiled(XS), gradient(XS)
        compiled(XS)
    assert (len(outer["h"]), len(inner["h"])) == (4, 2)


def test_other_threads_are_not_heard():
    gradient, own = jit(grad(lambda x: jnp.sum(tap("h", jnp.sin(x))))), {}

    def work(n):
        if n % 2:
            gradient(XS)
            return
        with taps() as seen:
            for _ in range(n):
                gradient(XS)
        own[n] = len(seen["h"])

    with taps() as seen:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert own == {2: 2, 4: 4, 6: 6} and not seen


def test_an_exception_ends_the_listening():
    with pytest.raises(KeyError), taps() as seen:
        grad(lambda x: jnp.sum(tap("h", x)))(XS)
        raise KeyError
    assert tap("h", XS) is XS and len(seen["h"]) == 1


def test_pullbacks_before_and_after():
    early = T.vjp(lambda x: tap("h", jnp.sin(x)), XS)[1]
    with taps() as seen:
        early(XS)
        late = T.vjp(lambda x: tap("h", jnp.sin(x)), XS)[1]
        late(XS)
    assert len(seen["h"]) == 1
    late(XS)  # nobody there
    assert len(seen["h"]) == 1


def test_the_same_taps_again():
    gradient = grad(lambda x: jnp.sum(tap("h", x)))
    seen = taps()
    for n in (1, 2):
        with seen:
            gradient(XS)
        assert len(seen["h"]) == n


def test_nothing_keeps_a_listener():
    gradient = jit(grad(lambda x: jnp.sum(tap("h", x))))
    with taps() as seen:
        gradient(XS)
    gone = weakref.ref(seen)
    del seen
    gc.collect()
    assert gone() is None


def test_the_table():
    with taps() as seen:
        grad(lambda x: jnp.sum(tap("first", x) * jnp.array([3.0, 0.0, -4.0])) + tap("b", x * NAN).sum())(XS)
    head, *lines = repr(seen).splitlines()
    assert head.split("  ")[0] == "tap" and repr(taps()).split() == head.split()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows == {"first": ["1", "5", "5", "-4", "3", "33%", "0"], "b": ["1", "1.73", "1.73", "1", "1", "0%", "0"]}


# ------------------------------------------------------------------------------------------ misuse


@pytest.mark.parametrize("name", [XS, 3, None, ("a",)])
def test_a_name_is_a_string(name):
    with pytest.raises(StateTypeError, match=r"a name and a value, as in tap\('h', x\); the name is a"):
        tap(name, XS)


def test_misuse_of_listeners():
    with taps() as seen:
        with pytest.raises(StateValueError, match="open already: make new ones"), seen:
            pass
        grad(lambda x: jnp.sum(tap("g", x)))(XS)
    with pytest.raises(KeyError, match=r"no cotangent came to a tap named 'h'; there are \['g'\]"):
        seen["h"]


def test_listeners_leave_in_the_order_of_their_coming():
    first, second = taps(), taps()
    with first:
        second.__enter__()
        with pytest.raises(StateValueError, match="left before others that were opened later"):
            first.__exit__(None, None, None)
        grad(lambda x: tap("h", x**2).sum())(jnp.ones(2))
        second.__exit__(None, None, None)
    assert len(first["h"]) == len(second["h"]) == 1
