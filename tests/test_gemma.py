"""Layers with sliding windows, and Gemma 3: every format gives transformers' logits, beyond the window too.

Oracle: transformers' float32 logits, token ids and greedy continuations (tests/goldens/gemma.json). Here they
run in a context without a cache and with a mask for each layer; tiny models on pages are in
test_sliding_window.py. The real model is tested if its packages are installed, on pages too.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.errors import RequestTooLargeError
from tiny_llm.gelu_mlp import geglu
from tiny_llm.kernels import twins
from tiny_llm.linear import Linear, ScaledRows
from tiny_llm.llm import LLM
from tiny_llm.loader import LoadedModel, build
from tiny_llm.model import Model
from tiny_llm.page_scheduler import PageScheduler
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.sequence import PagedSequence

import tiny_llm_kernels
from promises import check_all_returned, check_pages
from tiny_checkpoints import WINDOWED_CONFIGS, random_weights, to_bfloat16, write_folder, write_gguf
from tiny_llm_checkpoints.checkpoint import Checkpoint
from tiny_llm_checkpoints.errors import ConfigError, ModelFileError
from tiny_llm_checkpoints.hf_config import model_config
from tiny_llm_checkpoints.hub import find_model
from tiny_llm_checkpoints.model_config import ModelConfig
from tiny_llm_checkpoints.readers import read_checkpoint
from windowed_context import WindowedNoCacheContext, window_mask

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "gemma.json").read_text(encoding="utf-8"))
PROMPT = [int(token) for token in GOLDENS["tiny_prompt"].split()]
POSITIONS = GOLDENS["positions"]
TOLERANCE = 1e-4
NAMES = list(WINDOWED_CONFIGS)
GEMMA = WINDOWED_CONFIGS["gemma3"]
LAYERS = {"S": "sliding_attention", "f": "full_attention"}


def golden_logits(name: str) -> np.ndarray:
    """transformers' logits [positions, vocab_size]."""
    [found] = [record for record in GOLDENS["logits"] if record["checkpoint"] == name]
    return np.array(found["logits"])


def logits(model: Model, tokens: list[int], rows: list[int], *, windows: Any = None) -> np.ndarray:
    """The model's logits [rows, vocab_size], each layer with its own window, or with the given windows."""
    config = model.config
    context = WindowedNoCacheContext(len(tokens), config.attention_scale, windows or config.windows)
    context.logit_rows = mx.array(rows, mx.int32)
    return np.array(model(mx.array([tokens], mx.int32), context)[0])


def our_logits(path: Path) -> np.ndarray:
    """Our logits of a file or folder at the goldens' positions."""
    return logits(build(read_checkpoint(path)), PROMPT, POSITIONS)


# Tiny checkpoints.


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_gives_transformers_logits(name: str, tmp_path: Path) -> None:
    path = write_folder(tmp_path, WINDOWED_CONFIGS[name], random_weights(WINDOWED_CONFIGS[name]))
    assert np.abs(our_logits(path) - golden_logits(name)).max() < TOLERANCE
    with twins():
        assert np.abs(our_logits(path) - golden_logits(name)).max() < TOLERANCE


