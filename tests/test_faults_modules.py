"""Faults of States, Modules, layers and graphs that were found by trying, each with its neighbours."""

import copy
import functools
import gc
import math
import pickle
import re
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from _unchanged import unchanged
from brainstate import ParamState, State, StateTypeError, StateValueError, TraceContextError, graph, nn, random
from brainstate._seam.scope import generation
from brainstate.transform import for_loop, grad, jit, prepare, vmap, vmap_new_states


class Net(nn.Module):
    """Two layers in a list, States in a list, a dict and an attribute."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(2, 2, w_init=jnp.ones), nn.Linear(2, 2, w_init=jnp.ones)]
        self.ws = [ParamState(jnp.ones(2)), ParamState(jnp.zeros(2))]
        self.table = {"a": ParamState(jnp.ones(2)), "n": State(jnp.array(0))}
        self.pair = (ParamState(jnp.ones(2)), 1.0)
        self.n = State(jnp.array(0))


# ------------------------------------------ A7: `.value` was forgotten


def set_(thing, key, value):
    """Assign, as an expression."""
    if isinstance(key, str) and isinstance(thing, nn.Module):
        setattr(thing, key, value)
    else:
        thing[key] = value


OVER = {
    "count": lambda m: set_(m, "n", m.n.value + 1),
    "array": lambda m: set_(m.layers[0], "weight", jnp.ones((2, 2))),
    "numpy": lambda m: set_(m.layers[0], "weight", np.ones((2, 2))),
    "number": lambda m: set_(m, "n", 3),
    "text": lambda m: set_(m, "n", "three"),
    "element": lambda m: set_(m.ws, 0, jnp.ones(2)),
    "slice": lambda m: set_(m.ws, slice(None), [jnp.ones(2), jnp.ones(2)]),
    "list over list": lambda m: set_(m, "ws", [w.value for w in m.ws]),
    "array over list": lambda m: set_(m, "ws", jnp.stack([w.value for w in m.ws])),
    "tuple over tuple": lambda m: set_(m, "pair", (jnp.ones(2), 1.0)),
    "entry": lambda m: set_(m.table, "a", jnp.ones(2)),
    "update": lambda m: m.table.update(a=jnp.ones(2)),
    "union": lambda m: m.table.__ior__({"n": 1}),
}


@pytest.mark.parametrize("over", OVER.values(), ids=OVER)
@pytest.mark.parametrize("around", [lambda f: f(), lambda f: jit(f)(), lambda f: grad(f)(1.0)], ids=["", "jit", "grad"])
def test_a7_nothing_takes_the_place_of_a_state(over, around):
    model = Net()
    before = model.states()
    with unchanged(*before.values()), pytest.raises(StateTypeError, match=r"would drop: write `.*value = .*`del "):
        around(lambda *_: over(model))
    assert model.states() == before and all(
        a is b for a, b in zip(model.states().values(), before.values(), strict=True)
    )


def test_a7_what_may_replace_a_state():
    model = Net()
    model.n = State(jnp.array(5))
    model.n = None  # taken away
    model.n = State(1)
    model.n = [State(2)]
    model.n = nn.Linear(2, 2)
    model.ws[0] = ParamState(jnp.ones(3))
    model.ws.insert(0, "text")  # nothing is lost
    del model.ws[1]
    model.ws[1] = None
    model.ws = []
    model.ws.append(3.0)
    model.layers[0] = jnp.cos
    del model.table
    model.table = jnp.ones(2)
    assert list(model.states()) == [
        *[("layers", 1, "bias"), ("layers", 1, "weight"), ("n", "bias"), ("n", "weight"), ("pair", 0)]
    ]


s = State(jnp.ones(2), name="s")
USES = {
    "if": lambda: 1 if s else 2,
    "not": lambda: not s,
    "while": lambda: any([s]),
    "== 3": lambda: s == 3,
    "!=": lambda: s != 3,
    "3 ==": lambda: s == 3.0,
    "== array": lambda: s == jnp.ones(2),
    "array ==": lambda: jnp.ones(2) == s,
    "numpy ==": lambda: np.ones(2) == s,
    "== text": lambda: s == "on",
    "<": lambda: s < 3,
    "+": lambda: s + 1,
    "1 -": lambda: 1 - s,
    "+=": lambda: exec("s += 1", {"s": s}),
    "**": lambda: s**2,
    "//": lambda: 3 // s,
    "divmod": lambda: divmod(s, 2),
    "-": lambda: -s,
    "~": lambda: ~s,
    "abs": lambda: abs(s),
    "round": lambda: round(s),
    "&": lambda: s & True,
    "<<": lambda: 1 << s,
    "@": lambda: s @ s,
    "array @": lambda: jnp.ones(2) @ s,
    "numpy @": lambda: np.ones(2) @ s,
    "array +": lambda: jnp.ones(2) + s,
    "numpy +": lambda: np.ones(2) + s,
    "number *": lambda: 2.0 * s,
    "float": lambda: float(s),
    "int": lambda: int(s),
    "math": lambda: math.exp(s),
    "range": lambda: range(s),
    "len": lambda: len(s),
    "iter": lambda: [x for x in s],
    "star": lambda: [*s],
    "in": lambda: 1.0 in s,
    "[0]": lambda: s[0],
    "[0] =": lambda: set_(s, 0, 1.0),
    ".shape": lambda: s.shape,
    ".dtype": lambda: s.dtype,
    ".T": lambda: s.T,
    ".at": lambda: s.at[0].set(1.0),
    ".sum()": lambda: s.sum(),
    ".astype": lambda: s.astype(int),
    "format": lambda: f"{s:.3f}",
    "np.asarray": lambda: np.asarray(s),
    "np.array of a list": lambda: np.array([s, s]),
    "np.exp": lambda: np.exp(s),
    "np.sum": lambda: np.sum(s),
    "np.mean": lambda: np.mean(s),
    "jnp.asarray": lambda: jnp.asarray(s),
    "jnp.array of a list": lambda: jnp.array([s, s]),
    "jnp.sum": lambda: jnp.sum(s),
    "jnp.dot": lambda: jnp.dot(jnp.ones(2), s),
    "jnp.where": lambda: jnp.where(s, 1, 2),
    "jnp.shape": lambda: jnp.shape(s),
    "jax.nn": lambda: jax.nn.softmax(s),
    "stack": lambda: jnp.stack([s, s]),
    "index": lambda: jnp.ones(3)[s],
    ".set": lambda: jnp.ones(2).at[0].set(s),
    "raw jit": lambda: jax.jit(lambda x: x)(s),
    "raw grad": lambda: jax.grad(lambda x: x)(s),
    "raw vmap": lambda: jax.vmap(lambda x: x)(s),
    "raw cond": lambda: jax.lax.cond(s, lambda: 1, lambda: 2),
    "raw scan": lambda: jax.lax.scan(lambda c, x: (c, x), s, None, length=2),
    "layer": lambda: nn.Linear(2, 2)(s),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("inside", [False, True], ids=["", "jit"])
def test_a7_a_state_in_the_place_of_its_value(use, inside):
    with pytest.raises(
        (StateTypeError, StateValueError), match=r"^State 's' is not the value that it holds: write `\.value\S*` after"
    ):
        jit(use)() if inside else use()


@pytest.mark.parametrize("use", [jax.lax.sin, jax.nn.relu])
def test_a7_a_primitive_of_jax_names_the_class(use):
    """JAX asks such an operand nothing that could answer, and says itself what it was given."""
    with pytest.raises(TypeError, match=r"The problematic value is of type <class 'brainstate.*State'>"):
        use(s)


def test_a7_what_a_state_can_do():
    other, model = s.copy(), Net()
    assert s == s and s != other and s in [other, s] and s not in [other]
    assert [other, s].index(s) == 1 and {s: 1}[s] == 1 and len({s, other, s}) == 2
    assert s is not None and s != None  # noqa: E711
    assert f"{s}" == repr(s) == format(s) and "float32[2]" in str(s)
    assert jax.tree.leaves([s, {"a": s}]) == [s, s]
    assert [model, s, other].index(other) == 2 and (model in [s, model])
    assert not hasattr(s, "shape") and not hasattr(s, "sum") and not hasattr(s, "nonsense")
    assert State(1.0, shape=(3,), size="big").shape == (3,)  # metadata may be called so
    with pytest.raises(AttributeError, match="nonsense"):
        s.nonsense  # noqa: B018
    assert vmap(lambda x: x * s.value.sum())(jnp.ones(2)).tolist() == [2.0, 2.0]


# ------------------------------------------ A3: a State that shows another value


class Positive(ParamState):
    """A positive number, stored as its logarithm."""

    def __init__(self, value, **metadata):
        super().__init__(jnp.log(value), **metadata)

    @property
    def value(self):
        """What is shown."""
        return jnp.exp(super().value)

    @value.setter
    def value(self, new):
        ParamState.value.fset(self, jnp.log(new))


def stored(state):
    """Return what the seam keeps."""
    return ParamState.value.fget(state)


def through_load(load):
    """Return ``load(target module, source State)`` as a function of the source."""

    def way(p):
        node = {"p": Positive(7.0), "q": State(1.0)}
        load(node, p)
        return node["p"]

    return way


COPIES = {
    "copy": lambda p: p.copy(),
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda p: pickle.loads(pickle.dumps(p)),
    "replace": lambda p: p.replace(stored(p)),
    "clone": lambda p: graph.clone({"p": p})["p"],
    "clone of a Module": lambda p: graph.clone([{"p": p}])[0]["p"],
    "split and merge": lambda p: graph.treefy_merge(*graph.treefy_split({"p": p}))["p"],
    "snapshot": lambda p: graph.treefy_states({"p": p}).p.to_state(),
    "through numpy": lambda p: jax.tree.map(np.asarray, graph.treefy_states({"p": p})).p.to_state(),
    "pickled snapshot": lambda p: pickle.loads(pickle.dumps(graph.treefy_states({"p": p}))).p.to_state(),
    "pop_states": lambda p: graph.pop_states({"p": p}, ...).p.to_state(),
    "update_states, snapshots": through_load(lambda n, p: graph.update_states(n, graph.treefy_states({"p": p}))),
    "update_states, States": through_load(lambda n, p: graph.update_states(n, {"p": p})),
    "update_states, values": through_load(lambda n, p: graph.update_states(n, graph.states({"p": p}).to_dict_values())),
    "assign_dict_values": through_load(
        lambda n, p: graph.states({"p": n["p"]}).assign_dict_values(graph.states({"p": p}).to_dict_values())
    ),
    "replace_by_pure_dict": through_load(
        lambda n, p: graph.states(n).to_nest().replace_by_pure_dict(graph.treefy_states({"p": p}).to_pure_dict())
    ),
    "copy_from": through_load(lambda n, p: n["p"].copy_from(p)),
    "restore_value": through_load(lambda n, p: n["p"].restore_value(stored(p))),
}


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)
def test_a3_a_state_that_shows_another_value_is_copied_as_it_is_stored(way):
    p = Positive(3.0, name="p")
    again = way(p)
    assert type(again) is Positive and again is not p
    assert float(stored(again)) == float(stored(p)) == pytest.approx(math.log(3.0))
    assert float(again.value) == pytest.approx(3.0)


@pytest.mark.parametrize("way", [COPIES[k] for k in COPIES if "pickle" not in k and "numpy" not in k])
def test_a3_inside_transforms(way):
    p = Positive(3.0)

    def square():
        return way(p).value ** 2  # 9 = exp(2 log 3), so its derivative by the logarithm is 18

    assert float(jit(square)()) == pytest.approx(9.0)
    assert float(grad(lambda: way(p).value ** 2 + 0 * p.value, p)()) == pytest.approx(18.0)
    assert float(jit(grad(lambda: way(p).value ** 2 + 0 * p.value, p))()) == pytest.approx(18.0)
    assert for_loop(lambda x: x * way(p).value, jnp.ones(2)).tolist() == pytest.approx([3.0, 3.0])
    assert float(p.value) == pytest.approx(3.0)


# ------------------------------------------ A8: loading looks at what it is given


def loads():
    """Return ways to load ``{name: value}`` into the States of a layer, in part or as a whole."""
    return {
        "update_states": lambda layer, new: graph.update_states(layer, new),
        "update_states, second tree": lambda layer, new: graph.update_states(
            layer, {"bias": jnp.ones(3, jnp.float32)}, new
        ),
        "update_states, snapshots": lambda layer, new: graph.update_states(
            layer, graph.NestedDict({k: graph.TreefyState(ParamState, v) for k, v in new.items()})
        ),
        "update_states, States": lambda layer, new: graph.update_states(layer, {k: State(v) for k, v in new.items()}),
        "replace_by_pure_dict": lambda layer, new: layer.states().to_nest().replace_by_pure_dict(new),
        "snapshots": lambda layer, new: graph.treefy_states(layer).replace_by_pure_dict(new),
        "assign_dict_values": lambda layer, new: layer.states().assign_dict_values({(k,): v for k, v in new.items()}),
    }


WHOLE = {"bias": jnp.zeros(3), "weight": jnp.zeros((2, 3))}


@pytest.mark.parametrize("way", loads().values(), ids=loads())
@pytest.mark.parametrize("around", ["", "jit", "grad", "vmap"])
def test_a8_all_that_does_not_fit_is_named_and_nothing_is_loaded(way, around):
    layer = nn.Linear(2, 3)
    arounds = {"jit": lambda f: jit(f)(1.0), "grad": lambda f: grad(f)(1.0), "vmap": lambda f: vmap(f)(jnp.ones(2))}
    run = arounds.get(around, lambda f: f(1.0))
    wrong = {
        "weight": lambda x: x * jnp.zeros((3, 2)),
        "bias": lambda x: jnp.zeros(3, jnp.int32),
        "scale": lambda x: x,
        "deep": lambda x: {"er": x},
    }

    def load(x):
        way(layer, {key: make(x) for key, make in wrong.items()})
        return x

    pattern = r"has unknown ('scale', 'deep|'deep.*'scale|'scale).*does not fit at.*float32\[3,2\] for float32\[2,3\].*"
    with unchanged(*layer.states().values()), pytest.raises(StateValueError, match=pattern + "Nothing was changed"):
        run(load)


@pytest.mark.parametrize("way", loads().values(), ids=loads())
def test_a8_what_fits_is_loaded(way):
    layer = nn.Linear(2, 3)
    way(layer, WHOLE | {"weight": np.full((2, 3), 0.5, np.float32)})
    way(layer, WHOLE | {"weight": np.full((2, 3), 0.5)})  # float64 of NumPy is float32 for JAX
    with jax.enable_x64(True), pytest.raises(StateValueError, match=r"'weight' \(float64\[2,3\] for float32\[2,3\]\)"):
        way(layer, WHOLE | {"weight": np.full((2, 3), 0.5)})


def test_a8_missing_unexpected_and_unfit_together():
    layer = nn.Linear(2, 3)
    with (
        unchanged(*layer.states().values()),
        pytest.raises(
            StateValueError,
            match=r"^data lacks 'bias', has unknown 'b' and does not fit at 'weight' "
            r"\(float32\[3\] for float32\[2,3\]\): .*the paths are: 'bias', 'weight'; structure, shape and dtype must",
        ),
    ):
        layer.states().assign_dict_values({("b",): jnp.zeros(3), ("weight",): jnp.zeros(3)})
    graph.update_states(layer, {"bias": jnp.full(3, 2.0)})  # a part of it
    assert layer.bias.value.tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(StateTypeError, match="tree 0 is a mapping"):
        graph.update_states(layer, [jnp.zeros(3)])


FITS = [
    *[(jnp.zeros(2), new, True) for new in (np.zeros(2, np.float32), np.zeros(2), jnp.ones(2))],
    *[
        (jnp.zeros(2), new, False)
        for new in (jnp.zeros(3), jnp.zeros((1, 2)), jnp.zeros(2, int), 1.0, None, "two", [0.0])
    ],
    *[(jnp.float32(0), new, True) for new in (1.0, 2, True, np.float32(1), np.float64(1), jnp.float32(1))],
    *[(jnp.float32(0), new, False) for new in (1j, jnp.int32(1), jnp.zeros(1), jnp.float16(1))],
    *[(jnp.int32(0), new, True) for new in (1, True, np.int32(1), np.int64(1))],
    *[(jnp.int32(0), new, False) for new in (1.0, jnp.float32(1), jnp.uint8(1), jnp.bool_(True))],
    *[(jnp.bfloat16(0), new, True) for new in (1.0, jnp.bfloat16(1))],
    *[(1.0, new, True) for new in (2.0, 2, jnp.float32(3), np.float64(3))],
    *[(1, new, True) for new in (2, True, jnp.int32(3))],
    *[(1.0, new, False) for new in (1j, jnp.int32(3), jnp.zeros(1), "one")],
    *[(1, new, False) for new in (2.5, jnp.float32(3))],
    *[(True, new, False) for new in (2, 1.0)],
    *[("idle", new, True) for new in ("busy",)],
    *[("idle", new, False) for new in (1.0, jnp.ones(2))],
    ({"a": 1.0, "b": [jnp.ones(2)]}, {"a": 2.0, "b": [jnp.zeros(2)]}, True),
    *[({"a": 1.0, "b": jnp.ones(2)}, new, False) for new in ({"a": 1.0}, {"a": 1.0, "b": jnp.ones(3)}, jnp.ones(2))],
    (jax.random.key(0), jax.random.key(1), True),
    (jax.random.key(0), jax.random.key_data(jax.random.key(1)), False),
]


@pytest.mark.parametrize(("old", "new", "fits"), FITS)
def test_a8_what_may_take_the_place_of_a_value(old, new, fits):
    s = State(old, name="s")
    if fits:
        before = jax.tree.map(jax.typeof, old) if not isinstance(old, str) else None
        s.restore_value(new)
        if before is not None and not isinstance(old, bool | int | float):
            assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(
                lambda x: (jax.typeof(x).shape, jax.typeof(x).dtype), s.value
            )
        return
    with unchanged(s), pytest.raises(StateValueError, match=r"State 's': the value to restore is .* must agree"):
        s.restore_value(new)


# ------------------------------------------ A9: layers look at their input


class Deep(nn.Module):
    """Layers at some depth, with a method of another name."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(4, 3), jnp.tanh, nn.Sequential(nn.Linear(2, 5)))

    def update(self, x):
        """Call them."""
        return self.head(x)

    def forward(self, x):
        """Call them, without `update`."""
        return self.head(x)


