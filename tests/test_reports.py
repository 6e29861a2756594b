"""Kinds of public reports about state in JAX libraries, replayed: each function has to return two equal things.

A name says whose report it is, with its number if it is about just this, and what the user met. The programs are ours.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brainstate.transform as T
from brainstate import ParamState, State, StateTypeError, graph, nn, random

XS = jnp.arange(12.0).reshape(4, 3) / 7


class Running(nn.Module):
    """The running mean of its inputs, as of batch normalisation."""

    def __init__(self, axis_name=None):
        super().__init__()
        self.mean, self.axis_name, self.training = State(jnp.zeros(3)), axis_name, True

    def __call__(self, x):
        if not self.training:
            return x - self.mean.value
        batch = x if self.axis_name is None else jax.lax.pmean(x, self.axis_name)
        self.mean.value = 0.5 * self.mean.value + 0.5 * batch
        return x - batch


class Counter(nn.Module):
    def __init__(self, start=0):
        super().__init__()
        self.n = State(jnp.array(start))


REPORTS = {}


def report(name):
    return lambda fun: REPORTS.setdefault(name, fun)


# ------------------------------------------------------------------------------------------ maps


@report("flax 4760, 4061: statistics of a mapped model, the second call fails")
def _():
    model = Running("batch")
    call = T.vmap(model, axis_name="batch")
    outs = [call(XS), call(XS)]
    return [*outs, model.mean.value], [XS - XS.mean(0, keepdims=True)] * 2 + [0.75 * XS.mean(0)]


@report("flax 3319: statistics of a model under two maps")
def _():
    model = Running(("a", "b"))
    T.vmap(T.vmap(model, axis_name="b"), axis_name="a")(jnp.stack([XS, XS + 1]))
    return model.mean.value, 0.5 * (XS.mean(0) + 0.5)


@report("flax 4195, 4973: every lane has the same noise")
def _():
    rng = random.RandomState(0)
    noise = T.vmap(lambda x: rng.normal())(XS)
    return len(set(noise.tolist())), 4


@report("flax 4589: layers that are made in a map drop the same inputs")
def _():
    rng = random.RandomState(0)
    layers = T.vmap_new_states(lambda: nn.Linear(3, 3), axis_size=5)()

    def layer(x, i):
        return x + rng.normal(size=3), x

    inputs = T.scan(layer, jnp.zeros(3), jnp.arange(5))[1]
    return [len(np.unique(inputs[:, 0])), layers.weight.value.shape], [5, (5, 3, 3)]


@report("equinox 65: an ensemble, and one input for all")
def _():
    models = T.vmap_new_states(lambda: nn.Linear(3, 2), axis_size=4)()
    out = T.vmap(models, in_axes=None, in_states=models)(XS[0])
    return out, jnp.einsum("i,nij->nj", XS[0], models.weight.value) + models.bias.value


# ------------------------------------------------------------------------------------------ loops and branches


@report("equinox 237: statistics in a loop, differentiated")
def _():
    model, w = Running(), ParamState(jnp.array(2.0))
    gradient = T.grad(lambda: T.for_loop(lambda x: model(x * w.value), XS).sum() + model.mean.value.sum(), w)()
    weights = 0.5 ** jnp.arange(4.0, 0.0, -1.0)
    return [gradient, model.mean.value], [(weights @ XS).sum(), 2 * weights @ XS]


@report("flax 4522: a while loop with two objects")
def _():
    a, b = Counter(), Counter(10)

    def body(x):
        a.n.value, b.n.value = a.n.value + 1, b.n.value - 1
        return x

    T.while_loop(lambda x: a.n.value < 5, body, 0)
    return [a.n.value, b.n.value], [5, 5]


@report("flax 4436: a loop over two models that are not touched")
def _():
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    before = [model.weight.value for model in models]
    T.fori_loop(0, 10, lambda i, x: (models, x)[1], 0)
    return [model.weight.value for model in models], before


@report("flax: a State that one branch writes, and the other reads")
def _():
    a, b = Counter(1), Counter(2)

    def write():
        a.n.value = a.n.value + b.n.value
        return 0

    for sign in (1, -1, 1):
        T.cond(jnp.array(sign) > 0, write, lambda: b.n.value * 0)
    return [a.n.value, b.n.value], [5, 2]


@report("jax 2507: an error in a loop leaves the trace open")
def _():
    s = State(jnp.array(0.0))

    def body(x):
        s.value = s.value + x
        raise KeyError

    with pytest.raises(KeyError):
        T.for_loop(body, XS)
    return [T.jit(lambda: s.value + 1)(), s.value], [1.0, 0.0]


# ------------------------------------------------------------------------------------------ jit


@report("equinox 61: jit bakes the value in that a State had at first")
def _():
    s = State(jnp.array(1.0))
    double = T.jit(lambda: 2 * s.value)
    outs = [double()]
    s.value = jnp.array(5.0)
    return [*outs, double()], [2.0, 10.0]


@report("flax: a flag is turned, and compiled code goes on as before")
def _():
    model = Running()
    call = T.jit(lambda x: model(x))
    call(XS[1])
    model.training = False
    return call(XS[1]), 0.5 * XS[1]


@report("flax 4720: a raw transform around a compiled function")
def _():
    w = State(jnp.array(3.0))
    scale = T.jit(lambda x: w.value * x)
    return [jax.vmap(scale)(XS), jax.grad(lambda x: scale(x))(1.0)], [3 * XS, 3.0]


@report("jax: a value that a failing step has half written")
def _():
    a, b = State(jnp.array(1.0)), State(jnp.array(1.0))

    @T.jit
    def step():
        a.value = a.value + 1
        b.value = jnp.ones(2) @ jnp.ones(3)

    with pytest.raises(TypeError):
        step()
    return [a.value, b.value], [1.0, 1.0]


@report("optax: a step that holds model and optimizer is compiled once, and learns")
def _():
    model, tx = nn.Linear(3, 1), optax.sgd(0.1)
    params = model.states(ParamState)
    kept, traced = State(tx.init(params.to_dict_values())), []

    @T.jit
    def step(x, y):
        traced.append(0)
        grads, loss = T.grad(lambda: ((model(x) - y) ** 2).mean(), params, return_value=True)()
        updates, kept.value = tx.update(dict(grads), kept.value)
        for path, update in updates.items():
            params[path].value = params[path].value + update
        return loss

    losses = [float(step(XS, XS[:, :1])) for _ in range(20)]
    return [losses[-1] < 0.2 * losses[0], len(traced)], [True, 1]


@report("jax: arrays that were donated are read afterwards")
def _():
    s = State(jnp.zeros(3))

    @T.jit(donate_states=True)
    def step():
        s.value = s.value + 1

    for _ in range(3):
        step()
    return s.value, jnp.full(3, 3.0)


# ------------------------------------------------------------------------------------------ derivatives


@report("equinox 189: numbers and lists of them have derivatives")
def _():
    found = [T.grad(lambda x: x**2)(1.0), T.grad(lambda xs: sum(xs) ** 2)([1.0, 2.0, 3.0])]
    return found, [2.0, [12.0] * 3]


@report("equinox: a weight that is used in two places has half of its gradient")
def _():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight

    model = Tied()
    grads = T.grad(lambda: (model.second(model.first(XS))).sum(), model.states(ParamState))()
    w, b, c = model.first.weight.value, model.first.bias.value, model.second.bias.value
    wanted = jax.grad(lambda w: ((XS @ w + b[None]) @ w + c[None]).sum())(w)
    return [len(grads), grads["first", "weight"]], [3, wanted]


@report("flax 339: a function that writes is differentiated, and counts once")
def _():
    counter, w = Counter(), ParamState(jnp.array([1.0, 2.0]))

    def loss():
        counter.n.value = counter.n.value + 1
        return (w.value**3).sum()

    for derivative in (T.grad, T.hessian, T.jacrev, T.jacfwd):
        derivative(loss, w)()
    return counter.n.value, 4


@report("flax: a replay drops other inputs than the forward pass")
def _():
    rng, w = random.RandomState(1), ParamState(jnp.ones(50))
    f = T.checkpoint(lambda x: (jnp.sin(w.value) * rng.normal(size=50) * x).sum())
    value, gradient = T.value_and_grad(f, w)(1.0)[0], T.grad(f, w)(1.0)
    noise = random.RandomState(1)
    first, second = noise.normal(size=50), noise.normal(size=50)
    return [value, gradient], [(jnp.sin(1.0) * first).sum(), jnp.cos(1.0) * second]


@report("jax: the derivative of a custom rule that closes over a weight")
def _():
    w = ParamState(jnp.array(3.0))
    f = T.custom_vjp(lambda x: w.value * x, states=w)
    f.defvjp(lambda v, x: (v * x, (v, x)), lambda kept, ct: (ct * kept[1], ct * kept[0] * 10))
    return T.grad(lambda x: f(x), w, 0)(2.0), (2.0, 30.0)


# ------------------------------------------------------------------------------------------ objects


@report("flax 4734: shapes of a model with statistics, without computing")
def _():
    model = Running()
    shape = T.eval_shape(model, jax.ShapeDtypeStruct((3,), jnp.float32)).shape
    return [shape, model.mean.value], [(3,), jnp.zeros(3)]


@report("equinox 0.11: a method of its own in an attribute, and there are two models")
def _():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = ParamState(jnp.array(1.0))
            self.f = self.act

        def act(self, x):
            return self.w.value * x

    model = Own()
    twin = copy.deepcopy(model)
    twin.w.value = jnp.array(7.0)
    return [model.f(1.0), twin.f(1.0), graph.clone(twin).f(1.0), len(model.states())], [1.0, 7.0, 7.0, 1]


@report("flax: an array is assigned over a parameter")
def _():
    layer = nn.Linear(2, 2)
    with pytest.raises(StateTypeError, match="value = "):
        layer.weight = jnp.ones((2, 2))
    return len(layer.states()), 2


@report("equinox 46: weights that are loaded are used by what was compiled before")
def _():
    layer, other = nn.Linear(3, 2), nn.Linear(3, 2)
    call = T.jit(layer)
    call(XS)
    layer.states().assign_dict_values(other.states().to_dict_values())
    return call(XS), XS @ other.weight.value + other.bias.value[None]


@pytest.mark.parametrize("name", REPORTS)
def test_reports(name):
    found, wanted = REPORTS[name]()
    assert len(jax.tree.leaves(found)) == len(jax.tree.leaves(wanted))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
