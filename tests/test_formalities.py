"""
The form of the package, read from its source and its namespaces; runs before every other test.

A *rule* looks at one module's syntax tree and yields what is wrong with it. Rules are crossed with the
modules of the package, and each has planted violations that prove that it can fail.
"""

import __future__

import ast
import importlib
import inspect
import re
import subprocess
import sys
import types
import typing
from collections import defaultdict
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter

import pytest
from _api import public_modules

from _source import MODULES, PACKAGE, ROOT, Module, files, floors, import_graph, rooms, span

# What a part of the package may import from the package, itself aside. `__init__` may import all.
CORE = "_errors _compat _arrays _functions _copies _seam _state"
# The same within `_seam` and `transform`, for their modules and rooms.
SEAM_LAYERS = {
    "packing": "",
    "marker": "",
    "local_states": "",
    "donation": "",
    "other_libraries": "local_states",
    "tokens": "local_states other_libraries",
    "run_time_errors": "",
    "scope": "donation local_states marker other_libraries packing run_time_errors tokens",
    "staging": "marker scope",
    "module_reads": "scope",
    "step": "donation packing scope staging tokens",
}
TRANSFORM_LAYERS = {
    "_wrapper": "",
    "_random_keys": "",
    "_select_states": "",
    "_tap": "",
    "_nonfinite": "",
    "_control": "_select_states _wrapper",
    "_compile": "_select_states _tap _wrapper",
    "_first_order": "_nonfinite _random_keys _select_states _wrapper",
    "_batches": "_first_order _control _wrapper",
    "_second_order": "_first_order _nonfinite _random_keys _wrapper",
    "_sparse": "_first_order",
    "_diagnosis": "_first_order _select_states",
}
LAYERS = {
    "_errors": "",
    "_compat": "",
    "_arrays": "_errors",
    "_functions": "_errors",
    "_copies": "_errors",
    "_seam": "_errors _compat _arrays _functions _program",
    "_state": "_errors _compat _seam",
    "_program": "_compat _functions",
    "filters": CORE,
    "random": CORE,
    "transform": f"{CORE} _program filters",
    "graph": f"{CORE} filters",
    "util": f"{CORE} filters random transform graph",
    "nn": f"{CORE} filters random transform graph util",
}
WITHIN = {"_seam": SEAM_LAYERS, "transform": TRANSFORM_LAYERS}
# One module draws the keys of estimates and so needs random numbers.
EXCEPTIONS = {("brainstate.transform._random_keys", "random")}

# The only modules that touch the raw value of a State.
SEAM = {"brainstate._state", "brainstate._seam.scope", "brainstate._seam.step"}

# Imported where they are used, never by `import brainstate`.
OPTIONAL = {
    "optax",
    "equinox",
    "lineax",
    "optimistix",
    "orbax",
    "safetensors",
    "tqdm",
    "rich",
    "treescope",
    "matplotlib",
}
FOREIGN = OPTIONAL | {"sklearn", "flax"}

FILE_LINES, BODY_LINES, PARAMETERS = 400, 40, 8
FOLDER_FILES, FLOORS = 12, 6
# Functions with more parameters, and why: {"module.function": "reason"}, from `transform` on.
WIDE: dict[str, str] = {
    "_first_order.gradient_transform.GradientTransform.__init__": "what all derivatives take, and the derivative",
    "_second_order.hvp_ggn.ggn": "what all gradients take, and the loss",
    "_first_order.gradients.grad": "what all derivatives take, and two that jax.grad takes",
    "_first_order.gradients.jacrev": "what all gradients take, and three that jax.jacrev and memory ask for",
    "_first_order.gradients.jacfwd": "as jacrev",
    "_first_order.gradients.hessian": "as jacrev",
    "_diagnosis.check_grads.check_grads": "those of jax.test_util.check_grads, and what is differentiated",
    "_first_order.forward_gradient.fwd_grad": "what all gradients take, and three that say how to estimate",
    "_second_order.fisher.fisher": "what all gradients take, and four that say whose labels",
    "_second_order.laplacian.laplacian": "what all gradients take, and three that say how to estimate",
    "_batches.per_example.per_example_grad": "what grad takes, and what vmap takes",
    "_batches.per_example.per_example_norms": "what grad takes, and what vmap takes",
    "_sparse.transforms.sparse_jacobian": "what all derivatives take, and what is known of the pattern",
    "_sparse.transforms.sparse_hessian": "as sparse_jacobian",
}


# --- rules: one module's tree -> what is wrong with it ------------------------------------------------------