def test_a9_an_input_that_does_not_fit_names_the_layer():
    model, x = Deep(), jnp.ones((7, 4))
    for call in (model, jit(model), lambda x: grad(lambda: model(x).sum(), model.states())()):
        with pytest.raises(
            StateValueError,
            match=r"^Linear at head.layers.2.layers.0 of Deep: the last axis of the input must be in_size=\(2,\), "
            r"after any batch axes; the input has shape \(7, 3\)",
        ):
            call(x)
    with pytest.raises(StateValueError, match=r"^Linear at layers.2.layers.0 of Sequential: the last axis"):
        jit(model.forward)(x)
    with pytest.raises(StateValueError, match=r"^Linear: the last axis .* shape \(\)"):
        nn.Linear(2, 3)(1.0)
    with pytest.raises(StateValueError, match=r"^Linear: the last 2 axes .* in_size=\(5, 2\).* shape \(4, 2\)"):
        nn.Linear((5, 2), (5, 3))(jnp.ones((4, 2)))
    assert nn.Linear((5, 2), (5, 3))(jnp.ones((4, 5, 2))).shape == (4, 5, 3)


def test_a9_a_stacked_model_called_as_if_it_were_one():
    model = vmap_new_states(Deep, axis_size=3)()
    layer = model.head[0]
    with pytest.raises(
        StateValueError, match=r"Linear.*its weight has shape \(3, 4, 3\).*vmap_new_states.*\.vmap with"
    ):
        layer(jnp.ones((5, 3, 4)))
    assert vmap(layer, in_states=layer)(jnp.ones((3, 5, 4))).shape == (3, 5, 3)
    assert vmap(lambda: layer(jnp.ones((5, 4))), in_states=layer)().shape == (3, 5, 3)
    assert vmap(nn.Linear(4, 3))(jnp.ones((3, 5, 4))).shape == (3, 5, 3)


