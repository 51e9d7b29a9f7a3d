"""The engine's first two promises as functions, so that mutants of the engine can be run through the same
checks.

Scheduling never changes the answer: `check_scenario` serves many requests from a small pool and compares
every finished completion with the same completion computed alone: in one chunk, in a large pool, on one
thread. Pages are conserved: `check_pages` counts the holders of every block, and a listener that sees only
the block events must get the same counts.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiny_llm.beam_search import BeamSearch, BeamSearchParams
from tiny_llm.block_events import BlockWatch
from tiny_llm.compaction import compact_pages
from tiny_llm.engine_core import EngineCore
from tiny_llm.errors import RequestTooLargeError
from tiny_llm.grammar import Grammar
from tiny_llm.layer_groups import LayerGroup, group_layers
from tiny_llm.managers import sharing
from tiny_llm.model import Model
from tiny_llm.paged_attention import BlockCopy
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.paged_queues import BeamStep
from tiny_llm.policies import NoPreemption, NoPrefixSharing, Policies
from tiny_llm.preemption import NewestFirst
from tiny_llm.prefix_sharing import PrefixSharing
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.scheduler import AgedPriority
from tiny_llm.sequence import PagedSequence, Sequence, SequenceState, TokenLogprobs, completion_ids
from tiny_llm.sliding_window import WindowedTable
from tiny_llm.step import Plan, StepLogits
from tiny_llm.structured_outputs import StructuredOutputsParams
from tiny_llm.windowed_prefix import WindowedPrefixSharing

import tiny_llm_kernels
from grammars import toy_compiler
from mirror import Mirror
from tiny_llm import compaction
from tiny_model import EOS, VOCAB, examples, random_prompt

# Pages.


def check_pages(manager: PagedBatchManager) -> None:
    """Check that free + referenced = total, and that a table or the prefix cache holds each reference."""
    allocator = manager.allocator
    counted = [allocator.ref_count(block) for block in range(allocator.num_blocks)]
    waiting = [*manager.waiting, *manager._queues.set_aside]
    sequences = [*manager.running, *waiting]
    tables = [table for sequence in sequences for table in sequence.tables]
    held = Counter(block for table in tables for block in table.blocks)
    in_use = set(held)
    kept = manager.prefix.blocks
    assert len(set(kept)) == len(kept), "a block is cached twice"
    assert manager.prefix.num_idle == len(set(kept) - in_use), "idle blocks are miscounted"
    held.update(kept)
    assert counted == [held[block] for block in range(allocator.num_blocks)], "a reference that no table owns"
    assert allocator.num_free == counted.count(0), "free blocks and unreferenced blocks differ"
    for table in tables:
        assert len(set(table.blocks)) == len(table.blocks), "a table holds a block twice"
        assert len(table.blocks) == -(-table.num_tokens // table.block_size), (
            "a table holds blocks without tokens"
        )
    for sequence in sequences:
        assert sorted(sequence.blocks) == sorted(block for table in sequence.tables for block in table.blocks)
        check_tables(sequence, manager._layout.groups)
    assert all(not sequence.blocks for sequence in waiting), "a waiting sequence holds pages"
    for leader in sequences:
        for beam in leader.parked.beams if leader.parked else ():
            assert not beam.blocks, "a parked beam holds pages"
    check_prefix_order(manager)
    check_host(manager)


def check_host(manager: PagedBatchManager) -> None:
    """Check that every reference to a host block belongs to one waiting sequence."""
    space = manager._scheduler.swap_space
    if space is None:
        return
    held: Counter[int] = Counter()
    for sequence in [*manager.waiting, *manager._queues.set_aside]:
        assert (sequence.swapped is not None) == (sequence.state is SequenceState.SWAPPED)
        for table in sequence.swapped.tables if sequence.swapped else ():
            held.update(table.host_blocks)
    assert all(sequence.swapped is None for sequence in manager.running), (
        "a running sequence still has a swapped state"
    )
    counted = [space.allocator.ref_count(block) for block in range(space.allocator.num_blocks)]
    assert counted == [held[block] for block in range(len(counted))], (
        "a host block is not held by the waiting sequences as counted"
    )
    assert set(space._hash_of) <= set(held), "a host block can be found that no sequence holds"


def check_tables(sequence: PagedSequence, groups: Seq[LayerGroup]) -> None:
    """Check that each table ends at the last computed token and starts at the first block still visible."""
    for table, group in zip(sequence.tables, groups, strict=True):
        start = table.start if isinstance(table, WindowedTable) else 0
        assert sequence.num_computed == start + table.num_tokens, "a page for a token that is not computed"
        visible = 0 if group.window is None else max(0, sequence.num_computed - group.window + 1)
        assert start <= visible, "a page that the next query sees was released"
        assert visible < start + table.block_size or not table.blocks, "a page that no query sees is held"


def check_prefix_order(manager: PagedBatchManager) -> None:
    """Check that no idle block is evicted after its parent, and that a table's cached blocks have no gap."""
    if not isinstance(manager.prefix, PrefixSharing):
        return
    for sequence in manager.running:
        for table in sequence.tables:
            are_kept = [block in manager.prefix.cache for block in table.blocks]
            assert are_kept == sorted(are_kept, reverse=True), "a cached block after one that is not"
    if isinstance(manager.prefix, WindowedPrefixSharing):
        return  # blocks behind a window are evicted first, and those after them are usable without them
    queue = manager.prefix.cache._queue
    in_use = {block for sequence in manager.running for block in sequence.table.blocks}
    place = {digest: i for i, digest in enumerate(queue)}
    for digest, kept in queue.items():
        if kept.block not in in_use and kept.parent in queue:
            parent = queue[kept.parent]
            assert parent.block in in_use or place[kept.parent] > place[digest], (
                "a parent is evicted before its child"
            )


