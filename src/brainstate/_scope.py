"""The seam: the one place that knows how States and tracers meet.

A transform turns ordinary Python, which reads ``state.value`` and assigns ``state.value = …``, into a pure
function, hands that to the JAX transform of the same name and puts the new values back. Every transform is
therefore three beats::

    with Scope(...) as scope:            # open:   reads and writes of this thread now go to the scope
        out = fun(*args)                 #         (inside the function that JAX traces)
        writes = scope.close()           #         what was written leaves as an ordinary pytree
    ...                                  # call:   JAX returns `out` and `writes`
    commit(writes)                       # commit: the values reach the States, or the enclosing scope

Vocabulary
    *scope*   one transformed call in progress; scopes nest, each thread has its own stack.
    *read*    looks in the scope, then in its parents, then in the State itself.
    *write*   stays in the innermost scope.
    *Writes*  a pytree: the written values as children, the States in the static part. The treedef that JAX
              hands back says *which* States were written, so different traces may write different States.
    *stage*   run a function once, abstractly, and keep its jaxpr. The first read of a State leaves a marker in
              the jaxpr; evaluating the jaxpr replaces the marker by the value given for that State. This is
              how a transform that needs to know the States beforehand (jit, scan, cond) still runs the user's
              function once.
    *born*    a State created while a scope is open. If it is still referenced when the scope closes it leaves
              with the writes, otherwise it costs nothing.

Invariants
    Only ``commit`` and a write with no scope open change a State, and neither ever stores a tracer: an
    exception anywhere leaves every State as it was, and no other thread sees half a step.
    A container that a State holds is lent out as a copy; what the user changes in place in it is a write.
    Only this module, ``_state``, and ``_launch`` on the path of a compiled call touch ``State._value``.
"""

import gc
import os
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, MappingView
from pathlib import Path
from threading import get_ident
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import Primitive, jaxpr_as_fun, set_current_trace, valid_jaxtype

from ._boundary import named_after
from ._carry import Absent, Writes, awaited
from ._compat import current_trace, stages_within, staging
from ._errors import FrozenReadWarning, StateTypeError, StateValueError, TraceContextError, a_type

__all__ = [
    "AT_ONCE",
    "Cell",
    "Restart",
    "Scope",
    "Staged",
    "caught",
    "commit",
    "create",
    "differentiated",
    "eager",
    "frozen_here",
    "gather",
    "generation",
    "innermost",
    "invalidate",
    "is_tracer",
    "read",
    "refuse_foreign",
    "refuse_states",
    "replaced_since",
    "stage",
    "traced_part",
    "write",
]

_NOT_USERS = (
    str(Path(__file__).parent) + os.sep,
    str(Path(jax.__file__).parent) + os.sep,
)  # frames that a warning skips

with jax.ensure_compile_time_eval():
    AT_ONCE = current_trace()  # the trace that computes at once; one object for all threads


class _Thread(threading.local):
    def __init__(self):
        self.given: Any = None  # while a staged function is evaluated: {State: leaves that replace its markers}


_thread = _Thread()
_open: dict[int, Any] = {}  # thread -> its innermost open Scope; nearly always empty, which costs least to ask
_commit_lock = threading.Lock()  # held while values are gathered or committed, never while computing
_step_lock = threading.RLock()  # held by a whole read-compute-write call of a compiled step

# Counts the replacements of States and Modules in the object graph. What was compiled for an older count may
# hold on to a State that is no longer reachable, and is traced again.
_generation = [0]
_replaced = deque(maxlen=16)  # the last of these changes, in words


def generation() -> int:
    """Return the number of structural changes that Modules have announced so far."""
    return _generation[0]


def invalidate(what: str) -> None:
    """Announce that a State or Module was replaced, and where, so that compiled functions look again."""
    _replaced.append(what)
    _generation[0] += 1


def replaced_since(count: int) -> list[str]:
    """Return where States or Modules were replaced after the generation ``count``, as far as is remembered."""
    return list(_replaced)[-new:] if (new := _generation[0] - count) else []


class Cell:
    """What the seam knows of a State: one slot, empty until the State has a concrete value."""

    __slots__ = ("__weakref__", "_value")

    def describe(self) -> str:
        """Name this State for an error message, without reading it."""
        return type(self).__name__


