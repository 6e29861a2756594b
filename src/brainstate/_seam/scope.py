"""The seam: the one place that knows how States and tracers meet.

A transform turns ordinary Python, which reads ``state.value`` and assigns ``state.value = …``, into a pure
function, hands that to the JAX transform of the same name and puts the new values back. Every transform is
therefore three beats::

    out, writes = run(Scope(...), fun, *args)   # open:   inside the function that JAX traces, reads and writes of
                                                #         this thread go to the scope; the written values leave
                                                #         as an ordinary pytree
    ...                                         # call:   JAX returns `out` and `writes`
    commit(writes)                              # commit: the values reach the States, or the enclosing scope

Vocabulary
    *scope*   one transformed call in progress; scopes nest, each thread has its own stack.
    *read*    looks in the scope, then in its parents, then in the State itself.
    *write*   stays in the innermost scope.
    *Writes*  a pytree: the written values as children, the States in the static part. The treedef that JAX
              hands back says *which* States were written, so different traces may write different States.
    *stage*   run a function once, abstractly, and keep its jaxpr; see ``staging``.
    *born*    a State created while a scope is open. If it is still referenced when the scope closes it leaves
              with the writes, otherwise it costs nothing.

Invariants
    Only ``commit`` and a write with no scope open change a State, and neither ever stores a tracer: an
    exception anywhere leaves every State as it was, and no other thread sees half a step.
    A container that a State holds is lent out as a copy; a change in place of this copy is a write.
    Only this module, ``_state``, and ``step`` on the path of a compiled call touch ``State._value``.
"""

import gc
import threading
import weakref
from collections import deque
from collections.abc import Iterator, MappingView
from functools import partial
from itertools import compress
from threading import get_ident
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import set_current_trace, valid_jaxtype

from .._compat import AT_ONCE, current_trace, is_recording, stages_within
from .._errors import StateTypeError, StateValueError, TraceContextError, a_type
from .donation import donors, is_deleted, taken_error
from .local_states import is_local, local_trace
from .marker import state_read
from .other_libraries import is_kept
from .packing import ABSENT, Absent, Writes
from .run_time_errors import await_announced
from .tokens import announce_replacement, announce_values, announce_write, any_met, forget, meet, read_inside, separate

__all__ = [
    "Cell",
    "Scope",
    "claim",
    "claim_lock",
    "commit",
    "create",
    "eager",
    "frozen_here",
    "gather",
    "generation",
    "glance",
    "innermost",
    "invalidate",
    "is_differentiated",
    "is_tracer",
    "read",
    "refuse_foreign",
    "refuse_states",
    "replaced_since",
    "retag",
    "run",
    "tag_changes",
    "write",
]


_open: dict[int, Any] = {}  # thread -> its innermost open Scope; nearly always empty, which costs least to ask
_commit_lock = threading.Lock()  # held while values are gathered or committed, never while computing
_step_lock = threading.RLock()  # held by a whole read-compute-write call of a compiled step
claim_lock = threading.RLock()  # held while a generator is claimed or drawn from at once; nobody waits within

# Counts the replacements of States and Modules in the object graph. A program compiled for an older count may
# hold on to a State that is no longer reachable, so it is traced again.
_generation, _retagged = [0], [0]
_replaced = deque(maxlen=16)  # the last of these changes, in words


def generation() -> int:
    """Return the number of structural changes that Modules have announced so far."""
    return _generation[0]


def invalidate(what: str) -> None:
    """Announce that a State or Module was replaced, and where, so that compiled functions look again."""
    _replaced.append(what)
    _generation[0] += 1
    if any_met:
        announce_replacement(innermost())


def retag(what: str) -> None:
    """Announce that the tags of a State changed: selections by tag are made again."""
    _retagged[0] += 1
    invalidate(what)


def tag_changes() -> int:
    """Return the number of changes of tags so far."""
    return _retagged[0]


def replaced_since(count: int) -> list[str]:
    """Return where States or Modules were replaced after the generation ``count``, as far as is remembered."""
    return list(_replaced)[-new:] if (new := _generation[0] - count) else []


