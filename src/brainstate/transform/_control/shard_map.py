"""``shard_map``: run a function on the shards of arrays over a device mesh, with States.

A State is replicated unless it is declared to be sharded by a ``PartitionSpec``; inside, the function sees the shard
of its device, and the shards that it writes are put together by the same spec. A replicated State must be written
with the same value on all devices (after a ``psum`` or ``pmean``). Each device draws random numbers of its own, from
the generator's key and the position of the device; the generator advances once.

A derivative taken inside of a replicated State is already summed over the devices by JAX: take ``pmean`` of the loss,
not of the gradient.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from ..._compat import varying_axes
from ..._copies import Remade
from ..._errors import BatchAxisError, StateValueError
from ..._functions import boundary, check_function
from ..._seam.packing import Writes
from ..._seam.scope import Scope, commit, gather
from ..._seam.staging import Restart, catch_restart, stage
from .._select_states import chooser, draws
from .._wrapper import resemble

__all__ = ["Sharded", "shard_map"]


class _Shard(Scope):
    """A staging scope that shows the shard of a State that a device has; ``types(state, leaves)`` are those of it."""

    def __init__(self, types):
        super().__init__("shard_map", stages=True)
        self._shard_types, self._mesh = types, jax.sharding.get_abstract_mesh()

    def _types(self, state, leaves):
        with jax.sharding.use_abstract_mesh(self._mesh):  # a read may come from a `shard_map` within this one
            return self._shard_types(state, leaves)


def _spec_rules(state_specs):
    rules = [(spec, chooser("state_specs", states)) for spec, states in (state_specs or {}).items()]

    def spec_of(state):
        specs = [spec for spec, holds in rules if holds(state)]
        if len(set(specs)) > 1:
            raise StateValueError(f"state_specs declares {state.describe()} with {specs}: give one.")
        return specs[0] if specs else PartitionSpec()

    return spec_of


class Sharded(Remade):
    """A function on the shards of arrays; made by `shard_map`."""

    def __init__(self, f, mesh, in_specs, out_specs, state_specs, axis_names, check_vma):
        check_function("shard_map maps a function", f)
        self.f, self.in_specs, self.out_specs = f, in_specs, out_specs
        self._given, self._names = mesh, frozenset(axis_names)
        self.spec_of, self.check_vma = _spec_rules(state_specs), check_vma
        resemble(self, f)

    @property
    def mesh(self) -> Any:
        """The mesh: as given, or that of the `shard_map` around."""
        return jax.sharding.get_abstract_mesh() if self._given is None else self._given

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the mesh that are mapped."""
        return tuple(n for n in self.mesh.axis_names if n in self._names or not self._names)

    @boundary
    def __call__(self, *args: Any) -> Any:
        """Run the function on all shards and commit its writes."""
        staged = catch_restart(lambda fun: self._map_shards(fun, self.in_specs, self.out_specs)(*args), self._probe)
        lanes = self._lanes(staged)
        after = {s: own[1] for s, own in lanes.items() if not staged.replaces(s)}  # a new seed is an ordinary write
        reads, written = list(staged.reads), [s for s in staged.writes if s not in after]

        def body(values, shards):
            given = dict(zip(reads, values, strict=True))
            for state in filter(self._per_device, reads):
                given[state] = lanes[state][0][self._position()] if state in lanes else self._vary(given[state])
            out, writes = staged(given, shards, {})
            table = dict(zip(writes.states, writes.values, strict=True))
            return out, [table[s] for s in written]

        values = [lanes[s][0] if s in lanes else v for s, v in zip(reads, gather(reads), strict=True)]
        specs = [PartitionSpec() if s in lanes else self.spec_of(s) for s in reads]
        each = self.in_specs if isinstance(self.in_specs, tuple) else (self.in_specs,) * len(args)
        try:
            mapped = self._map_shards(body, (specs, each), (self.out_specs, [self.spec_of(s) for s in written]))
            out, new = mapped(values, args)
        except ValueError as error:
            self._explain(error, written)
            raise
        commit(Writes((*written, *after), [*new, *after.values()]))
        return out

    def _map_shards(self, fun, in_specs, out_specs):
        specs = {"in_specs": in_specs, "out_specs": out_specs}
        return jax.shard_map(fun, mesh=self._given, axis_names=self._names, check_vma=self.check_vma, **specs)

    def _probe(self, *shards):
        raise Restart(stage(self.f, shards, {}, name="shard_map", scope=_Shard(self._types)))

    def _lanes(self, staged):
        """Return {State: (a value for each device, the value afterwards)} of the generators."""
        drawn = [s for s in staged.reads if s in staged.writes and self._per_device(s)]
        return {s: s.lanes(*gather([s]), math.prod(self.mesh.shape[n] for n in self.axes)) for s in drawn}

    def _per_device(self, state):
        """Tell whether each device has a value of its own, though none is declared: a generator."""
        return draws(state) and self.spec_of(state) == PartitionSpec()

    def _vary(self, value, axes=None):
        axes = self.axes if axes is None else axes
        return jax.lax.pcast(value, axes, to="varying") if axes and self.check_vma else value

    def _position(self):
        """Return the number of the device along the mapped axes."""
        index = 0
        for name in self.axes:
            index = index * self.mesh.shape[name] + jax.lax.axis_index(name)
        return index

    def _types(self, state, leaves):
        """Return the types that the leaves of ``state`` have inside."""
        spec = self.spec_of(state)
        unknown = {n for part in spec if part for n in (part if isinstance(part, tuple) else (part,))} - {*self.axes}
        if unknown:
            raise StateValueError(
                f"state_specs declares {state.describe()} with {spec}, and {', '.join(sorted(unknown))} is none of the "
                f"axes that are mapped, {', '.join(self.axes)}."
            )
        try:
            return [self._shard_type(leaf, spec, self._per_device(state)) for leaf in leaves]
        except ValueError as error:
            raise StateValueError(f"{state.describe()} cannot be sharded by {spec}: {error}") from error

    def _shard_type(self, leaf, spec, everywhere):
        """Return the type that a shard of ``leaf`` has inside; asked there, where it says over which axes it varies."""
        whole, names = jax.typeof(leaf), [() if n is None else n if isinstance(n, tuple) else (n,) for n in spec]
        parts = [math.prod(self.mesh.shape[n] for n in axes) for axes in names]
        if len(parts) > whole.ndim or any(size % n for size, n in zip(whole.shape, parts, strict=False)):
            raise ValueError(f"its shape {whole.shape} cannot be divided into {parts}")
        shape = [size // n for size, n in zip(whole.shape, [*parts, *[1] * whole.ndim], strict=False)]
        axes = self.axes if everywhere else tuple(n for group in names for n in group)
        axes, types = tuple(dict.fromkeys((*axes, *varying_axes(leaf)))), []
        jax.eval_shape(
            lambda v: types.append(jax.typeof(self._vary(v, axes))),
            jax.ShapeDtypeStruct(shape, whole.dtype, weak_type=whole.weak_type),
        )
        return types[0]

    def _explain(self, error, written):
        shared = [s.describe() for s in written if self.spec_of(s) == PartitionSpec()]
        if "out_specs" in str(error) and shared:
            raise BatchAxisError(
                f"shard_map: a result or one of the replicated States that are written ({', '.join(shared)}) may "
                f"differ between devices. Reduce it with psum or pmean, or declare it in state_specs. JAX says: {error}"
            ) from error


def shard_map(
    f: Callable,
    *,
    mesh: jax.sharding.Mesh | None = None,
    in_specs: Any,
    out_specs: Any,
    state_specs: dict[PartitionSpec, Any] | None = None,
    axis_names: frozenset[str] | set[str] = frozenset(),
    check_vma: bool = True,
) -> Callable:
    """Run a function on the shards of its arguments: ``jax.shard_map`` that knows States.

    A derivative with respect to a replicated State is summed over the devices already: differentiate the ``pmean`` of
    the loss; the ``pmean`` of a gradient is as many times too large as there are devices.

    Parameters
    ----------
    f : callable
        The function of the shards.
    mesh, in_specs, out_specs, axis_names, check_vma
        As in ``jax.shard_map``. Within another `shard_map` leave the mesh out and name the axes, which are none of its.
    state_specs : {PartitionSpec: State, container, Module, type or filter}, optional
        How States are sharded; those not declared are replicated.

    Returns
    -------
    callable
        The function of whole arrays.

    Raises
    ------
    BatchAxisError
        If devices write different values to a replicated State.
    StateValueError
        If a State cannot be sharded as declared, or is declared twice.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpy as np, brainstate
    >>> from jax.sharding import Mesh, PartitionSpec as P
    >>> mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    >>> total = brainstate.State(jnp.array(0.0))
    >>> def add(x):
    ...     total.value += jax.lax.psum(x.sum(), "d")
    ...     return 2 * x
    >>> run = brainstate.transform.shard_map(add, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    >>> run(jnp.arange(4.0)).tolist(), float(total.value)
    ([0.0, 2.0, 4.0, 6.0], 6.0)
    """
    return Sharded(f, mesh, in_specs, out_specs, state_specs, axis_names, check_vma)
