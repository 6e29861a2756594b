"""Write ``random/__init__.pyi``, the types of the samplers, from their table: tools that do not run code need them."""

import inspect
from pathlib import Path

from brainstate.random import _generator, _samplers

FILE = Path(_samplers.__file__).with_name("__init__.pyi")
HEAD = '''"""The types of the samplers, written by `make docs` from their table."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike, DTypeLike

from . import _generator
from ._generator import seed as seed
from ._generator import seed_context as seed_context

_Size = int | Sequence[int] | None
_Numbers = ArrayLike | Sequence[Any]

'''
TAIL = """
DEFAULT: RandomState

def default_rng(s: Any = None) -> RandomState: ...
def clone_rng(s: Any = None, clone: bool = True) -> RandomState: ...
"""
TYPES = {"size": "_Size", "dtype": "DTypeLike | None", "key": "Any", "dn": "int", "method": "str"}
TYPES |= dict.fromkeys(["check_valid", "replace", "independent"], "bool") | {"axis": "int"}
KEYS = ["get_key", "get_key_data", "restore_key", "self_assign_multi_keys", "set_key", "split_key", "split_keys"]


def parameter(p):
    """Return a parameter with its type."""
    kind = TYPES.get(p.name, "_Numbers")
    if p.default is None and not kind.endswith(("None", "_Size", "Any")):
        kind += " | None"
    star = "*" if p.kind is p.VAR_POSITIONAL else ""
    default = "" if p.default is p.empty else f" = {p.default!r}".replace("'", '"')
    return f"{star}{p.name}: {kind}{default}"


def sampler(name, first=()):
    """Return the definition of a sampler."""
    shown, parameters = list(first), list(_samplers.SAMPLERS[name].public_signature.parameters.values())
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and "*" not in shown and not any(s.startswith("*") for s in shown):
            shown.append("*")
        shown.append(parameter(p))
    return f"def {name}({', '.join(shown)}) -> jax.Array: ..."


def key_function(name):
    """Return the definition of a function that is a method of the default generator."""
    signature = inspect.signature(getattr(_generator.RandomState, name))
    parameters = [p for p in signature.parameters.values() if p.name != "self"]
    text = str(signature.replace(parameters=parameters)).replace("jax.jaxlib._jax.Array", "jax.Array")
    return f"def {name}{text.replace('typing.Any', 'Any')}: ..."


def page():
    """Return the whole file."""
    names = _samplers.SAMPLERS
    methods = "\n".join(f"    {sampler(name, ['self'])}" for name in names)
    functions = "\n".join([*map(key_function, KEYS), *map(sampler, names)])
    return f"{HEAD}class RandomState(_generator.RandomState):\n{methods}\n{TAIL}{functions}\n"


if __name__ == "__main__":
    FILE.write_text(page())
