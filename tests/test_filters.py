"""Filters: the table of ``brainstate.filters``, row by row, and what is refused."""

import pickle

import jax.numpy as jnp
import pytest

from brainstate import BatchState, HiddenState, LongTermState, ParamState, ShortTermState, State
from brainstate.filters import (
    All,
    Any,
    Everything,
    Not,
    Nothing,
    OfType,
    PathContains,
    WithTag,
    to_predicate,
    to_predicates,
)
from brainstate.graph import TreefyState
from brainstate.util import filter as public

W = ParamState(1.0, tag="slow")
H = HiddenState(jnp.ones(2))
PATH = ("layers", 0, "weight")


@pytest.mark.parametrize(
    ("filter", "predicate"),
    [
        (ParamState, OfType(ParamState)),
        ("slow", WithTag("slow")),
        (..., Everything()),
        (True, Everything()),
        (Everything, Everything()),
        (None, Nothing()),
        (False, Nothing()),
        (Nothing, Nothing()),
        ([ParamState, "slow"], Any(ParamState, "slow")),
        ((ParamState, ["a", "b"]), Any(OfType(ParamState), Any("a", "b"))),
        ([], Any()),
        (Not(ParamState), Not(OfType(ParamState))),
    ],
)
def test_what_a_filter_stands_for(filter, predicate):
    assert to_predicate(filter) == predicate
    assert hash(to_predicate(filter)) == hash(predicate)


def test_a_function_is_its_own_predicate():
    def f(path, x):
        return True

    assert to_predicate(f) is f


@pytest.mark.parametrize(
    ("filter", "selects_w", "selects_h"),
    [
        (State, True, True),
        (ParamState, True, False),
        (LongTermState, True, False),
        (ShortTermState, False, True),
        (BatchState, False, False),
        ("slow", True, False),
        ("slo", False, False),
        (..., True, True),
        (None, False, False),
        ([HiddenState, "slow"], True, True),
        ([], False, False),
        (All(ParamState, "slow"), True, False),
        (All(ParamState, HiddenState), False, False),
        (All(), True, True),
        (Not("slow"), False, True),
        (PathContains("layers"), True, True),
        (PathContains(0), True, True),
        (PathContains("layer"), False, False),
        (lambda path, x: x is W and path == PATH, True, False),
    ],
)
def test_what_is_selected(filter, selects_w, selects_h):
    predicate = to_predicate(filter)
    assert (predicate(PATH, W), predicate(PATH, H)) == (selects_w, selects_h)


def test_snapshots_are_selected_by_the_class_and_tags_of_their_state():
    snapshot = TreefyState(ParamState, 1.0, tag="slow")
    assert OfType(LongTermState)((), snapshot)
    assert not OfType(HiddenState)((), snapshot)
    assert WithTag("slow")((), snapshot)


def test_things_without_class_or_tag_are_not_selected():
    assert not OfType(State)((), 3)
    assert not WithTag("slow")((), 3)


def test_predicates_print_and_pickle():
    predicate = All(Not("slow"), Any(PathContains(0), ...))
    assert repr(predicate) == "All(Not(WithTag(tag='slow')), Any(PathContains(key=0), Everything()))"
    assert pickle.loads(pickle.dumps(predicate)) == predicate
    assert Any("a") != All("a")


@pytest.mark.parametrize("bad", [3, 1.5, {"a"}, {}, [ParamState, 3]])
def test_what_is_no_filter_is_refused(bad):
    with pytest.raises(TypeError, match=r"is not a filter.*a class, a tag"):
        to_predicate(bad)


def test_a_tag_is_a_string():
    with pytest.raises(TypeError, match="WithTag takes the tag as a string, not 3"):
        WithTag(3)


def test_everything_comes_last():
    assert to_predicates((ParamState, ...)) == (OfType(ParamState), Everything())
    with pytest.raises(ValueError, match=r"filter 1 selects everything.*last"):
        to_predicates((ParamState, ..., State))
    with pytest.raises(ValueError, match="filter 0 selects everything"):
        to_predicates((True, State))


def test_the_public_door_opens_on_the_same_filters():
    assert public.to_predicate is to_predicate
    assert public.All is All
