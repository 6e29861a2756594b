"""The object graph: what is found and in which order, splitting and merging, changes in place."""

import collections
import copy
import dataclasses
import gc
import weakref

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from brainstate import HiddenState, ParamState, State, graph, nn
from brainstate._seam.scope import generation
from brainstate.graph import FlattedDict, NestedDict, TreefyState


class Box(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


@dataclasses.dataclass
class Pair:
    first: object
    second: object = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    inner: object


Named = collections.namedtuple("Named", ["z", "a"])


def paths(x, *filters):
    return list(graph.states(x, *filters))


# -------------------------------------------------------------------------------- finding


def test_order_of_paths():
    s = [State(i) for i in range(12)]
    box = Box(b=s[0], B=s[1], _x=s[2], a={"y": s[3], "x": s[4]}, seq=s[:2] + s[5:])
    assert paths(box) == [
        ("B",),
        ("_x",),
        ("a", "x"),
        ("a", "y"),
        ("b",),
        *(("seq", i) for i in range(2, 9)),
    ]
    assert paths(Box(seq=s)) == [("seq", i) for i in range(12)]


def test_d7_dict_keys_of_different_types():
    box = Box()
    box.d = {"a": State(2.0), 3: State(1.0), None: State(3.0), (1, "x"): State(4.0)}
    assert [p[1] for p in paths(box)] == [3, "a", (1, "x"), None]
    assert [s.value for s in box.states().values()] == [1.0, 2.0, 4.0, 3.0]
    again = graph.treefy_merge(*graph.treefy_split(box))
    assert list(again.d) == list(box.d)
    assert jax.tree.map(lambda s: s.value, box.d) == {3: 1.0, "a": 2.0, (1, "x"): 4.0, None: 3.0}


def test_what_is_descended_into():
    s = [State(float(i)) for i in range(7)]
    box = Box(
        list=[s[0]],
        named=Named(s[1], None),
        ordered=collections.OrderedDict(k=s[2]),
        pair=Pair([s[3]]),
        partial=jax.tree_util.Partial(max, s[4]),
        frozen=Frozen(Box(w=s[5])),
        default=collections.defaultdict(list, k=[s[6]]),
        text="text",
        none=None,
        array=np.ones(3),
    )
    assert {path: state.value for path, state in box.states().items()} == {
        ("default", "k", 0): 6.0,
        ("frozen", "inner", "w"): 5.0,
        ("list", 0): 0.0,
        ("named", "z"): 1.0,
        ("ordered", "k"): 2.0,
        ("pair", "first", 0): 3.0,
        ("partial", 0, 0): 4.0,
    }
    assert [state is s[int(state.value)] for state in box.states().values()] == [True] * 7


def test_roots_of_any_kind():
    w = State(1.0)
    assert graph.states(w) == {(): w}
    assert graph.nodes(w) == graph.states({}) == {}
    for nothing in (3, None, "text"):
        with pytest.raises(TypeError, match="States are looked for in a Module"):
            graph.states(nothing)
    assert paths([Box(w=w), {"x": State(0)}]) == [(0, "w"), (1, "x")]
    assert list(graph.nodes([Box(), Pair(Box())])) == [(0,), (1, "first")]
    assert list(graph.iter_leaf({"w": w})) == [(("w",), w)]
    with pytest.raises(ValueError, match="no place in nested dicts"):
        graph.treefy_states(w)


def test_shared_things_are_listed_once_under_the_first_path():
    w = State(1.0)
    inner = Box(w=w)
    box = Box(b=inner, a=w, c=[inner, inner])
    assert graph.states(box) == {("a",): w}
    assert list(graph.nodes(box)) == [("b",), ()]


def test_cycles():
    box = Box(w=State(1.0), loop=[])
    box.loop.append(box)
    box.me = box
    assert paths(box) == [("w",)]
    assert list(box.nodes()) == [()]
    loop: list = [State(0)]
    loop.append(loop)
    assert paths(loop) == [(0,)]
    box.pair = Pair(State(2.0))
    box.pair.second = box.pair
    box.pair = dataclasses.replace(box.pair)
    assert paths(box) == [("pair", "first"), ("w",)]


def test_children_come_before_parents():
    box = Box(a=Box(z=Box()), b=Box())
    assert list(box.nodes()) == [("a", "z"), ("a",), ("b",), ()]
    assert box.nodes()[()] is box


def test_several_filters():
    p, h, n = ParamState(1.0, tag="t"), HiddenState(jnp.ones(2)), State(0)
    box = Box(p=p, h=h, n=n)
    assert box.states("t", ParamState, HiddenState) == ({("p",): p}, {}, {("h",): h})
    assert box.states(ParamState, ...)[1] == {("h",): h, ("n",): n}
    assert box.states(State) == box.states()
    trees = graph.treefy_states(box, ParamState, HiddenState)
    assert [list(t) for t in trees] == [["p"], ["h"]]
    assert box.nodes(Box, ...)[1] == {}
    with pytest.raises(ValueError, match=r"put `\.\.\.` last"):
        box.states(..., ParamState)
    with pytest.raises(TypeError, match="is not a filter"):
        box.states(3)


def test_allowed_hierarchy_counts_modules():
    box = Box(w=State(0), l=[State(1)], a=Box(w=State(2), b=Box(w=State(3))))

    def values(first, last):
        return sorted(s.value for s in box.states(allowed_hierarchy=(first, last)).values())

    assert values(0, 0) == [0, 1]
    assert values(1, 1) == [2]
    assert values(1, 9) == [2, 3]
    assert values(2, 2) == [3]
    assert list(box.nodes(allowed_hierarchy=(1, 2))) == [("a", "b"), ("a",)]
    for bad in ((1, 0), (-1, 2), 3, (1,)):
        with pytest.raises(ValueError, match="allowed_hierarchy is a pair"):
            box.states(allowed_hierarchy=bad)


def test_a_shared_state_of_the_first_level_is_found_without_deeper_ones():
    w = State(1.0)
    assert graph.states(Box(a=Box(w=w), w=w), allowed_hierarchy=(0, 0)) == {("w",): w}


def test_the_walk_leaves_no_garbage_behind():
    gc.collect()
    gc.disable()
    try:
        box = Box(w=State(1.0), l=[Box(w=State(2.0))])
        alive = [weakref.ref(s) for s in box.states().values()]
        box.nodes(), repr(box), graph.clone(box), graph.treefy_states(box).to_flat()
        graph.treefy_merge(*graph.treefy_split(box))
        graph.update_states(box, {"w": 3.0})
        del box
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


# -------------------------------------------------------------------------------- snapshots


def test_treefy_states_has_the_keys_of_states():
    box = Box(a=Box(w=ParamState(jnp.ones((2, 3)), name="n", tag="t", unit="mV")), l=[State({"x": 1.0})])
    tree = graph.treefy_states(box)
    assert type(tree) is NestedDict
    assert list(tree.to_flat()) == list(box.states())
    w = tree.a.w
    assert (w.value.shape, w.type, w.name, w.tag, w.unit) == ((2, 3), ParamState, "n", {"t"}, "mV")
    assert w.value is box.a.w.value
    tree.l[0].value["x"] = 5.0
    assert box.l[0].value == {"x": 1.0}


def test_a_snapshot_becomes_a_state_again():
    snapshot = TreefyState.of(ParamState(1.0, name="n", tag={"a", "b"}, unit="mV"))
    for again in (
        snapshot,
        snapshot.copy(),
        copy.deepcopy(snapshot),
        jax.tree.map(lambda x: x, snapshot),
    ):
        state = again.to_state()
        assert type(state) is ParamState
        assert (state.value, state.name, state.tag, state.unit) == (1.0, "n", {"a", "b"}, "mV")
    assert snapshot.replace(5.0).to_state().value == 5.0
    assert snapshot.value == 1.0
    assert TreefyState(State, 1.0, tag="a").tag == {"a"}
    with pytest.raises(AttributeError, match="a snapshot of a ParamState has no attribute 'foo'"):
        _ = snapshot.foo


def test_equal_snapshots_are_not_traced_again():
    box = Box(w=ParamState(jnp.ones(2), name="n", tag="t", notes={"k": [1]}, table=np.ones(2)))
    traces = []

    @jax.jit
    def double(tree):
        traces.append(1)
        return jax.tree.map(lambda x: 2 * x, tree)

    for _ in range(3):
        graph.update_states(box, double(graph.treefy_states(box)))
    assert box.w.value.tolist() == [8.0, 8.0]
    assert len(traces) == 1
    box.w.add_tag("other")
    double(graph.treefy_states(box))
    assert len(traces) == 2


def test_gradients_with_respect_to_snapshots():
    tree = graph.treefy_states({"w": ParamState(jnp.array(3.0)), "b": ParamState(jnp.array(1.0))})
    grads = jax.grad(lambda t: t.w.value**2 + t.b.value)(tree)
    assert jax.tree.map(float, grads).to_pure_dict() == {"w": 6.0, "b": 1.0}


# -------------------------------------------------------------------------------- split, merge, clone


def elaborate():
    w = State(jnp.ones(2))
    inner = Box(w=w, size=3)
    box = Box(
        inner=inner,
        tied=w,
        layers=[inner, Box(w=ParamState(2.0)), {"x": w}],
        pair=Pair(inner, [State(3)]),
        frozen=Frozen(inner),
        both=(inner, Named(w, 1)),
        act=jnp.sin,
        table=np.arange(3),
        nothing=None,
        empty=[],
    )
    box.me = box
    box.layers[1].parent = box
    box.alias = box.layers
    return box


def check_same_structure(new, old):
    assert type(new) is type(old) is Box
    assert list(vars(new)) == list(vars(old))
    assert graph.graphdef(new) == graph.graphdef(old)
    assert list(new.states()) == list(old.states())
    assert not set(new.states().values()) & set(old.states().values())
    assert new.tied is new.inner.w is new.layers[2]["x"] is new.both[1].z is new.states()["alias", 0, "w"]
    assert new.inner is new.layers[0] is new.pair.first is new.frozen.inner is new.both[0]
    assert new.me is new is new.layers[1].parent
    assert new.alias is new.layers
    assert type(new.layers) is type(old.layers)
    assert (type(new.pair), type(new.both[1]), new.inner.size, new.empty) == (Pair, Named, 3, [])
    assert new.act is jnp.sin


def test_split_and_merge():
    box = elaborate()
    structure, params, others = graph.treefy_split(box, ParamState, ...)
    assert list(params.to_flat()) == [("alias", 1, "w")]
    new = graph.treefy_merge(structure, others, params)
    check_same_structure(new, box)
    assert new.table is box.table
    assert new.tied.value is box.tied.value
    new.tied.value = jnp.zeros(2)
    assert box.tied.value.tolist() == [1.0, 1.0]


def test_split_without_filters_gives_one_tree():
    structure, tree = graph.treefy_split(elaborate())
    assert list(tree.to_flat()) == [("alias", 0, "w"), ("alias", 1, "w"), ("pair", "second", 0)]
    new = graph.treefy_merge(structure, tree.to_flat())
    assert graph.graphdef(new) == structure
    assert repr(graph.graphdef(Box(w=State(1)))) == "GraphDef(Box, paths=['w'])"


def test_clone_and_deepcopy():
    box = elaborate()
    check_same_structure(graph.clone(box), box)
    new = copy.deepcopy(box)
    new.table, new.act = box.table, box.act
    check_same_structure(new, box)


def test_clone_does_not_share_containers_of_values():
    box = Box(s=State({"x": 1.0}))
    graph.clone(box).s.value["x"] = 5.0
    assert box.s.value == {"x": 1.0}


FORMS = ["state", "box", "list", "dict", "tuple"]


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from("abc"), st.sampled_from(FORMS), st.integers(0, 5)),
        max_size=15,
    )
)
def test_any_graph_survives_splitting(edges):
    boxes = [Box() for _ in range(6)]
    shared = [State(float(i)) for i in range(6)]
    for source, name, form, target in edges:
        part = {
            "state": shared[target],
            "box": boxes[target],
            "list": [boxes[target], shared[target]],
            "dict": {"k": boxes[target], 1: shared[target]},
            "tuple": (boxes[target], shared[target]),
        }[form]
        setattr(boxes[source], name, part)
    new = graph.treefy_merge(*graph.treefy_split(boxes[0]))
    assert graph.graphdef(new) == graph.graphdef(boxes[0])
    assert {p: s.value for p, s in new.states().items()} == {p: s.value for p, s in boxes[0].states().items()}
    assert list(new.nodes()) == list(boxes[0].nodes())
    assert list(jax.tree.map(lambda s: 0, new.states())) == list(new.states())


