"""JAX's transforms, for functions that read and write States; each under the name that JAX gives it."""

from ._accumulate import accumulate
from ._branches import cond, ifelse, switch
from ._check import check_grads
from ._checkpoint import checkpoint, remat, save_states
from ._coloring import SparsityPattern
from ._counted import associative_scan, fori_loop
from ._curvature import ggn, hvp
from ._custom import custom_jvp, custom_vjp, stop_gradient
from ._derivatives import grad, hessian, jacfwd, jacobian, jacrev, value_and_grad, vector_grad
from ._draws import Estimate
from ._explain import Explanation, explain
from ._finder import StateFinder
from ._fisher import fisher
from ._forward import fwd_grad
from ._functional import functional, substituted
from ._gradient import GradientTransform
from ._higher import laplacian, taylor
from ._implicit import argmin, fixed_point, root
from ._inspect import FoundStates, checkify, eval_shape, make_jaxpr, named_scope
from ._jit import jit
from ._linear import linearize
from ._loops import (
    bounded_while_loop,
    checkpointed_for_loop,
    checkpointed_scan,
    for_loop,
    scan,
    while_loop,
)
from ._operator import LinearOperator
from ._per_example import per_example_grad, per_example_norms
from ._prepare import Prepared, prepare
from ._products import jvp, vjp
from ._progress import ProgressBar
from ._shard_map import shard_map
from ._sparse import hessian_sparsity, jacobian_sparsity, sparse_hessian, sparse_jacobian
from ._tap import tap, taps
from ._vmap import map, vmap, vmap_new_states

__all__ = [
    "Estimate",
    "Explanation",
    "FoundStates",
    "GradientTransform",
    "LinearOperator",
    "Prepared",
    "ProgressBar",
    "SparsityPattern",
    "StateFinder",
    "accumulate",
    "argmin",
    "associative_scan",
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
    "fisher",
    "fixed_point",
    "for_loop",
    "fori_loop",
    "functional",
    "fwd_grad",
    "ggn",
    "grad",
    "hessian",
    "hessian_sparsity",
    "hvp",
    "ifelse",
    "jacfwd",
    "jacobian",
    "jacobian_sparsity",
    "jacrev",
    "jit",
    "jvp",
    "laplacian",
    "linearize",
    "make_jaxpr",
    "map",
    "named_scope",
    "per_example_grad",
    "per_example_norms",
    "prepare",
    "remat",
    "root",
    "save_states",
    "scan",
    "shard_map",
    "sparse_hessian",
    "sparse_jacobian",
    "stop_gradient",
    "substituted",
    "switch",
    "tap",
    "taps",
    "taylor",
    "value_and_grad",
    "vector_grad",
    "vjp",
    "vmap",
    "vmap_new_states",
    "while_loop",
]
