"""GGUF conventions that llama.cpp keeps in its code, not in the file: tokens, keys, and split files.

Oracle for names and keys: llama.cpp's sources (llama-vocab, llama-model, its loader). Oracle for logits: the
same model as a folder, with equivalent settings in config.json or equivalent weights.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_llm.llm import LLM
from tiny_llm.loader import load_model
from tiny_llm.sampling_params import SamplingParams

from tiny_checkpoints import CONFIGS, WINDOWED_CONFIGS, gguf_name, random_weights, write_folder, write_gguf
from tiny_llm_checkpoints.errors import ModelFileError
from tiny_llm_checkpoints.gguf_tokenizer import gguf_tokenizer
from tiny_llm_checkpoints.readers import read_checkpoint

CONFIG = {**CONFIGS["llama"], "head_dim": 32, "num_hidden_layers": 1}
WEIGHTS = random_weights(CONFIG)
GEMMA = {**WINDOWED_CONFIGS["gemma3"], "num_hidden_layers": 2}
PROMPT = [1, 2, 3, 100, 250, 7, 7, 64, 8, 9, 10, 11]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def logits(path: Path) -> np.ndarray:
    """Logits of `PROMPT`, with keys and values in float32."""
    return np.array(LLM(path, kv_cache_dtype="float32", num_blocks=8).logits(PROMPT))


# Tokens that end a generation.

END_NAMES = [
    *(
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
    ),
    *(
        "</s>",
        "<eos>",
        "[EOS]",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "<\uff5cend▁of▁sentence\uff5c>",
        "<end_of_utterance>",
    ),
    *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<turn|>", "<|tool_response>", "[e~["),
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
]
CONTROL_NAMES = [
    *(
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<\uff5cfim▁begin\uff5c>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
    ),
    *(
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<\uff5cfim▁hole\uff5c>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
    ),
    *(
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<\uff5cfim▁end\uff5c>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
    ),
    *("<|prefix|>", "<|suffix|>", "<|middle|>"),
]
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def bpe(tokens: list[str], types: list[int] | None = None, **keys: Any) -> dict[str, Any]:
    """The metadata of a byte-level BPE tokenizer without merges."""
    found = {"model": "gpt2", "pre": "gpt-2", "merges": [], "tokens": tokens, **keys}
    found["token_type"] = types or [NORMAL] * len(tokens)
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


def sentencepiece(tokens: list[str], types: list[int], **keys: Any) -> dict[str, Any]:
    """The metadata of a SentencePiece tokenizer."""
    found = {"model": "llama", "tokens": tokens, "token_type": types, "scores": [0.0] * len(tokens), **keys}
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED], ids=["normal", "control", "user-defined"])
@pytest.mark.parametrize("name", END_NAMES)
def test_a_token_with_a_known_end_name_ends_generation_whatever_its_type(name: str, kind: int) -> None:
    """The file itself names only the base model's end token."""
    tokens = [*LETTERS, "base", name]
    tokenizer = gguf_tokenizer(bpe(tokens, [NORMAL] * 26 + [CONTROL, kind], eos_token_id=26))
    assert tokenizer.eos_token_ids == {26, 27}
    assert tokenizer.eos_token == "base"
    # llama.cpp also corrects their type: all of these are control tokens.
    assert name in tokenizer.control_tokens
    assert tokenizer.decode([0, 27]) == "a"
    assert tokenizer.encode(f"a{name}") == [0, 27]


@pytest.mark.parametrize("name", CONTROL_NAMES)
def test_infill_tokens_are_control_tokens_that_do_not_end_generation(name: str) -> None:
    tokenizer = gguf_tokenizer(bpe([*LETTERS, "base", name], eos_token_id=26))
    assert tokenizer.eos_token_ids == {26}
    assert tokenizer.control_tokens == (name,)


