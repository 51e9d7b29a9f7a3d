"""The interface between the model and the memory for keys and values.

Attention hands its queries, keys and values to the context of the forward pass and gets the output back.
There is a context for each kind of memory: none, contiguous caches, pages. The model stays the same, and
never knows where keys are stored.
"""

from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

if TYPE_CHECKING:
    from tiny_llm_kernels import TransformerBlock as FusedBlock


class KVContext(Protocol):
    """The context of one forward pass: where its tokens are, and which tokens they attend to.

    positions: [L] int32, each token's position in its own sequence.
    logit_rows: [R] int32, the rows along L that need logits; None for all.
    """

    positions: mx.array
    logit_rows: mx.array | None

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Store a layer's k and v, then attend with q; q and k are already rotated.

        q [B, H, L, D], k and v [B, Hkv, L, D] -> [B, H, L, D]. Each query sees the tokens of its own sequence
        up to its own position; their keys and values are read as they are stored.
        """


class FusingContext(KVContext, Protocol):
    """A context in which a whole block may run as one compiled operator that includes attention.

    fuses: whether it may do so now. A context without this attribute never fuses.
    """

    @property
    def fuses(self) -> bool:
        """True if the operator would do what `attend` does."""

    def run_block(self, layer: int, block: "FusedBlock", x: mx.array) -> mx.array:
        """Run x [1, T, E] through one block -> [1, T, E], and store its keys and values.

        The last layer's output is only needed in the rows `logit_rows`; the others may have any values.
        """
