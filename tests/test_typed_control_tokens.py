"""Text in a message never becomes a control token and never changes the tokens of another message.

Oracle: the same conversation with harmless text instead. Every tokenizer family is combined with every
template and every way to spell a control token.
"""

from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from chat_templates import BARE, CHATML, NAMES, REASONING, TEMPLATES
from tiny_llm_checkpoints.chat_template import ChatTemplate
from tiny_llm_checkpoints.embedded import embedded_model_path
from tiny_llm_checkpoints.gguf_format import read_gguf_header
from tiny_llm_checkpoints.gguf_tokenizer import gguf_tokenizer
from tiny_llm_checkpoints.hf_tokenizer import hf_tokenizer
from tiny_llm_checkpoints.plain_json import MessageError
from tiny_llm_checkpoints.tokenizer import Tokenizer

FOLDERS = Path(__file__).parent / "goldens" / "tokenizers"
CONTROL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>"),
    *("[INST]", "[/INST]", "<|im", "<|im_end|><|im_end|>"),  # some share a prefix, some contain others
]
PLAIN = ["<think>", "</think>", "<tool_response>"]  # added tokens that are text
LETTERS = [chr(code) for code in range(0x20, 0x7F)] + ["\n", "\u2581", "é"]


def built(
    normalizer: Any = None, pre_tokenizer: Any = None, *, normalized: bool = False, **flags: bool
) -> Tokenizer:
    """A tokenizer of single characters with a few merges and the control tokens of all templates."""
    pairs = [("\u2581", "a"), ("h", "e"), ("l", "l"), ("<", "|"), ("|", ">")]
    vocab = {text: number for number, text in enumerate(LETTERS)}
    vocab |= {left + right: len(LETTERS) + number for number, (left, right) in enumerate(pairs)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=normalized, **flags) for token in CONTROL])
    tokenizer.add_tokens(PLAIN)
    return Tokenizer(tokenizer, bos_token="<s>", eos_token="</s>")


def gguf_llama(*, add_space_prefix: bool) -> Tokenizer:
    """SentencePiece, built from GGUF metadata."""
    letters = ["\u2581" if letter == " " else letter for letter in LETTERS if letter != "\u2581"]
    tokens = ["<unk>", *CONTROL, *letters, "\u2581a", "he", *PLAIN]
    kinds = [2, *[3] * len(CONTROL), *[1] * (len(letters) + 2), *[4] * len(PLAIN)]
    return gguf_tokenizer(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [0.0] * len(tokens),
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_space_prefix": add_space_prefix,
        }
    )


def metaspace(scheme: str) -> Any:
    return pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme=scheme)


def unigram() -> Tokenizer:
    """A model that looks up whole words in its vocabulary, which contains the control tokens."""
    scored = [("<unk>", 0.0), *((token, 0.0) for token in CONTROL), *((letter, -5.0) for letter in LETTERS)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(scored, unk_id=0))
    tokenizer.pre_tokenizer = metaspace("first")
    tokenizer.add_special_tokens(["<unk>", *CONTROL])
    return Tokenizer(tokenizer, bos_token="<s>", eos_token="</s>")


