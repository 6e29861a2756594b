"""debug_nan: programs with a planted first NaN, whose line, pass, operation and reach must be found.

The line is the one that ends in ``# <- here`` in the source of the program.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _unchanged import unchanged
from brainstate import BatchState, NonFiniteError, ParamState, State, nn
from brainstate import random as R
from brainstate import transform as T

# ------------------------------------------------------------------------------------------ states

w = ParamState(jnp.array([0.0, 1.0, 4.0]), name="w")
b = ParamState(jnp.array(2.0), name="b")
neg = ParamState(jnp.array([1.0, -1.0]), name="neg")
tree = ParamState({"u": jnp.array(3.0), "v": jnp.array(-1.0), "n": 2}, name="tree")
hot = State(jnp.array([1.0, 1.0]), name="hot")
seen = State(jnp.array(0.0), name="seen")

STATES = (w, b, neg, tree, hot, seen)

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


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.fun.__name__)
def test_under_jit(row):
    judge(row, raised(T.jit(T.grad(row.fun, row.states, check_states=False, debug_nan=True))))


@pytest.mark.parametrize("row", FORWARD_MODE, ids=lambda row: row.fun.__name__)
def test_forward_mode(row):
    judge(row, raised(T.jacfwd(row.fun, row.states, check_states=False, debug_nan=True)))
