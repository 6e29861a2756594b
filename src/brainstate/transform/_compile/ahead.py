"""Programs that are compiled ahead of time, for one kind of call.

``jit(f).trace(x)`` gives a `Stage`, its ``lower()`` another, whose ``compile()`` gives a `Prepared`; `prepare` does all
three steps. They are JAX's own ``Traced``, ``Lowered`` and ``Compiled``, with the States filled in.

A call of a `Prepared` gathers the present values of the States, runs JAX's ``Compiled`` and commits (`Ready`). Nothing
about the arguments is asked in Python. ``Compiled`` never compiles: it refuses a call that does not fit. Only then is
the call compared with the one that was prepared, leaf by leaf, to show a table of differences.

JAX cannot see that a Module changed. A counter tells that some Module did (``_seam/module_reads``). If the function has
read that Module, it is traced again, by itself and without being compiled. If it is still the same program with the
same States, nothing happens; otherwise the prepared program is stale, and every call says so.

Static arguments are compared at each call and taken out, since JAX compiles them away. A program that comes from
``lower`` is called without them, as in JAX.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from operator import methodcaller
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.tree_util import keystr

from ..._copies import Remade
from ..._errors import StateTypeError, StateValueError, TraceContextError
from ..._program.interpret import all_programs
from ..._seam.packing import ABSENT
from ..._seam.run_time_errors import await_errors
from ..._seam.scope import gather, generation, is_tracer, replaced_since, tag_changes
from ..._seam.step import Ready, give, launch
from ..._seam.tokens import without_token
from .._wrapper import resemble
from .retraces import options
from .signature import Comparison, Part, argument_names, argument_parts, compare, state_part

__all__ = ["Cost", "Memory", "Prepared", "Source", "Stage"]

_SHOWN = 12  # rows that agree; more are counted


class Cost(NamedTuple):
    """XLA's estimate of the work of one call; a loop is counted once, and an unknown amount is None."""

    flops: float | None
    bytes: float | None
    transcendentals: float | None


@dataclass(frozen=True, repr=False)
class Memory:
    """The memory that one call needs, in bytes.

    Attributes
    ----------
    arguments, output : int
        The values that go in (arguments and States) and come out (the result and the written States).
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
        """The sum of arguments, output and temporaries, less the donated part."""
        return self.arguments + self.output + self.temporaries - self.donated

    def __repr__(self) -> str:
        parts = asdict(self) | {"peak": self.peak}
        return f"Memory({', '.join(f'{name}={_bytes(size)}' for name, size in parts.items())})"


def _bytes(size) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size} B"


class Source(NamedTuple):
    """The origin of a program: the `Jit`, its ``program`` with the States of that moment, and JAX's trace."""

    jitted: Any
    program: Any
    traced: Any
    places: set[int | str]  # positions and names of static arguments
    statics: dict[int | str, Any]  # those of the call, by position or name

    @classmethod
    def from_trace(cls, jitted: Any, program: Any, traced: Any, args: tuple, kwargs: dict[str, Any]) -> "Source":
        """Return the source of programs after ``jitted`` was traced for these arguments."""
        places = jitted.statics(len(args))
        return cls(jitted, program, traced, places, _statics_of(places, args, kwargs))

    def types(self) -> tuple[list, list, dict[str, Any]]:
        """Return the types of the values of the States, and those of the arguments that are not static."""
        (first, *args), kwargs = self.traced.in_avals
        if not self.program.donates:
            return first, args, kwargs
        given, kept, args = iter(first), iter(args[0]), args[1:]
        return [next(given if gives else kept) for gives in self.program.gives], args, kwargs

    def without_statics(self, args, kwargs) -> tuple[list, dict[str, Any]]:
        """Return the arguments that are not static."""
        kept = [arg for i, arg in enumerate(args) if i not in self.places]
        return kept, {name: arg for name, arg in kwargs.items() if name not in self.places}

    def with_statics(self, args, kwargs) -> tuple[list, dict[str, Any]]:
        """Insert the static arguments of the traced call among ``args`` and ``kwargs``."""
        args, numbers = list(args), [key for key in self.statics if isinstance(key, int)]
        for place in sorted(numbers):
            args.insert(place, self.statics[place])
        return args, kwargs | {key: self.statics[key] for key in self.statics.keys() - set(numbers)}

    def trace_again(self) -> "Source":
        """Trace the present function for arguments of the same types."""
        args, kwargs = self.with_statics(*jax.tree.map(_example, self.types()[1:]))
        return self.jitted.fresh_copy().trace(*args, **kwargs)._source


