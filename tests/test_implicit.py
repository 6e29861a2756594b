"""root, fixed_point and argmin: against closed forms, unrolled iterations and finite differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest

import brainstate
from brainstate import HiddenState, ParamState, State, StateTypeError, StateValueError
from brainstate import transform as T


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def p():
    """A State with a pytree, one leaf of which is no float."""
    return ParamState({"w": jnp.array([[0.3, -0.2], [0.1, 0.25]]), "n": jnp.int32(2)}, name="p")


X = np.array([0.4, -0.7])


def cell(p, y, x):
    return jnp.tanh(p["w"] @ y + x) * 0.9


def unrolled(w, x):
    """Return the fixed point after so many steps that nothing changes any more."""
    y = jnp.zeros(2)
    for _ in range(200):
        y = cell({"w": w}, y, x)
    return y


def objective(y, p, x):
    return jnp.sum((p["w"] @ y - x) ** 2) + 0.1 * jnp.sum(jnp.cosh(y))


def problems(p):
    """Return {name: how it is solved as a function of x}; all but the last have the same solution."""
    return {
        "root": lambda x: T.root(lambda y, x: cell(p.value, y, x) - y, jnp.zeros(2), x),
        "fixed_point": lambda x: T.fixed_point(lambda y, x: cell(p.value, y, x), jnp.zeros(2), x),
        "iteration": lambda x: T.fixed_point(
            lambda y: cell(p.value, y, x), jnp.zeros(2), solver=optimistix.FixedPointIteration(1e-12, 1e-12)
        ),
        "argmin": lambda x: T.argmin(lambda y: jnp.sum((cell(p.value, y, x) - y) ** 2), jnp.zeros(2)),
    }


NAMES = ["root", "fixed_point", "iteration", "argmin"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_solution(p, name, compiled):
    solve = problems(p)[name]
    y = (T.jit(solve) if compiled else solve)(jnp.array(X))
    np.testing.assert_allclose(y, unrolled(p.value["w"], X), atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_those_of_the_unrolled_iteration(p, name):
    """With respect to a State and an argument, reverse and forward; the States are inputs though only closed over."""
    solve, x = problems(p)[name], jnp.array(X)
    jacobian = jax.jacrev(unrolled, (0, 1))(p.value["w"], x)
    for transform in (T.jacrev, T.jacfwd):
        got = transform(solve, p, 0)(x)
        assert got[0]["n"] is None
        np.testing.assert_allclose(got[0]["w"], jacobian[0], atol=1e-6)
        np.testing.assert_allclose(got[1], jacobian[1], atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", ["root", "fixed_point"])
def test_second_derivatives(p, name):
    solve, x = problems(p)[name], jnp.array(X)
    got = T.hessian(lambda x: jnp.sum(solve(x) ** 2), p, 0)(x)
    wanted = jax.hessian(lambda w, x: jnp.sum(unrolled(w, x) ** 2), (0, 1))(p.value["w"], x)
    np.testing.assert_allclose(got[0]["w"][0]["w"], wanted[0][0], atol=1e-8)
    np.testing.assert_allclose(got[0]["w"][1], wanted[0][1], atol=1e-8)
    np.testing.assert_allclose(got[1][1], wanted[1][1], atol=1e-8)


@pytest.mark.long
def test_second_derivatives_of_a_minimiser():
    """The minimum of ``cosh(y - a²) + (y - a²)²`` is ``a²``."""
    a = State(jnp.array([0.7, -1.2]))

    def solution():
        return T.argmin(lambda y: jnp.sum(jnp.cosh(y - a.value**2) + (y - a.value**2) ** 2), jnp.zeros(2)).sum()

    np.testing.assert_allclose(T.grad(solution, a)(), 2 * a.value, atol=1e-8)
    np.testing.assert_allclose(T.hessian(solution, a)(), 2 * np.eye(2), atol=1e-6)


def test_the_derivative_of_a_minimiser(p):
    """Against central differences; no closed form, and no other derivative, is involved."""
    x, h = jnp.array(X), 1e-4

    def loss(x):
        return jnp.sum(T.argmin(lambda y: objective(y, p.value, x), jnp.zeros(2)) ** 3)

    got_p, got_x = T.grad(loss, p, 0)(x)
    value = p.value
    for i, j in np.ndindex(2, 2):
        sides = []
        for sign in (1, -1):
            p.value = value | {"w": value["w"].at[i, j].add(sign * h)}
            sides.append(float(loss(x)))
        np.testing.assert_allclose(got_p["w"][i, j], (sides[0] - sides[1]) / (2 * h), rtol=1e-4, atol=1e-7)
    p.value = value
    for i in range(2):
        up, down = (float(loss(x.at[i].add(s * h))) for s in (1, -1))
        np.testing.assert_allclose(got_x[i], (up - down) / (2 * h), rtol=1e-4, atol=1e-7)


@pytest.mark.long
def test_inside_the_other_transforms(p):
    """The function runs once, the States it does not write stay the objects they were."""
    runs, seen, before = [], HiddenState(jnp.zeros(2)), p.value
    xs = jnp.stack([jnp.array(X), 2 * X, -X])

    def f(y, x):
        runs.append(1)
        return cell(p.value, y, x) - y

    def step(x):
        seen.value = T.root(f, jnp.zeros(2), x)
        return seen.value.sum()

    wanted = jax.vmap(lambda x: unrolled(p.value["w"], x))(xs)
    for loop in (T.for_loop, T.vmap(step, out_states={"last": seen})):
        runs.clear()
        out = loop(step, xs) if loop is T.for_loop else loop(xs)
        assert len(runs) == 1
        np.testing.assert_allclose(out, wanted.sum(1), atol=1e-8)
        np.testing.assert_allclose(seen.value, wanted[-1], atol=1e-8)
    slope = T.jit(T.grad(lambda: T.for_loop(step, xs).sum(), p))()["w"]
    expected = jax.grad(lambda w: jax.vmap(lambda x: unrolled(w, x))(xs).sum())(p.value["w"])
    np.testing.assert_allclose(slope, expected, atol=1e-8)
    assert p.value is before


def test_a_state_may_hold_what_begins_the_search_and_pytrees_are_unknowns():
    a, start = State(jnp.array([4.0, 9.0])), State({"u": jnp.array([1.0, 1.0]), "v": 2.0})

    def f(y):
        return {"u": y["u"] ** 2 - a.value, "v": y["v"] - y["u"].sum()}

    y = T.root(f, start.value)
    np.testing.assert_allclose(y["u"], [2, 3], atol=1e-9)
    np.testing.assert_allclose(y["v"], 5, atol=1e-9)
    np.testing.assert_allclose(T.grad(lambda: T.root(f, start.value)["v"], a)(), [1 / 4, 1 / 6], atol=1e-9)


def test_single_precision_and_arguments_that_are_no_arrays():
    with jax.enable_x64(False):
        y = T.root(lambda y, a, mode: y**2 - a if mode == "square" else y - a, jnp.float32(1), 2.0, "square")
        assert y.dtype == jnp.float32 and abs(float(y) - 2**0.5) < 1e-5


written = State(jnp.zeros(()), name="written")


def writing(y):
    written.value = y
    return y


def drawing(y):
    return y + brainstate.random.normal()


MISUSE = {
    "writes": (T.root, (writing, 1.0), StateValueError, r"root: the function writes State 'written'.* only read"),
    "draws": (
        T.fixed_point,
        (drawing, 1.0),
        StateValueError,
        r"fixed_point: the function writes .*draw random numbers",
    ),
    "no function": (T.root, (3, 1.0), StateTypeError, "root solves for a function; got int"),
    "integer": (T.root, (lambda y: y, jnp.arange(2)), StateTypeError, r"y0 is int\S*\[2\].* floating-point"),
    "integer inside": (T.argmin, (lambda y: 0.0, {"a": 1}), StateTypeError, r"argmin: y0\['a'\] is int"),
    "complex": (T.root, (lambda y: y, 1j), StateTypeError, "y0 is complex"),
    "text": (T.root, (lambda y: y, "a"), StateTypeError, "y0 is a str"),
    "nothing": (T.root, (lambda y: y, {}), StateValueError, "y0 holds no array"),
    "too few equations": (T.root, (jnp.sum, jnp.ones(3)), StateValueError, "1 numbers for 3 unknowns.*argmin"),
    "other shape": (
        T.fixed_point,
        (lambda y: {"a": y["a"][None]}, {"a": 1.0}),
        StateValueError,
        r"at result\['a'\] it returns f\w+\[1\], and y0\['a'\] is f\w+\[\]",
    ),
    "other structure": (T.fixed_point, (lambda y: (y, y), 1.0), StateValueError, "must return a pytree like y0"),
    "no scalar": (T.argmin, (lambda y: y, jnp.ones(2)), StateValueError, "must return a real scalar, and returns"),
    "a State": (T.root, (lambda y: y, written), StateValueError, "State 'written' is among the arguments of root"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse(case):
    solve, args, kind, text = MISUSE[case]
    before = written.value
    with pytest.raises(kind, match=text):
        solve(*args)
    assert written.value is before


@pytest.mark.parametrize("steps", [0, -1, 1.5, None])
def test_max_steps_is_a_positive_number(steps):
    with pytest.raises(StateValueError if type(steps) is int else StateTypeError, match="max_steps="):
        T.root(lambda y: y, 1.0, max_steps=steps)


@pytest.mark.parametrize("compiled", [False, True])
def test_no_solution_is_an_error(compiled):
    solve = T.jit(lambda: T.root(lambda y: y**2 + 1, 1.0, max_steps=20))
    if not compiled:
        solve = solve.__wrapped__
    with pytest.raises(RuntimeError, match="root found no solution: not within 20 steps"):
        jax.block_until_ready(solve())


def test_no_solution_in_a_program_that_jax_has_traced_before_keeps_the_states():
    raw = jax.jit(lambda a: T.root(lambda y: y**2 + a, 1.0, max_steps=20))
    jax.block_until_ready(raw(-1.0))  # from now on it comes out of JAX's caches
    count = State(jnp.array(0.0))

    def step(a):
        count.value += 1.0
        return raw(a)

    compiled = T.jit(step, donate_states=True)
    with pytest.raises(RuntimeError, match="root found no solution"):
        compiled(1.0)
    assert count.value == 0.0
    compiled(-1.0)
    assert count.value == 1.0
