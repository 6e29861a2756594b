"""Frozen and tied: ``(Module, filter)`` wherever States are differentiated, against pure JAX and in every transform."""

import copy
import pickle
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from _unchanged import unchanged
from brainstate import HiddenState, ParamState, State, StateTypeError, StateValueError, nn
from brainstate import transform as T
from brainstate.filters import All, Any, Not, PathContains
from transforms import DERIVATIVES


class Adapter(ParamState):
    """A kind of parameter of its own."""


class Net(nn.Module):
    """An encoder, tagged as frozen, a head, an adapter, and the activity, which is no parameter."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 4, w_init=lambda shape: jnp.linspace(-1.0, 1.0, 12).reshape(shape))
        self.head = nn.Linear(4, 2, w_init=lambda shape: jnp.linspace(0.5, -0.7, 8).reshape(shape))
        self.scale = Adapter(jnp.array(1.3), tag="slow")
        self.seen = HiddenState(jnp.zeros(4))
        for state in self.encoder.parameters():
            state.add_tag("frozen")

    def update(self, x):
        self.seen.value = h = jnp.tanh(self.encoder(x)) * self.scale.value
        return self.head(h)


def twin(values, x):
    """Compute what ``Net`` computes, from ``{path: value}``."""
    h = jnp.tanh(x @ values["encoder", "weight"] + values["encoder", "bias"]) * values["scale",]
    return h @ values["head", "weight"] + values["head", "bias"]


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def x():
    return jnp.sin(jnp.arange(3.0))


ENCODER = {("encoder", "bias"), ("encoder", "weight")}
HEAD = {("head", "bias"), ("head", "weight")}
SCALE = {("scale",)}

FILTERS = {
    "tag": ("frozen", ENCODER),
    "not a tag": (Not("frozen"), HEAD | SCALE),
    "kind": (Adapter, SCALE),
    "all": (..., ENCODER | HEAD | SCALE),
    "true": (True, ENCODER | HEAD | SCALE),
    "path": (PathContains("head"), HEAD),
    "function": (lambda path, state: path[-1] == "weight", {("encoder", "weight"), ("head", "weight")}),
    "list": (["frozen", Adapter], ENCODER | SCALE),
    "tuple": (("slow", PathContains("head")), HEAD | SCALE),
    "combined": (All(Not("frozen"), Not(PathContains("bias"))), {("head", "weight")} | SCALE),
    "one for all kinds": (Any(HiddenState, "slow"), SCALE),
}


def sums(out):
    return jnp.sum(jnp.sin(out))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", FILTERS)
def test_gradient_is_that_of_the_selected_parameters_alone(double, net, x, name, compiled):
    chosen, paths = FILTERS[name]
    values = {path: state.value for path, state in net.states(ParamState).items()}
    flat, restore = ravel_pytree({path: values[path] for path in sorted(paths)})
    wanted = restore(jax.grad(lambda p: sums(twin({**values, **restore(p)}, x)))(flat))
    gradient = T.grad(lambda x: sums(net(x)), (net, chosen))
    got = (T.jit(gradient) if compiled else gradient)(x)
    assert set(got) == paths and type(got) is type(net.states())
    for path, g in got.items():
        np.testing.assert_allclose(g, wanted[path], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("where", "shape"),
    [
        (lambda n, s: {"net": (n, Not("frozen")), "s": s}, lambda g, b: {"net": g, "s": b}),
        (lambda n, s: [(n.head, ...), s], lambda g, b: [{(p[1],): g[p] for p in HEAD}, b]),
        (lambda n, s: (s, (n, Not("frozen"))), lambda g, b: (b, g)),
        (lambda n, s: ((n, Not("frozen")), s), lambda g, b: (g, b)),
        (lambda n, s: (n.head, [s]), lambda g, b: ({(p[1],): g[p] for p in HEAD}, [b])),
        (lambda n, s: (n.head, {}, s), lambda g, b: ({(p[1],): g[p] for p in HEAD}, {}, b)),
    ],
)
def test_pairs_stand_where_modules_may(net, x, where, shape):
    s = State(jnp.float32(0.3), name="s")

    def loss(x):
        return sums(net(x)) * s.value

    every, b = T.grad(loss, [net, s])(x)
    got = T.grad(loss, where(net, s))(x)
    wanted = shape({p: g for p, g in every.items() if p not in ENCODER}, b)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, _plain(got), _plain(wanted)))
    with_argument = T.grad(loss, (net, "slow"), argnums=0)(x)
    assert set(with_argument[0]) == SCALE and with_argument[1].shape == x.shape


def _plain(tree):
    """Return ``tree`` with dicts for path mappings."""
    if isinstance(tree, dict):
        return {str(k): _plain(v) for k, v in tree.items()}
    return type(tree)(map(_plain, tree)) if isinstance(tree, list | tuple) else tree


# ------------------------------------------------------------------------------------------ every transform


def _explained(net, x, states):
    return {row.name.partition("[(")[2]: (row.norm, row.cause) for row in T.explain(net, x, grad_states=states).rows}


def _ruled(net, x, states):
    f = T.custom_vjp(lambda x: net.head(x), states=states)
    f.defvjp(
        lambda v, x: (x @ v["head", "weight"] + v["head", "bias"], (v, x)),
        lambda kept, ct: (jax.tree.map(lambda leaf: 3.0 * leaf, kept[0]), kept[1]),
    )
    return T.grad(lambda x: f(x).sum(), states)(jnp.ones(4))


def _derived(row):
    """Return what a row of the table makes of the net; of one without HiddenState where it goes over a batch."""

    def run(net, x, states):
        def single(x):
            return sums(net.head(jnp.tanh(net.encoder(x))))

        fun = single if row.batched else row.call(lambda x: sums(net(x)), net)
        return row.derive(fun, states, **row.options, **{"check_states": False} if row.batched else {})(x)

    return run


# name: what it computes from the net, an input and the States
TRANSFORMS = {name: _derived(row) for name, row in DERIVATIVES.items()} | {
    "check_grads": lambda net, x, states: T.check_grads(net, x, grad_states=states),
    "explain": _explained,
    "custom_vjp": _ruled,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_takes_a_pair(net, x, name):
    """A pair gives what the explicit container of the same States gives."""
    chosen = PathContains("head") if name == "custom_vjp" else Not("frozen")
    got = TRANSFORMS[name](net, x, (net, chosen))
    wanted = TRANSFORMS[name](net, x, net.states(All(ParamState, chosen)))
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), got, wanted))


def test_second_derivatives_against_pure_jax(double, net, x):
    values = {path: state.value for path, state in net.states(ParamState).items()}
    flat, restore = ravel_pytree({path: values[path] for path in sorted(HEAD | SCALE)})
    wanted = jax.hessian(lambda p: sums(twin({**values, **restore(p)}, x)))(flat)
    blocks = T.jit(T.hessian(lambda x: sums(net(x)), (net, Not("frozen"))))(x)
    rows = [[np.reshape(block, (flat_size(values[p]), -1)) for block in blocks[p].values()] for p in blocks]
    np.testing.assert_allclose(np.block(rows), wanted, rtol=1e-12, atol=1e-13)


def flat_size(value):
    return int(np.size(value))


# ------------------------------------------------------------------------------------------ thawed, and frozen again

CHANGES = {
    "add_tag": (lambda s: s.add_tag("frozen"), lambda s: s.tag.discard("frozen")),
    "add, remove": (lambda s: s.tag.add("frozen"), lambda s: s.tag.remove("frozen")),
    "assigned": (lambda s: setattr(s, "tag", {"frozen"}), lambda s: setattr(s, "tag", ())),
    "update, clear": (lambda s: s.tag.update({"frozen", "more"}), lambda s: s.tag.clear()),
    "in place": (lambda s: s.tag.__ior__({"frozen"}), lambda s: s.tag.__isub__({"frozen"})),
    "pop": (lambda s: s.tag.symmetric_difference_update({"frozen", "slow"}), lambda s: s.tag.pop()),
    "intersection": (lambda s: s.tag.__ixor__({"frozen"}), lambda s: s.tag.intersection_update(())),
    "difference": (lambda s: setattr(s, "tag", "frozen"), lambda s: s.tag.difference_update(("frozen",))),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_freezing_takes_effect_at_the_next_call(net, x, name, compiled):
    freeze, thaw = CHANGES[name]
    runs = []

    def loss(x):
        runs.append(1)
        return sums(net(x))

    gradient = T.grad(loss, (net, Not("frozen")))
    gradient = T.jit(gradient) if compiled else gradient
    for change, paths in ((freeze, HEAD), (thaw, HEAD | SCALE), (freeze, HEAD)):
        change(net.scale)
        runs.clear()
        assert set(gradient(x)) == set(gradient(x)) == paths
        assert len(runs) == (1 if compiled else 2)


def test_what_changes_no_tag_compiles_nothing_anew(net, x):
    runs = []

    @T.jit
    def gradient(x):
        runs.append(1)
        new = ParamState(x * 1.0)  # one that dies with the trace, and is tagged there
        new.add_tag("frozen")
        return T.grad(lambda x: sums(net(x)) + new.value.sum(), (net, Not("frozen")))(x)

    gradient(x)
    net.scale.add_tag("slow")
    net.scale.tag = {"slow"}
    net.scale.tag.discard("frozen")
    net.scale.tag |= {"slow"}
    ParamState(1.0, tag="frozen").copy()
    gradient(x)
    assert len(runs) == 1


def test_tags_are_a_set():
    s = State(1.0, tag=["a", "b"])
    assert s.tag == {"a", "b"} and isinstance(s.tag, set) and repr(State(1.0, tag="a").tag) == "{'a'}"
    for other in (copy.copy(s), copy.deepcopy(s), pickle.loads(pickle.dumps(s)), s.replace(2.0)):
        other.tag.add("c")
        assert (s.tag, other.tag) == ({"a", "b"}, {"a", "b", "c"})
    assert type(copy.deepcopy(s.tag)) is type(copy.copy(s.tag)) is set and s.tag | {"c"} == {"a", "b", "c"}
    with pytest.raises(KeyError):
        s.tag.remove("z")


def test_a_frozen_state_may_be_written(net, x):
    def loss(x):
        net.encoder.bias.value = net.encoder.bias.value + 1.0
        return sums(net(x))

    assert set(T.jit(T.grad(loss, (net, Not("frozen"))))(x)) == HEAD | SCALE
    assert net.encoder.bias.value.tolist() == [1.0] * 4


# ------------------------------------------------------------------------------------------ tied


class Tied(nn.Module):
    """An autoencoder whose decoder uses the weight of the encoder, under a second name."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 3, w_init=lambda shape: jnp.linspace(-0.8, 1.0, 9).reshape(shape))
        self.decoder = nn.Linear(3, 3, w_init=jnp.zeros)
        self.decoder.weight = self.encoder.weight

    def update(self, x):
        return self.decoder(jnp.tanh(self.encoder(x)))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_tied_parameter_has_one_gradient_the_sum(double, x, compiled, frozen):
    tied = Tied()
    if frozen:
        tied.encoder.bias.add_tag("frozen")
    w, b, c = tied.encoder.weight.value, tied.encoder.bias.value, tied.decoder.bias.value

    def pure(first, second, b, c):
        return sums(jnp.tanh(x @ first + b) @ second + c)

    first, second, by_b, by_c = jax.grad(pure, (0, 1, 2, 3))(w, w, b, c)
    gradient = T.grad(lambda x: sums(tied(x)), (tied, Not("frozen")))
    got = (T.jit(gradient) if compiled else gradient)(x)
    wanted = {("decoder", "bias"): by_c, ("decoder", "weight"): first + second, ("encoder", "bias"): by_b}
    wanted.pop(("encoder", "bias") if frozen else None, None)
    assert list(got) == list(wanted)
    for path, g in got.items():
        np.testing.assert_allclose(g, wanted[path], rtol=1e-13, atol=1e-15)


