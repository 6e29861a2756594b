"""``prepare``: compile any transform ahead of time, for one kind of call.

Preparing traces the function once and compiles it; a call then gathers the present values of the States, runs the
program and commits (`Ready`). Nothing about the arguments is asked in Python: JAX refuses what does not fit, and only
then the call is compared with what was prepared, leaf by leaf. The program is called through ``jax.jit``, which is
the fastest way, under a seal (`Seal`). What JAX would compile anew for may be fine all the same, such as a number for
an array of its type; so what the seal stops goes to JAX's ``Compiled``, then and from then on. So does, from the
beginning, what was prepared for arrays that are committed to a device: JAX does not lower again for another one, it
only compiles.

What JAX cannot see is that a Module changed. That some did, somewhere, is one comparison of a counter. If something of
it was read by the function (``_seam/module_reads``), it is traced again, by itself and without being compiled: if it would be the
same program with the same States, nothing happens; otherwise the prepared program is stale, and every call says so.

Static arguments are compared at each call and taken out, since JAX compiles them away. States that are donated are
looked through for arrays that something else refers to as well.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import compress
from operator import not_
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.extend.core import valid_jaxtype
from jax.tree_util import keystr, tree_leaves

from ..._compat import jit_disabled
from ..._copies import Remade
from ..._errors import StateTypeError, StateValueError, TraceContextError, a_type
from ..._functions import boundary
from ..._program.interpret import all_programs
from ..._seam.run_time_errors import await_errors
from ..._seam.scope import gather, generation, is_tracer, replaced_since, tag_changes
from ..._seam.step import Ready, box, generators, outside
from ..._seam.tokens import apart
from .._wrapper import resemble
from .jit import Jit, compiled_form, owned
from .retraces import options
from .seal import Seal
from .signature import Part, Row, argument_names, argument_parts, compare, state_part

__all__ = ["Cost", "Memory", "Prepared", "prepare"]

_SHOWN = 12  # rows that agree; more are counted


class Cost(NamedTuple):
    """What XLA estimates that one call costs; a loop is counted once, and None is what it cannot tell."""

    flops: float | None
    bytes: float | None
    transcendentals: float | None


@dataclass(frozen=True, repr=False)
class Memory:
    """What one call needs, in bytes.

    Attributes
    ----------
    arguments, output : int
        The values that go in (arguments and States) and come out (the result and what is written).
    temporaries : int
        Intermediate results.
    donated : int
        The part of the output that takes the place of arguments.
    code : int
        The program itself.
    """

    arguments: int
    output: int
    temporaries: int
    donated: int
    code: int

    @property
    def peak(self) -> int:
        """All of it together: arguments, output and temporaries, less what is donated."""
        return self.arguments + self.output + self.temporaries - self.donated

    def __repr__(self) -> str:
        parts = {
            name: getattr(self, name) for name in ("arguments", "output", "temporaries", "donated", "code", "peak")
        }
        return f"Memory({', '.join(f'{name}={_bytes(size)}' for name, size in parts.items())})"


def _bytes(size) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size} B"


class Prepared(Remade, Ready):
    """A function that was compiled ahead of time; made by `prepare`, and called like the function."""

    def __init__(self, transform: Any, jitted: Jit, args: tuple, kwargs: dict[str, Any]):
        resemble(self, transform)
        self.__wrapped__ = transform  # keeps alive what a bound method belongs to
        self._label = _label(transform)
        seal = Seal()
        self._jitted, self._generation, self._options = jitted.afresh(seal), generation(), options()
        self._statics = _Statics(jitted.statics(len(args)), args, kwargs)
        self._check_arguments(args, kwargs)
        program, self._traced = self._jitted.traced(args, kwargs)
        with apart():
            self._compiled = self._traced.lower().compile()
        seal.closed = True
        self._states, count = _in_order(program)
        self._generators = generators(self._states)
        self._written, self._donates, self._returned = tuple(program.written), program.donates, []
        self._touched, self._retagged = program.touched, program.retagged
        self._example = jax.tree.map(_abstract, (args, kwargs))
        values = gather(self._states)
        self._expected = self._of_states(values), self._of_arguments(args, kwargs)
        flat = all("" in part.leaves for side in self._expected for part in side.values())

        def whole(run):
            run = await_errors(run) if program.waits else run
            return _giving(run, count, flat, self._returned) if self._donates else run

        self._run_any = self._statics.around(whole(self._compiled.__call__))
        placed = any(_place(leaf) is not None for _, leaf in self._inputs(values, args, kwargs))
        self._run = self._run_any if placed else whole(program.compiled)

    def _recipe(self):
        return _prepare_again, (self.__wrapped__,)

    def __reduce_ex__(self, protocol):
        return _prepare_again(self.__wrapped__)

    # -------------------------------------------------------------------------------------- what it is

    def cost(self) -> Cost | None:
        """Return XLA's estimate of the work of one call, or None where the backend gives none."""
        found = self._compiled.cost_analysis()
        found = found[0] if isinstance(found, list | tuple) and found else found
        if not isinstance(found, dict):
            return None
        amounts = (found.get(key, 0.0) for key in ("flops", "bytes accessed", "transcendentals"))
        return Cost(*(amount if amount >= 0 else None for amount in amounts))

    def memory(self) -> Memory | None:
        """Return what one call needs of memory, or None where the backend does not say."""
        found = self._compiled.memory_analysis()
        if found is None:
            return None
        parts = ("argument", "output", "temp", "alias", "generated_code")
        return Memory(*(int(getattr(found, f"{part}_size_in_bytes")) for part in parts))

    def as_text(self, stage: Literal["jaxpr", "stablehlo", "hlo"] = "hlo") -> str:
        """Return the program as text: as it was traced, as it was lowered, or as it was optimised by XLA.

        The ``seal`` in the first is nothing in the others: it tells that the program was lowered once more.
        """
        if stage == "jaxpr":
            return str(self._traced.jaxpr)
        if stage == "stablehlo":
            with apart():
                return self._traced.lower().as_text()
        if stage == "hlo":
            return self._compiled.as_text() or ""
        raise StateValueError(f"as_text(): stage is 'jaxpr', 'stablehlo' or 'hlo', not {stage!r}.")

    def __repr__(self) -> str:
        given = (f"{name}: {', '.join(part.leaves.values())}" for name, part in self._expected[1].items())
        states = f"States: {len(self._states)} read, {len(self._written)} written"
        return f"prepared {self._label}({', '.join(given)}), {states}"

    # -------------------------------------------------------------------------------------- what a call is like

    def _of_states(self, values) -> dict[Any, Part]:
        return {id(s): state_part(s, value, weak=False) for s, value in zip(self._states, values, strict=True)}

    def _of_arguments(self, args, kwargs) -> dict[Any, Part]:
        names = argument_names(self._jitted, len(args))
        return argument_parts(names, args, kwargs, lambda key, _: key in self._statics.places, weak=False)

    def _check_arguments(self, args, kwargs):
        """Refuse example arguments that cannot be compiled for, by name."""
        self._jitted._explain(*self._statics.without(args, kwargs))
        named = [*zip(argument_names(self._jitted, len(args)), enumerate(args), strict=True)]
        for name, (key, arg) in [*named, *((name, (name, arg)) for name, arg in kwargs.items())]:
            for path, leaf in () if key in self._statics.places else jax.tree_util.tree_leaves_with_path(arg):
                if not (valid_jaxtype(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)):
                    raise StateTypeError(
                        f"prepare: argument {name}{keystr(path)} is {a_type(leaf)}. Give an array, a number "
                        f"or a jax.ShapeDtypeStruct, or make it static: prepare(jit(f, static_argnames={name!r}), ...)."
                    )

    def _inputs(self, values, args, kwargs) -> Iterator[tuple[str, Any]]:
        """Return the leaves that go in by name, in the order in which JAX has them."""
        names, _ = self._statics.without(argument_names(self._jitted, len(args)), {})
        args, kwargs = self._statics.without(args, kwargs)
        named = [(state.describe(), value) for state, value in zip(self._states, values, strict=True)]
        named += zip((f"argument {name}" for name in names), args, strict=True)
        for name, value in [*named, *((f"argument {name}", kwargs[name]) for name in sorted(kwargs))]:
            for path, leaf in jax.tree_util.tree_leaves_with_path(value):
                yield name + keystr(path), leaf

    # -------------------------------------------------------------------------------------- what can be wrong

    def _refused(self, args, kwargs):
        """Raise an error with words for a call that failed, if it does not match."""
        values = gather(self._states)
        inputs = list(self._inputs(values, args, kwargs))
        traced = [name for name, leaf in inputs if is_tracer(leaf)]
        if traced:
            raise TraceContextError(
                f"prepared {self._label} was called inside a transform: {', '.join(traced[:3])} {_is(traced)} traced. "
                f"A program that is compiled cannot be transformed. Call the function itself there, or prepare the "
                f"whole: prepare(grad(fun), ...)."
            ) from None
        states, arguments = self._expected
        rows = [*compare(arguments, self._of_arguments(args, kwargs)), *compare(states, self._of_states(values))]
        if all(row.same for row in rows):
            expected = jax.tree.leaves(self._compiled.input_shardings, is_leaf=lambda x: x is None)
            rows = [_placed(*named, sharding) for named, sharding in zip(inputs, expected, strict=False)]
        if not all(row.same for row in rows):
            raise self._mismatch(rows) from None

    def _mismatch(self, rows) -> StateTypeError:
        return StateTypeError(
            f"{self._label} was prepared for another call (prepared → given):\n{_table(rows)}\n"
            f"Give what was prepared, or prepare again for what is given."
        )

    def _renew(self):
        """Look again after States or Modules were replaced somewhere, and refuse if the program is stale."""
        now, changes = generation(), self._touched.changes()
        if self._retagged == tag_changes() and not changes:
            self._generation = now
            return
        replaced = "; ".join(dict.fromkeys(changes.values() or replaced_since(self._generation)))
        rows = list(compare(self._expected[0], self._of_states(gather(self._states))))
        if not all(row.same for row in rows):
            raise self._mismatch(rows)
        stale = f"prepared {self._label} is stale ({replaced}): "
        again = f"Prepare it again: prepare({self._label}, ...)."
        pairs = ((name, was, now) for (name, was), now in zip(self._options.items(), options().values(), strict=True))
        around = [f"{name}: {was} → {now}" for name, was, now in pairs if was != now]
        if around:  # then it is not known which of both it is
            again = (
                f"But it was prepared under other options ({'; '.join(around)}): call it once under those, or {again}"
            )
        try:
            program, traced = self._jitted.afresh(Seal()).traced(*self._example)
        except Exception as error:
            raise StateValueError(f"{stale}the function now raises {type(error).__name__}: {error}. {again}") from error
        before, after = (*self._states, *self._written), (*_in_order(program)[0], *program.written)
        if before != after or not _same_program(self._traced.jaxpr, traced.jaxpr):
            raise StateValueError(f"{stale}the function {_change(before, after)}. {again}")
        self._generation, self._touched, self._retagged = now, program.touched, program.retagged


