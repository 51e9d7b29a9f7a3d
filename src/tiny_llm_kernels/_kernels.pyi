import mlx.core as mx

def pack(weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int) -> mx.array: ...
def stack_packed(parts: list[mx.array]) -> mx.array: ...
def ggml_quants(blocks: mx.array, bits: int) -> mx.array: ...
def dense_matmul(x: mx.array, weight: mx.array) -> mx.array: ...
def quantized_matmul(
    x: mx.array, packed: mx.array, out_features: int, bits: int, activation_bits: int
) -> mx.array: ...
def dequantize_rows(packed: mx.array, ids: mx.array, in_features: int, bits: int) -> mx.array: ...
def flash_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, causal: bool) -> mx.array: ...
def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array: ...
def sample(
    logits: mx.array, temperature: float, min_p: float, top_k: int, top_p: float, uniform: float
) -> mx.array: ...
def swiglu(gate: mx.array, up: mx.array) -> mx.array: ...
def zeros(count: int, shape: tuple[int, ...], dtype: mx.Dtype) -> list[mx.array]: ...
def copy_blocks(
    target: mx.array, from_blocks: mx.array, to_blocks: mx.array, source: mx.array | None = None
) -> mx.array: ...
def geglu(gate: mx.array, up: mx.array) -> mx.array: ...
def rope(x: mx.array, positions: mx.array, inv_freq: mx.array) -> mx.array: ...
def paged_attention(
    q: mx.array,
    key_pool: mx.array,
    value_pool: mx.array,
    tables: mx.array,
    row_of_token: mx.array,
    positions: mx.array,
    scale: float,
    window: int | None = None,
) -> mx.array: ...
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
) -> tuple[mx.array, mx.array, mx.array]: ...

class TransformerBlock:
    def __init__(
        self,
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
        activation_bits: int,
        qkv_bias: mx.array | None = None,
        q_norm: mx.array | None = None,
        k_norm: mx.array | None = None,
        attention_out_norm: mx.array | None = None,
        mlp_out_norm: mx.array | None = None,
        gelu: bool = False,
    ) -> None: ...
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
    ) -> tuple[mx.array, mx.array, mx.array]: ...

def set_num_threads(n: int) -> None: ...
def num_threads() -> int: ...
def instruction_set() -> str: ...
def instruction_sets() -> list[str]: ...
def select_instruction_set(name: str) -> None: ...