# JAX's attributes by argument and by result, of a program whose first arguments and last result are those of States.
_OF_INPUTS = {"args_info", "in_avals", "input_formats", "input_layouts", "input_shardings"}
_OF_RESULTS = {"out_avals", "out_info", "output_formats", "output_layouts", "output_shardings"}
_OF_PROGRAM = {"as_text", "compiler_ir", "cost_analysis", "effects", "fun_name", "jaxpr", "memory_analysis"}


class _Step:
    """A step of JAX's ahead-of-time compilation (traced, lowered or compiled), with the States filled in.

    ``args_info``, ``in_tree``, ``out_info``, ``input_shardings`` and the like are about the arguments and results of
    the function. ``jaxpr``, ``as_text()``, ``memory_analysis()`` and the like are about the program, where the values
    of the States come before the arguments and after the results.
    """

    _source: Source
    _step: Any

    def _ask(self, name: str) -> Any:
        found = getattr(self._step, name)
        if name in _OF_INPUTS:
            args, kwargs = found
            return args[2 if self._source.program.donates else 1 :], kwargs
        return found[0] if name in _OF_RESULTS else found

    @property
    def in_tree(self) -> Any:
        """The structure of the arguments."""
        return jax.tree.structure(self._ask("args_info"))

    @property
    def out_tree(self) -> Any:
        """The structure of the result."""
        return jax.tree.structure(self._ask("out_info"))

    @property
    def donate_argnums(self) -> tuple[int, ...]:
        """The leaves of the arguments, by number, that are given away."""
        return tuple(i for i, leaf in enumerate(jax.tree.leaves(self._ask("args_info"))) if leaf.donated)


# Properties, since a `__getattr__` slows down each access to an attribute: a small call by some hundredths.
for _name in _OF_INPUTS | _OF_RESULTS | _OF_PROGRAM | {"runtime_executable"}:
    setattr(_Step, _name, property(methodcaller("_ask", _name)))


class Stage(_Step):
    """A function that was traced or lowered for certain arguments; the next step leads to `Prepared`."""

    def __init__(self, source: Source, step: Any):
        self._source, self._step = source, step

    def lower(self, **options: Any) -> Any:
        """Lower the traced function, as ``jax.stages.Traced.lower``."""
        with without_token():
            lowered = self._step.lower(**options)
        # Only `jax.export` asks with parameters of its own, and it reads the trees of the whole program.
        return lowered if "_private_parameters" in options else Stage(self._source, lowered)

    def compile(self, *options: Any, **more: Any) -> "Prepared":
        """Compile the lowered function, as ``jax.stages.Lowered.compile``; calls leave static arguments out."""
        return Prepared(self._source, self._step.compile(*options, **more))


