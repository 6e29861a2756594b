"""``State``: what it is by itself, and what a State goes through in each of the transforms."""

import copy
import functools
import gc
import inspect
import pickle
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainstate
from _unchanged import unchanged
from brainstate import (
    BatchState,
    FrozenReadWarning,
    HiddenState,
    LongTermState,
    ParamState,
    ShortTermState,
    State,
    TraceContextError,
    nn,
)
from brainstate import random as R
from brainstate.transform import (
    StateFinder,
    fwd_grad,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jit,
    vector_grad,
)
from transforms import DERIVATIVES, EXACT, ROW

KINDS = [State, LongTermState, ParamState, BatchState, ShortTermState, HiddenState]

# Each takes a function of one float and returns a function of one float that runs it, derivatives and all.
FIRST = {name: row for name, row in DERIVATIVES.items() if row.kind == "gradient"}
TRANSFORMS = {name: functools.partial(row.derive, **row.options) for name, row in FIRST.items()}
TRANSFORMS |= {name: ROW[name].derive for name in ("GradientTransform", "vjp", "jvp")}
TRANSFORMS |= {
    "fwd_grad of several directions": lambda f: fwd_grad(f, key=0, tangent_size=3),
    "jit": jit,
    "jit of grad": lambda f: jit(grad(f)),
    "grad of jit": lambda f: grad(jit(f)),
    "grad of grad": lambda f: grad(grad(f)),
    "jacfwd of jit of vector_grad": lambda f: jacfwd(jit(vector_grad(f))),
}
every_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
EAGER = {k: v for k, v in TRANSFORMS.items() if "jit" not in k}
every_eager_transform = pytest.mark.parametrize("transform", EAGER.values(), ids=EAGER)


