"""debug_nan: programs with a planted first NaN, whose line, pass, operation and reach must be found.

The line is the one that ends in ``# <- here`` in the source of the program.
"""

import gc
import inspect
import os
import pickle
import subprocess
import sys
import traceback
import weakref
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _unchanged import unchanged
from brainstate import BrainStateError, NonFiniteError, ParamState, State, nn
from brainstate import random as R
from brainstate import transform as T
from brainstate.transform._nonfinite import advice
from transforms import ROW

# ------------------------------------------------------------------------------------------ states

w = ParamState(jnp.array([0.0, 1.0, 4.0]), name="w")
b = ParamState(jnp.array(2.0), name="b")
neg = ParamState(jnp.array([1.0, -1.0]), name="neg")
tree = ParamState({"u": jnp.array(3.0), "v": jnp.array(-1.0), "n": 2}, name="tree")
hot = State(jnp.array([1.0, 1.0]), name="hot")
seen = State(jnp.array(0.0), name="seen")

STATES = (w, b, neg, tree, hot, seen)
VALUES = [state.value for state in STATES]


def as_at_the_start():
    """Undo what a test has written."""
    for state, value in zip(STATES, VALUES, strict=True):
        state.value = value


@pytest.fixture(autouse=True)
def anew():
    as_at_the_start()


# ------------------------------------------------------------------------------------------ planted programs


def log_of_negative():
    x = neg.value * 2.0
    y = jnp.log(x)  # <- here
    return (y * b.value).sum()


def log_of_zero():
    return (jnp.log(w.value)).sum()  # <- here


def zero_by_zero():
    x = w.value - w.value
    y = x / (w.value * 0.0)  # <- here
    return y.sum() + b.value


def division_by_zero():
    y = b.value / w.value  # <- here
    return y.sum()


def root_of_negative():
    y = jnp.sqrt(neg.value)  # <- here
    return y[1] * b.value


def root_at_zero():
    y = jnp.sqrt(w.value)  # <- here
    return y.sum() * b.value


def power_at_zero():
    y = w.value**0.5  # <- here
    return y.sum()


def overflow():
    x = w.value * 100.0
    p = jnp.exp(x)  # <- here
    return (p / p.sum())[0]


def overflow_in_half():
    x = (w.value * 3.0).astype(jnp.float16)
    p = jnp.exp(x)  # <- here
    return p.sum().astype(jnp.float32)


def overflow_that_cancels():
    x = b.value * 1e30
    y = x * x  # <- here
    return y - y


def norm_at_zero():
    x = w.value * 0.0
    n = jnp.linalg.norm(x)  # <- here
    return n + b.value


def norm_by_hand():
    x = w.value * 0.0
    n = jnp.sqrt((x**2).sum())  # <- here
    return n + b.value


def where_trap_log():
    x = w.value
    y = jnp.where(x > 0, jnp.log(x), 0.0)  # <- here
    return y.sum()


def where_trap_root():
    x = w.value
    safe = x > 0
    y = jnp.sqrt(x)  # <- here
    z = jnp.where(safe, y, 0.0)
    return z.sum() * b.value


def where_trap_exp():
    x = w.value * 100.0
    y = jnp.exp(x)  # <- here
    return jnp.where(x < 10.0, y, 1.0).sum()


def where_trap_division():
    x = w.value
    y = 1.0 / x  # <- here
    return jnp.where(x > 0, y, 0.0).sum()


def masked_nan_besides():
    harmless = jnp.where(jnp.array([True, False]), neg.value, 0.0)
    other = jnp.log(-jnp.abs(jax.lax.stop_gradient(neg.value)))
    y = jnp.log(neg.value)  # <- here
    both = jnp.concatenate([other, y])
    return both[2:].sum() + harmless.sum()


def inside_scan():
    def body(c, x):
        d = c - x
        y = jnp.log(d)  # <- here
        return d, y

    return jax.lax.scan(body, b.value, jnp.array([0.5, 0.5, 2.0, 0.1]))[1].sum()


def inside_for_loop():
    def body(x):
        seen.value = seen.value + x
        y = jnp.sqrt(seen.value * b.value)  # <- here
        return y

    return T.for_loop(body, jnp.array([1.0, 1.0, -3.0, 1.0])).sum()


def backward_in_scan():
    def body(c, x):
        y = c * jnp.sqrt(b.value - x)  # <- here
        return y, None

    return T.scan(body, b.value, jnp.array([0.5, 1.0, 2.0]))[0]


def inside_while():
    def body(carry):
        i, x = carry
        return i + 1, jnp.log(x)  # <- here

    return jax.lax.while_loop(lambda c: c[0] < 3, body, (0, b.value))[1]


def inside_fori():
    return jax.lax.fori_loop(0, 3, lambda i, x: jnp.log(x), b.value)  # <- here


def inside_cond():
    return T.cond(
        b.value > 0,
        lambda x: jnp.log(-x),  # <- here
        lambda x: jnp.log(x),
        b.value,
    )


def inside_switch():
    branches = [
        lambda x: jnp.log(-x),
        lambda x: x,
        lambda x: jnp.arcsin(x),  # <- here
    ]
    return jax.lax.switch(2, branches, b.value)


def inside_vmap():
    def one(x):
        return jnp.log(x * b.value)  # <- here

    return jax.vmap(one)(neg.value).sum()


def inside_our_vmap():
    def one(x):
        y = x * b.value
        return jnp.sqrt(y)  # <- here

    return T.vmap(one)(neg.value).sum()


