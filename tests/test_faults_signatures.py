"""What JAX says and this package said otherwise: positions, integers, pullbacks as pytrees, rules, Modules passed.

Each test is named after its fault. Right values are those of the same program in pure JAX, written beside it.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _unchanged import unchanged
from brainstate import (
    BrainStateError,
    HiddenState,
    ParamState,
    State,
    StateTypeError,
    StateValueError,
    TraceContextError,
    nn,
)
from brainstate import transform as T
from brainstate._errors import a_type
from transforms import DERIVATIVES, rows

FLOAT0 = jax.dtypes.float0
X, Y = 3.0, 4.0
NO_TANGENT = np.zeros((), FLOAT0)


@pytest.fixture
def w():
    return ParamState(jnp.array([1.0, -2.0]), name="w")


def same(got, wanted):
    """Compare two pytrees, leaf by leaf and with their structure."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert jnp.shape(a) == jnp.shape(b)
        if getattr(b, "dtype", None) == FLOAT0:
            assert a.dtype == FLOAT0
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5)


def product(w, x, y):
    return jnp.sum(jnp.sin(w * x) * y**2)


# ------------------------------------------------------------------------------------------ A16: vjp, linearize, jvp


@pytest.mark.parametrize("debug_nan", [False, True])
@pytest.mark.parametrize("context", [lambda f: f, T.jit])
def test_a16_without_arguments_the_states_are_meant(w, context, debug_nan):
    def f():
        return jnp.sin(w.value)

    v, options = jnp.array([0.5, 2.0]), {"grad_states": w, "debug_nan": debug_nan}
    out, tangent = jax.jvp(jnp.sin, (w.value,), (v,))
    (wanted,) = jax.vjp(jnp.sin, w.value)[1](v)
    same(context(lambda: T.vjp(f, **options)[1](v))(), wanted)
    same(context(lambda: T.linearize(f, **options)[1](v))(), tangent)
    same(context(lambda: T.jvp(f, state_tangents=v, **options))(), (out, tangent))
    _, terms = context(lambda: T.taylor(f, order=1, state_directions=v, **options))()
    same(terms[0], tangent)


def test_a16_with_an_argument_the_first_is_meant(w):
    """Users rely on it; what differs from JAX is in the docstring."""
    _, pull = T.vjp(lambda x, y: product(w.value, x, y), X, Y, grad_states=w)
    states, first = pull(1.0)
    same((states, first), jax.grad(product, (0, 1))(w.value, X, Y))
    same(T.vjp(lambda x, y: x * y, X, Y)[1](1.0), Y)
    same(T.vjp(lambda x, y: x * y, X, Y, argnums=(0, 1))[1](1.0), jax.vjp(lambda x, y: x * y, X, Y)[1](1.0))
    _, theirs = jax.linearize(lambda x, y: x * y, X, Y)
    _, ours = T.linearize(lambda x, y: x * y, X, Y, argnums=(0, 1))
    same(ours((2.0, 5.0)), theirs(2.0, 5.0))
    with pytest.raises(StateValueError, match="neither grad_states nor argnums"):
        T.vjp(lambda: w.value, argnums=None)
    with pytest.raises(StateValueError, match=r"argnums=1 selects argument 1, but the call has 0"):
        T.vjp(lambda: w.value, grad_states=w, argnums=1)
    for transform in (T.vjp, T.linearize):
        assert "argnums=(0, 1)" in transform.__doc__


# ------------------------------------------------------------------------------------------ C: positions


# name: a derivative with respect to argument `n` of `product` without States, as jax.grad has it
POSITIONS = {
    name: lambda f, n, row=row: row.gradient(f, argnums=n)(X, Y) for name, row in rows(lambda row: row.gradient).items()
} | {
    "jacfwd in chunks": lambda f, n: T.jacfwd(f, argnums=n, chunk_size=1)(X, Y),
    "jit": lambda f, n: T.jit(T.grad(f, argnums=n))(X, Y),
    "debug_nan": lambda f, n: T.grad(f, argnums=n, debug_nan=True)(X, Y),
    "decorator": lambda f, n: T.grad(argnums=n)(f)(X, Y),
    "prepare": lambda f, n: T.prepare(T.grad(f, argnums=n), X, Y)(X, Y),
}


@pytest.mark.parametrize("numbers", [-1, -2, np.int32(1), np.array(0), (-1, 0), [np.int64(-2), -1], range(2), (-1,)])
@pytest.mark.parametrize("name", POSITIONS)
def test_c_positions_from_the_end_and_of_numpy(w, name, numbers):
    values = w.value
    plain = [int(n) for n in numbers] if isinstance(numbers, tuple | list | range) else int(numbers)
    got = POSITIONS[name](lambda x, y: product(w.value, x, y), numbers)
    same(got, jax.grad(lambda x, y: product(values, x, y), argnums=plain)(X, Y))


