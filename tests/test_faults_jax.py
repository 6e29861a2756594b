"""Faults where ours and JAX's transforms were not alike: control flow, checkpoint, jit, vmap; and what errors show."""

import contextlib
import dataclasses
import functools
import logging
import re
import traceback
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import brainstate
from _unchanged import unchanged
from brainstate import ParamState, State, StateTypeError, StateValueError, nn
from brainstate import random as R
from brainstate import transform as T
from transforms import rows

OURS = str(Path(brainstate.__file__).parent)
MESH = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
LAYERS = str(Path(nn.__file__).parent)
D = P("d")
XS, W = jnp.arange(3.0), ParamState(jnp.array(1.0), name="w")


# ------------------------------------------------------------------------------------------ errors of the user


def broken(x):
    """Fail as a user's function does, in JAX."""
    return jnp.dot(jnp.ones(2) * x, jnp.ones(3))


@contextlib.contextmanager
def option(name, value):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


def devices(f, specs=D):
    """Map over a mesh of one device, where all that JAX checks of several is checked."""
    return T.shard_map(f, mesh=MESH, in_specs=specs, out_specs=specs)


PATTERNS = ("jacobian_sparsity", "hessian_sparsity")  # which show all frames
RUNS = {
    name: lambda f, row=row: row.run(f)(1.0)
    for name, row in rows(lambda row: row.run and row.name not in PATTERNS).items()
} | {
    "jit that reads": lambda f: T.jit(lambda x: f(W.value * x))(1.0),
    "jit of grad": lambda f: T.jit(T.grad(f))(1.0),
    "grad of a State": lambda f: T.grad(lambda: f(W.value), W)(),
    "map in batches": lambda f: T.map(f, XS, batch_size=2),
    "lower": lambda f: T.jit(f).lower(1.0),
    "deep": lambda f: T.jit(lambda x: T.for_loop(lambda y: T.grad(T.checkpoint(f))(y), x))(XS),
}


def frames(run, f=broken):
    """Return the files of the traceback, from here on."""
    with pytest.raises(Exception) as caught:
        run(f)
    return [entry.filename for entry in traceback.extract_tb(caught.value.__traceback__)], caught.value


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_d_the_traceback_is_the_users(run):
    files, error = frames(run)
    assert isinstance(error, TypeError) and __file__ in files[2:]
    assert sum(file.startswith(OURS) for file in files) <= 2
    assert len(files) <= 10  # this helper, this file, what fails, JAX


def test_d_a_traceback_with_all_frames():
    with option("jax_traceback_filtering", "off"):
        files, _ = frames(RUNS["jit of grad"])
    assert sum(file.startswith(OURS) for file in files) > 5


def test_d_a_traceback_of_our_own_error():
    files, error = frames(lambda f: T.jit(lambda x: T.cond(x, f, f))(XS))
    assert isinstance(error, StateTypeError) and sum(file.startswith(OURS) for file in files) <= 2


def test_d_a_traceback_shows_the_innermost_layer():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 3)), nn.Linear(4, 5))
    files, _ = frames(lambda f: T.jit(model)(jnp.ones(2)))
    assert sum(file.startswith(LAYERS) for file in files) <= 1
    assert sum(file.startswith(OURS) for file in files) <= 2


def test_d_causes_are_cut_as_well():
    def f(x):
        try:
            return T.jit(broken)(x)
        except TypeError as error:
            raise KeyError("mine") from error

    with pytest.raises(KeyError) as caught:
        T.grad(f)(1.0)
    cause = traceback.extract_tb(caught.value.__cause__.__traceback__)
    assert sum(entry.filename.startswith(OURS) for entry in cause) <= 2 and "broken" in [e.name for e in cause]


def branching(x, y=0.0):
    return x if y > 0 else -x


class Callable_:
    def __call__(self, x):
        return x if x > 0 else -x