class Cell:
    """The seam's part of a State.

    ``_value`` is its value, unset until that is concrete; ``_local``, for a State made under a raw JAX transform, is a
    weak reference to that trace with the value there.
    """

    __slots__ = ("__weakref__", "_local", "_value")

    branch: Any = None  # for a generator, whose values no two threads may share: the method that derives another value

    def describe(self) -> str:
        """Name this State for an error message, without reading it."""
        return type(self).__name__


_assign = Cell._value.__set__  # pyright: ignore[reportAttributeAccessIssue]


def _assign_all(states, values) -> None:
    """Assign all ``values`` but ``ABSENT``, in one call of C code, which no signal interrupts."""
    given = [value is not ABSENT for value in values]
    any(map(_assign, compress(states, given), compress(values, given)))


# ------------------------------------------------------------------------------------------------ scopes


class Scope:
    """One transformed call in progress. ``values`` maps States to the values that the transform provides.

    ``frozen``: JAX itself is tracing a program around this call, which would keep the values that are read from
    outside. By default it is `frozen_here`; it is given where the scope is opened in another function that JAX traces.
    """

    opaque = False  # whether States may have other values inside than outside, even without an entry in `values`

    def __init__(self, name, values=(), *, stages=False, frozen=None):
        self.name, self.stages = name, stages
        self.frozen = not stages and (frozen_here() if frozen is None else frozen)
        self.parent = self.trace = None
        self.inside: Any = None  # a weak reference, which is dead once the `with` block has been left
        self.values, self.written = {}, {}  # both ordered; `written` is used as an ordered set
        self.reads = {}  # staging only: State -> (avals, treedef)
        self.lent = {}  # State -> (leaves, treedef) of the container that was handed out
        self.born = []
        self.initial: Any = None  # {State created inside: its first value}, kept only where the call may run again
        self.launches = 0  # compiled functions that are being called in this very scope
        self.context: Any = None  # restores the token around this scope when it is left; see `tokens`
        self.unused, self.overwritten, self.given = set(values), set(), frozenset(values)
        for state, value in dict(values).items():
            self.values[state] = self._lend(state, *jax.tree.flatten(value))

    @property
    def __exit__(self):
        # `with` looks this up first, and holds the only reference to it: once it is gone, the block has been left,
        # even where an interrupt came before the first line of `_leave`.
        leave = partial(_leave, self)
        self.inside = weakref.ref(leave)
        return leave

    def __enter__(self):
        self.parent, self.trace = innermost(), current_trace()
        _open[get_ident()] = self
        if any_met or len(_open) > 1:
            separate(self, len(_open) > 1)
        return self

    def read(self, state):
        """Return the value of ``state`` as the function under transformation sees it."""
        self.unused.discard(state)
        try:
            return self.values[state]
        except KeyError:
            if local_trace(state, self.trace) is not None:  # made under a raw transform inside: not ours to keep
                return _stored_value(state)
            value = self.values[state] = self._inherit(state)
            return value

    def write(self, state, value):
        """Keep ``value`` as the new value of ``state`` until this scope is committed."""
        if current_trace() is not self.trace:
            if is_local(state) or (_is_new(state) and state not in self.values and not self._is_known(state)):
                _keep_local(state, value)
                return
            forget(current_trace())
            raise TraceContextError(
                f"{state.describe()} was written inside a raw JAX transform within brainstate.transform.{self.name}: "
                f"the write would leak or be lost. Use the function of the same name from brainstate.transform there."
            )
        _admit(state, value)
        if state not in self.values and _is_new(state) and not self._is_known(state):
            self.born.append(state)
        self.values[state] = value
        self.written[state] = True
        if state in self.unused:  # overwritten before its value was read
            self.unused.discard(state)
            self.overwritten.add(state)
        self.lent.pop(state, None)
        if any_met:
            announce_write(self, state)

    def close(self) -> Writes:
        """Return all writes: by assignment, in place, and to States born inside that outlive the call."""
        # A container changed in place has another structure, or other objects as leaves, than was handed out.
        for state, (leaves, treedef) in self.lent.items():
            now, tree = jax.tree.flatten(self.values[state])
            if tree != treedef or any(a is not b for a, b in zip(now, leaves, strict=True)):
                _admit(state, self.values[state])
                self.written[state] = True
        survivors = self._survivors()
        self.born = list(survivors)
        values = [*(self.values[s] for s in self.written), *survivors.values()]
        return Writes((*self.written, *survivors), values)

    def _is_known(self, state):
        scope = self.parent
        while scope is not None and state not in scope.values:
            scope = scope.parent
        return scope is not None

    def _inherit(self, state):
        # Each scope on the way keeps the value: later reads agree, even if another thread commits meanwhile.
        outer = self.parent.read(state) if self.parent is not None else _stored_value(state)
        if self.frozen:
            meet(self.parent, state)
        if state.branch is not None and self.parent is None and not self.stages:
            outer = claim(state)
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
        refuse_foreign(treedef.unflatten(leaves), lambda: f"{state.describe()} holds", self.name)
        avals = self._types(state, leaves)
        self.reads[state] = (avals, treedef)
        with set_current_trace(self.trace):  # the read may be inside a raw transform; its marker belongs out here
            return [state_read.bind(state=id(state), leaf=i, aval=aval) for i, aval in enumerate(avals)]

    def _types(self, state, leaves):
        """Return the types that the leaves of ``state`` have inside; a mapping transform sees a lane of it."""
        return [jax.typeof(leaf) for leaf in leaves]

    def _survivors(self):
        """Return {State: value} of the States born here that somebody outside still refers to."""
        kept = [(weakref.ref(s), self.values.pop(s), self.written.pop(s)) for s in self.born]
        for state in self.born:
            self.lent.pop(state, None)
        self.born, state = [], None
        for young in (1, 2):  # a dead reference cycle does not survive; it is young, unless the trace was long
            if any(ref() is not None for ref, *_ in kept):
                gc.collect(young)
        return {ref(): value for ref, value, _ in kept if ref() is not None}


