"""Beam search in plain loops, and the comparison of what two searches found."""

from collections.abc import Callable, Sequence

import pytest
from tiny_llm.beam_search import BeamSearchParams, Ended, Hypothesis

Table = Callable[[tuple[int, ...]], list[float]]  # the log-probability of each token behind those


def by_definition(table: Table, params: BeamSearchParams, eos: Sequence[int]) -> list[Ended]:
    """Beam search as it is defined: every token of every beam is a candidate, and nothing ends early."""
    living, ended = [Hypothesis((), 0.0)], []
    for length in range(1, params.max_tokens + 1):
        grown = [
            Hypothesis((*beam.tokens, token), beam.logprob + more)
            for beam in living
            for token, more in enumerate(table(beam.tokens))
        ]
        grown.sort(key=lambda one: -one.logprob)  # equal ones stay: the better parent's, the smaller token
        for one in grown[: params.beam_width]:
            if one.tokens[-1] in eos or length == params.max_tokens:
                score = one.logprob / length**params.length_penalty
                ended.append(Ended(score, one, "stop" if one.tokens[-1] in eos else "length"))
        living = [one for one in grown if one.tokens[-1] not in eos][: params.beam_width]
    return sorted(ended, key=lambda one: -one.score)[: params.beam_width]


def check_found(found: Sequence[Ended], expected: Sequence[Ended], tolerance: float = 1e-9) -> None:
    """The same texts in the same order, their sums and scores, and why they ended."""
    assert [one.hypothesis.tokens for one in found] == [one.hypothesis.tokens for one in expected]
    assert [one.finish_reason for one in found] == [one.finish_reason for one in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.hypothesis.logprob == pytest.approx(theirs.hypothesis.logprob, abs=tolerance)
        assert ours.score == pytest.approx(theirs.score, abs=tolerance)