NAMED = {
    "jit": (lambda: T.jit(branching)(1.0, 2.0), "branching", "y"),
    "jit, by keyword": (lambda: T.jit(branching)(1.0, y=2.0), "branching", "y"),
    "scan": (lambda: T.scan(lambda c, x: (c, branching(c, x)), 0.0, XS), "<lambda>", "x"),
    "vmap": (lambda: T.jit(T.vmap(branching))(XS, XS), "branching", "y"),
    "checkpoint": (lambda: T.checkpoint(branching)(1.0, 2.0), "branching", "y"),
    "cond": (lambda: T.cond(True, branching, branching, 1.0, 2.0), "branching", "y"),
    "partial": (lambda: T.jit(functools.partial(branching, 1.0))(2.0), "branching", "y"),
    "object": (lambda: T.jit(Callable_())(2.0), "__call__", "x"),
    "grad": (lambda: T.jit(T.grad(branching))(1.0, 2.0), "branching", "y"),
    "for_loop": (lambda: T.for_loop(lambda y: branching(1.0, y), XS), "<lambda>", ""),
}


@pytest.mark.parametrize(("run", "name", "argument"), NAMED.values(), ids=NAMED)
def test_d_jax_names_the_users_function(run, name, argument):
    with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
        run()
    text = str(caught.value)
    assert re.search(rf"the function {re.escape(name)} at {re.escape(__file__)}:\d+", text), text
    assert f"the value of the argument {argument}" in text, text


def test_d_jax_names_the_place_of_the_user_in_its_log(caplog):
    f = T.jit(lambda x: x * 2.0)
    with option("jax_explain_cache_misses", True), caplog.at_level(logging.WARNING, "jax"):
        f(1.0)
        f(jnp.ones(3))
    text = caplog.text
    assert f"{__file__}:" in text and OURS not in text


def test_d_reverse_mode_of_a_while_loop():
    for run in (T.grad, T.jacrev, lambda f: T.jit(T.grad(f)), lambda f: lambda x: T.vjp(f, x)[1](1.0)):
        with pytest.raises(ValueError, match=r"Reverse-mode .* does not work.*bounded_while_loop.*max_steps") as caught:
            run(lambda x: T.while_loop(lambda c: c < 3.0, lambda c: c * 2.0, x))(1.0)
        assert str(caught.value).count("bounded_while_loop") == 1


# ------------------------------------------------------------------------------------------ what is refused


def generator(x):
    yield x


def generators(x):
    return (x for _ in range(3))


class Plain:
    s = State(jnp.array(0.0), name="s")


