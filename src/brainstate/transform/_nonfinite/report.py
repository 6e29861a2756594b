"""A staged call as a `Program` that can be searched on given inputs, and the text of the error that tells its finding.

The names in the text come from here: of arguments, States and constants that go in, and of gradients, value, aux and
States that come out.
"""

import linecache
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from ..._errors import NonFiniteError
from ..._program.interpret import all_equations
from ..._program.source_lines import is_part
from ..._seam.scope import gather, is_tracer
from ..._seam.staging import Staged
from .advice import describe_array, remedy_for
from .search import Given, Origin, TracedValue, inexact, origins

__all__ = ["Program", "Untraceable", "describe_line", "facts_of", "is_input", "untraceable_reason"]

_MANY = 6  # names in a message


def is_input(leaf: Any) -> bool:
    """Tell whether ``leaf`` of the arguments becomes an input of the program: a tracer, or one not known yet."""
    return is_tracer(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def untraceable_reason(problem: Exception) -> str:
    """Say why a function cannot be traced, from the error."""
    python = isinstance(problem, jax.errors.ConcretizationTypeError)
    what = "it looks at values in Python" if python else _first_line(problem)
    return f"The function cannot be traced ({type(problem).__name__}: {what})"


# ------------------------------------------------------------------------------------------ a program that is searched


class Untraceable:
    """Stands for the `Program` of a function that cannot be traced: there is nothing to search."""

    def __init__(self, name: str, problem: Exception):
        self._text = (
            f"{name}: the result is not finite.\n  {untraceable_reason(problem)}, so that no operation is known."
        )
        if isinstance(problem, jax.errors.ConcretizationTypeError):
            self._text += " Use jnp.where or brainstate.transform.cond in place of Python's if to have it."

    def without_product(self) -> "Untraceable":
        """Return itself: nothing is known of either part."""
        return self

    def search(self, *inputs: Any) -> NonFiniteError:
        """Return the error that says why nothing more is known."""
        return NonFiniteError(self._text)


@dataclass(frozen=True, eq=False)
class Program:
    """One call as a traced program, with names for its inputs and outputs.

    It outlives the trace, in JAX's caches too, and so it holds no State and no tracer.
    """

    name: str
    jaxpr: Any
    labels: list[str | None]  # of the constants and the arguments
    states: list[tuple[int, int, str]]  # id of a State, number of a leaf, name of the State
    suspects: list[str]  # arguments that are not finite, if they are constants that cannot be told apart
    derivative: set[int]  # which outputs belong to it
    value: set[int]
    reached: list[tuple[str, int]]  # a differentiated value, and an output that is its derivative
    others: list[tuple[str, set[int]]]  # the other outputs
    product: set[int]  # outputs of the derivative that are a product with a linear map
    ignored: frozenset[int] = frozenset()  # outputs that may be anything

    @classmethod
    def from_staged(cls, check: Any, staged: Staged, args: tuple, kwargs: dict, vector: tuple, of_map: bool) -> tuple:
        """Return the program of a staged `DerivativeCheck`, and its inputs: constants, leaves of States, arguments.

        ``of_map``: the derivative is a pair (product with a linear map, other derivatives).
        """
        paths = jax.tree_util.tree_leaves_with_path((args, kwargs, vector))
        leaves = [(_describe_input(path, check.vector_name), leaf) for path, leaf in paths]
        known = {id(leaf): label for label, leaf in leaves}
        labels = [known.get(id(c)) for c in staged.closed.consts] + [leaves[i][0] for i in staged.places]
        fixed = [(label, leaf) for label, leaf in leaves if inexact(leaf) and not is_input(leaf)]
        suspects = [label for label, leaf in fixed if not np.isfinite(np.asarray(leaf)).all()]
        reads = list(staged.reads)
        values = [jax.tree.leaves(value) for value in gather(reads)]
        states = [(id(s), i, s.describe()) for s, v in zip(reads, values, strict=True) for i in range(len(v))]
        carried, writes = staged.out_tree.unflatten(range(staged.out_tree.num_leaves))
        derivative, value, *aux = carried.tree()
        product = derivative[0] if of_map else ()
        others = [("the value", value), ("aux", aux)]
        others += [(s.describe(), v) for s, v in zip(writes.states, writes.values, strict=True)]
        jaxpr = staged.closed.jaxpr
        program = cls(
            check.name,
            jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars]),  # or it would keep the constants
            labels,
            states,
            suspects,
            _output_numbers(derivative),
            _output_numbers(value),
            _find_reached(derivative, *check.inputs(args, kwargs)),
            [(name, _output_numbers(part)) for name, part in others],
            _output_numbers(product),
        )
        dynamic = [leaves[i][1] for i in staged.places]
        return program, ([*staged.closed.consts], [leaf for v in values for leaf in v], dynamic)

    def without_product(self) -> "Program":
        """Return the program that is searched for the results beside the product."""
        return replace(self, ignored=frozenset(self.product))

    def search(self, constants, states, dynamic, lane=()) -> NonFiniteError:
        """Run the program on these inputs, operation by operation, and return the error that tells the finding."""
        outputs: list[TracedValue] = []
        strict = self.derivative | self.value

        def faulty(outs):
            outputs[:] = outputs or outs
            asked = [(n, out) for n, out in enumerate(outs) if n not in self.ignored]
            return [out for n, out in asked if out.nan or (out.inf and n in strict)]

        named = zip([*constants, *dynamic], self.labels, strict=True)
        inputs = [TracedValue.from_array(leaf, [Given(label)]) for leaf, label in named]
        given = {
            (state, i): TracedValue.from_array(leaf, [Given(name)])
            for (state, i, name), leaf in zip(self.states, states, strict=True)
        }
        flags = [n in self.derivative for n in range(len(self.jaxpr.outvars))]
        try:
            with jax.debug_nans(False), jax.debug_infs(False):  # they would stop the search at its aim
                found = origins(self.jaxpr, inputs, given, flags, faulty)
        except Exception as problem:
            return NonFiniteError(
                f"{self.name}: the result is not finite, and its program cannot be run operation by operation here "
                f"({type(problem).__name__}: {_first_line(problem)}).",
                lane=lane,
            )
        return self._report(found, outputs, lane)

    def _report(self, found, outputs, lane) -> NonFiniteError:
        bad = {n for n, out in enumerate(outputs) if not out.finite} - self.ignored
        reached = tuple(dict.fromkeys(name for name, n in self.reached if n in bad))
        also = [] if reached or not bad & self.derivative else ["the derivative"]
        also += [name for name, numbers in self.others if numbers & bad]
        more = [f"{len(reached) - _MANY} more"] if len(reached) > _MANY else []
        lines = [f"reached     {', '.join([*reached[:_MANY], *more, *also])}"]
        if lane:
            lines.append(f"lane        {', '.join(map(str, lane))} of vmap, the first of those that are not finite")
        facts: dict[str, Any] = {"reached": reached, "lane": lane}
        given = [cause for cause in found if isinstance(cause, Given)]
        if given:
            names = sorted({cause.name for cause in given if cause.name}) or self.suspects
            site = None if names else given[0].site
            used = f" (used at {describe_line(site)})" if site else ""
            where = " and ".join(names) or f"a constant that the function refers to{used}"
            text = f"{self.name}: {where} already holds NaN or infinities, and they reach the result."
            return NonFiniteError(_text(text, lines), phase="input", inputs=tuple(names), **facts_of(site), **facts)
        if not found:
            text = (
                f"{self.name}: the result is not finite, but it is when its program runs one operation after the "
                f"other. The compiled program rounds in another way: values are close to the limit of their dtype."
            )
            return NonFiniteError(_text(text, lines), **facts)
        if found[0].where.path and any(map(is_part, all_equations(self.jaxpr))):
            lines.append("iterations  are counted within a part of a checkpointed or bounded loop, which has many")
        return _describe_origin(self.name, found[0], len(found) - 1, lines, facts)


