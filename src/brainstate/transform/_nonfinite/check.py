"""``debug_nan=True``: what a derivative does whose result has to be finite.

Called at once, the derivative is computed as always and its result is looked at. Only if it is not finite the same
call is staged, on the same States and keys, and its program, forward and backward in one, is searched (`search`).
Nothing has been committed by then.

Inside a transform there are no numbers to look at. The call is staged right away, so that the user's function runs
once, and its program is evaluated in place. Beside the result there is then a check at run time: where it fails, a
callback hands the inputs of the program to the same search on the host, and raises there. The derivative depends on
that callback, so no compiler leaves it out. `jit`, and `commit` outside of it, wait for the end of such a program
before they change a State.

A callback on one of several devices does not raise: `jit` does so afterwards, and in a `shard_map` without `jit` the
derivative is NaN and the text is logged. JAX wraps what a callback raises into an error of its own, with the text
inside; `waiting` unwraps it for `jit`.
"""

import collections
import contextlib
import copy
import itertools
import linecache
import logging
import threading
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from ..._compat import nans_checked, varying_axes
from ..._errors import NonFiniteError
from ..._program.interpret import opened, within
from ..._program.source_lines import is_part, site_of
from ..._seam.packing import Carried, may_fail
from ..._seam.scope import Scope, commit, eager, gather, is_tracer
from ..._seam.staging import Staged, stage
from .advice import likely, shown
from .search import Given, Origin, Value, inexact, origins

__all__ = [
    "Program",
    "Untraceable",
    "Watch",
    "checks",
    "guarded",
    "holds_check",
    "leave",
    "leaving_out",
    "made",
    "unwrapped",
    "waiting",
    "watched",
]

_MANY = 6  # names in a message


@dataclass(frozen=True)
class Watch:
    """A derivative that has to be finite: ``call(*args, **kwargs)`` returns ``(derivative, value, *aux)``.

    ``inputs(args, kwargs)`` returns the names of what is differentiated, and the structure of a gradient. ``of_map``
    says that the derivative is a pair: the product with a linear map, and what else is a derivative.
    """

    name: str
    call: Callable
    inputs: Callable = lambda args, kwargs: ([], None)
    of_map: bool = False

    @property
    def transform(self) -> str:
        """The name without that of the function."""
        return self.name.partition("(")[0]

    def staged(self, args, kwargs) -> Staged:
        """Stage the call; tracers, and what is no array yet, become inputs."""
        return stage(
            lambda *a, **k: Carried.of(self.call(*a, **k)), args, kwargs, name=self.transform, dynamic=_is_input
        )


def leaving_out(name: str, inputs: Callable) -> Callable:
    """Return ``inputs`` of a `Watch` for calls that are given ``name`` besides."""
    return lambda args, kwargs: inputs(args, {key: value for key, value in kwargs.items() if key != name})


