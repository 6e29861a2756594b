"""The exceptions of the package, one small tree.

::

    Exception
    └── BrainStateError                 catch this to catch everything below
        ├── StateTypeError              (also TypeError)   an argument or a State is of the wrong kind
        ├── StateValueError             (also ValueError)  right kind, unusable value
        ├── TraceContextError           a State met a transform that does not know it
        ├── BatchAxisError              lanes of a map disagree about a State
        ├── GradientCheckError          (also AssertionError)   a derivative is wrong
        ├── NonFiniteError              (also RuntimeError)     a derivative holds NaN or infinities
        └── NoSolutionError             (also RuntimeError)     a solver found no solution
    Warning
    └── UserWarning
        ├── FrozenReadWarning           a raw ``jax.jit`` compiles a State's value in as a constant
        └── DensePatternWarning         a sparse derivative takes a loop to mix all that enters it

A message says which State (by path or name) or which argument, the rule, and how to comply.
"""

from typing import Any

__all__ = [
    "BatchAxisError",
    "BrainStateError",
    "DensePatternWarning",
    "FrozenReadWarning",
    "GradientCheckError",
    "NoSolutionError",
    "NonFiniteError",
    "StateTypeError",
    "StateValueError",
    "TraceContextError",
    "a_type",
    "article",
]


def a_type(thing: Any) -> str:
    """Name the type of ``thing`` with its article, for a message: ``an int``, ``a list``."""
    return article(type(thing).__name__)


def article(name: str) -> str:
    """Return ``name`` with its article; a u, as in uint8, is said as in ``you``."""
    return f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"


class BrainStateError(Exception):
    """Base class of every error that this package raises on purpose."""


class StateTypeError(BrainStateError, TypeError):
    """An argument, or the value of a State, is of the wrong kind."""


class StateValueError(BrainStateError, ValueError):
    """An argument is of the right kind and still cannot be used."""


class TraceContextError(BrainStateError):
    """A State was used under a JAX transform that does not know States, or after its transform ended."""


class BatchAxisError(BrainStateError):
    """A State was written lane by lane under a mapping transform without a declared axis."""


class GradientCheckError(BrainStateError, AssertionError):
    """A derivative, or a differentiated call, fails a test of `check_grads`."""


class NonFiniteError(BrainStateError, RuntimeError):
    """A derivative with ``debug_nan=True`` met NaN or an infinity; the attributes have its origin, for tools.

    Attributes
    ----------
    kind : str or None
        ``'NaN'`` or ``'Inf'``: the result of the first operation.
    phase : str or None
        ``'forward'``: in computing the value; ``'backward'``: in its derivative; ``'input'``: it was there before.
    file, line, function, source : str, int, str, str, or None
        The line of the user that the operation belongs to.
    primitive : str or None
        The name of the operation.
    path : tuple of str
        The loops and branches around it, from outside in.
    iteration, branch : int or None
        Those of the innermost loop and branch; a checkpointed loop is cut into parts, and counts within one.
    operands : tuple of str
        Type and range of each operand.
    reached : tuple of str
        The States and arguments whose derivative is not finite.
    inputs : tuple of str
        The States and arguments that held NaN or infinities before, if this is the cause.
    lane : tuple of int
        Under ``vmap``, the first lane that is not finite.
    """

    kind: str | None = None
    phase: str | None = None
    file: str | None = None
    line: int | None = None
    function: str | None = None
    source: str | None = None
    primitive: str | None = None
    path: tuple[str, ...] = ()
    iteration: int | None = None
    branch: int | None = None
    operands: tuple[str, ...] = ()
    reached: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    lane: tuple[int, ...] = ()

    def __init__(self, message: str, **facts: Any):
        super().__init__(message)
        self.__dict__.update(facts)


class NoSolutionError(BrainStateError, RuntimeError):
    """`root`, `fixed_point` or `argmin` found no solution, in one lane of a map at least."""


class FrozenReadWarning(UserWarning):
    """A State was read under a raw staging transform: its value became a constant of the compiled code."""


class DensePatternWarning(UserWarning):
    """The sparsity pattern of a long loop is that of all its iterations taken together, and may be dense."""