FOREIGN = {
    "size 0": (lambda: nn.Linear(0, 2), StateValueError, r"a size has ints from 1 up, not 0"),
    "size -1": (lambda: nn.Linear(2, -1), StateValueError, r"a size has ints from 1 up, not -1"),
    "size 2.5": (lambda: nn.Linear(2.5, 1), StateTypeError, r"a size is an int or a tuple of ints, not 2.5"),
    "size None": (lambda: nn.Linear(None, 1), StateTypeError, r"a size is an int or a tuple of ints, not None"),
    "size text": (lambda: nn.Linear("ab", 1), StateTypeError, r"a size is an int or a tuple of ints, not 'ab'"),
    "no axis": (lambda: nn.Linear((), ()), StateValueError, r"a size has at least one int, not \(\)"),
    "rate": (lambda: nn.Dropout("a"), StateTypeError, r"rate is a number, .* not 'a'"),
    "rate None": (lambda: nn.Dropout(None), StateTypeError, r"rate is a number, .* not None"),
    "rate nan": (lambda: nn.Dropout(float("nan")), StateValueError, r"rate is the probability .* not nan"),
    "layer": (lambda: nn.Sequential(nn.Linear(1, 1), None), StateTypeError, r"layer 1 of Sequential is a NoneType"),
    "init": (lambda: nn.Linear(1, 1, w_init=3), StateTypeError, r"w_init is a function .* not 3"),
    "init shape": (lambda: nn.Linear(1, 2, b_init=lambda _: jnp.ones(3)), StateValueError, r"b_init.*\(3,\).*\(2,\)"),
    "name": (lambda: State(1.0, name=3), StateTypeError, r"the name of a State is a string, not a int: 3"),
    "tag": (lambda: State(1.0, tag=3), StateTypeError, r"the tags of a State are strings; .* not \[3\]"),
    "tags": (lambda: State(1.0, tag=["a", 3]), StateTypeError, r"the tags of a State are strings"),
    "add_tag": (lambda: State(1.0).add_tag(3), StateTypeError, r"the tags of a State are strings"),
    "snapshot tag": (lambda: graph.TreefyState(State, 1.0, tag=3), StateTypeError, r"tags .* are strings"),
    "states": (lambda: graph.states(None), StateTypeError, r"States are looked for in a Module.*, not in None"),
    "nodes": (lambda: graph.nodes(3), StateTypeError, r"States are looked for in a Module.*, not in 3"),
    "treefy_states": (lambda: graph.treefy_states("x"), StateTypeError, r"States are looked for in .* not in 'x'"),
    "function": (lambda: graph.states(jnp.sin), StateTypeError, r"States are looked for in a Module"),
    "class": (lambda: graph.states(nn.Linear), StateTypeError, r"States are looked for in a Module"),
    "clone": (lambda: graph.clone(3), StateTypeError, r"States are looked for in a Module.*, not in 3"),
    "split": (lambda: graph.treefy_split(jnp.ones(2)), StateTypeError, r"States are looked for in a Module"),
    "update_states": (lambda: graph.update_states(None, {}), StateTypeError, r"States are looked for in a Module"),
    "pop_states": (lambda: graph.pop_states(3, ...), StateTypeError, r"States are looked for in a Module"),
    "merge": (lambda: graph.treefy_merge(3, {}), StateTypeError, r"a GraphDef.*not a int"),
    "merge trees": (
        lambda: graph.treefy_merge(graph.graphdef({}), None),
        StateTypeError,
        r"the trees to merge are mappings.*not a NoneType",
    ),
}


