"""NumPy in place of XLA, for tests that run many different programs once.

What runs is what JAX made of a function: equations that follow one another, with programs inside of some. Here
NumPy runs them. Keys are what they consist of, two uint32 seen as one uint64, so that NumPy moves them like numbers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.extend.core import Literal, find_top_trace, primitives, set_current_trace


def _is_key(dtype):
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _lower(x):
    """Return a value of JAX as NumPy has it."""
    if _is_key(jnp.result_type(x)):
        return np.asarray(jax.random.key_data(x)).view(np.uint64)[..., 0]
    return np.asarray(x)


def _lift(x, dtype):
    """Return what NumPy computed as a value of JAX."""
    if _is_key(dtype):
        return jax.random.wrap_key_data(_halves(x))
    return jax.device_put(np.asarray(x))


def _halves(key):
    return np.asarray(key, order="C")[..., None].view(np.uint32)


def _evaluate(jaxpr, *args):
    """Run a program on values of NumPy."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)  # closed or not
    consts = map(_lower, getattr(jaxpr, "consts", ()))
    env = dict(zip([*inner.constvars, *inner.invars], [*consts, *args], strict=True))

    def read(atom):
        return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, Literal) else env[atom]

    for eqn in inner.eqns:
        name, values = eqn.primitive.name, [read(atom) for atom in eqn.invars]
        if name in _NUMPY:
            out = _NUMPY[name](*values, **eqn.params)
        else:
            with eqn.ctx.manager:
                values = [_lift(x, atom.aval.dtype) for x, atom in zip(values, eqn.invars, strict=True)]
                out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
            out = jax.tree.map(_lower, out)
        for var, value in zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True):
            assert value.shape == var.aval.shape
            assert value.dtype == (np.uint64 if _is_key(var.aval.dtype) else var.aval.dtype)
            env[var] = value
    return [read(atom) for atom in inner.outvars]


def _run_scan(*args, jaxpr, length, reverse, **params):
    if "ft_in" in params:  # newer JAX
        consts, carry, xs = (list(part) for part in params["ft_in"].update(args).unpack())
    else:
        count, end = params["num_consts"], params["num_consts"] + params["num_carry"]
        consts, carry, xs = args[:count], args[count:end], args[end:]
    ys = []
    for i in reversed(range(length)) if reverse else range(length):
        out = _evaluate(jaxpr, *consts, *carry, *(x[i] for x in xs))
        carry = out[: len(carry)]
        ys.append(out[len(carry) :])
    if not ys:
        avals = jaxpr.out_avals[len(carry) :]
        return [*carry, *(np.zeros((0, *a.shape), np.uint64 if _is_key(a.dtype) else a.dtype) for a in avals)]
    return [*carry, *(np.stack(y[::-1] if reverse else y) for y in zip(*ys, strict=True))]


def _run_while(*args, cond_jaxpr, cond_nconsts, body_jaxpr, body_nconsts):
    test, body = args[:cond_nconsts], args[cond_nconsts : cond_nconsts + body_nconsts]
    carry = args[cond_nconsts + body_nconsts :]
    while np.any(goes_on := _evaluate(cond_jaxpr, *test, *carry)[0]):
        new = _evaluate(body_jaxpr, *body, *carry)
        if goes_on.ndim:  # mapped, and the lanes disagree
            lead = [goes_on.reshape(goes_on.shape + (1,) * (x.ndim - goes_on.ndim)) for x in new]
            new = [np.where(on, x, old) for on, x, old in zip(lead, new, carry, strict=True)]
        carry = new
    return list(carry)


# What holds programs: how it runs, and the dtypes of its results.
_HOLDERS = {
    "scan": (_run_scan, lambda jaxpr, **_: jaxpr.out_avals),
    "while": (_run_while, lambda body_jaxpr, **_: body_jaxpr.out_avals),
    "cond": (
        lambda index, *args, branches, **_: _evaluate(branches[int(index)], *args),
        lambda branches, **_: branches[0].out_avals,
    ),
    "jit": (lambda *args, jaxpr, **_: _evaluate(jaxpr, *args), lambda jaxpr, **_: jaxpr.out_avals),
    "remat": (lambda *args, jaxpr, **_: _evaluate(jaxpr, *args), lambda jaxpr, **_: [v.aval for v in jaxpr.outvars]),
}


