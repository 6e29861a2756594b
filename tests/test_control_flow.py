"""Calls, loops and branches of traced programs: read in one way, and seen alike by everything that reads programs.

A function is wrapped in each kind of call, loop and branch that JAX has. Its traced program is evaluated with the
programs within entered as `control_flow` says; and sparsity, series, `explain`, norms and the search for NaN have to
say of it what they say of the function itself.
"""

import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import linear_call
from jax.experimental import compute_on

from brainstate import NonFiniteError, ParamState
from brainstate import transform as T
from brainstate._program.control_flow import (
    CALLS,
    Call,
    Cond,
    Scan,
    While,
    control_flow,
    find_fixed_point,
    inline_calls,
)
from brainstate._program.interpret import all_equations, bind, interpret
from brainstate._program.liveness import liveness

FACTORS = jnp.array([0.5, -2.0, 3.0])  # which becomes a constant of whatever holds it


def base(x):
    return jnp.sin(x) * jnp.asarray(FACTORS, x.dtype) + jnp.roll(x, 1)[::-1] * x[0]


# ------------------------------------------------------------------------------------------ each kind of each


def with_forward_rule(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return g


def with_backward_rule(f, **options):
    g = jax.custom_vjp(f)
    g.defvjp(lambda *xs: jax.vjp(f, *xs), lambda pull, ct: pull(ct), **options)
    return g


def with_rule_for_vmap(f):
    g = custom_vmap(f)
    g.def_vmap(lambda _, batched, *xs: (jax.vmap(f, [0 if b else None for b in batched])(*xs), True))
    return g


def on_the_host(f):
    place = getattr(compute_on, "compute_on2", compute_on.compute_on)  # the name before JAX 0.12
    return place(f, compute_type="device_host", out_memory_spaces=jax.memory.Space.Device)


def sharded(f):
    return jax.shard_map(f, mesh=jax.make_mesh((1,), ("i",)), in_specs=jax.P(), out_specs=jax.P())


def in_scan(f):
    """The carry is the result of the one iteration, which computes with a constant, a carry and a row."""

    def run(x):
        return jax.lax.scan(lambda c, row: (f(c + row), c[0]), x, jnp.zeros((1, *x.shape), x.dtype))[0]

    return run


def in_reverse_scan(f):
    return lambda x: jax.lax.scan(lambda c, row: (c, f(row)), 0, jnp.stack([x, x + 1]), reverse=True)[1][0]


def in_while(f):
    return lambda x: jax.lax.while_loop(lambda c: c[0] < 1 + 0 * FACTORS[0], lambda c: (c[0] + 1, f(c[1])), (0, x))[1]


WRAPPERS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "custom_jvp": with_forward_rule,
    "custom_vjp": with_backward_rule,
    "custom_vmap": with_rule_for_vmap,
    "compute_on": on_the_host,
    "composite": lambda f: jax.lax.composite(f, "tests.base"),
    "scan": in_scan,
    "scan in reverse": in_reverse_scan,
    "while": in_while,
    "cond": lambda f: lambda x: jax.lax.cond(True, f, f, x),
    "switch": lambda f: lambda x: jax.lax.switch(1, [lambda x: f(x), f, lambda x: f(x)], x),
    "nested": lambda f: jax.jit(in_scan(jax.checkpoint(lambda x: jax.lax.cond(True, jax.jit(f), f, x)))),
}


def linear(x):
    """Has a rule for transposition, a residual, and a constant on either side."""
    return linear_call(lambda r, x: x * r * FACTORS, lambda r, ct: ct * r * FACTORS, FACTORS + 1, x)


def optimized(x):
    """What a custom_vjp whose forward pass may be dropped becomes under reverse mode."""
    return jax.vjp(with_backward_rule(base, optimize_remat=True), x)[0]


def remembered(x):
    """The checkpoint of such a function under reverse mode, which needs the residuals in its backward pass only."""
    rule = with_backward_rule(base, optimize_remat=True)
    return jax.grad(lambda x: jnp.sin(jax.checkpoint(lambda x: jnp.sin(rule(x)))(x)).sum())(x)