def run(scope: Scope, fun, /, *args, **kwargs) -> tuple[Any, Writes]:
    """Call ``fun`` in ``scope``; return its result, which may hold no State, and its writes."""
    with scope:
        out = fun(*args, **kwargs)
        refuse_states(out, f"results of a function under {scope.name}")
        return out, scope.close()


# ------------------------------------------------------------------------------------------------ reading, writing


def innermost():
    """Return the innermost scope that is open in this thread, or None."""
    scope = _open.get(get_ident()) if _open else None
    return scope if scope is None or scope.inside() is not None else _skip_abandoned(scope)


def _skip_abandoned(scope):
    """Return the innermost scope that is open, where an interrupt kept ``scope`` from being left."""
    while scope is not None and scope.inside() is None:
        if scope.context is not None:
            scope.context.__exit__(None, None, None)
        scope = scope.parent
    _return_to(scope)
    return scope


def _return_to(scope):
    if scope is None:
        _open.pop(get_ident(), None)
    else:
        _open[get_ident()] = scope


def _leave(scope, *_):
    # In this order: an interrupt in between leaves the scope to `_skip_abandoned`; a context may be left twice.
    if scope.context is not None:
        scope.context.__exit__(None, None, None)
    _return_to(scope.parent)
    # Nothing may keep a finished trace alive.
    scope.trace, scope.used, scope.values, scope.lent = None, tuple(scope.values), {}, {}


def read(state):
    """Return the value of ``state``: from the innermost scope, else from the State itself."""
    scope = innermost() if _open else None
    if scope is not None:
        value = scope.read(state)
        if current_trace() is not scope.trace:
            value = read_inside(scope, state, value)
        elif any_met and state in scope.lent:  # it may be changed in place
            announce_write(scope, state)
        return value
    try:
        value = state._value
    except AttributeError:
        value = _stored_value(state)
    if current_trace() is not AT_ONCE and is_kept(state):
        meet(None, state)
    elif any_met and type(value) not in _plain:
        announce_write(None, state)
    return _await_value(state) if donors and is_deleted(value) else value


def glance(state) -> Any:
    """Return the value of ``state`` for a look at its structure: unlike a `read`, this does not count as a use."""
    scope = innermost()
    while scope is not None and state not in scope.values:
        scope = scope.parent
    return _stored_value(state) if scope is None else scope.values[state]


