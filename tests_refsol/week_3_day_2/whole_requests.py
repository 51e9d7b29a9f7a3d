"""Day 3.2, task 17: whole requests and beam searches get the same results in every batch."""

from collections.abc import Sequence

import numpy as np
import pytest
from tiny_llm.beam_search import BeamSearchParams
from tiny_llm.engine_core import EngineCore
from tiny_llm.paged_batch import PagedBatchManager

from common.beams import Table, by_definition, check_found
from common.paged_managers import check_pages, with_model
from common.toy_models import logits_after, recompute_everything, tiny_model
from common.toy_requests import REQUESTS, Requests, answers, limits, prompt


def served(manager: PagedBatchManager, requests: Requests, every: int = 0) -> dict[str, list[int]]:
    """The result of `answers`; asserts that pages are conserved after every step and all free at the end."""
    found = answers(manager, requests, every, after_step=lambda: check_pages(manager))
    assert manager.capacity.num_free == manager.max_pages, "pages were leaked: not all are free at the end"
    return found


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_task_17_a_single_request_gets_the_tokens_of_a_loop_without_cache(block_size: int) -> None:
    """Oracle: a plain loop that recomputes everything."""
    for name, (tokens, params) in REQUESTS.items():
        assert params.max_tokens is not None
        found = served(with_model(block_size=block_size), {name: (tokens, params)})
        assert found == {name: recompute_everything(tiny_model(), tokens, params.max_tokens)}


@pytest.mark.parametrize(
    ("blocks", "block_size", "max_seqs", "budget", "every", "min_pages"),
    [
        (64, 4, 5, 512, 0, None),
        (64, 4, 5, 8, 0, None),
        (40, 1, 5, 8, 2, None),
        (13, 3, 5, 6, 0, None),
        (20, 4, 2, 16, 5, None),
        (64, 2, 5, 16, 3, 1),
    ],
)
def test_task_17_a_request_gets_the_same_tokens_in_any_batch(
    blocks: int, block_size: int, max_seqs: int, budget: int, every: int, min_pages: int | None
) -> None:
    """Oracle: each request without a cache. Requests start together or join later; pages are scarce.

    After every step each block is free or held by the tables that contain it, and at the end all are free.
    """
    manager = with_model(blocks, block_size, max_seqs, budget=budget, min_pages=min_pages)
    expected = {
        name: recompute_everything(tiny_model(), tokens, params.max_tokens or 0)
        for name, (tokens, params) in REQUESTS.items()
    }
    assert served(manager, REQUESTS, every) == expected


def test_task_17_completions_get_the_same_tokens_in_any_batch() -> None:
    """Oracle: each request without a cache; greedy tokens are the same for all completions."""
    tokens, _ = REQUESTS["r0"]
    found = served(with_model(budget=8), {"a": (tokens, limits(9, n=3)), **REQUESTS})
    want = recompute_everything(tiny_model(), tokens, 9)
    assert [found[f"a/{i}"] for i in range(3)] == [want, want, want]
    assert found["r3"] == recompute_everything(tiny_model(), REQUESTS["r3"][0], 6)


def next_tokens(start: Sequence[int]) -> Table:
    """The model's log-probabilities after a prompt, without a cache."""

    def table(tokens: tuple[int, ...]) -> list[float]:
        row = logits_after(tiny_model(), (*start, *tokens)).astype(np.float64)
        return [float(x) for x in row - row.max() - np.log(np.exp(row - row.max()).sum())]

    return table


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_task_17_a_beam_search_finds_the_same_hypotheses_as_without_a_cache(
    width: int, penalty: float
) -> None:
    """Oracle: beam search in plain loops that recompute every beam.

    The test uses your beams, pages and batches together. Two searches and a request run at the same time on
    few pages.
    """
    manager, eos = with_model(blocks=36, block_size=3, max_seqs=9, budget=16), (4, 17)
    core = EngineCore(manager, eos)
    params = BeamSearchParams(beam_width=width, max_tokens=6, length_penalty=penalty)
    starts = {"a": prompt(7, 20), "b": prompt(11, 21)}
    searches = {name: core.add_beam_search(name, start, params) for name, start in starts.items()}
    core.add_request("c", prompt(4, 22), limits(9))
    steps = 0
    while core.has_work:
        core.step()
        check_pages(manager)
        steps += 1
        assert steps < 100, "the searches do not finish"
    assert manager.capacity.num_free == 36
    for name, start in starts.items():
        check_found(searches[name].ended, by_definition(next_tokens(start), params, eos), 1e-3)
