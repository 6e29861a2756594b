"""shard_map on four virtual devices, against one device and against jax.shard_map on the functional twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import brainstate
from brainstate import BatchAxisError, HiddenState, ParamState, State, StateValueError
from brainstate.transform import grad, jit, shard_map


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()[:4]), ("d",))


@pytest.fixture
def x():
    return jnp.arange(8.0).reshape(8, 1) * jnp.ones((1, 2))


@pytest.fixture
def states():
    w = ParamState({"w": jnp.array([[1.0, -2.0]])}, name="w")
    return w, HiddenState(jnp.ones((8, 2)), name="h"), State(jnp.float32(0.0), name="total")


def step(w, h, total):
    def f(x):
        h.value = 0.5 * h.value + x * w.value["w"]
        total.value = total.value + jax.lax.psum(x.sum(), "d")
        return h.value.sum(1)

    return f


@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_states_are_those_of_one_device(mesh, x, states, compiled):
    w, h, total = states
    h1, total1 = 0.5 * h.value + x * w.value["w"], x.sum()
    run = shard_map(step(*states), mesh=mesh, in_specs=P("d"), out_specs=P("d"), state_specs={P("d"): HiddenState})
    out = (jit(run) if compiled else run)(x)
    assert jnp.allclose(out, h1.sum(1)) and jnp.allclose(h.value, h1) and total.value == total1


@pytest.mark.parametrize("inside", [False, True])
def test_gradient_is_that_of_one_device(mesh, x, states, inside):
    """Pitfall: the derivative inside is summed over devices; the mean has to be in the loss."""
    w, *_ = states

    def loss(x):
        return jax.lax.pmean(jnp.mean((x * w.value["w"]) ** 2), "d")

    wanted = jax.grad(lambda v: jnp.mean((x * v["w"]) ** 2))(w.value)["w"]
    if inside:
        got = jit(shard_map(lambda x: grad(loss, w)(x), mesh=mesh, in_specs=P("d"), out_specs=P()))(x)
    else:
        got = grad(lambda x: shard_map(loss, mesh=mesh, in_specs=P("d"), out_specs=P())(x), w)(x)
    assert jnp.allclose(got["w"], wanted)


def test_devices_draw_their_own_numbers_and_the_generator_advances_once(mesh, x):
    brainstate.random.seed(3)
    run = shard_map(lambda x: x[:, 0] + brainstate.random.normal(size=2), mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    noise = run(x) - x[:, 0]
    assert len(np.unique(np.asarray(noise).round(4))) == 8
    after = brainstate.random.get_key_data()
    brainstate.random.seed(3)
    brainstate.random.normal()
    assert jnp.array_equal(after, brainstate.random.get_key_data())


def test_a_seed_on_all_devices_is_kept(mesh, x):
    """After a draw, as after none."""
    rng, other = brainstate.random.RandomState(0), brainstate.random.RandomState(7)

    def f(x):
        y = rng.normal(size=2) + x[:, 0]
        rng.seed(7)
        return y

    noise = shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"))(x) - x[:, 0]
    assert len(np.unique(np.asarray(noise).round(4))) == 8 and jnp.array_equal(rng.value, other.value)


def test_one_python_run(mesh, x, states):
    runs = []

    def f(x):
        runs.append(0)
        return step(*states)(x)

    run = jit(shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"), state_specs={P("d"): states[1]}))
    run(x)
    assert len(runs) == 1


def test_misuse(mesh, x, states):
    _, h, total = states

    def write(x):
        total.value = x.sum()
        return x

    with pytest.raises(BatchAxisError, match=r"State 'total'.* psum or pmean"):
        shard_map(write, mesh=mesh, in_specs=P("d"), out_specs=P("d"))(x)
    assert total.value == 0.0
    odd = State(jnp.ones(6), name="odd")
    with pytest.raises(StateValueError, match=r"State 'odd' cannot be sharded .* cannot be divided"):
        shard_map(
            lambda x: x + odd.value.sum(), mesh=mesh, in_specs=P("d"), out_specs=P("d"), state_specs={P("d"): odd}
        )(x)
    with pytest.raises(StateValueError, match=r"declares HiddenState 'h' with .*: give one"):
        specs = {P("d"): h, P(): HiddenState}
        shard_map(step(*states), mesh=mesh, in_specs=P("d"), out_specs=P("d"), state_specs=specs)(x)


def test_over_one_axis_of_a_mesh_and_within_over_the_other():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("d", "e"))
    w, count = State(jnp.arange(8.0).reshape(2, 4), name="w"), State(jnp.array(0.0), name="count")

    def block(x):
        w.value = 2 * w.value
        count.value = count.value + jax.lax.psum(1.0, "e")
        return x + w.value

    def row(x):
        specs = {"in_specs": P(None, "e"), "out_specs": P(None, "e"), "state_specs": {P(None, "e"): w}}
        return 10 * shard_map(block, axis_names={"e"}, **specs)(x)

    run = shard_map(row, mesh=mesh, axis_names={"d"}, in_specs=P("d"), out_specs=P("d"), state_specs={P("d"): w})
    out = jit(run)(jnp.ones((2, 4)))
    assert jnp.array_equal(w.value, 2 * jnp.arange(8.0).reshape(2, 4)) and count.value == 2.0
    assert jnp.array_equal(out, 10 * (1 + w.value))


def test_an_axis_that_is_not_mapped():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("d", "e"))
    w = State(jnp.ones(4), name="w")
    for axes, spec in (({"d"}, P("e")), ((), P("q"))):
        with pytest.raises(StateValueError, match=r"State 'w' with .* is none of the axes that are mapped, d"):
            specs = {"in_specs": P("d"), "out_specs": P("d"), "state_specs": {spec: w}}
            shard_map(lambda x: x * w.value.sum(), mesh=mesh, axis_names=axes, **specs)(jnp.ones(4))
