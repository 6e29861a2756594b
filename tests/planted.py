"""Planted errors for `check_grads`: each has to be found, and no right gradient may be taken for a wrong one.

A table of losses, sizes of a State, precisions and seeds; a seed chooses the State, the place and the kind of the
error. ``make planted`` runs 200 seeds of all, which takes hours; ``python tests/planted.py SEEDS [LOSS ...]`` runs a
part of it; `test_faults_derivatives` runs a few seeds.
"""

import os

os.environ.setdefault("NPROC", "32")  # see conftest.py

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from brainstate import GradientCheckError, ParamState
from brainstate.transform import check_grads

SIZES = 1, 2, 3, 10, 30, 100, 300, 1000
FAULTS: dict[str, Callable] = {
    "doubled": lambda g, i: 2 * g,
    "zeroed": lambda g, i: 0 * g,
    "flipped": lambda g, i: -g,
    "one zeroed": lambda g, i: g.at[i].set(0),
    "one doubled": lambda g, i: g.at[i].multiply(2),
    "one flipped": lambda g, i: g.at[i].multiply(-1),
}
LOSSES: dict[str, Callable] = {
    "sum": lambda w: jnp.sum(jnp.sin(w)),
    "mean": lambda w: jnp.mean(w**2),
    "exp": lambda w: jnp.sum(jnp.exp(w)),
    "tiny": lambda w: 1e-4 * jnp.sum(jnp.exp(w)),
    "large": lambda w: 1e4 * jnp.sum(jnp.exp(w)),
    "beside a large number": lambda w: 1e5 + jnp.sum(jnp.sin(w)),
    "vector": lambda w: jnp.tanh(w) * w,
}
RIGHT: dict[str, Callable] = LOSSES | {
    "linear": lambda w: jnp.sum((w * 0.0) ** 3 + w),
    "cancelling": lambda w: jnp.sum(jnp.sin(w) ** 2 + jnp.cos(w) ** 2 - 1),
    "of all": lambda w: jnp.tanh(w * w.sum()),
    "stiff": lambda w: jnp.sum(jnp.tanh(30 * w)) + jnp.sum(jnp.exp(5 * w)),
    "valley": lambda w: jnp.sum(100 * (w[1:] - w[:-1] ** 2) ** 2) + jnp.sum((1 - w) ** 2),
    "normalised": lambda w: jax.nn.log_softmax(10 * w)[0],
    "without a derivative": lambda w: 1e3 + jnp.sum(0.0 * w),
    "half": lambda w: jnp.sum(jnp.sin(w.astype(jnp.bfloat16))),
    "complex": lambda w: 1e3 + jnp.sum((w * jnp.exp(1j * w)) ** 2),
}


def planted(fun: Callable, spoil: Callable) -> Callable:
    """Return ``fun`` with a reverse rule that gives ``spoil(gradient)``."""
    f = jax.custom_vjp(fun)
    f.defvjp(lambda w: (fun(w), w), lambda w, ct: (spoil(jax.vjp(fun, w)[1](ct)[0]),))
    return f


def weights(size: int, seed: int, dtype=jnp.float32) -> ParamState:
    """Return a State with entries of either sign that are not near zero."""
    rng = np.random.default_rng(seed)
    return ParamState(jnp.asarray(rng.choice([-1, 1], size) * rng.uniform(0.3, 1.2, size), dtype))


def is_found(loss: str, size: int, seed: int, float64: bool) -> bool:
    """Tell whether the error that ``seed`` plants is found."""
    fault, place = list(FAULTS.values())[seed % len(FAULTS)], seed * 7919 % size
    f, w = planted(LOSSES[loss], lambda g: fault(g, place)), weights(size, seed)
    try:
        check_grads(lambda: f(w.value), grad_states=w, modes="rev", seed=seed, float64=float64)
    except GradientCheckError as error:
        return str(error).startswith("the reverse derivative")
    return False


def is_acquitted(loss: str, size: int, seed: int, float64: bool) -> bool:
    """Tell whether a right gradient is taken for one."""
    dtype = {"half": jnp.bfloat16, "complex": jnp.complex64}.get(loss, jnp.float32)
    w = weights(size, seed, dtype)
    try:
        check_grads(lambda: RIGHT[loss](w.value), grad_states=w, seed=seed, float64=float64 and loss != "half")
    except GradientCheckError:
        return False
    return True


def table(seeds: int, losses: list[str]) -> int:
    """Print for each loss and precision how many seeds of each size fail, and return how many do."""
    failures = 0
    for name, check, rows in (("found", is_found, LOSSES), ("acquitted", is_acquitted, RIGHT)):
        for loss in (loss for loss in rows if loss in losses):
            for float64 in (False, True):
                failed = [[seed for seed in range(seeds) if not check(loss, size, seed, float64)] for size in SIZES]
                failures += sum(map(len, failed))
                said = [f"{size}: {seeds - len(f)}{f[:3] or ''}" for size, f in zip(SIZES, failed, strict=True)]
                print(f"{name:10}{loss:24}{'float64' if float64 else 'float32'}  {', '.join(said)}", flush=True)
    return failures


if __name__ == "__main__":
    given = sys.argv[1:] or ["200"]
    sys.exit(table(int(given[0]), given[1:] or list(RIGHT)) and "errors were not found, or gradients not acquitted")
