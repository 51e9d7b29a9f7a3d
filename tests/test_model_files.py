"""Model files are untrusted: any defect must raise one clear error that names the file.

Two kinds of defects: chosen ones (each row of a table is a real mistake), and random ones, where bytes are
changed, removed or repeated and the file is read to its last weight with bounded memory.
"""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_llm.loader import build, load_model

from malformed_files import EDITS, outcome, write_valid_files
from tiny_checkpoints import CONFIGS, random_weights, write_folder, write_gguf, write_safetensors
from tiny_llm_checkpoints.errors import ModelFileError
from tiny_llm_checkpoints.gguf_format import read_gguf_header
from tiny_llm_checkpoints.readers import read_checkpoint
from tiny_llm_checkpoints.safetensors_format import read_safetensors_header
from tiny_model import examples

CONFIG = {**CONFIGS["llama"], "head_dim": 32, "num_hidden_layers": 1}
WEIGHTS = random_weights(CONFIG)

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid folder, to be copied."""
    return write_folder(tmp_path_factory.mktemp("good") / "tiny", CONFIG, WEIGHTS)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid GGUF file, to be copied."""
    return write_gguf(tmp_path_factory.mktemp("good") / "tiny.gguf", CONFIG, WEIGHTS)


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy of the valid folder, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def error_message(path: Path) -> str:
    """The message that a broken model's error has: one line."""
    with pytest.raises(ModelFileError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_json(file: Path, edit: Edit) -> None:
    """Change a JSON file in place."""
    found = json.loads(file.read_text())
    edit(found)
    file.write_text(json.dumps(found))


# Folders.


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c.update(model_type="mamba"), ["model_type 'mamba'", "supported: llama, mistral, qwen2"]),
        (lambda c: c.pop("model_type"), ["model_type None", "supported"]),
        (lambda c: c.update(model_type=["llama"]), ["model_type ['llama']", "supported"]),
        (lambda c: c.pop("hidden_size"), ["hidden_size is missing"]),
        (lambda c: c.update(hidden_size="64"), ["hidden_size is '64'", "a whole number"]),
        (lambda c: c.update(num_hidden_layers=10**12), ["num_hidden_layers", "1 to 1024", "1000000000000"]),
        (lambda c: c.update(num_attention_heads=0), ["num_attention_heads", "not 0"]),
        (lambda c: c.update(num_key_value_heads=3), ["num_attention_heads (4)", "num_key_value_heads (3)"]),
        (lambda c: c.update(head_dim=31), ["head_dim must be even", "31"]),
        (lambda c: c.update(hidden_act="gelu"), ["hidden_act 'gelu'", "expected 'silu'"]),
        (lambda c: c.update(hidden_act=["silu"]), ["hidden_act ['silu']", "expected 'silu'"]),
        (lambda c: c.update(use_sliding_window=True), ["use_sliding_window"]),
        (lambda c: c.update(layer_types=["sliding_attention"]), ["layer_types 'sliding_attention'"]),
        (
            lambda c: c.update(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
            ["rope_type 'yarn'", "llama3"],
        ),
        (lambda c: c.update(rope_scaling={"type": "linear"}), ["factor is missing"]),
        (lambda c: c.update(rms_norm_eps=float("nan")), ["rms_norm_eps", "nan"]),
        (lambda c: c.update(eos_token_id="</s>"), ["eos_token_id is '</s>'"]),
        (lambda c: c.update(quantization_config={"quant_method": "gptq"}), ["'gptq'", "MLX"]),
        (lambda c: c.update(quantization={"group_size": 16, "bits": 4}), ["group_size 16", "(32, 64, 128)"]),
        (lambda c: c.update(quantization={"group_size": 32, "bits": 7}), ["bits 7"]),
        (lambda c: c.update(vocab_size=270), ["model.embed_tokens.weight", "[288, 64]", "[270, 64]"]),
        (lambda c: c.update(num_hidden_layers=2), ["9 tensors", "model.layers.1.", "missing"]),
        (lambda c: c.update(attention_bias=True), ["4 tensors", "self_attn.q_proj.bias", "missing"]),
        (lambda c: c.update(model_type="qwen3"), ["q_norm.weight", "missing"]),
        (lambda c: c.update(intermediate_size=64), ["gate_proj.weight", "[96, 64]", "[64, 64]"]),
    ],
)
def test_a_config_json_that_is_invalid_or_does_not_match_is_rejected(
    broken: Path, edit: Edit, words: list[str]
) -> None:
    edit_json(broken / "config.json", edit)
    message = error_message(broken)
    assert str(broken) in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, ["no config.json in this folder; a model folder has config.json, tokenizer"]),
        ("config.json", b"{", ["config.json", "not valid JSON"]),
        ("config.json", b"[]", ["config.json", "list", "an object"]),
        ("config.json", b"[" * 100_000, ["config.json", "not valid JSON"]),
        ("tokenizer.json", None, ["tokenizer.json"]),
        ("tokenizer.json", b"{}", ["tokenizer.json"]),
        ("generation_config.json", b"\xff\xfe", ["generation_config.json", "not valid JSON"]),
        ("model.safetensors", None, ["no model.safetensors"]),
        ("model.safetensors", b"", ["model.safetensors", "truncated"]),
        ("model.safetensors", struct.pack("<Q", 1 << 60) + b"{}", ["model.safetensors", str(1 << 60)]),
        ("model.safetensors", struct.pack("<Q", 2) + b"[]", ["model.safetensors", "list"]),
        ("model.safetensors", struct.pack("<Q", 4) + b"{]}}", ["model.safetensors", "not valid JSON"]),
        ("model.safetensors.index.json", b"{}", ["index.json", "weight_map"]),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "../../etc/passwd"}}',
            ["index.json", "../../etc/passwd", "the name of a file in this folder"],
        ),
    ],
)
def test_a_missing_or_malformed_file_is_rejected_by_name(
    broken: Path, name: str, content: bytes | None, words: list[str]
) -> None:
    (broken / name).unlink(missing_ok=True)
    if content is not None:
        (broken / name).write_bytes(content)
    message = error_message(broken)
    assert all(word in message for word in words), message