def arrival_order(manager: PagedBatchManager, arrivals: Mapping[str, int]) -> list[tuple[int, str]]:
    """Running and waiting sequences in the manager's order, as (arrival, sequence id)."""
    return [(arrivals[seq.request_id], seq.seq_id) for seq in [*manager.running, *manager.waiting]]


def check_first_come_first_served(manager: PagedBatchManager, arrivals: Mapping[str, int]) -> None:
    """Check that queues are in priority order and no sequence runs while an equal that came earlier waits."""
    for queue in (manager.running, manager.waiting):
        ranks = [sequence.rank for sequence in queue]
        assert ranks == sorted(ranks), f"a queue is out of order: {ranks}"
    if not any(sequence.params.priority for sequence in [*manager.running, *manager.waiting]):
        order = arrival_order(manager, arrivals)
        assert order == sorted(order), f"a request was overtaken: {order}"


def check_all_returned(manager: PagedBatchManager) -> None:
    """Check that nothing runs, nothing waits, and every block is free."""
    assert not manager.has_work
    assert not manager.running
    assert not manager.waiting
    kept = len(manager.prefix.blocks)
    space = manager._scheduler.swap_space
    assert space is None or space.allocator.num_free == space.allocator.num_blocks, "host blocks are missing"
    assert manager.allocator.num_free + kept == manager.allocator.num_blocks, (
        "pages are missing after the last request"
    )
    assert manager.prefix.evict(kept) == kept, "an unused block cannot be evicted"
    assert manager.allocator.num_free == manager.allocator.num_blocks, (
        "pages are missing after all are evicted"
    )


class Watched(PagedBatchManager):
    """A batch manager that counts events, and passes plans and compactions to its listeners."""

    def __init__(
        self,
        *args: object,
        watch: Callable[[Plan], None] = lambda plan: None,
        watch_moves: Callable[[list[BlockCopy]], None] = lambda copies: None,
        **options: object,
    ) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.happened: Counter[str] = Counter()
        self._watch = watch
        self._watch_moves = watch_moves
        self._preempted, self._scheduler._preempt = self._scheduler._preempt, self._preempt
        self._passed, self._scheduler._release_passed = self._scheduler._release_passed, self._release_passed

    def _schedule(self) -> Plan:
        had = {sequence.seq_id: sequence.num_computed for sequence in self.running}
        size = self.allocator.num_blocks
        plan = super()._schedule()
        self.happened["steps"] += 1
        self.happened["pool growths"] += self.allocator.num_blocks > size
        assert all(chunk.start < chunk.stop for chunk in plan.chunks), "a chunk without tokens"
        for sequence, start, *_ in plan.chunks:
            self.happened["prefix hits"] += start > had.get(sequence.seq_id, 0)
            self.happened["prefix hits under windows"] += (
                start > had.get(sequence.seq_id, 0) and self._layout._has_windows
            )
            self.happened["partial block hits"] += (
                start > had.get(sequence.seq_id, 0) and start % self.block_size != 0
            )
        self.happened["copies on write"] += len(plan.copies)
        self.happened["blocks swapped out"] += len(plan.swapped_out)
        self.happened["blocks swapped in"] += len(plan.swapped_in)
        chunks = [chunk for chunk in plan.chunks if chunk.stop < chunk.sequence.num_tokens]
        self.happened["chunked prompts"] += len(chunks)
        decodes = sum(chunk.stop - chunk.start == 1 and chunk.start > 0 for chunk in plan.chunks)
        self.happened["mixed steps"] += 0 < decodes < len(plan.chunks)
        self._watch(plan)
        return plan

    def _fork(self, leader: PagedSequence) -> list[PagedSequence]:
        forked = super()._fork(leader)
        self.happened["forks"] += len(forked) - 1
        return forked

    def _preempt(self, sequence: PagedSequence, plan: Plan) -> None:
        self.happened["preemptions"] += 1
        self.happened["preemptions after output"] += bool(sequence.outputs)
        self.happened["preemptions of beams"] += sequence.is_beam
        self._preempted(sequence, plan)
        self.happened["sequences swapped out"] += sequence.swapped is not None

    def _release_passed(self, sequence: PagedSequence) -> None:
        held = len(sequence.blocks)
        self._passed(sequence)
        self.happened["blocks released by windows"] += held - len(sequence.blocks)

    def compact(self) -> int:
        shown: list[BlockCopy] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compaction, "compact_pages", lambda *a: shown.extend(compact_pages(*a)) or shown)
            num_free = super().compact()
        self._watch_moves(shown)
        self.happened["blocks moved"] += len(shown)
        return num_free

    def advance(self, request_id: str, steps: Seq[BeamStep]) -> None:
        self.happened["beams forked"] += len(steps) - len({step.parent for step in steps})
        super().advance(request_id, steps)


