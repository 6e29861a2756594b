"""Modules and layers as a user meets them."""

import collections
import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainstate
from brainstate import HiddenState, ParamState, State, graph, nn

Named = collections.namedtuple("Named", ["z"])


class LinearRegressor(nn.Module):
    def __init__(self, in_features: int, out_features: int = 1):
        super().__init__()
        self.weight = ParamState(jnp.zeros((in_features, out_features)))
        self.bias = ParamState(jnp.zeros((out_features,)))

    def __call__(self, x):
        y = x @ self.weight.value
        return y + jnp.broadcast_to(self.bias.value, y.shape)


class Net(nn.Module):
    def __init__(self):
        super().__init__(name="net")
        self.head = LinearRegressor(2)
        self.layers = [LinearRegressor(2, 2), {"norm": LinearRegressor(2, 2)}]
        self.scale = ParamState(jnp.ones(1))
        self.count = State(0)

    def update(self, x):
        return self.head(self.layers[0](x)) * self.scale.value[0]


NAMES = [
    "head.bias",
    "head.weight",
    "layers.0.bias",
    "layers.0.weight",
    "layers.1.norm.bias",
    "layers.1.norm.weight",
    "scale",
]


def test_states_and_snapshots_have_the_same_keys():
    model = LinearRegressor(1)
    params = model.states(ParamState)
    assert [(path, state.value.shape) for path, state in params.items()] == [
        (("bias",), (1,)),
        (("weight",), (1, 1)),
    ]
    trees = graph.treefy_states(model, ParamState)
    assert set(params) == set(trees.to_flat())
    assert model.state_trees(ParamState).weight.value.shape == (1, 1)


def test_calling():
    model = Net()
    x = jnp.ones((3, 2))
    assert model(x).shape == (3, 1)
    assert (x >> model).shape == (np.ones((3, 2)) >> model).shape == (3, 1)
    with pytest.raises(NotImplementedError, match="Module defines neither `update` nor `__call__`"):
        nn.Module()(1)


def test_name_and_sizes():
    model = Net()
    assert model.name == "net"
    with pytest.raises(AttributeError):
        model.name = "other"
    assert model.in_size is None
    model.in_size, model.out_size = 3, [np.int64(4), 5]
    assert (model.in_size, model.out_size) == ((3,), (4, 5))


def test_without_calling_super_init():
    class Bare(nn.Module):
        def __init__(self):
            self.w = ParamState(1.0)

    assert list(Bare().states()) == [("w",)]
    assert Bare().name is None


def test_an_attribute_that_is_deleted_may_become_an_array():
    model = LinearRegressor(1)
    del model.bias
    model.bias = jnp.zeros(1)
    assert list(model.states()) == [("weight",)]


def test_names():
    model = Net()
    assert [name for name, _ in model.named_parameters()] == NAMES
    assert [name for name, _ in model.named_parameters("net")] == ["net." + name for name in NAMES]
    assert list(model.parameters()) == [p for _, p in model.named_parameters()]
    assert [name for name, _ in model.named_modules()] == ["head", "layers.0", "layers.1.norm", ""]
    assert [name for name, _ in model.named_modules("net")] == [
        "net.head",
        "net.layers.0",
        "net.layers.1.norm",
        "net",
    ]
    assert list(model.modules(include_self=False)) == list(model.children())
    assert [name for name, _ in model.named_children()] == ["head", "layers.0", "layers.1.norm"]
    assert list(model.modules())[-1] is model


def test_children_are_one_level():
    model = nn.Module()
    model.a = Net()
    assert [name for name, _ in model.named_children()] == ["a"]


def test_d19_without_recursion_the_own_parameters():
    model = Net()
    assert [name for name, _ in model.named_parameters(recurse=False)] == ["scale"]
    assert list(model.parameters(recurse=False)) == [model.scale]
    assert [name for name, _ in LinearRegressor(1).named_parameters(recurse=False)] == ["bias", "weight"]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), graph.clone])
def test_d24_copies_of_a_module(again):
    model = Net()
    model.tied = model.head
    model.layers.append(model)
    model.head.weight.value = jnp.full((2, 1), 3.0)
    new = again(model)
    assert repr(new) == repr(model)
    assert new.tied is new.head
    assert new.layers[2] is new
    assert new.head.weight is not model.head.weight
    assert new.head.weight.value.tolist() == [[3.0], [3.0]]
    assert new.name == "net"
    new.head.weight.value = jnp.zeros((2, 1))
    assert model.head.weight.value.tolist() == [[3.0], [3.0]]
    new.layers.append(State(1))
    assert len(new.states()) == len(model.states()) + 1


