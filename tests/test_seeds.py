"""
The two documents that this library grew from, statement by statement, with the figures that they print.

The functions here are named for what they compute and compared with what the documents show: text where they
print text, hand-derived numbers where they state a rule. Run under JAX's default promotion, as a reader would.
"""

import inspect
import itertools
import math
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainstate
from brainstate import ParamState, State, graph, nn
from brainstate.transform import (
    GradientTransform,
    StateFinder,
    fwd_grad,
    grad,
    hessian,
    jacfwd,
    jacobian,
    jacrev,
    jit,
    vector_grad,
)
from transforms import DECORATORS


@pytest.fixture(autouse=True)
def hostile():
    """Take the place of the fixture of that name: the documents add a bias to a batch, of another rank."""


class Line(nn.Module):
    """The affine model that both documents fit, all zeros at first."""

    def __init__(self, in_features, out_features=1):
        super().__init__()
        self.weight = ParamState(jnp.zeros((in_features, out_features)))
        self.bias = ParamState(jnp.zeros((out_features,)))

    def __call__(self, x):
        return x @ self.weight.value + self.bias.value


INPUTS = jnp.linspace(-1.0, 1.0, 5).reshape(-1, 1)
TARGETS = 3.0 * INPUTS + 1.0


def squared_error(model):
    """The loss of `model` as a function of inputs and targets."""
    return lambda x, target: jnp.mean((model(x) - target) ** 2)


def lines(pattern, mapping):
    """Write each entry of `mapping` by `pattern`, one on a line."""
    return "\n".join(pattern.format(key, value) for key, value in mapping.items())


# ------------------------------------------------------------------------------------------ arguments


def weighted_distance(x, y, factor):
    return factor * jnp.sum((x - y) ** 2)


X, Y = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.5, 1.5, 2.5])


def test_argnums_selects_one_argument():
    assert f"Gradient w.r.t. x: {grad(weighted_distance, argnums=0)(X, Y, 2.0)}" == "Gradient w.r.t. x: [2. 2. 2.]"


@pytest.mark.parametrize("kind", [list, tuple])
def test_argnums_selects_several_arguments_in_order(kind):
    by_x, by_y = grad(weighted_distance, argnums=kind([0, 1]))(X, Y, 2.0)
    assert f"Gradient w.r.t. x: {by_x}" == "Gradient w.r.t. x: [2. 2. 2.]"
    assert f"Gradient w.r.t. y: {by_y}" == "Gradient w.r.t. y: [-2. -2. -2.]"
    swapped = grad(weighted_distance, argnums=kind([1, 0]))(X, Y, 2.0)
    assert [g.tolist() for g in swapped] == [by_y.tolist(), by_x.tolist()]


@pytest.mark.parametrize("argnums", [None, 0, 2, (2,), [0], (2, 0)])
def test_argnums_is_that_of_jax(argnums):
    ours = grad(weighted_distance, argnums=argnums)(X, Y, 2.0)
    theirs = jax.grad(weighted_distance, argnums=0 if argnums is None else argnums)(X, Y, 2.0)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert all(map(np.array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs)))


# ------------------------------------------------------------------------------------------ parameters


def test_gradients_of_the_parameters_of_a_module():
    model = Line(1)
    derivative = grad(squared_error(model), grad_states=model.states(ParamState), return_value=True)
    grads, loss = derivative(INPUTS, TARGETS)
    assert f"Loss: {float(loss):.4f}" == "Loss: 5.5000"
    assert lines("  {}: {}", grads) == "  ('bias',): [-2.]\n  ('weight',): [[-3.]]"


def test_states_and_treefy_states_find_the_same_parameters():
    model = Line(1)
    live = model.states(ParamState)
    snapshots = graph.treefy_states(model, ParamState).to_flat()
    for found in (live, snapshots):
        shown = {path: f"shape={state.value.shape}" for path, state in found.items()}
        assert lines("  {}: {}", shown) == "  ('bias',): shape=(1,)\n  ('weight',): shape=(1, 1)"
    assert set(live.keys()) == set(snapshots.keys())
    assert live["weight",] is model.weight and live["bias",] is model.bias