def test_a_gguf_gives_transformers_logits(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", GEMMA, random_weights(GEMMA))
    assert np.abs(our_logits(path) - golden_logits("gemma3")).max() < TOLERANCE


def test_a_bfloat16_folder_gives_the_logits_of_the_same_numbers_in_float32(tmp_path: Path) -> None:
    """Oracle: the same numbers in float32. A norm's stored weight plus one does not fit bfloat16."""
    weights = {name: to_bfloat16(array) for name, array in random_weights(GEMMA).items()}
    narrow = our_logits(write_folder(tmp_path / "narrow", GEMMA, weights, dtype="BF16"))
    wide = our_logits(write_folder(tmp_path / "wide", GEMMA, weights))
    assert np.abs(narrow - wide).max() < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("off_by", [-1, 1, None])
def test_a_wrong_window_changes_the_logits_at_positions_beyond_it(
    name: str, off_by: int | None, tmp_path: Path
) -> None:
    """Oracle: the goldens; positions from the window's size on see one token too many or too few."""
    model = build(
        read_checkpoint(
            write_folder(tmp_path, WINDOWED_CONFIGS[name], random_weights(WINDOWED_CONFIGS[name]))
        )
    )
    wrong = [window and (window + off_by if off_by else None) for window in model.config.windows]
    apart = np.abs(logits(model, PROMPT, POSITIONS, windows=wrong) - golden_logits(name)).max(axis=-1)
    first = 7 if off_by == -1 else 8  # the window is 8
    for position, difference in zip(POSITIONS, apart, strict=True):
        assert (difference < TOLERANCE) == (position < first), (position, difference)


@pytest.mark.parametrize("window", [1, 2, 5, 12, 13, None])
def test_a_query_sees_itself_and_earlier_tokens_within_the_window(window: int | None) -> None:
    """Oracle: the rule, position by position."""
    mask = np.array(window_mask(12, window))
    for p in range(12):
        first = 0 if window is None else max(0, p - window + 1)
        assert [key for key in range(12) if mask[p, key] == 0] == list(range(first, p + 1))


# Configurations.


def described(**changes: object) -> ModelConfig:
    """A Gemma 3 configuration in Hugging Face's first form, with changes; None leaves a field out."""
    config = {
        **{"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4},
        **{"num_key_value_heads": 1, "intermediate_size": 96, "vocab_size": 288, "sliding_window": 512},
        **{"max_position_embeddings": 128, "rope_scaling": None},
        **changes,
    }
    return model_config(config, ())


def pattern(config: ModelConfig) -> str:
    """One letter per layer: S for a sliding window."""
    return "".join("f" if window is None else "S" for window in config.windows)


def test_missing_gemma_fields_get_transformers_defaults() -> None:
    """Oracle: transformers' Gemma3TextConfig."""
    config = described()
    assert (config.head_dim, config.rope_theta, config.rope_local_theta) == (256, 1e6, 1e4)
    assert (config.query_pre_attn_scalar, config.attention_scale) == (256, 1 / 16)
    assert (config.rms_norm_eps, config.hidden_act) == (1e-6, "gelu_pytorch_tanh")
    assert config.tie_word_embeddings
    assert config.sandwich_norm
    assert config.scale_embeddings
    assert config.qk_norm
    assert pattern(config) == "SSSSSfSS"
    assert {window for window in config.windows if window} == {512}


def test_only_layers_with_full_attention_use_rope_scaling() -> None:
    """Oracle: transformers, with its old field names and its new ones."""
    old = described(rope_scaling={"type": "linear", "factor": 8.0}, rope_theta=5e5, rope_local_base_freq=2e4)
    by_type = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    assert described(rope_parameters=by_type) == old
    assert (old.rope_theta, old.rope_local_theta, set(old.rope_factors or ())) == (5e5, 2e4, {8.0})


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("gemma3_text", {"sliding_window_pattern": 2}, "SfSfSfSf"),
        ("gemma3_text", {"layer_types": [LAYERS[x] for x in "fSSfffSf"]}, "fSSfffSf"),
        ("mistral", {}, "SSSSSSSS"),
        ("mistral", {"sliding_window": None}, "ffffffff"),
        ("qwen2", {}, "ffffffff"),
        ("qwen2", {"use_sliding_window": True}, "ffffffff"),  # 28 layers have full attention
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 5}, "fffffSSS"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, "ffffffff"),
        ("qwen3", {"use_sliding_window": True, "layer_types": [LAYERS[x] for x in "SfSfSfSf"]}, "SfSfSfSf"),
        ("qwen3", {"layer_types": [LAYERS["f"]] * 8}, "ffffffff"),
        ("llama", {}, "ffffffff"),
    ],
)
def test_layers_have_the_windows_that_transformers_gives_them(
    model_type: str, fields: dict[str, object], expected: str
) -> None:
    """Oracle: transformers' configuration of each architecture."""
    assert pattern(described(model_type=model_type, **fields)) == expected