@pytest.mark.parametrize(("misuse", "error", "pattern"), FOREIGN.values(), ids=FOREIGN)
def test_d_misuse_is_named(misuse, error, pattern):
    with pytest.raises(error, match=pattern):
        misuse()


def test_d_what_may_be_looked_through():
    state = State(1.0)
    assert list(graph.states(state).values()) == [state]
    for empty in ({}, [], (), nn.Module()):
        assert not graph.states(empty) and graph.clone(empty) is not None


# ------------------------------------------ A10: arguments of a Sequential


class Seen(nn.Module):
    """Return the input, and remember what was given."""

    def update(self, x, train=True, *, scale=1.0):
        """Return the input, scaled."""
        self.seen = train, scale
        return x * scale


def seen(**options):
    """Return layers with an argument in several of them, and what the last call gave them."""
    layers = Seen(), jnp.cos, nn.Sequential(Seen(), nn.Dropout(0.5)), Seen(), lambda x: x
    net = nn.Sequential(*layers)
    return net, lambda: [layers[0].seen, layers[2][0].seen, layers[3].seen]


def test_a10_dropout_in_a_sequential_is_evaluated():
    net = nn.Sequential(nn.Linear(3, 30), jax.nn.relu, nn.Sequential(nn.Dropout(0.5), jnp.tanh), nn.Dropout(0.5))
    x = jnp.ones((4, 3))
    expected = jnp.tanh(jax.nn.relu(net[0](x)))
    assert jnp.array_equal(net(x, train=False), expected) and jnp.array_equal(net(x=x, train=False), expected)
    assert jnp.array_equal(net(x, False), expected)
    assert jnp.allclose(jit(net, static_argnames="train")(x, train=False), expected)
    assert not jnp.array_equal(net(x), net(x, train=True))