def test_graphdef_is_static_data():
    traces = []

    @jax.jit
    def double(structure, tree):
        traces.append(1)
        return structure, jax.tree.map(lambda x: 2 * x, tree)

    for _ in range(2):
        structure, tree = double(*graph.treefy_split({"l": [State(1.0), Named(jnp.sin, {})]}))
    assert graph.treefy_merge(structure, tree)["l"][0].value == 2.0
    assert len(traces) == 1
    assert graph.graphdef(Box(k=1)) != graph.graphdef(Box(k=2))
    assert graph.graphdef(Box(k=1)) != graph.graphdef(Box(k=True))
    assert hash(graph.graphdef(Box(k={1}))) == hash(graph.graphdef(Box(k={1})))


def test_lower_layer_keeps_the_states():
    box = Box(w=State(1.0))
    structure, states = graph.flatten(box)
    new = graph.unflatten(structure, states)
    assert new is not box
    assert new.w is box.w


def test_errors_of_splitting_and_merging():
    box = Box(a=Box(w=ParamState(1.0)), n=State(0))
    with pytest.raises(ValueError, match=r"no filter selects 'n'.*Add `\.\.\.`"):
        graph.treefy_split(box, ParamState)
    structure, tree = graph.treefy_split(box)
    with pytest.raises(ValueError, match=r"the trees to merge lacks 'a\.w'|lack"):
        graph.treefy_merge(structure, tree.filter("none"))
    with pytest.raises(ValueError, match="unknown 'z'"):
        graph.treefy_merge(structure, tree, {"z": TreefyState(State, 1)})
    with pytest.raises(TypeError, match=r"'a\.w' is a float.*snapshots"):
        graph.treefy_merge(structure, tree.to_pure_dict())


