"""``per_example_grad`` and ``per_example_norms``: truth against a Python loop, States, chunks, memory, misuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _unchanged import unchanged
from brainstate import (
    BatchAxisError,
    BatchState,
    HiddenState,
    ParamState,
    State,
    StateTypeError,
    StateValueError,
    nn,
    random,
)
from brainstate import transform as T

N = 5


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed + 7 * len(shape)).normal(size=shape))


def same(got, expected, tolerance=1e-10):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert jnp.shape(a) == jnp.shape(b) and jnp.result_type(a) == jnp.result_type(b)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------ losses of one example

# Each is a pure function of weights and one example, the shapes of the weights, and of an example.


def _scanned(p, x):
    def step(h, u):
        return jnp.tanh(u @ p["w"] + h @ p["v"]), h.sum()

    h, ys = jax.lax.scan(step, jnp.zeros(p["v"].shape[0], x.dtype), x)
    return (h**2).sum() + ys.sum()


LOSSES = {
    "linear": (
        lambda p, x: (jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]).sum() ** 2,
        {"w": (4, 6), "b": (6,), "v": (6, 3)},
        (4,),
    ),
    "weight on the left": (lambda p, x: jnp.sin(p["w"] @ x).sum(), {"w": (6, 4)}, (4,)),
    "transposed": (lambda p, x: jnp.sin(x @ p["w"].T).sum(), {"w": (6, 4)}, (4,)),
    "reshaped": (lambda p, x: jnp.sin(x @ p["w"].reshape(4, 6)).sum(), {"w": (24,)}, (4,)),
    "sequence": (lambda p, x: (jnp.tanh(x @ p["w"]) @ p["v"]).sum() ** 2, {"w": (4, 9), "v": (9, 8)}, (3, 4)),
    "long sequence": (lambda p, x: (jnp.tanh(x @ p["w"]) ** 2).sum(), {"w": (4, 2)}, (30, 4)),
    "sequence on the right": (lambda p, x: jnp.sin(p["w"] @ x).sum(), {"w": (9, 8)}, (8, 3)),
    "heads": (lambda p, x: jnp.sin(jnp.einsum("thi,hio->hto", x, p["w"])).sum(), {"w": (2, 5, 7)}, (3, 2, 5)),
    "two axes": (lambda p, x: jnp.sin(jnp.einsum("ti,ihd->thd", x, p["w"])).sum(), {"w": (5, 3, 4)}, (2, 5)),
    "tied": (lambda p, x: (jnp.tanh(x @ p["w"]) @ p["w"]).sum() ** 2, {"w": (4, 4)}, (4,)),
    "tied, transposed": (lambda p, x: ((jnp.tanh(x @ p["w"]) @ p["w"].T - x) ** 2).sum(), {"w": (4, 6)}, (4,)),
    "squared": (lambda p, x: (p["w"] @ p["w"] @ x).sum(), {"w": (4, 4)}, (4,)),
    "regularised": (lambda p, x: (x @ p["w"]).sum() ** 2 + (p["w"] ** 2).sum(), {"w": (4, 6)}, (4,)),
    "in a scan": (_scanned, {"w": (4, 6), "v": (6, 6)}, (3, 4)),
    "in a jit": (
        lambda p, x: jax.jit(lambda w: jnp.sin(jax.jit(lambda y: y @ w)(x)))(p["w"]).sum(),
        {"w": (4, 6)},
        (4,),
    ),
    "rematerialised": (lambda p, x: jax.checkpoint(lambda w: jnp.sin(x @ w))(p["w"]).sum(), {"w": (4, 6)}, (4,)),
    "stopped": (
        lambda p, x: (x @ jax.lax.stop_gradient(p["w"])).sum() + (x @ p["v"]).sum(),
        {"w": (4, 6), "v": (4, 6)},
        (4,),
    ),
    "convolution": (
        lambda p, x: jnp.tanh(jax.lax.conv(x[None], p["w"], (1,), "SAME")).sum(),
        {"w": (3, 2, 3)},
        (2, 7),
    ),
    "embedding": (
        lambda p, x: (p["e"][jnp.array([0, 2, 2])] @ p["w"] @ x).sum() ** 2,
        {"e": (5, 6), "w": (6, 4)},
        (4,),
    ),
    "both factors": (lambda p, x: jnp.sin(p["v"] @ p["w"]).sum() * x.sum(), {"v": (3, 5), "w": (5, 6)}, (4,)),
    "a factor that depends on a weight": (
        lambda p, x: ((x * p["s"]) @ p["w"]).sum() ** 2,
        {"s": (4,), "w": (4, 6)},
        (4,),
    ),
    "cancelling rows": (lambda p, x: ((x @ p["w"]) * jnp.array([[1.0], [-1.0]])).sum(), {"w": (4, 6)}, (1, 4)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_norms_against_a_loop(name, double):
    loss, shapes, example = LOSSES[name]
    params = {key: numbers(*shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}
    states = {key: ParamState(value) for key, value in params.items()}
    xs = numbers(N, *example, seed=9)
    if name == "cancelling rows":
        xs = jnp.concatenate([xs, xs], axis=1)  # the gradient is zero, but not its terms
    runs = []

    def ours(x):
        runs.append(1)
        return loss({key: s.value for key, s in states.items()}, x)

    gradients = [jax.grad(loss)(params, x) for x in xs]
    squares = {key: jnp.stack([(g[key] ** 2).sum() for g in gradients]) for key in params}
    tolerance = 1e-6 if name == "cancelling rows" else 1e-10
    per_leaf = T.jit(T.per_example_norms(ours, states, per_leaf=True))(xs)
    same(per_leaf, jax.tree.map(jnp.sqrt, squares), tolerance)
    assert len(runs) == 1
    same(T.jit(T.per_example_norms(ours, states))(xs), jnp.sqrt(sum(squares.values())), tolerance)
    if name in ("linear", "in a jit", "embedding"):
        whole = jax.tree.map(lambda *g: jnp.stack(g), *gradients)
        same(T.jit(T.per_example_grad(ours, states))(xs), whole)


def test_norms_with_respect_to_an_argument_and_a_weight(double):
    """Both factors of a product are differentiated, and one of them is the example."""
    w, xs, shared = ParamState(numbers(4, 6)), numbers(N, 4), numbers(6, 8)

    def loss(x, v):
        return jnp.sin(x @ w.value).sum() + jnp.cos(jnp.tanh(x) @ w.value @ v).sum()

    def simple(x, v):
        return jnp.cos(x @ w.value @ v).sum()

    for f in (loss, simple):
        norms, (of_x, of_v) = T.per_example_norms(f, w, (0, 1), in_axes=(0, None), per_leaf=True)(xs, shared)
        gradient, (along_x, along_v) = T.per_example_grad(f, w, (0, 1), in_axes=(0, None))(xs, shared)
        for n, g in ((norms, gradient), (of_x, along_x), (of_v, along_v)):
            assert g.shape[0] == N
            np.testing.assert_allclose(n, jnp.sqrt((g**2).reshape(N, -1).sum(1)), rtol=1e-10)
        hand = [jax.grad(lambda w, x, v: jnp.cos(x @ w @ v).sum(), argnums=(0, 1, 2))(w.value, x, shared) for x in xs]
    same((gradient, along_x, along_v), jax.tree.map(lambda *g: jnp.stack(g), *hand))


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_norms_in_other_types(dtype):
    if dtype == "complex64":
        w, xs = ParamState(numbers(3, 4).astype(dtype) * (1 + 0.5j)), numbers(N, 3).astype(dtype)
        norms = T.per_example_norms(lambda x: jnp.abs(x @ w.value).sum(), w)(xs)
        assert norms.dtype == "float32"
        loop = [jnp.linalg.norm(jax.grad(lambda w, x=x: jnp.abs(x @ w).sum())(w.value)) for x in xs]
        np.testing.assert_allclose(norms, loop, rtol=1e-5)
        return
    w, xs = ParamState(numbers(8, 8).astype(dtype)), 100 * numbers(N, 8).astype(dtype)

    def loss(w, x):
        return (x @ w.astype(dtype)).sum().astype("float32") * 10

    norms = T.per_example_norms(lambda x: loss(w.value, x), w)(xs)
    wide = [jnp.linalg.norm(jax.grad(loss)(w.value, x).astype("float32")) for x in xs]
    assert norms.dtype == "float32" and np.isfinite(norms).all()  # the squares do not fit into half precision
    np.testing.assert_allclose(norms, wide, rtol=2e-2)


# ------------------------------------------------------------------------------------------ States


class Net(nn.Module):
    """A counter, statistics, noise and a normal layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.count = State(jnp.int32(0), name="count")
        self.mean = BatchState(jnp.zeros(4), name="mean")
        self.last = BatchState(jnp.zeros(4), name="last")
        self.rng = random.RandomState(1)
        self.runs = 0

    def loss(self, x, y):
        self.runs += 1
        h = jnp.tanh(self.layer(x)) * (1 + self.rng.normal(size=4, dtype=x.dtype))
        self.count.value += 1
        self.mean.value = 0.5 * self.mean.value + h
        self.last.value = h
        return ((h.sum() - y) ** 2), {"h": h}

    def rules(self):
        return {"mean": self.mean, "last": self.last}


