"""What we take for granted of JAX beside its documented API, as facts about JAX: run this first on its next release.

``docs/contributing/jax.md`` lists them, each with the test that fails if JAX changes it.
"""

import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer
from jax.experimental.jet import jet, jet_rules
from jax.extend.core import (
    ClosedJaxpr,
    Literal,
    Primitive,
    find_top_trace,
    jaxpr_as_fun,
    mapped_aval,
    set_current_trace,
    unsafe_am_i_under_a_jit_DO_NOT_USE,
    valid_jaxtype,
)
from jax.extend.source_info_util import current_name_stack, register_exclusion, user_context
from jax.sharding import PartitionSpec as P

from brainstate import _compat

JAX = str(Path(jax.__file__).parent)
MESH = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
X = jnp.ones(3)


def equations(fun, *args):
    return jax.make_jaxpr(fun)(*args).jaxpr.eqns


# ------------------------------------------------------------------------------------------ traces


def test_one_object_stands_for_no_trace():
    seen = [find_top_trace(())]
    thread = threading.Thread(target=lambda: seen.append(find_top_trace(())))
    thread.start()
    thread.join()
    assert seen == [_compat.AT_ONCE, _compat.AT_ONCE] and _compat.current_trace() is _compat.AT_ONCE


def test_a_trace_knows_the_one_around():
    seen = []

    def f(x):
        seen.append(find_top_trace(()))
        return x * 2.0

    jax.make_jaxpr(f)(1.0)
    jax.make_jaxpr(jax.grad(f))(1.0)
    jax.vmap(f)(X)
    recording, derivative, lanes = seen
    assert type(derivative.parent_trace) is type(recording) is not type(derivative)
    assert lanes.parent_trace is _compat.AT_ONCE


def test_staging_is_told_from_computing():
    seen = []

    def f(x):
        seen.append(
            (unsafe_am_i_under_a_jit_DO_NOT_USE(), _compat.is_recording(), _compat.stages_within(_compat.AT_ONCE))
        )
        return x

    f(1.0)
    jax.grad(f)(1.0)
    jax.vmap(f)(X)
    jax.jit(f)(1.0)
    jax.lax.map(f, X)
    jax.make_jaxpr(jax.grad(f))(1.0)
    assert seen == [(False,) * 3] * 3 + [(True,) * 3] * 3


def test_an_operation_goes_to_the_trace_that_is_made_current():
    def f(x):
        outer, found = find_top_trace(()), []

        def g(y):
            with set_current_trace(outer):
                found.append(jnp.sin(x))
            return y

        jax.make_jaxpr(g)(1.0)
        return found[0]

    assert [eqn.primitive.name for eqn in equations(f, 1.0)] == ["sin"]


def test_the_value_of_a_user_context_is_in_the_key_of_the_caches():
    context, traced = jax.make_user_context(None), []
    f = jax.jit(lambda x: traced.append(context.value) or x)
    f(1.0)
    with context(1):
        f(1.0)
        f(1.0)
    f(1.0)
    context.set_global(2)
    f(1.0)
    assert traced == [None, 1, 2]


# ------------------------------------------------------------------------------------------ types


def test_types_of_jax():
    assert all(map(valid_jaxtype, (X, np.ones(2), 1, 2.0, 1j, True, jax.random.key(0))))
    assert not any(map(valid_jaxtype, ("a", None, [1.0], object())))
    jax.make_jaxpr(lambda x: [] if isinstance(x, Tracer) and valid_jaxtype(x) else 1 / 0)(1.0)
    assert jax.typeof(X).str_short() == "float32[3]"
    assert jax.typeof(1.0).weak_type and not jax.typeof(X).weak_type


def test_the_type_of_one_lane():
    aval = jax.typeof(jnp.ones((2, 3, 4)))
    assert mapped_aval(3, 1, aval).shape == (2, 4) and mapped_aval(3, 1, aval).dtype == aval.dtype


def test_the_axes_along_which_a_shard_varies():
    seen = []
    run = jax.shard_map(
        lambda x: seen.append(_compat.varying_axes(x)) or x, mesh=MESH, in_specs=P("d"), out_specs=P("d")
    )
    run(X)
    assert seen == [("d",)] and _compat.varying_axes(X) == ()


def test_the_type_of_a_reference_holds_another():
    (eqn, *_) = equations(lambda x: jax.new_ref(x)[...], X)
    assert eqn.outvars[0].aval.inner_aval.shape == (3,) and not hasattr(jax.typeof(X), "inner_aval")


