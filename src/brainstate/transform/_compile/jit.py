"""``jit``: compile a function that reads and writes States.

The compiled program takes the values of the States that the function reads, and returns the values that it
writes. Which States these are is found while JAX traces, by staging (``_seam/staging``)::

    call ── gather the values of the known States ── jax.jit of `_Program.pure` ── commit the writes ── result
                                                            │ cache miss: stage the function, once
                                                            └ States that are not inputs yet? leave JAX with
                                                              `Restart`; the call adds them to its inputs and runs
                                                              again, `pure` then only evaluates the staged program

Nothing else is on the path of a call: JAX's own dispatch sees new shapes, dtypes, structures and static
arguments, and the number of input States is part of its key.

A new program begins when a part of a Module has changed that a trace has read (``_seam/module_reads``). States that a
call created and left behind are inputs from the next call on, which is therefore traced again; unless that trace
too creates States and never uses the old ones, because the function makes its States in each call.

A call that writes holds one lock from reading to committing, so concurrent calls lose no update.
"""

import copy
import functools
import sys
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ..._arrays import owns_states
from ..._compat import jit_disabled
from ..._copies import Remade
from ..._errors import StateTypeError, StateValueError
from ..._functions import Unbound, boundary, check_function, signature_of
from ..._seam.donation import donors
from ..._seam.local_states import users_frame
from ..._seam.module_reads import Touched, record_reads
from ..._seam.packing import ABSENT
from ..._seam.run_time_errors import announce_error, await_errors, is_marked
from ..._seam.scope import Scope, gather, generation, is_tracer, refuse_states, replaced_since, run, tag_changes
from ..._seam.staging import Restart, stage
from ..._seam.step import Launcher, generators, give, launch, with_donation
from ..._seam.tokens import refuse_leak, without_token
from .._wrapper import or_decorator, resemble
from .ahead import Source, Stage
from .jit_options import compiler, in_tuples, static_places, with_states
from .retraces import Journal, Retraces
from .signature import state_part

__all__ = ["Jit", "compiled_form", "jit"]

_OFTEN = 5  # changes of one attribute that a compiled function is traced again for, before it says so


