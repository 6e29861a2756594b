"""The defects D1 to D28 of the system that this one replaces, each with the right behaviour.

Every test here started as the smallest program that showed the defect. D12 concerns ``vmap`` only. Those of the
object graph and of random numbers have tests of the same names (d4, d7, d15, d19 ... d26) beside their subject
as well.
"""

import copy
import pickle
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainstate
import transforms
from _unchanged import unchanged
from brainstate import HiddenState, ParamState, State, TraceContextError, graph, nn
from brainstate import random as R
from brainstate.transform import (
    GradientTransform,
    StateFinder,
    fwd_grad,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jit,
    jvp,
    vector_grad,
    vjp,
)
from transforms import DERIVATIVES, EXACT

DECORATORS = [row.derive for row in transforms.DECORATORS.values()]
EXACTLY = [row.derive for row in EXACT.values()]
ONE_OF_EACH = [row.derive for row in DERIVATIVES.values() if row.kind == "gradient"]


@pytest.fixture
def w():
    return ParamState(jnp.array([1.0, 2.0]), name="w")


@pytest.fixture
def c():
    return State(jnp.array(0.0), name="c")


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = ParamState(jnp.array([1.0, 2.0]))
        self.layers = [ParamState(jnp.array(1.0))]

    def update(self, x):
        return sum((jnp.sum(s.value) for s in (self.w, *self.layers)), 0.0) * x


# ------------------------------------------------------------------------------------------ the forms of calling


@pytest.mark.parametrize("transform", DECORATORS)
def test_d01_all_transforms_decorate_with_and_without_options(transform, w):
    options = {"key": 0} if transform is fwd_grad else {}

    def plain(x):
        """Say what it is."""
        return (w.value**2).sum() * x**2

    expected = transform(plain, grad_states=[w], **options)(3.0)

    @transform(grad_states=[w], **options)
    def with_options(x):
        return plain(x)

    assert jax.tree.all(jax.tree.map(jnp.array_equal, with_options(3.0), expected))

    @transform
    def bare(x):
        return plain(x)

    @transform()
    def empty(x):
        return plain(x)

    assert bare(3.0).shape == empty(3.0).shape == ()
    named = transform(plain, argnums=0)
    assert (named.__name__, named.__doc__, named.__wrapped__) == ("plain", "Say what it is.", plain)


def test_d02_hessian_of_states_and_arguments_together(w):
    (ss, sa), (as_, aa) = hessian(lambda x: (w.value**2).sum() * x**3, grad_states=w, argnums=0)(2.0)
    assert jnp.array_equal(ss, 16.0 * jnp.eye(2))
    assert jnp.array_equal(sa, jnp.array([24.0, 48.0]))
    assert jnp.array_equal(as_, sa)
    assert aa == 60.0


def test_d03a_closed_over_values_are_live():
    k = {"v": 2.0}
    g = grad(lambda x: x * k["v"])
    assert g(1.0) == 2.0
    k["v"] = 5.0
    assert g(1.0) == 5.0


@pytest.mark.parametrize("transform", DECORATORS)
def test_d03b_arguments_that_are_no_arrays(transform):
    options = {"key": 0} if transform is fwd_grad else {}

    def f(x, mode, act=None):
        x = x * 2.0 if mode else x
        x = x * 3.0 if mode == "a" else x
        return x if act is None else act(x)

    seen = [transform(f, **options)(1.0, *rest) for rest in ((True,), (False,), ("a",), (None, jnp.sin))]
    if transform not in (fwd_grad, hessian):
        assert seen == [2.0, 1.0, 6.0, pytest.approx(np.cos(1.0))]
    assert transform(f, **options)(1.0, mode="a", act=jnp.sin).shape == ()


def test_d03b_python_control_flow_on_values(w):
    def f(x):
        return x * w.value.sum() if x > 0 else -x

    assert (grad(f)(2.0), grad(f)(-2.0)) == (3.0, -1.0)


