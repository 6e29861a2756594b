"""``root``, ``fixed_point`` and ``argmin``: solutions that can be differentiated, by optimistix.

Optimistix solves ``fun(y, p) = 0``, and differentiates the solution by the implicit function theorem,
``dy/dp = -(∂fun/∂y)⁻¹ ∂fun/∂p``, whatever the steps that led there: forward and reverse, to any order. This module adds
the States that the function reads to ``p``: staging the function once finds them, and the solver gets their values as
inputs.

A solver calls the function as often as it likes, so a function that writes States, or draws random numbers, has
no meaning here and is refused.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun, valid_jaxtype
from jax.interpreters import batching, mlir

from ..._arrays import at_least, combine, differentiable, layout, partition
from ..._compat import optional, varying_axes
from ..._errors import NoSolutionError, StateTypeError, StateValueError
from ..._functions import boundary
from ..._program.interpret import trace_flat
from ..._seam.run_time_errors import mark, raise_on_host
from ..._seam.scope import gather, refuse_states
from ..._seam.staging import stage

__all__ = ["argmin", "fixed_point", "root"]


# ------------------------------------------------------------------------------------------ was there a solution


def _check_solved(failed, several=False, *, name, max_steps):
    """Raise an error if any of ``failed`` is true."""
    failed = np.asarray(failed)
    if failed.any():
        lanes = f", in {failed.sum()} of {failed.size} lanes" if failed.ndim else ""
        error = NoSolutionError(
            f"{name} found no solution{lanes}: not within {max_steps} steps (`max_steps`), or a step failed. Begin "
            f"nearer to it, or give another solver of optimistix."
        )
        raise_on_host(error, several)
    return failed


def _checked_in_program(failed, **params):
    check = functools.partial(_check_solved, several=bool(varying_axes(failed)), **params)
    return jax.pure_callback(check, jax.ShapeDtypeStruct(failed.shape, bool), failed)


# An identity that raises, once for all lanes: `vmap` hands it all of them.
_solved = Primitive("solution_check")
_solved.def_impl(_check_solved)
_solved.def_abstract_eval(lambda failed, **params: failed)
batching.defvectorized(_solved)
mlir.register_lowering(_solved, mlir.lower_fun(_checked_in_program, multiple_results=False))


# ------------------------------------------------------------------------------------------ the solver


def _solve(name, fun, y0, args, solver, max_steps, check):
    """Return the solution of ``solver``'s problem; ``check(out types, y types)`` refuses unfit results of ``fun``."""
    optimistix = optional("optimistix", name, "implicit")
    if not callable(fun):
        raise StateTypeError(f"{name} solves for a function; got {type(fun).__name__}, which cannot be called.")
    at_least(f"{name}: max_steps", max_steps, 1, "a number of steps")
    refuse_states((y0, args), f"arguments of {name}")
    y0 = _start(name, y0)
    staged = stage(fun, (y0, *args), {}, name=name, dynamic=valid_jaxtype)
    if staged.writes:
        raise StateValueError(
            f"{name}: the function writes {', '.join(s.describe() for s in staged.writes)}, and a solver calls it any "
            f"number of times. Let it only read States; write, and draw random numbers, before or after."
        )
    check(staged.result_types, jax.tree.map(jax.typeof, y0))
    pure, inputs = _pure(staged, y0, args)
    # The precision of the dtype bounds the accuracy of the solution; 2/3 of its digits leave room for rounding.
    tolerance = float(jnp.finfo(jnp.result_type(*jax.tree.leaves(y0))).eps) ** (2 / 3)
    call, default = _problem(optimistix, name)
    solver = default(rtol=tolerance, atol=tolerance) if solver is None else solver
    solution = call(pure, solver, y0, inputs, max_steps=max_steps, throw=False)
    failed = mark(solution.result != optimistix.RESULTS.successful)
    failed = _solved.bind(failed, name=name, max_steps=max_steps)
    # The result depends on the check, so that no compiler drops it.
    return jax.tree.map(lambda y: jnp.where(failed, jnp.asarray(jnp.nan, y.dtype), y), solution.value)


