"""Each number of ``make measure`` counts what it says: modules with planted examples."""

import pytest

import measure
from _source import MODULES, Module


def module(text="", name="brainstate.a", is_package=False):
    return Module.parse(text, name, is_package)


EXAMPLE = '''
"""Say what, what it is. What else? It depends on what."""
import typing

# A comment of its own.
x: int = 1  # and one beside

@typing.overload
def made(a: int) -> int: ...

def made(a):
    """Return ``what`` is 1.

    >>> what
    what
    """
    if type(a) is not int or a < 1:
        raise ValueError

    return a

def make_it(eqn):
    return eqn.primitive.name in ("scan", "dead")
'''


@pytest.mark.parametrize(
    ("function", "number"),
    [
        (measure.code_lines, "8 + 2 of types · 1"),
        (measure.longest_file, "10 (`a`)"),
        (measure.longest_body, "3 (`a.made`)"),
        (measure.comments, "10.0 %"),
        (measure.widest_folder, "1 (``)"),
        (measure.all_imports, "1 · 1 · 0"),
        (measure.free_what, f"{1000 * 3 / 13:.1f}"),
        (measure.lone_names, f"{100 * 2 / 3:.1f} %"),
        (measure.repeated_names, "0"),
        (measure.counts_by_hand, "1"),
        (measure.control_flow_readers, "1"),
        (measure.dead_names, "1 of 2"),
    ],
)
def test_a_number(function, number):
    assert function([module(EXAMPLE.strip())]) == number


@pytest.mark.parametrize("name", ["made", "_placed", "besides", "of", "told_", "waiting", "__of"])
def test_a_lone_word(name):
    assert measure.is_lone_word(name)


@pytest.mark.parametrize("name", ["make", "seed", "_string", "made_of", "read", "nothing", "is_placed", "_"])
def test_a_name(name):
    assert not measure.is_lone_word(name)


def test_names_in_several_modules():
    a = module("def f(): ...\nx, y = 1, 2\n__all__ = []\nz: int = 1", "brainstate.a")
    b = module("class f: ...\ny = 1\n__all__ = []\ndef g():\n    x = 1", "brainstate.b")
    assert list(measure.definitions_of_several([a, b])) == ["f", "y"]


def test_functions_that_return_any():
    exported = module("__all__ = ['f', 'g', 'h', 'k', 'C']", "brainstate.transform", is_package=True)
    text = """
def f(): ...
def g() -> Any: ...
def h() -> int: ...
@overload
def k(a: int) -> int: ...
def k(a) -> Any: ...
class C: ...
def hidden(): ...
"""
    inside = module(text, "brainstate.transform.room.m")
    assert measure.untyped([exported, inside]) == "2 of 4"
    stub = "def f() -> int: ...\ndef h() -> Any: ...\nclass g: ..."
    exported = Module.parse(exported.text, exported.name, True, stub)
    assert measure.untyped([exported, inside]) == "2 of 4"  # f is typed there and h is not
    assert measure.code_lines([exported]) == "1 + 3 of types · 1"


def test_floors_and_imports_of_a_folder():
    parts = {
        "brainstate.a": "from .room import deep\nfrom . import top",
        "brainstate.a.top": "from .room.deep import x\nfrom .room.low import y",
        "brainstate.a.room": "",
        "brainstate.a.room.deep": "from .low import z",
        "brainstate.a.room.low": "from ..base import w",
        "brainstate.a.base": "import jax",
    }
    modules = [module(text, name, name.endswith((".a", ".room"))) for name, text in parts.items()]
    assert measure.imports("brainstate.a")(modules) == "4 · 4 · 4"  # __init__ → top → room → base, and __init__ → room
    assert measure.imports("brainstate.a.room")(modules) == "3 · 2 · 1"
    assert measure.imports("brainstate.b")(modules) == "none"
    assert measure.widest_folder(modules) == "3 (`a.`)"


def test_the_table():
    modules = [each for each in MODULES if each.is_package]
    text = measure.table({"before": modules, "now": modules})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert lines[0] == ["", "before", "now"] and {len(line) for line in lines} == {3}
    assert all(before == now for _, before, now in lines[1:])
    assert {line[0] for line in lines} >= measure.MEASURES.keys() | {
        "parts · floors · imports in `brainstate.transform`"
    }