def test_a10_arguments_reach_the_layers_that_have_them():
    net, what = seen()
    assert float(net(2.0, train=False)) == pytest.approx(math.cos(2.0))
    assert what() == [(False, 1.0)] * 3
    assert float(net(2.0, False, scale=3.0)) == pytest.approx(9 * math.cos(6.0))
    assert what() == [(False, 3.0)] * 3
    assert float(net(x=2.0, train=False)) == pytest.approx(math.cos(2.0))
    assert nn.Sequential(lambda *xs: sum(xs), jnp.square)(1.0, 2.0) == 9.0
    assert nn.Sequential(lambda x, y: x + y, lambda x, **k: (x, k))(1.0, 2.0, z=3.0) == (3.0, {"y": 2.0, "z": 3.0})
    assert nn.Sequential()(5.0) == 5.0
    assert nn.Sequential(jnp.cos, nn.Dropout(0.5))(0.0, False) == 1.0


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        (lambda net: net(2.0, trian=False), r"no layer of Sequential takes the argument 'trian'; .* 'scale', 'train'"),
        (lambda net: net(2.0, x=2.0), r"no layer of Sequential takes the argument 'x'"),
        (lambda net: net(2.0, False, 3.0), r"Sequential got 3 positional arguments"),
        (lambda net: net(2.0, False, train=True), r"Sequential got 2 positional arguments.*by name as well"),
        (lambda net: nn.Sequential(jnp.cos, jnp.sin)(1.0, 2.0), r"Sequential got 2 positional arguments"),
        (lambda net: nn.Sequential(jnp.cos)(), r"Sequential needs an argument"),
        (lambda net: nn.Sequential()(1.0, train=False), r"no layer of Sequential takes the argument 'train'"),
    ],
)
def test_a10_an_argument_that_no_layer_takes(call, pattern):
    with pytest.raises(StateTypeError, match=pattern):
        call(seen()[0])


# ------------------------------------------ C: initialisers of JAX

INIT = jax.nn.initializers


@pytest.mark.parametrize(
    "init",
    [
        INIT.glorot_uniform(),
        INIT.zeros,
        INIT.orthogonal(),
        lambda key, shape, dtype: jax.random.normal(key, shape, dtype),
    ],
)
def test_c_initialisers_of_jax(init):
    random.seed(3)
    key = random.RandomState(3).split_key()
    layer = nn.Linear(4, 3, w_init=init, b_init=INIT.ones)
    assert (
        jnp.array_equal(layer.weight.value, init(key, (4, 3), jnp.float32)) and layer.bias.value.tolist() == [1.0] * 3
    )
    other = nn.Linear(4, 3, w_init=init)
    assert jnp.array_equal(other.weight.value, layer.weight.value) == (init is INIT.zeros)


