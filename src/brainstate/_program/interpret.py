"""Running a traced program one equation after the other, with a rule that says what an equation does."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from .source_lines import at_line

__all__ = ["bind", "held", "inlined", "interpret", "opened", "program", "subprogram", "within"]


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


def opened(jaxpr: Any) -> Jaxpr:
    """Return a program, closed or not, without its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def held(eqn) -> Iterator[Jaxpr | ClosedJaxpr]:
    """Yield the programs among the parameters of an equation."""
    for parameter in eqn.params.values():
        for part in parameter if isinstance(parameter, tuple | list) else (parameter,):
            if isinstance(part, ClosedJaxpr | Jaxpr):
                yield part


def within(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[Jaxpr | ClosedJaxpr]:
    """Yield a program and all programs within."""
    yield jaxpr
    for eqn in opened(jaxpr).eqns:
        for inner in held(eqn):
            yield from within(inner)


def subprogram(eqn):
    """Return the program that a ``jit`` equation calls, or None for any other equation."""
    return eqn.params["jaxpr"] if eqn.primitive.name == "jit" else None


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
    with at_line(eqn):
        return bind(eqn, values) if inner is None else interpret(inner.jaxpr, inner.consts, values, _inline)