# -------------------------------------------------------------------------------- changes in place


@pytest.mark.parametrize(
    "form",
    [
        lambda t: t,
        lambda t: t.to_flat(),
        lambda t: t.to_pure_dict(),
        lambda t: t.to_dict(),
        lambda t: dict(t.to_flat()),
        lambda t: t.to_flat().to_dict_values(),
    ],
)
def test_d20_update_states_takes_any_mapping(form):
    box = Box(a=Box(w=State(1.0)), l=[State({"x": 2.0})], n=State(3.0))
    new = jax.tree.map(lambda x: 10 * x, graph.treefy_states(box))
    graph.update_states(box, form(new))
    assert [s.value for s in box.states().values()] == [10.0, {"x": 20.0}, 30.0]


def test_update_states_with_parts():
    box = Box(a=Box(w=State(1.0)), n=State(3.0))
    graph.update_states(box, {"n": 4.0}, {("a", "w"): 5.0})
    assert (box.a.w.value, box.n.value) == (5.0, 4.0)
    with pytest.raises(ValueError, match=r"tree 0 has unknown 'a\.v': the paths are: 'a\.w', 'n'"):
        graph.update_states(box, {"n": 0.0, "a": {"v": 0.0}})
    assert box.n.value == 4.0


def test_pop_states_removes_every_reference():
    p, n = ParamState(1.0), State(0)
    box = Box(a=Box(p=p), p=p, l=[p, n, p], d={"k": p}, pair=Pair(p, 1))
    tree = graph.pop_states(box, ParamState)
    assert list(tree.to_flat()) == [("a", "p")]
    assert box.states() == {("l", 0): n}
    assert (box.l, box.d, hasattr(box, "p"), hasattr(box.pair, "first")) == ([n], {}, False, False)
    assert p.value == 1.0