@jax.jit
def _compiled(x):
    y = x - 1.0
    return jnp.log(y)  # <- here


def inside_jit():
    x = b.value * 0.0
    return _compiled(x)


inside_jit.lines_of = _compiled  # pyright: ignore[reportFunctionMemberAccess]


def second_call_of_jit():
    first = _rooted(b.value)
    return _rooted(first - 5.0)


@T.jit
def _rooted(x):
    return jnp.sqrt(x * b.value)  # <- here


second_call_of_jit.lines_of = _rooted  # pyright: ignore[reportFunctionMemberAccess]


def second_call_of_library():
    first = jnp.linalg.norm(w.value)
    x = w.value * 0.0
    second = jnp.linalg.norm(x)  # <- here
    return first + second


def inside_remat():
    def block(x):
        y = x - 5.0
        return jnp.log(y)  # <- here

    return T.checkpoint(block)(b.value)


def scan_in_remat():
    def body(c, _):
        y = jnp.log(c)  # <- here
        return y, None

    return jax.checkpoint(lambda x: jax.lax.scan(body, x, None, length=4)[0])(b.value)


def backward_of_remat():
    return jax.checkpoint(lambda x: jnp.sqrt(x - 2.0))(b.value)  # <- here


def scan_in_cond_in_scan():
    def inner(c, x):
        return c, jnp.log(c - x)  # <- here

    def outer(c, x):
        y = jax.lax.cond(x > 0, lambda: jax.lax.scan(inner, c, jnp.arange(4.0))[1].sum(), lambda: c)
        return c, y

    return jax.lax.scan(outer, b.value + 0.5, jnp.array([-1.0, 1.0]))[1].sum()


@jax.custom_vjp
def _halved(x):
    return x / 2.0


def _halved_backward(_, g):
    return (g * jnp.log(-jnp.abs(g)),)


_halved.defvjp(lambda x: (_halved(x), None), _halved_backward)


def backward_rule():
    return _halved(b.value)  # <- here


@jax.custom_jvp
def _kept(x):
    return x * 2.0


@_kept.defjvp
def _kept_forward(primals, tangents):
    return _kept(primals[0]), tangents[0] / (primals[0] - 2.0)  # <- here


def forward_rule():
    return _kept(b.value)


forward_rule.lines_of = _kept_forward  # pyright: ignore[reportFunctionMemberAccess]


def masked_rows():
    scores = jnp.outer(hot.value, neg.value) * b.value
    mask = jnp.array([[True, False], [False, False]])
    scores = jnp.where(mask, scores, -jnp.inf)
    shifted = scores - scores.max(axis=1, keepdims=True)  # <- here
    return jnp.exp(shifted).sum()


def fraction_of_powers():
    x = tree.value["v"]
    y = x ** (1.0 / 3.0)  # <- here
    return y * tree.value["u"]


def matrix_product():
    x = jnp.full((2, 2), 1e30) * b.value
    y = x @ x  # <- here
    return y.sum()


def standard_deviation():
    x = w.value * 0.0
    s = jnp.std(x)  # <- here
    return s


def rounding_below_zero():
    x = b.value * jnp.ones(4)
    variance = (x**2).mean() - x.mean() ** 2 - 1e-4
    return jnp.sqrt(variance)  # <- here


def complex_numbers():
    z = jax.lax.complex(b.value, b.value) * 0.0
    y = jnp.log(z)  # <- here
    return jnp.real(y) * b.value


def atan_at_origin():
    x = b.value * 0.0
    y = jnp.arctan2(x, x)  # <- here
    return y


def pole_of_gamma():
    y = jax.lax.lgamma(b.value - 2.0)  # <- here
    return y


def pole_of_derivative():
    y = jax.lax.polygamma(1.0, b.value - 3.0)  # <- here
    return y


@dataclass
class Row:
    """A program, and what is to be said about it; None where it does not matter."""

    fun: Any
    phase: str
    primitive: str | None
    reached: tuple[str, ...]
    says: tuple[str, ...] = ()
    iteration: int | None = None
    branch: int | None = None
    kind: str | None = None
    states: Any = field(default_factory=lambda: {"w": w, "b": b, "neg": neg, "tree": tree})

    @property
    def line(self) -> int:
        """The line of the mark."""
        return marked(getattr(self.fun, "lines_of", self.fun))


def marked(fun) -> int:
    lines, first = inspect.getsourcelines(inspect.unwrap(fun))
    (number,) = (i for i, text in enumerate(lines) if text.rstrip().endswith("# <- here"))
    return first + number


