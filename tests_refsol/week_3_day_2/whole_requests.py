"""Day 3.2, task 17: whole requests and searches, each with the answer that it gets by itself."""

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
    """What `answers` gives; pages are conserved after every step, and all are free in the end."""
    found = answers(manager, requests, every, after_step=lambda: check_pages(manager))
    assert manager.capacity.num_free == manager.max_pages, "pages are missing when all have ended"
    return found


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_task_17_a_request_alone_gets_the_likeliest_tokens(block_size: int) -> None:
    """Oracle: a plain loop that recomputes everything."""
    for name, (tokens, params) in REQUESTS.items():
        assert params.max_tokens is not None
        found = served(with_model(block_size=block_size), {name: (tokens, params)})
        assert found == {name: recompute_everything(tiny_model(), tokens, params.max_tokens)}


@pytest.mark.parametrize(
    ("blocks", "block_size", "seats", "budget", "every", "min_pages"),
    [
        (64, 4, 5, 512, 0, None),
        (64, 4, 5, 8, 0, None),
        (40, 1, 5, 8, 2, None),
        (13, 3, 5, 6, 0, None),
        (20, 4, 2, 16, 5, None),
        (64, 2, 5, 16, 3, 1),
    ],
)
def test_task_17_a_request_gets_beside_others_what_it_gets_alone(
    blocks: int, block_size: int, seats: int, budget: int, every: int, min_pages: int | None
) -> None:
    """Oracle: each request from nothing. They begin together or join later; pages and seats are short.

    After every step each block is free or held by the tables that name it, and in the end all are free.
    """
    manager = with_model(blocks, block_size, seats, budget=budget, min_pages=min_pages)
    expected = {
        name: recompute_everything(tiny_model(), tokens, params.max_tokens or 0)
        for name, (tokens, params) in REQUESTS.items()
    }
    assert served(manager, REQUESTS, every) == expected


def test_task_17_completions_beside_others() -> None:
    """Oracle: each request from nothing; the likeliest tokens are the same for all completions."""
    tokens, _ = REQUESTS["r0"]
    found = served(with_model(budget=8), {"a": (tokens, limits(9, n=3)), **REQUESTS})
    want = recompute_everything(tiny_model(), tokens, 9)
    assert [found[f"a/{i}"] for i in range(3)] == [want, want, want]
    assert found["r3"] == recompute_everything(tiny_model(), REQUESTS["r3"][0], 6)


def next_tokens(start: Sequence[int]) -> Table:
    """The model's log-probabilities behind a prompt, from nothing."""

    def table(tokens: tuple[int, ...]) -> list[float]:
        row = logits_after(tiny_model(), (*start, *tokens)).astype(np.float64)
        return [float(x) for x in row - row.max() - np.log(np.exp(row - row.max()).sum())]

    return table


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_task_17_a_search_finds_what_it_finds_without_any_cache(width: int, penalty: float) -> None:
    """Oracle: beam search in plain loops that recompute every beam; your beams, pages and batches together.

    Two searches and a request run beside each other on few pages.
    """
    manager, eos = with_model(blocks=36, block_size=3, seats=9, budget=16), (4, 17)
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
        assert steps < 100, "it never ends"
    assert manager.capacity.num_free == 36
    for name, start in starts.items():
        check_found(searches[name].ended, by_definition(next_tokens(start), params, eos), 1e-3)