def test_d03c_text_in_aux(c):
    def f(x):
        c.value = x
        return x, {"note": "text", "call": jnp.sin, "none": None, "x": x}

    gradient, aux = grad(f, has_aux=True)(1.0)
    assert gradient == 1.0
    assert aux == {"note": "text", "call": jnp.sin, "none": None, "x": 1.0}
    assert c.value == 1.0


# ------------------------------------------------------------------------------------------ containers of States


def test_d04_gradients_pair_with_the_states():
    model = Scale()
    states = model.states(ParamState)
    grads = grad(model, grad_states=states)(2.0)
    new = jax.tree.map(lambda s, g: s.value - 0.5 * g, states, grads)
    assert jax.tree.map(lambda x: x.tolist(), dict(new)) == {("layers", 0): 0.0, ("w",): [0.0, 1.0]}
    assert grads["layers", 0] == 2.0
    norms = jax.tree.map(jnp.linalg.norm, grad(model, grad_states=model)(2.0))
    assert jax.tree.structure(norms) == jax.tree.structure(states)


def test_d05_snapshots_point_to_the_states():
    model = Scale()
    for snapshots in (graph.treefy_states(model, ParamState), graph.treefy_states({"w": model.w})["w"]):
        with pytest.raises(TypeError, match=r"grad_states.* is a snapshot.*model\.states\(\.\.\.\)"):
            grad(model, grad_states=snapshots)
    with pytest.raises(TypeError, match=r"grad_states\['layers'\]\[0\] is a snapshot"):
        vjp(model, 2.0, grad_states=graph.treefy_states(model, ParamState))


@pytest.mark.parametrize("transform", EXACTLY)
def test_d06_states_that_select_nothing_are_an_error(transform):
    model = Scale()
    for nothing in (model.states(HiddenState), [], {}, (), {"a": []}, nn.Module()):
        with unchanged(model.w), pytest.raises(ValueError, match="selects no State"):
            transform(model, grad_states=nothing)(2.0)


def test_d07_a_key_function_that_repeats_itself(w):
    other = ParamState(jnp.array(3.0))

    def f(x):
        return w.value.sum() * other.value * x

    states = StateFinder(f, key_fn=lambda i, s: 0)(1.0)
    assert list(states.values()) == [w, other]
    grads = grad(f, grad_states=states)(1.0)
    assert {k: v.tolist() for k, v in grads.items()} == {"0": [3.0, 3.0], "state_1": 3.0}
    for key_fn in (lambda i, s: None, lambda i, s: [i], lambda i, s: ("a", 1)[i]):
        assert len(grad(f, grad_states=StateFinder(f, key_fn=key_fn)(1.0))(1.0)) == 2


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_d08_jacobians_of_functions_with_pytree_outputs(transform, w):
    jac = transform(lambda x: {"o": x * w.value, "p": (x**2, w.value.sum())}, grad_states=[w])(3.0)
    assert jac["o"][0].tolist() == [[3.0, 0.0], [0.0, 3.0]]
    assert [j[0].tolist() for j in jac["p"]] == [[0.0, 0.0], [1.0, 1.0]]
    jac = transform(lambda x: {"o": x * w.value}, grad_states={"k": w}, argnums=(0,))(3.0)
    assert jac["o"][0]["k"].shape == (2, 2)
    assert jac["o"][1][0].tolist() == [1.0, 2.0]


def test_d08_hessian_of_a_state_with_a_pytree_value():
    s = ParamState({"w": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)})
    h = hessian(lambda: (s.value["w"] ** 2).sum() * s.value["b"], grad_states=[s])()
    assert h[0]["w"][0]["w"].tolist() == [[6.0, 0.0], [0.0, 6.0]]
    assert h[0]["w"][0]["b"].tolist() == h[0]["b"][0]["w"].tolist() == [2.0, 4.0]
    assert h[0]["b"][0]["b"] == 0.0


