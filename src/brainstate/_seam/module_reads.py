"""A record of the attributes of Modules that a trace reads: a change retraces the functions that read it, no others.

While a function is traced for ``jit``, each read of an attribute of a `Watched` object (a Module) and of a `Container`
(the lists and dicts that a Module keeps) is recorded: for this time only, these classes have reading methods of their
own, so reading costs nothing at other times. The reads are kept as a `Touched`, with their values at the end of the
trace: an assignment by the function itself is not taken for a change. Objects are referred to weakly.

A later change of something recorded is announced (`announce_change`): the generation goes up, a compiled call that
sees it asks `Touched.changes`, and is traced again only if something differs. An attribute that gets an equal value
does not differ.
"""

import functools
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import jax
import numpy as np

from .scope import Cell, generation, invalidate, is_tracer

__all__ = [
    "ALL",
    "STRUCTURE",
    "Container",
    "Touched",
    "Watched",
    "announce_change",
    "is_watched",
    "note",
    "record_reads",
    "register_container",
]

ALL = "__dict__"  # read in place of one attribute: every attribute of an object, every element of a container
STRUCTURE = "the States below"  # read by a walk over the graph: attributes that hold States


class Watched:
    """Base of objects whose attributes a trace may read."""


class Container:
    """Base of lists and dicts whose elements a trace may read."""

    __slots__ = ()


def _nobody() -> None:
    """Stand for a weak reference that is dead."""


class _ReadsOfThread(threading.local):
    def __init__(self):
        self.seen: dict | None = None  # while a trace records: {id: (weak reference, names that were read)}
        self.reader: Any = _nobody  # a weak reference to whose that is


_reads = _ReadsOfThread()
_WRAPPERS = (
    functools.__file__,
    str(Path(jax.__file__).parent),
    str(Path(__file__).parents[1] / "transform/_wrapper.py"),
)  # they copy the attributes of a function
_lock, _readers = threading.Lock(), weakref.WeakSet()
_watched: dict[int, Any] = {}  # id -> (weak reference, {name: (when, the last change in words)}) of reads by a trace
_containers: list[type] = []
_READS = "__getitem__ __iter__ __len__ __contains__ __reversed__ get items values keys"


def note(x: Any, name: str = ALL) -> None:
    """Record that ``x`` is read, if a trace records."""
    seen = _reads.seen
    if seen is None:
        return
    ref, names = seen.get(id(x), (None, None))
    if ref is None or ref() is not x:
        seen[id(x)] = _, names = weakref.ref(x), set()
    names.add(name)


def _getattribute(self, name):
    if _reads.seen is not None:
        if not name.startswith("__"):
            note(self, name)
        elif name == ALL and not sys._getframe(1).f_code.co_filename.startswith(_WRAPPERS):
            note(self)
    return super(Watched, self).__getattribute__(name)


def _note_reads(method):
    def read(self, *args):
        note(self)
        return method(self, *args)

    return read


def register_container(cls: type) -> None:
    """Let the elements of this class be recorded."""
    _containers.append(cls)


def _switch_methods(on: bool) -> None:
    """Give the classes their reading methods, or take them away again."""
    pairs: list = [(Watched, "__getattribute__", _getattribute)]
    for cls in _containers:
        base = cls.__mro__[-2]
        pairs += [(cls, name, _note_reads(getattr(base, name))) for name in _READS.split() if hasattr(base, name)]
    for cls, name, method in pairs:
        if on:
            setattr(cls, name, method)
        elif name in vars(cls):  # an interrupt may have come in between
            delattr(cls, name)


class _Reader:
    """One block of `record_reads` in progress; an interrupt anywhere lets go of it, and so ends it."""


@contextmanager
def record_reads(touched: "Touched") -> Iterator[None]:
    """Record in ``touched`` the reads of this thread in the block; a block around it records the same."""
    before, reader = (_reads.seen, _reads.reader), _Reader()
    outer = before if before[1]() is not None else (None, _nobody)
    seen: dict = {}
    try:
        _reads.seen, _reads.reader = seen, weakref.ref(reader)
        with _lock:
            _readers.add(reader)
            _switch_methods(True)
        yield
    finally:
        _reads.seen, _reads.reader = None, _nobody
        with _lock:
            _readers.discard(reader)
            if not _readers:
                _switch_methods(False)
        touched.take(seen)
        _reads.seen, _reads.reader = outer
        touched.pass_on()


