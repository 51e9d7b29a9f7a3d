"""Day 3.4, tasks 9 to 11: sequences that do not compute what is kept, and batches of them."""

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
from common.preemption import NewestGivesWay
from tiny_llm import SamplingParams
from week_3_day_4.blocks_by_content import kept, make_cache, stream_of
from week_3_day_4.idle_blocks import end

# Task 9: PrefixCache.match_part


def root() -> bytes:
    """The parent of the first block of a stream."""
    return TokenBlocks(4).parent(0)


@pytest.mark.parametrize(
    ("tokens", "length"), [([5, 6, 7, 8], 4), ([5, 6, 7], 3), ([5, 6, 9, 8], 2), ([5, 9, 7, 8], 1), ([5], 1)]
)
def test_task_9_the_common_beginning_is_counted(tokens: list[int], length: int) -> None:
    """Oracle: by hand: equal tokens behind a difference do not count."""
    allocator, cache = make_cache()
    table = kept(allocator, cache, [5, 6, 7, 8])
    assert cache.match_part(root(), tokens) == PartMatch(table.blocks[0], length)


def test_task_9_nothing_in_common_is_no_match() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    assert cache.match_part(root(), [5, 6]) is None
    kept(allocator, cache, [5, 6, 7, 8])
    assert cache.match_part(root(), [6, 6, 7, 8]) is None


def test_task_9_the_text_before_counts() -> None:
    """Oracle: by hand: the second block continues the first, and nothing else."""
    allocator, cache = make_cache()
    table, stream = kept(allocator, cache, range(8)), stream_of(range(8))
    assert cache.match_part(stream.parent(1), [4, 5, 0]) == PartMatch(table.blocks[1], 2)
    assert cache.match_part(stream.parent(0), [4, 5, 0]) is None
    assert cache.match_part(stream.hashes[1], [4, 5, 0]) is None
    assert cache.match_part(TokenBlocks(4, "salt").parent(0), [0, 1, 2]) is None


def test_task_9_of_several_the_one_that_was_kept_last() -> None:
    """Oracle: the docstring: two blocks begin with token 5; one that begins with another does not count."""
    allocator, cache = make_cache()
    kept(allocator, cache, [5, 6, 7, 8])
    newer = kept(allocator, cache, [5, 6, 0, 0])
    kept(allocator, cache, [9, 9, 9, 9])
    assert cache.match_part(root(), [5, 6, 7, 8]) == PartMatch(newer.blocks[0], 2)


def test_task_9_what_was_evicted_is_no_match() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    end(cache, kept(allocator, cache, [5, 6, 7, 8]))
    assert cache.match_part(root(), [5, 6]) is not None
    cache.evict(1)
    assert cache.match_part(root(), [5, 6]) is None


def test_task_9_a_part_that_is_looked_at_stays_idle() -> None:
    """Oracle: by hand."""
    allocator, cache = make_cache()
    end(cache, kept(allocator, cache, [5, 6, 7, 8]))
    cache.match_part(root(), [5, 6])
    assert cache.num_idle == 1
    assert allocator.num_free == 11


def test_task_9_no_tokens_are_no_match() -> None:
    """Oracle: the docstring."""
    allocator, cache = make_cache()
    kept(allocator, cache, [5, 6, 7, 8])
    assert cache.match_part(root(), []) is None


# Task 10: PrefixSharing.adopt


def make_sharing(num_blocks: int = 24, block_size: int = 4) -> tuple[BlockAllocator, PrefixSharing]:
    """A policy with an empty cache, and the allocator of its pool."""
    allocator = BlockAllocator(num_blocks)
    return allocator, PrefixSharing(allocator, block_size)


def sequence_of(
    allocator: BlockAllocator, tokens: Sequence[int], outputs: Sequence[int] = (), **params: object
) -> PagedSequence:
    """A sequence with these tokens, of which none is computed; blocks of 4."""
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
    """Compute the next tokens of a sequence and keep what is full: as if a step had done it."""
    start = sequence.num_computed
    sequence.table.append_tokens(count)
    sequence.num_computed += count
    sharing.keep(sequence, start)


def serve(
    allocator: BlockAllocator, sharing: PrefixSharing, tokens: Sequence[int], **params: object
) -> list[int]:
    """Compute all of a text and end; the blocks that were its own."""
    sequence = sequence_of(allocator, tokens, **params)
    compute(sharing, sequence, len(tokens))
    blocks = list(sequence.table.blocks)
    sequence.release_pages()
    sharing.released(blocks)
    return blocks


def test_task_10_what_is_kept_comes_into_the_table_and_counts_as_computed() -> None:
    """Oracle: by hand: 10 tokens are kept as two blocks; 14 begin like them."""
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
def test_task_10_the_last_token_is_left_to_compute(length: int, adopted: int) -> None:
    """Oracle: by hand, blocks of 4 that are all kept. No token left, no logits: a step that never ends."""
    allocator, sharing = make_sharing()
    serve(allocator, sharing, range(20))
    sequence = sequence_of(allocator, range(length))
    sharing.adopt(sequence)
    assert sequence.num_computed == sequence.table.num_tokens == adopted


