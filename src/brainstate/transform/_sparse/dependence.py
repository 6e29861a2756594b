"""The inputs that each element of an output depends on: an evaluation of a jaxpr on sets of inputs.

The analysis is run on programs that are linear in the inputs asked for (a JVP in its tangents, a pullback in its
cotangents), traced with every other input abstract. So its result holds for all floating values. It is about the
program that will be evaluated, custom derivative rules included, and not about the mathematical function. It errs on
the safe side: any branch of a ``cond`` may be taken, a ``while`` loop may run any number of iterations, and a primitive
without a rule makes every result depend on everything.

Integers and booleans that are constants of the program are known: with known indices a gather is exact.

A scan is followed in one of three ways:

1. Step by step, while it is short.
2. All steps at once, as a map over them. The carry that a step gets from the one before is found by repetition: round
   ``k`` is exact for a carry that is handed on over ``k`` steps. The cost is linear in the length where that is a few.
3. One step that stands for all, where a carry is handed on for many steps (a sum over all of them). All steps are then
   taken together, and a warning says so.
"""

import collections
import contextlib
import warnings
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from ..._errors import DensePatternWarning
from ..._program.control_flow import Call, Cond, Scan, While, control_flow, find_fixed_point
from ..._program.interpret import all_equations, all_programs, bind, inner_programs, interpret, open_jaxpr
from ..._program.liveness import prune
from ..._program.source_lines import frames_of, site_of
from .index_sets import EMPTY, Deps, identity, reduce_groups, same_sizes, share_table, unite
from .rules import RULES, Value, everything, known_result, over_all

__all__ = ["dependencies", "primitives"]

# The largest number of equations to follow in a scan step by step; beyond, all steps are followed at once.
UNROLLED = 10_000
# The largest number of elements, over all values of all steps, to follow all steps at once.
LARGEST_LOOP = 50_000_000
# The largest number of rounds towards a fixed point; beyond, a loop mixes all its inputs.
ROUNDS = 12


