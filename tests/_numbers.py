"""Numbers for tests that compare in float64."""

import jax.numpy as jnp
import numpy as np


def numbers(seed, *shape):
    """Return normal numbers of this shape."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))