def _find_reached(derivative, names, structure) -> list[tuple[str, int]]:
    """Return the pairs (differentiated value, output); the structure of a gradient may stand in another one."""
    if structure is None:
        return []
    derivative = jax.tree.map(lambda part: jax.tree.leaves(part)[0], derivative, is_leaf=_is_sparse)
    parts = jax.tree.leaves(derivative, is_leaf=lambda part: jax.tree.structure(part) == structure)
    if any(jax.tree.structure(part) != structure for part in parts):
        return []
    pairs = [pair for part in parts for pair in zip(names, jax.tree.leaves(part), strict=True)]
    return [(name, n) for name, n in pairs if type(n) is int]


def _is_sparse(part) -> bool:
    return hasattr(type(part), "nse")  # a matrix: its numbers are the first of its leaves


def _output_numbers(tree) -> set[int]:
    return {n for n in jax.tree.leaves(tree) if type(n) is int}


def _first_line(problem) -> str:
    return str(problem).partition("\n")[0]


def _describe_input(path, vector_name) -> str:
    """Return the name of a leaf of ``(args, kwargs, vector)``."""
    part, place, *rest = path
    name = vector_name if part.idx == 2 else f"argument {getattr(place, 'idx', getattr(place, 'key', place))!r}"
    return f"{name}{jax.tree_util.keystr(tuple(rest))}"