def write(state, value) -> None:
    """Set the value of ``state``: in the innermost scope, else in the State itself."""
    scope = innermost() if _open else None
    if scope is not None:
        scope.write(state, value)
        return
    if current_trace() is not AT_ONCE:
        if not is_local(state):
            raise _raw_transform(state)
        _keep_local(state, value)
        return
    if type(value) not in _plain:
        _admit(state, value)
    state._value = value
    if any_met:
        announce_write(None, state)


def create(state, value) -> None:
    """Give a new State its first value; unlike `write`, also under a raw transform, which it may not outlive then."""
    scope, trace = innermost() if _open else None, current_trace()
    if trace is not AT_ONCE and (scope is None or trace is not scope.trace):
        _keep_local(state, value)
        return
    if scope is not None:
        scope.write(state, value)
        while scope is not None:
            if scope.initial is not None:
                scope.initial[state] = value
            scope = scope.parent
        return
    if type(value) not in _plain:
        _admit(state, value)
    state._value = value


def gather(states, generators=None) -> list:
    """Return the values of ``states`` as inputs of a transform; ``generators`` are the positions of those, if known."""
    if innermost() is not None or current_trace() is not AT_ONCE:
        return [read(s) for s in states]
    try:
        with _commit_lock:
            values = [s._value for s in states]
    except AttributeError:
        values = [_stored_value(s) for s in states]
    values = [_await_value(s) for s in states] if donors and is_deleted(values) else values
    for i in range(len(states)) if generators is None else generators:
        if states[i].branch is not None:
            values[i] = claim(states[i])
    return values


def claim(state):
    """Return the value of a generator for this thread, which computes with it and will then write another one.

    If another thread does so now, or did and failed, the generator goes on with a branch of that value. So nobody
    waits, and the two threads draw different numbers.
    """
    with claim_lock:
        value, thread = state._value, get_ident()
        if state.claimed is not None and state.claimed[0] is value and state.claimed[1] != thread:
            value = state._value = state.branch(value)
        state.claimed = value, thread
        return value


def _await_value(state):
    """Return the value of ``state``, which a call in another thread has taken and is about to replace."""
    with _step_lock:
        if is_deleted(state._value):
            raise taken_error([state.describe()])
        return state._value


def commit(writes: Writes) -> None:
    """Hand written values to the enclosing scope, or to the States, all together."""
    states, scope = writes.states, innermost()
    if not states:
        return
    if scope is None and current_trace() is not AT_ONCE:
        # Under a raw transform only States that belong to its trace, or are new, can take values.
        for state in states:
            if not (is_local(state) or _is_new(state)):
                raise _raw_transform(state)
        for state, value in zip(states, writes.values, strict=True):
            _keep_local(state, value)
        return
    if scope is not None:
        for state, value in zip(states, writes.values, strict=True):
            scope.write(state, value)
        return
    await_announced(writes.values)
    for state, value in zip(states, writes.values, strict=True):
        _admit(state, value)  # a container changed in place under a raw transform may hold its tracers
    with _step_lock, _commit_lock:  # never between the gathering and the committing of another call
        _assign_all(states, writes.values)
    if any_met:
        announce_values(states)


def eager() -> bool:
    """Tell whether an operation is computed at once now, and not recorded, mapped or differentiated."""
    return current_trace() is AT_ONCE


def is_differentiated(state) -> bool:
    """Tell whether a derivative in progress in this thread is with respect to ``state``."""
    scope = innermost()
    while scope is not None and state not in scope.given:
        scope = scope.parent
    return scope is not None


def frozen_here() -> bool:
    """Tell whether JAX itself is tracing a program here, and would keep the value of a State that is read."""
    scope = innermost()
    if scope is None:
        return current_trace() is not AT_ONCE and is_recording()
    return current_trace() is not scope.trace and bool(stages_within(scope.trace))