def concrete(tree) -> bool:
    """Tell that no tracer is left in ``tree``."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


# ------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(
    "value",
    [1, 2.5, True, "text", None, jnp.sin, object(), jnp.ones(2), np.ones(3), {"a": [1, (2.0, None)]}, [], {1, 2}],
    ids=lambda v: type(v).__name__,
)
def test_any_value(value):
    s = State(value)
    assert s.value is value
    s.value = other = {"new": value}
    assert s.value is other
    s.value = value
    assert s.value is value


def test_value_cannot_be_deleted():
    with pytest.raises(AttributeError):
        del State(1.0).value


def test_a_state_given_as_value_is_unwrapped():
    inner = ParamState(jnp.ones(2), name="inner")
    assert State(inner).value is inner.value
    assert State(inner).name is None


def test_augmented_assignment():
    s = State(jnp.zeros(2))
    s.value += 1.0
    s.value = s.value.at[0].set(5.0)
    assert s.value.tolist() == [5.0, 1.0]


def test_an_in_place_change_outside_of_transforms_is_plain_python():
    s = State({"a": 1.0})
    s.value["a"] = 2.0
    assert s.value == {"a": 2.0}


@pytest.mark.parametrize("kind", KINDS)
def test_name_tags_and_metadata(kind):
    s = kind(jnp.ones(2), name="n", tag="t", unit="mV", bounds=(0, 1))
    assert (s.name, s.tag, s.unit, s.bounds) == ("n", {"t"}, "mV", (0, 1))
    assert s.metadata() == {"name": "n", "tag": {"t"}, "unit": "mV", "bounds": (0, 1)}
    s.name = "m"
    s.add_tag("u")
    s.unit = "V"
    assert s.metadata() == {"name": "m", "tag": {"t", "u"}, "unit": "V", "bounds": (0, 1)}
    assert kind(jnp.ones(2), tag=("a", "b")).tag == {"a", "b"}
    assert (kind(jnp.ones(2)).name, kind(jnp.ones(2)).tag) == (None, set())
    s.metadata()["tag"].add("elsewhere")
    assert s.tag == {"t", "u"}


@pytest.mark.parametrize("word", ["copy", "restore_value", "numel", "metadata"])
def test_metadata_cannot_hide_a_member(word):
    for make in (lambda: State(1.0, **{word: 3}), lambda: State(1.0).replace(2.0, **{word: 3})):
        with pytest.raises(TypeError, match=rf"State has its own attribute '{word}': choose another word"):
            make()


@pytest.mark.parametrize("kind", KINDS)
def test_copy(kind):
    s = kind(jnp.ones(2), name="n", tag="t", unit="mV")
    for new in (s.copy(), copy.copy(s)):
        assert type(new) is kind and new is not s and new != s
        assert new.value is s.value
        assert new.metadata() == s.metadata()
        new.add_tag("other")
        new.value = jnp.zeros(2)
        assert (s.tag, s.value.tolist()) == ({"t"}, [1.0, 1.0])


@pytest.mark.parametrize("kind", KINDS)
def test_replace(kind):
    s = kind(jnp.ones(2), name="n", tag="t", unit="mV")
    new = s.replace(jnp.zeros(3))
    assert (type(new), new.value.tolist(), new.metadata()) == (kind, [0.0] * 3, s.metadata())
    new = s.replace(jnp.zeros(3), name="m", tag="u", unit="V", more=1)
    assert new.metadata() == {"name": "m", "tag": {"u"}, "unit": "V", "more": 1}
    assert s.replace(jnp.zeros(3), tag=("a", "b")).tag == {"a", "b"}
    assert s.replace(jnp.zeros(3), name=None).name is None
    assert s.metadata() == {"name": "n", "tag": {"t"}, "unit": "mV"}


def test_restore_value():
    s = State({"a": jnp.ones(2), "b": 1.0}, name="s")
    s.restore_value({"a": jnp.zeros(2), "b": 2})
    assert s.value["a"].tolist() == [0.0, 0.0] and type(s.value["b"]) is float
    with unchanged(s), pytest.raises(ValueError, match=r"State 's': the value to restore is {'a'.* for .*must agree"):
        s.restore_value({"a": jnp.zeros(2)})
    with unchanged(s), pytest.raises(ValueError, match="must agree"):
        s.restore_value(jnp.zeros(5))


def test_copy_from():
    s, other = ParamState(jnp.ones(2), name="s"), ParamState(jnp.zeros(3), name="other")
    s.copy_from(other)
    assert s.value is other.value
    assert s.name == "other"
    with unchanged(s), pytest.raises(ValueError, match="ParamState 'other' cannot take over a State: the classes"):
        s.copy_from(State(1.0, name="no"))
    assert s.name == "other"


def test_numel_and_value_call():
    s = State({"a": jnp.ones((2, 3)), "b": [1.0, np.zeros(4)], "c": None})
    assert s.numel() == 11
    assert State(3.0).numel() == 1
    assert State(None).numel() == 0
    doubled = s.value_call(lambda x: 2 * x)
    assert (doubled["a"].tolist(), doubled["b"][0], doubled["c"]) == ([[2.0] * 3] * 2, 2.0, None)
    assert s.value["b"][0] == 1.0


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        (ParamState(jnp.ones((2, 3)), name="w"), "ParamState(float32[2,3], name='w')"),
        (State(jnp.array(0)), "State(int32[])"),
        (State({"a": np.ones(2), "b": [1, "text", None]}), "State({'a': float64[2], 'b': [1, 'text', None]})"),
        (State(None), "State(None)"),
        (State(jnp.sin, tag="t"), "tag={'t'})"),
        (BatchState(jnp.ones(1, complex), unit="mV"), "BatchState(complex64[1], unit='mV')"),
        (State(2.5, name="x", tag="t", k=(1, 2)), "State(2.5, name='x', tag={'t'}, k=(1, 2))"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_repr(state, shown):
    assert repr(state).endswith(shown)
    assert type(state).__name__ in repr(state)


# ------------------------------------------------------------------------------------------ identity


def test_identity():
    a, b = State(jnp.ones(2), name="s"), State(jnp.ones(2), name="s")
    assert a == a and a != b
    assert len({a, b, a}) == 2
    value = hash(a)
    a.value, a.name = 1.0, "other"
    assert hash(a) == value
    assert weakref.ref(a)() is a


def test_a_state_is_a_leaf():
    a, b = State([1.0, 2.0]), State(3.0)
    assert jax.tree.leaves({"x": [a], "y": b}) == [a, b]
    assert jax.tree.map(lambda s: s.value, (a, b)) == ([1.0, 2.0], 3.0)


@pytest.mark.parametrize(
    "use", [lambda s: s + 1.0, lambda s: 2.0 * s, lambda s: -s, jnp.sin, lambda s: s[0], lambda s: jax.jit(jnp.sin)(s)]
)
def test_a_state_is_no_array(use):
    with pytest.raises((TypeError, ValueError), match=r"is not the value that it holds: write `\.value` after"):
        use(State(jnp.ones(2)))


def test_kinds():
    parents = {LongTermState: State, ParamState: LongTermState, BatchState: LongTermState}
    parents |= {ShortTermState: State, HiddenState: ShortTermState}
    for kind, parent in parents.items():
        assert kind.__mro__[1] is parent
    assert {brainstate.State, *parents} == {
        getattr(brainstate, name) for name in dir(brainstate) if name.endswith("State")
    }


# ------------------------------------------------------------------------------------------ hidden states


def test_hidden_state():
    h = HiddenState(np.ones((2, 3)), name="h")
    assert (h.varshape, h.num_state, h.numel()) == ((2, 3), 1, 6)
    assert HiddenState(State(jnp.ones(4))).varshape == (4,)
    h.value = jnp.zeros((5, 3))
    assert h.varshape == (5, 3)


@pytest.mark.parametrize("value", [1.0, None, "text", [jnp.ones(2), jnp.ones(2)], {"a": 1.0}, [], jnp.sin])
def test_hidden_state_holds_one_array(value):
    with pytest.raises(TypeError, match=r"HiddenState holds one array, not .*: use ShortTermState"):
        HiddenState(value)


def test_hidden_state_inside_transforms():
    h = HiddenState(jnp.ones(2), name="h")

    @jit
    def step(x):
        h.value = h.value * x
        fresh = HiddenState(h.value + 1.0)
        return fresh.varshape[0] * fresh.value.sum()

    assert step(3.0) == 16.0
    assert grad(lambda: (h.value**2).sum(), h)().tolist() == [6.0, 6.0]


# ------------------------------------------------------------------------------------------ copies and pickles


@pytest.mark.parametrize("again", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", KINDS)
def test_deep_copies(kind, again):
    s = kind(jnp.ones(2), name="n", tag="t", unit=["mV"])
    new = again(s)
    assert type(new) is kind and new is not s
    assert new.value.tolist() == [1.0, 1.0]
    assert new.metadata() == s.metadata()
    new.unit.append("V")
    new.add_tag("u")
    new.value = new.value + 1.0
    assert (s.unit, s.tag, s.value.tolist()) == (["mV"], {"t"}, [1.0, 1.0])


@pytest.mark.parametrize("again", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
def test_deep_copies_keep_what_is_shared(again):
    s = State({"a": [jnp.ones(2), 1], "b": None, "c": "text"})
    one, two, value = again([s, s, s.value])
    assert one is two
    assert one.value is value
    one.value["a"].append(3)
    assert len(s.value["a"]) == 2


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_of_generators_draw_the_same(again):
    rng = R.RandomState(7)
    rng.normal()
    new = again(rng)
    assert new.normal() == rng.normal()
    new.normal()
    assert (new.get_key_data() != rng.get_key_data()).any()


def test_a_copied_state_is_its_own_in_transforms():
    s = State(jnp.array(1.0))
    new = copy.deepcopy(s)
    jit(lambda: setattr(new, "value", s.value + new.value))()
    assert (s.value, new.value) == (1.0, 2.0)


@every_transform
def test_copies_inside_transforms(transform):
    s = ParamState(jnp.array(3.0), name="s", tag="t")

    def f(x):
        for twin in (s.copy(), copy.deepcopy(s), s.replace(s.value)):
            assert twin.metadata() == s.metadata()
            twin.value = twin.value * x
        return s.value * x

    with unchanged(s):
        transform(f)(2.0)


# ------------------------------------------------------------------------------------------ reading in transforms


@every_transform
@pytest.mark.parametrize(
    "value", [2, 2.0, True, np.float32(2), np.ones(2, np.float32), jnp.ones(2), {"a": jnp.ones(2), "b": [1, None]}]
)
def test_a_read_changes_nothing(transform, value):
    s = State(value)

    def f(x):
        jax.tree.leaves(s.value)
        return x * 2.0

    with unchanged(s):
        transform(f)(1.0)
        transform(f)(1.0)
    assert s.value is value


@every_transform
def test_a_python_number_that_is_written_becomes_what_was_written(transform):
    s = State(2)

    def f(x):
        s.value = jnp.asarray(s.value) + 1
        return x * 2.0

    transform(f)(1.0)
    assert isinstance(s.value, jax.Array)
    assert (s.value, s.value.dtype) == (3, jnp.int32)


@every_eager_transform
@pytest.mark.parametrize(
    "value", ["text", None, jnp.sin, {"k": ("text", None)}], ids=["text", "None", "callable", "dict"]
)
def test_values_that_are_no_arrays(transform, value):
    s, t = State(value), State("old")

    def f(x):
        assert s.value == value
        t.value = s.value
        return x * 2.0

    with unchanged(s):
        transform(f)(1.0)
    assert t.value == value


def test_text_among_the_leaves_of_a_differentiated_state():
    s = State({"w": jnp.ones(2), "n": 3, "name": "text", "call": jnp.sin, "none": None})

    def f(x):
        assert (s.value["n"], s.value["name"], s.value["call"]) == (3, "text", jnp.sin)
        return (s.value["w"] * x).sum()

    for transform in (grad, vector_grad, jacrev, jacfwd):
        g = transform(f, s)(2.0)
        assert g.pop("w").tolist() == [2.0, 2.0]
        assert set(g.values()) == {None}


# ------------------------------------------------------------------------------------------ writing in transforms


@every_transform
def test_a_write_is_committed_once(transform):
    count, last = State(jnp.array(0)), State(jnp.zeros(()))

    def f(x):
        count.value = count.value + 1
        last.value = x * 3.0
        return last.value**2

    wrapped = transform(f)
    for i in range(1, 3):
        wrapped(2.0)
        assert (count.value, last.value) == (i, 6.0)
        assert concrete([count.value, last.value])


@pytest.mark.parametrize("row", [*EXACT.values(), None], ids=lambda row: str(row or "jit of grad"))
def test_a_write_to_a_differentiated_state(row):
    """It is kept, and the derivative is the one at the value at entry."""
    w = ParamState(jnp.array(3.0))

    def f(x):
        y = w.value**3 * x
        w.value = w.value * 10.0
        return y + 0.0 * w.value

    transform, twin = (row.derive, row.jax) if row else (lambda *given: jit(grad(*given)), jax.grad)
    assert transform(f, w)(2.0) == twin(lambda w: w**3 * 2.0)(3.0)
    assert w.value == 30.0


@pytest.mark.parametrize("transform", [*(row.derive for row in EXACT.values()), lambda *a, **k: jit(grad(*a, **k))])
def test_a_differentiated_state_that_is_overwritten_has_no_influence(transform):
    w = ParamState(jnp.array(3.0))

    def f(x):
        w.value = x
        return w.value**2

    with pytest.raises(ValueError, match="before it reads it"):
        transform(f, w)(2.0)
    assert w.value == 3.0
    assert transform(f, w, check_states=False)(2.0) == 0.0
    assert w.value == 2.0


@every_transform
def test_a_new_shape_dtype_and_structure(transform):
    s = State(jnp.ones(2))
    values = [jnp.ones(3), jnp.zeros(3, int), {"a": jnp.ones(1)}, [1.0], (), jnp.ones(2)]

    def f(x, i=0):
        jax.tree.leaves(s.value)
        s.value = values[i]
        return x * 2.0

    for i, value in enumerate(values):
        transform(lambda x, i=i: f(x, i))(1.0)
        assert jax.tree.structure(s.value) == jax.tree.structure(value)
        assert jax.tree.all(jax.tree.map(lambda a, b: jnp.array_equal(a, b), s.value, value))


def test_jit_traces_again_when_a_state_changes_its_shape():
    s, traces = State(jnp.ones(2)), []

    @jit
    def f():
        traces.append(s.value)
        return s.value.sum()

    for value in (jnp.ones(2), jnp.zeros(2), jnp.ones(3), jnp.ones(3, int), jnp.ones(2)):
        s.value = value
        assert f() == value.sum()
    assert len(traces) == 3


@every_transform
def test_writes_of_an_inner_transform_are_seen_by_the_outer_one(transform):
    s = State(jnp.zeros(()))

    def inner(x):
        s.value = s.value + x
        return s.value * x

    def outer(x):
        s.value = s.value + 1.0
        y = sum(jax.tree.leaves(transform(inner)(x * 1.0)), start=0.0 * x)
        s.value = s.value * 2.0
        return y

    for make in (jit, grad, lambda f: jit(jacfwd(f))):
        s.value = jnp.zeros(())
        make(outer)(3.0)
        assert s.value == 8.0
        assert concrete([s.value])


@every_transform
def test_changes_in_place_are_committed(transform):
    s = State({"a": jnp.zeros(()), "l": [1.0]}, name="s")

    def inner(x):
        s.value["a"] = s.value["a"] + x
        s.value["l"].append(x)
        return x * s.value["a"]

    transform(inner)(2.0)
    assert s.value["a"] == 2.0
    assert [float(x) for x in s.value["l"]] == [1.0, 2.0]
    assert concrete(s.value)

    def outer(x):
        s.value["b"] = x
        inner(x)
        transform(inner)(x * 1.0)
        return x * s.value["a"]

    for make in (jit, grad):
        s.value = {"a": jnp.zeros(()), "l": []}
        make(outer)(2.0)
        assert (s.value["a"], s.value["b"], len(s.value["l"])) == (4.0, 2.0, 2)
        assert concrete(s.value)


def test_an_in_place_change_that_fails_is_undone():
    s = State({"l": [1.0]})

    def f(x):
        s.value["l"].append(x)
        s.value["more"] = x
        raise ZeroDivisionError

    for transform in (jit, grad, jacfwd):
        with unchanged(s), pytest.raises(ZeroDivisionError):
            transform(f)(2.0)
    assert s.value == {"l": [1.0]}


def test_nested_gradients():
    w, c = ParamState(jnp.array(2.0)), State(jnp.array(0))

    def f(x):
        c.value += 1
        return w.value**3 * x**3

    assert grad(grad(f))(2.0) == 8.0 * 12.0
    assert c.value == 1
    assert grad(lambda x: grad(f, w)(x), w)(2.0) == 12.0 * 8.0
    assert grad(lambda x: grad(f)(x), w)(2.0) == 12.0 * 12.0
    assert c.value == 3


# ------------------------------------------------------------------------------------------ States created inside


@every_transform
def test_a_local_state(transform):
    made = []

    def f(x):
        local = State(x * 2.0, name="local")
        local.value = local.value * x
        made.append(weakref.ref(local))
        return local.value

    transform(f)(3.0)
    gc.collect()
    assert made and all(ref() is None for ref in made)


def test_derivatives_go_through_a_local_state():
    w = ParamState(jnp.array(2.0))

    def f(x):
        local = State({"a": w.value * x})
        local.value["a"] = local.value["a"] ** 2
        return local.value["a"]

    assert grad(f, w, 0)(3.0) == (36.0, 24.0)
    assert (jacrev(f)(3.0), jacfwd(f)(3.0), hessian(f)(3.0), jit(f)(3.0)) == (24.0, 24.0, 8.0, 36.0)
    assert StateFinder(f, return_type="list")(3.0) == [w]


@every_transform
def test_a_state_that_outlives_the_transform_has_a_concrete_value(transform):
    kept = []

    def f(x):
        kept.append(State({"a": x * 2.0, "b": 1.0}, name="kept"))
        kept[-1].value["a"] = kept[-1].value["a"] * x
        return x * 2.0

    transform(f)(3.0)
    assert concrete(kept[-1].value)
    assert kept[-1].value["a"] == 18.0
    kept[-1].value = 1.0
    assert kept[-1].value == 1.0


@every_transform
def test_a_state_created_by_a_call_that_failed(transform):
    kept = []

    def f(x):
        kept.append(State(x, name="kept"))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        transform(f)(3.0)
    with pytest.raises(TraceContextError, match=r"State 'kept' was created inside a transform that .*failed.*Assign"):
        _ = kept[0].value
    assert "no value yet" in repr(kept[0])
    kept[0].value = 5.0
    assert kept[0].value == 5.0


def test_a_state_made_once_is_an_input_from_then_on():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = None

        def update(self, x):
            if self.w is None:
                self.w = ParamState(jnp.ones(()), name="w")
            self.w.value = self.w.value * 2.0
            return self.w.value * x

    m = Lazy()
    f = jit(lambda x: m(x))
    assert [float(f(1.0)) for _ in range(4)] == [2.0, 4.0, 8.0, 16.0]
    assert m.w.value == 16.0
    assert grad(lambda x: m(x), m)(1.0)["w",] == 2.0


# ------------------------------------------------------------------------------------------ raw JAX transforms

RAW = {
    "jit": jax.jit,
    "grad": jax.grad,
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, x])),
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, y: (c, f(y)), 0.0, jnp.stack([x, x])),
    "checkpoint": jax.checkpoint,
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,)),
    "make_jaxpr": jax.make_jaxpr,
    "eval_shape": lambda f: lambda x: jax.eval_shape(f, x),
}
STAGING = ("jit", "scan", "checkpoint", "make_jaxpr", "eval_shape")
every_raw_transform = pytest.mark.parametrize("raw", RAW.values(), ids=RAW)


@every_raw_transform
@pytest.mark.parametrize("value", [lambda x: x, lambda x: 1.0, lambda x: {"a": [x]}], ids=["tracer", "number", "dict"])
def test_a_write_under_a_raw_transform_is_refused(raw, value):
    c = State(jnp.array(0.0), name="c")

    def f(x):
        c.value = value(x)
        return x * 2.0

    with (
        unchanged(c),
        pytest.raises(
            TraceContextError, match=r"State 'c' was written inside a raw JAX transform.*brainstate\.transform"
        ),
    ):
        raw(f)(jnp.array(1.0))


@every_raw_transform
@pytest.mark.parametrize("outer", ["grad", "jit", "jacfwd", "jvp", "jit of grad"])
def test_a_write_under_a_raw_transform_within_ours_is_refused(raw, outer):
    c = State(jnp.array(0.0), name="c")

    def f(x):
        c.value = x
        return x * 2.0

    with (
        unchanged(c),
        pytest.raises(
            TraceContextError,
            match=r"State 'c' was written inside a raw JAX transform within brainstate\.transform\.\w+:",
        ),
    ):
        TRANSFORMS[outer](lambda x: (raw(f)(x), x)[1])(jnp.array(1.0))


@every_raw_transform
def test_our_transform_under_a_raw_one(raw):
    """Nothing is read or written: no objection. With a write: refused, at the commit."""
    c = State(jnp.array(0.0), name="c")

    def g(x, write=False):
        if write:
            c.value = x
        return x**2

    def ours(write):
        return lambda x: grad(g)(x, write=write)

    raw(ours(False))(jnp.array(3.0))
    with unchanged(c), pytest.raises(TraceContextError, match=r"State 'c' was written inside a raw JAX transform"):
        raw(ours(True))(jnp.array(3.0))
    with unchanged(c), pytest.raises(TraceContextError, match=r"State 'c' was written inside a raw JAX transform"):
        raw(lambda x: jit(g, static_argnames="write")(x, write=True))(jnp.array(3.0))


@pytest.mark.parametrize("name", RAW)
def test_a_read_under_a_raw_transform(name):
    """Under staging the value freezes: a warning. Otherwise it is an ordinary read."""
    s = State(jnp.array(2.0), name="s")
    f = RAW[name](lambda x: x * s.value)
    if name in STAGING:
        with pytest.warns(FrozenReadWarning, match=r"State 's' was read under a raw staging transform.*\.jit"):
            f(jnp.array(3.0))
    else:
        f(jnp.array(3.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FrozenReadWarning)
        RAW[name](lambda x: x * s.value)(jnp.array(3.0))


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize(
    "ours", [lambda f: grad(f), lambda f: jit(f), lambda f: jit(jacfwd(f))], ids=["grad", "jit", "jit_jacfwd"]
)
def test_a_read_of_our_transform_under_a_raw_one(name, ours):
    s = State(jnp.array(2.0), name="s")
    f = RAW[name](ours(lambda x: x * s.value))
    if name in STAGING:
        with pytest.warns(FrozenReadWarning, match="State 's' was read under a raw staging transform"):
            f(jnp.array(3.0))
    else:
        f(jnp.array(3.0))


def line_of(function, text):
    """Return the file and the line of ``function`` that holds ``text``."""
    lines, first = inspect.getsourcelines(function)
    return inspect.getsourcefile(function), first + next(i for i, line in enumerate(lines) if text in line)


def frozen_places(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        run()
    assert {w.category for w in caught} <= {FrozenReadWarning}
    return [(w.filename, w.lineno) for w in caught]


def test_the_warning_is_given_once_at_the_line_of_the_user():
    s = State(jnp.array(2.0), name="s")

    def user(x):
        y = x + 1.0
        y = y * s.value  # here
        return y

    f = jax.jit(user)

    def run():
        for n in (1, 2, 3):
            f(jnp.ones(n))
            f(jnp.ones(n))

    assert frozen_places(run) == [line_of(user, "# here")]


def test_the_warning_skips_the_frames_of_jax_and_of_this_package():
    layer, s = nn.Linear(2, 3), State([1.0, {"a": 2.0}], name="s")

    def through_a_layer(x):
        return layer(x)  # layer

    def through_a_method(x):
        return x * s.numel()  # method

    def through_a_transform(x):
        return grad(lambda y: (y * s.value[0]).sum())(x)  # transform

    def through_jax(x):
        return jax.tree.map(lambda leaf: leaf * s.value[0], x)  # tree

    for user, text in ((through_a_layer, "# layer"), (through_a_method, "# method"), (through_a_transform, "# trans")):
        places = frozen_places(lambda user=user: jax.jit(user)(jnp.ones(2)))
        assert set(places) == {line_of(user, text)}
    assert frozen_places(lambda: jax.jit(through_jax)([1.0])) == [line_of(through_jax, "# tree")]


def test_a_raw_jit_within_our_transform():
    """What it reads there is a tracer of ours: right, without a warning."""
    w = ParamState(jnp.array(2.0), name="w")

    def f(x):
        return jax.jit(lambda y: y * w.value**2)(x)

    assert grad(f, w, 0)(3.0) == (12.0, 4.0)
    assert (jit(f)(3.0), jit(grad(f, w))(3.0), jit(jacfwd(f, w))(3.0)) == (12.0, 12.0, 12.0)
    w.value = jnp.array(3.0)
    assert (jit(f)(3.0), jit(grad(f, w))(3.0), grad(f, w)(3.0)) == (27.0, 18.0, 18.0)

    @jit
    def scanned(xs):
        return jax.lax.scan(lambda c, x: (c + x * w.value, None), 0.0, xs)[0]

    assert scanned(jnp.ones(3)) == 9.0
    w.value = jnp.array(5.0)
    assert scanned(jnp.ones(3)) == 15.0


@pytest.mark.parametrize("raw", ["jit", "scan"])
@pytest.mark.parametrize("first", [False, True], ids=["read_there_first", "read_before"])
def test_a_raw_jit_within_an_eager_transform_of_ours_freezes(raw, first):
    """A value that is no tracer is compiled in by the raw transform, and found again in its cache: a warning."""
    s = State(jnp.array(2.0), name="s")

    def body(y):
        return y * s.value

    compiled = jax.jit(body)

    def f(x):
        x = x + s.value if first else x
        if raw == "jit":
            return compiled(x)
        return jax.lax.scan(lambda c, y: (c, body(y)), 0.0, jnp.stack([x]))[1].sum()

    with pytest.warns(FrozenReadWarning, match="State 's' was read under a raw staging transform"):
        grad(f)(3.0)


# ------------------------------------------------------------------------------------------ random numbers


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian])
def test_one_derivative_is_one_draw(transform):
    rng = R.RandomState(0)
    twin = copy.deepcopy(rng)

    def f(x):
        noise = rng.normal(size=3)
        return (noise * x**2).sum() if transform is hessian else noise * x

    derivative = transform(f)
    for _ in range(2):
        noise = twin.normal(size=3)
        expected = 2.0 * noise.sum() if transform is hessian else noise
        assert jnp.allclose(derivative(1.0), expected)
    assert (rng.get_key_data() == twin.get_key_data()).all()


@every_transform
def test_a_generator_advances_as_outside(transform):
    rng = R.RandomState(0)
    twin = copy.deepcopy(rng)
    wrapped = transform(lambda x: x * rng.normal())
    for _ in range(2):
        wrapped(1.0)
        twin.normal()
        assert (rng.get_key_data() == twin.get_key_data()).all()
    assert concrete(rng.value)
