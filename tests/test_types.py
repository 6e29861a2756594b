"""The types that checkers see: stubs agree with the functions. `make check` runs pyright and mypy on a program."""

import ast
import inspect
from pathlib import Path

import _stubs
import pytest

import brainstate
import typed_program
from brainstate import transform

STUB = ast.parse(Path(transform.__file__).with_suffix(".pyi").read_text())
OPTIONS = {
    node.name: {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
    | {base.id for base in node.bases if isinstance(base, ast.Name)}
    for node in STUB.body
    if isinstance(node, ast.ClassDef)
}
FUNCTIONS: dict[str, list[ast.FunctionDef]] = {}
for node in STUB.body:
    if isinstance(node, ast.FunctionDef):
        FUNCTIONS.setdefault(node.name, []).append(node)


def options_of(name):
    """Return the keys of a TypedDict of the stub, those of its bases included."""
    own = OPTIONS.get(name, set())
    return {key for entry in own for key in (options_of(entry) if entry in OPTIONS else {entry})} - {"TypedDict"}


def parameters_of(function):
    """Return the names of the parameters that one definition of the stub accepts."""
    arguments = function.args
    names = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    match arguments.kwarg:
        case ast.arg(annotation=ast.Subscript(slice=ast.Name(options))):
            names |= options_of(options)
    return names


def test_the_program_runs():
    assert typed_program.step(typed_program.batch) >= 0


def test_the_stub_names_what_is_public():
    named = {alias.asname for node in STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    named |= {target.id for node in STUB.body if isinstance(node, ast.Assign) for target in node.targets}
    named |= {node.name for node in STUB.body if isinstance(node, ast.ClassDef)} | FUNCTIONS.keys()
    public = {name for name in named - {None} if not name.startswith("_") and len(name) > 1}
    assert public == set(transform.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_stub_has_the_parameters_of_the_function(name):
    signature = inspect.signature(getattr(transform, name))
    known = {p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    stated = set().union(*map(parameters_of, FUNCTIONS[name])) - {"args", "kwargs"}
    assert stated >= known if open_ended else stated == known
    for function in FUNCTIONS[name]:
        for argument, default in [*_defaults(function)]:
            if argument in known and isinstance(default, ast.Constant) and default.value is not ...:
                assert default.value == signature.parameters[argument].default, argument


def _defaults(function):
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    yield from zip(
        [a.arg for a in positional[len(positional) - len(arguments.defaults) :]], arguments.defaults, strict=True
    )
    yield from zip([a.arg for a in arguments.kwonlyargs], arguments.kw_defaults, strict=True)


def test_few_functions_return_anything():
    loose = {
        name
        for name, definitions in FUNCTIONS.items()
        if all(isinstance(function.returns, ast.Name) and function.returns.id == "Any" for function in definitions)
    }
    assert len(loose) <= 5


def test_the_stub_of_the_samplers_is_what_the_table_says():
    assert ast.dump(ast.parse(_stubs.page())) == ast.dump(ast.parse(_stubs.FILE.read_text())), "run `make docs`"


def test_a_state_with_a_type_is_an_ordinary_state():
    state = brainstate.State[int](3, name="count")
    assert state.metadata() == {"name": "count", "tag": set()}
    assert type(state.copy()) is brainstate.State