REFUSED = {
    "jit of a generator": (
        lambda: T.jit(generator),
        StateTypeError,
        r"jit compiles a function; got the generator f",
    ),
    "vmap of a generator": (lambda: T.vmap(generator), StateTypeError, r"the generator function generator"),
    "grad of a generator": (lambda: T.grad(generator), StateTypeError, r"the generator function generator"),
    "scan of a generator": (lambda: T.scan(generator, 0.0, XS), StateTypeError, r"the generator function generator"),
    "map of a generator": (lambda: T.map(generator, XS), StateTypeError, r"map takes functions; got the generator"),
    "checkpoint of a generator": (lambda: T.checkpoint(generator), StateTypeError, r"the generator function"),
    "jit of a staticmethod": (lambda: T.jit(staticmethod(branching)), StateTypeError, r"put @staticmethod above"),
    "vmap of a staticmethod": (lambda: T.vmap(staticmethod(branching)), StateTypeError, r"put @staticmethod above"),
    "a generator returned": (lambda: T.jit(generators)(1.0), StateTypeError, r"generators returned a generator, which"),
    "a generator in a list": (
        lambda: T.vmap(lambda x: [x, generators(x)])(XS),
        StateTypeError,
        r"returned a generator at \[1\], which is not a JAX type: brainstate.transform.vmap takes and returns",
    ),
    "text returned by a body": (
        lambda: T.scan(lambda c, x: (c, "a"), 0.0, XS),
        StateTypeError,
        r"returned a str at \[1\], which is not a JAX type: brainstate.transform.scan",
    ),
    "eval_shape": (lambda: T.eval_shape(3), StateTypeError, r"eval_shape takes a function; got int"),
    "make_jaxpr": (lambda: T.make_jaxpr(3), StateTypeError, r"make_jaxpr takes a function; got int"),
    "checkify": (lambda: T.checkify(3), StateTypeError, r"checkify takes a function; got int"),
    "for_loop": (lambda: T.for_loop(None, XS), StateTypeError, r"for_loop takes functions; got NoneType"),
    "switch over None": (
        lambda: T.switch(1, None),
        StateTypeError,
        r"switch: branches is a NoneType: give a list",
    ),
    "ifelse over None": (lambda: T.ifelse([True], None), StateTypeError, r"ifelse: branches is a NoneType"),
    "donate_states": (lambda: T.jit(branching, donate_states="yes"), StateTypeError, r"donate_states='yes': give True"),
    "donate_states=1": (lambda: T.jit(donate_states=1)(branching), StateTypeError, r"donate_states=1: give True or F"),
    "NaN": (lambda: T.cond(jnp.nan, lambda: 1, lambda: 2), StateValueError, r"cond: pred is NaN, which is neither"),
    "NaN of Python": (lambda: T.cond(float("nan"), lambda: 1, lambda: 2), StateValueError, r"pred is NaN"),
    "NaN of several": (lambda: T.ifelse([np.nan], [lambda: 1]), StateValueError, r"condition 0 is NaN"),
    "complex": (lambda: T.cond(1j, lambda: 1, lambda: 2), StateTypeError, r"pred is complex64\[\], which is neither"),
    "a key": (lambda: T.cond(jax.random.key(0), lambda: 1, lambda: 2), StateTypeError, r"pred is key<fry>\[\], which"),
    "map over a number": (
        lambda: T.map(jnp.sin, 3.0),
        StateValueError,
        r"map: the value to loop over, at \[0\], is f",
    ),
    "loop over a number": (lambda: T.for_loop(jnp.sin, 3.0), StateValueError, r"has no axis to loop over"),
    "scan over a number": (
        lambda: T.scan(lambda c, x: (c, x), 0, {"a": 3}),
        StateValueError,
        r"at \['a'\], is int",
    ),
    "a traced length": (
        lambda: T.jit(lambda n: T.scan(lambda c, _: (c, c), 1.0, length=n))(3),
        StateTypeError,
        r"scan: length is a traced value.*static argument.*while_loop",
    ),
    "a traced length of for_loop": (
        lambda: T.jit(lambda n: T.for_loop(lambda: 1.0, length=n))(3),
        StateTypeError,
        r"length is a traced value",
    ),
    "a traced length of checkpointed_scan": (
        lambda: T.jit(lambda n: T.checkpointed_scan(lambda c, _: (c, c), 1.0, length=n))(3),
        StateTypeError,
        r"checkpointed_scan: length is a traced value",
    ),
    "pbar": (lambda: T.for_loop(jnp.sin, XS, pbar="yes"), StateValueError, r"pbar='yes': give a ProgressBar\(\), or"),
    "pbar of 0": (lambda: T.for_loop(jnp.sin, XS, pbar=0), StateValueError, r"freq=0"),
    "pbar of True": (lambda: T.for_loop(jnp.sin, XS, pbar=True), StateValueError, r"pbar=True"),
    "static_argnums": (lambda: T.checkpoint(branching, static_argnums=2), StateValueError, r"names argument 2 of 2"),
    "static_argnames": (lambda: T.checkpoint(branching, static_argnames="z"), StateValueError, r"no parameter 'z'"),
    "static_argnums of many": (
        lambda: T.checkpoint(lambda *xs: xs[0], static_argnums=2)(1.0),
        StateValueError,
        r"names argument 2 of 1",
    ),
    "a float bound": (
        lambda: T.fori_loop(0.0, 3, lambda i, x: x, 1.0),
        StateTypeError,
        r"lower is float32\[\], an",
    ),
    "a vector bound": (lambda: T.fori_loop(0, XS, lambda i, x: x, 1.0), StateTypeError, r"upper is float32\[3\]"),
    "bounds that differ": (
        lambda: T.fori_loop(jnp.int32(0), jnp.int16(3), lambda i, x: x, 1.0),
        StateTypeError,
        r"lower is int32\[\] and upper is int16\[\]: give both one dtype",
    ),
    "unroll of a traced range": (
        lambda: T.jit(lambda n: T.fori_loop(0, n, lambda i, x: x, 1.0, unroll=2))(3),
        StateValueError,
        r"fori_loop: unroll=2, and a bound is a traced value",
    ),
    "a write in associative_scan": (
        lambda: T.associative_scan(lambda a, b: (setattr(Plain.s, "value", a.sum()), a + b)[1], XS),
        StateValueError,
        r"State 's' is written in associative_scan",
    ),
    "a draw in associative_scan": (
        lambda: T.associative_scan(lambda a, b: a + b + R.normal(), XS),
        StateValueError,
        r"RandomState.* is written in associative_scan",
    ),
}