@pytest.mark.parametrize(
    ("names", "ends"),
    [
        (["<|end|>", "<|return|>", "<|call|>"], ["<|return|>", "<|call|>"]),
        (["<|end|>", "<|calls|>", "<|flush|>"], ["<|calls|>", "<|flush|>"]),
        (["<|end|>", "<|return|>"], ["<|end|>", "<|return|>"]),
        (["</s>", "<|tool_response>"], ["<|tool_response>"]),
        (["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"], []),
    ],
)
def test_llama_cpps_exceptions_are_visible_text_and_do_not_end_generation(
    names: list[str], ends: list[str]
) -> None:
    """Even if the file marks them as control tokens."""
    tokens = [*LETTERS, "base", *names]
    tokenizer = gguf_tokenizer(bpe(tokens, [NORMAL] * 26 + [CONTROL] * (len(names) + 1), eos_token_id=26))
    assert {tokens[i] for i in tokenizer.eos_token_ids} == {"base", *ends}
    shown = [name for name in names if name not in ends]
    assert not set(shown) & set(tokenizer.control_tokens)
    assert tokenizer.decode([tokens.index(name) for name in shown]) == "".join(shown)


@pytest.mark.parametrize(
    ("name", "ids"), [("Phi-3 mini", [26, 0, 27, 28, 1]), ("Mini", [26, 28, 0, 27, 28, 1])]
)
def test_in_phi3_models_control_tokens_absorb_the_space_after_them(name: str, ids: list[int]) -> None:
    """The model is recognized by its name."""
    metadata = bpe([*LETTERS, "<|user|>", "<s>", "Ġ"], [NORMAL] * 26 + [CONTROL, CONTROL, NORMAL])
    assert gguf_tokenizer({**metadata, "general.name": name}).encode("<|user|> a<s> b") == ids


def test_a_key_selects_the_infill_token_that_ends_generation() -> None:
    tokens = [*LETTERS, "<|fim_pad|>", "<PAD>"]
    assert gguf_tokenizer(bpe(tokens, fim_pad_token_id=27)).eos_token_ids == {27}
    assert gguf_tokenizer(bpe(tokens)).eos_token_ids == {26}, "without the key, the first one"


def test_generation_stops_at_an_end_of_turn_token_that_the_file_does_not_name(tmp_path: Path) -> None:
    """The second token of the model's greedy answer is renamed to "<|im_end|>"."""
    path = write_gguf(tmp_path / "a.gguf", CONFIG, WEIGHTS)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    answer = LLM(path, num_blocks=8).generate([PROMPT], params, use_tqdm=False)[0].outputs[0].token_ids
    where = answer.index(answer[1])
    path.write_bytes(renamed(path.read_bytes(), answer[1]))
    [output] = LLM(path, num_blocks=8).generate([PROMPT], SamplingParams(temperature=0), use_tqdm=False)
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == (answer[: where + 1], "stop")


def renamed(content: bytes, token: int) -> bytes:
    """The GGUF file with the names of `token` and of "<|im_end|>" swapped."""
    start = content.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 4 + 4 + 8
    texts, at = [], start
    [count] = struct.unpack("<Q", content[start - 8 : start])
    for _ in range(count):
        [length] = struct.unpack_from("<Q", content, at)
        texts.append(content[at + 8 : at + 8 + length])
        at += 8 + length
    im_end = texts.index(b"<|im_end|>")
    texts[token], texts[im_end] = texts[im_end], texts[token]
    return content[:start] + b"".join(struct.pack("<Q", len(t)) + t for t in texts) + content[at:]


# Defaults for missing keys.

PIECES = ["<unk>", "<s>", "</s>", "▁", "a", "▁a"]
PIECE_TYPES = [UNKNOWN, CONTROL, CONTROL, NORMAL, NORMAL, NORMAL]


def test_sentencepiece_without_keys_has_llama_cpps_defaults() -> None:
    tokenizer = gguf_tokenizer(sentencepiece(PIECES, PIECE_TYPES))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_ids) == ("<s>", "</s>", {2})
    assert tokenizer.encode("a", add_special_tokens=True) == [1, 5], "add_bos and add_space_prefix are true"
    assert tokenizer.encode("é") == [3, 0], "unknown characters become token 0"


