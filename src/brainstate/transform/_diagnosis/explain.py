"""``explain``: a report on the gradient of each State and argument, and the reason where it is zero.

Whether a value can have a gradient at all is read from the traced program. A walk along its equations notes for each
intermediate value the inputs that it depends on, by the kind of *path* that leads there: smooth, through a
``stop_gradient``, or discrete (through an integer, a comparison, a rounding). A gradient that is zero although a
smooth path leads there is zero because of the numbers: at points nearby too (a dead unit), or only here.

A value has one path of each kind at most: the walk does not count paths, it unites the inputs that they come from. So
the paths through a loop are a fixed point, which is reached as soon as an iteration adds no input.
"""

import html
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, valid_jaxtype

from ..._arrays import differentiable
from ..._functions import boundary
from ..._program.control_flow import Call, Cond, Scan, While, control_flow, find_fixed_point
from ..._program.interpret import interpret, open_jaxpr
from ..._seam.scope import Scope
from ..._seam.staging import stage
from .flat_function import random_like, settle, subject_of

__all__ = ["Explanation", "Row", "explain"]

_NEVER = "never read"
_OVERWRITTEN = "read but overwritten first"
_ASIDE = "used, but the result does not depend on it"
_STOPPED = "behind stop_gradient"
_DISCRETE = "integer, rounding, comparison or argmax path"
_DEAD = "dead units: zero nearby as well"
_HERE = "only numerically zero here"

_STEPS = frozenset({"argmax", "argmin", "ceil", "floor", "is_finite", "round", "sign"})


# ------------------------------------------------------------------------------------ paths through a program


class _Paths(NamedTuple):
    """The inputs that a value depends on, by the kind of path from there."""

    smooth: frozenset = frozenset()
    stopped: frozenset = frozenset()
    discrete: frozenset = frozenset()


def _union_of_paths(many) -> _Paths:
    return _Paths(*(frozenset().union(*kind) for kind in zip(*many, strict=True))) if many else _Paths()


def _as_discrete(paths) -> _Paths:
    return _Paths(discrete=paths.smooth | paths.discrete, stopped=paths.stopped)


def _follow_program(program, inputs) -> list[_Paths]:
    """Return the paths to each output of a program, from those to its inputs."""
    jaxpr = open_jaxpr(program)
    return interpret(jaxpr, [_Paths()] * len(jaxpr.constvars), inputs, _follow_equation, lambda _: _Paths())


def _follow_equation(eqn, ins) -> list[_Paths]:
    """Return the paths to each result of an equation, from those to its operands."""
    match control_flow(eqn):
        case Call(body=body):
            return _follow_program(body, ins)
        case Cond(branches=branches):
            number, *operands = ins
            outs = [_follow_program(branch, operands) for branch in branches]
            return [_union_of_paths([*many, _as_discrete(number)]) for many in zip(*outs, strict=True)]
        case Scan() as loop:
            constants, carry, xs = loop.split(ins)
            carry = find_fixed_point(
                lambda now: _add_paths(now, _follow_program(loop.body, [*constants, *now, *xs])), carry
            )
            outs = _follow_program(loop.body, [*constants, *carry, *xs])
            return outs if loop.length else [*carry, *outs[loop.carried :]]
        case While() as loop:
            return _follow_loop(loop, *loop.split(ins))
    together = _union_of_paths(ins)
    if eqn.primitive.name == "stop_gradient":
        together = _Paths(stopped=together.smooth | together.stopped, discrete=together.discrete)
    elif eqn.primitive.name in _STEPS:
        together = _as_discrete(together)
    return [together if jnp.issubdtype(v.aval.dtype, jnp.inexact) else _as_discrete(together) for v in eqn.outvars]


def _add_paths(carry, outs) -> list[_Paths]:
    """Add to each carry the paths to the result of an iteration that is the next."""
    return [_union_of_paths([now, out]) for now, out in zip(carry, outs, strict=False)]


def _follow_loop(loop, test_constants, constants, carry) -> list[_Paths]:
    def step(now):
        # Each carry depends on the number of iterations, and so on the inputs of the test: discretely.
        end = _as_discrete(_follow_program(loop.test, [*test_constants, *now])[0])
        return [_union_of_paths([out, end]) for out in _add_paths(now, _follow_program(loop.body, [*constants, *now]))]

    return find_fixed_point(step, carry)


# ------------------------------------------------------------------------------------------ the report


@dataclass(frozen=True)
class Row:
    """The report on the gradient of one array."""

    name: str
    read: bool
    written: bool
    norm: float
    relative: float
    zeros: float
    nonfinite: int
    cause: str


@dataclass(frozen=True)
class Explanation:
    """A report on gradients, as `explain` returns it: ``rows``, one for each array, shown as a table.

    A row has ``name``, ``read``, ``written``, ``norm`` of the gradient, ``relative`` to that of the value, the
    fraction of ``zeros``, the number of ``nonfinite`` entries, and the ``cause`` if the gradient is zero, else ''.
    """

    rows: tuple[Row, ...]

    def __getitem__(self, part: str) -> Row:
        """Return the one row whose name contains ``part``."""
        (row,) = (row for row in self.rows if part in row.name)
        return row

    def _cells(self) -> list[list[str]]:
        words = {True: "yes", False: "no"}
        table = [["with respect to", *(field.name for field in fields(Row)[1:])]]
        for row in self.rows:
            numbers = [f"{row.norm:.3g}", f"{row.relative:.3g}", f"{row.zeros:.0%}", str(row.nonfinite)]
            table.append([row.name, words[row.read], words[row.written], *numbers, row.cause])
        return table

    def __str__(self) -> str:
        table = self._cells()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head, *rest = ("".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in self._cells())
        body = "".join(f"<tr>{line}</tr>" for line in rest)
        return f"<table><thead><tr>{head.replace('td>', 'th>')}</tr></thead><tbody>{body}</tbody></table>"


