"""``docs/contributing/architecture.md``: its map, its names, and each recipe, carried out in a copy of the repository.

A block after the name of a file is what the recipe does to it: all of a new file, or lines that are added (and some
replaced) beside lines that are there. The generic tests of the copy then find the new thing in their tables.
"""

import importlib
import operator
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

from _source import MODULES, import_graph, rooms

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/contributing/architecture.md").read_text()
BLOCK = re.compile(
    r"(?:^\*\*`(?P<path>[^`]+)`\*\*|^(?P<after>Afterwards:))|^```(?P<kind>py|diff)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass
class Recipe:
    """What is added, the tests that find it by this name, how many at least, and in how many places it is written."""

    title: str
    name: str
    tests: tuple[str, ...]
    cases: int
    places: int

    def blocks(self):
        """Yield ``(path, kind, text)``; what runs afterwards has no path."""
        section = TEXT.split(f"## How to add a {self.title}\n")[1].split("\n## ")[0]
        path = None
        for found in BLOCK.finditer(section):
            if found["kind"]:
                yield path, found["kind"], found["text"]
            else:
                path = found["path"]

    def __str__(self):
        return self.title


TABLE = """
    checked chunks conventions defects errors faults_derivatives faults_jax faults_signatures frozen jit laws loops
    misuse nan never_silent seeds state tap types vmap
"""
RECIPES = [
    Recipe("transform", "mean_grad", tuple(f"tests/test_{name}.py" for name in TABLE.split()), 140, 3),
    Recipe("layer", "Affine", ("tests/test_checked.py", "src/brainstate/nn/_layers.py"), 2, 3),
    Recipe("sampler", "halfnormal", ("tests/test_random.py",), 5, 2),
    Recipe("sparsity rule", "test_pattern_of_each_operation", ("tests/test_sparse.py",), 4, 2),
    Recipe("NaN remedy", "outside_of_igamma", ("tests/test_nan.py",), 1, 2),
]


def changed(text, diff):
    """Return ``text`` after a change whose lines begin as those of a diff do."""
    lines = diff.splitlines()
    before, after = ("".join(f"{line[1:]}\n" for line in lines if line[:1] != sign) for sign in "+-")
    before, after = before.rstrip("\n"), after.rstrip("\n")  # the last line may go on
    assert text.count(before) == 1, f"not there, or not once:\n{before}"
    return text.replace(before, after)


def test_a_change_can_fail():
    assert changed("a = [1, 2]\nb = 3\n", "-a = [1,\n+a = [0, 1,\n") == "a = [0, 1, 2]\nb = 3\n"
    assert changed("a\nb\n", " a\n+c\n") == "a\nc\nb\n"
    for wrong in ("z", "b"):
        with pytest.raises(AssertionError, match="not there, or not once"):
            changed("a\nb\nb\n", f" {wrong}\n+c\n")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return a copy of the repository after all recipes."""
    root = tmp_path_factory.mktemp("recipes") / "copy"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".*", "__pycache__", "dist"))
    for recipe in RECIPES:
        for path, kind, text in recipe.blocks():
            if path:
                file = root / path
                assert file.exists() == (kind == "diff"), path
                file.write_text(changed(file.read_text(), text) if kind == "diff" else text)
    for written in ("_api", "_stubs"):
        run(root, f"docs/{written}.py")
    return root


def run(root, *arguments):
    """Run Python in the copy, on its own package."""
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def cases(copy):
    """Return the cases of the generic tests that are about what was added; they, and the rules of form, have passed."""
    report = copy / "report.xml"
    files = dict.fromkeys(["tests/test_formalities.py", *(file for recipe in RECIPES for file in recipe.tests)])
    wanted = " or ".join(["test_formalities", *(recipe.name for recipe in RECIPES)])
    run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", wanted, f"--junitxml={report}")
    return [case.get("name") for case in ElementTree.parse(report).iter("testcase")]


@pytest.mark.long
@pytest.mark.timeout(900)  # the tests of the copy are part of it
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_recipe(recipe, cases):
    paths = {path.removesuffix("i") for path, _, _ in recipe.blocks() if path}  # a module and its types are one
    assert 0 < len(paths) <= recipe.places
    assert sum(recipe.name in case for case in cases) >= recipe.cases


def test_what_was_added_can_be_used(copy):
    scripts = [[text for path, _, text in recipe.blocks() if path is None] for recipe in RECIPES]
    assert all(scripts)
    run(copy, "-c", "\n".join(text for texts in scripts for text in texts))


# ------------------------------------------------------------------------------------------ the map and the names

FILES = {path.relative_to(ROOT / "src/brainstate") for path in (ROOT / "src/brainstate").rglob("*.py")}


def drawn():
    """Yield the files on the map, with the rooms as their `__init__`."""
    rooms = [Path()]
    for line in TEXT.split("## The map")[1].split("```text\n")[1].split("```")[0].splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        for name in line.strip().split("  ")[0].split():
            del rooms[depth + 1 :]
            if name.endswith("/"):
                rooms.append(rooms[depth] / name)
            yield rooms[-1] / ("__init__.py" if name.endswith("/") else f"{name}.py")


def test_the_map_has_every_file():
    on_map = [*drawn()]
    assert len(on_map) == len(set(on_map))
    assert set(on_map) == FILES - {Path("__init__.py")}


@pytest.mark.parametrize("folder", ["brainstate", "brainstate.transform"])
def test_imports_point_upwards_on_the_map(folder):
    inside = Path(*folder.split(".")[1:])
    files = [path.relative_to(inside) for path in drawn() if path.is_relative_to(inside)]
    places = {path.parts[0].removesuffix(".py"): i for i, path in reversed([*enumerate(files)])}
    for room, imported in rooms(import_graph(MODULES), folder).items():
        below = [name for name in imported if room != "__init__" and places[name] > places[room]]
        assert not below, f"{room} imports {below}"


def test_the_names_exist():
    """``scope.py: Scope.read``, with the folders or without, is a name in that file."""
    found = re.findall(r"`([\w/]+\.py): ([\w.]+)`", TEXT)
    assert len(found) > 20
    for file, name in found:
        (path,) = (path for path in FILES if path.match(file))
        module = importlib.import_module(".".join(["brainstate", *path.with_suffix("").parts]))
        assert operator.attrgetter(name)(module) is not None