@pytest.mark.parametrize(
    ("keys", "ids"),
    [
        ({"add_bos_token": False}, [5]),
        ({"add_eos_token": True}, [1, 5, 2]),
        ({"add_space_prefix": False}, [1, 4]),
        ({"bos_token_id": 4}, [4, 5]),
        ({"add_sep_token": True, "remove_extra_whitespaces": True, "precompiled_charsmap": [1, 2]}, [1, 5]),
    ],
)
def test_each_tokenizer_flag_has_llama_cpps_effect(keys: dict[str, Any], ids: list[int]) -> None:
    tokenizer = gguf_tokenizer(sentencepiece(PIECES, PIECE_TYPES, **keys))
    assert tokenizer.encode("a", add_special_tokens=True) == ids


def test_the_file_can_name_another_unknown_token() -> None:
    assert gguf_tokenizer(sentencepiece(PIECES, PIECE_TYPES, unknown_token_id=1)).encode("é") == [3, 1]


def test_default_token_ids_beyond_the_vocabulary_are_ignored() -> None:
    tokenizer = gguf_tokenizer(sentencepiece(["▁"], [NORMAL]))
    assert (tokenizer.bos_token, tokenizer.eos_token_ids) == ("", set())


@pytest.mark.parametrize(("kind", "ends"), [(CONTROL, {11}), (NORMAL, set())])
def test_bpe_without_keys_ends_at_token_11_if_it_is_a_control_token(kind: int, ends: set[int]) -> None:
    """llama.cpp always uses token 11, which is Falcon's end token, but a comma in most vocabularies."""
    types = [kind if index == 11 else NORMAL for index in range(26)]
    tokenizer = gguf_tokenizer(bpe(LETTERS, types))
    assert tokenizer.eos_token_ids == ends
    assert tokenizer.encode("a", add_special_tokens=True) == [0]


def test_token_types_may_be_missing_and_token_texts_may_be_empty() -> None:
    metadata = bpe([*LETTERS, "", "<|im_end|>"])
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = gguf_tokenizer(metadata)
    assert tokenizer.eos_token_ids == {27}
    assert tokenizer.encode("[EMPTY_26]", special_tokens=False) != [26]


