"""Who computes what in the next step, and on which pages: admission, shared prefixes, room, preemption.

Plain bookkeeping over ints. Takes pages and gives them back; knows nothing of arrays, logits or text.
"""

from .batch_manager import PrefixStats, wanted
from .chunked_prefill import share_budget
from .errors import OutOfBlocksError, StuckRequestError
from .page_layout import PageLayout
from .paged_attention import BlockAllocator
from .paged_queues import PagedQueues
from .policies import Policies
from .sequence import PagedSequence, SequenceState
from .step import Plan, Scheduled
from .swap import SwapSpace


class PageScheduler:
    """Plans steps over the queues and the allocator of a batch manager.

    max_seqs: sequences that run at once, completions and beams to come included. max_tokens: in one step.
    max_blocks: what the pool may grow to; the allocator begins with as many or fewer.

    Every admitted sequence has its reserved blocks available: free, cached but idle, or not yet allocated.
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
        self._under_way: Plan[PagedSequence] = Plan()
        self._ran: list[PagedSequence] = []  # the sequences that ran when the step began
        self._swapped: set[PagedSequence] = set()  # all that are on the host, and perhaps some that were
        self.num_preemptions = 0
        self.num_swapped_out = 0
        self.prefix_stats = PrefixStats()
        self._queues = queues
        self._allocator = allocator
        self._layout = layout
        self._preemption = policies.preemption
        self._max_seqs = max_seqs
        self._max_tokens = max_tokens
        self._max_blocks = max_blocks

    @property
    def num_available(self) -> int:
        """Blocks that can be had: free, kept for nobody in particular, or not yet there."""
        return self._allocator.num_free + self.prefix.num_idle + self._max_blocks - self._allocator.num_blocks

    @property
    def num_swapped(self) -> int:
        """Sequences that wait with their keys and values on the host."""
        return sum(sequence.state is SequenceState.SWAPPED for sequence in self._swapped)

    def plan(self) -> Plan[PagedSequence]:
        """Admit what fits, share the token budget, and take the pages, preempting where they run out."""
        plan = self._under_way = Plan()
        self._ran = list(self._queues.running)
        self._admit(plan)
        self._share()
        running = list(self._queues.running)
        for sequence, count in zip(running, share_budget(self._wants(), self._max_tokens), strict=True):
            if count and sequence in self._queues.running:
                self._take(sequence, count, plan)
        return plan

    def computed(self, plan: Plan[PagedSequence]) -> None:
        """Take note that a plan is computed: its full blocks may be shared by content from now on."""
        for sequence in plan.returned:
            if self.swap_space is not None and sequence.state is SequenceState.RUNNING:
                self.swap_space.forget(sequence)
                self.prefix.keep(sequence, 0)
        for sequence, start, stop, _ in plan.chunks:
            sequence.num_computed = stop
            self.prefix.keep(sequence, start)
            self._release_passed(sequence)
            if start < len(sequence.prompt) <= stop and not sequence.outputs:
                queries, hits = self.prefix_stats
                found = sequence.num_cached_tokens
                self.prefix_stats = PrefixStats(queries + len(sequence.prompt), hits + found)
        self._under_way, self._ran = Plan(), []

    def undo(self) -> list[str]:
        """After a step that failed: everybody who ran waits again; the requests that it was to compute.

        What the step was to copy to the host is not there.
        """
        returned = {sequence.seq_id for sequence in self._under_way.returned}
        half_out = [sequence for sequence in self._queues.running if sequence.seq_id not in returned]
        for sequence in [*self._under_way.departed, *half_out]:
            self._forget_swapped(sequence)
        about_to_run = [self._queues.waiting[0]] if self._queues.waiting else []
        for sequence in [*reversed(self._queues.running)]:
            if sequence in self._queues.running:  # not put back yet, together with another beam
                self._put_back(sequence)
        for sequence in [*self._ran, *about_to_run]:
            self.give_up(sequence)  # no other waiting sequence can hold pages
        self.prefix.released(self.prefix.blocks)
        return list(dict.fromkeys(chunk.sequence.request_id for chunk in self._under_way.chunks))

    def forget_everything(self) -> None:
        """Nothing that was computed can be read any more: what is kept or waits on the host is given up."""
        self.prefix.evict(len(self.prefix.blocks))
        for sequence in self._swapped:
            self._forget_swapped(sequence)
        self._swapped.clear()

    def _forget_swapped(self, sequence: PagedSequence) -> None:
        """What a sequence has on the host is not to be had: it is computed again."""
        if self.swap_space is not None:
            self.swap_space.forget(sequence)
        if sequence.state is SequenceState.SWAPPED:
            sequence.state = SequenceState.WAITING

    def give_up(self, sequence: PagedSequence) -> None:
        """Take a sequence's pages away, and those on the host if it has ended."""
        blocks = sequence.blocks
        sequence.give_up_pages()
        self.prefix.released(blocks)
        if self.swap_space is not None and sequence.state is SequenceState.FINISHED:
            self.swap_space.forget(sequence)

    def reserved_blocks(self, sequence: PagedSequence) -> int:
        """Blocks that must stay available for a sequence beyond those that it holds."""
        tokens = self._preemption.reserved_tokens(sequence)
        own = self._layout.blocks_to_come(sequence, tokens)
        return own + sequence.num_forks * self._layout.blocks_of_fork(len(sequence.prompt), tokens)

    def _admit(self, plan: Plan[PagedSequence]) -> None:
        """Start waiting sequences, oldest first, while there are places and blocks to reserve for them."""
        if not self._queues.waiting:
            return
        reserved = sum(map(self.reserved_blocks, self._queues.running))
        seats = self._max_seqs - sum(1 + running.num_forks for running in self._queues.running)
        while self._queues.waiting:
            sequence = self._queues.waiting[0]
            if 1 + sequence.num_forks > seats:
                return
            self.prefix.adopt(sequence)
            needed = self.reserved_blocks(sequence)
            if reserved + needed > self.num_available:
                # Blocks that windows share are not expected back; those that the sequence computes alone are.
                self.give_up(sequence)
                needed = self.reserved_blocks(sequence)
            if reserved + needed > self.num_available:
                if not self._queues.running:
                    self._refuse_stuck(sequence, needed)
                return
            self._queues.start_next()
            self._swap_in(sequence, plan)
            reserved += needed
            seats -= 1 + sequence.num_forks

    def _swap_in(self, sequence: PagedSequence, plan: Plan[PagedSequence]) -> None:
        """Plan to bring back what a sequence left on the host, beyond what it found in the prefix cache."""
        if self.swap_space is None or sequence.swapped is None:
            return
        if sequence.num_computed < sequence.swapped.num_computed:
            self._fetch(self.swap_space.blocks_to_swap_in(sequence))
            found = sequence.blocks
            copies = self.swap_space.swap_in(sequence, self._queues.blocks_of_others(sequence))
            self.prefix.released([block for block in found if block not in sequence.blocks])
            plan.swapped_in.update(copies)
        plan.returned.append(sequence)

    def _share(self) -> None:
        """Let everybody who runs take what the prefix cache has by now, and parked beams join."""
        for sequence in list(self._queues.running):
            self.prefix.adopt(sequence)
            self._release_passed(sequence)
            if sequence.parked is not None and sequence.num_uncomputed == 0:
                self._queues.join(sequence)

    def _wants(self) -> list[int]:
        """Tokens that each running sequence wants to compute now.

        Nobody computes a block that somebody before is about to fill with the same: who waits, shares it.
        """
        wants, to_be_filled = [], set()
        for sequence in self._queues.running:
            block = self.prefix.next_block(sequence)
            waits = block in to_be_filled and sequence.is_at_edge
            wants.append(0 if waits else wanted(sequence))
            if block is not None:
                to_be_filled.add(block)
        return wants

    def _take(self, sequence: PagedSequence, count: int, plan: Plan[PagedSequence]) -> None:
        """Plan up to `count` tokens of a sequence and take their pages; none where it has to give way."""
        if sequence.blocks_to_append(count) + len(sequence.tables) <= self.num_available:
            self.prefix.adopt_part(sequence)
            self._release_passed(sequence)
            count = min(count, sequence.num_uncomputed)
            if sequence.blocks_to_append(count) > self.num_available:
                # Only what is left of the shared blocks' copies: their originals can be had again afterwards.
                size = sequence.table.block_size
                count = min(count, size - sequence.num_computed % size)
        if self._make_room(sequence, count, plan):
            start = sequence.num_computed
            copies = sequence.append_tokens(count)
            self.prefix.released([copy.src for copy in copies])
            plan.chunks.append(Scheduled(sequence, start, start + count, copies))

    def _release_passed(self, sequence: PagedSequence) -> None:
        """Release the blocks that the windows of a sequence have passed."""
        self.prefix.released(self._layout.release_passed(sequence.tables, sequence.num_computed))

    def _make_room(self, sequence: PagedSequence, count: int, plan: Plan[PagedSequence]) -> bool:
        """Find pages for `count` more tokens, preempting if need be; False: `sequence` had to give way."""
        while (needed := sequence.blocks_to_append(count)) > self.num_available:
            candidates = [other for other in self._queues.running if other.rank >= sequence.rank]
            victim = self._preemption.choose_victim(candidates)
            if victim is None:
                raise OutOfBlocksError(
                    f"sequence {sequence.seq_id!r} needs {needed} more blocks, {self.num_available} of "
                    f"{self._max_blocks} can be had, and nobody may be preempted"
                )
            self._preempt(victim, plan)
            plan.drop_who_stopped()
            if sequence not in self._queues.running:
                return False
        self._fetch(needed)
        return True

    def _fetch(self, num_blocks: int) -> None:
        """Make so many blocks free: the pool grows first, then kept blocks are given up."""
        short = num_blocks - self._allocator.num_free
        if short > 0:
            size = self._allocator.num_blocks
            self._allocator.resize(min(self._max_blocks, max(2 * size, size + short)))
            self.prefix.evict(num_blocks - self._allocator.num_free)

    def _preempt(self, sequence: PagedSequence, plan: Plan[PagedSequence]) -> None:
        """Take a running sequence's pages; it waits at the head of the queue to get them back.

        From the host, where that has room, or by computing them again. Beams of one search go together: they
        can only go on together, and compute again what they have in common.
        """
        if not sequence.is_beam:
            self._swap_out(sequence, plan)
        self._put_back(sequence)
        self.num_preemptions += 1

    def _put_back(self, sequence: PagedSequence) -> None:
        """Let a running sequence wait, without its pages, and its fellow beams with it."""
        for stopped in self._queues.put_back(sequence):
            self.give_up(stopped)
        if sequence.swapped is not None:
            sequence.state = SequenceState.SWAPPED
            still = {other for other in self._swapped if other.state is SequenceState.SWAPPED}
            self._swapped = still | {sequence}

    def _swap_out(self, sequence: PagedSequence, plan: Plan[PagedSequence]) -> None:
        """Plan to copy what a sequence has computed to the host, unless it is there, or there is no room."""
        if self.swap_space is None or sequence.swapped is not None or sequence.num_computed == 0:
            return
        chunks = (chunk for chunk in plan.chunks if chunk.sequence is sequence)
        copies = self.swap_space.swap_out(
            sequence, {copy.dst: copy.src for chunk in chunks for copy in chunk.copies}
        )
        if copies is not None:
            plan.swapped_out += copies
            plan.departed.append(sequence)
            self.num_swapped_out += 1

    def _refuse_stuck(self, sequence: PagedSequence, needed: int) -> None:
        """Refuse a request that waits for pages which nobody is left to give back: it has ended."""
        for seq_id in self._queues.forget_forks_to_come(sequence.request_id):
            self.give_up(self._queues.end(seq_id))
        raise StuckRequestError(
            f"request {sequence.request_id!r} needs {needed} blocks, {self.num_available} of "
            f"{self._max_blocks} can be had, and no running sequence will give any back",
            sequence.request_id,
        )