# Scenarios.


@dataclass(frozen=True)
class Arrival:
    """A request, the step before which it arrives, and the step before which it is cancelled, if any.

    fails_after: number of tokens after which the last of several completions fails, as if its text could not
    be made.
    """

    step: int
    prompt: tuple[int, ...]
    params: SamplingParams | BeamSearchParams
    cancelled_at: int | None = None
    fails_after: int | None = None

    def fails(self, request_id: str, seq_id: str, num_tokens: int) -> bool:
        """Whether a completion fails with its token of this number, counted from 1."""
        is_last = self.width > 1 and seq_id == completion_ids(request_id, self.width)[-1]
        return is_last and num_tokens == self.fails_after

    @property
    def width(self) -> int:
        """The most sequences that it may have at once."""
        return self.params.beam_width if isinstance(self.params, BeamSearchParams) else self.params.n


@dataclass(frozen=True)
class Scenario:
    """Requests and the engine that serves them. `spare_blocks` are added to what the largest request needs.

    prefix: whether prefix caching is on. swap_blocks: blocks on the host for preempted sequences. grows:
    whether the pool starts with one block. compacted_at: the steps after which the pool is compacted. drafts:
    the most tokens that are guessed for a sequence in a step; 0: no speculation.
    """

    arrivals: tuple[Arrival, ...]
    block_size: int
    spare_blocks: int
    max_seqs: int
    max_tokens: int
    threads: int
    instruction_set: str
    preempts: bool
    prefix: bool = False
    swap_blocks: int = 0
    grows: bool = False
    compacted_at: tuple[int, ...] = ()
    drafts: int = 0


