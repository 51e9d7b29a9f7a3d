"""Prefix caching under sliding windows: what each group of layers still needs is found, or it is computed.

A hit must never bring keys of another text (mlx-lm 1494): the oracle is the same request alone and without
sharing, token by token with its log-probabilities. The expected hit is found by trying all lengths, one by
one. The tokens that a step computes are counted in its plan.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llm.engine_core import EngineCore
from tiny_llm.layer_groups import LayerGroup, group_layers, layers_per_block
from tiny_llm.managers import sharing
from tiny_llm.model import Model
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.policies import NoPrefixSharing, Policies
from tiny_llm.preemption import NewestFirst
from tiny_llm.prefix_cache import PrefixCache
from tiny_llm.prefix_sharing import MIN_TOKENS_TO_COPY, PrefixSharing
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.sliding_window import first_visible
from tiny_llm.windowed_prefix import WindowedPrefixSharing

from counted import Counted
from promises import check_all_returned, check_pages, policies
from tiny_llm_checkpoints.model_config import SLIDING
from tiny_model import EOS, examples, gemma_model, random_prompt, tiny_model

Windows = tuple[int | None, ...]
Said = list[tuple[object, ...]]
MIXED: Windows = (None, 6)


def mistral_model() -> Model:
    """A tiny model in which all layers see 6 tokens: no group sees the whole prefix."""
    return tiny_model(sliding_window=6, layer_types=(SLIDING, SLIDING))


MODELS = {"gemma": gemma_model, "mistral": mistral_model}
any_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def manager_of(
    windows: Windows = MIXED,
    blocks: int = 200,
    block_size: int = 4,
    max_seqs: int = 8,
    *,
    budget: int = 256,
    preempts: bool = True,
) -> Counted:
    """Without a model, for layers with these windows."""
    groups = group_layers(windows)
    return Counted(
        blocks,
        block_size,
        max_seqs,
        max_batched_tokens=budget,
        max_model_len=blocks * block_size,
        policies=policies(preempts, prefix=True, groups=groups),
        groups=groups,
    )


def serving(
    model: Model,
    blocks: int = 200,
    block_size: int = 4,
    *,
    shares: bool = True,
    budget: int = 256,
    swap_blocks: int = 0,
) -> Counted:
    """A manager that computes."""
    prefix = sharing(group_layers(model.config.windows)) if shares else NoPrefixSharing
    those = Policies(NewestFirst(), prefix, swap_blocks)
    return Counted(blocks, block_size, 6, model=model, max_batched_tokens=budget, policies=those)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=2, ignore_eos=True)


def answers(manager: Counted, *prompts: Seq[int], max_tokens: int = 5) -> list[Said]:
    """The engine's answers to prompts that arrive together: tokens, log-probabilities and finish reasons."""
    engine, params = EngineCore(manager, (EOS,)), greedy(max_tokens)
    names = [f"{len(manager.computed)}:{i}" for i in range(len(prompts))]
    got: dict[str, Said] = {name: [] for name in names}
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, list(prompt), params)
    for _ in range(2_000):
        for output in engine.step():
            got[output.request_id].append((output.token, output.logprobs, output.finish_reason))
        check_pages(manager)
        if not engine.has_work:
            return list(got.values())
    raise AssertionError("a request is never served")


def last_computed(manager: Counted) -> int:
    """Tokens that the newest request computed, including all its outputs but the last."""
    return list(manager.computed.values())[-1]


def step(manager: Counted) -> None:
    """Run a step; every sequence that is ready gets a token, and finishes with its last."""
    ready = list(manager.process_batch())
    manager.commit(dict.fromkeys(ready, 1))
    for seq_id in ready:
        if manager.sequence(seq_id).num_tokens >= manager.sequence(seq_id).max_len:
            manager.finish(seq_id)
    check_pages(manager)