def test_a_folder_with_only_gguf_files_is_rejected_with_the_path_to_pass(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).touch()
    expected = f"{tmp_path}: no config.json in this folder; to load a GGUF file, pass its path, such as "
    assert error_message(tmp_path) == expected + str(tmp_path / "a.gguf")


def with_header(file: Path, edit: Edit) -> None:
    """Change the header of a safetensors file in place; its data stays the same."""
    data = file.read_bytes()
    [length] = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda h: h.update(extra=h.pop(NORM)), [f"tensor {NORM} is missing"]),
        (
            lambda h: h.update(extra={**h[NORM], "shape": [0], "data_offsets": [0, 0]}),
            ["tensor extra is not part of"],
        ),
        (lambda h: h[NORM].update(dtype="F4"), [NORM, "'F4'"]),
        (lambda h: h[NORM].update(dtype="I32"), [NORM, "I32", "expected F32 or F16 or BF16"]),
        (lambda h: h[NORM].update(shape=[1 << 62]), [NORM, "256 bytes", str(4 << 62)]),
        (lambda h: h[NORM].update(shape=[-64]), [NORM, "[-64]"]),
        (lambda h: h[NORM].update(shape=[8, 8]), [NORM, "[8, 8]", "[64]"]),
        (lambda h: h[NORM].update(data_offsets=[1 << 40, (1 << 40) + 256]), [NORM, "truncated or corrupted"]),
        (lambda h: h[NORM].pop("dtype"), [NORM, "lacks dtype"]),
        (lambda h: h.update({NORM: 3}), [NORM, "lacks dtype"]),
    ],
)
def test_a_safetensors_header_that_does_not_match_is_rejected(
    broken: Path, edit: Edit, words: list[str]
) -> None:
    with_header(broken / "model.safetensors", edit)
    message = error_message(broken)
    assert "model.safetensors" in message or "missing" in message
    assert all(word in message for word in words), message


def test_tensors_that_claim_the_same_bytes_are_rejected(broken: Path) -> None:
    """Oracle: the safetensors library, which requires that each byte belongs to exactly one tensor."""

    def all_the_same(header: dict[str, Any]) -> None:
        for entry in header.values():
            if entry["shape"] == header[NORM]["shape"]:
                entry["data_offsets"] = header[NORM]["data_offsets"]

    with_header(broken / "model.safetensors", all_the_same)
    assert "within tensor" in error_message(broken)


