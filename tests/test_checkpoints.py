"""Tiny random models of every architecture give transformers' logits, from every file format.

Oracle: transformers' float32 logits (tests/goldens/checkpoints.json); for quantized files, its logits for the
dequantized weights. The tolerance is 1e-4 for plain weights and for quantized weights with float32
activations. The compiled quantized matmul rounds activations to 16 bits; its tolerance is 1e-4 of the largest
logit, which is about 4 in these models.
"""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import gguf
import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.kernels import twins
from tiny_llm.linear import quantized_linear
from tiny_llm.llm import LLM
from tiny_llm.loader import build, describe_model
from tiny_llm.quantize import dequantize

from tiny_checkpoints import (
    CONFIGS,
    dequantized,
    random_weights,
    to_bfloat16,
    write_folder,
    write_gguf,
    write_safetensors,
)
from tiny_llm_checkpoints import ggml_blocks
from tiny_llm_checkpoints.errors import ModelFileError
from tiny_llm_checkpoints.readers import read_checkpoint

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "checkpoints.json").read_text())
TOLERANCE = 1e-4
NAMES = list(CONFIGS)


def golden_logits(name: str, weights: str) -> np.ndarray:
    """transformers' logits [positions, vocab_size]."""
    [found] = [r for r in GOLDENS["logits"] if (r["checkpoint"], r["weights"]) == (name, weights)]
    return np.array(found["logits"])


def our_logits(path: Path) -> np.ndarray:
    """The engine's logits at the goldens' positions, with keys and values in float32 as in transformers."""
    llm = LLM(path, kv_cache_dtype="float32", num_blocks=16, max_num_batched_tokens=64)
    logits = llm.logits(GOLDENS["prompt"])
    assert logits.dtype == mx.float32
    return np.array(logits)[GOLDENS["positions"]]