def imports_point_one_way(module: Module) -> Iterator[str]:
    """LAYERS says which part may import which."""
    _, part, room, *_ = [*module.name.split("."), "", ""]
    yield from _arrows(module, (PACKAGE,), part, LAYERS)
    if part in WITHIN:
        yield from _arrows(module, (PACKAGE, part), room, WITHIN[part])


def _arrows(module, house, own, layers) -> Iterator[str]:
    """The imports within `house` that its `layers` do not allow to its part `own`."""
    if not own:
        return
    if own not in layers:
        yield f"{own} has no place in the layers of {'.'.join(house)}"
        return
    allowed = {own, *layers[own].split()}
    for line, name in module.imports():
        *parts, target = [*name.split("."), ""][: len(house) + 1]
        if tuple(parts) == house and target not in allowed and (module.name, target) not in EXCEPTIONS:
            yield f"line {line}: {own} must not import {name}"


def public_jax_only(module: Module) -> Iterator[str]:
    """`jax._src` is nowhere."""
    for line, name in module.imports():
        if name.startswith("jax._src"):
            yield f"line {line}: import of {name}"
    for node in ast.walk(module.tree):
        match node:
            case ast.Attribute(attr="_src"):
                yield f"line {node.lineno}: attribute _src"
            case ast.Constant(str(text)) if text.startswith("jax._src"):
                yield f"line {node.lineno}: {text!r}"


def no_hidden_import(module: Module) -> Iterator[str]:
    """Only optional libraries are imported inside a function, and nothing for the type checker alone."""
    for name, function in module.functions():
        for line, target in module.imports(function):
            if target.partition(".")[0] not in OPTIONAL:
                yield f"line {line}: {name} imports {target}"
    for node in ast.walk(module.tree):
        match node:
            case ast.Name("TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING"):
                yield f"line {node.lineno}: TYPE_CHECKING"


def one_seam(module: Module) -> Iterator[str]:
    """`_value` is named in the state module and the seam only, as an attribute or as a string."""
    if module.name in SEAM:
        return
    for node in ast.walk(module.tree):
        match node:
            case ast.Attribute(attr="_value") | ast.Constant("_value"):
                yield f"line {node.lineno}: _value"


def no_version_comparison(module: Module) -> Iterator[str]:
    """Features of JAX are detected by presence."""
    for line, name in module.imports():
        if name.startswith("jax") and "version" in name:
            yield f"line {line}: import of {name}"
    for node in ast.walk(module.tree):
        match node:
            case ast.Attribute(ast.Name("jax" | "jaxlib"), str(attribute)) if "version" in attribute:
                yield f"line {node.lineno}: {attribute} of JAX"
            case ast.Call(
                args=[ast.Constant("jax" | "jaxlib"), *_],
                func=ast.Attribute(attr="version") | ast.Name("version"),
            ):
                yield f"line {node.lineno}: version of JAX"


def within_file_budget(module: Module) -> Iterator[str]:
    """A file has few lines of code."""
    if (lines := len(module.code_lines())) > FILE_LINES:
        yield f"{lines} lines of code, {FILE_LINES} allowed"


def within_body_budget(module: Module) -> Iterator[str]:
    """The body of a function has few lines of code."""
    code = module.code_lines()
    for name, function in module.functions():
        lines = {line for statement in function.body for line in span(statement)} & code
        if len(lines) > BODY_LINES:
            yield f"{name}: {len(lines)} lines of code, {BODY_LINES} allowed"


def within_parameter_budget(module: Module) -> Iterator[str]:
    """A function has few parameters, `self` aside, unless WIDE gives a reason."""
    for name, count in parameter_counts(module):
        if count > PARAMETERS and name not in WIDE:
            yield f"{name}: {count} parameters, {PARAMETERS} allowed"


def parameter_counts(module: Module) -> Iterator[tuple[str, int]]:
    for name, function in module.functions():
        arguments = function.args.posonlyargs + function.args.args
        bound = bool(arguments) and arguments[0].arg in ("self", "cls")
        yield name.removeprefix(f"{PACKAGE}.transform."), len(arguments) - bound + len(function.args.kwonlyargs)


def says_what_it_is(module: Module) -> Iterator[str]:
    """A module that holds code begins with a docstring."""
    if module.tree.body and not ast.get_docstring(module.tree):
        yield "no module docstring"


