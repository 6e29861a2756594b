"""Which values of a program its results are computed from: liveness, as compilers call it.

A value is *live* if a wanted result needs it. The analysis goes through a program backward, and into calls, loops and
branches; of a single operation, every result needs every operand.

An equation that has to be evaluated reads all its operands, live or not: `prune` leaves out equations accordingly.
"""

from typing import NamedTuple

from jax.extend.core import Jaxpr, Literal

from .control_flow import Call, Cond, Scan, While, control_flow, find_fixed_point
from .interpret import open_jaxpr

__all__ = ["Liveness", "liveness", "prune", "results_of_iteration"]


class Liveness(NamedTuple):
    """The live results of each live equation, by the ``id`` of that; and for each input of the program if it is live.

    The inputs do not include the constants of the program.
    """

    results: dict[int, list[bool]]
    inputs: list[bool]


def liveness(program, wanted) -> Liveness:
    """Return the live values of a program, closed or open; ``wanted`` tells for each output if it is asked for."""
    jaxpr = open_jaxpr(program)
    live = {v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and not isinstance(v, Literal)}
    results = {}
    for eqn in reversed(jaxpr.eqns):
        outs = [v in live for v in eqn.outvars]
        if any(outs):
            results[id(eqn)] = outs
            operands = zip(eqn.invars, _operands(eqn, outs), strict=True)
            live.update(v for v, is_live in operands if is_live and not isinstance(v, Literal))
    return Liveness(results, [v in live for v in jaxpr.invars])


def _operands(eqn, wanted) -> list[bool]:
    """Tell for each operand of an equation if its ``wanted`` results need it."""
    match control_flow(eqn):
        case Call(body=body):
            return liveness(body, wanted).inputs
        case Cond(branches=branches):
            needs = [liveness(branch, wanted).inputs for branch in branches]
            return [True, *map(any, zip(*needs, strict=True))]
        case Scan() as loop:
            return liveness(loop.body, results_of_iteration(loop, wanted)).inputs
        case While() as loop:
            carry = results_of_iteration(loop, wanted)
            constants = liveness(loop.body, carry).inputs[: loop.constants]
            return [*[True] * loop.test_constants, *constants, *carry]
    return [True] * len(eqn.invars)


def results_of_iteration(loop: Scan | While, wanted: list[bool]) -> list[bool]:
    """Tell for each result of an iteration if the ``wanted`` results of the loop need it, in this or a later iteration.

    A carry may be needed for another one; and one that decides on the end of the loop is always needed.
    """
    first, end = loop.constants, loop.constants + loop.carried
    if isinstance(loop, While):
        decisive = liveness(loop.test, [True]).inputs[loop.test_constants :]
        wanted = [want or decides for want, decides in zip(wanted, decisive, strict=True)]

    def step(results):
        carry = liveness(loop.body, results).inputs[first:end]
        return [now or later for now, later in zip(results, carry, strict=False)] + results[len(carry) :]

    return find_fixed_point(step, list(wanted))


def prune(jaxpr: Jaxpr) -> Jaxpr:
    """Leave out the equations of an open program that need not be evaluated."""
    read, kept = {v for v in jaxpr.outvars if not isinstance(v, Literal)}, []
    for eqn in reversed(jaxpr.eqns):
        if not read.isdisjoint(eqn.outvars):
            read.update(v for v in eqn.invars if not isinstance(v, Literal))
            kept.append(eqn)
    return jaxpr.replace(eqns=kept[::-1])
