"""A whole block in one compiled operator: the same kernels in the same order, and the same bits.

Described part by part, a decode step is some four hundred operators, and describing and starting them takes
as long as the arithmetic of half of them. A block's own code stays what it is, for who reads it and for what
cannot be fused: parts of a learner's, matrices that are not packed, contexts without pages, other devices.
"""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import mlx.core as mx

from .grouped_attention import Attention
from .kernels import REFERENCE_FOLDER, compiled_kernel, is_reference, use_compiled
from .kv_context import FusingContext, KVContext
from .linear import BiasedLinear, LinearLike, PackedLinear
from .mlp import MLP, swiglu
from .norm import rms_norm
from .rope import rope

if TYPE_CHECKING:
    from tiny_llm_kernels import TransformerBlock as FusedBlock

    from .block import TransformerBlock

_fused: "WeakKeyDictionary[TransformerBlock, FusedBlock | None]" = WeakKeyDictionary()


def can_fuse(block: "TransformerBlock", x: mx.array, context: KVContext) -> bool:
    """True where the block runs as one operator in this context."""
    if not getattr(context, "fuses", False):
        return False
    if block not in _fused:
        _fused[block] = fuse(block)
    return _fused[block] is not None


def run_fused(block: "TransformerBlock", x: mx.array, context: KVContext) -> mx.array:
    """What the block does with x, as one operator; call it only where it `can_fuse`."""
    operator = _fused[block]
    assert operator is not None
    return cast(FusingContext, context).run_block(block.self_attn.layer, operator, x)


def fuse(block: "TransformerBlock") -> "FusedBlock | None":
    """The block as one operator; None where a part of it is not one that the compiled block is made of."""
    attention, mlp = block.self_attn, block.mlp
    if not use_compiled() or not all(is_reference(one) for one in (rms_norm, rope, swiglu)):
        return None
    if not _is_exactly(attention, Attention) or not _is_exactly(mlp, MLP):
        return None
    qkv, bias = _without_bias(attention.qkv_proj)
    matrices = (qkv, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
    packed = [matrix for matrix in matrices if isinstance(matrix, PackedLinear)]
    if len(packed) < len(matrices) or len({matrix.activation_bits for matrix in packed}) > 1:
        return None
    names = ("qkv", "o", "gate_up", "down")
    fused: FusedBlock = compiled_kernel("TransformerBlock")(
        input_layernorm=block.input_layernorm,
        post_attention_layernorm=block.post_attention_layernorm,
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
    )
    return fused


def _is_exactly(part: object, kind: type) -> bool:
    """Of that class and no other, and the class is the reference's."""
    return type(part) is kind and Path(inspect.getfile(kind)).parent == REFERENCE_FOLDER


def _without_bias(matrix: LinearLike) -> tuple[LinearLike, Any]:
    """A matrix, and its bias or None."""
    return (matrix.matrix, matrix.bias) if isinstance(matrix, BiasedLinear) else (matrix, None)
