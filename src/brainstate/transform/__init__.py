"""JAX's transforms, for functions that read and write States; each under the name that JAX gives it."""

from ._derivatives import grad, hessian, jacfwd, jacobian, jacrev, vector_grad
from ._finder import StateFinder
from ._forward import fwd_grad
from ._gradient import GradientTransform
from ._jit import jit
from ._products import jvp, vjp

__all__ = [
    "GradientTransform",
    "StateFinder",
    "fwd_grad",
    "grad",
    "hessian",
    "jacfwd",
    "jacobian",
    "jacrev",
    "jit",
    "jvp",
    "vector_grad",
    "vjp",
]