def test_task_10_without_a_kept_block_nothing_changes() -> None:
    """Oracle: by hand: an empty cache, and another text."""
    allocator, sharing = make_sharing()
    sequence = sequence_of(allocator, range(12))
    sharing.adopt(sequence)
    serve(allocator, sharing, [9] * 12)
    sharing.adopt(sequence)
    assert (len(sequence.table.blocks), sequence.num_computed, sequence.num_cached_tokens) == (0, 0, 0)
    assert sharing.num_idle == 3


def test_task_10_a_sequence_under_way_takes_what_has_come() -> None:
    """Oracle: by hand: one block computed by itself, and by then two more are there."""
    allocator, sharing = make_sharing()
    sequence = sequence_of(allocator, range(20))
    compute(sharing, sequence, 4)
    serve(allocator, sharing, range(12))
    sharing.adopt(sequence)
    assert (sequence.num_computed, sequence.num_cached_tokens) == (12, 8)
    assert len(set(sequence.table.blocks)) == 3
    assert holders(sequence.table) == [2, 2, 2]


def test_task_10_within_a_block_nothing_is_shared() -> None:
    """Oracle: by hand: 6 of 20 tokens are computed; a whole block would not fit behind half of one."""
    allocator, sharing = make_sharing()
    sequence = sequence_of(allocator, range(20))
    compute(sharing, sequence, 6)
    serve(allocator, sharing, range(20))
    held = list(sequence.table.blocks)
    sharing.adopt(sequence)
    assert (sequence.table.blocks, sequence.num_computed) == (held, 6)


def test_task_10_a_prompt_whose_log_probabilities_are_asked_for_is_computed() -> None:
    """Oracle: by hand: logits exist only for tokens that are computed."""
    allocator, sharing = make_sharing()
    serve(allocator, sharing, range(12))
    sequence = sequence_of(allocator, range(12), prompt_logprobs=1)
    sharing.adopt(sequence)
    assert (len(sequence.table.blocks), sequence.num_computed) == (0, 0)


def test_task_10_outputs_from_before_a_preemption_are_shared_like_a_prompt() -> None:
    """Oracle: by hand: a prompt of 6 and 7 outputs: all but the last token was computed before.

    How many tokens were cached is said once, about the prompt, and that was before its first output.
    """
    allocator, sharing = make_sharing()
    serve(allocator, sharing, range(12))
    sequence = sequence_of(allocator, range(6), outputs=range(6, 13))
    sharing.adopt(sequence)
    assert (sequence.num_computed, sequence.num_uncomputed) == (12, 1)
    assert sequence.num_cached_tokens == 0


def test_task_10_salts_keep_tenants_apart() -> None:
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


def test_task_11_equal_texts_have_equal_next_blocks() -> None:
    """Oracle: by hand: alike for two blocks, and different in the third."""
    allocator, sharing = make_sharing()
    one, other = sequence_of(allocator, range(13)), sequence_of(allocator, [*range(9), 99, *range(10, 13)])
    seen = []
    for _ in range(3):
        assert sharing.next_block(one) is not None
        seen.append(sharing.next_block(one) == sharing.next_block(other))
        compute(sharing, one, 4)
        compute(sharing, other, 4)
    assert seen == [True, True, False]


def test_task_11_each_block_is_another() -> None:
    """Oracle: by hand: equal tokens all the way."""
    allocator, sharing = make_sharing()
    sequence, seen = sequence_of(allocator, [7] * 13), set()
    for _ in range(3):
        seen.add(sharing.next_block(sequence))
        compute(sharing, sequence, 4)
    assert len(seen) == 3


def test_task_11_a_block_that_is_half_full_is_the_next_one_still() -> None:
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
def test_task_11_a_block_with_an_unknown_token_has_no_hash(length: int, count: int, is_known: bool) -> None:
    """Oracle: by hand: what fills the rest is not known yet; a last block that is full is known."""
    allocator, sharing = make_sharing()
    sequence = sequence_of(allocator, range(length))
    compute(sharing, sequence, count)
    assert (sharing.next_block(sequence) is not None) == is_known


def test_task_11_a_preempted_sequence_fills_its_first_block_next() -> None:
    """Oracle: by hand: its stream is cut into four blocks, and none is computed any more. The last hash of
    the stream is the mistake."""
    allocator, sharing = make_sharing()
    sequence = sequence_of(allocator, range(17))
    first = sharing.next_block(sequence)
    compute(sharing, sequence, 16)
    sequence.release_pages()
    assert len(sequence.stream) == 4
    assert sharing.next_block(sequence) == first == stream_of(range(4)).hashes[0]


