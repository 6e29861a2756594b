"""The names of JAX's primitives and of their equations' parameters: those in the source, and those of this JAX.

The source is read, not run. An expression *is a name* if it is an attribute ``primitive`` or ``primitive.name``, or a
variable called ``primitive`` or made from one of these in the same function. The strings that such an expression is
compared with, looked up in, or matched against are names of primitives: written there, or in a table of any module. A
string that indexes ``….params``, ``params`` or ``p`` is the name of a parameter.
"""

import ast
import importlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive

from _source import Module

__all__ = ["dead_primitives", "live_parameters", "live_primitives", "parameters_named", "primitives_named"]

# Names that one supported JAX has and another has not; the tests prove that on either.
ELSEWHERE = {"closed_call": "0.10", "num_carry": "0.10", "ft_in": "0.12"}
HERE = ".".join(jax.__version__.split(".")[:2])

_FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
_COLLECTIONS = ("makers", "primitives")  # what holds names of primitives
Places = dict[str, list[str]]


# ------------------------------------------------------------------------------------------ the source


def _tables(module: Module) -> Iterator[tuple[str, ast.expr]]:
    """Yield each name that is assigned at module level, with its value."""
    for node in module.tree.body:
        match node:
            case ast.Assign([ast.Tuple(targets)], ast.Tuple(values)):
                yield from ((target.id, v) for target, v in zip(targets, values, strict=True))
            case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), value=ast.expr() as value):
                yield name, value


def _strings(node: ast.AST | None, module: str, tables: dict) -> set[str]:
    """Return the strings in a table: its elements, or the keys of a dictionary."""

    def inner(*nodes):
        return set().union(*(_strings(each, module, tables) for each in nodes))

    match node:
        case ast.Constant(str(text)):
            return {text}
        case ast.Tuple(elements) | ast.List(elements) | ast.Set(elements):
            return inner(*elements)
        case ast.Dict(keys, values):
            return inner(*(key or value for key, value in zip(keys, values, strict=True)))
        case ast.BinOp(left, ast.BitOr(), right):
            return inner(left, right)
        case ast.Call(ast.Attribute(text, "split")):
            return {word for string in inner(text) for word in string.split()}
        case ast.Call(ast.Name("frozenset" | "set" | "tuple") | ast.Attribute(attr="fromkeys"), [first, *_]):
            return inner(first)
        case ast.Name(name) if (module, name) in tables:
            where, value = tables[module, name]
            return _strings(value, where, tables)
    return set()


def _is_name(node: ast.AST, local: set[str]) -> bool:
    match node:
        case ast.Attribute(ast.Attribute(attr="primitive"), "name") | ast.Attribute(attr="primitive"):
            return True
        case ast.Name(name):
            return name in local or name == "primitive"
    return False


def _local(function: ast.AST) -> set[str]:
    """Return the variables of a function that hold the name of a primitive."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=True))
            else:
                pairs = [(target, value)]
            found |= {t.id for t, v in pairs if isinstance(t, ast.Name) and _is_name(v, set())}
    return found


def _uses(node: ast.AST, local: set[str]) -> Iterator[tuple[ast.expr, Callable[[str, str], bool]]]:
    """Yield what holds names of primitives because of how ``node`` uses it, and how such a name is recognised."""
    match node:
        case ast.Compare(left, [ast.Eq() | ast.NotEq() | ast.In() | ast.NotIn() as operator], [right]):
            if _is_name(left, local):
                yield right, str.__eq__
            elif _is_name(right, local):
                yield left, str.__contains__ if isinstance(operator, ast.In) else str.__eq__
            elif isinstance(right, ast.Attribute) and right.attr in _COLLECTIONS:
                yield left, str.__eq__
        case ast.Subscript(table, key) | ast.Call(ast.Attribute(table, "get"), [key, *_]) if _is_name(key, local):
            yield table, str.__eq__
        case ast.Call(ast.Attribute(name, "startswith"), [prefix]) if _is_name(name, local):
            yield prefix, str.startswith
        case ast.Match(subject, cases) if _is_name(subject, local):
            for each in (pattern for case in cases for pattern in ast.walk(case.pattern)):
                if isinstance(each, ast.MatchValue):
                    yield each.value, str.__eq__


def primitives_named(modules: Iterable[Module]) -> dict[str, tuple[Callable, list[str]]]:
    """Return the names of primitives in the source, how each is recognised, and the modules that write it."""
    modules = list(modules)
    tables = {(module.name, name): (module.name, value) for module in modules for name, value in _tables(module)}
    for module in modules:
        for _, target in module.imports():
            where, _, name = target.rpartition(".")
            if (where, name) in tables:
                tables[module.name, name] = tables[where, name]
    found: dict[str, tuple[Callable, list[str]]] = {}
    for module in modules:
        for function in module.tree.body:
            local = _local(function)
            for node in ast.walk(function):
                for table, recognised in _uses(node, local):
                    for name in _strings(table, module.name, tables):
                        _, places = found.setdefault(name, (recognised, []))
                        places.append(module.name)
    return found


def parameters_named(modules: Iterable[Module]) -> Places:
    """Return the names of equations' parameters in the source, and the modules that write them."""
    found = defaultdict(list)
    for module in modules:
        for node in ast.walk(module.tree):
            for name in _keys(node):
                found[name].append(module.name)
    return dict(found)