def dependencies(closed: ClosedJaxpr, unasked: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for each output of a program its pairs (element of the output, element of the inputs it depends on).

    The pairs are sorted. The first ``unasked`` inputs are left out; the elements of the others are numbered in order.
    """
    asked = closed.jaxpr.invars[unasked:]
    sizes = [int(np.prod(v.aval.shape)) for v in asked]
    starts, width = np.cumsum([0, *sizes]), sum(sizes)
    no_pairs = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    if width == 0:
        return [no_pairs for _ in closed.jaxpr.outvars]
    values = [
        Value(identity(int(start), v.aval.shape, width) if size else None)
        for start, size, v in zip(starts, sizes, asked, strict=False)
    ]
    if _has_references(closed):  # a dependency could pass unseen through memory
        outs = _mixture(values, closed.jaxpr.outvars)
    else:
        outs = _run(closed, [Value()] * unasked + values)
    return [no_pairs if out.deps is None else out.deps.entries() for out in outs]


def primitives(program: Jaxpr | ClosedJaxpr) -> set[str]:
    """Return the names of all primitives in a program and in the programs within."""
    return {eqn.primitive.name for eqn in all_equations(program)}


def _has_references(closed) -> bool:
    """Tell whether a program, or one within, has mutable arrays, as `jax.new_ref` makes them."""
    jaxprs = list(map(open_jaxpr, all_programs(closed)))
    parts = [*jaxprs, *(eqn for jaxpr in jaxprs for eqn in jaxpr.eqns)]
    return any(hasattr(v.aval, "inner_aval") for part in parts for v in (*part.invars, *part.outvars))


# ------------------------------------------------------------------------------------------------ the interpreter


def _constant(value) -> Value:
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    integer = isinstance(value, bool | int) or kind in ("i", "u", "b")
    return Value(None, np.asarray(value)) if integer and not isinstance(value, Tracer) else Value()


def _run(closed, ins: list[Value]) -> list[Value]:
    """Return the `Value` of each output of a program, from those of its inputs."""
    return interpret(prune(closed.jaxpr), map(_constant, closed.consts), ins, _follow, _constant)


def _follow(eqn, ins) -> list[Value]:
    """Return the `Value` of each result of an equation, from those of its operands."""
    dependent, flow = any(value.deps is not None for value in ins), control_flow(eqn)
    # Without dependencies only a call may still have something to tell: the integers that it computes.
    if (dependent or isinstance(flow, Call)) and (outs := _follow_inside(eqn, flow, ins)) is not None:
        return outs
    if not dependent:
        return [Value(None, known_result(eqn, ins))] if len(eqn.outvars) == 1 else [Value()] * len(eqn.outvars)
    name = eqn.primitive.name
    found = RULES[name](eqn, ins) if name in RULES else _follow_implementation(eqn, ins)
    found = [found] if isinstance(found, Deps) else found
    if found is None or any(
        d is not None and d.ids.shape != v.aval.shape for d, v in zip(found, eqn.outvars, strict=True)
    ):
        found = everything(eqn, ins)
    return [Value(deps) for deps in found]


def _follow_implementation(eqn, ins):
    """Follow the implementation of a primitive without a rule, if it is made of others (as those of BCOO are)."""
    closed = None
    with contextlib.suppress(Exception):  # whatever goes wrong: everything may depend on everything
        shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
        closed = jax.make_jaxpr(lambda *args: eqn.primitive.impl(*args, **eqn.params))(*shapes)
    if closed is None or eqn.primitive.name in primitives(closed.jaxpr):
        return None
    return [value.deps for value in _run(closed, ins)]


# ------------------------------------------------------------------------------------------------ control flow


def _follow_inside(eqn, flow, ins) -> list[Value] | None:
    """Follow the programs of a call, loop or branch; return None for a single operation, and where that gives up."""
    match flow:
        case Call(body, adds) if adds != "devices":  # whose body sees parts of the arrays
            return _run(body, ins)
        case Cond(branches):
            number, *operands = ins
            if number.deps is None:
                return list(map(_union, *(_run(branch, operands) for branch in branches)))
        case While():
            return _follow_while(flow, *flow.split(ins), eqn.outvars)
        case Scan(length=length) if length:
            return _follow_scan(eqn, flow, *flow.split(ins))
    return None


def _union(*values: Value) -> Value:
    """Return the dependencies of a value that is one of ``values``."""
    found = [value.deps for value in values if value.deps is not None]
    return Value(unite(found) if found else None)


def _mixture(values, variables) -> list[Value]:
    """Return values with the shapes of ``variables``, each element of which depends on all that ``values`` do."""
    union: Any = over_all(values)
    return [Value(union and union.rearrange(np.broadcast_to(union.ids, v.aval.shape))) for v in variables]


def _carry_of_loop(step, carry, others, variables) -> list[Value]:
    """Return the dependencies of the carry of a loop, for any number of iterations; ``step`` computes one iteration.

    ``others`` are the other inputs of an iteration. If there is no fixed point within `ROUNDS`, all inputs are mixed.
    """
    carry = [Value(value.deps) for value in carry]
    found = find_fixed_point(lambda now: list(map(_union, now, step(now))), carry, _same_sizes, ROUNDS)
    return _mixture([*others, *carry], variables) if found is None else found


def _same_sizes(before, after) -> bool:
    return all(same_sizes(a.deps, b.deps) for a, b in zip(before, after, strict=True))


def _follow_while(loop, test_constants, constants, carry, variables):
    carry = _carry_of_loop(lambda now: _run(loop.body, constants + now), carry, constants, variables)
    if _run(loop.test, test_constants + carry)[0].deps is not None:
        return None
    return carry


def _follow_scan(eqn, loop, constants, carry, xs):
    if loop.length * _cost(loop.body.jaxpr) <= UNROLLED:
        return _follow_each_step(loop, constants, carry, xs)
    if (outs := _follow_all_steps(loop, constants, carry, xs)) is not None:
        return outs
    _warn(eqn)
    return _follow_any_step(eqn, loop, constants, carry, xs)


# ------------------------------------------------------------------------------------------------ a scan, three ways


def _follow_each_step(loop, constants, carry, xs):
    """Follow a scan step by step."""
    rows: list[Any] = [None] * loop.length
    for i in loop.steps():
        outs = _run(loop.body, [*constants, *carry, *(_slice_step(x, i) for x in xs)])
        carry, rows[i] = outs[: loop.carried], [out.deps for out in outs[loop.carried :]]
    return carry + [_stack_steps(column) for column in zip(*rows, strict=True)]


def _slice_step(value, i):
    deps, known = value
    return Value(deps and deps.rearrange(np.asarray(deps.ids[i])), None if known is None else np.asarray(known[i]))


def _stack_steps(rows):
    model = next((row for row in rows if row is not None), None)
    if model is None:
        return Value()
    nothing = model.rearrange(np.full_like(model.ids, EMPTY))
    rows = share_table([nothing if row is None else row for row in rows])
    return Value(rows[0].rearrange(np.stack([row.ids for row in rows])))


def _follow_any_step(eqn, loop, constants, carry, xs):
    """Follow one step that stands for all: its carry is that of any step, and its row of xs any row."""
    xs = [Value(value.deps and _union_over_steps(value.deps)) for value in xs]
    variables = loop.body.jaxpr.invars[loop.constants : loop.constants + loop.carried]
    carry = _carry_of_loop(
        lambda now: _run(loop.body, constants + now + xs)[: loop.carried], carry, constants + xs, variables
    )
    outs = _run(loop.body, constants + carry + xs)
    shapes = [v.aval.shape for v in eqn.outvars]
    return [
        Value(out.deps and out.deps.rearrange(np.broadcast_to(out.deps.ids, s)))
        for out, s in zip(outs, shapes, strict=True)
    ]


def _union_over_steps(deps):
    shape = deps.ids.shape[1:]
    return reduce_groups([(np.arange(int(np.prod(shape))).reshape(shape), deps)], shape)


def _follow_all_steps(loop, constants, carry, xs):
    """Follow all steps at once, or return None if they hand on a carry for too long, or are too large."""
    body, length, count = loop.body, loop.length, loop.carried
    if length * sum(v.aval.size for e in body.jaxpr.eqns for v in e.outvars) > LARGEST_LOOP:
        return None
    xs = [_reverse(x) for x in xs] if loop.reverse else xs
    steps, shapes = _vectorize(loop)
    known = _known_carries(loop, constants, carry, xs)
    sums = _sums(loop)

    def starts(outs):
        """Return the carry that each step starts with, if ``outs`` is the carry that each returns."""
        deps = [_shift(*each) for each in zip(carry, outs, shapes[loop.constants :], strict=False)]
        return [Value(None if i in sums else d, known[i]) for i, d in enumerate(deps)]

    def step(state):
        outs = _run(steps, [*constants, *state[0], *xs])
        return starts(outs[:count]), outs

    found = find_fixed_point(step, (starts([Value()] * count), []), lambda a, b: _same_sizes(a[0], b[0]), ROUNDS)
    if found is None:
        return None
    outs = [Value(out.deps) for out in found[1]]
    last = [
        _union(first, Value(out.deps and _union_over_steps(out.deps))) if i in sums else _slice_step(out, -1)
        for i, (first, out) in enumerate(zip(carry, outs, strict=False))
    ]
    return last + ([_reverse(row) for row in outs[count:]] if loop.reverse else outs[count:])


def _vectorize(loop):
    """Return the program of all steps, which takes the constants once, and the shapes of its inputs."""
    ins = loop.body.jaxpr.invars
    axes = [None] * loop.constants + [0] * (len(ins) - loop.constants)
    shapes = [v.aval.shape if axis is None else (loop.length, *v.aval.shape) for v, axis in zip(ins, axes, strict=True)]
    types = [jax.ShapeDtypeStruct(shape, v.aval.dtype) for shape, v in zip(shapes, ins, strict=True)]
    steps = jax.vmap(jaxpr_as_fun(loop.body), in_axes=axes, axis_size=loop.length)
    return jax.make_jaxpr(steps)(*types), shapes


def _sums(loop) -> set[int]:
    """Return the numbers of the carries that are only added to, as derivatives by constants are in reverse mode."""
    jaxpr = loop.body.jaxpr
    adding = [eqn for eqn in jaxpr.eqns if eqn.primitive.name in ("add", "add_any", "convert_element_type", "copy")]
    sum_of = {v: eqn.outvars[0] for eqn in adding for v in eqn.invars if not isinstance(v, Literal)}
    atoms = [*(v for eqn in jaxpr.eqns for v in eqn.invars), *jaxpr.outvars]
    uses = collections.Counter(v for v in atoms if not isinstance(v, Literal))

    def is_sum(v, out):
        while v is not out and uses[v] == 1 and v in sum_of:
            v = sum_of[v]
        return v is out and uses[v] == 1

    pairs = zip(jaxpr.invars[loop.constants : loop.constants + loop.carried], jaxpr.outvars, strict=False)
    return {i for i, pair in enumerate(pairs) if is_sum(*pair)}


def _reverse(value):
    deps, known = value
    return Value(deps and deps.rearrange(deps.ids[::-1]), None if known is None else known[::-1])


def _shift(first, out, shape):
    """Return the carry that each step starts with: the first one, then the results of all steps but the last."""
    model = first.deps or out.deps
    if model is None:
        return None
    first = first.deps or model.rearrange(np.full(shape[1:], EMPTY))
    first, out = share_table([first, out.deps or model.rearrange(np.full(shape, EMPTY))])
    return first.rearrange(np.concatenate([first.ids[None], out.ids[:-1]]))


def _known_carries(loop, constants, carry, xs) -> list[np.ndarray | None]:
    """Return for each carry its value at the start of every step, where known integers alone determine that."""
    jaxpr, first, count = loop.body.jaxpr, loop.constants, loop.carried
    inputs = [value.known is not None for value in [*constants, *carry, *xs]]
    needs = [_inputs_read(jaxpr, out) for out in jaxpr.outvars[:count]]

    def step(known):
        """Keep the carries that a step computes from known inputs."""
        now = [*inputs[:first], *known, *inputs[first + count :]]
        return [
            is_known and not any(need > have for need, have in zip(needs[i], now, strict=True))
            for i, is_known in enumerate(known)
        ]

    known = find_fixed_point(step, inputs[first : first + count])
    followed = [i for i in range(count) if known[i]]
    found: list[Any] = [None] * count
    if not followed:
        return found
    program = prune(jaxpr.replace(outvars=[jaxpr.outvars[i] for i in followed]))

    def advance(now, x):
        given = [*(value.known for value in constants), *map(now.get, range(count)), *x]
        return dict(zip(followed, interpret(program, loop.body.consts, given, bind), strict=True)), now

    with jax.ensure_compile_time_eval():
        start = {i: jax.numpy.asarray(carry[i].known) for i in followed}
        steps = jax.lax.scan(advance, start, [value.known for value in xs], loop.length)[1]
    for i in followed:
        found[i] = np.asarray(steps[i])
    return found


def _inputs_read(jaxpr, out) -> list[bool]:
    """Tell for each input of a program if it is read when ``out`` is evaluated."""
    eqns = prune(jaxpr.replace(outvars=[out])).eqns
    read = {v for v in (out, *(v for eqn in eqns for v in eqn.invars)) if not isinstance(v, Literal)}
    return [v in read for v in jaxpr.invars]


def _warn(eqn) -> None:
    """Warn, at the line of the user, that the pattern of a scan may be larger than necessary."""
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
    """Return the number of equations that one evaluation follows."""
    total = 0
    for eqn in jaxpr.eqns:
        flow = control_flow(eqn)
        steps = flow.length if isinstance(flow, Scan) else 1
        total += 1 + steps * sum(_cost(open_jaxpr(inner)) for inner in inner_programs(eqn))
    return total