def _prepare_again(transform):
    raise StateTypeError(
        f"prepared {_label(transform)} is compiled for its States and cannot be copied with them: take it away before, "
        f"and prepare again for the copy."
    )


def _in_order(program) -> tuple[tuple, int]:
    """Return the States that are inputs of ``program``, those to donate first, and how many these are."""
    given = list(compress(program.states, program.gives))
    return (*given, *compress(program.states, map(not_, program.gives))), len(given)


def _giving(compiled, count, flat, returned):
    """Return ``compiled`` as a function of the values of all States in one list; it donates the first ``count``.

    What it returns is also put into ``returned``.
    ``flat`` says that each State and argument is one leaf; where that is no longer so, JAX refuses.
    """

    def run(values, /, *args, **kwargs):
        states, others = values, (*args, *kwargs.values()) if kwargs else args
        if not flat:
            states, others = tree_leaves(values), tree_leaves(others)
        given, kept, seen = values[:count], values[count:], set(map(id, states))
        if len(seen) < len(states) or not seen.isdisjoint(map(id, others)):
            given = owned(given, (kept, args, kwargs))
        return box(returned, compiled, (given, kept, *args), kwargs)

    return run


class _Statics:
    """The static arguments of a prepared call: part of what was compiled, so compared and left out."""

    def __init__(self, places, args, kwargs):
        self.places = places
        self._values = {key: arg for key, arg in (*enumerate(args), *kwargs.items()) if key in places}

    def without(self, args, kwargs) -> tuple[list, dict]:
        """Return the arguments that are not static."""
        kept = [arg for i, arg in enumerate(args) if i not in self.places]
        return kept, {name: arg for name, arg in kwargs.items() if name not in self.places}

    def around(self, run):
        """Return ``run`` as a function of all arguments."""
        if not self._values:
            return run

        def checked(values, /, *args, **kwargs):
            given = {key: arg for key, arg in (*enumerate(args), *kwargs.items()) if key in self.places}
            if given.keys() != self._values.keys() or not all(map(_equal, given.values(), self._values.values())):
                raise TypeError("a static argument differs from the one that was prepared")
            args, kwargs = self.without(args, kwargs)
            return run(values, *args, **kwargs)

        return checked