def test_param_state_marks_what_is_trained():
    model = Line(1)
    model.seen = State(jnp.array(0.0))
    assert list(model.states(ParamState)) == [("bias",), ("weight",)]
    assert list(model.states()) == [("bias",), ("seen",), ("weight",)]


def test_gradients_mirror_the_parameters_and_step_them():
    model = Line(1)
    params = model.states(ParamState)
    grads = grad(squared_error(model), grad_states=params)(INPUTS, TARGETS)
    assert list(grads) == list(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    for path, state in params.items():
        state.value = state.value - 0.1 * grads[path]
    assert f"updated weight: {model.weight.value}" == "updated weight: [[0.3]]"
    assert f"updated bias: {model.bias.value}" == "updated bias: [0.2]"


# ------------------------------------------------------------------------------------------ any function, any State


def make_energy():
    """An energy of two free-standing parameters, which it writes back, and a cache that it fills."""
    factor = ParamState(jnp.array(1.5), name="scale")
    shift = ParamState(jnp.array(-0.2), name="offset")
    cache = State(jnp.array(0.0), name="cache")

    def energy(x):
        moved = x * factor.value + shift.value
        factor.value = factor.value + 0.0
        cache.value = jnp.sum(moved)
        return jnp.sum(jnp.square(moved))

    return energy, factor, shift, cache


def test_state_finder_finds_the_parameters_of_a_function():
    energy, factor, shift, cache = make_energy()
    find = StateFinder(energy, filter=ParamState, usage="all", return_type="dict")
    found = find(jnp.ones((2,)))
    assert lines("  {}: {}", {k: s.name for k, s in found.items()}) == "  0: scale\n  1: offset"
    assert found == {0: factor, 1: shift}
    assert float(cache.value) == 0.0, "finding computes nothing"

    grads, value = grad(energy, grad_states=found, return_value=True)(jnp.array([1.0, 3.0]))
    assert f"Energy: {float(value):.4f}" == "Energy: 20.1800"
    assert lines("  {}: {}", grads) == "  0: 28.400001525878906\n  1: 11.200000762939453"
    assert math.isclose(float(cache.value), 5.6, rel_tol=1e-6), "a write that is not differentiated is kept"


@pytest.mark.parametrize(
    ("usage", "names"),
    [("all", ["scale", "offset", "cache"]), ("read", ["offset"]), ("write", ["scale", "cache"])],
)
@pytest.mark.parametrize("kind", [dict, list, tuple])
def test_state_finder_by_usage(usage, names, kind):
    found = StateFinder(make_energy()[0], usage=usage, return_type=kind.__name__)(jnp.ones(2))
    assert type(found) is kind
    assert [s.name for s in (found.values() if kind is dict else found)] == names


def test_any_state_can_be_differentiated():
    plain = State(jnp.array(2.0), name="regular_state")
    (gradient,) = grad(lambda x: jnp.sum((x * plain.value) ** 2), grad_states=[plain])(X)
    assert f"Gradient w.r.t. regular State: {gradient}" == "Gradient w.r.t. regular State: 56.0"


# ------------------------------------------------------------------------------------------ States and arguments


def ridge(model):
    """The squared error of `model` plus `strength` times the squares of its parameters."""

    def loss(strength, x, target):
        squares = jnp.sum(model.weight.value**2) + jnp.sum(model.bias.value**2)
        return squared_error(model)(x, target) + strength * squares

    return loss


@pytest.mark.parametrize("strength", [0.5, 0.1])
def test_states_and_arguments_together(strength):
    model = Line(1)
    derivative = grad(ridge(model), grad_states=model.states(ParamState), argnums=0, return_value=True)
    (by_state, by_strength), loss = derivative(strength, INPUTS, TARGETS)
    assert f"Loss: {float(loss):.4f}" == "Loss: 5.5000"
    assert f"Gradient w.r.t. l2_coeff: {float(by_strength):.4f}" == "Gradient w.r.t. l2_coeff: 0.0000"
    assert lines("  {}: {}", by_state) == "  ('bias',): [-2.]\n  ('weight',): [[-3.]]"


def test_the_argument_has_a_gradient_away_from_zero():
    model = Line(1)
    model.weight.value, model.bias.value = jnp.array([[2.0]]), jnp.array([-1.0])
    by_state, by_strength = grad(ridge(model), model.states(ParamState), 0)(0.5, INPUTS, TARGETS)
    assert math.isclose(float(by_strength), 5.0, rel_tol=1e-6)
    # d/dw: -2 mean(x (y - w x)) + w = -2 * 0.5 * (3 - 2) + 2;   d/db: -2 (1 - b) + b = -4 - 1
    assert np.allclose(by_state["weight",], [[1.0]]) and np.allclose(by_state["bias",], [-5.0])


# ------------------------------------------------------------------------------------------ the table of results


def scaled_transform(fun, *, argnums, has_aux, scale):
    """A gradient times a number, as a transform of one's own."""
    assert has_aux is True
    base = jax.grad(fun, argnums=argnums, has_aux=True)

    def wrapped(*args, **kwargs):
        grads, aux = base(*args, **kwargs)
        return jax.tree.map(lambda g: scale * g, grads), aux

    return wrapped


def halved(fun, **options):
    return GradientTransform(fun, transform=scaled_transform, transform_params={"scale": 0.5}, **options)


def by_chance(fun, **options):
    return fwd_grad(fun, tangent_size=20_000, key=0, **options)


P, Q, A, B = 2.0, 3.0, 5.0, 7.0  # States p, q and arguments a, b of f = p² a + q b²
VALUE = P**2 * A + Q * B**2
FIRST = {"p": 2 * P * A, "q": B**2, "a": P**2, "b": 2 * Q * B}
SECOND = {("p", "p"): 2 * A, ("a", "p"): 2 * P, ("b", "q"): 2 * B, ("b", "b"): 2 * Q}
OUTPUTS = np.array([1.0, -2.0, 4.0])  # a vector-valued transform sees f times these

# name -> (the transform, what an output of ones would be, the derivative of a weighted function given its gradient)
SCALAR, VECTOR = np.array(1.0), OUTPUTS
TRANSFORMS = {
    name: (row.derive if row.exact else by_chance, row.call(SCALAR, VECTOR), row.by_hand)
    for name, row in DECORATORS.items()
} | {"custom": (halved, SCALAR, lambda weights, gradient: 0.5 * gradient)}

# The names of what is differentiated in the place of each gradient: G of the table.
ROWS = [
    *[(None, argnums, g) for argnums, g in [(None, "a"), (0, "a"), (1, "b"), ((0,), ("a",)), ([1, 0], ("b", "a"))]],
    ("states", None, {"p": "p", "q": "q"}),
    *[
        ("states", argnums, ({"p": "p", "q": "q"}, g))
        for argnums, g in [(0, "a"), (1, "b"), ([1], ("b",)), ((0, 1), ("a", "b"))]
    ],
]


def derivative_of(names, first):
    """The hand-derived derivative in the structure of `names`; of second order where `first` is None."""
    if first is not None:
        return jax.tree.map(first, names)
    return jax.tree.map(lambda n: jax.tree.map(lambda m: SECOND.get(tuple(sorted((n, m))), 0.0), names), names)


@pytest.mark.crossing(2)
@pytest.mark.parametrize("return_value", [False, True])
@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize(("given", "argnums", "names"), ROWS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_row_of_the_result_table(transform, given, argnums, names, has_aux, return_value):
    make, ones, by_hand = TRANSFORMS[transform]
    first = by_hand and (lambda name: by_hand(ones, FIRST[name]))
    p, q, calls = ParamState(jnp.array(P)), State(jnp.array(Q)), State(jnp.array(0))

    def fun(a, b):
        calls.value = calls.value + 1
        out = ones.astype("float32") * (p.value**2 * a + q.value * b**2)
        return (out, {"note": "text", "a": a}) if has_aux else out

    states = None if given is None else {"q": q, "p": p}
    result = make(fun, grad_states=states, argnums=argnums, has_aux=has_aux, return_value=return_value)(A, B)

    expected = (derivative_of(names, first), *[ones * VALUE] * return_value, *[{"note": "text", "a": A}] * has_aux)
    if len(expected) == 1:
        (expected,) = expected
    else:
        assert type(result) is tuple
        if has_aux:
            assert result[-1].pop("note") == expected[-1].pop("note")
    assert jax.tree.structure(result) == jax.tree.structure(expected, is_leaf=lambda x: isinstance(x, np.ndarray))
    # The standard deviation of an entry of the random estimate is at most |gradient| * sqrt(2 / 20000).
    close = {"atol": 0.05 * math.hypot(*FIRST.values())} if transform == "fwd_grad" else {"rtol": 1e-6}
    for ours, theirs in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, **close)
    assert int(calls.value) == 1, "a write is committed once, however many passes ran"


def test_the_example_with_every_option():
    model = Line(1)

    def loss(strength, x, target):
        error = model(x) - target
        mse, squares = jnp.mean(error**2), jnp.sum(model.weight.value**2)
        return mse + strength * squares, {"mae": jnp.mean(jnp.abs(error)), "mse": mse, "l2": squares}

    options = {"argnums": 0, "has_aux": True, "return_value": True}
    ((by_state, by_strength), value, metrics) = grad(loss, model.states(ParamState), **options)(0.3, INPUTS, TARGETS)
    assert f"Loss: {float(value):.4f}" == "Loss: 5.5000"
    assert f"Gradient w.r.t. l2_coeff: {float(by_strength):.4f}" == "Gradient w.r.t. l2_coeff: 0.0000"
    assert lines("  {}: {}", by_state) == "  ('bias',): [-2.]\n  ('weight',): [[-3.]]"
    assert lines("  {}: {:.4f}", metrics) == "  l2: 0.0000\n  mae: 2.0000\n  mse: 5.5000"


# ------------------------------------------------------------------------------------------ the other transforms


def test_all_share_one_signature():
    shared = {"grad_states", "argnums", "has_aux", "return_value", "check_states"}
    for row in DECORATORS.values():
        parameters = inspect.signature(row.transform).parameters
        assert list(parameters)[:3] == ["fun", "grad_states", "argnums"]
        assert shared <= set(parameters)
    assert shared <= set(inspect.signature(GradientTransform).parameters)


def test_vector_grad_sums_over_the_outputs():
    def outputs(x):
        return jnp.array([x[0] * x[1], jnp.sin(x[0]), x[0] ** 2 + x[1] ** 2])

    at = jnp.array([1.0, 2.0])
    assert f"Vector gradient: {vector_grad(outputs)(at)}" == "Vector gradient: [4.5403023 5.       ]"
    assert np.allclose(vector_grad(outputs)(at), jax.jacrev(outputs)(at).sum(axis=0))


@pytest.mark.parametrize("transform", [jacrev, jacfwd, jacobian])
def test_jacobians(transform):
    jacobian_at = transform(lambda x: jnp.array([x[0] * x[1], jnp.sin(x[0]), jnp.exp(x[1])]))
    printed = """
        [[2.        1.       ]
         [0.5403023 0.       ]
         [0.        7.389056 ]]"""
    assert str(jacobian_at(jnp.array([1.0, 2.0]))) == textwrap.dedent(printed).strip()


def test_jacobian_is_jacrev():
    assert jacobian is jacrev


def test_hessian():
    assert str(hessian(lambda x: jnp.dot(x, x))(jnp.array([1.0, 2.0]))) == "[[2. 0.]\n [0. 2.]]"


@pytest.mark.parametrize("transform", [jacrev, jacfwd, jacobian])
def test_jacobian_with_respect_to_parameters(transform):
    model = Line(2)
    at = jnp.array([1.0, 2.0])
    by_state = transform(lambda x: model(x), grad_states=model.states(ParamState))(at)
    shown = {path: f"shape={block.shape}" for path, block in by_state.items()}
    assert lines("  {}: {}", shown) == "  ('bias',): shape=(1, 1)\n  ('weight',): shape=(1, 2, 1)"
    assert by_state["bias",].tolist() == [[1.0]] and by_state["weight",].tolist() == [[[1.0], [2.0]]]


# ------------------------------------------------------------------------------------------ one's own transform


def test_scaled_gradients():
    model = Line(1)
    options = {"grad_states": model.states(ParamState)}
    scaled = halved(squared_error(model), **options)(INPUTS, TARGETS)
    assert lines("  {}: {}", scaled) == "  ('bias',): [-1.]\n  ('weight',): [[-1.5]]"
    unscaled = grad(squared_error(model), **options)(INPUTS, TARGETS)
    assert lines("  {}: {}", unscaled) == "  ('bias',): [-2.]\n  ('weight',): [[-3.]]"


def clipped_transform(fun, *, argnums, has_aux, max_norm):
    base = jax.grad(fun, argnums=argnums, has_aux=has_aux)

    def wrapped(*args, **kwargs):
        grads, aux = base(*args, **kwargs)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
        return jax.tree.map(lambda g: factor * g, grads), aux

    return wrapped


def test_clipped_gradients():
    model = Line(1)
    clipped = GradientTransform(
        squared_error(model),
        transform=clipped_transform,
        grad_states=model.states(ParamState),
        transform_params={"max_norm": 0.1},
    )(INPUTS, TARGETS)
    shown = {path: f"{g}\n    norm: {jnp.linalg.norm(g):.4f}" for path, g in clipped.items()}
    assert lines("  {}: {}", shown) == (
        "  ('bias',): [-0.05547]\n    norm: 0.0555\n  ('weight',): [[-0.08320501]]\n    norm: 0.0832"
    )


def test_a_transform_of_ones_own_keeps_the_state_effects():
    model, steps = Line(1), State(jnp.array(0))

    def loss(x, target):
        steps.value = steps.value + 1
        return squared_error(model)(x, target), {"pred": model(x)}

    derivative = halved(loss, grad_states=model, has_aux=True, return_value=True)
    for expected in (1, 2):
        _, value, aux = derivative(INPUTS, TARGETS)
        assert int(steps.value) == expected
    assert float(value) == 5.5 and aux["pred"].shape == (5, 1)


# ------------------------------------------------------------------------------------------ training


def train(x, y, epochs, rate=0.1, strength=0.01):
    """Fit a `Line` as the document does; return it and what the document prints, every tenth epoch."""
    model, printed = Line(1), {}

    @jit
    def loss(x, y):
        mse = jnp.mean((model(x) - y) ** 2)
        squares = strength * (jnp.sum(model.weight.value**2) + jnp.sum(model.bias.value**2))
        return mse + squares, {"mse": mse, "l2": squares}

    derivative = grad(loss, grad_states=model.states(ParamState), has_aux=True, return_value=True)
    assert str(model.weight.value) == "[[0.]]" and str(model.bias.value) == "[0.]"
    for epoch in range(1, epochs + 1):
        grads, value, aux = derivative(x, y)
        for path, state in model.states(ParamState).items():
            state.value = state.value - rate * grads[path]
        if epoch % 10 == 0:
            row = (value, aux["mse"], aux["l2"], model.weight.value[0, 0], model.bias.value[0])
            printed[epoch] = [float(number) for number in row]
    return model, printed


def numpy_twin(x, y, epochs, rate=0.1, strength=0.01):
    """The rows of `train` by hand-derived gradients in float64, without JAX."""
    x, y = np.float64(x).ravel(), np.float64(y).ravel()
    weight = bias = 0.0
    rows = {}
    for epoch in range(1, epochs + 1):
        error = weight * x + bias - y
        mse, squares = np.mean(error**2), strength * (weight**2 + bias**2)
        by_weight = 2 * np.mean(error * x) + 2 * strength * weight
        by_bias = 2 * np.mean(error) + 2 * strength * bias
        weight, bias = weight - rate * by_weight, bias - rate * by_bias
        if epoch % 10 == 0:
            rows[epoch] = [mse + squares, mse, squares, weight, bias]
    return rows


TRAIN_X = jnp.linspace(-1.0, 1.0, 20).reshape(-1, 1)
TRAIN_Y = 3.0 * TRAIN_X + 1.0


def optimum(x, y, strength=0.01):
    """Weight and bias at the minimum of the regularised loss, from its normal equations."""
    design = np.stack([np.float64(x).ravel(), np.ones(x.size)], axis=1)
    gram = design.T @ design / x.size + strength * np.eye(2)
    return np.linalg.solve(gram, design.T @ np.float64(y).ravel() / x.size)


def test_training_without_noise_is_that_of_numpy():
    _, ours = train(TRAIN_X, TRAIN_Y, 50)
    theirs = numpy_twin(TRAIN_X, TRAIN_Y, 50)
    assert list(ours) == list(theirs) == [10, 20, 30, 40, 50]
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=2e-5)


