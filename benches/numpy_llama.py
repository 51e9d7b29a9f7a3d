"""A Llama model in NumPy, all in float32: the reference that accuracy is measured against.

It shares no code with the engine: it dequantizes the GGUF file itself, computes dense attention over the
whole text at once, and rotates pairs in GGUF's own interleaved order. Readable, not fast.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def dequantize(packed: NDArray[np.uint32], scales: Floats, biases: Floats) -> Floats:
    """Packed words [O, W] with scales and biases [O, G], one per 32 inputs -> weights [O, 32 G].

    A weight is scale * q + bias. The q are unsigned integers, stored from the lowest bits of each word up.
    """
    outputs, groups = scales.shape
    bits = packed.shape[1] // groups  # a group's 32 values of b bits fill b words of 32 bits
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    levels = (packed[..., None] >> shifts) & np.uint32(2**bits - 1)  # [O, W, 32 / b]
    grouped = levels.astype(np.float32).reshape(outputs, groups, 32)
    return (scales[..., None] * grouped + biases[..., None]).reshape(outputs, groups * 32)


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """Each row divided by its root mean square, then scaled."""
    normed: Floats = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight
    return normed


def softmax(x: Floats) -> Floats:
    """Softmax over the last axis, shifted by the maximum."""
    shifted = np.exp(x - x.max(axis=-1, keepdims=True))
    total: Floats = shifted / shifted.sum(axis=-1, keepdims=True)
    return total


def silu(x: Floats) -> Floats:
    """x * sigmoid(x)."""
    gated: Floats = x / (1 + np.exp(-x))
    return gated


class NumpyLlama:
    """A llama-architecture GGUF with every weight in float32."""

    def __init__(self, path: Path) -> None:
        """Read and dequantize the file; takes four bytes of memory for each parameter."""
        arrays, metadata = cast(
            "tuple[dict[str, mx.array], dict[str, Any]]", mx.load(str(path), return_metadata=True)
        )
        self.weights = {
            name.removesuffix(".weight"): self._weight(arrays, name.removesuffix(".weight"))
            for name in arrays
            if name.endswith(".weight")
        }

        def number(key: str) -> Any:
            return np.array(metadata[f"llama.{key}"]).item()

        self.num_layers = number("block_count")
        self.num_heads = number("attention.head_count")
        self.num_kv_heads = number("attention.head_count_kv")
        self.eps = number("attention.layer_norm_rms_epsilon")
        self.head_dim = number("embedding_length") // self.num_heads
        self.rope_base = number("rope.freq_base")

    @staticmethod
    def _weight(arrays: dict[str, mx.array], name: str) -> Floats:
        weight = np.array(arrays[f"{name}.weight"])
        if f"{name}.scales" not in arrays:
            return weight.astype(np.float32)
        scales, biases = (
            np.array(arrays[f"{name}.{part}"]).astype(np.float32) for part in ("scales", "biases")
        )
        return dequantize(weight, scales, biases)

    def logits(self, token_ids: Sequence[int]) -> Floats:
        """L token ids -> logits [L, V]; row i predicts the token after tokens 0 to i."""
        x = self.weights["token_embd"][np.asarray(token_ids)]  # [L, E]
        rotation = self._rotation(len(token_ids))
        for layer in range(self.num_layers):
            block = f"blk.{layer}."
            x = x + self._attention(rms_norm(x, self.weights[block + "attn_norm"], self.eps), block, rotation)
            x = x + self._mlp(rms_norm(x, self.weights[block + "ffn_norm"], self.eps), block)
        x = rms_norm(x, self.weights["output_norm"], self.eps)
        return x @ self.weights.get("output", self.weights["token_embd"]).T

    def _rotation(self, length: int) -> NDArray[np.complex64]:
        """[L, D / 2]: the rotation of pair i at each position, as a complex number."""
        frequencies = self.rope_base ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        return np.exp(1j * np.outer(np.arange(length), frequencies)).astype(np.complex64)

    def _heads(self, x: Floats, name: str, heads: int) -> Floats:
        """Project and split: [L, E] -> [heads, L, D]."""
        return (x @ self.weights[name].T).reshape(len(x), heads, self.head_dim).swapaxes(0, 1)

    def _attention(self, x: Floats, block: str, rotation: NDArray[np.complex64]) -> Floats:
        """Causal attention of all rows at once, [L, E] -> [L, E]."""

        def rotate(heads: Floats) -> Floats:
            # GGUF stores the two values of a pair next to each other: view them as one complex number.
            pairs = np.ascontiguousarray(heads).view(np.complex64)
            return (pairs * rotation).view(np.float32)

        q = rotate(self._heads(x, block + "attn_q", self.num_heads))
        k = rotate(self._heads(x, block + "attn_k", self.num_kv_heads))
        v = self._heads(x, block + "attn_v", self.num_kv_heads)
        group = self.num_heads // self.num_kv_heads
        k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
        scores = q @ k.swapaxes(1, 2) / np.float32(self.head_dim**0.5)  # [H, L, L]
        scores[:, np.triu(np.ones(scores.shape[1:], dtype=bool), k=1)] = -np.inf
        mixed: Floats = softmax(scores) @ v  # [H, L, D]
        return mixed.swapaxes(0, 1).reshape(len(x), -1) @ self.weights[block + "attn_output"].T

    def _mlp(self, x: Floats, block: str) -> Floats:
        """SwiGLU, [L, E] -> [L, E]."""
        gate, up, down = (self.weights[f"{block}ffn_{part}"].T for part in ("gate", "up", "down"))
        return (silu(x @ gate) * (x @ up)) @ down