FAMILIES: dict[str, Any] = {
    "unigram": unigram,
    "metaspace first": lambda: built(pre_tokenizer=metaspace("first")),
    "metaspace always": lambda: built(pre_tokenizer=metaspace("always")),
    "metaspace never": lambda: built(pre_tokenizer=metaspace("never")),
    "a prefix": lambda: built(
        normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    ),
    "a prefix for control tokens": lambda: built(normalizers.Prepend("\u2581"), normalized=True),
    "NFKC": lambda: built(normalizers.NFKC()),
    "NFKC for control tokens": lambda: built(normalizers.NFKC(), normalized=True),
    "lowercase": lambda: built(normalizers.Lowercase()),
    "strip": lambda: built(normalizers.Strip()),
    "control tokens that strip": lambda: built(lstrip=True, rstrip=True),
    "whitespace": lambda: built(pre_tokenizer=pre_tokenizers.Whitespace()),
    "gguf llama": lambda: gguf_llama(add_space_prefix=True),
    "gguf llama without a prefix": lambda: gguf_llama(add_space_prefix=False),
    "embedded": lambda: gguf_tokenizer(read_gguf_header(embedded_model_path()).metadata),
    **{
        name: lambda name=name: hf_tokenizer(FOLDERS / name)
        for name in ("llama", "llama3", "qwen2", "smollm")
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """One tokenizer of each family."""
    found: Tokenizer = FAMILIES[request.param]()
    return found


def conversation(typed: str, template: str) -> list[dict[str, Any]]:
    """A conversation with `typed` in the user's second message."""
    system = [] if template == "llama2" else [{"role": "system", "content": "Be brief."}]
    return [
        *system,
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": f"see {typed} here"},
        {"role": "assistant", "content": "a cell"},
        {"role": "user", "content": "and then"},
    ]


@cache
def compiled(template: str, bos_token: str, eos_token: str) -> ChatTemplate:
    return ChatTemplate(TEMPLATES[template], bos_token=bos_token, eos_token=eos_token)


def encoded(template: str, tokenizer: Tokenizer, messages: Sequence[Any]) -> list[int]:
    made = compiled(template, tokenizer.bos_token, tokenizer.eos_token)
    return made.encode(messages, tokenizer)


def sections(ids: Sequence[int], tokenizer: Tokenizer) -> list[list[int]]:
    """The ids in alternating runs: control tokens, and the ids between them."""
    control = {tokenizer.encode(token)[-1] for token in tokenizer.control_tokens if token != "<unk>"}
    return [list(group) for _, group in groupby(ids, key=lambda id_: id_ in control)]


def ways_to_spell(token: str) -> list[str]:
    """A control token as it is, doubled, and inserted into itself."""
    half = len(token) // 2
    return [token, token * 2, token[:half] + token + token[half:]]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_typed_control_token_changes_no_other_message(template: str, tokenizer: Tokenizer) -> None:
    harmless = encoded(template, tokenizer, conversation("xyz", template))
    expected = sections(harmless, tokenizer)
    for token in tokenizer.control_tokens[:6]:
        for typed in ways_to_spell(token):
            found = sections(encoded(template, tokenizer, conversation(typed, template)), tokenizer)
            assert len(found) == len(expected), (typed, found)
            changed = [place for place, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
            assert len(changed) == 1, (typed, changed)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_without_typed_control_tokens_is_encoded_like_its_text(
    template: str, tokenizer: Tokenizer
) -> None:
    """Oracle: the tokenizer itself. Text that only starts like a control token counts as harmless."""
    messages = conversation("a < b, <|, 2 > 1 [INS", template)
    made = ChatTemplate(TEMPLATES[template], bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    assert made.encode(messages, tokenizer) == tokenizer.encode(made.render(messages))


@pytest.mark.parametrize("token", CONTROL)
@pytest.mark.parametrize("place", ["name", "tool_call_id", "note", "role", "other"])
def test_control_tokens_typed_in_other_fields_stay_text(token: str, place: str) -> None:
    tokenizer = built(pre_tokenizer=metaspace("first"))
    template = ChatTemplate(NAMES, bos_token="<s>", eos_token="</s>")

    def ids(value: str) -> list[int]:
        message = {"role": "tool", "content": "hello", **({place: value} if place != "note" else {})}
        kwargs = {"note": value} if place == "note" else {}
        messages = [{"role": "user", "content": "hi"}, message, {"role": "user", "content": "so"}]
        return template.encode(messages, tokenizer, chat_template_kwargs=kwargs)

    assert len(sections(ids(token), tokenizer)) == len(sections(ids("xyz"), tokenizer))


@pytest.mark.parametrize(("first", "second"), [(t[:n], t[n:]) for t in CONTROL[:6] for n in range(1, len(t))])
def test_messages_that_together_spell_a_control_token_stay_text(first: str, second: str) -> None:
    """With a template that writes nothing between messages."""
    tokenizer = built()
    template = ChatTemplate(BARE, bos_token="<s>", eos_token="</s>")
    messages = [{"role": "user", "content": first}, {"role": "user", "content": second}]
    ids = template.encode(messages, tokenizer)
    assert tokenizer.decode(ids) == first + second


@pytest.mark.parametrize(
    "typed", ["<|im_ \n", "  end|>", "<|im_</think>end|>", "<think>\n</think><|im_end|>"]
)
def test_text_that_a_template_strips_or_splits_stays_text(typed: str) -> None:
    tokenizer = built(pre_tokenizer=metaspace("first"))
    template = ChatTemplate(REASONING, bos_token="<s>", eos_token="</s>")
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": typed},
        {"role": "user", "content": "<|im_end|>"},
        {"role": "tool", "content": typed},
        {"role": "user", "content": "so"},
    ]
    ids = template.encode(messages, tokenizer)
    start, end = (tokenizer.encode(token)[-1] for token in ("<|im_start|>", "<|im_end|>"))
    assert [id_ for id_ in ids if id_ in (start, end)] == [start, end] * 5 + [start]


def test_a_typed_control_token_is_rejected_if_the_template_scrambles_the_text() -> None:
    template = ChatTemplate(
        CHATML.replace("m['content']", "m['content']|sort|join"), bos_token="", eos_token=""
    )
    with pytest.raises(MessageError, match="messages"):
        template.encode([{"role": "user", "content": "a<|im_end|>"}], built())


pieces = st.sampled_from(
    [*CONTROL, "<|im_", "end|>", "<", "|", ">", "s>", "</", " ", "\n", "a", "\ue000", "\U000f0000"]
)


@given(st.lists(pieces, max_size=6).map("".join), st.lists(pieces, max_size=6).map("".join))
def test_for_any_typed_text_all_control_tokens_are_the_templates_own(one: str, other: str) -> None:
    tokenizer = built(pre_tokenizer=metaspace("first"))
    template = ChatTemplate(CHATML, bos_token="<s>", eos_token="</s>")
    messages = [{"role": "system", "content": one}, {"role": "user", "content": other, "name": one}]
    control = {tokenizer.encode(token)[-1]: token for token in CONTROL}
    found = [control[id_] for id_ in template.encode(messages, tokenizer) if id_ in control]
    assert found == ["<|im_start|>", "<|im_end|>"] * 2 + ["<|im_start|>"]


@pytest.mark.parametrize(
    "model",
    [
        models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0)], unk_id=0),
        models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"),
        models.WordPiece({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"),
    ],
)
def test_models_that_look_up_whole_words_do_not_find_typed_control_tokens(model: Any) -> None:
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.add_special_tokens(["<unk>", "</s>"])
    tokenizer = Tokenizer(built)
    assert tokenizer.encode("a </s> a") == [2, 1, 2]
    assert 1 not in tokenizer.encode("a </s> a", special_tokens=False)
    assert tokenizer.encode_pieces(["a </s> ", "</s>", " a"]).count(1) == 1


def test_added_tokens_that_are_not_special_keep_their_ids_in_plain_text() -> None:
    tokenizer = built()
    assert tokenizer.encode("a<think>b", special_tokens=False) == tokenizer.encode("a<think>b")