ROWS = [
    Row(log_of_negative, "forward", "log", ("b",), ("logarithm of a negative", "float32[2]: -2 .. 2"), kind="NaN"),
    Row(log_of_zero, "forward", "log", ("w",), ("logarithm of zero",), kind="Inf"),
    Row(zero_by_zero, "forward", "div", ("w",), ("zero divided by zero", "jnp.where(y == 0, 1.0, y)"), kind="NaN"),
    Row(division_by_zero, "forward", "div", ("w", "b"), ("division by zero",), kind="Inf"),
    Row(root_of_negative, "forward", "sqrt", ("neg", "b"), ("root of a negative",), kind="NaN"),
    Row(root_at_zero, "backward", "div", ("w",), ("derivative of sqrt is infinite at zero", "eps"), kind="Inf"),
    Row(power_at_zero, "backward", None, ("w",), ("infinite at",), kind="Inf"),
    Row(overflow, "forward", "exp", ("w",), ("overflows", "logsumexp", "becomes NaN in div"), kind="Inf"),
    Row(overflow_in_half, "forward", "exp", ("w",), ("float16", "overflows"), kind="Inf"),
    Row(overflow_that_cancels, "forward", "mul", (), ("too large for its dtype", "becomes NaN in sub"), kind="Inf"),
    Row(norm_at_zero, "backward", None, ("w",), ("norm", "add a small number under the root")),
    Row(norm_by_hand, "backward", None, ("w",), ("sum of squares", "add a small number under the root")),
    Row(where_trap_log, "backward", "div", ("w",), ("masked later", "jnp.where(x > 0, x, 1.0)"), kind="NaN"),
    Row(where_trap_root, "backward", "div", ("w",), ("masked later", "jnp.where(x > 0, x, 1.0)")),
    Row(where_trap_exp, "forward", "exp", ("w",), ("overflows", "becomes NaN in mul (backward)")),
    Row(where_trap_division, "backward", None, ("w",), ("masked later",)),
    Row(pole_of_gamma, "forward", "lgamma", ("b",), ("poles at 0", "keep the operand positive"), kind="Inf"),
    Row(pole_of_derivative, "forward", "polygamma", ("b",), ("polygamma has poles at 0",), kind="Inf"),
    Row(masked_nan_besides, "forward", "log", (), ("logarithm of a negative",)),
    Row(inside_scan, "forward", "log", (), ("iteration 2 of 4 of a scan",), iteration=2),
    Row(inside_for_loop, "forward", "sqrt", ("b",), ("iteration 2 of 4 of a scan",), iteration=2),
    Row(backward_in_scan, "backward", "div", ("b",), ("iteration 2 of 3 of a scan",), iteration=2),
    Row(inside_cond, "forward", "log", (), ("branch 1 of a cond",), branch=1),
    Row(inside_switch, "forward", None, ("b",), ()),
    Row(inside_vmap, "forward", "log", (), ("reached     the value",)),
    Row(inside_our_vmap, "forward", "sqrt", ("b", "neg")),
    Row(inside_jit, "forward", "log", ()),
    Row(second_call_of_jit, "forward", "sqrt", ("b",)),
    Row(second_call_of_library, "backward", None, ("w",), ("norm",)),
    Row(inside_remat, "forward", "log", ()),
    Row(scan_in_remat, "forward", "log", ("b",), ("iteration 2 of 4 of a scan",), iteration=2),
    Row(backward_of_remat, "backward", "div", ("b",), ("infinite at zero",)),
    Row(
        scan_in_cond_in_scan,
        "forward",
        "log",
        (),
        ("iteration 1 of 2 of a scan, branch 1 of a cond, iteration 3 of 4 of a scan",),
    ),
    Row(backward_rule, "backward", "log", ("b",), ("logarithm of a negative",), kind="NaN"),
    Row(forward_rule, "backward", "div", ("b",)),
    Row(masked_rows, "forward", "sub", (), ("inf - inf", "large finite number")),
    Row(fraction_of_powers, "forward", "pow", ("tree['u']", "tree['v']"), ("power",)),
    Row(matrix_product, "forward", "dot_general", ("b",), ("too large",), kind="Inf"),
    Row(standard_deviation, "backward", None, ("w",)),
    Row(rounding_below_zero, "forward", "sqrt", ("b",), ("jnp.maximum(x, 0.0)",), kind="NaN"),
    Row(complex_numbers, "forward", "log", ("b",)),
    Row(atan_at_origin, "backward", None, ("b",)),
]

FORWARD_MODE = [
    Row(inside_while, "forward", "log", (), ("iteration 2 of a while loop",), iteration=2),
    Row(inside_fori, "forward", "log", (), ("iteration 2 of",), iteration=2),
]


def raised(call, *args) -> NonFiniteError:
    with unchanged(*STATES, R.DEFAULT), pytest.raises(NonFiniteError) as caught:
        jax.block_until_ready(call(*args))
    return caught.value


def judge(row, error):
    assert (error.file, error.line) == (__file__, row.line), error
    assert error.phase == row.phase, error
    assert row.primitive in (None, error.primitive), error
    assert row.kind in (None, error.kind), error
    assert row.iteration in (None, error.iteration) and row.branch in (None, error.branch), error
    text = str(error)
    for part in (*row.says, f"{__file__}:{row.line}", error.source, *error.path):
        assert part in text, f"{part!r} is not in {text}"
    reached = " ".join(error.reached)
    for name in ("w", "b", "neg", "tree['u']", "tree['v']"):
        where = f"grad_states['{name}']" if "[" not in name else f"(ParamState 'tree'){name[4:]}"
        assert (where in reached) == (name in row.reached), (name, text)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.fun.__name__)
def test_the_first_operation_is_named(row):
    derivative = T.grad(row.fun, row.states, check_states=False, debug_nan=True)
    judge(row, raised(derivative))


@pytest.mark.long
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.fun.__name__)
def test_under_jit(row):
    judge(row, raised(T.jit(T.grad(row.fun, row.states, check_states=False, debug_nan=True))))


@pytest.mark.parametrize("row", FORWARD_MODE, ids=lambda row: row.fun.__name__)
def test_forward_mode(row):
    judge(row, raised(T.jacfwd(row.fun, row.states, check_states=False, debug_nan=True)))


# ------------------------------------------------------------------------------------------ nothing to report


def masked_softmax():
    scores = jnp.outer(w.value, w.value)
    mask = jnp.tril(jnp.ones((3, 3), bool))
    return (jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)) * scores).sum()