def test_c_positions_from_the_end_elsewhere(w):
    """Of second derivatives, with States, on methods, of parts of a batch, and in checks."""

    def f(x, y):
        return product(w.value, x, y)

    values = w.value
    same(T.grad(f, w, -1)(X, Y), jax.grad(product, (0, 2))(values, X, Y))
    hessian = jax.hessian(product, (1, 2))(values, X, Y)
    same(T.hessian(f, argnums=(-2, -1))(X, Y), hessian)
    same(T.hvp(f, argnums=-1)(1.0, X, Y), hessian[1][1])
    same(T.hvp(f, argnums=(-2, -1)).operator(X, Y)[0, 1], hessian[0][1])
    same(T.laplacian(f, argnums=-1)(X, Y), hessian[1][1])
    same(T.ggn(f, lambda out, x, y: out**2 / 2, argnums=-1)(1.0, X, Y), jax.grad(product, 2)(values, X, Y) ** 2)
    T.check_grads(f, X, Y, argnums=-1, float64=True)
    assert "argument 1" in repr(T.explain(lambda x, y: 0.0 * y + x, X, Y, argnums=-1))

    class Model(nn.Module):
        @T.grad(argnums=-1)
        def slope(self, x, y):
            return product(values, x, y)

    same(Model().slope(X, Y), jax.grad(product, 2)(values, X, Y))
    data = jnp.arange(1.0, 5.0)
    parts = T.accumulate(T.grad(lambda x, scale: jnp.mean(x) * scale**2, argnums=-1), 2)
    same(parts(data, Y), 2 * Y * jnp.mean(data))


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (2, "argnums=2 selects argument 2, but the call has 2 positional"),
        (-3, "argnums=-3 selects argument -3, but the call has 2 positional"),
        (2**70, "selects argument 1180591620717411303424"),
        ((0, -2), r"argnums=\(0, -2\) names an argument twice"),
        ((1, 1), r"argnums=\(1, 1\) names an argument twice"),
        ((np.int32(1), 1), "names an argument twice"),
        (True, "argnums=True: positions are Python ints"),
        ("01", "argnums='01': positions are Python ints"),
        (1.0, "argnums=1.0: positions are Python ints"),
        (np.array([0.5]), "positions are Python ints"),
        ({0}, r"argnums=\{0\}: positions are Python ints"),
    ],
)
@pytest.mark.parametrize("name", [*POSITIONS])
def test_c_positions_that_are_none_are_refused_by_name(w, name, numbers, words):
    with unchanged(w), pytest.raises(BrainStateError, match=words):
        POSITIONS[name](lambda x, y: product(w.value, x, y), numbers)


JITS = {"jit": T.jit, "donating": functools.partial(T.jit, donate_states=True)}


@pytest.mark.parametrize("option", ["static_argnums", "donate_argnums"])
@pytest.mark.parametrize(
    "fun", [lambda a, b, c: a, lambda *a: a, lambda a, b, *, key=1: a, lambda: 1, lambda a, **k: a]
)
@pytest.mark.parametrize("name", JITS)
def test_c_jit_takes_the_positions_that_jax_takes(name, fun, option):
    for numbers in (
        0,
        2,
        3,
        -1,
        -3,
        -4,
        -5,
        (0, 3),
        (0, -4),
        (0, 0),
        np.int64(1),
        np.array([1]),
        2**70,
        "x",
        1.0,
        {1},
        range(2),
        np.uint8(255),
    ):

        def outcome(jit, numbers=numbers):
            try:
                return jit(fun, **{option: numbers}) and None
            except Exception as error:
                return type(error), str(error)

        assert outcome(JITS[name]) == outcome(jax.jit), numbers


def test_c_jit_computes_with_positions_of_numpy():
    s = State(jnp.array(0.0), name="s")

    @functools.partial(T.jit, static_argnums=np.int64(1), donate_argnums=np.array([0]))
    def f(x, n):
        s.value += x * n if n > 1 else 0.0
        return 2 * x

    assert f(jnp.array(2.0), 3) == 4.0 and s.value == 6.0


# ------------------------------------------------------------------------------------------ C: integers


def mixed(w, x, n):
    return {"y": w * x * jnp.asarray(n, w.dtype), "n": n}


CT = {"y": jnp.array([1.0, 0.5]), "n": NO_TANGENT}


