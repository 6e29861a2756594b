"""Train a classifier of handwritten digits with curvature: a dozen steps of damped Newton-CG, hundreds of Adam.

    python examples/newton_cg.py

Each step solves ``(G + damping) move = -gradient`` by conjugate gradients, where ``G`` is the generalised Gauss-Newton
matrix of the loss. The matrix is never made: the solver needs products with it, and `ggn` gives these, the gradient
and the loss from one pass through the model. The damping follows Levenberg and Marquardt: it falls while the quadratic
model foretells the loss well, and grows when it does not.

Adam trains the same network from the same start on the same images, all of them in each step, until its loss is as
low. A Newton step costs more than a step of Adam, one product per iteration of the solver; the seconds tell of both.
"""

import time

import jax
import jax.numpy as jnp
import optax
from jax.scipy.sparse.linalg import cg
from sklearn.datasets import load_digits

import brainstate
from brainstate import transform


class Classifier(brainstate.nn.Module):
    """Two layers: 64 pixels in, one score for each of the ten digits out."""

    def __init__(self):
        super().__init__()
        self.hidden = brainstate.nn.Linear(64, 32)
        self.output = brainstate.nn.Linear(32, 10)

    def update(self, pixels):
        return self.output(jnp.tanh(self.hidden(pixels)))


def cross_entropy(scores, images, labels):
    """Return the mean loss of the scores that a model gives; it is convex in them."""
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def newton(model, iterations=30):
    """Return a step of damped Newton-CG; a step that would raise the loss changes the damping only."""
    params = model.states(brainstate.ParamState)
    damping = brainstate.LongTermState(jnp.array(0.1))
    curvature = transform.ggn(
        lambda images, labels: model(images), cross_entropy, params, return_grad=True, return_value=True
    )

    @transform.jit
    def step(images, labels):
        G, gradient, loss = curvature.operator(images, labels)
        damp, old = damping.value, params.to_dict_values()

        def damped(v):
            return jax.tree.map(lambda product, leaf: product + damp * leaf, G @ v, v)

        downhill = jax.tree.map(jnp.negative, gradient)
        move, _ = cg(damped, downhill, maxiter=iterations)

        params.assign_dict_values(jax.tree.map(jnp.add, old, move))
        new_loss = cross_entropy(model(images), images, labels)
        foretold = G.ravel(move) @ (G.ravel(gradient) + G.ravel(G @ move) / 2)
        fulfilled = (new_loss - loss) / foretold  # both are negative in a good step
        damping.value = damp * jnp.where(fulfilled > 0.75, 1 / 3, jnp.where(fulfilled < 0.25, 3.0, 1.0))

        better = new_loss < loss
        kept = jax.tree.map(lambda new, before: jnp.where(better, new, before), params.to_dict_values(), old)
        params.assign_dict_values(kept)
        return jnp.where(better, new_loss, loss)

    return step


def adam(model, rate=0.1):
    """Return a step of Adam; the rate is the best here of 0.003, 0.01, 0.03 and 0.1."""
    params = model.states(brainstate.ParamState)
    optimiser = optax.adam(rate)
    moments = brainstate.LongTermState(optimiser.init(params.to_dict_values()))

    @transform.jit
    def step(images, labels):
        old = params.to_dict_values()
        gradient = transform.grad(lambda: cross_entropy(model(images), images, labels), params)()
        updates, moments.value = optimiser.update(gradient, moments.value, old)
        params.assign_dict_values(optax.apply_updates(old, updates))
        return cross_entropy(model(images), images, labels)

    return step


def train(make_step, target, limit=2000):
    """Return (steps, seconds) until the loss of the training set is below ``target``."""
    brainstate.random.seed(0)
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.float32(images / 16), jnp.int32(labels)
    step, begin = make_step(Classifier()), time.perf_counter()
    for count in range(1, limit + 1):
        if (loss := float(step(images, labels))) < target:
            seconds = time.perf_counter() - begin
            print(f"{make_step.__name__:<8}{count:>5} steps {seconds:>6.1f} s to a loss of {loss:.2e}")
            return count, seconds
    raise RuntimeError(f"{make_step.__name__} is at a loss of {loss:.2e} after {limit} steps")


def main(target=1e-3):
    """Train with both to the same loss; return the steps that each took."""
    return train(newton, target)[0], train(adam, target)[0]


if __name__ == "__main__":
    main()
