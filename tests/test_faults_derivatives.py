"""Derivatives that were wrong without a word, and errors that said something else: each fault by its name."""

import gc
import sys
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainstate
from _unchanged import unchanged
from brainstate import (
    DensePatternWarning,
    NoSolutionError,
    ParamState,
    State,
    StateValueError,
)
from brainstate import random as R
from brainstate import transform as T
from brainstate._errors import GradientCheckError, NonFiniteError
from brainstate.transform import check_grads, grad, jit
from brainstate.transform._diagnosis import check_grads as _check
from brainstate.transform._sparse import dependence as _dependence
from planted import LOSSES, RIGHT, is_acquitted, is_found, planted, weights
from transforms import DERIVATIVES

# ------------------------------------------------------------------------------------------ A2: complex estimates


@pytest.mark.parametrize("compiled", [False, True])
def test_a2_complex_forward_gradient(compiled):
    z, r = ParamState(jnp.array([0.5 + 1.7j, -0.3j])), ParamState({"r": jnp.array([1.0, 2.0]), "n": jnp.int32(3)})

    def loss(c):
        return (jnp.abs(z.value) ** 2).sum() * r.value["r"][0] + (z.value**2 * c).imag.sum() * r.value["r"][1]

    wanted, c = grad(loss, {"z": z, "r": r}, 0)(0.3 + 0.4j), 0.3 + 0.4j
    estimate = T.fwd_grad(loss, {"z": z, "r": r}, 0, tangent_size=5000, key=0)
    found = (jit(estimate) if compiled else estimate)(c)
    size = np.sqrt(sum(np.sum(np.abs(leaf) ** 2) for leaf in jax.tree.leaves(wanted)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=5 * size * np.sqrt(2 / 5000))


def test_a2_the_gradient_is_that_of_the_two_parts():
    def loss(z):
        return jnp.abs(z) ** 2 + (z**3).real

    with jax.enable_x64(True):
        z, h = 0.5 + 1.7j, 1e-6
        along = [(loss(z + h * d) - loss(z - h * d)) / (2 * h) for d in (1, 1j)]
        found = T.fwd_grad(loss, tangent_size=20_000, key=1)(jnp.complex128(z))
    np.testing.assert_allclose(found, along[0] - 1j * along[1], rtol=0.05)


def test_a2_explain_sees_an_imaginary_result():
    w = ParamState(jnp.array([2.0, 1.0]), name="w")
    for fun in (lambda x: jax.lax.complex(0 * w.value, x * w.value), lambda x: jax.lax.complex(0.0, x * w.value[0])):
        (row,) = T.explain(fun, 2.0, grad_states=w).rows
        assert row.norm > 0 and not row.cause


# ------------------------------------------------------------------------------------------ A6: overwritten unread


def _write(w, value=2.0):
    w.value = jnp.array(value)


OVERWRITTEN = {
    "read afterwards": lambda w, x: (_write(w), w.value**2)[1],
    "never read": lambda w, x: (_write(w), x**2)[1],
    "in a jit": lambda w, x: (jit(lambda: _write(w))(), w.value**2)[1],
    "in a loop": lambda w, x: T.for_loop(lambda k: (_write(w, 3.0), w.value * k)[1], jnp.arange(1.0, 4.0)).sum(),
    "in a compiled loop": lambda w, x: jit(lambda: T.for_loop(lambda k: _write(w), jnp.arange(3.0)))() or w.value * x,
    "in a checkpointed loop": lambda w, x: T.checkpointed_for_loop(
        lambda k: (_write(w), w.value * k)[1], jnp.arange(1.0, 40.0)
    ).sum(),
    "in both branches": lambda w, x: (T.cond(x > 0, lambda: _write(w), lambda: _write(w, 3.0)), w.value * x)[1],
    "in a checkpoint": lambda w, x: T.checkpoint(lambda: (_write(w), w.value * x)[1])(),
    "in a map": lambda w, x: T.vmap(lambda k: (_write(w), w.value * k)[1])(jnp.arange(1.0, 4.0)).sum(),
    "restored": lambda w, x: (w.restore_value(jnp.array(2.0)), w.value * x)[1],
    "restored in a jit": lambda w, x: (jit(lambda: w.restore_value(jnp.array(2.0)))(), w.value * x)[1],
}


@pytest.mark.parametrize("case", OVERWRITTEN)
def test_a6_overwritten_before_it_is_read(case):
    w = ParamState(jnp.array(3.0), name="w")

    def loss(x):
        return OVERWRITTEN[case](w, x)

    with unchanged(w), pytest.raises(StateValueError, match=r"writes grad_states \(ParamState 'w'\) before it reads"):
        grad(loss, w)(2.0)
    assert grad(loss, w, check_states=False)(2.0) == 0.0


REFUSE = {name: row.derive for name, row in DERIVATIVES.items()} | {
    "jit(grad)": lambda f, w: jit(grad(f, w)),
    "debug_nan": lambda f, w: grad(f, w, debug_nan=True),
    "prepare": lambda f, w: lambda x: T.prepare(grad(f, w), x),
}


@pytest.mark.parametrize("name", REFUSE)
def test_a6_every_derivative_refuses(name):
    w = ParamState(jnp.array(3.0), name="w")

    def loss(x):
        w.value = jnp.array(2.0)
        return w.value * x

    with unchanged(w), pytest.raises(StateValueError, match=r"ParamState 'w'.*before it reads it.*check_states=False"):
        REFUSE[name](loss, w)(2.0)


def test_a6_all_states_are_named_and_what_is_used_is_not():
    a, b, c, d = (ParamState({"u": jnp.array(1.0), "v": jnp.array(2.0)}, name=name) for name in "abcd")

    def loss():
        c.value = {"u": jnp.array(5.0), "v": jnp.array(6.0)}
        d.value["u"] = jnp.array(7.0)
        return a.value["u"] * c.value["u"] + d.value["v"]

    with unchanged(a, b, c, d), pytest.raises(StateValueError) as error:
        grad(loss, [a, b, c, d])()
    text = str(error.value)
    assert "never reads grad_states[1] (ParamState 'b')" in text
    assert "writes grad_states[2] (ParamState 'c') before" in text
    assert "'a'" not in text and "'d'" not in text
    used = grad(loss, [a, d])()
    assert [{k: float(v) for k, v in part.items()} for part in used] == [{"u": 5.0, "v": 0.0}, {"u": 0.0, "v": 1.0}]


def test_a6_what_may_keep_its_value_is_read():
    w = ParamState(jnp.array(3.0))

    def branch(x):
        T.cond(x > 0, lambda: _write(w), lambda: None)
        return w.value**2

    def turns(x):
        T.while_loop(lambda i: i < x, lambda i: (_write(w), i + 1.0)[1], 0.0)
        return w.value * 5.0

    assert [float(grad(branch, w)(x)) for x in (1.0, -1.0)] == [0.0, 4.0]
    w.value = jnp.array(3.0)
    assert [float(T.jacfwd(turns, w)(x)) for x in (-1.0, 1.0)] == [5.0, 0.0]


def test_a6_a_loop_leaves_the_last_value_of_what_it_only_writes():
    s, t = State(1), State({"a": jnp.zeros(2)})

    def body(k):
        s.value = k
        t.value = {"a": jnp.stack([k, k]), "b": k}

    T.for_loop(body, jnp.arange(3.0))
    assert s.value == 2.0 and t.value["a"].tolist() == [2.0, 2.0] and t.value["b"] == 2.0
    T.for_loop(lambda: setattr(s, "value", 5.0), length=0)
    assert s.value == 2.0


# ------------------------------------------------------------------------------------------ A12: planted errors


@pytest.mark.crossing
@pytest.mark.parametrize("float64", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_a12_planted_errors_are_found(loss, float64):
    """One seed for each of three sizes; ``make planted`` takes 200 for each of eight."""
    for seed, size in ((0, 1), (2, 30), (3, 1000)):
        assert is_found(loss, size, seed, float64), (size, seed)


@pytest.mark.parametrize("seed", range(6))
def test_a12_one_wrong_entry_of_a_thousand(seed):
    for loss in ("exp", "beside a large number"):
        assert is_found(loss, 1000, seed, False)


@pytest.mark.parametrize("fault", ["in one precision only", "in a lower precision"])
def test_a12_where_double_precision_says_nothing(fault):
    """A function that does something else in double precision is not judged by it."""
    w = weights(500, 0)

    def fun():
        if fault == "in one precision only" and w.value.dtype != jnp.float32:
            raise TypeError
        return 1e5 + jnp.sum(jnp.sin(w.value.astype(jnp.float32)))

    with unchanged(w):
        check_grads(fun, grad_states=w)


@pytest.mark.long
def test_a12_no_direction_misses_a_wrong_gradient():
    """For 200 seeds and each size: what `check_grads` compares is off by more than it allows, without running it."""
    for size in (1, 2, 3, 10, 100, 1000):
        for seed in range(200):
            rng = np.random.default_rng(seed)
            g = rng.choice([-1, 1], size) * rng.uniform(0.4, 1.0, size)
            slopes = np.array([g @ np.asarray(v[0]) for v in _directions(size, seed)])
            lone = np.array([g[0] * np.asarray(v[0])[0] for v in _directions(size, seed)])
            allowed = np.finfo(np.float32).eps ** (1 / 3) * np.maximum(np.abs(slopes), np.sqrt(np.mean(slopes**2)))
            assert (np.abs(slopes) > 2 * allowed).any() and (np.abs(lone) > allowed).any()


def _directions(size, seed):
    like = [np.zeros(size, np.float32)]
    return [_check.random_like(np.random.default_rng((_check._OWN, seed, n)), like) for n in range(3)]


def test_a12_a_small_gradient_beside_a_large_one():
    small, large = ParamState(jnp.array([0.3, -0.4]), name="small"), ParamState(jnp.ones(50), name="large")
    f = planted(lambda w: 1e-3 * jnp.sum(jnp.sin(w)), lambda g: 2 * g)
    fun = lambda: f(small.value) + jnp.sum(jnp.cos(large.value))  # noqa: E731
    states = [small, large]
    with unchanged(*states), pytest.raises(GradientCheckError, match=r"ParamState 'small'") as error:
        check_grads(fun, grad_states=states, modes="rev", float64=True)
    assert "'large'" not in str(error.value)


@pytest.mark.long
@pytest.mark.parametrize("float64", [False, True])
@pytest.mark.parametrize("loss", RIGHT)
def test_a12_no_false_alarm(loss, float64):
    for seed, size in enumerate((2, 100)):
        assert is_acquitted(loss, size, seed, float64), (size, seed)


@pytest.mark.long
def test_a12_where_the_derivative_vanishes():
    for f in (lambda x: x**3, lambda x: x**2, lambda x: jnp.sum(0.0 * x)):
        check_grads(f, jnp.zeros(3))
        check_grads(f, jnp.zeros(3), float64=True, order=2)


# ------------------------------------------------------------------------------------------ A14: parts without weight


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("filler", [0.0, np.nan, np.inf])
def test_a14_a_part_without_weight_is_dropped(filler, compiled):
    w, level, last = ParamState(jnp.array([2.0, 1.0])), State(jnp.array(0.0)), State(0)

    def loss(x, mask):
        noise = R.normal()
        value = jnp.sum(((x * w.value[None]) ** 2).sum(1), where=mask) / mask.sum().astype(jnp.float32)
        level.value = 0.5 * level.value + value
        last.value = value
        return value, {"value": value, "count": mask.sum(), "noise": noise}

    mask = jnp.array([1, 1, 1, 0, 0, 0, 1, 1]) > 0
    x = jnp.where(mask[:, None], jnp.arange(16.0).reshape(8, 2), filler if filler == 0 else 0.0)
    x = x.at[4:6].set(filler)
    gradient = grad(loss, w, has_aux=True, return_value=True)
    parts = T.accumulate(gradient, 4, weight=lambda x, mask: mask.sum())

    with R.seed_context(3):
        looped = [gradient(x[i : i + 2], mask[i : i + 2]) for i in (0, 2, 6)]
        wanted, key = (level.value, last.value), R.get_key_data()
    level.value, last.value = jnp.array(0.0), 0
    with R.seed_context(3):
        found, value, aux = (jit(parts) if compiled else parts)(x, mask)
        np.testing.assert_array_equal(R.get_key_data(), key)
    counts = [2, 1, 2]
    np.testing.assert_allclose(found, sum(n * g for n, (g, *_) in zip(counts, looped, strict=True)) / 5, rtol=1e-5)
    np.testing.assert_allclose(value, sum(n * v for n, (_, v, _) in zip(counts, looped, strict=True)) / 5, rtol=1e-5)
    np.testing.assert_allclose((level.value, last.value), wanted, rtol=1e-6)
    assert aux["count"].tolist() == [2, 1, 0, 2] and aux["value"][2] == aux["noise"][2] == 0
    np.testing.assert_allclose(aux["noise"][jnp.array([0, 1, 3])], [a["noise"] for *_, a in looped], rtol=1e-6)


def test_a14_nothing_has_weight():
    w = ParamState(jnp.array(2.0))
    parts = T.accumulate(grad(lambda x: jnp.mean(w.value * x), w), 2, weight=lambda x: 0.0)
    assert np.isnan(parts(jnp.ones(4)))


# ------------------------------------------------------------------------------------------ A15: long scans


def _neighbours(x):
    return jax.lax.scan(lambda c, t: (t, t - jnp.sin(c)), x[0], x)[1]


@pytest.mark.parametrize("length", [1000, 2500, 100_000])
def test_a15_a_carry_of_one_step_is_exact_and_linear(length):
    pattern = T.jacobian_sparsity(_neighbours)(jnp.arange(float(length)))
    rows = np.arange(1, length)
    assert pattern.nnz == 2 * length - 1
    wanted = np.sort(np.concatenate([np.arange(length) * (length + 1), rows * length + rows - 1]))
    np.testing.assert_array_equal(pattern.rows * length + pattern.cols, wanted)


@pytest.mark.long
def test_a15_the_matrix_of_a_long_scan():
    matrix = T.sparse_jacobian(_neighbours)(jnp.zeros(3000))
    assert matrix.nse == 5999
    np.testing.assert_array_equal(matrix @ jnp.arange(3000.0), [0.0, *[1.0] * 2999])
    hessian = T.sparse_hessian(lambda x: (_neighbours(x) ** 2).sum() * 0.5)(jnp.zeros(3000))
    assert hessian.nse == 3000 + 2 * 2999


N, X = 24, jnp.sin(jnp.arange(24.0)) + 1.1
LONG = {
    "two steps": lambda x: jax.lax.scan(lambda c, t: ((c[1], t), c[0] * t), (x[0], x[1]), x)[1],
    "reverse": lambda x: jax.lax.scan(lambda c, t: (t, t * c), x[3], x, reverse=True)[1],
    "the last carry": lambda x: jnp.append(*jax.lax.scan(lambda c, t: (t, t * c), x[3], x)[::-1]),
    "vectors": lambda x: jax.lax.scan(lambda c, t: (jnp.roll(t, 1) * x[0], t * c), x[:3], x.reshape(8, 3))[1].ravel(),
    "constants": lambda x: jax.lax.scan(lambda c, t: (t, t * c * x[5] + x[:3].sum()), x[3], x)[1],
    "a branch": lambda x: jax.lax.scan(lambda c, t: (t, jax.lax.cond(t > 0, lambda: c * t, lambda: c)), x[3], x)[1],
    "a scan within": lambda x: jax.lax.scan(
        lambda c, t: (t[-1], jax.lax.scan(lambda d, u: (u, d * u), c, t)[1]), x[0], x.reshape(8, 3)
    )[1].ravel(),
    "a counter": lambda x: jax.lax.scan(
        lambda c, _: ((c[0] + 2, x[c[0] % N]), c[1] * x[(c[0] + 1) % N]), (0, x[0]), length=N
    )[1],
    "integers of integers": lambda x: jax.lax.scan(
        lambda c, t: (((c[0] * 5 + 3) % N, c[2], c[0]), x[c[2]] * t), (1, 2, 0), x
    )[1],
    "a counter in a call": lambda x: jax.lax.scan(
        lambda c, t: ((jax.jit(lambda n: n + 1)(c[0]), t), c[1] * x[c[0]]), (0, x[0]), x
    )[1],
    "indices": lambda x: jax.lax.scan(lambda c, i: (x[i], c * x[i]), x[0], jnp.arange(N)[::-1])[1],
    "a sum beside": lambda x: jax.lax.scan(lambda c, t: ((t, c[1] + t**2), c[0] * t), (x[0], 0.0), x)[1],
}


@pytest.mark.crossing
@pytest.mark.parametrize("case", LONG)
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_a15_all_steps_at_once_are_what_one_after_the_other_is(monkeypatch, case, mode):
    f = LONG[case]
    stepwise = T.sparse_jacobian(f, mode=mode)(X)
    monkeypatch.setattr(_dependence, "UNROLLED", 0)
    with warnings.catch_warnings():
        if mode == "reverse":  # an index that is computed forward is not known backward
            warnings.simplefilter("ignore", DensePatternWarning)
        at_once = T.sparse_jacobian(f, mode=mode)(X)
    np.testing.assert_allclose(at_once.todense(), jax.jacobian(f)(X), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(at_once.indices, stepwise.indices)


def test_a15_what_is_handed_on_for_ever_is_warned_of_at_its_line(monkeypatch):
    def total(x):
        return jax.lax.scan(lambda c, t: (c + t, jnp.sin(c)), 0.0, x)[1]

    line = total.__code__.co_firstlineno + 1
    with pytest.warns(DensePatternWarning, match=rf"the scan at .*test_faults_derivatives.py:{line} has 2600") as seen:
        pattern = T.jacobian_sparsity(total)(jnp.zeros(2600))
    assert pattern.nnz == 2600**2 and {(w.filename, w.lineno) for w in seen} == {(__file__, line)}
    h = State(jnp.array(0.0))
    monkeypatch.setattr(_dependence, "UNROLLED", 100)
    with pytest.warns(DensePatternWarning, match=r"test_faults_derivatives.py:\d+ has 60 steps"):
        T.jacobian_sparsity(lambda x: T.for_loop(lambda t: (setattr(h, "value", h.value * t), h.value)[1], x))(
            jnp.ones(60)
        )


# ------------------------------------------------------------------------------------------ B5: solvers

SOLVERS = {
    "root": lambda w: T.root(lambda y: y**2 - w.value, 1.0),
    "fixed_point": lambda w: T.fixed_point(lambda y: jnp.cos(0.3 * y * w.value), 1.0),
    "argmin": lambda w: T.argmin(lambda y: (y - w.value) ** 2, 1.0),
}


def _solved_and_dropped(name, call):
    w = ParamState(jnp.array(2.0))
    call(lambda: SOLVERS[name](w), w)
    return weakref.ref(w)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("how", ["plain", "grad", "jit"])
def test_b5_no_state_is_kept(name, how):
    call = {"plain": lambda f, w: f(), "grad": lambda f, w: grad(f, w)(), "jit": lambda f, w: jit(f)()}[how]
    reference = _solved_and_dropped(name, call)
    gc.collect()
    assert reference() is None


@pytest.mark.long
@pytest.mark.parametrize("start", [1.0, 40.0, 44.7, 44.72136, 2000.0])
def test_b5_single_precision_far_from_one(start):
    for scale in (1.0, 1e-3, 1e4):
        found = T.root(lambda y, scale=scale: scale * (y**2 - 2000.0), start)
        np.testing.assert_allclose(found, np.sqrt(2000.0), rtol=1e-6)
    pair = T.root(lambda y: jnp.stack([y[0] * y[1] - 6e4, y[0] - 2 * y[1]]), jnp.array([start, start]))
    np.testing.assert_allclose(pair, [np.sqrt(1.2e5), np.sqrt(3e4)], rtol=1e-6)
    target = State(jnp.array(5e5))
    slope = grad(lambda: T.root(lambda y: y**2 - target.value, start), target)()
    np.testing.assert_allclose(slope, 0.5 / np.sqrt(5e5), rtol=1e-5)


def test_b5_a_fixed_point_and_a_minimum_far_from_one():
    found = T.fixed_point(lambda y: 3000.0 + jnp.sin(y / 100), 1.0)
    np.testing.assert_allclose(found, 3000.0 + np.sin(found / 100), rtol=1e-6)
    np.testing.assert_allclose(T.argmin(lambda y: (y - 2000.0) ** 2 / 1e3, 1.0), 2000.0, rtol=1e-4)


@pytest.mark.parametrize("fun", [lambda y: y**2 + 1, jnp.exp, lambda y: jnp.sqrt(jnp.abs(y)) + 1, lambda y: y * 0 + 1])
def test_b5_what_has_no_root_is_not_found(fun):
    for start in (0.0, 1.0, 30.0):
        with pytest.raises(NoSolutionError, match="root found no solution: not within 50 steps"):
            T.root(fun, start, max_steps=50)


@pytest.mark.long
@pytest.mark.parametrize("how", ["plain", "jit", "jit inside", "grad", "twice"])
def test_b5_lanes_that_fail_are_counted(how):
    written, x = State(jnp.array(0.0)), jnp.array([1.0, -1.0, 4.0, -9.0])

    def one(a):
        return T.root(lambda y: y**2 - a, 1.0, max_steps=50)

    lanes = {
        "plain": T.vmap(one),
        "jit": jit(T.vmap(one)),
        "jit inside": T.vmap(jit(one)),
        "grad": lambda x: T.vmap(grad(one))(x),
        "twice": lambda x: T.vmap(T.vmap(one))(x.reshape(2, 2)),
    }[how]

    def step(x):
        out = lanes(x)
        written.value = written.value + 1
        return out

    step = jit(step) if how.startswith("jit") else step
    expected = [1.0, 2.0] if how != "grad" else [0.5, 0.25]
    if how != "twice":
        np.testing.assert_allclose(jax.block_until_ready(lanes(jnp.array([1.0, 4.0]))), expected, rtol=1e-5)
    with unchanged(written), pytest.raises(RuntimeError, match="root found no solution, in 2 of 4 lanes"):
        jax.block_until_ready(step(x))


@pytest.mark.parametrize(
    ("module", "call", "who"),
    [
        ("optimistix", lambda: T.root(lambda y: y, 1.0), "root needs optimistix"),
        ("optimistix", lambda: T.fixed_point(lambda y: y, 1.0), "fixed_point needs optimistix"),
        ("optimistix", lambda: T.argmin(lambda y: y, 1.0), "argmin needs optimistix"),
        ("tqdm", lambda: T.for_loop(lambda k: k, jnp.arange(3), pbar=T.ProgressBar()), "a ProgressBar needs tqdm"),
    ],
)
def test_d_a_missing_library_is_named_with_its_remedy(monkeypatch, module, call, who):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{who}.*pip install {module}"):
        call()


# ------------------------------------------------------------------------------------------ C: Poisson, explain


@pytest.mark.long
def test_c_fisher_of_a_poisson():
    """The exact matrix is the expectation of outer products of scores, and the Hessian of the loss at its mean."""
    with jax.enable_x64(True):
        w = ParamState(jnp.array([0.3, -0.2]), name="w")
        x = jnp.array([[1.0, 0.5], [-0.4, 2.0], [0.1, 0.2]])

        def model(x):
            return jnp.tanh(x @ w.value) * 2

        def loss(v, y):
            f = jnp.tanh(x @ v) * 2
            return (jnp.exp(f) - y * f).sum()  # -log p(y | f) without what does not depend on f

        rate = jnp.exp(model(x))
        exact = T.fisher(model, "poisson", w).operator(x).dense()
        counts = np.arange(60)
        factorials = np.array([float(jax.lax.lgamma(k + 1.0)) for k in counts])
        rates = np.asarray(rate)[None]
        log_p = counts[:, None] * np.log(rates) - rates - factorials[:, None]
        jacobian = np.asarray(T.jacrev(model, w)(x))
        squares = (np.exp(log_p) * (rates - counts[:, None]) ** 2).sum(0)
        np.testing.assert_allclose(exact, np.einsum("i,ia,ib->ab", squares, jacobian, jacobian), rtol=1e-8)
        # With y at its mean the second term of the Hessian vanishes.
        np.testing.assert_allclose(exact, jax.hessian(loss)(w.value, rate), rtol=1e-8)

        y = jnp.array([2.0, 0.0, 1.0])
        empirical = T.fisher(lambda x, y: model(x), "poisson", w, kind="empirical", targets=lambda x, y: y)
        rows = np.stack([jax.grad(_one)(w.value, x[i], y[i]) for i in range(3)])
        np.testing.assert_allclose(empirical.operator(x, y).dense(), rows.T @ rows, rtol=1e-8)
        sampled = T.fisher(model, "poisson", w, kind="sampled", samples=20_000, key=0).operator(x).dense()
        np.testing.assert_allclose(sampled, exact, rtol=0.06)


def _one(v, x, y):
    f = jnp.tanh(x @ v) * 2
    return jnp.exp(f) - y * f


@pytest.mark.parametrize("check", [T.explain, check_grads])
@pytest.mark.parametrize("given", ["state", "list", "module"])
def test_c_a_state_in_the_place_of_an_argument(check, given):
    w = ParamState(jnp.array(2.0), name="w")
    wrong = {"state": w, "list": [w], "module": brainstate.nn.Linear(2, 3)}[given]
    with unchanged(w), pytest.raises(StateValueError, match=rf"{check.__name__}: argument 0 .*grad_states=") as error:
        check(lambda: w.value**2, wrong)
    assert ("'w'" in str(error.value)) == (given != "module")


# ------------------------------------------------------------------------------------------ D: debug_nan


@pytest.mark.parametrize("wide", [False, True])
def test_d_an_exploding_derivative_is_called_so(wide):
    def run(w):
        h = jnp.full(3, 0.5) if wide else jnp.array(0.5)
        h, _ = jax.lax.scan(lambda h, _: (jnp.sin(w @ h if wide else w * h), None), h, None, length=80)
        return h.sum()

    w = 1e3 * jnp.sin(jnp.arange(1.0, 10.0)).reshape(3, 3) if wide else jnp.array(1e3)
    with pytest.raises(NonFiniteError, match="the derivative grows on its way back") as error:
        grad(run, debug_nan=True)(w)
    assert "masked" not in str(error.value) and error.value.phase == "backward"


def test_d_an_overflow_that_meets_a_zero_is_not_a_mask():
    with pytest.raises(NonFiniteError, match="the derivative grows on its way back") as error:
        grad(lambda x: x * 0.0 * 1e20 * 1e20, debug_nan=True)(jnp.array(1.0))
    assert "masked" not in str(error.value)
    with pytest.raises(NonFiniteError, match="masked later"):
        grad(lambda x: jnp.where(x > 0, jnp.sqrt(x), 0.0), debug_nan=True)(0.0)


@pytest.mark.long
def test_d_a_checkpointed_loop_says_that_it_counts_within_a_part():
    def run(loop, x):
        return loop(lambda c, i: (c + jnp.where(i == 13, jnp.log(c - c), 0.0), None), x, jnp.arange(20))[0]

    with pytest.raises(NonFiniteError, match="counted within a part of a checkpointed"):
        grad(lambda x: run(T.checkpointed_scan, x), debug_nan=True)(2.0)
    with pytest.raises(NonFiniteError, match="iteration 13 of 20") as error:
        grad(lambda x: run(T.scan, x), debug_nan=True)(2.0)
    assert "a part of" not in str(error.value)
