"""Greedy continuations of the embedded model equal transformers' in float32, token by token.

For every position, the goldens hold the margin in logits between the two likeliest tokens. A computation that
rounds anywhere cannot promise the float32 answer where that margin is tiny.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tiny_llm import LLM, SamplingParams

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "greedy.json").read_text())
CONTINUATIONS = {case["name"]: case for case in GOLDENS["continuations"]}


@pytest.fixture(scope="module")
def answers(embedded_llm: LLM) -> dict[str, tuple[int, ...]]:
    """All continuations, run together in one batch."""
    params = SamplingParams(temperature=0, max_tokens=GOLDENS["new_tokens"])
    outputs = embedded_llm.generate(
        [case["prompt_ids"] for case in CONTINUATIONS.values()], params, use_tqdm=False
    )
    return {name: output.outputs[0].token_ids for name, output in zip(CONTINUATIONS, outputs, strict=True)}


@pytest.mark.parametrize("name", CONTINUATIONS)
def test_greedy_continuation_matches_transformers(name: str, answers: dict[str, tuple[int, ...]]) -> None:
    case: dict[str, Any] = CONTINUATIONS[name]
    expected, got = case["output_ids"], list(answers[name])
    if got != expected:
        at = next(i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b)
        pytest.fail(
            f"token {at} is {got[at]}, transformers' is {expected[at]}; float32 margin {case['margins'][at]}"
        )
