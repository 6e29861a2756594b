"""FlattedDict and NestedDict: conversions, selections, pytrees."""

import copy
import pickle

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given

from brainstate import HiddenState, ParamState, State
from brainstate.graph import FlattedDict, NestedDict, TreefyState, states, treefy_states

FLAT = {("b",): 1, ("a", 10, "w"): 2, ("a", 2, "w"): 3}
NESTED = {"b": 1, "a": {10: {"w": 2}, 2: {"w": 3}}}

keys = st.one_of(st.text(max_size=2), st.integers(-3, 3), st.tuples(st.integers(0, 1)))
trees = st.recursive(st.integers(), lambda t: st.dictionaries(keys, t, min_size=1, max_size=3), max_leaves=8).filter(
    lambda t: isinstance(t, dict)
)


def test_conversions():
    flat, nested = FlattedDict(FLAT), NestedDict(NESTED)
    assert flat.to_nest() == nested == NestedDict.from_flat(FLAT)
    assert nested.to_flat() == flat == FlattedDict.from_nest(NESTED)
    assert type(flat.to_nest()) is NestedDict
    assert type(nested.to_flat()) is FlattedDict
    assert flat.to_flat() is flat
    assert nested.to_nest() == nested
    assert nested.to_dict() == NESTED
    assert type(nested.to_dict()["a"]) is dict
    assert flat.to_dict() == FLAT
    assert type(flat.to_dict()) is dict


@given(trees)
def test_round_trip_of_any_nesting(tree):
    nested = NestedDict(tree)
    assert nested.to_flat().to_nest() == nested
    assert jax.tree.map(lambda x: x, nested) == nested
    assert jax.tree.leaves(nested) == jax.tree.leaves(nested.to_flat())


def test_a_dict_below_is_a_value_and_survives():
    flat = FlattedDict({("w",): {"re": 1.0, "im": 2.0}})
    assert flat.to_nest().to_flat() == flat
    assert jax.tree.map(lambda x: x, flat.to_nest()).to_flat() == flat


def test_leaves_come_sorted_by_path_whatever_the_insertion_order():
    assert jax.tree.leaves(FlattedDict(FLAT)) == [3, 2, 1]
    assert jax.tree.leaves(NestedDict(NESTED)) == [3, 2, 1]
    assert list(jax.tree.map(lambda x: x, FlattedDict(FLAT))) == [("a", 2, "w"), ("a", 10, "w"), ("b",)]


def test_d7_keys_of_different_types_have_an_order():
    odd = {("x", "a"): 1, ("x", 3): 2, ("x", (0, "p")): 3, ("x", None): 4, (1,): 5}
    assert jax.tree.leaves(FlattedDict(odd)) == [5, 2, 1, 3, 4]
    assert jax.tree.leaves(NestedDict.from_flat(odd)) == [5, 2, 1, 3, 4]


def test_errors_of_jax_name_the_path():
    with pytest.raises(ValueError, match=r"\('w',\)"):
        jax.tree.map(lambda x, y: x, FlattedDict({("w",): (1, 2)}), FlattedDict({("w",): (1,)}))


@pytest.mark.parametrize("form", [FlattedDict, NestedDict.from_flat])
def test_filter_split_subset(form):
    w, h = ParamState(1.0, tag="t"), HiddenState(jnp.ones(2))
    mapping = form({("l", "w"): w, ("h",): h})
    assert mapping.filter(ParamState) == form({("l", "w"): w}) == mapping.subset("t")
    assert mapping.filter("t", ParamState) == (form({("l", "w"): w}), form({}))
    assert mapping.split(ParamState, ...) == (form({("l", "w"): w}), form({("h",): h}))
    assert mapping.split(...) == mapping
    assert type(mapping.split(...)) is type(mapping)
    with pytest.raises(ValueError, match=r"no filter selects 'l\.w'.*`\.\.\.`"):
        mapping.split(HiddenState)
    with pytest.raises(ValueError, match="at least one filter"):
        mapping.filter()


@pytest.mark.parametrize("form", [FlattedDict, NestedDict.from_flat])
def test_merge_union_difference(form):
    one, two = form({("a", "x"): 1, ("b",): 2}), form({("a", "y"): 3, ("b",): 4})
    both = form({("a", "x"): 1, ("a", "y"): 3, ("b",): 4})
    assert one.merge(two) == type(one).merge(one, two) == one | two == both
    assert type(one | two) is type(one)
    assert one - two == form({("a", "x"): 1})
    assert one == form({("a", "x"): 1, ("b",): 2})
    assert {("a", "x"): 1} | two == form({("a", "x"): 1, ("a", "y"): 3, ("b",): 4})
    same = one
    one |= two
    assert one is same
    assert one == both


