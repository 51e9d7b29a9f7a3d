"""The compiled kernels: MLX operators in C++ for the CPU, where MLX's own are slow.

Importing this package never fails for want of a compiler: ask `available()`, and `why_unavailable()`
for the reason. Only an extension that was built for another MLX raises ImportError, because loading it
could crash. Knows nothing of models, caches or schedulers: arrays in, arrays out.

Letters: M rows, N outputs, K inputs, T tokens of a step, H query heads, Hkv key-value heads, D head
size, S sequences. All activations are float32. Every operator is lazy, like MLX's own, and runs on the
CPU stream. Wrong shapes, types and options raise ValueError when the operator is called.

One promise holds for all of them: **a row's result is the same bits** whatever else is in the batch and
however many threads run, for one instruction set. Another instruction set may round differently.

Environment, read at import: TINY_LLM_KERNELS = auto | off | portable | avx2 | avx512 and
TINY_LLM_NUM_THREADS.
"""

from pathlib import Path

import mlx.core as mx

from ._loading import MOST_THREADS, native, reason

__all__ = [
    "TransformerBlock",
    "available",
    "copy_blocks",
    "dense_matmul",
    "dequantize_rows",
    "flash_attention",
    "geglu",
    "ggml_quants",
    "instruction_set",
    "instruction_sets",
    "library",
    "num_threads",
    "pack",
    "packed_bits",
    "paged_attention",
    "quantized_matmul",
    "rms_norm",
    "rope",
    "sample",
    "select_instruction_set",
    "set_num_threads",
    "stack_packed",
    "swiglu",
    "why_unavailable",
    "write_and_attend",
    "zeros",
]


def available() -> bool:
    """Whether the compiled kernels can be called."""
    return reason is None


def why_unavailable() -> str | None:
    """One line that says why the kernels cannot be called, or None if they can."""
    return reason


def library() -> Path | None:
    """The file that the kernels were loaded from; None where there are none."""
    return Path(native.__file__) if available() else None


# ---- linear layers ----


def pack(weight: mx.array, scales: mx.array, biases: mx.array, *, group_size: int, bits: int) -> mx.array:
    """Rearranges MLX-quantized weights, once at load, into the tiles that `quantized_matmul` reads.

    weight uint32 [N, K*bits/32], scales and biases [N, K/group_size], both float16 or both float32, as
    `mx.quantize` returns them -> uint8 [ceil(N/16), K/32, bytes of a record]. bits: 2, 3, 4, 5, 6 or 8;
    group_size: any multiple of 32 that divides K. The same numbers come out, exactly: each value in
    `packed_bits(bits)` bits, each group of 32 with a scale and a bias of its own.
    """
    return native.pack(weight, scales, biases, group_size, bits)


def stack_packed(parts: list[mx.array]) -> mx.array:
    """The packed weights of several matrices over the same inputs as one matrix, their outputs side by side.

    Each has whole tiles: a number of outputs that 16 divides.
    """
    return native.stack_packed(parts)


def ggml_quants(blocks: mx.array, *, bits: int) -> mx.array:
    """The values of ggml's blocks of 32 in MLX's order: uint8 [N, K/32, bytes] -> uint32 [N, K*bits/32].

    They are a block's last bytes. 4 bits (Q4_0, Q4_1) are reordered; 8 bits (Q8_0) lose their sign: q + 128.
    """
    return native.ggml_quants(blocks, bits)


def packed_bits(bits: int) -> int:
    """Bits of a value in the packed weights: 4, or 8 where 4 do not hold it."""
    return 4 if bits <= 4 else 8


def quantized_matmul(
    x: mx.array, packed: mx.array, out_features: int, *, bits: int, activation_bits: int = 16
) -> mx.array:
    """x [..., K] times the packed weights [N, K], transposed -> [..., N], with N = out_features.

    bits: 4 or 8, as `packed_bits` gives it. activation_bits: each group of 32 activations is rounded to int8
    or int16 (absmax / 127 or 32767, ties to even). Sums within a group are exact integers, and groups are
    added in order.
    """
    return native.quantized_matmul(x, packed, out_features, bits, activation_bits)


def dequantize_rows(packed: mx.array, ids: mx.array, in_features: int, *, bits: int) -> mx.array:
    """Rows of the packed weights as floats, scale * q + bias: an embedding lookup.

    ids int32 [...] -> [..., K] with K = in_features. An id outside the weights gives a row of NaN.
    """
    return native.dequantize_rows(packed, ids, in_features, bits)