def masked_by_logarithm():
    keep = jnp.array([1.0, 0.0, 1.0])
    return jax.nn.logsumexp(w.value + jnp.log(keep))


def harmless_nan_forward():
    return jnp.where(neg.value > 0, jnp.log(neg.value), 0.0).sum()  # its derivative at -1 is finite, and masked


def stopped_nan():
    bad = jax.lax.stop_gradient(jnp.log(neg.value))
    return jnp.where(jnp.isnan(bad), 0.0, neg.value).sum()


def infinite_best():
    hot.value = jnp.full(2, jnp.inf)
    return b.value**2


HARMLESS = [masked_softmax, masked_by_logarithm, harmless_nan_forward, stopped_nan, infinite_best]


@pytest.mark.crossing
@pytest.mark.parametrize("compiled", [False, True], ids=["at once", "jit"])
@pytest.mark.parametrize("fun", HARMLESS, ids=lambda fun: fun.__name__)
def test_harmless_infinities_raise_nothing(fun, compiled):
    states = [w, b, neg]
    plain = T.grad(fun, states, check_states=False)
    derivative = T.grad(fun, states, check_states=False, debug_nan=True)
    before = hot.value
    for got, want in zip((T.jit(derivative) if compiled else derivative)(), plain(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    hot.value = before


def test_an_infinity_that_is_meant_may_be_in_the_value_of_many_numbers():
    f = T.jacrev(lambda x: jnp.where(jnp.array([True, False]), x, -jnp.inf), debug_nan=True)
    assert np.isfinite(f(jnp.ones(2))).all()


# ------------------------------------------------------------------------------------------ it costs nothing if unused


def test_without_it_the_program_is_the_same():
    def shown(derivative):
        return str(T.make_jaxpr(derivative)(jnp.ones(3))[0])

    def loss(x):
        seen.value = x.sum()
        return (w.value * x).sum()

    plain, explicit = T.grad(loss, w), T.grad(loss, w, debug_nan=False)
    assert shown(plain) == shown(explicit) and "callback" not in shown(plain)
    assert "callback" in shown(T.grad(loss, w, debug_nan=True))


@pytest.mark.parametrize(("bad", "at_once"), [(False, 1), (True, 2)])
def test_how_often_the_function_runs(bad, at_once):
    runs = []

    def loss(x):
        runs.append(1)
        return jnp.sqrt(x).sum()

    x = jnp.zeros(2) if bad else jnp.ones(2)
    for call, wanted in ((lambda f: f, at_once), (T.jit, 1), (jax.jit, 1)):
        runs.clear()
        try:
            jax.block_until_ready(call(T.grad(loss, argnums=0, debug_nan=True))(x))
        except Exception:
            assert bad
        assert len(runs) == wanted


def test_a_finite_call_returns_and_writes_what_it_always_does():
    def loss(x):
        seen.value = x * 2.0
        return (x * b.value) * R.uniform(), {"kept": x, "text": "t"}

    def run(**options):
        R.seed(3)
        out = T.grad(loss, b, 0, has_aux=True, return_value=True, **options)(2.0)
        return out, seen.value, R.DEFAULT.value

    wanted, got = run(), run(debug_nan=True)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b) if a != "t" else a == b, wanted, got))
    assert isinstance(T.grad(lambda x: x**2, debug_nan=True)(2.0), jax.Array)


# ------------------------------------------------------------------------------------------ every transform


def root_of(x):
    return jnp.sqrt(x * b.value).sum()  # <- here


def _watched(row):
    return lambda on: row.derive(root_of, b, 0, debug_nan=on, **row.options)


TRANSFORMS: dict[str, Any] = {name: _watched(row) for name, row in ROW.items() if row.takes("debug_nan")}
TRANSFORMS |= {  # in other forms
    "jacobian": lambda on: T.jacobian(root_of, b, 0, debug_nan=on, chunk_size=1),
    "jacfwd in chunks": lambda on: T.jacfwd(root_of, b, 0, debug_nan=on, chunk_size=1),
    "laplacian": lambda on: T.laplacian(root_of, argnums=0, debug_nan=on),  # one number for all that is selected
    "per_example_norms": lambda on: T.per_example_norms(root_of, b, 0, debug_nan=on, per_leaf=True),
    "sparse_jacobian dense": lambda on: T.sparse_jacobian(root_of, b, 0, dense=True, mode="forward", debug_nan=on),
    "linearize transposed": lambda on: lambda x: T.linearize(root_of, x, debug_nan=on)[1].T @ jnp.ones(()),
    "operator of hvp": lambda on: lambda x: T.hvp(root_of, argnums=0, debug_nan=on).operator(x).dense(),
    "operator of ggn": lambda on: (
        lambda x: T.ggn(root_of, lambda out, x: out**2, argnums=0, debug_nan=on).operator(x).diagonal()
    ),
    "operator of fisher": lambda on: (
        lambda x: (
            T.fisher(lambda x: root_of(x)[None], "gaussian", argnums=0, debug_nan=on).operator(x) @ jnp.ones_like(x)
        )
    ),
    "decorator": lambda on: T.grad(grad_states=b, argnums=0, debug_nan=on)(root_of),
}


NO_DERIVATIVE = {"check_grads", "explain", "jacobian_sparsity", "hessian_sparsity"}