# ------------------------------------------------------------------------------------------ programs


def test_a_program_can_be_taken_apart_and_run():
    closed = jax.make_jaxpr(lambda x: jnp.sin(x * 2.0) + X)(X)
    jaxpr = closed.jaxpr
    assert any(isinstance(v, Literal) and v.val == 2.0 for eqn in jaxpr.eqns for v in eqn.invars)
    (first,) = jaxpr_as_fun(ClosedJaxpr(jaxpr.replace(outvars=jaxpr.eqns[0].outvars), closed.consts))(X)
    assert first.tolist() == [2.0] * 3


def test_an_equation_binds_again_as_it_was():
    """With the rule of a function that has one, and under the options that it was traced under."""
    ruled = jax.custom_jvp(lambda x: x)
    ruled.defjvp(lambda primals, tangents: (primals[0], 5.0 * tangents[0]))
    (eqn,) = equations(ruled, 1.0)

    def again(x):
        return eqn.primitive.bind(x, **eqn.primitive.get_bind_params(eqn.params))[0]

    assert jax.grad(again)(1.0) == 5.0
    with jax.threefry_partitionable(False):
        (eqn,) = equations(jnp.sin, 1.0)
    with jax.threefry_partitionable(True), eqn.ctx.manager:
        assert not jax.config.jax_threefry_partitionable


def test_a_primitive_of_our_own_is_asked_when_a_program_runs():
    class Asked(Primitive):
        def bind(self, x):
            return 7.0 if x is four else super().bind(x)

    primitive, four = Asked("asked"), jnp.array(4.0)
    primitive.def_abstract_eval(lambda x: x)
    closed = jax.make_jaxpr(primitive.bind)(1.0)
    assert [eqn.primitive for eqn in closed.jaxpr.eqns] == [primitive]
    assert jaxpr_as_fun(closed)(four) == [7.0]


def test_an_operation_has_the_effects_of_a_callback():
    effects = jax.make_jaxpr(lambda: jax.debug.callback(lambda: None))().effects
    primitive = Primitive("heard")
    primitive.def_effectful_abstract_eval(lambda x: (x, effects))
    closed = jax.make_jaxpr(lambda x: primitive.bind(x))(1.0)
    assert effects and closed.effects == effects


def test_the_parts_of_a_scan():
    (eqn,) = equations(lambda a, c, xs: jax.lax.scan(lambda c, x: (c * a, (x, x)), c, xs), 1.0, 2.0, X)
    assert _compat.scan_counts(eqn.params, len(eqn.invars)) == (1, 1)
    assert [v.aval.shape for v in eqn.invars] == [(), (), (3,)]


def test_a_callback_is_called_so_in_the_text_of_a_program():
    calls = [
        jax.debug.callback,
        lambda f, x: jax.pure_callback(f, x, x),
        lambda f, x: jax.experimental.io_callback(f, x, x),
    ]
    for call in calls:
        assert "callback" in str(jax.make_jaxpr(lambda x, call=call: call(lambda x: x, x))(X))


def test_the_rules_for_series():
    (eqn,) = equations(jnp.exp, 1.0)
    assert eqn.primitive in jet_rules
    _, (series,) = jet(lambda x: [jnp.exp(x)], (0.0,), ([1.0, 0.0, 0.0],), factorial_scaled=False)
    np.testing.assert_allclose(series, [1.0, 1 / 2, 1 / 6], rtol=1e-6)


# ------------------------------------------------------------------------------------------ lines and names


def test_an_equation_keeps_the_stack():
    """Innermost frame first; and what is traced in a `user_context` has that of another equation."""
    (eqn,) = equations(lambda x: jnp.sin(x), 1.0)  # the line of the user
    frames = [(f.file_name, f.function_name) for f in eqn.source_info.traceback.frames]
    mine = frames.index((__file__, "test_an_equation_keeps_the_stack.<locals>.<lambda>"))
    assert mine > 0 and all(file.startswith(JAX) for file, _ in frames[:mine])
    line = next(f.line_num for f in eqn.source_info.traceback.frames if f.file_name == __file__)
    assert "the line of the user" in Path(__file__).read_text().splitlines()[line - 1]

    def elsewhere(x):
        with user_context(eqn.source_info.traceback, name_stack=current_name_stack() + eqn.source_info.name_stack):
            return jnp.cos(x)

    (other,) = equations(elsewhere, 1.0)
    assert str(other.source_info.traceback) == str(eqn.source_info.traceback)


