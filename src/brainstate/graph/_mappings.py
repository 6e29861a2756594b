"""``FlattedDict`` and ``NestedDict``: the two forms in which States, values and gradients travel.

A *flat* mapping has whole paths as keys, ``{('layers', 0, 'weight'): x}``. A *nested* mapping has one level
for each part of the path, ``{'layers': {0: {'weight': x}}}``, and every level is a ``NestedDict``: a plain
dict below is a value (a State may hold one), so both forms convert into each other without loss.

Both are dicts, and pytrees whose children are the values in the order of their paths: ``jax.tree.map`` of
two such mappings pairs equal paths whatever the insertion order, and ``jax.grad`` answers in the same form.
The values may be anything; methods that speak of States want States (or snapshots).
"""

from collections.abc import Mapping
from typing import Any, Self, TypeVar

import jax

from .._errors import StateTypeError, StateValueError
from .._seam.packing import Writes
from .._seam.scope import commit, read
from .._state import State, fit
from ..filters import Filter, to_predicates
from ._paths import Path, in_order, join_path
from ._snapshot import TreefyState

__all__ = ["FlattedDict", "NestedDict", "assign", "complete", "loadable", "plain", "select", "take_all"]


def select(flat: Mapping, filters: tuple[Filter, ...], *, rest: bool = False) -> list[dict]:
    """Deal ``{path: x}`` out to ``filters``, each entry to the first that selects it.

    Entries that no filter selects are dropped, or come as one more dict with ``rest``.
    """
    predicates = to_predicates(filters)
    parts: list[dict] = [{} for _ in range(len(filters) + rest)]
    for path, x in flat.items():
        for part, predicate in zip(parts, predicates, strict=False):
            if predicate(path, x):
                part[path] = x
                break
        else:
            if rest:
                parts[-1][path] = x
    return parts


def take_all(flat: Mapping, filters: tuple[Filter, ...]) -> list[dict]:
    """Deal out as `select` does, and refuse to leave anything over."""
    *parts, left = select(flat, filters, rest=True)
    if left:
        shown = ", ".join(repr(join_path(path)) for path in left)
        raise StateValueError(
            f"no filter selects {shown}: the filters must cover everything. Add `...` as the last one."
        )
    return parts


def complete(name: str, wanted: Mapping, given: Mapping) -> None:
    """Raise unless ``given`` has exactly the paths of ``wanted``."""
    absent = [path for path in wanted if path not in given]
    _refuse_mismatch(name, wanted, absent, [path for path in given if path not in wanted], {})


def loadable(name: str, targets: Mapping, data: Mapping, *, whole: bool = False) -> dict:
    """Return the values in ``data``, flat or nested, that can be assigned to ``targets``, as ``{path: value}``.

    Raises
    ------
    StateValueError
        If ``data`` has paths that are none of ``targets``, values of another structure, shape or dtype than the States
        or snapshots there, or, where it has to be ``whole``, lacks paths: all of them are named.
    """
    if not isinstance(data, Mapping):
        raise StateTypeError(f"{name} is a mapping from paths or names to values, not a {type(data).__name__}.")
    found, unknown = _pair(targets, data)
    problems = {}
    for path, value in found.items():
        if isinstance(targets[path], State | TreefyState):
            found[path], problem = fit(plain(targets[path]), value)
            problems |= {path: problem} if problem else {}
    _refuse_mismatch(name, targets, [path for path in targets if whole and path not in found], unknown, problems)
    return found


def _refuse_mismatch(name, targets, absent, unknown, problems):
    """Raise if anything is wrong, and name all of it."""
    quoted = [[repr(join_path(path)) for path in paths] for paths in (absent, unknown, problems)]
    quoted[2] = [f"{path} ({problem})" for path, problem in zip(quoted[2], problems.values(), strict=True)]
    verbs = ("lacks", "has unknown", "does not fit at")
    wrong = [f"{verb} {', '.join(paths)}" for verb, paths in zip(verbs, quoted, strict=True) if paths]
    if not wrong:
        return
    rules = [
        "it needs an entry for each path and no other" * bool(absent),
        f"the paths are: {', '.join(repr(join_path(p)) for p in targets) or 'none'}" * bool(unknown),
        "structure, shape and dtype must agree (`jnp.asarray(x, dtype)` converts)" * bool(problems),
    ]
    first = f"{', '.join(wrong[:-1])} and {wrong[-1]}" if len(wrong) > 1 else wrong[0]
    raise StateValueError(f"{name} {first}: {'; '.join(filter(None, rules))}. Nothing was changed.")


def assign(states: Mapping[Any, Any], values: Mapping) -> None:
    """Give States their new stored values, all together."""
    commit(Writes(tuple(states[path] for path in values), list(values.values())))


