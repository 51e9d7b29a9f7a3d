"""Day 1.5: the block and the model.

When these tests pass, you have a whole decoder: token ids in, logits out, its weights from a checkpoint. The
embedded model runs on it and predicts " Paris" after "The capital of France is".
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.block import TransformerBlock
from tiny_llm.grouped_attention import Attention, NoCacheContext
from tiny_llm.kv_context import KVContext
from tiny_llm.linear import Linear, LinearLike
from tiny_llm.mlp import MLP
from tiny_llm.model import Model, build_model
from tiny_llm.rope import inverse_frequencies

from tiny_llm_checkpoints.checkpoint import Checkpoint
from tiny_llm_checkpoints.embedded import embedded_model_path
from tiny_llm_checkpoints.model_config import ModelConfig
from tiny_llm_checkpoints.readers import read_checkpoint

# The suite runs with and without compiled kernels; the warning about missing ones does not concern this day.
pytestmark = pytest.mark.filterwarnings("ignore:no compiled kernels:RuntimeWarning")

CONFIG = ModelConfig(
    architecture="llama",
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=40,
    vocab_size=50,
    max_position_embeddings=64,
    rms_norm_eps=0.1,  # large, so that a wrong eps changes the logits
    tie_word_embeddings=False,
)
CONFIGS = {
    "separate output matrix": CONFIG,
    "tied embedding": replace(CONFIG, tie_word_embeddings=True),
    "three layers, one kv head": replace(CONFIG, num_hidden_layers=3, num_key_value_heads=1),
    "norms of queries and keys": replace(CONFIG, qk_norm=True),
    "scaled frequencies": replace(CONFIG, rope_theta=100.0, rope_factors=(1.0, 1.5, 4.0, 8.0)),
    "a scaled embedding": replace(CONFIG, scale_embeddings=True),
    "a scaled embedding, tied": replace(CONFIG, scale_embeddings=True, tie_word_embeddings=True),
    "windowed layers with their own rope base": replace(
        CONFIG,
        rope_theta=100.0,
        rope_local_theta=2.0,
        sliding_window=64,
        layer_types=("sliding_attention", "full_attention"),
    ),
}


def random_parameters(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Every parameter by its name, without `.weight`: matrices [outputs, inputs], norms around 1."""
    rng, parameters = np.random.default_rng(seed), {}
    for name, shape in config.parameter_shapes.items():
        noise = rng.normal(size=shape)
        if len(shape) == 1:
            value = 1 + 0.3 * noise
        else:
            value = noise if "embed" in name else 1.5 * noise / shape[1] ** 0.5
        parameters[name.removesuffix(".weight")] = value.astype(np.float32)
    return parameters


