"""The one seam between the model and its memory: the model never knows where keys live.

Attention hands its queries, keys and values to the context that it was given, and gets the output
back. No cache, dense caches, pages: each is a context, and the model is the same.
"""

from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

if TYPE_CHECKING:
    from tiny_llm_kernels import TransformerBlock as FusedBlock


class KVContext(Protocol):
    """What one forward pass runs in: where its tokens stand, and what they attend to.

    positions: [L] int32, each token's position in its own sequence.
    logit_rows: [R] int32, the rows of L that need logits; None for all.
    """

    positions: mx.array
    logit_rows: mx.array | None

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Store k and v, attend with q; q and k are already rotated.

        q [B, H, L, D], k and v [B, Hkv, L, D] -> [B, H, L, D]. Each query sees the tokens of its own
        sequence up to its own position, as they were stored.
        """


class FusingContext(KVContext, Protocol):
    """A context in which a whole block may run as one compiled operator, which attends by itself.

    fuses: whether it may now; a context without this attribute never fuses.
    """

    @property
    def fuses(self) -> bool:
        """True where the operator would do what `attend` does."""

    def run_block(self, layer: int, block: "FusedBlock", x: mx.array) -> mx.array:
        """x [1, T, E] through one block -> [1, T, E]; its keys and values are stored."""
