"""Where NaN and infinities come from: a traced program run one operation after the other, on numbers.

Every value that is not finite has *causes*: operations that made it out of finite operands (`Origin`), or inputs that
brought it along (`Given`). A finite value has none, so a mask that does its work ends the trail, and what is found at
the end of the program is what flows there. Two choices make the trail honest:

*An infinity comes before the NaN that it leads to.* ``inf - inf`` is blamed on the ``exp`` that overflowed. An
infinity that is written down (a literal, an input) is meant, and the operation that makes NaN of it is blamed.

*Several causes are told apart by trial.* What meets in one array (a harmless NaN that is masked later, say) cannot be
told apart by looking at arrays. The program runs again with every cause but one made finite; if the result still is
not, then that one suffices.

A call, loop or branch runs as a whole first. Only if its result is not finite it is entered, and a loop only at the
iterations at which that begins, so that long loops cost little.

Forward or backward is read from the flow of data: forward is what the value of the function depends on.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxpr_as_fun

from ..._compat import scan_inputs
from ..._program.interpret import bind, interpret, opened
from ..._program.source_lines import Site, called_at, frames_of, site_of

__all__ = ["Given", "Origin", "Value", "inexact", "origins"]

_KEYS = jax.dtypes.extended
_DETAILED = 32  # iterations of one loop that are looked into; what goes on after them is only passed on
_TRIALS = 16  # causes that are tried one by one
_ENDLESS = 100_000  # iterations of a while loop, which may never end on values that were made finite

_CALLS = "jit closed_call eval_jaxpr remat2 custom_jvp_call custom_vjp_call"
_ELEMENTWISE = (
    "acos acosh add add_any asin asinh atan2 atanh cbrt convert_element_type cos cosh digamma div erf_inv exp exp2 "
    "expm1 integer_pow lgamma log log1p logistic mul nextafter pow rem rsqrt sin sinh sqrt square sub tan"
)
_calls, _elementwise = frozenset(_CALLS.split()), frozenset(_ELEMENTWISE.split())


def inexact(leaf) -> bool:
    """Tell whether ``leaf`` is an array or number of a floating or complex type."""
    return type(leaf) in (float, complex) or (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact))


# ------------------------------------------------------------------------------------------ values and causes


@dataclass(eq=False)
class Given:
    """An input that is not finite; ``name`` is None for a constant, which then is known by the line that uses it."""

    name: str | None
    site: Site | None = None
    source: "Given | None" = None  # the constant as it is before it is used


@dataclass(frozen=True)
class _Where:
    """What encloses an operation: the user's line that led there, the library function, and loops and branches."""

    site: Site | None = None
    called: str | None = None
    path: tuple[str, ...] = ()
    iteration: int | None = None
    branch: int | None = None


@dataclass(eq=False)
class Origin:
    """An operation that makes NaN or an infinity, at one time: with what it worked on and what came out."""

    primitive: str
    phase: str
    where: _Where
    operands: list
    makers: list[str]  # the names of the operations that the operands come from
    before: tuple[str, ...]  # the inputs that infinities among the operands come from
    result: Any
    key: Any
    spoilt: "Origin | None" = field(default=None)  # the operation that made NaN of this infinity first
    direct: bool = False  # and whether it took the infinity as it was

    @property
    def kind(self) -> str:
        """'NaN', or 'Inf' if there are only infinities."""
        return "NaN" if np.isnan(self.result).any() else "Inf"


class Value(NamedTuple):
    """An array, what made it not finite, whether it holds NaN and infinities, and the operation it comes from."""

    array: Any
    causes: frozenset = frozenset()
    nan: bool = False
    inf: bool = False
    maker: Any = None

    @classmethod
    def of(cls, array, causes: Any = (), maker=None) -> "Value":
        """Look at ``array``; a finite one has no causes."""
        if not inexact(array) or np.isfinite(numbers := np.asarray(array)).all():
            return cls(array, maker=maker)
        return cls(array, frozenset(causes), bool(np.isnan(numbers).any()), bool(np.isinf(numbers).any()), maker)

    @property
    def finite(self) -> bool:
        """Whether all is finite, or no number."""
        return not (self.nan or self.inf)


_CONSTANT = Given(None)


def _literal(array) -> Value:
    return Value.of(array, [_CONSTANT])


def _union(values) -> frozenset:
    return frozenset().union(*(v.causes for v in values))


