"""``check_grads``: compares derivatives with central differences, and differentiated calls with plain ones.

Nothing has to be restored afterwards: every evaluation runs in a scope that is never committed. So each begins with the
same States and the same keys, which freezes randomness. To move a State, or to cast it to float64, the scope provides
another value.

The checks see no States, only a `Subject`: a pure function of a flat list of arrays. The derivatives of a subject are
subjects too, and are checked in the same way for higher orders.

Step and tolerance are one number, the cube root of the precision ``u`` of the coarsest type that takes part: the
error of a central difference with step ``h`` is about ``h² + u / h``, least near ``h = u^(1/3)``, where it is
``u^(2/3)``. So ``u^(1/3)`` of the norm as tolerance leaves a wide margin. A derivative outside of it is judged once
more: the spread of the differences with other steps estimates the error of the difference, and twice that is added to
the tolerance.

A derivative along one direction says little of a gradient that is nearly orthogonal to it. So there are several, the
tolerance is relative to the norm over all of them, and no entry of a direction is near zero: one wrong entry of a
gradient is about as visible in every direction. After that each array moves alone, so that a wrong small gradient is
not hidden by a large one.

In single precision a wrong entry may be too small to be told from rounding: one of 1,000, or any one where the value of
the function is large. Then the same function is checked in double precision as well, if it computes there throughout.

One-sided differences show a kink: for a smooth function the right and the left one differ by ``h f''``, which shrinks
with the step; at a kink they differ by the jump of the slope, whatever the step. A kink nearby is not a fault of the
function, and a network of many relus has one within any step: in double precision a smaller step avoids it.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import valid_jaxtype

from ..._arrays import at_least, differentiable
from ..._errors import GradientCheckError, StateValueError
from ..._functions import boundary
from ..._program.interpret import all_equations
from ..._seam.scope import Scope
from .flat_function import call_plainly, is_python, pull_back, random_like, settle, subject_of, wide

__all__ = ["check_grads"]

_MODE_NAMES = ("fwd", "rev")
_CLOSER = 64  # divides the step, to tell a kink at the point from one nearby
_OWN = 1974  # keeps the directions of seed 0 apart from parameters that a user draws with default_rng(0)
_OTHERS = (1 / 2, 5 / 8, 3 / 4, 7 / 8)  # parts of the step; the spread of their differences estimates the error
_NOISE = 16  # units of rounding in the value of a function, by which a difference may be off
_HIDDEN = 0.1  # part of the slope from a typical entry of a gradient; one that is off by less may stay unseen


class _Double(Scope):
    """A scope that provides the value of every State in double precision."""

    opaque = True

    def _inherit(self, state):
        with jax.ensure_compile_time_eval():  # the first read may be inside a loop that is being staged
            return _double(super()._inherit(state))


def _double(tree):
    """Return ``tree`` with its arrays in double precision; a Python number has it already."""

    def cast(leaf):
        if not differentiable(leaf) or is_python(leaf):
            return leaf
        return jnp.asarray(leaf, jnp.complex128 if jnp.iscomplexobj(leaf) else jnp.float64)

    return jax.tree.map(cast, tree)


# ------------------------------------------------------------------------------------------ is it the same?


def _difference(wanted, got) -> str | None:
    """Say where two trees differ by more than rounding, or return None."""
    if jax.tree.structure(wanted) != jax.tree.structure(got):
        return f" has the structure {jax.tree.structure(got)}, not {jax.tree.structure(wanted)}"
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(got), strict=True):
        if not _same_values(a, b):
            return f"{jax.tree_util.keystr(path)} is {_digits(b)}, not {_digits(a)}"
    return None


def _same_values(a, b) -> bool:
    if not valid_jaxtype(a) or not valid_jaxtype(b):
        return a is b or bool(np.all(a == b))
    if jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    if jnp.shape(a) != jnp.shape(b):
        return False
    if not differentiable(a):
        return bool(np.array_equal(np.asarray(a), np.asarray(b)))
    x, y = wide(a), wide(b)
    scale = np.max(np.abs(x[np.isfinite(x)]), initial=0.0)
    return bool(np.allclose(y, x, rtol=0, atol=256 * _unit([a, b]) * scale, equal_nan=True))


def _unit(leaves) -> float:
    """Return the coarsest precision among ``leaves``."""
    return max(float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in leaves)


def _digits(value) -> str:
    if not valid_jaxtype(value):
        return repr(value)
    return np.array2string(np.asarray(value), precision=6, threshold=6, edgeitems=3).replace("\n", "")


# ------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class _Settings:
    """Modes, step, tolerances and directions of one check."""

    modes: tuple[str, ...]
    step: float
    atol: float
    rtol: float
    unit: float
    directions: int
    seed: int

    @classmethod
    def for_types(cls, subject, out, modes, atol, rtol, eps, directions, seed) -> "_Settings":
        """Return the settings for the types of ``subject`` and of its result ``out``."""
        unit = _unit([*subject.leaves, *filter(differentiable, jax.tree.leaves(out))])
        step, relative = (unit ** (1 / 3) if x is None else x for x in (eps, rtol))
        return cls(modes, step, unit ** (2 / 3) if atol is None else atol, relative, unit, directions, seed)

    @property
    def double(self) -> bool:
        """Whether there is room for a smaller step."""
        return self.unit < 1e-12

    def rounding_error(self, value):
        """Return the error of a difference that rounding in ``value`` may cause."""
        return _NOISE * self.unit * np.abs(value) / self.step

    def tolerance(self, a, b, value, norm=0.0):
        """Return the allowed distance of derivative ``a`` and difference ``b``; ``norm`` is the size of its kind."""
        return self.atol + self.rtol * np.maximum(np.maximum(np.abs(a), np.abs(b)), norm) + self.rounding_error(value)

    def is_blind(self, here, norms, count) -> bool:
        """Tell whether one wrong entry among ``count`` may stay unseen, where slopes have these norms."""
        limits = [np.sum(self.tolerance(0.0, 0.0, x, norm) ** 2) for x, norm in zip(here, norms, strict=True)]
        squares = [norm**2 * x.size for x, norm in zip(here, norms, strict=True)]
        return sum(limits) * count > _HIDDEN**2 * sum(squares)

    def nearer(self) -> "_Settings":
        """Return the same with a smaller step."""
        return replace(self, step=self.step / (_CLOSER if self.double else 2))


def _draw(subject, value, settings, number) -> tuple[list, list]:
    """Return the direction and the cotangent of this number."""
    rng = np.random.default_rng((_OWN, settings.seed, number))
    return random_like(rng, subject.leaves), random_like(rng, value)


def _inner_product(xs, ys) -> np.ndarray:
    """Return the terms of the real inner product of two lists of arrays."""
    return np.concatenate([np.real(np.conj(wide(x)) * wide(y)).ravel() for x, y in zip(xs, ys, strict=True)])


# ------------------------------------------------------------------------------------------ results and writes


def _check_effects(subject, plain, settings) -> None:
    """Differentiated or not, the function returns and writes the same; its derivative is the same each time."""
    value, effects = subject.call(subject.leaves)
    _same_call("called with its States given", plain, value, effects)
    direction, cotangent = _draw(subject, value, settings, 0)
    if "fwd" in settings.modes:
        value, tangent, effects = subject.forward(direction)
        _same_call("differentiated in forward mode", plain, value, effects)
        _same_derivative("forward", subject.outputs, tangent, subject.forward(direction)[1])
    if "rev" in settings.modes:
        others = [_draw(subject, value, settings, n)[1] for n in (1, 2)]
        value, gradients, effects, pull = subject.reverse(cotangent, *others)
        _same_call("differentiated in reverse mode", plain, value, effects)
        _same_derivative("reverse", subject.inputs, gradients[0], pull_back(pull, cotangent))
        _same_derivative("reverse", subject.inputs, gradients[0], subject.reverse(cotangent)[1][0])
        _check_batched(subject, pull, [cotangent, *others], gradients)


def _same_call(how, plain, value, effects) -> None:
    out, writes = plain
    wanted = [leaf for leaf in jax.tree.leaves(out) if differentiable(leaf)]
    if found := _difference(wanted, value):
        raise GradientCheckError(
            f"the function returns something else when {how}: output{found}.\n"
            f"likely cause: the forward pass of a custom rule does not compute the function, or code asks whether it "
            f"is differentiated."
        )
    _, _, written = effects.tree()
    _same_writes(f"when {how}", writes, written)


def _same_writes(how, wanted, got) -> None:
    before = dict(zip(wanted.states, wanted.values, strict=True))
    after = dict(zip(got.states, got.values, strict=True))
    for state in before.keys() | after.keys():
        name = state.describe()
        if state not in after:
            raise GradientCheckError(f"{name} is not written {how}, but by a plain call: the write is dropped.")
        if state not in before:
            raise GradientCheckError(f"{name} is written {how}, but not by a plain call.")
        if found := _difference(before[state], after[state]):
            cause = _cause_of_write(state.value, before[state], after[state])
            raise GradientCheckError(f"{name} is left with another value {how}: it{found}.\nlikely cause: {cause}.")


def _cause_of_write(start, wanted, got) -> str:
    if _difference(start, got) is None:
        return "the write is dropped, the State keeps its old value"
    try:
        twice = jax.tree.map(lambda s, w: wide(w) + (wide(w) - wide(s)), start, wanted)
        if _difference(twice, jax.tree.map(wide, got)) is None:
            return "the write happens twice"
    except (TypeError, ValueError):
        pass  # not numbers, or of other shapes than before
    return "a custom transform or rule does not pass on the writes of the function, or code asks whether it is traced"


def _same_derivative(mode, names, first, second) -> None:
    for name, a, b in zip(names, first, second, strict=True):
        if found := _difference(a, b):
            raise GradientCheckError(
                f"the {mode} derivative ({name}) is another one when computed again, although calls agree:{found}.\n"
                f"likely cause: fresh noise in the backward pass or in a replay (a rematerialized function, a custom "
                f"rule), from outside of brainstate.random."
            )


def _check_batched(subject, pull, cotangents, gradients) -> None:
    """Compare the pullback under vmap with the pullback of each cotangent alone."""
    stacked = [jnp.stack([jnp.asarray(c) for c in column]) for column in zip(*cotangents, strict=True)]
    try:
        batched = jax.vmap(lambda c: pull_back(pull, c))(stacked)
    except Exception as error:
        raise GradientCheckError(
            f"the pullback works alone and fails under vmap, as jacrev would call it: {type(error).__name__}: {error}"
        ) from error
    for i, gradient in enumerate(gradients):
        for name, alone, lanes in zip(subject.inputs, gradient, batched, strict=True):
            if found := _difference(alone, lanes[i]):
                raise GradientCheckError(
                    f"the pullback under vmap is not the pullback of each cotangent, with respect to {name}:{found}.\n"
                    f"likely cause: the reverse rule mixes the lanes (a callback, a custom_vmap rule), or is not "
                    f"linear in the cotangent."
                )


# ------------------------------------------------------------------------------------------ against differences

_KINK = (
    "a kink (relu, abs, max, clip at its corner) or a jump (comparison, rounding): the function has no derivative "
    "here. Move the point"
)
_NEARBY = "a kink or a jump closer to the point than the step: float64=True takes a smaller one"
_EDGE = "a value that is not finite, or a step that leaves the domain of the function (log, sqrt, division)"


@dataclass(frozen=True)
class _Finding:
    """Two numbers that do not agree, and the likely cause."""

    kind: str
    output: str
    derivative: Any
    difference: Any
    allowed: float
    cause: str


@dataclass(frozen=True)
class _Probe:
    """A direction with the slopes and bends measured along it, and a cotangent with its gradient."""

    direction: list
    cotangent: list
    gradient: list | None
    slopes: list
    bends: list

    @classmethod
    def measure(cls, subject, settings, here, direction, cotangent, gradient=None) -> "_Probe":
        """Return a probe with its differences, and with its gradient, computed unless given."""
        if gradient is None and "rev" in settings.modes:
            gradient = subject.reverse(cotangent)[1][0]
        return cls(direction, cotangent, gradient, *_slopes(subject, here, direction, settings.step))

    def alone(self, subject, settings, here, number) -> "_Probe":
        """Return the probe along the part of this direction that belongs to one input."""
        direction = [v if k == number else v * 0 for k, v in enumerate(self.direction)]
        return _Probe.measure(subject, settings, here, direction, self.cotangent, self.gradient)


def _norms(probes) -> list[float]:
    """Return for each output the root of the mean square of its slopes."""
    columns = zip(*(probe.slopes for probe in probes), strict=True)
    finite = [np.nan_to_num(np.abs(np.stack(column)), posinf=0) for column in columns]
    return [float(np.sqrt(np.mean(slopes**2))) if slopes.size else 0.0 for slopes in finite]


def _judge(subject, settings, here, probe, norms) -> _Finding | None:
    """Compare the derivatives of ``probe`` with differences; return the first finding."""
    h, slopes, bends, direction = settings.step, probe.slopes, probe.bends, probe.direction
    if not all(np.isfinite(s).all() for s in slopes):
        return _worst("value", subject, [~np.isfinite(s) for s in slopes], here, slopes, _EDGE)
    limits = [settings.tolerance(s, s, x) + settings.unit ** (1 / 3) for s, x in zip(slopes, here, strict=True)]
    # A bend beyond the tolerance may be a kink. It is one if it does not shrink with the step.
    bent = [np.abs(b) > limit for b, limit in zip(bends, limits, strict=True)]
    if any(b.any() for b in bent):
        nearer = settings.nearer()
        bounds = [0.75 * np.abs(b) + nearer.rounding_error(x) for b, x in zip(bends, here, strict=True)]
        found = _slopes(subject, here, direction, nearer.step)[1]
        kinks = [b & (np.abs(y) > bound) for b, y, bound in zip(bent, found, bounds, strict=True)]
        if any(k.any() for k in kinks):
            left = [s - b / 2 for s, b in zip(slopes, bends, strict=True)]
            right = [s + b / 2 for s, b in zip(slopes, bends, strict=True)]
            return _worst("kink", subject, kinks, left, right, _KINK)
    exact = [np.zeros(())] * len(slopes)
    wrong = dict(_disagreements(subject, settings, here, probe, norms, exact))
    if not wrong:
        return None
    # A disagreement counts only beyond the error of the differences, which other steps show.
    others = [_slopes(subject, here, direction, h * part)[0] for part in _OTHERS]
    unsure = [2 * np.max([np.abs(s - t) for t in column], axis=0) for s, *column in zip(slopes, *others, strict=True)]
    if not any(_disagreements(subject, settings, here, probe, norms, unsure)):
        return None
    if any(b.any() for b in bent):
        # A kink within the step spoils the difference; a smaller step avoids it.
        near = replace(settings, step=h / _CLOSER)
        closer = replace(probe, slopes=_slopes(subject, here, direction, near.step)[0])
        if not any(_disagreements(subject, near, here, closer, norms, exact)):
            # In single precision the small step says too little to acquit.
            return None if settings.double else replace(next(iter(wrong.values())), cause=_NEARBY)
    mode, finding = next(iter(wrong.items()))
    return replace(finding, cause=_cause(mode, wrong, finding, settings))


def _slopes(subject, here, direction, h) -> tuple[list, list]:
    """Return the slopes, as central differences, and the bends: by how much right and left slope differ."""
    up, down = subject.value_at(h, direction), subject.value_at(-h, direction)
    with np.errstate(invalid="ignore"):
        slopes = [(u - d) / (2 * h) for u, d in zip(up, down, strict=True)]
        # (f(x+h) - f(x)) / h - (f(x) - f(x-h)) / h, which is h f'' for a smooth function.
        bends = [(u - 2 * x + d) / h for u, x, d in zip(up, here, down, strict=True)]
    return slopes, bends


def _disagreements(subject, settings, here, probe, norms, unsure) -> "Iterator[tuple[str, _Finding]]":
    """Yield ``(mode, finding)`` for each mode that disagrees with the differences, whose error is ``unsure``."""
    slopes, cotangent = probe.slopes, probe.cotangent
    given = list(zip(slopes, here, norms, unsure, strict=True))
    if "fwd" in settings.modes:
        tangents = [wide(t) for t in subject.forward(probe.direction)[1]]
        limits = [settings.tolerance(t, s, x, n) + u for t, (s, x, n, u) in zip(tangents, given, strict=True)]
        wrong = [~(np.abs(t - s) <= limit) for t, s, limit in zip(tangents, slopes, limits, strict=True)]
        if any(w.any() for w in wrong):
            yield "fwd", _worst("forward", subject, wrong, tangents, slopes, "", limits)
    if "rev" in settings.modes:
        terms = _inner_product(cotangent, slopes)
        # <Jᵀ c, v> = <c, J v>: the gradient along the direction against the slopes weighted by the cotangent.
        product, slope = _inner_product(probe.gradient, probe.direction).sum(), terms.sum()
        # Each term may be off by its own limit, at random.
        limits = [settings.tolerance(s, s, x, n) + u for s, x, n, u in given]
        limits = [limit * np.abs(wide(c)) for limit, c in zip(limits, cotangent, strict=True)]
        limit = float(np.sqrt(sum((x**2).sum() for x in limits)))
        if not abs(product - slope) <= limit:
            yield "rev", _Finding("reverse", "cotangent * result", product, slope, limit, "")


def _worst(kind, subject, wrong, derivatives, differences, cause, limits=None) -> _Finding:
    """Return the finding for the entry, among the ``wrong`` ones, that is off most."""
    i = max(range(len(wrong)), key=lambda k: (wrong[k].any(), np.max(np.abs(differences[k]), initial=0)))
    gap = np.where(wrong[i], np.nan_to_num(np.abs(derivatives[i] - differences[i]), nan=np.inf), -1)
    place = np.unravel_index(np.argmax(gap), gap.shape)
    where = subject.outputs[i] + (f"[{', '.join(map(str, place))}]" if place else "")
    limit = 0.0 if limits is None else float(limits[i][place])
    return _Finding(kind, where, derivatives[i][place], differences[i][place], limit, cause)


def _cause(mode, wrong, finding, settings) -> str:
    """Guess the cause of a wrong derivative from the modes that are wrong, and from the numbers."""
    if not settings.double and abs(finding.derivative - finding.difference) < 10 * finding.allowed:
        return "rounding, perhaps, since the numbers are close: float64=True tells"
    if set(settings.modes) == set(_MODE_NAMES) and len(wrong) == 1:
        other = "reverse" if mode == "fwd" else "forward"
        return f"a custom rule, or a transpose: the {other} derivative is right"
    if finding.derivative == 0:
        return "a value that is detached (stop_gradient, rounding, a comparison), or a custom rule that returns zero"
    return "a custom rule (custom_vjp, custom_jvp) that is wrong, or a stop_gradient on a part of the function"


def _report(subject, settings, finding, direction, number, guilty) -> GradientCheckError:
    """Return the error with the full report of a failure."""
    first, second = ("left slope", "right slope") if finding.kind == "kink" else ("derivative", "differences")
    what = {
        "value": f"the value{subject.label} is not finite near the point",
        "kink": f"the slopes{subject.label} to the left and to the right differ",
    }.get(finding.kind, f"the {finding.kind} derivative{subject.label} is wrong")
    lines = [f"{what}.", f"  output          {finding.output}", f"  direction       {number} of seed {settings.seed}"]
    for i, own in guilty[:5]:
        lines.append(f"  with respect to {subject.inputs[i]}, along {_digits(direction[i])}:")
        lines.append(f"    {first} {own.derivative:.8g}, {second} {own.difference:.8g}")
    if len(guilty) > 5:
        lines.append(f"    and {len(guilty) - 5} more")
    if not guilty:
        lines.append(f"  with respect to all of {', '.join(subject.inputs[:5])} together:")
        lines.append(f"    {first} {finding.derivative:.8g}, {second} {finding.difference:.8g}")
    lines.append(f"  step            {settings.step:.2g}, allowed difference {finding.allowed:.2g}")
    lines.append(f"  likely cause    {(guilty[0][1] if guilty else finding).cause}.")
    return GradientCheckError("\n".join(lines))


def _check_order(subject, settings, order) -> bool:
    """Check ``subject`` along random directions, then its derivatives up to ``order``.

    Return whether one wrong entry of a derivative may have stayed unseen.
    """
    value, _ = subject.call(subject.leaves)
    here = [wide(out) for out in value]
    sizes = [np.size(leaf) for leaf in subject.leaves]
    inputs = range(len(sizes))

    def probes(numbers):
        return [_Probe.measure(subject, settings, here, *_draw(subject, value, settings, number)) for number in numbers]

    def alone(probe, i):
        probe = probe.alone(subject, settings, here, i)
        norms = _norms([probe])
        return _judge(subject, settings, here, probe, norms), settings.is_blind(here, norms, sizes[i])

    together = probes(range(settings.directions))
    norms = _norms(together)
    blind = settings.is_blind(here, norms, sum(sizes))
    # All arrays together first: each then is moved alone only to find the ones at fault.
    for number, probe in enumerate(together):
        finding = _judge(subject, settings, here, probe, norms)
        if finding is not None:
            found = [(i, alone(probe, i)[0]) for i in inputs]
            guilty = [(i, own) for i, own in found if own is not None and own.kind == finding.kind]
            raise _report(subject, settings, finding, probe.direction, number, guilty)
    # One more direction, array by array: a wrong small gradient is lost in the sum with a large one.
    for probe in probes([settings.directions]) if len(inputs) > 1 else ():
        for i in inputs:
            finding, hidden = alone(probe, i)
            blind |= hidden
            if finding is not None:
                raise _report(subject, settings, finding, probe.direction, settings.directions, [(i, finding)])
    if order > 1:
        direction, cotangent = _draw(subject, value, settings, 0)
        for derivative in subject.derivatives(settings.modes, direction, cotangent):
            blind |= _check_order(derivative, settings, order - 1)
    return blind


def _in_double(f, args, chosen, options, order, plain) -> None:
    """Check ``f`` in double precision, if it returns ``plain`` there and computes nothing in a lower one."""
    try:
        with jax.enable_x64(True), _Double("check_grads"):
            args = _double(args)
            out = call_plainly("check_grads", f, args)[0]
            subject = replace(subject_of("check_grads", f, args, *chosen), label=" in double precision")
            if _difference(plain, out) is None and _is_double(subject):
                _check_order(subject, _Settings.for_types(subject, out, **options), order)
    except GradientCheckError:
        raise
    except Exception:
        return  # made for one precision only: the finding in that one stands


def _is_double(subject) -> bool:
    """Tell whether the function computes everything but integers in double precision."""
    jaxpr = jax.make_jaxpr(lambda leaves: subject.call(leaves)[0])(subject.leaves)
    found = (v.aval for eqn in all_equations(jaxpr) for v in eqn.outvars)
    types: Any = {getattr(aval, "dtype", None) for aval in found} - {None}
    return all(jnp.finfo(t).bits == 64 for t in types if jnp.issubdtype(t, jnp.inexact))


def _check_options(order, modes, directions) -> tuple[str, ...]:
    at_least("check_grads: order", order, 1, "the order of the highest derivative")
    at_least("check_grads: directions", directions, 1, "the number of random directions")
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    if not modes or set(modes) - set(_MODE_NAMES):
        raise StateValueError(f"check_grads: modes={modes!r}: give 'fwd', 'rev', or both.")
    return modes


@boundary
def check_grads(
    f: Callable,
    *args: Any,
    grad_states: Any = None,
    argnums: int | tuple[int, ...] | list[int] | None = None,
    order: int = 1,
    modes: tuple[str, ...] | str = ("fwd", "rev"),
    atol: float | None = None,
    rtol: float | None = None,
    eps: float | None = None,
    directions: int = 3,
    seed: int = 0,
    float64: bool = False,
) -> None:
    """Check derivatives against central differences: ``jax.test_util.check_grads`` that knows States.

    It also checks that two calls from the same States and keys agree; that a differentiated call has the result and
    the writes of a plain one; that a derivative computed twice agrees; that the pullback works under ``vmap``; and that
    there is no kink. Random numbers are the same in all evaluations, and no State changes, whatever happens.

    Parameters
    ----------
    f : callable
        The function; it may read and write States and draw random numbers, and returns a pytree of arrays.
    *args : pytree
        Its arguments.
    grad_states, argnums
        See `GradientTransform`; without both, every argument that holds floating or complex values only.
    order : int
        Check derivatives up to this order: with both modes and 2, all four of forward and reverse over each other.
    modes : 'fwd', 'rev' or both
        Forward mode, reverse mode. A ``custom_vjp`` has no forward, a while loop no reverse derivative.
    atol, rtol : float, optional
        Tolerances: absolute, by default the precision to the power of 2/3 (4e-11 in float64); and relative to the norm
        of the derivatives along all directions, by default the cube root of the precision (6e-6).
    eps : float, optional
        The step; by default likewise.
    directions : int
        Number of random directions to try, along which all arrays move. Then each array moves alone.
    seed : int
        The seed of the directions.
    float64 : bool
        Check in double precision (recommended): floating arguments and the States that are read are cast for the time
        of the check, and ``jax.enable_x64`` is set. Arrays that the function holds itself stay as they are.

    Raises
    ------
    GradientCheckError
        If anything is wrong; the message names the State or argument, both numbers and the likely cause.
    StateTypeError, StateValueError
        If the function or the selection of differentiated values cannot be used, as in `GradientTransform`.

    Notes
    -----
    A State that the function creates in its first call, and keeps, gets its value as in a plain call.

    The entries of a direction are random signs times numbers between 2/3 and 4/3. So a single wrong entry of a gradient
    is seen if it is off by more than the tolerance times the norm of the gradient, in every direction. In single
    precision it may be hidden: one entry of some hundred, or any where the function is much larger than its derivative.
    Without tolerances of one's own the function is then checked in double precision as well, where it runs there,
    returns the same, and computes in no lower precision. Where it does not, an error that is hidden so is not found.

    Examples
    --------
    >>> import jax.numpy as jnp, brainstate
    >>> w = brainstate.ParamState(jnp.array([1.0, 2.0]))
    >>> brainstate.transform.check_grads(lambda x: jnp.sin(w.value * x), 3.0, grad_states=w, argnums=0, order=2)
    """
    modes = _check_options(order, modes, directions)
    subject_of("check_grads", f, args, grad_states, argnums)
    plain, again = settle("check_grads", f, args), call_plainly("check_grads", f, args)[:2]
    if found := _difference(plain[0], again[0]):
        raise GradientCheckError(
            f"two calls with the same States and keys return different results: result{found}.\nlikely cause: the "
            f"function draws from outside of brainstate.random (NumPy, Python's random), counts its calls, or changes "
            f"an object that it reads."
        )
    _same_writes("by a second call from the same States and keys", plain[1], again[1])
    options = dict(modes=modes, atol=atol, rtol=rtol, eps=eps, directions=directions, seed=seed)
    with jax.enable_x64(True) if float64 else contextlib.nullcontext(), (_Double if float64 else Scope)("check_grads"):
        given = _double(args) if float64 else args
        called = call_plainly("check_grads", f, given)[:2]
        subject = subject_of("check_grads", f, given, grad_states, argnums)
        settings = _Settings.for_types(subject, called[0], **options)
        _check_effects(subject, called, settings)
        blind = _check_order(subject, settings, order)
    if blind and not settings.double and atol is None and rtol is None:
        _in_double(f, args, (grad_states, argnums), options, order, plain[0])