@pytest.mark.parametrize(
    "init", [jnp.ones, lambda shape: jnp.full(shape, 1.0), lambda shape, scale=1.0: jnp.ones(shape)]
)
def test_c_initialisers_that_take_the_shape(init):
    before = random.DEFAULT.value
    assert nn.Linear(4, 3, w_init=init).weight.value.tolist() == [[1.0] * 3] * 4
    assert random.DEFAULT.value is before


# ------------------------------------------ C: a Module out of a map


def test_c_a_module_is_returned_from_a_map():
    model = vmap_new_states(Deep, axis_size=5)()
    assert isinstance(model, Deep) and {s.value.shape[0] for s in model.states().values()} == {5}
    weights = model.head[0].weight.value
    assert not jnp.array_equal(weights[0], weights[1])  # each lane draws its own
    x = jnp.ones(4)
    layer = vmap_new_states(lambda: nn.Linear(4, 3), axis=1, axis_size=5)()
    assert layer.weight.value.shape == (4, 5, 3) and layer.bias.value.shape == (3, 5)
    assert vmap(layer, in_axes=None, in_states={1: layer})(x).shape == (5, 3)
    one, two, y = vmap(lambda x: ({"m": nn.Linear(4, 3)}["m"], [nn.Linear(4, 2)], x), axis_size=2)(jnp.ones(2))
    assert one.weight.value.shape == (2, 4, 3) and two[0].weight.value.shape == (2, 4, 2) and y.shape == (2,)
    assert vmap(lambda x: model, axis_size=2)(jnp.ones(2)) is model


def test_c_a_module_with_lanes_outside_its_states_is_refused():
    def build(x):
        layer = nn.Linear(4, 3)
        layer.scale = x
        return layer

    with pytest.raises(StateValueError, match=r"attribute 'scale' of Linear.*Make it a State"):
        vmap(build)(jnp.ones(2))


# ------------------------------------------ A11: a changed plain attribute


class Switch(nn.Module):
    """A layer with a flag, a function in an attribute, a list of layers, and numbers that are read."""

    def __init__(self):
        super().__init__()
        self.training, self.rate, self.act = True, 0.1, jnp.sin
        self.layers = [nn.Linear(2, 2, w_init=jnp.ones), jnp.sin]
        self.table = {"f": jnp.sin}
        self.unused = 0
        self.inner = nn.Dropout(0.5)

    def update(self, x):
        """Read all but `unused` and `inner`."""
        y = sum(f(x).sum() for f in (*self.layers, self.act, self.table["f"]))
        return (y * self.rate if self.training else y) + getattr(self, "shift", 0.0) + (self.in_size or (0,))[0]


CHANGES = {
    "flag": (lambda m: setattr(m, "training", False), r"attribute `training` of Switch changed: True → False"),
    "number": (lambda m: setattr(m, "rate", 0.2), r"attribute `rate` of Switch changed: 0.1 → 0.2"),
    "function": (lambda m: setattr(m, "act", jnp.cos), r"attribute `act` of Switch changed: sin → cos"),
    "element": (lambda m: set_(m.layers, 1, jnp.cos), r"list was changed by `__setitem__`"),
    "append": (lambda m: m.layers.append(jnp.cos), r"list was changed by `append`"),
    "Module appended": (lambda m: m.layers.append(nn.Linear(2, 2)), r"list of States or Modules .* `append`"),
    "entry": (lambda m: m.table.update(f=jnp.cos), r"dict was changed by `update`"),
    "new list": (
        lambda m: setattr(m, "layers", [nn.Linear(2, 2, w_init=jnp.ones), jnp.cos]),
        r"Switch.layers was replaced",
    ),
    "added": (lambda m: setattr(m, "shift", 1.0), r"attribute `shift` of Switch changed, it is 1.0 now"),
    "deleted": (lambda m: (setattr(m, "shift", 1.0), delattr(m, "shift"), setattr(m, "shift", 2.0)), r"`shift`"),
    "size": (lambda m: setattr(m, "in_size", 3), r"attribute `_in_size` of Switch"),
    "State replaced": (
        lambda m: setattr(m.layers[0], "weight", ParamState(2 * jnp.ones((2, 2)))),
        r"Linear.weight was",
    ),
}
NO_CHANGES = {
    "same": lambda m: setattr(m, "training", True),
    "equal": lambda m: setattr(m, "rate", 10**-1),
    "another attribute": lambda m: setattr(m, "unused", 5),
    "back again": lambda m: (setattr(m, "training", False), setattr(m, "training", True)),
    "a layer that is not run": lambda m: setattr(m.inner, "rate", 0.25),
    "a value": lambda m: setattr(m.layers[0].weight, "value", jnp.zeros((2, 2))),
    "another Module": lambda m: setattr(nn.Linear(2, 2), "weight", ParamState(jnp.ones(2))),
    "equal list": lambda m: setattr(m, "table", {"f": jnp.sin}),
}
WAYS = {
    "Module": lambda m: jit(m),
    "method": lambda m: jit(m.update),
    "closure": lambda m: jit(lambda x: m(x)),
    "direct call": lambda m: jit(lambda x: m.update(x)),
    "grad": lambda m: jit(lambda x: (grad(lambda: m(x), m)(), m(x))[1]),
    "loop": lambda m: jit(lambda x: for_loop(lambda _: m(x), jnp.ones(2))[0]),
    "vmap": lambda m: jit(lambda x: vmap(m)(x[None])[0]),
    "clone": lambda m: jit(lambda x: graph.clone(m)(x)),
    "inner jit": lambda m: (lambda inner: (inner(jnp.ones(2)), jit(lambda x: inner(x)))[1])(jit(m)),
}


