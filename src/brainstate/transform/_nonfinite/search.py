"""The search for the origin of NaN and infinities: a traced program, run one operation after the other on numbers.

Every value that is not finite has *causes*: an operation that made it from finite operands (`Origin`), or an input
that already was not finite (`Given`). A finite value has no causes, so a mask ends the trail of a NaN that it removes,
and the causes of the final results are those that reach them. Two choices make the trail honest:

*An infinity comes before the NaN that it leads to.* For ``inf - inf``, the ``exp`` that overflowed is blamed. An
infinity that is written down (a literal, an input) is intended, and the operation that makes NaN of it is blamed.

*Several causes are told apart by trial.* Arrays do not show which of the causes that meet in one of them matters (one
may be a harmless NaN that is masked later, say). So the program runs again with all causes but one made finite. If the
result still is not finite, that cause suffices.

A call, loop or branch runs as a whole first. The search enters it only if its result is not finite, and a loop only
at the iterations where that begins, so that long loops cost little.

An operation is *forward* if the value of the function depends on it (`liveness`), and *backward* otherwise.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from ..._program.control_flow import Call, Cond, Scan, While, control_flow
from ..._program.interpret import bind, interpret
from ..._program.liveness import liveness, results_of_iteration
from ..._program.source_lines import Site, called_at, frames_of, site_of

__all__ = ["Given", "Origin", "TracedValue", "inexact", "origins"]

_KEYS = jax.dtypes.extended
_DETAILED = 32  # iterations of one loop that are entered; later ones only pass causes on
_TRIALS = 16  # causes that are tried one by one
_ENDLESS = 100_000  # iterations of a while loop, which may never end on values that were made finite

# Primitives whose result has NaN or an infinity exactly at the elements where it arises.
_ELEMENT_BY_ELEMENT = (
    "acos acosh add add_any asin asinh atan2 atanh cbrt convert_element_type cos cosh digamma div erf_inv exp exp2 "
    "expm1 integer_pow lgamma log log1p logistic mul nextafter pow rem rsqrt sin sinh sqrt square sub tan"
)


def inexact(leaf) -> bool:
    """Tell whether ``leaf`` is an array or number of a floating or complex type."""
    return type(leaf) in (float, complex) or (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact))


# ------------------------------------------------------------------------------------------ values and causes


@dataclass(eq=False)
class Given:
    """An input that is not finite. A constant has no name, and is known by the line that uses it."""

    name: str | None
    site: Site | None = None
    source: "Given | None" = None  # the constant as it is before it is used


@dataclass(frozen=True)
class _Where:
    """The surroundings of an operation: the user's line that led there, the library function, loops and branches."""

    site: Site | None = None
    called: str | None = None
    path: tuple[str, ...] = ()
    iteration: int | None = None
    branch: int | None = None


@dataclass(eq=False)
class Origin:
    """An operation that makes NaN or an infinity, in one evaluation: with its operands and its result."""

    primitive: str
    phase: str
    where: _Where
    operands: list
    makers: list[str]  # the names of the operations that the operands come from
    before: tuple[str, ...]  # the inputs that infinities among the operands come from
    result: Any
    key: Any
    spoilt: "Origin | None" = field(default=None)  # the operation that made NaN of this infinity first
    direct: bool = False  # that operation took the infinity as an operand

    @property
    def kind(self) -> str:
        """'NaN', or 'Inf' if there are only infinities."""
        return "NaN" if np.isnan(self.result).any() else "Inf"


class TracedValue(NamedTuple):
    """An array, the causes why it is not finite, if it holds NaN and infinities, and the equation it comes from."""

    array: Any
    causes: frozenset = frozenset()
    nan: bool = False
    inf: bool = False
    maker: Any = None

    @classmethod
    def from_array(cls, array, causes: Any = (), maker=None) -> "TracedValue":
        """Return ``array`` with these causes, or without if it is finite."""
        if not inexact(array) or np.isfinite(numbers := np.asarray(array)).all():
            return cls(array, maker=maker)
        return cls(array, frozenset(causes), bool(np.isnan(numbers).any()), bool(np.isinf(numbers).any()), maker)

    @property
    def finite(self) -> bool:
        """Whether no number in it is NaN or infinite."""
        return not (self.nan or self.inf)


_CONSTANT = Given(None)


def _constant_value(array) -> TracedValue:
    return TracedValue.from_array(array, [_CONSTANT])


def _all_causes(values) -> frozenset:
    return frozenset().union(*(v.causes for v in values))


def _array_of_type(array, atom):
    """Return ``array`` with the type that the program gives it: a literal is a Python number."""
    return np.asarray(array, atom.aval.dtype) if inexact(array) else np.asarray(array)


def _make_finite(array, mask):
    numbers = np.asarray(array)
    return np.where(mask, np.ones((), numbers.dtype), numbers)


def _element(value, i) -> TracedValue:
    whole = np.asarray(value.array) if inexact(value.array) else value.array
    return TracedValue.from_array(whole[i], value.causes)