class Prepared(Remade, Ready, _Step):
    """A function that was compiled ahead of time; made by `prepare`, and called like the function."""

    def __init__(self, source: Source, compiled: Any, transform: Any = None):
        self._source, self._step = source, compiled
        prepared = source.jitted if transform is None else transform
        resemble(self, prepared)
        self.__wrapped__ = prepared  # keeps the object of a bound method alive
        self._label, self._options, self._takes_statics = _label(prepared), options(), transform is not None
        program = source.program.snapshot()
        self._states, self._written = tuple(program.states), tuple(program.written)
        self._generators = program.generators
        self._generation, self._retagged, self._touched = program.generation, program.retagged, program.touched
        values, args, kwargs = source.types()
        run = await_errors(compiled.__call__) if program.waits else compiled.__call__
        run = program.with_donation(run, program.returned)
        if self._takes_statics:
            run, (args, kwargs) = _with_statics(run, source), source.with_statics(args, kwargs)
        call = partial(give, self._label, program.returned) if program.donates and not program.waits else launch
        self._run, self._launch = run, partial(call, run, self._states, self._generators, self._written)
        self._writes_all = not (program.donates or any(value is ABSENT for value in source.traced.out_info[1]))
        self._expected = self._of_states(values), self._of_arguments(args, kwargs)

    def _recipe(self):
        return _refuse_copy, (self.__wrapped__,)

    def __reduce_ex__(self, protocol):
        return _refuse_copy(self.__wrapped__)

    # -------------------------------------------------------------------------------------- the program

    def cost(self) -> Cost | None:
        """Return XLA's estimate of the work of one call, or None where the backend gives none."""
        found = self._step.cost_analysis()
        found = found[0] if isinstance(found, list | tuple) and found else found
        if not isinstance(found, dict):
            return None
        amounts = (found.get(key, 0.0) for key in ("flops", "bytes accessed", "transcendentals"))
        return Cost(*(amount if amount >= 0 else None for amount in amounts))

    def memory(self) -> Memory | None:
        """Return the memory that one call needs, or None where the backend does not say."""
        found = self._step.memory_analysis()
        if found is None:
            return None
        parts = ("argument", "output", "temp", "alias", "generated_code")
        return Memory(*(int(getattr(found, f"{part}_size_in_bytes")) for part in parts))

    def as_text(self, stage: Literal["jaxpr", "stablehlo", "hlo"] = "hlo") -> str:
        """Return the program as text: as it was traced, as it was lowered, or as it was optimised by XLA."""
        if stage == "jaxpr":
            return str(self._source.traced.jaxpr)
        if stage == "stablehlo":
            with without_token():
                return self._source.traced.lower().as_text()
        if stage == "hlo":
            return self._step.as_text() or ""
        raise StateValueError(f"as_text(): stage is 'jaxpr', 'stablehlo' or 'hlo', not {stage!r}.")

    def __repr__(self) -> str:
        given = (f"{name}: {', '.join(part.leaves.values())}" for name, part in self._expected[1].items())
        states = f"States: {len(self._states)} read, {len(self._written)} written"
        return f"prepared {self._label}({', '.join(given)}), {states}"

    # -------------------------------------------------------------------------------------- types of a call

    def _of_states(self, values) -> dict[Any, Part]:
        return {id(s): state_part(s, value, weak=False) for s, value in zip(self._states, values, strict=True)}

    def _of_arguments(self, args, kwargs) -> dict[Any, Part]:
        static = self._source.places if self._takes_statics else ()
        return argument_parts(self._names(len(args)), args, kwargs, lambda key, _: key in static, weak=False)

    def _names(self, count) -> list[str]:
        """Return the names of the first ``count`` positional arguments of a call."""
        source = self._source
        if self._takes_statics:
            return argument_names(source.jitted, count)
        names = argument_names(source.jitted, count + len(source.statics))
        return source.without_statics(names, {})[0][:count]

    def _inputs(self, values, args, kwargs) -> Iterator[tuple[str, Any]]:
        """Return the leaves that go in by name, in the order in which JAX has them."""
        names = self._names(len(args))
        if self._takes_statics:
            (names, _), (args, kwargs) = (self._source.without_statics(*x) for x in ((names, {}), (args, kwargs)))
        named = [(state.describe(), value) for state, value in zip(self._states, values, strict=True)]
        named += zip((f"argument {name}" for name in names), args, strict=True)
        for name, value in [*named, *((f"argument {name}", kwargs[name]) for name in sorted(kwargs))]:
            for path, leaf in jax.tree_util.tree_leaves_with_path(value):
                yield name + keystr(path), leaf

    # -------------------------------------------------------------------------------------- errors

    def _refuse(self, args, kwargs):
        """Raise an error for a call that failed, if its types or places do not match the program."""
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
            expected = jax.tree.leaves(self._step.input_shardings, is_leaf=lambda x: x is None)
            rows = [_placement_row(*named, sharding) for named, sharding in zip(inputs, expected, strict=False)]
        if not all(row.same for row in rows):
            raise self._mismatch(rows) from None

    def _mismatch(self, rows) -> StateTypeError:
        return StateTypeError(
            f"{self._label} was prepared for another call (prepared → given):\n{_table(rows)}\n"
            f"Call it as prepared, or prepare again for this call."
        )

    def _renew(self):
        """Look again after States or Modules were replaced somewhere, and refuse if the program is stale."""
        source, now, changes = self._source, generation(), self._touched.changes()
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
            new = source.trace_again()
        except Exception as error:
            raise StateValueError(f"{stale}the function now raises {type(error).__name__}: {error}. {again}") from error
        before, after = ((*one.states, *one.written) for one in (source.program, new.program))
        if before != after or not _same_program(source.traced.jaxpr, new.traced.jaxpr):
            raise StateValueError(f"{stale}the function {_change(before, after)}. {again}")
        self._generation, self._touched, self._retagged = now, new.program.touched, new.program.retagged