@pytest.mark.long
@pytest.mark.parametrize("transform", [T.per_example_grad, T.per_example_norms])
def test_chunks_change_nothing(transform, double):
    xs, ys = numbers(7, 3), numbers(7)
    first = None
    for size in (None, 3):
        random.seed(0)
        net = Net()
        options = {"has_aux": True, "return_value": True, "out_states": net.rules()}
        result = T.jit(transform(net.loss, net, chunk_size=size, **options))(xs, ys)
        after = (net.count.value, net.mean.value, net.last.value, net.rng.value)
        first = first or (result, after)
        same((result, after), first)
        assert net.runs == 1 and net.count.value == 1
    (_, value, aux), (_, mean, last, _) = first
    assert value.shape == (7,) and aux["h"].shape == (7, 4)
    assert len(np.unique(np.asarray(aux["h"]))) == 28  # each example its own noise
    same((mean, last), (aux["h"].mean(0), aux["h"][-1]))


def test_statistics_that_are_kept_and_states_of_each_example(double):
    w, hidden, seen = ParamState(numbers(3, 4)), HiddenState(numbers(4, 6)), State(jnp.zeros(4))
    before, xs = hidden.value, numbers(6, 3)

    def loss(x):
        hidden.value = jnp.tanh(hidden.value + x @ w.value)
        seen.value = hidden.value
        return (hidden.value**2).sum()

    options = {"in_states": {1: hidden}, "out_states": {1: [hidden, seen]}}
    for size in (None, 4):
        hidden.value = before
        gradient = T.per_example_grad(loss, w, chunk_size=size, **options)(xs)
        lanes = jnp.tanh(before.T + xs @ w.value).T
        same((hidden.value, seen.value), (lanes, lanes))
        loop = [
            jax.grad(lambda w, x, h: (jnp.tanh(h + x @ w) ** 2).sum())(w.value, x, h)
            for x, h in zip(xs, before.T, strict=True)
        ]
        same(gradient, jnp.stack(loop))
        seen.value = jnp.zeros(4)


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("transform", [T.per_example_grad, T.per_example_norms])
def test_a_write_without_a_rule_is_refused(transform, size):
    net = Net()
    with unchanged(net.count, net.mean, net.last, net.rng), pytest.raises(BatchAxisError, match=r"'mean'.*out_states"):
        transform(net.loss, net, has_aux=True, chunk_size=size, out_states={"last": net.last})(
            numbers(5, 3), numbers(5)
        )