class Answer(NamedTuple):
    """The result of one completion: tokens, log-probabilities, the logits for each token, the finish reason.

    prompt_logprobs: what was delivered with each token: the prompt's log-probabilities with the first one, if
    requested.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...]
    logits: tuple[bytes, ...]
    prompt_logprobs: tuple[tuple[TokenLogprobs, ...] | None, ...]
    finish_reason: str | None


EVERYTHING = (LayerGroup((0,)),)


def policies(
    preempts: bool, prefix: bool = False, groups: Seq[LayerGroup] = EVERYTHING, swap_blocks: int = 0
) -> Policies:
    """Preemption by recompute, by swap or none; prefix caching on or off."""
    prefixes = sharing(groups) if prefix else NoPrefixSharing
    patience = 3  # small, so that a few requests are enough for one to be overtaken
    return Policies(
        NewestFirst() if preempts else NoPreemption(), prefixes, swap_blocks, AgedPriority(patience).key
    )


class PartlyRight:
    """Drafts that know the answers, and are wrong from a place on that depends on sequence and position.

    alone: the completions computed alone.
    """

    def __init__(self, alone: "Alone", most: int, threads: int) -> None:
        self._alone = alone
        self._most = most
        self._threads = threads

    def drafts(self, decodes: Seq[Sequence], num_rows: int, max_drafted: int) -> list[list[int]]:
        drafts = []
        for sequence in decodes:
            most = min(self._most, max_drafted, sequence.max_len - sequence.num_tokens - 1)
            drafts.append(self._draft(sequence, most) if most > 0 else [])
            max_drafted -= len(drafts[-1])
        with kernels_on(self._threads, self._alone.instruction_set):  # `Alone` uses one thread
            return drafts

    def observe(self, num_rows: int, seconds: float) -> None:
        """What a step costs changes nothing."""

    def _draft(self, sequence: Sequence, most: int) -> list[int]:
        params = replace(sequence.params, n=1, seed=sequence.seed)
        answer = self._alone.answer(sequence.prompt, params).tokens
        place, random = len(sequence.outputs), Random(f"{sequence.seq_id} {sequence.num_tokens}")
        assert tuple(sequence.outputs) == answer[:place], "other tokens than alone"
        right = list(answer[place : place + random.randint(0, most)])
        wrong = [random.randrange(3, 100) for _ in range(random.randint(0, most - len(right)))]
        return [*right, *wrong]


class Alone:
    """Completions computed alone on one thread, each once."""

    def __init__(self, model: Model, instruction_set: str) -> None:
        self.instruction_set = instruction_set
        self._model = model
        self._answers: dict[str, Answer] = {}

    def answer(self, prompt: tuple[int, ...], params: SamplingParams) -> Answer:
        key = repr((prompt, params))
        if key not in self._answers:
            with kernels_on(1, self.instruction_set):
                self._answers[key] = answer_alone(self._model, prompt, params)
        return self._answers[key]


def smallest_pool(scenario: "Scenario", groups: Seq[LayerGroup]) -> int:
    """The fewest blocks with which every request passes validation."""
    blocks = 1
    for arrival in scenario.arrivals:
        while not _admits(arrival, blocks, scenario, groups):
            blocks += 1
    return blocks


def _admits(arrival: Arrival, blocks: int, scenario: "Scenario", groups: Seq[LayerGroup]) -> bool:
    manager = PagedBatchManager(
        blocks,
        scenario.block_size,
        scenario.max_seqs,
        max_batched_tokens=max(scenario.max_tokens, scenario.max_seqs),
        max_model_len=10_000,
        policies=policies(scenario.preempts),
        groups=groups,
    )
    try:
        _add(EngineCore(manager, (EOS,)), "probe", arrival)
        return True
    except RequestTooLargeError:
        return False


@st.composite
def sampling(draw: st.DrawFn, most_tokens: int, vocab: int) -> SamplingParams:
    """Parameters of every kind, from small ranges, so that each drawn value matters."""
    max_tokens = draw(st.sampled_from([1, 2, most_tokens // 2, most_tokens - 1, most_tokens]))
    return SamplingParams(
        n=draw(st.sampled_from([1, 1, 1, 2, 3])),
        temperature=draw(st.sampled_from([0.0, 0.7, 1.0, 1.5])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.5])),
        top_k=draw(st.sampled_from([0, 1, 5, 40])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.1])),
        seed=draw(st.none() | st.integers(0, 2**40)),
        stop_token_ids=draw(st.sampled_from([None, None, tuple(range(0, vocab, 20))])),
        ignore_eos=draw(st.booleans()),
        max_tokens=max_tokens,
        min_tokens=draw(st.sampled_from([0, 0, max_tokens // 2, max_tokens])),
        logprobs=draw(st.sampled_from([None, 0, 3])),
        prompt_logprobs=draw(st.sampled_from([None, None, 0, 2])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.5, -1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.7, -0.3])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.8])),
        logit_bias=draw(st.sampled_from([None, None, {3: 4.0, vocab - 1: -100.0}, {EOS: 1.0}])),
        cache_salt=draw(st.sampled_from(["", "", "", "tenant"])),
        priority=draw(st.sampled_from([0, 0, 0, 0, -1, 2])),
        structured_outputs=draw(st.sampled_from([*[None] * len(FORMS), *FORMS])),
    )


# Short and long texts, with one way or many to go on; some must end, and some may.
FORMS = [
    StructuredOutputsParams(regex="[a-z]{2,}[0-9]?"),
    StructuredOutputsParams(regex="(ab|ac|[x-z]{3}){2,4}"),
    StructuredOutputsParams(regex="[!-~]*"),
    StructuredOutputsParams(choice=["yes", "no", "nobody", "yesterday"]),
    StructuredOutputsParams(grammar='start: "(" start ")" | /[a-f]+/'),
    StructuredOutputsParams(
        json={
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 3}},
            "required": ["a", "b"],
            "additionalProperties": False,
        }
    ),
]


def grammar_of(engine: EngineCore, params: SamplingParams) -> Grammar | None:
    """The compiled form of a request's text; tokens are the characters from "!" on."""
    if params.structured_outputs is None:
        return None
    assert isinstance(engine.manager, PagedBatchManager)
    model = engine.manager._model
    vocab_size = VOCAB if model is None else model.config.vocab_size
    return toy_compiler(vocab_size, VOCAB, EOS).compile(params.structured_outputs)


def threads(most: int) -> st.SearchStrategy[int]:
    """A number of threads for the compiled kernels; always drawn: every machine gets the same scenarios."""
    return st.integers(1, most).map(lambda number: number if tiny_llm_kernels.available() else 1)


def instruction_sets() -> st.SearchStrategy[str]:
    """An instruction set of this machine, "" without compiled kernels; drawn as if all had equally many."""
    sets = tiny_llm_kernels.instruction_sets() if tiny_llm_kernels.available() else [""]
    return st.integers(0, 11).map(lambda number: sets[number % len(sets)])


SPARE_BLOCKS = {"mixed": [0, 1, 2, 4, 30], "sharing": [4, 12], "searching": [0, 0, 1], "tight": [0, 0, 1]}


