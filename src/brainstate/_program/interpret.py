"""Evaluation of a traced program, equation by equation, by a rule for one equation.

The *rule* is a function ``rule(eqn, inputs) -> outputs``. With `bind` for a rule, the program computes the values that
it always computes. Any other rule works on values of its own: series, dependencies, or arrays that know where their
NaN comes from.

A program is *closed* (``ClosedJaxpr``: it holds its constants) or *open* (``Jaxpr``: they are its first inputs).
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

__all__ = ["all_equations", "all_programs", "bind", "inner_programs", "interpret", "open_jaxpr", "trace_flat"]


def bind(eqn, values) -> list:
    """Evaluate an equation on ``values`` as JAX does."""
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def interpret(jaxpr, consts, args, rule: Callable, lift: Callable = lambda value: value) -> list:
    """Evaluate an open program by ``rule``; ``lift`` turns a literal into a value that the rule works on."""
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom):
        return lift(atom.val) if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, rule(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def open_jaxpr(program: Any) -> Jaxpr:
    """Return a program, closed or open, without its constants."""
    return getattr(program, "jaxpr", program)


def inner_programs(eqn) -> Iterator[Jaxpr | ClosedJaxpr]:
    """Yield the programs among the parameters of an equation, of whatever primitive."""
    for parameter in eqn.params.values():
        for part in parameter if isinstance(parameter, tuple | list) else (parameter,):
            if isinstance(part, ClosedJaxpr | Jaxpr):
                yield part


def all_programs(program: Jaxpr | ClosedJaxpr) -> Iterator[Jaxpr | ClosedJaxpr]:
    """Yield a program, the programs that its equations hold, those that their equations hold, and so on."""
    yield program
    for eqn in open_jaxpr(program).eqns:
        for inner in inner_programs(eqn):
            yield from all_programs(inner)


def all_equations(program: Jaxpr | ClosedJaxpr) -> Iterator[Any]:
    """Yield the equations of `all_programs`."""
    for inner in all_programs(program):
        yield from open_jaxpr(inner).eqns


def trace_flat(fun, leaves):
    """Trace ``fun(leaves)``, which may return any pytree; return the closed program and the structure of the result."""
    trees = []

    def flat(*leaves):
        out, tree = jax.tree.flatten(fun(list(leaves)))
        trees.append(tree)
        return out  # JAX's caches keep the structure of a result, and that of `out` may hold States

    return jax.make_jaxpr(flat)(*leaves), trees[0]
