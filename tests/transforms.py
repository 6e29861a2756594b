"""One row for each public name of ``brainstate.transform``: how the tests call it, and what they may expect.

A new transform is one more row. The generic tests take their cases from here, so that it is crossed with States that
are overwritten, frozen, tapped, NaN, with wrong input, exceptions and random programs. What a test wants of a
transform that the row does not say becomes a column, not a second table.

All derivatives have one form of calling, whatever their own is::

    row.derive(fun, grad_states, argnums, **options)(*args)
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from brainstate import HiddenState, ParamState, State, nn
from brainstate import transform as T
from brainstate.filters import All

# ------------------------------------------------------------------------------------------ the columns


@dataclass(frozen=True, eq=False)
class Row:
    """A public name of ``brainstate.transform``. Everything but ``name`` and ``kind`` is optional."""

    name: str
    kind: str  # gradient, product, curvature, example, sparse, loop, branch, lanes, compile, rule, tool or result

    # --- derivatives
    derive: Callable | None = None  # (fun, grad_states, argnums, **options) -> a function of the arguments
    of: str = "number"  # what `fun` returns: a "number", or an "array"
    jax: Callable | None = None  # the twin, which is called as `jax.grad` is
    by_hand: Callable | None = None  # (weights, gradient of f) -> the first derivative of `weights * f`
    gradient: Callable | None = None  # like `derive`, and gives what `jax.grad` gives
    order: int = 1  # of the derivative
    mode: str = "reverse"  # or "forward"
    exact: bool = True  # False: a random estimate
    batched: bool = False  # maps over a batch: `fun` is that of one example, and writes no State
    along: bool = False  # says nothing about an argument by itself: a product along a direction of all
    same_as: str | None = None  # a name of which this is another form: generic tests take one of the two
    options: dict = field(default_factory=dict)  # without which a call is not reproducible

    # --- any transform
    run: Callable | None = None  # f -> a function of a number that runs f within; from `derive` where it is left out
    program: Callable | None = None  # (State, number) -> something differentiable that uses it
    check: dict = field(default_factory=dict)  # options of `check_grads` for `program`
    no_derivative: str = ""  # why there is no program

    def __post_init__(self):
        if self.derive and not self.run:
            object.__setattr__(self, "run", functools.partial(self.derive, **self.options))

    def __str__(self):
        return self.name

    @property
    def transform(self):
        """Return the public object itself."""
        return getattr(T, self.name)

    def takes(self, option):
        """Tell whether it has this parameter."""
        return callable(self.transform) and option in inspect.signature(self.transform).parameters

    @property
    def decorates(self):
        """Tell whether it is a decorator too: the function may be left out."""
        first = next(iter(inspect.signature(self.transform).parameters.values()), None)
        return inspect.isfunction(self.transform) and first is not None and first.default is None

    def call(self, number, array):
        """Return which of two functions it is for."""
        return array if self.of == "array" else number


# ------------------------------------------------------------------------------------------ one form of calling


def values(states):
    """Return the values in the structure of their gradient, of whatever may stand as ``grad_states``."""
    if isinstance(states, nn.Module):
        states = states.states(ParamState)
    elif isinstance(states, tuple) and len(states) == 2 and isinstance(states[0], nn.Module):
        states = states[0].states(All(ParamState, states[1]))
    return jax.tree.map(lambda s: s.value if isinstance(s, State) else s, states)


def along(grad_states, argnums, args):
    """Return a vector in the structure of the gradient: the point itself."""
    if grad_states is None and argnums is None:
        argnums = 0
    moved = [] if argnums is None else [args[argnums] if isinstance(argnums, int) else tuple(args[n] for n in argnums)]
    parts = ([] if grad_states is None else [values(grad_states)]) + moved
    return parts[0] if len(parts) == 1 else tuple(parts)


def _vjp(fun, grad_states=None, argnums=0, **options):
    def run(*args, **kwargs):
        out, pull, *_ = T.vjp(fun, *args, grad_states=grad_states, argnums=argnums, **options, **kwargs)
        return pull(jax.tree.map(jnp.ones_like, out))

    return run


def _along_all(make, directions, *more):
    """Return the form of what moves all arguments, and the States, along the point itself."""

    def derive(fun, grad_states=None, argnums=None, **options):
        def run(*args):
            given = {} if grad_states is None else {"grad_states": grad_states, directions: values(grad_states)}
            return make(fun, args, args, *more, **given, **options)

        return run

    return derive


def _linearize(fun, grad_states=None, argnums=None, **options):
    def run(*args):
        linear = T.linearize(fun, *args, grad_states=grad_states, argnums=argnums, **options)[1]
        return linear(along(grad_states, argnums, args))

    return run


def _linear_part(fun, **options):
    return lambda *args: T.linearize(fun, *args, **options)[1].tree()


def _product(make):
    """Return the form of a product with a vector, which is the point itself."""

    def derive(fun, grad_states=None, argnums=None, **options):
        times = make(fun, grad_states=grad_states, argnums=argnums, **options)
        return lambda *args: times(along(grad_states, argnums, args), *args)

    return derive


def _ggn(fun, **options):
    return T.ggn(fun, lambda out, *args: jnp.sum(out**2), **options)


def _fisher(fun, **options):
    return T.fisher(lambda *args: jnp.atleast_1d(fun(*args)), "bernoulli", **options)


def two(x):
    """Return a batch of two: ``x``, and twice that."""
    return jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf), 2 * jnp.asarray(leaf)]), x)


def _of_two(make):
    """Return the form of what takes a batch."""
    return lambda fun, *given, **options: lambda *args: make(fun, *given, **options)(*map(two, args))


def _accumulate(fun, *given, **options):
    def single(*args):
        return fun(*jax.tree.map(lambda leaf: leaf[0], args))

    return lambda *args: T.accumulate(T.grad(single, *given, **options), 2)(*map(two, args))


ONE = ParamState(jnp.array(1.0), name="one")


def _first_of_two(make):
    return lambda *given, **options: lambda *args: jax.tree.map(lambda g: g[0], make(*given, **options)(*args))


def _sparsity(make):
    """Return the form of what returns patterns, which are compared as tables."""
    shown = lambda tree: jax.tree.map(repr, tree, is_leaf=lambda leaf: isinstance(leaf, T.SparsityPattern))  # noqa: E731
    return lambda *given, **options: lambda *args: shown(make(*given, **options)(*args))


def _custom(fun, *given, **options):
    return T.GradientTransform(fun, jax.grad, *given, **options)


# ------------------------------------------------------------------------------------------ twins in JAX


def vector_grad_of_jax(fun, argnums=0, has_aux=False, holomorphic=False):
    """Return the gradient of the sum of the outputs, as `jax.grad` returns that of one."""

    def run(*args):
        numbers = argnums if isinstance(argnums, tuple) else (argnums,)

        def of(*chosen):
            moved = list(args)
            for n, value in zip(numbers, chosen, strict=True):
                moved[n] = value
            return fun(*moved)

        out, pull, *aux = jax.vjp(of, *(args[n] for n in numbers), has_aux=has_aux)
        gradient = pull(jax.tree.map(jnp.ones_like, out))
        gradient = gradient if isinstance(argnums, tuple) else gradient[0]
        return (gradient, *aux) if has_aux else gradient

    return run


# ------------------------------------------------------------------------------------------ programs


def wave(s):
    """Return a smooth function of an array that reads the State."""
    return lambda x: jnp.sin(s.value * x)


def total(s):
    """Return the same with one number as its result."""
    return lambda x: jnp.sum(jnp.sin(s.value * x) + s.value**2)


def parts(x):
    """Return something to loop over, which depends on ``x``."""
    return x * jnp.linspace(0.5, 1.0, 4, dtype=x.dtype)


def body(s):
    """Return a step of a loop that carries a number and writes the State."""

    def step(carry, k):
        s.value = jnp.sin(s.value * k + carry)
        return carry * 0.9, jnp.sum(s.value)

    return step


def entry(s):
    """Return a function for one entry of a loop, which writes the State."""

    def step(k):
        s.value = jnp.sin(s.value * k)
        return jnp.sum(s.value)

    return step


def ruled_vjp(s, x):
    f = T.custom_vjp(lambda x: s.value * x, states=s)
    f.defvjp(lambda v, x: (v * x, (v, x)), lambda kept, ct: (ct * kept[1], jnp.sum(ct * kept[0])))
    return f(x)


def ruled_jvp(s, x):
    f = T.custom_jvp(lambda x: s.value * x, states=s)
    f.defjvp(lambda p, t: (p[0] * p[1], t[0] * p[1] + p[0] * t[1]))
    return f(x)


def tripled(fun, *, argnums, has_aux):
    base = jax.grad(fun, argnums=argnums, has_aux=has_aux)

    def wrapped(*args):
        gradient, aux = base(*args)
        return jax.tree.map(lambda g: 3 * g, gradient), aux

    return wrapped


def sharded(s, x):
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    run = T.shard_map(lambda x: jax.lax.psum(wave(s)(x[0]), "d"), mesh=mesh, in_specs=P("d"), out_specs=P())
    return run(parts(x)[:2])


def grown(s, x):
    """A map that makes a State."""
    made = []

    def lane(k):
        made.append(HiddenState(wave(s)(k)))
        return jnp.sum(made[0].value) * k

    return T.vmap_new_states(lane)(parts(x))


def listened(s, x):
    with T.taps():
        return T.tap("h", wave(s)(x)) ** 2


def found(s, x):
    states = T.StateFinder(total(s), return_type="list")(x)
    return T.grad(total(s), states)(x)[0]


def operated(s, x):
    return T.hvp(total(s), s).operator(x) @ s.value


def scoped(s, x):
    with T.named_scope("part"):
        return wave(s)(x)


def spiral(s, x):
    """Return the arguments of a while loop that takes three steps."""

    def step(carry):
        n, y = carry
        return n + 1, jnp.sin(s.value * y + y)

    return lambda carry: carry[0] < 3, step, (0, x * s.value)


def target(s, x):
    return jnp.tanh(s.value * x)


# ------------------------------------------------------------------------------------------ runs of any transform


def _mapped(make):
    """Return the run of something that takes a function and what it maps or goes over."""
    return lambda f: lambda x: make(f, two(x))


def _on_one_device(f):
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    return T.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P())


def _ruled(f):
    f = T.custom_jvp(f)
    f.defjvp(lambda p, t: (f(*p), t[0]))
    return f


# ------------------------------------------------------------------------------------------ the table


def times(weights, gradient):
    """Return the derivative of ``weights * f`` where it is that of each output."""
    return weights * gradient


ROWS = [
    # --- gradients: function, grad_states, argnums, and options by name
    Row(
        "grad",
        "gradient",
        derive=T.grad,
        jax=jax.grad,
        by_hand=times,
        gradient=T.grad,
        program=lambda s, x: T.grad(total(s), s, argnums=0)(x),
    ),
    Row(
        "value_and_grad",
        "gradient",
        derive=T.value_and_grad,
        jax=jax.value_and_grad,
        gradient=lambda *given, **options: lambda *args: T.value_and_grad(*given, **options)(*args)[1],
        same_as="grad",
        program=lambda s, x: T.value_and_grad(total(s), s, 0)(x),
    ),
    Row(
        "vector_grad",
        "gradient",
        derive=T.vector_grad,
        of="array",
        jax=vector_grad_of_jax,
        by_hand=lambda weights, gradient: weights.sum() * gradient,
        gradient=T.vector_grad,
        program=lambda s, x: T.vector_grad(wave(s), s, 0)(x),
    ),
    Row(
        "fwd_grad",
        "gradient",
        derive=T.fwd_grad,
        by_hand=times,
        mode="forward",
        exact=False,
        options={"key": 0},
        program=lambda s, x: T.fwd_grad(total(s), s, 0, key=0)(x),
    ),
    Row(
        "jacrev",
        "gradient",
        derive=T.jacrev,
        of="array",
        jax=jax.jacrev,
        by_hand=times,
        gradient=T.jacrev,
        program=lambda s, x: T.jacrev(wave(s), s, 0)(x),
    ),
    Row(
        "jacfwd",
        "gradient",
        derive=T.jacfwd,
        of="array",
        jax=jax.jacfwd,
        by_hand=times,
        gradient=T.jacfwd,
        mode="forward",
        program=lambda s, x: T.jacfwd(wave(s), s)(x),
    ),
    Row(
        "jacobian",
        "gradient",
        derive=T.jacobian,
        of="array",
        jax=jax.jacrev,
        by_hand=times,
        same_as="jacrev",
        program=lambda s, x: T.jacobian(wave(s), s, chunk_size=2)(x),
    ),
    Row(
        "hessian",
        "gradient",
        derive=T.hessian,
        jax=jax.hessian,
        order=2,
        program=lambda s, x: T.hessian(total(s), s, argnums=0)(x),
    ),
    Row(
        "GradientTransform",
        "gradient",
        derive=_custom,
        gradient=_custom,
        same_as="grad",
        program=lambda s, x: T.GradientTransform(total(s), tripled, s)(x),
    ),
    # --- products with a vector
    Row(
        "vjp",
        "product",
        derive=_vjp,
        of="array",
        gradient=_vjp,
        program=lambda s, x: T.vjp(wave(s), x, grad_states=s)[1](s.value),
    ),
    Row(
        "jvp",
        "product",
        derive=_along_all(T.jvp, "state_tangents"),
        of="array",
        mode="forward",
        along=True,
        program=lambda s, x: T.jvp(wave(s), (x,), (x**2,), grad_states=s, state_tangents=s.value**2),
    ),
    Row(
        "linearize",
        "product",
        derive=_linearize,
        of="array",
        gradient=_linear_part,
        mode="forward",
        along=True,
        program=lambda s, x: T.linearize(wave(s), x, grad_states=s, argnums=0)[1]((s.value, x)),
    ),
    Row(
        "taylor",
        "product",
        derive=_along_all(T.taylor, "state_directions", 2),
        mode="forward",
        order=2,
        along=True,
        program=lambda s, x: T.taylor(wave(s), (x,), (x**2,), 2, grad_states=s, state_directions=s.value),
    ),
    # --- curvature
    Row(
        "hvp",
        "curvature",
        derive=_product(T.hvp),
        order=2,
        program=lambda s, x: T.hvp(total(s), s)(s.value, x),
    ),
    Row(
        "ggn",
        "curvature",
        derive=_product(_ggn),
        of="array",
        order=2,
        program=lambda s, x: T.ggn(wave(s), lambda out, x: jnp.sum(jnp.cosh(out)), s)(s.value, x),
    ),
    Row(
        "fisher",
        "curvature",
        derive=_product(_fisher),
        of="array",
        order=2,
        program=lambda s, x: T.fisher(lambda k: wave(s)(k)[None], "bernoulli", s)(s.value, x),
    ),
    Row(
        "laplacian",
        "curvature",
        derive=T.laplacian,
        order=2,
        program=lambda s, x: T.laplacian(total(s), s)(x),
    ),
    # --- one derivative for each example
    Row(
        "per_example_grad",
        "example",
        derive=_of_two(T.per_example_grad),
        gradient=_first_of_two(_of_two(T.per_example_grad)),
        batched=True,
        program=lambda s, x: T.per_example_grad(total(s), s)(parts(x)),
    ),
    Row(
        "per_example_norms",
        "example",
        derive=_of_two(T.per_example_norms),
        batched=True,
        program=lambda s, x: T.per_example_norms(total(s), s)(parts(x)),
    ),
    Row(
        "accumulate",
        "example",
        derive=_accumulate,
        batched=True,
        run=lambda f: _accumulate(lambda x: f(ONE.value * x), ONE),
        program=lambda s, x: T.accumulate(T.grad(lambda k: jnp.mean(jnp.sin(k)) * jnp.sum(s.value**3), s), 2)(parts(x)),
    ),
    # --- sparse matrices
    Row(
        "sparse_jacobian",
        "sparse",
        derive=T.sparse_jacobian,
        of="array",
        gradient=lambda *given, **options: T.sparse_jacobian(*given, dense=True, **options),
        program=lambda s, x: T.sparse_jacobian(wave(s), s, dense=True)(x),
    ),
    Row(
        "sparse_hessian",
        "sparse",
        derive=T.sparse_hessian,
        order=2,
        program=lambda s, x: T.sparse_hessian(total(s), s, dense=True)(x),
    ),
    Row(
        "jacobian_sparsity",
        "sparse",
        derive=_sparsity(T.jacobian_sparsity),
        of="array",
        no_derivative="positions, which are no floats",
    ),
    Row(
        "hessian_sparsity",
        "sparse",
        derive=_sparsity(T.hessian_sparsity),
        order=2,
        no_derivative="positions, which are no floats",
    ),
    # --- loops
    Row(
        "scan",
        "loop",
        run=_mapped(lambda f, xs: T.scan(lambda c, x: (c, f(x)), 0.0, xs)),
        program=lambda s, x: T.scan(body(s), x, parts(x)),
    ),
    Row(
        "for_loop",
        "loop",
        run=_mapped(T.for_loop),
        program=lambda s, x: T.for_loop(entry(s), parts(x)),
    ),
    Row(
        "while_loop",
        "loop",
        run=lambda f: lambda x: T.while_loop(lambda y: y < 3.0, f, x),
        program=lambda s, x: T.while_loop(*spiral(s, x))[1],
        check={"modes": "fwd"},
    ),
    Row(
        "fori_loop",
        "loop",
        run=lambda f: lambda x: T.fori_loop(0, 3, lambda i, y: f(y), x),
        program=lambda s, x: T.fori_loop(0, 3, lambda i, y: jnp.sin(s.value * y + y), x * s.value),
    ),
    Row(
        "bounded_while_loop",
        "loop",
        run=lambda f: lambda x: T.bounded_while_loop(lambda y: y < 3.0, f, x, max_steps=3),
        program=lambda s, x: T.bounded_while_loop(*spiral(s, x), max_steps=4)[1],
    ),
    Row(
        "checkpointed_for_loop",
        "loop",
        run=_mapped(T.checkpointed_for_loop),
        program=lambda s, x: T.checkpointed_for_loop(entry(s), parts(x)),
    ),
    Row(
        "checkpointed_scan",
        "loop",
        run=_mapped(lambda f, xs: T.checkpointed_scan(lambda c, x: (c, f(x)), 0.0, xs)),
        program=lambda s, x: T.checkpointed_scan(body(s), x, parts(x)),
    ),
    Row(
        "associative_scan",
        "loop",
        run=_mapped(lambda f, xs: T.associative_scan(lambda a, b: f(a[0]), xs)),
        program=lambda s, x: T.associative_scan(lambda a, b: a + s.value[0] * a * b + b, parts(x)),
    ),
    Row(
        "map",
        "loop",
        run=_mapped(T.map),
        program=lambda s, x: T.map(wave(s), parts(x)),
    ),
    # --- branches
    Row(
        "cond",
        "branch",
        run=lambda f: lambda x: T.cond(True, f, lambda x: x, x),
        program=lambda s, x: T.cond(x > 0, wave(s), lambda x: s.value, x),
    ),
    Row(
        "switch",
        "branch",
        run=lambda f: lambda x: T.switch(1, [lambda x: x, f], x),
        program=lambda s, x: T.switch(1, [lambda x: s.value, wave(s)], x),
    ),
    Row(
        "ifelse",
        "branch",
        run=lambda f: lambda x: T.ifelse([False, True], [lambda x: x, f], x),
        program=lambda s, x: T.ifelse([x < 0, x >= 0], [lambda x: s.value, wave(s)], x),
    ),
    # --- lanes and devices
    Row(
        "vmap",
        "lanes",
        run=_mapped(lambda f, xs: T.vmap(f)(xs)),
        program=lambda s, x: T.vmap(wave(s))(parts(x)),
    ),
    Row(
        "vmap_new_states",
        "lanes",
        run=_mapped(lambda f, xs: T.vmap_new_states(f)(xs)),
        program=grown,
    ),
    Row(
        "shard_map",
        "lanes",
        run=_on_one_device,
        program=sharded,
    ),
    # --- compiled, remembered, looked at
    Row(
        "jit",
        "compile",
        jax=jax.jit,
        run=T.jit,
        program=lambda s, x: T.jit(wave(s))(x),
    ),
    Row(
        "prepare",
        "compile",
        run=lambda f: lambda x: T.prepare(f, x),
        no_derivative="see Prepared",
    ),
    Row(
        "checkpoint",
        "compile",
        run=T.checkpoint,
        program=lambda s, x: T.checkpoint(lambda x: wave(s)(x) ** 2 * x)(x),
    ),
    Row(
        "remat",
        "compile",
        run=T.remat,
        same_as="checkpoint",
        program=lambda s, x: T.remat(lambda x: wave(s)(x) ** 2)(x),
    ),
    Row(
        "save_states",
        "compile",
        program=lambda s, x: T.checkpoint(entry(s), policy=T.save_states(ParamState))(x),
    ),
    Row(
        "make_jaxpr",
        "compile",
        run=lambda f: lambda x: T.make_jaxpr(f)(x),
        no_derivative="a program as text",
    ),
    Row(
        "eval_shape",
        "compile",
        run=lambda f: lambda x: T.eval_shape(f, x),
        no_derivative="shapes only",
    ),
    Row(
        "checkify",
        "compile",
        run=T.checkify,
        program=lambda s, x: T.checkify(wave(s))(x)[1],
    ),
    Row(
        "StateFinder",
        "compile",
        program=found,
    ),
    # --- rules of one's own
    Row(
        "custom_jvp",
        "rule",
        run=_ruled,
        program=ruled_jvp,
    ),
    Row(
        "custom_vjp",
        "rule",
        program=ruled_vjp,
        check={"modes": "rev"},
    ),
    Row(
        "stop_gradient",
        "rule",
        run=T.stop_gradient,
        program=lambda s, x: wave(s)(x) * T.stop_gradient(lambda: x**2, s)(),
    ),
    Row(
        "root",
        "rule",
        program=lambda s, x: T.root(lambda y: y**3 + y - target(s, x), jnp.zeros(3, x.dtype)),
    ),
    Row(
        "fixed_point",
        "rule",
        program=lambda s, x: T.fixed_point(lambda y: 0.5 * jnp.cos(y) + target(s, x), jnp.zeros(3, x.dtype)),
    ),
    Row(
        "argmin",
        "rule",
        program=lambda s, x: T.argmin(lambda y: jnp.sum(jnp.cosh(y - target(s, x)) + y**2), jnp.zeros(3, x.dtype)),
        check={"eps": 1e-3, "atol": 1e-4, "rtol": 1e-4},  # a minimiser is found to half of the digits only
    ),
    # --- tools
    Row("LinearOperator", "tool", program=operated),
    Row("named_scope", "tool", program=scoped),
    Row("tap", "tool", program=lambda s, x: T.tap("h", wave(s)(x)) ** 2),
    Row("taps", "tool", program=listened),
    Row("check_grads", "tool", no_derivative="this check itself; it looks at numbers, outside of transforms"),
    Row("explain", "tool", no_derivative="a report, made outside of transforms"),
    Row(
        "functional",
        "tool",
        no_derivative="a function as a pure one, for JAX's own derivatives: tests/test_faults_border.py",
    ),
    Row("substituted", "tool", no_derivative="a block on other values: tests/test_faults_border.py"),
    Row("ProgressBar", "tool", no_derivative="shows, and computes nothing"),
    # --- results
    Row("Estimate", "result", no_derivative="a result: two numbers"),
    Row("Explanation", "result", no_derivative="a report"),
    Row("FoundStates", "result", no_derivative="names the States of a jaxpr"),
    Row("Prepared", "result", no_derivative="a compiled program: it is prepared for a derivative, and has none"),
    Row("SparsityPattern", "result", no_derivative="a result: positions"),
]


# ------------------------------------------------------------------------------------------ questions to the table


def rows(condition, kind=None):
    """Return the rows of this kind, or of all, for which ``condition`` is true, by name."""
    return {row.name: row for row in ROWS if kind in (None, row.kind) and condition(row)}


ROW = rows(lambda row: True)
DERIVATIVES = rows(lambda row: row.derive and not row.same_as)  # each once
# Of what has the signature of `grad`: the functions with all of its options, and what returns just the derivative.
DECORATORS = rows(lambda row: row.takes("return_value") and inspect.isfunction(row.transform), "gradient")
EXACT = rows(lambda row: row.exact and not row.same_as, "gradient")
