"""Compiled kernels: MLX operators in C++ for the CPU, where MLX's own operators are slow.

Without a compiler the package still imports: check `available()`, and `why_unavailable()` for the reason.
Only an extension that was built for another MLX version raises ImportError, because loading it could crash.
Knows nothing of models, caches or schedulers: arrays in, arrays out.

Letters: M rows, N outputs, K inputs, T tokens of a step, H query heads, Hkv key-value heads, D head size,
S sequences. All activations are float32. Every operator is lazy, like MLX's own, and runs on the CPU stream.
Wrong shapes, types and options raise ValueError when the operator is called.

All operators are batch-invariant: **a row's result has the same bits** whatever else is in the batch and
however many threads run, as long as the instruction set is the same. Other instruction sets may round
differently.

Environment variables, read at import: TINY_LLM_KERNELS = auto | off | portable | avx2 | avx512, and
TINY_LLM_NUM_THREADS. An invalid value raises ValueError.
"""

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from ._loading import MAX_THREADS, native, reason

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
    "integer_peak",
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
    """One line with the reason why the kernels cannot be called, or None if they can."""
    return reason


def library() -> Path | None:
    """The file that the kernels were loaded from; None if they are unavailable."""
    return Path(native.__file__) if available() else None


# ---- linear layers ----


def pack(weight: mx.array, scales: mx.array, biases: mx.array, *, group_size: int, bits: int) -> mx.array:
    """Repack MLX-quantized weights into the tiles that `quantized_matmul` reads; do this once, at load.

    weight uint32 [N, K*bits/32], scales and biases [N, K/group_size], both float16 or both float32, as
    `mx.quantize` returns them -> uint8 [ceil(N/16), K/32, bytes per record]. bits: 2, 3, 4, 5, 6 or 8;
    group_size: any multiple of 32 that divides K. The weights keep their exact values: each takes
    `packed_bits(bits)` bits, and each group of 32 has its own scale and bias.
    """
    return native.pack(weight, scales, biases, group_size, bits)


def stack_packed(parts: list[mx.array]) -> mx.array:
    """Join the packed weights of matrices with the same inputs into one matrix; outputs keep their order.

    The number of outputs of each must be a multiple of 16, so that all tiles are full.
    """
    return native.stack_packed(parts)


def ggml_quants(blocks: mx.array, *, bits: int) -> mx.array:
    """The values of ggml's blocks of 32 in MLX's order: uint8 [N, K/32, bytes] -> uint32 [N, K*bits/32].

    The values are the last bytes of a block. 4 bits (Q4_0, Q4_1) are reordered; 8 bits (Q8_0) become unsigned
    by adding 128.
    """
    return native.ggml_quants(blocks, bits)


def packed_bits(bits: int) -> int:
    """Bits of a value in the packed weights: 4 if `bits` is at most 4, else 8."""
    return 4 if bits <= 4 else 8


def quantized_matmul(
    x: mx.array, packed: mx.array, out_features: int, *, bits: int, activation_bits: int = 16
) -> mx.array:
    """x [..., K] times the transpose of the packed weights [N, K] -> [..., N], with N = out_features.

    bits: 4 or 8, as returned by `packed_bits`. activation_bits: 8 or 16; each group of 32 activations is
    rounded to int8 or int16 (scale absmax / 127 or absmax / 32767, ties to even). Sums within a group are
    exact integers, and groups are added in order.
    """
    return native.quantized_matmul(x, packed, out_features, bits, activation_bits)


def dequantize_rows(packed: mx.array, ids: mx.array, in_features: int, *, bits: int) -> mx.array:
    """Rows of the packed weights as floats, scale * q + bias: an embedding lookup.

    ids int32 [...] -> [..., K] with K = in_features. An id out of range gives a row of NaN.
    """
    return native.dequantize_rows(packed, ids, in_features, bits)


def dense_matmul(x: mx.array, weight: mx.array) -> mx.array:
    """x [..., K] times the transpose of a plain weight [N, K] -> [..., N].

    weight is float32, float16 or bfloat16 and is read in place; products are added in float32.
    """
    return native.dense_matmul(x, weight)


