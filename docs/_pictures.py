"""Draw the pictures of ``docs/explanation/derivatives.md``: a sparse Jacobian, and the Hessian of a trained network.

make docs          or          python docs/_pictures.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import brainstate
from brainstate import nn, transform

FOLDER = Path(__file__).parent / "explanation"


def grid(n=6):
    """Return the pattern of a diffusion on n by n cells, as a matrix."""
    u = brainstate.State(jnp.zeros((n, n)))

    def change():
        v = jnp.pad(u.value, 1)
        return jnp.tanh(v[2:, 1:-1] + v[:-2, 1:-1] + v[1:-1, 2:] + v[1:-1, :-2] - 4 * u.value)

    return transform.jacobian_sparsity(change, u)()


def draw_pattern():
    pattern = grid()
    colors = pattern.coloring("column")
    (n, m), count = pattern.shape, pattern.colors("column")
    full, small = np.full((n, m), np.nan), np.full((n, count), np.nan)
    full[pattern.rows, pattern.cols] = colors[pattern.cols]
    small[pattern.rows, colors[pattern.cols]] = colors[pattern.cols]
    figure, axes = plt.subplots(1, 2, figsize=(7, 4.2), width_ratios=(m, count + 6), layout="constrained")
    for ax, matrix, title in zip(axes, (full, small), (f"{n} x {m}", f"{count} products"), strict=True):
        ax.imshow(matrix, cmap="tab10", vmin=0, vmax=9, interpolation="nearest")
        ax.set(title=title, xticks=[], yticks=[])
    figure.savefig(FOLDER / "sparse_jacobian.png", dpi=120)
    plt.close(figure)


def train(steps=400):
    """Return the loss of a small classifier of digits, and its parameters before and after training."""
    data = load_digits()
    images, labels = jnp.asarray(data.data / 16, jnp.float32), jnp.asarray(data.target)
    with brainstate.random.seed_context(0):
        model = nn.Sequential(nn.Linear(64, 16), jnp.tanh, nn.Linear(16, 10))
    params = model.states(brainstate.ParamState)
    optimiser = optax.adam(0.01)
    moments = brainstate.LongTermState(optimiser.init(params.to_dict_values()))

    def loss():
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    @transform.jit
    def fit():
        def step(_):
            value, grads = params.to_dict_values(), transform.grad(loss, params)()
            updates, moments.value = optimiser.update(grads, moments.value)
            params.assign_dict_values(optax.apply_updates(value, updates))

        transform.for_loop(step, jnp.arange(steps))

    return loss, params, fit


def spectrum(loss, params):
    """Return the eigenvalues of the Hessian, the largest first."""
    H = transform.jit(lambda: transform.hvp(loss, params).operator().dense())()
    return np.linalg.eigvalsh(np.asarray(H, np.float64))[::-1]


def draw_spectrum():
    loss, params, fit = train()
    before = spectrum(loss, params)
    fit()
    after = spectrum(loss, params)
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for values, name in ((before, "at the start"), (after, "trained")):
        axes.plot(np.arange(1, len(values) + 1), values, ".", markersize=3, label=name)
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.set(xlabel="eigenvalue number", ylabel="eigenvalue")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(FOLDER / "hessian_spectrum.png", dpi=120)
    plt.close(figure)
    return before, after, float(loss())


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    draw_pattern()
    start, end, value = draw_spectrum()
    for name, values in (("start", start), ("trained", end)):
        print(f"{name}: largest {values[0]:.3g}, tenth {values[9]:.3g}, smallest {values[-1]:.3g},", end=" ")
        print(f"{(np.abs(values) < 1e-3).mean():.0%} below 1e-3 of {len(values)}")
    print(f"loss {value:.3g}")