def test_training_with_noise_reaches_the_optimum():
    noise = 0.1 * brainstate.random.normal(size=TRAIN_X.shape)
    assert noise.shape == TRAIN_X.shape
    y = TRAIN_Y + noise
    model, rows = train(TRAIN_X, y, 300)
    weight, bias = optimum(TRAIN_X, y)
    assert math.isclose(float(model.weight.value[0, 0]), weight, rel_tol=1e-4)
    assert math.isclose(float(model.bias.value[0]), bias, rel_tol=1e-4)
    losses = [loss for loss, *_ in rows.values()]
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(losses))
    assert abs(weight - 3.0) < 0.3 and abs(bias - 1.0) < 0.3, "near what made the data, less the shrinkage"


PRINTED = {  # loss, mse, l2, weight, bias, every ten epochs
    10: [0.9506, 0.9198, 0.030758, 1.6285777, 0.9066533],
    20: [0.2827, 0.2190, 0.063762, 2.3699088, 1.0015979],
    30: [0.1478, 0.0655, 0.082280, 2.7073638, 1.0115404],
    40: [0.1199, 0.0284, 0.091504, 2.8609738, 1.0125817],
    50: [0.1141, 0.0182, 0.095877, 2.9308972, 1.0126907],
}
LAST_DIGIT = [1e-4, 1e-4, 1e-6, 1e-6, 1e-6]  # of the parameters all is shown, float32 carries less