@pytest.mark.crossing
@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a11_a_change_is_seen_by_those_that_ran_the_module(change, words, way):
    model, other, x = Switch(), Switch(), jnp.ones(2)
    compiled, beside = way(model), jit(other)
    compiled(x), beside(x)
    change(model)
    for _ in range(3):
        assert float(compiled(x)) == pytest.approx(float(model(x)), rel=1e-5)
        beside(x)
    traces = compiled.retraces()
    assert len(beside.retraces()) == 1 and len(traces) == 2
    assert any(re.search(words, cause) for cause in traces[-1].causes)


@pytest.mark.parametrize("change", NO_CHANGES.values(), ids=NO_CHANGES)
@pytest.mark.parametrize("way", [WAYS[k] for k in WAYS if k != "clone"], ids=[k for k in WAYS if k != "clone"])
def test_a11_what_is_no_change_for_a_function_does_not_trace_it(change, way):
    model, x = Switch(), jnp.ones(2)
    compiled = way(model)
    compiled(x)
    change(model)
    for _ in range(2):
        assert float(compiled(x)) == pytest.approx(float(model(x)), rel=1e-5)
    assert len(compiled.retraces()) == 1


def test_a11_what_compiled_code_assigns_itself_is_no_change():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.last, self.log = 0, None, []

        def update(self, x):
            self.calls = self.calls + 1
            self.last = x
            self.log.append("called")
            return x

    model = Counts()
    compiled = jit(model)
    for _ in range(4):
        compiled(1.0)
    assert model.calls == 1 and len(compiled.retraces()) == 1
    model.calls = 10
    compiled(1.0)
    assert model.calls == 11


def test_a11_a_change_before_it_was_run_or_elsewhere_costs_nothing():
    model = Switch()
    before = generation()
    for i in range(5):
        model.rate = i
    assert generation() == before