# ---- other operators of a layer ----


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: x [..., K], weight [K] -> [..., K]."""
    return native.rms_norm(x, weight, eps)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, where silu(g) = g / (1 + e^-g); both [..., K] -> [..., K]."""
    return native.swiglu(gate, up)


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up, with the tanh approximation of gelu; both [..., K] -> [..., K]."""
    return native.geglu(gate, up)


def rope(x: mx.array, positions: mx.array, inv_freq: mx.array) -> mx.array:
    """Rotate the pairs (x[i], x[i + D/2]) by the angle positions[l] * inv_freq[i].

    x [B, H, L, D] (a transposed view is fine), positions int32 [L], inv_freq [D/2] -> [B, H, L, D], stored as
    [B, L, H, D].
    """
    return native.rope(x, positions, inv_freq)


def sample(
    logits: mx.array,
    rows: Sequence[int],
    temperature: float,
    min_p: float,
    top_k: int,
    top_p: float,
    uniforms: Sequence[float],
    masks: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Draw a token for each of n rows of logits [R, V]: softmax(logits / temperature) after three filters.

    rows: n indices along R; a row may be listed several times. The filters are those of `tiny_llm.sampler`,
    min-p first; 0 disables min_p and top_k, 1 disables top_p. uniforms: n numbers in [0, 1); the drawn token
    is the first at which the cumulative probability reaches 1 - uniform. A temperature of 0 takes the first
    of the largest logits. A row with NaN gives the index of a NaN. masks: int32 [n, ceil(V / 32)], one for
    each of the n rows; if bit t % 32 of word t // 32 is 0, token t counts as if its logit were -inf. None:
    all tokens are allowed.

    Returns the token ids, uint32 [n], and their logits, float32 [n].
    """
    return native.sample(logits, rows, temperature, min_p, top_k, top_p, uniforms, masks)


# ---- attention ----


def flash_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, causal: bool) -> mx.array:
    """Attention over contiguous keys and values, in tiles with an online softmax.

    q [B, H, L, D], k and v [B, Hkv, S, D] -> [B, H, L, D], stored as [B, L, H, D]. Query head h reads
    key-value head h // (H / Hkv). causal: the queries are the last L of the S positions; each attends to
    positions up to its own.
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
    """Attend to stored keys and values through block tables, like `write_and_attend` without the writes.

    q [1, H, T, D] -> [1, H, T, D], stored as [1, T, H, D]; the other arguments are those of
    `write_and_attend`. The pools are read when the kernel runs: evaluate the result before the next in-place
    `write_and_attend` on them, or the result includes its writes. A token with a row or position out of range
    gets NaN. The result has the same bits as that of `write_and_attend`.
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
    """Write the K and V of a step's tokens into the pools, then attend through the block tables.

    q [1, H, T, D], k and v [1, Hkv, T, D], already rotated; T packed tokens of any sequences.
    key_pool, value_pool [num_blocks, Hkv, block_size, D] in float32, float16 or bfloat16.
    slots int32 [T]: where token t is written, block * block_size + offset.
    tables int32 [S, M]: the block ids of each sequence, with any padding.
    row_of_token int32 [T]: the row of `tables` that token t uses.
    positions int32 [T]: token t attends to the logical positions 0 .. positions[t] of its sequence.
    window: None for no limit; else at least 1: token t attends only to the last `window` of these positions,
    its own included. Entries of `tables` for blocks outside all windows may then be anything, and the cost
    depends on the window, not on the positions before it.
    -> (out [1, H, T, D], key_pool, value_pool), out stored as [1, T, H, D].

    All writes are done before the first read, and every token reads the stored values, even for its own K and
    V. The returned pools share *their memory* with the arguments, which must not be used again: every
    reference to them sees the writes. A write costs the tokens' bytes, not the pools'.

    D is even, from 2 to 512. Slots, tables, rows and positions are not checked before the kernel runs: a
    token with one out of range writes nothing and gets NaN.
    """
    return native.write_and_attend(
        q, k, v, key_pool, value_pool, slots, tables, row_of_token, positions, scale, window
    )