@pytest.mark.parametrize(
    ("transform", "decorate"),
    [
        *((t, t) for t in (*DECORATORS, jit)),
        *((t, t()) for t in (*DECORATORS, jit)),
        2 * (lambda f: GradientTransform(f, jax.grad),),
    ],
)
def test_d09_methods(transform, decorate):
    class Net(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.k, self.calls = k, State(jnp.array(0))

        @decorate
        def loss(self, x, power=2):
            self.calls.value += 1
            return self.k * x**power

        @staticmethod
        @decorate
        def static(x):
            return x**2

    one, two = Net(1.0), Net(2.0)
    for net in (one, two):
        net.loss(3.0)
        net.loss(3.0, power=1)
        Net.loss.__get__(net)(3.0)
        assert net.calls.value == 3
    results = jax.tree.leaves((one.loss(3.0), two.loss(3.0), Net.static(3.0)))
    assert [r.shape for r in results] == [(), (), ()]
    if transform is not fwd_grad:
        assert results[1] == 2 * results[0]
    assert transform(one.loss.__wrapped__ if transform is jit else lambda x: one.k * x)(3.0).shape == ()


# ------------------------------------------------------------------------------------------ messages, results

# What each message must contain is in the table of test_errors; this is that none of the old ones is left.


@pytest.mark.parametrize("transform", ONE_OF_EACH)
@pytest.mark.parametrize(
    ("argnums", "args", "kwargs", "words"),
    [
        (5, (1.0,), {}, "argument 5"),
        ((0, 0), (1.0,), {}, r"argnums=\(0, 0\)"),
        ((), (1.0,), {}, r"argnums=\(\)"),
        (np.float32(0), (1.0,), {}, r"argnums=(np\.float32\()?0"),
        (1, (1.0,), {"y": 1.0}, "argument 1"),
        (None, (), {"x": 1.0}, "argument 0"),
    ],
)
def test_d10_argnums_are_named_as_they_were_given(transform, argnums, args, kwargs, words, c):
    def f(x, y=1.0):
        c.value = x
        return x * y

    with unchanged(c), pytest.raises((TypeError, ValueError), match=words) as error:
        transform(f, argnums=argnums)(*args, **kwargs)
    assert not any(word in str(error.value) for word in ("NoneType", "max()", "argument 7", "argument 3", "argument 2"))


@pytest.mark.parametrize("parts", [(), (1.0,), (1.0, 2.0)], ids=["one", "three", "four"])
def test_d11_aux_has_exactly_one_part(parts, c):
    def f(x):
        c.value = x
        return (x * 2.0, 1.0, *parts)[: None if len(parts) > 0 else 1]

    with unchanged(c), pytest.raises(TypeError, match=r"pair \(value, aux\); it returned a tuple of [134]"):
        grad(f, has_aux=True)(2.0)


# ------------------------------------------------------------------------------------------ writes and compiled code


def test_d13_disable_jit(w, c):
    def f(x):
        c.value = c.value + x
        return (w.value * x).sum()

    with jax.disable_jit():
        state_grads, gradient = grad(f, grad_states=w, argnums=0)(2.0)
        assert (state_grads.tolist(), gradient, c.value) == ([2.0, 2.0], 3.0, 2.0)
        state_grads, gradient = jit(grad(f, grad_states=w, argnums=0))(2.0)
        assert (state_grads.tolist(), gradient, c.value) == ([2.0, 2.0], 3.0, 4.0)
        assert jit(lambda x: f(x))(1.0) == 3.0
        assert c.value == 5.0
        for transform in (vector_grad, jacrev, jacfwd, hessian):
            transform(f)(1.0)
        assert c.value == 9.0


@pytest.mark.parametrize("transform", [jit, *EXACTLY])
def test_d14_changes_in_place_are_writes(transform):
    s = State({"a": jnp.ones(2), "l": [jnp.zeros(())]})
    held = s.value

    def f(x):
        s.value["a"] = s.value["a"] * x
        s.value["l"].append(x)
        s.value["b"] = x
        return x

    transform(f)(3.0)
    assert s.value["a"].tolist() == [3.0, 3.0]
    assert [float(x) for x in s.value["l"]] == [0.0, 3.0]
    assert s.value["b"] == 3.0
    assert list(held) == ["a", "l"] and held["a"].tolist() == [1.0, 1.0]  # what was handed out before is not touched
    if transform is not jit:
        transform(f)(2.0)
        assert s.value["a"].tolist() == [6.0, 6.0]


def test_d14_the_structure_may_grow_under_jit():
    s = State([jnp.zeros(())])
    grow = jit(lambda x: s.value.append(x))
    for i in range(3):
        grow(float(i))
    assert [float(x) for x in s.value] == [0.0, 0.0, 1.0, 2.0]


@pytest.mark.parametrize("make", [jit, lambda f: jit(grad(f)), grad, lambda f: grad(jit(f))])
def test_d15_a_replaced_state_is_noticed(make):
    model = Scale()
    f = make(lambda x: model(x))
    assert f(1.0) == 4.0
    model.w = ParamState(jnp.array([10.0, 10.0]))
    assert f(1.0) == 21.0
    model.layers.append(ParamState(jnp.array(100.0)))
    assert f(1.0) == 121.0
    model.layers = []
    assert f(1.0) == 20.0


def test_d15_gradients_with_respect_to_the_new_state():
    model = Scale()
    gradient = grad(lambda x: model(x), grad_states=model)
    compiled = jit(gradient)
    gradient(1.0), compiled(1.0)
    model.layers.append(ParamState(jnp.array(1.0)))
    model.w = new = ParamState(jnp.array([5.0, 5.0]))
    for g in (gradient(2.0), compiled(2.0), grad(model, grad_states={"new": new})(2.0)):
        assert len(g) in (1, 3)
        assert all((leaf == 2.0).all() for leaf in jax.tree.leaves(g))


@pytest.mark.parametrize("transform", [lambda f: jit(f), lambda f: lambda: grad(lambda x: (f(), x)[1])(1.0)])
def test_d16_every_way_to_change_a_value_is_a_write(transform, c):
    other = State(jnp.array(7.0), name="other")
    restore = transform(lambda: c.restore_value(c.value + 1.0))
    restore()
    restore()
    assert c.value == 2.0
    take = transform(lambda: c.copy_from(other))
    take()
    assert (c.value, c.name) == (7.0, "other")
    other.value = jnp.array(8.0)
    take()
    assert c.value == 8.0


def test_d17_replace_renames():
    new = State(1.0, name="a", tag="t").replace(5.0, name="b")
    assert (new.name, new.value, new.tag) == ("b", 5.0, {"t"})
    assert State(1.0, name="a").replace(5.0).name == "a"


def test_d18_there_are_no_hooks(c):
    assert not [name for name in (*dir(State), *dir(brainstate)) if "hook" in name and not name.startswith("__")]
    step = jit(lambda x: setattr(c, "value", c.value + x))
    step(1.0)
    assert c.value == 1.0


# ------------------------------------------------------------------------------------------ graph, random, copies


def test_d19_own_parameters_without_recursion():
    model = nn.Sequential(nn.Linear(2, 3))
    assert list(model.named_parameters(recurse=False)) == []
    model.scale = ParamState(1.0)
    assert list(model.named_parameters(recurse=False)) == [("scale", model.scale)]


def test_d20_update_from_flat_and_plain_mappings():
    model = Scale()
    for mapping in (graph.treefy_states(model).to_flat(), dict(graph.treefy_states(model))):
        graph.update_states(model, mapping)
    assert model.w.value.tolist() == [1.0, 2.0]


def test_d21_attributes_of_a_mapping_that_are_missing():
    assert not hasattr(Scale().states(), "foo")
    assert not hasattr(Scale().states().to_nest(), "foo")


def test_d22_raw_vmap_of_random_numbers():
    with R.seed_context(0), pytest.raises(TraceContextError, match=r"random\.DEFAULT"):
        jax.vmap(lambda x: x + R.normal())(jnp.zeros(3))


def test_d23_a_bad_probability_is_named():
    with pytest.raises(ValueError, match=r"bernoulli.*p=2\.0"):
        R.bernoulli(2.0)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_d24_states_can_be_copied_and_pickled(again, w):
    w.add_tag("t")
    w.unit = "mV"
    for state in (w, State({"a": [jnp.ones(2), 3], "b": None}, name="s"), R.RandomState(3)):
        new = again(state)
        assert new is not state
        assert type(new) is type(state)
        assert repr(new) == repr(state)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, new.value, state.value))
        assert new.metadata() == state.metadata()