def _refuse_copy(transform):
    raise StateTypeError(
        f"prepared {_label(transform)} is compiled for its States and cannot be copied with them: take it away before, "
        f"and prepare again for the copy."
    )


def _statics_of(places, args, kwargs) -> dict[int | str, Any]:
    return {key: arg for key, arg in (*enumerate(args), *kwargs.items()) if key in places}


def _with_statics(run, source):
    """Return ``run`` as a function of all arguments: those that are static are compared, and left out."""
    if not source.statics:
        return run

    def run_dynamic(values, /, *args, **kwargs):
        given = _statics_of(source.places, args, kwargs)
        if given.keys() != source.statics.keys() or not all(map(_equal, given.values(), source.statics.values())):
            raise TypeError("a static argument differs from the one that was prepared")
        args, kwargs = source.without_statics(args, kwargs)
        return run(values, *args, **kwargs)

    return run_dynamic


def _equal(a, b) -> bool:
    return a is b or (type(a) is type(b) and a == b)


def _example(aval) -> jax.ShapeDtypeStruct:
    """Return an example of a type."""
    sharding = None if aval.sharding.mesh.empty else aval.sharding
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding, weak_type=aval.weak_type)


def _same_program(before, after) -> bool:
    """Tell whether two traces are of one program, with the same arrays and Python functions in it."""
    was, now = str(before), str(after)
    if was != now:  # functions are written with their addresses: wrappers of a trace are new ones, callbacks count
        was, now = (re.sub(r"0x[0-9a-f]+", "", text) for text in (was, now))
        if was != now or "callback" in was:
            return False
    pairs = zip(_constants(before), _constants(after), strict=True)
    return all(a is b or (jax.typeof(a) == jax.typeof(b) and np.array_equal(a, b)) for a, b in pairs)


def _constants(program) -> list:
    """Return the arrays that a program holds, and those that it calls."""
    return [constant for inner in all_programs(program) for constant in getattr(inner, "consts", ())]


def _label(transform) -> str:
    """Return the name of a prepared function, on one line."""
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
    """Return the sharding that ``leaf`` is committed to, or None."""
    return leaf.sharding if getattr(leaf, "committed", isinstance(leaf, jax.ShapeDtypeStruct)) else None


def _placement_row(name, leaf, sharding) -> Comparison:
    """Compare the placement of an array with the prepared one."""
    given = _place(leaf)
    same = given is None or sharding is None or given.is_equivalent_to(sharding, leaf.ndim)
    return Comparison(name, str(sharding), str(sharding if same else given), same)


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
