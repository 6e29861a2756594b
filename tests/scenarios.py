"""Scenarios: functions with States as data, each beside a twin written by hand in pure JAX.

A scenario says what happens to States; an operator (grad, jacrev, …) says what is computed from them; a context
(plain, under jit, …) says around which the call happens. `compare` crosses one of each and checks result and
States afterwards against the same operator of JAX on the twin. A new column of the table is one more entry in
``CONTEXTS``: how ours is called, and how the twin is.

    function(states, *args) -> out                    reads and writes ``states[name].value``
    twin(values, *args)     -> out, {name: new}       the same with plain values; only what was written is returned
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import brainstate
from brainstate import BatchState, HiddenState, ParamState, ShortTermState, State
from brainstate import transform as T
from transforms import EXACT

WRT = ("states", "arguments", "both")
DTYPES = ("float32", "float64", "complex64")


@dataclass(frozen=True)
class Scenario:
    """A function with States, its twin, and what is differentiated."""

    name: str
    kind: str  # of the differentiated values: scalar, array or pytree
    make_states: Callable[[Any], dict[str, State]]  # given ``num``, which makes arrays of the dtype
    function: Callable
    twin: Callable
    make_args: Callable[[Any], tuple]
    grad_states: tuple[str, ...]
    argnums: int | tuple[int, ...] = 0
    wrt: str = "states"

    def __str__(self):
        return f"{self.name}-{self.wrt}"

    def prepare(self, dtype):
        """Return fresh States and arguments of ``dtype``."""

        def num(value):
            value = np.asarray(value)
            return jnp.asarray(value + 0.25j * np.cos(value) if dtype == "complex64" else value, dtype)

        return self.make_states(num), self.make_args(num)

    def options(self, states):
        """Return ``grad_states`` and ``argnums`` for our transforms."""
        chosen = None if self.wrt == "arguments" else {name: states[name] for name in self.grad_states}
        return {"grad_states": chosen, "argnums": None if self.wrt == "states" else self.argnums}

    def pack(self, values, args):
        """Return what is differentiated, in the structure of the result."""
        chosen = {name: jax.tree.map(_inexact, values[name]) for name in self.grad_states}
        picked = tuple(args[n] for n in self.numbers)
        picked = picked if isinstance(self.argnums, tuple) else picked[0]
        return {"states": chosen, "arguments": picked, "both": (chosen, picked)}[self.wrt]

    def unpack(self, diff, values, args):
        """Undo `pack`: return all values and arguments, with ``diff`` in place."""
        chosen, picked = {
            "states": lambda: (diff, ()),
            "arguments": lambda: ({}, diff),
            "both": lambda: diff,
        }[self.wrt]()
        values = values | {name: jax.tree.map(_fill, values[name], new) for name, new in chosen.items()}
        args = list(args)
        if self.wrt != "states":
            for n, value in zip(self.numbers, picked if isinstance(self.argnums, tuple) else (picked,), strict=True):
                args[n] = value
        return values, args

    @property
    def numbers(self):
        """Return the positions of the differentiated arguments."""
        return self.argnums if isinstance(self.argnums, tuple) else (self.argnums,)


def _inexact(leaf):
    return leaf if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) else None


def _fill(old, new):
    return old if new is None else new


def total(tree):
    """Return the sum of everything inexact in ``tree``."""
    leaves = [leaf.sum() for leaf in jax.tree.leaves(tree) if _inexact(leaf) is not None]
    return sum(leaves[1:], leaves[0])


def probe(tree):
    """Return fixed values, each leaf different, in the structure, shapes and dtypes of ``tree``."""
    leaves, treedef = jax.tree.flatten(tree)
    made = [
        jnp.asarray(np.cos(np.arange(leaf.size) + i).reshape(leaf.shape), leaf.dtype) for i, leaf in enumerate(leaves)
    ]
    return treedef.unflatten(made)


def values_of(states):
    """Return the present values."""
    return {name: state.value for name, state in states.items()}


# ------------------------------------------------------------------------------------------ the scenarios


def _scalar(s, x):
    s["count"].value += 1
    s["trace"].value = s["trace"].value + s["w"].value * x
    return jnp.sin(s["w"].value * x) * s["gain"].value


def _scalar_twin(v, x):
    return jnp.sin(v["w"] * x) * v["gain"], {"count": v["count"] + 1, "trace": v["trace"] + v["w"] * x}


def _scalar_states(num):
    return {
        "w": ParamState(num(1.5)),
        "gain": State(num(0.7)),
        "count": State(jnp.array(0)),
        "trace": ShortTermState(num(0.0)),
    }


def _array(s, x, y):
    h = jnp.sin(s["w"].value @ x + s["b"].value)
    s["h"].value = h * y
    s["count"].value += 1
    return s["h"].value * h


def _array_twin(v, x, y):
    h = jnp.sin(v["w"] @ x + v["b"])
    return h * y * h, {"h": h * y, "count": v["count"] + 1}


def _array_states(num):
    return {
        "w": ParamState(num([[0.1, 0.2], [0.3, -0.4]])),
        "b": ParamState(num([0.5, -0.5])),
        "h": HiddenState(num([0.0, 0.0])),
        "count": State(jnp.array(0)),
    }


def _pytree(s, x):
    p = s["p"].value
    y = p["w"] * x["a"] ** 2 + p["b"][0] * x["b"]
    s["log"].value = {"last": y, "n": s["log"].value["n"] + 1}
    return {"y": y, "z": (p["b"][0] * x["b"], p["w"] ** 2)}


def _pytree_twin(v, x):
    p = v["p"]
    y = p["w"] * x["a"] ** 2 + p["b"][0] * x["b"]
    return {"y": y, "z": (p["b"][0] * x["b"], p["w"] ** 2)}, {"log": {"last": y, "n": v["log"]["n"] + 1}}


def _pytree_states(num):
    return {
        "p": ParamState({"w": num([1.0, 2.0]), "b": [num(0.3)]}),
        "log": State({"last": num([0.0, 0.0]), "n": jnp.array(0)}),
    }


def _overwritten(s, x):
    before = s["w"].value
    s["w"].value = before * x
    s["w"].value = s["w"].value + before
    return s["w"].value ** 2


def _overwritten_twin(v, x):
    w = v["w"] * x + v["w"]
    return w**2, {"w": w}


def _in_place(s, x):
    p = s["p"].value
    p["w"] = p["w"] * x
    p["n"] = p["n"] + 1
    return s["p"].value["w"] ** 3


def _in_place_twin(v, x):
    w = v["p"]["w"] * x
    return w**3, {"p": {"w": w, "n": v["p"]["n"] + 1}}


def _temporary(s, x):
    inner = State(s["w"].value * x)
    for _ in range(2):
        inner.value = jnp.sin(inner.value)
    s["m"].value = 0.9 * s["m"].value + 0.1 * inner.value
    return inner.value * x


def _temporary_twin(v, x):
    inner = jnp.sin(jnp.sin(v["w"] * x))
    return inner * x, {"m": 0.9 * v["m"] + 0.1 * inner}


def _noise(s, x):
    rng = s["rng"]
    first, second = (rng.normal(size=2, dtype=x.dtype) for _ in range(2))
    return (s["w"].value + first) * x * second


def _noise_twin(v, x):
    key, draws = v["rng"], []
    for _ in range(2):
        key, sub = jax.random.split(jax.random.wrap_key_data(key))
        key = jax.random.key_data(key)
        draws.append(jax.random.normal(sub, (2,), x.dtype))
    return (v["w"] + draws[0]) * x * draws[1], {"rng": key}


def _inner_step(s, x):
    """Write through transforms inside: a jitted one, and a gradient whose function writes too."""

    @T.jit
    def advance(y):
        s["h"].value = s["h"].value + y
        return s["h"].value

    def energy():
        s["count"].value += 1
        return (s["w"].value ** 3 * advance(x)).sum()

    return T.grad(energy, s["w"])() * x


def _inner_step_twin(v, x):
    h = v["h"] + x
    return jax.grad(lambda w: (w**3 * h).sum())(v["w"]) * x, {"h": h, "count": v["count"] + 1}


_BASE = (
    Scenario("scalar", "scalar", _scalar_states, _scalar, _scalar_twin, lambda num: (num(0.8),), ("w", "gain")),
    Scenario(
        "array",
        "array",
        _array_states,
        _array,
        _array_twin,
        lambda num: (num([1.0, -2.0]), num([0.5, 1.5])),
        ("w", "b"),
        (1, 0),
    ),
    Scenario(
        "pytree",
        "pytree",
        _pytree_states,
        _pytree,
        _pytree_twin,
        lambda num: ({"a": num([0.5, 1.0]), "b": num(2.0)},),
        ("p",),
    ),
    Scenario(
        "overwritten",
        "array",
        lambda num: {"w": ParamState(num([1.0, 2.0]))},
        _overwritten,
        _overwritten_twin,
        lambda num: (num([0.5, 0.3]),),
        ("w",),
    ),
    Scenario(
        "in_place",
        "pytree",
        lambda num: {"p": State({"w": num([1.0, 2.0]), "n": jnp.array(3)})},
        _in_place,
        _in_place_twin,
        lambda num: (num([0.5, 0.3]),),
        ("p",),
    ),
    Scenario(
        "temporary",
        "array",
        lambda num: {"w": ParamState(num([1.0, 2.0])), "m": BatchState(num([0.0, 1.0]))},
        _temporary,
        _temporary_twin,
        lambda num: (num([0.5, 0.3]),),
        ("w",),
    ),
    Scenario(
        "noise",
        "array",
        lambda num: {"w": ParamState(num([1.0, 2.0])), "rng": brainstate.random.RandomState(1)},
        _noise,
        _noise_twin,
        lambda num: (num([0.5, 0.3]),),
        ("w",),
    ),
    Scenario(
        "inner_step",
        "array",
        lambda num: {"w": ParamState(num([1.0])), "h": HiddenState(num([0.5])), "count": State(jnp.array(0))},
        _inner_step,
        _inner_step_twin,
        lambda num: (num([0.3]),),
        ("w",),
    ),
)
# Differentiating the inner gradient of a complex function would need `holomorphic` inside, too.
REAL_ONLY = {"inner_step"}

SCENARIOS = tuple(replace(base, wrt=wrt) for base in _BASE for wrt in WRT)


# ------------------------------------------------------------------------------------------ the operators


@dataclass(frozen=True)
class Operator:
    """``ours(scenario, states, run, args, holomorphic)``, and ``reference(pure, diff, holomorphic)`` with aux."""

    name: str
    ours: Callable
    reference: Callable

    def __str__(self):
        return self.name


def _gradient(row):
    """Return the operator of a gradient in the table: ours, and its twin on the twin."""

    def ours(scenario, states, run, args, holomorphic):
        params = {"holomorphic": holomorphic} if row.takes("holomorphic") else {}
        return row.derive(row.call(lambda *a: total(run(*a)), run), **scenario.options(states), **params)(*args)

    def reference(pure, diff, holomorphic):
        def fun(d):
            out, new = pure(d)
            return row.call(total, lambda out: out)(out), new

        return row.jax(fun, has_aux=True, holomorphic=holomorphic)(diff)

    return Operator(row.name, ours, reference)


def _vjp_ours(scenario, states, run, args, _):
    out, pull = T.vjp(run, *args, **scenario.options(states))
    return out, pull(probe(out))


def _vjp_reference(pure, diff, _):
    out, pull, new = jax.vjp(pure, diff, has_aux=True)
    return (out, pull(probe(out))[0]), new


def _jvp_ours(scenario, states, run, args, _):
    chosen = scenario.options(states)["grad_states"]
    diff = scenario.pack(values_of(states), args)
    along = probe(diff)
    tangents = {"states": (along, ()), "arguments": (None, along), "both": along}[scenario.wrt]
    given = () if scenario.wrt == "states" else tuple(args[n] for n in scenario.numbers)
    moved = tangents[1] if isinstance(scenario.argnums, tuple) or not given else (tangents[1],)

    def fun(*picked):
        full = list(args)
        for n, value in zip(scenario.numbers, picked, strict=False):
            full[n] = value
        return run(*full)

    return T.jvp(fun, given, moved, grad_states=chosen, state_tangents=tangents[0])


def _jvp_reference(pure, diff, _):
    out, tangent, new = jax.jvp(pure, (diff,), (probe(diff),), has_aux=True)
    return (out, tangent), new


CALL = Operator("call", lambda scenario, states, run, args, _: run(*args), lambda pure, diff, _: pure(diff))

OPERATORS = (
    *map(_gradient, EXACT.values()),
    Operator("vjp", _vjp_ours, _vjp_reference),
    Operator("jvp", _jvp_ours, _jvp_reference),
)


# ------------------------------------------------------------------------------------------ the contexts


@dataclass(frozen=True)
class Context:
    """How a call ``run(*args)`` is made, and ``pure(values, *args) -> (result, new values)`` of the reference."""

    name: str
    ours: Callable
    reference: Callable

    def __str__(self):
        return self.name


def _scaled(args, scale):
    return jax.tree.map(lambda leaf: leaf * scale, args)


def _one(args):
    return jnp.ones((), jax.tree.leaves(args)[0].dtype)


def _nested_ours(run, args, holomorphic):
    def outer(scale):
        result = run(*_scaled(args, scale))
        return total(result), result

    return T.grad(outer, has_aux=True, holomorphic=holomorphic)(_one(args))


def _nested_reference(pure, values, args, holomorphic):
    def outer(scale):
        result, new = pure(values, *_scaled(args, scale))
        return total(result), (result, new)

    slope, (result, new) = jax.grad(outer, has_aux=True, holomorphic=holomorphic)(_one(args))
    return (slope, result), new


def _plain_reference(pure, values, args, _):
    return pure(values, *args)


def _compiled(run, args, _):
    return T.jit(run)(*args)


def _compiled_reference(pure, values, args, _):
    return jax.jit(pure)(values, *args)


COMPILED = Context("compiled", _compiled, _compiled_reference)  # where JAX without jit is slow, as in `shard_map`

CONTEXTS = (
    Context("plain", lambda run, args, _: run(*args), _plain_reference),
    Context("jit", _compiled, _plain_reference),
    Context("nested", _nested_ours, _nested_reference),
)


# ------------------------------------------------------------------------------------------ the columns


@dataclass(frozen=True)
class Column:
    """A transform around a function: ``ours(function, names)`` and ``twin(twin, names)`` are what it becomes.

    ``names`` are the States that are written. In loops and lanes each turn has the arguments times a factor of its
    own. A column makes a scenario of a scenario, so that columns nest, and derivatives go inside and around.
    """

    name: str
    ours: Callable
    twin: Callable
    lanes: Callable | None = None  # another twin, by `jax.vmap`, which needs no compiler

    def __str__(self):
        return self.name


_FACTORS = (1.0, 0.6, 0.9, 0.7)


def _factors(args, count=2):
    return jnp.asarray(_FACTORS[:count], jax.tree.leaves(args)[0].dtype)


def _zero(args):
    return 0 * jax.tree.leaves(args)[0].sum()


def _kept(v, names):
    return {name: v[name] for name in names}


def _random_lanes(v, count):
    """Return what the lanes have in place of the generator, and what it is afterwards."""
    if "rng" not in v:
        return {}, {}
    key, sub = jax.random.split(jax.random.wrap_key_data(v["rng"]))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(sub, jnp.arange(count, dtype=jnp.uint32))
    return {"rng": jax.random.key_data(keys)}, {"rng": jax.random.key_data(key)}


def _stacked(tree, count):
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * count), tree)


def _vmap(function, names):
    def mapped(s, *args):
        own = [s[name] for name in names if name != "rng"]
        for state in own:
            state.value = _stacked(state.value, 2)
        lanes = T.vmap(lambda k: function(s, *_scaled(args, k)), in_states=own, out_states={"last": own})
        return lanes(_factors(args))

    return mapped


def _vmap_twin(twin, names):
    def mapped(v, *args):
        drawn, after = _random_lanes(v, 2)
        own = _stacked(_kept(v, names), 2) | drawn
        out, new = jax.vmap(lambda k, own: twin(v | own, *_scaled(args, k)))(_factors(args), own)
        return out, jax.tree.map(lambda lanes: lanes[-1], new) | after

    return mapped


def _scan(function, names):
    def loop(s, *args):
        def body(carry, k):
            out = function(s, *_scaled(args, k))
            return carry + total(out), out

        return T.scan(body, _zero(args), _factors(args))

    return loop


def _scan_twin(twin, names):
    def loop(v, *args):
        def body(carry, k):
            out, new = twin(v | carry[1], *_scaled(args, k))
            return (carry[0] + total(out), new), out

        (last, new), outs = jax.lax.scan(body, (_zero(args), _kept(v, names)), _factors(args))
        return (last, outs), new

    return loop


def _for_loop(function, names):
    return lambda s, *args: T.for_loop(lambda k: function(s, *_scaled(args, k)), _factors(args))


def _for_loop_twin(twin, names):
    def loop(v, *args):
        def body(own, k):
            return twin(v | own, *_scaled(args, k))[::-1]

        return jax.lax.scan(body, _kept(v, names), _factors(args))[::-1]

    return loop


def _while(function, names):
    def loop(s, *args):
        def body(carry):
            i, last = carry
            return i + 1, last + total(function(s, *_scaled(args, _factors(args)[i])))

        return T.while_loop(lambda carry: carry[0] < 2, body, (jnp.int32(0), _zero(args)))[1]

    return loop


def _while_twin(twin, names):
    def loop(v, *args):
        def body(carry):
            i, last, own = carry
            out, new = twin(v | own, *_scaled(args, _factors(args)[i]))
            return i + 1, last + total(out), new

        _, last, new = jax.lax.while_loop(lambda c: c[0] < 2, body, (jnp.int32(0), _zero(args), _kept(v, names)))
        return last, new

    return loop


def _cond(function, names):
    def branch(s, *args):
        return T.cond(_zero(args) == 0, lambda *a: total(function(s, *a)), lambda *a: _zero(a), *args)

    return branch


def _cond_twin(twin, names):
    def branch(v, *args):
        def run(own, *a):
            out, new = twin(v | own, *a)
            return total(out), new

        return jax.lax.cond(_zero(args) == 0, run, lambda own, *a: (_zero(a), own), _kept(v, names), *args)

    return branch


def _switch(function, names):
    def branch(s, *args):
        others = (lambda *a: _zero(a), lambda *a: _zero(a) + 1)
        return T.switch(jnp.int32(_zero(args)) + 1, [others[0], lambda *a: total(function(s, *a)), others[1]], *args)

    return branch


def _switch_twin(twin, names):
    def branch(v, *args):
        def run(own, *a):
            out, new = twin(v | own, *a)
            return total(out), new

        others = (lambda own, *a: (_zero(a), own), lambda own, *a: (_zero(a) + 1, own))
        index = jnp.int32(_zero(args)) + 1
        return jax.lax.switch(index, [others[0], run, others[1]], _kept(v, names), *args)

    return branch


def _checkpoint(function, names):
    return lambda s, *args: T.checkpoint(lambda *a: function(s, *a))(*args)


def _checkpoint_twin(twin, names):
    return jax.checkpoint(twin)


class _Over:
    """The mesh axis of a `shard_map`, with so many devices: options for both."""

    def __init__(self, axis="d", devices=4, shape=(4,), inner=False):
        self.axis, self.devices, self.shape, self.inner = axis, devices, shape, inner

    def options(self):
        options = {"in_specs": P(self.axis), "out_specs": P(self.axis), "axis_names": {self.axis}}
        if self.inner:
            return options  # the mesh is that of the one around
        mesh = Mesh(np.array(jax.devices()[:4]).reshape(self.shape), ("d", "e")[: len(self.shape)])
        return options | {"mesh": mesh}


def _first(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _one_more(tree):
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _shard_map(function, names, over):
    def mapped(s, *args):
        own = [s[name] for name in names if name != "rng"]
        for state in own:
            state.value = _stacked(state.value, over.devices)

        def shard(k):
            for state in own:
                state.value = _first(state.value)
            out = function(s, *_scaled(args, k[0]))
            for state in own:
                state.value = _one_more(state.value)
            return _one_more(out)

        specs = {P(over.axis): own} if own else None
        out = T.shard_map(shard, state_specs=specs, **over.options())(_factors(args, over.devices))
        for state in own:
            state.value = _first(state.value)
        return out

    return mapped


def _shard_map_twin(twin, names, over):
    def mapped(v, *args):
        drawn, after = _random_lanes(v, over.devices)
        own = _stacked(_kept(v, names), over.devices) | drawn
        sharded = P(over.axis)

        def shard(k, own, rest, args):
            return _one_more(twin(rest | _first(own), *_scaled(args, k[0])))

        rest = {name: value for name, value in v.items() if name not in own}
        options = over.options() | {"in_specs": (sharded, sharded, P(), P())}
        out, new = jax.shard_map(shard, **options)(_factors(args, over.devices), own, rest, args)
        return out, _first(new) | after

    return mapped


def _shard_map_lanes(twin, names, over):
    def mapped(v, *args):
        drawn, after = _random_lanes(v, over.devices)
        own = _stacked(_kept(v, names), over.devices) | drawn
        out, new = jax.vmap(lambda k, own: twin(v | own, *_scaled(args, k)))(_factors(args, over.devices), own)
        return out, _first(new) | after

    return mapped


def _sharding(**over):
    over = _Over(**over)
    ways = _shard_map, _shard_map_twin, _shard_map_lanes
    return Column("shard_map", *(functools.partial(way, over=over) for way in ways))


COLUMNS = (
    Column("vmap", _vmap, _vmap_twin),
    Column("scan", _scan, _scan_twin),
    Column("for_loop", _for_loop, _for_loop_twin),
    Column("while", _while, _while_twin),
    Column("cond", _cond, _cond_twin),
    Column("switch", _switch, _switch_twin),
    Column("checkpoint", _checkpoint, _checkpoint_twin),
    _sharding(),
)
SHARD_MAP_TWICE = (
    _sharding(axis="d", devices=2, shape=(2, 2)),
    _sharding(axis="e", devices=2, inner=True),
)


def nested(scenario, columns, inside=False, lanes=False):
    """Return ``scenario`` with the ``columns`` around it, the first outermost, and inside them a gradient or not.

    With ``lanes`` no `shard_map` is in the twin. That is only right without a derivative inside: JAX sums one with
    respect to what all devices share over the devices.
    """
    function, twin = scenario.function, scenario.twin
    states, args = scenario.prepare("float32")
    names = tuple(jax.eval_shape(twin, values_of(states), *args)[1])
    if inside:
        function, twin = _gradient_inside(scenario)
    for column in reversed(columns):
        other = (lanes and column.lanes) or column.twin
        function, twin = column.ours(function, names), other(twin, names)
    return replace(scenario, function=function, twin=twin)


def _gradient_inside(scenario):
    def function(s, *args):
        return T.grad(lambda *a: total(scenario.function(s, *a)), **scenario.options(s))(*args)

    def twin(v, *args):
        def fun(diff):
            new, moved = scenario.unpack(diff, v, args)
            out, new = scenario.twin(new, *moved)
            return total(out), new

        return jax.grad(fun, has_aux=True)(scenario.pack(v, args))

    return function, twin


def columns():
    """Return the cells ``(scenario, columns, derivative)`` of the nested table, with a gradient inside, around or none.

    One column: every scenario. Pairs: where States and arguments are differentiated together; `shard_map` within
    itself is over another axis of the mesh.
    """
    for scenario, column, derivative in itertools.product(SCENARIOS, COLUMNS, ("none", "inside", "around")):
        if derivative != "none" or scenario.wrt == "both":  # without a derivative all three are the same
            yield scenario, (column,), derivative
    for scenario, *pair, derivative in itertools.product(SCENARIOS, COLUMNS, COLUMNS, ("inside", "around")):
        if scenario.wrt == "both":
            twice = [column.name for column in pair] == ["shard_map"] * 2
            yield scenario, SHARD_MAP_TWICE if twice else tuple(pair), derivative


# ------------------------------------------------------------------------------------------ the comparison


def cells():
    """Return the cells of the table: all but those that cannot differ from their neighbours.

    In single precision every cell; in the other dtypes, all of them plain, and in the other contexts where States
    and arguments are differentiated together (which has the other two as its blocks).
    """
    for scenario, operator, dtype, context in itertools.product(SCENARIOS, OPERATORS, DTYPES, CONTEXTS):
        if dtype == "complex64" and scenario.name in REAL_ONLY:
            continue
        if dtype == "float32" or context.name == "plain" or scenario.wrt == "both":
            yield scenario, operator, dtype, context


def close(got, expected, dtype):
    """Assert that structure, dtypes and numbers agree."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    tolerance = 1e-10 if dtype == "float64" else 2e-4
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert jnp.result_type(a) == jnp.result_type(b)
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


@functools.cache
def expectation(scenario, operator, reference, dtype):
    """Return result and new values by JAX on the twin; contexts with the same reference share it."""
    states, args = scenario.prepare(dtype)
    holomorphic = dtype == "complex64"

    def pure(values, *a):
        def twin(diff):
            new, moved = scenario.unpack(diff, values, a)
            return scenario.twin(new, *moved)

        return operator.reference(twin, scenario.pack(values, a), holomorphic)

    return reference(pure, values_of(states), args, holomorphic)


def compare(scenario, operator, context, dtype):
    """Run one cell of the table: ours against JAX on the twin."""
    expected, new = expectation(scenario, operator, context.reference, dtype)
    states, args = scenario.prepare(dtype)
    holomorphic = dtype == "complex64"
    before, runs = values_of(states), []

    def function(*a):
        runs.append(1)
        return scenario.function(states, *a)

    def run(*a):
        return operator.ours(scenario, states, function, a, holomorphic)

    got = context.ours(run, args, holomorphic)

    assert len(runs) == 1
    close(got, expected, dtype)
    for name, state in states.items():
        if name in new:
            assert not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(state.value))
            close(state.value, new[name], dtype)
        else:
            assert state.value is before[name]
