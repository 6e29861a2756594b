"""``explain``: what the gradient of each State and argument is like, and where it is zero, why.

Whether a value can have a gradient at all is read from the program: a walk along its operations notes for each
intermediate result from which inputs it depends, and in which *way*: smoothly, behind a ``stop_gradient``, or
through something discrete (an integer, a comparison, rounding). What is zero in spite of a smooth way is zero by
its numbers: at points nearby too (a dead unit), or only here.
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
from ..._compat import scan_inputs
from ..._functions import boundary
from ..._program.interpret import interpret
from ..._seam.scope import Scope
from ..._seam.staging import stage
from .flat_function import random_like, settled, subject_of

__all__ = ["Explanation", "Row", "explain"]

_NEVER = "never read"
_OVERWRITTEN = "read but overwritten first"
_ASIDE = "used, but the result does not depend on it"
_STOPPED = "behind stop_gradient"
_DISCRETE = "integer, rounding, comparison or argmax path"
_DEAD = "dead units: zero nearby as well"
_HERE = "only numerically zero here"

_STEPS = frozenset({"argmax", "argmin", "ceil", "floor", "is_finite", "round", "sign"})


# ------------------------------------------------------------------------------------------ ways through a program


class _Ways(NamedTuple):
    """The inputs that a value depends on, by the way from there."""

    smooth: frozenset = frozenset()
    stopped: frozenset = frozenset()
    discrete: frozenset = frozenset()


def _merged(many) -> _Ways:
    return _Ways(*(frozenset().union(*kind) for kind in zip(*many, strict=True))) if many else _Ways()


def _discretely(ways) -> _Ways:
    return _Ways(discrete=ways.smooth | ways.discrete, stopped=ways.stopped)


def _flow(jaxpr, inputs) -> list[_Ways]:
    """Return the ways to each output of ``jaxpr``."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return interpret(jaxpr, [_Ways()] * len(jaxpr.constvars), inputs, _through, lambda _: _Ways())


def _through(eqn, ins) -> list[_Ways]:
    """Return the ways to each result of an operation, from those to its operands."""
    params, name = eqn.params, eqn.primitive.name
    if name == "scan":
        constants, first, _ = scan_inputs(params, ins)
        end = len(constants) + len(first)
        return _looped(lambda now: _flow(params["jaxpr"], now), ins, len(constants), end)
    if name == "while":
        return _while(params, ins)
    if name == "cond":
        outs = [_flow(branch, ins[1:]) for branch in params["branches"]]
        return [_merged([*many, _discretely(ins[0])]) for many in zip(*outs, strict=True)]
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    if inner is not None and len(getattr(inner, "jaxpr", inner).invars) == len(ins):
        return _flow(inner, ins)
    together = _merged(ins)
    if name == "stop_gradient":
        together = _Ways(stopped=together.smooth | together.stopped, discrete=together.discrete)
    elif name in _STEPS:
        together = _discretely(together)
    return [together if jnp.issubdtype(v.aval.dtype, jnp.inexact) else _discretely(together) for v in eqn.outvars]


def _looped(body, ins, first, last) -> list[_Ways]:
    """Follow a loop that carries the inputs from ``first`` to ``last`` until nothing is added."""
    ins = list(ins)
    while True:
        outs = body(ins)
        carried = [_merged([old, new]) for old, new in zip(ins[first:last], outs, strict=False)]
        if carried == ins[first:last]:
            return [*carried, *outs[last - first :]]
        ins[first:last] = carried


def _while(params, ins) -> list[_Ways]:
    n, m = params["cond_nconsts"], params["body_nconsts"]

    def body(now):
        ends = _discretely(_flow(params["cond_jaxpr"], [*ins[:n], *now[m:]])[0])
        return [_merged([out, ends]) for out in _flow(params["body_jaxpr"], now)]

    return _looped(body, ins[n:], m, len(ins) - n)


# ------------------------------------------------------------------------------------------ the report


@dataclass(frozen=True)
class Row:
    """What is known of one differentiated array."""

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


