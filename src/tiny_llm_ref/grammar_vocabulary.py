"""A tokenizer's vocabulary in the form that the library llguidance needs: the bytes of each token."""

from typing import TYPE_CHECKING

from tiny_llm_checkpoints.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer


def library_tokenizer(tokenizer: Tokenizer, eos_token_ids: list[int]) -> "LLTokenizer":
    """Return a tokenizer as the library needs it. eos_token_ids: the tokens that may follow a complete text.

    The library requires at least one. If there is none, the vocabulary gets one more token, which a model
    cannot generate.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    vocabulary = _Vocabulary(tokenizer, eos_token_ids)
    ends = eos_token_ids or [vocabulary.eos_token_id]
    return LLTokenizer(TokenizerWrapper(vocabulary), eos_token=ends)


class _Vocabulary:
    """The vocabulary, with the attributes that the library reads, and as a function that tokenizes."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: list[int]) -> None:
        known = range(tokenizer.vocab_size)
        self.tokens = [tokenizer.token_bytes(token) for token in known]
        control = {token for token in known if tokenizer.is_control(token)}
        control.update(eos_token_ids)
        self.special_token_ids = sorted(control)  # never part of a text
        self.eos_token_id = eos_token_ids[0] if eos_token_ids else len(self.tokens)
        if not eos_token_ids:
            self.tokens.append(b"<end>")
            self.special_token_ids.append(self.eos_token_id)
        self._tokenizer = tokenizer
        self._token_of = {self.tokens[token]: token for token in known if token not in control}
        self._longest = max(map(len, self._token_of), default=1)

    def __call__(self, text: bytes | str) -> list[int]:
        """Tokenize a text that a grammar forces as the model's tokenizer does, or else by `_greedy`."""
        spelled = text.encode() if isinstance(text, str) else text
        tokens = self._tokenizer.encode(spelled.decode(), special_tokens=False)
        if b"".join(self.tokens[token] for token in tokens) == spelled:
            return tokens
        return self._greedy(spelled)  # the tokenizer adds a space to the start of a text, or drops a byte

    def _greedy(self, spelled: bytes) -> list[int]:
        """Tokenize by taking the longest token at each place; a byte at which no token starts is left out."""
        tokens, at = [], 0
        while at < len(spelled):
            sizes = range(min(self._longest, len(spelled) - at), 0, -1)
            size = next((size for size in sizes if spelled[at : at + size] in self._token_of), 0)
            if size:
                tokens.append(self._token_of[spelled[at : at + size]])
            at += max(1, size)
        return tokens
