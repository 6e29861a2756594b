"""Sets of input numbers, one for each element of an array: the values of the dependency analysis.

A `Deps` is an array of set numbers, in the shape of the value it describes, and a table of the sets (`Sets`). An
operation that only moves elements (a reshape, a slice, a broadcast) is the same NumPy operation on the set numbers,
whatever the sets hold. Only an operation that combines elements makes new sets, all of them in one sort.

Set 0 is empty and set 1 holds every input. The second is never written out: a value that depends on everything costs
one number for each element, and a union with it costs nothing.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

__all__ = [
    "EMPTY",
    "FULL",
    "Deps",
    "Sets",
    "gather_flat",
    "identity",
    "reduce_groups",
    "same_sizes",
    "share_table",
    "sort_unique",
    "unite",
]

EMPTY, FULL = 0, 1


class Sets(NamedTuple):
    """Numbered sets of inputs: set ``s`` is ``members[bounds[s]:bounds[s + 1]]``, sorted; ``width`` inputs exist."""

    bounds: np.ndarray
    members: np.ndarray
    width: int

    def sizes(self, ids: np.ndarray) -> np.ndarray:
        """Return the number of inputs in each of the sets ``ids``."""
        return np.where(ids == FULL, self.width, self.bounds[ids + 1] - self.bounds[ids])

    def expand(self, ids: np.ndarray) -> np.ndarray:
        """Return the members of the sets ``ids``, one set after the other; the full set counts as empty."""
        starts, lengths = self.bounds[ids], self.bounds[ids + 1] - self.bounds[ids]
        shifts = np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
        return self.members[shifts + np.arange(len(shifts))]


class Deps(NamedTuple):
    """The set of inputs that each element of an array depends on: set numbers, and the table of sets."""

    ids: np.ndarray
    sets: Sets

    def rearrange(self, ids: np.ndarray) -> "Deps":
        """Return an array of the set numbers ``ids`` of the same table."""
        return Deps(ids, self.sets)

    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of the elements (flat) and of the inputs, one pair for each dependency, sorted."""
        ids = self.ids.ravel()
        sizes = self.sets.sizes(ids)
        columns = np.empty(sizes.sum(), np.int64)
        full = np.repeat(ids == FULL, sizes)
        columns[full] = np.tile(np.arange(self.sets.width), np.count_nonzero(ids == FULL))
        columns[~full] = self.sets.expand(ids)
        return np.repeat(np.arange(ids.size), sizes), columns


def sort_unique(keys: np.ndarray) -> np.ndarray:
    """Return the different numbers among ``keys``, sorted; ``np.unique`` hashes, ten times slower on regular keys."""
    keys = np.sort(keys)
    return keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if keys.size else keys


def identity(start: int, shape: tuple[int, ...], width: int) -> Deps:
    """Return the dependencies of the inputs themselves: element ``i`` is input ``start + i`` of ``width``."""
    size = int(np.prod(shape))
    ids = np.full(size, FULL) if width == 1 else np.arange(2, 2 + size)
    bounds = np.concatenate([[0, 0], np.arange(size + 1)])
    return Deps(ids.reshape(shape), Sets(bounds, np.arange(start, start + size), width))


def _unions(pieces: Iterable[tuple[np.ndarray, Deps]], count: int) -> Deps:
    """Return for each of ``count`` groups the union of the sets assigned to it, as pairs of arrays (group, deps)."""
    pieces, keys, width = list(pieces), [], 0
    full = np.zeros(count, bool)
    for group, deps in pieces:
        width = deps.sets.width
        full[group[deps.ids == FULL]] = True
    for group, (ids, sets) in pieces:
        wanted = (ids > FULL) & ~full[group]
        group, ids = group[wanted], ids[wanted]
        lengths = sets.bounds[ids + 1] - sets.bounds[ids]
        keys.append(np.repeat(group, lengths) * width + sets.expand(ids))
    groups, members = np.divmod(sort_unique(np.concatenate(keys)), width)
    sizes = np.bincount(groups, minlength=count)
    full |= sizes == width
    keep = ~full[groups]
    sizes[full] = 0
    ids = np.where(full, FULL, EMPTY)
    filled = sizes > 0
    ids[filled] = 2 + np.arange(np.count_nonzero(filled))
    return Deps(ids, Sets(np.concatenate([[0, 0, 0], np.cumsum(sizes[filled])]), members[keep], width))