def _gradient(subject, leaves, seed) -> list[np.ndarray]:
    """Return the gradient at ``leaves``: of a real scalar as it is, of anything else along a random cotangent."""
    value, pull, _ = jax.vjp(subject.call, leaves, has_aux=True)
    rng = np.random.default_rng(seed)
    single = len(value) == 1 and jnp.shape(value[0]) == () and not jnp.iscomplexobj(value[0])
    cotangent = [jnp.ones((), jnp.result_type(value[0]))] if single else random_like(rng, value)
    return [np.asarray(g) for g in pull(cotangent)[0]]


def _nearby(subject, seed, points=4) -> list[bool]:
    """Tell for each leaf whether its gradient is zero at all of some points around."""
    zero = [True] * len(subject.leaves)
    for n in range(1, points + 1):
        rng, leaves = np.random.default_rng((seed, n)), []
        arrays = [jnp.asarray(leaf) for leaf in subject.leaves]
        for leaf, move in zip(arrays, random_like(rng, arrays), strict=True):
            size = float(jnp.sqrt(jnp.mean(jnp.abs(leaf) ** 2))) or 1.0
            leaves.append(leaf + 0.01 * size * move)
        zero = [was and not g.any() for was, g in zip(zero, _gradient(subject, leaves, seed), strict=True)]
    return zero


def _program(subject):
    """Return the jaxpr of the value, and for each leaf whether the State it belongs to is written."""
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
        The function; ``jit`` must be able to trace it. If it returns no real scalar, the gradient is that of a
        product with random numbers. No State changes, and random numbers are those that the next call will draw.
    *args : pytree
        Its arguments.
    grad_states, argnums
        See `GradientTransform`; without both, every argument that holds floating or complex values only.
    seed : int
        Where the random numbers, and those for points nearby, come from.

    Returns
    -------
    Explanation
        A table, also in notebooks. The causes are: never read; read but overwritten first (the value at entry is not
        used, the State is written); used, but the result does not depend on it; behind ``stop_gradient``; integer,
        rounding, comparison or argmax path; dead units (zero at points nearby as well); only numerically zero here.

    Raises
    ------
    StateTypeError, StateValueError
        If the function or what is to be differentiated cannot be used, as in `GradientTransform`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, brainstate
    >>> a, b = brainstate.ParamState(jnp.array(2.0), name="a"), brainstate.ParamState(jnp.array(3.0), name="b")
    >>> report = brainstate.transform.explain(lambda x: x * a.value * jnp.round(b.value), 1.0, grad_states=[a, b])
    >>> report["'a'"].norm, report["'b'"].norm, report["'b'"].cause
    (3.0, 0.0, 'integer, rounding, comparison or argmax path')
    """
    subject_of("explain", f, args, grad_states, argnums)
    settled("explain", f, args)
    with Scope("explain"):
        subject = subject_of("explain", f, args, grad_states, argnums)
        jaxpr, outputs, written = _program(subject)
        ways = _merged(_flow(jaxpr, [_Ways(frozenset([i])) for i in range(len(subject.leaves))])[:outputs])
        used = {v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, Literal)}
        used.update(v for v in jaxpr.outvars[:outputs] if not isinstance(v, Literal))
        gradient = _gradient(subject, subject.leaves, seed)
        unexplained = [i for i, g in enumerate(gradient) if i in ways.smooth and not g.any()]
        dead = _nearby(subject, seed) if unexplained else []
    rows = []
    for i, (name, g) in enumerate(zip(subject.inputs, gradient, strict=True)):
        read = jaxpr.invars[i] in used
        if g.any():
            cause = ""
        elif i in ways.smooth:
            cause = _DEAD if dead[i] else _HERE
        elif i in ways.stopped or i in ways.discrete:
            cause = _STOPPED if i in ways.stopped else _DISCRETE
        else:
            cause = _ASIDE if read else _OVERWRITTEN if written[i] else _NEVER
        rows.append(_row(name, read, written[i], subject.leaves[i], g, cause))
    return Explanation(tuple(rows))


def _row(name, read, written, value, g, cause) -> Row:
    wide = np.asarray(g, np.complex128 if np.iscomplexobj(g) else np.float64)
    norm, size = float(np.linalg.norm(wide)), float(np.linalg.norm(np.asarray(value, wide.dtype)))
    zeros = float(np.mean(wide == 0)) if wide.size else 0.0
    relative = norm / size if size else float("inf") if norm else 0.0
    return Row(name, read, written, norm, relative, zeros, int((~np.isfinite(wide)).sum()), cause)
