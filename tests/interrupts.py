"""Interrupts placed at every bytecode of this package: scenarios, and what must hold after each.

``KeyboardInterrupt`` is raised before a bytecode that runs in a frame of the package. That is more than
signals do: CPython looks for them only after calls, at the beginning of a function and at jumps back. Left out are the
few bytecodes between the end of a block and its exit (`exits`): before none of them CPython looks for a signal.

One call with all bytecodes traced finds the places. An interrupted call traces the bytecodes of one function only, so a
place on the steady path of a compiled call costs about 0.1 ms, with all that is checked after it.
"""

import dis
import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import jax
import jax.numpy as jnp
import numpy as np

import brainstate
from brainstate import ParamState, State, nn, random
from brainstate._seam import marker as _marker
from brainstate._seam import run_time_errors as _errors
from brainstate._seam import scope as _scope
from brainstate._seam import tokens as _tokens
from brainstate.transform import checkpoint, cond, for_loop, functional, grad, jit, prepare, substituted, vmap

PACKAGE = str(Path(brainstate.__file__).parent)
LOCKS = _scope._step_lock, _scope._commit_lock, _scope.claim_lock


@functools.cache
def exits(code) -> frozenset[int]:
    """Return the offsets of the bytecodes that leave a ``with`` block, before its exit is called, or begin ``finally``.

    CPython looks for no signal before these: an interrupt comes at the end of the last call in the block.
    """
    found, nones = _finally(code), []
    for instruction in dis.get_instructions(code):
        if instruction.opname == "SWAP" or (instruction.opname == "LOAD_CONST" and instruction.argval is None):
            nones.append(instruction.offset)
        elif instruction.opname in ("PRECALL", "CALL") and instruction.arg == 2 and len(nones) >= 3:
            found |= {*nones[-4:], instruction.offset}
        else:
            nones = []
        if instruction.opname in ("NOP", "PUSH_EXC_INFO", "WITH_EXCEPT_START"):
            found.add(instruction.offset)
    return frozenset(found)


def _finally(code) -> set[int]:
    """Return the offsets of the bytecodes of a ``finally`` block, where nothing was raised, up to its first call."""
    instructions, found = list(dis.get_instructions(code)), set()
    places = {i.offset: n for n, i in enumerate(instructions)}
    for entry in dis.Bytecode(code).exception_entries:
        handler = instructions[places[entry.target] :][:4]
        after = instructions[places[entry.end] :] if entry.end in places else []
        # The block stands twice in the code, and begins in the same way.
        same = [(i.opname, i.arg) for i in after[:2]] == [(i.opname, i.arg) for i in handler[1:3]]
        if handler[0].opname == "PUSH_EXC_INFO" and same:
            found |= {i.offset for i in itertools.takewhile(lambda i: not i.opname.startswith("CALL"), after[:6])}
    return found


def uncovered(code) -> list[int]:
    """Return the lines in ``with`` blocks where an interrupt may come and passes the end of the block by.

    CPython 3.13 compiles such a jump for a condition at the end of a loop; that of a ``continue`` is another one.
    """
    instructions = {i.offset: i for i in dis.get_instructions(code)}
    found = []
    for before, after in itertools.pairwise(dis.Bytecode(code).exception_entries):
        if before.target == after.target and instructions[before.target + 2].opname == "WITH_EXCEPT_START":
            gap = [i for i in instructions.values() if before.end <= i.offset < after.start]
            inside = itertools.takewhile(lambda i: not i.opname.startswith("CALL"), gap)  # that of the exit
            found += [i.positions.lineno for i in inside if i.opname == "JUMP_BACKWARD"]
    return found + [line for part in code.co_consts if isinstance(part, CodeType) for line in uncovered(part)]