class _Program:
    """The compiled forms of a function for one state of the object graph, and the States they take and give."""

    def __init__(self, fun, options, donates, journal):
        self.fun, self.donates, self.journal = fun, donates, journal
        self.generation, self.retagged = generation(), tag_changes()
        self.touched = Touched()  # the parts of Modules that its traces have read
        self.states, self.written = [], []  # inputs, outputs; they only ever grow: an older trace knows a prefix
        self.generators = []  # positions of random generators among the inputs
        self.gives = []  # donates: whether each of `states` is given away
        self.newborn, self.kind = (), None  # States that the last trace left behind, and the kind of its arguments
        self.adopted = {}  # kind of the arguments -> the States that their trace left behind
        self.pending = {}  # thread -> the function that was staged before the restart
        self.records = weakref.WeakKeyDictionary()  # staged function -> its record in the journal
        self.waits = False  # whether a call waits for its end, since it may fail while it runs
        self.returned = []  # donates: see `give`
        if donates or options.get("donate_argnums") is not None or options.get("donate_argnames") is not None:
            donors[_name(fun)] = None
        self.compiled = compiler(with_states(fun, self), fun, options, 2 if donates else 1)
        self.jitted = self.with_donation(self.compiled, self.returned)

    def pure(self, values, /, *args, **kwargs):
        """Compute ``(out, new values of self.written)``; JAX traces this."""
        if jit_disabled():
            out, writes = run(Scope("jit"), self.fun, *args, **kwargs)
            return out, self._align(writes.states, writes.values)
        given = dict(zip(self.states, values, strict=False))
        staged = self.pending.pop(threading.get_ident(), None)
        if staged is None:
            staged = self._stage(values, args, kwargs)
            fails = is_marked(staged.closed)
            if fails:
                announce_error()  # of the program around too
            # A trace that uses none of the States that an earlier one of its kind left behind makes new ones each time.
            self.kind = _kind(args), tuple(kwargs), _kind(kwargs.values())
            before = self.adopted.get(self.kind)
            makes_new = before and before.isdisjoint((*staged.reads, *staged.writes))
            self.newborn = () if makes_new else tuple(staged.born)
            if fails and not self.waits:
                # The States keep their values if it fails, so nothing is given away.
                self.waits, self.jitted, self.gives[:] = True, await_errors(self.jitted), [False] * len(self.gives)
                raise Restart(staged)
        if (staged.writes and not self.written) or any(s not in given for s in staged.reads) or self._keeps(staged):
            raise Restart(staged)
        out, writes = staged(given, args, kwargs)
        self.records[staged].finish(self._inputs(values), frozenset(map(id, self.newborn)))
        # A State that was donated and not written is returned, or it would be left with a deleted buffer.
        back = [s for s, gives in zip(self.states, self.gives, strict=False) if gives and s not in writes.states]
        return out, self._align((*writes.states, *back), (*writes.values, *(given[s] for s in back)))

    def _stage(self, values, args, kwargs):
        """Stage the function, and record why."""
        record = self.journal.open(self.fun, self._inputs(values), args, kwargs)
        try:
            with record_reads(self.touched):
                staged = stage(self.fun, args, kwargs, name="jit")
        except Exception as error:
            record.fail(error)
            raise
        self.records[staged] = record
        return staged

    def _inputs(self, values):
        """Return the types of the input States, as the journal keeps them."""
        given = zip(self.states, values, self.gives, strict=False)
        return {id(s): state_part(s, value, "donated" if gives else "") for s, value, gives in given}

    def extend(self, staged):
        """Make inputs of the States that ``staged`` reads, and keep it for the trace that follows."""
        self._add([s for s in staged.reads if s not in set(self.states)])
        if self.donates and not self.waits:
            pairs = zip(self.states, self.gives, strict=False)
            self.gives[:] = [gives or _is_given(s, staged) for s, gives in pairs]
        self._align(staged.writes, [None] * len(staged.writes))
        self.pending[threading.get_ident()] = staged

    def _keeps(self, staged):
        """Tell whether ``staged`` writes a State whose buffer should be donated, and so far is not."""
        pairs = zip(self.states, self.gives, strict=False)
        return self.donates and not self.waits and any(_is_given(s, staged) and not gives for s, gives in pairs)

    def adopt(self):
        """Take the States that the last trace left behind as inputs of the next call."""
        new, self.newborn = self.newborn, ()
        self.adopted[self.kind] = set(new)
        self._add(new)

    def _add(self, new):
        self.gives += [False] * len(new)  # first: after an interrupt there may be too many, which nobody looks at
        self.states += new
        self.generators = generators(self.states)

    def launch(self, args, kwargs):
        """Call the compiled function and commit its writes."""
        call = self.jitted, self.states, self.generators, self.written, args, kwargs
        gives = self.donates and not self.waits  # a program that may fail keeps its values
        out = give(_name(self.fun), self.returned, *call) if gives else launch(*call)
        self.touched.pass_on()  # a trace around this call reads the same
        return out

    def entry_ahead(self, step):
        """Return ``trace`` or ``eval_shape`` of the compiled function, with the States filled in."""
        entry = self.with_donation(getattr(self.compiled, step), [])

        def call(args, kwargs):
            values = gather(self.states)
            with without_token():
                return entry(values, *args, **kwargs)

        return call

    def snapshot(self) -> "_Program":
        """Return this with the States that it has now; those of the original may grow."""
        new = copy.copy(self)
        new.states, new.written, new.gives, new.returned = [*self.states], [*self.written], [*self.gives], []
        return new

    def run(self, entry, args, kwargs, staged=None):
        """Call ``entry(args, kwargs)``, adding inputs until it needs no more."""
        thread = threading.get_ident()
        try:
            while True:
                if staged is not None:
                    self.extend(staged)
                try:
                    return entry(args, kwargs)
                except Restart as restart:
                    staged = restart.staged
        finally:
            self.pending.pop(thread, None)

    def _align(self, states, values):
        """Return ``values`` in the places of their States in ``self.written``, which is extended as needed."""
        self.written.extend(s for s in states if s not in set(self.written))
        table = dict(zip(states, values, strict=True))
        return [table.get(s, ABSENT) for s in self.written]

    def with_donation(self, compiled, returned):
        """Return ``compiled`` as a function of the values of all States in one list, and of the arguments."""
        return with_donation(compiled, self.gives, returned) if self.donates else compiled

    def restore(self, donated, kept) -> list:
        """Return the values of all States in their order."""
        count, donated, kept = len(donated) + len(kept), iter(donated), iter(kept)
        return [next(donated) if give else next(kept) for give in self.gives[:count]]


def _is_given(state, staged) -> bool:
    """Tell whether the buffers of ``state`` are to be donated: another thread may need those of a generator."""
    return state in staged.writes and state.branch is None


def _name(fun) -> str:
    return getattr(fun, "__qualname__", type(fun).__name__)


def _kind(args):
    """Return the key of a trace: the types of traced arguments, and static arguments as they are."""
    kinds = []
    for arg in args:
        leaves, treedef = jax.tree.flatten(arg)
        kinds.append((treedef, *map(jax.typeof, leaves)) if all(map(is_tracer, leaves)) else arg)
    return tuple(kinds)