# ------------------------------------------------------------------------------------------------ the marker


class _StateRead(Primitive):
    """``state_read[state=… leaf=… aval=…]``: stands for one leaf of a State's value in a staged program.

    The State is named by its ``id``, since JAX's caches keep the parameters of a primitive, and would keep a State.
    """

    def bind(self, *, state, leaf, aval):
        given = _thread.given
        if given is not None and state in given:
            return given[state][leaf]
        return super().bind(state=state, leaf=leaf, aval=aval)


_state_read = _StateRead("state_read")
_state_read.def_abstract_eval(lambda *, state, leaf, aval: aval)


# ------------------------------------------------------------------------------------------------ scopes


class Scope:
    """One transformed call in progress. ``values`` are the States whose value the transform provides."""

    def __init__(self, name, values=(), *, stages=False, frozen=False):
        self.name, self.stages, self.frozen = name, stages, frozen
        self.parent = self.trace = None
        self.values, self.written = {}, {}  # both ordered; `written` is used as an ordered set
        self.reads = {}  # staging only: State -> (avals, treedef)
        self.lent = {}  # State -> (leaves, treedef) of the container that was handed out
        self.born = []
        self.firsts: Any = None  # {State: the value it was made with}, where that is asked for
        self.unused, self.given = set(values), frozenset(values)
        for state, value in dict(values).items():
            self.values[state] = self._lend(state, *jax.tree.flatten(value))

    def __enter__(self):
        self.parent, self.trace = innermost(), current_trace()
        _open[get_ident()] = self
        return self

    def __exit__(self, *exc):
        if self.parent is None:
            del _open[get_ident()]
        else:
            _open[get_ident()] = self.parent
        # Nothing may keep a finished trace alive.
        self.trace, self.used = None, tuple(self.values)
        self.values, self.lent = {}, {}

    def read(self, state):
        """Return the value of ``state`` as the function under transformation sees it."""
        self.unused.discard(state)
        try:
            return self.values[state]
        except KeyError:
            value = self.values[state] = self._inherit(state)
            return value

    def write(self, state, value):
        """Keep ``value`` as the new value of ``state`` until this scope is committed."""
        if current_trace() is not self.trace:
            raise TraceContextError(
                f"{state.describe()} was written inside a raw JAX transform within brainstate.transform.{self.name}: "
                f"the write would leak or be lost. Use the function of the same name from brainstate.transform there."
            )
        _admit(state, value)
        if state not in self.values and not hasattr(state, "_value") and not self._known(state):
            self.born.append(state)
        self.values[state] = value
        self.written[state] = True
        self.unused.discard(state)
        self.lent.pop(state, None)

    def close(self) -> Writes:
        """Return what was written: by assignment, in place, and to States born inside that outlive the call."""
        for state, (leaves, treedef) in self.lent.items():
            now, tree = jax.tree.flatten(self.values[state])
            if tree != treedef or any(a is not b for a, b in zip(now, leaves, strict=True)):
                _admit(state, self.values[state])
                self.written[state] = True
        survivors = self._survivors()
        self.born = list(survivors)
        values = [*(self.values[s] for s in self.written), *survivors.values()]
        return Writes((*self.written, *survivors), values)

    def _known(self, state):
        scope = self.parent
        while scope is not None and state not in scope.values:
            scope = scope.parent
        return scope is not None

    def _inherit(self, state):
        outer = self.parent.read(state) if self.parent is not None else _stored(state, self.frozen)
        leaves, treedef = _flatten(state, outer)
        if self.stages:
            leaves = self._mark(state, leaves, treedef)
        elif jax.tree_util.treedef_is_leaf(treedef):
            return outer
        return self._lend(state, leaves, treedef)

    def _lend(self, state, leaves, treedef):
        if not jax.tree_util.treedef_is_leaf(treedef):
            self.lent[state] = (leaves, treedef)
        return treedef.unflatten(leaves)

    def _mark(self, state, leaves, treedef):
        refuse_foreign(state, treedef.unflatten(leaves), "holds", self.name)
        avals = self._types(state, leaves)
        self.reads[state] = (avals, treedef)
        with set_current_trace(self.trace):
            return [_state_read.bind(state=id(state), leaf=i, aval=aval) for i, aval in enumerate(avals)]

    def _types(self, state, leaves):
        """Return the types that the leaves of ``state`` have inside; a mapping transform sees a lane of it."""
        return [jax.typeof(leaf) for leaf in leaves]

    def _survivors(self):
        """Return {State: value} of the States born here that somebody outside still refers to."""
        kept = [(weakref.ref(s), self.values.pop(s), self.written.pop(s)) for s in self.born]
        for state in self.born:
            self.lent.pop(state, None)
        self.born, state = [], None
        for young in (1, 2):  # a dead cycle is no survivor; it is young, unless the trace was long
            if any(ref() is not None for ref, *_ in kept):
                gc.collect(young)
        return {ref(): value for ref, value, _ in kept if ref() is not None}