@pytest.mark.parametrize("debug_nan", [False, True])
@pytest.mark.parametrize("number", [3, True, np.int32(3), jnp.arange(2)], ids=["int", "bool", "numpy", "array"])
def test_c_integer_primals(w, number, debug_nan):
    def f(x, n):
        return mixed(w.value, x, n)

    values, options = w.value, {"debug_nan": debug_nan}
    none = np.zeros(jnp.shape(number), FLOAT0)
    ct = {"y": CT["y"], "n": none}
    _, theirs = jax.vjp(functools.partial(mixed, values), X, number)
    same(T.vjp(f, X, number, argnums=(0, 1), **options)[1](ct), theirs(ct))
    by_states = jax.vjp(lambda w, n: mixed(w, X, n), values, number)[1](ct)
    same(T.vjp(f, X, number, argnums=-1, grad_states=w, **options)[1](ct), by_states)
    tangents = (2.0, none)
    wanted = jax.jvp(functools.partial(mixed, values), (X, number), tangents)
    same(T.jvp(f, (X, number), tangents, **options), wanted)
    _, J = T.linearize(f, X, number, argnums=(0, 1), **options)
    same(J(tangents), wanted[1])
    assert repr(J).startswith("LinearOperator(") and J.structure[1].dtype == FLOAT0


def test_c_integer_primals_compiled_and_mapped(w):
    def f(n):
        return w.value * jnp.asarray(n, "float32")

    def products(n):
        _, pull = T.vjp(f, n, grad_states=w)
        return T.jvp(f, (n,), (NO_TANGENT,), grad_states=w, state_tangents=w.value)[1], pull(w.value)[0]

    v, ns = w.value, jnp.arange(3)
    wanted = jax.vmap(lambda n: (v * n, v * n))(jnp.arange(3.0))
    same(T.vmap(products)(ns), wanted)
    same(T.for_loop(T.jit(products), ns), wanted)


def test_c_what_integers_still_are_not(w):
    def f(x, n):
        return w.value * x * jnp.asarray(n, "float32")

    with pytest.raises(StateValueError, match=r"tangents\[1\] is int32\[\], and its primal is int32\[\]: .*float0"):
        T.jvp(f, (X, 3), (1.0, 1))
    _, J = T.linearize(f, X, 3, argnums=(0, 1))
    with pytest.raises(StateValueError, match=r"argument 1 is int32\[\], where float0\[\] is expected"):
        J((1.0, 1))
    for use in (J.dense, lambda: J.T):
        with pytest.raises(StateTypeError, match=r"argument 1 is of an integer type.* leave it out of argnums"):
            use()
    with pytest.raises(StateTypeError, match="argument 1 is int"):
        T.grad(lambda x, n: x * n, argnums=1)(X, 3)
    with pytest.raises(StateTypeError, match="argument 0 is a str"):
        T.vjp(lambda s: X, "s")
    kept = ParamState({"w": jnp.ones(2), "n": jnp.int32(3)})
    assert T.vjp(lambda: 2 * kept.value["w"], grad_states=kept)[1](jnp.ones(2))["n"] is None


# ------------------------------------------------------------------------------------------ C: value_and_grad


@pytest.mark.parametrize("context", [lambda f: f, T.jit, T.checkpoint])
@pytest.mark.parametrize("debug_nan", [False, True])
def test_c_value_and_grad(w, context, debug_nan):
    n, runs = State(jnp.array(0), name="n"), []

    def f(x, y):
        runs.append(x)
        n.value = n.value + 1
        return product(w.value, x, y), {"aux": x * y}

    values = w.value
    pure = jax.value_and_grad(lambda w, x, y: (product(w, x, y), {"aux": x * y}), (0, 2), has_aux=True)
    (value, aux), (by_w, by_y) = pure(values, X, Y)
    options = {"debug_nan": debug_nan}
    same(context(T.value_and_grad(f, w, 1, has_aux=True, **options))(X, Y), ((value, aux), (by_w, by_y)))
    assert len(runs) == 1 and n.value == 1
    same(context(T.value_and_grad(lambda x, y: f(x, y)[0], w, **options))(X, Y), (value, by_w))
    same(context(T.value_and_grad(lambda x, y: f(x, y)[0], argnums=-1, **options))(X, Y), (value, by_y))
    assert n.value == 3


def test_c_value_and_grad_is_grad_in_everything_else(w):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = ParamState(jnp.array(2.0))
            self.step = T.jit(T.value_and_grad(self.loss, self))

        def loss(self, x):
            return self.w.value**2 * x

        @T.value_and_grad(has_aux=True)
        def slope(self, x):
            return self.w.value * x**2, "text"

    model = Model()
    value, gradient = model.step(X)
    same((value, gradient[("w",)]), (12.0, 12.0))
    assert model.slope(X) == ((18.0, "text"), 12.0)
    parts = T.accumulate(T.value_and_grad(lambda x: (jnp.sum(w.value * jnp.mean(x)), x), w, has_aux=True), 2)
    data = jnp.arange(4.0)
    same(parts(data), ((-1.5, data.reshape(2, 2)), jnp.full(2, 1.5)))
    same(
        T.value_and_grad(lambda z: z**2, holomorphic=True)(1j), jax.value_and_grad(lambda z: z**2, holomorphic=True)(1j)
    )
    same(T.value_and_grad(lambda n: n * 2.0, allow_int=True)(3)[0], 6.0)
    for bad, words in (
        (lambda: T.value_and_grad(lambda x: w.value, w)(1.0), "scalar-output functions"),
        (lambda: T.value_and_grad(lambda x: x, w)(1.0), "never reads grad_states"),
        (lambda: T.value_and_grad(3), "value_and_grad differentiates a function; got int"),
        (lambda: T.value_and_grad(lambda x: x, 1), "argnums=1"),
        (lambda: T.value_and_grad(jnp.log, debug_nan=True)(0.0), "value_and_grad"),
    ):
        with unchanged(w), pytest.raises(BrainStateError, match=words):
            bad()