def zeros(count: int, shape: tuple[int, ...], dtype: mx.Dtype) -> list[mx.array]:
    """Return `count` arrays of zeros; adjacent ones are put on huge pages if the system has them.

    Use it for arrays that are read together, such as the keys and values of a pool.
    """
    return native.zeros(count, shape, dtype)


def copy_blocks(
    target: mx.array, from_blocks: mx.array, to_blocks: mx.array, source: mx.array | None = None
) -> mx.array:
    """target [num_blocks, ...] with blocks `from_blocks` of `source` copied to `to_blocks`, int32 [P] each.

    source: [any number, ...], with target's type; None means target itself, whose blocks are all read before
    any is written. Use the result instead of target. It is updated in place if nothing else references
    target; else it is a copy, so that earlier lazy reads see the old contents. Copies with an id out of range
    are skipped.
    """
    return native.copy_blocks(target, from_blocks, to_blocks, source)


# ---- a whole transformer block ----


class TransformerBlock:
    """A transformer block as one operator, run as one task; the operators above give the same bits.

    x = x + attention(norm(x)), x = x + mlp(norm(x)); with `attention_out_norm` and `mlp_out_norm` the output
    of each half is normalized before it is added. gelu: use `geglu` in the MLP instead of `swiglu`.

    Matrices are triples of a `pack` result, N and `packed_bits`: qkv [(H + 2 Hkv) D, E], o [E, H D],
    gate_up [2 I, E], down [E, I]. Vectors are float32: norms [E], inv_freq [D/2], qkv_bias [(H + 2 Hkv) D];
    q_norm and k_norm [D], both or neither. activation_bits: as in `quantized_matmul`.
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
        out_rows: mx.array | None = None,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """x [1, T, E] -> (x after the block, key_pool, value_pool); the rest as in `write_and_attend`.

        out_rows: [R] int32, the rows along T of the output that are needed; others may have any values. None:
        all rows. Negative rows count from the end, and rows outside are ignored. The keys and values of all
        rows are written.
        """
        where = (slots, tables, row_of_token, positions)
        return self._native(x, key_pool, value_pool, *where, scale, window, out_rows)


# ---- threads and instruction sets ----


def set_num_threads(n: int) -> None:
    """Run the kernels on `n` threads, the calling one included, or on fewer if one cannot be started.

    Results do not change. Raises ValueError unless 1 <= n <= `MAX_THREADS`.
    """
    if not 1 <= n <= MAX_THREADS:
        raise ValueError(f"the number of threads must be from 1 to {MAX_THREADS}, got {n}")
    native.set_num_threads(n)


def num_threads() -> int:
    """The number of threads in use; before the first kernel runs, the number that will be started.

    The default is the number of processors that this process may use.
    """
    return native.num_threads()


def instruction_set() -> str:
    """The instruction set in use, such as "avx2"."""
    return native.instruction_set()


def instruction_sets() -> list[str]:
    """The instruction sets that this processor supports, best first; always includes "portable"."""
    return native.instruction_sets()


def select_instruction_set(name: str) -> None:
    """Switch to another instruction set, for tests and comparisons.

    Raises ValueError for a name that is not in `instruction_sets()`.
    """
    native.select_instruction_set(name)


def integer_peak(activation_bits: int, rounds: int) -> int:
    """Multiply integers in registers in all threads, and return the number of multiplications.

    Nothing is loaded, unpacked or scaled, so this is the limit of `quantized_matmul` with activations
    of 8 or 16 bits. A round is about a dozen instructions; a million rounds take some milliseconds. The
    caller takes the time.
    Raises ValueError for other bits, and unless rounds is at least 1.
    """
    if activation_bits not in (8, 16):
        raise ValueError(f"activation_bits {activation_bits} is not supported: only 8 and 16")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    return native.integer_peak(activation_bits, rounds)
