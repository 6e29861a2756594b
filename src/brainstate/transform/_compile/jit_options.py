"""Options of ``jax.jit`` for a function that has the values of States in front of the user's arguments."""

import functools
import inspect
import operator
import weakref
from typing import Any

import jax

from ..._compat import UNSPECIFIED
from ..._functions import named_after, signature_of, with_leading

__all__ = ["compiler", "in_tuples", "static_places", "with_states"]


def in_tuples(options) -> dict[str, Any]:
    """Return ``options`` with positions as tuples of ints, which JAX takes in other forms as well."""
    given = {key: options[key] for key in ("static_argnums", "donate_argnums") if options.get(key) is not None}
    return options | {key: _indices(numbers) for key, numbers in given.items()}


def _indices(numbers) -> tuple[int, ...]:
    try:
        return (operator.index(numbers),)
    except TypeError:
        return tuple(map(operator.index, numbers))


def with_states(fun, program):
    """Return ``program.pure`` under the name of ``fun``, with its signature behind the values of the States.

    From the signature JAX infers names of static arguments from numbers and back, and names the inputs. The program
    holds JAX's compiled function, which does not hold the program: so both go as soon as nobody needs them.
    """
    held: Any = weakref.ref(program)

    def call_keeping(states, /, *args, **kwargs):
        return held().pure(states, *args, **kwargs)

    def call_donating(donated_states, states, /, *args, **kwargs):
        return held().pure(held().restore(donated_states, states), *args, **kwargs)

    stateful: Any = call_donating if program.donates else call_keeping
    signature = signature_of(fun)
    if signature is not None:
        mine = [p.name for p in inspect.signature(stateful).parameters.values() if p.kind is p.POSITIONAL_ONLY]
        stateful.__signature__ = with_leading(signature, mine)
    for attribute in ("__name__", "__qualname__", "__doc__", "__module__"):
        if hasattr(fun, attribute):
            setattr(stateful, attribute, getattr(fun, attribute))
    return named_after(stateful, fun)


def compiler(stateful, fun, given, lead):
    """Return ``jax.jit`` of ``stateful``, which takes ``lead`` more arguments in front than ``fun``."""
    shifted, front = _shift_options(fun, given, lead), [UNSPECIFIED] * lead
    shardings = shifted.get("in_shardings")
    if shardings is None or shardings is UNSPECIFIED:
        return jax.jit(stateful, **shifted)
    if isinstance(shardings, tuple | list):
        shifted["in_shardings"] = (*front, *shardings)
        return jax.jit(stateful, **shifted)
    static = static_places(fun, shifted, lead)

    @functools.cache
    def for_count(count):
        dynamic = set(range(lead, count)) - {n % count for n in static}
        options: dict[str, Any] = shifted | {"in_shardings": (*front, *[shardings] * len(dynamic))}
        return jax.jit(stateful, **options)

    return _ForAnyCount(for_count)


class _ForAnyCount:
    """``jax.jit`` with one sharding for all positional arguments, however many a call has."""

    def __init__(self, for_count):
        self._for_count = for_count

    def __call__(self, *args, **kwargs):
        return self._for_count(len(args))(*args, **kwargs)

    def __getattr__(self, step):
        return lambda *args, **kwargs: getattr(self._for_count(len(args)), step)(*args, **kwargs)


def static_places(fun, options, lead):
    """Return the positions of static arguments; as JAX does, from their names where only these are given."""
    numbers = options.get("static_argnums")
    if numbers is not None:
        return numbers
    names = options.get("static_argnames") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    signature = signature_of(fun)
    known = signature.parameters.values() if signature else ()
    return tuple(i + lead for i, p in enumerate(known) if p.name in names and p.kind is not p.KEYWORD_ONLY)


def _shift_options(fun, given, lead) -> dict[str, Any]:
    """Return the options ``given`` to ``jax.jit`` for a function with ``lead`` more arguments, two where it donates."""
    options: dict[str, Any] = dict(given)
    for key in ("static_argnums", "donate_argnums"):
        numbers = options.get(key)
        if numbers is not None:
            options[key] = tuple(n + lead if n >= 0 else n for n in numbers)
    if lead == 2:
        names = {"static_argnames": options.get("donate_argnames")}
        options["donate_argnums"] = (0, *(options.get("donate_argnums") or static_places(fun, names, lead)))
    if options.get("out_shardings", UNSPECIFIED) is not UNSPECIFIED:
        options["out_shardings"] = (options["out_shardings"], UNSPECIFIED)
    return options