def _broadcast(x, shape, broadcast_dimensions, **_):
    sizes = dict(zip(broadcast_dimensions, x.shape, strict=True))
    return np.broadcast_to(x.reshape([sizes.get(i, 1) for i in range(len(shape))]), shape)


def _iota(*, dtype, shape, dimension, **_):
    return _broadcast(np.arange(shape[dimension], dtype=dtype), shape, (dimension,))


def _dynamic_slice(x, *starts, slice_sizes):
    fits = [min(max(int(at), 0), n - size) for at, n, size in zip(starts, x.shape, slice_sizes, strict=True)]
    return x[tuple(slice(at, at + size) for at, size in zip(fits, slice_sizes, strict=True))]


def _threefry(key, high, low):
    """Return what the cipher makes of two uint32: 20 rounds (Salmon et al., 2011)."""
    k0, k1 = np.moveaxis(_halves(key), -1, 0)
    keys = (k0, k1, k0 ^ k1 ^ np.uint32(0x1BD11BDA))
    x0, x1 = high + k0, low + k1
    for i in range(5):
        for by in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(by) | x1 >> np.uint32(32 - by)) ^ x0
        x0, x1 = x0 + keys[(i + 1) % 3], x1 + keys[(i + 2) % 3] + np.uint32(i + 1)
    return x0, x1


def _positions(keys, shape):
    """Return what the cipher makes of each position in an array, under each key."""
    count = np.arange(math.prod(shape), dtype=np.uint64).reshape(shape)
    high, low = (count >> np.uint64(32)).astype(np.uint32), count.astype(np.uint32)
    return _threefry(keys.reshape(keys.shape + (1,) * len(shape)), high, low)


def _split(keys, *, shape):
    return np.stack(_positions(keys, shape), -1).view(np.uint64)[..., 0]


def _fold_in(keys, data):
    return np.stack(_threefry(keys, np.uint32(0), data), -1).view(np.uint64)[..., 0]


def _bits(keys, *, shape, bit_width):
    high, low = _positions(keys, shape)
    if bit_width == 64:
        return high.astype(np.uint64) << np.uint64(32) | low
    return (high ^ low).astype(f"uint{bit_width}")


def _plain(function):
    return lambda *args, **_: function(*args)


def _reduction(function):
    return lambda x, axes, **_: function(x, axis=axes)