def test_a11_what_keeps_changing_is_told():
    model, x = Switch(), jnp.ones(2)
    compiled = jit(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for i in range(8):
            model.rate = float(i)
            compiled(x)
    assert len(told) == 1 and told[0].filename == __file__
    assert re.search(r"5 times because Switch.rate changed: make it a State, or an argument", str(told[0].message))


def test_a11_a_prepared_program_that_is_concerned_is_stale():
    model, other, x = Switch(), Switch(), jnp.ones(2)
    prepared, beside = prepare(model, x), prepare(other, x)
    model.unused = 3
    assert float(prepared(x)) == pytest.approx(float(model(x)), rel=1e-5)
    model.training = False
    with pytest.raises(StateValueError, match=r"stale \(attribute `training` of Switch changed: True → False\)"):
        prepared(x)
    beside(x)


def test_a11_the_classes_are_as_before_after_a_trace():
    jit(Switch())(jnp.ones(2))
    with pytest.raises(ZeroDivisionError):
        jit(lambda: 1 / 0)()
    assert nn.Module.__getattribute__ is object.__getattribute__
    assert "__getitem__" not in vars(type(Switch().layers)) and "__iter__" not in vars(type(Switch().layers))


def test_a11_a_compiled_method_keeps_no_instance_alive():
    class Net(Switch):
        @jit
        def step(self, x):
            return self(x)

    model = Net()
    model.step(jnp.ones(2))
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None


# ------------------------------------------ C: States under raw transforms


class Cell(nn.Module):
    """A layer that counts and remembers."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 2)
        self.mean = State(jnp.zeros(2))
        self.count = State(0)

    def update(self, x):
        """Write both, and make a State of its own."""
        y = State(self.lin(x))
        self.mean.value = 0.5 * self.mean.value + y.value
        self.count.value += 1
        y.value = y.value + self.mean.value
        return (y.value**2).sum()


def twin(tree, x):
    """Compute what `Cell` does."""
    y = x @ tree.lin.weight.value + tree.lin.bias.value
    return ((y + 0.5 * tree.mean.value + y) ** 2).sum()


RAWS = {
    "jit": lambda f, tree, x: jax.jit(f)(tree, x),
    "jit again": lambda f, tree, x: (jax.jit(f)(tree, x), jax.jit(f)(tree, x))[1],
    "grad": lambda f, tree, x: jax.grad(lambda x: f(tree, x))(x),
    "jit of grad": lambda f, tree, x: jax.jit(jax.grad(f, argnums=1))(tree, x),
    "hessian": lambda f, tree, x: jax.hessian(f, argnums=1)(tree, x),
    "vmap": lambda f, tree, x: jax.vmap(f, (None, 0))(tree, jnp.stack([x, 2 * x])),
    "vmap of grad": lambda f, tree, x: jax.vmap(jax.grad(f, argnums=1), (None, 0))(tree, jnp.stack([x, 2 * x])),
    "scan": lambda f, tree, x: jax.lax.scan(lambda c, x: (c + f(tree, x), f(tree, x)), 0.0, jnp.stack([x, x])),
    "checkpoint": lambda f, tree, x: jax.grad(jax.checkpoint(f), argnums=1)(tree, x),
    "cond": lambda f, tree, x: jax.lax.cond(True, f, lambda tree, x: 0.0, tree, x),
    "eval_shape": lambda f, tree, x: jax.eval_shape(f, tree, x),
    "linearize": lambda f, tree, x: jax.linearize(f, tree, x)[0],
    "our jit around": lambda f, tree, x: jit(lambda x: jax.jit(jax.grad(f, argnums=1))(tree, x))(x),
    "our grad around": lambda f, tree, x: grad(lambda x: jax.jit(f)(tree, x))(x),
    "our loop around": lambda f, tree, x: for_loop(lambda x: jax.vmap(f, (None, 0))(tree, x[None]), x[None]),
}


@pytest.mark.parametrize("raw", RAWS.values(), ids=RAWS)
def test_c_a_model_is_merged_under_raw_transforms(raw):
    model, x = Cell(), jnp.array([1.0, 2.0])
    structure, tree = graph.treefy_split(model)
    inside = raw(lambda tree, x: graph.treefy_merge(structure, tree)(x), tree, x)
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, rtol=1e-4) if hasattr(a, "at") else a == b,
                                     inside, raw(twin, tree, x)))  # fmt: skip
    assert model.count.value == 0


def test_c_gradients_of_the_merged_tree():
    model, x = Cell(), jnp.array([1.0, 2.0])
    structure, params, others = graph.treefy_split(model, ParamState, ...)

    def loss(params, others, x):
        merged = graph.treefy_merge(structure, params, others)
        out = merged(x)
        return out, graph.treefy_split(merged, ParamState, ...)[2]

    grads, after = jax.jit(jax.grad(loss, has_aux=True))(params, others, x)
    expected = jax.grad(lambda params: twin(graph.NestedDict.merge(params, others), x))(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, rtol=1e-4), grads, expected))
    assert after.count.value == 1 and jnp.allclose(after.mean.value, model.lin(x))


@pytest.mark.parametrize("ours", [grad, jit, vmap], ids=["grad", "jit", "vmap"])
def test_c_our_transforms_on_a_model_that_was_merged_under_raw_ones(ours):
    structure, tree = graph.treefy_split(Cell())
    x = jnp.array([1.0, 2.0])

    def step(tree, x):
        model = graph.treefy_merge(structure, tree)
        if ours is grad:
            out = grad(lambda: model(x), model.lin.states())()
        elif ours is jit:
            out = jit(model)(x)
        else:
            out = vmap(lambda x: model.lin(x))(x[None])
        return out, model.mean.value, model.count.value

    def plain(tree, x):
        y = x @ tree.lin.weight.value + tree.lin.bias.value
        if ours is vmap:
            return y[None], tree.mean.value, 0
        return twin(tree, x), 0.5 * tree.mean.value + y, 1

    out, expected = jax.jit(step)(tree, x), jax.jit(plain)(tree, x)
    assert jnp.allclose(out[1], expected[1], rtol=1e-4) and out[2] == expected[2]
    if ours is not grad:
        assert jnp.allclose(out[0], expected[0], rtol=1e-4)


LEAKS = {
    "jit": lambda f: jax.jit(f)(1.0),
    "grad": lambda f: jax.grad(f)(1.0),
    "vmap": lambda f: jax.vmap(f)(jnp.ones(2)),
    "scan": lambda f: jax.lax.scan(lambda c, x: (f(c), None), 1.0, None, length=2),
    "within ours": lambda f: jit(lambda x: jax.vmap(f)(x))(jnp.ones(2)),
}


@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS)
def test_c_a_state_that_outlives_a_raw_transform_says_so(leak):
    kept = []

    def f(x):
        kept.append(State(x, name="kept"))
        kept[-1].value = kept[-1].value * 2.0
        return x

    leak(f)
    for use in (lambda: kept[-1].value, lambda: jit(lambda: kept[-1].value)(), lambda: kept[-1].copy()):
        with pytest.raises(TraceContextError, match=r"State 'kept' was created under a raw JAX transform"):
            use()
    kept[-1].value = 3.0  # it may be given another value
    assert jit(lambda: kept[-1].value)() == 3.0


def test_c_a_write_from_a_transform_inside_is_refused():
    def f(x):
        s = State(x, name="s")
        return jax.lax.scan(lambda c, y: (c, setattr(s, "value", y)), x, jnp.ones(2))[0]

    with pytest.raises(TraceContextError, match=r"State 's' was written inside a raw JAX transform"):
        jax.jit(f)(1.0)
    outside = State(1.0, name="outside")
    with pytest.raises(TraceContextError, match=r"State 'outside' was written inside a raw JAX transform"):
        jax.jit(lambda x: setattr(outside, "value", x))(1.0)
    assert outside.value == 1.0


# ------------------------------------------ C: pickles of functions of JAX


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("act", [jax.nn.relu, jax.nn.gelu, jnp.cos, jnp.add, jax.lax.exp, math.sin, nn.Linear])
def test_c_a_module_with_a_function_of_jax_is_pickled(act, again):
    net = nn.Sequential(nn.Linear(2, 2), act)
    net.act, net.table = act, {"f": act}
    copied = again(net)
    assert copied.act is act and copied.layers[1] is act and copied.table["f"] is act
    assert copied.layers[0].weight.value.tolist() == net.layers[0].weight.value.tolist()


class Trained(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.w = ParamState(jnp.ones(2))
        self.held = held


NAMELESS = {
    r"\.(init|update) is": lambda: optax.chain(optax.clip(1.0), optax.adam(1e-3)),
    r"\['a'\]\[1\] is": lambda: {"a": [jnp.tanh, lambda x: x]},
    r"\.args\[0\] is": lambda: functools.partial(max, lambda x: x),
}


@pytest.mark.parametrize("place", NAMELESS)
def test_c_a_function_without_a_name_is_named_by_its_place(place):
    model = Trained(NAMELESS[place]())
    for x in (model, Trained([model])):
        with pytest.raises(StateTypeError, match=rf"Trained\.held{place}.*make it again after loading"):
            pickle.dumps(x)
        for again in (copy.copy, copy.deepcopy, graph.clone):
            again(x)
    with pytest.raises((pickle.PicklingError, AttributeError)):  # a pickler in Python may know more, and is not stopped
        pickle._dumps(model)
    model.held = None
    assert pickle.loads(pickle.dumps(model)).w.value.tolist() == [1.0, 1.0]