def noise_of_the_document():
    """Noise with the three moments that the training depends on, as the document's last row implies them.

    The step is affine in (weight, bias), and as the inputs have mean zero the two do not mix: the last row gives the
    fixed point, and with it ``mean(x y)`` and ``mean(y)``. The printed loss of epoch 50 then gives ``mean(y²)``.
    """
    x = np.float64(TRAIN_X).ravel()
    power = np.mean(x**2)

    def target(final, curvature):  # solve final = fixed point (1 - contraction^50)
        return final / (1 - (1 - 0.1 * 2 * (curvature + 0.01)) ** 50) * (curvature + 0.01)

    xy, y = target(PRINTED[50][3], power), target(PRINTED[50][4], 1.0)
    fitted = xy / power * x + y
    wiggle = np.where(np.arange(x.size) % 4 % 3 == 0, 1.0, -1.0)  # + - - + ...: mean zero, and
    assert np.isclose(wiggle.mean(), 0) and np.isclose((wiggle * x).mean(), 0)  # orthogonal to x
    residual = PRINTED[50][1] - numpy_twin(x, fitted, 50)[50][1]
    return fitted + math.sqrt(residual) * wiggle - np.float64(TRAIN_Y).ravel()


def test_training_with_the_moments_of_the_documents_noise_prints_its_figures():
    noise = noise_of_the_document()
    assert 0.03 < noise.std() < 0.2, "what 0.1 times a normal number looks like, twenty times"
    _, rows = train(TRAIN_X, TRAIN_Y + jnp.asarray(noise, "float32").reshape(-1, 1), 50)
    assert list(rows) == list(PRINTED)
    off = np.abs(np.subtract(list(rows.values()), list(PRINTED.values())))
    assert (off <= LAST_DIGIT).all(), off


