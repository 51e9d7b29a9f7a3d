"""Day 3.4, tasks 9 to 11: sequences that reuse cached blocks, and batches of them."""

from collections import Counter
from collections.abc import Sequence

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_llm.loader import LoadedModel, load_model
from tiny_llm.paged_attention import BlockAllocator, BlockTable
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.policies import Policies
from tiny_llm.prefix_cache import PartMatch, TokenBlocks
from tiny_llm.prefix_sharing import PrefixSharing
from tiny_llm.sequence import PagedSequence

from common.blocks import counts, holders
from common.examples import quick
from common.preemption import PreemptNewest
from tiny_llm import SamplingParams
from week_3_day_4.blocks_by_content import cached, make_cache, short, stream_of
from week_3_day_4.idle_blocks import release_table

# Task 9: PrefixCache.match_part


def root() -> bytes:
    """The parent of the first block of a stream."""
    return TokenBlocks(4).parent(0)


@pytest.mark.parametrize(
    ("tokens", "length"), [([5, 6, 7, 8], 4), ([5, 6, 7], 3), ([5, 6, 9, 8], 2), ([5, 9, 7, 8], 1), ([5], 1)]
)
def test_task_9_the_length_of_the_common_prefix_is_returned(tokens: list[int], length: int) -> None:
    """Oracle: by hand: equal tokens after a difference do not count."""
    allocator, cache = make_cache()
    table = cached(allocator, cache, [5, 6, 7, 8])
    assert cache.match_part(root(), tokens) == PartMatch(table.blocks[0], length)


def test_task_9_a_different_first_token_is_not_a_match() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    assert cache.match_part(root(), [5, 6]) is None
    cached(allocator, cache, [5, 6, 7, 8])
    assert cache.match_part(root(), [6, 6, 7, 8]) is None


def test_task_9_the_parent_must_match() -> None:
    """Oracle: by hand: the second block only continues the first."""
    allocator, cache = make_cache()
    table, stream = cached(allocator, cache, range(8)), stream_of(range(8))
    assert cache.match_part(stream.parent(1), [4, 5, 0]) == PartMatch(table.blocks[1], 2)
    assert cache.match_part(stream.parent(0), [4, 5, 0]) is None
    assert cache.match_part(stream.hashes[1], [4, 5, 0]) is None
    assert cache.match_part(TokenBlocks(4, "salt").parent(0), [0, 1, 2]) is None


def test_task_9_of_several_candidates_the_most_recently_cached_is_returned() -> None:
    """Oracle: the docstring: two blocks start with token 5.

    A block with a different first token does not count.
    """
    allocator, cache = make_cache()
    cached(allocator, cache, [5, 6, 7, 8])
    newer = cached(allocator, cache, [5, 6, 0, 0])
    cached(allocator, cache, [9, 9, 9, 9])
    assert cache.match_part(root(), [5, 6, 7, 8]) == PartMatch(newer.blocks[0], 2)


def test_task_9_an_evicted_block_is_not_a_match() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    release_table(cache, cached(allocator, cache, [5, 6, 7, 8]))
    assert cache.match_part(root(), [5, 6]) is not None
    cache.evict(1)
    assert cache.match_part(root(), [5, 6]) is None


def test_task_9_a_partial_match_does_not_take_a_block_into_use() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    release_table(cache, cached(allocator, cache, [5, 6, 7, 8]))
    cache.match_part(root(), [5, 6])
    assert cache.num_idle == 1
    assert allocator.num_free == 11


def test_task_9_an_empty_list_of_tokens_matches_nothing() -> None:
    """Oracle: the docstring."""
    allocator, cache = make_cache()
    cached(allocator, cache, [5, 6, 7, 8])
    assert cache.match_part(root(), []) is None


# Task 10: PrefixSharing.adopt


