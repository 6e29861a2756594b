"""linearize, hvp, ggn, fisher and their operators, against matrices made by hand in float64.

The reference is never one of ours: a functional twin of the model on one flat vector, its Hessian or Jacobian by JAX,
and from these the matrix written out, ``JᵀHJ`` or a Python loop over examples and labels.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import brainstate
from _numbers import numbers
from _unchanged import unchanged
from brainstate import ParamState, State, StateTypeError, StateValueError, nn
from brainstate import transform as T

pytestmark = pytest.mark.usefixtures("double")


# ------------------------------------------------------------------------------------------ the model and its twin


class World:
    """A model of two layers with States of both sorts, which counts its runs in Python and its calls in a State."""

    def __init__(self, out=2):
        self.w = ParamState(numbers(0, 3, 2), name="w")
        self.p = ParamState({"b": numbers(1, 2), "n": jnp.array(2), "u": numbers(2, 2, out)}, name="p")
        self.calls = State(jnp.array(0), name="calls")
        self.runs = 0
        self.x, self.y = numbers(3, 5, 3), numbers(4, 5, out)
        self.states = {"w": self.w, "p": self.p}
        self.params = {"w": self.w.value, "p": self.p.value | {"n": None}}

    def model(self, x, y=None):
        self.runs += 1
        self.calls.value += 1
        p = self.p.value
        return network(self.w.value, p["b"], p["u"], x) * p["n"]

    def loss(self, x, y):
        return misfit(self.model(x), y)


def network(w, b, u, x):
    return jnp.tanh(x @ w + b[None]) @ u


def misfit(out, y):
    """Convex in ``out``, with a curvature that depends on it."""
    return (jnp.logaddexp(out, 0.0) - out * y).sum() + 0.1 * (out**4).mean()


def twin(params, x):
    return 2 * network(params["w"], params["p"]["b"], params["p"]["u"], x)


# What is differentiated: options for ours, the same as a pytree, and from that the twin's parameters and input.
WRT = {
    "states": (
        lambda m: {"grad_states": m.states},
        lambda m: m.params,
        lambda d, m: (d, m.x),
    ),
    "one state": (
        lambda m: {"grad_states": m.w},
        lambda m: m.w.value,
        lambda d, m: (m.params | {"w": d}, m.x),
    ),
    "argument": (
        lambda m: {"argnums": 0},
        lambda m: m.x,
        lambda d, m: (m.params, d),
    ),
    "both": (
        lambda m: {"grad_states": [m.w, m.p], "argnums": 0},
        lambda m: ([m.params["w"], m.params["p"]], m.x),
        lambda d, m: ({"w": d[0][0], "p": d[0][1]}, d[1]),
    ),
    "several": (
        lambda m: {"grad_states": m.w, "argnums": (0,)},
        lambda m: (m.w.value, (m.x,)),
        lambda d, m: (m.params | {"w": d[0]}, d[1][0]),
    ),
}


class Reference:
    """The twin as a function of one flat vector, and the matrices of the products."""

    def __init__(self, world, wrt):
        options, pack, unpack = WRT[wrt]
        self.world, self.options, self.diff = world, options(world), pack(world)
        self.point, self.unravel = ravel_pytree(self.diff)
        self.out = lambda flat: twin(*unpack(self.unravel(flat), world))

    def vector(self, seed=9):
        return self.unravel(numbers(seed, self.point.size))

    def loss(self, flat):
        return misfit(self.out(flat), self.world.y)

    def hvp(self):
        return jax.jit(jax.hessian(self.loss))(self.point)

    def jacobian(self):
        jac = jax.jit(jax.jacobian(self.out))(self.point)
        return jac.reshape(*jac.shape[:2], -1)  # example, output, parameter

    def ggn(self):
        out = self.out(self.point)
        jac = self.jacobian().reshape(out.size, -1)
        curve = jax.jit(jax.hessian(lambda o: misfit(o.reshape(out.shape), self.world.y)))(out.ravel())
        return jac.T @ curve @ jac

    def fisher(self, likelihood):
        """Sum over examples and labels of the probability of the label times the outer product of its gradient."""
        out, total = self.out(self.point), 0.0
        for i, jac in enumerate(self.jacobian()):
            for weight, score in outcomes(likelihood, out[i]):
                total += weight * jnp.outer(score @ jac, score @ jac)
        return total

    def empirical(self, likelihood, labels):
        total = 0.0
        for i in range(len(labels)):
            gradient = jax.grad(lambda flat, i=i: surprise(likelihood, self.out(flat)[i], labels[i]))(self.point)
            total += jnp.outer(gradient, gradient)
        return total


def surprise(likelihood, out, label):
    """Return the negative log-likelihood of the label of one example."""
    if likelihood == "categorical":
        return jax.nn.logsumexp(out) - out[label]
    if likelihood == "bernoulli":
        return (jnp.logaddexp(out, 0.0) - out * label).sum()
    return 0.5 * ((out - label) ** 2).sum()


def outcomes(likelihood, out):
    """Yield each label of one example as (probability, gradient of the surprise); normals by quadrature."""
    if likelihood == "categorical":
        labels = range(out.size)
        weigh = lambda label: jnp.exp(-surprise(likelihood, out, label))  # noqa: E731
    elif likelihood == "bernoulli":
        labels = map(jnp.array, itertools.product([0.0, 1.0], repeat=out.size))
        weigh = lambda label: jnp.exp(-surprise(likelihood, out, label))  # noqa: E731
    else:
        nodes, weights = np.polynomial.hermite_e.hermegauss(3)
        weights = dict(zip(nodes.round(6).tolist(), weights / weights.sum(), strict=True))
        labels = [out + jnp.array(eps) for eps in itertools.product(nodes.tolist(), repeat=out.size)]
        weigh = lambda label: np.prod([weights[round(e, 6)] for e in (label - out).tolist()])  # noqa: E731
    for label in labels:
        yield weigh(label), jax.grad(lambda o, y=label: surprise(likelihood, o, y))(out)


def close(got, expected, tolerance=1e-10):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (jnp.shape(a), jnp.result_type(a)) == (jnp.shape(b), jnp.result_type(b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


LABELS = {
    "categorical": np.array([0, 1, 1, 0, 1]),
    "bernoulli": np.eye(2)[[0, 1, 1, 0, 1]],
    "gaussian": np.random.default_rng(5).normal(size=(5, 2)),
}


def of_output(out, x, y):
    return misfit(out, y)


# The products: how ours is made, and the matrix of the reference.
PRODUCTS = {
    "hvp": (lambda m, **o: T.hvp(m.loss, **o), Reference.hvp),
    "ggn": (lambda m, **o: T.ggn(m.model, of_output, **o), Reference.ggn),
    **{
        f"fisher {law}": (
            lambda m, law=law, **o: T.fisher(m.model, law, **o),
            lambda r, law=law: r.fisher(law),
        )
        for law in LABELS
    },
    **{
        f"empirical {law}": (
            lambda m, law=law, **o: T.fisher(m.model, law, kind="empirical", targets=lambda x, y: LABELS[law], **o),
            lambda r, law=law: r.empirical(law, jnp.asarray(LABELS[law])),
        )
        for law in LABELS
    },
}


# ------------------------------------------------------------------------------------------ the products


@pytest.mark.crossing
# All that goes through a model's output is one piece of code, so States and an argument together will do for most.
@pytest.mark.parametrize(
    ("name", "wrt"), [(name, wrt) for name in PRODUCTS for wrt in WRT if name in ("hvp", "ggn") or wrt == "both"]
)
def test_product_and_operator_are_those_of_the_matrix(name, wrt):
    make, matrix = PRODUCTS[name]
    world = World()
    reference = Reference(world, wrt)
    expected, v = matrix(reference), reference.vector()
    product = make(world, **reference.options)

    close(product(v, world.x, world.y), reference.unravel(expected @ ravel_pytree(v)[0]))
    assert world.runs == 1 and int(world.calls.value) == 1
    H = product.operator(world.x, world.y)
    assert world.runs == 2 and int(world.calls.value) == 2
    close(H @ v, reference.unravel(expected @ ravel_pytree(v)[0]))
    close(H.dense(), expected)
    assert world.runs == 2 and int(world.calls.value) == 2


@pytest.mark.parametrize("wrt", WRT)
def test_linearize(wrt):
    world = World()
    reference = Reference(world, wrt)
    v = reference.vector()
    expected = jax.jvp(reference.out, (reference.point,), (ravel_pytree(v)[0],))
    out, push = T.linearize(world.model, world.x, **reference.options)
    close((out, push(v)), expected)
    close(push(jax.tree.map(lambda leaf: 2 * leaf, v)), 2 * expected[1])
    assert world.runs == 1 and int(world.calls.value) == 1


def test_linearize_with_aux_negative_positions_and_a_tangent_of_another_shape():
    w = ParamState(jnp.array([1.0, 2.0]), name="w")
    _, push, aux = T.linearize(
        lambda s, x: (w.value * x, {"text": s, "w": w.value}), "s", 3.0, grad_states=w, argnums=-1, has_aux=True
    )
    assert aux["text"] == "s" and aux["w"].tolist() == [1.0, 2.0]
    assert push((jnp.array([1.0, 0.0]), jnp.array(1.0))).tolist() == [4.0, 2.0]
    with pytest.raises(StateValueError, match=r"argument 1 is float64\[2\], where float64\[\] is expected"):
        push((jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0])))
    assert jax.jit(lambda push, t: push(t))(push, (jnp.ones(2), jnp.array(0.0))).tolist() == [3.0, 3.0]


@pytest.mark.parametrize("name", ["hvp", "ggn"])
def test_gradient_value_and_aux_come_from_the_same_pass(name):
    world = World()
    reference = Reference(world, "states")
    v = reference.vector()

    def model(x, y):
        out = world.model(x)
        return (out if name == "ggn" else misfit(out, y)), {"note": "text", "x": x}

    make = {"hvp": lambda **o: T.hvp(model, **o), "ggn": lambda **o: T.ggn(model, of_output, **o)}[name]
    slope = reference.unravel(jax.grad(reference.loss)(reference.point))
    Hv = reference.unravel(PRODUCTS[name][1](reference) @ ravel_pytree(v)[0])
    for has_grad, has_value in itertools.product([False, True], repeat=2):
        product = make(**reference.options, has_aux=True, return_grad=has_grad, return_value=has_value)
        runs = world.runs
        first, *more, aux = product(v, world.x, world.y)
        H, *again, aux2 = product.operator(world.x, world.y)
        assert world.runs == runs + 2
        expected = [slope] * has_grad + [reference.loss(reference.point)] * has_value
        close((first, more), (Hv, expected))
        close((H @ v, again), (Hv, expected))
        assert aux["note"] == aux2["note"] == "text" and aux["x"] is world.x


@pytest.mark.long
@pytest.mark.parametrize("law", LABELS)
def test_sampled_fisher_is_unbiased_and_fixed_by_its_key(law):
    """Twenty independent estimates: their mean is within five of its standard errors, in each of 100 entries."""
    world = World()
    reference = Reference(world, "states")

    @T.jit
    def dense(key):
        return T.fisher(world.model, law, world.states, kind="sampled", samples=50, key=key).operator(world.x).dense()

    found = np.array([dense(jax.random.key(k)) for k in range(20)])
    error = found.std(axis=0, ddof=1) / np.sqrt(20)
    assert (np.abs(found.mean(axis=0) - reference.fisher(law)) <= 5 * error + 1e-12).all()
    assert error.max() < 0.2 * np.abs(found.mean(axis=0)).max()
    v = reference.vector()
    fixed = T.fisher(world.model, law, world.states, kind="sampled", samples=50, key=3)
    close(fixed(v, world.x), reference.unravel(found[3] @ ravel_pytree(v)[0]))


def test_sampled_fisher_has_rank_one_for_one_example_and_one_draw():
    world = World()
    H = T.fisher(world.model, "bernoulli", world.states, kind="sampled", key=0).operator(world.x[:1])
    assert np.linalg.matrix_rank(H.dense()) == 1


def test_an_example_may_have_more_axes():
    """The score of an example sums over its parts, so the empirical matrix has terms between these."""
    w = ParamState(numbers(0, 3, 2), name="w")
    x, labels = numbers(1, 4, 5, 3), jnp.asarray(np.random.default_rng(2).integers(0, 2, (4, 5)))
    model = lambda: x @ w.value  # noqa: E731

    def surprises(flat):
        return (jax.nn.logsumexp(x @ flat.reshape(3, 2), axis=-1) - pick(x @ flat.reshape(3, 2))).sum(axis=1)

    def pick(out):
        return jnp.take_along_axis(out, labels[..., None], axis=-1)[..., 0]

    jac = jax.jit(jax.jacobian(surprises))(w.value.ravel())
    H = T.fisher(model, "categorical", w, kind="empirical", targets=lambda: labels).operator()
    close(H.dense(), jac.T @ jac)
    # The logits are linear in the weights, so the exact matrix is the Hessian.
    exact = jax.jit(jax.hessian(lambda flat: surprises(flat).sum()))(w.value.ravel())
    close(T.fisher(model, "categorical", w).operator().dense(), exact)


def test_labels_are_drawn_from_the_default_generator():
    world = World()
    product = T.fisher(world.model, "categorical", world.states, kind="sampled")
    v = Reference(world, "states").vector()
    with brainstate.random.seed_context(7):
        first, second = product(v, world.x), product(v, world.x)
        after = brainstate.random.normal()
    with brainstate.random.seed_context(7):
        close(T.jit(product)(v, world.x), first)
        H = product.operator(world.x)
        close(H @ v, second)
        close(H @ v, second)
        assert brainstate.random.normal() == after
    assert not np.allclose(first["w"], second["w"])


# ------------------------------------------------------------------------------------------ laws


@functools.cache
def _operators():
    with jax.enable_x64(True):
        world = World()
        sampled = T.fisher(world.model, "bernoulli", world.states, kind="sampled", samples=3, key=0)
        made = {name: make(world, grad_states=world.states) for name, (make, _) in PRODUCTS.items()}
        made["sampled"] = sampled
        return {name: jax.jit(product.operator(world.x, world.y).matvec) for name, product in made.items()}


SIZE = 12
VECTORS = st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=SIZE, max_size=SIZE).map(np.array)


@pytest.mark.parametrize("name", [*PRODUCTS, "sampled"])
@settings(max_examples=25)
@given(u=VECTORS, v=VECTORS, a=st.floats(-3, 3))
def test_products_are_symmetric_linear_and_where_they_promise_it_positive(name, u, v, a):
    H = _operators()[name]
    Hu, Hv = np.array(H(u)), np.array(H(v))
    size = 1 + np.abs(u).sum() * np.abs(v).sum()
    np.testing.assert_allclose(u @ Hv, v @ Hu, atol=1e-9 * size * 100)
    np.testing.assert_allclose(H(a * u + v), a * Hu + Hv, rtol=1e-9, atol=1e-8)
    if name != "hvp":
        assert v @ Hv >= -1e-9 * (1 + v @ v)


# ------------------------------------------------------------------------------------------ the operator


@pytest.fixture(scope="module")
def both():
    """Return an operator over States and an argument, its matrix, and the reference."""
    with jax.enable_x64(True):
        world = World()
        reference = Reference(world, "both")
        H = T.jit(T.hvp(world.loss, **reference.options).operator)(world.x, world.y)
        return H, reference.hvp(), reference


def test_tree_is_what_hessian_returns(both):
    H, matrix, reference = both
    world, n = reference.world, len(matrix)

    def nested(columns):  # columns: parameters of one leaf, then all
        block = jax.vmap(reference.unravel)(columns.reshape(-1, n))
        return jax.tree.map(lambda leaf: leaf.reshape(columns.shape[:-1] + leaf.shape[1:]), block)

    tree = H.tree()
    close(tree, jax.tree.map(nested, jax.vmap(reference.unravel, in_axes=1, out_axes=-1)(matrix)))
    hessian = T.eval_shape(T.hessian(world.loss, **reference.options), world.x, world.y)
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, hessian)


def test_vectors_are_trees_or_flat(both):
    H, matrix, reference = both
    assert H.shape == matrix.shape and H.dtype == matrix.dtype
    v = reference.vector()
    flat = H.ravel(v)
    close(flat, ravel_pytree(v)[0])
    close(H.unravel(flat), v)
    close(H @ flat, matrix @ flat)
    close(H.matvec(np.array(flat)), matrix @ flat)
    assert jax.tree.structure(H.structure) == jax.tree.structure(v)


def test_diagonal_and_trace_are_exact_in_chunks_of_any_size(both):
    H, matrix, reference = both
    close(H.trace(chunk_size=10), jnp.trace(matrix))
    close(H.dense(chunk_size=4), matrix)
    for chunk in (1, 5, 1000):
        close(H.diagonal(chunk_size=chunk), reference.unravel(jnp.diagonal(matrix)))


def test_estimates_lie_within_their_standard_errors_which_are_right(both):
    """Five standard errors; the variances over random signs are known, Σ H_ij² beside the diagonal, twice in all."""
    H, matrix, _ = both
    m, off = 2000, matrix - jnp.diag(jnp.diagonal(matrix))
    estimate, error = map(H.ravel, H.diagonal(samples=m, key=0))
    np.testing.assert_allclose(error, jnp.sqrt((off**2).sum(axis=1) / m), rtol=0.15)
    assert (jnp.abs(estimate - jnp.diagonal(matrix)) <= 5 * error).all()
    estimate, error = H.trace(samples=m, key=1)
    np.testing.assert_allclose(error, jnp.sqrt(2 * (off**2).sum() / m), rtol=0.15)
    assert jnp.abs(estimate - jnp.trace(matrix)) <= 5 * error


def test_estimates_draw_from_the_default_generator(both):
    trace = T.jit(lambda: both[0].trace(samples=4))
    with brainstate.random.seed_context(1):
        first, second = trace(), trace()
    with brainstate.random.seed_context(1):
        assert trace() == first and first != second


def test_blocks_by_path(both):
    H = both[0]
    tree = H.tree()
    part = {
        "0": lambda t: t[0][0],
        "1": lambda t: t[0][1],
        "1.b": lambda t: t[0][1]["b"],
        "1.u": lambda t: t[0][1]["u"],
        "": lambda t: t[0],
        0: lambda t: t[1],
    }
    for a, b in [("0", "1.u"), ("1.u", "0"), ("1.b", "1.b"), ("", 0), (0, "1")]:
        expected = jax.tree.map(part[b], part[a](tree), is_leaf=lambda t: isinstance(t, tuple))
        close(H[a, b], expected)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), jnp.tanh, nn.Linear(4, 2))

    def update(self, x):
        return self.layers(x)


def test_a_module_stands_for_its_parameters():
    with jax.enable_x64(False):
        x = numbers(3, 5, 3)
        with brainstate.random.seed_context(0):
            net = Net()
        H = T.ggn(net, lambda out, x: (out**2).sum(), net).operator(x)
        states = net.states(ParamState)
        assert jax.tree.structure(H.structure) == jax.tree.structure(states.to_dict_values())
        block = H["layers.layers.0.weight", "layers.layers.2.bias"]
        assert block.shape == (3, 4, 2) and block.dtype == jnp.float32
        number = {".".join(map(str, path)): i for i, path in enumerate(sorted(states))}
        spans = np.split(np.arange(H.shape[0]), np.cumsum([leaf.size for leaf in jax.tree.leaves(H.structure)]))
        rows, columns = spans[number["layers.layers.0.weight"]], spans[number["layers.layers.2.bias"]]
        np.testing.assert_allclose(block.reshape(12, 2), H.dense()[np.ix_(rows, columns)], rtol=1e-4, atol=1e-5)
        before = H.shape
        net.extra = ParamState(jnp.ones(2, jnp.float32))
        again = T.ggn(net, lambda out, x: (out**2).sum(), net, check_states=False)
        assert again.operator(x).shape == (before[0] + 2, before[0] + 2)


def test_leaves_of_several_dtypes():
    a, b = ParamState(jnp.array([1.0, 2.0], jnp.float32)), ParamState(jnp.array(3.0, jnp.float64))
    H = T.hvp(lambda: (a.value.astype(jnp.float64) ** 2).sum() * b.value**2, {"a": a, "b": b}).operator()
    assert H.dtype == jnp.float64
    assert H.dense().tolist() == [[18.0, 0.0, 12.0], [0.0, 18.0, 24.0], [12.0, 24.0, 10.0]]
    assert jax.tree.map(lambda leaf: leaf.dtype, H.diagonal()) == {"a": jnp.float32, "b": jnp.float64}


def test_operator_is_a_constant_and_a_pytree(both):
    H, matrix, reference = both
    reference.world.w.value = jnp.zeros((3, 2))
    v = H.ravel(reference.vector())
    assert repr(H) == f"LinearOperator({H.shape[0]} x {H.shape[0]}, float64)"
    close(jax.jit(lambda H, v: H @ v)(H, v), matrix @ v)
    close(T.jit(lambda H: H.trace())(H), jnp.trace(matrix))
    assert len(jax.tree.leaves(jax.tree.map(lambda leaf: leaf, H))) > 0


def test_conjugate_gradients_take_trees_and_flat_vectors():
    world = World()
    reference = Reference(world, "states")
    G = T.ggn(world.model, of_output, world.states).operator(world.x, world.y)
    b = reference.vector()
    expected = jnp.linalg.solve(reference.ggn() + jnp.eye(SIZE), ravel_pytree(b)[0])

    def damped(v):
        return jax.tree.map(jnp.add, G @ v, v)

    close(jax.scipy.sparse.linalg.cg(damped, b, tol=1e-12)[0], reference.unravel(expected), 1e-8)
    close(jax.scipy.sparse.linalg.cg(damped, G.ravel(b), tol=1e-12)[0], expected, 1e-8)
    H = T.ggn(lambda: world.w.value, lambda out: (out**2).sum(), world.w).operator()
    close(jax.scipy.sparse.linalg.cg(H.matvec, reference.vector()["w"])[0], reference.vector()["w"] / 2)


def test_lineax_solves_with_the_operator():
    lineax = pytest.importorskip("lineax")
    world = World()
    reference = Reference(world, "states")
    b = reference.vector()
    F = T.fisher(world.model, "gaussian", world.states).operator(world.x)
    damped = lineax.FunctionLinearOperator(
        lambda v: jax.tree.map(jnp.add, F @ v, v), F.structure, lineax.positive_semidefinite_tag
    )
    expected = jnp.linalg.solve(reference.fisher("gaussian") + jnp.eye(SIZE), ravel_pytree(b)[0])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # lineax does both
        found = lineax.linear_solve(damped, b, lineax.CG(rtol=1e-10, atol=1e-10)).value
        whole = lineax.FunctionLinearOperator(F.matvec, F.structure, lineax.positive_semidefinite_tag)
        close(found, reference.unravel(expected), 1e-7)
        close(whole.as_matrix(), F.dense())


def test_memory_of_a_diagonal_is_bounded():
    """The compiled program of an exact diagonal holds some vectors and no matrix."""
    n = 4000
    with jax.enable_x64(False):
        w, x = ParamState(jnp.ones(n) / n), jnp.ones((3, n))

        @T.jit
        def diagonal(x):
            return T.hvp(lambda: jnp.tanh(x @ w.value).sum(), w).operator().diagonal()

        used = diagonal.lower(x).compile().memory_analysis().temp_size_in_bytes
    assert used < 4 * n * n / 10


@pytest.mark.parametrize("name", ["hvp", "ggn"])
def test_products_compile_to_what_is_written_by_hand(name):
    world = World()
    v = Reference(world, "states").vector()

    def model(params):
        return twin(params, world.x)

    def by_hand(params, v):
        if name == "hvp":
            return jax.jvp(jax.grad(lambda p: misfit(model(p), world.y)), (params,), (v,))[1]
        out, tangent = jax.jvp(model, (params,), (v,))
        return jax.vjp(model, params)[1](jax.jvp(jax.grad(lambda o: misfit(o, world.y)), (out,), (tangent,))[1])[0]

    def instructions(lowered):
        return lowered.compile().as_text().count(" = ")

    # Without the integer beside the parameters, which is an input of ours and a constant of the twin.
    world.p.value = {k: x for k, x in world.p.value.items() if k != "n"}
    world.model = lambda x, y=None: twin({"w": world.w.value, "p": world.p.value}, x)
    del v["p"]["n"], world.params["p"]["n"]
    ours = T.jit(lambda v: PRODUCTS[name][0](world, grad_states=world.states)(v, world.x, world.y))
    assert instructions(ours.lower(v)) == instructions(jax.jit(by_hand).lower(world.params, v))


# ------------------------------------------------------------------------------------------ in all places


def _inside(name, world):
    """Return a function of ``(v, x, y)`` by ours, and by the twin."""
    product = PRODUCTS[name][0](world, grad_states=world.states)
    flat, unravel = ravel_pytree(world.params)

    def by_twin(v, x, y):
        out = lambda flat: twin(unravel(flat), x)  # noqa: E731
        if name == "hvp":
            slope = jax.grad(lambda flat: misfit(out(flat), y))
            return unravel(jax.jvp(slope, (flat,), (ravel_pytree(v)[0],))[1])
        value, tangent = jax.jvp(out, (flat,), (ravel_pytree(v)[0],))
        curved = jax.jvp(jax.grad(lambda o: misfit(o, y)), (value,), (tangent,))[1]
        return unravel(jax.vjp(out, flat)[1](curved)[0])

    return product, by_twin


@pytest.mark.long
@pytest.mark.parametrize("name", ["hvp", "ggn"])
def test_inside_other_transforms(name):
    world = World()
    ours, by_twin = _inside(name, world)
    v, x, y = Reference(world, "states").vector(), world.x, world.y
    calls = itertools.count(1)

    def ran(times):
        assert world.runs == next(calls) and int(world.calls.value) == times
        world.calls.value = jnp.array(0)

    close(T.jit(ours)(v, x, y), by_twin(v, x, y))
    ran(1)
    xs = jnp.stack([x, 2 * x])
    close(T.for_loop(lambda x: ours(v, x, y), xs), jax.lax.map(lambda x: by_twin(v, x, y), xs))
    ran(2)

    def sum_of(product):
        return lambda x: sum(leaf.sum() for leaf in jax.tree.leaves(product(v, x, y)))

    close(T.grad(sum_of(ours))(x), jax.grad(sum_of(by_twin))(x))
    ran(1)
    close(T.jit(T.grad(sum_of(lambda *a: ours.operator(*a[1:]) @ a[0])))(x), jax.grad(sum_of(by_twin))(x))
    ran(1)


def test_linearize_inside_other_transforms():
    world = World()
    v, xs = Reference(world, "one state").vector(), jnp.stack([world.x, 2 * world.x])

    def ours(x):
        out, push = T.linearize(world.model, x, grad_states=world.w)
        return out, push(v)

    def by_twin(x):
        return jax.jvp(lambda w: twin(world.params | {"w": w}, x), (world.params["w"],), (v,))

    expected = jax.lax.map(by_twin, xs)
    close(T.jit(ours)(world.x), by_twin(world.x))
    close(T.vmap(ours)(xs), expected)
    close(T.for_loop(ours, xs), expected)
    assert world.runs == 3 and int(world.calls.value) == 4
    close(T.grad(lambda x: ours(x)[1].sum())(world.x), jax.grad(lambda x: by_twin(x)[1].sum())(world.x))


@pytest.mark.long
@pytest.mark.parametrize("name", PRODUCTS)
def test_inside_vmap(name):
    world = World()
    v, x = Reference(world, "states").vector(), world.x
    product = PRODUCTS[name][0](world, grad_states=world.states)
    xs = jnp.stack([x, 2 * x])
    expected = [product(v, x, world.y) for x in xs]
    world.calls.value = jnp.array(0)
    close(T.vmap(lambda x: product(v, x, world.y))(xs), jax.tree.map(lambda *t: jnp.stack(t), *expected))
    assert int(world.calls.value) == 1


def test_the_hessian_of_a_product_is_the_fourth_derivative():
    w = ParamState(jnp.array(2.0))
    inner = T.hvp(lambda: w.value**4 / 24, w)
    assert float(T.hvp(lambda: inner(jnp.array(1.0)), w)(jnp.array(1.0))) == 1.0
    assert float(T.grad(lambda: inner(jnp.array(1.0)), w)()) == 2.0


@pytest.mark.long
def test_loops_and_checkpoints_inside_the_model():
    w, h = ParamState(jnp.array([0.5, -0.3]), name="w"), State(jnp.zeros(2), name="h")

    def model(x):
        h.value = jnp.zeros(2)
        step = T.checkpoint(lambda x: jnp.tanh(h.value * w.value + x))

        def body(x):
            h.value = step(x)
            return h.value.sum()

        return T.for_loop(body, x)

    def by_hand(w):
        def body(h, x):
            h = jnp.tanh(h * w + x)
            return h, h.sum()

        return jax.lax.scan(body, jnp.zeros(2), x)[1]

    x, v = jnp.arange(8.0).reshape(4, 2) / 10, jnp.array([1.0, -2.0])
    jac = jax.jacfwd(by_hand)(w.value)
    close(T.ggn(model, lambda out, x: (out**2).sum() / 2, w)(v, x), jac.T @ jac @ v)
    close(T.hvp(lambda x: (model(x) ** 2).sum(), w)(v, x), jax.hessian(lambda w: (by_hand(w) ** 2).sum())(w.value) @ v)


def test_python_control_flow_on_concrete_values():
    w = ParamState(jnp.array([1.0, 2.0]))

    def f(kind, x):
        return (w.value ** (3 if kind == "cubic" and w.value.sum() > 0 else 2)).sum() * x

    v = jnp.array([1.0, 0.0])
    assert T.hvp(f, w)(v, "cubic", 1.0).tolist() == [6.0, 0.0]
    assert (T.hvp(f, w).operator("cubic", 1.0) @ v).tolist() == [6.0, 0.0]
    assert T.ggn(lambda kind: w.value, lambda out, kind: (out**2).sum(), w)(v, "text").tolist() == [2.0, 0.0]


def test_complex_values():
    z, v = jnp.array([1.0 + 2.0j, 0.5j]), jnp.array([1.0j, 2.0 - 1.0j])
    f = lambda z: (jnp.abs(z) ** 4).sum()  # noqa: E731
    close(T.hvp(f)(v, z), jax.jvp(jax.grad(f), (z,), (v,))[1])


def test_decorators_and_methods():
    w = ParamState(jnp.array([1.0, 2.0]))

    @T.hvp
    def plain(x):
        """Say what."""
        return (x**3).sum()

    @T.hvp(grad_states=w, return_value=True)
    def other(x):
        return (w.value**2).sum() * x

    class Energy:
        scale = 2.0

        @T.hvp(argnums=0)
        def curvature(self, x):
            return self.scale * (x**2).sum()

    v = jnp.array([1.0, 0.0])
    assert plain.__doc__ == "Say what." and repr(plain).startswith("hvp(")
    assert plain(v, w.value).tolist() == [6.0, 0.0]
    assert [part.tolist() for part in other(v, 3.0)] == [[6.0, 0.0], 15.0]
    assert Energy().curvature(v, w.value).tolist() == [4.0, 0.0]
    assert Energy().curvature.operator(w.value).dense().tolist() == [[4.0, 0.0], [0.0, 4.0]]
    assert isinstance(Energy.curvature.method, type(plain))


def test_loss_sees_what_the_model_wrote_and_writes_itself():
    w, h, log = ParamState(jnp.array([1.0, 2.0])), State(jnp.array(0.0)), State({"loss": jnp.array(0.0), "n": 0})

    def model(x):
        h.value = h.value + x
        return w.value * x

    def loss(out, x):
        value = h.value * (out**2).sum()
        log.value = {"loss": value, "n": log.value["n"] + 1}
        return value

    v = jnp.array([1.0, 0.0])
    assert T.ggn(model, loss, w)(v, 2.0).tolist() == [16.0, 0.0]
    assert float(h.value) == 2.0 and log.value == {"loss": 40.0, "n": 1}
    G, slope, value = T.ggn(model, loss, w, return_grad=True, return_value=True).operator(2.0)
    assert (G @ v).tolist() == [32.0, 0.0] and slope.tolist() == [32.0, 64.0] and float(value) == 80.0
    assert float(h.value) == 4.0 and log.value["n"] == 2


def test_a_generator_draws_once_for_all_passes_and_once_for_an_operator():
    w, rng, twin_rng = ParamState(jnp.array([1.0, 2.0])), *(brainstate.random.RandomState(0) for _ in range(2))
    v = jnp.array([1.0, 2.0])
    product = T.hvp(lambda: (w.value**3 * rng.normal(size=2)).sum(), w)
    close(product(v), 6 * w.value * twin_rng.normal(size=2) * v)
    G = T.ggn(lambda: w.value * rng.normal(size=2), lambda out: (out**2).sum() / 2, w).operator()
    noise = twin_rng.normal(size=2)
    for _ in range(2):
        close(G @ v, noise**2 * v)
    assert rng.normal() == twin_rng.normal()


def test_numbers_of_python_and_loss_of_another_use_of_an_argument():
    w = ParamState(3.0)
    G = T.ggn(lambda x, y: w.value * x, lambda out, x, y: (out - y * jax.lax.stop_gradient(x)) ** 2, w, 0)
    (first, second), H = G((1.0, 1.0), 2.0, 1.0), G.operator(2.0, 1.0)
    assert (float(first), float(second)) == (2 * 2.0 * 5.0, 2 * 3.0 * 5.0)
    assert H.dense().tolist() == [[8.0, 12.0], [12.0, 18.0]]
    out, push = T.linearize(lambda x: w.value * x, 2.0, grad_states=w, argnums=0)
    assert (float(out), float(push((1.0, 1.0)))) == (6.0, 5.0)


def test_states_created_inside_and_no_leaks(no_leaks):
    w, kept = ParamState(jnp.array([1.0, 2.0])), []

    def model(x):
        kept.append(State(w.value * x))
        return State(kept[-1].value ** 2).value

    v = jnp.array([1.0, 0.0])
    T.ggn(model, lambda out, x: (out**2).sum(), w)(v, 2.0)
    T.hvp(lambda x: model(x).sum(), w).operator(3.0)
    T.linearize(model, 4.0, grad_states=w)
    assert [s.value.tolist() for s in kept] == [[2.0, 4.0], [3.0, 6.0], [4.0, 8.0]]


# ------------------------------------------------------------------------------------------ misuse


@dataclass
class Row:
    """A mistake, the type of its error, and what the message contains."""

    name: str
    trigger: Callable
    error: type
    message: str


w = ParamState(np.array([1.0, 2.0], np.float32), name="w")
p = ParamState({"k": np.float32(3.0), "n": 1}, name="p")
z = ParamState(np.array([1.0j], np.complex64), name="z")
idle = ParamState(np.float32(1.0), name="idle")
cache = State(np.float32(0.0), name="cache")
FOUND = {"a": w, "b": {"p": p}}


def f(x=1.0):
    cache.value = cache.value + 1
    return (w.value**2).sum() * p.value["k"] * x


def g(x=1.0):
    cache.value = cache.value + 1
    return w.value[:, None] * p.value["k"]


def square(out, *args):
    cache.value = cache.value + 1
    return (out**2).sum()


def one(dtype=jnp.float32):
    return jnp.ones(2, dtype)


@functools.cache
def _good():
    return T.hvp(f, FOUND).operator()


ROWS = [
    Row("no function", lambda: T.hvp(3, w), StateTypeError, "hvp differentiates a function; got int"),
    Row("no loss", lambda: T.ggn(g, None, w), StateTypeError, "loss_fn is a NoneType"),
    Row("nothing to differentiate", lambda: T.hvp(f, argnums=()), StateValueError, "nothing to differentiate"),
    Row("argnums no int", lambda: T.ggn(g, square, argnums="x"), StateValueError, "argnums='x': positions are Python"),
    Row(
        "linearize: out of range",
        lambda: T.linearize(f, 1.0, argnums=3),
        StateTypeError,
        "argnums=3 selects argument 3, but the call has 1",
    ),
    Row("a State twice", lambda: T.hvp(f, [w, w])([one(), one()]), StateValueError, r"grad_states\[0\] and .*\[1\]"),
    Row("unused", lambda: T.hvp(f, [w, idle])([one(), 1.0]), StateValueError, r"never reads grad_states\[1\]"),
    Row("no scalar", lambda: T.hvp(g, w)(one()), StateTypeError, r"one real number, a loss; its output is of shape"),
    Row("int loss", lambda: T.hvp(lambda: (f(), 1)[1], w)(one()), StateTypeError, "of dtype int"),
    Row("loss no scalar", lambda: T.ggn(g, lambda o: o, w)(one()), StateTypeError, "ggn: loss_fn returns one real"),
    Row("has_aux, no pair", lambda: T.hvp(f, w, has_aux=True)(one()), StateTypeError, r"a pair \(value, aux\)"),
    Row(
        "vector: None",
        lambda: T.hvp(f, w)(None),
        StateValueError,
        "hvp: the vector has the wrong structure: grad_states is missing",
    ),
    Row(
        "vector: missing leaf",
        lambda: T.hvp(f, FOUND)({"a": one(), "b": {"q": one()}}),
        StateValueError,
        r"grad_states\['b'\]\['p'\]\['k'\] is missing, grad_states\['b'\]\['q'\] is unexpected",
    ),
    Row(
        "vector: shape",
        lambda: T.ggn(g, square, FOUND)({"a": jnp.ones(3, jnp.float32), "b": {"p": {"k": 1.0, "n": None}}}),
        StateValueError,
        r"ggn: the vector at grad_states\['a'\] is float32\[3\], where float32\[2\] is expected",
    ),
    Row(
        "vector: dtype",
        lambda: T.fisher(g, "gaussian", w)(one(jnp.float16)),
        StateValueError,
        r"fisher: the vector at grad_states is float16\[2\], where float32\[2\] is expected",
    ),
    Row(
        "vector: an argument's",
        lambda: T.hvp(f, w, 0)((one(), one()), 1.0),
        StateValueError,
        r"at argument 0 is float32\[2\], where float32\[\] is expected",
    ),
    Row(
        "vector: one of several arguments",
        lambda: T.hvp(lambda a, b: a * f(b), argnums=(1, 0))((1.0, "text"), 1.0, 2.0),
        StateValueError,
        r"at argument 0 is a str",
    ),
    Row(
        "vector: integer leaf not None",
        lambda: T.hvp(f, p)({"k": jnp.float32(1), "n": 1}),
        StateValueError,
        r"grad_states\['n'\] is unexpected",
    ),
    Row("matvec: length", lambda: _good() @ jnp.ones(7), StateValueError, r"\(a flat one is float32\[3\]\)"),
    Row("unravel: length", lambda: _good().unravel(jnp.ones(7)), StateValueError, r"3 numbers, .* \(7,\)"),
    Row("ravel: structure", lambda: _good().ravel({"a": one()}), StateValueError, r"grad_states\['b'\].* is missing"),
    Row("path: unknown", lambda: _good()["a", "c"], StateValueError, r"'c' names nothing .*there are 'a', 'b.p.k'"),
    Row("path: not differentiated", lambda: _good()["b.p.n", "a"], StateValueError, r"'b.p.n' names nothing"),
    Row("path: argument", lambda: _good()[0, "a"], StateValueError, r"0 names nothing that is differentiated"),
    Row("path: below a leaf", lambda: _good()["a.0", "a"], StateValueError, r"'a.0' names nothing"),
    Row("path: only one", lambda: _good()["a"], StateTypeError, r"two paths, one of its rows"),
    Row("chunk_size", lambda: _good().diagonal(chunk_size=0), StateValueError, "chunk_size=0: give the number"),
    Row("samples", lambda: _good().trace(samples=1), StateValueError, "samples=1: .*no standard error"),
    Row("both", lambda: _good().trace(samples=2, chunk_size=2), StateValueError, "give one of them"),
    Row("key alone", lambda: _good().diagonal(key=0), StateValueError, "key is given and samples is not"),
    Row("complex", lambda: T.hvp(lambda: jnp.abs(z.value).sum(), z).operator(), StateTypeError, "over the reals only"),
    Row(
        "ggn: integer output", lambda: T.ggn(lambda: (g(), 1), square, w)(one()), StateTypeError, r"output\[1\] .* int"
    ),
    Row("ggn: complex", lambda: T.ggn(lambda: jnp.abs(z.value), square, z)(z.value), StateTypeError, "over the reals"),
    Row(
        "ggn: the loss reads a parameter",
        lambda: T.ggn(g, lambda o: (o**2).sum() + (w.value**2).sum(), w)(one()),
        StateValueError,
        "State 'w' is differentiated and read by the loss of ggn.*Let the model return",
    ),
    Row(
        "ggn: the loss depends on a differentiated argument",
        lambda: T.ggn(lambda x: x * w.value, lambda o, x: ((o - x) ** 2).sum(), w, (0,))((one(), (one(),)), one()),
        StateValueError,
        "depends on an argument that is differentiated.*Let the model return",
    ),
    Row("likelihood", lambda: T.fisher(g, "gamma", w), StateValueError, "likelihood='gamma' .*'categorical'"),
    Row("kind", lambda: T.fisher(g, "gaussian", w, kind="true"), StateValueError, "kind='true' .*'empirical'"),
    Row(
        "no targets", lambda: T.fisher(g, "gaussian", w, kind="empirical"), StateTypeError, "needs targets, a function"
    ),
    Row("targets", lambda: T.fisher(g, "gaussian", w, targets=g), StateValueError, "targets is for kind='empirical'"),
    Row("key of exact", lambda: T.fisher(g, "gaussian", w, key=0), StateValueError, "key is for kind='sampled'"),
    Row(
        "samples of sampled",
        lambda: T.fisher(g, "gaussian", w, kind="sampled", samples=0),
        StateValueError,
        "samples=0: give how many labels",
    ),
    Row("no examples", lambda: T.fisher(f, "gaussian", w)(one()), StateTypeError, r"shape \(\).*1 or more axes"),
    Row(
        "no classes",
        lambda: T.fisher(lambda: g()[:, 0], "categorical", w)(one()),
        StateTypeError,
        "2 or more axes, examples first, classes last",
    ),
    Row("two outputs", lambda: T.fisher(lambda: (g(), g()), "gaussian", w)(one()), StateTypeError, "model is a tuple"),
    Row(
        "labels: one-hot",
        lambda: T.fisher(g, "categorical", w, kind="empirical", targets=lambda: jnp.ones((2, 1)))(one()),
        StateValueError,
        r"the targets are float\d+\[2,1\]. For 'categorical' .*integers of shape \(2,\)",
    ),
    Row(
        "labels: shape",
        lambda: T.fisher(g, "bernoulli", w, kind="empirical", targets=lambda: jnp.ones(2))(one()),
        StateValueError,
        r"numbers of shape \(2, 1\)",
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_misuse(row):
    with jax.enable_x64(False):
        _good()
        with unchanged(w, p, z, idle, cache), pytest.raises(row.error, match=row.message):
            row.trigger()


def test_an_exception_in_the_loss_leaves_every_state():
    world = World()

    def boom(out, x):
        world.w.value = jnp.zeros((3, 2))
        raise RuntimeError("boom")

    with unchanged(world.w, world.p, world.calls), pytest.raises(RuntimeError, match="boom"):
        T.ggn(world.model, boom, world.states)(Reference(world, "states").vector(), world.x)


def test_a_label_that_is_no_class_is_not_silent():
    world = World()
    product = T.fisher(world.model, "categorical", world.states, kind="empirical", targets=lambda x: jnp.full(5, 2))
    assert np.isnan(product.operator(world.x).dense()).all()


@pytest.mark.long
def test_a_raw_jit_warns_of_frozen_states():
    world = World()
    v = Reference(world, "one state").vector()
    with pytest.warns(brainstate.FrozenReadWarning, match="'w'"):
        jax.jit(T.hvp(lambda: (world.w.value**2).sum(), world.w))(v)