@pytest.mark.parametrize(("run", "error", "text"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("where", [lambda f: f(), lambda f: T.jit(lambda: (f(), 1.0)[1])()], ids=["alone", "jit"])
def test_d_refused_in_our_words(run, error, text, where):
    with unchanged(Plain.s, R.DEFAULT), pytest.raises(error, match=text):
        where(run)


def test_c_pred_that_is_traced_is_as_in_jax():
    run = lambda cond: lambda p: cond(p, lambda: 1, lambda: 2)  # noqa: E731
    for pred in (jnp.nan, 0.0, 0, 3, True, -0.0, jnp.inf):
        assert T.jit(run(T.cond))(pred) == jax.jit(run(jax.lax.cond))(pred)


def test_d_a_carry_is_named_as_the_user_names_it():
    with pytest.raises(TypeError, match=r"The input carry total has type float32\[\]"):
        T.scan(lambda total, x: (jnp.ones(2), x), 1.0, XS)
    with pytest.raises(TypeError, match=r"input carry component total\[0\] has type float32\[\]"):
        T.while_loop(lambda c: True, lambda total: (jnp.ones(2),), (1.0,))


# ------------------------------------------------------------------------------------------ shard_map


VARYING = {
    "for_loop": lambda s, x: T.for_loop(lambda y: setattr(s, "value", s.value + y), x),
    "in a tree": lambda s, x: T.for_loop(lambda y: setattr(s, "value", s.value * y), x),
    "while_loop": lambda s, x: T.while_loop(
        lambda n: n < 3, lambda n: (setattr(s, "value", s.value + x[0]), n + 1)[1], 0
    ),
    "checkpointed": lambda s, x: T.checkpointed_for_loop(lambda y: setattr(s, "value", s.value + y), x),
    "cond": lambda s, x: T.cond(True, lambda: setattr(s, "value", s.value + x[0]), lambda: None),
    "switch": lambda s, x: T.switch(
        0, [lambda: setattr(s, "value", s.value + x[0]), lambda: setattr(s, "value", s.value + 1.0)]
    ),
}


@pytest.mark.parametrize("run", VARYING.values(), ids=VARYING)
def test_d_a_replicated_state_that_becomes_varying(run):
    s = State(jnp.array(0.0), name="total")

    def f(x):
        run(s, x)
        return x

    pattern = r"State 'total' .*(may differ between the devices of d|is the same on all devices).*psum or pmean"
    with unchanged(s), pytest.raises(StateTypeError, match=pattern):
        devices(f)(XS)


def test_d_results_of_branches_that_vary():
    with pytest.raises(StateTypeError, match=r"cond returns a value that may differ .* from branch 0, and one that is"):
        devices(lambda x: T.cond(x[0] > 0, lambda: x, lambda: jnp.zeros(3)))(XS)


def test_d_a_reduced_state_in_a_loop():
    s = State(jnp.array(0.0), name="total")

    def f(x):
        T.for_loop(lambda y: setattr(s, "value", s.value + jax.lax.psum(y, "d")), x)
        return x

    devices(f)(XS)
    assert s.value == 3.0


# ------------------------------------------------------------------------------------------ checkpoint


def scaled(x, mode="sin", *, times=1):
    for _ in range(times):
        x = getattr(jnp, mode)(x) if isinstance(mode, str) else x * (2.0 if mode else 3.0)
    return x


STATIC = {
    "at its default": (lambda f: f(0.5), {"static_argnums": 1}, 1),
    "by position": (lambda f: f(0.5, True), {"static_argnums": 1}, 1),
    "by keyword": (lambda f: f(0.5, mode=True), {"static_argnums": 1}, 1),
    "by name": (lambda f: f(0.5, mode=False), {"static_argnames": "mode"}, 1),
    "by name and position": (lambda f: f(0.5, False), {"static_argnames": ("mode",)}, 1),
    "keyword only": (lambda f: f(0.5, times=2), {"static_argnames": ["times"]}, 2),
    "negative": (lambda f: f(0.5, True), {"static_argnums": (-1,)}, 1),
    "both": (lambda f: f(0.5, True, times=2), {"static_argnums": (1,), "static_argnames": "times"}, 2),
}


@pytest.mark.parametrize(("call", "options", "times"), STATIC.values(), ids=STATIC)
def test_c_static_arguments_of_checkpoint(call, options, times):
    expected = jax.grad(lambda x: call(lambda _, *a, **k: scaled(x, *a, **k)))(0.5)
    run = T.checkpoint(scaled, **options)
    got = T.grad(lambda x: call(lambda _, *a, **k: run(x, *a, **k)))(0.5)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = ParamState(jnp.array(2.0))

    @functools.partial(T.checkpoint, static_argnums=1)
    def saved(self, x, squared):
        return self.w.value * x ** (2 if squared else 1)

    @functools.partial(T.jit, static_argnums=1)
    def compiled(self, x, squared):
        return self.w.value * x ** (2 if squared else 1)

    @T.jit
    def step(self, x):
        self.w.value = self.w.value + x
        return self.w.value

    @functools.partial(T.grad, argnums=0)
    def slope(self, x):
        return self.w.value * x**2

    @T.vmap
    def lanes(self, x):
        return self.w.value * x


class Derived(Model):
    def step(self, x):
        return Model.step(self, x) * 10.0

    def slope(self, x):
        return Model.slope(self, x) * 10.0

    def saved(self, x, squared):
        return Model.saved(self, x, squared) * 10.0

    def lanes(self, x):
        return Model.lanes(self, x) * 10.0


def test_c_checkpoint_and_jit_count_alike_on_methods():
    m = Model()
    for squared in (False, True):
        assert T.grad(m.saved)(3.0, squared) == T.grad(m.compiled)(3.0, squared) == (12.0 if squared else 2.0)
    assert m.saved(3.0, squared=True) == 18.0


def test_d_a_transformed_method_called_on_its_class():
    m = Derived()
    assert m.step(1.0) == 30.0 and Model.step(m, 1.0) == 4.0 and m.w.value == 4.0
    assert m.slope(1.0) == 80.0 and m.saved(1.0, True) == 40.0
    assert m.lanes(XS).tolist() == [0.0, 40.0, 80.0]
    assert T.jit(lambda x: Model.step(m, x))(1.0) == 5.0 and m.w.value == 5.0
    assert Model.step.__name__ == "step" and callable(Model.step.lower) and "step" in repr(Model.step)


def test_d_a_pytree_is_an_argument_of_its_method():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Point:
        x: jax.Array

        @T.jit
        def norm(self):
            return abs(self.x)

    assert Point.norm(Point(jnp.array(-2.0))) == 2.0 and Point.norm(Point(jnp.array(-3.0))) == 3.0


# ------------------------------------------------------------------------------------------ the new loops


LOOPS_AND_GRADS = (T.grad, T.fori_loop), (jax.grad, jax.lax.fori_loop)


def test_c_fori_loop():
    s = State(jnp.array(0), name="n")

    def body(i, x):
        s.value = s.value + i
        return x * 2 + i

    def twin(n, x, i, upper):
        return jax.lax.fori_loop(i, upper, lambda i, c: (c[0] + i, c[1] * 2 + i), (n, x))

    for lower, upper in [(0, 5), (2, 4), (3, 3), (4, 2), (-2, 2)]:
        n, expected = twin(s.value, 1, lower, upper)
        assert T.fori_loop(lower, upper, body, 1) == expected and s.value == n
        n, expected = twin(s.value, 1, lower, upper)
        assert T.jit(lambda a, b: T.fori_loop(a, b, body, 1))(lower, upper) == expected and s.value == n
    slopes = [g(lambda x, f=f: f(0, 3, lambda i, y: jnp.sin(y), x))(0.5) for g, f in LOOPS_AND_GRADS]
    assert slopes[0] == slopes[1]
    assert T.fori_loop(jnp.int8(0), 3, lambda i, x: x + 1, 0) == 3
    with jax.disable_jit():
        assert T.fori_loop(0, 0, lambda i, x: x + 1, 0) == 0 and T.fori_loop(0, 2, lambda i, x: x + i, 0) == 1


def test_c_fori_loop_runs_the_function_once():
    runs = []
    T.jit(lambda n: T.fori_loop(0, n, lambda i, x: (runs.append(1), x * 2.0)[1], 1.0))(3)
    T.fori_loop(0, 3, lambda i, x: (runs.append(1), x * 2.0)[1], 1.0)
    assert len(runs) == 2


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"axis": 1}, {"axis": -1}])
def test_c_associative_scan(options):
    s, xs = ParamState(jnp.array(0.7), name="s"), jnp.arange(12.0).reshape(4, 3)

    def ours(x):
        return T.associative_scan(lambda a, b: a + b + s.value * a * b, x, **options)

    def twin(w, x):
        return jax.lax.associative_scan(lambda a, b: a + b + w * a * b, x, **options)

    np.testing.assert_allclose(T.jit(ours)(xs), twin(s.value, xs), rtol=1e-6)
    np.testing.assert_allclose(
        T.grad(lambda: ours(xs).sum(), s)(), jax.grad(lambda w: twin(w, xs).sum())(s.value), rtol=1e-5
    )
    s.value = jnp.array(0.0)
    np.testing.assert_allclose(ours(xs), twin(0.0, xs), rtol=1e-6)