def _typed(array, atom):
    """Return ``array`` with the type that the program gives it: a literal is a Python number."""
    return np.asarray(array, atom.aval.dtype) if inexact(array) else np.asarray(array)


def _repaired(array, mask):
    numbers = np.asarray(array)
    return np.where(mask, np.ones((), numbers.dtype), numbers)


def _part(value, i) -> Value:
    whole = np.asarray(value.array) if inexact(value.array) else value.array
    return Value.of(whole[i], value.causes)


def _stacked(values) -> Value:
    arrays = [v.array for v in values]
    return Value.of(np.stack(arrays) if inexact(arrays[0]) else jnp.stack(arrays), _union(values))


# ------------------------------------------------------------------------------------------ what the value needs


def _inner(eqn):
    """Return the program that a call runs, or None if the operation is no call."""
    if eqn.primitive.name not in _calls:
        return None
    return eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))


def _needed(jaxpr, wanted) -> tuple[dict, list[bool]]:
    """Return {id of an operation: which results are needed}, and which inputs are, for the ``wanted`` outputs."""
    jaxpr = opened(jaxpr)
    alive = {v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and not isinstance(v, Literal)}
    needs = {}
    for eqn in reversed(jaxpr.eqns):
        outs = [v in alive for v in eqn.outvars]
        if any(outs):
            needs[id(eqn)] = outs
            ins = _inputs_needed(eqn, outs)
            alive.update(v for v, want in zip(eqn.invars, ins, strict=True) if want and not isinstance(v, Literal))
    return needs, [v in alive for v in jaxpr.invars]


def _inputs_needed(eqn, outs) -> list[bool]:
    name, params = eqn.primitive.name, eqn.params
    inner = _inner(eqn)
    if inner is not None:
        return _needed(inner, outs)[1]
    if name == "cond":
        each = [_needed(branch, outs)[1] for branch in params["branches"]]
        return [True, *map(any, zip(*each, strict=True))]
    if name == "scan":
        return _needed(params["jaxpr"], _wanted_of_scan(eqn, outs))[1]
    if name == "while":
        carry = _wanted_of_while(eqn, outs)
        consts = _needed(params["body_jaxpr"], carry)[1][: params["body_nconsts"]]
        return [*[True] * params["cond_nconsts"], *consts, *carry]
    return [True] * len(eqn.invars)


def _wanted_of_scan(eqn, outs) -> list[bool]:
    """Return which results of an iteration are needed, for these of the loop: a carry may need another one."""
    consts, carry, _ = scan_inputs(eqn.params, eqn.invars)
    first, count = len(consts), len(carry)
    while True:
        ins = _needed(eqn.params["jaxpr"], outs)[1][first : first + count]
        more = [a or b for a, b in zip(outs, ins, strict=False)] + outs[count:]
        if more == outs:
            return outs
        outs = more


def _wanted_of_while(eqn, outs) -> list[bool]:
    """As `_wanted_of_scan`; what decides on the end is needed too."""
    params, first = eqn.params, eqn.params["body_nconsts"]
    outs = [
        a or b for a, b in zip(outs, _needed(params["cond_jaxpr"], [True])[1][params["cond_nconsts"] :], strict=True)
    ]
    while True:
        more = [a or b for a, b in zip(outs, _needed(params["body_jaxpr"], outs)[1][first:], strict=True)]
        if more == outs:
            return outs
        outs = more


# ------------------------------------------------------------------------------------------ the search