PRE_NAMES = {
    "llama-bpe": ["llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
    "gpt-2": ["phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4"],
    "qwen2": ["deepseek-r1-qwen", "megrez", "kormo"],
}


@pytest.mark.parametrize(("name", "alias"), [(n, a) for n, aliases in PRE_NAMES.items() for a in aliases])
def test_each_alias_of_a_pre_tokenizer_splits_like_its_main_name(name: str, alias: str) -> None:
    texts = ["a b 123 c", "it's 1234567\n\n x", "  two"]
    one, other = (gguf_tokenizer(bpe(LETTERS, pre=pre, bos_token_id=1)) for pre in (name, alias))
    assert [one.encode(t, add_special_tokens=True) for t in texts] == [
        other.encode(t, add_special_tokens=True) for t in texts
    ]
    assert (one.encode("a", add_special_tokens=True) == [1, 0]) == (name == "llama-bpe")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"pre": "default"},
            "tokenizer.ggml.pre 'default' is not a supported pre-tokenizer; supported: smollm, gpt-2",
        ),
        ({"suppress_tokens": [3]}, "tokenizer.ggml.suppress_tokens is not supported"),
        ({"fim_pad_token_id": 99}, "tokenizer.ggml.fim_pad_token_id is '99', expected 0 to 25"),
        ({"eot_token_id": -1}, "tokenizer.ggml.eot_token_id is '-1'"),
        (
            {"add_eos_token": 1, "eos_token_id": 0},
            "tokenizer.ggml.add_eos_token is '1', expected true or false",
        ),
    ],
)
def test_an_unsupported_tokenizer_setting_is_rejected_by_its_key(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gguf_tokenizer(bpe(LETTERS, **keys))


def test_merges_that_would_fill_the_memory_are_rejected() -> None:
    nested = ["\u00e9" * length for length in range(2, 1200)]
    tokens, types = [*PIECES, "\u00e9", *nested], [*PIECE_TYPES, *[NORMAL] * 1199]
    with pytest.raises(ValueError, match=r"tokens has too many merges: .* over 67108864 characters long"):
        gguf_tokenizer(sentencepiece(tokens, types))


def test_tokens_whose_merges_would_take_too_long_to_compute_are_rejected_at_once() -> None:
    """A token of 100,000 characters takes ten billion steps; the vocabulary of Gemma 3 takes 10 million."""
    tokens = [*PIECES, "a" * 100_000]
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.tokens are too long .* has 100000 characters"):
        gguf_tokenizer(sentencepiece(tokens, [*PIECE_TYPES, NORMAL]))


# Keys that change the computation.


def folder_with(tmp_path: Path, weights: Mapping[str, np.ndarray] = WEIGHTS, **fields: Any) -> Path:
    """The oracle: the same model as a folder with transformers' settings."""
    return write_folder(tmp_path / "oracle", {**CONFIG, **fields}, weights)


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"rope.scaling.factor": 4.0}, 4.0),  # a file without a type means linear
        ({"rope.scale_linear": 4.0}, 4.0),  # the old name of the factor
        ({"rope.scaling.factor": 2.0, "rope.scale_linear": 4.0}, 2.0),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scaling.factor": 0.0}, None),
        ({"rope.scaling.original_context_length": 64, "rope.scaling.finetuned": 1}, None),
    ],
)
def test_linear_rope_scaling_matches_transformers(
    keys: dict[str, Any], factor: float | None, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "a.gguf", CONFIG, WEIGHTS, **keys)
    scaling = {} if factor is None else {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    found, plain = logits(path), logits(write_folder(tmp_path / "plain", CONFIG, WEIGHTS))
    assert np.abs(found - logits(folder_with(tmp_path, **scaling))).max() < 1e-4
    assert (np.abs(found - plain).max() > 0.1) == (factor is not None)


def test_a_linear_factor_multiplies_the_stored_rope_factors(tmp_path: Path) -> None:
    """llama 3's tensor and a linear factor both divide the frequencies, as in ggml."""
    config = {**CONFIGS["llama3-scaling"], "num_hidden_layers": 1}
    weights = random_weights(config)
    stored = read_checkpoint(write_gguf(tmp_path / "a.gguf", config, weights)).config.rope_factors
    keys = {"rope.scaling.factor": 2.0}
    both = read_checkpoint(write_gguf(tmp_path / "b.gguf", config, weights, **keys)).config.rope_factors
    assert stored is not None
    assert both == tuple(2 * factor for factor in stored)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_rope_factors_are_rejected_in_architectures_that_do_not_read_them(name: str, tmp_path: Path) -> None:
    config = {**CONFIGS[name], "rope_scaling": CONFIGS["llama3-scaling"]["rope_scaling"]}
    path = write_gguf(tmp_path / "a.gguf", config, random_weights(config))
    assert "tensor rope_freqs.weight is not part of" in error_message(path)


def error_message(path: Path) -> str:
    """The message of the error that loading raises."""
    with pytest.raises(ModelFileError) as caught:
        load_model(path)
    return str(caught.value)


REJECTED: dict[str, Any] = {
    "attention.causal": False,
    "attention.clamp_kqv": 8.0,
    "attention.max_alibi_bias": 8.0,
    "attention.scale": 0.5,
    "attention.output_scale": 0.5,
    "attention.value_scale": 2.0,
    "attention.temperature_length": 8192,
    "attention.temperature_scale": 0.1,
    "attention.sliding_window": 64,
    "attention.key_length_swa": 16,
    "attention.value_length": 16,
    "attention.value_length_swa": 16,
    "attention.kv_lora_rank": 64,
    "attention.q_lora_rank": 64,
    "attention.key_length_mla": 64,
    "attention.value_length_mla": 64,
    "attention.shared_kv_layers": 1,
    "attention.recurrent_layers": [True],
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "logit_scale": 0.5,
    "embedding_scale": 12.0,
    "embedding_length_out": 32,
    "embedding_length_per_layer_input": 32,
    "residual_scale": 0.22,
    "expert_count": 8,
    "expert_used_count": 2,
    "full_attention_interval": 4,
    "hidden_activation": "gelu",
    "n_deepstack_layers": 3,
    "nextn_predict_layers": 1,
    "rope.dimension_count": 16,
    "rope.dimension_count_swa": 16,
    "rope.dimension_sections": [4, 6, 6, 0],
    "rope.scaling.alpha": 50.0,
    "rope.scaling.attn_factor": 1.2,
    "rope.scaling.factor": -2.0,
    "rope.scaling.type": "yarn",
    "swin_norm": True,
    "use_parallel_residual": True,
}


@pytest.mark.parametrize("key", REJECTED)
def test_a_key_for_an_unsupported_computation_is_rejected_by_name(key: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", CONFIG, WEIGHTS, **{key: REJECTED[key]})
    assert f"llama.{key} " in error_message(path)


@pytest.mark.parametrize("kind", ["yarn", "longrope", "dynamic", "llama3"])
def test_an_unsupported_rope_scaling_type_is_rejected_by_name(kind: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", CONFIG, WEIGHTS, **{"rope.scaling.type": kind})
    assert f"llama.rope.scaling.type '{kind}' is not supported; supported: none, linear" in error_message(
        path
    )


NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attention.scale": 32**-0.5,
    "attention.value_length": 32,
    "expert_count": 0,
    "logit_scale": 1.0,
    "final_logit_softcapping": 0.0,
    "rope.scaling.attn_factor": 1.0,
    "attention.head_count": [4],
    "feed_forward_length": [96],
    "vocab_size": 7,
    "pooling_type": 3,
    "tensor_data_layout": "Meta AI original pth",
    "rope.scaling.yarn_ext_factor": 1.0,
    "something.new": 5,
}


@pytest.mark.parametrize("key", NEUTRAL)
def test_neutral_and_unknown_keys_do_not_change_the_logits(key: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", CONFIG, WEIGHTS, **{key: NEUTRAL[key]})
    assert np.abs(logits(path) - logits(folder_with(tmp_path))).max() < 1e-4


@pytest.mark.parametrize(
    ("field", "key", "value"),
    [
        ("rope_theta", "rope.freq_base", 500.0),
        ("rms_norm_eps", "attention.layer_norm_rms_epsilon", 0.25),
    ],
)
def test_rope_base_and_norm_epsilon_are_read_from_the_file(
    field: str, key: str, value: float, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "a.gguf", CONFIG, WEIGHTS, **{key: value})
    assert np.abs(logits(path) - logits(folder_with(tmp_path, **{field: value}))).max() < 1e-4


def test_the_default_rope_base_is_10000(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", {**CONFIG, "rope_theta": None}, WEIGHTS)
    assert read_checkpoint(path).config.rope_theta == 10_000.0


def test_without_an_output_tensor_the_embedding_is_the_output_projection(tmp_path: Path) -> None:
    tied = {name: array for name, array in WEIGHTS.items() if name != "lm_head.weight"}
    path = write_gguf(tmp_path / "a.gguf", CONFIG, tied)
    oracle = folder_with(tmp_path, tied, tie_word_embeddings=True)
    assert np.abs(logits(path) - logits(oracle)).max() < 1e-4


@pytest.mark.parametrize(
    "name",
    [
        *("blk.0.attn_qkv.weight", "blk.0.attn_q.scale", "blk.0.attn_q_norm.weight", "output.bias"),
        *("blk.0.ffn_gate_inp.weight", "blk.0.post_attention_norm.weight", "rope_factors_long.weight"),
        *(
            "cls.output.weight",
            "model.norm.weight",
            "model.layers.0.mlp.up_proj.weight",
            "position_embd.weight",
        ),
    ],
)
def test_an_unexpected_tensor_is_rejected_by_its_name_in_the_file(name: str, tmp_path: Path) -> None:
    """Checkpoint names too: a file must not use them to replace a tensor with another GGUF name."""
    path = write_gguf(tmp_path / "a.gguf", CONFIG, WEIGHTS, extra={name: np.ones(64, np.float32)})
    assert f"tensor {name} is not part of a llama model" in error_message(path)


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "vocab", "imatrix", 7])
def test_a_gguf_whose_type_is_not_model_is_rejected(kind: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", CONFIG, WEIGHTS, other={"general.type": kind})
    assert f"general.type is '{kind}', expected 'model'" in error_message(path)


# Split files.


def write_split(tmp_path: Path, count: int = 3, **first: Any) -> list[Path]:
    """A split model, as llama.cpp's gguf-split writes it. first: further metadata of the first part."""
    paths = [tmp_path / f"tiny-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    names = list(WEIGHTS)
    for place, path in enumerate(paths):
        chosen = {name: WEIGHTS[name] for name in names[place::count]}
        split = {"split.no": place, "split.count": count, "split.tensors.count": len(names)}
        write_gguf(path, CONFIG, chosen, other={**split, **(first if place == 0 else {})})
    return paths


def test_a_split_gguf_is_read_as_one_model(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    assert np.array_equal(logits(paths[0]), logits(write_gguf(tmp_path / "one.gguf", CONFIG, WEIGHTS)))
    assert load_model(paths[0]).name == "tiny"


def test_opening_a_later_part_names_the_first_part(tmp_path: Path) -> None:
    message = error_message(write_split(tmp_path)[1])
    assert "this is part 2 of 3; open the first part, tiny-00001-of-00003.gguf" in message


def test_a_missing_gguf_part_is_named(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    paths[2].unlink()
    assert error_message(paths[0]) == f"{paths[2]}: part 3 of 3 is missing, expected in the same folder"


def test_gguf_parts_in_the_wrong_order_are_rejected(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    moved = paths[1].rename(tmp_path / "kept")
    paths[2].rename(paths[1])
    moved.rename(paths[2])
    assert error_message(paths[0]) == f"{paths[1]}: split.no is 2, expected 1"


def test_a_renamed_part_is_rejected_with_the_expected_name(tmp_path: Path) -> None:
    path = write_split(tmp_path)[0].rename(tmp_path / "tiny.gguf")
    expected = "part 1 of 3, expected a file name that ends in -00001-of-00003.gguf"
    assert expected in error_message(path)


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (
            {"split.tensors.count": 99},
            "split.tensors.count is '12', expected the first part's '99' (tiny-00001",
        ),
        ({"split.count": 2}, "expected a file name that ends in -00001-of-00002.gguf"),
        ({"split.count": 0}, "part 1 of 0, expected a file name that ends in"),
        ({"split.no": "x"}, "split.no is 'x', expected a whole number"),
    ],
)
def test_gguf_parts_with_inconsistent_metadata_are_rejected(
    first: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in error_message(write_split(tmp_path, **first)[0])


@pytest.mark.parametrize(
    ("key", "value"), [("general.name", "another"), ("general.architecture", "qwen2")], ids=["name", "kind"]
)
def test_a_part_of_another_model_is_rejected(key: str, value: str, tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    other = {"split.no": 2, "split.count": 3, key: value}
    name = next(iter(WEIGHTS))
    write_gguf(paths[2], CONFIG, {name: WEIGHTS[name]}, other=other)
    message = error_message(paths[0])
    assert message.startswith(f"{paths[2]}: {key} is '{value}', expected the first part's '")
    assert message.endswith(f"' ({paths[0].name})")


def test_a_tensor_in_two_gguf_parts_is_rejected(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    split = {"split.no": 1, "split.count": 3}
    write_gguf(paths[1], CONFIG, {"model.norm.weight": WEIGHTS["model.norm.weight"]}, other=split)
    name = next(iter(WEIGHTS))
    write_gguf(paths[2], CONFIG, {name: WEIGHTS[name]}, other={**split, "split.no": 2})
    assert f"tensor {gguf_name(name)} appears in two parts, expected in one" in error_message(paths[0])


def test_a_gemma_without_a_window_has_full_attention_in_all_layers(tmp_path: Path) -> None:
    """Oracle: a window longer than the prompt, with the same rotary base in all layers."""
    weights = random_weights(GEMMA)
    none = write_gguf(tmp_path / "a.gguf", GEMMA, weights, **{"attention.sliding_window": 0})
    base = float(GEMMA["rope_theta"])
    wide = {"attention.sliding_window": 64, "rope.freq_base_swa": base}
    assert np.abs(logits(none) - logits(write_gguf(tmp_path / "b.gguf", GEMMA, weights, **wide))).max() < 1e-4
