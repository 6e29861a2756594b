"""The operator of linearize: a rectangular Jacobian, against the one that JAX makes of a twin in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from _numbers import numbers
from _unchanged import unchanged
from brainstate import ParamState, State, StateTypeError, StateValueError
from brainstate import transform as T

pytestmark = pytest.mark.usefixtures("double")


class World:
    """Two States, one of them a container with an integer, an argument, and an output of two arrays."""

    def __init__(self, rows=4):
        self.w = ParamState(numbers(0, 3, 2), name="w")
        self.p = ParamState({"b": numbers(1, 2), "n": jnp.array(2)}, name="p")
        self.calls, self.runs = State(jnp.array(0), name="calls"), 0
        self.x = numbers(2, rows, 3)
        self.states = {"w": self.w, "p": self.p}
        self.point = ({"w": self.w.value, "p": self.p.value | {"n": None}}, self.x)

    def model(self, x):
        self.runs += 1
        self.calls.value += 1
        return twin(({"w": self.w.value, "p": self.p.value}, x))

    def linearize(self):
        return T.linearize(self.model, self.x, grad_states=self.states, argnums=0)


def twin(point):
    params, x = point

    def step(carry, row):  # a loop, whose derivative has to be transposed too
        carry = jnp.tanh(row @ params["w"] + carry + params["p"]["b"])
        return carry, carry.sum()

    last, sums = jax.lax.scan(step, jnp.zeros(2), x)
    return {"last": 2 * last, "more": (sums, x[0, 0] ** 2)}


def close(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (jnp.shape(a), jnp.result_type(a)) == (jnp.shape(b), jnp.result_type(b))
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def matrix(world):
    flat, unravel = ravel_pytree(world.point)
    return jax.jacobian(lambda v: ravel_pytree(twin(unravel(v)))[0])(flat), unravel


@pytest.mark.parametrize("rows", [1, 9])  # fewer outputs than inputs are not the same code as more
@pytest.mark.parametrize("compiled", [False, True])
def test_products_with_the_matrix_and_its_transpose(rows, compiled):
    world = World(rows)
    expected, unravel = matrix(world)
    out, J = T.jit(world.linearize)() if compiled else world.linearize()
    v, u = unravel(numbers(5, expected.shape[1])), jax.tree.map(jnp.cos, out)
    flat_v, flat_u = ravel_pytree(v)[0], ravel_pytree(u)[0]
    back = ravel_pytree(out)[1]
    assert J.shape == expected.shape and J.T.shape == expected.T.shape and J.dtype == jnp.float64
    close(out, twin(world.point))
    for product in (J(v), J @ v, J.matvec(v)):
        close(product, back(expected @ flat_v))
    close(J @ J.ravel(v), expected @ flat_v)
    close(J.T @ u, unravel(expected.T @ flat_u))
    close(J.T @ J.T.ravel(u), expected.T @ flat_u)
    close(J.T.T @ v, back(expected @ flat_v))
    close(J.unravel(flat_v), v)
    assert int(world.calls.value) == 1 and world.runs == 1


@pytest.mark.parametrize("rows", [1, 9])
def test_all_of_the_matrix_flat_and_nested(rows):
    world = World(rows)
    expected, _ = matrix(world)
    _, J = world.linearize()
    close(J.dense(), expected)
    close(J.dense(chunk_size=3), expected)
    close(J.T.dense(), expected.T)
    nested = jax.jacobian(twin)
    close(J.tree(), jax.tree.map(lambda _, block: block, twin(world.point), nested(world.point)))
    assert world.runs == 1


def test_blocks_by_the_path_of_the_output_and_of_the_input():
    world = World()
    nested = jax.jacobian(lambda states, x: twin((states, x)), argnums=(0, 1))(*world.point)
    _, J = world.linearize()
    close(J["last", "w"], nested["last"][0]["w"])
    close(J["more.0", "p.b"], nested["more"][0][0]["p"]["b"])
    close(J["more", 0], (nested["more"][0][1], nested["more"][1][1]))
    last, more = nested["last"], nested["more"]
    close(J["", "p"], {"last": last[0]["p"], "more": (more[0][0]["p"], more[1][0]["p"])})
    close(J.T["w", "last"], jnp.moveaxis(nested["last"][0]["w"], 0, -1))


def test_only_a_square_one_has_a_diagonal_and_a_trace():
    w = ParamState(numbers(3, 4), name="w")
    f = lambda: jnp.sin(w.value) * w.value[::-1]  # noqa: E731
    expected = jax.jacobian(lambda v: jnp.sin(v) * v[::-1])(w.value)
    _, J = T.linearize(f, grad_states=w)
    close(J.diagonal(), jnp.diag(expected))
    close(J.trace(), jnp.trace(expected))
    trace, diagonal = J.trace(samples=3000, key=0), J.diagonal(samples=3000, key=1)
    assert abs(trace.mean - jnp.trace(expected)) < 4 * trace.error
    assert (jnp.abs(diagonal.mean - jnp.diag(expected)) <= 4 * diagonal.error + 1e-12).all()


def test_an_array_in_the_structure_of_what_is_differentiated_is_not_taken_for_a_flat_vector():
    w = ParamState(numbers(3, 4), name="w")
    _, J = T.linearize(lambda: jnp.outer(w.value, w.value), grad_states=w)
    assert (J @ jnp.ones(4)).shape == (4, 4)
    assert (J.T @ jnp.ones((4, 4))).shape == (J.T @ jnp.ones(16)).shape == (4,)


@pytest.mark.long
def test_it_is_a_pytree_for_other_transforms_and_for_solvers():
    world = World()
    expected, _ = matrix(world)
    _, J = world.linearize()
    close(jax.jit(lambda J, v: J.T @ (J @ v))(J, jnp.ones(J.shape[1])), expected.T @ (expected @ jnp.ones(J.shape[1])))
    lanes = numbers(6, 3, J.shape[1])
    close(jax.vmap(J.matvec)(lanes), lanes @ expected.T)
    damped = lambda v: J.T @ (J @ v) + 0.1 * v  # noqa: E731
    step, _ = jax.scipy.sparse.linalg.cg(damped, jnp.ones(J.shape[1]), tol=1e-12)
    close(damped(step), jnp.ones(J.shape[1]))
    gradient = T.grad(lambda x: (T.linearize(world.model, x, grad_states=world.w)[1].dense() ** 2).sum())(world.x)
    of_w = lambda x: jax.jacobian(lambda w: twin((world.point[0] | {"w": w}, x)))(world.w.value)  # noqa: E731
    by_twin = jax.grad(lambda x: sum((block**2).sum() for block in jax.tree.leaves(of_w(x))))(world.x)
    close(gradient, by_twin)


def test_arrays_of_several_dtypes():
    a, b = ParamState(jnp.ones(2, jnp.bfloat16), name="a"), ParamState(jnp.ones(3, jnp.float32), name="b")
    _, J = T.linearize(lambda: {"y": a.value.sum() * 2, "z": b.value * 3}, grad_states={"a": a, "b": b})
    assert J.dtype == jnp.float32 and J["y", "a"].dtype == jnp.bfloat16
    assert J.dense().tolist() == [[2, 2, 0, 0, 0], [0, 0, 3, 0, 0], [0, 0, 0, 3, 0], [0, 0, 0, 0, 3]]


z = ParamState(np.array([1.0j]), name="z")
w = ParamState(np.array([1.0, 2.0]), name="w")


def _good():
    return T.linearize(lambda: {"y": w.value.sum(), "z": w.value * 2}, grad_states={"w": w})[1]


ROWS = {
    "no output": (lambda: _good()["q", "w"], StateValueError, r"'q' names no output; there are 'y', 'z'"),
    "an output by number": (lambda: _good()[0, "w"], StateValueError, "0 names no output"),
    "no state": (lambda: _good()["y", "v"], StateValueError, "'v' names nothing that is differentiated"),
    "one path": (lambda: _good()["y"], StateTypeError, "two paths, one of its rows"),
    "trace": (lambda: _good().trace(), StateValueError, r"shape \(3, 2\) is not square"),
    "diagonal": (lambda: _good().diagonal(samples=9), StateValueError, "is not square"),
    "tangent": (lambda: _good()({"w": jnp.ones(3)}), StateValueError, r"at grad_states\['w'\] is float64\[3\]"),
    "flat": (lambda: _good() @ jnp.ones(3), StateValueError, r"a flat one is float64\[2\]"),
    "cotangent": (
        lambda: _good().T @ {"y": 1.0},
        StateValueError,
        r"the wrong structure: output\['z'\] is missing",
    ),
    "integer output": (
        lambda: T.linearize(lambda: (w.value, 1), grad_states=w)[1].dense(),
        StateTypeError,
        r"output\[1\] is of an integer type.* return it as aux",
    ),
    "complex": (
        lambda: T.linearize(lambda: z.value, grad_states=z)[1].T,
        StateTypeError,
        r"grad_states is complex128\[1\].*two real arrays",
    ),
    "chunk_size": (lambda: _good().dense(chunk_size=-1), StateValueError, "chunk_size=-1"),
}


@pytest.mark.parametrize("row", ROWS)
def test_misuse(row):
    trigger, error, message = ROWS[row]
    with unchanged(w, z), pytest.raises(error, match=message):
        trigger()


def test_nothing_at_all():
    nothing = ParamState(jnp.zeros(0), name="nothing")
    for H in (
        T.hvp(lambda: (nothing.value**2).sum(), nothing).operator(),
        T.linearize(lambda: nothing.value, grad_states=nothing)[1],
    ):
        assert H.shape == (0, 0) and H.trace() == 0.0 and H.diagonal().shape == (0,) and H.dense().shape == (0, 0)


def test_a_key_with_a_dot():
    x, y = ParamState(jnp.array([1.0]), name="x"), ParamState(jnp.array([2.0]), name="y")
    _, J = T.linearize(lambda: 2 * x.value + 3 * y.value, grad_states={"a": {"c": x}, "a.b": y})
    assert J["", "a.b"].tolist() == [[3.0]] and J["", "a.c"].tolist() == [[2.0]]
    _, J = T.linearize(lambda: 2 * x.value + 3 * y.value, grad_states={"a": {"b": x}, "a.b": y})
    with pytest.raises(StateValueError, match=r"'a.b' names 2 things"):
        J["", "a.b"]
