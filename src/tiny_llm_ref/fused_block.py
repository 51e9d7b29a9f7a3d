"""A whole block in one compiled operator: the same kernels in the same order, so the same bits.

Without fusion, a decode step is about four hundred operators, and building and starting them takes about half
as long as their arithmetic. The block's Python code stays: it is there to be read, and it runs everything
that cannot be fused: a learner's parts, matrices that are not packed, contexts without pages, other devices.
"""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast
from weakref import WeakKeyDictionary

import mlx.core as mx

from .gelu_mlp import GeluMLP, geglu
from .grouped_attention import Attention
from .kernels import REFERENCE_FOLDER, compiled_kernel, is_reference, use_compiled
from .kv_context import FusingContext, KVContext
from .linear import BiasedLinear, LinearLike, PackedLinear
from .mlp import MLP, swiglu
from .norm import rms_norm
from .rope import rope

if TYPE_CHECKING:
    from tiny_llm_kernels import TransformerBlock as FusedBlock

# A block's norms: the operator's name for each, and the checkpoint's.
PRE_NORM = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
SANDWICH_NORM = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
# The MLPs that a compiled block can run, and whether the gate is a GELU.
GATES: dict[type, bool] = {MLP: False, GeluMLP: True}


class Block(Protocol):
    """The attributes that all blocks have. Their norms have the checkpoint's names."""

    @property
    def self_attn(self) -> Attention:
        """The attention layer."""

    @property
    def mlp(self) -> MLP:
        """The feed-forward network."""

    @property
    def eps(self) -> float:
        """The number that the norms add to the mean square."""


_fused: "WeakKeyDictionary[Block, FusedBlock | None]" = WeakKeyDictionary()


def can_fuse(block: Block, x: mx.array, context: KVContext) -> bool:
    """True if the block runs as one operator in this context."""
    if not getattr(context, "fuses", False):
        return False
    if block not in _fused:
        _fused[block] = fuse(block)
    return _fused[block] is not None


def run_fused(block: Block, x: mx.array, context: KVContext) -> mx.array:
    """Run the block on x as one operator; call it only if `can_fuse` is True."""
    operator = _fused[block]
    assert operator is not None
    return cast(FusingContext, context).run_block(block.self_attn.layer, operator, x)


def fuse(block: Block) -> "FusedBlock | None":
    """Return the block as one operator; None if the compiled block cannot run one of its parts."""
    attention, mlp = block.self_attn, block.mlp
    if not use_compiled() or not all(is_reference(one) for one in (rms_norm, rope, swiglu, geglu)):
        return None
    if not _is_one_of(attention, Attention) or not _is_one_of(mlp, *GATES):
        return None
    qkv, bias = _without_bias(attention.qkv_proj)
    matrices = (qkv, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
    packed = [matrix for matrix in matrices if isinstance(matrix, PackedLinear)]
    if len(packed) < len(matrices) or len({matrix.activation_bits for matrix in packed}) > 1:
        return None
    names = ("qkv", "o", "gate_up", "down")
    fused: FusedBlock = compiled_kernel("TransformerBlock")(
        **_norms(block),
        **{name: (one.packed, one.out_features, one.bits) for name, one in zip(names, packed, strict=True)},
        inv_freq=attention.inv_freq,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        eps=block.eps,
        activation_bits=packed[0].activation_bits,
        qkv_bias=bias,
        q_norm=attention.q_norm,
        k_norm=attention.k_norm,
        gelu=GATES[type(mlp)],
    )
    return fused


def _norms(block: Block) -> dict[str, mx.array]:
    """Return a block's norms by the operator's names for them."""
    names = SANDWICH_NORM if hasattr(block, SANDWICH_NORM["mlp_norm"]) else PRE_NORM
    return {operator_name: getattr(block, name) for operator_name, name in names.items()}


def _is_one_of(part: object, *kinds: type) -> bool:
    """True if the part's class is one of `kinds`, not a subclass, and is the reference's."""
    return type(part) in kinds and Path(inspect.getfile(type(part))).parent == REFERENCE_FOLDER


def _without_bias(matrix: LinearLike) -> tuple[LinearLike, Any]:
    """Split a matrix with a bias into the matrix and the bias; the bias is None if it has none."""
    return (matrix.matrix, matrix.bias) if isinstance(matrix, BiasedLinear) else (matrix, None)