def plain(x: Any) -> Any:
    """Return the stored value of a State or snapshot, and anything else as it is."""
    return read(x) if isinstance(x, State) else x.value if isinstance(x, TreefyState) else x


_K = TypeVar("_K")
_V = TypeVar("_V")


class _PathMapping(dict[_K, _V]):
    """Common base of the two forms; everything that looks at paths works on the flat form."""

    __slots__ = ()

    @classmethod
    def _from_paths(cls, flat: Mapping) -> Self:
        raise NotImplementedError

    def to_flat(self) -> "FlattedDict":
        """Return the flat form."""
        raise NotImplementedError

    def to_nest(self) -> "NestedDict":
        """Return the nested form."""
        return NestedDict._from_paths(self.to_flat())

    def filter(self, *filters: Filter) -> Self | tuple[Self, ...]:
        """Return one mapping for each filter, with the entries that it selects; the rest is dropped."""
        parts = [self._from_paths(part) for part in select(self.to_flat(), _some(filters))]
        return parts[0] if len(parts) == 1 else tuple(parts)

    subset = filter

    def split(self, *filters: Filter) -> Self | tuple[Self, ...]:
        """Return one mapping for each filter; raise `StateValueError` if anything is left over."""
        parts = [self._from_paths(part) for part in take_all(self.to_flat(), _some(filters))]
        return parts[0] if len(parts) == 1 else tuple(parts)

    def merge(self, *others: Mapping) -> Self:
        """Return one mapping of all entries; of entries with the same path the last counts."""
        merged: dict = {}
        for mapping in (self, *others):
            merged.update(_flat(mapping))
        return self._from_paths(merged)

    def __or__(self, other):
        return self.merge(other) if isinstance(other, Mapping) else NotImplemented

    def __ror__(self, other):
        return self._from_paths(_flat(other)).merge(self) if isinstance(other, Mapping) else NotImplemented

    def __ior__(self, other):
        merged = self.merge(other)
        dict.clear(self)
        dict.update(self, merged)
        return self

    def __sub__(self, other):
        if not isinstance(other, Mapping):
            return NotImplemented
        gone = _flat(other)
        return self._from_paths({path: x for path, x in self.to_flat().items() if path not in gone})

    def treefy_state(self) -> Self:
        """Return the mapping with a snapshot in place of each State."""
        return self._from_paths(
            {p: TreefyState.of(x) if isinstance(x, State) else x for p, x in self.to_flat().items()}
        )

    def copy(self) -> Self:
        """Return a copy that shares the values."""
        return self._from_paths(self.to_flat())

    def __getattr__(self, name: str) -> Any:
        try:
            return self[self._key(name)]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no entry and no attribute {name!r}.") from None

    @staticmethod
    def _key(name):
        return name

    def __repr__(self):
        if not self:
            return f"{type(self).__name__}({{}})"
        lines = (f"{k!r}: {v!r},".replace("\n", "\n  ") for k, v in self.items())
        return "\n  ".join([f"{type(self).__name__}({{", *lines]) + "\n})"


class FlattedDict(_PathMapping[Path, _V]):
    """A dict from paths (tuples) to States, values or gradients, and a pytree sorted by path.

    Attribute access looks up the path of length one: ``flat.w`` is ``flat[('w',)]``.

    Examples
    --------
    >>> import jax
    >>> from brainstate import graph
    >>> flat = graph.FlattedDict({("b",): 1.0, ("a", "w"): 2.0})
    >>> jax.tree.leaves(flat)
    [2.0, 1.0]
    >>> flat.to_nest()
    NestedDict({
      'b': 1.0,
      'a': NestedDict({
        'w': 2.0,
      }),
    })
    """

    __slots__ = ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for path in self:
            if type(path) is not tuple:
                raise StateTypeError(f"a FlattedDict has paths (tuples) as keys, not {path!r}: see NestedDict.")

    @classmethod
    def _from_paths(cls, flat):
        new = cls.__new__(cls)
        dict.update(new, flat)
        return new

    @classmethod
    def from_nest(cls, nested: Mapping) -> Self:
        """Return the flat form of nested dicts."""
        return cls._from_paths(NestedDict(nested).to_flat())

    def to_flat(self) -> "FlattedDict":
        """Return the mapping itself."""
        return self

    def to_dict(self) -> dict:
        """Return a plain dict with the same keys."""
        return dict(self)

    def to_dict_values(self) -> "FlattedDict":
        """Return the values of the States, under the same paths."""
        return self._from_paths({path: plain(x) for path, x in self.items()})

    def assign_dict_values(self, data: Mapping) -> None:
        """Assign to each State the value that ``data`` has under the same path.

        Raises
        ------
        StateValueError
            If ``data`` lacks a path, has an unknown one, or a value of another structure, shape or dtype than the State
            holds: all of these are named, and no State is changed.

        Examples
        --------
        >>> from brainstate import State, graph
        >>> states = graph.FlattedDict({("w",): State(1.0)})
        >>> states.assign_dict_values({("w",): 5.0})
        >>> states.w
        State(5.0)
        """
        assign(self, loadable("data", self, data, whole=True))

    @staticmethod
    def _key(name):
        return (name,)


