"""Bad input of the loops, branches, maps and the rest: what the user reads, and that nothing was changed.

A row is a misuse of one or several of the States of ``Around``, the class of the error and a pattern of its message.
Each runs on its own, inside a compiled function and inside a gradient.
"""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _unchanged import unchanged
from brainstate import (
    BatchAxisError,
    BrainStateError,
    HiddenState,
    NoSolutionError,
    ParamState,
    State,
    StateTypeError,
    StateValueError,
    TraceContextError,
)
from brainstate import random as R
from brainstate import transform as T
from brainstate.nn import Module
from transforms import rows

XS = jnp.array([1.0, 2.0, 3.0])


class Holder(Module):
    """A Module whose State has a path."""

    def __init__(self):
        self.weight = ParamState(jnp.ones(2))


class Around:
    """The States that are misused."""

    def __init__(self):
        self.s = State(jnp.float32(1.0), name="s")
        self.n = State(jnp.int32(0), name="n")
        self.h = HiddenState(jnp.zeros(3), name="h")
        self.m = State({"a": jnp.zeros((3, 2)), "b": jnp.zeros(4)}, name="m")
        self.w = ParamState(jnp.ones(2), name="w")
        self.text = State("idle", name="text")
        self.rng = R.RandomState(0)
        self.rng.name = "rng"
        self.all = (self.s, self.n, self.h, self.m, self.w, self.text, self.rng)


def put(state, value):
    """Assign, as an expression."""
    state.value = value
    return value


def born(x):
    """Make a State that outlives the call."""
    KEPT.append(State(x, name="born"))
    return x


KEPT = []
NO_RAW = r"State 's' was written inside a raw JAX transform.*(Use|Wrap) the function.* of the same name"


