"""Interrupts placed at every bytecode of this package: scenarios, and what must hold after each.

A trace function raises ``KeyboardInterrupt`` before the n-th bytecode that runs in a frame of the package. That is
more than signals do: CPython looks for them only after calls, at the beginning of a function and at jumps back. Left
out are the few bytecodes between the end of a ``with`` block and its exit, and those that do nothing: before none of
them CPython looks for a signal.
"""

import dis
import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import brainstate
from brainstate import ParamState, State, random
from brainstate._seam import marker as _marker
from brainstate._seam import run_time_errors as _errors
from brainstate._seam import scope as _scope
from brainstate.transform import cond, for_loop, grad, jit, prepare, vmap

PACKAGE = str(Path(brainstate.__file__).parent)
LOCKS = _scope._step_lock, _scope._commit_lock, _scope.claim_lock
other_thread = ThreadPoolExecutor(1)


@functools.cache
def exits(code) -> frozenset[int]:
    """Return the offsets of the bytecodes that leave a ``with`` block, before its exit is called."""
    found, nones = set(), []
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


class Interrupter:
    """Raises before the ``at``-th bytecode; counts them without one. ``place`` says where it was."""

    def __init__(self, at=None):
        self.at, self.count, self.place = at, 0, None

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "call" or (event == "opcode" and frame.f_lasti not in exits(frame.f_code)):
            self.count += 1
            if self.count == self.at:
                self.place = f"{frame.f_code.co_qualname}:{frame.f_lineno}, offset {frame.f_lasti}"
                raise KeyboardInterrupt
        return self

    def run(self, call):
        """Return whether ``call()`` was interrupted."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


@dataclass
class Scenario:
    """``make()`` returns States and a function that changes them; ``fresh``: each call is to be a first one."""

    name: str
    make: Callable
    fresh: bool = False


def leaves(tree):
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def equal(a, b):
    return len(a) == len(b) and all(map(np.array_equal, a, b))


class Trial:
    """One scenario: its States, what a call makes of them, and the number of places."""

    def __init__(self, scenario):
        self.scenario = scenario
        self.states, self.call = scenario.make()
        self.start = leaves([s.value for s in self.states])
        self.reset()
        self.values = [self.start]
        self.results = []
        for _ in range(2):
            self.results.append(leaves(self.call()))
            self.values.append(self.now())
        if scenario.fresh:
            self.renew()
        counter = Interrupter()
        self.reset()
        counter.run(self.call)
        self.places = counter.count

    def now(self):
        return leaves([s.value for s in self.states])

    def renew(self):
        self.states, self.call = self.scenario.make()

    def reset(self):
        given = iter(self.start)
        for state in self.states:
            treedef = jax.tree.structure(state.value)
            state.value = treedef.unflatten([jnp.array(next(given)) for _ in range(treedef.num_leaves)])

    def interrupt(self, at):
        """Interrupt a call before its ``at``-th bytecode and check what is left."""
        if self.scenario.fresh:
            self.renew()
        self.reset()
        interrupter = Interrupter(at)
        interrupted = interrupter.run(self.call)
        where = f"{self.scenario.name}, {interrupter.place}"
        assert _scope.innermost() is None, f"a scope is open: {where}"
        assert not _scope._open and _marker.thread.given is None, f"something is left: {where}"
        assert not _errors._thread.announced, f"an error is announced: {where}"
        assert _scope.eager(), f"JAX is still tracing: {where}"
        assert other_thread.submit(free_locks).result(), f"a lock is held: {where}"
        now = self.now()
        done = equal(now, self.values[1])
        assert done or (interrupted and equal(now, self.values[0])), f"half a commit: {where}"
        assert equal(leaves(self.call()), self.results[done]), f"a wrong result afterwards: {where}"
        assert equal(self.now(), self.values[done + 1]), f"wrong values afterwards: {where}"
        return interrupted


def free_locks():
    for lock in LOCKS:
        if not lock.acquire(timeout=5):
            return False
        lock.release()
    return True


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
    Scenario("a draw", drawing),
    Scenario("scopes", scoped),
    Scenario("grad", derivative),
    Scenario("cond", branched),
    Scenario("for_loop", looped),
    Scenario("vmap", mapped),
    Scenario("first jit", jitted, fresh=True),
    Scenario("first jit that donates", functools.partial(jitted, donate_states=True), fresh=True),
    Scenario("first nested jit", nested, fresh=True),
    Scenario("first prepare", preparing, fresh=True),
]