@st.composite
def scenarios(
    draw: st.DrawFn,
    *,
    most_requests: int = 6,
    longest_prompt: int = 30,
    most_tokens: int = 20,
    vocab: int = VOCAB,
) -> Scenario:
    """Requests that share a pool between barely large enough and large.

    In some scenarios the prompts share prefixes and the pool has space to cache them; some have beam
    searches; in some the pool has no spare block at all.
    """
    mix = draw(st.sampled_from(["mixed", "sharing", "searching", "tight", "tight", "tight"]))
    arrivals = []
    kinds = [sampling(most_tokens, vocab)] * 2
    kinds += [beam_searches(most_tokens)] if mix in ("mixed", "searching") else []
    for _ in range(draw(st.integers(min(3, most_requests), most_requests))):
        step = draw(st.sampled_from([0, 4, 9, 15] if mix == "sharing" else [0, 0, 1, 2, 6, 15]))
        arrivals.append(
            Arrival(
                step=step,
                prompt=draw(prompts(longest_prompt, share=mix == "sharing")),
                params=draw(
                    kinds[0] if mix == "searching" and not arrivals else draw(st.sampled_from(kinds))
                ),
                cancelled_at=draw(st.sampled_from([None] * 7 + [step + 9, step + 2, step])),
                fails_after=draw(st.sampled_from([None, None, 1, 3])),
            )
        )
    max_seqs = max(draw(st.integers(1, 9)), *(arrival.width for arrival in arrivals))
    return Scenario(
        arrivals=tuple(sorted(arrivals, key=lambda arrival: arrival.step)),
        block_size=draw(st.integers(5, 9) if mix == "sharing" else st.integers(1, 3) | st.integers(1, 17)),
        spare_blocks=draw(st.sampled_from(SPARE_BLOCKS[mix])),
        max_seqs=max_seqs,
        max_tokens=draw(st.sampled_from([max_seqs, max_seqs + 1, max_seqs + 5, 20, 64])),
        threads=draw(threads(4)),
        instruction_set=draw(instruction_sets()),
        preempts=mix in ("tight", "searching") or draw(st.sampled_from([True, True, False])),
        prefix=mix == "sharing" or draw(st.booleans()),
        swap_blocks=draw(st.sampled_from([0, 0, 1000, 1000, 7])),
        grows=draw(st.sampled_from([True, False, False])),
        compacted_at=draw(st.sampled_from([(), (), (2, 3, 9), tuple(range(0, 60, 2))])),
        drafts=draw(st.sampled_from([0, 0, 1, 3, 9])),
    )


