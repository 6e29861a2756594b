"""JAX's transforms, for functions that read and write States; each under the name that JAX gives it."""

from ._accumulate import accumulate
from ._branches import cond, ifelse, switch
from ._check import check_grads
from ._checkpoint import checkpoint, remat, save_states
from ._custom import custom_jvp, custom_vjp, stop_gradient
from ._derivatives import grad, hessian, jacfwd, jacobian, jacrev, vector_grad
from ._explain import Explanation, explain
from ._finder import StateFinder
from ._forward import fwd_grad
from ._gradient import GradientTransform
from ._implicit import argmin, fixed_point, root
from ._inspect import FoundStates, checkify, eval_shape, make_jaxpr, named_scope
from ._jit import jit
from ._loops import (
    bounded_while_loop,
    checkpointed_for_loop,
    checkpointed_scan,
    for_loop,
    scan,
    while_loop,
)
from ._products import jvp, vjp
from ._progress import ProgressBar
from ._shard_map import shard_map
from ._vmap import map, vmap, vmap_new_states

__all__ = [
    "Explanation",
    "FoundStates",
    "GradientTransform",
    "ProgressBar",
    "StateFinder",
    "accumulate",
    "argmin",
    "bounded_while_loop",
    "check_grads",
    "checkify",
    "checkpoint",
    "checkpointed_for_loop",
    "checkpointed_scan",
    "cond",
    "custom_jvp",
    "custom_vjp",
    "eval_shape",
    "explain",
    "fixed_point",
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
    "make_jaxpr",
    "map",
    "named_scope",
    "remat",
    "root",
    "save_states",
    "scan",
    "shard_map",
    "stop_gradient",
    "switch",
    "vector_grad",
    "vjp",
    "vmap",
    "vmap_new_states",
    "while_loop",
]
