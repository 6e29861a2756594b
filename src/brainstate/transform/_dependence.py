"""Which outputs of a program depend on which inputs: an interpreter of jaxprs that computes with sets of inputs.

It is run on programs that are linear in the inputs asked for (a JVP in its tangents, a pullback in its cotangents),
traced with every other input abstract. What it finds therefore holds whatever the floating values are, custom
derivative rules included, and the order of mathematics does not matter: it asks what the program that will be
evaluated can let through. Everything is on the safe side: a branch of ``cond`` may be taken, a loop may run any number
of times, and a primitive without a rule lets everything through.

Integers and booleans that are constants of the program are seen: with known indices a gather is exact.
"""

import contextlib
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from .._compat import scan_inputs
from ._dependence_rules import RULES, Value, everything, known_result, over_all
from ._index_sets import EMPTY, Deps, identity, joined, reduced, same_sizes, united
from ._interpret import held, interpret, opened, within

__all__ = ["dependencies", "primitives"]

#: A scan is followed step by step while that takes at most so many equations; beyond, all steps are taken together.
UNROLLED = 10_000
#: After so many rounds without a fixed point, a loop is taken to mix all that enters it.
ROUNDS = 12


def dependencies(closed: ClosedJaxpr, unasked: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for each output the pairs (element, input) of what depends on what, sorted.

    The inputs from number ``unasked`` on are asked about, and their elements numbered in order.
    """
    asked = closed.jaxpr.invars[unasked:]
    sizes = [int(np.prod(v.aval.shape)) for v in asked]
    starts, width = np.cumsum([0, *sizes]), sum(sizes)
    nothing = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    if width == 0:
        return [nothing for _ in closed.jaxpr.outvars]
    values = [
        Value(identity(int(start), v.aval.shape, width) if size else None)
        for start, size, v in zip(starts, sizes, asked, strict=False)
    ]
    if any(_mutable(opened(jaxpr)) for jaxpr in within(closed)):  # a dependency could pass unseen through memory
        union = over_all(values)
        outs = [Value(union and union.moved(np.broadcast_to(union.ids, v.aval.shape))) for v in closed.jaxpr.outvars]
    else:
        outs = _run(closed, [Value()] * unasked + values)
    return [nothing if out.deps is None else out.deps.entries() for out in outs]


def primitives(jaxpr: Jaxpr) -> set[str]:
    """Return the names of all primitives in a program and in the programs within."""
    return {eqn.primitive.name for inner in within(jaxpr) for eqn in opened(inner).eqns}


def _mutable(jaxpr):
    variables = [*jaxpr.invars, *jaxpr.constvars, *(v for eqn in jaxpr.eqns for v in eqn.outvars)]
    return any(hasattr(v.aval, "inner_aval") for v in variables)


# ------------------------------------------------------------------------------------------------ the interpreter


def _constant(value) -> Value:
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    integer = isinstance(value, bool | int) or kind in ("i", "u", "b")
    return Value(None, np.asarray(value)) if integer and not isinstance(value, Tracer) else Value()


def _run(program, ins: list[Value]) -> list[Value]:
    """Return what is known of the outputs of a jaxpr, open or closed."""
    jaxpr = getattr(program, "jaxpr", program)
    consts = map(_constant, getattr(program, "consts", ()))
    return interpret(jaxpr.replace(eqns=_needed(jaxpr)), consts, ins, _follow, _constant)


def _needed(jaxpr) -> list:
    """Return the equations that the outputs need, in order."""
    needed, kept = {v for v in jaxpr.outvars if not isinstance(v, Literal)}, []
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            needed.update(v for v in eqn.invars if not isinstance(v, Literal))
            kept.append(eqn)
    return kept[::-1]


def _follow(eqn, ins) -> list[Value]:
    name, tainted = eqn.primitive.name, any(value.deps is not None for value in ins)
    follow = _CONTROL.get(name)
    # Without dependencies only a call may still have something to tell: the integers that it computes.
    if follow and (tainted or follow is _call) and (outs := follow(eqn, ins)) is not None:
        return outs
    if not tainted:
        return [Value(None, known_result(eqn, ins))] if len(eqn.outvars) == 1 else [Value()] * len(eqn.outvars)
    found = RULES[name](eqn, ins) if name in RULES else _expanded(eqn, ins)
    found = [found] if isinstance(found, Deps) else found
    if found is None or any(
        d is not None and d.ids.shape != v.aval.shape for d, v in zip(found, eqn.outvars, strict=True)
    ):
        found = everything(eqn, ins)
    return [Value(deps) for deps in found]


def _expanded(eqn, ins):
    """Follow the implementation of a primitive without a rule, if it is made of others (as those of BCOO are)."""
    closed = None
    with contextlib.suppress(Exception):  # whatever goes wrong: everything may depend on everything
        shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
        closed = jax.make_jaxpr(lambda *args: eqn.primitive.impl(*args, **eqn.params))(*shapes)
    if closed is None or eqn.primitive.name in primitives(closed.jaxpr):
        return None
    return [value.deps for value in _run(closed, ins)]


# ------------------------------------------------------------------------------------------------ control flow

# Primitives that run one program within, with the same inputs and outputs.
_CALLS = "jit pjit closed_call core_call remat remat2 checkpoint custom_jvp_call custom_vjp_call custom_vmap_call"


def _call(eqn, ins):
    inner = [p for p in eqn.params.values() if isinstance(p, ClosedJaxpr | Jaxpr)]
    if len(inner) != 1:
        return None
    jaxpr = getattr(inner[0], "jaxpr", inner[0])
    if len(jaxpr.invars) != len(ins) or len(jaxpr.outvars) != len(eqn.outvars):
        return None
    return _run(inner[0], ins)


def _either(a: Value, b: Value) -> Value:
    if a.deps is None or b.deps is None:
        return Value(a.deps or b.deps)
    return Value(united([a.deps, b.deps]))


def _cond(eqn, ins):
    which, *operands = ins
    if which.deps is not None:
        return None
    outs, *others = (_run(branch, operands) for branch in eqn.params["branches"])
    for other in others:
        outs = [_either(a, b) for a, b in zip(outs, other, strict=True)]
    return outs


def _fixed_point(step, carry, also) -> list[Value]:
    """Return values that contain ``carry`` and what ``step`` makes of them; ``also`` is what else may flow in."""
    carry = [Value(value.deps) for value in carry]
    for _ in range(ROUNDS):
        after = [_either(a, b) for a, b in zip(carry, step(carry), strict=True)]
        if all(same_sizes(a.deps, b.deps) for a, b in zip(carry, after, strict=True)):
            return carry
        carry = after
    return also(carry)


def _mixed(values, carried) -> list[Value]:
    union: Any = over_all(values)
    return [Value(union.moved(np.broadcast_to(union.ids, v.aval.shape))) for v in carried]


def _while(eqn, ins):
    p = eqn.params
    tests, bodies = p["cond_nconsts"], p["body_nconsts"]
    test, body, start = ins[:tests], ins[tests : tests + bodies], ins[tests + bodies :]
    carry = _fixed_point(lambda c: _run(p["body_jaxpr"], body + c), start, lambda c: _mixed(body + c, eqn.outvars))
    if _run(p["cond_jaxpr"], test + carry)[0].deps is not None:
        return None
    return carry


def _scan(eqn, ins):
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    consts, carry, xs = scan_inputs(eqn.params, ins)
    fixed, carried = len(consts), len(carry)
    if length == 0:
        return None
    if length * _cost(body.jaxpr) <= UNROLLED:
        return _unrolled(eqn, consts, carry, xs)
    xs = [Value(value.deps and _over_steps(value.deps)) for value in xs]
    inner = body.jaxpr.invars[fixed : fixed + carried]
    carry = _fixed_point(
        lambda c: _run(body, consts + c + xs)[:carried], carry, lambda c: _mixed(consts + c + xs, inner)
    )
    outs = _run(body, consts + carry + xs)
    shapes = [v.aval.shape for v in eqn.outvars]
    return [
        Value(out.deps and out.deps.moved(np.broadcast_to(out.deps.ids, s)))
        for out, s in zip(outs, shapes, strict=True)
    ]


def _over_steps(deps):
    shape = deps.ids.shape[1:]
    return reduced([(np.arange(int(np.prod(shape))).reshape(shape), deps)], shape)


def _unrolled(eqn, consts, carry, xs):
    body, length, steps = eqn.params["jaxpr"], eqn.params["length"], []
    order = range(length)
    for i in reversed(order) if eqn.params["reverse"] else order:
        outs = _run(body, consts + carry + [_at(x, i) for x in xs])
        carry = outs[: len(carry)]
        steps.append([out.deps for out in outs[len(carry) :]])
    if eqn.params["reverse"]:
        steps.reverse()
    return carry + [_stacked(parts) for parts in zip(*steps, strict=True)]


def _at(value, i):
    deps, known = value
    return Value(deps and deps.moved(np.asarray(deps.ids[i])), None if known is None else np.asarray(known[i]))


def _stacked(parts):
    model = next((part for part in parts if part is not None), None)
    if model is None:
        return Value()
    nothing = model.moved(np.full_like(model.ids, EMPTY))
    parts = joined([nothing if part is None else part for part in parts])
    return Value(parts[0].moved(np.stack([part.ids for part in parts])))


def _cost(jaxpr):
    """Return how many equations are followed in one run."""
    total = 0
    for eqn in jaxpr.eqns:
        steps = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += 1 + steps * sum(_cost(opened(inner)) for inner in held(eqn))
    return total


_CONTROL = {**dict.fromkeys(_CALLS.split(), _call), "cond": _cond, "while": _while, "scan": _scan}