# ------------------------------------------------------------------------------------------ the second document

CELLS = [
    (
        """
        from __future__ import annotations

        import jax
        import jax.numpy as jnp

        import brainstate
        from brainstate.transform import grad
        """,
        "",
    ),
    (
        """
        x_data = jnp.linspace(-1.0, 1.0, 5).reshape(-1, 1)
        y_data = 1.0 + 3.0 * x_data
        """,
        "",
    ),
    (
        """
        class Affine(brainstate.nn.Module):
            def __init__(self, n_in: int, n_out: int = 1):
                super().__init__()
                self.weight = brainstate.ParamState(jnp.zeros((n_in, n_out)))
                self.bias = brainstate.ParamState(jnp.zeros((n_out,)))

            def __call__(self, x: jax.Array) -> jax.Array:
                return x @ self.weight.value + self.bias.value


        net = Affine(n_in=1)


        def error(x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.mean((net(x) - y) ** 2)


        derivative = grad(error, grad_states=net.states(brainstate.ParamState), return_value=True)
        grads, value = derivative(x_data, y_data)
        print('loss:', float(value))
        print('gradients:')
        for path, g in grads.items():
            print(' ', path, g)
        """,
        """
        loss: 5.5
        gradients:
          ('bias',) [-2.]
          ('weight',) [[-3.]]
        """,
    ),
    (
        """
        found = net.states(brainstate.ParamState)
        for path, state in found.items():
            state.value = state.value - 0.1 * grads[path]

        print('updated weight:', net.weight.value)
        print('updated bias:', net.bias.value)
        """,
        """
        updated weight: [[0.3]]
        updated bias: [0.2]
        """,
    ),
    (
        """
        observed = Affine(1)


        def error_and_metrics(x: jax.Array, y: jax.Array):
            out = observed(x)
            metrics = {
                'mae': jnp.mean(jnp.abs(out - y)),
                'mean_pred': jnp.mean(out),
            }
            return jnp.mean((out - y) ** 2), metrics


        derivative = grad(
            error_and_metrics,
            grad_states=observed.states(brainstate.ParamState),
            has_aux=True,
            return_value=True,
        )

        grads, value, metrics = derivative(x_data, y_data)
        print('loss:', float(value))
        print('grad(weight):', grads[('weight',)])
        print('metrics:', {k: float(v) for k, v in metrics.items()})
        """,
        """
        loss: 5.5
        grad(weight): [[-3.]]
        metrics: {'mae': 2.0, 'mean_pred': 0.0}
        """,
    ),
    (
        """
        ridge = Affine(1)


        def penalised(strength: float, x: jax.Array, y: jax.Array) -> jax.Array:
            squares = jnp.sum(ridge.weight.value ** 2) + jnp.sum(ridge.bias.value ** 2)
            return jnp.mean((ridge(x) - y) ** 2) + strength * squares


        derivative = grad(
            penalised,
            grad_states=ridge.states(brainstate.ParamState),
            argnums=0,
            return_value=True,
        )

        (pair, value) = derivative(0.1, x_data, y_data)
        by_state, by_strength = pair
        print('loss:', float(value))
        print('coeff gradient:', float(by_strength))
        for path, g in by_state.items():
            print('state grad', path, g)
        """,
        """
        loss: 5.5
        coeff gradient: 0.0
        state grad ('bias',) [-2.]
        state grad ('weight',) [[-3.]]
        """,
    ),
]


def test_a_notebook_cell_by_cell(capsys):
    """Run every cell in one namespace, with the annotations of all as text, as the first cell asks for."""
    namespace = {"__name__": "notebook"}
    future = "from __future__ import annotations\n"
    for number, (code, printed) in enumerate(CELLS):
        text = textwrap.dedent(code)
        exec(compile(text if number == 0 else future + text, f"cell {number}", "exec"), namespace)
        assert capsys.readouterr().out.strip() == textwrap.dedent(printed).strip(), f"cell {number}"


def test_a_loop_variable_may_shadow_grad():
    """The training section ends with a variable named `grad`; the gradient function made before goes on working."""
    script = """
        from brainstate.transform import grad
        import brainstate
        w = brainstate.ParamState(2.0)
        derivative = grad(lambda x: w.value ** 2 * x, grad_states={'w': w})
        for _ in range(2):
            grads = derivative(1.0)
            for path, state in {'w': w}.items():
                grad = grads[path]
                state.value = state.value - 0.25 * grad
        """
    namespace = {}
    exec(textwrap.dedent(script), namespace)
    assert float(namespace["w"].value) == 0.5