class Jit(Remade, Launcher):
    """A compiled function with States; made by `jit`."""

    def __init__(self, fun, options, donates):
        check_function("jit compiles a function", fun)
        if not isinstance(donates, bool | np.bool_):
            raise StateTypeError(f"jit: donate_states={donates!r}: give True or False.")
        options = in_tuples(options)
        jax.jit(fun, **options)  # checks them
        self._fun, self._options, self._donates = fun, options, bool(donates)
        self._methods = {}  # id of an instance -> (weak reference to it, the Jit of its bound method)
        self._journal, self._changes = Journal(), Counter()
        self._begin()
        resemble(self, fun)

    def _recipe(self):
        name = self.__module__, getattr(self, "__qualname__", "")
        if _find_by_name(*name) is self:  # a function of a module, or of a class there: one for all
            return _find_by_name, name
        return Jit, (self._fun, self._options, self._donates)

    @boundary
    def _retry(self, program, staged, args, kwargs):
        """Finish a call whose trace was left: ``staged`` met new States, or None for a start from nothing."""
        try:
            out = program.run(program.launch, args, kwargs, staged)
        except TypeError as error:
            refuse_leak(error)
            raise
        if program.newborn:
            program.adopt()
        return out

    @boundary
    def check_arguments(self, args: Any, kwargs: Any) -> None:
        """Raise an error that names a State or Module among the arguments, if there is one."""
        refuse_states((args, kwargs), "arguments of jit")
        for path, leaf in jax.tree_util.tree_leaves_with_path((args, kwargs)):
            if owns_states(leaf):
                raise StateTypeError(
                    f"argument {jax.tree_util.keystr(path[1:])} of jit is a Module ({type(leaf).__name__}). Let the "
                    f"function refer to it by name instead: its States are found automatically."
                )

    @boundary
    def lower(self, *args: Any, **kwargs: Any) -> Stage:
        """Lower for these arguments, as ``jax.stages.Wrapped.lower``; the States are filled in."""
        return self.trace(*args, **kwargs).lower()

    def trace(self, *args: Any, **kwargs: Any) -> Stage:
        """Trace for these arguments, as ``jax.stages.Wrapped.trace``; the States are filled in."""
        program, traced = self._run_ahead("trace", args, kwargs)
        return Stage(Source.from_trace(self, program.snapshot(), traced, args, kwargs), traced)

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """Return shapes and dtypes of the result; no State changes."""
        return self._run_ahead("eval_shape", args, kwargs)[1][0]

    @property
    def donates(self) -> bool:
        """Whether the buffers of the States that are written are given away."""
        return self._donates

    def fresh_copy(self) -> "Jit":
        """Return a `Jit` of the same function and options that has compiled nothing."""
        return Jit(self._fun, self._options, self._donates)

    def statics(self, count: int) -> set[int | str]:
        """Return the positions, of ``count`` arguments, and the names of those that are static."""
        numbers, names = static_places(self._fun, self._options, 0), self._options.get("static_argnames")
        if names is None:
            signature = signature_of(self._fun)
            names = [name for i, name in enumerate(signature.parameters if signature else ()) if i in numbers]
        return {n % count for n in numbers if -count <= n < count}.union([names] if isinstance(names, str) else names)

    def clear_cache(self) -> None:
        """Forget all that was compiled and which States are inputs."""
        self._begin("clear_cache() was called")

    def retraces(self) -> Retraces:
        """Return why this function was traced: one entry a trace, each with all that differs from the nearest before.

        An argument, State or static value of another type, structure or number; a State that became an input; a State
        or Module that was replaced; an option of JAX. The last 32 traces are kept, as text. On a method, each
        instance has its own.

        Examples
        --------
        >>> import jax.numpy as jnp, brainstate
        >>> mean = brainstate.State(jnp.zeros(2), name="mean")
        >>> smooth = brainstate.transform.jit(lambda x, rate=0.5: mean.value + rate * (x - mean.value))
        >>> _ = smooth(jnp.ones(2)), smooth(jnp.ones(2)), smooth(jnp.ones((3, 2))), smooth(jnp.ones(2), rate=0.1)
        >>> smooth.retraces()
        trace 1: first call
        trace 2: argument x: float32[2] → float32[3,2]
        trace 3: argument rate: not given → float32[] (weak)
        """
        return self._journal.entries()

    def _look(self, program: _Program) -> _Program:
        """Begin a new program if something has changed that this one has read."""
        now = generation()
        changes = program.touched.changes()
        if program.retagged == tag_changes() and not changes:
            program.generation = now
            return program
        for what in changes:
            self._changes[what] += 1
            if self._changes[what] == _OFTEN:
                warnings.warn(
                    f"{self!r} was traced again {_OFTEN} times because {'.'.join(what)} changed: make it a State, or "
                    f"an argument of the function.",
                    stacklevel=users_frame()[1],
                )
        return self._begin("; ".join(dict.fromkeys(changes.values())) or "; ".join(replaced_since(program.generation)))

    def _begin(self, why: str = "") -> _Program:
        """Begin a new program."""
        self._journal.begin(why)
        self._program = _Program(self._fun, self._options, self._donates, self._journal)
        return self._program

    @boundary
    def _run_ahead(self, step, args, kwargs):
        program = self._program
        if program.generation != generation():
            program = self._look(program)
        done = program.run(program.entry_ahead(step), args, kwargs)
        if program.newborn:
            made = program.newborn[0]
            self._begin(f"tracing ahead of time created {made.describe()}")  # JAX has cached it: nobody may run it
            if step != "eval_shape":
                raise StateValueError(
                    f"{made.describe()} is created by the function and outlives it, so a program made ahead of time "
                    f"would create it at every call. Call the function once before, or create the State outside."
                )
        return program, done

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind as a method; each instance has compiled functions of its own, which do not keep it alive."""
        if instance is None:
            return Unbound(self, owner)
        alive, jitted = self._methods.get(id(instance), (lambda: None, None))
        if alive() is not instance:
            forget = functools.partial(self._methods.pop, id(instance), None)
            alive = weakref.ref(instance, lambda _: forget())
            jitted = Jit(_weak_method(self._fun, alive), self._options, self._donates)
            self._methods[id(instance)] = alive, jitted
        return _Method(instance, jitted, self)

    def __repr__(self) -> str:
        return f"jit({getattr(self._fun, '__qualname__', type(self._fun).__name__)})"


class _Method(Remade):
    """A compiled method of one instance, which it keeps alive."""

    def __init__(self, instance, jitted, unbound):
        self.__self__, self._jitted, self._unbound = instance, jitted, unbound
        functools.update_wrapper(self, jitted.__wrapped__, updated=())

    def __call__(self, /, *args, **kwargs):
        return self._jitted(*args, **kwargs)

    def _recipe(self):
        return _bind, (self._unbound, self.__self__)

    def __getattr__(self, name):
        return getattr(self._jitted, name)

    def __repr__(self):
        return f"<bound {self._jitted!r} of {self.__self__!r}>"


def _find_by_name(module, name) -> Any:
    """Return the object of this name in this module, or None."""
    found = functools.reduce(lambda x, part: getattr(x, part, None), name.split("."), sys.modules.get(module))
    return found.method if isinstance(found, Unbound) else found


def _bind(unbound, instance) -> _Method:
    return unbound.__get__(instance, type(instance))


def compiled_form(fun: Any) -> Jit | None:
    """Return the `Jit` that ``fun`` is, or that it is a bound method of."""
    fun = fun.method if isinstance(fun, Unbound) else fun
    return fun._jitted if isinstance(fun, _Method) else fun if isinstance(fun, Jit) else None


def _weak_method(fun, alive):
    """Return ``fun`` bound to the object that the weak reference ``alive`` leads to."""
    bind = getattr(fun, "__get__", functools.partial(functools.partial, fun))  # a transform binds in its own way

    def method(*args, **kwargs):
        return bind(alive())(*args, **kwargs)

    bound = resemble(method, fun)
    signature = signature_of(fun)
    if signature is not None:
        bound.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
    return bound


def jit(fun: Callable | None = None, /, *, donate_states: bool = False, **options: Any) -> Any:
    """Compile a function that reads and writes States: ``jax.jit`` that knows States.

    Parameters
    ----------
    fun : callable, optional
        The function. The States it reads become inputs and those it writes become outputs of the compiled program,
        found exactly and automatically. Left out: a decorator is returned. On a method, positions count the
        arguments after ``self``, and each instance has compiled programs of its own.
    donate_states : bool
        Give the buffers of the States that are written to the program, as ``donate_argnums`` does for arguments:
        old and new value need not fit into memory together. Other references to the old arrays become invalid: a State
        that has one says so. If the call fails once it has them, the error names the States that lost their values.
    **options
        Every option of ``jax.jit``: in_shardings, out_shardings, static_argnums, static_argnames, donate_argnums,
        donate_argnames, keep_unused, device, backend, inline, compiler_options; they concern the arguments of
        ``fun`` only.

    Returns
    -------
    Jit
        A function of the same arguments, with ``lower``, ``trace``, ``eval_shape`` and ``clear_cache`` as in JAX.

    Raises
    ------
    StateTypeError
        If ``fun`` cannot be called, or a State that is read holds no JAX type.
    StateValueError
        If a State is passed as an argument or returned.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> total = brainstate.State(jnp.array(0.0))
    >>> @brainstate.transform.jit
    ... def add(x):
    ...     total.value += x
    ...     return 2 * total.value
    >>> float(add(1.0)), float(add(2.0)), float(total.value)
    (2.0, 6.0, 3.0)
    """
    return or_decorator(fun, lambda fun: Jit(fun, options, donate_states))
