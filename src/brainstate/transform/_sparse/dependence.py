"""Which outputs of a program depend on which inputs: an interpreter of jaxprs that computes with sets of inputs.

It is run on programs that are linear in the inputs asked for (a JVP in its tangents, a pullback in its cotangents),
traced with every other input abstract. What it finds therefore holds whatever the floating values are, custom
derivative rules included, and the order of mathematics does not matter: it asks what the program that will be
evaluated can let through. Everything is on the safe side: a branch of ``cond`` may be taken, a loop may run any number
of times, and a primitive without a rule lets everything through.

Integers and booleans that are constants of the program are seen: with known indices a gather is exact.

A short scan is followed step by step. A long one is followed in all its steps at once, as a map over them: what each
step is handed by the one before is known after as many rounds as a carry is handed on, which is exact, and linear in
the length, where that is a few steps. Where a carry is handed on for ever (a sum over all steps), all steps are taken
together, and a warning says so.
"""

import collections
import contextlib
import warnings
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from ..._compat import scan_inputs
from ..._errors import DensePatternWarning
from ..._program.interpret import bind, held, interpret, opened, within
from ..._program.source_lines import frames_of, site_of
from .index_sets import EMPTY, Deps, identity, joined, reduced, same_sizes, united
from .rules import RULES, Value, everything, known_result, over_all

__all__ = ["dependencies", "primitives"]

#: A scan is followed step by step while that takes at most so many equations; beyond, in all steps at once.
UNROLLED = 10_000
#: And that while all values of all steps have at most so many elements.
LARGEST_LOOP = 50_000_000
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
_CALLS = "jit closed_call remat2 custom_jvp_call custom_vjp_call custom_vmap_call"


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
    if (outs := _mapped(eqn, consts, carry, xs)) is not None:
        return outs
    _warn(eqn)
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


def _mapped(eqn, consts, carry, xs):
    """Follow all steps at once, or return None if they hand on a carry for too long, or are too large."""
    body, length, reverse = eqn.params["jaxpr"], eqn.params["length"], eqn.params["reverse"]
    if length * sum(v.aval.size for e in body.jaxpr.eqns for v in e.outvars) > LARGEST_LOOP:
        return None
    xs = [_reversed(x) for x in xs] if reverse else xs
    steps, shapes = _batched(body, len(consts), length)
    known = _counters(body, length, consts, carry, xs)
    sums = _sums(body.jaxpr, len(consts), len(carry))

    def begun(outs):
        """Return what each step begins with, where ``outs`` is what it makes of that."""
        deps = [_handed_on(*each) for each in zip(carry, outs, shapes[len(consts) :], strict=False)]
        return [Value(None if i in sums else d, known[i]) for i, d in enumerate(deps)]

    before = begun([Value()] * len(carry))
    for _ in range(ROUNDS):
        outs = _run(steps, [*consts, *before, *xs])
        after = begun(outs[: len(carry)])
        if all(same_sizes(a.deps, b.deps) for a, b in zip(before, after, strict=True)):
            rows = [Value(out.deps) for out in outs[len(carry) :]]
            last = [
                _either(first, Value(out.deps and _over_steps(out.deps))) if i in sums else _at(Value(out.deps), -1)
                for i, (first, out) in enumerate(zip(carry, outs, strict=False))
            ]
            return last + ([_reversed(row) for row in rows] if reverse else rows)
        before = after
    return None


def _batched(body, fixed, length):
    """Return the program of all steps, which takes the constants once, and the shapes of its inputs."""
    ins = body.jaxpr.invars
    axes = [None] * fixed + [0] * (len(ins) - fixed)
    shapes = [v.aval.shape if axis is None else (length, *v.aval.shape) for v, axis in zip(ins, axes, strict=True)]
    types = [jax.ShapeDtypeStruct(shape, v.aval.dtype) for shape, v in zip(shapes, ins, strict=True)]
    return jax.make_jaxpr(jax.vmap(jaxpr_as_fun(body), in_axes=axes, axis_size=length))(*types), shapes


