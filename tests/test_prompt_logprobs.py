"""Log-probabilities of prompts: right, told once, the same bits however the prompt was computed."""

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.batch_manager import MAX_PROMPT_ROWS
from tiny_llm.engine_core import EngineCore
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.step import Plan
from tiny_llm.token_output import TokenOutput

from promises import policies
from tiny_model import EOS, logits_through_pages, random_prompt, tiny_model

PARAMS = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=2, ignore_eos=True)


def engine(num_blocks: int = 40, *, max_tokens: int = 64, preempts: bool = False) -> EngineCore:
    manager = PagedBatchManager(
        num_blocks,
        4,
        8,
        model=tiny_model(),
        max_batched_tokens=max_tokens,
        policies=policies(preempts),
    )
    return EngineCore(manager, (EOS,))


def finish(core: EngineCore) -> list[TokenOutput]:
    outputs = []
    while core.has_work:
        outputs += core.step()
    return outputs


def told(outputs: list[TokenOutput], seq_id: str = "r") -> list[object]:
    """What came with each token of a sequence."""
    return [output.prompt_logprobs for output in outputs if output.seq_id == seq_id]


def alone(prompt: list[int], params: SamplingParams = PARAMS) -> list[object]:
    core = engine()
    core.add_request("r", prompt, params)
    return told(finish(core))


def test_they_are_those_of_the_logits_before_each_token() -> None:
    """Oracle: float64 log softmax of all the prompt's logits."""
    prompt = random_prompt(50, seed=1)
    logits = np.array(logits_through_pages(tiny_model(), prompt, [50])).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    [found, *later] = alone(prompt)
    assert later == [None, None]
    assert isinstance(found, tuple)
    assert len(found) == 49
    for position, (logprob, rank, top) in enumerate(found):
        row, token = expected[position], prompt[position + 1]
        assert abs(logprob - row[token]) < 1e-4
        assert rank == (row > row[token]).sum() + 1
        assert [likely for likely, _ in top] == np.argsort(-row)[:2].tolist()


@pytest.mark.parametrize("length", [1, 2, 64, 65, 100])
def test_a_prompt_of_any_length_gets_one_entry_less_than_tokens(length: int) -> None:
    found = alone(random_prompt(length, seed=length))[0]
    assert isinstance(found, tuple)
    assert len(found) == length - 1


@pytest.mark.parametrize("max_tokens", [8, 9, 13, 100])
def test_chunks_and_neighbours_change_no_bit(max_tokens: int) -> None:
    prompt = random_prompt(60, seed=2)
    core = engine(max_tokens=max_tokens)
    core.add_request("other", random_prompt(9, seed=3), SamplingParams(max_tokens=9, seed=1))
    core.add_request("r", prompt, PARAMS)
    core.add_request("third", random_prompt(20, seed=4), PARAMS)
    assert told(finish(core)) == alone(prompt)


@pytest.mark.parametrize("steps", range(1, 8))
def test_a_preemption_in_the_middle_of_the_prompt_tells_nothing_twice(steps: int) -> None:
    prompt = random_prompt(60, seed=5)
    core = engine(max_tokens=10, preempts=True)
    core.add_request("r", prompt, PARAMS)
    outputs = [output for _ in range(steps) for output in core.step()]
    core.manager._scheduler._preempt(core.manager.sequence("r"), Plan())
    assert told(outputs + finish(core)) == alone(prompt)


def test_every_completion_of_a_prompt_brings_the_same() -> None:
    prompt = random_prompt(30, seed=6)
    core = engine()
    core.add_request(
        "r", prompt, SamplingParams(n=3, seed=1, max_tokens=2, prompt_logprobs=2, ignore_eos=True)
    )
    outputs = finish(core)
    for index in range(3):
        assert told(outputs, f"r/{index}") == alone(prompt)[:2]


def test_a_step_computes_few_rows_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    core = engine(max_tokens=500)
    process_batch = core.manager.process_batch

    def counted() -> object:
        logits = process_batch()
        rows.append(0 if logits.rows is None else logits.rows.shape[0])
        return logits

    monkeypatch.setattr(core.manager, "process_batch", counted)
    core.add_request("r", random_prompt(120, seed=7), PARAMS)
    finish(core)
    assert max(rows) <= MAX_PROMPT_ROWS
    assert sum(rows[:2]) == 120


def test_rows_that_are_not_asked_for_are_not_computed() -> None:
    core = engine()
    core.add_request("r", random_prompt(50, seed=8), SamplingParams(max_tokens=1))
    logits = core.manager.process_batch()
    assert logits.rows is not None
    assert logits.rows.shape[0] == 1
    mx.eval(logits.rows)
