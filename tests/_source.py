"""The modules of the package as syntax trees, for all that reads the source: formalities, measures, names of JAX."""

import ast
import io
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

__all__ = ["MODULES", "PACKAGE", "ROOT", "SOURCE", "Module", "files", "floors", "import_graph", "load", "rooms", "span"]

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
PACKAGE = "brainstate"


@dataclass(frozen=True)
class Module:
    """The source of one module and its syntax tree."""

    name: str
    is_package: bool
    text: str
    tree: ast.Module
    stub: "Module | None" = None  # the types that are written in a file of their own

    @classmethod
    def parse(cls, text: str, name: str, is_package: bool = False, stub: str | None = None) -> "Module":
        types = None if stub is None else cls.parse(stub, name, is_package)
        return cls(name, is_package, text, ast.parse(text), types)

    @classmethod
    def load(cls, path: Path, source: Path = SOURCE) -> "Module":
        parts = path.relative_to(source).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        stub = path.with_suffix(".pyi")
        types = stub.read_text() if stub.exists() else None
        return cls.parse(path.read_text(), ".".join(parts[:-1] if is_package else parts), is_package, types)

    def functions(self) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        """Every function with its qualified name, nested ones and methods included."""
        pending: list[tuple[str, ast.AST]] = [(self.name, self.tree)]
        while pending:
            prefix, parent = pending.pop()
            for node in ast.iter_child_nodes(parent):
                scope = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                name = f"{prefix}.{node.name}" if scope else prefix
                if scope and not isinstance(node, ast.ClassDef):
                    yield name, node
                pending.append((name, node))

    def imports(self, within: ast.AST | None = None) -> Iterator[tuple[int, str]]:
        """Line and absolute dotted name of all that is imported; of `from a import b`, it is `a.b`."""
        for node in ast.walk(within or self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                parts = self.name.split(".")
                parents = parts[: len(parts) - node.level + self.is_package] if node.level else []
                base = ".".join([*parents, *filter(None, [node.module])])
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)

    def docstrings(self) -> Iterator[tuple[ast.AST, ast.Constant]]:
        """Every docstring with what it documents."""
        for node in ast.walk(self.tree):
            match node:
                case (
                    ast.Module(body=[ast.Expr(ast.Constant(str()) as text), *_])
                    | ast.ClassDef(body=[ast.Expr(ast.Constant(str()) as text), *_])
                    | ast.FunctionDef(body=[ast.Expr(ast.Constant(str()) as text), *_])
                    | ast.AsyncFunctionDef(body=[ast.Expr(ast.Constant(str()) as text), *_])
                ):
                    yield node, text

    def code_lines(self) -> set[int]:
        """The numbers of the lines that hold code: no docstrings, comments, blanks."""
        silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in silent and token.string:
                lines.update(range(token.start[0], token.end[0] + 1))
        for _, text in self.docstrings():
            lines.difference_update(span(text))
        return lines


def span(node: ast.stmt | ast.expr) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def load(source: Path = SOURCE) -> list[Module]:
    """Return all modules of the package below ``source``."""
    return [Module.load(path, source) for path in sorted((source / PACKAGE).rglob("*.py"))]


MODULES = load()


# ------------------------------------------------------------------------------------------ folders and imports

Graph = dict[str, set[str]]


def files(modules: Iterable[Module]) -> Graph:
    """Return the modules in each folder, its ``__init__`` included."""
    found = defaultdict(set)
    for module in modules:
        found[module.name if module.is_package else module.name.rpartition(".")[0]].add(module.name)
    return dict(found)


def import_graph(modules: Iterable[Module]) -> Graph:
    """Return which modules each module imports."""
    known = {module.name: module for module in modules}

    def imported(module):
        targets = (target if target in known else target.rpartition(".")[0] for _, target in module.imports())
        return {target for target in targets if target in known} - {module.name}

    return {name: imported(module) for name, module in known.items()}


def rooms(graph: Graph, folder: str) -> Graph:
    """Return the imports between the parts of a folder: its modules, its folders, and its ``__init__``."""

    def room(name):
        inside = name == folder or name.startswith(f"{folder}.")
        return (name[len(folder) + 1 :].partition(".")[0] or "__init__") if inside else None

    found: Graph = defaultdict(set)
    for name, targets in graph.items():
        if (own := room(name)) is not None:
            found[own] |= {target for target in map(room, targets) if target is not None} - {own, "__init__"}
    return dict(found)


def floors(graph: Graph) -> int:
    """Return the length of the longest way along imports."""
    level: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        level[name] = 1 + max((level[target] for target in graph.get(name, ())), default=0)
    return max(level.values(), default=0)
