"""Broken and hostile tokenizer.json files from the goldens: `python tests/tokenizer_fuzz.py COUNT SEED`.

Each file is loaded and, if that works, used as in a server: texts are encoded, ids decoded and streamed. Two
outcomes are allowed: it works, or it raises a ValueError (while loading, a `ModelFileError`).
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tiny_llm_checkpoints.errors import ModelFileError
from tiny_llm_checkpoints.hf_tokenizer import hf_tokenizer
from tiny_llm_checkpoints.tokenizer import Tokenizer

FOLDERS = Path(__file__).parent / "goldens" / "tokenizers"
TEXTS = [
    "",
    "a",
    " ",
    "Hello world, 123 \n\t",
    "日本語 \U0001fae8 e\u0301",
    "<s></s><|im_end|><unk>",
    "a" * 300,
]

VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        2**31,
        2**32,
        2**64,
        10**30,
        0.5,
        1e308,
        "",
        " ",
        "a",
        "\u2581",
        "$A",
        "<s>",
    ),
    *(
        "\ufffd",
        "\ud83d",
        "AAAA",
        "x" * 2000,
        [],
        {},
        [[]],
        [None],
        [0],
        ["a", "b"],
        ["a", "zz"],
        {"type": "Fuse"},
    ),
]
PATTERNS = [
    {"String": ""},
    {"String": "a"},
    {"Regex": "(a+)+$"},
    {"Regex": "("},
    {"Regex": "(?<!a+)b"},
    {"Regex": "^"},
    {"Regex": "(x+x+)+y"},
    {"Regex": "\\p{Nope}"},
    {"Regex": "(?:a?){40}a{40}"},
]
PARTS: list[dict[str, Any]] = [
    {"type": "Strip", "content": " ", "start": 1, "stop": 5},
    {"type": "Strip", "content": "a", "start": 2**63, "stop": 2**63},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Precompiled", "precompiled_charsmap": "ALQCAACEAAAAAACAAQAAgMz8AgC4BQAAhyIAgMzkAgC4PQAAeyI="},
    {"type": "Precompiled", "precompiled_charsmap": ""},
    *({"type": "Replace", "pattern": pattern, "content": "x"} for pattern in PATTERNS),
    *({"type": "Split", "pattern": pattern, "behavior": "Removed", "invert": True} for pattern in PATTERNS),
    *({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False} for pattern in PATTERNS),
    *(
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": s}
        for s in ("first", "always", "never")
    ),
    {"type": "Metaspace", "replacement": "ab", "prepend_scheme": "first", "split": True},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "WordPiece", "prefix": "", "cleanup": True},
    {"type": "BPEDecoder", "suffix": ""},
    {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
    {"type": "Sequence", "decoders": []},
    {"type": "Sequence", "normalizers": []},
    {"type": "Sequence", "pretokenizers": []},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "BertPreTokenizer"},
    {"type": "FixedLength", "length": 0},
    {"type": "CharDelimiterSplit", "delimiter": "a"},
    {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "no", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    },
    {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"a": {"id": "a", "ids": [2**31, 7], "tokens": ["a"]}},
    },
    {
        "type": "RobertaProcessing",
        "sep": ["x", 10**6],
        "cls": ["y", 2**32 - 1],
        "trim_offsets": True,
        "add_prefix_space": True,
    },
]
MODELS: list[dict[str, Any]] = [
    {"type": "BPE", "vocab": {"a": 2**32 - 1, "b": 1}, "merges": []},
    {"type": "BPE", "vocab": {"a": 0, "b": 0, "ab": 0}, "merges": [["a", "b"]]},
    {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b c"], "dropout": 2.0},
    {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "nope", "byte_fallback": True},
    {
        "type": "WordPiece",
        "vocab": {"a": 0},
        "unk_token": "nope",
        "max_input_chars_per_word": 2**63,
        "continuing_subword_prefix": "",
    },
    {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "nope"},
    {"type": "Unigram", "unk_id": 5, "vocab": [["a", -1.0]]},
    {"type": "Unigram", "unk_id": None, "vocab": []},
    {"type": "Unigram", "unk_id": 0, "vocab": [["", 0.0], ["a", 1e308]], "byte_fallback": True},
]
ADDED = {
    "id": 0,
    "content": "a",
    "single_word": False,
    "lstrip": True,
    "rstrip": True,
    "normalized": True,
    "special": True,
}
COMPONENTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def broken_files(count: int, seed: int) -> Iterator[str]:
    """Yield `count` tokenizer.json files, each a golden one with one to four defects."""
    rng = random.Random(seed)
    goldens = [json.loads((path / "tokenizer.json").read_text("utf-8")) for path in sorted(FOLDERS.iterdir())]
    for _ in range(count):
        tree = deepcopy(rng.choice(goldens))
        for _ in range(rng.randint(1, 4)):
            rng.choice([_change_value, _change_value, _change_part, _change_part, _change_model, _add_token])(
                tree, rng
            )
        text = json.dumps(tree)
        yield text if rng.random() < 0.95 else text[: rng.randrange(len(text))]


def _change_value(tree: Any, rng: random.Random) -> None:
    """Walk to a random value, more likely a deep one, and replace or delete it."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(tree[key], (dict, list)) and tree[key] and rng.random() < 0.8:
            tree = tree[key]
            continue
        if rng.random() < 0.2:
            del tree[key]
        else:
            tree[key] = deepcopy(rng.choice([*VALUES, *PARTS]))
        return