def test_forms_mix_in_merge():
    assert FlattedDict({("a", "x"): 1}) | NestedDict({"a": {"y": 2}}) == FlattedDict({("a", "x"): 1, ("a", "y"): 2})
    assert NestedDict({"a": {"y": 2}}) | FlattedDict({("a", "x"): 1}) == NestedDict({"a": {"x": 1, "y": 2}})


def test_attribute_access():
    nested, flat = NestedDict(NESTED), FlattedDict(FLAT)
    assert (nested.b, nested.a[10].w, flat.b) == (1, 2, 1)
    nested["new"] = {"w": 5}
    assert nested.new.w == 5
    with pytest.raises(AttributeError):
        nested.typo = 3


def test_d21_a_missing_name_is_an_attribute_error():
    for mapping in (states([State(1)]), NestedDict({"w": 1}), FlattedDict()):
        assert not hasattr(mapping, "foo")
        with pytest.raises(AttributeError, match="no entry and no attribute 'foo'"):
            _ = mapping.foo


def test_d4_gradients_pair_with_states():
    ps = FlattedDict({("w",): ParamState(jnp.ones(2)), ("b",): ParamState(jnp.zeros(2))})

    def loss(values):
        return jnp.sum(values[("w",)] ** 2 + values[("b",)])

    grads = jax.grad(loss)(ps.to_dict_values())
    assert type(grads) is FlattedDict
    assert list(grads) == [("b",), ("w",)]
    new = jax.tree.map(lambda s, g: s.value - 0.5 * g, ps, grads)
    assert new[("w",)].tolist() == [0.0, 0.0]
    assert new.b.tolist() == [-0.5, -0.5]
    new = jax.tree.map(lambda v, g: v - 0.5 * g, ps.to_dict_values(), grads)
    assert new.b.tolist() == [-0.5, -0.5]


def test_assign_dict_values_wants_every_path():
    ps = FlattedDict({("w",): State(1.0), ("l", 0): State(2.0)})
    ps.assign_dict_values({("w",): 10.0, ("l", 0): State(20.0)})
    assert ps.to_dict_values() == {("w",): 10.0, ("l", 0): 20.0}
    with pytest.raises(ValueError, match=r"data lacks 'l\.0' and has unknown 'z'"):
        ps.assign_dict_values({("w",): 5.0, ("z",): 1.0})
    assert ps.w.value == 10.0


def test_pure_dicts():
    w, n = ParamState(1.0), State(2)
    nested = NestedDict({"l": {"w": w}, "n": n, "x": 3})
    assert nested.to_pure_dict() == {"l": {"w": 1.0}, "n": 2, "x": 3}
    nested.replace_by_pure_dict({"l": {"w": 5.0}, "x": 4})
    assert (w.value, nested.x, n.value) == (5.0, 4, 2)
    tree = treefy_states({"l": {"w": w}})
    tree.replace_by_pure_dict({"l": {"w": 7.0}})
    assert (tree.l.w.value, tree.l.w.type, w.value) == (7.0, ParamState, 5.0)
    with pytest.raises(ValueError, match=r"data has unknown 'l\.v'.*the paths are: 'l\.w'"):
        tree.replace_by_pure_dict({"l": {"w": 0.0, "v": 7.0}})
    assert tree.l.w.value == 7.0


def test_treefy_state():
    flat = FlattedDict({("w",): ParamState(1.0, name="n")}).treefy_state()
    assert type(flat) is FlattedDict
    assert isinstance(flat.w, TreefyState)
    assert (flat.w.type, flat.w.name, flat.w.value) == (ParamState, "n", 1.0)


@pytest.mark.parametrize("mapping", [FlattedDict(FLAT), NestedDict(NESTED)])
def test_copies(mapping):
    for again in (
        mapping.copy(),
        copy.copy(mapping),
        copy.deepcopy(mapping),
        pickle.loads(pickle.dumps(mapping)),
    ):
        assert again == mapping
        assert again is not mapping
        assert type(again) is type(mapping)
        assert repr(again) == repr(mapping)


def test_bad_paths():
    with pytest.raises(TypeError, match=r"has paths \(tuples\) as keys, not 'w'"):
        FlattedDict({"w": 1})
    with pytest.raises(ValueError, match="one path is the beginning of another"):
        FlattedDict({("a",): 1, ("a", "b"): 2}).to_nest()
    with pytest.raises(ValueError, match="beginning of another"):
        FlattedDict({("a", "b"): 2, ("a",): 1}).to_nest()
    with pytest.raises(ValueError, match="it is empty"):
        FlattedDict({(): 1}).to_nest()


def test_inside_jit():
    traces = []

    @jax.jit
    def double(tree):
        traces.append(1)
        return jax.tree.map(lambda x: 2 * x, tree)

    assert double(FlattedDict(FLAT)) == FlattedDict({k: 2 * v for k, v in FLAT.items()})
    assert double(FlattedDict(reversed(FLAT.items()))) == double(FlattedDict(FLAT))
    assert len(traces) == 1