class _Search:
    """One run of a program. ``only``: the one cause that is not made finite; None for a run as it is."""

    def __init__(self, given: dict, only: Any = None):
        self.given, self.only = given, only
        self.origins: dict[Any, Origin] = {}  # in the order of execution
        self.constants: dict[Any, Given] = {}  # by the line that uses them
        self.compiled: dict[int, Any] = {}
        self.entered: dict[Any, int] = {}

    def run(self, jaxpr, consts, args, wanted, where) -> list[Value]:
        """Run ``jaxpr``; ``wanted`` are the outputs that belong to the value of the function."""
        rule = functools.partial(self._step, _needed(jaxpr, wanted)[0], where)
        return interpret(jaxpr, consts, args, rule, _literal)

    def _step(self, needs, where, eqn, ins) -> list[Value]:
        name = eqn.primitive.name
        if name == "state_read":
            return [self.given[eqn.params["state"], eqn.params["leaf"]]]
        if name in ("pvary", "tap_record"):  # identities; of a search nobody should hear, and pvary needs a shard_map
            return list(ins)
        if name == "debug_callback":
            return []
        outs = [Value.of(out, maker=eqn) for out in bind(eqn, [v.array for v in ins])]
        if all(out.finite for out in outs):
            return outs
        wanted = needs.get(id(eqn), [False] * len(outs))
        enter = {"scan": self._scan, "while": self._while, "cond": self._cond}.get(name)
        if _inner(eqn) is not None:
            enter = self._call
        if enter is not None and eqn.params.get("length", 1):
            frames = frames_of(eqn)
            called = eqn.params.get("name") if _inner(eqn) is not None else None
            return enter(eqn, ins, wanted, replace(where, site=site_of(frames) or where.site, called=called))
        phases = ["forward" if want else "backward" for want in wanted]
        return [self._judged(eqn, ins, out, phase, where) for out, phase in zip(outs, phases, strict=True)]

    # --- programs within

    def _call(self, eqn, ins, wanted, where):
        inner = _inner(eqn)
        return self.run(opened(inner), self._constants(inner), ins, wanted, where)

    def _cond(self, eqn, ins, wanted, where):
        branches = eqn.params["branches"]
        number = min(max(int(ins[0].array), 0), len(branches) - 1)
        path = (*where.path, f"branch {number} of a cond")
        where = replace(where, path=path, branch=number)
        return self.run(branches[number].jaxpr, self._constants(branches[number]), ins[1:], wanted, where)

    def _scan(self, eqn, ins, wanted, where):
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        consts, carry, xs = scan_inputs(eqn.params, ins)
        wanted, count = _wanted_of_scan(eqn, wanted), len(carry)
        rows = [None] * length
        for i in reversed(range(length)) if eqn.params["reverse"] else range(length):
            inside = replace(where, path=(*where.path, f"iteration {i} of {length} of a scan"), iteration=i)
            outs = self._iteration(body, [*consts, *carry, *(_part(x, i) for x in xs)], wanted, inside, id(eqn))
            carry, rows[i] = outs[:count], outs[count:]
        return [*carry, *map(_stacked, zip(*rows, strict=True))]

    def _while(self, eqn, ins, wanted, where):
        params = eqn.params
        n, m = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        wanted, carry = _wanted_of_while(eqn, wanted), ins[m:]
        goes_on = self._whole(params["cond_jaxpr"])
        for i in range(_ENDLESS):
            if not goes_on(*(v.array for v in [*ins[:n], *carry]))[0]:
                break
            inside = replace(where, path=(*where.path, f"iteration {i} of a while loop"), iteration=i)
            carry = self._iteration(params["body_jaxpr"], [*ins[n:m], *carry], wanted, inside, id(eqn))
        return carry

    def _iteration(self, body, ins, wanted, where, loop):
        outs = [Value.of(out) for out in self._whole(body)(*(v.array for v in ins))]
        if all(out.finite for out in outs):
            return outs
        times = self.entered[loop, where.path[:-1]] = self.entered.get((loop, where.path[:-1]), 0) + 1
        if times > _DETAILED and all(_follows(ins, out) for out in outs):
            return [Value.of(out.array, _inherited(ins, out.nan)) for out in outs]
        return self.run(body.jaxpr, self._constants(body), ins, wanted, where)

    def _whole(self, closed):
        if id(closed) not in self.compiled:
            self.compiled[id(closed)] = jax.jit(jaxpr_as_fun(closed))
        return self.compiled[id(closed)]

    def _constants(self, program) -> list[Value]:
        return [_literal(c) for c in getattr(program, "consts", ())]

    # --- single operations

    def _judged(self, eqn, ins, out, phase, where) -> Value:
        """Return the result ``out`` of one operation with its causes."""
        if out.finite:
            return out
        ins = _selected(eqn, ins)
        causes = _inherited(ins, out.nan)
        causes = frozenset(self._placed(cause, eqn, where) for cause in causes)
        fresh = _fresh(eqn, ins, out) if causes else ~np.isfinite(np.asarray(out.array))
        if fresh is None:
            if out.nan and not any(v.nan for v in ins):
                self._spoil(causes, self._origin(eqn, ins, out, phase, where), ins)
            return Value.of(out.array, causes, eqn)
        origin = self._origin(eqn, ins, out, phase, where)
        if self.only is not None and origin.key != getattr(self.only, "key", None):
            return Value.of(_repaired(out.array, fresh), causes, eqn)
        origin = self.origins.setdefault(origin.key, origin)
        return Value.of(out.array, causes | {origin}, eqn)

    def _placed(self, cause, eqn, where):
        if not isinstance(cause, Given) or cause.name or cause.site:
            return cause
        site = site_of(frames_of(eqn)) or where.site
        return self.constants.setdefault((id(cause), site), Given(None, site, cause))

    def _origin(self, eqn, ins, out, phase, where) -> Origin:
        frames = frames_of(eqn)
        site = site_of(frames)
        place = where if site is None else replace(where, site=site, called=called_at(frames))
        pairs = zip(ins, eqn.invars, strict=True)
        operands = [_typed(v.array, atom) for v, atom in pairs if not jnp.issubdtype(atom.aval.dtype, _KEYS)]
        makers = [v.maker.primitive.name if v.maker else "" for v in ins]
        given = [cause.name for cause in _union(ins) if isinstance(cause, Given) and cause.name]
        key = where.path, where.site, id(eqn)
        return Origin(
            eqn.primitive.name, phase, place, operands, makers, tuple(sorted(given)), np.asarray(out.array), key
        )

    def _spoil(self, causes, operation, ins):
        makers = [id(v.maker) for v in ins if v.inf]
        for cause in causes:
            if isinstance(cause, Origin) and cause.spoilt is None:
                cause.spoilt, cause.direct = operation, cause.key[-1] in makers