@pytest.mark.parametrize("donate", [False, True])
def test_d25_threads_lose_no_update(donate):
    c = State(jnp.array(0))
    rounds, workers = 50, 8

    @jit(donate_states=donate)
    def step():
        c.value += 1

    start = threading.Barrier(workers)

    def work():
        start.wait()
        for _ in range(rounds):
            step()

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert c.value == workers * rounds


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: [s], lambda s: {"a": (1.0, s)}])
def test_d26_a_state_in_the_value_of_a_state(wrap, w):
    holder = State(0.0, name="holder")
    with unchanged(holder), pytest.raises(ValueError, match="given to State 'holder' contains a State"):
        holder.value = wrap(w)
    with pytest.raises(ValueError, match=r"holder.*contains a State"):
        jit(lambda: setattr(holder, "value", wrap(w)))()
    with pytest.raises(ValueError, match="contains a State"):
        holder.replace(wrap(w))
    if wrap(w) is not w:
        with pytest.raises(ValueError, match="contains a State"):
            State(wrap(w))
    assert State(w).value is w.value


def test_d27_all_unused_states_are_named(w):
    unused = {k: ParamState(jnp.ones(()), name=f"name_{k}") for k in "cab"}
    for _ in range(3):
        with unchanged(w), pytest.raises(ValueError) as error:
            grad(lambda: w.value.sum(), grad_states={"used": w, "not": unused})()
        assert str(error.value).startswith(
            "the function never reads grad_states['not']['a'] (ParamState 'name_a'), grad_states['not']['b'] "
            "(ParamState 'name_b'), grad_states['not']['c'] (ParamState 'name_c'): "
        )
        assert "\n" not in str(error.value) and "`" not in str(error.value) and "used'" not in str(error.value)