def is_watched(x: Any) -> bool:
    """Tell whether a trace has read something of ``x``."""
    return id(x) in _watched


def announce_change(x: Any, name: str, what: str, structure: bool) -> None:
    """Announce a change of ``x``, in words, if it matters: always if States are concerned."""
    _, names = _watched.get(id(x), (None, {}))
    if not structure and name not in names and ALL not in names:
        return
    invalidate(what)
    names.update(dict.fromkeys({name, ALL, *[STRUCTURE] * structure} & names.keys(), (generation(), what)))


def _forget(key, _):
    _watched.pop(key, None)


class Touched:
    """The reads of traces, and the values that were read."""

    def __init__(self):
        self._forms: dict[int, tuple[weakref.ref, dict[str, Any]]] = {}

    def take(self, seen: dict) -> None:
        """Keep the present values of the reads in ``seen``."""
        for ref, names in seen.values():
            x = ref()
            if x is None:
                continue
            watch = _watched.get(id(x))
            if watch is None or watch[0]() is not x:
                watch = _watched[id(x)] = weakref.ref(x, partial(_forget, id(x))), {}
            forms = {name: _form(_current_part(x, name)) for name in names}
            forms = {name: form for name, form in forms.items() if form is not _TRACED}
            self._forms.setdefault(id(x), (watch[0], {}))[1].update(forms)
            for name in forms:
                watch[1].setdefault(name, (0, ""))

    def pass_on(self) -> None:
        """Record all of it for a trace around, if there is one."""
        for ref, forms in self._forms.values() if _reads.seen is not None else ():
            if (x := ref()) is not None:
                for name in forms:
                    note(x, name)

    def changes(self) -> dict[tuple[str, str], str]:
        """Return the reads whose values differ now, as ``{(class, name): the change in words}``."""
        told, others = {}, {}  # the change itself; and the containers of it
        for key, (ref, forms) in list(self._forms.items()):
            x = ref()
            for name, form in forms.items() if x is not None else ():
                if not _is_still(form, _current_part(x, name)):
                    (when, words), place = _watched[key][1][name], (type(x).__name__, name)
                    (told if words else others)[place] = when, words or f"{'.'.join(place)} changed"
        in_order = sorted((told or others).items(), key=lambda item: item[1])
        return {place: words for place, (_, words) in in_order}


# ------------------------------------------------------------------------------------------ values, referred to weakly

_ABSENT, _TRACED = object(), object()
_HOLDERS = (Cell, Watched, list, tuple, dict)  # containers of States


def _current_part(x, name):
    if isinstance(x, Container):
        return x
    attributes = object.__getattribute__(x, "__dict__")
    if name == ALL:
        return dict(attributes)
    if name == STRUCTURE:
        return {key: x for key, x in attributes.items() if isinstance(x, _HOLDERS) or is_dataclass(x)}
    return attributes.get(name, _ABSENT)


class _Parts:
    """The form of a list, tuple or dict."""

    def __init__(self, cls, forms):
        self.cls, self.forms = cls, forms


def _form(value: Any, depth: int = 0) -> Any:
    """Return a form of ``value`` for `_is_still` to compare with a later one; `_TRACED` if it cannot be compared."""
    if is_tracer(value):
        return _TRACED
    if isinstance(value, list | tuple | dict) and depth < 8:
        forms = {key: _form(part, depth + 1) for key, part in _items(value)}
        return _TRACED if any(form is _TRACED for form in forms.values()) else _Parts(type(value), forms)
    if isinstance(value, MethodType):
        return weakref.WeakMethod(value)
    own_equality = type(value).__eq__ is not object.__eq__ and type(value).__hash__ is not None
    if own_equality and not isinstance(value, Watched):
        return value
    try:
        return weakref.ref(value)
    except TypeError:
        return value


def _items(value):
    if isinstance(value, dict):
        return list(dict.items(value))
    return list(enumerate(list.__iter__(value) if isinstance(value, list) else value))


def _is_still(form, value) -> bool:
    if isinstance(form, _Parts):
        if type(value) is not form.cls:
            return False
        items = _items(value)
        return [key for key, _ in items] == list(form.forms) and all(_is_still(form.forms[k], x) for k, x in items)
    then = form() if isinstance(form, weakref.ref) else form
    if then is value:
        return True
    if type(then) is not type(value) or isinstance(then, jax.Array | np.ndarray | Watched):
        return False
    equal = then == value
    return isinstance(equal, bool | np.bool_) and bool(equal)