def test_a_function_of_a_library_is_a_frame_in_its_folder():
    (call, *_) = equations(lambda x: jnp.linalg.norm(x), X)
    frames = call.params["jaxpr"].jaxpr.eqns[0].source_info.traceback.frames
    assert any(f.file_name.startswith(f"{JAX}/_src/numpy") and f.function_name.split(".")[-1] == "norm" for f in frames)
    assert all((Path(JAX) / "_src" / part).is_dir() for part in ("numpy", "nn", "scipy"))


def test_a_file_can_be_excluded():
    register_exclusion("/nowhere/")
    with pytest.raises(TypeError):
        register_exclusion()


class Asked:
    """Notes which function of JAX asks for an array, and which asked that one."""

    def __init__(self):
        self.asking = []

    @property
    def __jax_array__(self):
        frame = sys._getframe(1)
        self.asking.append((frame.f_code.co_name, frame.f_back.f_code.co_name))
        assert frame.f_globals["__name__"].startswith("jax.")
        raise AttributeError("__jax_array__")


@pytest.mark.parametrize(
    ("ask", "functions"),
    [
        (jax.typeof, "typeof"),
        (jax.grad(jnp.sin), "typeof valid_jaxtype"),
        (jax.lax.sin, "bind"),
    ],
)
def test_the_names_of_the_functions_that_ask_for_an_array(ask, functions):
    asked = Asked()
    with pytest.raises(TypeError):
        ask(asked)
    assert any(names[: len(functions.split())] == tuple(functions.split()) for names in asked.asking), asked.asking


@pytest.mark.parametrize("kind", [jax.custom_jvp, jax.custom_vjp])
def test_the_file_that_calls_what_has_a_rule(kind):
    files = []

    def f(x):
        frame = sys._getframe(1)
        while frame is not None:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        return x

    ruled = kind(f)
    rules = [lambda x: (x, None), lambda _, ct: (ct,)]
    ruled.defjvp(rules[1]) if kind is jax.custom_jvp else ruled.defvjp(*rules)
    jax.make_jaxpr(ruled)(1.0)
    assert any(file.endswith("/custom_derivatives.py") for file in files)


# ------------------------------------------------------------------------------------------ words and options


def test_reverse_mode_of_a_while_loop():
    with pytest.raises(ValueError, match=r"^Reverse-mode differentiation does not work for lax\.while_loop"):
        jax.grad(lambda x: jax.lax.while_loop(lambda c: c < 3.0, lambda c: c * 2.0, x))(1.0)


def test_forward_mode_of_what_goes_backwards():
    f = jax.custom_vjp(jnp.sin)
    f.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (ct * jnp.cos(x),))

    def slope(x):
        return jax.jvp(f, (x,), (1.0,))[1]

    with pytest.raises(NotImplementedError, match="custom_lin"):
        jax.jvp(jax.checkpoint(slope), (1.0,), (1.0,))


def test_a_result_that_varies():
    with pytest.raises(ValueError, match="out_specs"):
        jax.shard_map(lambda x: x, mesh=MESH, in_specs=P("d"), out_specs=P())(X)


def test_an_error_in_a_callback():
    """It arrives as another one, whose text holds that of the first, after the traceback."""

    def fail(x):
        raise KeyError("the word")

    with pytest.raises(Exception) as caught:
        jax.block_until_ready(jax.jit(lambda x: jax.pure_callback(fail, x, x))(X))
    assert not isinstance(caught.value, KeyError) and "the word" in str(caught.value)
    assert "the word" in str(caught.value).strip().splitlines()[-1]


def test_options():
    with jax.disable_jit():
        assert _compat.jit_disabled()
    for option in (jax.debug_nans, jax.debug_infs):
        with option(True):
            assert _compat.nans_checked()
    with jax.debug_nans(False):
        assert not _compat.jit_disabled() and not _compat.nans_checked()
    with jax.explain_cache_misses(True):
        assert jax.config.jax_explain_cache_misses
    assert jax.config.jax_traceback_filtering in (
        "off",
        "tracebackhide",
        "remove_frames",
        "quiet_remove_frames",
        "auto",
    )


def test_the_default_of_in_shardings():
    assert jax.jit(jnp.sin, in_shardings=_compat.UNSPECIFIED).lower(X).as_text() == jax.jit(jnp.sin).lower(X).as_text()