# name: (misuse, class of the error, pattern of the message)
TABLE = {
    # raw JAX transforms around a write
    "raw jit": (lambda a: jax.jit(lambda x: put(a.s, x))(1.0), TraceContextError, NO_RAW),
    "raw grad": (lambda a: jax.grad(lambda x: put(a.s, x))(1.0), TraceContextError, NO_RAW),
    "raw vmap": (lambda a: jax.vmap(lambda x: put(a.s, x))(XS), TraceContextError, NO_RAW),
    "raw scan": (
        lambda a: jax.lax.scan(lambda c, x: (c, put(a.s, x)), 0.0, XS),
        TraceContextError,
        NO_RAW,
    ),
    "raw while": (
        lambda a: jax.lax.while_loop(lambda c: c < 3.0, lambda c: put(a.s, c + 1.0), 0.0),
        TraceContextError,
        NO_RAW,
    ),
    "raw cond": (
        lambda a: jax.lax.cond(True, lambda x: put(a.s, x), lambda x: x, 1.0),
        TraceContextError,
        NO_RAW,
    ),
    "raw checkpoint": (lambda a: jax.checkpoint(lambda x: put(a.s, x))(1.0), TraceContextError, NO_RAW),
    "raw scan in a loop of ours": (
        lambda a: T.for_loop(lambda x: jax.lax.scan(lambda c, y: (c, put(a.s, y)), x, XS), XS),
        TraceContextError,
        r"State 's' was written inside a raw JAX transform within brainstate.transform.for_loop",
    ),
    "raw vmap in a branch of ours": (
        lambda a: T.cond(True, lambda: jax.vmap(lambda x: put(a.s, x))(XS), lambda: XS),
        TraceContextError,
        r"State 's' was written inside a raw JAX transform within brainstate.transform.cond",
    ),
    "raw vmap around random numbers": (
        lambda a: jax.vmap(lambda x: a.rng.normal())(XS),
        TraceContextError,
        r"RandomState 'rng' was written inside a raw JAX transform",
    ),
    # loops
    "a state that changes its dtype": (
        lambda a: T.for_loop(lambda x: put(a.n, a.n.value.astype(jnp.float32) + x), XS),
        StateTypeError,
        r"State 'n' is int32\[\] before an iteration of for_loop and float32\[\] after it.*Cast",
    ),
    "a state that changes its shape": (
        lambda a: T.scan(lambda c, x: (c, put(a.h, jnp.append(a.h.value, x))), 0.0, XS),
        StateTypeError,
        r"HiddenState 'h' is float32\[3\] before an iteration of scan and float32\[4\] after",
    ),
    "a state that changes its structure": (
        lambda a: T.for_loop(lambda x: put(a.m, (a.m.value["a"],)), XS),
        StateTypeError,
        r"State 'm' is \{'a': 'float32\[3,2\]', 'b': 'float32\[4\]'\} before .* and \('float32\[3,2\]',\) after",
    ),
    "a container that grows in place": (
        lambda a: T.for_loop(lambda x: a.m.value.update(c=x), XS),
        StateTypeError,
        r"State 'm' is .* before an iteration of for_loop and .*'c'",
    ),
    "a state that changes in a while loop": (
        lambda a: T.while_loop(lambda x: x < 2.0, lambda x: (put(a.h, a.h.value[:2]), x + 1.0)[1], 0.0),
        StateTypeError,
        r"HiddenState 'h' is float32\[3\] before an iteration of while_loop and float32\[2\]",
    ),
    "a state that changes in a checkpointed loop": (
        lambda a: T.checkpointed_for_loop(lambda x: put(a.h, a.h.value[:2]), XS),
        StateTypeError,
        r"HiddenState 'h' .* of checkpointed_for_loop",
    ),
    "text written in a loop": (
        lambda a: T.for_loop(lambda x: put(a.s, "text") and x, XS),
        StateTypeError,
        r"State 's' was given a str, which is not a JAX type.*plain attribute",
    ),
    "text read in a loop": (
        lambda a: T.for_loop(lambda x: x * len(a.text.value), XS),
        StateTypeError,
        r"State 'text' holds a str, which is not a JAX type",
    ),
    "a carry that changes its type": (
        lambda a: T.scan(lambda c, x: (put(a.s, x) * jnp.ones(2), None), 0.0, XS),
        TypeError,
        r"carry input and carry output must have equal types",
    ),
    "a carry that changes its structure": (
        lambda a: T.while_loop(lambda c: True, lambda c: (put(a.s, c), c), 1.0),
        TypeError,
        r"must have the same pytree structure",
    ),
    "no pair from a scan": (
        lambda a: T.scan(lambda c, x: put(a.s, x), 0.0, XS),
        StateTypeError,
        r"scan: the function returns a pair \(carry, y\); it returned float32\[\]",
    ),
    "no length": (
        lambda a: T.for_loop(lambda: put(a.s, a.s.value + 1.0)),
        StateValueError,
        r"for_loop: nothing says how long the loop is.*or length",
    ),
    "no length and a progress bar": (
        lambda a: T.scan(lambda c, _: (put(a.s, c), None), 0.0, pbar=T.ProgressBar()),
        StateValueError,
        r"nothing says how long",
    ),
    "two lengths": (
        lambda a: T.for_loop(lambda x, y: put(a.s, x), XS, jnp.ones(4)),
        StateValueError,
        r"for_loop: the lengths \[3, 4\] disagree",
    ),
    "another length": (
        lambda a: T.checkpointed_for_loop(lambda x: put(a.s, x), XS, length=5),
        StateValueError,
        r"checkpointed_for_loop: the lengths \[3, 5\] disagree",
    ),
    "a condition that writes": (
        lambda a: T.while_loop(lambda c: put(a.s, c) < 3.0, lambda c: c + 1.0, 0.0),
        StateValueError,
        r"State 's' is written in the condition of while_loop: a condition may only read",
    ),
    "a condition that draws": (
        lambda a: T.bounded_while_loop(lambda c: a.rng.uniform() < c, lambda c: c - 1.0, 2.0, max_steps=3),
        StateValueError,
        r"RandomState 'rng' is written in the condition of bounded_while_loop",
    ),
    "a condition that is no condition": (
        lambda a: T.while_loop(lambda c: c, lambda c: put(a.s, c), 1.0),
        TypeError,
        r"boolean scalar",
    ),
    "a state made in a loop": (
        lambda a: T.for_loop(lambda x: born(put(a.s, x)), XS),
        StateValueError,
        r"State 'born' is created inside for_loop and outlives it.*Create it before",
    ),
    "a state made in a while loop": (
        lambda a: T.while_loop(lambda x: x < 3.0, lambda x: born(put(a.s, x + 1.0)), 0.0),
        StateValueError,
        r"State 'born' is created inside while_loop and outlives it",
    ),
    "a bound below zero": (
        lambda a: T.bounded_while_loop(lambda c: True, lambda c: put(a.s, c), 0.0, max_steps=-1),
        StateValueError,
        r"max_steps=-1: give the largest number of iterations, an int from 0 up",
    ),
    "a bound that is no int": (
        lambda a: T.bounded_while_loop(lambda c: True, lambda c: put(a.s, c), 0.0, max_steps=3.0),
        StateTypeError,
        r"max_steps=3.0: give",
    ),
    "a base of one": (
        lambda a: T.checkpointed_for_loop(lambda x: put(a.s, x), XS, base=1),
        StateValueError,
        r"base=1: give the number of parts of a loop, an int from 2 up",
    ),
    "a progress bar that is none": (
        lambda a: T.for_loop(lambda x: put(a.s, x), XS, pbar=True),
        StateValueError,
        r"pbar=True: give a ProgressBar\(\)",
    ),
    "a frequency of zero": (lambda a: T.ProgressBar(freq=0), StateValueError, r"freq=0: give a number of iterations"),
    "a loop over no function": (lambda a: T.scan(a.s.value, 0.0, XS), StateTypeError, r"scan takes functions; got"),
    "a state as carry": (
        lambda a: T.scan(lambda c, x: (c, x), a.s, XS),
        StateValueError,
        r"State 's' is among the arguments of scan, at \[0\].*pass or return `state.value`",
    ),
    "a state from a loop": (
        lambda a: T.for_loop(lambda x: (put(a.s, x), a.s), XS),
        StateValueError,
        r"State 's' is among the results of a function under for_loop",
    ),
    "reverse mode through a while loop": (
        lambda a: T.grad(lambda x: T.while_loop(lambda c: c < 9.0, lambda c: put(a.s, 2 * c), x))(1.0),
        ValueError,
        r"Reverse-mode differentiation does not work for lax.while_loop",
    ),
    # branches
    "branches with results of other structure": (
        lambda a: T.cond(True, lambda: (put(a.s, 2.0),), lambda: 1.0),
        StateTypeError,
        r"cond returns \('float32\[\]',\) from branch 0 and float32\[\] from branch 1: all branches return the same",
    ),
    "branches with results of other dtype": (
        lambda a: T.switch(1, [lambda: put(a.s, 2.0), lambda: 1, lambda: 2]),
        StateTypeError,
        r"switch returns float32\[\] from branch 0 and int32\[\] from branch 1",
    ),
    "branches that leave a state in other shape": (
        lambda a: T.cond(True, lambda: put(a.h, jnp.ones(2)).sum(), lambda: put(a.h, jnp.ones(4)).sum()),
        StateTypeError,
        r"HiddenState 'h' is float32\[2\] after branch 0 and float32\[4\] after branch 1",
    ),
    "a branch that leaves a state in other shape than it was": (
        lambda a: T.switch(0, [lambda: put(a.h, jnp.ones(2)).sum(), lambda: 1.0]),
        StateTypeError,
        r"HiddenState 'h' is float32\[2\] after branch 0 and float32\[3\] where no branch writes it",
    ),
    "a branch that writes where there was text": (
        lambda a: T.cond(True, lambda: put(a.text, 1.0), lambda: 1.0),
        StateTypeError,
        r"State 'text' (is float32\[\] after branch 0 and str where no|holds a str, which is not a JAX type)",
    ),
    "a state made in a branch": (
        lambda a: T.switch(0, [lambda x: born(put(a.s, x)), lambda x: x], 1.0),
        StateValueError,
        r"State 'born' is created inside switch and outlives it",
    ),
    "a predicate that is an array": (
        lambda a: T.cond(XS > 1.0, lambda: put(a.s, 2.0), lambda: 1.0),
        StateTypeError,
        r"cond: pred is bool\[3\], a scalar is needed. Reduce it with .any\(\)",
    ),
    "a predicate that is text": (
        lambda a: T.cond("yes", lambda: put(a.s, 2.0), lambda: 1.0),
        StateTypeError,
        r"cond: pred is a str, a scalar",
    ),
    "an index that is a float": (
        lambda a: T.switch(1.0, [lambda: put(a.s, 2.0), lambda: 1.0]),
        StateTypeError,
        r"switch: index is float32\[\], an integer scalar is needed",
    ),
    "an index that is a list": (
        lambda a: T.switch([0], [lambda: put(a.s, 2.0), lambda: 1.0]),
        StateTypeError,
        r"switch: index is a list",
    ),
    "no branches": (lambda a: T.switch(0, []), StateValueError, r"switch: branches is empty"),
    "a branch that is no function": (
        lambda a: T.cond(True, lambda: put(a.s, 2.0), 1.0),
        StateTypeError,
        r"cond takes functions; got float",
    ),
    "a state as operand": (
        lambda a: T.cond(True, lambda s: put(s, 2.0), lambda s: 1.0, a.s),
        StateValueError,
        r"State 's' is among the arguments of cond",
    ),
    "too few conditions": (
        lambda a: T.ifelse([True], [lambda: put(a.s, 2.0), lambda: 1.0]),
        StateValueError,
        r"ifelse: 1 conditions and 2 branches",
    ),
    "no condition that holds": (
        lambda a: T.ifelse([False, False], [lambda: put(a.s, 2.0), lambda: 1.0]),
        (StateValueError, jax.errors.JaxRuntimeError),
        r"the conditions are \[False, False\]: exactly one",
    ),
    "a condition that is text": (
        lambda a: T.ifelse(["a", True], [lambda: put(a.s, 2.0), lambda: 1.0]),
        StateTypeError,
        r"ifelse: condition 0 is a str",
    ),
    # lanes
    "a write lane by lane": (
        lambda a: T.vmap(lambda x: put(a.s, x))(XS),
        BatchAxisError,
        r"State 's' was written with a value per lane, float32\[3\] in all.*out_states=\{0: \[state\]\}.*'mean'",
    ),
    "a write lane by lane to a container": (
        lambda a: T.vmap(lambda x: put(a.m, {"a": x, "b": 1.0})["a"])(XS),
        BatchAxisError,
        r"State 'm' was written with a value per lane, \{'a': 'float32\[3\]'",
    ),
    "a write lane by lane in a loop": (
        lambda a: T.vmap(lambda x: T.for_loop(lambda y: put(a.s, x * y), XS))(XS),
        BatchAxisError,
        r"State 's' was written with a value per lane",
    ),
    "a write lane by lane in batches": (
        lambda a: T.map(lambda x: put(a.s, x), XS, batch_size=2),
        BatchAxisError,
        r"State 's' was written with a value per lane",
    ),
    "an axis that is not there": (
        lambda a: T.vmap(lambda x: put(a.h, a.h.value + x), in_states={1: a.h})(XS),
        StateValueError,
        r"HiddenState 'h' is declared with axis 1 and holds float32\[3\], which has no such axis",
    ),
    "a negative axis that is not there": (
        lambda a: T.vmap(lambda x: put(a.h, a.h.value + x), in_states={-2: a.h})(XS),
        StateValueError,
        r"HiddenState 'h' is declared with axis -2",
    ),
    "an axis of a number": (
        lambda a: T.vmap(lambda x: put(a.s, a.s.value + x), in_states=a.s)(XS),
        StateValueError,
        r"State 's' is declared with axis 0 and holds float32\[\]",
    ),
    "an axis that what is written does not have": (
        lambda a: T.vmap(lambda x: put(a.s, x), out_states={2: a.s})(XS),
        StateValueError,
        r"State 's' is declared with axis 2, and the written value has no such axis: it is float32\[3\]",
    ),
    "two axes": (
        lambda a: T.vmap(lambda x: put(a.h, a.h.value + x), in_states={0: a.h, -1: HiddenState})(XS),
        StateValueError,
        r"in_states declares HiddenState 'h' with the axes \[0, -1\]: give one",
    ),
    "an axis and a reduction": (
        lambda a: T.vmap(lambda x: put(a.s, x), out_states={0: a.s, "mean": [a.s]})(XS),
        StateValueError,
        r"out_states declares State 's' with the axes \[0, 'mean'\]",
    ),
    "a reduction that does not exist": (
        lambda a: T.vmap(lambda x: put(a.s, x), out_states={0: a.h, "median": a.s})(XS),
        StateValueError,
        r"out_states: 'median' is neither an int axis nor one of stack, mean, sum, last",
    ),
    "a reduction of what goes in": (
        lambda a: T.vmap(lambda x: put(a.s, x), in_states={"mean": a.s})(XS),
        StateValueError,
        r"in_states: 'mean' is a reduction of written values",
    ),
    "the mean of ints": (
        lambda a: T.vmap(lambda x: put(a.n, x), out_states={"mean": a.n})(jnp.arange(3)),
        StateTypeError,
        r"the mean of State 'n' is taken over int32 values.*Choose 'last' or 'stack'",
    ),
    "a declaration of nothing sensible": (
        lambda a: T.vmap(lambda x: x, in_states=[a.h, 3.5])(XS),
        StateTypeError,
        r"in_states: 3.5 is neither a State nor a filter",
    ),
    "lanes of different number": (
        lambda a: T.vmap(lambda x: put(a.h, a.h.value + x), in_states=a.h)(jnp.ones(4)),
        StateValueError,
        r"the numbers of lanes disagree: \{'argument \[0\]': 4, \"HiddenState 'h'\": 3\}",
    ),
    "leaves of different number": (
        lambda a: T.vmap(lambda: a.m.value["b"], in_states=a.m)(),
        StateValueError,
        r"the numbers of lanes disagree: .*State 'm'\['a'\].*3.*State 'm'\['b'\].*4",
    ),
    "arguments of different number": (
        lambda a: T.vmap(lambda x, y: put(a.h, x), out_states=a.h)(XS, jnp.ones(4)),
        StateValueError,
        r"lanes disagree: \{'argument \[0\]': 3, 'argument \[1\]': 4\}",
    ),
    "another axis_size": (
        lambda a: T.vmap(lambda x: put(a.h, x), out_states=a.h, axis_size=5)(XS),
        StateValueError,
        r"lanes disagree: \{'axis_size': 5, 'argument \[0\]': 3\}",
    ),
    "nothing that is mapped": (
        lambda a: T.vmap(lambda x: put(a.s, x), in_axes=None)(XS),
        StateValueError,
        r"vmap: nothing is mapped, so the number of lanes is unknown: give axis_size",
    ),
    "too many axes": (
        lambda a: T.vmap(lambda x: put(a.s, x), in_axes=(0, 0))(XS),
        StateValueError,
        r"in_axes=\(0, 0\) does not fit the 1 positional arguments",
    ),
    "axes that are text": (
        lambda a: T.vmap(lambda x: put(a.s, x), in_axes="first")(XS),
        TypeError,
        r"vmap in_axes must be an int, None, or",
    ),
    "an argument without the axis": (
        lambda a: T.vmap(lambda x: put(a.s, x), in_axes=-2)(XS),
        ValueError,
        r"axis -2.*rank should be at least 2",
    ),
    "a result without an axis": (
        lambda a: T.vmap(lambda x: (put(a.h, x), x)[1], out_axes=None, out_states=a.h)(XS),
        ValueError,
        r"out_axes.*got axis spec None but output was batched",
    ),
    "a state as argument of lanes": (
        lambda a: T.vmap(lambda s, x: put(s, x), in_axes=(None, 0))(a.s, XS),
        StateValueError,
        r"State 's' is among the arguments of vmap",
    ),
    "a state from lanes": (
        lambda a: T.vmap(lambda x: a.s)(XS),
        StateValueError,
        r"State 's' is among the results of a function under vmap",
    ),
    "lanes of no function": (lambda a: T.vmap(3.0), StateTypeError, r"vmap maps a function; got float"),
    "a batch of no size": (
        lambda a: T.map(lambda x: put(a.s, x), XS, batch_size=0),
        StateValueError,
        r"map: batch_size=0",
    ),
    "a map over nothing": (
        lambda a: T.map(lambda: put(a.s, 2.0), batch_size=2),
        StateValueError,
        r"map: nothing says how long",
    ),
    # memory, inspection
    "a checkpoint of no function": (lambda a: T.checkpoint(3.0), StateTypeError, r"checkpoint takes a function; got"),
    "a policy that is a type of states": (
        lambda a: T.checkpoint(lambda x: put(a.s, x), policy=HiddenState)(1.0),
        StateTypeError,
        r"policy=.*HiddenState.* is not a policy. Give one of jax.checkpoint_policies, or save_states\(filter\)",
    ),
    "a policy that is text": (
        lambda a: T.checkpoint(lambda x: put(a.s, x), policy="dots")(1.0),
        StateTypeError,
        r"policy='dots' is not a policy",
    ),
    "a filter that is none": (lambda a: T.save_states(3), StateTypeError, r"3 is not a filter"),
    "a state as argument of a checkpoint": (
        lambda a: T.checkpoint(lambda s: put(s, 2.0))(a.s),
        StateValueError,
        r"State 's' is among the arguments of checkpoint",
    ),
    "a state from a checkpoint": (
        lambda a: T.checkpoint(lambda x: (put(a.s, x), a.s))(1.0),
        StateValueError,
        r"State 's' is among the results of a function under checkpoint",
    ),
    "a static argument that is not there": (
        lambda a: T.checkpoint(lambda x: put(a.s, x), static_argnums=(1,))(1.0),
        StateValueError,
        r"static_argnums=\(1,\) names argument 1 of 1",
    ),
    "a state in a state": (
        lambda a: T.for_loop(lambda x: put(a.m, {"a": a.s}) and x, XS),
        StateValueError,
        r"the value given to State 'm' contains a State",
    ),
}
WHERE = {
    "alone": lambda f: f(),
    "jit": lambda f: T.jit(f)(),
    "grad": lambda f: T.grad(lambda x: (f(), x)[1])(1.0),
    "scan": lambda f: T.for_loop(lambda x: (f(), x)[1], XS),
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", TABLE)
def test_misuse(name, where):
    misuse, error, message = TABLE[name]
    a = Around()
    KEPT.clear()
    with unchanged(*a.all), pytest.raises(error) as caught:
        WHERE[where](lambda: (misuse(a), None)[1])
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
    assert len(str(caught.value)) < 700 or not isinstance(caught.value, BrainStateError)
    if isinstance(caught.value, BrainStateError):
        assert "\n" not in str(caught.value)


def test_the_table_is_large_enough():
    assert len(TABLE) >= 40


# ------------------------------------------------------------------------------------------ a State in a result


def custom(make, rule):
    def call(f):
        ruled = make(lambda x: f())
        getattr(ruled, rule)(*[lambda *_: None] * (2 if rule == "defvjp" else 1))
        return ruled(1.0)

    return call


def mapped_over_a_mesh(f):
    spec = jax.sharding.PartitionSpec()
    return T.shard_map(lambda x: f(), mesh=jax.make_mesh((1,), ("d",)), in_specs=spec, out_specs=spec)(1.0)


AROUND = Around()
# {transform: (call it with a function of no arguments, the name in the message if it is another one)}
RETURNING = {
    "accumulate": (lambda f: T.accumulate(T.grad(lambda x: f(), AROUND.w), 1)(XS), "grad"),
    "argmin": (lambda f: T.argmin(lambda y: f(), 1.0),),
    "associative_scan": (lambda f: T.associative_scan(lambda a, b: f(), XS),),
    "bounded_while_loop": (lambda f: T.bounded_while_loop(lambda c: c < 1.0, lambda c: f(), 0.0, max_steps=2),),
    "check_grads": (lambda f: T.check_grads(lambda x: f(), 1.0),),
    "checkify": (lambda f: T.checkify(f)(),),
    "checkpoint": (lambda f: T.checkpoint(f)(),),
    "checkpointed_for_loop": (lambda f: T.checkpointed_for_loop(f, length=2),),
    "checkpointed_scan": (lambda f: T.checkpointed_scan(lambda c, x: (c, f()), 0.0, XS),),
    "cond": (lambda f: T.cond(True, f, f),),
    "custom_jvp": (custom(T.custom_jvp, "defjvp"),),
    "custom_vjp": (custom(T.custom_vjp, "defvjp"),),
    "eval_shape": (lambda f: T.eval_shape(f),),
    "explain": (lambda f: T.explain(lambda x: f(), 1.0),),
    "fisher": (lambda f: T.fisher(lambda x: f(), "gaussian", argnums=0)(1.0, 1.0),),
    "fixed_point": (lambda f: T.fixed_point(lambda y: f(), 1.0),),
    "for_loop": (lambda f: T.for_loop(f, length=2),),
    "fori_loop": (lambda f: T.fori_loop(0, 2, lambda i, x: f(), 1.0),),
    "functional": (lambda f: T.functional(f)[0]({}),),
    "fwd_grad": (lambda f: T.fwd_grad(lambda x: f())(1.0),),
    "ggn": (lambda f: T.ggn(lambda x: x, lambda out, x: f(), argnums=0)(1.0, 1.0),),
    "grad": (lambda f: T.grad(lambda x: f())(1.0),),
    "hessian": (lambda f: T.hessian(lambda x: f())(1.0),),
    "hessian_sparsity": (lambda f: T.hessian_sparsity(lambda x: f())(1.0),),
    "hvp": (lambda f: T.hvp(lambda x: f())(1.0, 1.0),),
    "ifelse": (lambda f: T.ifelse([True, False], [f, f]), "switch"),
    "jacfwd": (lambda f: T.jacfwd(lambda x: f())(1.0),),
    "jacobian": (lambda f: T.jacobian(lambda x: f())(1.0), "jacrev"),
    "jacobian_sparsity": (lambda f: T.jacobian_sparsity(lambda x: f())(1.0),),
    "jacrev": (lambda f: T.jacrev(lambda x: f())(1.0),),
    "jit": (lambda f: T.jit(f)(),),
    "jvp": (lambda f: T.jvp(lambda x: f(), (1.0,), (1.0,)),),
    "laplacian": (lambda f: T.laplacian(lambda x: f())(1.0),),
    "linearize": (lambda f: T.linearize(lambda x: f(), 1.0),),
    "make_jaxpr": (lambda f: T.make_jaxpr(f)(),),
    "map": (lambda f: T.map(lambda x: f(), XS),),
    "map in batches": (lambda f: T.map(lambda x: f(), XS, batch_size=2), "map"),
    "per_example_grad": (lambda f: T.per_example_grad(lambda x: f(), argnums=0)(XS),),
    "per_example_norms": (lambda f: T.per_example_norms(lambda x: f(), argnums=0)(XS),),
    "prepare": (lambda f: T.prepare(f), "jit"),
    "remat": (lambda f: T.remat(f)(), "checkpoint"),
    "root": (lambda f: T.root(lambda y: f(), 1.0),),
    "scan": (lambda f: T.scan(lambda c, x: (c, f()), 0.0, XS),),
    "shard_map": (mapped_over_a_mesh,),
    "sparse_hessian": (lambda f: T.sparse_hessian(lambda x: f())(1.0),),
    "sparse_jacobian": (lambda f: T.sparse_jacobian(lambda x: f())(1.0),),
    "StateFinder": (lambda f: T.StateFinder(f)(),),
    "stop_gradient": (lambda f: T.stop_gradient(f)(),),
    "switch": (lambda f: T.switch(0, [f, f]),),
    "switch of one": (lambda f: T.switch(0, [f]), "switch"),
    "taylor": (lambda f: T.taylor(lambda x: f(), (1.0,), (1.0,), 2),),
    "value_and_grad": (lambda f: T.value_and_grad(lambda x: f())(1.0),),
    "vector_grad": (lambda f: T.vector_grad(lambda x: f())(1.0),),
    "vjp": (lambda f: T.vjp(lambda x: f(), 1.0),),
    "vmap": (lambda f: T.vmap(f, axis_size=2)(),),
    "vmap_new_states": (lambda f: T.vmap_new_states(f, axis_size=2)(), "vmap"),
    "while_loop": (lambda f: T.while_loop(lambda c: c < 1.0, lambda c: f(), 0.0),),
    "condition": (lambda f: T.while_loop(lambda c: f(), lambda c: c, 0.0), "the condition of while_loop"),
}
NOT_OF_A_FUNCTION = {"Estimate", "Explanation", "FoundStates", "LinearOperator", "Prepared", "ProgressBar"}
NOT_OF_A_FUNCTION |= {"SparsityPattern", "named_scope", "save_states", "substituted", "tap", "taps"}
NOT_OF_A_FUNCTION |= {"GradientTransform"}  # the row of each gradient


def test_each_transform_has_a_row():
    assert set(T.__all__) - NOT_OF_A_FUNCTION <= set(RETURNING)


@pytest.mark.parametrize("disabled", [False, True], ids=["", "without jit"])
@pytest.mark.parametrize("name", RETURNING)
def test_a_state_in_a_result(name, disabled):
    """One error for all: it names the State by its path, the transform and the remedy, and nothing is changed."""
    if disabled and name == "prepare":
        pytest.skip("prepare compiles")
    call, shown = (*RETURNING[name], name)[:2]
    model, a = Holder(), Around()

    def returning():
        a.s.value = a.s.value + 1.0
        return {"out": model.weight}

    with jax.disable_jit(disabled), unchanged(*a.all, model.weight), pytest.raises(StateValueError) as caught:
        call(returning)
    pattern = rf"^ParamState at Holder\.weight is among the results of a function under {shown}, at .*\['out'\]: "
    assert re.search(pattern + r".*return `state\.value`", str(caught.value)), str(caught.value)


# ------------------------------------------------------------------------------------------ counts


def operator():
    return T.hvp(jnp.sum).operator(XS)


# {argument in the message: (call with a value for it, the least, whether None is one)}
COUNTS = {
    "accumulate: steps": (lambda n: T.accumulate(T.grad(jnp.sum, AROUND.w), n), 1, False),
    "bounded_while_loop: max_steps": (
        lambda n: T.bounded_while_loop(lambda x: x < 0.0, abs, 1.0, max_steps=n),
        0,
        False,
    ),
    "bounded_while_loop: base": (
        lambda n: T.bounded_while_loop(lambda x: x < 0.0, abs, 1.0, max_steps=1, base=n),
        2,
        False,
    ),
    "checkpointed_scan: base": (lambda n: T.checkpointed_scan(lambda c, x: (c, x), 0.0, XS, base=n), 2, False),
    "checkpointed_for_loop: base": (lambda n: T.checkpointed_for_loop(jnp.sin, XS, base=n), 2, False),
    "check_grads: order": (lambda n: T.check_grads(jnp.sin, 1.0, order=n), 1, False),
    "check_grads: directions": (lambda n: T.check_grads(jnp.sin, 1.0, directions=n), 1, False),
    "fisher: samples": (lambda n: T.fisher(jnp.sin, "gaussian", argnums=0, kind="sampled", samples=n), 1, True),
    "fwd_grad: tangent_size": (lambda n: T.fwd_grad(jnp.sum, tangent_size=n), 1, True),
    "laplacian: chunk_size": (lambda n: T.laplacian(jnp.sum, chunk_size=n), 1, True),
    "laplacian: samples": (lambda n: T.laplacian(jnp.sum, samples=n), 2, True),
    "map: batch_size": (lambda n: T.map(jnp.sin, XS, batch_size=n), 1, True),
    "ProgressBar: freq": (lambda n: T.ProgressBar(n), 1, True),
    "root: max_steps": (lambda n: T.root(lambda y: y - 1.0, 0.5, max_steps=n), 1, False),
    "samples": (lambda n: operator().trace(samples=n), 2, True),
    "taylor: order": (lambda n: T.taylor(jnp.sin, (1.0,), (1.0,), n), 1, False),
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_count(name):
    """An int from some number up; a bool, a float and a text are of the wrong type."""
    call, least, none = COUNTS[name]
    with contextlib.suppress(NoSolutionError):
        call(least)
    if none:
        call(None)
    rule = rf"^{name}=%s: give .*, an int from {least} up"
    with pytest.raises(StateValueError, match=rule % (least - 1)):
        call(least - 1)
    for value in (True, float(least), "2", [2], *([] if none else [None])):
        with pytest.raises(StateTypeError, match=rule % re.escape(repr(value))):
            call(value)


# ------------------------------------------------------------------------------------------ after a failure


FAILING = {name: lambda f, row=row: row.run(lambda x: f())(1.0) for name, row in rows(lambda row: row.run).items()} | {
    "vmap": lambda f: T.vmap(f, axis_size=3)(),
    "for_loop": lambda f: T.for_loop(f, length=3),
    "condition": lambda f: T.while_loop(lambda c: c < f(), lambda c: c + 1.0, 0.0),
    "other branch": lambda f: T.cond(True, lambda: 1.0, f),
    "map": lambda f: T.map(lambda x: f(), XS, batch_size=2),
}


@pytest.mark.parametrize("disabled", [False, True], ids=["", "without jit"])
@pytest.mark.parametrize("name", FAILING)
def test_an_exception_of_the_user(name, disabled):
    """It arrives as it is, nothing has changed, and what was used can be used again."""
    if disabled and name in ("other branch", "prepare"):
        pytest.skip("only the branch that is taken runs; prepare compiles, and so refuses")
    a = Around()

    def f(fail=True):
        a.s.value = a.s.value + a.rng.normal()
        a.h.value = a.h.value + 1.0
        a.m.value["a"] = jnp.ones((3, 2))
        if fail:
            raise ZeroDivisionError("of the user")
        return jnp.float32(1.0)

    with jax.disable_jit(disabled), unchanged(*a.all), pytest.raises(ZeroDivisionError, match="of the user"):
        FAILING[name](f)
    assert float(a.m.value["a"].sum()) == 0.0
    expected = R.RandomState(0).normal(size=2)
    assert (a.rng.normal(size=2) == expected).all()
    assert T.jit(lambda: f(fail=False))() == 1.0
    assert a.h.value.tolist() == [1.0] * 3


def test_a_generator_made_by_a_call_that_failed():
    made = []

    def f(x):
        made.append(R.RandomState(0))
        made[-1].name = "lost"
        raise ZeroDivisionError

    for transform in (T.jit, T.grad, T.vmap, T.checkpoint, lambda f: lambda x: T.for_loop(f, XS)):
        with pytest.raises(ZeroDivisionError):
            transform(f)(XS[0] if transform is not T.vmap else XS)
        rng = made.pop()
        with pytest.raises(
            TraceContextError, match=r"RandomState.* was created inside a transform that has not finished"
        ):
            rng.normal()
        rng.seed(0)
        assert rng.normal() == R.RandomState(0).normal()


def test_a_failed_loop_inside_a_function_that_goes_on():
    """The error is caught by the user inside a compiled function: what the loop would have written is gone."""
    a = Around()

    def f(x):
        a.s.value = a.s.value + x
        try:
            T.for_loop(lambda y: (put(a.s, y * 100.0), 1 / 0), XS)
        except ZeroDivisionError:
            a.n.value = a.n.value + 1
        return a.s.value

    assert T.jit(f)(1.0) == 2.0 and a.s.value == 2.0 and a.n.value == 1
    assert T.grad(f)(1.0) == 1.0 and a.s.value == 3.0 and a.n.value == 2
    np.testing.assert_allclose(T.for_loop(f, XS), [4.0, 6.0, 9.0])