def _equal(a, b) -> bool:
    return a is b or (type(a) is type(b) and a == b)


def _abstract(leaf):
    """Return the type in place of an array, whose memory need not be kept."""
    if not isinstance(leaf, jax.Array | np.ndarray):
        return leaf
    aval: Any = jax.typeof(leaf)
    sharding = leaf.sharding if isinstance(leaf, jax.Array) else None
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding, weak_type=aval.weak_type)


def _same_program(before, after) -> bool:
    """Tell whether two traces are of one program, what it holds of arrays and Python functions included."""
    was, now = str(before), str(after)
    if was != now:  # functions are written with their addresses: those that trace it are made anew, callbacks count
        was, now = (re.sub(r"0x[0-9a-f]+", "", text) for text in (was, now))
        if was != now or "callback" in was:
            return False
    pairs = zip(_constants(before), _constants(after), strict=True)
    return all(a is b or (_abstract(a) == _abstract(b) and np.array_equal(a, b)) for a, b in pairs)


def _constants(program) -> list:
    """Return the arrays that a program holds, and those that it calls."""
    return [constant for inner in all_programs(program) for constant in getattr(inner, "consts", ())]


def _label(transform) -> str:
    """Name what was prepared on one line."""
    name = getattr(transform, "__name__", None) or repr(transform)
    return type(transform).__name__ if "\n" in name else name