def _sums(jaxpr, fixed, count) -> set[int]:
    """Return which carries are only added to, as the derivatives by constants are in reverse mode."""
    adding = [eqn for eqn in jaxpr.eqns if eqn.primitive.name in ("add", "add_any", "convert_element_type", "copy")]
    sum_of = {v: eqn.outvars[0] for eqn in adding for v in eqn.invars if not isinstance(v, Literal)}
    atoms = [*(v for eqn in jaxpr.eqns for v in eqn.invars), *jaxpr.outvars]
    uses = collections.Counter(v for v in atoms if not isinstance(v, Literal))

    def is_sum(v, out):
        while v is not out and uses[v] == 1 and v in sum_of:
            v = sum_of[v]
        return v is out and uses[v] == 1

    pairs = zip(jaxpr.invars[fixed : fixed + count], jaxpr.outvars, strict=False)
    return {i for i, pair in enumerate(pairs) if is_sum(*pair)}


def _reversed(value):
    deps, known = value
    return Value(deps and deps.moved(deps.ids[::-1]), None if known is None else known[::-1])


def _handed_on(first, out, shape):
    """Return what the steps begin with: the carry, and what each step but the last makes of it."""
    model = first.deps or out.deps
    if model is None:
        return None
    first = first.deps or model.moved(np.full(shape[1:], EMPTY))
    first, out = joined([first, out.deps or model.moved(np.full(shape, EMPTY))])
    return first.moved(np.concatenate([first.ids[None], out.ids[:-1]]))


def _counters(body, length, consts, carry, xs) -> list[np.ndarray | None]:
    """Return for each carry, where that is integers which follow from known ones alone, those that each step sees."""
    jaxpr, fixed, count = body.jaxpr, len(consts), len(carry)
    known = [value.known is not None for value in [*consts, *carry, *xs]]
    needs = [_used(jaxpr, [out]) for out in jaxpr.outvars[:count]]
    followed = [i for i in range(count) if known[fixed + i]]
    while unknown := [i for i in followed if any(not known[n] for n in needs[i])]:
        for i in unknown:
            known[fixed + i] = False
        followed = [i for i in followed if known[fixed + i]]
    found: list[Any] = [None] * count
    if not followed:
        return found
    program = ClosedJaxpr(jaxpr.replace(outvars=[jaxpr.outvars[i] for i in followed]), body.consts)
    program = ClosedJaxpr(program.jaxpr.replace(eqns=_needed(program.jaxpr)), body.consts)

    def step(now, x):
        inputs = [*(value.known for value in consts), *map(now.get, range(count)), *x]
        return dict(zip(followed, interpret(program.jaxpr, program.consts, inputs, bind), strict=True)), now

    with jax.ensure_compile_time_eval():
        start = {i: jax.numpy.asarray(carry[i].known) for i in followed}
        steps = jax.lax.scan(step, start, [value.known for value in xs], length)[1]
    for i in followed:
        found[i] = np.asarray(steps[i])
    return found


def _used(jaxpr, outs) -> list[int]:
    """Return the numbers of the inputs that ``outs`` are computed from."""
    kept = _needed(jaxpr.replace(outvars=outs))
    used = {v for v in [*outs, *(v for eqn in kept for v in eqn.invars)] if not isinstance(v, Literal)}
    return [n for n, v in enumerate(jaxpr.invars) if v in used]


def _warn(eqn) -> None:
    """Say that the pattern of a scan is larger than need be, at the line of the user."""
    site = site_of(frames_of(eqn))
    file, line = (site.file, site.line) if site else ("<unknown>", 0)
    warnings.warn_explicit(
        f"the scan at {file}:{line} has {eqn.params['length']} steps and hands its carry on through many of them: its "
        f"sparsity pattern is that of all steps taken together, which is exact or too large, and then dense. Give the "
        f"pattern by hand (pattern=...), or carry for a few steps only.",
        DensePatternWarning,
        file,
        line,
    )


def _cost(jaxpr):
    """Return how many equations are followed in one run."""
    total = 0
    for eqn in jaxpr.eqns:
        steps = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += 1 + steps * sum(_cost(opened(inner)) for inner in held(eqn))
    return total


_CONTROL = {**dict.fromkeys(_CALLS.split(), _call), "cond": _cond, "while": _while, "scan": _scan}