@pytest.mark.parametrize("value", ["text", jnp.sin, {"a": 1.0, "b": "text"}, None, [None, {}]])
def test_d28_values_that_are_no_arrays(value):
    s = State(value, name="s")
    seen = []

    def f(x):
        seen.append(s.value)
        return x * 2.0

    for transform in EXACTLY:
        transform(f)(1.0)
        assert seen[-1] == value
    assert vjp(f, 1.0)[0] == 2.0
    assert jvp(f, (1.0,), (1.0,)) == (2.0, 2.0)
    if jax.tree.leaves(value):
        with unchanged(s), pytest.raises(TypeError, match=r"State 's' holds a .*not a JAX type.*plain attribute"):
            jit(f)(1.0)
    else:
        jit(f)(1.0)
        assert seen[-1] == value


def test_d28_arguments_that_are_no_arrays_are_named():
    with pytest.raises(TypeError, match=r"argument 0\['k'\] is a function: grad differentiates"):
        grad(lambda d: 1.0)({"k": lambda: 1})
    with pytest.raises(TypeError, match="argument 1 is a str"):
        grad(lambda x, m: x, argnums=(0, 1))(1.0, "a")


def test_the_defects_all_have_a_test(request):
    names = {name.split("_")[1] for name in vars(request.module) if name.startswith("test_d")}
    tested = {int(name[1:3]) for name in names if name[1:3].isdigit()}
    assert tested == set(range(1, 29)) - {12}