def _stack_values(values) -> TracedValue:
    arrays = [v.array for v in values]
    return TracedValue.from_array(np.stack(arrays) if inexact(arrays[0]) else jnp.stack(arrays), _all_causes(values))


# ------------------------------------------------------------------------------------------ the search


class _Search:
    """One run of a program. With ``only``, every other cause is made finite."""

    def __init__(self, given: dict, only: Any = None):
        self.given, self.only = given, only
        self.origins: dict[Any, Origin] = {}  # in the order of execution
        self.constants: dict[Any, Given] = {}  # by the line that uses them
        self.compiled: dict[int, Any] = {}
        self.entered: dict[Any, int] = {}

    def run(self, closed, args, wanted, where) -> list[TracedValue]:
        """Run a program; ``wanted`` are the outputs that belong to the value of the function."""
        rule = functools.partial(self._step, liveness(closed, wanted).results, where)
        return interpret(closed.jaxpr, map(_constant_value, closed.consts), args, rule, _constant_value)

    def _step(self, live, where, eqn, ins) -> list[TracedValue]:
        name = eqn.primitive.name
        if name == "state_read":
            return [self.given[eqn.params["state"], eqn.params["leaf"]]]
        if name in ("pvary", "tap_record"):  # identities; a tap must not record the search, and pvary needs a shard_map
            return list(ins)
        if name == "debug_callback":
            return []
        outs = [TracedValue.from_array(out, maker=eqn) for out in bind(eqn, [v.array for v in ins])]
        if all(out.finite for out in outs):
            return outs
        wanted = live.get(id(eqn), [False] * len(outs))
        entered = self._enter(eqn, ins, wanted, where)
        if entered is not None:
            return entered
        phases = ["forward" if want else "backward" for want in wanted]
        return [self._find_causes(eqn, ins, out, phase, where) for out, phase in zip(outs, phases, strict=True)]

    # --- programs within

    def _enter(self, eqn, ins, wanted, where) -> list[TracedValue] | None:
        """Run the programs of a call, loop or branch, operation by operation; return None for a single operation."""
        where = replace(where, site=site_of(frames_of(eqn)) or where.site, called=None)
        match control_flow(eqn):
            case Call(body, adds, name) if adds != "devices":  # a shard cannot be computed alone
                return self.run(body, ins, wanted, replace(where, called=name))
            case Cond(branches):
                number = min(max(int(ins[0].array), 0), len(branches) - 1)
                path = (*where.path, f"branch {number} of a cond")
                return self.run(branches[number], ins[1:], wanted, replace(where, path=path, branch=number))
            case Scan(length=length) as loop if length:
                return self._scan(loop, *loop.split(ins), wanted, where, id(eqn))
            case While() as loop:
                return self._while(loop, *loop.split(ins), wanted, where, id(eqn))
        return None

    def _scan(self, loop, constants, carry, xs, wanted, where, key):
        wanted, rows = results_of_iteration(loop, wanted), [None] * loop.length
        for i in loop.steps():
            ins = [*constants, *carry, *(_element(x, i) for x in xs)]
            outs = self._iteration(loop, ins, wanted, where, i, f"{i} of {loop.length} of a scan", key)
            carry, rows[i] = outs[: loop.carried], outs[loop.carried :]
        return [*carry, *map(_stack_values, zip(*rows, strict=True))]

    def _while(self, loop, test_constants, constants, carry, wanted, where, key):
        wanted, goes_on = results_of_iteration(loop, wanted), self._compile(loop.test)
        for i in range(_ENDLESS):
            if not goes_on(*(v.array for v in [*test_constants, *carry]))[0]:
                break
            carry = self._iteration(loop, [*constants, *carry], wanted, where, i, f"{i} of a while loop", key)
        return carry

    def _iteration(self, loop, ins, wanted, where, i, words, key):
        """Run iteration ``i`` as a whole, and operation by operation if something in its result is not finite."""
        outs = [TracedValue.from_array(out) for out in self._compile(loop.body)(*(v.array for v in ins))]
        if all(out.finite for out in outs):
            return outs
        times = self.entered[key, where.path] = self.entered.get((key, where.path), 0) + 1
        if times > _DETAILED and all(_is_inherited(ins, out) for out in outs):
            return [TracedValue.from_array(out.array, _inherited_causes(ins, out.nan)) for out in outs]
        inside = replace(where, path=(*where.path, f"iteration {words}"), iteration=i)
        return self.run(loop.body, ins, wanted, inside)

    def _compile(self, closed):
        """Return a program of the search as a compiled function."""
        if id(closed) not in self.compiled:
            self.compiled[id(closed)] = jax.jit(jaxpr_as_fun(closed))
        return self.compiled[id(closed)]

    # --- single operations

    def _find_causes(self, eqn, ins, out, phase, where) -> TracedValue:
        """Return the result ``out`` of a single operation with its causes."""
        if out.finite:
            return out
        ins = _operands_used(eqn, ins)
        causes = _inherited_causes(ins, out.nan)
        causes = frozenset(self._locate(cause, eqn, where) for cause in causes)
        new = _new_elements(eqn, ins, out) if causes else ~np.isfinite(np.asarray(out.array))
        if new is None:
            if out.nan and not any(v.nan for v in ins):
                self._spoil(causes, self._origin(eqn, ins, out, phase, where), ins)
            return TracedValue.from_array(out.array, causes, eqn)
        origin = self._origin(eqn, ins, out, phase, where)
        if self.only is not None and origin.key != getattr(self.only, "key", None):
            return TracedValue.from_array(_make_finite(out.array, new), causes, eqn)
        origin = self.origins.setdefault(origin.key, origin)
        return TracedValue.from_array(out.array, causes | {origin}, eqn)

    def _locate(self, cause, eqn, where):
        if not isinstance(cause, Given) or cause.name or cause.site:
            return cause
        site = site_of(frames_of(eqn)) or where.site
        return self.constants.setdefault((id(cause), site), Given(None, site, cause))

    def _origin(self, eqn, ins, out, phase, where) -> Origin:
        frames = frames_of(eqn)
        site = site_of(frames)
        place = where if site is None else replace(where, site=site, called=called_at(frames))
        pairs = zip(ins, eqn.invars, strict=True)
        operands = [_array_of_type(v.array, atom) for v, atom in pairs if not jnp.issubdtype(atom.aval.dtype, _KEYS)]
        makers = [v.maker.primitive.name if v.maker else "" for v in ins]
        given = [cause.name for cause in _all_causes(ins) if isinstance(cause, Given) and cause.name]
        key = where.path, where.site, id(eqn)
        return Origin(
            eqn.primitive.name, phase, place, operands, makers, tuple(sorted(given)), np.asarray(out.array), key
        )

    def _spoil(self, causes, operation, ins):
        makers = [id(v.maker) for v in ins if v.inf]
        for cause in causes:
            if isinstance(cause, Origin) and cause.spoilt is None:
                cause.spoilt, cause.direct = operation, cause.key[-1] in makers