def test_a_missing_window_gets_transformers_default() -> None:
    """Oracle: MistralConfig, whose default is 4096; null means no window."""
    fields = {"model_type": "mistral", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields |= {"intermediate_size": 96, "vocab_size": 288, "max_position_embeddings": 128}
    assert model_config(fields, ()).windows == (4096, 4096)
    assert model_config({**fields, "sliding_window": None}, ()).windows == (None, None)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gemma3"}, "'gemma3' also takes images.*'gemma3_text'"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ({"hidden_activation": "gelu"}, "hidden_activation 'gelu'.*gelu_pytorch_tanh"),
        ({"sliding_window": None}, "sliding_attention.*needs a sliding_window"),
        ({"sliding_window": 0}, "sliding_window must be.*not 0"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ({"layer_types": ["full_attention"]}, "layer_types must name 8 layers, not 1"),
        ({"layer_types": ["chunked_attention"] * 8}, "layer_types 'chunked_attention'"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention', expected a list"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a positive"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters has 'rope_type'"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "'linear' of sliding",
        ),
        (
            {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}},
            "partial_rotary_factor 0.5",
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 8}, "'full_attention'.*mistral"),
        ({"model_type": "llama", "use_sliding_window": True}, "use_sliding_window True.*llama"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 8}, "needs a sliding_window"),
        (
            {"model_type": "qwen3", "rope_parameters": {"full_attention": {}}},
            "has 'full_attention', expected one",
        ),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers must be"),
    ],
)
def test_unsupported_configurations_are_rejected(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        described(**fields)


def test_the_pattern_of_windows_comes_from_the_gguf_or_from_llama_cpp(tmp_path: Path) -> None:
    """Oracle: llama.cpp, where every sixth layer has full attention unless the file has a pattern."""
    weights = random_weights(GEMMA)

    def read(**metadata: object) -> ModelConfig:
        return read_checkpoint(write_gguf(tmp_path / "x.gguf", GEMMA, weights, **metadata)).config

    assert (pattern(read()), read().rope_local_theta) == ("SSSSSfS", 10_000.0)
    key = "attention.sliding_window_pattern"
    assert pattern(read(**{key: 3})) == "SSfSSfS"
    assert pattern(read(**{key: [True, False, False, True, True, False, False]})) == "SffSSff"
    assert read(**{"rope.freq_base_swa": 5000.0}).rope_local_theta == 5000.0
    scaled = read(**{"rope.scaling.type": "linear", "rope.scaling.factor": 8.0})
    assert scaled.rope_factors == (8.0,) * 8
    unwindowed = read(**{"attention.sliding_window": 0})
    assert (unwindowed.windows, unwindowed.rope_local_theta) == ((None,) * 7, None)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30"),
        ({"attention.sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ({"attention.sliding_window_pattern": ["a"] * 7}, "sliding_window_pattern is .* true or false"),
        ({"attention.sliding_window_pattern": [True]}, "must name 7 layers, not 1"),
        ({"attention.scale": 0.5}, "attention.scale is 0.5, which is not supported; expected 0.25"),
    ],
)
def test_an_unsupported_gguf_is_rejected(tmp_path: Path, metadata: dict[str, object], words: str) -> None:
    path = write_gguf(tmp_path / "x.gguf", GEMMA, random_weights(GEMMA), **metadata)
    with pytest.raises(ModelFileError, match=words):
        read_checkpoint(path)


def test_the_largest_gemma_scales_queries_differently(tmp_path: Path) -> None:
    """Oracle: llama.cpp, which recognizes the 27B model by its 62 layers: hidden_size / heads."""
    config = {**GEMMA, "num_hidden_layers": 62, "num_attention_heads": 2, "hidden_size": 32}
    path = write_gguf(tmp_path / "deep.gguf", config, random_weights(config))
    assert read_checkpoint(path).config.attention_scale == (32 / 2) ** -0.5
    assert read_checkpoint(path).config.query_pre_attn_scalar == 16


def test_a_cache_without_windows_rejects_contexts_beyond_them(tmp_path: Path) -> None:
    path = write_folder(tmp_path, GEMMA, random_weights(GEMMA))
    with pytest.raises(
        ConfigError, match=r"no sliding windows.* a window of 8 tokens and the context has 128"
    ):
        LLM(path, batching="dense")
    LLM(path, batching="dense", max_model_len=8, kv_cache_memory=1 << 20)


def test_an_answer_without_max_tokens_ends_when_the_pool_is_full(tmp_path: Path) -> None:
    """Layers with full attention fill the pool; those with windows release the blocks they pass."""
    path = write_folder(tmp_path, GEMMA, random_weights(GEMMA))
    llm = LLM(path, block_size=4, num_blocks=40, max_num_seqs=4, max_num_batched_tokens=8)
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    [output] = llm.generate([5, 6, 7], params, use_tqdm=False)
    assert 3 + len(output.outputs[0].token_ids) == llm.max_model_len < GEMMA["max_position_embeddings"]
    assert output.outputs[0].finish_reason == "length"
    with pytest.raises(RequestTooLargeError, match=f"exceed the context of {llm.max_model_len}"):
        llm.generate([5] * llm.max_model_len, params, use_tqdm=False)


@pytest.mark.parametrize("mode", ["recompute", "swap", "none"])
def test_answers_without_max_tokens_are_the_same_as_when_served_alone(tmp_path: Path, mode: str) -> None:
    """Several requests, each of which may fill the pool. Oracle: an engine that serves only one of them."""
    path, prompts = write_folder(tmp_path, GEMMA, random_weights(GEMMA)), [[5, 6, 7], [8] * 4, [9, 10] * 2]
    params = [SamplingParams(max_tokens=None, ignore_eos=True, seed=i, logprobs=1) for i in range(3)]
    sizes = {"block_size": 4, "num_blocks": 40, "max_num_seqs": 4, "max_num_batched_tokens": 8}
    together = LLM(path, preemption_mode=mode, **sizes)
    found = together.generate(prompts, params, use_tqdm=False)
    for prompt, wanted, output in zip(prompts, params, found, strict=True):
        [alone] = LLM(path, enable_prefix_caching=False, **sizes).generate(prompt, wanted, use_tqdm=False)
        assert len(prompt) + len(alone.outputs[0].token_ids) == together.max_model_len
        assert output.outputs == alone.outputs
    assert (together.engine.stats.num_preemptions > 0) == (mode != "none")
    together.engine.call(lambda: check_pages(pages_of(together)))
    assert together.engine.stats.num_free_blocks + together.engine.stats.num_cached_blocks == 40


# Parts.


def test_geglu_is_the_tanh_approximation_of_gelu_times_up() -> None:
    """Oracle: the definition, in float64."""
    x = np.linspace(-12, 12, 2001)
    expected = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) * 3
    found = np.array(geglu(mx.array(x.astype(np.float32)), mx.full(x.shape, 3.0)))
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_a_row_of_geglu_gives_the_same_bits_in_any_batch() -> None:
    """Oracle: the row computed alone."""
    both = mx.random.normal((33, 2 * 67), key=mx.random.key(3)) * 4
    whole = np.array(geglu(*mx.split(both, 2, axis=-1)))
    for rows in ([0], [3, 4], [5, 6, 7], list(range(10, 27)), [32]):
        part = np.array(geglu(*mx.split(both[mx.array(rows)], 2, axis=-1)))
        assert np.array_equal(part, whole[rows])