# ------------------------------------------------------------------------------------------------ reading, writing


def innermost():
    """Return the innermost scope that is open in this thread, or None."""
    return _open.get(get_ident()) if _open else None


def read(state):
    """Return the value of ``state``: from the innermost scope, else from the State itself."""
    scope = _open.get(get_ident()) if _open else None
    if scope is not None:
        value = scope.read(state)
        # A tracer of ours that a raw jit inside closes over is no constant of its program; a concrete array is.
        if current_trace() is not scope.trace and stages_within(scope.trace) and not _has_tracer(value):
            _warn_frozen(state)
        return value
    if current_trace() is not AT_ONCE and staging():
        _warn_frozen(state)
    try:
        return state._value
    except AttributeError:
        return _stored(state)


def write(state, value) -> None:
    """Set the value of ``state``: in the innermost scope, else in the State itself."""
    scope = _open.get(get_ident()) if _open else None
    if scope is not None:
        scope.write(state, value)
        return
    if current_trace() is not AT_ONCE:
        raise _raw_transform(state)
    if type(value) not in _plain:
        _admit(state, value)
    state._value = value


def create(state, value) -> None:
    """Give a new State its first value; unlike `write`, also under a raw transform if it is concrete."""
    scope = innermost()
    if scope is not None:
        scope.write(state, value)
        while scope is not None:
            if scope.firsts is not None:
                scope.firsts[state] = value
            scope = scope.parent
        return
    if type(value) not in _plain:
        _admit(state, value)
    state._value = value


def gather(states) -> list:
    """Return the values of ``states`` as inputs of a transform."""
    if innermost() is not None or current_trace() is not AT_ONCE:
        return [read(s) for s in states]
    try:
        with _commit_lock:
            return [s._value for s in states]
    except AttributeError:
        return [_stored(s) for s in states]


def caught(call, fun) -> "Staged":
    """Return what ``fun`` staged and raised as `Restart` when JAX called it in ``call(fun)``."""
    try:
        call(fun)
    except Restart as restart:
        return restart.staged
    raise AssertionError("JAX did not call the function")


class Restart(BaseException):
    """Leaves a trace whose function met States that are no inputs yet, or writes for the first time.

    It is no Exception: JAX looks at the whole stack for each of these that passes, and traces took half as long again.
    """

    def __init__(self, staged):
        super().__init__()
        self.staged = staged


def commit(writes: Writes) -> None:
    """Hand written values to the enclosing scope, or to the States, all together."""
    states, scope = writes.states, innermost()
    if not states:
        return
    if scope is None and current_trace() is not AT_ONCE:
        raise _raw_transform(states[0])
    if scope is not None:
        for state, value in zip(states, writes.values, strict=True):
            scope.write(state, value)
        return
    awaited(writes.values)
    for state, value in zip(states, writes.values, strict=True):
        _admit(state, value)  # a container changed in place under a raw transform may hold its tracers
    with _step_lock, _commit_lock:  # between the gathering and the committing of no other call
        for state, value in zip(states, writes.values, strict=True):
            state._value = value


def eager() -> bool:
    """Tell whether an operation is computed at once now, and not recorded, mapped or differentiated."""
    return current_trace() is AT_ONCE


