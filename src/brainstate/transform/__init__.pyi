"""The types of the public functions, for type checkers and editors; the functions themselves are in the rooms.

A transform keeps the parameters of the function it is given (``P``) and says what it returns: ``R`` what the function
returned, ``A`` its auxiliary data. A derivative itself has the structure of the table in `GradientTransform`, which
types cannot express: it is ``Any``.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import (
    Any,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    Self,
    TypedDict,
    TypeVar,
    Unpack,
    overload,
    type_check_only,
)

import jax
from jax import named_scope as named_scope
from jax.experimental.checkify import Error
from jax.extend.core import ClosedJaxpr

from ._compile.ahead import Cost, Memory
from ._compile.inspect import FoundStates as FoundStates
from ._compile.retraces import Retraces
from ._compile.state_finder import StateFinder as StateFinder
from ._control.checkpoint import save_states as save_states
from ._control.progress import ProgressBar as ProgressBar
from ._diagnosis.explain import Explanation as Explanation
from ._random_keys import Estimate as Estimate
from ._second_order.linear_operator import LinearOperator as LinearOperator
from ._sparse.pattern import SparsityPattern as SparsityPattern
from ._tap import taps as taps

P = ParamSpec("P")
Q = ParamSpec("Q")
A = TypeVar("A")
C = TypeVar("C")
R = TypeVar("R")
S = TypeVar("S")
X = TypeVar("X")

_Argnums = int | Sequence[int] | None
_Bar = ProgressBar | int | None

# --------------------------------------------------------------------------------------- what transforms return

@type_check_only
class _Function(Generic[P, R]):
    __wrapped__: Callable[P, R]
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(self: _Function[Concatenate[S, Q], R], instance: S, owner: type | None = None) -> _Function[Q, R]: ...

@type_check_only
class _Jit(_Function[P, R]):
    def lower(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...
    def trace(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...
    def eval_shape(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...
    def clear_cache(self) -> None: ...
    def retraces(self) -> Retraces: ...
    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(self: _Jit[Concatenate[S, Q], R], instance: S, owner: type | None = None) -> _Jit[Q, R]: ...

@type_check_only
class _Product(_Function[P, R]):
    def operator(self, *args: Any, **kwargs: Any) -> Any: ...

@type_check_only
class _CustomVJP(_Function[P, R]):
    def defvjp(
        self,
        fwd: Callable[..., tuple[R, Any]],
        bwd: Callable[..., Any],
        symbolic_zeros: bool = False,
        optimize_remat: bool = False,
    ) -> None: ...

@type_check_only
class _CustomJVP(_Function[P, R]):
    def defjvp(self, rule: Callable[..., Any], symbolic_zeros: bool = False) -> Callable[..., Any]: ...
    def defjvps(self, *rules: Callable[..., Any] | None) -> None: ...

class GradientTransform(_Function[P, R]):
    def __init__(
        self,
        target: Callable[P, Any],
        transform: Callable[..., Any],
        grad_states: Any = None,
        argnums: _Argnums = None,
        return_value: bool = False,
        has_aux: bool | None = False,
        transform_params: dict[str, Any] | None = None,
        check_states: bool = True,
        debug_nan: bool = False,
    ) -> None: ...
    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(
        self: GradientTransform[Concatenate[S, Q], R], instance: S, owner: type | None = None
    ) -> GradientTransform[Q, R]: ...

class Prepared(_Function[P, R]):
    @property
    def cost(self) -> Cost | None: ...
    @property
    def memory(self) -> Memory | None: ...
    def as_text(self, stage: Literal["jaxpr", "stablehlo", "hlo"] = "hlo") -> str: ...

# --------------------------------------------------------------------------------------- compilation

@type_check_only
class _JitOptions(TypedDict, total=False):
    donate_states: bool
    in_shardings: Any
    out_shardings: Any
    static_argnums: int | Sequence[int] | None
    static_argnames: str | Sequence[str] | None
    donate_argnums: int | Sequence[int] | None
    donate_argnames: str | Sequence[str] | None
    keep_unused: bool
    device: Any
    backend: str | None
    inline: bool
    compiler_options: dict[str, Any] | None

@overload
def jit(fun: Callable[P, R], /, **options: Unpack[_JitOptions]) -> _Jit[P, R]: ...
@overload
def jit(fun: None = None, /, **options: Unpack[_JitOptions]) -> Callable[[Callable[P, R]], _Jit[P, R]]: ...
@overload
def prepare(transform: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Prepared[P, R]: ...
@overload
def prepare(transform: Callable[..., R], /, *args: Any, donate_states: bool, **kwargs: Any) -> Prepared[..., R]: ...
def eval_shape(f: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R: ...
@overload
def make_jaxpr(
    fun: Callable[P, Any], *, return_shape: Literal[False] = False
) -> Callable[P, tuple[ClosedJaxpr, FoundStates]]: ...
@overload
def make_jaxpr(
    fun: Callable[P, R], *, return_shape: Literal[True]
) -> Callable[P, tuple[ClosedJaxpr, FoundStates, R]]: ...

# --------------------------------------------------------------------------------------- control flow and maps

def cond(pred: Any, true_fun: Callable[..., R], false_fun: Callable[..., R], *operands: Any) -> R: ...
def ifelse(
    conditions: Sequence[Any], branches: Sequence[Callable[..., R]], *operands: Any, check_cond: bool = True
) -> R: ...
def switch(index: Any, branches: Sequence[Callable[..., R]], *operands: Any) -> R: ...
def scan(
    f: Callable[[C, X], tuple[C, R]],
    init: C,
    xs: X = ...,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    pbar: _Bar = None,
) -> tuple[C, R]: ...
def checkpointed_scan(
    f: Callable[[C, X], tuple[C, R]],
    init: C,
    xs: X = ...,
    length: int | None = None,
    *,
    base: int = 16,
    pbar: _Bar = None,
) -> tuple[C, R]: ...
def for_loop(
    f: Callable[..., R],
    *xs: Any,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    pbar: _Bar = None,
) -> R: ...
def checkpointed_for_loop(
    f: Callable[..., R], *xs: Any, length: int | None = None, base: int = 16, pbar: _Bar = None
) -> R: ...
def while_loop(cond_fun: Callable[[C], Any], body_fun: Callable[[C], C], init_val: C) -> C: ...
def bounded_while_loop(
    cond_fun: Callable[[C], Any], body_fun: Callable[[C], C], init_val: C, *, max_steps: int, base: int = 16
) -> C: ...
def fori_loop(
    lower: Any, upper: Any, body_fun: Callable[[Any, C], C], init_val: C, *, unroll: int | bool | None = None
) -> C: ...
def associative_scan(fn: Callable[[C, C], C], elems: C, reverse: bool = False, axis: int = 0) -> C: ...
def map(f: Callable[..., R], *xs: Any, batch_size: int | None = None) -> R: ...

@type_check_only
class _CheckpointOptions(TypedDict, total=False):
    prevent_cse: bool | tuple[bool, ...]
    policy: Any
    static_argnums: int | tuple[int, ...]
    static_argnames: str | tuple[str, ...]

@overload
def checkpoint(fun: Callable[P, R], **options: Unpack[_CheckpointOptions]) -> _Function[P, R]: ...
@overload
def checkpoint(
    fun: None = None, **options: Unpack[_CheckpointOptions]
) -> Callable[[Callable[P, R]], _Function[P, R]]: ...

remat = checkpoint

@type_check_only
class _MapOptions(TypedDict, total=False):
    in_axes: Any
    out_axes: Any
    axis_name: Any
    axis_size: int | None
    spmd_axis_name: Any
    in_states: Any
    out_states: Any

@overload
def vmap(
    fn: Callable[P, R],
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_name: Any = None,
    axis_size: int | None = None,
    spmd_axis_name: Any = None,
    *,
    in_states: Any = None,
    out_states: Any = None,
) -> _Function[P, R]: ...
@overload
def vmap(fn: None = None, **options: Unpack[_MapOptions]) -> Callable[[Callable[P, R]], _Function[P, R]]: ...
@overload
def vmap_new_states(fn: Callable[P, R], *, axis: int = 0, **options: Unpack[_MapOptions]) -> _Function[P, R]: ...
@overload
def vmap_new_states(
    fn: None = None, *, axis: int = 0, **options: Unpack[_MapOptions]
) -> Callable[[Callable[P, R]], _Function[P, R]]: ...
def shard_map(
    f: Callable[P, R],
    *,
    mesh: jax.sharding.Mesh | None = None,
    in_specs: Any,
    out_specs: Any,
    state_specs: dict[jax.sharding.PartitionSpec, Any] | None = None,
    axis_names: frozenset[str] | set[str] = ...,
    check_vma: bool = True,
) -> _Function[P, R]: ...
def checkify(fun: Callable[P, R], errors: Any = ...) -> _Function[P, tuple[Error, R]]: ...

# --------------------------------------------------------------------------------------- derivatives

@type_check_only
class _Options(TypedDict, total=False):
    check_states: bool
    debug_nan: bool

@overload
def vector_grad(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[False] = False,
    **options: Unpack[_Options],
) -> GradientTransform[P, Any]: ...
@overload
def vector_grad(
    fun: Callable[P, tuple[Any, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[False] = False,
    **options: Unpack[_Options],
) -> GradientTransform[P, tuple[Any, A]]: ...
@overload
def vector_grad(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[True],
    **options: Unpack[_Options],
) -> GradientTransform[P, tuple[Any, R]]: ...
@overload
def vector_grad(
    fun: Callable[P, tuple[R, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[True],
    **options: Unpack[_Options],
) -> GradientTransform[P, tuple[Any, R, A]]: ...
@overload
def vector_grad(
    fun: None = None,
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: bool | None = False,
    return_value: bool = False,
    **options: Unpack[_Options],
) -> Callable[[Callable[P, Any]], GradientTransform[P, Any]]: ...

@type_check_only
class _GradOptions(_Options, total=False):
    holomorphic: bool
    allow_int: bool

@overload
def grad(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[False] = False,
    **options: Unpack[_GradOptions],
) -> GradientTransform[P, Any]: ...
@overload
def grad(
    fun: Callable[P, tuple[Any, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[False] = False,
    **options: Unpack[_GradOptions],
) -> GradientTransform[P, tuple[Any, A]]: ...
@overload
def grad(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[True],
    **options: Unpack[_GradOptions],
) -> GradientTransform[P, tuple[Any, R]]: ...
@overload
def grad(
    fun: Callable[P, tuple[R, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[True],
    **options: Unpack[_GradOptions],
) -> GradientTransform[P, tuple[Any, R, A]]: ...
@overload
def grad(
    fun: None = None,
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: bool | None = False,
    return_value: bool = False,
    **options: Unpack[_GradOptions],
) -> Callable[[Callable[P, Any]], GradientTransform[P, Any]]: ...
@overload
def value_and_grad(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    **options: Unpack[_GradOptions],
) -> GradientTransform[P, tuple[R, Any]]: ...
@overload
def value_and_grad(
    fun: Callable[P, tuple[R, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    **options: Unpack[_GradOptions],
) -> GradientTransform[P, tuple[tuple[R, A], Any]]: ...
@overload
def value_and_grad(
    fun: None = None,
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: bool | None = False,
    **options: Unpack[_GradOptions],
) -> Callable[[Callable[P, Any]], GradientTransform[P, Any]]: ...

@type_check_only
class _JacfwdOptions(_Options, total=False):
    holomorphic: bool
    chunk_size: int | None

@overload
def jacfwd(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[False] = False,
    **options: Unpack[_JacfwdOptions],
) -> GradientTransform[P, Any]: ...
@overload
def jacfwd(
    fun: Callable[P, tuple[Any, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[False] = False,
    **options: Unpack[_JacfwdOptions],
) -> GradientTransform[P, tuple[Any, A]]: ...
@overload
def jacfwd(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[True],
    **options: Unpack[_JacfwdOptions],
) -> GradientTransform[P, tuple[Any, R]]: ...
@overload
def jacfwd(
    fun: Callable[P, tuple[R, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[True],
    **options: Unpack[_JacfwdOptions],
) -> GradientTransform[P, tuple[Any, R, A]]: ...
@overload
def jacfwd(
    fun: None = None,
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: bool | None = False,
    return_value: bool = False,
    **options: Unpack[_JacfwdOptions],
) -> Callable[[Callable[P, Any]], GradientTransform[P, Any]]: ...
@overload
def hessian(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[False] = False,
    **options: Unpack[_JacfwdOptions],
) -> GradientTransform[P, Any]: ...
@overload
def hessian(
    fun: Callable[P, tuple[Any, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[False] = False,
    **options: Unpack[_JacfwdOptions],
) -> GradientTransform[P, tuple[Any, A]]: ...
@overload
def hessian(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[True],
    **options: Unpack[_JacfwdOptions],
) -> GradientTransform[P, tuple[Any, R]]: ...
@overload
def hessian(
    fun: Callable[P, tuple[R, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[True],
    **options: Unpack[_JacfwdOptions],
) -> GradientTransform[P, tuple[Any, R, A]]: ...
@overload
def hessian(
    fun: None = None,
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: bool | None = False,
    return_value: bool = False,
    **options: Unpack[_JacfwdOptions],
) -> Callable[[Callable[P, Any]], GradientTransform[P, Any]]: ...

@type_check_only
class _JacrevOptions(_JacfwdOptions, total=False):
    allow_int: bool

@overload
def jacrev(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[False] = False,
    **options: Unpack[_JacrevOptions],
) -> GradientTransform[P, Any]: ...
@overload
def jacrev(
    fun: Callable[P, tuple[Any, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[False] = False,
    **options: Unpack[_JacrevOptions],
) -> GradientTransform[P, tuple[Any, A]]: ...
@overload
def jacrev(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[True],
    **options: Unpack[_JacrevOptions],
) -> GradientTransform[P, tuple[Any, R]]: ...
@overload
def jacrev(
    fun: Callable[P, tuple[R, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[True],
    **options: Unpack[_JacrevOptions],
) -> GradientTransform[P, tuple[Any, R, A]]: ...
@overload
def jacrev(
    fun: None = None,
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: bool | None = False,
    return_value: bool = False,
    **options: Unpack[_JacrevOptions],
) -> Callable[[Callable[P, Any]], GradientTransform[P, Any]]: ...

jacobian = jacrev

@type_check_only
class _ForwardOptions(_Options, total=False):
    tangent_size: int | None
    drct_der_clip: float | None
    key: Any

@overload
def fwd_grad(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[False] = False,
    **options: Unpack[_ForwardOptions],
) -> GradientTransform[P, Any]: ...
@overload
def fwd_grad(
    fun: Callable[P, tuple[Any, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[False] = False,
    **options: Unpack[_ForwardOptions],
) -> GradientTransform[P, tuple[Any, A]]: ...
@overload
def fwd_grad(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[True],
    **options: Unpack[_ForwardOptions],
) -> GradientTransform[P, tuple[Any, R]]: ...
@overload
def fwd_grad(
    fun: Callable[P, tuple[R, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[True],
    **options: Unpack[_ForwardOptions],
) -> GradientTransform[P, tuple[Any, R, A]]: ...
@overload
def fwd_grad(
    fun: None = None,
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: bool | None = False,
    return_value: bool = False,
    **options: Unpack[_ForwardOptions],
) -> Callable[[Callable[P, Any]], GradientTransform[P, Any]]: ...

@type_check_only
class _LaplacianOptions(_Options, total=False):
    chunk_size: int | None
    samples: int | None
    key: Any

@overload
def laplacian(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[False] = False,
    **options: Unpack[_LaplacianOptions],
) -> GradientTransform[P, Any]: ...
@overload
def laplacian(
    fun: Callable[P, tuple[Any, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[False] = False,
    **options: Unpack[_LaplacianOptions],
) -> GradientTransform[P, tuple[Any, A]]: ...
@overload
def laplacian(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[True],
    **options: Unpack[_LaplacianOptions],
) -> GradientTransform[P, tuple[Any, R]]: ...
@overload
def laplacian(
    fun: Callable[P, tuple[R, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[True],
    **options: Unpack[_LaplacianOptions],
) -> GradientTransform[P, tuple[Any, R, A]]: ...
@overload
def laplacian(
    fun: None = None,
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: bool | None = False,
    return_value: bool = False,
    **options: Unpack[_LaplacianOptions],
) -> Callable[[Callable[P, Any]], GradientTransform[P, Any]]: ...

@type_check_only
class _SparseOptions(_Options, total=False):
    pattern: Any
    dense: bool
    check_pattern: bool

@overload
def sparse_hessian(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[False] = False,
    **options: Unpack[_SparseOptions],
) -> GradientTransform[P, Any]: ...
@overload
def sparse_hessian(
    fun: Callable[P, tuple[Any, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[False] = False,
    **options: Unpack[_SparseOptions],
) -> GradientTransform[P, tuple[Any, A]]: ...
@overload
def sparse_hessian(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[True],
    **options: Unpack[_SparseOptions],
) -> GradientTransform[P, tuple[Any, R]]: ...
@overload
def sparse_hessian(
    fun: Callable[P, tuple[R, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[True],
    **options: Unpack[_SparseOptions],
) -> GradientTransform[P, tuple[Any, R, A]]: ...
@overload
def sparse_hessian(
    fun: None = None,
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: bool | None = False,
    return_value: bool = False,
    **options: Unpack[_SparseOptions],
) -> Callable[[Callable[P, Any]], GradientTransform[P, Any]]: ...

@type_check_only
class _SparseJacobianOptions(_SparseOptions, total=False):
    mode: str

@overload
def sparse_jacobian(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[False] = False,
    **options: Unpack[_SparseJacobianOptions],
) -> GradientTransform[P, Any]: ...
@overload
def sparse_jacobian(
    fun: Callable[P, tuple[Any, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[False] = False,
    **options: Unpack[_SparseJacobianOptions],
) -> GradientTransform[P, tuple[Any, A]]: ...
@overload
def sparse_jacobian(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[True],
    **options: Unpack[_SparseJacobianOptions],
) -> GradientTransform[P, tuple[Any, R]]: ...
@overload
def sparse_jacobian(
    fun: Callable[P, tuple[R, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[True],
    **options: Unpack[_SparseJacobianOptions],
) -> GradientTransform[P, tuple[Any, R, A]]: ...
@overload
def sparse_jacobian(
    fun: None = None,
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: bool | None = False,
    return_value: bool = False,
    **options: Unpack[_SparseJacobianOptions],
) -> Callable[[Callable[P, Any]], GradientTransform[P, Any]]: ...

@type_check_only
class _BatchOptions(_Options, total=False):
    in_axes: Any
    chunk_size: int | None
    in_states: Any
    out_states: Any

@overload
def per_example_grad(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[False] = False,
    **options: Unpack[_BatchOptions],
) -> GradientTransform[P, Any]: ...
@overload
def per_example_grad(
    fun: Callable[P, tuple[Any, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[False] = False,
    **options: Unpack[_BatchOptions],
) -> GradientTransform[P, tuple[Any, A]]: ...
@overload
def per_example_grad(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[True],
    **options: Unpack[_BatchOptions],
) -> GradientTransform[P, tuple[Any, R]]: ...
@overload
def per_example_grad(
    fun: Callable[P, tuple[R, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[True],
    **options: Unpack[_BatchOptions],
) -> GradientTransform[P, tuple[Any, R, A]]: ...
@overload
def per_example_grad(
    fun: None = None,
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: bool | None = False,
    return_value: bool = False,
    **options: Unpack[_BatchOptions],
) -> Callable[[Callable[P, Any]], GradientTransform[P, Any]]: ...

@type_check_only
class _NormOptions(_BatchOptions, total=False):
    per_leaf: bool

@overload
def per_example_norms(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[False] = False,
    **options: Unpack[_NormOptions],
) -> GradientTransform[P, Any]: ...
@overload
def per_example_norms(
    fun: Callable[P, tuple[Any, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[False] = False,
    **options: Unpack[_NormOptions],
) -> GradientTransform[P, tuple[Any, A]]: ...
@overload
def per_example_norms(
    fun: Callable[P, R],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    return_value: Literal[True],
    **options: Unpack[_NormOptions],
) -> GradientTransform[P, tuple[Any, R]]: ...
@overload
def per_example_norms(
    fun: Callable[P, tuple[R, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    return_value: Literal[True],
    **options: Unpack[_NormOptions],
) -> GradientTransform[P, tuple[Any, R, A]]: ...
@overload
def per_example_norms(
    fun: None = None,
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: bool | None = False,
    return_value: bool = False,
    **options: Unpack[_NormOptions],
) -> Callable[[Callable[P, Any]], GradientTransform[P, Any]]: ...
@overload
def jacobian_sparsity(
    fun: Callable[P, Any],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    check_states: bool = True,
) -> _Function[P, SparsityPattern]: ...
@overload
def jacobian_sparsity(
    fun: Callable[P, tuple[Any, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    check_states: bool = True,
) -> _Function[P, tuple[SparsityPattern, A]]: ...
@overload
def jacobian_sparsity(
    fun: None = None,
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: bool | None = False,
    check_states: bool = True,
) -> Callable[[Callable[P, Any]], _Function[P, Any]]: ...
@overload
def hessian_sparsity(
    fun: Callable[P, Any],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[False] | None = False,
    check_states: bool = True,
) -> _Function[P, SparsityPattern]: ...
@overload
def hessian_sparsity(
    fun: Callable[P, tuple[Any, A]],
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: Literal[True],
    check_states: bool = True,
) -> _Function[P, tuple[SparsityPattern, A]]: ...
@overload
def hessian_sparsity(
    fun: None = None,
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    has_aux: bool | None = False,
    check_states: bool = True,
) -> Callable[[Callable[P, Any]], _Function[P, Any]]: ...
def accumulate(
    grad_fn: GradientTransform[P, R],
    steps: int,
    *,
    reduction: str = "mean",
    weight: Callable[P, Any] | None = None,
) -> _Function[P, R]: ...
@overload
def vjp(
    fun: Callable[..., R],
    *primals: Any,
    grad_states: Any = None,
    argnums: _Argnums = 0,
    has_aux: Literal[False] = False,
    debug_nan: bool = False,
) -> tuple[R, Callable[[Any], Any]]: ...
@overload
def vjp(
    fun: Callable[..., tuple[R, A]],
    *primals: Any,
    grad_states: Any = None,
    argnums: _Argnums = 0,
    has_aux: Literal[True],
    debug_nan: bool = False,
) -> tuple[R, Callable[[Any], Any], A]: ...
@overload
def jvp(
    fun: Callable[..., R],
    primals: Sequence[Any] = (),
    tangents: Sequence[Any] = (),
    *,
    grad_states: Any = None,
    state_tangents: Any = None,
    has_aux: Literal[False] = False,
    debug_nan: bool = False,
) -> tuple[R, R]: ...
@overload
def jvp(
    fun: Callable[..., tuple[R, A]],
    primals: Sequence[Any] = (),
    tangents: Sequence[Any] = (),
    *,
    grad_states: Any = None,
    state_tangents: Any = None,
    has_aux: Literal[True],
    debug_nan: bool = False,
) -> tuple[R, R, A]: ...
@overload
def linearize(
    fun: Callable[..., R],
    *primals: Any,
    grad_states: Any = None,
    argnums: _Argnums = None,
    has_aux: Literal[False] = False,
    debug_nan: bool = False,
) -> tuple[R, LinearOperator]: ...
@overload
def linearize(
    fun: Callable[..., tuple[R, A]],
    *primals: Any,
    grad_states: Any = None,
    argnums: _Argnums = None,
    has_aux: Literal[True],
    debug_nan: bool = False,
) -> tuple[R, LinearOperator, A]: ...
@overload
def taylor(
    fun: Callable[..., R],
    primals: Sequence[Any] = (),
    directions: Sequence[Any] = (),
    order: int | None = None,
    *,
    grad_states: Any = None,
    state_directions: Any = None,
    has_aux: Literal[False] = False,
    debug_nan: bool = False,
) -> tuple[R, list[R]]: ...
@overload
def taylor(
    fun: Callable[..., tuple[R, A]],
    primals: Sequence[Any] = (),
    directions: Sequence[Any] = (),
    order: int | None = None,
    *,
    grad_states: Any = None,
    state_directions: Any = None,
    has_aux: Literal[True],
    debug_nan: bool = False,
) -> tuple[R, list[R], A]: ...

@type_check_only
class _ProductOptions(_Options, total=False):
    has_aux: bool
    return_value: bool
    return_grad: bool

@overload
def hvp(
    fun: Callable[P, Any], grad_states: Any = None, argnums: _Argnums = None, **options: Unpack[_ProductOptions]
) -> _Product[Concatenate[Any, P], Any]: ...
@overload
def hvp(
    fun: None = None, grad_states: Any = None, argnums: _Argnums = None, **options: Unpack[_ProductOptions]
) -> Callable[[Callable[P, Any]], _Product[Concatenate[Any, P], Any]]: ...
def ggn(
    model_fn: Callable[P, R],
    loss_fn: Callable[[R], Any],
    grad_states: Any = None,
    argnums: _Argnums = None,
    **options: Unpack[_ProductOptions],
) -> _Product[Concatenate[Any, P], Any]: ...
def fisher(
    model_fn: Callable[P, R],
    likelihood: str,
    grad_states: Any = None,
    argnums: _Argnums = None,
    *,
    kind: str = "exact",
    targets: Callable[P, Any] | None = None,
    samples: int | None = None,
    key: Any = None,
    has_aux: bool = False,
    check_states: bool = True,
    debug_nan: bool = False,
) -> _Product[Concatenate[Any, P], Any]: ...
def argmin(fun: Callable[..., Any], y0: C, *args: Any, solver: Any = None, max_steps: int = 256) -> C: ...
def root(fun: Callable[..., Any], y0: C, *args: Any, solver: Any = None, max_steps: int = 256) -> C: ...
def fixed_point(fun: Callable[..., C], y0: C, *args: Any, solver: Any = None, max_steps: int = 256) -> C: ...

@type_check_only
class _RuleOptions(TypedDict, total=False):
    nondiff_argnums: Sequence[int]
    nondiff_argnames: Sequence[str]
    states: Any

@overload
def custom_vjp(
    fun: Callable[P, R],
    nondiff_argnums: Sequence[int] = (),
    nondiff_argnames: Sequence[str] = (),
    *,
    states: Any = None,
) -> _CustomVJP[P, R]: ...
@overload
def custom_vjp(fun: None = None, **options: Unpack[_RuleOptions]) -> Callable[[Callable[P, R]], _CustomVJP[P, R]]: ...
@overload
def custom_jvp(
    fun: Callable[P, R],
    nondiff_argnums: Sequence[int] = (),
    nondiff_argnames: Sequence[str] = (),
    *,
    states: Any = None,
) -> _CustomJVP[P, R]: ...
@overload
def custom_jvp(fun: None = None, **options: Unpack[_RuleOptions]) -> Callable[[Callable[P, R]], _CustomJVP[P, R]]: ...
def stop_gradient(fun: Callable[P, R], states: Any = ...) -> _Function[P, R]: ...
def functional(
    f: Callable[..., R], states: Any = None, /, *args: Any, **kwargs: Any
) -> tuple[Callable[..., tuple[R, Any]], Any]: ...
def substituted(states: Any, values: Any) -> AbstractContextManager[None]: ...
def tap(name: str, x: C) -> C: ...

# --------------------------------------------------------------------------------------- diagnosis

def check_grads(
    f: Callable[..., Any],
    *args: Any,
    grad_states: Any = None,
    argnums: _Argnums = None,
    order: int = 1,
    modes: Sequence[str] | str = ...,
    atol: float | None = None,
    rtol: float | None = None,
    eps: float | None = None,
    directions: int = 3,
    seed: int = 0,
    float64: bool = False,
) -> None: ...
def explain(
    f: Callable[..., Any], *args: Any, grad_states: Any = None, argnums: _Argnums = None, seed: int = 0
) -> Explanation: ...
