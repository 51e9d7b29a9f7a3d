"""How a model's keys and values are laid out in pages: which tables a sequence has, and how many blocks.

Everything that depends on windows is here, so the scheduler only knows sequences and blocks.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from .kv_context import KVContext
from .kv_pool import KVPool
from .layer_groups import LayerGroup
from .paged_attention import BlockAllocator, BlockTable
from .paged_kernel import PagedContext, Span, pack_batch
from .prefix_cache import TokenBlocks
from .sequence import PagedSequence
from .sliding_window import WindowedContext, WindowedTable, first_visible


@dataclass(frozen=True)
class PageLayout:
    """The layout of a model's layers in blocks.

    groups: the groups of layers. block_size: tokens in a block. most_tokens: the maximum number of tokens
    that one step computes for a sequence.
    """

    groups: tuple[LayerGroup, ...]
    block_size: int
    most_tokens: int

    def tables(self, allocator: BlockAllocator) -> list[BlockTable]:
        """Return empty tables for a sequence, one for each group."""
        kinds = (BlockTable if group.window is None else WindowedTable for group in self.groups)
        return [kind(allocator, self.block_size) for kind in kinds]

    def streams(self, salt: str) -> list[TokenBlocks]:
        """Return empty token streams for a sequence, one for each group; no two get the same hashes."""
        salts = [salt] if len(self.groups) == 1 else [f"{i} {salt}" for i in range(len(self.groups))]
        return [TokenBlocks(self.block_size, salt) for salt in salts]

    def max_blocks(self, num_tokens: int) -> int:
        """Return how many blocks a sequence may hold at once while it grows to `num_tokens` tokens."""
        return sum(self._most(group, num_tokens) for group in self.groups)

    def blocks_to_come(self, sequence: PagedSequence, num_tokens: int) -> int:
        """Return how many free blocks a sequence may still take while it grows to `num_tokens` tokens.

        Blocks that its windows will release are not counted as free: other tables may hold them too.
        """
        more = max(0, num_tokens - sequence.num_computed)
        pairs = zip(self.groups, sequence.tables, strict=True)
        return sum(min(table.blocks_to_append(more), self._most(group, num_tokens)) for group, table in pairs)

    def blocks_of_fork(self, num_shared: int, num_tokens: int) -> int:
        """Return how many blocks a fork may take while it grows to `num_tokens` tokens.

        num_shared: the tokens that it shares with its parent; their full blocks need no copies.
        """
        own = max(0, -(-num_tokens // self.block_size) - num_shared // self.block_size)
        return sum(min(own, self._most(group, num_tokens)) for group in self.groups)

    def release_passed(self, tables: Seq[BlockTable], position: int) -> list[int]:
        """Release the blocks that no query at `position` or later sees; return them, table by table."""
        passed: list[int] = []
        if not self._has_windows:
            return passed
        for group, table in zip(self.groups, tables, strict=True):
            if isinstance(table, WindowedTable) and group.window is not None:
                passed += table.release_before(first_visible(position, group.window))
        return passed

    def context(
        self,
        pool: KVPool,
        spans: Seq[tuple[Seq[BlockTable], int, int]],
        scale: float,
        logit_rows: mx.array | None,
    ) -> KVContext:
        """Return the context of one packed forward pass.

        spans: (tables, start, stop) of each chunk, in packed order: its sequence's tables and positions.
        """
        batches = [
            pack_batch([Span(tables[i], start, stop) for tables, start, stop in spans])
            for i in range(len(self.groups))
        ]
        if self._has_windows:
            return WindowedContext(pool, self.groups, batches, scale, logit_rows)
        return PagedContext(pool, batches[0], scale, logit_rows)

    @cached_property
    def _has_windows(self) -> bool:
        return any(group.window is not None for group in self.groups)

    def _most(self, group: LayerGroup, num_tokens: int) -> int:
        return group.max_blocks(num_tokens, self.block_size, self.most_tokens)