# ------------------------------------------------------------------------------------------ C: pullbacks are pytrees

BOTH = pytest.mark.parametrize("jit", [jax.jit, T.jit], ids=["jax.jit", "jit"])


@pytest.fixture
def ran():
    """Counts the calls of the function of `pulls`."""
    return []


@pytest.fixture
def pulls(w, ran):
    """Return a function of x that returns (out, pull, aux) of a function that reads a State."""

    def f(x):
        ran.append(1)
        return jnp.sin(w.value * x), {"x": x}

    return lambda x: T.vjp(f, x, grad_states=w, has_aux=True)


def pulled(w, x, ct):
    return jax.vjp(lambda w, x: jnp.sin(w * x), w, x)[1](ct)


def test_c_a_pullback_leaves_a_jit(w, pulls, ran):
    values, ct, compiled = w.value, jnp.array([1.0, 3.0]), T.jit(pulls)
    for x in (X, Y):
        out, pull, aux = compiled(x)
        w.value = jnp.zeros(2)  # it is the pullback at the old value
        same(pull(ct), pulled(values, x, ct))
        same((out, aux), (jnp.sin(values * x), {"x": x}))
        w.value = values
    assert len(ran) == 1


@BOTH
def test_c_a_pullback_enters_a_jit(w, pulls, jit, ran):
    ct, traces = jnp.array([1.0, 3.0]), []

    @jit
    def apply(pull, ct):
        traces.append(1)
        return pull(ct)

    _, pull, _ = pulls(X)
    for scale in (1.0, 2.0):
        same(apply(pull, scale * ct), pulled(w.value, X, scale * ct))
    assert len(traces) == 1
    compiled = T.jit(pulls)
    for x in (X, Y):  # they are of one program
        same(apply(compiled(x)[1], ct), pulled(w.value, x, ct))
    assert len(traces) == 2 and len(ran) == 2


@pytest.mark.parametrize("vmap", [jax.vmap, T.vmap], ids=["jax.vmap", "vmap"])
def test_c_pullbacks_are_mapped(w, pulls, vmap):
    xs, ct = jnp.array([X, Y]), jnp.array([1.0, 3.0])
    wanted = jax.vmap(lambda x: pulled(w.value, x, ct))(xs)
    mapped = vmap(lambda x: pulls(x)[1])(xs)
    same(vmap(lambda pull: pull(ct))(mapped), wanted)
    same(jax.tree.map(lambda leaf: leaf[1], mapped)(ct), pulled(w.value, Y, ct))


def test_c_a_pullback_is_carried_and_branched(w, pulls):
    _, pull, _ = pulls(X)
    cts = jnp.array([[1.0, 3.0], [0.0, 1.0]])
    wanted = jax.vmap(lambda ct: pulled(w.value, X, ct))(cts)
    for scan in (jax.lax.scan, T.scan):
        last, got = scan(lambda pull, ct: (pull, pull(ct)), pull, cts)
        same(got, wanted)
        same(last(cts[0]), pulled(w.value, X, cts[0]))
    same(T.cond(True, lambda pull: pull(cts[0]), lambda pull: pull(cts[1]), pull), pulled(w.value, X, cts[0]))
    same(T.grad(lambda ct: pull(ct)[1])(cts[0]), jax.grad(lambda ct: pulled(w.value, X, ct)[1])(cts[0]))
    # Its residuals are differentiated as any other arrays.
    by_pull = jax.grad(lambda pull: pull(cts[0])[1], allow_int=True)(pull)
    assert jax.tree.structure(by_pull) == jax.tree.structure(pull)


def test_c_a_watched_pullback_leaves_a_jit(w):
    @T.jit
    def make(x):
        return T.vjp(lambda x: jnp.sqrt(w.value * x), x, grad_states=w, debug_nan=True)

    w.value = jnp.array([1.0, 2.0])
    _, pull = make(X)
    ct = jnp.array([1.0, 3.0])
    same(pull(ct), jax.vjp(lambda w, x: jnp.sqrt(w * x), w.value, X)[1](ct))