def test_c_vmap_by_position():
    s = State(jnp.array(2.0))
    f = lambda x, y: s.value * x + y  # noqa: E731
    assert T.vmap(f, (0, None))(XS, 1.0).tolist() == [1.0, 3.0, 5.0]
    assert T.vmap(f, 0, 0, "i")(XS, XS).shape == (3,)
    assert T.vmap(lambda x: x * jnp.ones(2), 0, 1)(XS).shape == (2, 3)
    assert T.vmap(f, (None, 0), 0, None, 3)(1.0, XS).shape == (3,)


def test_c_pbar_takes_an_int(capsys):
    pytest.importorskip("tqdm")
    assert T.for_loop(lambda x: x, jnp.ones(6), pbar=2).sum() == 6.0
    jax.effects_barrier()
    assert "6/6" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ ahead of time, and why


@pytest.mark.parametrize("donate_states", [False, True])
@pytest.mark.parametrize("donate", [(), (0,)])
def test_c_what_is_said_ahead_of_time_is_of_the_arguments(donate_states, donate):
    s, t = State(jnp.ones(3)), State(jnp.zeros(2))

    def f(x, y, *, k=1.0):
        s.value = s.value + x["a"]
        return {"out": x["a"] * y * k, "t": t.value}

    def twin(x, y, *, k=1.0):
        return {"out": x["a"] * y * k, "t": jnp.zeros(2)}

    args = ({"a": jnp.ones(3), "b": jnp.ones(4)}, 2.0)
    ours, theirs = T.jit(f, donate_states=donate_states, donate_argnums=donate), jax.jit(twin, donate_argnums=donate)
    ours, theirs = ours.trace(*args, k=2.0), theirs.trace(*args, k=2.0)
    for step in ("trace", "lower", "compile"):
        for name in ("args_info", "in_tree", "in_avals", "out_info", "out_tree", "out_avals", "donate_argnums"):
            if hasattr(theirs, name):
                assert str(getattr(ours, name)) == str(getattr(theirs, name)), (step, name)
        if step != "compile":
            ours, theirs = (x.lower() if step == "trace" else x.compile() for x in (ours, theirs))
    assert jax.tree.structure(ours.input_shardings) == jax.tree.structure(theirs.input_shardings)
    assert jax.tree.structure(ours.output_shardings) == jax.tree.structure(theirs.output_shardings)
    assert ours(*args, k=2.0)["out"].tolist() == [4.0] * 3


def test_c_retraces_name_a_mesh():
    spread, s = jax.sharding.NamedSharding(MESH, P("d")), State(jnp.ones(3), name="s")
    f = T.jit(lambda x: s.value + x)
    f(XS)
    f(jax.device_put(XS, spread))
    s.value = jax.device_put(s.value, spread)
    f(jax.device_put(XS, spread))
    assert "argument x: float32[3] → float32[3] on the mesh (d: 1 auto)" in str(f.retraces()[1])
    assert "State 's': float32[3] → float32[3] on the mesh (d: 1 auto)" in str(f.retraces()[2])


@pytest.mark.parametrize("reads", [False, True])
def test_c_a_deleted_jit_lets_go_at_once(reads):
    x = jnp.ones(3)
    f = T.jit((lambda x: lambda: W.value * x if reads else x + 1.0)(x))
    f(), f()
    x = weakref.ref(x)
    assert x() is not None
    del f
    assert x() is None
