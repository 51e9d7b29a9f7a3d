"""The goldens of tokenizer.json: small tokenizers as saved by transformers, and its token ids.

Called by make.py in its environment. Each family's tokenizer is built by transformers' own class or converter
if there is one, with a vocabulary of a few hundred tokens trained on the edge-case strings, and saved to
tokenizers/NAME/ with transformers' other files. The ids go to tokenizers/NAME/expected.json.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "tokenizers"
VOCAB_SIZE = 640
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def make(write: Any) -> None:
    """Build and save each tokenizer, and encode all strings; `write(name, payload)` stores the ids."""
    from inputs import STRINGS
    from transformers import AutoTokenizer

    for name, build in FAMILIES.items():
        built = build()
        built.chat_template = TEMPLATE
        built.save_pretrained(FOLDER / name)
        saved = AutoTokenizer.from_pretrained(FOLDER / name)  # read it back as users do
        specials = sorted(saved.all_special_tokens)
        # The strings contain the embedded model's special tokens; add those of each family.
        texts = [*STRINGS, *(f"a {token}b{token}{token} c" for token in specials)]
        records = [_record(saved, text) for text in texts]
        write(f"tokenizers/{name}/expected.json", {"special_tokens": specials, "strings": records})


def _record(tokenizer: Any, text: str) -> dict[str, Any]:
    """Ids, and the text that they decode to; values equal to the text or the ids are omitted."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    others = {
        "framed": tokenizer.encode(text),
        "as_text": tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True),
    }
    decoded = {
        "decoded": tokenizer.decode(ids, clean_up_tokenization_spaces=False),
        "skipped": tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
    }
    return {
        "text": text,
        "ids": ids,
        **{key: value for key, value in others.items() if value != ids},
        **{key: value for key, value in decoded.items() if value != text},
    }


def _byte_level(pre_tokenizer: Any, normalizer: Any = None) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train byte-level BPE on the edge-case strings; return the vocabulary, and the merges in rank order."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        trained.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _train(trained, trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet))


def _train(trained: Any, trainer: Any, *, rare: int = 0) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train on all strings of inputs.py, without characters that occur `rare` times or less."""
    import json
    from collections import Counter

    from inputs import CONVERSATIONS, LONG_TEXT, STRINGS

    said = [message["content"] for messages in CONVERSATIONS.values() for message in messages]
    texts = [*STRINGS, *said, LONG_TEXT]
    counts = Counter("".join(texts))
    kept = ["".join(letter for letter in text if counts[letter] > rare) for text in texts]
    trained.train_from_iterator(kept, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    return vocab, [tuple(pair) for pair in model["merges"]]


def _smollm() -> Any:
    """Byte-level BPE after splitting off single digits, as in the embedded model's checkpoint."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rule = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    vocab, merges = _byte_level(rule)
    built = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    built.pre_tokenizer, built.decoder = rule, decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )


def _llama3() -> Any:
    """transformers' conversion of a tiktoken vocabulary, with llama 3's beginning-of-sequence token."""
    from tokenizers import Regex, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    words = pre_tokenizers.Split(Regex(TikTokenConverter().pattern), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab, _ = _byte_level(pre_tokenizers.Sequence([words, bytes_only]))
    letters = _bytes_of_letters()
    ranks = {bytes(letters[letter] for letter in token): rank for token, rank in vocab.items()}

    class FromRanks(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks

    built = FromRanks(extra_special_tokens=None).converted()
    bos = "<|begin_of_text|>"
    built.add_special_tokens([bos, "<|end_of_text|>", "<|eot_id|>"])
    frame = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, built.token_to_id(bos))])
    built.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), frame])
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token=bos, eos_token="<|eot_id|>")


def _bytes_of_letters() -> dict[str, int]:
    """The byte of each character of the byte-level alphabet."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def _qwen2() -> Any:
    """transformers' class for Qwen 2 and 3: NFC, single digits, no added special tokens."""
    from transformers import Qwen2Tokenizer

    empty = Qwen2Tokenizer().backend_tokenizer
    vocab, merges = _byte_level(empty.pre_tokenizer, empty.normalizer)
    special = ["<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="<|im_end|>", extra_special_tokens=special)


def _llama() -> Any:
    """SentencePiece's BPE: a space before the text, bytes for unknown characters.

    Built with normalizers, like the published llama 1 and 2 checkpoints: transformers' own class for them
    does not put a space before a text that starts with one, unlike SentencePiece and llama.cpp.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import generate_merges

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    learnt, pairs = _train(trained, trainers.BpeTrainer(vocab_size=VOCAB_SIZE), rare=2)
    merged = [left + right for left, right in pairs]
    letters = [token for token in learnt if token not in set(merged)]
    control = ["<unk>", "<s>", "</s>"]
    all_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    # SentencePiece's order: control tokens, bytes, merged tokens by decreasing score, single characters.
    vocab = {token: index for index, token in enumerate([*control, *all_bytes, *merged, *letters])}
    first = len(control) + len(all_bytes)
    scores = {token: float(first - index) for token, index in vocab.items() if index >= first}
    merges = generate_merges(vocab, scores)
    built = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    space = "\u2581"
    built.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    text = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    built.decoder = decoders.Sequence(text)
    built.add_special_tokens(control)
    built.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "smollm": _smollm,
    "llama3": _llama3,
    "qwen2": _qwen2,
    "llama": _llama,
}