def differentiated(state) -> bool:
    """Tell whether a derivative in progress in this thread is with respect to ``state``."""
    scope = innermost()
    while scope is not None and state not in scope.given:
        scope = scope.parent
    return scope is not None


def frozen_here() -> bool:
    """Tell whether a read now would be compiled in as a constant: raw staging, and no scope open."""
    return innermost() is None and current_trace() is not AT_ONCE and staging()


def _stored(state, frozen=False):
    if frozen:
        _warn_frozen(state)
    try:
        return state._value
    except AttributeError:
        raise TraceContextError(
            f"{state.describe()} was created inside a transform that has not finished, failed, or keeps no States "
            f"created inside: it has no value here. Assign a value first, or create it outside."
        ) from None


# Types that need no look inside: numbers, text, NumPy arrays, and (added when first met) JAX's own arrays.
_plain = {bool, int, float, complex, str, type(None), Absent}


def _admit(state, value) -> None:
    """Refuse a value that holds a State, or that holds a tracer while no scope is open."""
    if type(value) in _plain:
        return
    leaves = _flatten(state, value)[0]
    kinds = {type(leaf) for leaf in leaves} - _plain
    if any(issubclass(kind, Cell) for kind in kinds):
        raise StateValueError(
            f"the value given to {state.describe()} contains a State. A State holds arrays, not States: assign "
            f"`other.value`, or keep the States in a Module, list or dict."
        )
    tracers = [kind for kind in kinds if issubclass(kind, Tracer)]
    if tracers and innermost() is None:
        raise _raw_transform(state)
    if leaves and leaves[0] is value and not tracers and isinstance(value, jax.Array):
        _plain.add(type(value))


def _flatten(state, value):
    try:
        return jax.tree.flatten(value)
    except (TypeError, ValueError) as error:
        raise StateValueError(
            f"the value of {state.describe()} is no pytree: {error} The keys of a dict must be of one sortable kind."
        ) from None


def _opaque(leaf) -> bool:
    return isinstance(leaf, Iterator | MappingView)  # JAX warns of walking these


def refuse_foreign(state, value, verb, name) -> None:
    """Refuse a ``value`` of ``state`` that holds what is no JAX type, where a transform needs arrays."""
    for path, leaf in jax.tree.leaves_with_path(value):
        if not valid_jaxtype(leaf):
            where = jax.tree_util.keystr(path)
            raise StateTypeError(
                f"{state.describe()} {verb} {a_type(leaf)}{where and ' at ' + where}, which is no JAX type: "
                f"brainstate.transform.{name} takes and returns arrays and numbers. Keep such a value in a plain "
                f"attribute, or pass it as a static argument."
            )


def refuse_states(tree, what) -> None:
    """Refuse States among arguments or results: they belong to the function, not to its signature."""
    try:
        found = any(isinstance(leaf, Cell) for leaf in jax.tree.leaves(tree, is_leaf=_opaque))
    except (TypeError, ValueError):
        return  # no pytree for JAX, such as a dict with unsortable keys: what is not traced may be anything
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_opaque) if found else ():
        if isinstance(leaf, Cell):
            where = jax.tree_util.keystr(path)
            raise StateValueError(
                f"{leaf.describe()} is among the {what}{where and ', at ' + where}: States are not passed in or out of "
                f"a transform. Use the State inside the function, and pass or return `state.value`."
            )