def make_sharing(num_blocks: int = 24, block_size: int = 4) -> tuple[BlockAllocator, PrefixSharing]:
    """A policy with an empty cache, and the allocator of its pool."""
    allocator = BlockAllocator(num_blocks)
    return allocator, PrefixSharing(allocator, block_size)


def sequence_of(
    allocator: BlockAllocator, tokens: Sequence[int], outputs: Sequence[int] = (), **params: object
) -> PagedSequence:
    """A sequence with these tokens, none of them computed; blocks of 4."""
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    return PagedSequence(
        seq_id="one",
        request_id="one",
        prompt=tuple(tokens),
        params=sampling,
        seed=0,
        max_len=100,
        outputs=list(outputs),
        tables=[BlockTable(allocator, 4)],
        streams=[TokenBlocks(4, sampling.cache_salt)],
    )


def compute(sharing: PrefixSharing, sequence: PagedSequence, count: int) -> None:
    """Compute the next tokens of a sequence and cache its full blocks, as a step does."""
    start = sequence.num_computed
    sequence.table.append_tokens(count)
    sequence.num_computed += count
    sharing.keep(sequence, start)


def serve(
    allocator: BlockAllocator, sharing: PrefixSharing, tokens: Sequence[int], **params: object
) -> list[int]:
    """Compute a sequence completely and finish it; return its blocks."""
    sequence = sequence_of(allocator, tokens, **params)
    compute(sharing, sequence, len(tokens))
    blocks = list(sequence.table.blocks)
    sequence.release_pages()
    sharing.released(blocks)
    return blocks


def test_task_10_cached_blocks_are_added_to_the_table_and_count_as_computed() -> None:
    """Oracle: by hand: 10 tokens are cached as two blocks; a prompt of 14 starts with them."""
    allocator, sharing = make_sharing()
    blocks = serve(allocator, sharing, range(10))[:2]
    sequence = sequence_of(allocator, range(14))
    sharing.adopt(sequence)
    assert sequence.table.blocks == blocks
    assert sequence.table.num_tokens == sequence.num_computed == sequence.num_cached_tokens == 8
    assert sequence.num_uncomputed == 6
    assert [allocator.ref_count(block) for block in blocks] == [2, 2]
    assert sharing.num_idle == 0


@pytest.mark.parametrize(
    ("length", "adopted"),
    [(1, 0), (4, 0), (5, 4), (7, 4), (8, 4), (9, 8), (12, 8), (13, 12), (16, 12), (17, 16)],
)
def test_task_10_the_last_token_is_always_computed(length: int, adopted: int) -> None:
    """Oracle: by hand, blocks of 4, all cached. Without a token to compute there are no logits."""
    allocator, sharing = make_sharing()
    serve(allocator, sharing, range(20))
    sequence = sequence_of(allocator, range(length))
    sharing.adopt(sequence)
    assert sequence.num_computed == sequence.table.num_tokens == adopted


def test_task_10_without_a_cached_block_nothing_changes() -> None:
    """Oracle: by hand: an empty cache, and a cache of other tokens."""
    allocator, sharing = make_sharing()
    sequence = sequence_of(allocator, range(12))
    sharing.adopt(sequence)
    serve(allocator, sharing, [9] * 12)
    sharing.adopt(sequence)
    assert (len(sequence.table.blocks), sequence.num_computed, sequence.num_cached_tokens) == (0, 0, 0)
    assert sharing.num_idle == 3


def test_task_10_a_partly_computed_sequence_adopts_blocks_that_were_cached_meanwhile() -> None:
    """Oracle: by hand: one block is computed, and meanwhile two more are cached."""
    allocator, sharing = make_sharing()
    sequence = sequence_of(allocator, range(20))
    compute(sharing, sequence, 4)
    serve(allocator, sharing, range(12))
    sharing.adopt(sequence)
    assert (sequence.num_computed, sequence.num_cached_tokens) == (12, 8)
    assert len(set(sequence.table.blocks)) == 3
    assert holders(sequence.table) == [2, 2, 2]


