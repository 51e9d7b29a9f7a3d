"""Malformed model files, made at random from valid ones and a seed.

An edit replaces a value in a header or a configuration with one of another type, out of range, or absurd.
tests/test_model_files.py uses it with few seeds; `python tests/malformed_files.py 20000` runs more and counts
the outcomes.
"""

import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tiny_llm.loader import load_model

from tiny_checkpoints import CONFIGS, WINDOWED_CONFIGS, random_weights, write_folder, write_gguf
from tiny_llm_checkpoints.errors import ConfigError, ModelFileError
from tiny_llm_checkpoints.gguf_format import GGUFFile, read_gguf_header

SMALL = {**CONFIGS["llama3-scaling"], "num_hidden_layers": 1}
GEMMA = {**WINDOWED_CONFIGS["gemma3"], "num_hidden_layers": 2}
EXTREMES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, 2**64, 10**9, -(10**18), 10**400, -(10**400)),
    *(0.0, -0.0, 0.5, 1.5, -3.25, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")),
    *("", "0", "llama", "linear", "default", "full_attention", "\ud800", "\0", "a\nb", "x" * 5000),
    *([], {}, [0], [[]], [None], {"a": {}}, [1, 2, 3], ["full_attention"], [True] * 7, [10**400], {"": []}),
    *({"rope_type": "linear", "factor": 0}, {"rope_type": "llama3"}, {"type": "linear", "factor": -1.0}),
)
FOLDER_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json"),
    *("header", "header", "config.json", "config.json"),
)
GENERATION = {"eos_token_id": [2, 3], "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_new_tokens": 7}

Edit = Callable[[random.Random, Path], Path]


def outcome(path: Path) -> str:
    """The outcome of loading a model: `loaded`, `rejected`, or the description of an unexpected error."""
    try:
        load_model(path)
    except (ModelFileError, ConfigError) as error:
        message = str(error)
        named = str(path.parent) in message and message.isprintable()
        return "rejected" if named else f"rejected without naming the file: {message[:200]}"
    except BaseException as error:  # such as a panic of a library
        return f"{type(error).__name__}: {error}"[:300]
    return "loaded"


def write_valid_files(place: Path) -> None:
    """Write the folder and the two GGUF files that the edits start from."""
    folder = write_folder(place / "folder", SMALL, random_weights(SMALL))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    index = {"weight_map": dict.fromkeys(random_weights(SMALL), "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_gguf(place / "llama.gguf", SMALL, random_weights(SMALL))
    write_gguf(place / "gemma.gguf", GEMMA, random_weights(GEMMA))


def malformed_folder(chance: random.Random, place: Path) -> Path:
    """A copy of the folder with edits in one or two files."""
    copy = place / "malformed" / "folder"
    shutil.copytree(place / "folder", copy, dirs_exist_ok=True)
    for name in {chance.choice(FOLDER_FILES) for _ in range(chance.choice((1, 1, 2)))}:
        if name == "header":
            _change_header(chance, copy / "model.safetensors")
        else:
            (copy / name).write_text(json.dumps(_changed(chance, json.loads((copy / name).read_text()))))
    return copy


def malformed_gguf(chance: random.Random, place: Path) -> Path:
    """A copy of a GGUF file with edits of one to three keys or of a tensor's header."""
    valid = place / chance.choice(("llama.gguf", "gemma.gguf"))
    file = read_gguf_header(valid)
    metadata = _changed(chance, file.metadata) if chance.random() < 0.8 else file.metadata
    copy = place / "malformed" / "malformed.gguf"
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(encoded(chance, metadata, file, valid.read_bytes()))
    return copy


def _changed(chance: random.Random, found: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with one to three values replaced or removed, at any depth."""
    changed = dict(found)
    for _ in range(min(len(found), chance.choice((1, 1, 2, 3)))):
        key = chance.choice(sorted(changed))
        inner = changed[key]
        if isinstance(inner, dict) and inner and chance.random() < 0.7:
            changed[key] = _changed(chance, inner)
        elif isinstance(inner, list) and inner and chance.random() < 0.5:
            changed[key] = [*inner]
            changed[key][chance.randrange(len(inner))] = chance.choice(EXTREMES)
        elif chance.random() < 0.1:
            changed.pop(key)
        else:
            changed[key] = chance.choice(EXTREMES)
    return changed


def _change_header(chance: random.Random, file: Path) -> None:
    data = file.read_bytes()
    [length] = struct.unpack("<Q", data[:8])
    text = json.dumps(_changed(chance, json.loads(data[8 : 8 + length]))).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def encoded(chance: random.Random, metadata: Mapping[str, Any], file: GGUFFile, content: bytes) -> bytes:
    """A GGUF file with this metadata and the tensors of `file`, one of which may have a wrong header."""
    keys = b"".join(_text(key) + _value(value) for key, value in metadata.items())
    start = min(tensor.offset for tensor in file.tensors.values())
    edited = chance.choice([*file.tensors, None])
    tensors = b""
    for name, tensor in file.tensors.items():
        kind = {"F32": 0}[tensor.type.name]
        numbers = [*tensor.shape[::-1], kind, tensor.offset - start]
        if name == edited:
            numbers[chance.randrange(len(numbers))] = chance.choice(
                (0, 1, 7, 32, 33, 2**31, 2**63, 2**64 - 1)
            )
        *shape, kind, offset = numbers
        tensors += _text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        tensors += struct.pack("<IQ", kind & 0xFFFFFFFF, offset)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(file.tensors), len(metadata)) + keys + tensors
    return head + b"\0" * (-len(head) % 32) + content[start:]


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    kind, raw = _typed(value)
    return struct.pack("<I", kind) + raw


def _typed(value: Any) -> tuple[int, bytes]:
    """A value's GGUF type and bytes; values that GGUF cannot represent become similar ones."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        bounded = max(-(2**63), min(value, 2**64 - 1))
        return (10, struct.pack("<Q", bounded)) if bounded >= 2**63 else (11, struct.pack("<q", bounded))
    if isinstance(value, float):
        return 12, struct.pack("<d", value)
    if isinstance(value, str):
        return 8, _text(value)
    items = [_typed(item) for item in value] if isinstance(value, list) else []
    kinds = Counter(kind for kind, _ in items)
    common = kinds.most_common(1)[0][0] if kinds else 4
    kept = [raw for kind, raw in items if kind == common]
    return 9, struct.pack("<IQ", common, len(kept)) + b"".join(kept)


EDITS: Mapping[str, Edit] = {"folder": malformed_folder, "gguf": malformed_gguf}


def main(count: int) -> None:
    """Load `count` malformed files of each kind, and print how often each outcome occurred."""
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_valid_files(place)
        for kind, edit in EDITS.items():
            outcomes: Counter[str] = Counter()
            slowest = (0.0, -1)
            for seed in range(count):
                begin = time.perf_counter()
                path = edit(random.Random(f"{kind} {seed}"), place)
                found = outcome(path)
                slowest = max(slowest, (time.perf_counter() - begin, seed))
                if found not in ("loaded", "rejected") and outcomes[found] == 0:
                    print(f"{kind} {seed}: {found}")
                outcomes[found] += 1
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(f"{kind}: {dict(outcomes)}; slowest {slowest[0]:.2f} s (seed {slowest[1]}); peak {peak} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]))