def _selected(eqn, ins) -> Sequence[Value]:
    """Return ``ins``, for a selection without what is selected nowhere."""
    if eqn.primitive.name != "select_n":
        return ins
    which, *cases = ins
    chosen = np.asarray(which.array)
    kept = [which]
    for i, case in enumerate(cases):
        taken = np.where(chosen == i, np.asarray(case.array), 0)
        kept.append(Value.of(taken, case.causes, case.maker))
    return kept


def _inherited(ins, nan) -> frozenset:
    """Return the causes that operands pass on to a result with NaN, or with infinities only."""
    if not nan:
        return _union(v for v in ins if v.inf) or _union(v for v in ins if v.nan)
    found = _union(v for v in ins if v.nan)
    return found or frozenset(c for c in _union(v for v in ins if v.inf) if isinstance(c, Origin))


def _follows(ins, out) -> bool:
    """Tell whether ``out`` is no worse than some of ``ins``."""
    return any(v.nan for v in ins) or not (out.nan or (out.inf and not any(v.inf for v in ins)))


def _fresh(eqn, ins, out):
    """Return where the result is not finite while all operands are, or None: nowhere, or who knows."""
    shape = np.shape(out.array)
    if eqn.primitive.name not in _elementwise or any(np.shape(v.array) not in ((), shape) for v in ins):
        return None
    mask = ~np.isfinite(np.asarray(out.array))
    for v in ins:
        mask = mask & np.isfinite(np.asarray(v.array))
    return mask if mask.any() else None


def origins(jaxpr, inputs: Sequence[Value], given: dict, derivative: Sequence[bool], faulty: Callable) -> list:
    """Return what makes the result of a program not finite: `Given`, then forward, then backward, each in order.

    ``inputs`` has the `Value` of each input of the program, which has no constants, and ``given`` that of each leaf
    of a State. ``derivative`` tells for each output whether it belongs to the derivative, ``faulty(outputs)`` returns
    those that should be finite and are not.
    """
    wanted = [not flag for flag in derivative]

    def run(only=None):
        def kept(value):
            if only is None or not value.nan or not value.causes.isdisjoint((only, getattr(only, "source", None))):
                return value
            return Value.of(_repaired(value.array, np.isnan(np.asarray(value.array))), value.causes)

        search = _Search({key: kept(value) for key, value in given.items()}, only)
        return faulty(search.run(jaxpr, (), map(kept, inputs), wanted, _Where())), search

    found, search = run()
    causes = _union(found)
    made = [o for o in search.origins.values() if o in causes]
    order = [c for c in causes if isinstance(c, Given)] + sorted(made, key=lambda o: o.phase != "forward")
    if len(order) < 2:
        return order
    sufficient = [cause for cause in order[:_TRIALS] if run(cause)[0]]
    return sufficient or order