def _batch(scale):
    return scale * jnp.array([[0.5, 1.0], [2.0, 0.3]])


TARGETS = jnp.array([1.0, 0.0])
OPERATORS = {
    "linearize": lambda w, x: T.linearize(lambda x: jnp.sin(w.value * x), x, grad_states=w, argnums=0)[1],
    "hvp": lambda w, x: T.hvp(lambda x: product(w.value, x, Y), w, 0).operator(x),
    "ggn": lambda w, x: T.ggn(
        lambda a, y: jnp.tanh(a @ w.value), lambda out, a, y: jnp.sum((out - y) ** 2), w
    ).operator(_batch(x), TARGETS),
    "fisher exact": lambda w, x: T.fisher(lambda a: a @ w.value, "bernoulli", w).operator(_batch(x)),
    "fisher sampled": lambda w, x: T.fisher(
        lambda a: jnp.stack([a @ w.value, -a @ w.value], 1), "categorical", w, kind="sampled", key=0
    ).operator(_batch(x)),
    "fisher empirical": lambda w, x: T.fisher(
        lambda a: a @ w.value, "gaussian", w, kind="empirical", targets=lambda a: TARGETS
    ).operator(_batch(x)),
}


@pytest.mark.long
@pytest.mark.parametrize("name", OPERATORS)
def test_c_operators_leave_and_enter_a_jit(w, name):
    make = functools.partial(OPERATORS[name], w)
    wanted = [make(x).dense() for x in (X, Y)]
    compiled, traces = T.jit(make), []

    @T.jit
    def dense(operator):
        traces.append(1)
        return operator.dense()

    for x, matrix in zip((X, Y), wanted, strict=True):
        operator = compiled(x)
        np.testing.assert_allclose(operator.dense(), matrix, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(dense(operator), matrix, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(T.jit(lambda J: J.T)(operator).dense(), matrix.T, rtol=1e-4, atol=1e-5)
    assert len(traces) == 1
    mapped = T.vmap(make)(jnp.array([X, Y]))
    for got, matrix in zip(jax.vmap(lambda J: J.dense())(mapped), wanted, strict=True):
        np.testing.assert_allclose(got, matrix, rtol=1e-4, atol=1e-5)


@BOTH
def test_c_other_results_leave_and_enter_a_jit(jit):
    estimate = jit(lambda x: T.Estimate(x, 2 * x))(T.laplacian(lambda x: jnp.sum(x**2), samples=3)(jnp.ones(4)).mean)
    assert type(estimate) is T.Estimate and estimate.error == 16.0
    pattern = jit(lambda x: T.jacobian_sparsity(lambda x: x**2)(x))(jnp.ones(3))
    assert pattern == T.SparsityPattern([0, 1, 2], [0, 1, 2], (3, 3))
    traces = []

    @jit
    def sparse(pattern, x):
        traces.append(1)
        return T.sparse_jacobian(lambda x: x**2, pattern=pattern, dense=True)(x)

    for p in (pattern, T.SparsityPattern([2, 1, 0], [2, 1, 0], (3, 3))):  # equal ones are one constant
        np.testing.assert_array_equal(sparse(p, jnp.arange(3.0)), np.diag([0.0, 2.0, 4.0]))
    assert len(traces) == 1


# ------------------------------------------------------------------------------------------ C: custom rules


def _spike(custom_jvp, grad):
    @functools.partial(custom_jvp, nondiff_argnums=(1,))
    def spike(x, width):
        return jnp.asarray(x > 0, x.dtype)

    @spike.defjvp
    def rule(width, primals, tangents):
        (x,), (t,) = primals, tangents
        return spike(x, width), t * jnp.maximum(1 - jnp.abs(x) / width, 0)

    return grad(lambda x: jnp.sum(spike(x, 2.0) + spike(width=4.0, x=x)))(jnp.array([0.5, -1.0]))


def _each(custom_jvp, grad):
    f = custom_jvp(lambda x, y: x * y)
    f.defjvps(None, lambda t, out, x, y: 7.0 * t * out)
    return grad(f, argnums=(0, 1))(X, Y)


def _symbolic_jvp(custom_jvp, grad):
    f, seen = custom_jvp(lambda x, y: x * y), []

    @functools.partial(f.defjvp, symbolic_zeros=True)
    def rule(primals, tangents):
        seen.append([type(t).__name__ for t in tangents])
        return primals[0] * primals[1], 5.0 * tangents[0]

    return grad(lambda x: f(x, Y))(X), jnp.array("SymbolicZero" in seen[0])


def _names(custom_vjp, grad):
    f = custom_vjp(lambda n, x, k=2.0: x * n * k, nondiff_argnames=("n", "k"))
    f.defvjp(lambda n, x, k: (x * n * k, x), lambda n, k, x, ct: (10.0 * ct * k * n,))
    return grad(lambda x: f(x=x, n=3.0))(X), grad(lambda x: f(3.0, x, k=5.0))(X)


def _positional(custom_vjp, grad):
    f = custom_vjp(lambda g, x: g(x), (0,))
    f.defvjp(lambda g, x: (g(x), x), lambda g, x, ct: (ct * g(3.0 * x),))
    return grad(lambda x: f(jnp.cos, x))(X)


def _symbolic_vjp(custom_vjp, grad):
    f, seen = custom_vjp(lambda x, y: x * y), []

    def fwd(x, y):
        seen.append((x.perturbed, y.perturbed))
        return x.value * y.value, y.value

    f.defvjp(fwd, lambda y, ct: (5.0 * ct * y, None), symbolic_zeros=True)
    return grad(lambda x: f(x, Y))(X), jnp.array(seen[0])


def _remat(custom_vjp, grad):
    f = custom_vjp(lambda x: x**2)
    f.defvjp(lambda x: (x**2, {"kept": x}), lambda r, ct: (5.0 * ct * r["kept"],), optimize_remat=True)
    return grad(jax.checkpoint(f))(X), jax.vmap(grad(f))(jnp.arange(3.0)), jax.jit(grad(f))(X)


def _trees(custom_vjp, grad):
    @custom_vjp
    def f(p, x):
        """Return something of a tree."""
        return {"out": p["a"] * x, "n": p["b"]}

    f.defvjp(lambda p, x: (f(p, x), p), lambda p, ct: ({"a": 2.0 * ct["out"], "b": -ct["n"]}, ct["out"] * p["a"]))
    return grad(lambda p, x: sum(f(p, x).values()), argnums=(0, 1))({"a": X, "b": Y}, 2.0)


RULES = {
    **{name: (rule, "custom_jvp") for name, rule in {"spike": _spike, "each": _each, "zeros": _symbolic_jvp}.items()},
    **{
        name: (rule, "custom_vjp")
        for name, rule in {
            "names": _names,
            "positional": _positional,
            "zeros, reverse": _symbolic_vjp,
            "remat": _remat,
            "trees": _trees,
        }.items()
    },
}


@pytest.mark.parametrize("name", RULES)
def test_c_rules_written_for_jax_are_taken_as_they_are(name):
    """The same text, once with JAX's functions and once with ours."""
    rule, kind = RULES[name]
    wanted = rule(getattr(jax, kind), jax.grad)
    same(rule(getattr(T, kind), jax.grad), wanted)
    same(rule(getattr(T, kind), T.grad), wanted)
    same(rule(getattr(T, kind), lambda f, **options: T.jit(T.grad(f, **options))), wanted)


def test_c_a_surrogate_gradient_in_a_loop_with_states():
    """The usual neuron: a spike with a rule, and a State that is reset where it spikes."""

    def neuron(custom_jvp):
        spike = custom_jvp(lambda v: jnp.asarray(v > 1.0, v.dtype))
        spike.defjvp(lambda p, t: (spike(*p), t[0] / (1.0 + jnp.abs(p[0] - 1.0)) ** 2))
        return spike

    weight, v = ParamState(jnp.array(0.7)), HiddenState(jnp.array(0.0))
    ours, theirs, inputs = neuron(T.custom_jvp), neuron(jax.custom_jvp), jnp.array([1.0, 0.9, 1.2, 0.2])

    def loss():
        v.value = jnp.array(0.0)

        def step(i):
            s = ours(v.value)
            v.value = 0.9 * v.value * (1 - s) + weight.value * i
            return s

        return jnp.sum(T.for_loop(step, inputs)) + v.value

    def twin(weight):
        def step(v, i):
            s = theirs(v)
            return 0.9 * v * (1 - s) + weight * i, s

        last, spikes = jax.lax.scan(step, jnp.array(0.0), inputs)
        return jnp.sum(spikes) + last

    for transform in (T.grad(loss, weight), T.jit(T.grad(loss, weight))):
        same(transform(), jax.grad(twin)(weight.value))


def test_c_rules_with_states_get_their_values_first(w):
    values = w.value

    def pure(w, x, k):
        return jnp.sum(w * x * k)

    twin = jax.custom_vjp(pure)
    rule = (lambda w, x, k: (pure(w, x, k), (w, x, k)), lambda r, ct: (5.0 * ct * r[0], ct * r[1], 0.0 * r[2]))
    twin.defvjp(*rule)
    ours = T.custom_vjp(lambda x, k=2.0: pure(w.value, x, k), states=w)
    ours.defvjp(*rule)
    wanted = jax.grad(twin, (0, 1))(values, X, 2.0)
    for f in (lambda x: ours(x), lambda x: ours(x=x), lambda x: ours(x, k=2.0), T.jit(ours)):
        same(T.grad(f, w, 0)(X), wanted)
    each = T.custom_jvp(lambda x: jnp.sum(w.value * x), states={"w": w})
    each.defjvps(lambda t, out, v, x: 7.0 * jnp.sum(t["w"]) * x, None)
    same(T.grad(each, w, 0)(X), (jnp.full(2, 21.0), 0.0))
    placed = T.custom_vjp(lambda g, x: jnp.sum(w.value * g(x)), (0,), states=w)
    placed.defvjp(lambda v, g, x: (jnp.sum(v * g(x)), v), lambda g, v, ct: (ct * v, g(ct)))
    same(T.grad(lambda x: placed(jnp.exp, x), w, 0)(X), (values, jnp.exp(1.0)))


@pytest.mark.parametrize("custom", [T.custom_jvp, T.custom_vjp])
def test_d_positions_of_rules(custom):
    for numbers in (
        jnp.array([0.5]),
        np.array([0.5, 1.0]),
        jnp.array([0]),
        (-1,),
        (0, 0),
        (5,),
        (1.0,),
        "x",
        True,
        None,
    ):
        with pytest.raises(StateValueError, match=f"{custom.__name__}: nondiff_argnums=.*ints from 0 up in a tuple"):
            custom(lambda x, y: x, nondiff_argnums=numbers)
    for numbers in (0, (np.int32(0),), [0], np.array([0])):
        assert callable(custom(lambda x, y: x, nondiff_argnums=numbers))
    assert callable(custom(lambda *args: args[0], nondiff_argnums=(5,)))


# ------------------------------------------------------------------------------------------ A17: a Module as argument


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = ParamState(jnp.array([1.0, 2.0]))

    def update(self, x):
        return jnp.sum(self.w.value * x)


def loss_of(model):
    return model(X)


SAYS_SO = {
    "grad": lambda f, m: jax.grad(f)(m),
    "in a container": lambda f, m: jax.grad(lambda tree: f(tree["m"]))({"m": m, "x": 1.0}),
    "value_and_grad": lambda f, m: jax.value_and_grad(f)(m),
    "jacrev": lambda f, m: jax.jacobian(f)(m),
    "jacfwd": lambda f, m: jax.jacfwd(f)(m),
    "hessian": lambda f, m: jax.hessian(f)(m),
    "jvp": lambda f, m: jax.jvp(f, (m,), (m,)),
    "linearize": lambda f, m: jax.linearize(f, m),
    "vmap": lambda f, m: jax.vmap(f)(m),
    "scan": lambda f, m: jax.lax.scan(lambda m, _: (m, f(m)), m, None, length=2),
} | {
    f"{name}, ours": lambda f, m, row=row: row.derive(f, **row.options)(m)
    for name, row in (DERIVATIVES | rows(lambda row: row.name == "value_and_grad")).items()
    if not row.batched
}


@pytest.mark.parametrize("name", SAYS_SO)
def test_a17_a_module_is_no_argument(name):
    model = Scale()
    with unchanged(model.w), pytest.raises((StateTypeError, TraceContextError), match=r"Scale.*grad_states"):
        SAYS_SO[name](loss_of, model)


def test_a17_a_module_is_asked_by_nobody_else():
    """It is an object as any other for hasattr, operators, callbacks, static arguments and aux."""
    model, x = Scale(), jnp.array(X)
    assert not hasattr(model, "__jax_array__") and getattr(model, "__jax_array__", None) is None
    assert not jax.extend.core.valid_jaxtype(model)
    same(x >> model, 9.0)
    with pytest.raises(TypeError, match="unsupported operand"):
        x + model
    assert jax.tree.leaves({"a": model}) == [model]
    assert T.grad(lambda x: (model(x), model), has_aux=True)(X)[1] is model
    same(jax.jit(lambda m, x: x**2, static_argnums=0)(model, X), 9.0)
    shown = []
    jax.debug.callback(lambda m: shown.append(m), model)
    jax.effects_barrier()
    assert shown == [model]
    same(T.checkpoint(lambda m, x: m(x))(model, X), 9.0)
    same(T.grad(lambda: model(X), model)()[("w",)], jnp.full(2, X))


@pytest.mark.parametrize("way", ["grad", "value_and_grad", "vjp", "in jit", "in our jit", "in a container"])
def test_a17_equinox_finds_nothing_in_a_module(way):
    """It asks a Module nothing, and its gradient would be None: the States refuse."""
    eqx = pytest.importorskip("equinox")
    ways = {
        "grad": lambda m: eqx.filter_grad(loss_of)(m),
        "value_and_grad": lambda m: eqx.filter_value_and_grad(loss_of)(m),
        "vjp": lambda m: eqx.filter_vjp(loss_of, m),
        "in jit": lambda m: eqx.filter_jit(eqx.filter_grad(loss_of))(m),
        "in our jit": lambda m: T.jit(lambda: eqx.filter_grad(loss_of)(m))(),
        "in a container": lambda m: eqx.filter_grad(lambda ms: loss_of(ms[0]))([m]),
    }
    model = Scale()
    with pytest.raises(TraceContextError, match=r"\(Scale\).*grad_states=module"):
        ways[way](model)
    assert eqx.filter_grad(lambda x: x * loss_of(model))(jnp.float32(1)) == loss_of(model)


# ------------------------------------------------------------------------------------------ D: messages, attributes


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (1, r"grad_states is an int, not a State. The positions of arguments go by name: argnums=1\."),
        (np.int64(1), r"grad_states is an int64, .*argnums=1\."),
        ((0, 1), r"grad_states\[0\] is an int, .*argnums=0\."),
        (True, "grad_states is a bool, not a State. Pass a State"),
        (jnp.ones(2), "grad_states is an ArrayImpl, .*by argnums, and the value of a State by its State"),
        ([1.5], r"grad_states\[0\] is a float, .*by argnums"),
        ("frozen", r"grad_states is a str, .*\(model, filter\)"),
        (ParamState, r"grad_states is a type, .*\(model, filter\)"),
        (lambda path, state: True, r"grad_states is a function, .*\(model, filter\)"),
        (object(), "grad_states is an object, not a State. Pass a State"),
    ],
)
@pytest.mark.parametrize("transform", [T.grad, T.hvp, lambda f, s: T.vjp(f, 1.0, grad_states=s)])
def test_d_what_was_meant_by_grad_states(transform, given, words):
    with pytest.raises(StateTypeError, match=words):
        transform(lambda x: x, given)


