"""``laplacian``, ``taylor`` and the variance of ``fwd_grad``: analytic references, nested JAX, States, misuse."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from _unchanged import unchanged
from brainstate import ParamState, State, StateTypeError, StateValueError, nn, random
from brainstate import transform as T


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def same(got, expected, tolerance=1e-9):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert jnp.shape(a) == jnp.shape(b) and jnp.result_type(a) == jnp.result_type(b)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


X = np.array([0.3, -0.7, 1.2])

# ------------------------------------------------------------------------------------------ laplacian

ANALYTIC = {
    "a harmonic polynomial": (lambda x: x[0] ** 2 - x[1] ** 2 + x[0] * x[2], 0.0),
    "a harmonic function": (lambda x: jnp.exp(x[0]) * jnp.cos(x[1]), 0.0),
    "1 / |x| in three dimensions": (lambda x: 1 / jnp.linalg.norm(x), 0.0),
    "|x|²": (lambda x: (x**2).sum(), 2.0 * 3),
    "|x|⁴": (lambda x: (x**2).sum() ** 2, 4 * (3 + 2) * (X**2).sum()),
    "a Gaussian": (lambda x: jnp.exp(-(x**2).sum() / 2), ((X**2).sum() - 3) * np.exp(-(X**2).sum() / 2)),
    "exp of a sum": (lambda x: jnp.exp(x.sum()), 3 * np.exp(X.sum())),
    "a linear function": (lambda x: 2 * x.sum(), 0.0),
    "each entry": (lambda x: {"y": x**3, "z": (jnp.sin(x),)}, {"y": 6 * X, "z": (-np.sin(X),)}),
}


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("name", ANALYTIC)
def test_laplacian_of_known_functions(name, size, double):
    function, expected = ANALYTIC[name]
    same(T.jit(T.laplacian(function, chunk_size=size))(jnp.asarray(X)), jax.tree.map(jnp.asarray, expected), 1e-12)


class Model:
    """Parameters beside an integer, a counter and a trace; with noise, on demand."""

    def __init__(self):
        self.w = ParamState(jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), name="w")
        self.p = ParamState({"b": jnp.array([0.5, -0.2]), "n": jnp.array(2)}, name="p")
        self.count, self.trace = State(jnp.array(0)), State(jnp.zeros(2))
        self.rng = random.RandomState(2)
        self.runs = 0

    def __call__(self, x):
        self.runs += 1
        self.count.value += 1
        self.trace.value = jnp.tanh(x @ self.w.value + self.p.value["b"])
        return self.trace.value * jnp.exp(x.sum())

    def noisy(self, x):
        return (self(x) * self.rng.normal(size=2, dtype=x.dtype)).sum(), {"note": "text"}


def twin(w, b, x):
    return jnp.tanh(x @ w + b) * jnp.exp(x.sum())


@pytest.mark.parametrize("size", [None, 4])
def test_laplacian_with_states(size, double):
    model, x = Model(), jnp.asarray(X)
    flat, unravel = ravel_pytree((model.w.value, model.p.value["b"], x))
    trace = jnp.trace(jax.hessian(lambda flat: twin(*unravel(flat)))(flat), axis1=1, axis2=2)
    transform = T.laplacian(model, [model.w, model.p], [0], return_value=True, chunk_size=size)
    same(transform(x), (trace, twin(model.w.value, model.p.value["b"], x)))
    same(model.trace.value, jnp.tanh(x @ model.w.value + model.p.value["b"]))
    assert model.runs == model.count.value == 1
    same(T.jit(transform)(x)[0], trace)
    assert model.runs == model.count.value == 2
    one = T.jit(T.jacfwd(lambda x: T.laplacian(model, model.w, chunk_size=size)(x).sum()))(x)

    start, b = model.w.value.ravel(), model.p.value["b"]

    def by_hand(x):
        hessian = jax.hessian(lambda w: twin(w.reshape(3, 2), b, x))(start)
        return jnp.trace(hessian, axis1=1, axis2=2).sum()

    same(one, jax.jit(jax.jacfwd(by_hand))(x))


@pytest.mark.long
@pytest.mark.parametrize("size", [None, 2])
def test_laplacian_draws_once(size):
    def summed(w):
        return twin(w.reshape(3, 2), model.p.value["b"], x) @ noise

    model, x = Model(), jnp.asarray(X, "float32")
    generator = random.RandomState(2)
    noise = generator.normal(size=2, dtype="float32")
    lap, value, aux = T.laplacian(model.noisy, model.w, has_aux=True, return_value=True, chunk_size=size)(x)
    assert aux == {"note": "text"} and (model.rng.value == generator.value).all()
    flat = model.w.value.ravel()
    same((lap, value), (jnp.trace(jax.hessian(summed)(flat)), summed(flat)), 1e-4)


def test_concrete_values_where_nothing_is_mapped():
    @T.laplacian
    def f(x):
        return (x**2).sum() if x.sum() > 0 else (x**4).sum()

    assert f(jnp.ones(3)) == 6.0 and f(-jnp.ones(3)) == 36.0


def test_stochastic_laplacian(double):
    """The estimate lies within five of its standard errors, and these are what the formula says."""
    a = np.random.default_rng(0).normal(size=(6, 6))
    hessian = a + a.T
    x, samples = jnp.ones(6), 4000

    def f(x):
        return {"q": x @ jnp.asarray(hessian / 2) @ x, "diagonal": (x**3).sum()}

    draw = T.laplacian(f, samples=samples, key=1, return_value=True)
    estimate, value = T.jit(draw)(x)
    assert isinstance(estimate, T.Estimate)
    same(value, f(x))
    predicted = math.sqrt(2 * ((hessian**2).sum() - (np.diag(hessian) ** 2).sum()) / samples)
    assert abs(estimate.mean["q"] - np.trace(hessian)) < 5 * predicted
    # The sample deviation of so many values of a kurtosis below 15 is right to within 15 %.
    np.testing.assert_allclose(estimate.error["q"], predicted, rtol=0.15)
    same((estimate.mean["diagonal"], estimate.error["diagonal"]), (jnp.array(36.0), jnp.array(0.0)), 1e-10)
    same(T.jit(T.laplacian(f, samples=samples, key=1, chunk_size=700))(x), estimate)


def test_stochastic_laplacian_and_the_default_generator():
    def f(x):
        return (x.sum() * random.normal()) ** 2

    random.seed(0)
    transform = T.laplacian(f, samples=3)
    first, second = transform(jnp.ones(3)), transform(jnp.ones(3))
    assert first.mean != second.mean
    random.seed(0)
    same(T.jit(transform)(jnp.ones(3)), first, 1e-5)
    before = random.DEFAULT.value

    def failing(x):
        raise ZeroDivisionError("mine")

    for estimate in (T.laplacian(failing, samples=3), T.fwd_grad(failing), T.fwd_grad(failing, tangent_size=2)):
        with unchanged(random.DEFAULT), pytest.raises(ZeroDivisionError, match="mine"):
            estimate(jnp.ones(3))
    assert (random.DEFAULT.value == before).all()


def test_memory_of_the_laplacian():
    def f(x):
        h = jnp.linspace(0.0, 1.0, 20_000)
        for _ in range(2):
            h = jnp.sin(jnp.cumsum(h) * x.sum() + h[::-1])
        return h.sum()

    def temporary(**options):
        program = T.jit(T.laplacian(f, **options)).lower(jnp.ones(100)).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(chunk_size=5) < temporary() / 8
    assert temporary(samples=100, chunk_size=5) < temporary(samples=100) / 5


# ------------------------------------------------------------------------------------------ taylor


def nested(f, x, v, order):
    """Return the Taylor coefficients of ``f(x + t v)`` by nested ``jax.jvp``."""

    def longer(derivatives):
        def run(t):
            found, slopes = jax.jvp(derivatives, (t,), (1.0,))
            return [*found, slopes[-1]]

        return run

    derivatives = lambda t: [f(jax.tree.map(lambda x, v: x + t * v, x, v))]  # noqa: E731
    for _ in range(order):
        derivatives = longer(derivatives)
    return [jax.tree.map(lambda d, k=k: d / math.factorial(k), out) for k, out in enumerate(derivatives(0.0))]


M = np.array([[0.2, -0.5, 0.1], [0.4, 0.3, -0.2], [0.1, 0.6, 0.5]])


def loop(c, a):
    return jnp.sin(c) * a + c, c * a


FUNCTIONS = {
    "elementary": lambda x: jnp.sin(x) * jnp.exp(-x) / (1 + x**2),
    "roots and logs": lambda x: jnp.sqrt(x**2 + 1) + jnp.log1p(x**2) + jnp.abs(x) ** 1.7,
    "activations": lambda x: jnp.tanh(x) + jax.nn.sigmoid(x) + jax.nn.softplus(x) + jax.nn.gelu(x) + jax.nn.relu(x),
    "softmax": lambda x: jax.nn.softmax(x) * jax.nn.logsumexp(x),
    "special": lambda x: jax.scipy.special.erf(x) + jnp.arctan2(x, 2.0) + jnp.arcsinh(x),
    "a zero of a power": lambda x: (x - 0.3) ** 3,
    "products": lambda x: jnp.outer(x, x**2) @ M @ x,
    "convolution": lambda x: jnp.convolve(x, x),
    "pieces": lambda x: jnp.clip(x, -0.5, 0.9) * jnp.where(x > 0, x**2, jnp.maximum(x, x[0])),
    "indices": lambda x: jnp.concatenate([x[np.array([2, 0])] ** 2, x[::-1]]).at[1].add(x[0] ** 2),
    "sorted": lambda x: jnp.cumsum(jnp.sort(x**2)) * jnp.prod(x),
    "linear algebra": lambda x: jnp.linalg.solve(jnp.diag(x) + M, x),
    "complex": lambda x: jnp.abs(jnp.exp(1j * x.astype(complex)) + 2 * x.astype(complex)),
    "stopped": lambda x: jax.lax.stop_gradient(x) * x,
    "scan": lambda x: jax.lax.scan(loop, x[1], x),
    "a carry that begins constant": lambda x: jax.lax.scan(loop, 1.0, x, reverse=True),
    "while": lambda x: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1]) * c[1]), (0, x))[1],
    "cond": lambda x: jax.lax.cond(x[0] > 0, lambda x: (jnp.sin(x) * x, 1.0), lambda x: (x, x[0]), x),
    "switch": lambda x: jax.lax.switch(1, [jnp.sin, jnp.cos], x),
    "nested programs": jax.jit(lambda x: jax.checkpoint(lambda x: jnp.sin(jax.jit(jnp.exp)(x)))(x)),
    "vmap of a loop": lambda x: jax.vmap(lambda a: jax.lax.scan(loop, a, x)[0])(x),
    "constant": lambda x: {"c": jnp.ones(2), "x": x},
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_taylor_against_nested_derivatives(name, double):
    function, x, v = FUNCTIONS[name], jnp.asarray(X), jnp.array([1.0, -0.5, 2.0])
    value, terms = T.jit(lambda x, v: T.taylor(function, (x,), (v,), 3))(x, v)
    same([value, *terms], jax.jit(lambda x, v: nested(function, x, v, 3))(x, v))


def test_taylor_of_high_order(double):
    x = jnp.array(0.5)
    for f, derivative in (
        (jnp.exp, lambda k: np.exp(0.5)),
        (jnp.sin, lambda k: np.sin(0.5 + k * np.pi / 2)),
        (lambda x: 1 / (1 - x), lambda k: math.factorial(k) * 2.0 ** (k + 1)),
        (jnp.log, lambda k: -((-2.0) ** k) * math.factorial(k - 1)),
    ):
        _, terms = T.taylor(f, (x,), (1.0 + 0 * x,), 15)
        np.testing.assert_allclose(terms, [derivative(k) / math.factorial(k) for k in range(1, 16)], rtol=1e-10)
    value, terms = T.taylor(lambda x: jnp.sin(x) * jnp.exp(x), (x,), (jnp.array(1.0),), 15)
    polynomial = sum((c * 0.3**k for k, c in enumerate(terms, 1)), value)  # with the radius of convergence unbounded
    np.testing.assert_allclose(polynomial, np.sin(0.8) * np.exp(0.8), rtol=1e-14)


class Recurrent(nn.Module):
    """A recurrent network with a counter, noise, and loops of ours."""

    def __init__(self):
        super().__init__()
        self.w = ParamState({"in": jnp.array([0.5, -1.0]), "n": jnp.array(3)}, name="w")
        self.h, self.count = State(jnp.zeros(2), name="h"), State(jnp.array(0))
        self.rng = random.RandomState(4)
        self.runs = 0

    def __call__(self, xs):
        self.runs += 1

        def step(x):
            self.count.value += 1
            noise = self.rng.normal(size=2, dtype=x.dtype)
            self.h.value = jnp.tanh(self.h.value * 0.5 + self.w.value["in"] * x + 0.1 * noise)
            return T.cond(x > 0.5, lambda: self.h.value.sum(), lambda: self.h.value[0] ** 2)

        return T.for_loop(step, xs)


@pytest.mark.parametrize("wrap", [lambda f: f, T.jit])
def test_taylor_through_a_stateful_model(wrap, double):
    net, xs = Recurrent(), jnp.array([0.2, 0.9, 0.4])
    along, state_along = jnp.array([1.0, 0.0, -2.0]), {"in": jnp.array([0.3, 0.1]), "n": None}
    rng = random.RandomState(4)
    noise = [rng.normal(size=2, dtype=xs.dtype) for _ in xs]

    def by_hand(inputs):
        w, xs = inputs
        h, ys = jnp.zeros(2), []
        for x, n in zip(xs, noise, strict=True):
            h = jnp.tanh(h * 0.5 + w * x + 0.1 * n)
            ys.append(jnp.where(x > 0.5, h.sum(), h[0] ** 2))
        return jnp.stack(ys)

    def ours(xs):
        return T.taylor(net, (xs,), (along,), 4, grad_states=net.w, state_directions=state_along)

    expected = jax.jit(lambda *start: nested(by_hand, start, (state_along["in"], along), 4))(net.w.value["in"], xs)
    value, terms = wrap(ours)(xs)
    same([value, *terms], expected)
    assert net.runs == 1 and net.count.value == 3 and (net.rng.value == rng.value).all()
    assert not isinstance(net.h.value, jax.core.Tracer)


@pytest.mark.long
@pytest.mark.parametrize("name", ["elementary", "scan"])
def test_taylor_inside_other_transforms(name, double):
    function, x, v = FUNCTIONS[name], jnp.asarray(X), jnp.ones(3)

    def total(tree):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree))

    ours = T.jit(T.grad(lambda x: total(T.taylor(function, (x,), (v,), 3)[1])))
    theirs = jax.jit(jax.grad(lambda x: total(nested(function, x, v, 3)[1:])))
    same(ours(x), theirs(x))
    lanes = T.jit(T.vmap(lambda x: T.taylor(function, (x,), (v,), 3)[1]))(jnp.stack([x, 2 * x]))
    same(lanes, jax.vmap(lambda x: nested(function, x, v, 3)[1:])(jnp.stack([x, 2 * x])))


def test_taylor_first_terms_are_jvp_and_hessian_vector(double):
    w, x, v, u = ParamState(jnp.asarray(M)), jnp.asarray(X), jnp.array([1.0, 2.0, 3.0]), jnp.asarray(M.T)

    def f(x):
        return (jnp.sin(w.value @ x) * x).sum(), {"note": "text", "x": x}

    options = {"grad_states": [w], "has_aux": True}
    value, terms, aux = T.taylor(f, (x,), (v,), 2, state_directions=[u], **options)
    again, slope, _ = T.jvp(f, (x,), (v,), state_tangents=[u], **options)
    flat, unravel = ravel_pytree((w.value, x))
    along = ravel_pytree((u, v))[0]
    hessian = jax.hessian(lambda flat: (lambda w, x: (jnp.sin(w @ x) * x).sum())(*unravel(flat)))(flat)
    same([value, *terms], [again, slope, along @ hessian @ along / 2])
    assert aux["note"] == "text"
    same(aux["x"], x)


def test_taylor_follows_custom_derivatives(double):
    """What the user says the derivative is, is what is used: jet alone would look inside."""

    @jax.custom_jvp
    def spike(x):
        return (x > 0).astype(x.dtype)

    spike.defjvp(lambda primals, tangents: (spike(primals[0]), tangents[0] / (1 + primals[0] ** 2)))
    x, v = jnp.asarray(X), jnp.ones(3)
    value, terms = T.taylor(lambda x: spike(x) * x, (x,), (v,), 3)
    same([value, *terms], nested(lambda x: spike(x) * x, x, v, 3))
    with pytest.raises(StateValueError, match=r"order=9.*'custom_jvp_call'.*up to order 8"):
        T.taylor(spike, (x,), (v,), 9)


def test_taylor_of_what_is_not_differentiable():
    seen = []

    def f(x):
        jax.debug.callback(lambda x: seen.append(x.item()), x)
        return {"n": (x > 0).astype(int), "y": x**2}

    value, terms = T.taylor(f, (1.0,), (1.0,), 2)
    jax.effects_barrier()
    assert value["n"] == 1 and terms == [{"n": None, "y": 2.0}, {"n": None, "y": 1.0}]
    assert set(seen) == {1.0}
    backward = jax.custom_vjp(jnp.sin)
    backward.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    with pytest.raises(StateTypeError, match=r"reverse mode only.*custom_jvp"):
        T.taylor(backward, (1.0,), (1.0,), 2)
    for size in (None, 1):
        with pytest.raises(StateTypeError, match=r"reverse mode only.*custom_jvp"):
            T.laplacian(lambda x: backward(x).sum(), chunk_size=size)(jnp.ones(2))


def test_taylor_runs_in_a_program_that_grows_with_the_square_of_the_order():
    def equations(order):
        program = jax.make_jaxpr(lambda x: T.taylor(lambda x: jnp.sin(jnp.exp(x)) * x, (x,), (x,), order))(1.0)
        return len(program.jaxpr.eqns)

    assert equations(16) < 5 * equations(8)


# ------------------------------------------------------------------------------------------ fwd_grad


@pytest.mark.parametrize("directions", [1, 8])
def test_the_variance_of_fwd_grad(directions, double):
    """Over ``m`` calls, mean and variance of each entry lie within five standard deviations of the formula.

    The squared error of an entry has a heavy tail for one direction; its fourth moment is at most 225 times the
    squared variance (a product of four normal variables), so that of its mean is at most ``15 / sqrt(m)`` relative.
    """
    calls = 40_000
    c = jnp.array([1.0, -2.0, 0.5])
    w = ParamState(jnp.zeros(1))

    def estimate(key):
        transform = T.fwd_grad(lambda x: x @ c + 3 * w.value[0], w, 0, tangent_size=directions, key=key)
        of_w, of_x = transform(jnp.ones(3))
        return jnp.concatenate([of_w, of_x])

    found = T.jit(T.vmap(estimate))(jax.random.split(jax.random.key(0), calls))
    gradient = np.array([3.0, 1.0, -2.0, 0.5])
    variance = ((gradient**2).sum() + gradient**2) / directions
    assert (np.abs(found.mean(0) - gradient) < 5 * np.sqrt(variance / calls)).all()
    np.testing.assert_allclose(found.var(0), variance, rtol=5 * 15 / math.sqrt(calls) / math.sqrt(directions))


# ------------------------------------------------------------------------------------------ misuse

w = ParamState(jnp.array([1.0, 2.0]), name="w")
idle = ParamState(jnp.array(4.0), name="idle")
cache = State(jnp.array(0), name="cache")


def loss(x):
    cache.value += 1
    return (w.value * x).sum() ** 2


L, ONE = T.laplacian, jnp.array(1.0)
MISUSE = {
    "chunk_size=0": (lambda: L(loss, chunk_size=0), StateValueError, "laplacian: chunk_size=0.*int from 1 up"),
    "chunk_size='a'": (lambda: L(loss, chunk_size="a"), StateTypeError, "laplacian: chunk_size='a'.*int from 1 up"),
    "samples=1": (lambda: L(loss, samples=1), StateValueError, "samples=1.*int from 2 up"),
    "samples=2.0": (lambda: L(loss, samples=2.0), StateTypeError, r"samples=2\.0.*int from 2 up"),
    "a key alone": (lambda: L(loss, key=0), StateValueError, "key is given and no samples"),
    "no function": (lambda: L(3.0), StateTypeError, "laplacian.*got float, which cannot be called"),
    "an integer": (lambda: L(loss)(2), StateTypeError, "argument 0 is int32.*laplacian"),
    "a complex value": (lambda: L(loss)(ONE.astype(complex)), StateTypeError, r"laplacian.*complex64\[\].*imaginary"),
    "an integer output": (lambda: L(lambda x: {"n": loss(x).astype(int)})(ONE), StateTypeError, r"\['n'\] is int32"),
    "no output": (lambda: L(lambda x: None)(ONE), StateTypeError, "returned None"),
    "an unused State": (lambda: L(loss, [w, idle])(ONE), StateValueError, r"never reads grad_states\[1\].*'idle'"),
    "no States": (lambda: L(loss, []), StateValueError, "selects no State"),
    "no argument": (lambda: L(loss)(), StateTypeError, "argnums=0.*0 positional arguments"),
    "has_aux without": (lambda: L(loss, has_aux=True)(ONE), StateTypeError, r"pair \(value, aux\)"),
    "order=0": (lambda: T.taylor(loss, (ONE,), (ONE,), 0), StateValueError, "order=0.*int from 1 up"),
    "order=1.5": (lambda: T.taylor(loss, (ONE,), (ONE,), 1.5), StateTypeError, r"order=1\.5.*int from 1 up"),
    "taylor of no function": (lambda: T.taylor(3, (ONE,), (ONE,), 1), StateTypeError, "taylor.*got int, which cannot"),
    "primals alone": (lambda: T.taylor(loss, ONE, (ONE,), 1), StateTypeError, "taylor: primals.*tuple or list"),
    "a direction alone": (lambda: T.taylor(loss, (ONE,), ONE, 1), StateTypeError, "taylor: directions.*tuple or list"),
    "a direction too few": (lambda: T.taylor(loss, (ONE,), (), 1), StateValueError, "taylor: directions has the"),
    "another shape": (lambda: T.taylor(loss, (ONE,), (jnp.ones(2),), 1), StateValueError, r"\[0\] is float32\[2\]"),
    "States without": (
        lambda: T.taylor(loss, (), (), 1, grad_states=w),
        StateValueError,
        "taylor: grad_states and state_directions belong together",
    ),
    "State of another shape": (
        lambda: T.taylor(lambda: loss(1.0), (), (), 1, grad_states=[w], state_directions=[ONE]),
        StateValueError,
        r"taylor: state_directions\[0\] is float32\[\].*float32\[2\]",
    ),
    "taylor by an integer": (lambda: T.taylor(loss, (2,), (2,), 1), StateTypeError, r"argument 0\D*int32.*taylor"),
    "a State as result": (lambda: T.taylor(lambda x: [loss(x), w], (ONE,), (ONE,), 1), StateValueError, "the results"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISUSE)
def test_misuse(case):
    trigger, error, message = MISUSE[case]
    with unchanged(w, idle, cache), pytest.raises(error, match=message):
        trigger()


@pytest.mark.long
@pytest.mark.parametrize(
    "call",
    [
        lambda f: T.laplacian(f, w)(ONE),
        lambda f: T.laplacian(f, w, chunk_size=1)(ONE),
        lambda f: T.taylor(f, (ONE,), (ONE,), 2),
    ],
)
def test_an_exception_leaves_everything_as_it_was(call):
    def failing(x):
        cache.value += 1
        w.value = w.value * x
        raise ZeroDivisionError("mine")

    with unchanged(w, cache), pytest.raises(ZeroDivisionError, match="mine"):
        call(failing)
