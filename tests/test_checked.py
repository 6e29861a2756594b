"""check_grads on the package itself: every public transform and layer, or a reason why there is nothing to check."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from _unchanged import unchanged
from brainstate import BatchState, HiddenState, ParamState, nn
from brainstate import random as R
from brainstate import transform as T
from brainstate.transform import check_grads

# ------------------------------------------------------------------------------------------ programs


def wave(s):
    """Return a smooth function of an array that reads the State."""
    return lambda x: jnp.sin(s.value * x)


def total(s):
    return lambda x: jnp.sum(jnp.sin(s.value * x) + s.value**2)


def parts(x):
    """Return something to loop over, which depends on ``x``."""
    return x * jnp.linspace(0.5, 1.0, 4, dtype=x.dtype)


def body(s):
    """Return a step of a loop that carries a number and writes the State."""

    def step(carry, k):
        s.value = jnp.sin(s.value * k + carry)
        return carry * 0.9, jnp.sum(s.value)

    return step


def entry(s):
    """Return a function for one entry of a loop, which writes the State."""

    def step(k):
        s.value = jnp.sin(s.value * k)
        return jnp.sum(s.value)

    return step


def ruled_vjp(s, x):
    f = T.custom_vjp(lambda x: s.value * x, states=s)
    f.defvjp(lambda v, x: (v * x, (v, x)), lambda kept, ct: (ct * kept[1], jnp.sum(ct * kept[0])))
    return f(x)


def ruled_jvp(s, x):
    f = T.custom_jvp(lambda x: s.value * x, states=s)
    f.defjvp(lambda p, t: (p[0] * p[1], t[0] * p[1] + p[0] * t[1]))
    return f(x)


def tripled(fun, *, argnums, has_aux):
    base = jax.grad(fun, argnums=argnums, has_aux=has_aux)

    def wrapped(*args):
        gradient, aux = base(*args)
        return jax.tree.map(lambda g: 3 * g, gradient), aux

    return wrapped


def sharded(s, x):
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    run = T.shard_map(lambda x: jax.lax.psum(wave(s)(x[0]), "d"), mesh=mesh, in_specs=P("d"), out_specs=P())
    return run(parts(x)[:2])


def grown(s, x):
    """A map that makes a State."""
    made = []

    def lane(k):
        made.append(HiddenState(wave(s)(k)))
        return jnp.sum(made[0].value) * k

    return T.vmap_new_states(lane)(parts(x))


def listened(s, x):
    with T.taps():
        return T.tap("h", wave(s)(x)) ** 2


def found(s, x):
    states = T.StateFinder(total(s), return_type="list")(x)
    return T.grad(total(s), states)(x)[0]


def operated(s, x):
    return T.hvp(total(s), s).operator(x) @ s.value


def scoped(s, x):
    with T.named_scope("part"):
        return wave(s)(x)


def spiral(s, x):
    """Return the arguments of a while loop that takes three steps."""

    def step(carry):
        n, y = carry
        return n + 1, jnp.sin(s.value * y + y)

    return lambda carry: carry[0] < 3, step, (0, x * s.value)


def target(s, x):
    return jnp.tanh(s.value * x)


# name of a public transform: a program of a State and a number that uses it
PROGRAMS = {
    "LinearOperator": operated,
    "GradientTransform": lambda s, x: T.GradientTransform(total(s), tripled, s)(x),
    "StateFinder": found,
    "accumulate": lambda s, x: T.accumulate(T.grad(lambda k: jnp.mean(jnp.sin(k)) * jnp.sum(s.value**3), s), 2)(
        parts(x)
    ),
    "argmin": lambda s, x: T.argmin(lambda y: jnp.sum(jnp.cosh(y - target(s, x)) + y**2), jnp.zeros(3, x.dtype)),
    "associative_scan": lambda s, x: T.associative_scan(lambda a, b: a + s.value[0] * a * b + b, parts(x)),
    "bounded_while_loop": lambda s, x: T.bounded_while_loop(*spiral(s, x), max_steps=4)[1],
    "checkify": lambda s, x: T.checkify(wave(s))(x)[1],
    "checkpoint": lambda s, x: T.checkpoint(lambda x: wave(s)(x) ** 2 * x)(x),
    "checkpointed_for_loop": lambda s, x: T.checkpointed_for_loop(entry(s), parts(x)),
    "checkpointed_scan": lambda s, x: T.checkpointed_scan(body(s), x, parts(x)),
    "cond": lambda s, x: T.cond(x > 0, wave(s), lambda x: s.value, x),
    "custom_jvp": ruled_jvp,
    "custom_vjp": ruled_vjp,
    "fisher": lambda s, x: T.fisher(lambda k: wave(s)(k)[None], "bernoulli", s)(s.value, x),
    "fixed_point": lambda s, x: T.fixed_point(lambda y: 0.5 * jnp.cos(y) + target(s, x), jnp.zeros(3, x.dtype)),
    "for_loop": lambda s, x: T.for_loop(entry(s), parts(x)),
    "fori_loop": lambda s, x: T.fori_loop(0, 3, lambda i, y: jnp.sin(s.value * y + y), x * s.value),
    "fwd_grad": lambda s, x: T.fwd_grad(total(s), s, 0, key=0)(x),
    "ggn": lambda s, x: T.ggn(wave(s), lambda out, x: jnp.sum(jnp.cosh(out)), s)(s.value, x),
    "grad": lambda s, x: T.grad(total(s), s, argnums=0)(x),
    "hessian": lambda s, x: T.hessian(total(s), s, argnums=0)(x),
    "hvp": lambda s, x: T.hvp(total(s), s)(s.value, x),
    "ifelse": lambda s, x: T.ifelse([x < 0, x >= 0], [lambda x: s.value, wave(s)], x),
    "jacfwd": lambda s, x: T.jacfwd(wave(s), s)(x),
    "jacobian": lambda s, x: T.jacobian(wave(s), s, chunk_size=2)(x),
    "jacrev": lambda s, x: T.jacrev(wave(s), s, 0)(x),
    "jit": lambda s, x: T.jit(wave(s))(x),
    "jvp": lambda s, x: T.jvp(wave(s), (x,), (x**2,), grad_states=s, state_tangents=s.value**2),
    "laplacian": lambda s, x: T.laplacian(total(s), s)(x),
    "linearize": lambda s, x: T.linearize(wave(s), x, grad_states=s, argnums=0)[1]((s.value, x)),
    "map": lambda s, x: T.map(wave(s), parts(x)),
    "named_scope": scoped,
    "per_example_grad": lambda s, x: T.per_example_grad(total(s), s)(parts(x)),
    "per_example_norms": lambda s, x: T.per_example_norms(total(s), s)(parts(x)),
    "remat": lambda s, x: T.remat(lambda x: wave(s)(x) ** 2)(x),
    "root": lambda s, x: T.root(lambda y: y**3 + y - target(s, x), jnp.zeros(3, x.dtype)),
    "save_states": lambda s, x: T.checkpoint(entry(s), policy=T.save_states(ParamState))(x),
    "scan": lambda s, x: T.scan(body(s), x, parts(x)),
    "shard_map": sharded,
    "sparse_hessian": lambda s, x: T.sparse_hessian(total(s), s, dense=True)(x),
    "sparse_jacobian": lambda s, x: T.sparse_jacobian(wave(s), s, dense=True)(x),
    "stop_gradient": lambda s, x: wave(s)(x) * T.stop_gradient(lambda: x**2, s)(),
    "switch": lambda s, x: T.switch(1, [lambda x: s.value, wave(s)], x),
    "tap": lambda s, x: T.tap("h", wave(s)(x)) ** 2,
    "taps": listened,
    "taylor": lambda s, x: T.taylor(wave(s), (x,), (x**2,), 2, grad_states=s, state_directions=s.value),
    "value_and_grad": lambda s, x: T.value_and_grad(total(s), s, 0)(x),
    "vector_grad": lambda s, x: T.vector_grad(wave(s), s, 0)(x),
    "vjp": lambda s, x: T.vjp(wave(s), x, grad_states=s)[1](s.value),
    "vmap": lambda s, x: T.vmap(wave(s))(parts(x)),
    "vmap_new_states": grown,
    "while_loop": lambda s, x: T.while_loop(*spiral(s, x))[1],
}
# What differs from the rule: all others are checked in both modes, with the step and tolerance of the check.
OPTIONS = {
    "argmin": {"eps": 1e-3, "atol": 1e-4, "rtol": 1e-4},  # a minimiser is found to half of the digits only
    "custom_vjp": {"modes": "rev"},
    "while_loop": {"modes": "fwd"},
}

# name of anything else that is public: why no derivative goes through it
NO_DERIVATIVE = {
    "Estimate": "a result: two numbers",
    "Explanation": "a report",
    "FoundStates": "names the States of a jaxpr",
    "Prepared": "a compiled program: it is prepared for a derivative, and has none",
    "ProgressBar": "shows, and computes nothing",
    "SparsityPattern": "a result: positions",
    "check_grads": "this check itself; it looks at numbers, outside of transforms",
    "eval_shape": "shapes only",
    "explain": "a report, made outside of transforms",
    "functional": "a function as a pure one, for JAX's own derivatives: tests/test_faults_border.py",
    "hessian_sparsity": "positions, which are no floats",
    "jacobian_sparsity": "positions, which are no floats",
    "make_jaxpr": "a program as text",
    "prepare": "see Prepared",
    "substituted": "a block on other values: tests/test_faults_border.py",
}


@pytest.fixture
def s():
    return ParamState(jnp.array([0.6, -1.2, 0.3]), name="s")


@pytest.mark.parametrize("name", PROGRAMS)
def test_transforms(s, name):
    """Compiled, since each is called two dozen times."""
    run, options = T.jit(lambda x: PROGRAMS[name](s, x)), OPTIONS.get(name, {})
    with unchanged(s, R.DEFAULT):
        check_grads(run, jnp.float32(0.8), grad_states=s, argnums=0, float64=True, **options)


def missing_and_unknown(public, *tables):
    """Return which public names no table has, and which entries are no public names or stand twice."""
    listed = [name for table in tables for name in table]
    return set(public) - set(listed), {name for name in listed if name not in public or listed.count(name) > 1}


def test_every_public_transform_is_checked():
    assert missing_and_unknown(T.__all__, PROGRAMS, NO_DERIVATIVE) == (set(), set())


def test_the_comparison_can_fail():
    assert missing_and_unknown(["a", "b"], {"b": 0, "c": 0}, {"b": 0}) == ({"a"}, {"b", "c"})


# ------------------------------------------------------------------------------------------ layers


class Net(nn.Module):
    """What a layer looks like that is the user's own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), jnp.tanh, nn.Dropout(0.4), nn.Linear(4, 2, b_init=jnp.ones))
        self.mean = BatchState(jnp.zeros(2))

    def update(self, x):
        y = self.layers(x)
        self.mean.value = 0.9 * self.mean.value + 0.1 * y.mean(0)
        return y


LAYERS = {
    "Dropout": lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.4)),
    "Linear": lambda: nn.Linear(3, 4),
    "Module": Net,
    "Sequential": lambda: nn.Sequential(nn.Linear(3, 4), jnp.tanh, nn.Linear(4, 2)),
}


@pytest.mark.parametrize(
    ("name", "compiled", "order"),
    [*((name, False, 1) for name in LAYERS), pytest.param("Module", True, 2, marks=pytest.mark.long)],
)
def test_layers(name, compiled, order):
    layer, x = LAYERS[name](), jnp.sin(jnp.arange(6.0)).reshape(2, 3)
    with unchanged(*layer.states().values(), R.DEFAULT), jax.numpy_dtype_promotion("standard"):
        check_grads(T.jit(layer) if compiled else layer, x, grad_states=layer, argnums=0, order=order, float64=True)


def test_every_public_layer_is_checked():
    assert missing_and_unknown(nn.__all__, LAYERS) == (set(), set())