def _is_input(leaf) -> bool:
    return is_tracer(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def watched(watch: Watch, args: tuple, kwargs: dict) -> tuple:
    """Return ``watch.call(*args, **kwargs)``, and commit what it writes; raise if it is not finite."""
    if not eager():
        return _in_program(watch, args, kwargs)
    with Scope(watch.transform) as scope:
        scope.firsts = weakref.WeakKeyDictionary()
        out = watch.call(*args, **kwargs)
        writes = scope.close()
    if any(map(bool, checks(out, writes))):
        with Scope(watch.transform, made(scope, writes)):
            raise _diagnosis(watch, args, kwargs) from None
    commit(writes)
    return out


def made(scope, writes) -> dict:
    """Return {State: value} of the States that a call made which runs again: it makes them no second time.

    The value is that of the beginning, since the call may have written another one; if it was no number then, what
    there is.
    """
    last = dict(zip(writes.states, writes.values, strict=True))
    firsts = {state: scope.firsts.get(state, last[state]) for state in scope.born}
    return {s: last[s] if any(map(is_tracer, jax.tree.leaves(first))) else first for s, first in firsts.items()}


@jax.jit
def _not_finite(x):
    return ~jnp.isfinite(x).all()


@jax.jit
def _has_nan(x):
    return jnp.isnan(x).any()


def checks(out, writes) -> list:
    """Return what is true if the result must not be used.

    That is NaN anywhere, or an infinity in the derivative or in a value that is one number. Elsewhere an infinity is
    often meant: a mask, the best loss so far.
    """
    derivative, value, *aux = out
    single = [x for x in jax.tree.leaves(value) if jnp.shape(x) == ()]
    arrays = [x for x in jax.tree.leaves(value) if jnp.shape(x) != ()]
    return [
        *(_not_finite(x) for x in jax.tree.leaves((derivative, single)) if inexact(x)),
        *(_has_nan(x) for x in jax.tree.leaves((arrays, aux, writes)) if inexact(x)),
    ]


# ------------------------------------------------------------------------------------------ at once


def _diagnosis(watch, args, kwargs) -> NonFiniteError:
    try:
        staged = watch.staged(args, kwargs)
    except Exception as problem:  # the function has just run well, so it is being abstract that it cannot do
        return _by_python(watch, args, kwargs, problem)
    program, inputs = Program.of(watch, staged, args, kwargs)
    return program.search(*inputs)


def _by_python(watch, args, kwargs, problem) -> NonFiniteError:
    """Say what a run with JAX's own check finds: the first NaN, which is not always the one that matters."""
    head = f"{watch.name}: the result is not finite."
    why = _reason(problem)
    for check, what in ((jax.debug_nans, "NaN"), (jax.debug_infs, "Inf")):
        try:
            with check(True), Scope(watch.transform):
                watch.call(*args, **kwargs)
        except FloatingPointError as error:
            frames = [(f.filename, f.lineno, f.name) for f in reversed(traceback.extract_tb(error.__traceback__))]
            site = site_of(frames)
            if site is None:
                return NonFiniteError(
                    f"{head}\n  {why}, and {what} appears in the backward pass, whose lines are not known then. Use "
                    f"jnp.where or brainstate.transform.cond in place of Python's if to have them.",
                    kind=what,
                    phase="backward",
                )
            return NonFiniteError(
                f"{head} The first {what} at all is at {_line(site)}\n  {str(error).strip()}\n  {why}, so that it is "
                f"not known whether this one reaches the result. Use jnp.where or brainstate.transform.cond in place "
                f"of Python's if to have that.",
                kind=what,
                phase="forward",
                **_facts(site),
            )
    return NonFiniteError(f"{head}\n  {why}, and a run with jax.debug_nans and jax.debug_infs finds nothing.")


def _reason(problem) -> str:
    python = isinstance(problem, jax.errors.ConcretizationTypeError)
    what = "it looks at values in Python" if python else _first_line(problem)
    return f"The function cannot be traced ({type(problem).__name__}: {what})"


# ------------------------------------------------------------------------------------------ a program that is searched


class Untraceable:
    """Stands for the `Program` of what cannot be traced: there is nothing to search."""

    def __init__(self, name: str, problem: Exception):
        self._text = f"{name}: the result is not finite.\n  {_reason(problem)}, so that no operation is known."
        if isinstance(problem, jax.errors.ConcretizationTypeError):
            self._text += " Use jnp.where or brainstate.transform.cond in place of Python's if to have it."

    def without_product(self) -> "Untraceable":
        """Return what stands for that one."""
        return self

    def search(self, *inputs: Any) -> NonFiniteError:
        """Return what can be said."""
        return NonFiniteError(self._text)


@dataclass(frozen=True, eq=False)
class Program:
    """One call as a traced program, with names for what goes in and comes out.

    It outlives the trace, in JAX's caches too, and so it holds no State and no tracer.
    """

    name: str
    jaxpr: Any
    labels: list[str | None]  # of the constants and the arguments
    states: list[tuple[int, int, str]]  # id of a State, number of a leaf, name of the State
    suspects: list[str]  # arguments that are not finite, if they are constants that cannot be told apart
    derivative: set[int]  # which outputs belong to it
    value: set[int]
    reached: list[tuple[str, int]]  # what is differentiated, and an output that is its derivative
    others: list[tuple[str, set[int]]]  # what else comes out
    product: set[int]  # of the derivative, what is a product with a linear map
    ignored: frozenset[int] = frozenset()  # outputs of which nothing is asked

    @classmethod
    def of(cls, watch, staged, args, kwargs) -> tuple["Program", tuple]:
        """Return the program of what was staged, and its inputs: constants, leaves of States, arguments."""
        leaves = [(_argument(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path((args, kwargs))]
        known = {id(leaf): label for label, leaf in leaves}
        labels = [known.get(id(c)) for c in staged.closed.consts] + [leaves[i][0] for i in staged.places]
        fixed = [(label, leaf) for label, leaf in leaves if inexact(leaf) and not _is_input(leaf)]
        suspects = [label for label, leaf in fixed if not np.isfinite(np.asarray(leaf)).all()]
        reads = list(staged.reads)
        values = [jax.tree.leaves(value) for value in gather(reads)]
        states = [(id(s), i, s.describe()) for s, v in zip(reads, values, strict=True) for i in range(len(v))]
        carried, writes = staged.out_tree.unflatten(range(staged.out_tree.num_leaves))
        derivative, value, *aux = carried.tree()
        product = derivative[0] if watch.of_map else ()
        others = [("the value", value), ("aux", aux)]
        others += [(s.describe(), v) for s, v in zip(writes.states, writes.values, strict=True)]
        jaxpr = staged.closed.jaxpr
        program = cls(
            watch.name,
            jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars]),  # or it would keep the constants
            labels,
            states,
            suspects,
            _numbers(derivative),
            _numbers(value),
            _reached(derivative, *watch.inputs(args, kwargs)),
            [(name, _numbers(part)) for name, part in others],
            _numbers(product),
        )
        dynamic = [leaves[i][1] for i in staged.places]
        return program, ([*staged.closed.consts], [leaf for v in values for leaf in v], dynamic)

    def without_product(self) -> "Program":
        """Return the program that is searched for what comes out beside the product."""
        return replace(self, ignored=frozenset(self.product))

    def search(self, constants, states, dynamic, lane=()) -> NonFiniteError:
        """Run the program on these inputs, operation by operation, and return what is found."""
        outputs: list[Value] = []
        strict = self.derivative | self.value

        def faulty(outs):
            outputs[:] = outputs or outs
            asked = [(n, out) for n, out in enumerate(outs) if n not in self.ignored]
            return [out for n, out in asked if out.nan or (out.inf and n in strict)]

        named = zip([*constants, *dynamic], self.labels, strict=True)
        inputs = [Value.of(leaf, [Given(label)]) for leaf, label in named]
        given = {
            (state, i): Value.of(leaf, [Given(name)])
            for (state, i, name), leaf in zip(self.states, states, strict=True)
        }
        flags = [n in self.derivative for n in range(len(self.jaxpr.outvars))]
        try:
            with jax.debug_nans(False), jax.debug_infs(False):  # this is the search for what they would stop at
                found = origins(self.jaxpr, inputs, given, flags, faulty)
        except Exception as problem:
            return NonFiniteError(
                f"{self.name}: the result is not finite, and its program cannot be run operation by operation here "
                f"({type(problem).__name__}: {_first_line(problem)}).",
                lane=lane,
            )
        return self._report(found, outputs, lane)

    def _report(self, found, outputs, lane) -> NonFiniteError:
        bad = {n for n, out in enumerate(outputs) if not out.finite} - self.ignored
        reached = tuple(dict.fromkeys(name for name, n in self.reached if n in bad))
        also = [] if reached or not bad & self.derivative else ["the derivative"]
        also += [name for name, numbers in self.others if numbers & bad]
        more = [f"{len(reached) - _MANY} more"] if len(reached) > _MANY else []
        lines = [f"reached     {', '.join([*reached[:_MANY], *more, *also])}"]
        if lane:
            lines.append(f"lane        {', '.join(map(str, lane))} of vmap, the first of those that are not finite")
        facts: dict[str, Any] = {"reached": reached, "lane": lane}
        given = [cause for cause in found if isinstance(cause, Given)]
        if given:
            names = sorted({cause.name for cause in given if cause.name}) or self.suspects
            site = None if names else given[0].site
            used = f" (used at {_line(site)})" if site else ""
            where = " and ".join(names) or f"a constant that the function refers to{used}"
            text = f"{self.name}: {where} already holds NaN or infinities, and they reach the result."
            return NonFiniteError(_text(text, lines), phase="input", inputs=tuple(names), **_facts(site), **facts)
        if not found:
            text = (
                f"{self.name}: the result is not finite, but it is when its program runs one operation after the "
                f"other. What is compiled rounds in another way: values are close to what their dtype can hold."
            )
            return NonFiniteError(_text(text, lines), **facts)
        scans = (eqn for inner in within(self.jaxpr) for eqn in opened(inner).eqns)
        if found[0].where.path and any(map(is_part, scans)):
            lines.append("iterations  are counted within a part of a checkpointed or bounded loop, which has many")
        return _of_origin(self.name, found[0], len(found) - 1, lines, facts)


def _reached(derivative, names, structure) -> list[tuple[str, int]]:
    """Return the pairs (what is differentiated, an output); the structure of a gradient may stand in another one."""
    if structure is None:
        return []
    derivative = jax.tree.map(lambda part: jax.tree.leaves(part)[0], derivative, is_leaf=_is_sparse)
    parts = jax.tree.leaves(derivative, is_leaf=lambda part: jax.tree.structure(part) == structure)
    if any(jax.tree.structure(part) != structure for part in parts):
        return []
    pairs = [pair for part in parts for pair in zip(names, jax.tree.leaves(part), strict=True)]
    return [(name, n) for name, n in pairs if type(n) is int]


def _is_sparse(part) -> bool:
    return hasattr(type(part), "nse")  # a matrix: its numbers are the first of its leaves


def _numbers(tree) -> set[int]:
    return {n for n in jax.tree.leaves(tree) if type(n) is int}


def _first_line(problem) -> str:
    return str(problem).partition("\n")[0]


def _argument(path) -> str:
    place = path[1]
    name = getattr(place, "idx", getattr(place, "key", place))
    what = name if str(name).startswith("the ") else f"argument {name!r}"  # a name that no parameter has
    return f"{what}{jax.tree_util.keystr(path[2:])}"


# ------------------------------------------------------------------------------------------ what is said


def _text(head, lines) -> str:
    return "\n".join([head, *(f"  {line}" for line in lines)])


def _line(site) -> str:
    source = linecache.getline(site.file, site.line).strip()
    return f"{site.file}:{site.line}, in {site.function}" + (f"\n    {source}" if source else "")


def _facts(site) -> dict[str, Any]:
    if site is None:
        return {}
    source = linecache.getline(site.file, site.line).strip() or None
    return {"file": site.file, "line": site.line, "function": site.function, "source": source}


def _of_origin(name, origin: Origin, others, lines, facts) -> NonFiniteError:
    where, site = origin.where, origin.where.site
    head = f"{name}: the first {origin.kind} appears in the {origin.phase} pass"
    head += f", at {_line(site)}" if site else ", at an operation whose line is not known"
    operands = tuple(map(shown, origin.operands))
    called = f", in {where.called}" if where.called and where.called != origin.primitive else ""
    found = [f"operation   {origin.primitive}{called}"]
    found += [f"inside      {', '.join(where.path)}"] if where.path else []
    found += [f"layer       {site.layer}"] if site and site.layer else []
    found += [f"operand     {operand}" for operand in operands]
    found += [f"infinite    before: {', '.join(origin.before)}"] if origin.before else []
    found.append(f"result      {shown(origin.result)}")
    spoilt = origin.spoilt
    if spoilt is not None:
        there = f", at {spoilt.where.site.file}:{spoilt.where.site.line}" if spoilt.where.site else ""
        found.append(f"becomes NaN in {spoilt.primitive} ({spoilt.phase}){there}")
    cause, repair = likely(origin)
    found += lines
    found += [f"and         {others} more such operation{'s' if others > 1 else ''} later"] if others else []
    found += [f"likely      {cause}", f"repair      {repair}"]
    facts |= {"kind": origin.kind, "phase": origin.phase, "primitive": origin.primitive, "operands": operands}
    facts |= {"inputs": origin.before, "path": where.path, "iteration": where.iteration, "branch": where.branch}
    return NonFiniteError(_text(head, found), **_facts(site), **facts)


# ------------------------------------------------------------------------------------------ inside a transform


_raised: collections.deque = collections.deque(maxlen=16)  # by callbacks, for `waiting` to find again
# Of several devices the others would wait for ever for one whose callback raises: it leaves the error here instead.
_left: collections.deque = collections.deque(maxlen=16)
_awaited = [False]  # whether a call that has its turn looks there
_turn = threading.RLock()  # held by a call that looks there afterwards


# An identity that marks a check in a program, for one that JAX has traced before and takes from its caches.
_check = Primitive("finite_check")
_check.def_impl(lambda bad: bad)
_check.def_abstract_eval(lambda bad: bad)
batching.defvectorized(_check)
mlir.register_lowering(_check, lambda _, bad: [bad])
_traced_checks = [False]


def holds_check(closed) -> bool:
    """Tell whether a program, or one that it calls, checks at run time that something is finite."""
    if not _traced_checks[0]:
        return False
    return any(eqn.primitive is _check for inner in within(closed) for eqn in opened(inner).eqns)


def _in_program(watch, args, kwargs) -> tuple:
    staged = watch.staged(args, kwargs)
    program, inputs = Program.of(watch, staged, args, kwargs)
    carried, writes = staged(dict(zip(staged.reads, gather(staged.reads), strict=True)), args, kwargs)
    grads, *rest = carried.tree()
    grads = guarded(program, inputs, grads, checks((grads, *rest), writes))
    commit(writes)
    return (grads, *rest)


def guarded(program, inputs, result, bad: list) -> Any:
    """Return ``result`` of a program that is being traced, with a search when it runs, if any of ``bad`` is true."""
    if not bad:
        return result
    fine = ~_gate(program, jnp.stack(bad).any(), inputs)
    # NaN is seen only where nothing is raised. It is added, as a compiler that knows the derivative to be NaN would
    # drop a choice between the two, and the check with it; x + -0.0 is x, for every x.
    return jax.tree.map(lambda x: x + _nan_unless(fine, jax.typeof(x).dtype) if inexact(x) else x, result)


def leave(error: Exception, several: bool) -> None:
    """Raise ``error`` in a callback, for `unwrapped` to find; or leave it, so that no other device waits for ever."""
    if several or _awaited[0]:
        _left.append(error)
        if not _awaited[0]:
            logging.getLogger(__name__).error("%s", error)
        return
    _raised.append(copy.copy(error))  # not with the frames of this call
    raise error


def _is_key(leaf) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _nan_unless(fine, dtype):
    return jnp.where(fine, -np.zeros((), dtype), np.asarray(np.nan, dtype))


def _gate(program, bad, inputs):
    """Return False; or at run time, if ``bad`` is true, raise what the search finds (leave it and return True)."""
    leaves = [leaf for part in inputs for leaf in part]
    ends = list(itertools.accumulate(map(len, inputs)))
    # Every array is an operand: what a callback refers to, JAX's caches keep. Keys would arrive as bare numbers.
    places = [i for i, leaf in enumerate(leaves) if is_tracer(leaf) or isinstance(leaf, jax.Array | np.ndarray)]
    operands = [jax.lax.stop_gradient(leaves[i]) if inexact(leaves[i]) else leaves[i] for i in places]
    keys = {i: jax.random.key_impl(leaf) for i, leaf in zip(places, operands, strict=True) if _is_key(leaf)}
    operands = [jax.random.key_data(leaf) if i in keys else leaf for i, leaf in zip(places, operands, strict=True)]
    kept = [None if i in set(places) else leaf for i, leaf in enumerate(leaves)]
    several = any(varying_axes(leaves[i]) for i in places)  # in a shard_map

    def on_host(bad, *operands):
        bad = np.asarray(bad)
        sizes = np.broadcast_shapes(bad.shape, *(operand.shape[: bad.ndim] for operand in operands))
        if not bad.any():
            return np.zeros(sizes, bool)
        lane = tuple(int(i) for i in np.argwhere(np.broadcast_to(bad, sizes))[0])
        filled = list(kept)
        for i, operand in zip(places, operands, strict=True):
            part = operand[tuple(min(n, size - 1) for n, size in zip(lane, operand.shape, strict=False))]
            filled[i] = jax.random.wrap_key_data(jnp.asarray(part), impl=keys[i]) if i in keys else part
        parts = (filled[start:end] for start, end in itertools.pairwise([0, *ends]))
        # Another device may be waiting for this callback, and would compute nothing meanwhile.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            error = program.search(*parts, lane)
        leave(error, several)
        return np.ones(sizes, bool)

    def fails(bad, operands):
        # Under vmap both branches run; lanes come together, along leading axes that are 1 for what has no lanes.
        return jax.pure_callback(on_host, jax.ShapeDtypeStruct((), bool), bad, *operands, vmap_method="expand_dims")

    may_fail()
    _traced_checks[0] = True
    bad = _check.bind(bad)
    return jax.lax.cond(bad, fails, lambda *_: jnp.zeros((), bool), bad, operands)


@contextlib.contextmanager
def unwrapped():
    """Raise what a check inside has raised, in place of the error that JAX made of it."""
    try:
        yield
    except Exception as failure:
        for error in tuple(_raised):
            if not isinstance(failure, type(error)) and str(error) in str(failure):
                with contextlib.suppress(ValueError):  # another thread had the same
                    _raised.remove(error)
                raise error from None
        raise


def waiting(jitted: Callable) -> Callable:
    """Return ``jitted`` with a call that ends when the program has, and raises what a check in it has raised."""

    def call(*args, **kwargs):
        if not eager():
            may_fail()
            return jitted(*args, **kwargs)
        # Which devices a program uses, nobody can tell beforehand. JAX's own check would see the NaN that is returned.
        several = jax.device_count() > 1 and not nans_checked()
        with _turn if several else contextlib.nullcontext(), unwrapped():
            _left.clear()
            before, _awaited[0] = _awaited[0], several
            try:
                out = jax.block_until_ready(jitted(*args, **kwargs))
            finally:
                _awaited[0] = before
            if _left:
                raise _left.popleft()
            return out

    return call
