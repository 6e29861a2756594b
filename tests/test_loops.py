"""Loops: against the twin in pure JAX, for results, derivatives, the States afterwards, jaxprs, runs and memory."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _unchanged import unchanged
from brainstate import HiddenState, ParamState, State
from brainstate import random as R
from brainstate import transform as T
from transforms import EXACT

XS = jnp.linspace(0.1, 1.0, 5)
CHEAP = "unsafe_rbg"  # XLA takes a second to compile threefry in some of these nests


def close(got, expected, rtol=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert jnp.shape(a) == jnp.shape(b) and jnp.result_type(a) == jnp.result_type(b)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


def draw(data, impl=None):
    """Return the next key data, and the number that a generator draws from ``data``."""
    key, sub = jax.random.split(jax.random.wrap_key_data(data, impl=impl))
    return jax.random.key_data(key), jax.random.normal(sub)


# ------------------------------------------------------------------------------------------ a cell and its twin


class Cell:
    """Reads one State, writes three (one of them a container) and draws."""

    def __init__(self):
        self.w = ParamState(jnp.array(0.7), name="w")
        self.h = HiddenState(jnp.array(0.2), name="h")
        self.log = State({"n": jnp.array(0), "last": [jnp.array(0.0)]}, name="log")
        self.rng = R.RandomState(jax.random.key(3, impl=CHEAP))
        self.written = (self.h, self.log, self.rng)
        self.runs = 0

    def __call__(self, c, x):
        self.runs += 1
        noise = self.rng.normal()
        self.h.value = jnp.sin(self.w.value * self.h.value + x) + 0.1 * noise
        log = self.log.value
        log["n"] = log["n"] + 1
        self.log.value = {"n": log["n"], "last": [c]}
        return c * 0.9 + self.h.value, self.h.value * x

    def values(self):
        return [s.value for s in self.written]


def twin(w, values, c, x):
    h, log, key = values
    key, noise = draw(key, CHEAP)
    h = jnp.sin(w * h + x) + 0.1 * noise
    return (c * 0.9 + h, h * x), [h, {"n": log["n"] + 1, "last": [c]}, key]


def twin_scan(w, values, c, xs, **options):
    def step(carry, x):
        (c, y), values = twin(w, carry[1], carry[0], x)
        return (c, values), y

    (c, values), ys = jax.lax.scan(step, (c, values), xs, **options)
    return (c, ys), values


SCANS = {
    "scan": lambda f, c, xs: T.scan(f, c, xs),
    "unroll": lambda f, c, xs: T.scan(f, c, xs, unroll=3),
    "unroll all": lambda f, c, xs: T.scan(f, c, xs, unroll=True),
    "length": lambda f, c, xs: T.scan(f, c, xs, length=5),
    "checkpointed": lambda f, c, xs: T.checkpointed_scan(f, c, xs),
    "checkpointed 2": lambda f, c, xs: T.checkpointed_scan(f, c, xs, base=2),
    "jit": lambda f, c, xs: T.jit(lambda c, xs: T.scan(f, c, xs))(c, xs),
}


@pytest.mark.parametrize("loop", SCANS.values(), ids=SCANS)
def test_scan_is_the_twin(loop):
    cell = Cell()
    expected, values = twin_scan(cell.w.value, cell.values(), jnp.array(0.5), XS)
    with unchanged(cell.w):
        close(loop(cell, jnp.array(0.5), XS), expected)
    close(cell.values(), values)
    assert cell.runs == 1


def test_reverse():
    cell = Cell()
    expected, values = twin_scan(cell.w.value, cell.values(), jnp.array(0.5), XS, reverse=True)
    close(T.scan(cell, jnp.array(0.5), XS, reverse=True), expected)
    close(cell.values(), values)
    other = Cell()
    ys = T.for_loop(lambda x: other(jnp.array(0.5), x)[1], XS, reverse=True)
    assert ys.shape == (5,)
    close(other.h.value, cell.h.value)


@pytest.mark.parametrize("loop", SCANS.values(), ids=SCANS)
def test_gradients_around_a_loop(loop):
    cell = Cell()

    def loss(x):
        c, ys = loop(cell, x, XS)
        return c + (ys**2).sum()

    def pure(diff, values):
        (w, h), x = diff
        (c, ys), values = twin_scan(w, [h, *values], x, XS)
        return c + (ys**2).sum(), values

    start = cell.values()
    grads = T.grad(loss, [cell.w, cell.h], argnums=0)(0.5)
    expected, values = jax.grad(pure, has_aux=True)(([cell.w.value, start[0]], jnp.array(0.5)), start[1:])
    close(tuple(grads), tuple(expected), 1e-4)
    close(cell.values(), values)
    assert cell.runs == 1


@pytest.mark.parametrize("row", [row for row in EXACT.values() if row.name != "grad"], ids=str)
def test_other_derivatives_around_a_scan(row):
    cell = Cell()
    start = cell.values()

    def loss(x):
        return T.scan(cell, x, XS)[0]

    got = row.derive(loss)(0.5)
    expected = row.jax(lambda x: twin_scan(jnp.array(0.7), start, x, XS)[0][0])(0.5)
    close(got, expected, 1e-4)
    assert cell.runs == 1


def test_a_gradient_inside_a_scan():
    w, n = ParamState(jnp.array([1.0, -2.0]), name="w"), State(jnp.array(0))

    def loss(x):
        n.value += 1
        return ((w.value - x) ** 2).sum()

    def body(c, x):
        g = T.grad(loss, w)(x)
        w.value = w.value - 0.1 * g
        return c + g.sum(), g

    def step(c, x):
        c, w = c
        g = 2 * (w - x)
        return (c + g.sum(), w - 0.1 * g), g

    (c, new), gs = jax.lax.scan(step, (0.0, w.value), XS)
    close(T.scan(body, 0.0, XS), (c, gs))
    close(w.value, new)
    assert n.value == 5


def test_each_iteration_draws_anew_and_replays_draw_the_same():
    rng, data = R.RandomState(0), R.RandomState(0).value
    expected = []
    for _ in range(4):
        data, x = draw(jnp.asarray(data))
        expected.append(x)
    np.testing.assert_allclose(T.for_loop(rng.normal, length=4), expected)
    assert (rng.value == data).all()
    for loop in (T.for_loop, T.checkpointed_for_loop):
        again = R.RandomState(0)
        slope = T.grad(lambda c, again=again, loop=loop: loop(lambda: c * again.normal(), length=4).sum())(1.0)
        np.testing.assert_allclose(slope, np.sum(expected), rtol=1e-6)
        assert (again.value == data).all()


# ------------------------------------------------------------------------------------------ lengths


@pytest.mark.parametrize("loop", [T.scan, T.checkpointed_scan])
def test_no_iterations(loop):
    cell = Cell()
    before = cell.values()
    c, ys = loop(cell, jnp.array(0.5), jnp.zeros(0))
    assert c == 0.5 and ys.shape == (0,) and cell.runs == 1
    close(cell.values(), before)
    assert T.for_loop(lambda: cell.h.value, length=0).shape == (0,)


def test_no_iterations_and_a_state_that_is_only_written():
    s = State(jnp.zeros(2), name="s")

    def body(x):
        s.value = jnp.stack([x, x, x])

    with unchanged(s), pytest.raises(TypeError, match=r"State 's' is float32\[2\] before .* for_loop and float32\[3\]"):
        T.for_loop(body, jnp.zeros(0))
    T.for_loop(body, XS)
    assert s.value.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("first", [None, "idle", {"a": 1.0}, jnp.arange(2), 0])
def test_a_state_that_is_only_written(first):
    """What it held before does not matter: nobody sees it."""
    s = State(first)
    runs = []

    def body(x):
        runs.append(1)
        s.value = {"x": x}

    T.for_loop(body, XS)
    close(s.value, {"x": XS[-1]})
    assert len(runs) == 1


@pytest.mark.crossing
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 15, 16, 17, 26, 27, 28, 40])
@pytest.mark.parametrize("base", [2, 3])
def test_checkpointed_lengths(count, base):
    s = State(jnp.array(0))

    def body(c, x):
        s.value = s.value + x
        return c + 1, s.value

    c, ys = T.checkpointed_scan(body, 0, jnp.arange(count), base=base)
    assert c == count and ys.tolist() == np.cumsum(np.arange(count)).tolist()
    assert s.value == ys[-1]


def test_checkpointed_powers():
    """Where the logarithm, as a float, is not what it should be."""
    assert math.log(125, 5) > 3
    for base, count in ((5, 125), (3, 243), (6, 216), (10, 1000)):
        assert T.checkpointed_scan(lambda c, _: (c + 1, None), 0, length=count, base=base)[0] == count


def test_for_loop_over_several_arguments():
    n = State(jnp.array(0))

    def f(a, b):
        n.value += 1
        return a * b["k"], n.value

    y, k = T.for_loop(f, XS, {"k": 2.0 * XS})
    close(y, 2.0 * XS**2)
    assert k.tolist() == [1, 2, 3, 4, 5]
    assert T.for_loop(lambda: n.value, length=3).tolist() == [5, 5, 5]
    assert T.checkpointed_for_loop(lambda: n.value, length=3).tolist() == [5, 5, 5]


# ------------------------------------------------------------------------------------------ numbers without a dtype


WEAK = {
    "float in an int": (7, lambda c: c // 2 + 0.5),
    "float": (1.0, lambda c: c * 0.5),
    "strong": (1.0, lambda c: c * jnp.float32(0.5)),
    "half": (1, lambda c: c * jnp.float16(0.5)),
    "int": (1, lambda c: c * 2),
    "complex": (1, lambda c: c * 1j),
}


@pytest.mark.parametrize("case", WEAK.values(), ids=WEAK)
def test_numbers_without_a_dtype_as_carry_and_in_a_state(case):
    """The type is that of ``jax.lax.scan``, and so are the numbers."""
    first, change = case
    expected = jax.lax.scan(lambda c, _: (change(c), None), first, length=3)[0]
    s, runs = State(first), []

    def body(c, _):
        runs.append(1)
        s.value = change(s.value)
        return change(c), None

    for loop in (T.scan, T.checkpointed_scan):
        s.value = first
        runs.clear()
        c, _ = loop(body, first, length=3)
        close(c, expected), close(s.value, expected)
        assert len(runs) == 1 + (jnp.result_type(first) != expected.dtype)
    s.value = first
    n, c = T.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, body(c[1], None)[0]), (0, first))
    assert n == 3
    close(c, expected), close(s.value, expected)
    s.value = first
    n, c = T.bounded_while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, body(c[1], None)[0]), (0, first), max_steps=4)
    close(c, expected), close(s.value, expected)


def test_a_condition_sees_the_number_that_the_body_leaves():
    s = State(0, name="s")

    def body(n):
        s.value = s.value + 0.5
        return n + 1

    assert T.while_loop(lambda n: s.value < 2, body, 0) == 4
    assert s.value == 2.0


# ------------------------------------------------------------------------------------------ while loops


def _while_twin(w, h, key, x, steps):
    def body(carry):
        n, x, h, key = carry
        key, noise = draw(key, CHEAP)
        h = jnp.sin(w * h) + 0.1 * noise
        return n + 1, x + h, h, key

    return jax.lax.while_loop(lambda carry: carry[0] < steps, body, (0, x, h, key))


WHILES = {
    "while": T.while_loop,
    "bounded": lambda c, b, v: T.bounded_while_loop(c, b, v, max_steps=20, base=4),
    "bounded exactly": lambda c, b, v: T.bounded_while_loop(c, b, v, max_steps=4, base=2),
    "jit": lambda c, b, v: T.jit(lambda v: T.while_loop(c, b, v))(v),
}


@pytest.mark.parametrize("loop", WHILES.values(), ids=WHILES)
def test_while_is_the_twin(loop):
    cell, runs = Cell(), []
    limit = State(jnp.array(4), name="limit")

    def body(carry):
        runs.append(1)
        cell.h.value = jnp.sin(cell.w.value * cell.h.value) + 0.1 * cell.rng.normal()
        return carry[0] + 1, carry[1] + cell.h.value

    n, x, h, key = _while_twin(cell.w.value, cell.h.value, cell.rng.value, 0.5, 4)
    with unchanged(limit, cell.w):
        close(loop(lambda carry: carry[0] < limit.value, body, (0, 0.5)), (n, x))
    close([cell.h.value, cell.rng.value], [h, key])
    assert len(runs) == 1


def test_forward_mode_through_while():
    cell = Cell()

    def body(carry):
        cell.h.value = jnp.sin(cell.w.value * cell.h.value) + 0.1 * cell.rng.normal()
        return carry[0] + 1, carry[1] + cell.h.value

    key = cell.rng.value
    got = T.jacfwd(lambda: T.while_loop(lambda c: c[0] < 4, body, (0, 0.5))[1], [cell.w, cell.h])()
    expected = jax.jacfwd(lambda w, h: _while_twin(w, h, key, 0.5, 4)[1], (0, 1))(jnp.array(0.7), jnp.array(0.2))
    close(tuple(got), expected)


def test_no_step_of_a_while_loop():
    s = State(jnp.array(1.0), name="s")
    for loop in WHILES.values():
        assert loop(lambda x: x > 5.0, lambda x: x + s.value, 1.0) == 1.0
    assert T.bounded_while_loop(lambda x: True, lambda x: x + 1.0, 1.0, max_steps=0) == 1.0


@pytest.mark.parametrize("base", [2, 3, 16])
@pytest.mark.parametrize("bound", [1, 2, 7, 8, 9])
def test_bounds(bound, base):
    s = State(jnp.array(0))

    def body(n):
        s.value += 1
        return n + 1

    assert T.bounded_while_loop(lambda n: n < 100, body, 0, max_steps=bound, base=base) == bound
    assert s.value == bound


# ------------------------------------------------------------------------------------------ reverse mode in float64


def test_reverse_mode_through_a_bounded_loop():
    """Against a scan over as many steps, and against finite differences."""
    with jax.enable_x64(True):
        w, s = ParamState(jnp.array(3.0), name="w"), State(jnp.array(0.0))

        def test(carry):
            return abs(carry[1] ** 2 - w.value) > 1e-3

        def body(carry):
            n, x = carry
            s.value = s.value + x * w.value
            return n + 1, x - (x**2 - w.value) / (2 * x)

        def loss(x, loop):
            s.value = jnp.array(0.0)
            return loop(x)[1] ** 2 + s.value

        def plain(x):
            return T.while_loop(test, body, (0, x))

        count = int(plain(2.5)[0])
        loops = [lambda x: T.scan(lambda c, _: (body(c), None), (0, x), length=count)[0]]
        loops += [lambda x, b=b: T.bounded_while_loop(test, body, (0, x), max_steps=20, base=b) for b in (2, 3, 32)]
        grads = [T.grad(lambda x, loop=loop: loss(x, loop), w, argnums=0)(2.5) for loop in loops]
        for g in grads[1:]:
            np.testing.assert_allclose(g, grads[0], rtol=1e-12)

        def moved(dw, dx):
            w.value = jnp.array(3.0 + dw)
            return float(loss(2.5 + dx, plain))

        h = 1e-6
        slopes = [(moved(h, 0) - moved(-h, 0)) / (2 * h), (moved(0, h) - moved(0, -h)) / (2 * h)]
        np.testing.assert_allclose(grads[1], slopes, rtol=1e-6)


def test_reverse_mode_through_a_checkpointed_scan():
    with jax.enable_x64(True):
        w, h = ParamState(jnp.array([0.3, -0.2])), HiddenState(jnp.array([0.1, 0.4]))
        xs = jnp.linspace(0.0, 1.0, 11)

        def cell(x):
            h.value = jnp.tanh(w.value * h.value + x)
            return (h.value**2).sum()

        def loss(loop, first, **options):
            h.value = first
            return loop(cell, xs, **options).sum()

        first = h.value
        plain = T.grad(lambda f: loss(T.for_loop, f), w, argnums=0)(first)
        for base in (2, 16):
            got = T.grad(lambda f, b=base: loss(T.checkpointed_for_loop, f, base=b), w, argnums=0)(first)
            close(got, plain, 1e-12)
        w0, step = w.value, 1e-6

        def moved(d):
            w.value = w0.at[0].add(d)
            return float(loss(T.for_loop, first))

        np.testing.assert_allclose(plain[0][0], (moved(step) - moved(-step)) / (2 * step), rtol=1e-7)


# ------------------------------------------------------------------------------------------ memory


def temporaries(loop, length):
    """Return the bytes that the compiled gradient of a loop needs beside inputs and outputs."""
    w, h = ParamState(jnp.ones((64, 64))), HiddenState(jnp.ones(64))

    def cell(c, _):
        h.value = jnp.tanh(w.value @ h.value)
        return c, None

    def loss():
        loop(cell, None, length=length)
        return h.value.sum()

    return T.jit(T.grad(loss, w)).lower().compile().memory_analysis().temp_size_in_bytes


def test_memory_of_checkpointed_scan():
    plain = [temporaries(T.scan, n) for n in (256, 4096)]
    checkpointed = [temporaries(lambda *a, **k: T.checkpointed_scan(*a, base=8, **k), n) for n in (256, 4096)]
    assert plain[1] > 10 * plain[0]
    assert checkpointed[1] < 2 * checkpointed[0]
    assert checkpointed[1] < plain[1] / 20


def test_memory_of_bounded_while_loop():
    def loss_of(n):
        h = HiddenState(jnp.ones(1024))

        def body(i):
            h.value = jnp.sin(h.value)
            return i + 1

        def loss():
            T.bounded_while_loop(lambda i: i < n - 1, body, 0, max_steps=n, base=8)
            return h.value.sum()

        return T.jit(T.grad(loss, h)).lower().compile().memory_analysis().temp_size_in_bytes

    assert loss_of(4096) < 3 * loss_of(64)


# ------------------------------------------------------------------------------------------ the same program


def canonical(jaxpr) -> str:
    """Write a jaxpr with the names of its variables only, which JAX gives in their order."""
    return str(jaxpr)


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"unroll": 2}, {"length": 5}])
def test_jaxpr_of_a_stateful_scan(options):
    w, h = ParamState(jnp.ones(3), name="w"), HiddenState(jnp.zeros(3), name="h")

    def body(c, x):
        h.value = jnp.sin(w.value * h.value + x)
        return c + h.value.sum(), h.value

    def by_hand(values, c, xs):
        w, h = values

        def step(carry, x):
            c, h = carry
            h = jnp.sin(w * h + x)
            return (c + h.sum(), h), h

        (c, h), ys = jax.lax.scan(step, (c, h), xs, **options)
        return c, ys, h

    c, xs = jnp.array(0.0), jnp.ones((5, 3))
    jaxpr, states = T.make_jaxpr(lambda c, xs: T.scan(body, c, xs, **options))(c, xs)
    assert set(states.reads) == {w, h} and states.writes == (h,)
    values = [s.value for s in states.reads]
    order = (lambda v: v) if states.reads == (w, h) else (lambda v: v[::-1])
    expected = jax.make_jaxpr(lambda v, c, xs: by_hand(order(v), c, xs))(values, c, xs)
    assert canonical(jaxpr) == canonical(expected)


def test_jaxpr_of_a_stateful_while_loop():
    h = HiddenState(jnp.zeros(3), name="h")

    def body(n):
        h.value = jnp.sin(h.value)
        return n + 1

    jaxpr, _ = T.make_jaxpr(lambda n: T.while_loop(lambda n: n < 9, body, n))(jnp.array(0))

    def advance(carry):
        h = jnp.sin(carry[1])
        return carry[0] + 1, h

    expected = jax.make_jaxpr(lambda h, n: jax.lax.while_loop(lambda c: c[0] < 9, advance, (n, h)))(
        h.value, jnp.array(0)
    )
    assert canonical(jaxpr) == canonical(expected)


def test_a_state_that_is_read_only_is_not_carried():
    w, h = ParamState(jnp.ones(3), name="w"), HiddenState(jnp.zeros(3), name="h")

    def body(x):
        h.value = h.value * w.value

    def by_hand(values):
        h, w = values

        def step(carry, x):
            return (None, carry[1] * w), None

        return jax.lax.scan(step, (None, h), XS)[0][1]

    jaxpr, states = T.make_jaxpr(lambda: T.for_loop(body, XS))()
    assert states.reads == (h, w) and states.writes == (h,)
    assert canonical(jaxpr) == canonical(jax.make_jaxpr(by_hand)([h.value, w.value]))


# ------------------------------------------------------------------------------------------ nested in one another


def _lanes(step):
    def mapped(values, x):
        n, key = values
        after, sub = jax.random.split(jax.random.wrap_key_data(key, impl=CHEAP))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(sub, jnp.arange(2, dtype=jnp.uint32))

        def lane(key, x):
            y, (n_, _) = step((n, key), x)
            return y, n_

        ys, n = jax.vmap(lane, out_axes=(0, None))(jax.random.key_data(keys), jnp.stack([x, 2 * x]))
        return ys.sum(), (n, jax.random.key_data(after))

    return mapped


def _differentiated(transform):
    def outer(step):
        def run(values, x):
            def swapped(x):
                y, new = step(values, x)
                return y, new

            return transform(swapped, has_aux=True)(x)

        return run

    return outer


def _scanned(step):
    def run(values, x):
        def once(carry, x):
            y, values = step(carry[1], x)
            return (carry[0] + y, values), None

        return jax.lax.scan(once, (jnp.array(0.0), values), jnp.stack([x, 2 * x]))[0]

    return run


def _while(step):
    def run(values, x):
        def body(carry):
            i, y, values = carry
            out, values = step(values, x + y)
            return i + 1, y + 0.1 * out, values

        return jax.lax.while_loop(lambda c: c[0] < 2, body, (0, jnp.array(0.0), values))[1:]

    return run


def _loop_ours(loop):
    def outer(f):
        def run(x):
            return loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] + 0.1 * f(x + c[1])), (0, jnp.array(0.0)))[1]

        return run

    return outer


def _bounded_twin(step):
    def run(values, x):
        def once(carry, _):
            y, values = carry
            out, values = step(values, x + y)
            return (y + 0.1 * out, values), None

        return jax.lax.scan(once, (jnp.array(0.0), values), length=2)[0]

    return run


def _branch(values, x):
    return -x, values


YES = jnp.array(True)
NESTS = {
    "jit": (T.jit, lambda step: lambda v, x: step(v, x)),
    "grad": (T.grad, _differentiated(jax.grad)),
    "jacrev": (T.jacrev, _differentiated(jax.jacrev)),
    "vmap": (lambda f: lambda x: T.vmap(f)(jnp.stack([x, 2 * x])).sum(), _lanes),
    "scan": (
        lambda f: lambda x: T.scan(lambda c, x: (c + f(x), None), jnp.array(0.0), jnp.stack([x, 2 * x]))[0],
        _scanned,
    ),
    "for_loop": (lambda f: lambda x: T.for_loop(f, jnp.stack([x, 2 * x])).sum(), _scanned),
    "while_loop": (_loop_ours(T.while_loop), _while),
    "bounded_while_loop": (
        _loop_ours(lambda c, b, v: T.bounded_while_loop(c, b, v, max_steps=3, base=2)),
        _bounded_twin,
    ),
    "cond": (
        lambda f: lambda x: T.cond(YES, f, lambda x: -x, x),
        lambda step: lambda v, x: jax.lax.cond(YES, step, _branch, v, x),
    ),
    "switch": (
        lambda f: lambda x: T.switch(1, [lambda x: -x, f, lambda x: x], x),
        lambda step: lambda v, x: step(v, x),
    ),
    "checkpoint": (T.checkpoint, lambda step: lambda v, x: jax.checkpoint(step)(v, x)),
}

KINDS = ("grad", "vmap", "scan", "while_loop", "bounded_while_loop", "cond", "checkpoint")  # whose numbers are compared
REVERSE = ("grad", "jacrev")


def made(names):
    """Return States, a function with ``names`` around it, outermost first, and what counts its runs."""
    w, n = ParamState(jnp.float32(1.5), name="w"), State(jnp.int32(0), name="n")
    rng = R.RandomState(jax.random.key(1, impl=CHEAP))
    runs = []

    def f(x):
        runs.append(1)
        n.value += 1
        return jnp.sin(w.value * x) * (1.0 + 0.1 * rng.normal())

    for name in reversed(names):
        f = NESTS[name][0](f)
    return w, (n, rng), f, runs


def nest(names):
    """Compare what ``names`` make of one function with what they make of its twin."""
    w, written, f, runs = made(names)

    def step(values, x):
        key, noise = draw(values[1], CHEAP)
        return jnp.sin(1.5 * x) * (1.0 + 0.1 * noise), (values[0] + 1, key)

    start = tuple(s.value for s in written)
    for name in reversed(names):
        step = NESTS[name][1](step)
    with unchanged(w):
        y = T.jit(f)(jnp.float32(0.3))
    assert len(runs) == 1
    expected, values = jax.jit(step)(start, jnp.float32(0.3))
    close(y, expected, 1e-4)
    close(tuple(s.value for s in written), values)


def _possible(names):
    """Reverse mode does not go through a while loop."""
    return not any(a in REVERSE and "while_loop" in names[i:] for i, a in enumerate(names))


@pytest.mark.long
@pytest.mark.parametrize("outer", KINDS)
def test_pairs(outer):
    for inner in KINDS:
        if _possible((outer, inner)):
            nest((outer, inner))


def test_one_run_of_each_pair():
    for names in itertools.product(NESTS, NESTS):
        if _possible(names):
            _, _, f, runs = made(names)
            T.make_jaxpr(f)(jnp.float32(0.3))
            assert len(runs) == 1, names


@pytest.mark.long
@pytest.mark.parametrize("shift", range(4))
def test_depth_six(shift):
    order = list(itertools.islice(itertools.cycle(NESTS), 3 * shift, 3 * shift + 11))
    names = [name for name in order if name not in ("while_loop", "jacrev")][:6]
    assert len(names) == 6
    nest(names)


@pytest.mark.long
def test_depth_six_with_a_while_loop():
    nest(("jit", "while_loop", "vmap", "cond", "scan", "grad"))
