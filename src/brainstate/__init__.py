"""State-aware automatic differentiation for JAX."""

from . import graph, nn, random, transform, util
from ._errors import (
    BatchAxisError,
    BrainStateError,
    DensePatternWarning,
    FrozenReadWarning,
    GradientCheckError,
    NonFiniteError,
    NoSolutionError,
    StateTypeError,
    StateValueError,
    TraceContextError,
)
from ._state import BatchState, HiddenState, LongTermState, ParamState, ShortTermState, State

__version__ = "0.1.0"

__all__ = [
    "BatchAxisError",
    "BatchState",
    "BrainStateError",
    "DensePatternWarning",
    "FrozenReadWarning",
    "GradientCheckError",
    "HiddenState",
    "LongTermState",
    "NoSolutionError",
    "NonFiniteError",
    "ParamState",
    "ShortTermState",
    "State",
    "StateTypeError",
    "StateValueError",
    "TraceContextError",
    "graph",
    "nn",
    "random",
    "transform",
    "util",
]
