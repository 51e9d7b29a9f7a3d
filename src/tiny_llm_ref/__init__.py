"""tiny-llm's reference implementation: the complete engine in one flat package, one concept per file.

Shapes are written in letters: B batch, L or T tokens of this pass, S tokens attended to, H query heads, Hkv
key and value heads, D head size, E hidden size, I intermediate size, R rows that need logits, N blocks of the
pool, M blocks of the longest table.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import *  # noqa: F403
else:  # hidden from type checkers, which would accept any name because of __getattr__
    from .api import __all__, __dir__, __getattr__  # noqa: F401 (re-exported)