def test_pop_states_with_several_filters():
    box = Box(p=ParamState(1.0), n=State(0), h=HiddenState(jnp.ones(2)))
    params, hidden = graph.pop_states(box, ParamState, HiddenState)
    assert (list(params), list(hidden), paths(box)) == (["p"], ["h"], [("n",)])
    with pytest.raises(ValueError, match="at least one filter"):
        graph.pop_states(box)


@pytest.mark.parametrize("holder", [lambda s: (s,), Frozen])
def test_pop_states_is_all_or_nothing(holder):
    box = Box(a=State(1), z=holder(State(2)))
    with pytest.raises(TypeError, match=r"'z\.(0|inner)' cannot be removed from a (tuple|Frozen)"):
        graph.pop_states(box, ...)
    assert len(box.states()) == 2


# -------------------------------------------------------------------------------- noticing changes


def bumps(change):
    before = generation()
    change()
    return generation() - before


def test_d15_attributes():
    box = Box()
    w = State(1.0)
    assert bumps(lambda: setattr(box, "w", w)) == 0
    assert bumps(lambda: setattr(box, "w", w)) == 0
    assert bumps(lambda: setattr(box, "w", State(2.0))) == 1
    assert bumps(lambda: setattr(box, "w", None)) == 1
    assert bumps(lambda: setattr(box, "w", State(2.0))) == 0
    assert bumps(lambda: delattr(box, "w")) == 1
    assert bumps(lambda: setattr(box, "inner", Box())) == 0
    assert bumps(lambda: setattr(box, "inner", Box())) == 1
    assert bumps(lambda: setattr(box, "k", 3)) == 0
    assert bumps(lambda: setattr(box, "k", 4)) == 0
    assert bumps(lambda: delattr(box, "k")) == 0
    for held in ([State(0)], {"k": Box()}, (State(0),), Pair([State(0)])):
        assert bumps(lambda held=held: setattr(box, "c", held)) == 0
        assert bumps(lambda: setattr(box, "c", 3)) == 1
        del box.c


