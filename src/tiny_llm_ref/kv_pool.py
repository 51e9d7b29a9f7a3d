"""The pool: owns the arrays that hold every key and value of the engine.

Each layer has one array for keys and one for values, [num_blocks, Hkv, block_size, D]. No other object keeps
a reference to them, because MLX writes to an array in place only if nothing else refers to it: a single
unevaluated reader makes a write copy the whole pool. The methods that read (`read`, `read_blocks`) return
evaluated copies. Knows nothing of sequences, or of which table holds which block.
"""

from collections.abc import Sequence as Seq
from typing import Self

import mlx.core as mx

from tiny_llm_checkpoints.model_config import ModelConfig

from .kernels import compiled_kernel, use_compiled
from .layer_groups import group_layers, layers_per_block
from .paged_attention import BlockCopy

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


class KVPool:
    """Blocks of keys and values in every layer, for `num_heads` heads of size `head_dim`.

    num_blocks: blocks in each layer. block_size: tokens in a block. dtype: the type of the arrays. A layer's
    keys and its values are one array each, [num_blocks, num_heads, block_size, head_dim].
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_heads: int,
        head_dim: int,
        num_layers: int = 1,
        dtype: mx.Dtype = mx.float16,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_layers = num_layers
        self.dtype = dtype
        shape = (num_blocks, num_heads, block_size, head_dim)
        arrays = _zeros(2 * num_layers, shape, dtype)
        self._keys, self._values = arrays[:num_layers], arrays[num_layers:]
        self.evaluate()

    @classmethod
    def for_model(cls, model: ModelConfig, num_blocks: int, block_size: int, dtype: mx.Dtype) -> Self:
        """Make a pool for a model's keys and values; layers with different windows use different blocks."""
        heads, layers = model.num_key_value_heads, layers_per_block(group_layers(model.windows))
        return cls(num_blocks, block_size, heads, model.head_dim, layers, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in (*self._keys, *self._values))

    def lend(self, layer: int) -> tuple[mx.array, mx.array]:
        """Return the key and value arrays of a layer, for one write; `put_back` must follow."""
        return self._keys[layer], self._values[layer]

    def put_back(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Store the arrays that a write returned, in place of those that `lend` returned."""
        self._keys[layer] = keys
        self._values[layer] = values

    def evaluate(self, *outputs: mx.array) -> None:
        """Evaluate `outputs` and every pending write, so that no unevaluated array refers to the pool."""
        mx.eval(*outputs, *self._keys, *self._values)

    def start(self, *outputs: mx.array) -> None:
        """Start to compute `outputs` and every pending write, without waiting; reading them will wait."""
        arrays = (*outputs, *self._keys, *self._values)
        mx.async_eval(*arrays)  # type: ignore[no-untyped-call]

    def settle(self) -> bool:
        """Evaluate pending writes after a failure. If that fails, zero all arrays and return False."""
        try:
            self.evaluate()
            return True
        except Exception:  # an operator may raise anything
            for arrays in (self._keys, self._values):
                arrays[:] = _zeros(len(arrays), arrays[0].shape, self.dtype)
            self.evaluate()
            return False

    def resize(self, num_blocks: int) -> None:
        """Add empty blocks at the end, or cut the last ones off; copies one layer's array at a time."""
        if num_blocks == self.num_blocks:
            return
        for arrays in (self._keys, self._values):
            for layer, old in enumerate(arrays):
                more = mx.zeros((max(0, num_blocks - self.num_blocks), *old.shape[1:]), self.dtype)
                arrays[layer] = mx.contiguous(mx.concatenate([old[:num_blocks], more]))
                mx.eval(arrays[layer])
        self.num_blocks = num_blocks

    def copy_blocks(self, copies: Seq[BlockCopy]) -> None:
        """Copy whole blocks in all layers, as if all sources were read before any target is written.

        A copy's `length` is ignored: the tokens after the first `length` are copied too.
        """
        self.fill_from(self, [(copy.src, copy.dst) for copy in copies])

    def fill_from(self, source: "KVPool", pairs: Seq[tuple[int, int]]) -> None:
        """Copy whole blocks in all layers from this pool, or from another whose blocks have the same shape.

        pairs: (block of `source`, block of this pool). All sources are read before any target is written.
        Both pools may be written to afterwards.
        """
        if not pairs:
            return
        sources, targets = (mx.array(ids, mx.int32) for ids in zip(*pairs, strict=True))
        if use_compiled():
            copy = compiled_kernel("copy_blocks")
            for arrays, others in ((self._keys, source._keys), (self._values, source._values)):
                for layer in range(len(arrays)):  # a variable for an array would be a second reference to it
                    other = None if source is self else others[layer]
                    arrays[layer] = copy(arrays[layer], sources, targets, other)
            self.evaluate()
            return
        for arrays, others in ((self._keys, source._keys), (self._values, source._values)):
            rows = [other[sources] for other in others]
            mx.eval(rows)
            for array, row in zip(arrays, rows, strict=True):
                array[targets] = row
        self.evaluate()

    def write(self, layer: int, slots: mx.array, keys: mx.array, values: mx.array) -> None:
        """Write keys and values [T, Hkv, D] of one layer to T different slots [T], in place."""
        blocks, offsets = slots // self.block_size, slots % self.block_size
        self._keys[layer][blocks, :, offsets] = keys.astype(self.dtype)
        self._values[layer][blocks, :, offsets] = values.astype(self.dtype)
        mx.eval(self._keys[layer], self._values[layer])

    def read(self, layer: int, slots: mx.array) -> tuple[mx.array, mx.array]:
        """Return evaluated copies of one layer's keys and values at T slots, each [T, Hkv, D]."""
        blocks, offsets = slots // self.block_size, slots % self.block_size
        keys, values = self._keys[layer][blocks, :, offsets], self._values[layer][blocks, :, offsets]
        mx.eval(keys, values)
        return keys, values

    def read_blocks(self, layer: int, blocks: Seq[int]) -> tuple[mx.array, mx.array]:
        """Return evaluated copies of a layer's keys and values, each [len(blocks), Hkv, block_size, D]."""
        index = mx.array(list(blocks))
        keys, values = self._keys[layer][index], self._values[layer][index]
        mx.eval(keys, values)
        return keys, values


def _zeros(count: int, shape: tuple[int, ...], dtype: mx.Dtype) -> list[mx.array]:
    """Return `count` arrays of zeros."""
    if use_compiled():
        made: list[mx.array] = compiled_kernel("zeros")(count, shape, dtype)
        return made
    return [mx.zeros(shape, dtype) for _ in range(count)]