def test_a_tag_freezes_a_tied_parameter_under_all_its_names(x):
    tied = Tied()
    tied.encoder.weight.add_tag("frozen")
    assert list(T.grad(lambda x: sums(tied(x)), (tied, Not("frozen")))(x)) == [("decoder", "bias"), ("encoder", "bias")]


# ------------------------------------------------------------------------------------------ stop_gradient


@pytest.mark.parametrize("compiled", [False, True])
def test_stop_gradient_takes_a_pair(net, x, compiled):
    """Entries are there, and zero; a Module, alone or in a pair, stands for all its States here."""
    gradient = T.grad(lambda x: sums(T.stop_gradient(net, (net, "frozen"))(x)), net)
    gradient = T.jit(gradient) if compiled else gradient
    free = T.grad(lambda x: sums(net(x)), net)(x)
    for frozen in (ENCODER, ENCODER | SCALE):
        for path, g in gradient(x).items():
            assert jnp.allclose(g, 0.0 if path in frozen else free[path])
        net.scale.add_tag("frozen")


def test_stop_gradient_selects_from_all_states_of_the_module_and_from_no_other(net):
    other = ParamState(jnp.array(2.0), tag="frozen")

    def f(x):
        return (net.seen.value * x * other.value).sum()

    net.seen.value = jnp.ones(4)
    net.seen.add_tag("frozen")
    seen, free = T.grad(T.stop_gradient(f, (net, "frozen")), [net.seen, other])(1.0)
    assert seen.tolist() == [0.0] * 4 and free == 4.0
    with pytest.raises(StateValueError, match=r"stop_gradient: the filter .* selects none of the 6 States of Net"):
        T.stop_gradient(f, (net, "fast"))