def _pure(staged, y0, args):
    """Return the staged function as ``pure(y, inputs)``, and its inputs: values of States, arguments and closures.

    JAX's and Equinox's caches keep this function, and so it refers to no State and no array.
    """
    reads = list(staged.reads)
    arrays, rest = partition((gather(reads), args), valid_jaxtype)
    unknowns, y_tree = jax.tree.flatten(y0)

    def run(leaves):
        values, args = combine(leaves[len(unknowns) :], rest)
        y = y_tree.unflatten(leaves[: len(unknowns)])
        return staged(dict(zip(reads, values, strict=True)), (y, *args), {})[0]

    closed, out_tree = trace_flat(run, [*unknowns, *arrays])
    # Constants become inputs of the solver: optimistix differentiates with respect to inputs, not to closures.
    jaxpr = closed.jaxpr
    compute = jaxpr_as_fun(ClosedJaxpr(jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars]), ()))

    def pure(y, inputs):
        constants, arrays = inputs
        return out_tree.unflatten(compute(*constants, *jax.tree.leaves(y), *arrays))

    return pure, (closed.consts, arrays)


@functools.cache
def _newton(optimistix):
    """Return Newton's method that also stops when rounding allows no progress: at a small step that no longer shrinks.

    Optimistix alone waits until the value of the function is below ``atol``, which a sum of large terms never is.
    """

    class Newton(optimistix.Newton):
        def terminate(self, fn, y, args, options, state, tags):
            done, result = super().terminate(fn, y, args, options, state, tags)
            step, unit = self.norm(state.diff), jnp.finfo(state.diffsize.dtype).eps
            # `diffsize` is the step in units of the tolerance.
            stuck = (state.diffsize <= 1) & (state.diffsize > state.diffsize_prev / 2)
            rounded = (step > 0) & (step <= 8 * unit * self.norm(y))
            return done | stuck | rounded, result

    return Newton


def _problem(optimistix, name):
    """Return the function of optimistix, and the default solver."""
    return {
        "root": (optimistix.root_find, _newton(optimistix)),
        "fixed_point": (optimistix.fixed_point, _newton(optimistix)),
        "argmin": (optimistix.minimise, optimistix.BFGS),
    }[name]


def _start(name, y0):
    leaves = jax.tree_util.tree_leaves_with_path(y0)
    if not leaves:
        raise StateValueError(f"{name}: y0 holds no array, so there is nothing to solve for.")
    for path, leaf in leaves:
        if not differentiable(leaf) or jnp.iscomplexobj(leaf):
            raise StateTypeError(
                f"{name}: y0{jax.tree_util.keystr(path)} is {layout(leaf)}, and the unknown must be of a "
                f"floating-point dtype. Convert it, or pass known values among the other arguments."
            )
    return jax.tree.map(jnp.asarray, y0)


def _like_unknown(name, rule):
    def check(out, y):
        if jax.tree.structure(out) != jax.tree.structure(y):
            raise StateValueError(
                f"{name}: {rule}; it returns {jax.tree.structure(out)}, and y0 is {jax.tree.structure(y)}."
            )
        for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(out), jax.tree.leaves(y), strict=True):
            if (got.shape, got.dtype) != (want.shape, want.dtype):
                where = jax.tree_util.keystr(path)
                raise StateValueError(
                    f"{name}: {rule}; at result{where} it returns {layout(got)}, and y0{where} is {layout(want)}."
                )

    return check


def _any_result(out, y):
    """Accept any pytree of arrays that holds as many numbers as there are unknowns."""
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (out, y)]
    if sizes[0] != sizes[1]:
        raise StateValueError(
            f"root: the function returns {sizes[0]} numbers for {sizes[1]} unknowns. As many equations as unknowns are "
            f"needed; the least squares of more are an `argmin`."
        )


def _scalar(out, y):
    leaves = jax.tree.leaves(out)
    if len(leaves) != 1 or leaves[0].shape or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        shown = jax.tree.map(layout, out)
        raise StateValueError(f"argmin: the function must return a real scalar, and returns {shown}.")


