"""explain: the cause of each zero gradient, on planted faults and on random programs against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _covering import few
from _unchanged import unchanged
from brainstate import ParamState, State, StateTypeError, StateValueError, nn
from brainstate import random as R
from brainstate import transform as T
from brainstate.transform import Explanation, explain

STOPPED, DISCRETE = "behind stop_gradient", "integer, rounding, comparison or argmax path"


@pytest.fixture
def w():
    return ParamState(jnp.array([0.6, -1.2]), name="w")


def causes(fun, *args, **options):
    return [row.cause for row in explain(fun, *args, **options).rows]


# ------------------------------------------------------------------------------------------ a real network


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.detached = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4)
        self.dead = nn.Linear(4, 4, b_init=lambda shape: jnp.full(shape, -100.0))
        self.head = nn.Linear(4, 2)
        self.unused = nn.Linear(4, 2)
        self.ignored = nn.Linear(4, 2)
        self.gate = nn.Linear(4, 1)

    def update(self, x):
        h = jnp.tanh(self.body(x))
        a = jax.lax.stop_gradient(self.detached(h))
        b = T.stop_gradient(self.frozen)(h)
        c = jax.nn.relu(self.dead(h))
        self.ignored(h)
        return self.head(h + a + b + c) * jnp.where(self.gate(h) > 0, 1.0, 0.5)


EXPECTED = {
    "body": "",
    "head": "",
    "detached": STOPPED,
    "frozen": STOPPED,
    "dead": "dead units",
    "unused": "never read",
    "ignored": "used, but the result does not depend on it",
    "gate": DISCRETE,
}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_network_with_planted_faults(compiled):
    R.seed(0)
    net, x = Net(), jnp.sin(jnp.arange(6.0)).reshape(2, 3)
    run = T.jit(net) if compiled else net
    with unchanged(*net.states().values(), R.DEFAULT):
        report = explain(lambda x: (run(x) ** 2).sum(), x, grad_states=net)
    assert len(report.rows) == len(net.states())
    for row in report.rows:
        layer = next(name for name in EXPECTED if f"'{name}'" in row.name)
        assert row.cause.startswith(EXPECTED[layer]) and bool(row.cause) == bool(EXPECTED[layer]), row
        assert (row.norm == 0) == bool(row.cause) and (row.zeros == 1) == bool(row.cause)
        assert row.read == (layer != "unused") and not row.written


# ------------------------------------------------------------------------------------------ each cause


def overwritten(w):
    def fun(x):
        w.value = x
        return (w.value**2).sum()

    return fun


CASES = {
    "smooth": (lambda w: lambda x: (w.value * x).sum(), ""),
    "never": (lambda w: lambda x: (x**2).sum(), "never read"),
    "overwritten": (overwritten, "read but overwritten first"),
    "aside": (lambda w: lambda x: (jnp.sin(w.value), (x**2).sum())[1], "used, but"),
    "stopped": (lambda w: lambda x: (jax.lax.stop_gradient(w.value) * x).sum(), STOPPED),
    "stopped_outside": (lambda w: lambda x: T.stop_gradient(lambda: (w.value * x).sum())() + x.sum(), STOPPED),
    "rounded": (lambda w: lambda x: (jnp.round(w.value) * x).sum(), DISCRETE),
    "compared": (lambda w: lambda x: jnp.where(w.value > 0, x, 2 * x).sum(), DISCRETE),
    "argmax": (lambda w: lambda x: x[jnp.argmax(w.value)], DISCRETE),
    "integer": (lambda w: lambda x: (w.value.astype(int).astype(x.dtype) * x).sum(), DISCRETE),
    "branch": (lambda w: lambda x: T.cond(w.value[0] > 0, lambda: x.sum(), lambda: (x**2).sum()), DISCRETE),
    "rounds": (
        lambda w: (
            lambda x: T.while_loop(lambda c: c[0] < w.value[0], lambda c: (c[0] + 1, c[1] * x[0]), (0.0, x[1]))[1]
        ),
        DISCRETE,
    ),
    "relu": (lambda w: lambda x: jax.nn.relu(w.value - 50).sum() + x.sum(), "dead units"),
    "clip": (lambda w: lambda x: (jnp.clip(w.value, 5, 6) * x).sum(), "dead units"),
    "where": (lambda w: lambda x: jnp.where(x > 100, w.value, x).sum(), "dead units"),
    "here": (lambda w: lambda x: ((w.value - jnp.array([0.6, -1.2])) ** 2 * x).sum(), "only numerically zero here"),
    "in_scan": (lambda w: lambda x: T.scan(lambda c, k: (c + jnp.round(w.value[0]) * k, None), x[0], x)[0], DISCRETE),
    "carried": (
        lambda w: (
            lambda x: jax.lax.scan(lambda c, _: ((c[1], c[2], c[2]), None), (x[0], x[1], w.value[0]), length=3)[0][0]
        ),
        "",
    ),
    "in_checkpoint": (lambda w: lambda x: T.checkpoint(lambda x: (jnp.floor(w.value) * x).sum())(x), DISCRETE),
    "in_vmap": (lambda w: lambda x: T.vmap(lambda y: jnp.sign(w.value[0]) * y)(x).sum(), DISCRETE),
    "unused_carry": (
        lambda w: lambda x: jax.lax.scan(lambda c, k: ((c[0] + k, c[1] * 2), None), (x[0], w.value), x)[0][0],
        "used, but",
    ),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_each_cause(w, case, compiled):
    make, cause = CASES[case]
    fun = T.jit(make(w)) if compiled else make(w)
    with unchanged(w):
        (row,) = explain(fun, jnp.array([1.5, 0.7]), grad_states=w).rows
    assert row.cause.startswith(cause) and bool(row.cause) == bool(cause)
    assert row.written == (case == "overwritten")


def test_the_numbers(w):
    s = State({"a": jnp.array([3.0, 4.0]), "n": 3}, name="s")
    report = explain(
        lambda x: (s.value["a"][0] * x).sum() + jnp.log(w.value * 0).sum(), 2.0, grad_states=[s, w], argnums=0
    )
    row = report["'s'"]
    assert (row.norm, row.zeros, row.nonfinite, row.cause) == (2.0, 0.5, 0, "")
    np.testing.assert_allclose(row.relative, 0.4)
    assert "['a']" in row.name
    assert report["argument 0"].norm == 3.0
    assert report["'w'"].nonfinite == 2 and report["'w'"].cause == ""


def test_vector_valued_functions_do_not_cancel(w):
    assert causes(lambda: jax.nn.softmax(w.value), grad_states=w) == [""]


def test_arguments_alone():
    report = explain(lambda x, n: jnp.floor(x["a"]) * x["b"] * n, {"a": 1.5, "b": jnp.ones(2)}, 3)
    assert [row.cause for row in report.rows] == [DISCRETE, ""]
    assert [row.name for row in report.rows] == ["argument 0['a']", "argument 0['b']"]


def test_states_are_written_and_noise_drawn_without_a_trace(w):
    count = State(jnp.int32(0), name="count")

    def fun():
        count.value += 1
        w.value = w.value + R.normal(size=2)
        return (w.value**2).sum()

    with unchanged(w, count, R.DEFAULT):
        (row,) = explain(fun, grad_states=w).rows
    assert row.read and row.written and row.cause == ""
    with unchanged(w), pytest.raises(KeyError):
        explain(lambda: {}["missing"], grad_states=w)


# ------------------------------------------------------------------------------------------ against brute force

UNARY = {
    "sin": jnp.sin,
    "stop": jax.lax.stop_gradient,
    "round": lambda x: jnp.round(3 * x),
    "sign": lambda x: jnp.where(x > 0, 1.0, -1.0),
    "remat": jax.checkpoint(lambda x: jnp.cos(x) * 2),
    "scan": lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c) + x, None), x, length=2)[0],
    "jit": jax.jit(lambda x: x * 3),
}


def random_program(seed):
    """Return a function of a list of five numbers: random operations on randomly chosen results so far."""
    rng = np.random.default_rng(seed)
    names = list(UNARY)
    plan = [(names[rng.integers(len(names))], *rng.integers(0, 5 + i, 2)) for i in range(7)]

    def program(inputs):
        values = list(inputs)
        for name, i, j in plan:
            values.append(UNARY[name](values[i]) * (values[j] + 1.7) if name != "stop" else UNARY[name](values[i]))
        return values[-1] + 0.3 * values[-2]

    return program


@pytest.mark.parametrize("seed", few(range(16), 2))
def test_verdicts_against_brute_force(seed):
    """Gradients at random points, and finite changes of one value at a time."""
    program = random_program(seed)
    states = [
        ParamState(jnp.float32(v), name=f"s{i}") for i, v in enumerate(np.random.default_rng(seed).normal(size=5))
    ]
    rows = explain(lambda: program([s.value for s in states]), grad_states=states).rows
    points = np.random.default_rng(1).normal(size=(400, 5)).astype(np.float32)
    values, slopes = jax.vmap(jax.value_and_grad(program))(points)
    for i, row in enumerate(rows):
        assert bool(row.cause) == (not slopes[:4, i].any()), row
        moved = points.copy()
        moved[:, i] = points[::-1, i]
        changes = bool((jax.vmap(program)(moved) != values).any())
        assert changes == (row.cause in ("", STOPPED, DISCRETE)), row


# ------------------------------------------------------------------------------------------ how it looks, misuse


def test_table_and_html(w):
    odd = ParamState(jnp.float32(1), name="<b>")
    report = explain(lambda: jnp.round(odd.value) * w.value.sum(), grad_states=[w, odd])
    assert isinstance(report, Explanation)
    lines = str(report).splitlines()
    assert len(lines) == 3 and lines[0].startswith("with respect to") and lines[2].endswith(DISCRETE)
    page = report._repr_html_()
    assert page.count("<tr>") == 3 and "&lt;b&gt;" in page and "<b>" not in page


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: explain(lambda n: n, 1), StateValueError, "explain: no argument is of a floating"),
        (lambda: explain(3, 1.0), StateTypeError, "explain differentiates a function"),
        (lambda: explain(lambda x: x, 1.0, argnums=2), StateTypeError, "selects argument 2"),
        (lambda: explain(lambda x: x, 1.0, grad_states=[]), StateValueError, "selects no State"),
        (lambda: explain(lambda x: 3, 1.0), StateTypeError, "nothing of a floating"),
        (lambda: T.jit(lambda x: explain(lambda y: y, x).rows[0].norm)(1.0), StateTypeError, "call it outside"),
    ],
)
def test_misuse(call, error, match):
    with pytest.raises(error, match=match):
        call()