def test_other_declarations_take_a_pair(net):
    """As in stop_gradient: of all States of the Module, and of no other."""
    net.seen.value, other = jnp.zeros((3, 4)), HiddenState(jnp.zeros(2), tag="lane")
    net.seen.add_tag("lane")

    def step(x):
        net.seen.value = net.seen.value + x + other.value.sum()

    T.vmap(step, in_states={0: (net, "lane")}, out_states={0: (net, HiddenState)})(jnp.arange(3.0))
    assert net.seen.value[:, 0].tolist() == [0.0, 1.0, 2.0]


# ------------------------------------------------------------------------------------------ misuse

Named = namedtuple("Named", "module filter")

MISUSES = {
    "no such tag": (
        lambda net: (net, "fast"),
        StateValueError,
        r"grad_states: the filter WithTag\(tag='fast'\) selects none of the 5 ParamStates of Net "
        r"\(encoder.bias, .*scale\).*PathContains",
    ),
    "a path as a tag": (lambda net: (net, "head"), StateValueError, "A string is a tag, and filters.PathContains"),
    "in a container": (lambda net: {"a": [(net, "fast")]}, StateValueError, r"grad_states\['a'\]\[0\]: the filter"),
    "States of another kind": (
        lambda net: (net, HiddenState),
        StateValueError,
        r"OfType.*HiddenState.* narrows the ParamStates: for others give module.states\(SomeKind\)",
    ),
    "nothing": (lambda net: (net, None), StateValueError, r"Nothing\(\) selects none"),
    "no filter in a list of filters": (lambda net: (net, []), StateValueError, r"Any\(\) selects none"),
    "a module without parameters": (
        lambda net: (nn.Module(), ...),
        StateValueError,
        r"Everything\(\) selects none of the 0 ParamStates of Module\.",
    ),
    "a number": (lambda net: (net, 3), StateTypeError, r"grad_states\[1\] is an int, not a State.*\(Module, filter\)"),
    "a list in place of the pair": (lambda net: [net, "slow"], StateTypeError, r"grad_states\[1\] is a str"),
    "three": (lambda net: (net, "slow", "frozen"), StateTypeError, r"grad_states\[1\] is a str"),
    "a filter without a module": (lambda net: (net.scale, "slow"), StateTypeError, r"grad_states\[1\] is a str"),
    "the filter first": (lambda net: ("slow", net), StateTypeError, r"grad_states\[0\] is a str"),
    "a container for the module": (lambda net: ([net], "slow"), StateTypeError, r"grad_states\[1\] is a str"),
    "a namedtuple": (lambda net: Named(net, "slow"), StateTypeError, r"grad_states.filter is a str"),
    "a State among filters": (
        lambda net: (net, ["slow", net.scale]),
        StateTypeError,
        r"grad_states\[1\]\[0\] is a str",
    ),
    "a Module among filters": (
        lambda net: (net, ["slow", net.head]),
        StateTypeError,
        r"grad_states\[1\]\[0\] is a str",
    ),
    "overlapping pairs": (
        lambda net: [(net, "slow"), (net, Adapter)],
        StateValueError,
        r"lists Adapter at Net.scale twice, as grad_states\[0\]\[\('scale',\)\] and grad_states\[1\]",
    ),
    "a module twice": (lambda net: (net, net), StateValueError, "twice"),
    "a set": (lambda net: (net, {"slow"}), StateTypeError, r"grad_states\[1\] is a set"),
    "a parameter that is not read": (
        lambda net: {"a": (net, Any("slow", "spare"))},
        StateValueError,
        r"never reads grad_states\['a'\]\[\('spare',\)\]",
    ),
}


@pytest.mark.parametrize("name", MISUSES)
@pytest.mark.parametrize("compiled", [False, True])
def test_misuse(net, x, name, compiled):
    make, error, match = MISUSES[name]
    net.spare = ParamState(jnp.ones(2), tag="spare")
    if name == "a parameter that is not read" or "ParamStates of Net" in match:
        match = match.replace("of the 5", "of the 6").replace("scale", "scale, spare", 1)
    with unchanged(*net.states().values()), pytest.raises(error, match=match):
        run = T.grad(lambda x: sums(net(x)), make(net))
        (T.jit(run) if compiled else run)(x)


def test_an_error_of_a_filter_is_its_own(net, x):
    def broken(path, state):
        raise TypeError(f"no rule for {path[0]}")

    with pytest.raises(TypeError, match="no rule for encoder"):
        T.grad(lambda x: sums(net(x)), (net, broken))(x)
