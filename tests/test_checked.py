"""check_grads on the package itself: every public transform and layer, or a reason why there is nothing to check."""

import jax
import jax.numpy as jnp
import pytest

from _unchanged import unchanged
from brainstate import BatchState, ParamState, nn
from brainstate import random as R
from brainstate import transform as T
from brainstate.transform import check_grads
from transforms import ROW, ROWS, rows

PROGRAMS = rows(lambda row: row.program)


@pytest.fixture
def s():
    return ParamState(jnp.array([0.6, -1.2, 0.3]), name="s")


@pytest.mark.parametrize("name", PROGRAMS)
def test_transforms(s, name):
    """Compiled, since each is called two dozen times."""
    row = ROW[name]
    run, options = T.jit(lambda x: row.program(s, x)), row.check
    with unchanged(s, R.DEFAULT):
        check_grads(run, jnp.float32(0.8), grad_states=s, argnums=0, float64=True, **options)


def missing_and_unknown(public, *tables):
    """Return which public names no table has, and which entries are no public names or stand twice."""
    listed = [name for table in tables for name in table]
    return set(public) - set(listed), {name for name in listed if name not in public or listed.count(name) > 1}


def test_every_public_transform_is_checked():
    """It has one row, with a program or the reason why no derivative goes through it."""
    assert missing_and_unknown(T.__all__, [row.name for row in ROWS]) == (set(), set())
    assert not [row for row in ROWS if bool(row.program) == bool(row.no_derivative)]


def test_the_comparison_can_fail():
    assert missing_and_unknown(["a", "b"], {"b": 0, "c": 0}, {"b": 0}) == ({"a"}, {"b", "c"})


# ------------------------------------------------------------------------------------------ layers


class Net(nn.Module):
    """What a layer looks like that is the user's own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), jnp.tanh, nn.Dropout(0.4), nn.Linear(4, 2, b_init=jnp.ones))
        self.mean = BatchState(jnp.zeros(2))

    def update(self, x):
        y = self.layers(x)
        self.mean.value = 0.9 * self.mean.value + 0.1 * y.mean(0)
        return y


LAYERS = {
    "Dropout": lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.4)),
    "Linear": lambda: nn.Linear(3, 4),
    "Module": Net,
    "Sequential": lambda: nn.Sequential(nn.Linear(3, 4), jnp.tanh, nn.Linear(4, 2)),
}


@pytest.mark.parametrize(
    ("name", "compiled", "order"),
    [*((name, False, 1) for name in LAYERS), pytest.param("Module", True, 2, marks=pytest.mark.long)],
)
def test_layers(name, compiled, order):
    layer, x = LAYERS[name](), jnp.sin(jnp.arange(6.0)).reshape(2, 3)
    with unchanged(*layer.states().values(), R.DEFAULT), jax.numpy_dtype_promotion("standard"):
        check_grads(T.jit(layer) if compiled else layer, x, grad_states=layer, argnums=0, order=order, float64=True)


def test_every_public_layer_is_checked():
    assert missing_and_unknown(nn.__all__, LAYERS) == (set(), set())
