"""The house in numbers: ``make measure``, one column for each source folder given (``ARGS='../before/src src'``).

Each measure is a function of the modules of the package; its docstring says how it counts. They are thermometers: a
better number is a reason to look, not an aim.
"""

import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from _jax_names import dead_primitives, primitives_named
from _source import SOURCE, Module, files, floors, import_graph, load, rooms, span

__all__ = ["MEASURES", "table"]

Modules = Sequence[Module]

# Words that stand alone as the name of a function: participles that do not end in -ed or -ing, prepositions, adverbs.
PARTICIPLES = """
    begun bound built caught chosen dealt done drawn fed felt found given gone grown heard held kept known
    laid led left lent lost made meant met paid said seen sent set shown spent sunk taken taught told thought torn
    understood woven written
"""
SMALL_WORDS = """
    about above across afresh after again against ahead along among anew apart around as aside at away
    back before behind below beneath beside besides between beyond by despite directly down during elsewhere except
    for from here in inside into like near nearby of off on once onto out outside over past per since than then
    through to together toward under until up upon via with within without
"""
NOT_PARTICIPLES = "seed feed need speed embed string ring thing nothing something everything"


# ------------------------------------------------------------------------------------------ lines


def code_lines(modules: Modules) -> str:
    """Count lines without docstrings, comments and blanks, and those of types aside; and files."""
    types = type_lines(modules)
    lines = sum(len(module.code_lines() - overload_lines(module)) for module in modules)
    return f"{lines:,}{f' + {types:,} of types' if types else ''} · {len(modules)}"


def type_lines(modules: Modules) -> int:
    """Count the lines of overloads, and of files that hold nothing but types."""
    stubs = sum(len(module.stub.code_lines()) for module in modules if module.stub)
    return stubs + sum(len(overload_lines(module)) for module in modules)


def overload_lines(module: Module) -> set[int]:
    """Return the lines of code of functions that are declared with ``@overload``."""
    lines: set[int] = set()
    for _, function in module.functions():
        if any(ast.unparse(each).rpartition(".")[2] == "overload" for each in function.decorator_list):
            lines.update(span(function), *map(span, function.decorator_list))
    return lines & module.code_lines() if lines else lines


def comments(modules: Modules) -> str:
    """Count lines that hold nothing but a comment, by lines of code."""
    count = 0
    for module in modules:
        lines = module.text.splitlines()
        for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
            count += token.type == tokenize.COMMENT and lines[token.start[0] - 1].lstrip().startswith("#")
    return f"{100 * count / sum(len(module.code_lines()) for module in modules):.1f} %"


def longest_file(modules: Modules) -> str:
    """Count the lines of code in each file."""
    return _largest((len(module.code_lines()), module.name) for module in modules)


def longest_body(modules: Modules) -> str:
    """Count the lines of code in the body of each function."""
    sizes = []
    for module in modules:
        code = module.code_lines()
        for name, function in module.functions():
            sizes.append((len({line for statement in function.body for line in span(statement)} & code), name))
    return _largest(sizes)


def _largest(sizes) -> str:
    size, name = max(sizes, key=lambda pair: pair[0], default=(0, ""))
    return f"{size} (`{name.partition('.')[2]}`)"


# ------------------------------------------------------------------------------------------ folders and imports


def widest_folder(modules: Modules) -> str:
    """Count the files of each folder."""
    return _largest((len(names), f"{folder}.") for folder, names in files(modules).items())


def imports(folder: str) -> Callable[[Modules], str]:
    """Return the measure of a folder: its parts (modules, folders, `__init__`), their floors, and their imports."""

    def measure(modules: Modules) -> str:
        if folder not in files(modules):
            return "none"
        return _size(rooms(import_graph(modules), folder))

    return measure


def all_imports(modules: Modules) -> str:
    """Count modules, their floors, and imports between them."""
    return _size(import_graph(modules))


def _size(graph) -> str:
    return f"{len(graph)} · {floors(graph)} · {sum(map(len, graph.values()))}"


# ------------------------------------------------------------------------------------------ words


def prose(docstring: str) -> str:
    """Return a docstring without its examples and without code in backticks."""
    blocks = (block.partition(">>>")[0] for block in re.split(r"\n\s*\n", docstring))
    return re.sub(r"``[^`]*``|`[^`]*`", " ", "\n\n".join(blocks))


def free_what(modules: Modules) -> str:
    """Count "what" in docstrings, unless in a question, in 1,000 words; examples and code in backticks left out."""
    texts = [prose(str(text.value)) for module in modules for _, text in module.docstrings()]
    words = sum(len(re.findall("[A-Za-z]+", text)) for text in texts)
    whats = sum(len(re.findall(r"\bwhat\b(?![^.!?;:]*\?)", text, re.IGNORECASE)) for text in texts)
    return f"{1000 * whats / max(words, 1):.1f}"


