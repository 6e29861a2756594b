"""For tools that do not run the package: whatever is not listed here comes from the table of samplers."""

from collections.abc import Callable
from typing import Any

from . import _generator
from ._generator import seed as seed
from ._generator import seed_context as seed_context

class RandomState(_generator.RandomState):
    def __getattr__(self, name: str) -> Callable[..., Any]: ...

DEFAULT: RandomState

def default_rng(s: Any = None) -> RandomState: ...
def clone_rng(s: Any = None, clone: bool = True) -> RandomState: ...
def __getattr__(name: str) -> Callable[..., Any]: ...