def _gradient_at(subject, leaves, seed) -> list[np.ndarray]:
    """Return the gradient at ``leaves``: of a real scalar itself, of anything else for a random cotangent."""
    value, pull, _ = jax.vjp(subject.call, leaves, has_aux=True)
    rng = np.random.default_rng(seed)
    single = len(value) == 1 and jnp.shape(value[0]) == () and not jnp.iscomplexobj(value[0])
    cotangent = [jnp.ones((), jnp.result_type(value[0]))] if single else random_like(rng, value)
    return [np.asarray(g) for g in pull(cotangent)[0]]


def _is_zero_nearby(subject, seed, points=4) -> list[bool]:
    """Tell for each leaf whether its gradient is zero at several points nearby."""
    zero = [True] * len(subject.leaves)
    for n in range(1, points + 1):
        rng, leaves = np.random.default_rng((seed, n)), []
        arrays = [jnp.asarray(leaf) for leaf in subject.leaves]
        for leaf, move in zip(arrays, random_like(rng, arrays), strict=True):
            size = float(jnp.sqrt(jnp.mean(jnp.abs(leaf) ** 2))) or 1.0
            leaves.append(leaf + 0.01 * size * move)
        zero = [was and not g.any() for was, g in zip(zero, _gradient_at(subject, leaves, seed), strict=True)]
    return zero


def _trace_subject(subject):
    """Return the jaxpr, the number of its outputs that are the value, and for each leaf if its State is written."""
    written = []

    def run(leaves):
        value, effects = subject.call(leaves)
        _, _, writes = effects.tree()
        written.extend(writes.states)
        kept = [leaf for leaf in jax.tree.leaves(writes.values) if differentiable(leaf)]
        return value, kept

    staged = stage(run, (subject.leaves,), {}, name="explain", dynamic=valid_jaxtype)
    return staged.closed.jaxpr, len(staged.result_types[0]), [owner in written for owner in subject.owners]


@boundary
def explain(
    f: Callable,
    *args: Any,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = None,
    seed: int = 0,
) -> Explanation:
    """Report on the gradient with respect to each State and argument, and why it is zero where it is.

    Parameters
    ----------
    f : callable
        The function; ``jit`` must be able to trace it. If it does not return a real scalar, the gradient is that of the
        product of its result with random numbers. No State changes: the function draws the random numbers that its
        next call will draw.
    *args : pytree
        Its arguments.
    grad_states, argnums
        See `GradientTransform`. If both are left out: every argument that holds only floating or complex values.
    seed : int
        Seed of the random numbers of the product, and of those for points nearby.

    Returns
    -------
    Explanation
        A table, also in notebooks. The causes are: never read; read but overwritten first (the value at entry is not
        used, the State is written); used, but the result does not depend on it; behind ``stop_gradient``; integer,
        rounding, comparison or argmax path; dead units (zero at points nearby as well); only numerically zero here.

    Raises
    ------
    StateTypeError, StateValueError
        If the function, or a value to differentiate, cannot be used; as in `GradientTransform`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, brainstate
    >>> a, b = brainstate.ParamState(jnp.array(2.0), name="a"), brainstate.ParamState(jnp.array(3.0), name="b")
    >>> report = brainstate.transform.explain(lambda x: x * a.value * jnp.round(b.value), 1.0, grad_states=[a, b])
    >>> report["'a'"].norm, report["'b'"].norm, report["'b'"].cause
    (3.0, 0.0, 'integer, rounding, comparison or argmax path')
    """
    subject_of("explain", f, args, grad_states, argnums)
    settle("explain", f, args)
    with Scope("explain"):
        subject = subject_of("explain", f, args, grad_states, argnums)
        jaxpr, outputs, written = _trace_subject(subject)
        paths = _union_of_paths(
            _follow_program(jaxpr, [_Paths(frozenset([i])) for i in range(len(subject.leaves))])[:outputs]
        )
        used = {v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, Literal)}
        used.update(v for v in jaxpr.outvars[:outputs] if not isinstance(v, Literal))
        gradient = _gradient_at(subject, subject.leaves, seed)
        unexplained = [i for i, g in enumerate(gradient) if i in paths.smooth and not g.any()]
        dead = _is_zero_nearby(subject, seed) if unexplained else []
    rows = []
    for i, (name, g) in enumerate(zip(subject.inputs, gradient, strict=True)):
        read = jaxpr.invars[i] in used
        if g.any():
            cause = ""
        elif i in paths.smooth:
            cause = _DEAD if dead[i] else _HERE
        elif i in paths.stopped or i in paths.discrete:
            cause = _STOPPED if i in paths.stopped else _DISCRETE
        else:
            cause = _ASIDE if read else _OVERWRITTEN if written[i] else _NEVER
        rows.append(_report_on(name, read, written[i], subject.leaves[i], g, cause))
    return Explanation(tuple(rows))


def _report_on(name, read, written, value, g, cause) -> Row:
    wide = np.asarray(g, np.complex128 if np.iscomplexobj(g) else np.float64)
    norm, size = float(np.linalg.norm(wide)), float(np.linalg.norm(np.asarray(value, wide.dtype)))
    zeros = float(np.mean(wide == 0)) if wide.size else 0.0
    relative = norm / size if size else float("inf") if norm else 0.0
    return Row(name, read, written, norm, relative, zeros, int((~np.isfinite(wide)).sum()), cause)