def test_task_11_outputs_are_known_tokens() -> None:
    """Oracle: by hand: 2 tokens of a prompt and 3 outputs fill one block of 4, as a prompt of 5 does."""
    allocator, sharing = make_sharing()
    sequence = sequence_of(allocator, [0, 1], outputs=[2, 3, 4])
    assert sharing.next_block(sequence) is not None
    assert sharing.next_block(sequence) == sharing.next_block(sequence_of(allocator, range(5)))


def test_task_11_tenants_do_not_wait_for_each_other() -> None:
    """Oracle: by hand."""
    allocator, sharing = make_sharing()
    salts = ("", "one", "two")
    assert len({sharing.next_block(sequence_of(allocator, range(9), cache_salt=salt)) for salt in salts}) == 3


def manager_of(num_blocks: int = 40, budget: int = 256) -> PagedBatchManager:
    """A batch manager that shares prefixes and computes nothing: blocks of 4, eight sequences at once."""
    policies = Policies(preemption=NewestGivesWay(), prefix=PrefixSharing)
    return PagedBatchManager(num_blocks, 4, 8, max_batched_tokens=budget, policies=policies)


def run(manager: PagedBatchManager, prompts: dict[str, Sequence[int]], max_tokens: int = 1) -> dict[str, int]:
    """Serve prompts that come together; the tokens that were computed for each.

    The outputs are 0, 1, 2 and so on. After each step all blocks are counted.
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
    raise AssertionError("a prompt is never served")


def check_blocks(manager: PagedBatchManager) -> None:
    """Every block is free, or counted once for each table that holds it and once for the cache."""
    held = Counter(block for sequence in manager.running for block in sequence.table.blocks)
    assert manager.prefix.num_idle == len(set(manager.prefix.blocks) - set(held))
    held.update(manager.prefix.blocks)
    total = manager.allocator.num_blocks
    assert counts(manager.allocator) == [held[block] for block in range(total)]
    assert manager.allocator.num_free + len(held) == total


@pytest.mark.parametrize("budget", [256, 12, 8])
def test_task_11_equal_prompts_that_come_together_are_computed_once(budget: int) -> None:
    """Oracle: by hand: 22 tokens are five blocks of 4 and two more, which everybody computes.

    A batch in which no prompt waits computes 66 tokens instead of 26.
    """
    prompt = range(22)
    assert run(manager_of(budget=budget), {"a": prompt, "b": prompt, "c": prompt}) == {
        "a": 22,
        "b": 2,
        "c": 2,
    }


def test_task_11_the_next_turn_of_a_chat_finds_the_last_answer() -> None:
    """Oracle: by hand: 10 tokens and two outputs are kept as three blocks."""
    manager = manager_of()
    run(manager, {"first": [9] * 10}, max_tokens=4)
    assert run(manager, {"next": [*[9] * 10, 0, 1, 2, 3, 8, 8]}) == {"next": 16 - 12}


def test_task_11_a_pool_full_of_idle_blocks_admits_every_prompt() -> None:
    """Oracle: by hand: all 8 blocks are kept and idle; a prompt that shares nothing needs all of them."""
    manager = manager_of(8)
    run(manager, {"a": [1] * 16})
    run(manager, {"b": [2] * 16})
    assert (manager.allocator.num_free, manager.prefix.num_idle) == (0, 8)
    assert run(manager, {"c": [3] * 31}) == {"c": 31}


@quick
@given(
    num_blocks=st.integers(7, 20),
    budget=st.integers(8, 40),
    crowds=st.lists(
        st.lists(
            st.tuples(st.integers(0, 16), st.lists(st.integers(2, 3), min_size=1, max_size=3)),
            min_size=1,
            max_size=6,
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_task_11_crowds_that_share_lose_no_block(
    num_blocks: int, budget: int, crowds: list[list[tuple[int, list[int]]]]
) -> None:
    """Oracle: a count of all holders after each step; in the end free and kept blocks are the whole pool."""
    manager = manager_of(num_blocks, budget)
    for number, crowd in enumerate(crowds):
        prompts = {f"{number}:{i}": [1] * same + own for i, (same, own) in enumerate(crowd)}
        run(manager, prompts, max_tokens=6)
    kept = len(manager.prefix.blocks)
    assert manager.prefix.num_idle == kept
    assert manager.prefix.evict(num_blocks) == kept
    assert manager.allocator.num_free == num_blocks


def answers(
    loaded: LoadedModel, prompts: list[str], policies: Policies, waves: int
) -> list[list[PagedSequence]]:
    """Serve the prompts three tokens long, all together, `waves` times; the sequences of each wave."""
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


def test_task_11_the_real_model_answers_the_same_and_computes_less() -> None:
    """Oracle: the same manager without prefix caching; what is shared is counted in full blocks of 8."""
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