@dataclass(frozen=True)
class Place:
    """Before the bytecode at ``offset`` of ``code``, or before its frame begins or goes on (None), the ``nth`` time."""

    code: CodeType
    offset: int | None
    nth: int

    def __str__(self):
        lines = {at: line for start, end, line in self.code.co_lines() for at in range(start, end, 2)}
        line = self.code.co_firstlineno if self.offset is None else lines[self.offset]
        return f"{self.code.co_qualname}:{line}, offset {self.offset}, the {self.nth}. time"


def _by_trace(call, note, only):
    def entered(frame, event, _):
        if not _is_watched(frame.f_code, only):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        note(frame.f_code, None)
        return within

    def within(frame, event, _):
        if event == "opcode":
            note(frame.f_code, frame.f_lasti)
        return within

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        call()
    finally:
        sys.settrace(before)


def _by_monitor(call, note, only):
    monitoring, codes = sys.monitoring, {only} - {None}
    events = monitoring.events

    def entered(code, _):
        if _is_watched(code, only):
            monitoring.set_local_events(_TOOL, code, events.INSTRUCTION if only is None else _ALL)
            codes.add(code)
            note(code, None)

    monitoring.register_callback(_TOOL, events.PY_START, entered)
    monitoring.register_callback(_TOOL, events.PY_RESUME, entered)
    monitoring.register_callback(_TOOL, events.INSTRUCTION, note)
    if only is None:
        monitoring.set_events(_TOOL, events.PY_START | events.PY_RESUME)
    else:
        monitoring.set_local_events(_TOOL, only, _ALL)
    try:
        call()
    finally:
        monitoring.set_events(_TOOL, 0)
        for code in codes:
            monitoring.set_local_events(_TOOL, code, 0)


def _is_watched(code, only):
    return code is only if only is not None else code.co_filename.startswith(PACKAGE)


if hasattr(sys, "monitoring"):  # Python 3.12 and later, where the other one misses bytecodes of a first call
    _TOOL = 4
    sys.monitoring.use_tool_id(_TOOL, "interrupts")
    _ALL = sys.monitoring.events.PY_START | sys.monitoring.events.PY_RESUME | sys.monitoring.events.INSTRUCTION
    watch = _by_monitor
else:
    watch = _by_trace


def places(call) -> list[Place]:
    """Return the places that ``call()`` comes by, in order."""
    found, times = [], Counter()

    def note(code, offset):
        if offset not in exits(code):
            times[code, offset] += 1
            found.append(Place(code, offset, times[code, offset]))

    watch(call, note, None)
    return found


def interrupted(call, place) -> bool:
    """Return whether ``call()`` came by the place, where it was interrupted."""
    left = place.nth

    def note(_, offset):
        nonlocal left
        if offset == place.offset:
            left -= 1
            if not left:
                raise KeyboardInterrupt

    try:
        watch(call, note, place.code)
    except KeyboardInterrupt:
        return True
    return False


@dataclass
class Scenario:
    """``make()`` returns States and a function that changes them.

    ``fresh``: each call is to be a first one. ``traces``: each is one for JAX. ``meets``: a function that JAX itself
    has compiled reads a State.
    """

    name: str
    make: Callable
    fresh: bool = False
    traces: bool = False
    meets: bool = False

    @property
    def long(self):
        return self.fresh or self.traces


