"""JAX's own tests with our transforms in the place of JAX's: ``make test-jax JAX_REPO=path/to/jax``.

``JAX_REPO`` is a git directory of JAX's repository. Four of its test files are taken at the tag of the installed
release and run twice, each time in a process of their own: as they are, and with `jit`, `grad`, `vmap`, `scan`, ... of
``brainstate.transform`` under the names that the file imports. Nothing of them is kept.

How ours get into a file: what it imports as ``jax`` or ``jax.lax``, or from these, goes through a stand-in, which has
our function where there is one and JAX's own for all else. JAX itself, ``jax.numpy`` and the helpers of the tests are
untouched. Where our signature is another on purpose an adapter (`_adapted`) makes JAX's of it.

Then the two are compared. A test that passes under JAX and not under ours differs in *wording* if an error of the right
type has another text, else in *behaviour*; every test of the second kind is to be named, with the reason, in
``docs/explanation/differences.md``. The exit status says whether that is so.

    python tests/jax_suite.py REPO [--file batching_test] [--only PATTERN] [--verbose]
"""

import argparse
import builtins
import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import types
import unittest
from collections import Counter
from pathlib import Path

FILES = "lax_control_flow_test", "batching_test", "api_test", "custom_api_test"
PAGE = Path(__file__).parents[1] / "docs" / "explanation" / "differences.md"

# ------------------------------------------------------------------------------------------ the stand-ins


def _adapted(jax, transform):
    """Return {JAX's name: ours}, adapted where the signature differs on purpose."""

    def grad(fun, argnums=0, has_aux=False, holomorphic=False, allow_int=False):
        options = {"has_aux": has_aux, "holomorphic": holomorphic, "allow_int": allow_int}
        return transform.grad(fun, argnums=argnums, **options)

    def positions(ours):
        def derivative(fun, argnums=0, has_aux=False, holomorphic=False, **options):
            return ours(fun, argnums=argnums, has_aux=has_aux, holomorphic=holomorphic, **options)

        return derivative

    def vjp(fun, *primals, has_aux=False):
        return transform.vjp(fun, *primals, argnums=tuple(range(len(primals))), has_aux=has_aux)

    def linearize(fun, *primals, has_aux=False):
        out, linear, *aux = transform.linearize(fun, *primals, argnums=tuple(range(len(primals))), has_aux=has_aux)
        return out, lambda *tangents: linear(tangents), *aux

    def jvp(fun, primals, tangents, has_aux=False):
        return transform.jvp(fun, primals, tangents, has_aux=has_aux)

    same = "jit vmap checkpoint remat eval_shape custom_jvp custom_vjp value_and_grad shard_map"
    found = {name: getattr(transform, name) for name in same.split() if hasattr(transform, name)}
    matrices = {name: positions(getattr(transform, name)) for name in ("jacfwd", "jacrev", "jacobian", "hessian")}
    found |= matrices | {"grad": grad, "vjp": vjp, "linearize": linearize, "jvp": jvp}
    return {name: _with_attributes(getattr(jax, name), ours) for name, ours in found.items()}


def _with_attributes(theirs, ours):
    """Give an adapter the name under which it is used; tests are named after it."""
    return functools.update_wrapper(ours, theirs, updated=()) if ours.__module__ == __name__ else ours


def _of_lax(transform):
    names = "scan while_loop fori_loop cond switch map associative_scan"
    return {name: getattr(transform, name) for name in names.split() if hasattr(transform, name)}


class StandIn(types.ModuleType):
    """A module with some of its attributes replaced; what is set on it is set on the module."""

    def __init__(self, module, replaced):
        self.__dict__.update(_module=module, _replaced=replaced, __name__=module.__name__)

    def __getattr__(self, name):
        replaced = self.__dict__["_replaced"]
        return replaced[name] if name in replaced else getattr(self.__dict__["_module"], name)

    def __setattr__(self, name, value):
        setattr(self.__dict__["_module"], name, value)


def _importing():
    """Return an ``__import__`` that gives the stand-ins for jax and jax.lax."""
    import jax

    from brainstate import transform

    lax = StandIn(jax.lax, _of_lax(transform))
    stand_ins = {"jax": StandIn(jax, {**_adapted(jax, transform), "lax": lax}), "jax.lax": lax}

    def importing(name, namespace=None, names=None, fromlist=(), level=0):
        module = builtins.__import__(name, namespace, names, fromlist, level)
        return stand_ins.get(getattr(module, "__name__", None), module)

    return importing


# ------------------------------------------------------------------------------------------ one run


# What assertions about the text of an error say.
_TEXTS = re.compile(r'" does not match "|Exception message does not match|not found in ["\']')