PROGRAMS = {**{name: wrap(base) for name, wrap in WRAPPERS.items()}, "linear_call": linear}
PROGRAMS |= {"remat_opt": optimized, "gradient of a checkpoint": remembered, "gradient": jax.grad(lambda x: base(x)[0])}
X = jnp.array([0.3, -0.7, 1.1])


def enter(eqn, values):
    """Evaluate an equation by evaluating the programs within."""
    match control_flow(eqn):
        case Call(body, adds) if adds != "devices":
            return interpret(body.jaxpr, body.consts, values, enter)
        case Cond(branches):
            number, *operands = values
            branch = branches[int(number)]
            return interpret(branch.jaxpr, branch.consts, operands, enter)
        case Scan(body=body) as loop:
            constants, carry, xs = loop.split(values)
            rows = [None] * loop.length
            for i in loop.steps():
                outs = interpret(body.jaxpr, body.consts, [*constants, *carry, *(x[i] for x in xs)], enter)
                carry, rows[i] = outs[: loop.carried], outs[loop.carried :]
            return [*carry, *(jnp.stack(column) for column in zip(*rows, strict=True))]
        case While(test, body) as loop:
            of_test, constants, carry = loop.split(values)
            while interpret(test.jaxpr, test.consts, [*of_test, *carry], enter)[0]:
                carry = interpret(body.jaxpr, body.consts, [*constants, *carry], enter)
            return carry
    return bind(eqn, values)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_within_compute_the_equation(name):
    closed = jax.make_jaxpr(PROGRAMS[name])(X)
    (found,) = interpret(closed.jaxpr, closed.consts, [X], enter)
    np.testing.assert_allclose(found, PROGRAMS[name](X), rtol=1e-6)
    assert name == "gradient" or any(control_flow(eqn) for eqn in all_equations(closed))


def test_a_shard_is_another_program():
    (eqn,) = jax.make_jaxpr(sharded(lambda x: x * 2))(X).eqns
    call = control_flow(eqn)
    assert call.adds == "devices"
    assert len(call.body.jaxpr.invars) == len(eqn.invars) and len(call.body.jaxpr.outvars) == len(eqn.outvars)


def test_every_call_of_the_table_is_met():
    """One name is JAX's before 0.12 and one is that from then on, both for a remat_opt whose residuals are not used."""
    programs = [jax.make_jaxpr(f)(X) for f in (*PROGRAMS.values(), sharded(base))]
    met = {eqn.primitive.name for closed in programs for eqn in all_equations(closed)}
    assert CALLS.keys() - met in ({"closed_call"}, {"eval_jaxpr"})


def test_plain_calls_are_inlined_and_no_others():
    def names(f):
        closed = jax.make_jaxpr(f)(X)
        inlined = inline_calls(closed, [X])
        np.testing.assert_allclose(inlined.eqns and interpret(inlined.jaxpr, inlined.consts, [X], bind)[0], f(X))
        return [eqn.primitive.name for eqn in inlined.eqns if isinstance(control_flow(eqn), Call)]

    assert names(jax.jit(jax.jit(base))) == []
    assert names(jax.jit(jax.checkpoint(base))) == ["remat2"]
    assert names(jax.jit(with_forward_rule(base))) == ["custom_jvp_call"]


def test_a_fixed_point_that_is_not_reached():
    assert find_fixed_point(lambda n: min(n + 1, 5), 0) == 5
    assert find_fixed_point(lambda n: min(n + 1, 5), 0, rounds=6) == 5
    assert find_fixed_point(lambda n: min(n + 1, 5), 0, rounds=5) is None


# ------------------------------------------------------------------------------------------ what results need

LIVE = {
    "jit": (lambda x, y, z: jax.jit(lambda x, y, z: (x * y, z))(x, y, z)[0], [1, 1, 0]),
    "cond": (lambda x, y, z: jax.lax.cond(x > 0, lambda y, z: (y, z), lambda y, z: (1.0, z), y, z)[0], [1, 1, 0]),
    "a carry needs another": (
        lambda x, y, z: jax.lax.scan(lambda c, _: ((c[1], c[2], c[2], c[3]), None), (1.0, x, y, z), length=5)[0][0],
        [1, 1, 0],
    ),
    "a row": (lambda x, y, z: jax.lax.scan(lambda c, r: (c + y, r * z), x, jnp.ones(3))[1], [0, 0, 1]),
    "the end of a while": (
        lambda x, y, z: jax.lax.while_loop(lambda c: c[0] < y, lambda c: (c[0] + 1, c[1] * 2, c[2]), (x, 1.0, z))[1],
        [1, 1, 0],
    ),
}


