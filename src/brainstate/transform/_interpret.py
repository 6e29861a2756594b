"""Running a traced program one equation after the other, with a rule that says what an equation does."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal

__all__ = ["bind", "inlined", "interpret", "program", "subprogram"]


def bind(eqn, values) -> list:
    """Do what the equation says: the rule under which a program computes what it always computes."""
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def interpret(jaxpr, consts, args, rule: Callable, lift: Callable = lambda value: value) -> list:
    """Run ``jaxpr``; ``rule(eqn, inputs) -> outputs``, and ``lift`` makes of a literal what the rule works on."""
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom):
        return lift(atom.val) if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, rule(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def subprogram(eqn):
    """Return the program that a ``jit`` equation calls, or None for any other equation."""
    return eqn.params["jaxpr"] if eqn.primitive.name in ("jit", "pjit") else None


def program(fun, leaves):
    """Trace ``fun(leaves)``, any pytree, and return the closed jaxpr and the structure of the result."""
    trees = []

    def flat(*leaves):
        out, tree = jax.tree.flatten(fun(list(leaves)))
        trees.append(tree)
        return out  # JAX's caches keep the structure of a result, and that of `out` may hold States

    return jax.make_jaxpr(flat)(*leaves), trees[0]


def inlined(closed, leaves):
    """Return a program that does the same without ``jit`` equations."""
    if not any(subprogram(eqn) for eqn in closed.jaxpr.eqns):
        return closed
    return jax.make_jaxpr(lambda *args: interpret(closed.jaxpr, closed.consts, args, _inline))(*leaves)


def _inline(eqn, values):
    inner = subprogram(eqn)
    return bind(eqn, values) if inner is None else interpret(inner.jaxpr, inner.consts, values, _inline)
