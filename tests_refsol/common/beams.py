"""Beam search in plain loops, and a comparison of the results of two searches."""

from collections.abc import Callable, Sequence

import pytest
from tiny_llm.beam_search import BeamSearchParams, Ended, Hypothesis

Table = Callable[[tuple[int, ...]], list[float]]  # the log-probability of each token after these


def by_definition(table: Table, params: BeamSearchParams, eos: Sequence[int]) -> list[Ended]:
    """Beam search by its definition: every token of every beam is a candidate, without early stopping."""
    beams, ended = [Hypothesis((), 0.0)], []
    for length in range(1, params.max_tokens + 1):
        grown = [
            Hypothesis((*beam.tokens, token), beam.logprob + more)
            for beam in beams
            for token, more in enumerate(table(beam.tokens))
        ]
        grown.sort(key=lambda one: -one.logprob)  # stable: ties keep the order of parents and tokens
        for one in grown[: params.beam_width]:
            if one.tokens[-1] in eos or length == params.max_tokens:
                score = one.logprob / length**params.length_penalty
                ended.append(Ended(score, one, "stop" if one.tokens[-1] in eos else "length"))
        beams = [one for one in grown if one.tokens[-1] not in eos][: params.beam_width]
    return sorted(ended, key=lambda one: -one.score)[: params.beam_width]


def check_found(found: Sequence[Ended], expected: Sequence[Ended], tolerance: float = 1e-9) -> None:
    """Assert that both have the same tokens in the same order, with equal sums, scores and finish reasons."""
    assert [one.hypothesis.tokens for one in found] == [one.hypothesis.tokens for one in expected]
    assert [one.finish_reason for one in found] == [one.finish_reason for one in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.hypothesis.logprob == pytest.approx(theirs.hypothesis.logprob, abs=tolerance)
        assert ours.score == pytest.approx(theirs.score, abs=tolerance)