def _refuse_results(out, fun, name) -> None:
    """Refuse results that are no JAX types."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(out, is_leaf=_opaque):
        if not valid_jaxtype(leaf):
            where = jax.tree_util.keystr(path)
            raise StateTypeError(
                f"{getattr(fun, '__qualname__', type(fun).__name__)} returned a {type(leaf).__name__}"
                f"{where and ' at ' + where}, which is no JAX type: a function under brainstate.transform.{name} "
                f"returns arrays and numbers, in containers that JAX knows."
            )


def _raw_transform(state):
    return TraceContextError(
        f"{state.describe()} was written inside a raw JAX transform, which does not know States: a tracer would leak, "
        f"or the write be lost. Wrap the function with the transform of the same name from brainstate.transform "
        f"(jit, grad, vmap, ...) instead."
    )


def _has_tracer(value) -> bool:
    return any(map(is_tracer, jax.tree.leaves(value)))


def _warn_frozen(state) -> None:
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"{state.describe()} was read under a raw staging transform (jax.jit, jax.lax.scan, ...): its present value is "
        f"compiled in as a constant and later changes are not seen. Use the transform of the same name from "
        f"brainstate.transform.",
        FrozenReadWarning,
        stacklevel=level,
    )


# ------------------------------------------------------------------------------------------------ staging


class Staged:
    """A function that ran once, abstractly: ``reads``, ``writes`` and a pure function of both inputs."""

    def __init__(self, closed, places, out_tree, scope):
        self.closed, self.places, self.out_tree = closed, places, out_tree
        self.reads, self.born, self.used = scope.reads, scope.born, scope.used
        out, writes = out_tree.unflatten(closed.out_avals)
        self.writes, self.result_types = writes.states, out
        self.written_types = dict(zip(writes.states, writes.values, strict=True))  # State -> tree of avals

    def __call__(self, given, args, kwargs):
        """Evaluate with ``given`` = {State: value} for the reads, and arguments of the same structure.

        Returns ``(out, Writes)``. No Python code of the user runs.
        """
        leaves = jax.tree.leaves((args, kwargs))
        outer = _thread.given
        _thread.given = {id(s): jax.tree.leaves(given[s]) for s in self.reads}
        try:
            return self.out_tree.unflatten(jaxpr_as_fun(self.closed)(*(leaves[i] for i in self.places)))
        finally:
            _thread.given = outer

    def replaces(self, state) -> bool:
        """Tell whether what is written to ``state`` does not come from the value that was read."""
        _, writes = self.out_tree.unflatten(self.closed.jaxpr.outvars)
        wanted = set(map(id, jax.tree.leaves(writes.values[writes.states.index(state)])))
        for eqn in reversed(self.closed.eqns):
            if wanted.isdisjoint(map(id, eqn.outvars)):
                continue
            if eqn.primitive is _state_read and eqn.params["state"] == id(state):
                return False
            wanted.update(map(id, eqn.invars))
        return True


def is_tracer(leaf) -> bool:
    """Tell whether ``leaf`` is a tracer."""
    return isinstance(leaf, Tracer)


def traced_part(arg, dynamic):
    """Return what is traced of one argument; the argument itself if it is all of it, for its names in messages."""
    leaves = jax.tree.leaves(arg)
    traced = [leaf for leaf in leaves if dynamic(leaf)]
    return arg if len(traced) == len(leaves) else traced


def stage(fun, args, kwargs, *, name, dynamic=is_tracer, scope=None) -> Staged:
    """Run ``fun(*args, **kwargs)`` once, abstractly, in a staging scope.

    Leaves of the arguments for which ``dynamic`` holds become inputs; the others are closed over as they are.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if dynamic(leaf)]
    scope, trees = scope or Scope(name, stages=True), []
    explained = jax.config.jax_explain_cache_misses  # pyright: ignore[reportAttributeAccessIssue]

    def run(*inputs, **named):
        filled = list(leaves)
        for i, leaf in zip(places, jax.tree.leaves((inputs, named)), strict=True):
            filled[i] = leaf
        a, k = treedef.unflatten(filled)
        with scope, jax.explain_cache_misses(explained):
            out = fun(*a, **k)
            refuse_states(out, f"results of a function under {name}")
            _refuse_results(out, fun, name)
            writes = scope.close()
            for state, value in zip(writes.states, writes.values, strict=True):
                refuse_foreign(state, value, "was given", name)
            out = (out, writes)
        flat, tree = jax.tree.flatten(out)
        trees.append(tree)
        return flat  # JAX's caches keep the structure of a result, and that of `out` holds States

    named_after(run, fun, same_arguments=True)
    named = {key: traced_part(arg, dynamic) for key, arg in kwargs.items()}
    with jax.explain_cache_misses(False):  # `run` is always a new function; what matters is the trace around it
        closed = jax.make_jaxpr(run)(*(traced_part(arg, dynamic) for arg in args), **named)
    return Staged(closed, places, trees[0], scope)