def test_forms_of_use(double):
    w, p = ParamState(numbers(3)), ParamState({"scale": numbers(2), "n": jnp.array(2)})
    xs = numbers(N, 3)

    class Owner:
        @T.per_example_grad(grad_states=w, in_axes=1)
        def loss(self, x):
            return (w.value @ x) ** 2

    expected = 2 * (xs @ w.value)[:, None] * xs
    same(Owner().loss(xs.T), expected)
    same(
        T.per_example_grad(lambda x: (w.value @ x) ** 2, [w], return_value=True)(xs), ([expected], (xs @ w.value) ** 2)
    )
    both = T.per_example_grad(lambda x, y: (x * p.value["scale"].sum()).sum() * y, p, [1], in_axes=(0, None))(xs, 2.0)
    same(
        both,
        ({"scale": 2 * xs.sum(1, keepdims=True) * jnp.ones((1, 2)), "n": None}, (xs.sum(1) * p.value["scale"].sum(),)),
    )
    norms = T.per_example_norms(lambda x, *, y: (x * p.value["scale"].sum()).sum() * y, p, per_leaf=True)(
        xs, y=jnp.ones(N)
    )
    same(norms, {"scale": jnp.abs(xs.sum(1)) * np.sqrt(2.0), "n": None})
    same(T.per_example_grad(lambda x: (x**2).sum())(xs), 2 * xs)
    assert T.per_example_grad(lambda x: (x**2).sum(), chunk_size=2)(xs[:0]).shape == (0, 3)
    keys = jax.random.split(jax.random.key(0), N)
    drawn = T.per_example_grad(lambda x, k: (x * jax.random.normal(k, (3,))).sum(), chunk_size=2)(xs, keys)
    same(drawn, jax.vmap(lambda k: jax.random.normal(k, (3,)))(keys))