def dense_matmul(x: mx.array, weight: mx.array) -> mx.array:
    """x [..., K] times a plain weight [N, K], transposed -> [..., N].

    weight is float32, float16 or bfloat16, and is read as it lies; products are added in float32.
    """
    return native.dense_matmul(x, weight)


# ---- the operators between ----


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: x [..., K], weight [K] -> [..., K]."""
    return native.rms_norm(x, weight, eps)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, where silu(g) = g / (1 + e^-g): two arrays of one shape -> that shape."""
    return native.swiglu(gate, up)


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up, the tanh approximation; both [..., K] -> [..., K]."""
    return native.geglu(gate, up)


def rope(x: mx.array, positions: mx.array, inv_freq: mx.array) -> mx.array:
    """Rotates the pairs (x[i], x[i + D/2]) by the angle positions[l] * inv_freq[i].

    x [B, H, L, D] (a transposed view is fine), positions int32 [L], inv_freq [D/2] -> [B, H, L, D],
    laid out in memory as [B, L, H, D].
    """
    return native.rope(x, positions, inv_freq)


def sample(
    logits: mx.array, temperature: float, min_p: float, top_k: int, top_p: float, uniform: float
) -> mx.array:
    """A token id, uint32 [], drawn from softmax(logits / temperature) as three filters leave it; logits [V].

    The filters are those of `tiny_llm.sampler`, min-p first: 0 turns min_p and top_k off, and 1 top_p.
    uniform: in [0, 1); the draw ends at the first token where the probabilities up to it reach 1 - uniform. A
    temperature of 0 takes the first of the largest logits. A row with a NaN gives the index of a NaN.
    """
    return native.sample(logits, temperature, min_p, top_k, top_p, uniform)


# ---- attention ----


def flash_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, causal: bool) -> mx.array:
    """Attention over contiguous keys and values, in tiles, with a softmax that runs online.

    q [B, H, L, D], k and v [B, Hkv, S, D] -> [B, H, L, D], laid out in memory as [B, L, H, D]. Query head h
    reads head h // (H / Hkv). causal: the queries are the last L of the S positions; each sees up to its own.
    """
    return native.flash_attention(q, k, v, scale, causal)


def paged_attention(
    q: mx.array,
    key_pool: mx.array,
    value_pool: mx.array,
    tables: mx.array,
    row_of_token: mx.array,
    positions: mx.array,
    scale: float,
    window: int | None = None,
) -> mx.array:
    """Attends through the block tables to what is stored: the reading half of `write_and_attend`, same bits.

    q [1, H, T, D] -> [1, H, T, D], laid out in memory as [1, T, H, D]; the other arguments, `window` too, as
    there. The pools are read when the kernel runs: evaluate the result before the next `write_and_attend` on
    them, which is in place, or it shows that write. A token with a row or a position out of range gets NaN.
    """
    return native.paged_attention(q, key_pool, value_pool, tables, row_of_token, positions, scale, window)


def write_and_attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    key_pool: mx.array,
    value_pool: mx.array,
    slots: mx.array,
    tables: mx.array,
    row_of_token: mx.array,
    positions: mx.array,
    scale: float,
    window: int | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Writes the K and V of a step's tokens into the pools, then attends through the block tables.

    q [1, H, T, D], k and v [1, Hkv, T, D], already rotated; T packed tokens of any sequences.
    key_pool, value_pool [num_blocks, Hkv, block_size, D] in float32, float16 or bfloat16.
    slots int32 [T]: where token t is written, block * block_size + offset.
    tables int32 [S, M]: the block ids of each sequence, padded with anything.
    row_of_token int32 [T]: the row of `tables` that token t belongs to.
    positions int32 [T]: token t attends to the logical positions 0 .. positions[t] of its sequence.
    window: at least 1: token t attends to max(0, positions[t] - window + 1) .. positions[t] alone, `window`
    positions at most with its own. Entries of `tables` for blocks that no token of the step reaches may then
    be anything, and costs are those of the windows, not of the positions before. None: there is no window.
    -> (out [1, H, T, D], key_pool, value_pool), out laid out in memory as [1, T, H, D].

    All writes are done before the first read, and every token reads back what was stored, its own K and
    V included. The returned pools are the *same memory* as the arguments, which must not be used again:
    whoever holds them sees the writes too. Writing costs the tokens' bytes, never the pools'.

    D is even, from 2 to 512. Slots, tables, rows and positions are not looked at before the
    kernel runs: a token with one out of range writes nothing and gets NaN.
    """
    return native.write_and_attend(
        q, k, v, key_pool, value_pool, slots, tables, row_of_token, positions, scale, window
    )


