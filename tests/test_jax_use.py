"""The source and the next JAX: every name that it takes from programs is alive, every other dependence is on a page."""

import re

import pytest

from _jax_names import (
    ELSEWHERE,
    HERE,
    dead_primitives,
    live_parameters,
    live_primitives,
    parameters_named,
    primitives_named,
)
from _source import MODULES, ROOT, Module

# ------------------------------------------------------------------------------------------ names in programs


def test_every_primitive_in_the_source_is_alive():
    assert not dead_primitives(MODULES), "names of primitives that no supported JAX has"


def test_every_parameter_in_the_source_is_alive():
    known = live_parameters().keys() | {name for name, version in ELSEWHERE.items() if version != HERE}
    named = parameters_named(MODULES)
    dead = {name: places for name, places in named.items() if name not in known}
    assert not dead, "parameters of equations that no supported JAX has"


def test_names_of_one_version_are_alive_on_it_alone():
    live = live_primitives() | live_parameters().keys()
    assert {name for name in ELSEWHERE if name in live} == {
        name for name, version in ELSEWHERE.items() if version == HERE
    }
    assert ELSEWHERE.keys() <= primitives_named(MODULES).keys() | parameters_named(MODULES).keys()
    locks = "".join(path.read_text() for path in (ROOT / "constraints").glob("*.txt"))
    assert set(ELSEWHERE.values()) <= set(re.findall(r"^jax==(\d+\.\d+)", locks, re.MULTILINE)), "no supported version"


def test_the_names_are_found():
    """What everybody knows to be in the source is: the rule is not blind to how it is written."""
    named = primitives_named(MODULES)
    known = "scan while cond jit custom_jvp_call custom_vjp state_read stop_gradient add dot_general scatter-add sqrt"
    assert len(named) > 100 and not set(known.split()) - named.keys()
    assert (
        not {"jaxpr", "branches", "body_nconsts", "num_consts", "reverse", "strides"} - parameters_named(MODULES).keys()
    )


@pytest.mark.parametrize(
    "text",
    [
        "def f(eqn):\n    return eqn.primitive.name == 'dead'",
        "def f(eqn):\n    name, ins = eqn.primitive.name, eqn.invars\n    return name in ('sin', 'dead')",
        "T = {'sin', 'dead'}\ndef f(origin):\n    return origin.primitive in T",
        "W = 'sin dead'\nT, U = frozenset(W.split()), 1\ndef f(eqn):\n    return eqn.primitive.name not in T",
        "M = {'dead': 1}\nT = {**dict.fromkeys(M, 2), 'sin': 3}\ndef f(eqn):\n    return T[eqn.primitive.name]",
        "def f(eqn):\n    name = eqn.primitive.name\n    return {'dead': 1}.get(name)",
        "def f(eqn):\n    name = eqn.primitive.name\n    return lambda: name.startswith('dead')",
        "def f(names):\n    return any('dead' in primitive for primitive in names)",
        "def f(origin):\n    return 'dead' in origin.makers",
        "def f(eqn):\n    match eqn.primitive.name:\n        case 'sin' | 'dead':\n            return 1",
    ],
)
def test_a_dead_primitive_is_found(text):
    assert dead_primitives([Module.parse(text, "brainstate.a")]) == {"dead": ["brainstate.a"]}


def test_a_dead_primitive_in_a_table_of_another_module_is_found():
    a, b = (
        Module.parse("T = {'dead'}", "brainstate.a"),
        "from .a import T\ndef f(eqn):\n    return eqn.primitive.name in T",
    )
    assert dead_primitives([a, Module.parse(b, "brainstate.b")]) == {"dead": ["brainstate.b"]}


@pytest.mark.parametrize(
    "expression",
    [
        "eqn.params['dead']",
        "p['dead']",
        "params.get('dead', 0)",
        "'dead' in params",
        "{n: eqn.params[n] for n in ('dead',)}",
    ],
)
def test_a_parameter_is_found(expression):
    assert parameters_named([Module.parse(expression, "a")]) == {"dead": ["a"]}