def move_last(header: dict[str, Any], by: int) -> None:
    """Shift the byte range of a file's last tensor."""
    last = max(header.values(), key=lambda entry: entry["data_offsets"][1])
    last["data_offsets"] = [offset + by for offset in last["data_offsets"]]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda h: move_last(h, -4), "within tensor"),
        (lambda h: h.update(extra={"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}), "within tensor"),
        (lambda h: h.pop(min(h, key=lambda name: h[name]["data_offsets"])), "belong to no tensor"),
        (lambda h: h.pop(max(h, key=lambda name: h[name]["data_offsets"])), "the last tensor ends at byte"),
        (lambda h: h[NORM].update(dtype=["F32"]), "which is not supported"),
        (lambda h: h[NORM].update(shape=[10**30]), "shape"),
        (lambda h: h[NORM].update(shape=[2**62, 2**62, 2**62]), "256 bytes"),
        (lambda h: h[NORM].update(shape=[64.0]), "shape"),
        (lambda h: h[NORM].update(data_offsets=[256, 0]), "bytes"),
    ],
)
def test_safetensors_with_overlaps_gaps_or_wrong_sizes_are_rejected(
    broken: Path, edit: Edit, words: str
) -> None:
    with_header(broken / "model.safetensors", edit)
    message = error_message(broken)
    assert message.startswith(str(broken / "model.safetensors"))
    assert words in message


def write_many(file: Path, count: int, where: Callable[[int], int]) -> None:
    """A safetensors file that claims `count` tensors of four bytes each."""
    header = {
        f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [where(i), where(i) + 4]}
        for i in range(count)
    }
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4 * count)


def test_headers_with_100000_tensors_are_checked_in_seconds(tmp_path: Path) -> None:
    """Each takes about a second. Comparing all pairs or counting each key would take ten billion steps."""
    file, count = tmp_path / "many.safetensors", 100_000
    write_many(file, count, lambda i: 4 * (count - 1 - i))
    begin = time.process_time()
    assert len(read_safetensors_header(file)) == count
    write_many(file, count, lambda i: 4 * max(1, i))
    with pytest.raises(ValueError, match="tensor t1 starts at byte"):
        read_safetensors_header(file)
    twice = b",".join(b'"k%d": 1' % (i % (count - 1)) for i in range(count))
    file.write_bytes(struct.pack("<Q", len(twice) + 2) + b"{" + twice + b"}")
    with pytest.raises(ValueError, match="the header has the key 'k0' twice"):
        read_safetensors_header(file)
    assert time.process_time() - begin < 30


def test_a_tensor_in_two_safetensors_files_is_rejected(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "first.safetensors")
    write_safetensors(broken / "other.safetensors", {NORM: np.ones(64, np.float32)})
    assert f"tensor {NORM} is also in first.safetensors, expected in one file only" in error_message(broken)


def test_a_tokenizer_larger_than_the_embedding_is_rejected(broken: Path) -> None:
    weights = {
        name: array[:200] if array.shape[0] == CONFIG["vocab_size"] else array
        for name, array in WEIGHTS.items()
    }
    write_safetensors(broken / "model.safetensors", weights)
    edit_json(broken / "config.json", lambda c: c.update(vocab_size=200, eos_token_id=2))
    edit_json(broken / "tokenizer_config.json", lambda c: c.pop("eos_token"))
    assert "the tokenizer has 260 tokens, expected at most 200," in error_message(broken)


# Which files of a folder belong to the checkpoint.


@pytest.mark.parametrize(
    "name",
    [
        *("consolidated.safetensors", "adapter_model.safetensors", "consolidated.00-of-02.safetensors"),
        *(
            "other.safetensors",
            "model-00001-of-00002.safetensors",
            "pytorch_model.bin",
            "original/a.safetensors",
        ),
    ],
)
def test_files_that_are_not_part_of_the_checkpoint_are_ignored(name: str, broken: Path) -> None:
    (broken / name).parent.mkdir(exist_ok=True)
    (broken / name).write_bytes(b"this file is not read")
    assert load_model(broken).model.config.num_hidden_layers == 1