def zeros(count: int, shape: tuple[int, ...], dtype: mx.Dtype) -> list[mx.array]:
    """So many arrays of zeros that are read together: on huge pages where the system has them."""
    return native.zeros(count, shape, dtype)


def copy_blocks(
    target: mx.array, from_blocks: mx.array, to_blocks: mx.array, source: mx.array | None = None
) -> mx.array:
    """target [num_blocks, ...] with blocks `from_blocks` of `source` copied to `to_blocks`, int32 [P] each.

    source: [any number, ...], of target's type; None: target itself, all of whose blocks are read before any
    is written. What comes back takes target's place: in place where nobody else holds target, else a copy, so
    that whoever described a read before sees what was there then. An id outside is passed over.
    """
    return native.copy_blocks(target, from_blocks, to_blocks, source)


# ---- a whole block ----


class TransformerBlock:
    """A block as one operator: the kernels above in one task, and the same bits as one by one.

    x = x + attention(norm(x)), x = x + mlp(norm(x)); with `attention_out_norm` and `mlp_out_norm` each half
    is normalised again before it is added. gelu: the MLP's gate is `geglu`'s.

    Matrices are triples of `pack`'s blob, N and `packed_bits`: qkv [(H + 2 Hkv) D, E], o [E, H D],
    gate_up [2 I, E], down [E, I]. Vectors are float32: norms [E], inv_freq [D/2], qkv_bias [(H + 2 Hkv) D];
    q_norm and k_norm [D], both or neither. activation_bits: as for `quantized_matmul`.
    """

    def __init__(
        self,
        *,
        attention_norm: mx.array,
        mlp_norm: mx.array,
        qkv: tuple[mx.array, int, int],
        o: tuple[mx.array, int, int],
        gate_up: tuple[mx.array, int, int],
        down: tuple[mx.array, int, int],
        inv_freq: mx.array,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        activation_bits: int = 16,
        qkv_bias: mx.array | None = None,
        q_norm: mx.array | None = None,
        k_norm: mx.array | None = None,
        attention_out_norm: mx.array | None = None,
        mlp_out_norm: mx.array | None = None,
        gelu: bool = False,
    ) -> None:
        self._native = native.TransformerBlock(
            attention_norm,
            mlp_norm,
            qkv,
            o,
            gate_up,
            down,
            inv_freq,
            num_heads,
            num_kv_heads,
            head_dim,
            eps,
            activation_bits,
            qkv_bias,
            q_norm,
            k_norm,
            attention_out_norm,
            mlp_out_norm,
            gelu,
        )

    def __call__(
        self,
        x: mx.array,
        key_pool: mx.array,
        value_pool: mx.array,
        slots: mx.array,
        tables: mx.array,
        row_of_token: mx.array,
        positions: mx.array,
        scale: float,
        window: int | None = None,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """x [1, T, E] -> (x after the block, key_pool, value_pool); the rest as in `write_and_attend`."""
        where = (slots, tables, row_of_token, positions)
        return self._native(x, key_pool, value_pool, *where, scale, window)


# ---- how they run ----


def set_num_threads(n: int) -> None:
    """Runs the kernels on `n` threads, the calling one included, or as many as the system starts.

    Changes no result. Raises ValueError for a number outside 1 .. `MOST_THREADS`.
    """
    if not 1 <= n <= MOST_THREADS:
        raise ValueError(f"the number of threads must be from 1 to {MOST_THREADS}, got {n}")
    native.set_num_threads(n)


def num_threads() -> int:
    """The number of threads in use; before the first kernel runs, those that will be asked for.

    At first as many as this process may use processors.
    """
    return native.num_threads()


def instruction_set() -> str:
    """The instruction set in use, for instance "avx2"."""
    return native.instruction_set()


def instruction_sets() -> list[str]:
    """The instruction sets that this processor can run, best first; "portable" is always among them."""
    return native.instruction_sets()


def select_instruction_set(name: str) -> None:
    """Uses another instruction set from now on (for tests and comparisons)."""
    native.select_instruction_set(name)