def seen(tree) -> list:
    """Return the numbers of ``tree``, to compare with ``==``."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def held(lock) -> bool:
    """Tell whether this thread holds ``lock``."""
    return lock._is_owned() if hasattr(lock, "_is_owned") else lock.locked()


class Trial:
    """One scenario: its States, what a call makes of them, and the places that it comes by."""

    def __init__(self, scenario):
        self.scenario, self.given = scenario, None
        self.renew()
        self.start = [jax.tree.map(np.asarray, state.value) for state in self.states]
        self.reset()
        self.values, self.results = [self.now()], []
        for _ in range(2):
            self.results.append(seen(self.call()))
            self.values.append(self.now())
        # Arrays that a call takes have to be made again for each.
        self.takes = any(leaf.is_deleted() for leaf in jax.tree.leaves(self.given))

    def look(self):
        """Return the places of a call."""
        if self.scenario.fresh:
            self.renew()
        self.reset()
        return places(self.call)

    def now(self):
        return seen([s.value for s in self.states])

    def renew(self):
        self.states, self.call = self.scenario.make()

    def reset(self):
        if self.given is None or self.takes:
            self.given = jax.tree.map(jnp.array, self.start)
        for state, value in zip(self.states, self.given, strict=True):
            state.value = value if isinstance(value, jax.Array) else jax.tree.map(lambda leaf: leaf, value)

    def interrupt(self, place):
        """Interrupt a call and check what is left; return whether it came by the place."""
        if self.scenario.fresh:
            self.renew()
        self.reset()
        token, came = _tokens.token(), interrupted(self.call, place)
        left = {
            "a scope": _scope.innermost() is not None or _scope._open,
            "a trace of JAX": not _scope.eager(),
            "a lock": any(map(held, LOCKS)),
            "a token": _tokens.token() != token,
            "the announcement of an error": _errors._thread.announced,
            "what a trace is given": _marker.thread.given is not None,
        }
        for lock in filter(held, LOCKS):  # or all that comes after this hangs
            lock.release()
        assert not any(left.values()), f"{[name for name in left if left[name]]} left: {self.scenario.name}, {place}"
        now = self.now()
        done = now == self.values[1]
        assert done or (came and now == self.values[0]), f"half a commit: {self.scenario.name}, {place}"
        out = seen(self.call())
        assert out == self.results[done], f"a wrong result afterwards: {self.scenario.name}, {place}"
        assert self.now() == self.values[done + 1], f"wrong values afterwards: {self.scenario.name}, {place}"
        return came


# ------------------------------------------------------------------------------------------ the scenarios


def weights():
    return [ParamState(jnp.arange(3.0)), State({"a": jnp.ones(2), "b": jnp.zeros(())}), State(jnp.array(2.0))]


def descend(a, b, c):
    def step(x):
        a.value = a.value * 0.5 + x
        b.value = {"a": b.value["a"] + a.value[:2], "b": b.value["b"] + 1.0}
        c.value = c.value + b.value["b"]
        return a.value.sum()

    return step


def jitted(**options):
    states = weights()
    step = jit(descend(*states), **options)
    return states, lambda: step(2.0)


def steady(**options):
    states, call = jitted(**options)
    before = [s.value if not options else jax.tree.map(jnp.copy, s.value) for s in states]
    call()
    for state, value in zip(states, before, strict=True):
        state.value = value
    return states, call


def reading():
    states = weights()
    look = jit(lambda: states[0].value.sum() + states[1].value["b"])
    look()
    return states, look


def partial_writes():
    a, b, c = (State(jnp.array(float(i))) for i in range(3))

    @functools.partial(jit, static_argnums=1)
    def step(x, both):
        a.value += x
        if both:
            b.value += a.value
        c.value += a.value
        return c.value

    step(jnp.array(0.0), True)
    step(jnp.array(0.0), False)
    for i, state in enumerate((a, b, c)):
        state.value = jnp.array(float(i))
    return [a, b, c], lambda: step(jnp.array(1.0), False)


def eager():
    states = weights()
    step = descend(*states)

    def call():
        with substituted(states, [2.0 * s.value if i != 1 else s.value for i, s in enumerate(states)]):
            return step(1.0)

    def add():
        states[1].value["a"] = states[1].value["a"] + states[0].value[:2]
        return states[0].value + states[2].value

    return states, call, add


def substituting():
    states, call, _ = eager()
    return states, call


def in_place():
    states, _, add = eager()
    return states, add


def pure():
    states = weights()
    fun, values = functional(descend(*states), states)
    return states, lambda: fun(values, 1.0)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = weights()
        self.scale = 2.0

    @functools.partial(jit, static_argnames="twice")
    def step(self, x, *, twice=False):
        return descend(*self.weights)(x * self.scale * (2.0 if twice else 1.0))


def method():
    model = Model()
    start = [jax.tree.map(jnp.copy, s.value) for s in model.weights]
    model.step(1.0, twice=True)
    for state, value in zip(model.weights, start, strict=True):
        state.value = value
    return model.weights, lambda: model.step(1.0, twice=True)


def met():
    """A compiled function that runs a function which JAX itself has compiled, with a State in it."""
    states = weights()
    a, _, c = states
    helper = jax.jit(lambda x: a.value.sum() * x)

    @jit
    def step(x):
        out = helper(x)
        a.value = a.value + out
        c.value = c.value + helper(x)
        return out

    step(2.0)
    return states, lambda: step(2.0)


def repeated():
    states = weights()
    step = checkpoint(descend(*states))
    return states, lambda: step(jnp.array(1.0))


def derivative():
    states = weights()
    a, _, c = states

    def loss(x):
        c.value = c.value + 1.0
        return (a.value**2).sum() * x

    return states, lambda: grad(loss, a)(2.0)


def looped():
    states = weights()
    return states, lambda: for_loop(descend(*states), jnp.arange(3.0))


def branched():
    states = weights()
    step = descend(*states)
    return states, lambda: cond(states[2].value > 0, step, lambda x: x, jnp.array(1.0))


def mapped():
    rng, (a, _, c) = random.RandomState(0), weights()

    def lane(x):
        c.value = c.value + 1.0
        return a.value * x + rng.normal()

    return [rng, a, c], lambda: vmap(lane)(jnp.arange(3.0))


def drawing():
    rng = random.RandomState(0)
    return [rng], lambda: rng.normal(size=2)


def drawing_compiled():
    rng, total = random.RandomState(0), State(jnp.zeros(2))

    @jit
    def step():
        total.value += rng.normal(size=2)
        return total.value

    step()
    rng.seed(0)
    total.value = jnp.zeros(2)
    return [rng, total], step


def prepared(**options):
    states = weights()
    step = prepare(descend(*states), 2.0, **options)
    return states, lambda: step(2.0)


def preparing():
    states = weights()
    return states, lambda: prepare(descend(*states), 2.0)(2.0)


def scoped():
    states = weights()
    step = descend(*states)

    def call():
        with _scope.Scope("outer"):
            with _scope.Scope("inner") as scope:
                out = step(jnp.array(1.0))
                writes = scope.close()
            _scope.commit(writes)
            writes = _scope.innermost().close()
        _scope.commit(writes)
        return out

    return states, call


def nested():
    states = weights()
    a, b, c = states

    def loss():
        for_loop(descend(a, b, c), jnp.arange(2.0))
        return (a.value * c.value).sum()

    @jit
    def step():
        g = grad(loss, a)()
        a.value = a.value - 0.1 * g
        return g

    return states, step


SCENARIOS = [
    Scenario("jit", steady),
    Scenario("jit that donates", functools.partial(steady, donate_states=True)),
    Scenario("jit that reads", reading),
    Scenario("jit with fewer writes", partial_writes),
    Scenario("jit that draws", drawing_compiled),
    Scenario("prepare", prepared),
    Scenario("prepare that donates", functools.partial(prepared, donate_states=True)),
    Scenario("jit of a method", method),
    Scenario("a draw", drawing),
    Scenario("a write in place", in_place),
    Scenario("substituted", substituting),
    Scenario("functional", pure),
    Scenario("checkpoint", repeated),
    Scenario("scopes", scoped),
    Scenario("grad", derivative),
    Scenario("cond", branched, traces=True),
    Scenario("for_loop", looped, traces=True),
    Scenario("vmap", mapped, traces=True),
    Scenario("jit of JAX's jit", met, meets=True),
    Scenario("first jit", jitted, fresh=True),
    Scenario("first jit that donates", functools.partial(jitted, donate_states=True), fresh=True),
    Scenario("first nested jit", nested, fresh=True),
    Scenario("first prepare", preparing, fresh=True),
]