def _is(names) -> str:
    return "is" if len(names) == 1 else "are"


def _change(before, after) -> str:
    """Say how the States of a function have changed."""
    gone = [s.describe() for s in dict.fromkeys(before) if s not in after]
    new = [s.describe() for s in dict.fromkeys(after) if s not in before]
    if not gone and not new:
        return "is another program"
    parts = [f"no longer uses {', '.join(gone[:3])}"] * bool(gone) + [f"now uses {', '.join(new[:3])}"] * bool(new)
    return " and ".join(parts)


def _place(leaf):
    """Return where ``leaf`` says that it is computed with, or None."""
    return leaf.sharding if getattr(leaf, "committed", isinstance(leaf, jax.ShapeDtypeStruct)) else None


def _placed(name, leaf, sharding) -> Row:
    """Compare where an array is with where it was prepared to be."""
    given = _place(leaf)
    same = given is None or sharding is None or given.is_equivalent_to(sharding, leaf.ndim)
    return Row(name, str(sharding), str(sharding if same else given), same)


def _table(rows) -> str:
    """Write one line a row; of those that agree, no more than a few."""
    agreeing = [row for row in rows if row.same]
    shown = [row for row in rows if not row.same or len(agreeing) <= _SHOWN]
    width = max(len(row.name) for row in shown)
    lines = [
        f"  {'✅' if row.same else '❌'} {row.name:<{width}}  {row.was}{'' if row.same else f' → {row.now}'}"
        for row in shown
    ]
    return "\n".join([*lines, *([f"  ✅ … and {len(agreeing)} more that agree"] if len(agreeing) > _SHOWN else [])])


