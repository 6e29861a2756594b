"""Train a classifier on handwritten digits with States, `jit(grad)`, dropout and an Optax optimiser.

    make demo          or          python examples/digits.py

prints the accuracy on digits that were held out and the gradient norm of each parameter, and draws the
learning curve and the gradient norms over the epochs into demo/digits.png.

All that changes during training lives in States: the parameters, the moments of the optimiser, and the
generator behind dropout and shuffling. The functions below read and assign them as ordinary Python; `jit`
finds out which ones a function touches and makes them inputs and outputs of the compiled program.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from sklearn.datasets import load_digits
from tqdm import tqdm

import brainstate


class Classifier(brainstate.nn.Module):
    """Two layers with dropout in between: 64 pixels in, one score for each of the ten digits out."""

    def __init__(self):
        super().__init__()
        self.hidden = brainstate.nn.Linear(64, 256)
        self.dropout = brainstate.nn.Dropout(0.3)
        self.output = brainstate.nn.Linear(256, 10)

    def update(self, pixels, train=False):
        features = jax.nn.relu(self.hidden(pixels))
        return self.output(self.dropout(features, train=train))


def load(held_out=389):
    """Return (images, labels) of 22 batches of 64 to train with, and those held out."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = jnp.float32(images[order] / 16), jnp.int32(labels[order])
    return (images[held_out:], labels[held_out:]), (images[:held_out], labels[:held_out])


def main(epochs=30, folder="demo"):
    """Train, print what came out, draw it into ``folder``; return the accuracy and the gradient norms."""
    brainstate.random.seed(0)
    (images, labels), held_out = load()

    model = Classifier()
    params = model.states(brainstate.ParamState)  # {path: State}, sorted by path
    optimiser = optax.adam(optax.cosine_decay_schedule(5e-3, epochs * 22))
    moments = brainstate.LongTermState(optimiser.init(params.to_dict_values()))  # a State holds any pytree

    def loss(x, y, train):
        return optax.softmax_cross_entropy_with_integer_labels(model(x, train=train), y).mean()

    @brainstate.transform.jit
    def step(x, y):
        gradient = brainstate.transform.grad(loss, params, return_value=True)
        grads, value = gradient(x, y, train=True)  # {path: gradient}, as `params`
        old = params.to_dict_values()
        updates, moments.value = optimiser.update(grads, moments.value, old)
        params.assign_dict_values(optax.apply_updates(old, updates))
        return value, jax.tree.map(jnp.linalg.norm, grads)

    @brainstate.transform.jit
    def evaluate(x, y):
        return loss(x, y, train=False), (model(x).argmax(-1) == y).mean()

    history = []
    progress = tqdm(range(epochs), desc="training", unit="epoch")
    for _ in progress:
        batches = brainstate.random.permutation(len(images)).reshape(22, 64)
        steps = [step(images[rows], labels[rows]) for rows in batches]
        train_loss, norms = jax.tree.map(lambda *values: float(np.mean(values)), *steps)
        test_loss, accuracy = map(float, evaluate(*held_out))
        history.append((train_loss, test_loss, norms))
        progress.set_postfix(loss=f"{train_loss:.3f}", accuracy=f"{accuracy:.3f}")

    print(f"Accuracy on {len(held_out[1])} held-out digits: {accuracy:.4f}")
    print("Gradient norm, mean over the last epoch:")
    for path, norm in norms.items():
        print(f"  {'.'.join(path):<15}{norm:.4f}")
    print(f"Drawn in {draw(history, accuracy, Path(folder))}")
    return accuracy, norms


def draw(history, accuracy, folder):
    """Draw the learning curve and the gradient norms over the epochs; return the path of the picture."""
    train, test, norms = zip(*history, strict=True)
    epochs = range(1, len(history) + 1)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, train, label="training (with dropout)")
    left.plot(epochs, test, label="held out")
    left.set(title=f"Loss (held-out accuracy {accuracy:.1%})", ylabel="cross-entropy")
    for layer, kind in norms[0]:
        style = {"hidden": "tab:purple", "output": "tab:green"}[layer], {"weight": "-", "bias": "--"}[kind]
        curve = [norm[layer, kind] for norm in norms]
        right.plot(epochs, curve, color=style[0], linestyle=style[1], label=f"{layer}.{kind}")
    right.set(title="Gradient norm of each parameter", ylabel="norm, mean over the epoch")
    for axes in (left, right):
        axes.set(xlabel="epoch", yscale="log")
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "digits.png", dpi=140)
    return folder / "digits.png"


if __name__ == "__main__":
    main()
