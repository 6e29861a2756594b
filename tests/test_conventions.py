"""The conventions that ``docs/explanation/derivatives.md`` states, each against JAX or a sum written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainstate
from brainstate import ParamState, State
from brainstate import transform as T
from transforms import EXACT

HOLOMORPHIC = [row for row in EXACT.values() if row.takes("holomorphic")]

# ------------------------------------------------------------------------------------------ complex numbers


def real_loss(z):
    return jnp.real(z * jnp.conj(z)) + 3 * jnp.real(z) - 2 * jnp.imag(z)


def test_the_gradient_of_a_real_loss_is_the_conjugate_of_the_steepest_ascent():
    """As in JAX: g = ∂f/∂x - i ∂f/∂y, so a step of descent subtracts its conjugate."""
    z = State(jnp.complex64(0.5 - 1.5j))
    g = T.grad(lambda: real_loss(z.value), z)()
    assert g == jax.grad(real_loss)(z.value)
    by_x, by_y = 2 * 0.5 + 3, 2 * -1.5 - 2
    np.testing.assert_allclose(g, by_x - 1j * by_y, rtol=1e-6)
    for _ in range(200):
        z.value = z.value - 0.1 * jnp.conj(T.grad(lambda: real_loss(z.value), z)())
    np.testing.assert_allclose(np.asarray(z.value), -1.5 + 1j, atol=1e-5)  # the minimum of |z|² + 3x - 2y


@pytest.mark.parametrize("row", HOLOMORPHIC, ids=str)
def test_holomorphic_functions_have_the_complex_derivative(row):
    z = State(jnp.complex64(0.3 + 0.4j))
    got = row.derive(lambda: jnp.exp(2 * z.value), z, holomorphic=True)()
    np.testing.assert_allclose(got, (4 if row.order == 2 else 2) * jnp.exp(2 * z.value), rtol=1e-5)


@pytest.mark.parametrize("row", [row for row in HOLOMORPHIC if row.mode == "reverse"], ids=str)
def test_a_complex_loss_needs_holomorphic(row):
    z = State(jnp.complex64(1j))
    with pytest.raises(TypeError, match="holomorphic"):
        row.derive(lambda: z.value**2, z)()


def test_vjp_and_jvp_do_not_conjugate():
    """The pullback is linear over the complex numbers, J^T w; the product of both is `sum(w * (J v))`."""
    z, v, w = jnp.array([1 + 1j, 2 - 1j]), jnp.array([1j, 2.0]), jnp.array([1 - 2j, 0.5j])
    s = State(z)

    def f():
        return jnp.stack([s.value[0] * s.value[1], s.value[0] ** 2])

    jacobian = np.array([[z[1], z[0]], [2 * z[0], 0]])
    _, along = T.jvp(f, (), (), grad_states=s, state_tangents=v)
    _, pull = T.vjp(f, grad_states=s, argnums=None)
    np.testing.assert_allclose(along, jacobian @ np.array(v), rtol=1e-6)
    np.testing.assert_allclose(pull(w), jacobian.T @ np.array(w), rtol=1e-6)


# ------------------------------------------------------------------------------------------ vector_grad


def test_vector_grad_pulls_back_ones():
    w = State(jnp.array([1.0, 2.0, 3.0]))

    def f(x):
        return {"a": jnp.sin(w.value * x), "b": w.value[0] * x}

    jacobian = T.jacrev(f, w)(0.5)
    np.testing.assert_allclose(T.vector_grad(f, w)(0.5), jacobian["a"].sum(0) + jacobian["b"], rtol=1e-6)


# ------------------------------------------------------------------------------------------ dtypes and kinds of leaves


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("row", EXACT.values(), ids=str)
def test_half_precision_states_have_half_precision_derivatives(row, dtype):
    w = State(jnp.array([1.0, 2.0], dtype))
    fun = row.call(lambda v: jnp.sum(v**3), lambda v: v**3)
    got = row.derive(lambda: fun(w.value), w)()
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype("float32"), row.jax(fun)(w.value).astype("float32"))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("row", EXACT.values(), ids=str)
def test_integer_and_key_leaves_have_none(row, compiled):
    s = State({"w": jnp.array([1.0, 2.0]), "n": jnp.int32(3), "on": True, "key": jax.random.key(0)})

    def f():
        value = s.value
        noise = jax.random.normal(value["key"], (2,))
        return jnp.sum((value["w"] + noise) ** 2) * jnp.float32(value["n"])

    got = (T.jit(row.derive(f, s)) if compiled else row.derive(f, s))()
    assert got["n"] is got["on"] is got["key"] is None
    inner = got["w"]["w"] if row.order == 2 else got["w"]
    noise = jax.random.normal(jax.random.key(0), (2,))
    wanted = 6 * np.eye(2) if row.order == 2 else 6 * (jnp.array([1.0, 2.0]) + noise)
    np.testing.assert_allclose(inner, wanted, rtol=1e-5)


@pytest.mark.parametrize("row", EXACT.values(), ids=str)
def test_arrays_without_elements(row):
    w = State({"empty": jnp.zeros((0, 3)), "full": jnp.array([1.0, 2.0])})
    got = row.derive(lambda: jnp.sum(w.value["full"] ** 2) + jnp.sum(w.value["empty"]), w)()
    if row.order == 2:
        assert got["empty"]["full"].shape == (0, 3, 2) and got["full"]["empty"].shape == (2, 0, 3)
        np.testing.assert_array_equal(got["full"]["full"], 2 * np.eye(2))
    else:
        assert got["empty"].shape == (0, 3)
        np.testing.assert_array_equal(got["full"], [2, 4])


@pytest.mark.parametrize("row", EXACT.values(), ids=str)
def test_scalars_held_as_python_floats(row):
    w = State(1.5)
    got = row.derive(lambda: w.value**3, w)()
    np.testing.assert_allclose(got, 9.0 if row.order == 2 else 6.75, rtol=1e-6)
    assert type(w.value) is float and jnp.result_type(got) == jnp.float32


def test_none_is_no_leaf_for_jax_tree_map():
    """A step of descent goes over the gradient of a State with integer leaves as over any other."""
    p = ParamState({"w": jnp.array([1.0, 2.0]), "n": jnp.int32(3)})
    g = T.grad(lambda: jnp.sum(p.value["w"] ** 2), p)()
    p.value = jax.tree.map(lambda w, g: w if g is None else w - 0.5 * g, p.value, g, is_leaf=lambda leaf: leaf is None)
    np.testing.assert_array_equal(p.value["w"], [0.0, 0.0])
    assert int(p.value["n"]) == 3
    assert isinstance(brainstate.transform.grad(lambda: p.value["w"].sum(), p)(), dict)