def test_under_other_transforms(double):
    w, xs = ParamState(numbers(3, 4)), numbers(2, 6, 3)

    def norms(xs, size=None):
        return T.per_example_norms(lambda x: (jnp.tanh(x @ w.value) ** 2).sum(), w, chunk_size=size)(xs)

    def by_hand(w, xs):
        return jax.vmap(lambda x: jnp.linalg.norm(jax.grad(lambda w: (jnp.tanh(x @ w) ** 2).sum())(w).ravel()))(xs)

    both = jnp.stack([by_hand(w.value, part) for part in xs])
    same(T.jit(T.vmap(lambda part: norms(part, 4)))(xs), both)
    same(T.for_loop(norms, xs), both)
    ours = T.jit(T.grad(lambda part: norms(part, 4).sum(), w, 0))(xs[0])
    same(ours, jax.grad(lambda w, x: by_hand(w, x).sum(), argnums=(0, 1))(w.value, xs[0]))

    @T.jit
    def clipped_step(xs):  # each gradient is scaled to norm 1 at most before they are averaged
        gradients = T.per_example_grad(lambda x: (jnp.tanh(x @ w.value) ** 2).sum(), w, chunk_size=4)(xs)
        scale = jnp.minimum(1.0, 1.0 / norms(xs, 4))
        w.value -= 0.1 * jnp.mean(scale[:, None, None] * gradients, axis=0)

    start = w.value
    clipped_step(xs[0])
    assert jnp.linalg.norm(w.value - start) <= 0.1 + 1e-9


# ------------------------------------------------------------------------------------------ memory


def _memory(transform, *rows, wide=256):
    net = nn.Sequential(nn.Linear(wide, wide), jnp.tanh, nn.Linear(wide, wide))

    def loss(x):
        return net(x).sum() ** 2

    program = T.jit(lambda xs: transform(loss, net)(xs)).lower(jnp.ones((32, *rows, wide))).compile()
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("rows", [(), (4,)])
def test_memory(rows):
    gradients = 2 * 32 * 256 * 256 * 4  # bytes of all gradients of a batch
    assert _memory(T.per_example_norms, *rows) < gradients / 10