@boundary
def root(fun: Callable, y0: Any, *args: Any, solver: Any = None, max_steps: int = 256) -> Any:
    """Solve ``fun(y, *args) = 0`` for ``y``; the solution is differentiable in States, arguments and closures.

    Parameters
    ----------
    fun : callable
        ``fun(y, *args)`` returns as many numbers as ``y`` has. It may read States, not write them. It runs once.
    y0 : pytree of floating-point arrays
        The starting point; no derivative is taken with respect to it.
    *args : Any
        Further arguments of ``fun``.
    solver : optimistix.AbstractRootFinder, optional
        By default Newton's method, to a tolerance of ``eps ** (2 / 3)`` of the dtype, or as far as rounding allows.
    max_steps : int
        The largest number of steps.

    Returns
    -------
    pytree
        The solution, like ``y0``.

    Raises
    ------
    StateTypeError
        If ``fun`` cannot be called, or ``y0`` holds something else than floating-point arrays.
    StateValueError
        If ``fun`` writes a State or draws random numbers, or its result does not fit.
    NoSolutionError
        If there is no solution within ``max_steps``; also in compiled code, and if one lane of a map has none: the
        message says how many. A `jit` waits for the end of the program to know; the States are then unchanged.
    ModuleNotFoundError
        If optimistix is not installed: ``pip install optimistix``.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> a = brainstate.ParamState(jnp.array(8.0))
    >>> cube_root = lambda: brainstate.transform.root(lambda y: y**3 - a.value, jnp.array(1.0))
    >>> round(float(cube_root()), 4), round(float(brainstate.transform.grad(cube_root, a)()), 4)
    (2.0, 0.0833)
    """
    return _solve("root", fun, y0, args, solver, max_steps, _any_result)


@boundary
def fixed_point(fun: Callable, y0: Any, *args: Any, solver: Any = None, max_steps: int = 256) -> Any:
    """Solve ``fun(y, *args) = y`` for ``y``; the solution is differentiable, see `root`.

    Parameters
    ----------
    fun : callable
        ``fun(y, *args)`` returns a pytree like ``y``. It may read States, not write them. It runs once.
    y0, *args, max_steps
        As in `root`.
    solver : optimistix.AbstractFixedPointSolver or AbstractRootFinder, optional
        By default Newton's method; ``optimistix.FixedPointIteration`` needs no derivative, but a contraction.

    Returns
    -------
    pytree
        The solution, like ``y0``.

    Raises
    ------
    StateTypeError, StateValueError, NoSolutionError, ModuleNotFoundError
        As in `root`.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> rate = brainstate.transform.fixed_point(lambda y, drive: jnp.tanh(0.5 * y + drive), jnp.array(0.0), 0.3)
    >>> round(float(rate), 4)
    0.5008
    """
    check = _like_unknown("fixed_point", "the function must return a pytree like y0")
    return _solve("fixed_point", fun, y0, args, solver, max_steps, check)


@boundary
def argmin(fun: Callable, y0: Any, *args: Any, solver: Any = None, max_steps: int = 256) -> Any:
    """Minimize ``fun(y, *args)`` over ``y``; the minimizer is differentiable, see `root`.

    Parameters
    ----------
    fun : callable
        ``fun(y, *args)`` returns a real scalar. It may read States, not write them. It runs once.
    y0, *args, max_steps
        As in `root`.
    solver : optimistix.AbstractMinimiser, optional
        By default BFGS.

    Returns
    -------
    pytree
        The minimizer, like ``y0``; its derivative is that of the solution of ``∇fun = 0``.

    Raises
    ------
    StateTypeError, StateValueError, NoSolutionError, ModuleNotFoundError
        As in `root`.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> target = brainstate.State(jnp.array([1.0, -2.0]))
    >>> y = brainstate.transform.argmin(lambda y: ((y - target.value) ** 2).sum(), jnp.zeros(2))
    >>> y.round(3).tolist()
    [1.0, -2.0]
    """
    return _solve("argmin", fun, y0, args, solver, max_steps, _scalar)