def _change_part(tree: Any, rng: random.Random) -> None:
    kind = rng.choice(COMPONENTS)
    part = deepcopy(rng.choice(PARTS))
    names = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}
    old = tree.get(kind)
    both = [part, old] if rng.random() < 0.5 else [old, part]
    sequence = {"type": "Sequence", names.get(kind, "decoders"): both}
    tree[kind] = deepcopy(rng.choice([part, sequence, None]))


def _change_model(tree: Any, rng: random.Random) -> None:
    if rng.random() < 0.3:
        tree["model"] = deepcopy(rng.choice(MODELS))
    elif isinstance(tree.get("model"), dict):
        key = rng.choice(
            ["merges", "vocab", "unk_token", "byte_fallback", "dropout", "type", "ignore_merges"]
        )
        tree["model"][key] = deepcopy(rng.choice(VALUES))


def _add_token(tree: Any, rng: random.Random) -> None:
    changes = {
        "id": rng.choice([0, 5, 639, 640, 10**6, 2**32 - 1]),
        "content": rng.choice(["a", "", " ", "<s>", "日", "\n"]),
    }
    flags = {
        name: rng.random() < 0.5 for name in ("lstrip", "rstrip", "single_word", "normalized", "special")
    }
    if isinstance(tree.get("added_tokens"), list):
        tree["added_tokens"].append({**ADDED, **changes, **flags})


def outcome(folder: Path) -> str:
    """The outcome for a folder with such a file: "works", "rejected" or "fails"; other errors propagate."""
    try:
        tokenizer = hf_tokenizer(folder)
    except ModelFileError as error:
        return "rejected" if str(folder) in str(error) else f"rejected without naming the file: {error}"
    results = [_use(tokenizer, text) for text in TEXTS]
    return "works" if all(results) else "fails"


def _use(tokenizer: Tokenizer, text: str) -> bool:
    try:
        ids = tokenizer.encode(text, add_special_tokens=True, context=10**6)
        tokenizer.encode(text, special_tokens=False)
        tokenizer.decode(ids)
        stream = tokenizer.stream(ids[:2])
        _ = "".join(map(stream.push, ids[2:])) + stream.flush()
        for token in [*ids[:3], 0, 5, 10**7]:
            tokenizer.token_bytes(token)
    except ValueError:
        return False
    return True


def main(count: int, seed: int) -> None:
    """Try `count` files, and print how often each outcome occurred."""
    outcomes: Counter[str] = Counter()
    with TemporaryDirectory() as name:
        for source in broken_files(count, seed):
            (Path(name) / "tokenizer.json").write_text(source)
            try:
                outcomes[outcome(Path(name))] += 1
            except BaseException as error:
                outcomes[f"{type(error).__name__}: {str(error)[:100]}"] += 1
                Path("/tmp/broken_tokenizer.json").write_text(source)
    for kind, number in outcomes.most_common():
        print(f"{number:7} {kind}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
