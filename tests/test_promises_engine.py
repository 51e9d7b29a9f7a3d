"""Promises 1 and 2 on a real forward pass: a tiny random model, and the embedded one, from small pools.

The oracle is the engine itself, serving the same completion alone: equal means equal bits.
"""

from collections import Counter

import numpy as np
import pytest
import tiny_llm_kernels
from hypothesis import event, given, settings
from hypothesis import strategies as st
from promises import Scenario, check_scenario, kernels_on, scenarios
from tiny_llm.embedded import embedded_model_path
from tiny_llm.errors import ModelFileError
from tiny_llm.gguf_reader import load_gguf
from tiny_llm.linear import PackedLinear
from tiny_llm.model import Model
from tiny_model import examples, logits_through_pages, random_prompt, tiny_model

compiled_only = pytest.mark.skipif(
    not tiny_llm_kernels.available(), reason=f"no compiled kernels: {tiny_llm_kernels.why_unavailable()}"
)


@compiled_only
def test_the_tiny_model_runs_on_the_packed_kernels() -> None:
    assert isinstance(tiny_model().lm_head, PackedLinear)
    assert isinstance(tiny_model().layers[0].mlp.down_proj, PackedLinear)


def test_scheduling_never_changes_the_answer_and_pages_are_conserved() -> None:
    happened: Counter[str] = Counter()

    @settings(max_examples=examples(150))
    @given(scenarios())
    def every_completion_gets_what_it_gets_alone(scenario: Scenario) -> None:
        seen = check_scenario(tiny_model(), scenario)
        for name in sorted(seen):
            event(name, "some" if seen[name] else "none")
        happened.update(seen)

    every_completion_gets_what_it_gets_alone()
    for name in (
        "answers compared",
        "preemptions",
        "preemptions of outputs",
        "forks",
        "copies on write",
        "prompts cut into chunks",
        "mixed steps",
        "cancelled under way",
    ):
        assert happened[name] >= 50, f"the scenarios hardly test anything: {happened}"


@st.composite
def chunkings(draw: st.DrawFn, length: int) -> list[int]:
    """Sizes of chunks that sum to `length`."""
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=10)) | {0, length})
    return [stop - start for start, stop in zip(cuts, cuts[1:], strict=False)]


@settings(max_examples=examples(60))
@given(data=st.data(), length=st.integers(2, 120), block_size=st.integers(1, 17), threads=st.integers(1, 4))
def test_every_row_of_logits_is_the_same_bits_in_any_chunks(
    data: st.DataObject, length: int, block_size: int, threads: int
) -> None:
    prompt = random_prompt(length, seed=length)
    chunks = data.draw(chunkings(length))
    with kernels_on(1, ""):
        whole = np.array(logits_through_pages(tiny_model(), prompt, [length]))
    with kernels_on(threads, ""):
        cut = np.array(logits_through_pages(tiny_model(), prompt, chunks, block_size=block_size))
    assert np.array_equal(whole, cut)


@pytest.fixture(scope="module")
def embedded() -> Model:
    if not tiny_llm_kernels.available():
        pytest.skip(f"no compiled kernels: {tiny_llm_kernels.why_unavailable()}")
    try:
        return load_gguf(embedded_model_path()).model
    except ModelFileError as error:
        pytest.skip(str(error))


def test_the_embedded_model_answers_the_same_in_any_crowd(embedded: Model) -> None:
    happened: Counter[str] = Counter()

    @settings(max_examples=examples(8))
    @given(scenarios(most_requests=4, longest_prompt=40, most_tokens=6))
    def every_completion_gets_what_it_gets_alone(scenario: Scenario) -> None:
        happened.update(check_scenario(embedded, scenario))

    every_completion_gets_what_it_gets_alone()
    assert happened["answers compared"] >= 8
    assert happened["preemptions"] >= 1


def test_the_embedded_models_logits_are_the_same_bits_in_any_chunks(embedded: Model) -> None:
    prompt = random_prompt(150, seed=5)
    whole = np.array(logits_through_pages(embedded, prompt, [150]))
    assert np.array_equal(whole, np.array(logits_through_pages(embedded, prompt, [1, 2, 60, 7, 80], block_size=7)))
