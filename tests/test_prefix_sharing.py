"""PrefixSharing in the paged batch manager: what is found, computed and evicted, and which requests wait.

The tokens that a step computes are counted in its plan; the oracle is the same request alone and without
sharing.
"""

from collections import Counter
from collections.abc import Sequence as Seq

import numpy as np
import pytest
from tiny_llm.engine_core import EngineCore
from tiny_llm.paged_attention import BlockAllocator, BlockTable
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.paged_queues import BeamStep
from tiny_llm.policies import NoPreemption, NoPrefixSharing, Policies
from tiny_llm.preemption import NewestFirst
from tiny_llm.prefix_cache import PrefixCache, TokenBlocks
from tiny_llm.prefix_sharing import MIN_TOKENS_TO_COPY, PrefixSharing
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.sequence import PagedSequence
from tiny_llm.step import Plan
from tiny_llm.token_output import TokenOutput

from counted import Counted
from promises import Watched, check_all_returned, check_pages, policies
from tiny_llm import prefix_cache
from tiny_model import EOS, random_prompt, tiny_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, logprobs=0, ignore_eos=True)


def manager_of(
    blocks: int = 40,
    block_size: int = 4,
    max_seqs: int = 8,
    *,
    budget: int = 256,
    real: bool = False,
    preempts: bool = True,
    shares: bool = True,
) -> Counted:
    """A manager that shares prefixes; with `real` one that computes, on the tiny model."""
    policies = Policies(
        preemption=NewestFirst() if preempts else NoPreemption(),
        prefix=PrefixSharing if shares else NoPrefixSharing,
    )
    return Counted(
        blocks,
        block_size,
        max_seqs,
        model=tiny_model() if real else None,
        max_batched_tokens=budget,
        policies=policies,
    )


def cache_of(manager: PagedBatchManager) -> PrefixCache:
    assert isinstance(manager.prefix, PrefixSharing)
    return manager.prefix.cache


def step(manager: PagedBatchManager, token: int = 1) -> list[str]:
    """Run a step with a token for every sequence that is ready; those that have all their tokens finish."""
    ready = list(manager.process_batch())
    manager.commit(dict.fromkeys(ready, token))
    for seq_id in ready:
        if manager.sequence(seq_id).num_tokens >= manager.sequence(seq_id).max_len:
            manager.finish(seq_id)
    check_pages(manager)
    return ready


def run(manager: PagedBatchManager) -> None:
    """Run steps until every request is served."""
    for _ in range(10_000):
        if not manager.has_work:
            return
        step(manager)
    raise AssertionError("a request is never served")


def add(
    manager: PagedBatchManager, name: str, prompt: Seq[int], max_tokens: int = 1, **params: object
) -> None:
    sampling = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
    assert manager.add_request(list(prompt), name, sampling)


def answers(manager: PagedBatchManager, *prompts: Seq[int], **params: object) -> list[list[TokenOutput]]:
    """The engine's answers to prompts that arrive together; outputs in order."""
    engine = EngineCore(manager, (EOS,), seed=5)
    names = [f"{len(manager.computed)}:{i}" for i in range(len(prompts))]  # type: ignore[attr-defined]
    got: dict[str, list[TokenOutput]] = {name: [] for name in names}
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, list(prompt), GREEDY if not params else SamplingParams(**params))  # type: ignore[arg-type]
    while engine.has_work:
        for output in engine.step():
            got[output.request_id].append(output)
        check_pages(manager)
    return list(got.values())


def comparable(outputs: Seq[TokenOutput]) -> list[tuple[object, ...]]:
    """What must not depend on the cache: tokens, log-probabilities, and the finish reason."""
    return [(output.token, output.logprobs, output.finish_reason) for output in outputs]


# Hits.


