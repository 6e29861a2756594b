"""``chunk_size`` of ``jacrev``, ``jacfwd`` and ``hessian``: the same matrices, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from _unchanged import unchanged
from brainstate import ParamState, State, StateTypeError, StateValueError, random
from brainstate import transform as T
from transforms import rows

CHUNKED = rows(lambda row: row.takes("chunk_size") and not row.same_as, "gradient")
MATRICES = {name: row.derive for name, row in CHUNKED.items()}
OF_JAX = {name: row.jax for name, row in CHUNKED.items()}


def same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert jnp.shape(a) == jnp.shape(b) and jnp.result_type(a) == jnp.result_type(b)
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


class Model:
    """Two weights, an integer beside one of them, a counter, a trace and a generator."""

    def __init__(self):
        self.w = ParamState(jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), name="w")
        self.p = ParamState({"gain": jnp.array([0.5, 1.5, 2.0]), "n": jnp.array(2)}, name="p")
        self.count, self.trace = State(jnp.array(0)), State(jnp.zeros(3))
        self.runs = 0

    @property
    def chosen(self):
        return {"p": self.p, "w": self.w}

    def __call__(self, x):
        self.runs += 1
        self.count.value += 1
        assert x[0] > 0  # on concrete values outside jit, as without chunks
        self.trace.value = jnp.sin(x @ self.w.value) * self.p.value["gain"]
        return {"h": self.trace.value, "all": (self.trace.value**2).sum() * x}


def twin(flat, unravel):
    w, gain, x = unravel(flat)
    h = jnp.sin(x @ w) * gain
    return {"h": h, "all": (h**2).sum() * x}


@pytest.mark.crossing
@pytest.mark.parametrize("size", [4, 100])
@pytest.mark.parametrize("name", MATRICES)
def test_the_same_in_chunks(name, size, double):
    model, x = Model(), jnp.array([0.3, 0.4])
    whole = MATRICES[name](model, model.chosen, 0, return_value=True)(x)
    chunks = MATRICES[name](model, model.chosen, 0, return_value=True, chunk_size=size)(x)
    same(chunks, whole)
    assert model.runs == 2 and model.count.value == 2
    same(model.trace.value, whole[1]["h"])
    start, unravel = ravel_pytree((model.w.value, model.p.value["gain"], x))
    by_hand = OF_JAX[name](lambda flat: twin(flat, unravel))(start)
    entry = chunks[0]["h"][0]["w"]
    entry = entry[0]["w"] if name == "hessian" else entry
    n = model.w.value.size
    np.testing.assert_allclose(
        entry.reshape(by_hand["h"][(slice(None), *[slice(n)] * (by_hand["h"].ndim - 1))].shape),
        by_hand["h"][(slice(None), *[slice(n)] * (by_hand["h"].ndim - 1))],
        atol=1e-11,
    )


@pytest.mark.parametrize("name", MATRICES)
def test_random_numbers_aux_and_decorator(name):
    draws = random.RandomState(3)

    @MATRICES[name](has_aux=True, chunk_size=1)
    def f(x):
        noise = draws.normal(size=3, dtype=x.dtype)
        return (noise * x).sum() ** 2 if name == "hessian" else noise * x**2, {"note": "text", "noise": noise}

    before = draws.value
    matrix, aux = f(jnp.arange(3.0))
    assert aux["note"] == "text" and not (draws.value == before).all()
    noise = np.asarray(aux["noise"])
    expected = 2 * np.outer(noise, noise) if name == "hessian" else np.diag(2 * noise * np.arange(3.0))
    np.testing.assert_allclose(matrix, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", MATRICES)
def test_under_other_transforms(name, double):
    w = ParamState(jnp.array([0.5, -1.0, 2.0]))

    def whole(x, size=None):
        return MATRICES[name](lambda x: jnp.sin(w.value * x).sum() * x, chunk_size=size)(x)

    x = jnp.array([0.1, 0.2, 0.3])
    same(T.jit(lambda x: whole(x, 2))(x), whole(x))
    xs = jnp.stack([x, 2 * x])
    same(T.jit(T.vmap(lambda x: whole(x, 2)))(xs), T.jit(T.vmap(whole))(xs))
    for outer in (T.grad, T.jacfwd):
        ours, theirs = (outer(lambda x, s=s: (whole(x, s) ** 2).sum(), w, 0) for s in (2, None))
        same(T.jit(ours)(x), T.jit(theirs)(x))


@pytest.mark.long
@pytest.mark.parametrize("name", MATRICES)
def test_holomorphic(name):
    z = jnp.array([0.5 + 1j, 1 - 0.5j, 2j])

    def f(z):
        return (z**3).sum() if name == "hessian" else z**3 * z[0]

    a, b = (MATRICES[name](f, holomorphic=True, chunk_size=size)(z) for size in (None, 2))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_integers_and_empty_arrays():
    x = {"a": jnp.ones(3), "n": jnp.arange(3)}
    whole, chunks = (
        T.jacrev(lambda x: x["a"] * x["n"].astype("float32"), allow_int=True, chunk_size=s)(x) for s in (None, 2)
    )
    same(chunks, whole)
    whole, chunks = (T.jacfwd(lambda x: {"n": (x > 0).astype(int), "y": x}, chunk_size=s)(x["a"]) for s in (None, 2))
    same(chunks, whole)
    for matrix in (T.jacrev, T.jacfwd):
        assert matrix(lambda x: 2 * x, chunk_size=2)(jnp.ones((0,))).shape == (0, 0)
        with jax.disable_jit():
            same(matrix(lambda x: x**2, chunk_size=2)(jnp.arange(3.0)), jnp.diag(2 * jnp.arange(3.0)))


def wide(x):
    """Return something whose intermediate values are 200 times as large as `x`."""
    h = jnp.linspace(0.0, 1.0, 20_000)
    for _ in range(2):
        h = jnp.sin(jnp.cumsum(h) * x.sum() + h[::-1])
    return h[:100] * x


@pytest.mark.long
@pytest.mark.parametrize("name", MATRICES)
def test_memory(name):
    def temporary(size):
        f = (lambda x: wide(x).sum()) if name == "hessian" else wide
        program = T.jit(MATRICES[name](f, chunk_size=size)).lower(jnp.ones(100)).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(5) < temporary(None) / 10


@pytest.mark.parametrize("name", MATRICES)
def test_without_chunks_the_program_is_that_of_jax(name):
    def f(x):
        return jnp.sin(x).sum() * x

    x = jnp.ones(3)
    assert str(jax.make_jaxpr(MATRICES[name](f))(x)) == str(jax.make_jaxpr(OF_JAX[name](f))(x))


@pytest.mark.parametrize("name", MATRICES)
def test_misuse(name):
    count = State(jnp.array(0))

    def f(x):
        count.value += 1
        return (x**2).sum() if name == "hessian" else x**2

    for size, error in ((0, StateValueError), (-3, StateValueError), (2.0, StateTypeError), (True, StateTypeError)):
        with pytest.raises(error, match=rf"{name}: chunk_size={size}.*int from 1 up"):
            MATRICES[name](f, chunk_size=size)
    chunked = MATRICES[name](f, chunk_size=2)
    with unchanged(count), pytest.raises(StateTypeError, match="real floating type; one is complex64"):
        chunked(jnp.ones(2, complex))
    with unchanged(count), pytest.raises(StateTypeError, match="argument 0 is int32"):
        chunked(jnp.arange(2))
    with unchanged(count), pytest.raises((StateTypeError, TypeError), match="complex"):
        MATRICES[name](f, holomorphic=True, chunk_size=2)(jnp.ones(2))
