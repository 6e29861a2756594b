"""The examples run, reach what they promise, and stay short."""

import importlib.util
import math
import types
from pathlib import Path

import pytest

import brainstate

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
LINES = 120
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def hostile():
    """Examples run under JAX's defaults, as a user runs them: Optax promotes dtypes."""


def load(name: str) -> types.ModuleType:
    """Import an example by the name of its file."""
    path = next(path for path in EXAMPLES if path.stem == name)
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_is_short(path):
    assert len(path.read_text().splitlines()) <= LINES


def test_digits(tmp_path, capsys):
    with brainstate.random.seed_context(0):  # the example seeds the default generator
        accuracy, norms = load("digits").main(epochs=5, folder=tmp_path / "demo")
    assert accuracy > 0.93
    assert sorted(norms) == [(layer, kind) for layer in ("hidden", "output") for kind in ("bias", "weight")]
    assert all(math.isfinite(norm) and norm > 0 for norm in norms.values())
    picture = tmp_path / "demo" / "digits.png"
    assert picture.read_bytes().startswith(PNG)
    printed = capsys.readouterr().out
    assert f"{accuracy:.4f}" in printed and str(picture) in printed
    for path, norm in norms.items():
        assert ".".join(path) in printed and f"{norm:.4f}" in printed


def test_digits_is_reproducible_and_draws_a_single_epoch(tmp_path):
    digits = load("digits")
    with brainstate.random.seed_context(0):
        once = digits.main(epochs=1, folder=tmp_path)
        brainstate.random.normal()
        again = digits.main(epochs=1, folder=tmp_path)
    assert once == again


@pytest.mark.long
def test_newton_needs_fewer_steps_than_adam(capsys):
    with brainstate.random.seed_context(0):  # the example seeds the default generator
        newton, adam = load("newton_cg").main()
    assert newton <= 20 and 5 * newton < adam
    printed = capsys.readouterr().out
    assert f"newton  {newton:>5} steps" in printed and f"adam    {adam:>5} steps" in printed
