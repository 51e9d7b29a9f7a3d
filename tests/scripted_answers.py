"""Answers that a test writes instead of the model, token by token, through the whole engine and server."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_llm.token_output
from tiny_llm.token_output import Choice, TokenOutput

from tiny_llm import LLM

Script = Callable[..., None]


def script_answers(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> Script:
    """Return a function that makes all later requests answer with a text; several texts: one per choice.

    An answer ends as if the model had written its end token, unless `max_tokens` ends it before.
    """
    make_output = tiny_llm.token_output.make_output
    texts: list[list[int]] = []
    [end, *_] = llm.model_config.eos_token_ids

    def scripted(choice: Choice, eos_token_ids: Any) -> TokenOutput:
        output, sequence = make_output(choice, eos_token_ids), choice.sequence
        if not texts:
            return output
        index = int(sequence.seq_id.rpartition("/")[2]) if "/" in sequence.seq_id else 0
        tokens, place = texts[index % len(texts)], len(sequence.outputs)
        if place >= len(tokens):
            return output._replace(token=end, finish_reason="stop")
        is_full = sequence.num_tokens + 1 >= sequence.max_len
        return output._replace(token=tokens[place], finish_reason="length" if is_full else None)

    monkeypatch.setattr(tiny_llm.token_output, "make_output", scripted)

    def answer(*written: str, special_tokens: bool = False) -> None:
        texts[:] = [llm.tokenizer.encode(text, special_tokens=special_tokens) for text in written]

    return answer
