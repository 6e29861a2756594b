"""Calls, loops and branches in traced programs: the equations that run other programs.

JAX writes each of them as one equation, with the programs that it runs among the equation's parameters. `control_flow`
reads such an equation into one of four kinds. A kind names the programs, and says how the operands of the equation
become the inputs of these programs:

======== ============================================== ======================================================
kind     runs                                           operands
======== ============================================== ======================================================
`Call`   ``body`` once                                  the inputs of the body
`Scan`   ``body`` ``length`` times                      constants, first carry, xs
`While`  ``body`` as long as ``test`` is true           constants of the test, those of the body, first carry
`Cond`   one of ``branches``                            the number of the branch, then the inputs of each branch
======== ============================================== ======================================================

The body of a scan takes (constants, carry, one row of each xs), and returns (next carry, one row of each result). The
body of a while loop takes (constants, carry) and returns the next carry. All programs here are closed.

An equation of any other primitive is a single operation: readers have to treat it as one whose inside is unknown.

A property of the carry of a loop that holds for any number of iterations is a fixed point of the body
(`find_fixed_point`).
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr

from .._compat import scan_counts
from .interpret import bind, inner_programs, interpret
from .source_lines import at_line

__all__ = ["CALLS", "Call", "Cond", "Scan", "While", "control_flow", "find_fixed_point", "inline_calls"]

# {primitive: the meaning that the call adds to its body}. A reader that *computes* by entering the body loses that
# meaning; one that only *asks* something about the body loses nothing. Under "devices" the body sees a shard of each
# operand, so its shapes are others than those of the equation.
CALLS = {
    "jit": "",
    "closed_call": "",
    "eval_jaxpr": "",
    "remat2": "memory",
    "remat_opt": "memory",
    "custom_jvp_call": "derivative",
    "custom_vjp_call": "derivative",
    "linear_call": "derivative",
    "custom_vmap_call": "batching",
    "compute_on": "placement",
    "composite": "lowering",
    "shard_map": "devices",
}


class Call(NamedTuple):
    """Runs ``body`` once. ``adds`` is the further meaning of the call (see ``CALLS``), ``name`` the function's name."""

    body: ClosedJaxpr
    adds: str
    name: str | None


class Scan(NamedTuple):
    """Runs ``body`` ``length`` times, with that many ``constants`` and ``carried`` values."""

    body: ClosedJaxpr
    constants: int
    carried: int
    length: int
    reverse: bool
    unroll: int

    def split(self, inputs: list) -> tuple[list, list, list]:
        """Cut a list with one item for each operand into constants, first carry, and xs."""
        end = self.constants + self.carried
        return inputs[: self.constants], inputs[self.constants : end], inputs[end:]

    def steps(self) -> range:
        """Return the rows of xs in the order in which they are used."""
        rows = range(self.length)
        return rows[::-1] if self.reverse else rows


class While(NamedTuple):
    """Runs ``body`` as long as ``test`` is true; ``constants`` and ``carried`` count inputs of the body."""

    test: ClosedJaxpr
    body: ClosedJaxpr
    test_constants: int
    constants: int
    carried: int

    def split(self, inputs: list) -> tuple[list, list, list]:
        """Cut a list with one item for each operand into constants of the test, of the body, and first carry."""
        end = self.test_constants + self.constants
        return inputs[: self.test_constants], inputs[self.test_constants : end], inputs[end:]


class Cond(NamedTuple):
    """Runs one of ``branches``."""

    branches: tuple[ClosedJaxpr, ...]


def control_flow(eqn) -> Call | Scan | While | Cond | None:
    """Return the call, loop or branch that an equation is, or None for a single operation."""
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        (body,) = inner_programs(eqn)  # the rules of custom_jvp and the like are functions, no programs
        body = body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ())
        return Call(body, CALLS[name], params.get("name"))
    if name == "scan":
        counts = scan_counts(params, len(eqn.invars))
        return Scan(params["jaxpr"], *counts, params["length"], params["reverse"], params["unroll"])
    if name == "while":
        counts = params["cond_nconsts"], params["body_nconsts"], len(eqn.outvars)
        return While(params["cond_jaxpr"], params["body_jaxpr"], *counts)
    return Cond(params["branches"]) if name == "cond" else None


def find_fixed_point(step: Callable, carry: Any, same: Callable = operator.eq, rounds: int | None = None) -> Any:
    """Repeat ``carry = step(carry)`` until that changes nothing, and return it; None if it takes more than ``rounds``.

    It ends without a bound where ``step`` only ever adds to a finite set, or only takes away.
    """
    while rounds is None or rounds > 0:
        after = step(carry)
        if same(carry, after):
            return after
        carry, rounds = after, rounds and rounds - 1
    return None


def inline_calls(closed: ClosedJaxpr, leaves) -> ClosedJaxpr:
    """Replace the calls that mean no more than their body by their bodies; ``leaves`` are inputs to trace with."""
    if not any(_plain_body(eqn) for eqn in closed.jaxpr.eqns):
        return closed
    return jax.make_jaxpr(lambda *args: interpret(closed.jaxpr, closed.consts, args, _inline))(*leaves)


def _plain_body(eqn) -> ClosedJaxpr | None:
    call = control_flow(eqn)
    return call.body if isinstance(call, Call) and not call.adds else None


def _inline(eqn, values):
    body = _plain_body(eqn)
    with at_line(eqn):
        return bind(eqn, values) if body is None else interpret(body.jaxpr, body.consts, values, _inline)
