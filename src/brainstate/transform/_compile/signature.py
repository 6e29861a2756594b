"""The signature of a call in words: the types of its arguments and States by name; and how two calls differ.

A `Part` is one argument or one State, as text only: nothing here keeps an array, a tracer or a Module. Two
signatures, ``{key: Part}``, are compared leaf by leaf; each leaf gives a `Comparison`, equal or not.
"""

import reprlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
from jax.tree_util import keystr, treedef_is_leaf

from ..._arrays import layout
from ..._functions import signature_of
from ..._state import State

__all__ = [
    "NOTHING",
    "Comparison",
    "Part",
    "argument_names",
    "argument_parts",
    "compare",
    "state_part",
]

NOTHING = "nothing"

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


class Part(NamedTuple):
    """One argument or State: how it is given, the type of each leaf by its path, and the structure of the pytree."""

    name: str
    form: str
    leaves: dict[str, str]
    structure: tuple[str, int] = ("", 0)  # in words, and a hash that tells apart structures that look the same


class Comparison(NamedTuple):
    """One leaf in two signatures."""

    name: str
    was: str
    now: str
    same: bool


def argument_names(fun: Callable, count: int) -> list[str]:
    """Return the names of the first ``count`` positional arguments of ``fun``."""
    signature, names = signature_of(fun), []
    for parameter in signature.parameters.values() if signature else ():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}[{i}]" for i in range(count - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return [names[i] if i < len(names) else str(i) for i in range(count)]


# ------------------------------------------------------------------------------------------ parts


def _type_in_words(leaf, weak) -> str:
    """Write the type of one leaf, ``float32[3]``; with ``weak`` also whether it is that of a Python number."""
    try:
        aval: Any = jax.typeof(leaf)
    except TypeError:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return layout(leaf) + " (weak)" * (weak and leaf.weak_type)
        if not hasattr(leaf, "str_short"):
            return _in_words(leaf)
        aval = leaf  # a type itself
    weak = weak and bool(getattr(aval, "weak_type", False))
    return str(aval).removeprefix("~") + " (weak)" * weak + _mesh_of(aval)


def _mesh_of(aval) -> str:
    """Name the device mesh over which an array is spread, which is part of its type wherever its parts are."""
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    if mesh is None or mesh.empty:
        return ""
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return f" on the mesh ({', '.join(f'{name}: {size} {kind.name.lower()}' for name, size, kind in kinds)})"


def _in_words(thing) -> str:
    """Write an object that is not an array; one whose ``repr`` fails is named by its type."""
    kind = type(thing).__name__
    try:
        text = " ".join(_short.repr(thing).split())
    except Exception:
        return kind
    return text if kind in text else f"{kind} {text}"


def _told_apart(thing) -> int:
    try:
        return hash(thing)
    except TypeError:
        return 0


def _part_of(name, form, value, weak) -> Part:
    leaves, treedef = jax.tree.flatten(value)
    if not leaves:
        return Part(name, form, {"": _short.repr(value)}, (str(treedef), _told_apart(treedef)))
    if treedef_is_leaf(treedef):
        return Part(name, form, {"": _type_in_words(leaves[0], weak)})
    found = jax.tree_util.tree_leaves_with_path(value)
    types = {keystr(path): _type_in_words(leaf, weak) for path, leaf in found}
    return Part(name, form, types, (str(treedef), _told_apart(treedef)))


def _static_part(name, form, value) -> Part:
    return Part(f"static argument {name}", form, {"": _in_words(value)}, ("", _told_apart(value)))


def state_part(state: State, value: Any, form: str = "", weak: bool = True) -> Part:
    """Return the part of a State that goes in."""
    return _part_of(state.describe(), form, value, weak)


def argument_parts(names: Iterable[str], args, kwargs, is_static: Callable, weak: bool = True) -> dict[Any, Part]:
    """Return the parts of the arguments by name; ``is_static(key, value)`` says which are static."""
    given = [(name, i, "by position", arg) for i, (name, arg) in enumerate(zip(names, args, strict=True))]
    given += [(name, name, "by keyword", arg) for name, arg in kwargs.items()]
    return {
        name: _static_part(name, form, arg) if is_static(key, arg) else _part_of(f"argument {name}", form, arg, weak)
        for name, key, form, arg in given
    }


# ------------------------------------------------------------------------------------------ differences


def compare(old: dict[Any, Part], new: dict[Any, Part]) -> Iterator[Comparison]:
    """Return a row for each leaf of two signatures."""
    for key in {**old, **new}:
        yield from _rows(old.get(key), new.get(key))


def _rows(old: Part | None, new: Part | None) -> Iterator[Comparison]:
    if old is None or new is None:
        part: Any = old or new
        for path, text in part.leaves.items():
            yield Comparison(part.name + path, text if old else NOTHING, text if new else NOTHING, False)
        return
    if old.form != new.form and old.name == new.name:  # and not static in one of them only
        yield Comparison(new.name, old.form or "kept", new.form or "kept", False)
    restructured = old.leaves == new.leaves and old.structure != new.structure
    if restructured and old.structure[0] == new.structure[0]:
        text = new.structure[0] or new.leaves[""]
        yield Comparison(new.name, text, f"another {text}", False)
        return
    for path in {**old.leaves, **new.leaves}:
        was, now = old.leaves.get(path, NOTHING), new.leaves.get(path, NOTHING)
        yield Comparison(new.name + path, was, now, was == now)
    if restructured:
        yield Comparison(new.name, old.structure[0], new.structure[0], False)