# The commonest operations in NumPy: JAX would compile each of them for each shape that a program happens to have.
_OPERATIONS = {
    **{name: _plain(getattr(np, name)) for name in ("sin", "cos", "tanh", "exp", "log", "sqrt", "square", "sign")},
    "erf_inv": _plain(scipy.special.erfinv),
    "abs": _plain(np.abs),
    "add": _plain(np.add),
    "add_jaxvals": _plain(np.add),
    "mul": _plain(np.multiply),
    "sub": _plain(np.subtract),
    "neg": _plain(np.negative),
    "max": _plain(np.maximum),
    "min": _plain(np.minimum),
    "clamp": _plain(lambda low, x, high: np.minimum(np.maximum(x, low), high)),
    "lt": _plain(np.less),
    "le": _plain(np.less_equal),
    "gt": _plain(np.greater),
    "ge": _plain(np.greater_equal),
    "eq": _plain(np.equal),
    "ne": _plain(np.not_equal),
    "and": _plain(np.bitwise_and),
    "or": _plain(np.bitwise_or),
    "xor": _plain(np.bitwise_xor),
    "not": _plain(np.invert),
    "rem": _plain(np.fmod),
    "integer_pow": lambda x, y: np.power(x, np.asarray(y, x.dtype)),
    "shift_left": _plain(np.left_shift),
    "shift_right_logical": _plain(np.right_shift),
    "random_split": _split,
    "random_fold_in": _fold_in,
    "random_bits": _bits,
    "bitcast_convert_type": lambda x, new_dtype: x.view(new_dtype),
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda *xs, dimension: np.concatenate(xs, dimension),
    "convert_element_type": lambda x, new_dtype, **_: x.astype(new_dtype),
    "dynamic_slice": _dynamic_slice,
    "iota": _iota,
    "reduce_sum": lambda x, axes, **_: x.sum(axes, dtype=x.dtype),
    "reduce_max": _reduction(np.max),
    "reduce_or": _reduction(np.bitwise_or.reduce),
    "reduce_and": _reduction(np.bitwise_and.reduce),
    "reshape": lambda x, new_sizes, **_: x.reshape(new_sizes),
    "squeeze": lambda x, dimensions: x.squeeze(dimensions),
    "transpose": lambda x, permutation: x.transpose(permutation),
    "slice": lambda x, start_indices, limit_indices, strides: x[
        tuple(slice(*at) for at in zip(start_indices, limit_indices, strides or [1] * x.ndim, strict=True))
    ],
    "select_n": lambda which, *cases: (
        np.where(which, cases[1], cases[0]) if len(cases) == 2 else np.choose(which, cases)
    ),
}
_PRIMITIVES = {getattr(primitives, f"{name}_p"): run for name, run in _OPERATIONS.items()}
_NUMPY = {primitive.name: run for primitive, run in _PRIMITIVES.items()}
_PROGRAMS = {getattr(primitives, f"{name}_p"): holder for name, holder in _HOLDERS.items()}
_NUMPY |= {primitive.name: run for primitive, (run, _) in _PROGRAMS.items()}
_NUMPY |= {"random_wrap": lambda x, **_: x.view(np.uint64)[..., 0], "random_unwrap": _halves}


def _in_numpy(primitive, run):
    """Return what JAX calls for an operation outside of all programs."""

    def impl(*args, **params):
        keys = [x.dtype for x in args if isinstance(x, jax.Array) and _is_key(x.dtype)]
        out = run(*map(_lower, args), **params)
        made = keys and out.dtype == np.uint64 and primitive is not primitives.random_bits_p
        return _lift(out, keys[0] if made else out.dtype)

    return impl


def _holding(run, avals, otherwise):
    """Return the same for what holds programs."""

    def impl(*args, **params):
        if "name" in params and len(eqns := params["jaxpr"].eqns) == 1 and eqns[0].primitive.name == params["name"]:
            return otherwise(*args, **params)  # this is how JAX runs a single operation
        out = run(*map(_lower, args), **params)
        return [_lift(x, aval.dtype) for x, aval in zip(out, avals(**params), strict=True)]

    return impl


_IMPLEMENTATIONS = {primitive: _in_numpy(primitive, run) for primitive, run in _PRIMITIVES.items()}
_IMPLEMENTATIONS |= {primitive: _holding(*holder, primitive.impl) for primitive, holder in _PROGRAMS.items()}


def interpreted(run):
    """Return ``run()``, and let NumPy compute, operation by operation, so that it compiles next to nothing.

    Programs are traced, differentiated and mapped as ever; only the last step, XLA, is left out.
    """
    before = {primitive: primitive.impl for primitive in _IMPLEMENTATIONS}
    at_once, results = find_top_trace(()), []

    def inside(x):
        with set_current_trace(at_once), np.errstate(all="ignore"):
            results.append(run())
        return x

    try:
        for primitive, rule in _IMPLEMENTATIONS.items():
            primitive.def_impl(rule)
        # `jax.jit` compiles at once, and does not ask what implements it, unless there is a named axis.
        jax.vmap(inside, axis_name="interpreted")(np.zeros(1))
        return results[0]
    finally:
        for primitive, rule in before.items():
            primitive.def_impl(rule)