@pytest.mark.parametrize("name", LIVE)
def test_live_inputs(name):
    f, expected = LIVE[name]
    closed = jax.make_jaxpr(f)(0.5, 1.5, 2.5)
    assert liveness(closed, [True]).inputs == list(map(bool, expected))
    assert liveness(closed, [False]) == ({}, [False] * 3)


# ------------------------------------------------------------------------------------------ all readers alike

# What JAX cannot differentiate is not read. Under shard_map a pattern is dense, and an operation is not named: the body
# sees a part of each array.
# A while loop may run no iteration, and then its result is its input.
BACKWARD = [name for name in WRAPPERS if name not in ("custom_vmap", "composite", "while")]
FORWARD = [name for name in WRAPPERS if name not in ("custom_vjp", "composite")]


@pytest.mark.parametrize("name", sorted({*BACKWARD, *FORWARD} - {"while"}))
def test_sparsity_is_that_of_the_function(name):
    found, expected = (T.jacobian_sparsity(f)(X) for f in (WRAPPERS[name](base), base))
    assert (found.rows.tolist(), found.cols.tolist()) == (expected.rows.tolist(), expected.cols.tolist())
    assert expected.nnz < 9


@pytest.mark.parametrize("name", FORWARD)
def test_series_are_those_of_the_function(name, double):
    x, v = jnp.asarray(X, float), jnp.ones(3)
    found, expected = (T.taylor(f, (x,), (v,), 4) for f in (WRAPPERS[name](base), base))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, expected)


@pytest.mark.parametrize("name", [*BACKWARD, "shard_map"])
def test_explanations_are_those_of_the_function(name):
    wrap = WRAPPERS.get(name, sharded)

    def mixed(x):
        return jnp.array([1.0, 0.0, 0.0]) * x + jnp.round(x)[1] + jax.lax.stop_gradient(x)[2]

    def parts(f):
        """Inputs with a smooth path to the result, by rounding, behind a stop_gradient, and as an integer."""
        return lambda a, b, c, d: f(jnp.stack([a, b, c]))[0] + 0.0 * d.astype(int).astype(d.dtype)

    arguments = [jnp.array(1.5), jnp.array(2.2), jnp.array(0.4), jnp.array(3.0)]
    found, expected = (T.explain(parts(f), *arguments) for f in (wrap(mixed), mixed))
    assert found == expected
    assert T.explain(lambda x: wrap(lambda x: jnp.round(x))(x).sum(), X).rows[0].cause.endswith("argmax path")
    assert (
        T.explain(lambda x: wrap(lambda x: jax.lax.stop_gradient(x))(x).sum(), X).rows[0].cause
        == "behind stop_gradient"
    )


@pytest.mark.parametrize("name", BACKWARD)
def test_norms_are_those_of_the_function(name, double):
    w, xs = ParamState(jnp.arange(18.0).reshape(3, 6) / 10), jnp.stack([X, 2 * X]).astype(float)

    def losses(wrap):
        return lambda x: (wrap(base)(x) @ w.value).sum() ** 2 + wrap(base)(w.value[:, 0]).sum()

    found, expected = (T.per_example_norms(losses(wrap), w)(xs) for wrap in (WRAPPERS[name], lambda f: f))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("name", BACKWARD)
def test_the_line_of_a_nan_is_that_of_the_function(name):
    def broken(x):
        y = x - 2
        return jnp.log(y)  # the line

    lines, first = inspect.getsourcelines(broken)
    line = first + next(i for i, text in enumerate(lines) if "# the line" in text)
    wrapped = WRAPPERS[name](broken)
    with pytest.raises(NonFiniteError) as caught:
        T.grad(lambda x: wrapped(x).sum(), debug_nan=True)(X)
    error = caught.value
    assert (error.line, error.phase, error.primitive) == (line, "forward", "log")


def test_an_unknown_primitive_is_a_single_operation():
    eqn = SimpleNamespace(primitive=SimpleNamespace(name="unknown"), params={})
    assert control_flow(eqn) is None