@pytest.mark.parametrize("length", [16, 32, 48, 17, 31, 33, 47])
def test_a_fully_cached_prompt_computes_only_its_last_token(length: int) -> None:
    """nano-vllm 144: at a multiple of the block size nothing was left to compute."""
    manager, prompt = manager_of(block_size=16), random_prompt(length, 1)
    add(manager, "first", prompt, max_tokens=20)
    run(manager)
    add(manager, "again", prompt)
    run(manager)
    assert manager.computed["again"] == 1
    assert manager.computed["first"] == length + 19


@pytest.mark.parametrize("length", range(1, 20))
def test_a_token_is_always_left_to_compute_the_logits(length: int) -> None:
    """Blocks of 4: a partial match too short to be worth a copy is computed again."""
    manager, prompt = manager_of(), random_prompt(length, 1)
    add(manager, "first", prompt)
    run(manager)
    add(manager, "again", prompt)
    assert step(manager) == ["again"]
    assert MIN_TOKENS_TO_COPY == 4
    assert manager.computed["again"] == length - (length - 1) // 4 * 4


def test_a_hit_within_a_block_is_copied_and_leaves_its_owner_unchanged() -> None:
    manager, prompt = manager_of(block_size=16, real=True), random_prompt(40, 1)
    engine = EngineCore(manager, (EOS,))
    engine.add_request("owner", prompt, SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True))
    engine.step()
    table = manager.sequence("owner").table
    assert manager.pool is not None
    before = [np.array(x) for layer in (0, 1) for x in manager.pool.read_blocks(layer, table.blocks[:2])]
    other = [*prompt[:27], *random_prompt(6, 2)]
    engine.add_request("other", other, GREEDY)
    outputs = [output for _ in range(8) for output in engine.step() if output.request_id == "other"]
    assert outputs[0].num_cached_tokens == 27, "a block of 16 and 11 tokens of the next"
    assert manager.computed["other"] == 33 - 27 + 5
    assert manager.num_copies == 1
    after = [np.array(x) for layer in (0, 1) for x in manager.pool.read_blocks(layer, table.blocks[:2])]
    assert all(np.array_equal(one, two) for one, two in zip(before, after, strict=True))
    [alone] = answers(manager_of(block_size=16, real=True, shares=False), other)
    assert comparable(outputs) == comparable(alone)


def test_answers_from_a_warm_cache_equal_those_from_a_cold_one() -> None:
    warm = manager_of(80, real=True)
    prompts = [random_prompt(30, 1)[:n] + random_prompt(9 - i, i + 2) for i, n in enumerate((30, 21, 22, 4))]
    answers(warm, random_prompt(30, 1))
    for prompt in (*prompts, prompts[0]):
        [got] = answers(warm, prompt)
        [alone] = answers(manager_of(80, real=True, shares=False), prompt)
        assert comparable(got) == comparable(alone)
        assert got[0].num_cached_tokens > 0
    assert warm.prefix_stats.hits > 90


def test_the_next_message_of_a_chat_finds_the_last_prompt_and_answer() -> None:
    manager, prompt = manager_of(real=True), random_prompt(10, 1)
    [first] = answers(manager, prompt)
    conversation = [*prompt, *(output.token for output in first), *random_prompt(5, 2)]
    [second] = answers(manager, conversation)
    assert second[0].num_cached_tokens == 12, "three blocks of 4: 10 tokens of the prompt, 2 of the answer"
    assert comparable(second) == comparable(answers(manager_of(real=True, shares=False), conversation)[0])


def test_a_prompt_that_diverges_shares_the_common_part() -> None:
    manager, prompt = manager_of(), random_prompt(20, 1)
    add(manager, "first", prompt)
    run(manager)
    add(manager, "other", [*prompt[:13], 999, *prompt[14:]])
    add(manager, "from the second token", prompt[1:])
    run(manager)
    assert manager.computed["other"] == 20 - 12
    assert manager.computed["from the second token"] == 19


