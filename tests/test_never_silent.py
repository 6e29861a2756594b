"""Never silently wrong: what would be stale, shared, dropped, doubled or zero is right, or is an error.

Each of these was seen to go wrong without a word in an existing system. What concerns ``vmap`` is tested with it.
"""

import contextlib
import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainstate
from _unchanged import unchanged
from brainstate import FrozenReadWarning, HiddenState, ParamState, State, TraceContextError, nn
from brainstate import random as R
from brainstate.transform import grad, hessian, jacfwd, jit, jvp, vjp
from transforms import EXACT

DERIVATIVES = [row.derive for row in EXACT.values()]


class Box(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.fixture
def w():
    return ParamState(jnp.array([1.0, 2.0]), name="w")


@pytest.fixture
def c():
    return State(jnp.array(0.0), name="c")


@pytest.mark.parametrize("transform", DERIVATIVES)
def test_a_state_listed_twice(transform, w):
    """A loop over the gradients would step twice."""
    model = Box(tied=w, head=[w])
    assert list(model.states()) == [("head", 0)]
    for twice, keys in (
        ([w, w], [r"\[0\]", r"\[1\]"]),
        ({"a": w, "b": [w]}, [r"\['a'\]", r"\['b'\]\[0\]"]),
        ([model, w], [r"\[0\].*head", r"\[1\]"]),
    ):
        with (
            unchanged(w),
            pytest.raises(ValueError, match=rf"'w' twice, as grad_states{keys[0]}.*grad_states{keys[1]}"),
        ):
            transform(lambda: (w.value**2).sum(), grad_states=twice)()


def test_a_state_replaced_after_jit_was_traced(w):
    model = Box(w=w, inner=Box(v=State(1.0)))
    read = jit(lambda: (model.w.value.sum(), model.inner.v.value))
    write = jit(lambda: setattr(model.inner.v, "value", model.inner.v.value + 1.0))
    write()
    assert read() == (3.0, 2.0)
    old = model.inner.v
    model.w = ParamState(jnp.array([10.0, 20.0]))
    model.inner = Box(v=State(5.0))
    write()
    assert read() == (30.0, 6.0)
    assert old.value == 2.0


@pytest.mark.parametrize("transform", [jit, *DERIVATIVES, lambda f: jit(grad(f))])
def test_a_container_changed_in_place(transform):
    """It is a write like any other: committed when all went well, and not a moment before."""
    s = State({"a": jnp.ones(()), "l": [jnp.zeros(())]}, name="s")

    def f(x, fail=False):
        s.value["a"] = s.value["a"] * x
        s.value["l"].append(x)
        if fail:
            raise ZeroDivisionError
        return x * s.value["a"]

    transform(f)(3.0)
    assert s.value["a"] == 3.0
    assert [float(x) for x in s.value["l"]] == [0.0, 3.0]
    with unchanged(s), pytest.raises(ZeroDivisionError):
        transform(lambda x: f(x, fail=True))(3.0)
    assert s.value["a"] == 3.0 and len(s.value["l"]) == 2


def test_a_container_changed_in_place_and_its_gradient():
    s = ParamState({"a": jnp.array(2.0)})

    def f():
        before = s.value["a"]
        s.value["a"] = before * 10.0
        return before**2

    assert grad(f, s)() == {"a": 4.0}
    assert s.value["a"] == 20.0


@pytest.mark.filterwarnings("ignore::brainstate.FrozenReadWarning")
@pytest.mark.parametrize("raw", [jax.vmap, lambda f: lambda xs: jax.lax.scan(lambda c, x: (c, f(x)), 0.0, xs)])
def test_a_container_changed_in_place_under_a_raw_transform_of_ours(raw):
    """The change cannot leave that transform."""
    s = State({"a": jnp.zeros(())}, name="s")

    def body(y):
        s.value["a"] = y
        return y

    with unchanged(s), pytest.raises(TraceContextError, match="State 's'"):
        grad(lambda x: (raw(body)(jnp.ones(2)), x)[1])(1.0)
    assert s.value == {"a": 0.0}


def test_threads_that_write(c):
    step = jit(lambda: setattr(c, "value", c.value + 1.0))
    threads = [threading.Thread(target=lambda: [step() for _ in range(25)]) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert c.value == 200.0


def test_another_thread_sees_no_half_done_step():
    a, b = State(jnp.array(0.0)), State(jnp.array(0.0))
    written, looked = threading.Event(), threading.Event()
    seen = []

    def f(x):
        a.value = x
        written.set()
        assert looked.wait(10)
        b.value = x
        return x

    def other():
        assert written.wait(10)
        seen.append((float(a.value), float(b.value)))
        looked.set()

    for transform in (grad, jit):
        written.clear(), looked.clear()
        thread = threading.Thread(target=other)
        thread.start()
        transform(f)(1.0)
        thread.join()
        assert seen.pop() == (0.0, 0.0)
        assert (a.value, b.value) == (1.0, 1.0)
        a.value = b.value = jnp.array(0.0)


@pytest.mark.parametrize("transform", DERIVATIVES)
def test_grad_states_that_select_nothing(transform, w):
    """It does not mean argument 0."""
    model = Box(w=w)
    for nothing in (model.states(HiddenState), model.states(HiddenState).to_nest(), [], {}, (), Box(v=State(1.0))):
        with unchanged(w), pytest.raises(ValueError, match=r"grad_states selects no State.*Leave grad_states out"):
            transform(lambda x: (w.value * x).sum(), grad_states=nothing)(2.0)


@pytest.mark.parametrize("transform", DERIVATIVES)
def test_leaves_that_are_no_floats(transform):
    """Only the inexact leaves are differentiated; the others are there, with their values, and have None."""
    s = ParamState({"w": jnp.array(3.0), "n": jnp.array(2), "k": jax.random.key(0), "i": 4, "flag": True})
    f = ParamState([jnp.array(2.0), np.arange(2)])

    def loss(x):
        assert s.value["i"] == 4 and s.value["flag"] is True
        assert s.value["k"] == jax.random.key(0)
        s.value["n"] = s.value["n"] + 1
        scale = (s.value["n"] + f.value[1].sum()).astype(jnp.float32)
        return s.value["w"] ** 2 * scale * f.value[0] * x

    g = transform(loss, {"s": s, "f": f})(1.0)
    if transform is hessian:
        assert g["s"]["w"]["s"] == {"w": 16.0, "n": None, "k": None, "i": None, "flag": None}
        assert g["s"]["w"]["f"] == [24.0, None]
        assert g["f"] == [{"s": {"w": 24.0, "n": None, "k": None, "i": None, "flag": None}, "f": [0.0, None]}, None]
    else:
        assert g == {"s": {"w": 48.0, "n": None, "k": None, "i": None, "flag": None}, "f": [36.0, None]}
    assert s.value["n"] == 3


@pytest.mark.parametrize("parts", [0, 1, 3, 4])
def test_aux_with_another_number_of_parts(parts, c):
    def f(x):
        c.value = x
        return (x, 1.0, 2.0, 3.0)[:parts]

    for transform in (*DERIVATIVES, lambda f, has_aux: lambda x: vjp(f, x, has_aux=has_aux)):
        with unchanged(c), pytest.raises(TypeError, match=rf"pair \(value, aux\); it returned a tuple of {parts}"):
            transform(f, has_aux=True)(2.0)


@pytest.mark.parametrize("transform", DERIVATIVES)
def test_unused_states_are_all_listed_by_path(transform, w):
    model = Box(a=ParamState(jnp.ones(())), layers=[Box(v=ParamState(jnp.ones(())))], w=w)
    with unchanged(w), pytest.raises(ValueError, match="never reads") as error:
        transform(lambda: (w.value**2).sum(), grad_states=model)()
    assert "('a',)" in str(error.value) and "('layers', 0, 'v')" in str(error.value)
    assert "('w',)" not in str(error.value)


@pytest.mark.parametrize("nothing", [None, [], {}, {"a": ()}, 3, jnp.arange(2), True])
def test_a_function_that_returns_nothing_to_differentiate(nothing):
    """The gradient is not zero, there is none."""
    for transform in DERIVATIVES:
        if transform is jacfwd and jax.tree.leaves(nothing):
            continue  # as in JAX: the derivative of an integer, of dtype float0
        with pytest.raises(TypeError, match=r"returned|scalar-output|real-valued|floating"):
            transform(lambda x: nothing)(1.0)


@pytest.mark.parametrize("call", [R.normal, lambda: R.split_key(), lambda: R.DEFAULT.value.sum()])
def test_random_numbers_under_a_raw_vmap(call):
    """Equal lanes are refused; only to look at the key is harmless."""
    allowed = call not in (R.normal,) and call.__code__.co_names[-1] == "sum"
    with R.seed_context(0):
        before = R.get_key_data()
        with contextlib.nullcontext() if allowed else pytest.raises(TraceContextError, match=r"random\.DEFAULT.*vmap"):
            jax.vmap(lambda x: (call(), x)[1])(jnp.zeros(3))
        assert (R.get_key_data() == before).all()


def test_a_state_in_a_plain_dataclass(w):
    @dataclasses.dataclass
    class Pair:
        first: object
        second: object = None

    model = Box(pair=Pair(w, [State(1.0)]))
    assert list(model.states()) == [("pair", "first"), ("pair", "second", 0)]
    grads = grad(lambda: model.pair.first.value.sum(), model)()
    assert grads["pair", "first"].tolist() == [1.0, 1.0]


def test_a_state_where_it_could_not_be_found(w):
    class Plain:
        def __init__(self, held):
            self.held = held

    model = Box()
    with pytest.raises(TypeError, match="State"):
        model.hidden = Plain(w)
    with pytest.raises(TypeError, match="State"):
        model.hidden = {w}
    assert not model.states()


@pytest.mark.parametrize("wrap", [lambda s: [s], lambda s: {"k": (1, s)}])
def test_a_state_in_the_value_of_a_state(wrap, w, c):
    for change in (lambda: setattr(c, "value", wrap(w)), lambda: c.replace(wrap(w)), lambda: State(wrap(w), name="c")):
        for where in (lambda f: f(), lambda f: jit(f)(), lambda f: grad(lambda x: (f(), x)[1])(1.0)):
            with unchanged(c), pytest.raises(ValueError, match=r"given to State 'c' contains a State"):
                where(lambda change=change: (change(), None)[1])


def test_a_state_put_in_place_into_the_value_of_a_state(w):
    """It is found where the change becomes a write."""
    s = State({"a": 1.0}, name="s")
    for transform in (jit, grad):
        with unchanged(s), pytest.raises(ValueError, match=r"given to State 's' contains a State"):
            transform(lambda x: (s.value.update(b=w), x)[1])(1.0)
    assert s.value == {"a": 1.0}


WAYS = {
    "assignment": lambda s, v: setattr(s, "value", v),
    "restore_value": lambda s, v: s.restore_value(v),
    "copy_from": lambda s, v: s.copy_from(type(s)(v, name="s")),
    "setattr": lambda s, v: type(s).value.__set__(s, v),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_to_change_a_value_is_a_tracked_write(way):
    s = ParamState(jnp.array(1.0), name="s")

    def f(x):
        way(s, s.value * x)
        return s.value * x

    for i, transform in enumerate((jit, *DERIVATIVES, lambda f: jit(grad(f)), lambda f: lambda x: vjp(f, x)), start=1):
        transform(f)(2.0)
        assert s.value == 2.0**i
    assert jvp(f, (2.0,), (1.0,))[1] == 2.0 * 2.0**i * 2.0
    assert grad(f, s)(2.0) == 4.0
    with unchanged(s), pytest.raises(TraceContextError, match="ParamState 's' was written"):
        jax.grad(f)(2.0)


def test_there_are_no_hooks():
    public = {*dir(State), *dir(nn.Module), *dir(brainstate), *dir(brainstate.transform)}
    assert not {name for name in public if "hook" in name and not name.startswith("__")}


def test_a_tracer_cannot_be_assigned_under_a_raw_transform(c):
    for raw in (jax.jit, jax.grad, jax.checkpoint, lambda f: lambda x: jax.vmap(f)(jnp.stack([x]))):
        with unchanged(c), pytest.raises(TraceContextError, match=r"State 'c'.*transform of the same name"):
            raw(lambda x: (setattr(c, "value", x), x)[1])(1.0 * jnp.ones(()))


def test_a_value_that_would_be_frozen(c):
    with pytest.warns(FrozenReadWarning, match=r"State 'c' was read under a raw staging transform"):
        jax.jit(lambda: c.value + 1.0)()


def test_a_gradient_through_an_integer_argument():
    for transform in DERIVATIVES:
        with pytest.raises(TypeError, match="argument 0 is int"):
            transform(lambda x: x * 2.0)(3)
    assert grad(lambda x: x * 2.0, allow_int=True)(3).dtype == jax.dtypes.float0


@pytest.mark.parametrize("other", [{1: 2.0, "a": 3.0}, (i for i in range(2)), {"a": 1.0, "b": 2.0}.values()])
def test_arguments_that_are_no_pytrees_are_passed_on(other):
    """As in ``jax.grad``; they are not differentiated."""
    assert grad(lambda x, y: x * len(list(y)))(1.0, other) == 2.0


def test_a_value_that_cannot_be_sorted():
    with pytest.raises(ValueError, match="'s'"):
        State({1: 2.0, "a": 3.0}, name="s")