def is_lone_word(name: str) -> bool:
    """Tell whether a function's name, underscores aside, is one participle, preposition or adverb."""
    word = name.strip("_")
    ending = re.fullmatch("[a-z]+ed|[a-z]{2,}ing", word) and word not in NOT_PARTICIPLES.split()
    return bool(ending) or word in PARTICIPLES.split() or word in SMALL_WORDS.split()


def lone_names(modules: Modules) -> str:
    """Count functions, nested ones and methods included and special methods not, whose name `is_lone_word`."""
    names = [function.name for module in modules for _, function in module.functions()]
    names = [name for name in names if not re.fullmatch("__.*__", name)]
    return f"{100 * sum(map(is_lone_word, names)) / max(len(names), 1):.1f} %"


# ------------------------------------------------------------------------------------------ what stands twice


def repeated_names(modules: Modules) -> str:
    """Count names that two or more modules define at their top level."""
    return str(len(definitions_of_several(modules)))


def definitions_of_several(modules: Modules) -> dict[str, list[str]]:
    """Return them with the modules; names with two underscores aside."""
    places = defaultdict(set)
    for module in modules:
        for node in module.tree.body:
            for name in _defined(node):
                places[name].add(module.name)
    return {name: sorted(where) for name, where in places.items() if len(where) > 1 and not name.startswith("__")}


def _defined(node: ast.stmt) -> Iterator[str]:
    match node:
        case ast.FunctionDef(name) | ast.AsyncFunctionDef(name) | ast.ClassDef(name) | ast.AnnAssign(ast.Name(name)):
            yield name
        case ast.Assign(targets):
            yield from (each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name))


def counts_by_hand(modules: Modules) -> str:
    """Count conditions of the form ``type(n) is not int or n < 1``, with any number."""
    found = 0
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
                parts = [ast.unparse(value) for value in node.values]
                whole = any(re.fullmatch(r"type\(.*\) is not int", part) for part in parts)
                found += whole and any(re.fullmatch(r"\S+ <=? -?\d+", part) for part in parts)
    return str(found)


def control_flow_readers(modules: Modules) -> str:
    """Count modules that look for the primitives of control flow by name: ``scan`` or ``while``."""
    named = primitives_named(modules)
    return str(len({place for name in ("scan", "while") if name in named for place in named[name][1]}))


def dead_names(modules: Modules) -> str:
    """Count names of primitives that no supported JAX has."""
    return f"{len(dead_primitives(modules))} of {len(primitives_named(modules))}"


# ------------------------------------------------------------------------------------------ types


def untyped(modules: Modules) -> str:
    """Count public functions of `transform` that return `Any` or do not say, in all of their overloads."""
    (package,) = (module for module in modules if module.name == "brainstate.transform")
    (names,) = (
        ast.literal_eval(node.value)
        for node in package.tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    typed = _returned([package.stub] if package.stub else [])
    defined = _returned(module for module in modules if module.name.startswith("brainstate.transform"))
    kinds = [typed.get(name, defined[name]) for name in names if name in defined]
    return f"{sum(each == {'Any'} for each in kinds)} of {len(kinds)}"


def _returned(modules: Iterable[Module]) -> dict[str, set[str]]:
    """Return what the functions at the top level of modules return, as it is written there."""
    found = defaultdict(set)
    for module in modules:
        for node in module.tree.body:
            if isinstance(node, ast.FunctionDef):
                found[node.name].add(ast.unparse(node.returns) if node.returns else "Any")
    return dict(found)


# ------------------------------------------------------------------------------------------ the table

MEASURES: dict[str, Callable[[Modules], str]] = {
    "code lines · files": code_lines,
    "longest file, code lines": longest_file,
    "longest body, code lines": longest_body,
    "full-line comments, of code lines": comments,
    "widest folder, files": widest_folder,
    "modules · floors · imports, in all": all_imports,
    'free "what" in 1,000 words of docstring': free_what,
    "function names that are one participle, preposition or adverb": lone_names,
    "names defined in two or more modules": repeated_names,
    'checks of "an int from 1 up" by hand': counts_by_hand,
    "modules that know JAX's control flow": control_flow_readers,
    "names of primitives that no supported JAX has": dead_names,
    "public functions of `transform` that return `Any`": untyped,
}


def table(columns: dict[str, Modules]) -> str:
    """Return a table of Markdown, with a column for each name in ``columns``: the measures, then one row a folder."""
    folders = dict.fromkeys(folder for modules in columns.values() for folder in sorted(files(modules)))
    each = {f"parts · floors · imports in `{folder}`": imports(folder) for folder in folders}
    lines = [["", *columns], ["---", *["---"] * len(columns)]]
    lines += [[name, *map(measure, columns.values())] for name, measure in (MEASURES | each).items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    print(table({folder: load(Path(folder)) for folder in sys.argv[1:]} or {"now": load(SOURCE)}))