def _stored_value(state):
    try:
        value = state._value
    except AttributeError:
        if local_trace(state) is not None:
            return state._local[1]
        if hasattr(state, "_local"):
            raise TraceContextError(
                f"{state.describe()} was created under a raw JAX transform (jax.jit, jax.grad, ...), and is used "
                f"outside of it: its value was a tracer, which is gone. Return `state.value` from the function, or "
                f"create the State outside of it."
            ) from None
        raise TraceContextError(
            f"{state.describe()} was created inside a transform that has not finished, failed, or keeps no States "
            f"created inside: it has no value here. Assign a value first, or create it outside."
        ) from None
    return _await_value(state) if donors and is_deleted(value) else value


# Types that need no look inside: numbers, text, NumPy arrays, and (added when first met) JAX's own arrays.
_plain = {bool, int, float, complex, str, type(None), Absent}


def _admit(state, value, traced=False) -> bool:
    """Refuse a value that holds a State, or that holds a tracer while no scope is open, and tell whether it does.

    ``traced`` allows the tracer.
    """
    if type(value) in _plain:
        return False
    leaves = _flatten(state, value)[0]
    kinds = {type(leaf) for leaf in leaves} - _plain
    if any(issubclass(kind, Cell) for kind in kinds):
        raise StateValueError(
            f"the value given to {state.describe()} contains a State. A State holds arrays, not States: assign "
            f"`other.value`, or keep the States in a Module, list or dict."
        )
    tracers = [kind for kind in kinds if issubclass(kind, Tracer)]
    if tracers and not traced and innermost() is None:
        raise _raw_transform(state)
    # A bare array: the next value of this type is admitted without a look inside.
    if leaves and leaves[0] is value and not tracers and isinstance(value, jax.Array):
        _plain.add(type(value))
    return bool(tracers)


# A State that is made under a raw transform belongs to that trace: it is read there and in traces inside it, and
# written there only. Scopes around the transform do not know it.


def _keep_local(state, value) -> None:
    """Give ``state``, which belongs to the present trace, a value; a concrete one may outlive the trace."""
    traced = _admit(state, value, traced=True)
    state._local = weakref.ref(current_trace()), value
    if not traced:
        state._value = value
    elif hasattr(state, "_value"):
        del state._value


def _is_new(state) -> bool:
    return not (hasattr(state, "_value") or hasattr(state, "_local"))


def _flatten(state, value):
    try:
        return jax.tree.flatten(value)
    except (TypeError, ValueError) as error:
        raise StateValueError(
            f"the value of {state.describe()} is not a pytree: {error} The keys of a dict must be of one sortable kind."
        ) from None


def _opaque(leaf) -> bool:
    return isinstance(leaf, Iterator | MappingView)  # JAX warns of walking these


def refuse_foreign(value, holder, name) -> None:
    """Refuse a ``value`` with a leaf that is not of a JAX type; ``holder()`` says whose it is, for the message."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(value, is_leaf=_opaque):
        if not valid_jaxtype(leaf):
            where = jax.tree_util.keystr(path)
            raise StateTypeError(
                f"{holder()} {a_type(leaf)}{where and ' at ' + where}, which is not a JAX type: "
                f"brainstate.transform.{name} takes and returns arrays and numbers, in containers that JAX knows. "
                f"Keep such a value in a plain attribute, or pass it as a static argument."
            )


def refuse_states(tree, what) -> None:
    """Refuse States among arguments or results: they belong to the function, not to its signature."""
    try:
        found = any(isinstance(leaf, Cell) for leaf in jax.tree.leaves(tree, is_leaf=_opaque))
    except (TypeError, ValueError):
        return  # not a pytree for JAX, such as a dict with unsortable keys: values that are not traced may be anything
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_opaque) if found else ():
        if isinstance(leaf, Cell):
            where = jax.tree_util.keystr(path)
            raise StateValueError(
                f"{leaf.describe()} is among the {what}{where and ', at ' + where}: States are not passed in or out of "
                f"a transform. Use the State inside the function, and pass or return `state.value`."
            )


def _raw_transform(state):
    forget(current_trace())
    return TraceContextError(
        f"{state.describe()} was written inside a raw JAX transform, which does not know States: a tracer would leak, "
        f"or the write be lost. Wrap the function with the transform of the same name from brainstate.transform "
        f"(jit, grad, vmap, ...) instead."
    )


def is_tracer(leaf) -> bool:
    """Tell whether ``leaf`` is a tracer."""
    return isinstance(leaf, Tracer)