def q8_0_where_blocks_fit(name: str) -> Callable[[str], str]:
    """Q8_0 for every matrix whose rows divide into blocks of 32; F32 for the others."""
    weights = random_weights(CONFIGS[name])
    return lambda tensor: "F32" if weights[tensor].shape[-1] % 32 else "Q8_0"


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_of_a_folder_match_transformers(name: str, tmp_path: Path) -> None:
    path = write_folder(tmp_path, CONFIGS[name], random_weights(CONFIGS[name]))
    assert np.abs(our_logits(path) - golden_logits(name, "F32")).max() < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_of_a_gguf_match_transformers(name: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", CONFIGS[name], random_weights(CONFIGS[name]))
    assert np.abs(our_logits(path) - golden_logits(name, "F32")).max() < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_a_quantized_gguf_gives_the_logits_of_its_dequantized_weights(name: str, tmp_path: Path) -> None:
    kind, golden = q8_0_where_blocks_fit(name), golden_logits(name, "Q8_0")
    path = write_gguf(tmp_path / "tiny.gguf", CONFIGS[name], random_weights(CONFIGS[name]), kind)
    assert np.abs(our_logits(path) - golden).max() < TOLERANCE * np.abs(golden).max()
    with twins():
        assert np.abs(our_logits(path) - golden).max() < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_of_the_readable_twins_match_transformers(name: str, tmp_path: Path) -> None:
    path = write_folder(tmp_path, CONFIGS[name], random_weights(CONFIGS[name]))
    with twins():
        assert np.abs(our_logits(path) - golden_logits(name, "F32")).max() < TOLERANCE


# Every storage format of a matrix. Oracle: the same model with the same values stored in plain float32.

WIDE = {**CONFIGS["qwen3"], "hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
Weights = dict[str, np.ndarray]


def logit_difference(path: Path, values: Weights, tmp_path: Path) -> float:
    """The largest difference from the logits of a folder with `values` in float32."""
    return float(np.abs(our_logits(path) - oracle_logits(values, tmp_path)).max())


def oracle_logits(values: Weights, tmp_path: Path) -> np.ndarray:
    """The logits of a folder with `values` in float32."""
    return our_logits(write_folder(tmp_path / "oracle", WIDE, values))


def assert_quantized_equals(path: Path, values: Weights, tmp_path: Path) -> None:
    """The quantized model at `path` computes with `values`, within the tolerances of the module docstring."""
    oracle = oracle_logits(values, tmp_path)
    assert np.abs(our_logits(path) - oracle).max() < TOLERANCE * np.abs(oracle).max()
    with twins():
        assert np.abs(our_logits(path) - oracle).max() < TOLERANCE


def is_matrix(name: str) -> bool:
    return not name.endswith("norm.weight")


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_folders_give_the_logits_of_their_values(dtype: str, tmp_path: Path) -> None:
    weights = {name: to_bfloat16(array) for name, array in random_weights(WIDE).items()}
    if dtype == "F16":
        weights = {name: array.astype(np.float16) for name, array in weights.items()}
    path = write_folder(tmp_path / "half", WIDE, weights, dtype=dtype)
    assert (
        logit_difference(path, {name: a.astype(np.float32) for name, a in weights.items()}, tmp_path)
        < TOLERANCE
    )


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_every_gguf_type_gives_the_logits_of_its_dequantized_values(kind: str, tmp_path: Path) -> None:
    weights = random_weights(WIDE)
    path = write_gguf(tmp_path / "typed.gguf", WIDE, weights, kind)
    values = {name: dequantized(array, kind) if is_matrix(name) else array for name, array in weights.items()}
    if kind == "Q5_1":  # loaded as float16
        values = {
            name: a.astype(np.float16).astype(np.float32) if is_matrix(name) else a
            for name, a in values.items()
        }
    assert_quantized_equals(path, values, tmp_path)


# The places of the scales in a block, and values of the scales with which the weights are of about 0.1.
HALVES = {
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ4_NL", "IQ4_XS"), (0,)),
    **{"TQ1_0": (52,), "TQ2_0": (64,), "IQ1_M": (), "MXFP4": (), "NVFP4": ()},
}
SIZES = {
    "Q6_K": 2e-4,
    "Q3_K": 2e-3,
    "IQ1_S": 1e-2,
    "TQ1_0": 0.1,
    "TQ2_0": 0.1,
    "IQ4_NL": 1e-3,
    "IQ4_XS": 5e-5,
}


def random_blocks(kind: str, rows: int, inputs: int) -> np.ndarray:
    """A matrix in one of ggml's types, with random bits and scales that give values below about one."""
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    random = np.random.RandomState(crc32(kind.encode()))
    blocks = random.randint(0, 256, (rows, inputs // block, nbytes)).astype(np.uint8)
    for at in HALVES[kind]:
        scales = random.uniform(0.5, 1.5, blocks.shape[:2]) * SIZES.get(kind, 5e-4)
        blocks[..., at : at + 2] = scales.astype("<f2")[..., None].view(np.uint8)
    if kind == "IQ1_M":  # the scale is in the upper four bits of four numbers
        blocks[..., 49:56:2] = blocks[..., 49:56:2] & 0x0F | np.array([0, 0, 0, 0x20], np.uint8)
    if kind == "MXFP4":  # a power of two: 2^-7 to 2^-4
        blocks[..., 0] = 121 + blocks[..., 0] % 4
    if kind == "NVFP4":  # four floats of 8 bits, from 2^-6 to 2^-5
        blocks[..., :4] = 8 + blocks[..., :4] % 8
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", HALVES)
def test_a_block_type_gives_the_logits_of_ggmls_dequantized_values(kind: str, tmp_path: Path) -> None:
    weights = random_weights(WIDE)
    name = "model.layers.1.mlp.down_proj.weight"
    blocks = random_blocks(kind, *weights[name].shape)
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert 1e-3 < np.abs(values).mean() < 1.0
    path = write_gguf(tmp_path / "k.gguf", WIDE, {**weights, name: values}, raw={name: (blocks, kind)})
    if kind == "Q4_K":  # stays quantized
        assert_quantized_equals(path, {**weights, name: values}, tmp_path)
        return
    rounded = values.astype(np.float16).astype(np.float32)  # loaded as float16
    assert logit_difference(path, {**weights, name: rounded}, tmp_path) < TOLERANCE


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q8_0"])
@pytest.mark.parametrize("readable", [False, True], ids=["kernel", "readable"])
def test_loaded_quantized_tensors_keep_their_values_bit_for_bit(
    kind: str, readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: ggml's package. Checks both MLX's layout and the kernels' packed one."""
    if readable:
        monkeypatch.setattr(ggml_blocks, "quants", ggml_blocks.readable_quants)
    if kind == "Q4_K":
        blocks = random_blocks(kind, 48, 512)
    else:
        matrix = np.random.RandomState(7).standard_normal((48, 512)).astype(np.float32)
        blocks = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType[kind])
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    _, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    found = ggml_blocks.QUANTIZED[kind](mx.array(blocks).reshape(48, -1, nbytes))
    assert np.array_equal(np.array(dequantize(*found)), expected)
    assert np.array_equal(np.array(quantized_linear(*found).rows(mx.arange(48))), expected)


def test_q4_k_follows_ggmls_definition() -> None:
    """The oracle writes out ggml's definition: 8 groups of 32 with 6-bit scales and minimums."""
    [block] = random_blocks("Q4_K", 1, 256)
    d, dmin = block[:4].view("<f2").astype(np.float64)
    packed = block[4:16].astype(int)
    scales = [packed[i] & 63 for i in range(4)] + [
        (packed[i + 8] & 15) | (packed[i] >> 6) << 4 for i in range(4)
    ]
    minimums = [packed[i + 4] & 63 for i in range(4)] + [
        (packed[i + 8] >> 4) | (packed[i + 4] >> 6) << 4 for i in range(4)
    ]
    expected = []
    for group in range(8):
        quants = block[16 + group // 2 * 32 :][:32] >> (group % 2 * 4) & 15
        expected += [d * scales[group] * q - dmin * minimums[group] for q in quants.astype(int)]
    found = np.array(dequantize(*ggml_blocks.q4_k(mx.array(block[None, None]))))[0]
    assert np.allclose(found, expected, rtol=1e-6, atol=1e-7)


def quantized_folder(path: Path, quantization: dict[str, object], scale_type: mx.Dtype) -> Weights:
    """Write a folder quantized as mlx-lm does it; return the values that its weights represent."""
    stored, values = {}, {}
    for name, array in random_weights(WIDE).items():
        module = name.removesuffix(".weight")
        how = quantization.get(module, {key: quantization[key] for key in ("group_size", "bits")})
        if not is_matrix(name) or how is False:
            stored[name] = values[name] = array
            continue
        parts = mx.quantize(mx.array(array).astype(scale_type), **how)
        for part, found in zip(("weight", "scales", "biases"), parts, strict=True):
            is_bfloat16 = found.dtype == mx.bfloat16
            stored[f"{module}.{part}"] = np.array(found.view(mx.uint16) if is_bfloat16 else found)
        weight, *affine = parts  # dequantized in float32, not in the type of the scales
        values[name] = np.array(mx.dequantize(weight, *(a.astype(mx.float32) for a in affine), **how))
    write_folder(path, {**WIDE, "quantization": quantization}, stored)
    return values


@pytest.mark.parametrize("scale_type", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_quantized_folders_give_the_logits_of_their_values(
    bits: int, group_size: int, scale_type: mx.Dtype, tmp_path: Path
) -> None:
    quantization: dict[str, object] = {"group_size": group_size, "bits": bits}
    values = quantized_folder(tmp_path / "q", quantization, scale_type)
    assert_quantized_equals(tmp_path / "q", values, tmp_path)


def test_each_tensor_may_have_its_own_bits_and_group_size(tmp_path: Path) -> None:
    layer = "model.layers.0"
    quantization = {
        "group_size": 64,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
        f"{layer}.self_attn.q_proj": {"group_size": 128, "bits": 6},
        f"{layer}.mlp.gate_proj": {"group_size": 32, "bits": 3},
        f"{layer}.mlp.down_proj": False,
        "lm_head": {"group_size": 64, "bits": 5},
    }
    values = quantized_folder(tmp_path / "mixed", quantization, mx.float16)
    assert_quantized_equals(tmp_path / "mixed", values, tmp_path)


def test_safetensors_files_of_an_index_are_read_as_one_model(tmp_path: Path) -> None:
    weights = random_weights(WIDE)
    path = write_folder(tmp_path / "split", WIDE, weights)
    names = sorted(weights)
    (path / "model.safetensors").unlink()
    index = {}
    for part, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{part:05}-of-00002.safetensors"
        write_safetensors(path / file, {name: weights[name] for name in chosen})
        index.update(dict.fromkeys(chosen, file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (path / "consolidated.safetensors").write_bytes(b"not in the index")
    assert logit_difference(path, weights, tmp_path) == 0.0


def test_loading_does_not_hold_the_weights_twice(tmp_path: Path) -> None:
    """Peak memory is the model plus its largest stack of matrices."""
    config = {**WIDE, "num_hidden_layers": 24}
    path = write_folder(tmp_path / "deep", config, random_weights(config), dtype="F32")
    stored = (path / "model.safetensors").stat().st_size
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = build(read_checkpoint(path))
    assert mx.get_active_memory() - before < 1.05 * stored
    assert mx.get_peak_memory() - before < 1.2 * stored
    del model


# ---- files that would give other answers ----


def test_a_second_copy_of_a_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    config, weights = {**CONFIGS["llama"], "tie_word_embeddings": True}, random_weights(CONFIGS["llama"])
    embedding = weights["model.embed_tokens.weight"]
    alone = {name: array for name, array in weights.items() if name != "lm_head.weight"}
    expected = our_logits(write_folder(tmp_path / "alone", config, alone))
    copied = write_folder(tmp_path / "copied", config, {**alone, "lm_head.weight": embedding})
    assert np.array_equal(our_logits(copied), expected)
    changed = np.array(embedding)
    changed[-1, -1] += 1
    for name, head in (("changed", changed), ("shorter", embedding[:-1])):
        folder = write_folder(tmp_path / name, config, {**alone, "lm_head.weight": head})
        with pytest.raises(ModelFileError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            read_checkpoint(folder)


@pytest.mark.parametrize("name", NAMES)
def test_attention_to_later_tokens_is_refused(tmp_path: Path, name: str) -> None:
    weights = random_weights(CONFIGS[name])
    read_checkpoint(write_folder(tmp_path / "causal", {**CONFIGS[name], "is_causal": True}, weights))
    folder = write_folder(tmp_path / "both ways", {**CONFIGS[name], "is_causal": False}, weights)
    with pytest.raises(ModelFileError, match="is_causal False is not supported"):
        read_checkpoint(folder)


def test_a_quantized_matrix_without_axes_is_refused(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    parts = {
        f"{name}.weight": np.array(3, np.uint32),
        f"{name}.scales": np.array(1, np.float32),
        f"{name}.biases": np.array(1, np.float32),
    }
    config = {**CONFIGS["llama"], "quantization": {"bits": 4, "group_size": 64}}
    folder = write_folder(tmp_path / "model", config, {**random_weights(CONFIGS["llama"]), **parts})
    with pytest.raises(ModelFileError, match=name):
        read_checkpoint(folder)


def test_a_file_behind_a_link_has_the_links_name(tmp_path: Path) -> None:
    """The hub's cache has links to files that are named by their hashes."""
    file = write_gguf(tmp_path / "0123abcd", CONFIGS["llama"], random_weights(CONFIGS["llama"]))
    link = tmp_path / "Tiny-F32.gguf"
    link.symlink_to(file)
    assert describe_model(link).name == "Tiny-F32"