def split_weights(folder: Path, *names: str) -> None:
    """Distribute the weights over several files, without an index."""
    (folder / "model.safetensors").unlink()
    for place, name in enumerate(names):
        chosen = list(WEIGHTS)[place :: len(names)]
        write_safetensors(folder / name, {tensor: WEIGHTS[tensor] for tensor in chosen})


@pytest.mark.parametrize(
    "names",
    [
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ["weights.00.safetensors", "weights.01.safetensors"],
        ["pytorch.safetensors"],
    ],
)
def test_without_an_index_all_parts_are_read(names: list[str], broken: Path) -> None:
    split_weights(broken, *names)
    (broken / "consolidated.safetensors").write_bytes(b"this file is not read")
    if names[0].startswith("model-"):
        (broken / "other.safetensors").write_bytes(b"this file is not read")
    assert load_model(broken).model.config.num_hidden_layers == 1


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_git_lfs_pointer_is_named(broken: Path, name: str) -> None:
    (broken / name).write_bytes(POINTER)
    with pytest.raises(ModelFileError, match=f"{name}: a Git LFS pointer"):
        read_checkpoint(broken)


def test_a_missing_safetensors_part_is_named(broken: Path) -> None:
    split_weights(broken, "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")
    missing = broken / "model-00002-of-00003.safetensors"
    assert error_message(broken) == f"{missing}: part 2 of 3 is missing, expected in the same folder"


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_a_folder_with_only_other_weights_is_rejected_by_their_name(name: str, broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / name)
    assert f"{name} is not a checkpoint; expected model.safetensors" in error_message(broken)


@pytest.mark.parametrize(
    "name", ["a.safetensors", "../model.safetensors", "a\0b", 7, None, ["x"], "x" * 5000]
)
def test_an_index_entry_that_is_not_a_file_is_rejected(name: Any, broken: Path) -> None:
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: name}}))
    assert error_message(broken).startswith(f"{broken / 'model.safetensors.index.json'}: ")


def test_an_index_that_does_not_name_model_safetensors_next_to_it_is_rejected(broken: Path) -> None:
    shutil.copy(broken / "model.safetensors", broken / "other.safetensors")
    index = dict.fromkeys(read_safetensors_header(broken / "other.safetensors"), "other.safetensors")
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    message = error_message(broken)
    assert "model.safetensors.index.json does not name model.safetensors" in message
    (broken / "model.safetensors").unlink()
    assert read_checkpoint(broken).tensors


@pytest.mark.parametrize(
    ("names", "unexpected"),
    [
        (["stray.scales"], "stray.scales"),
        (["stray.biases"], "stray.biases"),
        (["stray.scales", "stray.biases"], "stray.scales, stray.biases"),
        (["model.norm.biases"], "model.norm.biases"),  # a norm without scales is not quantized
    ],
)
def test_scales_without_a_matrix_are_rejected_by_name(
    names: list[str], unexpected: str, broken: Path
) -> None:
    strays = {name: np.zeros((2, 2), np.float32) for name in names}
    write_safetensors(broken / "model.safetensors", {**WEIGHTS, **strays})
    assert f"{unexpected}" in error_message(broken)


def test_a_single_safetensors_file_is_rejected_with_advice(folder: Path) -> None:
    assert "pass the folder that contains it" in error_message(folder / "model.safetensors")


# GGUF files.


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"attention.head_count": 0}, ["num_attention_heads", "not 0"]),
        ({"block_count": 2}, ["blk.1.attn_q.weight", "missing"]),
        ({"attention.value_length": 16}, ["llama.attention.value_length is 16", "expected 32"]),
        ({"rope.dimension_count": 16}, ["llama.rope.dimension_count is 16"]),
        ({"expert_count": 8}, ["llama.expert_count is 8"]),
        ({"attention.sliding_window": 64}, ["llama.attention.sliding_window is 64"]),
        ({"rope.scaling.type": "yarn"}, ["rope.scaling.type 'yarn'", "none, linear"]),
        ({"embedding_length": 96}, ["token_embd.weight", "[288, 64]", "[288, 96]"]),
        ({"context_length": 1.5}, ["llama.context_length is '1.5'"]),
        ({"block_count": 4_000_000_000}, ["num_hidden_layers", "4000000000"]),
    ],
)
def test_gguf_metadata_that_is_invalid_or_does_not_match_is_rejected(
    tmp_path: Path, metadata: dict[str, Any], words: list[str]
) -> None:
    path = write_gguf(tmp_path / "broken.gguf", CONFIG, WEIGHTS, **metadata)
    message = error_message(path)
    assert message.startswith(f"{path}: ")
    assert all(word in message for word in words), message


