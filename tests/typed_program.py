"""A user's program that pyright and mypy check (``make check``); each ignored line is an error that they must find.

Both fail on an ignore comment that hides nothing, so a wrong call that is no longer found fails as well.
"""

from typing import Any, NamedTuple, assert_type

import jax
import jax.numpy as jnp

import brainstate as bst
from brainstate import ParamState, State, nn, random
from brainstate.transform import (
    LinearOperator,
    checkpoint,
    cond,
    for_loop,
    grad,
    jit,
    linearize,
    scan,
    stop_gradient,
    value_and_grad,
    vjp,
    vmap,
)


class Batch(NamedTuple):
    x: jax.Array
    y: jax.Array


class Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = ParamState(random.normal(size=(width,)))
        self.steps = State(0)

    @jit
    def predict(self, x: jax.Array, *, bias: float = 0.0) -> jax.Array:
        self.steps.value += 1
        return x @ self.weight.value + bias


model = Model(3)
assert_type(model.weight, ParamState[jax.Array])
assert_type(model.weight.value, jax.Array)
assert_type(model.steps.value, int)
assert_type(model.states(), bst.graph.FlattedDict[State[Any]])
assert_type(model.states(ParamState)[("weight",)], ParamState[Any])
assert_type(random.uniform(size=(4, 3)), jax.Array)
batch = Batch(random.normal(size=(4, 3)), jnp.zeros(4))
assert_type(model.predict(batch.x, bias=1.0), jax.Array)


def loss(batch: Batch) -> jax.Array:
    return ((model.predict(batch.x) - batch.y) ** 2).mean()


def loss_and_count(batch: Batch) -> tuple[jax.Array, int]:
    return loss(batch), len(batch.y)


@jit(donate_states=True)
def step(batch: Batch, rate: float = 0.1) -> jax.Array:
    gradients, value = grad(loss, model.states(ParamState), return_value=True)(batch)
    for path, state in model.states(ParamState).items():
        state.value = state.value - rate * gradients[path]
    return value


assert_type(step(batch, rate=0.2), jax.Array)
assert_type(grad(loss, model)(batch), Any)
assert_type(grad(loss_and_count, model, has_aux=True)(batch), tuple[Any, int])
assert_type(grad(loss_and_count, model, has_aux=True, return_value=True)(batch), tuple[Any, jax.Array, int])
assert_type(value_and_grad(loss, model)(batch), tuple[jax.Array, Any])
assert_type(linearize(loss, batch, grad_states=model)[1], LinearOperator)
assert_type(vjp(loss, batch)[0], jax.Array)
assert_type(vmap(stop_gradient(checkpoint(loss)))(batch), jax.Array)
assert_type(scan(lambda total, x: (total + x.sum(), x), jnp.zeros(()), batch.x), tuple[jax.Array, jax.Array])
assert_type(for_loop(jnp.sum, batch.x), jax.Array)
assert_type(cond(True, lambda: 1.0, lambda: 2.0), float)


def wrong() -> None:
    model.predict(batch.x, bias="wrong")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    step(batch.x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    step(batch, speed=0.1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    step()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    grad(loss, model)(3.0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    grad(loss, model, has_ax=True)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    model.weight.value = "text"  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
