"""The exceptions of the package, one small tree.

::

    Exception
    └── BrainStateError                 catch this to catch everything below
        ├── StateTypeError              (also TypeError)   an argument or a State is of the wrong kind
        ├── StateValueError             (also ValueError)  right kind, unusable value
        ├── TraceContextError           a State met a transform that does not know it
        ├── BatchAxisError              lanes of a map disagree about a State
        └── GradientCheckError          (also AssertionError)   a derivative is not what it has to be
    Warning
    └── UserWarning
        └── FrozenReadWarning           a raw ``jax.jit`` compiles a State's value in as a constant

A message says which State (by path or name) or which argument, what the rule is and how to comply.
"""

__all__ = [
    "BatchAxisError",
    "BrainStateError",
    "FrozenReadWarning",
    "GradientCheckError",
    "StateTypeError",
    "StateValueError",
    "TraceContextError",
]


class BrainStateError(Exception):
    """Base class of every error that this package raises on purpose."""


class StateTypeError(BrainStateError, TypeError):
    """An argument, or what a State holds, is of the wrong kind."""


class StateValueError(BrainStateError, ValueError):
    """An argument is of the right kind and still cannot be used."""


class TraceContextError(BrainStateError):
    """A State was used under a JAX transform that does not know States, or after its transform ended."""


class BatchAxisError(BrainStateError):
    """A State was written lane by lane under a mapping transform without a declared axis."""


class GradientCheckError(BrainStateError, AssertionError):
    """A derivative, or a differentiated call, does not do what `check_grads` asks of it."""


class FrozenReadWarning(UserWarning):
    """A State was read under a raw staging transform: its value became a constant of the compiled code."""