def _operands_used(eqn, ins) -> Sequence[TracedValue]:
    """Return the operands; those of a selection without the elements that are not selected."""
    if eqn.primitive.name != "select_n":
        return ins
    which, *cases = ins
    chosen = np.asarray(which.array)
    kept = [which]
    for i, case in enumerate(cases):
        taken = np.where(chosen == i, np.asarray(case.array), 0)
        kept.append(TracedValue.from_array(taken, case.causes, case.maker))
    return kept


def _inherited_causes(ins, nan) -> frozenset:
    """Return the causes that operands pass on to a result with NaN, or with infinities only."""
    if not nan:
        return _all_causes(v for v in ins if v.inf) or _all_causes(v for v in ins if v.nan)
    found = _all_causes(v for v in ins if v.nan)
    return found or frozenset(c for c in _all_causes(v for v in ins if v.inf) if isinstance(c, Origin))


def _is_inherited(ins, out) -> bool:
    """Tell whether the operands explain ``out``: NaN by NaN, and infinities by either."""
    return any(v.nan for v in ins) or not (out.nan or (out.inf and not any(v.inf for v in ins)))


def _new_elements(eqn, ins, out):
    """Return the mask of elements that are not finite though their operands are; None if empty or unknown."""
    shape = np.shape(out.array)
    if eqn.primitive.name not in _ELEMENT_BY_ELEMENT.split() or any(np.shape(v.array) not in ((), shape) for v in ins):
        return None
    mask = ~np.isfinite(np.asarray(out.array))
    for v in ins:
        mask = mask & np.isfinite(np.asarray(v.array))
    return mask if mask.any() else None


def origins(jaxpr, inputs: Sequence[TracedValue], given: dict, derivative: Sequence[bool], faulty: Callable) -> list:
    """Return the causes of a result that is not finite: `Given`, then forward, then backward ones, each in order.

    ``inputs`` has the `TracedValue` of each input of the program, which has no constants, and ``given`` that of each
    leaf of a State. ``derivative`` tells for each output whether it belongs to the derivative, ``faulty(outputs)``
    returns those that should be finite and are not.
    """
    wanted = [not flag for flag in derivative]

    def run(only=None):
        def repair(value):
            if only is None or not value.nan or not value.causes.isdisjoint((only, getattr(only, "source", None))):
                return value
            return TracedValue.from_array(_make_finite(value.array, np.isnan(np.asarray(value.array))), value.causes)

        search = _Search({key: repair(value) for key, value in given.items()}, only)
        return faulty(search.run(ClosedJaxpr(jaxpr, ()), map(repair, inputs), wanted, _Where())), search

    found, search = run()
    causes = _all_causes(found)
    made = [o for o in search.origins.values() if o in causes]
    order = [c for c in causes if isinstance(c, Given)] + sorted(made, key=lambda o: o.phase != "forward")
    if len(order) < 2:
        return order
    sufficient = [cause for cause in order[:_TRIALS] if run(cause)[0]]
    return sufficient or order