def test_memory_of_chunks():
    def tied(size):
        w = ParamState(jnp.ones((128, 128)))
        norms = T.per_example_norms(lambda x: (jnp.tanh(x @ w.value) @ w.value).sum(), w, chunk_size=size)
        return T.jit(norms).lower(jnp.ones((64, 128))).compile().memory_analysis().temp_size_in_bytes

    assert tied(4) < tied(None) / 5


# ------------------------------------------------------------------------------------------ misuse

w = ParamState(jnp.array([1.0, 2.0]), name="w")
idle = ParamState(jnp.array(4.0), name="idle")
cache = State(jnp.array(0), name="cache")
X = jnp.ones((3, 2))


def loss(x, y=1.0):
    cache.value += 1
    return (w.value * x).sum() * y


MISUSE = {
    "chunk_size=0": (lambda t: t(loss, w, chunk_size=0), StateValueError, "chunk_size=0.*int from 1 up"),
    "chunk_size=-1": (lambda t: t(loss, w, chunk_size=-1), StateValueError, "chunk_size=-1.*int from 1 up"),
    "chunk_size=2.5": (lambda t: t(loss, w, chunk_size=2.5), StateTypeError, r"chunk_size=2\.5.*int from 1 up"),
    "no function": (lambda t: t(3.0, w), StateTypeError, "got float, which cannot be called"),
    "no scalar": (lambda t: t(lambda x: w.value * x, w)(X), StateTypeError, r"one example.*of shape \(2,\)"),
    "an integer loss": (lambda t: t(lambda x: w.value.sum().astype(int), w)(X), StateTypeError, "real scalar.*int32"),
    "a complex loss": (lambda t: t(lambda x: w.value[0].astype(complex), w)(X), StateTypeError, "real.*complex64"),
    "an integer argument": (lambda t: t(loss)(jnp.ones((3, 2), int)), StateTypeError, r"argument 0 is int32\[2\]"),
    "sizes differ": (lambda t: t(loss, w)(X, jnp.ones(4)), StateValueError, r"disagree.*\[0\]': 3.*\[1\]': 4"),
    "nothing is batched": (lambda t: t(loss, w, in_axes=None)(X[0]), StateValueError, "nothing is mapped.*in_axes"),
    "no argument": (lambda t: t(lambda: w.value.sum(), w)(), StateValueError, "nothing is mapped.*in_axes"),
    "in_axes too long": (lambda t: t(loss, w, in_axes=(0, 0, 0))(X), StateValueError, r"in_axes=\(0, 0, 0\).*1 posit"),
    "an unused State": (lambda t: t(loss, [w, idle])(X), StateValueError, r"never reads grad_states\[1\].*'idle'"),
    "a State as argument": (lambda t: t(loss, w)(w), StateValueError, "ParamState 'w' is among the arguments"),
    "a State as result": (lambda t: t(lambda x: (loss(x), w), w, has_aux=True)(X), StateValueError, "the results"),
    "no aux": (lambda t: t(loss, w, has_aux=True)(X), StateTypeError, r"pair \(value, aux\)"),
    "out_states of another kind": (lambda t: t(loss, w, out_states=3.0)(X), StateTypeError, "out_states.*filter"),
    "unknown reduction": (lambda t: t(loss, w, out_states={"mean": cache})(X), StateTypeError, "mean of State 'cache'"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISUSE)
@pytest.mark.parametrize("transform", [T.per_example_grad, T.per_example_norms])
def test_misuse(transform, case):
    trigger, error, message = MISUSE[case]
    with unchanged(w, idle, cache), pytest.raises(error, match=message):
        trigger(transform)


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("transform", [T.per_example_grad, T.per_example_norms])
def test_an_exception_leaves_everything_as_it_was(transform, size):
    draws = random.RandomState(0)

    def failing(x):
        draws.normal()
        w.value = w.value * 0.0
        raise ZeroDivisionError("mine")

    with unchanged(w, draws), pytest.raises(ZeroDivisionError, match="mine"):
        transform(failing, w, chunk_size=size)(X)