def test_task_10_a_sequence_with_a_partly_computed_block_adopts_nothing() -> None:
    """Oracle: by hand: 6 of 20 tokens are computed, so no cached block starts at the next token."""
    allocator, sharing = make_sharing()
    sequence = sequence_of(allocator, range(20))
    compute(sharing, sequence, 6)
    serve(allocator, sharing, range(20))
    held = list(sequence.table.blocks)
    sharing.adopt(sequence)
    assert (sequence.table.blocks, sequence.num_computed) == (held, 6)


def test_task_10_a_prompt_with_prompt_logprobs_is_computed_completely() -> None:
    """Oracle: by hand: logits exist only for computed tokens."""
    allocator, sharing = make_sharing()
    serve(allocator, sharing, range(12))
    sequence = sequence_of(allocator, range(12), prompt_logprobs=1)
    sharing.adopt(sequence)
    assert (len(sequence.table.blocks), sequence.num_computed) == (0, 0)


def test_task_10_outputs_from_before_a_preemption_are_shared_like_a_prompt() -> None:
    """Oracle: by hand: a prompt of 6 and 7 outputs: all but the last token were computed before.

    `num_cached_tokens` is set once, for the prompt, before the first output.
    """
    allocator, sharing = make_sharing()
    serve(allocator, sharing, range(12))
    sequence = sequence_of(allocator, range(6), outputs=range(6, 13))
    sharing.adopt(sequence)
    assert (sequence.num_computed, sequence.num_uncomputed) == (12, 1)
    assert sequence.num_cached_tokens == 0


def test_task_10_tenants_with_different_salts_share_nothing() -> None:
    """Oracle: by hand."""
    allocator, sharing = make_sharing()
    serve(allocator, sharing, range(12), cache_salt="one")
    adopted = []
    for salt in ("one", "two", ""):
        sequence = sequence_of(allocator, range(12), cache_salt=salt)
        sharing.adopt(sequence)
        adopted.append(sequence.num_computed)
    assert adopted == [8, 0, 0]


# Task 11: PrefixSharing.next_block


def test_task_11_equal_prompts_have_equal_next_blocks() -> None:
    """Oracle: by hand: equal in two blocks, different in the third."""
    allocator, sharing = make_sharing()
    one, other = sequence_of(allocator, range(13)), sequence_of(allocator, [*range(9), 99, *range(10, 13)])
    seen = []
    for _ in range(3):
        assert sharing.next_block(one) is not None
        seen.append(sharing.next_block(one) == sharing.next_block(other))
        compute(sharing, one, 4)
        compute(sharing, other, 4)
    assert seen == [True, True, False]


def test_task_11_successive_blocks_have_different_hashes() -> None:
    """Oracle: by hand: all tokens are equal."""
    allocator, sharing = make_sharing()
    sequence, seen = sequence_of(allocator, [7] * 13), set()
    for _ in range(3):
        seen.add(sharing.next_block(sequence))
        compute(sharing, sequence, 4)
    assert len(seen) == 3


def test_task_11_a_half_full_block_is_still_the_next_one() -> None:
    """Oracle: by hand: 0, 1 and 3 tokens of the first block are computed, then all 4."""
    allocator, sharing = make_sharing()
    sequence, seen = sequence_of(allocator, range(9)), []
    for count in (0, 1, 2, 1):
        compute(sharing, sequence, count)
        seen.append(sharing.next_block(sequence))
    assert seen[0] is not None
    assert [block == seen[0] for block in seen] == [True, True, True, False]


@pytest.mark.parametrize(
    ("length", "count", "is_known"), [(3, 0, False), (4, 0, True), (7, 4, False), (8, 4, True), (8, 7, True)]
)
def test_task_11_a_block_with_unknown_tokens_has_no_hash(length: int, count: int, is_known: bool) -> None:
    """Oracle: by hand: a block without all its tokens has no hash yet; a full last block has one."""
    allocator, sharing = make_sharing()
    sequence = sequence_of(allocator, range(length))
    compute(sharing, sequence, count)
    assert (sharing.next_block(sequence) is not None) == is_known