@st.composite
def prompts(draw: st.DrawFn, longest: int, share: bool) -> tuple[int, ...]:
    """A piece of one of three long prompts, or most of one common prompt, with or without a suffix."""
    pieces = st.integers(longest // 2, longest) if share else st.integers(1, 6) | st.integers(1, longest)
    length = draw(pieces)
    shared = random_prompt(longest, seed=0 if share else draw(st.integers(0, 2)))[:length]
    tail = draw(st.integers(0, longest - length))
    return (*shared, *(random_prompt(tail, seed=draw(st.integers(3, 999))) if tail else ()))


@st.composite
def beam_searches(draw: st.DrawFn, most_tokens: int) -> BeamSearchParams:
    """Beam searches: narrow and wide, short and long."""
    return BeamSearchParams(
        beam_width=draw(st.sampled_from([1, 2, 2, 3, 4])),
        max_tokens=draw(st.sampled_from([1, 2, most_tokens // 2, most_tokens // 2, most_tokens])),
        ignore_eos=draw(st.booleans()),
        length_penalty=draw(st.sampled_from([1.0, 1.0, 0.0, -1.0, 2.0])),
        cache_salt=draw(st.sampled_from(["", "", "tenant"])),
    )


# Requests that are certain to fork, to be preempted, to be chunked, to share prefixes and to run a beam
# search.
MIXED_REQUESTS = Scenario(
    arrivals=(
        Arrival(0, tuple(random_prompt(9, 1)), SamplingParams(max_tokens=10, temperature=0.0, logprobs=2)),
        Arrival(
            0, tuple(random_prompt(5, 2)), SamplingParams(max_tokens=10, n=3, seed=5, top_p=0.9, logprobs=0)
        ),
        Arrival(1, tuple(random_prompt(30, 3)), SamplingParams(max_tokens=4, temperature=0.7, top_k=20)),
        Arrival(2, tuple(random_prompt(3, 4)), SamplingParams(max_tokens=10, min_p=0.05), cancelled_at=9),
        Arrival(3, tuple(random_prompt(9, 1)), BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True)),
    ),
    block_size=2,
    spare_blocks=1,
    max_seqs=6,
    max_tokens=11,
    threads=2,
    instruction_set="",
    preempts=True,
    prefix=True,
    grows=True,
    compacted_at=(4, 9),
)

# Prompts that end or diverge within a cached block.
ALIKE = Scenario(
    arrivals=(
        Arrival(0, tuple(random_prompt(30, 0)), SamplingParams(max_tokens=2, temperature=0.0)),
        Arrival(6, tuple(random_prompt(30, 0)[:22]), SamplingParams(max_tokens=6, logprobs=2, n=2)),
        Arrival(7, (*random_prompt(30, 0)[:22], 9, 8, 7), SamplingParams(max_tokens=6, temperature=0.0)),
        Arrival(7, tuple(random_prompt(30, 0)[:22]), BeamSearchParams(beam_width=2, max_tokens=4)),
    ),
    block_size=8,
    spare_blocks=12,
    max_seqs=6,
    max_tokens=20,
    threads=2,
    instruction_set="",
    preempts=True,
    prefix=True,
)

# A beam search that is preempted more than once, for a request that arrived before it.
SQUEEZED = Scenario(
    arrivals=(
        Arrival(0, tuple(random_prompt(4, 1)), SamplingParams(max_tokens=20, ignore_eos=True)),
        Arrival(1, tuple(random_prompt(7, 2)), BeamSearchParams(beam_width=3, max_tokens=7, ignore_eos=True)),
        Arrival(2, tuple(random_prompt(7, 2)), BeamSearchParams(beam_width=2, max_tokens=5)),
    ),
    block_size=2,
    spare_blocks=0,
    max_seqs=6,
    max_tokens=7,
    threads=2,
    instruction_set="",
    preempts=True,
)


# Requests that outgrow their pool, and are swapped out and in, some of them more than once.
SWAPPED = Scenario(
    arrivals=(
        Arrival(
            0, tuple(random_prompt(9, 1)), SamplingParams(max_tokens=16, ignore_eos=True, temperature=0.0)
        ),
        Arrival(0, tuple(random_prompt(7, 2)), SamplingParams(max_tokens=14, n=3, seed=5, ignore_eos=True)),
        Arrival(1, tuple(random_prompt(9, 1)), SamplingParams(max_tokens=12, seed=6, ignore_eos=True)),
        Arrival(2, tuple(random_prompt(12, 3)), SamplingParams(max_tokens=12, seed=7, logprobs=1)),
    ),
    block_size=3,
    spare_blocks=1,
    max_seqs=6,
    max_tokens=14,
    threads=2,
    instruction_set="",
    preempts=True,
    prefix=True,
    swap_blocks=100,
)


# The same in smaller blocks with none to spare, so that more sequences are swapped out.
SWAPPED_OFTEN = replace(SWAPPED, block_size=2, spare_blocks=0)


# Requests whose texts have a form, in a pool that is too small for all of them.
STRUCTURED = replace(
    SWAPPED,
    arrivals=tuple(
        Arrival(i // 2, tuple(random_prompt(9, i % 3)), replace(params, structured_outputs=FORMS[i]))
        for i, params in enumerate(
            (
                SamplingParams(max_tokens=16, n=3, seed=5, temperature=1.5),
                SamplingParams(max_tokens=14, n=2, seed=6, top_k=9, frequency_penalty=0.5),
                SamplingParams(max_tokens=12, seed=7, ignore_eos=True, min_tokens=4, logprobs=2),
                SamplingParams(max_tokens=12, temperature=0.0, logprobs=1),
                SamplingParams(max_tokens=14, n=3, seed=8, temperature=1.5),
                SamplingParams(max_tokens=16, temperature=0.0),
            )
        )
    ),
    max_seqs=11,
    max_tokens=20,
)


# Prompts that are computed together: steps with enough rows for each thread to compute some on its own.
MANY_ROWS = Scenario(
    arrivals=(
        Arrival(0, tuple(random_prompt(30, 1)), SamplingParams(max_tokens=8, temperature=0.0, logprobs=2)),
        Arrival(0, tuple(random_prompt(30, 2)), SamplingParams(max_tokens=6, n=2, seed=5, ignore_eos=True)),
        Arrival(0, tuple(random_prompt(28, 3)), SamplingParams(max_tokens=8, seed=6, prompt_logprobs=1)),
        Arrival(3, tuple(random_prompt(30, 1)), SamplingParams(max_tokens=4, temperature=0.0)),
        Arrival(3, tuple(random_prompt(29, 4)), SamplingParams(max_tokens=6, seed=7, ignore_eos=True)),
        Arrival(3, tuple(random_prompt(27, 5)), SamplingParams(max_tokens=6, temperature=0.0)),
    ),
    block_size=4,
    spare_blocks=60,
    max_seqs=8,
    max_tokens=200,
    threads=2,
    instruction_set="",
    preempts=True,
    prefix=True,
)


# Contexts of three partitions, whose attention is split among threads: chunks that end within a partition,
# decodes together with a prompt, and prefix hits.
LONG = Scenario(
    arrivals=(
        Arrival(0, tuple(random_prompt(250, 0)), SamplingParams(max_tokens=12, temperature=0.0, logprobs=1)),
        Arrival(3, tuple(random_prompt(250, 0)[:200]), SamplingParams(max_tokens=6, n=2, ignore_eos=True)),
        Arrival(5, tuple(random_prompt(300, 7)), SamplingParams(max_tokens=8, ignore_eos=True)),
        Arrival(6, tuple(random_prompt(250, 0)[:127]), SamplingParams(max_tokens=4, ignore_eos=True)),
    ),
    block_size=16,
    spare_blocks=12,
    max_seqs=6,
    max_tokens=64,
    threads=3,
    instruction_set="",
    preempts=True,
    prefix=True,
)


# Scheduling never changes the answer.


def check_scenario(model: Model, scenario: Scenario) -> Counter[str]:
    """Serve a scenario, check every promise at each step, and compare each answer with the one alone.

    Returns how often each relevant event happened, so that a test can check that it happens at all.
    """
    groups = group_layers(model.config.windows)
    blocks = scenario.spare_blocks + smallest_pool(scenario, groups)
    alone = Alone(model, scenario.instruction_set)
    chosen = policies(scenario.preempts, scenario.prefix, groups, scenario.swap_blocks)
    if scenario.drafts:
        chosen = replace(chosen, drafting=PartlyRight(alone, scenario.drafts, scenario.threads))
    manager = Watched(
        blocks,
        scenario.block_size,
        scenario.max_seqs,
        model=model,
        max_batched_tokens=max(scenario.max_tokens, scenario.max_seqs),
        policies=chosen,
        min_pages=1 if scenario.grows else None,
    )
    with kernels_on(scenario.threads, scenario.instruction_set):
        served = _serve(manager, scenario)
    check_all_returned(manager)
    drafted = manager.draft_stats
    manager.happened["guesses accepted"] = drafted.num_accepted_tokens
    manager.happened["guesses rejected"] = drafted.num_draft_tokens - drafted.num_accepted_tokens
    with kernels_on(1, scenario.instruction_set):
        for index, arrival in enumerate(scenario.arrivals):
            if isinstance(arrival.params, BeamSearchParams):
                _check_beams(model, str(index), arrival, served, manager.happened)
            else:
                _check_completions(alone, str(index), arrival, served, manager.happened)
    return manager.happened


def _check_completions(
    alone: Alone, request_id: str, arrival: Arrival, served: "Served", happened: Counter[str]
) -> None:
    """Check that each completion of a request that was not cancelled equals the one computed alone."""
    assert isinstance(arrival.params, SamplingParams)
    for i, seq_id in enumerate(completion_ids(request_id, arrival.params.n)):
        answer = served.answers[seq_id]
        if answer.finish_reason is None:
            assert arrival.cancelled_at is not None, f"completion {seq_id} never finished"
            happened["cancelled requests"] += 1
            continue
        params = replace(arrival.params, n=1, seed=served.seeds[request_id] + i)
        expected = alone.answer(arrival.prompt, params)
        if answer.finish_reason == "error":
            columns = (column[: len(answer.tokens)] for column in expected[:4])
            expected = Answer(*columns, "error")  # type: ignore[arg-type]
            happened["failed completions"] += 1
        check_same(seq_id, answer, expected)
        happened["answers compared"] += 1
        happened["structured answers compared"] += params.structured_outputs is not None


def _check_beams(
    model: Model, request_id: str, arrival: Arrival, served: "Served", happened: Counter[str]
) -> None:
    """Check that a search that was not cancelled found the same hypotheses as alone."""
    assert isinstance(arrival.params, BeamSearchParams)
    search = served.searches[request_id]
    if search.beams:
        assert arrival.cancelled_at is not None, f"search {request_id} never finished"
        happened["searches cancelled"] += 1
        return
    alone = _serve_alone(model, arrival.prompt, arrival.params).searches["0"]
    assert search.ended == alone.ended, f"search {request_id} found other hypotheses than alone"
    happened["searches compared"] += 1


def check_same(seq_id: str, answer: Answer, alone: Answer) -> None:
    """Compare bit for bit: tokens, log-probabilities, whole rows of logits, and the finish reason."""
    assert answer.tokens == alone.tokens, f"completion {seq_id} got other tokens than alone"
    assert answer.logits == alone.logits, f"completion {seq_id} got other logits than alone"
    assert answer.logprobs == alone.logprobs, f"completion {seq_id} got other log-probabilities than alone"
    assert answer.prompt_logprobs == alone.prompt_logprobs, (
        f"completion {seq_id} got other log-probabilities of its prompt than alone"
    )
    assert answer.finish_reason == alone.finish_reason, (
        f"completion {seq_id} finished for another reason than alone"
    )


def answer_alone(model: Model, prompt: tuple[int, ...], params: SamplingParams) -> Answer:
    """One completion, computed alone."""
    return _serve_alone(model, prompt, params).answers["0"]


def _serve_alone(
    model: Model, prompt: tuple[int, ...], params: SamplingParams | BeamSearchParams
) -> "Served":
    """Serve a request alone: a fresh engine, the prompt in one chunk, a large pool of blocks of 16."""
    arrival = Arrival(0, prompt, params)
    longest = len(prompt) + (params.max_tokens or 0)
    enough_blocks = longest * arrival.width * len(group_layers(model.config.windows))
    manager = Watched(enough_blocks, 16, arrival.width, model=model, max_batched_tokens=max(512, longest))
    return _serve(manager, Scenario((arrival,), 16, 0, arrival.width, 512, 1, "", False))


@contextmanager
def kernels_on(threads: int, instruction_set: str) -> Iterator[None]:
    """Run the compiled kernels, if they are built, on this many threads with this instruction set."""
    if tiny_llm_kernels.available():
        tiny_llm_kernels.set_num_threads(threads)
        tiny_llm_kernels.select_instruction_set(instruction_set or tiny_llm_kernels.instruction_set())
    yield


class Served(NamedTuple):
    """The results of a scenario: answers by sequence id, the seed of each request, searches by request id."""

    answers: dict[str, Answer]
    seeds: dict[str, int]
    searches: dict[str, BeamSearch]


def _add(engine: EngineCore, request_id: str, arrival: Arrival) -> BeamSearch | None:
    """Add an arriving request."""
    if isinstance(arrival.params, BeamSearchParams):
        return engine.add_beam_search(request_id, list(arrival.prompt), arrival.params)
    grammar = grammar_of(engine, arrival.params)
    assert engine.add_request(request_id, list(arrival.prompt), arrival.params, grammar)
    return None


def _serve(manager: Watched, scenario: Scenario) -> Served:
    """Run a scenario to its end."""
    engine = EngineCore(manager, (EOS,), seed=11)
    answers: dict[str, list[object]] = {}
    reasons: dict[str, str | None] = {}
    seeds: dict[str, int] = {}
    searches: dict[str, BeamSearch] = {}
    rows = _recorded_logits(manager)
    watch, mirror = BlockWatch(manager), Mirror()
    for step in range(_step_bound(scenario)):
        for index, arrival in enumerate(scenario.arrivals):
            if arrival.step == step:
                search = _add(engine, str(index), arrival)
                ids = completion_ids(str(index), arrival.width)
                if search is not None:
                    searches[str(index)] = search
                else:
                    answers |= {seq_id: [] for seq_id in ids}
                seeds[str(index)] = manager.sequence(ids[0]).seed
            if arrival.cancelled_at == step:
                engine.cancel(str(index))
        for output in engine.step():
            arrival = scenario.arrivals[int(output.request_id)]
            for one, row in zip((*output.earlier, output), rows[output.seq_id], strict=False):
                answers[output.seq_id].append((one.token, one.logprobs, row, one.prompt_logprobs))
                reasons[output.seq_id] = one.finish_reason
                num_tokens = len(answers[output.seq_id])
                if one.finish_reason is None and arrival.fails(output.request_id, output.seq_id, num_tokens):
                    reasons[output.seq_id] = "error"
                    if output.finish_reason is None:
                        engine.finish(output.seq_id)
                    break
        check_pages(manager)
        if step in scenario.compacted_at:
            _compact(manager)
        _check_events(manager, watch, mirror)
        check_first_come_first_served(manager, {str(i): i for i in range(len(scenario.arrivals))})
        if not engine.has_work and step >= max(arrival.step for arrival in scenario.arrivals):
            break
    assert not engine.has_work, f"not done after {_step_bound(scenario)} steps"
    complete = {
        seq_id: Answer(*(tuple(column) for column in zip(*got, strict=True)), reasons[seq_id])  # type: ignore[arg-type]
        if got
        else Answer((), (), (), (), None)
        for seq_id, got in answers.items()
    }
    return Served(complete, seeds, searches)


def _check_events(manager: Watched, watch: BlockWatch, mirror: Mirror) -> None:
    """Check that listeners know the state of the pool from its events, even one that has just started."""
    mirror.apply(watch.poll())
    mirror.check(manager)
    late = Mirror()
    late.apply(watch.snapshot())
    late.check(manager)


def _compact(manager: Watched) -> None:
    """Compact the pool, and check that the blocks in use are at its front."""
    allocator = manager.allocator
    before = {block for block in range(allocator.num_blocks) if allocator.ref_count(block)}
    num_free = manager.compact()
    after = {block for block in range(allocator.num_blocks) if allocator.ref_count(block)}
    assert after == set(range(len(before))), "blocks in use are not at the front"
    assert num_free == allocator.num_blocks - len(before)
    check_pages(manager)


def _step_bound(scenario: Scenario) -> int:
    """A bound on the steps to serve every request: the oldest always runs, a token per step or more."""
    work = sum(a.width * (len(a.prompt) + (a.params.max_tokens or 0)) for a in scenario.arrivals)
    return max(arrival.step for arrival in scenario.arrivals) + work + 1


def _recorded_logits(manager: PagedBatchManager) -> dict[str, list[bytes]]:
    """The bytes of each row of the last step by sequence id, refilled by each `process_batch`.

    A sequence has one row, and one more for each token of its draft.
    """
    recorded: dict[str, list[bytes]] = {}
    process_batch = manager.process_batch

    def recording() -> StepLogits:
        logits = process_batch()
        rows = None if logits.rows is None else np.array(logits.rows)
        recorded.clear()
        for seq_id, first in logits.row_of.items() if rows is not None else ():
            count = 1 + len(manager.sequence(seq_id).draft)
            recorded[seq_id] = [rows[row].tobytes() for row in range(first, first + count)]
        return logits

    manager.process_batch = recording  # type: ignore[method-assign]
    return recorded


# Mutants.


def assert_caught(check: Callable[[Scenario], object], strategy: st.SearchStrategy[Scenario]) -> None:
    """Fail unless the property fails on some example, as it must for a mutant of the engine."""

    @settings(
        max_examples=examples(60, quick=60),
        phases=[Phase.generate],
        report_multiple_bugs=False,
        database=None,
    )
    @given(strategy)
    def search(scenario: Scenario) -> None:
        check(scenario)

    with pytest.raises((AssertionError, LookupError)):
        search()


def keys_backwards(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """An attention that, for a single query, sums over its keys from the last to the first."""

    def attention(
        q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None
    ) -> mx.array:
        if q.shape[2] > 1 or mask is None:
            return function(q, k, v, scale, mask)
        return function(q, k[:, :, ::-1], v[:, :, ::-1], scale, mask[:, ::-1])

    return attention