@dataclass(frozen=True)
class NumpyDecoder:
    """The same decoder in float64, in plain NumPy, for one sequence."""

    config: ModelConfig
    parameters: dict[str, np.ndarray]

    def matrix(self, name: str) -> np.ndarray:
        return self.parameters[name].astype(np.float64)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean_square = (x * x).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + self.config.rms_norm_eps) * self.matrix(name)

    def rotated(self, x: np.ndarray, layer: int) -> np.ndarray:
        """x [L, D], token i at position i."""
        half, base = self.config.head_dim // 2, self.config.rope_theta
        if self.config.windows[layer] is not None and self.config.rope_local_theta is not None:
            base = self.config.rope_local_theta
        frequencies = base ** (-np.arange(half) / half)
        frequencies = frequencies / np.array(self.config.rope_factors or [1.0] * half)
        turns = np.exp(1j * np.arange(len(x))[:, None] * frequencies)
        turned = (x[:, :half] + 1j * x[:, half:]) * turns
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def attention(self, x: np.ndarray, layer: int) -> np.ndarray:
        config, outputs, name = self.config, [], f"model.layers.{layer}.self_attn"
        q, k, v = (
            np.split(x @ self.matrix(f"{name}.{part}_proj").T, heads, axis=-1)
            for part, heads in [
                ("q", config.num_attention_heads),
                ("k", config.num_key_value_heads),
                ("v", config.num_key_value_heads),
            ]
        )
        if config.qk_norm:
            q = [self.norm(head, f"{name}.q_norm") for head in q]
            k = [self.norm(head, f"{name}.k_norm") for head in k]
        group = config.num_attention_heads // config.num_key_value_heads
        for h, query in enumerate(q):
            scores = self.rotated(query, layer) @ self.rotated(k[h // group], layer).T
            weights = np.tril(np.exp(scores / np.sqrt(config.head_dim)))
            outputs.append(weights / weights.sum(axis=-1, keepdims=True) @ v[h // group])
        return np.concatenate(outputs, axis=-1) @ self.matrix(f"{name}.o_proj").T

    def mlp(self, x: np.ndarray, name: str) -> np.ndarray:
        gate, up = (x @ self.matrix(f"{name}.{part}_proj").T for part in ("gate", "up"))
        return (gate / (1 + np.exp(-gate)) * up) @ self.matrix(f"{name}.down_proj").T

    def block(self, x: np.ndarray, layer: int) -> np.ndarray:
        """x [L, E] -> [L, E]."""
        name = f"model.layers.{layer}"
        x = x + self.attention(self.norm(x, f"{name}.input_layernorm"), layer)
        return x + self.mlp(self.norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")

    def logits(self, tokens: list[int]) -> np.ndarray:
        """[L, vocab_size]."""
        x = self.matrix("model.embed_tokens")[tokens]
        if self.config.scale_embeddings:
            x = x * np.sqrt(self.config.hidden_size)
        for layer in range(self.config.num_hidden_layers):
            x = self.block(x, layer)
        tied = self.config.tie_word_embeddings
        return self.norm(x, "model.norm") @ self.matrix("model.embed_tokens" if tied else "lm_head").T


# Task 1: TransformerBlock.__call__


def fake_block(
    attention: Callable[[mx.array], mx.array], mlp: Callable[[mx.array], mx.array], *norms: mx.array
) -> TransformerBlock:
    """A block whose halves are plain functions, with norms without eps."""
    return TransformerBlock(
        self_attn=lambda x, context: attention(x),
        mlp=mlp,
        input_layernorm=norms[0],
        post_attention_layernorm=norms[1],
        eps=0.0,
    )


def test_task_1_each_half_reads_a_normalized_input_and_adds_its_output_to_the_stream() -> None:
    """Oracle: by hand, with halves that return their input.

    The first half normalizes (1, 7) to (0.2, 1.4), multiplies it by 10 and adds (2, 14): (3, 21). The second
    normalizes that to (0.2, 1.4) again, multiplies it by 5 and adds (1, 7): (4, 28).
    """
    block = fake_block(lambda x: x, lambda x: x, mx.full(2, 10.0), mx.full(2, 5.0))
    out = block(mx.array([[[1.0, 7.0]]]), NoCacheContext(1, 1.0))
    np.testing.assert_allclose(np.array(out), [[[4, 28]]], rtol=1e-5)


def test_task_1_halves_that_output_zeros_leave_the_stream_unchanged() -> None:
    """Oracle: by hand: x + 0 + 0. Common mistakes: a normalized stream, a missing sum."""
    block = fake_block(mx.zeros_like, mx.zeros_like, mx.ones(4), mx.ones(4))
    x = mx.random.normal((2, 3, 4), key=mx.random.key(1))
    np.testing.assert_allclose(np.array(block(x, NoCacheContext(3, 1.0))), np.array(x), rtol=1e-6)


def test_task_1_the_second_half_sees_the_output_of_the_first() -> None:
    """Oracle: by hand: (1, 7) + (6, -6) is (7, 1), which is normalized to (1.4, 0.2)."""
    block = fake_block(lambda x: mx.array([[[6.0, -6.0]]]), lambda x: 10 * x, mx.ones(2), mx.ones(2))
    out = block(mx.array([[[1.0, 7.0]]]), NoCacheContext(1, 1.0))
    np.testing.assert_allclose(np.array(out), [[[7 + 14, 1 + 2]]], rtol=1e-5)


def test_task_1_both_norms_use_the_eps_of_the_block() -> None:
    """Oracle: by hand: an eps of 11 divides (1, 7) by sqrt(25 + 11) = 6; the second half outputs zeros."""
    block = replace(fake_block(lambda x: x, mx.zeros_like, mx.full(2, 12.0), mx.ones(2)), eps=11.0)
    out = block(mx.array([[[1.0, 7.0]]]), NoCacheContext(1, 1.0))
    np.testing.assert_allclose(np.array(out), [[[3, 21]]], rtol=1e-5)


def test_task_1_attention_gets_the_context_of_the_pass() -> None:
    """Oracle: by hand: the same object, because it holds the cache."""
    seen = []

    def attention(x: mx.array, context: KVContext) -> mx.array:
        seen.append(context)
        return x

    block = replace(fake_block(lambda x: x, lambda x: x, mx.ones(2), mx.ones(2)), self_attn=attention)
    context = NoCacheContext(1, 1.0)
    block(mx.array([[[1.0, 7.0]]]), context)
    assert len(seen) == 1
    assert seen[0] is context


def first_block(config: ModelConfig, parameters: dict[str, np.ndarray]) -> TransformerBlock:
    """The block of layer 0, built by hand."""

    def joined(*names: str) -> Linear:
        return Linear(mx.array(np.concatenate([parameters[f"model.layers.0.{name}_proj"] for name in names])))

    return TransformerBlock(
        self_attn=Attention(
            layer=0,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            inv_freq=inverse_frequencies(config.head_dim, config.rope_theta),
            qkv_proj=joined("self_attn.q", "self_attn.k", "self_attn.v"),
            o_proj=joined("self_attn.o"),
            q_norm=None,
            k_norm=None,
            eps=config.rms_norm_eps,
        ),
        mlp=MLP(gate_up_proj=joined("mlp.gate", "mlp.up"), down_proj=joined("mlp.down")),
        input_layernorm=mx.array(parameters["model.layers.0.input_layernorm"]),
        post_attention_layernorm=mx.array(parameters["model.layers.0.post_attention_layernorm"]),
        eps=config.rms_norm_eps,
    )


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 7), (3, 4)])
def test_task_1_the_whole_block_matches_numpy(batch: int, length: int) -> None:
    """Oracle: NumPy in float64, sequence by sequence."""
    parameters = random_parameters(CONFIG, seed=2)
    x = np.random.default_rng(3).normal(size=(batch, length, 24)).astype(np.float32)
    out = first_block(CONFIG, parameters)(mx.array(x), NoCacheContext(length, CONFIG.attention_scale))
    decoder = NumpyDecoder(CONFIG, parameters)
    expected = [decoder.block(sequence.astype(np.float64), 0) for sequence in x]
    np.testing.assert_allclose(np.array(out), expected, rtol=1e-3, atol=1e-3)


# Task 2: Model.__call__


Layer = Callable[[mx.array, KVContext], mx.array]


def fake_model(layers: tuple[Layer, ...]) -> Model:
    """Three tokens, two values each, norms without eps; the output matrix multiplies by 1, 10 and 100."""
    return Model(
        config=replace(CONFIG, hidden_size=2, vocab_size=3, rms_norm_eps=1e-12),
        embed_tokens=Linear(mx.array([[1.0, 7.0], [7.0, 1.0], [3.0, 21.0]])),
        layers=layers,
        norm=mx.array([10.0, 5.0]),
        lm_head=Linear(mx.array([[1.0, 0.0], [0.0, 10.0], [100.0, 100.0]])),
    )


def run_model(model: Model, tokens: list[list[int]], rows: list[int] | None = None) -> np.ndarray:
    """The logits of whole sequences [B, L], of all rows or of `rows` only."""
    context = NoCacheContext(len(tokens[0]), model.config.attention_scale)
    context.logit_rows = None if rows is None else mx.array(rows, mx.int32)
    return np.array(model(mx.array(tokens, mx.int32), context))


def test_task_2_a_model_without_layers_embeds_normalizes_and_projects() -> None:
    """Oracle: by hand: (1, 7) is normalized to (0.2, 1.4), weighted (2, 7); (7, 1) gives (14, 1).

    Without the last norm the first logits are 1, 70 and 800.
    """
    out = run_model(fake_model(()), [[0, 1]])
    np.testing.assert_allclose(out, [[[2, 70, 900], [14, 10, 1500]]], rtol=1e-4)


def test_task_2_layers_run_in_order() -> None:
    """Oracle: by hand: (1, 7), doubled, plus (12, -12) is (14, 2), which is normalized to the same as (7, 1).

    In the other order the stream is (26, -10).
    """

    def double(x: mx.array, context: KVContext) -> mx.array:
        return 2 * x

    def shift(x: mx.array, context: KVContext) -> mx.array:
        return x + mx.array([12.0, -12.0])

    out = run_model(fake_model((double, shift)), [[0]])
    np.testing.assert_allclose(out, [[[14, 10, 1500]]], rtol=1e-4)


def test_task_2_every_layer_gets_the_context_of_the_pass() -> None:
    """Oracle: by hand: the same object, because it holds the cache."""
    seen = []

    def layer(x: mx.array, context: KVContext) -> mx.array:
        seen.append(context)
        return x

    context = NoCacheContext(1, 1.0)
    fake_model((layer, layer))(mx.array([[2]], mx.int32), context)
    assert len(seen) == 2
    assert all(given is context for given in seen)


def test_task_2_the_last_norm_uses_the_eps_of_the_config() -> None:
    """Oracle: by hand: an eps of 11 divides (1, 7) by sqrt(25 + 11) = 6; the weights make it (10/6, 35/6)."""
    model = fake_model(())
    model = replace(model, config=replace(model.config, rms_norm_eps=11.0))
    np.testing.assert_allclose(run_model(model, [[0]]), [[[10 / 6, 350 / 6, 4500 / 6]]], rtol=1e-4)


def sums(x: mx.array, context: KVContext) -> mx.array:
    """A layer in which every token depends on all earlier ones: cumulative sums."""
    return mx.cumsum(x, axis=1)


@pytest.mark.parametrize("rows", [[5], [0], [0, 5], [4, 1, 2], [5, 3, 4, 0, 2, 1]])
def test_task_2_logit_rows_selects_rows_of_every_sequence(rows: list[int]) -> None:
    """Oracle: the logits of all rows. Common mistakes: always the last row, rows chosen before the layers."""
    tokens = [[0, 1, 1, 0, 2, 0], [1, 1, 2, 0, 0, 1]]
    model = fake_model((sums, sums))
    out = run_model(model, tokens, rows)
    assert out.shape == (2, len(rows), 3)
    np.testing.assert_allclose(out, run_model(model, tokens)[:, rows], rtol=1e-4)


def test_task_2_only_the_requested_rows_are_projected_to_logits() -> None:
    """Oracle: counted by hand: 2 of 6. Computing all rows and discarding most costs time."""
    model, seen = fake_model((sums,)), []

    class RecordingHead:
        def __call__(self, x: mx.array) -> mx.array:
            seen.append(x.shape)
            return model.lm_head(x)

    run_model(replace(model, lm_head=RecordingHead()), [[0, 1, 1, 0, 2, 0]], [2, 5])
    assert seen == [(1, 2, 2)]


# Task 3: build_model


class ReadOnce(Mapping[str, Any]):
    """Parameters by name that may each be read only once, as if they came from a file."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        self.parameters = parameters
        self.reads: Counter[str] = Counter()

    def __getitem__(self, name: str) -> Any:
        self.reads[name] += 1
        assert self.reads[name] == 1, f"{name} is read a second time"
        return self.parameters[name]

    def __iter__(self) -> Any:
        raise AssertionError("take the names from the configuration; do not iterate over the parameters")

    def __len__(self) -> int:
        return len(self.parameters)


def built_model(config: ModelConfig, parameters: dict[str, np.ndarray]) -> Model:
    """The model of these parameters."""
    arrays = {name: mx.array(value) for name, value in parameters.items()}
    linears: dict[str, LinearLike] = {name: Linear(x) for name, x in arrays.items() if x.ndim == 2}
    vectors = {name: value for name, value in arrays.items() if value.ndim == 1}
    return build_model(config, linears, vectors)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "tokens", [[[7]], [[3, 49, 0, 3, 21, 8]], [[5, 6, 7, 8], [8, 8, 1, 0], [40, 2, 5, 6]]]
)
def test_task_3_the_whole_model_matches_numpy(kind: str, tokens: list[list[int]]) -> None:
    """Oracle: NumPy in float64, sequence by sequence."""
    config = CONFIGS[kind]
    parameters = random_parameters(config, seed=4)
    out = run_model(built_model(config, parameters), tokens)
    assert out.shape == (len(tokens), len(tokens[0]), config.vocab_size)
    expected = [NumpyDecoder(config, parameters).logits(sequence) for sequence in tokens]
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)


def test_task_3_every_parameter_is_read_once() -> None:
    """Oracle: the names of the configuration. A matrix that is read twice takes twice the time."""
    for config in CONFIGS.values():
        parameters = random_parameters(config, seed=8)
        linears = ReadOnce({name: Linear(mx.array(x)) for name, x in parameters.items() if x.ndim == 2})
        vectors = ReadOnce({name: mx.array(x) for name, x in parameters.items() if x.ndim == 1})
        build_model(config, linears, vectors)
        assert {*linears.reads, *vectors.reads} == set(parameters)


def test_task_3_a_tied_output_matrix_is_the_embedding_object() -> None:
    """Oracle: by hand: a second object would be a second copy in memory."""
    model = built_model(CONFIGS["tied embedding"], random_parameters(CONFIG, seed=9))
    assert model.lm_head is model.embed_tokens


def test_task_3_layers_are_a_tuple_of_blocks_numbered_in_order() -> None:
    """Oracle: by hand: a cache finds the keys of a layer by its number."""
    model = built_model(CONFIG, random_parameters(CONFIG, seed=10))
    assert isinstance(model.layers, tuple)
    assert [block.self_attn.layer for block in model.layers] == [0, 1]
    assert model.config is CONFIG


def test_task_3_a_later_token_does_not_affect_earlier_logits() -> None:
    """Oracle: the same tokens with a different last token."""
    model = built_model(CONFIG, random_parameters(CONFIG, seed=6))
    first, second = run_model(model, [[4, 5, 6, 7, 8]]), run_model(model, [[4, 5, 6, 7, 30]])
    np.testing.assert_allclose(second[:, :-1], first[:, :-1], rtol=1e-5, atol=1e-5)
    assert not np.allclose(second[:, -1], first[:, -1])


def test_task_3_an_earlier_token_affects_later_logits() -> None:
    """Oracle: the definition of attention: a token has other logits after a different prefix."""
    model = built_model(CONFIG, random_parameters(CONFIG, seed=7))
    first, second = run_model(model, [[4, 5, 6]]), run_model(model, [[9, 5, 6]])
    assert not np.allclose(second[:, -1], first[:, -1], rtol=1e-2, atol=1e-2)


class StoredMatrix:
    """A quantized matrix of the real checkpoint, multiplied by MLX."""

    def __init__(
        self, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
    ) -> None:
        self.arrays = (weight, scales, biases)
        self.kind = {"group_size": group_size, "bits": bits}

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., K] -> [..., N]."""
        return mx.quantized_matmul(x, *self.arrays, transpose=True, **self.kind)

    def rows(self, ids: mx.array) -> mx.array:
        """ids [...] -> [..., K]."""
        return mx.dequantize(*(array[ids] for array in self.arrays), **self.kind).astype(mx.float32)


def parameters(checkpoint: Checkpoint) -> tuple[dict[str, StoredMatrix], dict[str, mx.array]]:
    """Matrices and vectors of a checkpoint by their names without `.weight`."""
    stored = {name.removesuffix(".weight"): tensor.load() for name, tensor in checkpoint.tensors.items()}
    vectors = {name: x for name, x in stored.items() if isinstance(x, mx.array)}
    return {name: StoredMatrix(*x) for name, x in stored.items() if name not in vectors}, vectors


def test_task_3_the_embedded_model_predicts_the_capital_of_france() -> None:
    """Oracle: SmolLM2-135M, whose most likely next token is " Paris"."""
    checkpoint = read_checkpoint(embedded_model_path())
    model = build_model(checkpoint.config, *parameters(checkpoint))
    tokens = checkpoint.tokenizer.encode("The capital of France is")
    logits = run_model(model, [tokens])[0]
    assert logits.shape == (len(tokens), checkpoint.config.vocab_size)
    assert checkpoint.tokenizer.token_text(int(logits[-1].argmax())) == " Paris"