def test_scaled_rows_scale_only_the_rows_that_are_looked_up() -> None:
    matrix = Linear(mx.random.normal((5, 4), key=mx.random.key(1)))
    scaled, ids, x = ScaledRows(matrix, 3.0), mx.array([[4, 0]]), mx.ones((2, 4))
    assert np.array_equal(np.array(scaled.rows(ids)), 3 * np.array(matrix.rows(ids)))
    assert np.array_equal(np.array(scaled(x)), np.array(matrix(x)))


def test_a_scaled_embedding_and_its_tied_projection_are_one_matrix(tmp_path: Path) -> None:
    model = build(read_checkpoint(write_folder(tmp_path, GEMMA, random_weights(GEMMA))))
    assert isinstance(model.embed_tokens, ScaledRows)
    assert model.embed_tokens.matrix is model.lm_head
    assert model.embed_tokens.scale == 8.0  # sqrt(64)


# The real model.


@pytest.fixture(scope="module")
def gemma() -> Checkpoint:
    """Gemma 3 270M, if it is installed."""
    try:
        return read_checkpoint(find_model("gemma3-270m"))
    except ModelFileError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip("gemma3-270m is not installed")


def test_text_becomes_sentencepieces_tokens_and_decodes_to_the_same_text(gemma: Checkpoint) -> None:
    """Oracle: SentencePiece's rules, written out in make_gemma.py."""
    for record in GOLDENS["strings"]:
        assert gemma.tokenizer.encode(record["text"]) == record["ids"], record["text"]
        if "\u2581" not in record["text"]:  # SentencePiece cannot tell it from a space
            assert gemma.tokenizer.decode(record["ids"], skip_special_tokens=False) == record["text"]


def test_transformers_conversion_differs_only_in_long_runs_of_spaces() -> None:
    """Oracle: its ids, stored in the goldens. If this fails, transformers now follows SentencePiece."""
    differ = [record["text"] for record in GOLDENS["strings"] if "gguf_conversion_ids" in record]
    assert differ
    assert all(" " * 32 in text for text in differ)


@pytest.fixture(scope="module")
def real_model(gemma: Checkpoint) -> Model:
    """Its weights, read once for all tests."""
    return build(gemma)