def reduce_groups(pieces: Sequence[tuple[np.ndarray, Deps]], shape: tuple[int, ...]) -> Deps:
    """Return an array of ``shape`` whose element ``g`` (flat) has the union of all elements with the group ``g``."""
    once = []
    for group, (ids, sets) in pieces:
        group, ids = np.broadcast_arrays(group, ids)
        pairs = sort_unique(group.astype(np.int64).ravel() * len(sets.bounds) + ids.ravel())
        once.append((pairs // len(sets.bounds), Deps(pairs % len(sets.bounds), sets)))
    merged = _unions(once, int(np.prod(shape)))
    return merged.rearrange(merged.ids.reshape(shape))


def unite(parts: Sequence[Deps]) -> Deps:
    """Return the union, element by element, of arrays of one shape."""
    result, *others = parts
    for other in others:
        if result.sets is other.sets and np.array_equal(result.ids, other.ids):
            continue
        # Equal pairs of sets have equal unions: each pair is united once.
        pairs, places = np.unique(result.ids.ravel() * len(other.sets.bounds) + other.ids.ravel(), return_inverse=True)
        left, right = np.divmod(pairs, len(other.sets.bounds))
        groups = np.arange(len(pairs))
        merged = _unions([(groups, Deps(left, result.sets)), (groups, Deps(right, other.sets))], len(pairs))
        result = merged.rearrange(merged.ids[places].reshape(result.ids.shape))
    return result


def share_table(parts: Sequence[Deps]) -> list[Deps]:
    """Return the same dependencies with one common table, so that their set numbers may stand in one array."""
    tables, starts, shift = {}, {}, 0
    used = [_compact(part) for part in parts] if len({id(part.sets) for part in parts}) > 1 else parts
    for part in used:
        if id(part.sets) not in starts:
            tables[id(part.sets)], starts[id(part.sets)] = part.sets, shift
            shift += len(part.sets.bounds) - 3
    sets = list(tables.values())
    sizes = np.concatenate([np.diff(table.bounds)[2:] for table in sets])
    members = np.concatenate([table.members for table in sets])
    table = sets[0] if len(sets) == 1 else Sets(np.concatenate([[0, 0, 0], np.cumsum(sizes)]), members, sets[0].width)
    return [Deps(np.where(part.ids > FULL, part.ids + starts[id(part.sets)], part.ids), table) for part in used]


def _compact(deps: Deps) -> Deps:
    """Drop the sets that no element has, where these are many."""
    ids, sets = deps
    if len(sets.bounds) < 2 * ids.size + 16:
        return deps
    kept, places = np.unique(np.concatenate([[EMPTY, FULL], ids.ravel()]), return_inverse=True)
    bounds = np.concatenate([[0], np.cumsum(sets.bounds[kept + 1] - sets.bounds[kept])])
    return Deps(places[2:].reshape(ids.shape), Sets(bounds, sets.expand(kept), sets.width))


def gather_flat(deps: Deps, places: np.ndarray) -> Deps:
    """Return the elements at ``places`` (flat); where a place is negative, one that depends on nothing."""
    padded = np.append(deps.ids.ravel(), EMPTY)
    return deps.rearrange(padded[np.where(places < 0, deps.ids.size, places)])


def same_sizes(a: Deps | None, b: Deps | None) -> bool:
    """Tell whether the sets are equally large: if those of ``a`` lie in those of ``b``, whether they are the same."""
    if a is None or b is None:
        return a is b
    return np.array_equal(a.sets.sizes(a.ids), b.sets.sizes(b.ids))