def test_an_unknown_architecture_is_rejected_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "broken.gguf", {**CONFIG, "model_type": "mamba"}, {})
    assert "architecture 'mamba' is not supported; supported: llama, qwen2, qwen3" in error_message(path)


def test_missing_extra_and_misshapen_gguf_tensors_are_rejected_by_their_gguf_names(tmp_path: Path) -> None:
    fewer = {name: array for name, array in WEIGHTS.items() if not name.endswith("o_proj.weight")}
    assert "tensor blk.0.attn_output.weight is missing" in error_message(
        write_gguf(tmp_path / "a", CONFIG, fewer)
    )
    more = {**WEIGHTS, "model.layers.7.mlp.up_proj.weight": np.ones((96, 64), np.float32)}
    assert "tensor blk.7.ffn_up.weight is not part of" in error_message(
        write_gguf(tmp_path / "b", CONFIG, more)
    )
    other = {**WEIGHTS, "model.norm.weight": np.ones(32, np.float32)}
    message = error_message(write_gguf(tmp_path / "c", CONFIG, other))
    assert "tensor output_norm.weight has the shape [32], expected [64]" in message


U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack


def text(content: bytes) -> bytes:
    """A string in GGUF's encoding."""
    return U64(len(content)) + content


def gguf(num_tensors: int, num_keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    """A GGUF header that claims `num_tensors` tensors and `num_keys` keys."""
    return b"GGUF" + U32(version) + U64(num_tensors) + U64(num_keys) + rest


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 92003\n"
ABSURD = {
    "empty": (b"", "truncated"),
    "pointer": (POINTER, "a Git LFS pointer"),
    "magic": (b"GGML" + b"\0" * 40, "starts with b'GGML'"),
    "version": (gguf(0, 0, version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
    "tensors": (gguf(1 << 60, 0), "1152921504606846976 tensors"),
    "tensors, fewer": (gguf(60_000, 0), "60000 tensors"),
    "keys": (gguf(0, 1 << 63), "9223372036854775808 metadata keys"),
    "key length": (gguf(0, 1, U64(1 << 62) + b"\0" * 32), "4611686018427387904 bytes of text"),
    "key beyond the end": (gguf(0, 1, U64(100) + b"\0" * 32), "at least 100 bytes"),
    "key not UTF-8": (gguf(0, 1, text(b"\xff\xff") + U32(4) + U32(0)), "not UTF-8"),
    "value type": (gguf(0, 1, text(b"a") + U32(77) + b"\0" * 8), "unknown type 77"),
    "array length": (gguf(0, 1, text(b"a") + U32(9) + U32(8) + U64(1 << 40)), "1099511627776 items"),
    "array beyond the end": (gguf(0, 1, text(b"a") + U32(9) + U32(12) + U64(1 << 20)), "8388608 bytes"),
    "array of arrays": (gguf(0, 1, text(b"a") + U32(9) + U32(9) + U64(1)), "array of type 9"),
    "key twice": (gguf(0, 2, (text(b"a") + U32(4) + U32(0)) * 2), "metadata a appears twice"),
    "alignment": (gguf(0, 1, text(b"general.alignment") + U32(4) + U32(0)), "general.alignment is 0"),
    "dimensions": (gguf(1, 0, text(b"t") + U32(5) + b"\0" * 64), "5 dimensions"),
    "shape": (gguf(1, 0, text(b"t") + U32(2) + U64(1 << 63) * 2 + U32(0) + U64(0)), "tensor t ends at byte"),
    "no values": (gguf(1, 0, text(b"t") + U32(1) + U64(0) + U32(0) + U64(0)), "shape [0]"),
    "half a block": (
        gguf(1, 0, text(b"t") + U32(1) + U64(48) + U32(2) + U64(0)),
        "blocks of 32 values (Q4_0)",
    ),
    "tensor type": (gguf(1, 0, text(b"t") + U32(1) + U64(32) + U32(99) + U64(0)), "type 99"),
    "named type": (gguf(1, 0, text(b"t") + U32(1) + U64(32) + U32(24) + U64(0)), "has type I8, which"),
    "offset": (gguf(1, 0, text(b"t") + U32(1) + U64(1) + U32(0) + U64(1 << 63)), "tensor t ends at byte"),
    "tensor twice": (
        gguf(2, 0, (text(b"t") + U32(1) + U64(1) + U32(0) + U64(0)) * 2),
        "tensor t appears twice",
    ),
}


@pytest.mark.parametrize("name", ABSURD)
def test_an_absurd_gguf_header_is_rejected(name: str, tmp_path: Path) -> None:
    content, words = ABSURD[name]
    path = tmp_path / "absurd.gguf"
    path.write_bytes(content)
    assert words in error_message(path)


def test_absurd_headers_do_not_allocate_memory(tmp_path: Path) -> None:
    """Reads all of them in a process that may allocate only another 32 MB."""
    for name, (content, _) in ABSURD.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
    (tmp_path / "huge.safetensors").write_bytes(U64((1 << 63) - 1) + b"{}")
    program = """
        import resource, sys
        from pathlib import Path
        from tiny_llm_checkpoints.gguf_format import read_gguf_header
        from tiny_llm_checkpoints.safetensors_format import read_safetensors_header
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20),) * 2)
        for file in sorted(Path(sys.argv[1]).iterdir()):
            read = read_gguf_header if file.suffix == ".gguf" else read_safetensors_header
            try:
                read(file)
            except ValueError as error:
                print(file.stem, error)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(ABSURD) + 1


@pytest.mark.parametrize("keep", [0, 3, 23, 24, 200, 5_000, 40_000, -1])
def test_a_truncated_gguf_is_rejected(gguf_file: Path, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(gguf_file.read_bytes()[:keep])
    assert "truncated" in error_message(path)


@pytest.mark.parametrize("keep", [0, 7, 8, 300, 5_000, -1])
def test_truncated_safetensors_are_rejected(broken: Path, keep: int) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "truncated" in error_message(broken)


def gguf_with_offsets(offsets: list[int], size: int = 256, kind: int = 0) -> bytes:
    """A GGUF with a tensor of eight numbers at each of these offsets, and `size` bytes of data."""
    infos = b"".join(
        text(b"t%d" % i) + U32(1) + U64(8) + U32(kind) + U64(offset) for i, offset in enumerate(offsets)
    )
    head = gguf(len(offsets), 0, infos)
    return head + b"\0" * (-len(head) % 32 + size)


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ([0, 0], "tensor t1 starts at byte 96, within tensor t0, which ends at 128"),
        ([32, 0, 32], "tensor t2 starts at byte 160, within tensor t0"),
        ([0, 16], "tensor t1 has the offset 16, expected a multiple of 32"),
        ([0, 256], "truncated or corrupted: tensor t1 ends"),
        ([2**64 - 32], "truncated or corrupted: tensor t0 ends"),
    ],
)
def test_gguf_tensors_that_overlap_or_are_misplaced_are_rejected(
    offsets: list[int], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "placed.gguf"
    path.write_bytes(gguf_with_offsets(offsets))
    assert words in error_message(path)


def test_a_gguf_with_all_offsets_zero_is_rejected(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", CONFIG, WEIGHTS)
    content, header = path.read_bytes(), read_gguf_header(path)
    start = min(tensor.offset for tensor in header.tensors.values())
    for tensor in header.tensors.values():
        at = content.index(text(tensor.name.encode())) + 8 + len(tensor.name) + 4 + 8 * len(tensor.shape) + 4
        content = content[:at] + U64(0) + content[at + 8 :]
    path.write_bytes(content)
    assert f"starts at byte {start}, within tensor" in error_message(path)


# Configurations that would exhaust time or memory, and values that are not numbers.

BOMBS: list[tuple[str, Any]] = [
    *((name, 10**9) for name in ("num_hidden_layers", "head_dim", "vocab_size", "num_attention_heads")),
    *(
        (name, 10**400)
        for name in ("num_hidden_layers", "head_dim", "hidden_size", "max_position_embeddings")
    ),
    *((name, 10**400) for name in ("rope_theta", "rms_norm_eps")),
    *((name, "64") for name in ("hidden_size", "vocab_size", "rope_theta", "rms_norm_eps")),
    *((name, -1) for name in ("rope_theta", "num_key_value_heads", "intermediate_size", "rms_norm_eps")),
    *((name, True) for name in ("hidden_size", "rope_theta", "num_hidden_layers")),
    *((name, float("inf")) for name in ("rope_theta", "rms_norm_eps")),
    *((name, [64]) for name in ("hidden_size", "rope_theta", "rope_scaling", "layer_types", "hidden_act")),
]


@pytest.mark.parametrize(("name", "value"), BOMBS, ids=lambda value: str(value)[:12])
def test_an_absurd_value_is_rejected_by_its_name(name: str, value: Any, broken: Path) -> None:
    edit_json(broken / "config.json", lambda c: c.update({name: value}))
    message = error_message(broken)
    assert message.startswith(f"{broken / 'config.json'}: ")
    assert name in message


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"factor": 4.0}, "rope_scaling has factor 4.0, expected a rope_type that uses it"),
        ({"rope_type": "linear", "factor": 0}, "rope_factors"),
        ({"rope_type": "linear", "factor": 10**400}, "factor is"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor is nan"),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 10**400,
            },
            "original_max_position_embeddings is",
        ),
        *(
            ({"rope_type": kind, "factor": 2.0}, f"'{kind}'")
            for kind in ("dynamic", "longrope", "mrope", "su")
        ),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ],
)
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_unsupported_rope_scaling_is_rejected(
    name: str, scaling: dict[str, Any], words: str, broken: Path
) -> None:
    """In the formats of transformers 4 and of transformers 5."""
    edit_json(broken / "config.json", lambda c: c.update({name: scaling}))
    assert words in error_message(broken)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_the_original_context_may_be_next_to_the_rotary_settings(broken: Path) -> None:
    """transformers 5 reads it there too."""
    name = "original_max_position_embeddings"
    edit_json(broken / "config.json", lambda c: c.update(rope_scaling={**LLAMA3, name: 64}))
    inside = read_checkpoint(broken).config.rope_factors
    edit_json(broken / "config.json", lambda c: c.update({"rope_scaling": LLAMA3, name: 64}))
    assert read_checkpoint(broken).config.rope_factors == inside
    edit_json(broken / "config.json", lambda c: c["rope_scaling"].update({name: 32}))
    assert f"{name} is 64, and 32 in the rotary settings" in error_message(broken)


def test_a_rotation_per_layer_type_is_rejected_under_its_own_name(broken: Path) -> None:
    edit_json(broken / "config.json", lambda c: c.update(rope_scaling={"full_attention": {"factor": 2.0}}))
    assert "rope_scaling has 'full_attention'" in error_message(broken)


def test_two_different_rope_settings_are_rejected(broken: Path) -> None:
    one, other = ({"rope_type": "linear", "factor": factor} for factor in (2.0, 4.0))
    edit_json(broken / "config.json", lambda c: c.update(rope_scaling=one, rope_parameters=other))
    assert "rope_parameters and rope_scaling differ" in error_message(broken)


@pytest.mark.parametrize(
    "content",
    [
        b'{"a":' * 50_000,
        b'{"hidden_size": ' + b"9" * 10_000 + b"}",
        b'{"a": "\xff"}',
        b" " * (1 << 24) + b"{}",
    ],
    ids=["deep", "digits", "not UTF-8", "long"],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_unreadable_json_is_rejected_by_file_name(name: str, content: bytes, broken: Path) -> None:
    (broken / name).write_bytes(content)
    assert error_message(broken).startswith(f"{broken / name}: ")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_a_pipe_in_place_of_a_file_is_rejected_without_waiting(name: str, broken: Path) -> None:
    (broken / name).unlink(missing_ok=True)
    os.mkfifo(broken / name)
    assert error_message(broken) == f"{broken / name}: not a regular file"
    os.mkfifo(broken / "tiny.gguf")
    assert "neither a regular file nor a folder" in error_message(broken / "tiny.gguf")


def test_a_huge_template_file_is_rejected_before_it_is_read(broken: Path) -> None:
    with (broken / "chat_template.jinja").open("wb") as file:
        file.truncate(1 << 40)  # sparse, so it takes no space on the disk
    expected = f"{broken / 'chat_template.jinja'}: has {1 << 40} bytes, expected at most {1 << 24}"
    assert error_message(broken) == expected


def test_control_characters_in_names_are_escaped_in_errors(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", CONFIG, WEIGHTS, extra={"a\n\x1b[31mb": np.ones(8, np.float32)})
    assert "tensor a\\n\\x1b[31mb is not part of" in error_message(path)


# Random defects.


@pytest.fixture(scope="module")
def valid_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("malformed")
    write_valid_files(place)
    return place


@pytest.mark.parametrize("kind", EDITS)
def test_a_randomly_malformed_file_loads_or_raises_a_clean_error(kind: str, valid_files: Path) -> None:
    """Seeded; `python tests/malformed_files.py 20000` tries more."""
    outcomes = Counter(
        outcome(EDITS[kind](random.Random(f"{kind} {seed}"), valid_files))
        for seed in range(examples(150, quick=150))
    )
    assert set(outcomes) == {"loaded", "rejected"}


EXTREMES = [b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\xff" * 8, U64(1 << 31), U64(1 << 62), b"{", b"]", b'"']


@st.composite
def damages(draw: st.DrawFn) -> list[tuple[str, float, bytes]]:
    """Up to four changes: kind, relative position, and bytes. Most positions are in the header."""
    piece = st.binary(min_size=1, max_size=9) | st.sampled_from(EXTREMES)
    kind = st.sampled_from(["replace", "replace", "insert", "cut", "truncate"])
    return draw(st.lists(st.tuples(kind, st.floats(0, 1), piece), min_size=1, max_size=4))


def damaged(content: bytes, header: int, damage: list[tuple[str, float, bytes]]) -> bytes:
    """Apply the changes. Positions below 0.75 are in the header."""
    for kind, where, piece in damage:
        at = int(where / 0.75 * header) if where < 0.75 else int(where * len(content))
        head, tail = content[:at], content[at:]
        content = {
            "replace": head + piece + tail[len(piece) :],
            "insert": head + piece + tail,
            "cut": head + tail[len(piece) :],
            "truncate": head,
        }[kind]
    return content


def read_to_the_end(path: Path) -> None:
    """Load the model, or get an error that starts with the path; anything else fails."""
    message = str(path)
    try:
        build(read_checkpoint(path))
    except ModelFileError as error:
        message = str(error)
    assert message.startswith(str(path))


fuzzed = settings(
    max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@fuzzed
@given(damages())
def test_a_damaged_gguf_loads_or_is_rejected(gguf_file: Path, damage: list[tuple[str, float, bytes]]) -> None:
    content = gguf_file.read_bytes()
    header = min(tensor.offset for tensor in read_gguf_header(gguf_file).tensors.values())
    path = gguf_file.parent / "damaged.gguf"
    path.write_bytes(damaged(content, header, damage))
    read_to_the_end(path)


@fuzzed
@given(damages())
def test_damaged_safetensors_load_or_are_rejected(
    folder: Path, damage: list[tuple[str, float, bytes]]
) -> None:
    copy = folder.parent / "damaged"
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    file = copy / "model.safetensors"
    header = min(tensor.offset for tensor in read_safetensors_header(file).values())
    file.write_bytes(damaged(file.read_bytes(), header, damage))
    read_to_the_end(copy)


@fuzzed
@given(st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json"]), damages())
def test_damaged_json_loads_or_is_rejected(
    folder: Path, name: str, damage: list[tuple[str, float, bytes]]
) -> None:
    copy = folder.parent / "damaged"
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    file = copy / name
    file.write_bytes(damaged(file.read_bytes(), file.stat().st_size, damage))
    read_to_the_end(copy)


def test_the_error_for_a_folder_without_a_model_lists_the_files_of_a_model_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no config\.json in this folder; a model folder has"):
        read_checkpoint(tmp_path)
    (tmp_path / "model-q4.gguf").touch()
    with pytest.raises(ModelFileError, match=r"pass its path, such as .*model-q4\.gguf"):
        read_checkpoint(tmp_path)
