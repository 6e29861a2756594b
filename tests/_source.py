"""The modules of the package as syntax trees, for all that reads the source: formalities, measures, names of JAX."""

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MODULES", "PACKAGE", "ROOT", "SOURCE", "Module", "load", "span"]

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

    @classmethod
    def parse(cls, text: str, name: str, is_package: bool = False) -> "Module":
        return cls(name, is_package, text, ast.parse(text))

    @classmethod
    def load(cls, path: Path, source: Path = SOURCE) -> "Module":
        parts = path.relative_to(source).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        return cls.parse(path.read_text(), ".".join(parts[:-1] if is_package else parts), is_package)

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