def _keys(node: ast.AST) -> Iterator[str]:
    match node:
        case (
            ast.Subscript(params, ast.Constant(str(name)))
            | ast.Call(ast.Attribute(params, "get"), [ast.Constant(str(name)), *_])
            | ast.Compare(ast.Constant(str(name)), [ast.In() | ast.NotIn()], [params])
        ) if _is_params(params):
            yield name
        case ast.DictComp(
            value=ast.Subscript(params, ast.Name(key)), generators=[ast.comprehension(ast.Name(each), names)]
        ):
            if key == each and _is_params(params):
                yield from _strings(names, "", {})


def _is_params(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(attr="params") | ast.Name("params" | "p"):
            return True
    return False


# ------------------------------------------------------------------------------------------ this JAX


def dead_primitives(modules: Iterable[Module]) -> dict[str, list[str]]:
    """Return the names of primitives in the source that no supported JAX knows, and the modules that write them."""
    live = live_primitives() | {name for name, version in ELSEWHERE.items() if version != HERE}
    named = primitives_named(modules).items()
    return {name: places for name, (recognised, places) in named if not any(recognised(x, name) for x in live)}


def _primitives() -> dict[str, Primitive]:
    """Return all primitives that a module of JAX or of this package holds, by name."""
    for name in (
        "brainstate",
        *(f"jax.experimental.{part}" for part in ("sparse", "checkify", "compute_on", "jet", "pallas")),
    ):
        importlib.import_module(name)
    modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] in ("jax", "brainstate")]
    return {thing.name: thing for module in modules for thing in vars(module).values() if isinstance(thing, Primitive)}


def live_primitives() -> set[str]:
    """Return their names."""
    return set(_primitives())


@jax.custom_jvp
def _with_jvp(x):
    return x


@jax.custom_vjp
def _with_vjp(x):
    return x


@jax.custom_batching.custom_vmap
def _with_vmap(x):
    return x


_with_jvp.defjvp(lambda primals, tangents: (primals[0], tangents[0]))
_with_vjp.defvjp(lambda x: (x, None), lambda _, ct: (ct,))
_with_vmap.def_vmap(lambda size, batched, x: (x, batched[0]))
_KERNEL = np.ones((1, 1, 2, 2), np.float32)

# Small functions of a 4 x 4 matrix, which together hold every kind of equation whose parameters the source reads.
PROGRAMS: dict[str, Callable] = {
    "jit": jax.jit(jnp.sin),
    "remat": jax.checkpoint(jnp.sin),
    "custom_jvp": _with_jvp,
    "custom_vjp": _with_vjp,
    "custom_vmap": _with_vmap,
    "scan": lambda x: jax.lax.scan(lambda c, y: (c + y, y), x[0], x),
    "while": lambda x: jax.lax.while_loop(lambda c: c.sum() < 1, lambda c: c + x, x),
    "cond": lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
    "moves": lambda x: jnp.flip(x[1:3, None].reshape(8).reshape(2, 4).T, 0).squeeze(),
    "tile": lambda x: jnp.tile(x, (2, 2)),
    "join": lambda x: jnp.concatenate([*jnp.split(x, [1, 3]), jnp.stack([x[0], x[1]])]),
    "unstack": jnp.unstack,
    "pad": lambda x: jax.lax.pad(x, 0.0, [(1, 1, 0)] * 2),
    "reduce": lambda x: (x.sum(0), jnp.cumsum(x, 0), jnp.argmax(x, 0)),
    "windows": lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (2, 2), (1, 1), "VALID"),
    "dot": lambda x: x @ x,
    "convolution": lambda x: jax.lax.conv_general_dilated(x[None, None], _KERNEL, (1, 1), "SAME"),
    "fft": jnp.fft.fft,
    "solve": lambda x: jax.scipy.linalg.solve_triangular(x, x),
    "gather": lambda x: x[jnp.arange(3), jnp.arange(3)],
    "scatter": lambda x: x.at[jnp.arange(3)].add(1.0),
    "slices": lambda x: jax.lax.dynamic_slice(x, (x.astype(int)[0, 0], 0), (2, 2)),
    "iota": lambda x: jax.lax.broadcasted_iota(int, (2, 3), 1),
    "round": jnp.round,
    "state_read": lambda x: _primitives()["state_read"].bind(state=0, leaf=0, aval=jax.typeof(x)),
}  # fmt: skip


def _inner(parameter) -> list:
    parts = parameter if isinstance(parameter, tuple | list) else [parameter]
    return [getattr(part, "jaxpr", part) for part in parts if isinstance(part, ClosedJaxpr | Jaxpr)]


def live_parameters() -> dict[str, set[str]]:
    """Return the names of parameters in the equations of small programs, and the primitives that have each."""
    x, found = jnp.ones((4, 4)), defaultdict(set)
    pending = [jax.make_jaxpr(program)(x).jaxpr for program in PROGRAMS.values()]
    while pending:
        for eqn in pending.pop().eqns:
            for name, parameter in eqn.params.items():
                found[name].add(eqn.primitive.name)
                pending.extend(_inner(parameter))
    return dict(found)