def test_no_transform_is_left_out():
    takes = {name: inspect.signature(getattr(T, name)).parameters for name in T.__all__ if callable(getattr(T, name))}
    assert {name for name, of in takes.items() if "grad_states" in of and "debug_nan" not in of} == NO_DERIVATIVE
    watched = {name for name, of in takes.items() if "debug_nan" in of}
    assert watched <= set(TRANSFORMS)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_takes_it(name):
    make = TRANSFORMS[name]
    fine = jnp.ones(2)
    for got, want in zip(jax.tree.leaves(make(True)(fine)), jax.tree.leaves(make(False)(fine)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    for call in (make(True), T.jit(make(True))):
        error = raised(call, jnp.array([1.0, 0.0]))
        assert (error.line, error.phase) == (marked(root_of), "backward")
        assert "argument 0" in error.reached or (name in ROW and ROW[name].along)


def test_methods():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = ParamState(jnp.zeros(2))

        @T.grad(argnums=0, debug_nan=True, return_value=True)
        def slope(self, x):
            return jnp.sqrt(self.p.value + x).sum()  # <- here

    model = Model()
    assert len(model.slope(1.0)) == 2
    assert raised(model.slope, 0.0).line == marked(Model.__dict__["slope"].target)


def test_hvp_returns_what_is_asked_for():
    def cube(x):
        return (x**3).sum(), {"a": 1.0}

    v, x = jnp.ones(2), jnp.array([1.0, 2.0])
    for options in ({}, {"return_value": True}, {"return_grad": True}, {"return_grad": True, "return_value": True}):
        for more in ({"has_aux": True}, {}):
            f = cube if more else lambda x: cube(x)[0]
            got, want = (T.hvp(f, **options, **more, debug_nan=on)(v, x) for on in (True, False))
            assert jax.tree.structure(got) == jax.tree.structure(want)
            assert jax.tree.all(jax.tree.map(np.allclose, got, want))


# ------------------------------------------------------------------------------------------ a model


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.inner = nn.Linear(size, size)
        self.outer = nn.Linear(size, size)

    def update(self, x):
        h = jnp.tanh(self.inner(x))
        return self.outer(h)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Block(3), Block(3)

    def update(self, x):
        h = self.first(x)
        return self.second(h)


@pytest.mark.parametrize("compiled", [False, True], ids=["at once", "jit"])
def test_the_line_is_that_of_the_user_and_not_inside_a_layer(compiled):
    net = Net()
    weight = net.second.outer.weight
    weight.value = jnp.full_like(weight.value, 3e38)
    net.second.inner.bias.value = jnp.full(3, 99.0)  # so that h is 1, whatever the weights are
    derivative = T.grad(lambda x: net(x).sum(), net, debug_nan=True)
    error = raised(T.jit(derivative) if compiled else derivative, jnp.full((2, 3), 9.0))
    source, first = inspect.getsourcelines(Block.update)
    assert error.line == first + next(i for i, line in enumerate(source) if "self.outer(h)" in line)
    assert error.function == "Block.update" and error.phase == "forward" and error.kind == "Inf"
    assert "nn/_layers.py" in str(error) and "Linear.update" in str(error)
    assert any("'first', 'inner', 'weight'" in name for name in error.reached)


# ------------------------------------------------------------------------------------------ it was there before


def test_nan_that_was_there_before():
    stats = State({"k": jnp.array([jnp.nan])}, name="stats")
    constant = jnp.array([jnp.nan, 1.0])
    cases: list[tuple[Any, tuple, str]] = [
        (lambda x, y: (x["a"] * y).sum(), ({"a": jnp.array([1.0, jnp.nan])}, 2.0), "argument 0['a'] already holds NaN"),
        (lambda x, y: x * y, (1.0, float("nan")), "argument 1 already holds NaN"),
        (lambda x: x * stats.value["k"].sum(), (1.0,), "State 'stats' already holds NaN"),
        (lambda x: x * constant.sum(), (1.0,), "a constant that the function refers to (used at … already holds NaN"),
    ]
    for fun, args, text in cases:
        for call in (lambda f: f, T.jit):
            error = raised(call(T.grad(fun, debug_nan=True)), *args)
            assert all(part in str(error) for part in text.split(" … ")) and error.phase == "input"
            assert all(name in text for name in error.inputs) and (error.line is None or "constant" in text)


def test_a_constant_is_known_by_the_line_that_uses_it():
    def highest(x):
        y = jnp.where(x > 100.0, x, -jnp.inf)  # <- here
        return y.max() * x[0]

    error = raised(T.grad(highest, debug_nan=True), jnp.ones(2))
    assert error.phase == "input" and error.line == marked(highest) and error.inputs == ()


def test_an_infinite_input_is_named_beside_the_operation():
    limit = State(jnp.array(jnp.inf), name="limit")
    error = raised(T.grad(lambda x: (x + limit.value) - limit.value, debug_nan=True), 1.0)
    assert error.primitive == "sub" and error.inputs == ("State 'limit'",)
    assert "infinite    before: State 'limit'" in str(error)


def test_a_masked_input_is_not_to_blame():
    data = jnp.array([jnp.nan, 0.0])

    def loss(x):
        safe = jnp.where(jnp.isnan(data), 1.0, data)
        y = safe / x  # <- here
        return y.sum()

    assert raised(T.grad(loss, debug_nan=True), 0.0).line == marked(loss)


# ------------------------------------------------------------------------------------------ what else is checked


def test_nan_in_aux_and_in_what_is_written():
    def aux(x):
        return x * 1.0, jnp.log(-x)  # <- here

    def written(x):
        seen.value = jnp.log(-x)  # <- here
        return x * 1.0

    error = raised(T.grad(aux, has_aux=True, debug_nan=True), 1.0)
    assert error.line == marked(aux) and error.reached == () and "reached     aux" in str(error)
    error = raised(T.grad(written, debug_nan=True), 1.0)
    assert error.line == marked(written) and "reached     State 'seen'" in str(error)


def test_random_numbers_are_those_of_the_call():
    def loss(x):
        noise = R.uniform(size=(4,)) - 0.5
        return jnp.sqrt(noise * x).sum()  # <- here

    R.seed(1)
    key = R.DEFAULT.value
    low = float((R.uniform(size=(4,)) - 0.5).min())
    R.DEFAULT.value = key
    error = raised(T.grad(loss, debug_nan=True), 1.0)
    assert error.line == marked(loss) and f"{low:.4g} .." in str(error)


# ------------------------------------------------------------------------------------------ inside transforms


def losing(x):
    seen.value = seen.value + 1.0
    return jnp.sqrt(w.value * x).sum()  # <- here


def step(x):
    gradient = T.grad(losing, w, debug_nan=True)(x)
    w.value = w.value - gradient
    return gradient.sum()


NESTS: dict[str, Any] = {
    "jit of a step": T.jit(step),
    "jit of jit": T.jit(lambda x: T.jit(step)(x)),
    "jit that donates": T.jit(step, donate_states=True),
    "for_loop": lambda x: T.for_loop(lambda i: step(x), jnp.arange(2)),
    "jit of for_loop": T.jit(lambda x: T.for_loop(lambda i: step(x), jnp.arange(2))),
    "cond": lambda x: T.cond(x > 0, step, lambda x: x, x),
    "while_loop": lambda x: T.while_loop(lambda i: i < 3, lambda i: i + 1 + 0 * step(x).astype(int), 0),
    "jit of checkpoint": T.jit(lambda x: T.checkpoint(step)(x)),
    "grad": T.grad(step),
    "hessian": T.hessian(step),
    "vmap": lambda x: T.vmap(lambda x: T.grad(lambda: (w.value**0.5 * x).sum(), w, debug_nan=True)())(jnp.ones(2)),
    "jit of vmap": T.jit(T.vmap(lambda x: T.grad(lambda: (w.value**0.5 * x).sum(), w, debug_nan=True)(), axis_size=2)),
}


@pytest.mark.parametrize("name", NESTS)
def test_inside_transforms(name):
    x = jnp.ones(2) if name == "jit of vmap" else jnp.array(1.0)
    with unchanged(*STATES), pytest.raises((RuntimeError, ValueError)) as caught:
        jax.block_until_ready(NESTS[name](x))
    text = str(caught.value)
    assert "the first Inf appears in the backward pass" in text and "reached     grad_states (ParamState 'w')" in text
    if "vmap" not in name:
        assert f"{__file__}:{marked(losing)}" in text
    if name.startswith("jit"):
        assert type(caught.value) is NonFiniteError


def test_an_outer_jit_over_one_that_is_compiled_already():
    inner = T.jit(step)
    with pytest.raises(NonFiniteError):
        inner(jnp.array(1.0))
    assert raised(T.jit(lambda x: inner(x)), jnp.array(1.0)).line == marked(losing)


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_a_constant_derivative_is_checked_too(slope):
    def loss(x):
        y = jax.lax.stop_gradient(jnp.log(-jnp.abs(b.value)))  # <- here
        return x * slope + y

    for call in (lambda f: f, T.jit):
        assert raised(call(T.grad(loss, argnums=0, debug_nan=True)), 1.0).line == marked(loss)


def test_raw_jit_shows_the_whole_text():
    with pytest.raises((RuntimeError, ValueError), match="likely      the derivative of sqrt is infinite at zero"):
        jax.block_until_ready(jax.jit(T.grad(jnp.sqrt, debug_nan=True))(0.0))


def assert_let_go(run):
    """Nothing keeps a tracer of ``run()``, nor that to which it returns a weak reference."""
    with jax.checking_leaks():
        run()
    alive = run()
    gc.collect()
    assert alive() is None


def test_no_tracer_and_no_state_is_kept():
    def run():
        weight = ParamState(jnp.ones(2))

        @T.jit
        def slope(x):
            y = x * 2.0
            return T.grad(lambda z: (weight.value * z * y).sum(), weight, debug_nan=True)(x)

        slope(jnp.ones(2))
        return weakref.ref(weight)

    assert_let_go(run)


def test_lanes():
    def one(x):
        return T.grad(lambda x: jnp.log(x), debug_nan=True)(x)

    xs = jnp.array([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    error = raised(T.jit(T.vmap(T.vmap(one))), xs)
    assert error.lane == (1, 1) and "lane        1, 1 of vmap" in str(error)
    fine = T.vmap(T.vmap(one))(jnp.abs(xs) + 1.0)
    np.testing.assert_allclose(fine, 1.0 / (jnp.abs(xs) + 1.0), rtol=1e-6)


def test_derivatives_of_a_watched_derivative():
    def cubic(x):
        return T.grad(lambda y: (w.value * y**3).sum(), argnums=0, debug_nan=True)(x)

    want = 6.0 * w.value.sum() * 2.0
    for derivative in (T.grad(cubic), T.jacfwd(cubic), T.jit(T.grad(cubic)), T.grad(T.checkpoint(cubic))):
        np.testing.assert_allclose(derivative(2.0), want, rtol=1e-6)


def test_a_large_program_that_runs_behind_its_call_changes_no_state():
    weight, count = ParamState(jnp.full((200, 200), 0.01)), State(jnp.array(0))

    def loss(x):
        count.value += 1
        for _ in range(20):
            x = jnp.tanh(x @ weight.value)
        return jnp.sqrt((x * 0.0).sum())  # <- here

    @T.jit
    def train(x):
        weight.value -= T.grad(loss, weight, debug_nan=True)(x)

    with unchanged(weight, count), pytest.raises(NonFiniteError) as caught:
        train(jnp.ones((200, 200)))
    assert caught.value.line == marked(loss)
    with unchanged(weight, count), pytest.raises((RuntimeError, ValueError), match="the first Inf"):
        T.for_loop(lambda _: train(jnp.ones((200, 200))), jnp.arange(2))


def test_a_long_loop_is_looked_into_only_where_it_begins():
    def loss(x):
        def body(c, i):
            d = c * jnp.where(i == 1500, -1.0, 1.0)
            return jnp.sqrt(d), None  # <- here

        return jax.lax.scan(body, x, jnp.arange(2000))[0]

    error = raised(T.grad(loss, debug_nan=True), 2.0)
    assert error.line == marked(loss) and error.iteration == 1500


def test_shard_map_is_one_operation():
    mesh = jax.make_mesh((1,), ("i",))

    def loss(x):
        run = jax.shard_map(jnp.sqrt, mesh=mesh, in_specs=jax.P(), out_specs=jax.P())
        return run(x).sum()  # <- here

    error = raised(T.grad(loss, debug_nan=True), jnp.zeros(2))
    assert error.line == marked(loss) and error.primitive == "shard_map" and "one operation" in str(error)


SEVERAL = """
import jax, jax.numpy as jnp
from brainstate import NonFiniteError, ParamState, transform as T
mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
split = jax.sharding.NamedSharding(mesh, jax.P("i"))
w = ParamState(jax.device_put(jnp.array([1.0, 0.0, 1.0, 4.0]), split))
before = w.value
@T.jit
def step():
    w.value -= T.grad(lambda: jnp.sqrt(w.value).sum(), w, debug_nan=True)()
def lane(x):
    return T.grad(lambda x: jnp.sqrt(x).sum(), debug_nan=True)(x)
mapped = T.shard_map(lane, mesh=mesh, in_specs=jax.P("i"), out_specs=jax.P("i"))
for call in (step, T.grad(lambda: jnp.sqrt(w.value).sum(), w, debug_nan=True), lambda: T.jit(mapped)(w.value)):
    try:
        call()
    except NonFiniteError as error:
        print(error.primitive, error.line, w.value is before)
print(mapped(w.value))
"""


def test_several_devices():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SEVERAL], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["div 10 True", "div 14 True", "div 12 True", "[ nan  nan 0.5  0.25]"], (
        done.stderr
    )
    assert "the first Inf appears in the backward pass" in done.stderr


# ------------------------------------------------------------------------------------------ Python that looks at values


def test_a_function_that_cannot_be_traced():
    def forward(x):
        if x > 0:
            return jnp.log(x - 5.0)  # <- here
        return x

    def backward(x):
        return jnp.where(x > 0, jnp.log(x), 0.0) if x >= 0 else x

    error = raised(T.grad(forward, debug_nan=True), 1.0)
    assert error.line == marked(forward) and error.kind == "NaN"
    assert "cannot be traced" in str(error) and "not known whether this one reaches the result" in str(error)
    error = raised(T.grad(backward, debug_nan=True), 0.0)
    assert error.line is None and error.phase == "backward" and "transform.cond" in str(error)


def test_flags_and_text_among_the_arguments():
    def loss(x, train, name, shape):
        assert train and name == "n" and shape[0] == 2
        return jnp.sqrt(x)  # <- here

    error = raised(T.grad(loss, debug_nan=True), 0.0, True, "n", np.array([2]))
    assert error.line == marked(loss)


# ------------------------------------------------------------------------------------------ the error


def test_the_error():
    error = raised(T.grad(root_at_zero, w, debug_nan=True))
    assert isinstance(error, RuntimeError) and isinstance(error, BrainStateError)
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) and (copy.line, copy.reached) == (error.line, error.reached)
    assert error.source == "y = jnp.sqrt(w.value)  # <- here" and error.lane == () and error.inputs == ()
    assert error.operands == ("float32[]: 0.5", "float32[3]: 0 .. 2")


def test_the_whole_message():
    error = raised(T.grad(overflow, w, debug_nan=True))
    (line,) = (str(n) for n in [marked(overflow)])
    assert str(error).splitlines() == [
        f"grad(overflow): the first Inf appears in the forward pass, at {__file__}:{line}, in overflow",
        "    p = jnp.exp(x)  # <- here",
        "  operation   exp",
        "  operand     float32[3]: 0 .. 400",
        "  result      float32[3]: 1, 2 Inf",
        f"  becomes NaN in div (forward), at {__file__}:{int(line) + 1}",
        "  reached     grad_states (ParamState 'w')",
        "  likely      exp overflows: exp is finite up to 11 in float16, 88 in float32, 709 in float64",
        "  repair      subtract the maximum first, as jax.nn.softmax and jax.nn.logsumexp do, or clip the operand",
    ]


def test_a_remedy_is_one_row(monkeypatch):
    """The recipe: the row, and a planted fault that shows it; a row stands before those that are more general."""
    row = advice.Remedy("exp", "{name} of a large number", "take less", lambda origin, at: (at[0] > 80).all())
    monkeypatch.setattr(advice, "REAL", [row, *advice.REAL])
    assert "  likely      exp of a large number\n  repair      take less" in str(
        raised(T.grad(overflow, w, debug_nan=True))
    )
    monkeypatch.setattr(advice, "REAL", [*advice.REAL[1:], row])
    assert "  likely      exp overflows" in str(raised(T.grad(overflow, w, debug_nan=True)))


def test_the_texts_of_all_remedies_can_be_told():
    rows = [*advice.BACKWARD, *advice.REAL, *advice.ANY]
    assert all((row.cause + row.repair).format(name="mul", called="norm") for row in rows)
    last = advice.ANY[-1]  # applies to every operation
    assert not last.primitives and last.applies is advice.Remedy._field_defaults["applies"]


def test_it_can_fail_any_number_of_times():
    run, depths = T.jit(T.grad(root_of, argnums=0, debug_nan=True)), []
    for _ in range(3):
        error = raised(run, jnp.zeros(2))
        depths.append(len(list(traceback.walk_tb(error.__traceback__))))
        np.testing.assert_allclose(run(jnp.ones(2)), jnp.full(2, 2.0**-0.5), rtol=1e-6)
    assert depths[1] == depths[2]  # no error is raised a second time


def test_keys_among_the_arguments():
    def loss(x, key):
        return jnp.sqrt(x * jax.random.uniform(key))  # <- here

    for call in (lambda f: f, T.jit):
        error = raised(call(T.grad(loss, debug_nan=True)), 0.0, jax.random.key(0))
        assert error.line == marked(loss)


def test_accumulated_gradients():
    xs = jnp.array([1.0, 0.0, 1.0, 1.0])
    summed = T.accumulate(T.grad(root_of, b, debug_nan=True), 2)
    with pytest.raises((RuntimeError, ValueError), match="the first Inf appears in the backward pass"):
        jax.block_until_ready(summed(xs * 0.0))
    assert raised(T.jit(summed), xs * 0.0).line == marked(root_of)


def test_other_errors_come_through():
    def wrong(x):
        raise KeyError("mine")

    for call in (lambda f: f, T.jit):
        with pytest.raises(KeyError, match="mine"):
            call(T.grad(wrong, debug_nan=True))(1.0)
    with pytest.raises(TypeError, match="scalar-output"):
        T.grad(lambda x: x, debug_nan=True)(jnp.ones(2))
    with pytest.raises(ValueError, match="never reads"):
        T.grad(lambda x: x, b, debug_nan=True)(1.0)


@pytest.mark.parametrize("donates", [False, True])
def test_a_prepared_call_raises_and_leaves_every_state(donates):
    total, rate = State(jnp.array(0.0), name="total"), ParamState(jnp.array([1.0, 2.0]), name="rate")

    def step(x):
        def loss():
            total.value = total.value + x
            return jnp.sqrt(rate.value * x).sum()  # <- here

        return T.grad(loss, rate, debug_nan=True)()

    prepared = T.prepare(step, jnp.array(1.0), donate_states=donates)
    good = prepared(jnp.array(4.0))
    with unchanged(total, rate), pytest.raises(NonFiniteError, match="the first NaN appears in the forward pass"):
        prepared(jnp.array(-1.0))
    assert jnp.array_equal(prepared(jnp.array(4.0)), good) and total.value == 8.0


def test_a_trace_that_jax_has_kept_is_still_checked():
    """And nothing that may have to be kept is given away."""
    total = State(jnp.array(0.0), name="total")
    inner = jax.jit(T.grad(lambda x: jnp.sqrt(x).sum(), debug_nan=True))
    inner(jnp.ones(3))

    def step(x):
        total.value = total.value + inner(x).sum()

    step = T.jit(step, donate_states=True)
    step(jnp.ones(3))
    with unchanged(total), pytest.raises(NonFiniteError, match="backward"):
        step(jnp.zeros(3))
    assert total.value == 1.5


def test_arrays_are_not_kept_within_another_transform():
    refs = []
    for i in range(3):
        x = jnp.full(5, i + 1.0)
        refs.append(weakref.ref(x))
        T.grad(lambda x=x: T.grad(lambda x: (b.value * x).sum(), debug_nan=True)(x).sum(), b)()
        del x
    gc.collect()
    assert not any(ref() is not None for ref in refs)


def test_a_state_that_the_first_call_makes():
    class Lazy:
        h: Any = None

    def loss(x):
        if Lazy.h is None:
            Lazy.h = State(jnp.zeros(2), name="h")
        return jnp.sqrt(x * Lazy.h.value).sum()  # <- here

    error = raised(T.grad(loss, debug_nan=True), jnp.ones(2))
    assert error.line == marked(loss)


def test_the_search_is_not_heard():
    called = []

    def f(x):
        jax.debug.callback(lambda: called.append(1))
        return jnp.sqrt(T.tap("h", x)).sum() + jnp.log(x * 0).sum() + (1 / (x * 0)).sum()

    with T.taps() as seen:
        raised(T.grad(f, debug_nan=True), jnp.zeros(3))
        jax.effects_barrier()
    assert len(called) <= 2 and len(seen["h"]) == 1


@pytest.mark.long
def test_beside_the_check_of_jax():
    with jax.debug_nans(True):
        error = raised(T.jit(T.grad(lambda x: jnp.sqrt(x).sum(), debug_nan=True)), jnp.zeros(2))
    assert error.phase == "backward"
