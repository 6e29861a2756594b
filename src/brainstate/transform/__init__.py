"""JAX's transforms, for functions that read and write States; each under the name that JAX gives it."""

from ._branches import cond, ifelse, switch
from ._checkpoint import checkpoint, remat, save_states
from ._custom import custom_jvp, custom_vjp, stop_gradient
from ._derivatives import grad, hessian, jacfwd, jacobian, jacrev, vector_grad
from ._finder import StateFinder
from ._forward import fwd_grad
from ._gradient import GradientTransform
from ._higher import Estimate, laplacian, taylor
from ._inspect import FoundStates, checkify, eval_shape, make_jaxpr
from ._jit import jit
from ._loops import (
    bounded_while_loop,
    checkpointed_for_loop,
    checkpointed_scan,
    for_loop,
    scan,
    while_loop,
)
from ._per_example import per_example_grad, per_example_norms
from ._products import jvp, vjp
from ._progress import ProgressBar
from ._shard_map import shard_map
from ._vmap import map, vmap, vmap_new_states

__all__ = [
    "Estimate",
    "FoundStates",
    "GradientTransform",
    "ProgressBar",
    "StateFinder",
    "bounded_while_loop",
    "checkify",
    "checkpoint",
    "checkpointed_for_loop",
    "checkpointed_scan",
    "cond",
    "custom_jvp",
    "custom_vjp",
    "eval_shape",
    "for_loop",
    "fwd_grad",
    "grad",
    "hessian",
    "ifelse",
    "jacfwd",
    "jacobian",
    "jacrev",
    "jit",
    "jvp",
    "laplacian",
    "make_jaxpr",
    "map",
    "per_example_grad",
    "per_example_norms",
    "remat",
    "save_states",
    "scan",
    "shard_map",
    "stop_gradient",
    "switch",
    "taylor",
    "vector_grad",
    "vjp",
    "vmap",
    "vmap_new_states",
    "while_loop",
]