@pytest.mark.parametrize(
    ("change", "announced"),
    [
        (lambda x: x.append(State(0)), True),
        (lambda x: x.append(3), False),
        (lambda x: x.append([Box()]), True),
        (lambda x: x.extend(State(i) for i in range(3)), True),
        (lambda x: x.insert(0, 3), True),
        (lambda x: x.insert(9, 3), False),
        (lambda x: x.pop(), True),
        (lambda x: x.remove(x[1]), True),
        (lambda x: x.clear(), True),
        (lambda x: x.reverse(), True),
        (lambda x: x.sort(key=id, reverse=id(x[0]) < id(x[1])), True),
        (lambda x: x.sort(key=lambda s: 0), False),
        (lambda x: x.__setitem__(0, State(0)), True),
        (lambda x: x.__setitem__(0, x[0]), False),
        (lambda x: x.__setitem__(slice(0, 1), []), True),
        (lambda x: x.__delitem__(-1), True),
        (lambda x: x.__iadd__([State(0)]), True),
        (lambda x: x.__imul__(2), True),
        (lambda x: x.index(x[1]), False),
    ],
)
def test_d15_lists(change, announced):
    plain = [State(0), State(1)]
    box = Box(l=plain)
    assert bumps(lambda: change(box.l)) == announced
    assert isinstance(box.l, list)


@pytest.mark.parametrize(
    ("change", "announced"),
    [
        (lambda x: x.__setitem__("b", State(0)), True),
        (lambda x: x.__setitem__("b", 3), False),
        (lambda x: x.__setitem__("a", x["a"]), False),
        (lambda x: x.update(b={"c": State(0)}), True),
        (lambda x: x.setdefault("b", State(0)), True),
        (lambda x: x.setdefault("a", State(0)), False),
        (lambda x: x.pop("a"), True),
        (lambda x: x.popitem(), True),
        (lambda x: x.clear(), True),
        (lambda x: x.__delitem__("a"), True),
        (lambda x: x.__ior__({"b": State(0)}), True),
        (lambda x: x.get("a"), False),
    ],
)
def test_d15_dicts(change, announced):
    box = Box(d={"a": State(0)})
    assert bumps(lambda: change(box.d)) == announced
    assert isinstance(box.d, dict)


