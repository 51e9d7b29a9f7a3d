"""Day 3.5, task 12: batches of sequences with sliding windows, and a model that reads their pages."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_llm.grouped_attention import grouped_query_attention
from tiny_llm.layer_groups import LayerGroup, group_layers
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.policies import Policies
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.windowed_prefix import WindowedPrefixSharing

from common.blocks import counts
from common.examples import quick
from common.preemption import PreemptNewest
from common.toy_models import tiny_model
from week_3_day_5.windowed_prefixes import TEXT
from week_3_day_5.windowed_tables import NO, seen_from


def serve(
    manager: PagedBatchManager, prompts: dict[str, list[int]], max_tokens: int
) -> dict[str, list[np.ndarray]]:
    """Serve prompts together, greedily; return each prompt's rows of logits.

    After each step, assert that no table holds a block outside its window and that all references match.
    """
    for name, prompt in prompts.items():
        assert manager.add_request(prompt, name, SamplingParams(max_tokens=max_tokens))
    rows: dict[str, list[np.ndarray]] = {name: [] for name in prompts}
    while manager.has_work:
        known = {sequence.seq_id: sequence for sequence in [*manager.running, *manager.waiting]}
        for name, row in manager.process_batch().items():
            rows[name].append(np.array(row))
            manager.commit({name: int(np.argmax(rows[name][-1]))})
            if len(rows[name]) == max_tokens:
                manager.finish(name)
        held = Counter(block for sequence in manager.running for block in sequence.blocks)
        held.update(manager.prefix.blocks)
        total = manager.allocator.num_blocks
        assert counts(manager.allocator) == [held[block] for block in range(total)]
        for sequence in known.values():
            for table in sequence.tables[1:]:
                assert len(table.blocks) <= 2, (
                    "the 5 tokens before the next one are in at most two blocks of 4"
                )
    return rows


@quick
@given(
    num_blocks=st.integers(24, 40),
    budget=st.integers(4, 30),
    batches=st.lists(
        st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=5), max_size=3
    ),
)
def test_task_12_many_requests_that_share_prefixes_lose_no_block(
    num_blocks: int, budget: int, batches: list[list[tuple[int, int]]]
) -> None:
    """Oracle: a count of all references after each step.

    At the end free and cached blocks are the whole pool.
    """
    groups = (LayerGroup((0,), None), LayerGroup((1,), 6))
    policies = Policies(preemption=PreemptNewest(), prefix=partial(WindowedPrefixSharing, groups=groups))
    manager = PagedBatchManager(
        num_blocks, 4, 4, max_batched_tokens=budget, max_model_len=40, policies=policies, groups=groups
    )
    for batch in batches:
        for name, (shared, own) in enumerate(batch):
            manager.add_request([*TEXT[:shared], *range(own)], str(name), SamplingParams(max_tokens=3))
        while manager.has_work:
            for name in list(manager.process_batch()):
                manager.commit({name: 7})
                if manager.sequence(name).num_tokens == manager.sequence(name).max_len:
                    manager.finish(name)
            held = Counter(block for sequence in manager.running for block in sequence.blocks)
            held.update(manager.prefix.blocks)
            assert counts(manager.allocator) == [held[block] for block in range(num_blocks)]
    num_cached = len(manager.prefix.blocks)
    assert manager.prefix.evict(num_blocks) == num_cached
    assert manager.allocator.num_free == num_blocks


class MaskedContext:
    """A pass over a whole sequence without a cache, with one mask per layer, built pair by pair."""

    def __init__(self, length: int, scale: float, windows: Sequence[int | None]) -> None:
        self.positions = mx.arange(length, dtype=mx.int32)
        self.logit_rows = None
        self.scale = scale
        self.masks = [
            mx.array(
                [
                    [0.0 if other in seen_from(position, window or length) else NO for other in range(length)]
                    for position in range(length)
                ]
            )
            for window in windows
        ]

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Attend to all tokens at once, with the layer's mask."""
        return grouped_query_attention(q, k, v, self.scale, self.masks[layer])


@pytest.mark.parametrize("budget", [64, 7])
def test_task_12_a_model_with_windows_gives_the_same_logits_from_pages_as_with_masks(budget: int) -> None:
    """Oracle: the same model over each whole sequence at once, with masks built pair by pair.

    Three prompts with a common prefix arrive together, then one of them again: all but its last block is
    cached. In the windowed layers no sequence holds more than two blocks between two steps.
    """
    model = tiny_model((6, None, 6))
    groups = group_layers(model.config.windows)
    manager = PagedBatchManager(
        60,
        4,
        4,
        model=model,
        max_batched_tokens=budget,
        kv_dtype=mx.float32,
        policies=Policies(prefix=partial(WindowedPrefixSharing, groups=groups)),
    )
    assert [len(group.layers) for group in groups] == [1, 1, 1]
    rng = np.random.default_rng(2)
    prefix = rng.integers(0, 50, 17).tolist()
    prompts = {
        name: [*prefix, *rng.integers(0, 50, n).tolist()] for name, n in (("a", 4), ("b", 1), ("c", 9))
    }
    served = [
        (prompts, serve(manager, prompts, 12)),
        ({"a": prompts["a"]}, serve(manager, {"a": prompts["a"]}, 12)),
    ]
    assert manager.prefix_stats.hits >= 16 + 16 + 20, (
        "two of three prompts must find the prefix, and the last one all of its full blocks"
    )
    for requests, rows in served:
        for name, prompt in requests.items():
            tokens = [*prompt, *(int(np.argmax(row)) for row in rows[name])]
            context = MaskedContext(len(tokens), model.config.attention_scale, model.config.windows)
            expected = np.array(model(mx.array([tokens], mx.int32), context))[0, len(prompt) - 1 : -1]
            np.testing.assert_allclose(np.stack(rows[name]), expected, rtol=0, atol=2e-3)
    num_cached = len(manager.prefix.blocks)
    assert manager.prefix.evict(60) == num_cached
    assert manager.allocator.num_free == 60