def test_task_11_a_preempted_sequence_fills_its_first_block_next() -> None:
    """Oracle: by hand: its stream has four blocks, none of them computed any more.

    Common mistake: the last hash of the stream.
    """
    allocator, sharing = make_sharing()
    sequence = sequence_of(allocator, range(17))
    first = sharing.next_block(sequence)
    compute(sharing, sequence, 16)
    sequence.release_pages()
    assert len(sequence.stream) == 4
    found = [first, sharing.next_block(sequence)]
    assert short(digest or b"" for digest in found) == short(stream_of(range(4)).hashes * 2)


def test_task_11_outputs_count_as_known_tokens() -> None:
    """Oracle: by hand: 2 prompt tokens and 3 outputs fill one block of 4, like a prompt of 5."""
    allocator, sharing = make_sharing()
    sequence = sequence_of(allocator, [0, 1], outputs=[2, 3, 4])
    assert sharing.next_block(sequence) is not None
    assert sharing.next_block(sequence) == sharing.next_block(sequence_of(allocator, range(5)))


def test_task_11_tenants_with_different_salts_have_different_next_blocks() -> None:
    """Oracle: by hand."""
    allocator, sharing = make_sharing()
    salts = ("", "one", "two")
    assert len({sharing.next_block(sequence_of(allocator, range(9), cache_salt=salt)) for salt in salts}) == 3


def manager_of(num_blocks: int = 40, budget: int = 256) -> PagedBatchManager:
    """A batch manager with prefix caching and no model: blocks of 4, at most eight sequences."""
    policies = Policies(preemption=PreemptNewest(), prefix=PrefixSharing)
    return PagedBatchManager(num_blocks, 4, 8, max_batched_tokens=budget, policies=policies)


def run(manager: PagedBatchManager, prompts: dict[str, Sequence[int]], max_tokens: int = 1) -> dict[str, int]:
    """Serve prompts that arrive together; return the number of computed tokens of each.

    The outputs are 0, 1, 2, ... After each step all references are counted.
    """
    for name, prompt in prompts.items():
        manager.add_request(list(prompt), name, SamplingParams(max_tokens=max_tokens))
    computed_tokens = dict.fromkeys(prompts, 0)
    for _ in range(1_000):
        if not manager.has_work:
            return computed_tokens
        known = {sequence.seq_id: sequence for sequence in [*manager.running, *manager.waiting]}
        ready = list(manager.process_batch())
        for name in ready:
            sequence = known[name]
            first = not sequence.outputs
            computed_tokens[name] += sequence.num_tokens - sequence.num_cached_tokens if first else 1
            manager.commit({name: len(sequence.outputs)})
            if sequence.num_tokens == sequence.max_len:
                manager.finish(name)
        check_blocks(manager)
    raise AssertionError("a prompt was never served")


def check_blocks(manager: PagedBatchManager) -> None:
    """Assert that each block's reference count is the number of tables and caches that hold it."""
    held = Counter(block for sequence in manager.running for block in sequence.table.blocks)
    assert manager.prefix.num_idle == len(set(manager.prefix.blocks) - set(held))
    held.update(manager.prefix.blocks)
    total = manager.allocator.num_blocks
    assert counts(manager.allocator) == [held[block] for block in range(total)]
    assert manager.allocator.num_free + len(held) == total


@pytest.mark.parametrize("budget", [256, 12, 8])
def test_task_11_equal_prompts_that_arrive_together_are_computed_once(budget: int) -> None:
    """Oracle: by hand: 22 tokens are five blocks of 4 and two more, which every request computes.

    If no prompt waited for another, 66 tokens would be computed instead of 26.
    """
    prompt = range(22)
    assert run(manager_of(budget=budget), {"a": prompt, "b": prompt, "c": prompt}) == {
        "a": 22,
        "b": 2,
        "c": 2,
    }