def test_d15_empty_and_nested_containers_notice_too():
    box = Box(a=[], d={"x": [], "y": ({},)})
    assert bumps(lambda: box.a.append({})) == 0
    assert bumps(lambda: box.a[0].update(k=State(1))) == 1
    assert bumps(lambda: box.d["x"].append(Box(w=State(2)))) == 1
    assert bumps(lambda: box.d["y"][0].update(k=State(3))) == 1
    assert [s.value for s in box.states().values()] == [1, 2, 3]


def test_owned_containers_are_lists_and_dicts():
    s, t = State(0), State(1)
    box = Box(l=[s, [t]], d={"b": s, "a": {"c": t}}, numbers=[1, 2])
    assert box.l == [s, [t]]
    assert box.d == {"b": s, "a": {"c": t}}
    assert repr(box.l) == "[State(0), [State(1)]]"
    assert list(box.d) == ["b", "a"]
    assert type(box.numbers) is list
    assert type(box.l[:1]) is type(box.l * 2) is list
    assert jax.tree.leaves(box.l) == [s, t]
    assert jax.tree.leaves(box.d) == [t, s]
    doubled = jax.tree.map(lambda x: x.value + 1, box.l)
    assert doubled == [1, [2]]
    assert jax.tree.map(lambda x, y: x.value + y, box.l, doubled) == [1, [3]]
    assert not bumps(lambda: copy.deepcopy(box))
    assert copy.copy(box.l) == box.l
    assert copy.copy(box.l) is not box.l


def test_a_refused_item_leaves_the_list_as_it_was():
    s = State(0)
    box = Box(l=[s], d={"k": s})
    with pytest.raises(TypeError, match=r"States inside a set would not be found"):
        box.l.extend([State(1), {State(2)}])
    with pytest.raises(ZeroDivisionError):
        box.l.extend(1 / i for i in (1, 0))
    with pytest.raises(TypeError, match="States inside a set"):
        box.d.update(a=1, b={State(2)})
    assert (box.l, box.d) == ([s], {"k": s})


def test_a_change_of_the_original_list_is_not_lost_silently():
    layers, table = [], {}
    box = Box(layers=layers)
    layers.append(State(1.0))
    for look in (box.states, box.nodes, lambda: graph.treefy_split(box)):
        with pytest.raises(ValueError, match=r"keeps a copy: change the Module's own, as in `module.layers.append"):
            look()
    box.layers = layers
    assert len(box.states()) == 1
    box.table = table
    table["k"] = State(2.0)
    with pytest.raises(ValueError, match="a dict was changed after it was assigned"):
        box.states()


# -------------------------------------------------------------------------------- nothing hidden


class Plain:
    def __init__(self, inner):
        self.inner = inner


class MyList(list):
    pass


def test_d26_a_dataclass_is_looked_into():
    box = Box(pair=Pair(State(1.0), Pair(Box(w=State(2.0)))))
    assert paths(box) == [("pair", "first"), ("pair", "second", "first", "w")]
    assert [s.value for s in graph.clone(box).states().values()] == [1.0, 2.0]


@pytest.mark.parametrize(
    "hidden",
    [
        Plain(State(1.0)),
        Plain([Box(w=State(1.0))]),
        Plain({"k": (State(1.0),)}),
        MyList([State(1.0)]),
        {State(1.0)},
        [Plain(State(1.0))],
        ({"k": Plain(Box())},),
        Pair(Plain(State(1.0))),
    ],
)
def test_d26_what_would_hide_a_state_is_refused(hidden):
    with pytest.raises(
        TypeError, match=r"Box\.helper.*States inside a (Plain|MyList|set) would not be found.*dataclass"
    ):
        Box(helper=hidden)


@pytest.mark.parametrize("harmless", [Plain(3), Plain([1]), MyList([1]), {1}, jax, Plain, len, lambda: State(0)])
def test_other_objects_are_static(harmless):
    box = Box(helper=harmless)
    assert box.helper is harmless
    assert paths(box) == []
    assert graph.clone(box).helper is harmless


def test_a_state_knows_its_place_for_messages():
    box = Box(a=State(0), l=[State(1)])
    assert box.a.describe() == "State at Box.a"
    assert box.l[0].describe() == "State at Box.l[0]"
    assert FlattedDict is type(box.states())