def test_the_real_models_continuations_equal_transformers(gemma: Checkpoint, real_model: Model) -> None:
    """Oracle: greedy continuations of short prompts, all steps in one pass; log-probabilities within 0.01."""
    assert (gemma.config.windows.count(512), gemma.config.windows.count(None)) == (15, 3)
    for record in GOLDENS["continuations"]:
        prompt, output = record["prompt_ids"], record["output_ids"]
        if len(prompt) > 100:
            continue
        rows = list(range(len(prompt) - 1, len(prompt) + len(output) - 1))
        found = logits(real_model, prompt + output, rows)
        assert found.argmax(-1).tolist() == output, record["name"]
        assert gemma.tokenizer.decode(output) == record["text"]
        for row, expected in zip(found, record["top_log_probs"], strict=False):
            log_probs = row - np.log(np.exp(row.astype(np.float64)).sum())
            assert all(abs(log_probs[token] - value) < 0.01 for token, value in expected)


# The real model on pages.

CONTINUATIONS = {record["name"]: record for record in GOLDENS["continuations"]}
Serve = Callable[..., LLM]


@pytest.fixture(scope="module")
def serve(gemma: Checkpoint, real_model: Model) -> Iterator[Serve]:
    """Engines of any configuration over the model, which is read only once."""
    if not tiny_llm_kernels.available():
        pytest.skip(f"the model would take long: {tiny_llm_kernels.why_unavailable()}")
    loaded = LoadedModel("gemma3-270m", gemma.path, real_model, gemma.tokenizer, {}, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiny_llm.llm.load_model", lambda *_: loaded)
        yield lambda **options: LLM("gemma3-270m", **{"max_model_len": 2048, **options})


def pages_of(llm: LLM) -> PagedBatchManager:
    assert isinstance(llm.core.manager, PagedBatchManager)
    return llm.core.manager


def check_answers(llm: LLM, names: Sequence[str]) -> list[int]:
    """Serve goldens in one batch, and compare with transformers'; returns the cached tokens of each."""
    records = [CONTINUATIONS[name] for name in names]
    params = SamplingParams(temperature=0.0, max_tokens=len(records[0]["output_ids"]), ignore_eos=True)
    outputs = llm.generate([record["prompt_ids"] for record in records], params, use_tqdm=False)
    for record, output in zip(records, outputs, strict=True):
        got, margins = list(output.outputs[0].token_ids), record["margins"]
        assert got == record["output_ids"], f"{record['name']}: float32 margins {margins}"
    check_pages(pages_of(llm))
    return [output.num_cached_tokens for output in outputs]


def test_all_goldens_are_right_on_pages_from_a_cold_and_from_a_warm_cache(serve: Serve) -> None:
    """Oracle: transformers' greedy continuations. Prompts up to 1,100 tokens in a batch, at most 512 a step.

    The second time, each prompt computes only the end of a block, or a part that is too short to copy.
    """
    llm, names = serve(max_num_batched_tokens=384, max_num_seqs=8), list(CONTINUATIONS)
    lengths = [len(CONTINUATIONS[name]["prompt_ids"]) for name in names]
    assert sum(length > 512 for length in lengths) >= 3
    assert check_answers(llm, names) == [0] * len(names)
    cached = check_answers(llm, names)
    assert all(length - 16 <= found < length for length, found in zip(lengths, cached, strict=True))


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_a_preempted_text_beyond_the_window_continues_as_in_transformers(
    serve: Serve, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: transformers' greedy continuations. Eight short texts cause the preemption of a long one."""
    computed: list[int] = []
    preempt = PageScheduler._preempt

    def recorded(scheduler: PageScheduler, sequence: PagedSequence, *rest: Any) -> None:
        computed.append(sequence.num_computed)
        preempt(scheduler, sequence, *rest)

    monkeypatch.setattr(PageScheduler, "_preempt", recorded)
    llm = serve(
        block_size=4,
        num_blocks=1190,
        max_model_len=900,
        max_num_batched_tokens=256,
        max_num_seqs=10,
        enable_prefix_caching=False,
        preemption_mode=mode,
    )
    check_answers(llm, [*["capital", "story"] * 4, "class"])
    assert max(computed, default=0) > 640, "it had started to answer"
    assert bool(pages_of(llm)._scheduler.num_swapped_out) == (mode == "swap")
    check_all_returned(pages_of(llm))