class NestedDict(_PathMapping[Any, Any]):
    """Nested dicts from names to States, snapshots, values or gradients, and a pytree sorted at each level.

    Plain dicts that are given become levels. Attribute access looks up a key: ``tree.layer.w`` is
    ``tree['layer']['w']``.

    Examples
    --------
    >>> from brainstate import graph
    >>> tree = graph.NestedDict({"layer": {"w": 1.0, "b": 2.0}})
    >>> tree.layer.w
    1.0
    >>> tree.filter(lambda path, x: x > 1).to_flat()
    FlattedDict({
      ('layer', 'b'): 2.0,
    })
    """

    __slots__ = ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for key, x in self.items():
            self[key] = x

    def __setitem__(self, key, x):
        super().__setitem__(key, NestedDict(x) if type(x) is dict else x)

    @classmethod
    def _from_paths(cls, flat):
        root = cls.__new__(cls)
        for path, x in flat.items():
            level = root
            for key in path[:-1]:
                if key not in level:
                    dict.__setitem__(level, key, cls.__new__(cls))
                level = level[key]
                if not isinstance(level, NestedDict):
                    raise StateValueError(f"{path!r} leads through a value: one path is the beginning of another.")
            if not path or isinstance(level.get(path[-1]), NestedDict):
                raise StateValueError(
                    f"{path!r} has no place in nested dicts: it is empty, or the beginning of another."
                )
            dict.__setitem__(level, path[-1], x)
        return root

    @classmethod
    def from_flat(cls, flat: Mapping) -> Self:
        """Return the nested form of ``{path: x}``."""
        return cls._from_paths(flat)

    def to_flat(self) -> FlattedDict:
        """Return the flat form; empty levels vanish."""
        return FlattedDict._from_paths(dict(_leaves(self, ())))

    def to_dict(self) -> dict:
        """Return plain nested dicts."""
        return {k: x.to_dict() if isinstance(x, NestedDict) else x for k, x in self.items()}

    def to_pure_dict(self) -> dict:
        """Return plain nested dicts of values in place of States or snapshots."""
        return {k: x.to_pure_dict() if isinstance(x, NestedDict) else plain(x) for k, x in self.items()}

    def replace_by_pure_dict(self, data: Mapping) -> None:
        """Take over, in place, the values in plain nested dicts; paths that ``data`` does not mention keep theirs.

        Raises
        ------
        StateValueError
            If ``data`` has a path that is not here, or a value of another structure, shape or dtype than the State or
            snapshot holds: all of these are named, and nothing is changed.
        """
        here = self.to_flat()
        new = loadable("data", here, data)
        assign(here, {path: value for path, value in new.items() if isinstance(here[path], State)})
        for path, value in new.items():
            if isinstance(here[path], State):
                continue
            level = self
            for key in path[:-1]:
                level = level[key]
            old = here[path]
            dict.__setitem__(level, path[-1], old.replace(value) if isinstance(old, TreefyState) else value)


def _pair(targets, data):
    """Return the entries of ``data`` at the paths of ``targets``, as ``{path: value}``, and its other paths."""
    found, others = {}, []
    stack = list(data.items()) if _has_paths(data) else [((), data)]
    while stack:
        path, x = stack.pop()
        if path in targets:
            found[path] = plain(x)
        elif isinstance(x, Mapping):
            stack += [((*path, key), y) for key, y in x.items()]
        else:
            others.append(path)
    return found, others


def _leaves(level, prefix):
    for key, x in level.items():
        if isinstance(x, NestedDict):
            yield from _leaves(x, (*prefix, key))
        else:
            yield (*prefix, key), x


def _has_paths(mapping):
    return bool(mapping) and all(type(key) is tuple for key in mapping)


def _some(filters):
    if not filters:
        raise StateValueError("give at least one filter; `...` selects everything.")
    return filters


def _flat(mapping):
    if isinstance(mapping, _PathMapping):
        return mapping.to_flat()
    if _has_paths(mapping):
        return mapping
    return NestedDict(mapping).to_flat()


def _register(cls):
    def flatten(x):
        keys = tuple(in_order(x))
        return [x[key] for key in keys], keys

    def flatten_with_keys(x):
        keys = tuple(in_order(x))
        return [(jax.tree_util.DictKey(key), x[key]) for key in keys], keys

    def unflatten(keys, values):
        new = cls.__new__(cls)
        dict.update(new, zip(keys, values, strict=True))
        return new

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


_register(FlattedDict)
_register(NestedDict)