# Each rule with a violation: the module it stands in and its text.
RULES = {
    imports_point_one_way: [
        ("brainstate._state", "from .graph import states"),
        ("brainstate.transform._compile.jit", "from brainstate import random"),
        ("brainstate.transform._compile.jit", "from ...nn._module import Module"),
        ("brainstate.graph._paths", "import brainstate"),
        ("brainstate.newcomer", "import jax"),
        ("brainstate._seam.marker", "from .scope import Scope"),
        ("brainstate.transform._control.loops", "from .._first_order.gradients import grad"),
        ("brainstate.transform._newcomer.a", "import jax"),
    ],
    public_jax_only: [
        ("brainstate._compat", "from jax._src import core"),
        ("brainstate._compat", "import jax\nx = jax._src.core"),
        ("brainstate._compat", "x = importlib.import_module('jax._src.core')"),
    ],
    no_hidden_import: [
        ("brainstate.a", "def f():\n    from . import b"),
        ("brainstate.a", "class A:\n    def f(self):\n        if self:\n            import numpy"),
        ("brainstate.a", "import typing\nif typing.TYPE_CHECKING:\n    x = 1"),
    ],
    one_seam: [("brainstate.a", "x._value"), ("brainstate.a", "read = operator.attrgetter('_value')")],
    no_version_comparison: [
        ("brainstate._compat", "new = jax.__version__ > '0.10'"),
        ("brainstate._compat", "from jax import __version_info__"),
        ("brainstate._compat", "new = metadata.version('jax') > '0.10'"),
    ],
    within_file_budget: [("brainstate.a", "x = 1\n" * (FILE_LINES + 1))],
    within_body_budget: [("brainstate.a", "class A:\n    def f(self):\n" + "        x = 1\n" * (BODY_LINES + 1))],
    within_parameter_budget: [("brainstate.a", "def f(a, b, /, c, d, *, e, f, g, h, i): ...")],
    says_what_it_is: [("brainstate.a", "x = 1")],
}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule, module):
    faults = list(rule(module))
    assert not faults, "\n".join([rule.__doc__, *faults])


@pytest.mark.parametrize(
    ("rule", "name", "text"), [(rule, *violation) for rule, planted in RULES.items() for violation in planted]
)
def test_rule_can_fail(rule, name, text):
    assert list(rule(Module.parse(text, name)))


def test_rules_spare_what_is_allowed():
    text = '''
"""A docstring."""
import jax.extend.core
from ..._state import State
from ...filters import to_predicate
from . import branches
def f(self, a, b, c, d, e, f, g, h, *args, **kwargs):
    """{lines}"""
    import optax
    # {comments}
    return self.value, optax
'''.format(lines="\n" * FILE_LINES, comments="\n# " * FILE_LINES)
    module = Module.parse(text.strip(), "brainstate.transform._control.loops")
    assert not [fault for rule in RULES for fault in rule(module)]
    assert len(module.code_lines()) == 7


def test_wide_lists_nothing_stale():
    wide = {name for module in MODULES for name, count in parameter_counts(module) if count > PARAMETERS}
    assert not WIDE.keys() - wide


# --- the package as a whole ---------------------------------------------------------------------------------


def import_cycle(modules: Iterable[Module]) -> list[str]:
    """Return a cycle of imports, or nothing."""
    try:
        TopologicalSorter(import_graph(modules)).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def repeated_paragraphs(modules: Iterable[Module]) -> dict[str, list[str]]:
    """Return the long paragraphs that stand in docstrings more than once, with their places."""
    places = defaultdict(list)
    for module in modules:
        for node, text in module.docstrings():
            for paragraph in re.split(r"\n\s*\n", str(text.value)):
                places[" ".join(paragraph.split())].append(f"{module.name}.{getattr(node, 'name', '')}")
    return {text: where for text, where in places.items() if len(text) >= 120 and len(where) > 1}


def test_imports_have_no_cycle():
    assert not import_cycle(MODULES)


def test_cycle_is_found():
    a = Module.parse("from . import b", "brainstate.a")
    b = Module.parse("def f():\n    from brainstate.a import x", "brainstate.b")
    assert set(import_cycle([a, b])) == {"brainstate.a", "brainstate.b"}
    assert not import_cycle([a])


def crowded_folders(modules: Iterable[Module]) -> dict[str, int]:
    """Return the folders with more files than one looks through, and how many each has."""
    return {folder: len(names) for folder, names in files(modules).items() if len(names) > FOLDER_FILES}


def tall_folders(modules: Iterable[Module]) -> dict[str, int]:
    """Return the folders in `transform`, itself included, whose parts stand on too many floors, and their number."""
    modules = list(modules)
    graph, inside = (
        import_graph(modules),
        [folder for folder in files(modules) if folder.startswith(f"{PACKAGE}.transform")],
    )
    heights = {folder: floors(rooms(graph, folder)) for folder in inside}
    return {folder: height for folder, height in heights.items() if height > FLOORS}


def test_a_folder_has_few_files():
    assert not crowded_folders(MODULES)