def test_completions_of_one_request_share_the_hit_of_their_leader() -> None:
    manager, prompt = manager_of(), random_prompt(20, 1)
    add(manager, "first", prompt)
    run(manager)
    add(manager, "three", prompt, n=3, max_tokens=9)
    assert len(step(manager)) == 3
    assert manager.computed["three"] == 4
    assert [sequence.num_cached_tokens for sequence in manager.running] == [16, 16, 16]
    run(manager)
    check_all_returned(manager)


# Waiting for a prefix.


@pytest.mark.parametrize("budget", [256, 16, 9, 4])
def test_equal_prompts_that_arrive_together_are_computed_once(budget: int) -> None:
    manager, prompt = manager_of(budget=budget, max_seqs=4), random_prompt(22, 1)
    for name in "abcd":
        add(manager, name, prompt)
    run(manager)
    assert [manager.computed[name] for name in "abcd"] == [22, 2, 2, 2]
    assert manager.prefix_stats == (4 * 22, 3 * 20)


def test_prompts_with_a_common_prefix_wait_only_until_it_is_computed() -> None:
    manager, shared = manager_of(budget=8), random_prompt(16, 1)
    add(manager, "a", shared + random_prompt(8, 2))
    add(manager, "b", shared + random_prompt(8, 3))
    add(manager, "c", random_prompt(8, 4))
    computed = []
    for _ in range(4):
        before = Counter(manager.computed)
        step(manager)
        computed.append(dict(manager.computed - before))
    assert computed == [{"a": 8}, {"a": 8}, {"a": 8}, {"b": 8}], "first come, first served"
    run(manager)
    assert [manager.computed[name] for name in "abc"] == [24, 8, 8]


def test_an_unrelated_request_runs_before_those_that_wait_for_a_prefix() -> None:
    manager, prompt = manager_of(budget=32), random_prompt(16, 1)
    add(manager, "a", prompt)
    add(manager, "b", prompt)
    add(manager, "c", random_prompt(16, 2))
    step(manager)
    assert dict(manager.computed) == {"a": 16, "c": 16}


def test_a_waiting_request_goes_on_where_a_cancelled_one_stopped() -> None:
    manager, prompt = manager_of(budget=8), random_prompt(24, 1)
    add(manager, "a", prompt)
    add(manager, "b", prompt)
    step(manager)
    assert dict(manager.computed) == {"a": 8}
    manager.cancel("a")
    run(manager)
    assert manager.computed["b"] == 16


def test_equal_blocks_that_two_requests_computed_are_merged_into_one() -> None:
    """Both prompts are shorter than a block, so neither waits; with their answers they fill equal blocks."""
    manager = manager_of()
    for name in "ab":
        add(manager, name, [7, 7], max_tokens=8)
    for _ in range(7):
        step(manager)
    tables = [sequence.table.blocks for sequence in manager.running]
    assert tables[0] == tables[1]
    assert len(tables[0]) == 2
    assert manager.computed == {"a": 8, "b": 8}


def sequence_of(
    sharing: PrefixSharing, allocator: BlockAllocator, prompt: Seq[int], outputs: Seq[int], num_computed: int
) -> PagedSequence:
    """A sequence outside any manager, in blocks of 4, with this many tokens computed and cached."""
    sequence = PagedSequence(
        seq_id="s",
        request_id="s",
        prompt=tuple(prompt),
        params=SamplingParams(),
        seed=0,
        max_len=99,
        outputs=list(outputs),
        tables=[BlockTable(allocator, 4)],
        streams=[TokenBlocks(4)],
    )
    sequence.table.append_tokens(num_computed)
    sequence.num_computed = num_computed
    sharing.keep(sequence, 0)
    return sequence


@pytest.mark.parametrize(("known", "computed"), [(3, 0), (7, 4), (8, 8)])
def test_no_request_waits_for_a_block_with_unknown_tokens(known: int, computed: int) -> None:
    allocator = BlockAllocator(20)
    sharing = PrefixSharing(allocator, 4)
    assert sharing.next_block(sequence_of(sharing, allocator, range(known), [], computed)) is None