def test_d_articles():
    """No message says `a int`."""
    for bad, words in (
        (lambda: T.jvp(lambda x: x, 3, (1.0,)), "primals is an int;"),
        (lambda: T.tap(3, 1.0), "the name is an int"),
        (lambda: T.ggn(lambda x: x, 3), "loss_fn is an int"),
        (lambda: T.grad(lambda x: 3, has_aux=True)(1.0), "returned an array|returned an int"),
        (lambda: ParamState(1.0).copy_from(3), "take over an int|an int"),
    ):
        with pytest.raises((BrainStateError, AttributeError), match=words):
            bad()


def test_d_articles_of_names():
    assert [a_type(x) for x in (1, [], np.uint8(1), object())] == ["an int", "a list", "a uint8", "an object"]


def tagged():
    def f(x):
        """Square a number."""
        return x**2

    f.custom, f._private = 1, [2]
    f.lower = f.target = f.fn = f.fun = "the function's"
    return f


WRAPPERS = {name: row.transform for name, row in rows(lambda row: row.decorates).items()} | {
    "ggn": lambda f: T.ggn(f, f),
    "accumulate": lambda f: T.accumulate(T.grad(f), 2),
    "checkify": T.checkify,
    "make_jaxpr": T.make_jaxpr,
    "stop_gradient": T.stop_gradient,
    "prepare": lambda f: T.prepare(f, 1.0),
    "jit(grad)": lambda f: T.jit(T.grad(f)),
    "grad(jit)": lambda f: T.grad(T.jit(f)),
    "grad(checkpoint(jit))": lambda f: T.grad(T.checkpoint(T.jit(f))),
    "grad(jax.jit)": lambda f: T.grad(jax.jit(f)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_c_attributes_of_the_function_are_on_what_is_made_of_it(name):
    f = tagged()
    made = WRAPPERS[name](f)
    assert made.custom == 1 and made._private is f._private
    assert (made.__name__, made.__doc__, made.__module__) == (f.__name__, f.__doc__, f.__module__)
    assert made.__wrapped__ is not None


def test_c_own_attributes_stay():
    f = tagged()
    assert T.jit(f).lower(2.0).compile()(2.0) == 4.0
    assert T.grad(f).target is f and T.grad(f)(3.0) == 6.0
    assert T.vmap(f)(jnp.arange(2.0)).tolist() == [0.0, 1.0]

    class Model:
        def m(self, x):
            return x**2

        m.custom = 5
        compiled, slope, both = T.jit(m), T.grad(m), T.jit(T.grad(m))

    model = Model()
    for bound in (model.compiled, model.slope, model.both, T.jit(model.m)):
        assert bound.custom == 5 and bound(1.0) in (1.0, 2.0)
    # An object's own parts are not taken for attributes of a function: they would not follow it.
    layer = Scale()
    assert not hasattr(T.jit(layer), "w") and T.jit(layer)(X) == 9.0
    assert not re.findall("_program|_journal", " ".join(vars(T.grad(T.checkpoint(T.jit(f))))))