# ------------------------------------------------------------------------------------------ the text


def _text(head, lines) -> str:
    return "\n".join([head, *(f"  {line}" for line in lines)])


def describe_line(site: Any) -> str:
    """Return the place of a line of the user, and the line."""
    source = linecache.getline(site.file, site.line).strip()
    return f"{site.file}:{site.line}, in {site.function}" + (f"\n    {source}" if source else "")


def facts_of(site: Any) -> dict[str, Any]:
    """Return the attributes of a `NonFiniteError` that say the line of the user."""
    if site is None:
        return {}
    source = linecache.getline(site.file, site.line).strip() or None
    return {"file": site.file, "line": site.line, "function": site.function, "source": source}


def _describe_origin(name, origin: Origin, others, lines, facts) -> NonFiniteError:
    where, site = origin.where, origin.where.site
    head = f"{name}: the first {origin.kind} appears in the {origin.phase} pass"
    head += f", at {describe_line(site)}" if site else ", at an operation whose line is not known"
    operands = tuple(map(describe_array, origin.operands))
    called = f", in {where.called}" if where.called and where.called != origin.primitive else ""
    found = [f"operation   {origin.primitive}{called}"]
    found += [f"inside      {', '.join(where.path)}"] if where.path else []
    found += [f"layer       {site.layer}"] if site and site.layer else []
    found += [f"operand     {operand}" for operand in operands]
    found += [f"infinite    before: {', '.join(origin.before)}"] if origin.before else []
    found.append(f"result      {describe_array(origin.result)}")
    spoilt = origin.spoilt
    if spoilt is not None:
        there = f", at {spoilt.where.site.file}:{spoilt.where.site.line}" if spoilt.where.site else ""
        found.append(f"becomes NaN in {spoilt.primitive} ({spoilt.phase}){there}")
    cause, repair = remedy_for(origin)
    found += lines
    found += [f"and         {others} more such operation{'s' if others > 1 else ''} later"] if others else []
    found += [f"likely      {cause}", f"repair      {repair}"]
    facts |= {"kind": origin.kind, "phase": origin.phase, "primitive": origin.primitive, "operands": operands}
    facts |= {"inputs": origin.before, "path": where.path, "iteration": where.iteration, "branch": where.branch}
    return NonFiniteError(_text(head, found), **facts_of(site), **facts)