class _Outcomes(unittest.TestResult):
    """{test: "passed", "skipped", or the kind of failure and its last line}."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def _note(self, test, outcome):
        name = test.id().partition(".")[2] if hasattr(test, "test_case") is False else test.test_case.id()
        self.found.setdefault(name, outcome)

    def addSuccess(self, test):
        self._note(test, "passed")

    def addSkip(self, test, reason):
        self._note(test, "skipped")

    def addError(self, test, err):
        self._note(test, f"behaviour: {_said(err)}")

    def addFailure(self, test, err):
        of_text = _TEXTS.search(str(err[1])) or err[1].__context__  # or an assertion where an error was caught
        kind = "wording" if of_text else "behaviour"
        self._note(test, f"{kind}: {_said(err)}")

    def addSubTest(self, test, subtest, err):
        if err is not None:
            (self.addFailure if issubclass(err[0], test.failureException) else self.addError)(test, err)


def _said(err):
    return f"{err[0].__name__}: {' '.join(str(err[1]).split())[:400]}"


def run(path, ours, only, report):
    """Run the tests of a file and write ``{test: outcome}``."""
    sys.argv = [path]  # the test file reads the flags
    module = types.ModuleType(Path(path).stem)
    module.__file__ = path
    sys.modules[module.__name__] = module
    if ours:
        module.__builtins__ = {**vars(builtins), "__import__": _importing()}
    exec(compile(Path(path).read_text(), path, "exec"), vars(module))
    from jax._src import test_util

    loader = test_util.JaxTestLoader()
    tests = [t for suite in loader.loadTestsFromModule(module) for t in suite if re.search(only, t.id())]
    outcomes = _Outcomes()
    for test in tests:
        unittest.TestSuite([test]).run(outcomes)
    Path(report).write_text(json.dumps(outcomes.found))


# ------------------------------------------------------------------------------------------ all runs


def _tag(repo, version):
    """Return the tag of a release, or the nearest that is there."""
    listed = subprocess.run(["git", "-C", repo, "tag", "--list", "jax-v*"], capture_output=True, text=True, check=True)
    tags = [tag for tag in listed.stdout.split() if re.fullmatch(r"jax-v[\d.]+", tag)]

    def numbers(text):
        return [int(n) for n in re.findall(r"\d+", text)]

    wanted = numbers(version)
    return min(tags, key=lambda tag: [abs(a - b) for a, b in zip(numbers(tag), [*wanted, 0, 0, 0], strict=False)])


def _outcomes(path, ours, only):
    report = f"{path}.json"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}  # a cache of programs is counted
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
    leg = [sys.executable, __file__, path, "--run", "ours" if ours else "theirs", "--only", only, "--report", report]
    done = subprocess.run(leg, env=environment, capture_output=True, text=True)
    if not Path(report).exists():
        sys.exit(f"{Path(path).stem} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(Path(report).read_text())


def _names(test):
    """Return the names that a test goes by: without its class and parameters, and without its number."""
    name = re.findall(r"\w+", test)[1]
    return name, re.sub(r"_?\d+$", "", name)


def compare(repo, files, only, verbose):
    """Run the files both ways, print the table, and return the tests that differ and are not explained."""
    version = importlib.metadata.version("jax")
    tag, unexplained = _tag(repo, version), []
    print(f"tests of {tag} under jax {version}", "" if tag == f"jax-v{version}" else "(not the same release)")
    print(f"{'file':24}{'under JAX':>12}{'under ours':>12}{'wording':>10}{'behaviour':>11}")
    page = PAGE.read_text() if PAGE.exists() else ""
    for file in files:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, f"{file}.py")
            text = subprocess.run(
                ["git", "-C", repo, "show", f"{tag}:tests/{file}.py"], capture_output=True, check=True
            )
            Path(path).write_bytes(text.stdout)
            theirs, ours = _outcomes(path, False, only), _outcomes(path, True, only)
        passed = [test for test, outcome in theirs.items() if outcome == "passed"]
        differing = {test: ours.get(test, "not run") for test in passed if ours.get(test) != "passed"}
        kinds = Counter(outcome.partition(":")[0] for outcome in differing.values())
        others = len(differing) - kinds["wording"]
        print(f"{file:24}{len(passed):12}{len(passed) - len(differing):12}{kinds['wording']:10}{others:11}", flush=True)
        for test, outcome in differing.items():
            named = outcome.startswith("wording") or any(f"`{name}`" in page for name in _names(test))
            unexplained += [] if named else [f"{file}.{test}"]
            if verbose or not named:
                print(f"    {test}\n        {outcome}")
    return unexplained


def main():
    """Compare, or in a process started for that, run one file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path", help="a git directory of JAX's repository")
    parser.add_argument("--file", action="append", choices=FILES)
    parser.add_argument("--only", default="", help="a pattern for the names of tests")
    parser.add_argument("--verbose", action="store_true", help="list the tests that are explained as well")
    parser.add_argument("--run", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--report", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run(given.path, given.run == "ours", given.only, given.report)
        return
    unexplained = compare(given.path, given.file or FILES, given.only, given.verbose)
    sys.exit(f"{len(unexplained)} tests differ and are not named in {PAGE.name}" if unexplained else 0)


if __name__ == "__main__":
    main()
