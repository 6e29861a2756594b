"""``Seal``: keeps ``jax.jit`` from tracing or compiling a function once more.

What ``jax.jit(f)`` returns calls a program faster than the ``Compiled`` of its ahead-of-time steps does, which has
Python in between; but whatever does not fit it would trace and compile without a word. A seal that is closed refuses
both. The function asks it when it is traced (`check`), and when the program is lowered, for other devices say, an
operation does that stands on one of the results (`mark`) and leaves nothing in what is compiled.
"""

from typing import Any

import jax
from jax.extend.core import Primitive, valid_jaxtype
from jax.interpreters import mlir

from ..._seam.step import Sealed

__all__ = ["Seal"]


class Seal:
    """Open until it is closed; see above."""

    closed = False

    def check(self) -> None:
        """Refuse if closed."""
        if self.closed:
            raise Sealed

    def mark(self, results: Any) -> Any:
        """Return ``results`` with the operation on one of them; without any, nothing there is worth a seal."""
        leaves, treedef = jax.tree.flatten(results)
        for i, leaf in enumerate(leaves):
            if valid_jaxtype(leaf):
                leaves[i] = _seal.bind(leaf, seal=self)
                break
        return treedef.unflatten(leaves)

    def __repr__(self) -> str:
        return "Seal()"  # the same for all, as programs are compared by their text


def _lowered(_, x, *, seal):
    seal.check()
    return [x]


_seal = Primitive("seal")
_seal.def_abstract_eval(lambda x, *, seal: x)
mlir.register_lowering(_seal, _lowered)