def test_task_11_the_next_turn_of_a_chat_reuses_the_last_answer() -> None:
    """Oracle: by hand: 10 tokens and two outputs are cached as three blocks."""
    manager = manager_of()
    run(manager, {"first": [9] * 10}, max_tokens=4)
    assert run(manager, {"next": [*[9] * 10, 0, 1, 2, 3, 8, 8]}) == {"next": 16 - 12}


def test_task_11_a_pool_full_of_idle_blocks_admits_every_prompt() -> None:
    """Oracle: by hand: all 8 blocks are cached and idle; a prompt that shares nothing needs all of them."""
    manager = manager_of(8)
    run(manager, {"a": [1] * 16})
    run(manager, {"b": [2] * 16})
    assert (manager.allocator.num_free, manager.prefix.num_idle) == (0, 8)
    assert run(manager, {"c": [3] * 31}) == {"c": 31}


@quick
@given(
    num_blocks=st.integers(7, 20),
    budget=st.integers(8, 40),
    batches=st.lists(
        st.lists(
            st.tuples(st.integers(0, 16), st.lists(st.integers(2, 3), min_size=1, max_size=3)),
            min_size=1,
            max_size=6,
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_task_11_many_requests_that_share_prefixes_lose_no_block(
    num_blocks: int, budget: int, batches: list[list[tuple[int, list[int]]]]
) -> None:
    """Oracle: a count of all references after each step.

    At the end free and cached blocks are the whole pool.
    """
    manager = manager_of(num_blocks, budget)
    for number, batch in enumerate(batches):
        prompts = {f"{number}:{i}": [1] * same + own for i, (same, own) in enumerate(batch)}
        run(manager, prompts, max_tokens=6)
    num_cached = len(manager.prefix.blocks)
    assert manager.prefix.num_idle == num_cached
    assert manager.prefix.evict(num_blocks) == num_cached
    assert manager.allocator.num_free == num_blocks


def answers(
    loaded: LoadedModel, prompts: list[str], policies: Policies, waves: int
) -> list[list[PagedSequence]]:
    """Generate three tokens for all prompts together, `waves` times; return the sequences of each wave."""
    manager = PagedBatchManager(64, 8, 4, model=loaded.model, policies=policies)
    served = []
    for wave in range(waves):
        for i, prompt in enumerate(prompts):
            manager.add_request(loaded.tokenizer.encode(prompt), f"{wave}.{i}", SamplingParams(max_tokens=3))
        sequences = [manager.sequence(f"{wave}.{i}") for i in range(len(prompts))]
        while manager.has_work:
            logits = manager.process_batch()
            manager.commit({seq_id: int(mx.argmax(row).item()) for seq_id, row in logits.items()})
            for seq_id in list(logits):
                if len(manager.sequence(seq_id).outputs) == 3:
                    manager.finish(seq_id)
        served.append(sequences)
    return served


def test_task_11_the_real_model_gives_the_same_tokens_with_fewer_computed() -> None:
    """Oracle: the same manager without prefix caching; full blocks of 8 are shared."""
    system = "You keep a lighthouse, and you always answer every question in a single short sentence."
    prompts = [f"{system} Who are you?", f"{system} What shines?"]
    loaded = load_model(None)
    [plain] = answers(loaded, prompts, Policies(), waves=1)
    _, warm = answers(loaded, prompts, Policies(prefix=PrefixSharing), waves=2)
    full_blocks = (len(loaded.tokenizer.encode(system)) - 1) // 8
    assert full_blocks > 1
    assert [one.num_cached_tokens for one in plain] == [0, 0]
    assert [one.outputs for one in warm] == [one.outputs for one in plain]
    assert all(one.num_cached_tokens >= 8 * full_blocks for one in warm)
