"""The source and the next JAX: every name that it takes from programs is alive, every other dependence is on a page."""

import ast
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
    known = (
        "scan while cond jit custom_jvp_call custom_vjp_call state_read stop_gradient add dot_general scatter-add sqrt"
    )
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


# ------------------------------------------------------------------------------------------ the page

PAGE = (ROOT / "docs/contributing/jax.md").read_text()
UNSTABLE = ("jax.core.", "jax.extend.", "jax.interpreters.", "jax.experimental.")


def rows(page: str) -> list[tuple[set[str], list[tuple[str, str]]]]:
    """Return of each row of the page's tables what is quoted in it, and its tests as (file, name)."""
    cells = [[set(re.findall("`([^`]+)`", cell)) for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    return [
        (used | purpose, [tuple(test.split("::")) for test in sorted(tests)])
        for used, purpose, tests in (row for row in cells if len(row) == 3)
        if used or purpose or tests
    ]


def dependences(modules) -> set[str]:
    """Return what the source uses of JAX beside its documented API, as far as a rule can see it."""
    found = set()
    for module in modules:
        found |= {name.rpartition(".")[2] for _, name in module.imports() if name.startswith(UNSTABLE)}
        for node in ast.walk(module.tree):
            match node:
                case ast.Attribute(attr=str(name)) | ast.Constant(str(name)) if re.fullmatch("jax_[a-z0-9_]+", name):
                    found.add(name)
                case ast.Attribute(attr="make_user_context"):
                    found.add("make_user_context")
                case ast.Compare(ast.Constant(str(text)), [ast.In() | ast.NotIn()], [ast.Call(ast.Name("str"))]):
                    found.add(text)
                case ast.Compare(ast.Attribute(attr="co_name"), _, [ast.Constant(str(text))]):
                    found.add(text)
    return found


def compat() -> set[str]:
    (module,) = (module for module in MODULES if module.name == "brainstate._compat")
    for node in module.tree.body:
        match node:
            case ast.Assign([ast.Name("__all__")], ast.List(names)):
                return {f"_compat.{ast.literal_eval(name)}" for name in names}
    return set()


def missing_tests(page: str) -> list[str]:
    """Return the rows without a test, and the tests that do not exist."""
    faults = []
    for quoted, tests in rows(page):
        if not tests:
            faults.append(f"no test: {sorted(quoted)}")
        for file, name in tests:
            if not re.search(
                rf"^def {name}\(", (ROOT / file).read_text() if (ROOT / file).exists() else "", re.MULTILINE
            ):
                faults.append(f"{file}::{name}")
    return faults


def test_every_dependence_has_a_row():
    quoted = set().union(*(quoted for quoted, _ in rows(PAGE)))
    assert not (dependences(MODULES) | compat()) - quoted, "not in docs/contributing/jax.md"
    assert not {name for name in quoted if name.startswith("_compat.")} - compat(), "no longer in _compat"


def test_every_row_has_a_test_that_exists():
    assert len(rows(PAGE)) > 20
    assert not missing_tests(PAGE)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from jax.extend.core import find_top_trace", "find_top_trace"),
        ("from jax.experimental import checkify as _checkify", "checkify"),
        ("on = jax.config.jax_new_option", "jax_new_option"),
        ("_OPTIONS = ('jax_new_option',)", "jax_new_option"),
        ("token = jax.make_user_context(None)", "make_user_context"),
        ("leaked = 'a text' not in str(error)", "a text"),
        ("asked = frame.f_code.co_name != 'asks'", "asks"),
    ],
)
def test_a_dependence_is_found(text, found):
    assert dependences([Module.parse(text, "a")]) == {found}
    assert not dependences([Module.parse("import jax\nfrom jax.tree_util import keystr\nx = 'jax'", "a")])


def test_a_row_without_a_test_is_found():
    head = "| Of JAX | Use | Test |\n|---|---|---|\n"
    assert missing_tests(f"{head}| `a` | b | |") == ["no test: ['a']"]
    assert missing_tests(f"{head}| `a` | b | `tests/test_jax_use.py::test_x` |") == ["tests/test_jax_use.py::test_x"]
    assert missing_tests(f"{head}| `a` | b | `tests/nowhere.py::test_x` |") == ["tests/nowhere.py::test_x"]
    assert not missing_tests(f"{head}| `a` | b | `tests/test_jax_use.py::test_a_row_without_a_test_is_found` |")
