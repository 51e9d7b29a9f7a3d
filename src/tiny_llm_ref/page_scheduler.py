"""Plans each step: admission, shared prefixes, the tokens that each sequence computes, pages, preemption.

Plain bookkeeping over ints. Allocates and frees pages; knows nothing of arrays, logits or text.
"""

from collections.abc import Sequence as Seq
from typing import NamedTuple

from .batch_manager import DraftStats, PrefixStats, tokens_wanted
from .chunked_prefill import share_budget
from .errors import OutOfBlocksError, StuckRequestError
from .page_layout import PageLayout
from .paged_attention import BlockAllocator
from .paged_queues import PagedQueues
from .policies import Policies
from .sequence import PagedSequence, SequenceState
from .speculation import num_accepted
from .step import Plan, Scheduled
from .swap import SwapSpace


class Drafted(NamedTuple):
    """A draft that a step checks, and the number of outputs that its sequence had before."""

    sequence: PagedSequence
    tokens: list[int]
    num_outputs: int


class PageScheduler:
    """Plans steps over the queues and the allocator of a batch manager.

    max_seqs: the maximum number of sequences that run at once; completions and beams that are still to be
    forked count. max_tokens: the maximum number of tokens in one step. max_blocks: the size to which the pool
    may grow; the allocator starts with at most that many blocks.

    Invariant: every admitted sequence has its reserved blocks available: free, cached but idle, or blocks by
    which the pool can still grow.
    """

    def __init__(
        self,
        queues: PagedQueues,
        allocator: BlockAllocator,
        policies: Policies,
        layout: PageLayout,
        *,
        max_seqs: int,
        max_tokens: int,
        max_blocks: int,
    ) -> None:
        self.prefix = policies.prefix(allocator, layout.block_size)
        self.swap_space = SwapSpace(policies.swap_blocks, layout.block_size) if policies.swap_blocks else None
        self._current_plan: Plan[PagedSequence] = Plan()
        self._running_before: list[PagedSequence] = []  # the running sequences before the current plan
        self._swapped: set[PagedSequence] = set()  # all swapped sequences, and some that no longer are
        self.num_preemptions = 0
        self.num_swapped_out = 0
        self.prefix_stats = PrefixStats()
        self.draft_stats = DraftStats()
        self._drafted: list[Drafted] = []  # the drafts of the current plan
        self._decodes_only = False  # the current plan has only decodes, and their drafts
        self._queues = queues
        self._allocator = allocator
        self._layout = layout
        self._preemption = policies.preemption
        self.drafting = policies.drafting
        self._max_seqs = max_seqs
        self._max_tokens = max_tokens
        self._max_blocks = max_blocks

    @property
    def num_available(self) -> int:
        """The number of available blocks: free, cached but idle, or blocks by which the pool can grow."""
        return self._allocator.num_free + self.prefix.num_idle + self._max_blocks - self._allocator.num_blocks

    @property
    def num_swapped(self) -> int:
        """The number of sequences that wait with their keys and values on the host."""
        return sum(sequence.state is SequenceState.SWAPPED for sequence in self._swapped)

    def plan(self) -> Plan[PagedSequence]:
        """Admit sequences, share the token budget, and allocate pages; preempt if there are too few."""
        plan = self._current_plan = Plan()
        self._running_before = list(self._queues.running)
        self._admit(plan)
        self._adopt_cached()
        running = list(self._queues.running)
        counts = share_budget(self._wanted_tokens(), self._max_tokens)
        for sequence, count in zip(running, counts, strict=True):
            if count and sequence in self._queues.running:
                self._plan_chunk(sequence, count, plan)
        self._plan_drafts(plan)
        return plan

    def computed(self, plan: Plan[PagedSequence]) -> None:
        """Record that a plan has been computed: its full blocks can be shared by content from now on."""
        for sequence in plan.swapped_in_sequences:
            if self.swap_space is not None and sequence.state is SequenceState.RUNNING:
                self.swap_space.forget(sequence)
                self.prefix.keep(sequence, 0)
        for sequence, start, stop, _ in plan.chunks:
            sequence.num_computed = stop - len(sequence.draft)
            self.prefix.keep(sequence, start)
            self._release_passed(sequence)
            if start < len(sequence.prompt) <= stop and not sequence.outputs:
                queries, hits = self.prefix_stats
                found = sequence.num_cached_tokens
                self.prefix_stats = PrefixStats(queries + len(sequence.prompt), hits + found)
        self._current_plan, self._running_before = Plan(), []

    def settle_drafts(self, plan: Plan[PagedSequence], seconds: float) -> None:
        """After the tokens of a plan are committed: keep the accepted tokens' pages, release the others.

        seconds: how long the step took.
        """
        if self._decodes_only:
            self.drafting.observe(sum(chunk.stop - chunk.start for chunk in plan.chunks), seconds)
        for sequence, draft, num_outputs in self._drafted:
            accepted = num_accepted(draft, sequence.outputs[num_outputs:])
            self.draft_stats = self.draft_stats.plus(len(draft), accepted)
            if sequence.draft:  # the sequence has not ended
                start = sequence.num_computed
                self.prefix.released(sequence.settle_draft())
                self.prefix.keep(sequence, start)
                self._release_passed(sequence)
        self._drafted = []

    def undo(self) -> list[str]:
        """After a step that failed, put all running sequences back into the queue.

        The copies to the host that the step had planned are treated as lost. Returns the ids of the requests
        that the step was to compute.
        """
        swapped_in = {sequence.seq_id for sequence in self._current_plan.swapped_in_sequences}
        half_out = [sequence for sequence in self._queues.running if sequence.seq_id not in swapped_in]
        for sequence in [*self._current_plan.swapped_out_sequences, *half_out]:
            self._drop_swapped(sequence)
        about_to_run = [self._queues.waiting[0]] if self._queues.waiting else []
        for sequence in [*reversed(self._queues.running)]:
            if sequence in self._queues.running:  # putting back another beam may have put this one back too
                self._put_back(sequence)
        for sequence in [*self._running_before, *about_to_run]:
            self.release(sequence)  # no other waiting sequence can hold pages
        self.prefix.released(self.prefix.blocks)
        return list(dict.fromkeys(chunk.sequence.request_id for chunk in self._current_plan.chunks))

    def drop_computed(self) -> None:
        """Drop all cached blocks and all blocks on the host, because their keys and values are lost."""
        self.prefix.evict(len(self.prefix.blocks))
        for sequence in self._swapped:
            self._drop_swapped(sequence)
        self._swapped.clear()

    def _drop_swapped(self, sequence: PagedSequence) -> None:
        """Release a sequence's blocks on the host; it will be recomputed."""
        if self.swap_space is not None:
            self.swap_space.forget(sequence)
        if sequence.state is SequenceState.SWAPPED:
            sequence.state = SequenceState.WAITING

    def release(self, sequence: PagedSequence) -> None:
        """Release a sequence's pages, and if it has ended, its blocks on the host."""
        blocks = sequence.blocks
        sequence.release_pages()
        self.prefix.released(blocks)
        if self.swap_space is not None and sequence.state is SequenceState.FINISHED:
            self.swap_space.forget(sequence)

    def reserved_blocks(self, sequence: PagedSequence) -> int:
        """Return how many blocks must stay available for a sequence in addition to those that it holds."""
        tokens = self._preemption.reserved_tokens(sequence)
        own = self._layout.blocks_to_come(sequence, tokens)
        return own + sequence.num_forks * self._layout.blocks_of_fork(len(sequence.prompt), tokens)

    def _admit(self, plan: Plan[PagedSequence]) -> None:
        """Start waiting sequences in order, while there are slots and blocks to reserve for the next one."""
        if not self._queues.waiting:
            return
        reserved = sum(map(self.reserved_blocks, self._queues.running))
        free_slots = self._max_seqs - sum(1 + running.num_forks for running in self._queues.running)
        while self._queues.waiting:
            sequence = self._queues.waiting[0]
            if 1 + sequence.num_forks > free_slots:
                return
            self.prefix.adopt(sequence)
            needed = self.reserved_blocks(sequence)
            if reserved + needed > self.num_available:
                # The window of a sequence frees its own blocks but not shared ones, and the reservation
                # takes that into account. So a sequence without shared blocks may need fewer.
                self.release(sequence)
                needed = self.reserved_blocks(sequence)
            if reserved + needed > self.num_available:
                if not self._queues.running:
                    self._reject_stuck(sequence, needed)
                return
            self._queues.start_next()
            self._swap_in(sequence, plan)
            reserved += needed
            free_slots -= 1 + sequence.num_forks

    def _swap_in(self, sequence: PagedSequence, plan: Plan[PagedSequence]) -> None:
        """Plan to copy a sequence's blocks back from the host, except those found in the prefix cache."""
        if self.swap_space is None or sequence.swapped is None:
            return
        if sequence.num_computed < sequence.swapped.num_computed:
            self._free_blocks(self.swap_space.blocks_to_swap_in(sequence))
            found = sequence.blocks
            copies = self.swap_space.swap_in(sequence, self._queues.blocks_of_others(sequence))
            self.prefix.released([block for block in found if block not in sequence.blocks])
            plan.swapped_in.update(copies)
        plan.swapped_in_sequences.append(sequence)

    def _adopt_cached(self) -> None:
        """Let running sequences share newly cached blocks, and let parked beams (see `Parked`) run again."""
        for sequence in list(self._queues.running):
            if sequence.num_uncomputed > 1:  # a decode must compute its only token
                self.prefix.adopt(sequence)
            self._release_passed(sequence)
            if sequence.parked is not None and sequence.num_uncomputed == 0:
                self._queues.join(sequence)

    def _wanted_tokens(self) -> list[int]:
        """Return how many tokens each running sequence could compute now.

        A sequence waits while an earlier one is about to fill the same block, which it can then share.
        """
        wants, to_be_filled = [], set()
        for sequence in self._queues.running:
            block = self.prefix.next_block(sequence)
            waits = block in to_be_filled and sequence.is_at_block_start
            wants.append(0 if waits else tokens_wanted(sequence))
            if block is not None:
                to_be_filled.add(block)
        return wants

    def _plan_chunk(self, sequence: PagedSequence, count: int, plan: Plan[PagedSequence]) -> None:
        """Plan up to `count` tokens of a sequence and allocate their pages; none if it is preempted."""
        shares = sequence.num_uncomputed > 1  # a decode must compute its only token
        if shares and sequence.blocks_to_append(count) + len(sequence.tables) <= self.num_available:
            self.prefix.adopt_part(sequence)
            self._release_passed(sequence)
            count = min(count, sequence.num_uncomputed)
            if sequence.blocks_to_append(count) > self.num_available:
                # Compute only to the end of the partly shared block. The copy takes one block, but the
                # original becomes available in exchange.
                size = sequence.table.block_size
                count = min(count, size - sequence.num_computed % size)
        if self._ensure_blocks(sequence, count, plan):
            start = sequence.num_computed
            copies = sequence.append_tokens(count)
            self.prefix.released([copy.src for copy in copies])
            plan.chunks.append(Scheduled(sequence, start, start + count, copies))

    def _plan_drafts(self, plan: Plan[PagedSequence]) -> None:
        """Extend the chunks of decodes by drafts, as far as budget and pages are left by everything else."""
        places = [i for i, chunk in enumerate(plan.chunks) if _may_draft(chunk)]
        self._drafted = []
        self._decodes_only = 0 < len(places) == len(plan.chunks)
        if not places:
            return
        num_rows = sum(chunk.stop - chunk.start for chunk in plan.chunks)
        decodes = [plan.chunks[i].sequence for i in places]
        drafts = self.drafting.drafts(decodes, num_rows, self._max_tokens - num_rows)
        for i, draft in zip(places, drafts, strict=True):
            plan.chunks[i] = self._with_draft(plan.chunks[i], draft)

    def _with_draft(self, chunk: Scheduled[PagedSequence], draft: Seq[int]) -> Scheduled[PagedSequence]:
        """Return the chunk extended by a draft, as far as pages are available and its grammar allows."""
        sequence, start, stop, copies = chunk
        length = len(draft) if sequence.grammar is None else sequence.grammar.num_drafted(draft)
        while length and sequence.blocks_to_append(length) > self.num_available:
            length -= 1
        if not length:
            return chunk
        self._free_blocks(sequence.blocks_to_append(length))
        sequence.draft = list(draft[:length])
        self._drafted.append(Drafted(sequence, sequence.draft, len(sequence.outputs)))
        return Scheduled(sequence, start, stop + length, [*copies, *sequence.append_tokens(length)])

    def _release_passed(self, sequence: PagedSequence) -> None:
        """Release the blocks that the windows of a sequence have passed."""
        self.prefix.released(self._layout.release_passed(sequence.tables, sequence.num_computed))

    def _ensure_blocks(self, sequence: PagedSequence, count: int, plan: Plan[PagedSequence]) -> bool:
        """Free enough blocks for `count` more tokens, preempting others if needed.

        Returns False if `sequence` itself was preempted. Raises `OutOfBlocksError` if the preemption policy
        allows no preemption.
        """
        while (needed := sequence.blocks_to_append(count)) > self.num_available:
            candidates = [other for other in self._queues.running if other.rank >= sequence.rank]
            victim = self._preemption.choose_victim(candidates)
            if victim is None:
                raise OutOfBlocksError(
                    f"sequence {sequence.seq_id!r} needs {needed} more blocks, but only "
                    f"{self.num_available} of {self._max_blocks} are available, "
                    "and no sequence may be preempted"
                )
            self._preempt(victim, plan)
            plan.drop_stopped_sequences()
            if sequence not in self._queues.running:
                return False
        self._free_blocks(needed)
        return True

    def _free_blocks(self, num_blocks: int) -> None:
        """Make at least `num_blocks` blocks free: first the pool grows, then cached blocks are evicted."""
        short = num_blocks - self._allocator.num_free
        if short > 0:
            size = self._allocator.num_blocks
            self._allocator.resize(min(self._max_blocks, max(2 * size, size + short)))
            self.prefix.evict(num_blocks - self._allocator.num_free)

    def _preempt(self, sequence: PagedSequence, plan: Plan[PagedSequence]) -> None:
        """Release a running sequence's pages; it waits again, at its place in the order of service.

        Its keys and values are swapped to the host if that has enough free blocks, or recomputed later. The
        beams of a search are preempted together, because they can only advance together; when they are
        recomputed, their common tokens are computed once.
        """
        if not sequence.is_beam:
            self._swap_out(sequence, plan)
        self._put_back(sequence)
        self.num_preemptions += 1

    def _put_back(self, sequence: PagedSequence) -> None:
        """Let a running sequence wait, without its pages, together with the other beams of its search."""
        for stopped in self._queues.return_to_waiting(sequence):
            self.release(stopped)
        if sequence.swapped is not None:
            sequence.state = SequenceState.SWAPPED
            still = {other for other in self._swapped if other.state is SequenceState.SWAPPED}
            self._swapped = still | {sequence}

    def _swap_out(self, sequence: PagedSequence, plan: Plan[PagedSequence]) -> None:
        """Plan to copy a sequence's computed blocks to the host, unless they are already there.

        Plans nothing if the host has too few free blocks.
        """
        if self.swap_space is None or sequence.swapped is not None or sequence.num_computed == 0:
            return
        chunks = (chunk for chunk in plan.chunks if chunk.sequence is sequence)
        copies = self.swap_space.swap_out(
            sequence, {copy.dst: copy.src for chunk in chunks for copy in chunk.copies}
        )
        if copies is not None:
            plan.swapped_out += copies
            plan.swapped_out_sequences.append(sequence)
            self.num_swapped_out += 1

    def _reject_stuck(self, sequence: PagedSequence, needed: int) -> None:
        """End a request for which no running sequence can free pages, and raise `StuckRequestError`."""
        for seq_id in self._queues.remove_pending_forks(sequence.request_id):
            self.release(self._queues.end(seq_id))
        raise StuckRequestError(
            f"request {sequence.request_id!r} needs {needed} blocks, but only {self.num_available} of "
            f"{self._max_blocks} are available, and no running sequence will free any",
            sequence.request_id,
        )


def _may_draft(chunk: Scheduled[PagedSequence]) -> bool:
    """True if the chunk is a decode that continues a completion: its only token is the newest output."""
    sequence = chunk.sequence
    is_decode = chunk.start == sequence.num_tokens - 1 and bool(sequence.outputs)
    return is_decode and not sequence.is_beam
