"""Random programs over a few States, and two ways to run one.

A program is data: statements with expressions in them. `generate` draws one with Hypothesis. `Stateful` runs it as a
user would write it, with States and ``brainstate.transform``; `Functional` runs the same statements in pure JAX on
an environment ``{cell: value}`` that it hands through ``jax.lax.scan``, ``jax.vmap``, … itself, as the semantics say:

=============  ===================================================================================================
transform      what becomes of what the body writes
=============  ===================================================================================================
jit            an output
derivatives    auxiliary output: the primal value, once
checkpoint     an output
loops          carried
branches       the union of the branches is an output; who does not write a cell hands its value on
vmap           declared: stacked along the axis, or reduced; a generator: ``key, sub = split(key)``, lane ``i`` draws
               from ``fold_in(sub, i)``; anything else has to be the same in all lanes, or the call is refused
=============  ===================================================================================================

`compare` runs both and compares results, all States afterwards, what was refused, and how often Python code ran.
Everything is float64 or int32, so that rounding does not hide a mistake; the shapes are (), (3,) and (2, 3).
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from _interpreter import interpreted
from _unchanged import assert_no_scope
from brainstate import ParamState, State
from brainstate import transform as T
from brainstate._errors import BatchAxisError
from brainstate.random import RandomState
from transforms import EXACT, ROW

# ------------------------------------------------------------------------------------------ what a program is


class Boom(Exception):
    """What a program raises."""


class Refused(Exception):
    """The functional program would need a declaration of an axis."""


@dataclass(frozen=True)
class Expr:
    """``op`` of the parts; a leaf of the tree has a ``name`` or a number in place of parts."""

    op: str  # const, var, read, draw, raw, psum, sin, cos, add, mul
    parts: tuple = ()
    name: Any = None


@dataclass(frozen=True)
class Stmt:
    """One line. ``op`` says what the other fields mean; `Stateful` is the place to read it."""

    op: str
    name: str = ""
    expr: Expr | None = None
    other: str = ""
    shape: tuple = ()
    block: tuple = ()  # of try: statements
    bodies: tuple = ()  # of a transform
    options: tuple = ()  # of a transform: sorted pairs

    def __getitem__(self, key):
        return dict(self.options)[key]


@dataclass(frozen=True)
class Body:
    """A function of ``x``."""

    block: tuple
    out: Expr


# A function of JAX's own that reads a State, made once for each State and used wherever the program says:
# {name: what makes it from `get()` and `mixed(value, x)`}
RAW = {
    "jit": lambda get, mixed: jax.jit(lambda x: mixed(get(), x)),
    "checkpoint": lambda get, mixed: jax.checkpoint(lambda x: mixed(get(), x)),
    "jit in jit": lambda get, mixed: jax.jit(partial(_through, jax.jit(lambda x: mixed(get(), x)))),
    "scan": lambda get, mixed: partial(_scanned, lambda c, _: (mixed(get(), c), None)),
    "cond": lambda get, mixed: partial(_chosen, lambda x: mixed(get(), x), lambda x: x),
}
READ = ("a", "v", "w", "n", "p", "t", "u")


def _through(inner, x):
    return inner(x)


def _scanned(body, x):
    return lax.scan(body, x, None, length=1)[0]


def _chosen(yes, no, x):
    return lax.cond(x < jnp.inf, yes, no, x)  # always true, which JAX does not know; the twin takes it for granted


GRADIENTS = (*EXACT, "vjp", "jvp")
REVERSE = {name for name in GRADIENTS if ROW[name].mode == "reverse"}
ONCE = {"linear": False, "keeps": False, "lazy": False}
LOOPS = ("scan", "for_loop", "checkpointed_for_loop", "while_loop", "bounded_while_loop", "map")
BRANCHES = ("cond", "switch", "ifelse")

# What there is at the start: kind and shape. A tree is {"x": float, "n": [int]}; "py" starts as a Python number.
START = {
    "a": ("float", ()),
    "v": ("float", (3,)),
    "w": ("float", (2, 3)),
    "n": ("int", ()),
    "p": ("py", ()),
    "t": ("tree", (3,)),
    "u": ("tree", (3,)),
    "r": ("rng", ()),
}


def start() -> dict[str, Any]:
    """Return the values to begin with."""
    return {
        "a": jnp.float64(0.3),
        "v": jnp.array([0.1, -0.7, 0.4]),
        "w": jnp.array([[0.2, 0.5, -0.3], [0.8, -0.1, 0.6]]),
        "n": jnp.int32(1),
        "p": 0.75,
        "t": {"x": jnp.array([0.9, 0.2, -0.4]), "n": [jnp.array([1, 2, 3], jnp.int32)]},
        "u": {"x": jnp.array([-0.2, 0.3, 0.7]), "n": [jnp.array([4, 0, 2], jnp.int32)]},
        "r": np.array([0, 7], np.uint32),
    }


# ------------------------------------------------------------------------------------------ drawing one


@dataclass
class Context:
    """What may be used at some place of a program."""

    kinds: dict  # name -> (kind, shape): the States, aliases included
    variables: tuple = ()
    depth: int = 0  # how many transforms may be nested from here on
    reverse: bool = False  # inside a reverse pass: no while_loop
    linear: bool = True  # what stands here runs once, and nothing catches: a State may change its shape
    keeps: bool = True  # a State created here may outlive the function
    lazy: bool = True  # the same, of a State that is created if it is not there
    traced: bool = False
    axes: tuple = ()  # names of mapped axes
    targets: frozenset | None = None  # inside vmap: what had better be written
    owner: dict = field(default_factory=dict)  # alias -> name
    new: dict = field(default_factory=dict)  # States that outlive the function: name -> (kind, shape)

    def of(self, *kinds):
        return [name for name, (kind, _) in self.kinds.items() if kind in kinds]


class Generator:
    """Draws the parts of a program."""

    def __init__(self, draw):
        self.draw, self.count = draw, 0

    def pick(self, options):
        return options[self.draw(_BELOW[len(options)])]

    def chance(self, percent):
        return self.draw(_BELOW[100]) >= 100 - percent  # shrinks to no

    def fresh(self, letter):
        self.count += 1
        return f"{letter}{self.count}"

    def expr(self, ctx, size=2, draws=True):
        if size == 0 or self.chance(25):
            kinds = ["const", "read"] + ["var"] * 2 * bool(ctx.variables) + ["read"] * 2
            kinds += ["draw"] * (draws and bool(ctx.of("rng")))
            match self.pick(kinds):
                case "const":
                    return Expr("const", name=self.pick((0.5, -1.25)))
                case "var":
                    return Expr("var", name=self.pick(ctx.variables))
                case "draw":
                    return Expr(
                        "draw", (self.pick(("normal", "uniform")), self.pick(((), (3,)))), self.pick(ctx.of("rng"))
                    )
                case _:
                    return Expr("read", name=self.pick(ctx.of("float", "int", "py", "tree")))
        if self.chance(12):
            return Expr("raw", (self.expr(ctx, size - 1, draws),), (self.pick(tuple(RAW)), self.pick(READ)))
        op = self.pick(("sin", "add", "mul", "cos") + ("psum",) * bool(ctx.axes))
        parts = [self.expr(ctx, size - 1, draws) for _ in range(1 + (op in ("add", "mul")))]
        return Expr(op, tuple(parts), self.pick(ctx.axes) if op == "psum" else None)

    def target(self, ctx, *kinds):
        names = ctx.of(*kinds)
        if ctx.targets is not None and not self.chance(7):
            names = [n for n in names if ctx.owner.get(n, n) in ctx.targets]
        return self.pick(names) if names else None

    def block(self, ctx, least, most):
        return tuple(s for _ in range(self.draw(_FROM[least, most])) for s in [self.statement(ctx)] if s is not None)

    def statement(self, ctx):
        kinds = ["write"] * 5 + ["in_place"] * 2 + ["let", "alias", "create", "copy", "hold", "held"]
        kinds += ["transform"] * 9 * (ctx.depth > 0) + ["try"] * (ctx.depth > 0)
        kinds += ["boom"] * (ctx.traced and self.chance(8))
        kinds += ["keep"] * ctx.keeps + ["lazy"] * ctx.lazy
        return getattr(self, f"_{self.pick(kinds)}")(ctx)

    def _write(self, ctx):
        name = self.target(ctx, "float", "int", "py", "tree")
        if name is None:
            return self._create(ctx)
        op = "overwrite" if self.chance(25) else "write"
        kind, shape = ctx.kinds[name]
        return Stmt(op, name, self.expr(ctx), other=kind, shape=shape)

    def _in_place(self, ctx):
        name = self.target(ctx, "tree")
        return name and Stmt(self.pick(("in_place", "in_place_deep")), name, self.expr(ctx))

    def _let(self, ctx):
        name = self.fresh("y")
        stmt = Stmt("let", name, self.expr(ctx))
        ctx.variables += (name,)
        return stmt

    def _alias(self, ctx):
        old, name = self.pick(tuple(ctx.kinds)), self.fresh("alias")
        ctx.kinds[name] = ctx.kinds[old]
        ctx.owner[name] = ctx.owner.get(old, old)
        return Stmt("alias", name, other=old)

    def _create(self, ctx, op="create"):
        kind = self.pick(("float", "tree", "rng") if op == "create" else ("float", "tree"))
        name, shape = self.fresh("s"), self.pick(((), (3,)))
        stmt = Stmt(op, name, self.expr(ctx), other=kind, shape=shape)
        ctx.kinds[name] = (kind, shape if kind != "rng" else ())
        if op != "create":
            ctx.new[name] = ctx.kinds[name]
        if ctx.targets is not None:
            ctx.targets |= {name}
        return stmt

    def _keep(self, ctx):
        return self._create(ctx, "keep")

    def _lazy(self, ctx):
        return self._create(ctx, "lazy")

    def _copy(self, ctx):
        target = self.target(ctx, "tree")
        same = [n for n in ctx.of("tree") if target and ctx.kinds[n] == ctx.kinds[target]]
        return target and Stmt("copy", target, other=self.pick(same))

    def _hold(self, ctx):
        name = self.target(ctx, "tree")
        return name and Stmt("hold", name)

    def _held(self, ctx):
        return Stmt("held", expr=self.expr(ctx))

    def _boom(self, ctx):
        return Stmt("boom")

    def _try(self, ctx):
        inner = replace(ctx, kinds=dict(ctx.kinds), owner=dict(ctx.owner), **ONCE)
        return Stmt("try", block=self.block(inner, 1, 2))

    def body(self, ctx, **changes):
        """Return a function, and the States it leaves behind."""
        inner = replace(
            ctx,
            kinds=dict(ctx.kinds),
            owner=dict(ctx.owner),
            new={},
            variables=(*ctx.variables, "x"),
            depth=ctx.depth - 1,
            traced=True,
        )
        inner = replace(inner, **changes)
        body = Body(self.block(inner, 1, 3), self.expr(inner))
        if inner.linear:  # what ran once has the shapes that it left
            ctx.kinds.update((name, inner.kinds[name]) for name in ctx.kinds)
        return body, inner.new

    def _transform(self, ctx):
        kinds = ["jit", "checkpoint", "vmap", "vmap", "derivative", "derivative", "loop", "loop", "branch", "peek"]
        expr, name = self.expr(ctx, 1), self.fresh("y")
        stmt = getattr(self, f"_{self.pick(kinds)}")(ctx)
        ctx.variables += (name,)
        return replace(stmt, name=name, expr=expr)

    def _leaves(self, ctx, new, lanes=()):
        """Make known outside what outlives a function."""
        for name, (kind, shape) in new.items():
            ctx.kinds[name] = ctx.new[name] = (kind, (*lanes, *shape))
            if ctx.targets is not None:
                ctx.targets |= {name}

    def _jit(self, ctx):
        times = self.pick((1, 2))
        body, new = self.body(ctx, linear=ctx.linear and times == 1, keeps=ctx.keeps and times == 1)
        self._leaves(ctx, new)
        return Stmt("jit", bodies=(body,), options=(("times", times),))

    def _checkpoint(self, ctx):
        body, new = self.body(ctx)
        self._leaves(ctx, new)
        return Stmt("checkpoint", bodies=(body,), options=(("saving", self.chance(40)),))

    def _peek(self, ctx):
        body, _ = self.body(ctx, **ONCE)
        return Stmt(self.pick(("eval_shape", "make_jaxpr")), bodies=(body,))

    def _derivative(self, ctx):
        op = self.pick(GRADIENTS)
        if op == "hessian" and ctx.depth > 1 and not self.chance(20):
            op = "grad"
        body, new = self.body(ctx, reverse=ctx.reverse or op in REVERSE)
        self._leaves(ctx, new)
        names = tuple(n for n in ctx.of("float", "py", "tree") if n not in new)
        wrt = tuple(dict.fromkeys(self.pick(names) for _ in range(self.draw(_FROM[0, 2]))))
        arg = not wrt or self.chance(50)
        return Stmt(op, bodies=(body,), options=(("arg", arg), ("value", self.chance(40)), ("wrt", wrt)))

    def _loop(self, ctx):
        op = self.pick([n for n in LOOPS if not (ctx.reverse and n == "while_loop")])
        inside = {**ONCE, "axes": () if "while" in op else ctx.axes}
        options = {"length": self.pick((2, 3, 1, 0)), "reverse": self.chance(30)}
        if "while" in op:
            test = replace(ctx, axes=(), variables=(*ctx.variables, "x"))
            options["test"] = self.expr(test, 1, draws=False)
        if op == "map":
            options["length"] = max(1, options["length"])
        return Stmt(op, bodies=(self.body(ctx, **inside)[0],), options=tuple(sorted(options.items())))

    def _branch(self, ctx):
        op = self.pick(BRANCHES)
        count = 2 if op == "cond" else self.pick((2, 3))
        bodies = tuple(self.body(ctx, **ONCE, axes=())[0] for _ in range(count))
        on = Expr("read", name=self.pick(ctx.of("int"))) if self.chance(60) else self.expr(ctx, 1, draws=False)
        return Stmt(op, bodies=bodies, options=(("on", on),))

    def _vmap(self, ctx):
        size = self.pick((3, 2))
        axes_in, axes_out, kinds, targets = {}, {}, dict(ctx.kinds), set()
        for name, (kind, shape) in ctx.kinds.items():
            if name in ctx.owner or kind in ("rng", "py"):
                continue
            fits = [i for i, n in enumerate(shape) if n == size]
            if ctx.targets is not None and name not in ctx.targets:
                continue
            if fits and self.chance(60):
                axes_in[name] = self.pick(fits) - (len(shape) if self.chance(30) else 0)
                kinds[name] = kind, tuple(np.delete(shape, axes_in[name]).tolist())
            elif not self.chance(40):
                continue
            ways = ["last", "sum", "mean"] if ctx.linear or kinds[name] == ctx.kinds[name] else []
            if kind != "float":
                ways = ways[:2]  # no mean of ints
            if name in axes_in:
                ways = ["as before", axes_in[name] % len(shape), *ways]
            if ctx.linear:
                ways += [0]
            axes_out[name] = self.pick(ways) if ways else "as before"
            targets.add(name)
        for alias, name in ctx.owner.items():
            if name in kinds:
                kinds[alias] = kinds[name]
        label = self.fresh("lane")
        axes = (*ctx.axes, label) if self.chance(40) else ctx.axes
        body, new = self.body(ctx, kinds=kinds, targets=frozenset(targets), axes=axes, linear=False, lazy=False)
        for name, how in axes_out.items():
            if how != "as before" and ctx.linear and _certainly_writes(body, name):
                kind, shape = kinds[name]
                ctx.kinds[name] = kind, shape if isinstance(how, str) else (*shape[:how], size, *shape[how:])
            elif how != "as before" and ctx.linear and _lane_shape(kinds[name][1], how, size) != ctx.kinds[name][1]:
                axes_out[name] = "as before" if name in axes_in else "last"
        for alias, name in ctx.owner.items():
            if name in ctx.kinds:
                ctx.kinds[alias] = ctx.kinds[name]
        self._leaves(ctx, new, (size,))
        options = {
            "size": size,
            "label": label,
            "in": tuple(axes_in.items()),
            "out": tuple((n, a) for n, a in axes_out.items() if a != "as before"),
            "axis": self.pick((0, 1, None)),
            "out_axis": self.pick((0, -1)),
        }
        return Stmt("vmap", bodies=(body,), options=tuple(sorted(options.items())))


def _lane_shape(shape, how, size):
    return shape if isinstance(how, str) else (*shape[:how], size, *shape[how:])


def _certainly_writes(body, name):
    """Tell whether ``body`` writes ``name`` directly, under this name."""
    return any(s.op in ("write", "overwrite", "in_place", "in_place_deep") and s.name == name for s in body.block)


_BELOW = {n: st.integers(0, n - 1) for n in [*range(1, 60), 100]}
_FROM = {(a, b): st.integers(a, b) for a in range(5) for b in range(a, 6)}


@st.composite
def generate(draw):
    """Draw a program: a tuple of statements."""
    make = Generator(draw)
    ctx = Context(dict(START), depth=make.pick((1, 2, 1, 2, 3)))
    block = make.block(ctx, 0, 2)
    return (*block, make._transform(ctx), *make.block(ctx, 0, 2))


# ------------------------------------------------------------------------------------------ numbers


def fit(value, shape):
    """Return ``value`` as float64 of this shape, whatever shape it has."""
    value = jnp.asarray(value, jnp.float64)
    if value.shape == shape:
        return value
    return lax.broadcast(total(value), shape)


def total(value):
    """Return the sum of an array."""
    return lax.reduce_sum(value, tuple(range(value.ndim)))


def mix(tree):
    """Return one number that depends on every number in ``tree``, on each in another way."""
    mixed = jnp.float64(0)
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        if jnp.result_type(leaf) == jax.dtypes.float0:
            continue
        leaf = lax.convert_element_type(leaf, jnp.float64)
        weights = (i + 1.0) / (1.0 + np.arange(leaf.size, dtype=np.float64)).reshape(leaf.shape)
        mixed = lax.add(mixed, total(lax.mul(leaf, weights)))
    return lax.sin(mixed)


def number(value):
    """Return what a State holds as one float array."""
    if isinstance(value, dict):
        return lax.add(value["x"], number(value["n"][0]))
    value = jnp.asarray(value)
    return value if value.dtype == jnp.float64 else lax.mul(lax.convert_element_type(value, jnp.float64), 0.1)


def altered(old, new):
    """Return the value to write where ``old`` is."""
    if isinstance(old, dict):
        return {"x": altered(old["x"], new), "n": [altered(old["n"][0], new)]}
    if jnp.result_type(old) == jnp.int32:
        return (old * 3 + 1) % 11
    return lax.add(lax.mul(old, 0.5), lax.mul(lax.sin(fit(new, jnp.shape(old))), 0.5))


def made(kind, shape, new):
    """Return a value of this kind and shape, without looking at any other."""
    if kind == "int":
        return jnp.full(shape, 5, jnp.int32)
    if kind == "tree":
        return {"x": lax.sin(fit(new, shape)), "n": [jnp.full(shape, 2, jnp.int32)]}
    return 0.25 if kind == "py" else lax.sin(fit(new, shape))


def mixed(value, x):
    """Return one number that depends on a State and on ``x``."""
    return lax.add(lax.mul(lax.sin(total(number(value))), 0.7), lax.mul(lax.cos(x), 0.3))


def tangent(tree):
    """Return a tangent for each float in ``tree``."""
    return jax.tree.map(lambda leaf: jnp.full(jnp.shape(leaf), 0.7), floats(tree))


def floats(tree):
    """Return ``tree`` with None for what is no float."""
    return jax.tree.map(lambda leaf: leaf if jnp.result_type(leaf) == jnp.float64 else None, tree)


# ------------------------------------------------------------------------------------------ running one


class Interpreter:
    """What both ways of running have in common: expressions and statements, but no effect on a State."""

    def __init__(self):
        self.kept = {}
        self.results = []

    def evaluate(self, expr, at):
        """Return the value of an expression at ``at``, the place in the program."""
        match expr.op:
            case "const":
                return jnp.float64(expr.name)
            case "var":
                return at.variables[expr.name]
            case "read":
                return number(self.read(at, expr.name))
            case "draw":
                return self.random(at, expr.name, *expr.parts)
            case "raw":
                return self.raw(at, *expr.name, total(jnp.asarray(self.evaluate(expr.parts[0], at))))
        first, *rest = (self.evaluate(e, at) for e in expr.parts)
        match expr.op:
            case "sin":
                return lax.sin(first)
            case "cos":
                return lax.cos(first)
            case "psum":
                return lax.mul(lax.psum(first, expr.name), 0.3)
        if first.ndim == 0:
            first, rest = rest[0], [first]
        second = fit(rest[0], first.shape)
        return lax.add(first, second) if expr.op == "add" else lax.mul(lax.sin(first), second)

    def run(self, block, at):
        """Run statements."""
        for stmt in block:
            self.execute(stmt, at)

    def execute(self, stmt, at):
        """Run one statement."""
        match stmt.op:
            case "write":
                new = self.evaluate(stmt.expr, at)
                self.write(at, stmt.name, altered(self.read(at, stmt.name), new))
            case "overwrite":
                new = self.evaluate(stmt.expr, at)
                self.write(at, stmt.name, made(stmt.other, stmt.shape, new))
            case "in_place":
                new, box = self.evaluate(stmt.expr, at), self.read(at, stmt.name)
                box["x"] = altered(box["x"], new)
            case "in_place_deep":
                new, box = self.evaluate(stmt.expr, at), self.read(at, stmt.name)
                box["n"][0] = altered(box["n"][0], new)
            case "hold":
                at.box = self.read(at, stmt.name)
            case "held":
                if at.box is not None:
                    at.box["x"] = altered(at.box["x"], self.evaluate(stmt.expr, at))
            case "copy":
                self.write(at, stmt.name, self.read(at, stmt.other))
            case "let":
                at.variables[stmt.name] = self.evaluate(stmt.expr, at)
            case "alias":
                at.names[stmt.name] = self.find(at, stmt.other)
            case "create" | "keep" | "lazy":
                new = self.evaluate(stmt.expr, at)
                if stmt.op == "lazy" and self.exists(at, stmt.name):
                    return
                value = None if stmt.other == "rng" else made(stmt.other, stmt.shape, new)
                self.create(at, stmt.name, value, keep=stmt.op != "create")
            case "boom":
                raise Boom
            case "try":
                with contextlib.suppress(Boom):
                    self.run(stmt.block, at)
            case _:
                result = self.transform(stmt, at)
                if at.outermost:
                    self.results.append(result)
                at.variables[stmt.name] = mix(result)

    def find(self, at, name):
        """Return the State, or its name in the environment."""
        return at.names[name] if name in at.names else self.kept[name]

    def transform(self, stmt, at):
        """Run a statement that is a transform, by the method of its name."""
        family = (
            "derivative" if stmt.op in GRADIENTS else "peek" if stmt.op in ("eval_shape", "make_jaxpr") else stmt.op
        )
        x = self.evaluate(stmt.expr, at)
        if at.outermost:
            self.snapshot(at)
        return getattr(self, family)(stmt, at, x)

    def snapshot(self, at):
        """Remember how things are, just before a transform begins."""

    def slices(self, stmt, x):
        """Return what a loop loops over."""
        return lax.add(fit(x, (stmt["length"],)), 0.1 * np.arange(stmt["length"], dtype=np.float64))

    def index(self, stmt, at):
        """Return the number of the branch."""
        on = self.evaluate(stmt["on"], at)
        return (jnp.sum(jnp.abs(on)) * 10 + 1e-3).astype(jnp.int32) % len(stmt.bodies)

    def goes_on(self, stmt, at, val):
        """Tell whether a while loop goes on."""
        return (val[0] < 3) & (mix(self.evaluate(stmt["test"], at)) < 0.4)

    def lanes(self, stmt, x):
        """Return what a map maps over."""
        size, axis = stmt["size"], stmt["axis"]
        shape = {None: (), 0: (size,), 1: (2, size)}[axis]
        spread = np.arange(np.prod(shape, dtype=int), dtype=np.float64).reshape(shape)
        return lax.add(fit(x, shape), 0.1 * spread)


@dataclass
class Place:
    """Where a program is: the local names of one call of a function."""

    names: dict
    variables: dict = field(default_factory=dict)
    box: Any = None
    outermost: bool = True
    env: dict = field(default_factory=dict)
    written: dict = field(default_factory=dict)
    new: dict = field(default_factory=dict)

    def inner(self, **variables):
        """Return the place inside a function that closes over this one."""
        return Place(dict(self.names), {**self.variables, **variables}, outermost=False)


class Stateful(Interpreter):
    """Runs a program with States."""

    def __init__(self):
        super().__init__()
        self.runs, self.before, self.long_lived = Counter(), [], {}
        values = start()
        make = {"r": RandomState, "a": ParamState, "t": ParamState}
        self.states = {name: make.get(name, State)(value) for name, value in values.items()}

    def read(self, at, name):
        return self.find(at, name).value

    def write(self, at, name, value):
        self.find(at, name).value = value

    def random(self, at, name, how, shape):
        return getattr(self.find(at, name), how)(size=shape, dtype=jnp.float64)

    def raw(self, at, how, name, x):
        state = self.states[name]
        if (how, name) not in self.long_lived:
            self.long_lived[how, name] = RAW[how](lambda: state.value, mixed)
        return self.long_lived[how, name](x)

    def create(self, at, name, value, keep):
        state = RandomState(3) if value is None else State(value)
        (self.kept if keep else at.names)[name] = state

    def function(self, body, at):
        """Return the body as a function of ``x``."""

        def call(x):
            self.runs[id(body)] += 1
            inner = at.inner(x=x)
            self.run(body.block, inner)
            return self.evaluate(body.out, inner)

        return call

    def exists(self, at, name):
        return name in self.kept

    def snapshot(self, at):
        states = dict.fromkeys((*at.names.values(), *self.kept.values()))
        self.before = [(state, state.value, jax.tree.leaves(state.value)) for state in states]

    @contextlib.contextmanager
    def once(self, stmt, most=1):
        """Check that each body ran once."""
        before = [self.runs[id(b)] for b in stmt.bodies]
        yield
        for body, count in zip(stmt.bodies, before, strict=True):
            assert 1 <= self.runs[id(body)] - count <= most

    def transform(self, stmt, at):
        with self.once(stmt, stmt["times"] if stmt.op == "jit" and retraces(stmt.bodies[0].block) else 1):
            return super().transform(stmt, at)

    def jit(self, stmt, at, x):
        call = T.jit(self.function(stmt.bodies[0], at))
        return [call(lax.add(x, 0.1 * i)) for i in range(stmt["times"])]

    def checkpoint(self, stmt, at, x):
        policy = T.save_states(ParamState) if stmt["saving"] else None
        return T.checkpoint(self.function(stmt.bodies[0], at), policy=policy)(x)

    def peek(self, stmt, at, x):
        if stmt.op == "eval_shape":
            return [T.eval_shape(self.function(stmt.bodies[0], at), x).size]
        return [T.make_jaxpr(self.function(stmt.bodies[0], at))(x)[0].out_avals[0].size]

    def vmap(self, stmt, at, x):
        declared = {"in_states": {}, "out_states": {}}
        for key, what in (("in", "in_states"), ("out", "out_states")):
            for name, axis in stmt[key]:
                declared[what].setdefault(axis, []).append(self.find(at, name))
        options = {"axis_size": stmt["size"], "axis_name": stmt["label"]}
        options |= {"in_axes": stmt["axis"], "out_axes": stmt["out_axis"], **declared}
        return T.vmap(self.function(stmt.bodies[0], at), **options)(self.lanes(stmt, x))

    def derivative(self, stmt, at, x):
        body, wrt = self.function(stmt.bodies[0], at), list(dict.fromkeys(self.find(at, n) for n in stmt["wrt"]))

        def fun(*args):
            for state in wrt if stmt.op in ("vjp", "jvp") else ():
                _ = state.value  # these two insist that it is used
            out = body(*(args or (x,)))
            return ROW[stmt.op].call(total, lambda out: out)(out), out

        chosen, argnums = wrt or None, 0 if stmt["arg"] else None
        if stmt.op == "vjp":
            out, pull, aux = T.vjp(fun, x, grad_states=chosen, argnums=argnums, has_aux=True)
            return out, pull(jnp.ones_like(out)), pull(jnp.sin(out)), aux
        if stmt.op == "jvp":
            along = tangent([s.value for s in wrt]) if wrt else None
            args = (x,) if stmt["arg"] else ()
            return T.jvp(fun, args, tangent(args), grad_states=chosen, state_tangents=along, has_aux=True)
        options = {"has_aux": True, "return_value": stmt["value"], "check_states": False}
        return getattr(T, stmt.op)(fun, chosen, argnums, **options)(x)

    def scan(self, stmt, at, x):
        body = self.function(stmt.bodies[0], at)

        def step(carry, x):
            y = body(carry + x)
            return fit(y, ()), y

        return T.scan(step, fit(x, ()), self.slices(stmt, x), reverse=stmt["reverse"])

    def for_loop(self, stmt, at, x):
        return T.for_loop(self.function(stmt.bodies[0], at), self.slices(stmt, x), reverse=stmt["reverse"])

    def checkpointed_for_loop(self, stmt, at, x):
        return T.checkpointed_for_loop(self.function(stmt.bodies[0], at), self.slices(stmt, x), base=2)

    def map(self, stmt, at, x):
        return T.map(self.function(stmt.bodies[0], at), self.slices(stmt, x))

    def _while(self, stmt, at):
        body = self.function(stmt.bodies[0], at)
        test = lambda val: self.goes_on(stmt, at.inner(x=val[1]), val)  # noqa: E731
        return test, lambda val: (val[0] + 1, fit(body(val[1]), ()))

    def while_loop(self, stmt, at, x):
        return T.while_loop(*self._while(stmt, at), (jnp.int32(0), fit(x, ())))

    def bounded_while_loop(self, stmt, at, x):
        return T.bounded_while_loop(*self._while(stmt, at), (jnp.int32(0), fit(x, ())), max_steps=3, base=2)

    def _branches(self, stmt, at):
        return [lambda x, body=body: fit(self.function(body, at)(x), ()) for body in stmt.bodies]

    def cond(self, stmt, at, x):
        return T.cond(self.index(stmt, at), *self._branches(stmt, at), x)

    def switch(self, stmt, at, x):
        return T.switch(self.index(stmt, at), self._branches(stmt, at), x)

    def ifelse(self, stmt, at, x):
        index, branches = self.index(stmt, at), self._branches(stmt, at)
        conditions = [index == i for i in range(len(branches) - 1)]
        return T.ifelse([*conditions, True], branches, x, check_cond=False)


class Functional(Interpreter):
    """Runs a program in pure JAX: `Place.env` is all there is, and every function takes and returns one."""

    def snapshot(self, at):
        at.written.clear()

    def read(self, at, name):
        return at.env[self.find(at, name)]

    def write(self, at, name, value):
        cell = self.find(at, name)
        at.env[cell] = value
        at.written[cell] = True

    def random(self, at, name, how, shape):
        key, sub = jax.random.split(jax.random.wrap_key_data(jnp.asarray(self.read(at, name))))
        self.write(at, name, jax.random.key_data(key))
        return getattr(jax.random, how)(sub, shape, jnp.float64)

    def raw(self, at, how, name, x):
        return mixed(at.env[name], x)

    def create(self, at, name, value, keep):
        at.env[name] = jax.random.key_data(jax.random.key(3)) if value is None else value
        (self.kept if keep else at.names)[name] = name
        if keep:
            at.new[name] = True

    def exists(self, at, name):
        return name in at.env

    def function(self, body, at):
        """Return the body as a function ``env, x -> out, {cell: new value}``."""

        def call(env, x):
            inner = at.inner(x=x)
            inner.env = copied(env)
            before = {cell: jax.tree.leaves(value) for cell, value in inner.env.items()}
            self.run(body.block, inner)
            out = self.evaluate(body.out, inner)
            for cell, leaves in before.items():
                if any(a is not b for a, b in zip(leaves, jax.tree.leaves(inner.env[cell]), strict=True)):
                    inner.written[cell] = True
            changed = [cell for cell in before if cell in inner.written]
            return out, {cell: inner.env[cell] for cell in dict.fromkeys((*changed, *inner.new))}

        return call

    def settle(self, at, result):
        """Take over what a function wrote, and return its result."""
        out, new = result
        at.new.update((cell, True) for cell in new if cell not in at.env)
        at.written.update(dict.fromkeys(new, True))
        at.env.update(copied(new))
        return out

    def writes(self, call, env, *args):
        """Return the cells that a function writes."""
        found = {}

        def probe(*args):
            out, new = call(env, *args)
            found.update(dict.fromkeys(new))
            return out

        jax.eval_shape(probe, *args)
        return tuple(found)

    def jit(self, stmt, at, x):
        call = self.function(stmt.bodies[0], at)
        return [self.settle(at, call(at.env, lax.add(x, 0.1 * i))) for i in range(stmt["times"])]

    def checkpoint(self, stmt, at, x):
        return self.settle(at, jax.checkpoint(self.function(stmt.bodies[0], at))(at.env, x))

    def peek(self, stmt, at, x):
        return [jax.eval_shape(self.function(stmt.bodies[0], at), at.env, x)[0].size]

    def vmap(self, stmt, at, x):
        call, env, size = self.function(stmt.bodies[0], at), dict(at.env), stmt["size"]
        axes_in, axes_out = ({self.find(at, n): axis for n, axis in stmt[key]} for key in ("in", "out"))
        options = {"axis_size": size, "axis_name": stmt["label"]}

        def lane(x, mapped):
            return call({**env, **mapped}, x)

        def each(axes, out_axes):
            of = {cell: env[cell] for cell in axes}
            return jax.vmap(lane, in_axes=(stmt["axis"], axes), out_axes=out_axes, **options)(self.lanes(stmt, x), of)

        written = jax.eval_shape(lambda: each(axes_in, 0))[1]
        advanced = {}
        for cell in written:
            if cell in env and getattr(env[cell], "dtype", None) == np.uint32:
                key, sub = jax.random.split(jax.random.wrap_key_data(jnp.asarray(env[cell])))
                keys = jax.vmap(jax.random.fold_in, (None, 0))(sub, jnp.arange(size, dtype=jnp.uint32))
                advanced[cell], env[cell], axes_in[cell] = jax.random.key_data(key), jax.random.key_data(keys), 0
        axes = {cell: axes_out.get(cell, axes_in.get(cell) if cell in env else 0) for cell in written}
        numbers = {cell: 0 if isinstance(axis, str) else axis for cell, axis in axes.items()}
        try:
            out, new = each(axes_in, (stmt["out_axis"], numbers))
        except ValueError as error:
            if "out_axes" not in str(error):
                raise
            raise Refused from None
        reduce = {"last": lambda v: v[-1], "sum": lambda v: v.sum(0), "mean": lambda v: v.mean(0)}
        for cell, axis in axes.items():
            if isinstance(axis, str):
                new[cell] = jax.tree.map(lambda v, axis=axis: reduce[axis](v).astype(v.dtype), new[cell])
        return self.settle(at, (out, {**new, **advanced}))

    def derivative(self, stmt, at, x):
        call, env = self.function(stmt.bodies[0], at), dict(at.env)
        cells = list(dict.fromkeys(self.find(at, n) for n in stmt["wrt"]))
        given = [floats(env[cell]) for cell in cells]
        diff = (given, x) if cells and stmt["arg"] else given if cells else x

        def fun(diff):
            values, arg = diff if cells and stmt["arg"] else (diff, x) if cells else ([], diff)
            values = {
                cell: jax.tree.map(lambda old, new: old if new is None else new, env[cell], value)
                for cell, value in zip(cells, values, strict=True)
            }
            out, new = call({**env, **values}, arg)
            value = ROW[stmt.op].call(total, lambda out: out)(out)
            return value, (value, out, new)

        if stmt.op == "vjp":
            out, pull, (_, aux, new) = jax.vjp(fun, diff, has_aux=True)
            return self.settle(at, ((out, pull(jnp.ones_like(out))[0], pull(jnp.sin(out))[0], aux), new))
        if stmt.op == "jvp":
            out, along, (_, aux, new) = jax.jvp(fun, (diff,), (tangent(diff),), has_aux=True)
            return self.settle(at, ((out, along, aux), new))
        result, (value, aux, new) = ROW[stmt.op].jax(fun, has_aux=True)(diff)
        return self.settle(at, ((result, value, aux) if stmt["value"] else (result, aux), new))

    def _loop(self, stmt, at, init, xs, step, reverse=False):
        """Scan ``step(carry, x, call) -> carry, y`` where ``call(x)`` is the body."""
        call, env = self.function(stmt.bodies[0], at), dict(at.env)
        cells = self.writes(call, env, jnp.float64(0))

        def whole(carry, x):
            values = carry[1]

            def body(x):
                nonlocal values
                out, values = call({**env, **values}, x)
                return out

            carry, y = step(carry[0], x, body)
            return (carry, values), y

        (carry, new), ys = lax.scan(whole, (init, {c: env[c] for c in cells}), xs, reverse=reverse)
        return self.settle(at, ((carry, ys), new))

    def scan(self, stmt, at, x):
        def step(carry, x, body):
            y = body(carry + x)
            return fit(y, ()), y

        return self._loop(stmt, at, fit(x, ()), self.slices(stmt, x), step, stmt["reverse"])

    def for_loop(self, stmt, at, x):
        reverse = stmt["reverse"] and stmt.op == "for_loop"
        return self._loop(stmt, at, None, self.slices(stmt, x), lambda c, x, body: (c, body(x)), reverse)[1]

    checkpointed_for_loop = map = for_loop

    def while_loop(self, stmt, at, x):
        call, env = self.function(stmt.bodies[0], at), dict(at.env)
        cells = self.writes(call, env, jnp.float64(0))

        def test(carry):
            inner = at.inner(x=carry[0][1])
            inner.env = {**env, **carry[1]}
            return self.goes_on(stmt, inner, carry[0])

        def step(carry):
            (i, x), values = carry
            out, values = call({**env, **values}, x)
            return (i + 1, fit(out, ())), values

        first = (jnp.int32(0), fit(x, ())), {cell: env[cell] for cell in cells}
        if stmt.op == "while_loop":
            return self.settle(at, lax.while_loop(test, step, first))

        def once(carry, _):
            return lax.cond(test(carry), step, lambda c: c, carry), None

        return self.settle(at, lax.scan(once, first, length=3)[0])

    bounded_while_loop = while_loop

    def switch(self, stmt, at, x):
        index, env = self.index(stmt, at), dict(at.env)
        calls = [self.function(body, at) for body in stmt.bodies]
        cells = dict.fromkeys(cell for call in calls for cell in self.writes(call, env, x))

        def branch(call):
            def run(x):
                out, new = call(env, x)
                return fit(out, ()), {cell: new.get(cell, env[cell]) for cell in cells}

            return run

        branches = [branch(call) for call in calls]
        if stmt.op == "cond":
            return self.settle(at, lax.cond(index != 0, *branches, x))
        return self.settle(at, lax.switch(index, branches, x))

    cond = ifelse = switch


def copied(tree):
    """Return the same values in containers of their own."""
    return jax.tree.map(lambda leaf: leaf, tree)


def walk(block) -> Iterator[Any]:
    """Yield all statements and expressions."""
    for stmt in block:
        yield stmt
        stack = [stmt.expr, dict(stmt.options).get("on"), dict(stmt.options).get("test"), *(b.out for b in stmt.bodies)]
        while stack:
            expr = stack.pop()
            if isinstance(expr, Expr):
                yield expr
                stack.extend(expr.parts)
        yield from walk(stmt.block)
        for body in stmt.bodies:
            yield from walk(body.block)


def retraces(block):
    """Tell whether a second call may be traced again: a State is new, or is no Python number any more."""

    def python(name):
        return name == "p" or str(name).startswith("alias")  # of any State

    return any(
        node.op in ("keep", "lazy") or any(python(getattr(node, field, "")) for field in ("name", "other"))
        for node in walk(block)
    )


# ------------------------------------------------------------------------------------------ comparing


def close(got, expected):
    """Assert that structure, dtypes and numbers agree."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert not isinstance(a, jax.core.Tracer)
        assert jnp.result_type(a) == jnp.result_type(b)
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-9, atol=1e-9)


def compare(program, compiled=False) -> str:
    """Run ``program`` in both ways, that with States compiled or not; return how it ended."""
    functional, stateful = Functional(), Stateful()
    way = (lambda run: run()) if compiled else interpreted
    at = Place({name: name for name in START}, env=start())
    ends = Place(dict(stateful.states))
    for stmt in program:
        expected = interpreted(lambda stmt=stmt: _outcome(functional, stmt, at))
        got = way(lambda stmt=stmt: _outcome(stateful, stmt, ends))
        assert_no_scope()
        assert got == expected
        before = stateful.before if stmt.bodies else []
        if got != "done":
            for state, value, leaves in before:
                assert state.value is value
                assert all(a is b for a, b in zip(jax.tree.leaves(value), leaves, strict=True))
            return got
        for name, state in {**ends.names, **stateful.kept}.items():
            cell = functional.find(at, name)
            close(state.value, at.env[cell])
            if cell not in at.written:
                assert all(state.value is value for s, value, _ in before if s is state)
        close(stateful.results, functional.results)
    return "done"


def _outcome(interpreter, stmt, at):
    try:
        interpreter.execute(stmt, at)
    except Boom:
        return "boom"
    except (Refused, BatchAxisError):
        return "refused"
    return "done"
