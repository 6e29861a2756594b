"""Bad input: one clear error that names the argument or the State's path, the rule and the fix.

Each row of the table is a trigger, tried with every transform that it applies to, the type of the error, and
what its message must contain. Nothing may have changed afterwards: every function here first writes ``cache``.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainstate
from _unchanged import unchanged
from brainstate import BrainStateError, ParamState, State, nn
from brainstate.transform import (
    GradientTransform,
    StateFinder,
    jacobian,
    jacrev,
    jit,
    jvp,
)
from transforms import ROW, rows

# ------------------------------------------------------------------------------------------ states and functions

w = ParamState(jnp.array([1.0, 2.0]), name="w")
b = ParamState(jnp.array(3.0), name="b")
idle = ParamState(jnp.array(4.0), name="idle")
spare = ParamState(jnp.array(5.0), name="spare")
count = State(jnp.array(1), name="count")
label = State("text", name="label")
cache = State(jnp.array(0.0), name="cache")

STATES = (w, b, idle, spare, count, label, cache)


def loss(x=2.0, y=1.0):
    """Use w, b and the arguments, and write the cache."""
    cache.value = jnp.asarray(x * y)
    return (w.value**2).sum() * b.value * x * y


def returns(make):
    """Return a function that writes and then returns ``make(x)``."""

    def f(x=2.0):
        cache.value = w.value.sum() * x
        return make(x)

    return f


DERIVATIVES = rows(lambda row: row.name != "jacobian", "gradient")  # which is jacrev
PRODUCTS = {name: ROW[name] for name in ("vjp", "jvp")}
WITH_STATES = {**DERIVATIVES, **PRODUCTS}
DIFFERENTIATE = (*DERIVATIVES, "vjp")  # what has argnums
SCALAR = tuple(
    rows(
        lambda row: (
            row.of == "number" and row.order == 1 and row.name in DERIVATIVES and row.name != "GradientTransform"
        )
    )
)
# Each takes the function and options, and gives what takes the arguments.
ALL = {name: row.derive for name, row in WITH_STATES.items()} | {"jit": jit, "StateFinder": StateFinder}


def my_transform(fun, **params):
    return jax.grad(fun, **params)


@dataclass
class Row:
    """A mistake, whose it is, and what the user is told."""

    name: str
    transforms: tuple[str, ...]
    trigger: Callable
    error: type
    message: tuple[str, ...]
    ours: bool = True  # False: Python or JAX itself says it well


def same(state):
    return {"first": [state], "second": {"again": state}}


def unsortable():
    return {1: w, "a": b}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = State(jnp.ones(2))


ROWS = [
    # --- grad_states
    Row(
        "an array among the States",
        tuple(WITH_STATES),
        lambda t: t(loss, grad_states={"good": w, "bad": [b, jnp.ones(2)]})(2.0),
        TypeError,
        (r"grad_states\['bad'\]\[1\] is a", "not a State", "Pass a State", r"model\.states\(\.\.\.\)"),
    ),
    Row(
        "text as States",
        tuple(WITH_STATES),
        lambda t: t(loss, grad_states="w")(2.0),
        TypeError,
        ("grad_states is a str", "not a State", "Pass a State"),
    ),
    Row(
        "a set of States",
        tuple(WITH_STATES),
        lambda t: t(loss, grad_states={w, b})(2.0),
        TypeError,
        ("grad_states is a set", "set or an iterator", "list, tuple or dict"),
    ),
    Row(
        "a generator of States",
        DERIVATIVES,
        lambda t: t(loss, grad_states=(s for s in (w, b)))(2.0),
        TypeError,
        ("grad_states is a generator", "set or an iterator", "list, tuple or dict"),
    ),
    Row(
        "the values of a dict",
        DERIVATIVES,
        lambda t: t(loss, grad_states={"w": w}.values())(2.0),
        TypeError,
        ("grad_states is a dict_values", "list, tuple or dict"),
    ),
    Row(
        "snapshots in place of States",
        tuple(WITH_STATES),
        lambda t: t(loss, grad_states=brainstate.graph.treefy_states({"w": w}))(2.0),
        TypeError,
        ("grad_states", "snapshot", r"\.states\("),
    ),
    Row(
        "keys that cannot be sorted",
        DERIVATIVES,
        lambda t: t(loss, grad_states=unsortable())(2.0),
        TypeError,
        ("grad_states", "keys", "one sortable kind"),
    ),
    Row(
        "the same State twice",
        tuple(WITH_STATES),
        lambda t: t(loss, grad_states=same(w))(2.0),
        ValueError,
        (r"\['first'\]\[0\]", r"\['second'\]\['again'\]", "'w'", "twice", "List it once"),
    ),
    Row(
        "an empty container",
        tuple(WITH_STATES),
        lambda t: t(loss, grad_states={})(2.0),
        ValueError,
        ("grad_states selects no State", "filter", "Leave grad_states out"),
    ),
    Row(
        "a Module without parameters",
        DERIVATIVES,
        lambda t: t(loss, grad_states=Net())(2.0),
        ValueError,
        ("grad_states selects no State", "Leave grad_states out"),
    ),
    Row(
        "States that are not used",
        tuple(WITH_STATES),
        lambda t: t(loss, grad_states={"a": idle, "m": [w, spare], "b": b})(2.0),
        ValueError,
        (
            r"never reads grad_states\['a'\] \(ParamState 'idle'\), grad_states\['m'\]\[1\] \(ParamState 'spare'\):",
            "Remove",
        ),
    ),
    Row(
        "an integer State",
        tuple(WITH_STATES),
        lambda t: t(lambda x: (w.value.sum() + count.value.astype(float)) * x, grad_states=[w, count])(2.0),
        TypeError,
        (r"grad_states\[1\] \(State 'count'\)", "floating or complex", "Leave it out"),
    ),
    Row(
        "a State with text",
        tuple(WITH_STATES),
        lambda t: t(lambda x: x * len(label.value), grad_states=[label])(2.0),
        TypeError,
        (r"grad_states\[0\] \(State 'label'\)", "floating or complex", "Leave it out"),
    ),
    # --- argnums
    *(
        Row(
            f"argnums={argnums!r}",
            DIFFERENTIATE,
            lambda t, argnums=argnums: t(loss, argnums=argnums)(2.0),
            ValueError,
            (f"argnums={re.escape(repr(argnums))}", "Python ints"),
        )
        for argnums in (True, 1.0, "x", (0, "x"), [0, 1.5], {0}, np.float32(0))
    ),
    Row(
        "an argument twice, from both ends",
        DIFFERENTIATE,
        lambda t: t(loss, argnums=(0, -2))(2.0, 1.0),
        ValueError,
        (r"argnums=\(0, -2\)", "twice"),
    ),
    Row(
        "argnums beyond the arguments, from the end",
        tuple(DERIVATIVES),
        lambda t: t(loss, argnums=-3)(2.0, 1.0),
        TypeError,
        ("argnums=-3", "2 positional arguments", "by position"),
    ),
    Row(
        "argnums beyond the arguments",
        tuple(DERIVATIVES),
        lambda t: t(loss, argnums=(0, 5))(2.0),
        TypeError,
        (r"argnums=\(0, 5\)", "argument 5", "1 positional argument", "by position"),
    ),
    Row(
        "argnums beyond the arguments, with States",
        tuple(DERIVATIVES),
        lambda t: t(loss, grad_states=w, argnums=2)(2.0, 1.0),
        TypeError,
        ("argnums=2", "argument 2", "2 positional arguments", "by position"),
    ),
    Row(
        "argnums repeated",
        DIFFERENTIATE,
        lambda t: t(loss, argnums=(0, 0))(2.0),
        ValueError,
        (r"argnums=\(0, 0\)", "twice", "once"),
    ),
    Row(
        "argnums=() without States",
        DIFFERENTIATE,
        lambda t: t(loss, argnums=())(2.0),
        ValueError,
        ("argnums", "grad_states", "nothing to differentiate"),
    ),
    Row(
        "a selected argument passed by keyword",
        tuple(DERIVATIVES),
        lambda t: t(loss, argnums=1)(2.0, y=1.0),
        TypeError,
        ("argnums=1", "argument 1", "by position, not by keyword"),
    ),
    Row(
        "no arguments and no States",
        tuple(DERIVATIVES),
        lambda t: t(loss)(),
        TypeError,
        ("argnums=0", "0 positional arguments", "by position", "grad_states"),
    ),
    Row(
        "an integer argument",
        tuple(DERIVATIVES),
        lambda t: t(loss)(2),
        TypeError,
        ("argument 0 is int", "floating or complex", "Convert"),
    ),
    Row(
        "a number as the tangent of an integer",
        ("jvp",),
        lambda t: t(loss)(2),
        ValueError,
        (r"tangents\[0\] is int32\[\]", "its tangent is float0"),
    ),
    Row(
        "an integer deep in an argument",
        tuple(DERIVATIVES),
        lambda t: t(lambda y, x: x["a"][1] * y, argnums=(1,))(2.0, {"a": [1.0, np.arange(3)]}),
        TypeError,
        (r"argument 1\['a'\]\[1\]", "floating or complex", "Convert"),
    ),
    Row(
        "text as an argument",
        tuple(WITH_STATES),
        lambda t: t(loss)("two"),
        TypeError,
        ("argument 0 is a str", "floating or complex"),
    ),
    # --- the function and its results
    Row(
        "a number in place of a function",
        (*ALL,),
        lambda t: t(3.0)(2.0),
        TypeError,
        ("function", "got float", "cannot be called"),
    ),
    Row(
        "more than a scalar",
        SCALAR,
        lambda t: t(returns(lambda x: w.value * x))(2.0),
        (TypeError, ValueError),
        ("scalar", r"shape \(2,\)"),
    ),
    Row(
        "more than a scalar, with States",
        SCALAR,
        lambda t: t(returns(lambda x: {"o": w.value * x}), grad_states=[w])(2.0),
        (TypeError, ValueError),
        ("scalar", r"\{'o': \(2,\)\}"),
    ),
    Row(
        "more than a scalar: the way out",
        ("grad",),
        lambda t: t(returns(lambda x: w.value * x))(2.0),
        TypeError,
        ("Gradient only defined for scalar-output functions", "vector_grad", "jacrev"),
    ),
    Row(
        "has_aux without a pair",
        tuple(WITH_STATES),
        lambda t: t(returns(lambda x: b.value * x), has_aux=True)(2.0),
        TypeError,
        ("has_aux=True", r"pair \(value, aux\)", "returned a"),
    ),
    Row(
        "has_aux with one part",
        tuple(WITH_STATES),
        lambda t: t(returns(lambda x: (b.value * x,)), has_aux=True)(2.0),
        TypeError,
        ("has_aux=True", r"pair \(value, aux\)", "tuple of 1"),
    ),
    Row(
        "has_aux with three parts",
        tuple(WITH_STATES),
        lambda t: t(returns(lambda x: [b.value * x, 1.0, 2.0]), grad_states=[b], has_aux=True)(2.0),
        TypeError,
        ("has_aux=True", r"pair \(value, aux\)", "list of 3"),
    ),
    Row(
        "a State as an argument",
        tuple(ALL),
        lambda t: t(loss)(b),
        ValueError,
        ("ParamState 'b' is among the arguments", r"\[0\]", "inside the function", r"state\.value"),
    ),
    Row(
        "a State deep in an argument",
        tuple(DERIVATIVES),
        lambda t: t(loss, grad_states=w)(2.0, {"here": [b]}),
        ValueError,
        ("ParamState 'b'", r"\['here'\]\[0\]", r"state\.value"),
    ),
    Row(
        "a State as the result",
        tuple(ALL),
        lambda t: t(returns(lambda x: {"o": b}))(2.0),
        ValueError,
        ("ParamState 'b' is among the results", r"\['o'\]", r"state\.value"),
    ),
    Row(
        "a State in aux",
        tuple(WITH_STATES),
        lambda t: t(returns(lambda x: (b.value * x, [b])), has_aux=True)(2.0),
        ValueError,
        ("ParamState 'b' is among the results", r"\[1\]\[0\]", r"state\.value"),
    ),
    Row(
        "an unknown option",
        tuple(ALL),
        lambda t: t(loss, colour="red")(2.0),
        TypeError,
        ("colour",),
        ours=False,
    ),
    # --- vjp
    Row(
        "vjp: an argument that is not there",
        ("vjp",),
        lambda t: t(loss, argnums=-3)(2.0, 1.0),
        ValueError,
        ("argnums=-3", "2 positional arguments", "by position"),
    ),
    Row(
        "vjp: nothing to differentiate",
        ("vjp",),
        lambda t: t(loss, argnums=None)(2.0),
        ValueError,
        ("neither grad_states nor argnums", "nothing to differentiate"),
    ),
    # --- jvp
    Row(
        "jvp: primals are no sequence",
        ("jvp",),
        lambda t: jvp(loss, jnp.ones(()), (1.0,)),
        TypeError,
        ("jvp: primals", "tuple or list"),
    ),
    Row(
        "jvp: tangents are no sequence",
        ("jvp",),
        lambda t: jvp(loss, (1.0,), {"x": 1.0}),
        TypeError,
        ("jvp: tangents is a dict", "tuple or list"),
    ),
    Row(
        "jvp: a tangent too many",
        ("jvp",),
        lambda t: jvp(loss, (1.0,), (1.0, 2.0)),
        ValueError,
        ("jvp: tangents", "one tangent for each array"),
    ),
    Row(
        "jvp: a tangent of another shape",
        ("jvp",),
        lambda t: jvp(loss, (1.0,), (jnp.ones(3),)),
        ValueError,
        (r"jvp: tangents\[0\] is float32\[3\]", r"float32\[\]", "shape and dtype"),
    ),
    Row(
        "jvp: the tangent of a State of another shape",
        ("jvp",),
        lambda t: jvp(loss, (1.0,), (1.0,), grad_states={"w": w}, state_tangents={"w": jnp.ones(3)}),
        ValueError,
        (r"jvp: state_tangents\['w'\] is float32\[3\]", r"float32\[2\]", "shape and dtype"),
    ),
    Row(
        "jvp: the tangent of a State of another dtype",
        ("jvp",),
        lambda t: jvp(loss, (1.0,), (1.0,), grad_states=[w], state_tangents=[np.ones(2, int)]),
        ValueError,
        (r"jvp: state_tangents\[0\] is int32\[2\]", r"float32\[2\]", "shape and dtype"),
    ),
    Row(
        "jvp: States without tangents",
        ("jvp",),
        lambda t: jvp(loss, (1.0,), (1.0,), grad_states=w),
        ValueError,
        ("grad_states and state_tangents", "both or neither"),
    ),
    Row(
        "jvp: tangents without States",
        ("jvp",),
        lambda t: jvp(loss, (1.0,), (1.0,), state_tangents=jnp.ones(2)),
        ValueError,
        ("grad_states and state_tangents", "both or neither"),
    ),
    # --- fwd_grad
    Row(
        "fwd_grad: no direction",
        ("fwd_grad",),
        lambda t: t(loss, tangent_size=0),
        ValueError,
        ("tangent_size=0", "int from 1 up"),
    ),
    Row(
        "fwd_grad: half a direction",
        ("fwd_grad",),
        lambda t: t(loss, tangent_size=1.5),
        TypeError,
        ("tangent_size=1.5", "int from 1 up"),
    ),
    # --- GradientTransform
    Row(
        "a transform that drops aux",
        ("GradientTransform",),
        lambda t: GradientTransform(loss, lambda f, **kw: lambda *a: jax.grad(f, **kw)(*a)[0])(2.0),
        TypeError,
        (r"\(derivative, aux\)", "has_aux=True", "untouched"),
    ),
    Row(
        "a transform that returns more",
        ("GradientTransform",),
        lambda t: GradientTransform(loss, jax.value_and_grad)(2.0),
        TypeError,
        ("value_and_grad", r"\(derivative, aux\)", "untouched"),
    ),
    Row(
        "a result that is a State, under the full name of the user's transform",
        ("GradientTransform",),
        lambda t: GradientTransform(lambda x: b, my_transform)(2.0),
        ValueError,
        ("ParamState 'b' is among the results of a function under my_transform: ", r"state\.value"),
    ),
    Row(
        "a transform that cannot be called",
        ("GradientTransform",),
        lambda t: GradientTransform(loss, "grad")(2.0),
        TypeError,
        ("transform", "str", "cannot be called"),
    ),
    Row(
        "a transform that refuses has_aux",
        ("GradientTransform",),
        lambda t: GradientTransform(loss, lambda f, argnums: jax.grad(f, argnums=argnums))(2.0),
        TypeError,
        ("has_aux",),
        ours=False,
    ),
    # --- StateFinder
    Row(
        "StateFinder: a bad usage",
        ("StateFinder",),
        lambda t: t(loss, usage="some"),
        ValueError,
        ("usage='some'", "'all', 'read', 'write', 'both'"),
    ),
    Row(
        "StateFinder: a bad return_type",
        ("StateFinder",),
        lambda t: t(loss, return_type=list),
        ValueError,
        ("return_type=<class 'list'>", "'dict', 'list', 'tuple'"),
    ),
    Row(
        "StateFinder: a bad filter",
        ("StateFinder",),
        lambda t: t(loss, 3.5),
        TypeError,
        ("filter", "3.5"),
    ),
    Row(
        "StateFinder: usage by position",
        ("StateFinder",),
        lambda t: t(loss, None, "read"),
        TypeError,
        ("positional",),
        ours=False,
    ),
    # --- jit
    Row(
        "jit: a State with text",
        ("jit", "StateFinder"),
        lambda t: t(lambda x: x * len(label.value))(2.0),
        TypeError,
        ("State 'label' holds a str", "static argument"),
    ),
    Row(
        "jit: a Module as an argument",
        ("jit",),
        lambda t: t(lambda x, m: x)(2.0, Net()),
        TypeError,
        (r"argument \[1\]", r"Module \(Net\)", "refer to it by name"),
    ),
]

CASES = [pytest.param(row, name, id=f"{row.name}-{name}".replace(" ", "_")) for row in ROWS for name in row.transforms]


@pytest.mark.parametrize(("row", "name"), CASES)
def test_bad_input(row, name):
    with unchanged(*STATES), pytest.raises(row.error) as error:
        row.trigger(ALL[name])
    message = str(error.value)
    for part in row.message:
        assert re.search(part, message), f"{part!r} is not in: {message}"
    if row.ours:
        assert isinstance(error.value, BrainStateError)
        assert not re.search(r"JitTracer|JVPTracer|0x[0-9a-f]{6}|\b\d{9,}\b|\n", message), message


def test_every_transform_is_in_the_table():
    assert jacobian is jacrev
    assert {*ALL, "jacobian"} == set(brainstate.transform.__all__) & {*ALL, "jacobian"}
    for name in ALL:
        assert sum(name in row.transforms for row in ROWS) >= 4, name


@pytest.mark.parametrize("name", DERIVATIVES)
def test_a_mistake_in_the_construction_is_reported_there(name):
    """No call is needed to hear about it."""
    make = ALL[name]
    mistakes = [
        ({"grad_states": [jnp.ones(2)]}, TypeError),
        ({"grad_states": []}, ValueError),
        ({"grad_states": [w, w]}, ValueError),
        ({"argnums": True}, ValueError),
        ({"argnums": ()}, ValueError),
        ({"argnums": (0, 0)}, ValueError),
    ]
    for options, error in mistakes:
        with unchanged(*STATES), pytest.raises(error):
            make(loss, **options)
    with pytest.raises(TypeError):
        make(3.0)


@pytest.mark.parametrize("name", DERIVATIVES)
def test_usable_again_after_an_error(name):
    """The wrapper that failed works with good input, and commits then."""
    transformed = ALL[name](loss, argnums=0)
    with unchanged(*STATES), pytest.raises(TypeError):
        transformed(3)
    before = cache.value
    transformed(3.0)
    assert cache.value == 3.0
    cache.value = before


@pytest.mark.parametrize("name", [*DERIVATIVES, "vjp", "jvp", "jit"])
@pytest.mark.parametrize("outer", ["none", "jit", "grad"])
def test_an_exception_of_the_user_leaves_everything_as_it_was(name, outer):
    def failing(x):
        cache.value = w.value.sum() * x
        w.value = w.value * 0.0
        raise ZeroDivisionError("mine")

    inner = ALL[name](failing)
    if outer != "none":
        inner = ALL[outer](lambda x, f=inner: jax.tree.leaves(f(x))[0])
    with unchanged(*STATES), pytest.raises(ZeroDivisionError, match="mine"):
        inner(2.0)


@pytest.mark.parametrize("name", DERIVATIVES)
def test_unused_states_may_be_accepted(name):
    options = ROW[name].options
    result = ALL[name](loss, grad_states={"w": w, "idle": idle}, check_states=False, **options)(2.0)
    if name == "hessian":
        assert result["idle"]["idle"] == 0.0
    elif name == "value_and_grad":
        assert result[1]["idle"] == 0.0
    elif name != "fwd_grad":
        assert result["idle"] == 0.0
    cache.value = jnp.array(0.0)
