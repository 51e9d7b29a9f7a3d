"""The batch manager with its checks and steps in other orders, where the order is free."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import mlx.core as mx

from .batch_manager import Capacity, PrefixStats, longest
from .compaction import compact_memory
from .errors import RequestTooLargeError
from .kv_pool import KVPool
from .layer_groups import LayerGroup, group_layers
from .model import Model
from .page_layout import PageLayout
from .page_scheduler import PageScheduler
from .paged_attention import BlockAllocator
from .paged_queues import BeamStep, PagedQueues
from .policies import Policies, PrefixPolicy
from .queues import QueueViews
from .sampling_params import SamplingParams
from .sequence import PagedSequence, completion_ids
from .step import Plan, StepLogits


class PagedBatchManager(QueueViews[PagedSequence]):
    """Runs many requests at once over one pool of pages."""

    def __init__(
        self,
        max_pages: int,
        page_size: int,
        max_batch_size: int,
        *,
        model: Model | None = None,
        max_batched_tokens: int = 512,
        max_model_len: int | None = None,
        kv_dtype: mx.Dtype = mx.float16,
        policies: Policies | None = None,
        min_pages: int | None = None,
        groups: Seq[LayerGroup] | None = None,
    ) -> None:
        self.max_pages = max_pages
        self.block_size = page_size
        self._min_pages = min(max_pages, min_pages or max_pages)
        self.allocator = BlockAllocator(self._min_pages)
        self.pool: KVPool | None = (
            None if model is None else KVPool.for_model(model.config, self._min_pages, page_size, kv_dtype)
        )
        windows = (None,) if model is None else model.config.windows
        self._layout = PageLayout(tuple(groups or group_layers(windows)), page_size, max_batched_tokens)
        policies = policies or Policies()
        self._swap_pool: KVPool | None = (
            None
            if model is None or not policies.swap_blocks
            else KVPool.for_model(model.config, policies.swap_blocks, page_size, kv_dtype)
        )
        self.last_plan: Plan[PagedSequence] = Plan()
        self._queues: PagedQueues = PagedQueues(policies.turn)
        self._model = model
        self._max_seqs = max_batch_size
        self._context = max_model_len or (
            max_pages * page_size if model is None else model.config.max_position_embeddings
        )
        self._scheduler = PageScheduler(
            self._queues,
            self.allocator,
            policies,
            self._layout,
            max_seqs=max_batch_size,
            max_tokens=max_batched_tokens,
            max_blocks=max_pages,
        )

    def add_request(
        self,
        tokens: list[int],
        request_id: str,
        params: SamplingParams | None = None,
        seed: int = 0,
        *,
        beam_search: bool = False,
    ) -> bool:
        """Queue a request, and return True. It takes no pages."""
        if params is None:
            params = SamplingParams()
        self._queues.refuse_id_in_use(request_id, completion_ids(request_id, params.n))
        most = longest(tokens, params, request_id, self._context, self._max_seqs)
        one = self._new_leader(tokens, request_id, params, seed, most, is_beam=beam_search)
        self._refuse_what_never_fits(one)
        self._queues.add(one)
        return True

    def give_memory_back(self) -> None:
        """Halve a pool that is mostly unused: once a call, between two steps."""
        size = self.allocator.num_blocks
        held = size - self.allocator.num_free
        if (held - self.prefix.num_idle) * 4 < size and size // 2 >= self._min_pages:
            if held > size // 2:
                self.prefix.evict(held - size // 2)
            self.compact()
            if self.pool is not None:
                self.pool.resize(size // 2)
            self.allocator.resize(size // 2)

    def run_plan(self, plan: Plan[PagedSequence]) -> mx.array | None:
        """Compute a plan in one packed forward pass -> logits [R, vocab_size], or None if there are none."""
        pool, model = self.pool, self._model
        if pool is None or model is None:
            return None
        pool.resize(self.allocator.num_blocks)
        self._swap(pool, plan)
        pool.copy_blocks(plan.copies)
        if len(plan.chunks) == 0:
            return None
        ids, wanted = plan.pack()
        spans = [(chunk.sequence.tables, chunk.start, chunk.stop) for chunk in plan.chunks]
        scale = model.config.attention_scale
        out = model(
            mx.array(ids, mx.int32)[None],
            self._layout.context(pool, spans, scale, mx.array(wanted, mx.int32)),
        )
        if wanted:
            pool.start(out)
            return out[0]
        pool.evaluate()
        return None

    def process_batch(self) -> StepLogits:
        """Run one step; the logits of the sequences that are ready for their next token."""
        self.give_memory_back()
        plan = self._schedule()
        if not plan.is_empty:
            rows = self.run_plan(plan)
            self._scheduler.computed(plan)
            return plan.conclude(rows, self._fork)
        return StepLogits(None, {})

    def commit(self, tokens: Mapping[str, int]) -> None:
        """Append each sequence's sampled token, by sequence id."""
        for seq_id, token in tokens.items():
            self._queues[seq_id].outputs.append(token)

    def advance(self, request_id: str, steps: Seq[BeamStep]) -> None:
        """Continue a search with these beams, best first: each shares the pages of the beam it continues."""
        for parent in self._queues.advance(request_id, steps):
            self._scheduler.give_up(parent)

    def finish(self, seq_id: str) -> None:
        """End one sequence, waiting or running: its pages are freed. KeyError for an unknown or ended id."""
        self._scheduler.give_up(self._queues.end(seq_id))

    def cancel(self, request_id: str) -> None:
        """End every sequence of a request, whatever its state; unknown and ended ids are ignored."""
        for seq_id in self._queues.forget_forks_to_come(request_id):
            self.finish(seq_id)

    def recover(self) -> list[str]:
        """After a step that raised: all that ran wait again; returns the requests that it was to compute."""
        computing = self._scheduler.undo()
        settled = [pool.settle() for pool in (self.pool, self._swap_pool) if pool is not None]
        if not all(settled):
            self._scheduler.forget_everything()
        return computing

    def compact(self) -> int:
        """Move all blocks in use to the front of the pool, between two steps; returns how many are free."""
        tables = [table for sequence in self.running for table in sequence.tables]
        return compact_memory(self.allocator, [*tables, self.prefix], self.pool)

    @property
    def prefix(self) -> PrefixPolicy:
        """The policy that shares blocks by content."""
        return self._scheduler.prefix

    @property
    def num_preemptions(self) -> int:
        """The number of preemptions so far."""
        return self._scheduler.num_preemptions

    @property
    def num_swapped(self) -> int:
        """The number of sequences that wait with their keys and values on the host."""
        return self._scheduler.num_swapped

    @property
    def prefix_stats(self) -> PrefixStats:
        """How many prompt tokens there were, and how many of them were in the pool already."""
        return self._scheduler.prefix_stats

    @property
    def capacity(self) -> Capacity:
        """How full the pool is; blocks that it can still grow by count as free."""
        nbytes = 0 if self.pool is None else self.pool.nbytes
        to_come = self.max_pages - self.allocator.num_blocks
        swap_space = self._scheduler.swap_space
        return Capacity(
            num_blocks=self.max_pages,
            block_size=self.block_size,
            num_free=self.allocator.num_free + to_come,
            nbytes=nbytes,
            num_cached=self.prefix.num_idle,
            num_host_blocks=0 if swap_space is None else swap_space.allocator.num_blocks,
        )

    def _schedule(self) -> Plan[PagedSequence]:
        """Plan the next step, and take its pages."""
        self.last_plan = self._scheduler.plan()
        return self.last_plan

    def _swap(self, pool: KVPool, plan: Plan[PagedSequence]) -> None:
        """Copy a plan's swapped blocks to the host, then others back; nothing without a swap pool."""
        if self._swap_pool is not None:
            self._swap_pool.fill_from(pool, plan.swapped_out)
            pool.fill_from(self._swap_pool, [(host, block) for block, host in plan.swapped_in.items()])

    def _fork(self, leader: PagedSequence) -> list[PagedSequence]:
        """The sequences that share a ready sequence's logits: it, and its completions if they are to come."""
        return [leader] if leader.is_beam else self._queues.fork(leader)

    # Admission.

    def _new_leader(
        self,
        tokens: list[int],
        request_id: str,
        params: SamplingParams,
        seed: int,
        max_len: int,
        *,
        is_beam: bool,
    ) -> PagedSequence:
        """A request's leader: nothing computed, empty tables, `num_forks` for the completions to come."""
        return PagedSequence(
            seq_id=completion_ids(request_id, params.n)[0],
            request_id=request_id,
            prompt=tuple(tokens),
            params=params,
            seed=seed,
            max_len=max_len,
            tables=self._layout.tables(self.allocator),
            streams=self._layout.streams(params.cache_salt),
            num_forks=params.n - 1,
            is_beam=is_beam,
        )

    def _refuse_what_never_fits(self, leader: PagedSequence) -> None:
        """Raise `RequestTooLargeError` for a request that could not run even with the whole pool."""
        num_completions = 1 + leader.num_forks
        blocks = max(self._most_blocks(leader), self._scheduler.reserved_blocks(leader))
        if blocks > self.max_pages:
            raise RequestTooLargeError(
                f"request {leader.request_id!r}: up to {leader.max_len} tokens in {num_completions} "
                f"completions need {blocks} blocks of {self.block_size}; "
                f"the pool has {self.max_pages}",
                "n"
                if num_completions > 1 and self._layout.most_blocks(leader.max_len) <= self.max_pages
                else None,
            )

    def _most_blocks(self, leader: PagedSequence) -> int:
        """The most blocks that a request must have at once: beams run together, completions need not."""
        longest_one = self._layout.most_blocks(leader.max_len)
        per_fork = self._layout.blocks_of_fork(len(leader.prompt), leader.max_len)
        return longest_one + (leader.num_forks * per_fork if leader.is_beam else 0)