@pytest.mark.parametrize("num_outputs", [0, 2, 4])
@pytest.mark.parametrize(("known", "computed"), [(4, 0), (4, 3), (8, 4), (9, 6)])
def test_the_block_to_wait_for_may_contain_prompt_tokens_and_outputs(
    num_outputs: int, known: int, computed: int
) -> None:
    allocator = BlockAllocator(20)
    sharing, tokens, split = PrefixSharing(allocator, 4), range(known), known - num_outputs
    sequence = sequence_of(sharing, allocator, tokens[:split], tokens[split:], computed)
    stream = TokenBlocks(4)
    stream.extend(range(8))
    assert sharing.next_block(sequence) == stream.hashes[computed // 4]


def test_a_sequence_with_a_partly_computed_block_shares_nothing() -> None:
    allocator = BlockAllocator(20)
    sharing = PrefixSharing(allocator, 4)
    half = sequence_of(sharing, allocator, range(20), [], 6)
    sequence_of(sharing, allocator, range(20), [], 20)
    before = list(half.table.blocks)
    sharing.adopt(half)
    sharing.adopt_part(half)
    assert (half.table.blocks, half.num_computed) == (before, 6)


# Requests that skip the lookup.


def test_a_prompt_with_log_probabilities_skips_the_lookup_but_its_blocks_are_cached() -> None:
    manager, prompt = manager_of(real=True), random_prompt(21, 1)
    [first] = answers(manager, prompt)
    [second] = answers(manager, prompt, prompt_logprobs=1, temperature=0.0, max_tokens=6, logprobs=0)
    assert second[0].num_cached_tokens == 0
    assert second[0].prompt_logprobs is not None
    assert len(second[0].prompt_logprobs) == 20
    fresh = manager_of(real=True)
    [cold] = answers(fresh, prompt, prompt_logprobs=1, temperature=0.0, max_tokens=6, logprobs=0)
    assert second[0].prompt_logprobs == cold[0].prompt_logprobs
    assert [output.token for output in first] == [output.token for output in cold]
    [third] = answers(fresh, prompt)
    assert third[0].num_cached_tokens == 20


def test_tenants_with_different_salts_share_no_blocks() -> None:
    manager, prompt = manager_of(), random_prompt(20, 1)
    for name, salt in (("a", "one"), ("b", "two"), ("c", ""), ("a again", "one"), ("c again", "")):
        add(manager, name, prompt, cache_salt=salt)
        run(manager)
    assert [manager.computed[name] for name in ("a", "b", "c")] == [20, 20, 20]
    assert [manager.computed[name] for name in ("a again", "c again")] == [4, 4]


def test_tenants_that_arrive_together_do_not_wait_for_each_other() -> None:
    manager, prompt = manager_of(), random_prompt(20, 1)
    for salt in ("one", "two"):
        add(manager, salt, prompt, cache_salt=salt)
    step(manager)
    assert dict(manager.computed) == {"one": 20, "two": 20}


# Reported numbers.


def test_the_reported_cached_tokens_are_those_that_were_not_computed() -> None:
    manager = manager_of()
    prompts = [random_prompt(24, 1)[:n] + random_prompt(7, n) for n in (24, 17, 8, 3)]
    for i, prompt in enumerate(prompts):
        add(manager, str(i), prompt)
        step(manager)
        assert manager.prefix_stats.queries == sum(map(len, prompts[: i + 1]))
    assert [manager.computed[str(i)] for i in range(4)] == [31, 8, 7, 10]
    assert manager.prefix_stats.hits == 16 + 8


def test_a_preemption_does_not_change_the_reported_cached_tokens() -> None:
    manager = manager_of(14, max_seqs=2)
    prompt = random_prompt(18, 1)
    add(manager, "first", prompt)
    run(manager)
    add(manager, "old", random_prompt(8, 2), max_tokens=36)
    add(manager, "new", prompt, max_tokens=20)
    while not manager.num_preemptions:
        assert manager.has_work
        step(manager)
    new = manager.sequence("new")
    assert new.outputs
    assert new.num_cached_tokens == 16
    while new not in manager.running:
        step(manager)
    assert new.num_cached_tokens == 16
    assert manager.prefix_stats.queries == 18 + 8 + 18, "a prompt is counted once"


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    manager = manager_of(12, max_seqs=2)
    add(manager, "old", random_prompt(8, 2), max_tokens=8)
    add(manager, "new", random_prompt(20, 3), max_tokens=8)
    step(manager)
    new = manager.sequence("new")
    manager._scheduler._preempt(
        new, Plan()
    )  # before pages run short, so that none of its blocks has been evicted
    before = manager.computed["new"]
    step(manager)
    assert new in manager.running
    assert manager.computed["new"] - before == new.num_tokens - 1 - 20
    run(manager)
    check_all_returned(manager)


# Eviction.


def test_a_pool_of_idle_cached_blocks_still_admits_requests() -> None:
    manager = manager_of(8)
    for i in range(2):
        add(manager, str(i), random_prompt(16, i))
        run(manager)
    assert (manager.allocator.num_free, manager.prefix.num_idle) == (0, 8)
    add(manager, "all of it", random_prompt(31, 9))
    assert step(manager) == ["all of it"]
    assert manager.computed["all of it"] == 31


def test_an_evicted_prefix_is_computed_and_cached_again() -> None:
    manager, prompt = manager_of(8, real=True), random_prompt(20, 1)
    [cold] = answers(manager, prompt)
    answers(manager, random_prompt(25, 2))
    assert manager.prefix.num_idle == 7
    [part] = answers(manager, prompt)
    answers(manager, random_prompt(25, 3))
    [again] = answers(manager, prompt)
    assert comparable(part) == comparable(again) == comparable(cold)
    assert 0 <= again[0].num_cached_tokens <= part[0].num_cached_tokens < 20


def test_the_most_recently_used_prefix_survives() -> None:
    manager = manager_of(12)
    for seed in (1, 2, 1, 3):
        add(manager, f"{seed} {len(manager.computed)}", random_prompt(17, seed))
        run(manager)
    assert manager.computed["1 2"] == 1
    for seed in (1, 2):
        add(manager, f"again {seed}", random_prompt(17, seed))
        run(manager)
    assert manager.computed["again 1"] == 1
    assert manager.computed["again 2"] > 1


def test_an_idle_block_that_is_a_hit_is_not_also_counted_as_free_capacity() -> None:
    """Shared blocks are in use when a request's need is checked; otherwise there would be too few pages."""
    manager = manager_of(8, preempts=False)
    add(manager, "first", random_prompt(28, 1))
    run(manager)
    add(manager, "a", random_prompt(28, 1), max_tokens=4)
    add(manager, "b", random_prompt(8, 2), max_tokens=4)
    step(manager)
    assert [sequence.seq_id for sequence in manager.running] == ["a"]
    assert not manager.waiting[0].table.blocks
    run(manager)
    check_all_returned(manager)


def test_a_request_that_finds_a_prefix_but_not_enough_pages_releases_it_and_waits() -> None:
    manager = manager_of(10, preempts=False)
    add(manager, "first", random_prompt(12, 1))
    run(manager)
    elsewhere = BlockTable(manager.allocator, 4)
    elsewhere.append_tokens(24)
    add(manager, "a", random_prompt(4, 2), max_tokens=8)
    manager.process_batch()
    add(manager, "b", random_prompt(12, 1), max_tokens=8)
    manager.process_batch()
    assert [sequence.seq_id for sequence in manager.waiting] == ["b"]
    assert manager.sequence("b").num_cached_tokens == 0
    assert manager.prefix.num_idle == 3
    manager.cancel("a")
    elsewhere.release()
    run(manager)
    assert manager.computed["b"] == 4 + 7
    check_all_returned(manager)


def test_512_requests_on_a_full_cache_are_all_served() -> None:
    """nano-vllm 211, 233: preempted, admitted again with a hit, and crashed."""
    manager = manager_of(64, max_seqs=512, budget=512)
    for i in range(512):
        prompt = [*random_prompt(24, i % 7)[: 5 + i % 20], 1 + i % 3]
        add(manager, str(i), prompt, max_tokens=20 + i % 30, n=1 + (i % 31 == 0))
    ended = 0
    for number in range(20_000):
        ready = list(manager.process_batch())
        manager.commit({seq_id: 1 + len(seq_id) + number % 3 + i for i, seq_id in enumerate(ready)})
        for seq_id in ready:
            if manager.sequence(seq_id).num_tokens >= manager.sequence(seq_id).max_len:
                manager.finish(seq_id)
                ended += 1
        if number % 10 == 0:
            check_pages(manager)
        if not manager.has_work:
            break
    check_all_returned(manager)
    assert ended == 512 + 17
    assert manager.num_preemptions > 100
    assert manager.prefix_stats.hits > 1000


def test_clearing_the_cache_while_requests_run_loses_only_hits() -> None:
    manager, prompt = manager_of(real=True), random_prompt(20, 1)
    engine, got = EngineCore(manager, (EOS,)), list[TokenOutput]()
    engine.add_request("a", prompt, GREEDY)
    engine.add_request("b", prompt, GREEDY)
    for _ in range(3):
        got += engine.step()
    cache_of(manager).clear()
    engine.add_request("c", prompt, GREEDY)
    while engine.has_work:
        got += engine.step()
        check_pages(manager)
    [alone] = answers(manager_of(real=True, shares=False), prompt)
    for name in "abc":
        assert comparable([output for output in got if output.request_id == name]) == comparable(alone)
    assert manager.computed["c"] == 20 + 5
    check_all_returned(manager)


@pytest.mark.parametrize("bits", [0, 1, 3])
def test_colliding_hashes_change_no_answer(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    def short_hash(parent: bytes, tokens: Seq[int]) -> bytes:
        return bytes([(sum(parent) + sum(tokens)) % 2**bits])

    prompts = [random_prompt(20, 1)[:n] + random_prompt(5, n) for n in (20, 12, 9, 4, 20, 16)]
    alone = [answers(manager_of(real=True, shares=False), prompt)[0] for prompt in prompts]
    monkeypatch.setattr(prefix_cache, "block_hash", short_hash)
    manager = manager_of(30, real=True)
    for _ in range(2):
        for prompt, expected in zip(prompts, alone, strict=True):
            assert comparable(answers(manager, prompt)[0]) == comparable(expected)
    for got, expected in zip(answers(manager, *prompts), alone, strict=True):
        assert comparable(got) == comparable(expected)


def test_resumed_beams_whose_common_prefix_is_cached_still_compute_a_token() -> None:
    """Their common prefix ends within a cached block: with no token left to compute, a step is empty."""
    manager = Watched(32, 8, 4, policies=policies(preempts=True, prefix=True))
    manager.add_request([1, 2, 3, 4], "r", SamplingParams(n=2, max_tokens=40), beam_search=True)
    for token in range(10, 19):
        [beam] = manager.process_batch()
        manager.advance("r", [BeamStep(beam, token)])
    [beam] = manager.process_batch()
    manager.advance("r", [BeamStep(beam, 100), BeamStep(beam, 200)])
    for token in range(20, 28):
        manager.advance("r", [BeamStep(seq_id, token) for seq_id in list(manager.process_batch())])
    tokens = {beam.seq_id: beam.tokens(0, beam.num_tokens) for beam in manager.running}
    manager._scheduler._preempt(manager.running[0], Plan())
    assert list(manager.process_batch()) == [], "only the common prefix is computed"
    assert [beam.num_computed for beam in manager.running] == [13], "12 of 13 were found"
    assert manager.happened["partial block hits"] == 1
    assert sorted(manager.process_batch()) == ["r/0", "r/1"]
    assert {beam.seq_id: beam.tokens(0, beam.num_computed) for beam in manager.running} == tokens
    check_pages(manager)