def test_transforms_stand_on_few_floors():
    assert not tall_folders(MODULES)


def test_a_crowded_folder_is_found():
    names = ["brainstate.a", *(f"brainstate.a.m{i}" for i in range(FOLDER_FILES))]
    modules = [Module.parse("", name, is_package=name == "brainstate.a") for name in names]
    assert crowded_folders(modules) == {"brainstate.a": FOLDER_FILES + 1}
    assert not crowded_folders(modules[:-1])


def test_a_tall_folder_is_found():
    def tower(height):
        yield Module.parse("", "brainstate.transform", is_package=True)
        for i in range(height):
            yield Module.parse(f"from .m{i - 1} import x" if i else "", f"brainstate.transform.m{i}")

    assert tall_folders(tower(FLOORS + 1)) == {"brainstate.transform": FLOORS + 1} and not tall_folders(tower(FLOORS))


def test_no_paragraph_stands_twice():
    assert not repeated_paragraphs(MODULES)


def test_repetition_is_found():
    text = f'def f():\n    """First.\n\n    {"word " * 30}\n    """\ndef g():\n    """{"word " * 30}"""'
    assert list(repeated_paragraphs([Module.parse(text, "a")]).values()) == [["a.f", "a.g"]]


# --- namespaces ---------------------------------------------------------------------------------------------

PUBLIC = public_modules()

# Neither exported nor missing from an `__all__`.
PASSING = (types.ModuleType, typing.TypeVar, typing.ParamSpec, type(__future__.annotations))


def public_names(module: types.ModuleType) -> set[str]:
    """Return what a package shows, or what a module defines, without a leading underscore; modules aside."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, PASSING)
        and (hasattr(module, "__path__") or getattr(value, "__module__", None) == module.__name__)
    }


def export_faults(module: types.ModuleType) -> Iterator[str]:
    """`__all__` is exactly what can be imported; in a private module, by the rest of the package."""
    exported = list(module.__all__)
    if len(set(exported)) < len(exported):
        yield "__all__ names something twice"
    yield from (f"{name} is in __all__ and cannot be imported" for name in exported if not hasattr(module, name))
    yield from (f"{name} can be imported and is not in __all__" for name in public_names(module) - set(exported))


def documentation_faults(module: types.ModuleType) -> Iterator[str]:
    """Whatever is exported and can be called has a docstring that begins with a sentence of purpose."""
    for name in module.__all__:
        thing = getattr(module, name)
        purpose = inspect.cleandoc(thing.__doc__ or "").split("\n\n")[0]
        if callable(thing) and not purpose.endswith("."):
            yield f"{name} does not begin with a sentence of purpose: {purpose!r}"


@pytest.mark.parametrize("name", [module.name for module in MODULES])
def test_exports(name):
    module = importlib.import_module(name)
    if name in PUBLIC or hasattr(module, "__all__"):
        faults = list(export_faults(module))
        assert not faults, "\n".join(faults)


@pytest.mark.parametrize("module", PUBLIC.values(), ids=PUBLIC)
def test_exports_are_documented(module):
    faults = list(documentation_faults(module))
    assert not faults, "\n".join(faults)


def test_namespace_rules_can_fail():
    module = types.ModuleType("brainstate.a")
    exec("def f(): ...\ndef g():\n    '''No sentence'''\n__all__ = ['g', 'g', 'h']", vars(module))
    faults = " ".join(export_faults(module))
    assert "twice" in faults and "h is in" in faults and "f can be imported" in faults
    module.__all__ = ["f", "g"]
    assert len(list(documentation_faults(module))) == 2


def documented_names() -> dict[str, list[str]]:
    """Return the names on the API page, by module."""
    sections = re.split(r"^## `(.+)`$", (ROOT / "docs/api.md").read_text(), flags=re.MULTILINE)
    return {
        name: re.findall(r"^- `(\w+)`", body, re.MULTILINE)
        for name, body in zip(sections[1::2], sections[2::2], strict=True)
    }


def test_api_page_lists_the_exports():
    exported = {name: list(module.__all__) for name, module in PUBLIC.items()}
    assert documented_names() == exported, "`make docs` writes the page anew"


# --- importing costs nothing --------------------------------------------------------------------------------


def imported_by(statement: str) -> set[str]:
    """Return the top-level modules that a statement adds to those of JAX, in a new process."""
    program = f"import sys, jax; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_import_loads_no_optional_library():
    assert not imported_by(f"import {PACKAGE}") & FOREIGN


def test_import_of_an_optional_library_is_seen():
    assert imported_by("import tqdm") & FOREIGN == {"tqdm"}
