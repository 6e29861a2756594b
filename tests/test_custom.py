"""Custom rules and stop_gradient, against the same rules of JAX on a hand-written function of (values, *args)."""

import jax
import jax.numpy as jnp
import pytest

from brainstate import ParamState, State, StateTypeError, StateValueError
from brainstate.transform import (
    checkpoint,
    custom_jvp,
    custom_vjp,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jit,
    jvp,
    stop_gradient,
    vjp,
    vmap,
)


@pytest.fixture
def w():
    return ParamState({"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}, name="w")


def twin_vjp():
    @jax.custom_vjp
    def f(v, x):
        return jnp.sum(v["a"] * x) * v["b"]

    def fwd(v, x):
        return jnp.sum(v["a"] * x) * v["b"], (v, x)

    def bwd(kept, ct):  # clipped on purpose, so that the rule can be told from the derivative
        v, x = kept
        return {"a": jnp.clip(ct * x * v["b"], -1.0, 1.0), "b": 7.0 * ct}, jnp.clip(ct * v["a"] * v["b"], -1.0, 1.0)

    f.defvjp(fwd, bwd)
    return f, fwd, bwd


def ours_vjp(w):
    _, fwd, bwd = twin_vjp()
    f = custom_vjp(lambda x: jnp.sum(w.value["a"] * x) * w.value["b"], states=[w])
    f.defvjp(lambda v, x: fwd(v[0], x), lambda kept, ct: (lambda s, a: ([s], a))(*bwd(kept, ct)))
    return f


CONTEXTS = [
    lambda f: f,
    jit,
    checkpoint,
    lambda f: lambda x: jit(lambda y: 1.0 * f(y))(x),
]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("transform", [grad, jacrev])
def test_reverse_rule(w, context, transform):
    x = jnp.array([3.0, 4.0])
    twin, *_ = twin_vjp()
    f = context(ours_vjp(w))
    before = w.value
    assert f(x) == twin(w.value, x)
    ours = transform(f, w, 0)(x)
    wanted = jax.grad(twin, (0, 1))(w.value, x)
    assert jax.tree.map(jnp.array_equal, ours, wanted) == ({"a": True, "b": True}, True)
    assert w.value is before


def test_reverse_rule_in_lanes_and_pullbacks(w):
    xs = jnp.array([[3.0, 4.0], [0.1, 0.2]])
    twin, *_ = twin_vjp()
    f = ours_vjp(w)
    wanted = jax.vmap(jax.grad(twin), (None, 0))(w.value, xs)
    ours = vmap(grad(f, w))(xs)
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, ours, wanted)))
    _, pull = vjp(f, xs[0], grad_states=w)
    assert pull(2.0)[0]["b"] == 14.0


def test_forward_rule(w):
    def rule(primals, tangents):
        (v, x), (dv, dx) = primals, tangents
        return jnp.sum(v["a"] * x) * v["b"], 3.0 * jnp.sum(dv["a"] * x) + jnp.sum(v["a"] * dx) + dv["b"]

    twin = jax.custom_jvp(lambda v, x: jnp.sum(v["a"] * x) * v["b"])
    twin.defjvp(rule)
    f = custom_jvp(lambda x: jnp.sum(w.value["a"] * x) * w.value["b"], states=w)
    f.defjvp(rule)
    x = jnp.array([3.0, 4.0])
    for ours, theirs in ((jacfwd, jax.jacfwd), (grad, jax.grad), (hessian, jax.hessian)):
        got, wanted = ours(f, w, 0)(x), theirs(twin, (0, 1))(w.value, x)
        assert all(jax.tree.leaves(jax.tree.map(jnp.allclose, got, wanted)))
    out, tangent = jvp(jit(f), (x,), (jnp.ones(2),))
    assert (out, tangent) == jax.jvp(lambda x: twin(w.value, x), (x,), (jnp.ones(2),))


def test_a_rule_without_states():
    f = custom_vjp(lambda x: x**2)
    f.defvjp(lambda x: (x**2, x), lambda x, ct: (5.0 * ct,))
    assert grad(f)(3.0) == 5.0


def test_misuse_of_rules(w):
    u, c = ParamState(jnp.array(2.0), name="u"), State(jnp.array(0.0), name="c")
    with pytest.raises(StateTypeError, match="cannot be called"):
        custom_vjp(3)
    with pytest.raises(StateTypeError, match="is a float, not a State"):
        custom_vjp(lambda x: x, states=[1.0])
    with pytest.raises(StateValueError, match="no rule is defined yet: call defvjp"):
        custom_vjp(lambda x: x)(1.0)
    undeclared = custom_vjp(lambda x: x * u.value)
    undeclared.defvjp(lambda x: (x * u.value, x), lambda x, ct: (ct,))
    assert undeclared(2.0) == 4.0
    with pytest.raises(StateValueError, match=r"ParamState 'u' is differentiated .* Add it to states="):
        grad(undeclared, u)(2.0)

    def writes(x):
        c.value = x
        return x

    writing = custom_vjp(writes)
    writing.defvjp(lambda x: (x, None), lambda _, ct: (ct,))
    with pytest.raises(StateValueError, match=r"State 'c' is written .* Return the value"):
        writing(jnp.array(2.0))
    assert c.value == 0.0


def test_stop_gradient():
    a, b, c = (ParamState(jnp.array(v), name=n) for v, n in ((2.0, "a"), (3.0, "b"), (0.0, "c")))

    def f(x):
        c.value = c.value + a.value * x
        return a.value * b.value * x + c.value

    for states, wanted in (
        (a, (0.0, 2.0)),
        ([a, b], (0.0, 0.0)),
        (ParamState, (0.0, 0.0)),
        (lambda p, s: s is b, (4.0, 0.0)),
    ):
        c.value = jnp.array(0.0)
        got = jit(grad(stop_gradient(f, states), [a, b]))(1.0)
        assert tuple(float(g) for g in got) == wanted
        assert c.value == 2.0
    assert grad(stop_gradient(f), [a, b, c], 0)(1.0)[1] == 8.0
    with pytest.raises(StateTypeError, match="stop_gradient: 3 is neither a State nor a filter"):
        stop_gradient(f, 3)


def test_a_value_written_inside_has_its_derivative():
    a = ParamState(jnp.array(2.0))

    def f(x):
        a.value = a.value * x
        return a.value**2

    assert grad(stop_gradient(f), a, 0)(3.0) == (0.0, 2 * 6.0 * 2.0)