def test_d4_the_container_of_gradients_pairs_with_the_states():
    model = Net()
    params = model.states(ParamState)

    def loss(values):
        return sum(jnp.sum(v) for v in values.values())

    grads = jax.grad(loss)(params.to_dict_values())
    new = jax.tree.map(lambda s, g: s.value - 0.1 * g, params, grads)
    params.assign_dict_values(new)
    assert model.scale.value == pytest.approx(0.9)
    assert grads["layers", 0, "bias"].tolist() == [1.0, 1.0]


def test_d21_missing_attribute():
    assert not hasattr(Net().states(), "foo")
    assert not hasattr(Net(), "foo")


def test_repr():
    model = Net()
    model.act = jax.nn.tanh
    model.table = np.ones((2, 3))
    model.tied = model.head
    model.none = None
    assert repr(model) == (
        "Net(\n"
        "  name='net',\n"
        "  act=tanh,\n"
        "  count=State(0),\n"
        "  head=LinearRegressor(bias=ParamState(float32[1]), weight=ParamState(float32[2,1])),\n"
        "  layers=[\n"
        "    LinearRegressor(bias=ParamState(float32[2]), weight=ParamState(float32[2,2])),\n"
        "    {'norm': LinearRegressor(bias=ParamState(float32[2]), weight=ParamState(float32[2,2]))},\n"
        "  ],\n"
        "  scale=ParamState(float32[1]),\n"
        "  table=float64[2,3],\n"
        "  tied=<same as head>,\n"
        ")"
    )
    assert repr(nn.Module()) == "Module()"
    model.me = model
    model.others = Named(model)
    model.layers.append(model.layers)
    assert "me=<same as the root>" in repr(model)
    assert "<same as layers>" in repr(model)
    assert "<...>" in repr(model)


def test_a_module_may_be_a_dataclass():
    @dataclasses.dataclass(eq=True)
    class Point(nn.Module):
        x: object
        y: object

    point = Point(ParamState(1.0), [State(2)])
    assert list(point.states()) == [("x",), ("y", 0)]
    assert list(point.nodes()) == [()]


def test_properties_with_setters_work():
    class Clamped(nn.Module):
        @property
        def w(self):
            return self._w

        @w.setter
        def w(self, value):
            self._w = ParamState(max(value, 0.0))

    model = Clamped()
    model.w = -1.0
    assert model.w.value == 0.0
    assert list(model.states()) == [("_w",)]


# ---------------------------------------------------------------------------------------------- layers


def test_linear():
    brainstate.random.seed(0)
    layer = nn.Linear(400, 300)
    assert layer.weight.value.shape == (400, 300)
    assert layer.bias.value.tolist() == [0.0] * 300
    assert jnp.std(layer.weight.value) == pytest.approx(0.05, rel=0.02)
    x = jnp.ones((5, 2, 400))
    assert jnp.allclose(layer(x), jnp.sum(layer.weight.value, 0)[None, None], atol=1e-5)
    assert layer(x[0, 0]).shape == (300,)
    assert (layer.in_size, layer.out_size) == ((400,), (300,))
    assert all(type(s) is ParamState for s in layer.states().values())


def test_linear_with_other_initialisers():
    layer = nn.Linear((7, 2), (7, 3), w_init=jnp.ones, b_init=None)
    assert list(layer.states()) == [("weight",)]
    assert layer(jnp.ones((7, 2))).tolist() == [[2.0] * 3] * 7
    with pytest.raises(ValueError, match=r"in_size \(4, 2\) and out_size \(7, 3\) may differ in the last axis only"):
        nn.Linear((4, 2), (7, 3))


def test_dropout():
    brainstate.random.seed(0)
    drop = nn.Dropout(0.25)
    y = drop(jnp.ones((100, 100)))
    assert jnp.mean(y) == pytest.approx(1.0, abs=0.02)
    assert jnp.mean(jnp.where(y == 0, 1.0, 0.0)) == pytest.approx(0.25, abs=0.02)
    assert not jnp.array_equal(y, drop(jnp.ones((100, 100))))
    x = jnp.arange(3.0)
    assert drop(x, train=False) is x
    assert nn.Dropout(0.0)(x) is x
    for bad in (-0.1, 1.0, 2):
        with pytest.raises(ValueError, match="rate is the probability to drop"):
            nn.Dropout(bad)


def test_sequential():
    net = nn.Sequential(nn.Linear(4, 8), jax.nn.relu, nn.Linear(8, 2))
    x = jnp.ones((5, 4))
    assert jnp.array_equal(net(x), net[2](jax.nn.relu(net[0](x))))
    assert len(net) == 3
    assert net[:2](x).shape == (5, 8)
    assert net[0] is net[:2][0]
    net.layers.append(nn.Linear(2, 1))
    assert net(x).shape == (5, 1)
    assert len(net.states(HiddenState)) == 0