@boundary
def prepare(transform: Callable, /, *args: Any, donate_states: bool = False, **kwargs: Any) -> Prepared:
    """Compile a function or transform ahead of time, for arguments like these.

    Parameters
    ----------
    transform : callable
        A function that reads and writes States, a derivative, a ``vmap``, …, or what `jit` returns: that keeps its
        options, such as static arguments.
    *args, **kwargs
        Example arguments: arrays, numbers, or ``jax.ShapeDtypeStruct`` where only the type is known. Static arguments
        of a `jit` are given as they are, here and in each call.
    donate_states : bool
        As for `jit`, where ``transform`` is not one yet.

    Returns
    -------
    Prepared
        To be called like ``transform``, with arguments of these types: it reads the present values of the States and
        commits what is written. It has ``cost()``, ``memory()`` and ``as_text(stage)``. Preparing changes no State and
        runs the function once; calls never run it.

    Raises
    ------
    StateTypeError
        If an argument is nothing that can be compiled for; and by a call whose arguments or States do not match what
        was prepared, with a table of both.
    StateValueError
        If the function creates States that outlive it; and by a call after a State or Module was replaced on a Module
        and the function would mean another program. To find out, it is traced once more after such a replacement.
    TraceContextError
        If a transform is in progress; and by a call with something that is traced.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, brainstate
    >>> weight = brainstate.ParamState(jnp.ones(3), name="weight")
    >>> def step(x):
    ...     weight.value -= 0.5 * brainstate.transform.grad(lambda: (weight.value @ x) ** 2, weight)()
    >>> prepared = brainstate.transform.prepare(step, jax.ShapeDtypeStruct((3,), "float32"))
    >>> prepared
    prepared step(x: float32[3]), States: 1 read, 1 written
    >>> prepared.memory().arguments
    24
    >>> prepared(jnp.array([1.0, 0.0, 0.0]))
    >>> weight.value.tolist()
    [0.0, 1.0, 1.0]
    >>> prepared(jnp.ones(4))
    Traceback (most recent call last):
    ...
    brainstate._errors.StateTypeError: step was prepared for another call (prepared → given):
      ❌ argument x           float32[3] → float32[4]
      ✅ ParamState 'weight'  float32[3]
    Give what was prepared, or prepare again for what is given.
    """
    if not outside():
        raise TraceContextError("prepare compiles for calls outside of transforms: call it outside as well.")
    if jit_disabled():
        raise TraceContextError("prepare compiles, which jax.disable_jit forbids: call it outside of that.")
    if not callable(transform):
        raise StateTypeError(f"prepare compiles a function; got {type(transform).__name__}, which cannot be called.")
    jitted = compiled_form(transform)
    if jitted is None:
        jitted = Jit(transform, {}, donate_states)
    elif donate_states and not jitted.donates:
        raise StateValueError(
            "prepare: donate_states is an option of the jit that is prepared: jit(fun, donate_states=True)."
        )
    return Prepared(transform, jitted, args, kwargs)
