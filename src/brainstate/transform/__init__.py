"""JAX's transforms, for functions that read and write States; each under the name that JAX gives it.

The rooms, in the order in which to read them: `_control` (loops, branches, maps), `_compile`, `_first_order` (with
`_nonfinite`, which serves ``debug_nan``), `_batches`, `_second_order`, `_sparse`, `_diagnosis`.
"""

from ._batches.accumulate import accumulate
from ._batches.per_example import per_example_grad, per_example_norms
from ._compile.ahead import Prepared
from ._compile.inspect import FoundStates, eval_shape, make_jaxpr, named_scope
from ._compile.jit import jit
from ._compile.prepare import prepare
from ._compile.state_finder import StateFinder
from ._control.branches import cond, ifelse, switch
from ._control.checkify import checkify
from ._control.checkpoint import checkpoint, remat, save_states
from ._control.counted import associative_scan, fori_loop
from ._control.loops import (
    bounded_while_loop,
    checkpointed_for_loop,
    checkpointed_scan,
    for_loop,
    scan,
    while_loop,
)
from ._control.progress import ProgressBar
from ._control.shard_map import shard_map
from ._control.vmap import map, vmap, vmap_new_states
from ._diagnosis.check_grads import check_grads
from ._diagnosis.explain import Explanation, explain
from ._first_order.custom_rules import custom_jvp, custom_vjp
from ._first_order.forward_gradient import fwd_grad
from ._first_order.functional import functional, substituted
from ._first_order.gradient_transform import GradientTransform
from ._first_order.gradients import grad, hessian, jacfwd, jacobian, jacrev, value_and_grad, vector_grad
from ._first_order.implicit import argmin, fixed_point, root
from ._first_order.stop_gradient import stop_gradient
from ._first_order.vjp_jvp import jvp, vjp
from ._random_keys import Estimate
from ._second_order.fisher import fisher
from ._second_order.hvp_ggn import ggn, hvp
from ._second_order.laplacian import laplacian
from ._second_order.linear_operator import LinearOperator
from ._second_order.linearize import linearize
from ._second_order.taylor import taylor
from ._sparse.pattern import SparsityPattern
from ._sparse.transforms import hessian_sparsity, jacobian_sparsity, sparse_hessian, sparse_jacobian
from ._tap import tap, taps

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
