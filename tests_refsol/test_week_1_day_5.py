"""Day 1.5: the block and the model.

When it passes, you have a whole decoder: token ids in, logits out. The embedded model runs on it, and knows
the capital of France.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.block import TransformerBlock
from tiny_llm.grouped_attention import NoCacheContext
from tiny_llm.kv_context import KVContext
from tiny_llm.linear import Linear
from tiny_llm.model import Model, build_model

from tiny_llm_checkpoints.checkpoint import Checkpoint
from tiny_llm_checkpoints.embedded import embedded_model_path
from tiny_llm_checkpoints.model_config import ModelConfig
from tiny_llm_checkpoints.readers import read_checkpoint

# The suite runs with and without compiled kernels; the warning that there are none is not this day's matter.
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
    rms_norm_eps=0.1,  # large, so that a wrong one shows
    tie_word_embeddings=False,
)
CONFIGS = {
    "own output matrix": CONFIG,
    "tied embedding": replace(CONFIG, tie_word_embeddings=True),
    "three layers, one kv head": replace(CONFIG, num_hidden_layers=3, num_key_value_heads=1),
    "norms of queries and keys": replace(CONFIG, qk_norm=True),
    "scaled frequencies": replace(CONFIG, rope_theta=100.0, rope_factors=(1.0, 1.5, 4.0, 8.0)),
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


def built_model(config: ModelConfig, parameters: dict[str, np.ndarray]) -> Model:
    """The model of these parameters."""
    arrays = {name: mx.array(value) for name, value in parameters.items()}
    linears = {name: Linear(value) for name, value in arrays.items() if value.ndim == 2}
    vectors = {name: value for name, value in arrays.items() if value.ndim == 1}
    return build_model(config, linears, vectors)


@dataclass(frozen=True)
class NumpyDecoder:
    """The same decoder in float64, written out for one sequence."""

    config: ModelConfig
    parameters: dict[str, np.ndarray]

    def matrix(self, name: str) -> np.ndarray:
        return self.parameters[name].astype(np.float64)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean_square = (x * x).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + self.config.rms_norm_eps) * self.matrix(name)

    def rotated(self, x: np.ndarray) -> np.ndarray:
        """x [L, D], token i at position i."""
        half = self.config.head_dim // 2
        frequencies = self.config.rope_theta ** (-np.arange(half) / half)
        frequencies = frequencies / np.array(self.config.rope_factors or [1.0] * half)
        turns = np.exp(1j * np.arange(len(x))[:, None] * frequencies)
        turned = (x[:, :half] + 1j * x[:, half:]) * turns
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def attention(self, x: np.ndarray, name: str) -> np.ndarray:
        config, outputs = self.config, []
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
            scores = self.rotated(query) @ self.rotated(k[h // group]).T / np.sqrt(config.head_dim)
            weights = np.tril(np.exp(scores))
            outputs.append(weights / weights.sum(axis=-1, keepdims=True) @ v[h // group])
        return np.concatenate(outputs, axis=-1) @ self.matrix(f"{name}.o_proj").T

    def mlp(self, x: np.ndarray, name: str) -> np.ndarray:
        gate, up = (x @ self.matrix(f"{name}.{part}_proj").T for part in ("gate", "up"))
        return (gate / (1 + np.exp(-gate)) * up) @ self.matrix(f"{name}.down_proj").T

    def block(self, x: np.ndarray, layer: int) -> np.ndarray:
        """x [L, E] -> [L, E]."""
        name = f"model.layers.{layer}"
        x = x + self.attention(self.norm(x, f"{name}.input_layernorm"), f"{name}.self_attn")
        return x + self.mlp(self.norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")

    def logits(self, tokens: list[int]) -> np.ndarray:
        """[L, vocab_size]."""
        x = self.matrix("model.embed_tokens")[tokens]
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


def test_task_1_each_half_is_normalised_before_and_added_to_the_stream() -> None:
    """Oracle: by hand, with halves that give back what they get.

    (1, 7) is normalised to (0.2, 1.4), times 10 is (2, 14), and added makes (3, 21); that is normalised to
    (0.2, 1.4) again, times 5 is (1, 7), and added makes (4, 28).
    """
    block = fake_block(lambda x: x, lambda x: x, mx.full(2, 10.0), mx.full(2, 5.0))
    out = block(mx.array([[[1.0, 7.0]]]), NoCacheContext(1, 1.0))
    np.testing.assert_allclose(np.array(out), [[[4, 28]]], rtol=1e-5)


def test_task_1_the_stream_passes_through_halves_that_say_nothing() -> None:
    """Oracle: by hand: x + 0 + 0. A stream that is itself normalised, or not added, is the mistake here."""
    block = fake_block(mx.zeros_like, mx.zeros_like, mx.ones(4), mx.ones(4))
    x = mx.random.normal((2, 3, 4), key=mx.random.key(1))
    np.testing.assert_allclose(np.array(block(x, NoCacheContext(3, 1.0))), np.array(x), rtol=1e-6)


def test_task_1_the_second_half_sees_what_the_first_one_added() -> None:
    """Oracle: by hand: (1, 7) + (6, -6) is (7, 1), which is normalised to (1.4, 0.2)."""
    block = fake_block(lambda x: mx.array([[[6.0, -6.0]]]), lambda x: 10 * x, mx.ones(2), mx.ones(2))
    out = block(mx.array([[[1.0, 7.0]]]), NoCacheContext(1, 1.0))
    np.testing.assert_allclose(np.array(out), [[[7 + 14, 1 + 2]]], rtol=1e-5)


def test_task_1_eps_is_the_one_of_the_block() -> None:
    """Oracle: by hand: with 11 under the root (1, 7) is divided by 6, and the second half says nothing."""
    block = replace(fake_block(lambda x: x, mx.zeros_like, mx.full(2, 12.0), mx.ones(2)), eps=11.0)
    out = block(mx.array([[[1.0, 7.0]]]), NoCacheContext(1, 1.0))
    np.testing.assert_allclose(np.array(out), [[[3, 21]]], rtol=1e-5)


def test_task_1_attention_gets_the_context_of_the_pass() -> None:
    """Oracle: by hand: the same object, for a cache lives in it."""
    seen = []

    def attention(x: mx.array, context: KVContext) -> mx.array:
        seen.append(context)
        return x

    block = replace(fake_block(lambda x: x, lambda x: x, mx.ones(2), mx.ones(2)), self_attn=attention)
    context = NoCacheContext(1, 1.0)
    block(mx.array([[[1.0, 7.0]]]), context)
    assert len(seen) == 1
    assert seen[0] is context


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 7), (3, 4)])
@pytest.mark.parametrize("layer", [0, 1])
def test_task_1_the_whole_block(batch: int, length: int, layer: int) -> None:
    """Oracle: NumPy in float64, sequence by sequence."""
    parameters = random_parameters(CONFIG, seed=2)
    x = np.random.default_rng(3).normal(size=(batch, length, 24)).astype(np.float32)
    block = built_model(CONFIG, parameters).layers[layer]
    out = block(mx.array(x), NoCacheContext(length, CONFIG.attention_scale))
    decoder = NumpyDecoder(CONFIG, parameters)
    expected = [decoder.block(sequence.astype(np.float64), layer) for sequence in x]
    np.testing.assert_allclose(np.array(out), expected, rtol=1e-3, atol=1e-3)


# Task 2: Model.__call__


def fake_model(layers: tuple[Callable[[mx.array, KVContext], mx.array], ...]) -> Model:
    """Three tokens, two values each, norms without eps; the output matrix tells 1, 10 and 100 apart."""
    return Model(
        config=replace(CONFIG, hidden_size=2, vocab_size=3, rms_norm_eps=1e-12),
        embed_tokens=Linear(mx.array([[1.0, 7.0], [7.0, 1.0], [3.0, 21.0]])),
        layers=layers,
        norm=mx.array([10.0, 5.0]),
        lm_head=Linear(mx.array([[1.0, 0.0], [0.0, 10.0], [100.0, 100.0]])),
    )


def run_model(model: Model, tokens: list[list[int]], rows: list[int] | None = None) -> np.ndarray:
    """The logits of whole sequences [B, L], of all rows or of these."""
    context = NoCacheContext(len(tokens[0]), model.config.attention_scale)
    context.logit_rows = None if rows is None else mx.array(rows, mx.int32)
    return np.array(model(mx.array(tokens, mx.int32), context))


def test_task_2_without_layers_a_token_is_looked_up_normalised_and_projected() -> None:
    """Oracle: by hand: (1, 7) is (0.2, 1.4), by the weights (2, 7); (7, 1) is (1.4, 0.2), by them (14, 1).

    Without the last norm the first logits would be 1, 70 and 800.
    """
    out = run_model(fake_model(()), [[0, 1]])
    np.testing.assert_allclose(out, [[[2, 70, 900], [14, 10, 1500]]], rtol=1e-4)


def test_task_2_layers_run_in_order() -> None:
    """Oracle: by hand: (1, 7), doubled and then plus (12, -12), is (14, 2), which is normalised as (7, 1) is.

    In the other order it is (26, -10).
    """

    def double(x: mx.array, context: KVContext) -> mx.array:
        return 2 * x

    def shift(x: mx.array, context: KVContext) -> mx.array:
        return x + mx.array([12.0, -12.0])

    out = run_model(fake_model((double, shift)), [[0]])
    np.testing.assert_allclose(out, [[[14, 10, 1500]]], rtol=1e-4)


def test_task_2_every_layer_gets_the_context_of_the_pass() -> None:
    """Oracle: by hand: the same object, for a cache lives in it."""
    seen = []

    def layer(x: mx.array, context: KVContext) -> mx.array:
        seen.append(context)
        return x

    context = NoCacheContext(1, 1.0)
    fake_model((layer, layer))(mx.array([[2]], mx.int32), context)
    assert len(seen) == 2
    assert all(given is context for given in seen)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "tokens", [[[7]], [[3, 49, 0, 3, 21, 8]], [[5, 6, 7, 8], [8, 8, 1, 0], [40, 2, 5, 6]]]
)
def test_task_2_the_whole_model(kind: str, tokens: list[list[int]]) -> None:
    """Oracle: NumPy in float64, sequence by sequence."""
    config = CONFIGS[kind]
    parameters = random_parameters(config, seed=4)
    out = run_model(built_model(config, parameters), tokens)
    assert out.shape == (len(tokens), len(tokens[0]), config.vocab_size)
    expected = [NumpyDecoder(config, parameters).logits(sequence) for sequence in tokens]
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [[5], [0], [0, 5], [4, 1, 2], [5, 3, 4, 0, 2, 1]])
def test_task_2_logit_rows_selects_rows_of_every_sequence(rows: list[int]) -> None:
    """Oracle: NumPy in float64. Always the last row, or rows of the batch, is the mistake here."""
    parameters = random_parameters(CONFIG, seed=5)
    tokens = [[9, 8, 7, 6, 5, 4], [1, 2, 3, 4, 5, 6]]
    out = run_model(built_model(CONFIG, parameters), tokens, rows)
    assert out.shape == (2, len(rows), CONFIG.vocab_size)
    expected = [NumpyDecoder(CONFIG, parameters).logits(sequence)[rows] for sequence in tokens]
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)


def test_task_2_a_later_token_changes_nothing_before_it() -> None:
    """Oracle: the same tokens with another one at the end."""
    model = built_model(CONFIG, random_parameters(CONFIG, seed=6))
    first, second = run_model(model, [[4, 5, 6, 7, 8]]), run_model(model, [[4, 5, 6, 7, 30]])
    np.testing.assert_allclose(second[:, :-1], first[:, :-1], rtol=1e-5, atol=1e-5)
    assert not np.allclose(second[:, -1], first[:, -1])


def test_task_2_an_earlier_token_changes_what_comes_after_it() -> None:
    """Oracle: the definition of attention: the same token has other logits behind another one."""
    model = built_model(CONFIG, random_parameters(CONFIG, seed=7))
    first, second = run_model(model, [[4, 5, 6]]), run_model(model, [[9, 5, 6]])
    assert not np.allclose(second[:, -1], first[:, -1], rtol=1e-2, atol=1e-2)


class Stored:
    """A matrix of the real checkpoint, multiplied by MLX as it is stored."""

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


def parameters(checkpoint: Checkpoint) -> tuple[dict[str, Stored], dict[str, mx.array]]:
    """Matrices and vectors of a checkpoint by their names without `.weight`."""
    stored = {name.removesuffix(".weight"): tensor.load() for name, tensor in checkpoint.tensors.items()}
    vectors = {name: x for name, x in stored.items() if isinstance(x, mx.array)}
    return {name: Stored(*x) for name, x in stored.items() if name not in vectors}, vectors


def test_task_2_the_embedded_model_knows_the_capital_of_france() -> None:
    """Oracle: geography, and SmolLM2-135M, which was trained on it: the likeliest token is " Paris"."""
    checkpoint = read_checkpoint(embedded_model_path())
    model = build_model(checkpoint.config, *parameters(checkpoint))
    tokens = checkpoint.tokenizer.encode("The capital of France is")
    logits = run_model(model, [tokens])[0]
    assert logits.shape == (len(tokens), checkpoint.config.vocab_size)
    assert checkpoint.tokenizer.token_text(int(logits[-1].argmax())) == " Paris"