def run(manager: Counted, name: str, prompt: Seq[int], max_tokens: int = 1, **params: object) -> int:
    """Serve one request; returns how many tokens it computed."""
    sampling = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
    assert manager.add_request(list(prompt), name, sampling)
    finish(manager)
    return manager.computed[name]


def finish(manager: Counted) -> None:
    """Run steps until every request is served."""
    for _ in range(2_000):
        if not manager.has_work:
            return
        step(manager)
    raise AssertionError("a request is never served")


def cache_of(manager: PagedBatchManager) -> PrefixCache:
    assert isinstance(manager.prefix, PrefixSharing)
    return manager.prefix.cache


def longest_hit(manager: Counted, prompt: Seq[int]) -> int:
    """The most tokens of a prompt that need no computing: a prefix from which every group can go on.

    Whole blocks, then a part of one more.
    """
    size, cache = manager.block_size, cache_of(manager)
    streams = manager._layout.streams("")
    for stream in streams:
        stream.extend(list(prompt))

    def is_cached(group: LayerGroup, index: int, length: int) -> bool:
        seen = range(0 if group.window is None else first_visible(length * size, group.window), length * size)
        return all(cache.match(streams[index], block, block + 1) for block in {p // size for p in seen})

    most = (len(prompt) - 1) // size
    groups = list(enumerate(manager._layout.groups))
    full = next(n for n in range(most, -1, -1) if all(is_cached(group, i, n) for i, group in groups))
    known = prompt[full * size : min(len(prompt) - 1, (full + 1) * size)]
    matches = [cache.match_part(stream.parent(full), known) for stream in streams]
    part = min(match.length if match else 0 for match in matches)
    return full * size + (part if part >= MIN_TOKENS_TO_COPY else 0)


# ---- no keys of another text ----


@any_model
@pytest.mark.parametrize("block_size", [4, 8])
def test_prompts_that_diverge_anywhere_get_their_own_answers(
    make: Callable[[], Model], block_size: int
) -> None:
    """Oracle: the same prompt without a cache. One token differs; those after it are the same again."""
    base = random_prompt(30, 1)
    for place in range(30):
        prompt = [*base[:place], 9 if base[place] != 9 else 10, *base[place + 1 :]]
        manager = serving(make(), block_size=block_size)
        answers(manager, base)
        [got] = answers(manager, prompt)
        [alone] = answers(serving(make(), shares=False), prompt)
        assert got == alone, f"diverging at {place}"
        full, part = divmod(place, block_size)
        is_full = (full + 1) * block_size <= 34  # of the first prompt and its computed answer
        found = full * block_size + (part if is_full and part >= MIN_TOKENS_TO_COPY else 0)
        assert last_computed(manager) == 30 - found + 4, f"diverging at {place}"


@any_model
def test_equal_tokens_after_different_prefixes_have_different_keys(make: Callable[[], Model]) -> None:
    """Oracle: the prompt without a cache. All tokens within a window are the same, earlier ones differ."""
    common = random_prompt(40, 1)
    manager = serving(make())
    answers(manager, random_prompt(8, 2) + common)
    for seed, length in ((3, 8), (4, 4), (5, 12), (6, 1)):
        prompt = random_prompt(length, seed) + common
        [got] = answers(manager, prompt)
        assert got == answers(serving(make(), shares=False), prompt)[0]
        assert last_computed(manager) == len(prompt) + 4
    [got] = answers(manager, common)
    assert got == answers(serving(make(), shares=False), common)[0]
    assert last_computed(manager) == 40 + 4


@any_model
def test_under_windows_the_next_message_of_a_chat_finds_the_last_prompt_and_answer(
    make: Callable[[], Model],
) -> None:
    """Oracle: the whole conversation without a cache; both are longer than the window."""
    manager, prompt = serving(make()), random_prompt(21, 1)
    [first] = answers(manager, prompt, max_tokens=18)
    conversation = [*prompt, *(int(token) for token, *_ in first), *random_prompt(5, 2)]  # type: ignore[call-overload]
    [second] = answers(manager, conversation)
    assert second == answers(serving(make(), shares=False), conversation)[0]
    assert last_computed(manager) == 44 - 36 + 4, "39 - 1 tokens were computed: nine blocks of 4"


@any_model
def test_a_hit_within_a_block_is_copied_in_every_group_and_leaves_its_owner_unchanged(
    make: Callable[[], Model],
) -> None:
    """Oracle: both requests alone; and the cached part of the owner's pages, read before and after."""
    model, base = make(), random_prompt(40, 1)
    manager, params = serving(model, block_size=16), greedy(12)
    engine = EngineCore(manager, (EOS,))
    engine.add_request("owner", base, params)
    got: dict[str, Said] = {"owner": [], "other": []}

    def step() -> None:
        for out in engine.step():
            got[out.request_id].append((out.token, out.logprobs, out.finish_reason))
        check_pages(manager)

    def pages(blocks: Seq[int]) -> list[np.ndarray]:
        assert manager.pool is not None
        places = range(layers_per_block(group_layers(model.config.windows)))
        return [np.array(array) for place in places for array in manager.pool.read_blocks(place, blocks)]

    step()
    kept = list(manager.prefix.blocks)
    before = pages(kept)
    other = [*base[:27], *random_prompt(6, 2)]
    engine.add_request("other", other, params)
    while engine.has_work:
        step()
    assert all(np.array_equal(one, two) for one, two in zip(before, pages(kept), strict=True))
    assert manager.num_copies == len(group_layers(model.config.windows))
    assert manager.computed["other"] == 33 - 27 + 11
    for prompt, answer in ((base, got["owner"]), (other, got["other"])):
        assert [answer] == answers(serving(model, shares=False), prompt, max_tokens=12)


def test_tenants_with_different_salts_share_no_blocks_under_windows() -> None:
    """Oracle: by hand: 40 tokens, of which the last block is computed again."""
    manager, prompt = manager_of(), random_prompt(40, 1)
    for salt in ("one", "two", "", "1 one"):
        assert run(manager, salt, prompt, cache_salt=salt) == 40
    for salt in ("one", "two", "", "1 one"):
        assert run(manager, f"{salt} again", prompt, cache_salt=salt) == 4


@any_model
@pytest.mark.parametrize("swap_blocks", [0, 100])
@pytest.mark.parametrize(("blocks", "budget"), [(200, 64), (60, 16), (45, 256)])
def test_answers_are_the_same_with_the_cache_on_and_off(
    make: Callable[[], Model], blocks: int, budget: int, swap_blocks: int
) -> None:
    """Oracle: each prompt alone, without a cache. Small pools evict blocks, and preempt."""
    model = make()
    blocks = blocks if len(group_layers(model.config.windows)) > 1 else blocks // 3
    manager = serving(model, blocks, 5, budget=budget, swap_blocks=swap_blocks)
    streams = [random_prompt(40, seed) for seed in (1, 2)]
    prompts = [streams[i % 2][: 5 * (i % 7) + i] + random_prompt(1 + i % 4, 10 + i % 3) for i in range(10)]
    alone = [answers(serving(model, shares=False), prompt)[0] for prompt in prompts]
    for order in (range(10), range(9, -1, -2), range(0, 10, 3)):
        got = answers(manager, *(prompts[i] for i in order))
        assert got == [alone[i] for i in order]
    assert manager.prefix_stats.hits > 100
    check_all_returned(manager)


# ---- hits ----


@pytest.mark.parametrize("windows", [MIXED, (None, 1), (None, 4, 4), (None, 20), (5,), (3, 9)])
@pytest.mark.parametrize("length", [8, 16, 17, 31, 33])
def test_under_windows_a_fully_cached_prompt_computes_only_its_last_tokens(
    windows: Windows, length: int
) -> None:
    """Oracle: by hand, blocks of 4: windows have passed most of it, but no block was evicted."""
    manager, prompt = manager_of(windows), random_prompt(length, 1)
    assert run(manager, "first", prompt) == length
    assert run(manager, "again", prompt) == length - (length - 1) // 4 * 4


@pytest.mark.parametrize("windows", [MIXED, (None, 4, 4), (5,)])
@pytest.mark.parametrize("place", [4, 12, 20, 28, 36])
def test_a_prompt_that_diverges_far_before_the_window_finds_what_its_own_window_needs(
    windows: Windows, place: int
) -> None:
    """Oracle: by hand: the blocks before the divergence, wherever the first prompt's window ended."""
    manager, base = manager_of(windows), random_prompt(60, 1)
    run(manager, "first", base)
    assert run(manager, "other", base[:place] + random_prompt(10, 2)) == 10


def test_blocks_before_the_window_are_evicted_first_and_the_text_still_gets_a_hit() -> None:
    """Oracle: by hand: after 40 tokens in blocks of 4 a window of 6 needs two, and has passed eight."""
    base, more = random_prompt(40, 1), random_prompt(5, 2)
    for num_evicted in range(8 + 1):
        manager = manager_of()
        run(manager, "first", base)
        assert manager.prefix.num_idle == 20
        assert manager.prefix.evict(num_evicted) == num_evicted
        assert run(manager, "next message", base + more) == 5
    manager = manager_of()
    run(manager, "first", base)
    manager.prefix.evict(9)
    assert run(manager, "next message", base + more) == 45, "no hit ends before the end of the text"


def test_blocks_that_no_window_sees_are_evicted_first() -> None:
    """Oracle: by hand: the pool has 20 cached blocks; a text of 8 tokens takes four that no window needs."""
    base, more = random_prompt(40, 1), random_prompt(5, 2)
    manager = manager_of(blocks=24)
    run(manager, "first", base)
    assert (manager.allocator.num_free, manager.prefix.num_idle) == (4, 20)
    run(manager, "other", random_prompt(15, 3))
    assert manager.allocator.num_free + manager.prefix.num_idle == 24
    assert manager.prefix.num_idle < 20 + 6, "some were evicted"
    assert run(manager, "next message", base + more) == 5


@pytest.mark.parametrize("windows", [MIXED, (None, 9, 9), (5,), (None, 1), (3, 13)])
@pytest.mark.parametrize("block_size", [4, 7])
def test_after_any_evictions_the_longest_remaining_hit_is_found(windows: Windows, block_size: int) -> None:
    """Oracle: every length is tried, the longest first: is each block cached that the next query sees?"""
    base = random_prompt(45, 1)
    prompts = {
        "same": base,
        "next message": base + random_prompt(5, 2),
        "part": base[:30] + random_prompt(5, 3),
    }
    hits = set()
    for name, prompt in prompts.items():
        num_evicted = 0
        while True:
            manager = manager_of(windows, block_size=block_size)
            run(manager, "first", base, max_tokens=6)
            if num_evicted > manager.prefix.num_idle:
                break
            manager.prefix.evict(num_evicted)
            hit = longest_hit(manager, prompt)
            assert run(manager, name, prompt) == len(prompt) - hit, f"{num_evicted} blocks evicted"
            hits.add(hit)
            num_evicted += 1
    assert len(hits) > 2


@settings(max_examples=examples(100))
@given(
    windows=st.sampled_from([MIXED, (None, 9, 9), (5,), (None, 1), (3, 13), (None, 2, 5)]),
    block_size=st.sampled_from([4, 1, 5]),
    data=st.data(),
)
def test_a_block_that_is_missing_in_one_group_shortens_the_hit_of_all(
    windows: Windows, block_size: int, data: st.DataObject
) -> None:
    """Oracle: every length is tried. Any blocks may be missing, even those that are never evicted first."""
    base = random_prompt(40, 1)
    manager = manager_of(windows, block_size=block_size)
    run(manager, "first", base)
    cache = cache_of(manager)
    digests = sorted(cache._kept)
    for digest in data.draw(st.sets(st.sampled_from(digests), max_size=6)):
        cache._forget(digest)
    prompt = base[: data.draw(st.integers(1, 40))] + random_prompt(data.draw(st.integers(1, 9)), 2)
    hit = longest_hit(manager, prompt)
    assert run(manager, "other", prompt) == len(prompt) - hit
    check_all_returned(manager)


def test_a_partial_block_that_one_group_lacks_is_not_shared() -> None:
    """Oracle: by hand: blocks of 8, and 5 tokens of the third; then one group's block leaves the cache."""
    for lost in (None, 0, 1):
        manager, base = manager_of(block_size=8), random_prompt(40, 1)
        run(manager, "first", base)
        if lost is not None:
            stream = manager._layout.streams("")[lost]
            stream.extend(base)
            cache_of(manager)._forget(stream.hashes[2])
        prompt = base[:21] + random_prompt(6, 2)
        assert run(manager, "other", prompt) == 27 - (16 if lost is not None else 21)


# ---- waiting and capacity ----


@pytest.mark.parametrize("windows", [MIXED, (5,), (None, 4, 4)])
@pytest.mark.parametrize("budget", [256, 16, 9, 4])
def test_under_windows_equal_prompts_that_arrive_together_are_computed_once(
    windows: Windows, budget: int
) -> None:
    """Oracle: by hand: 22 tokens, of which the others compute the last two."""
    manager, prompt = manager_of(windows, budget=budget, max_seqs=4), random_prompt(22, 1)
    for name in "abcd":
        manager.add_request(prompt, name, SamplingParams(max_tokens=1))
    finish(manager)
    assert [manager.computed[name] for name in "abcd"] == [22, 2, 2, 2]
    assert manager.prefix_stats == (4 * 22, 3 * 20)


def test_a_text_that_is_read_again_and_again_is_in_the_pool_only_once() -> None:
    """Oracle: by hand: 40 tokens are 10 blocks in each of two groups."""
    manager, prompt = manager_of(), random_prompt(40, 1)
    for i in range(5):
        run(manager, str(i), prompt)
        assert manager.prefix.num_idle == len(manager.prefix.blocks) == 20
    check_all_returned(manager)


@pytest.mark.parametrize("preempts", [True, False])
@pytest.mark.parametrize("windows", [(None,), (4,), (None, 4), (None, 3, 3)])
@pytest.mark.parametrize("budget", [8, 5, 40])
def test_a_hit_within_a_block_leaves_capacity_for_its_copy(
    windows: Windows, budget: int, preempts: bool
) -> None:
    """Oracle: by hand: 3 blocks for all of 20 tokens, fewer in a window; the pool has no spare block.

    The second prompt has 15 tokens in common with the first: a block of 8, and a part of the next. It is
    served with that part or without it.
    """
    base = random_prompt(15, 1)
    groups = group_layers(windows)
    blocks = sum(group.max_blocks(21, 8, budget) for group in groups)
    manager = Counted(
        blocks,
        8,
        1,
        max_batched_tokens=budget,
        max_model_len=21,
        policies=policies(preempts, prefix=True, groups=groups),
        groups=groups,
    )
    run(manager, "first", base + random_prompt(5, 2))
    assert run(manager, "second", base + random_prompt(5, 3)) <= 20
    assert manager.num_preemptions == 0
    check_all_returned(manager)


def test_layers_with_full_attention_share_as_without_windows() -> None:
    """Oracle: the policy that a manager is given."""
    assert sharing(group_layers((None,) * 3)) is PrefixSharing
    manager = manager_of((5, 5))
    assert isinstance(manager.prefix, WindowedPrefixSharing)
