"""A cache of full blocks by content: prompts with the same prefix reuse its keys and values.

The cache holds one reference to each block that it keeps. When the pool needs free blocks, it evicts idle
ones: the least recently used first, and within one prompt the last block first. Ints and bytes only; knows
nothing of arrays, or of which sequences run.

Source: vLLM's automatic prefix caching. Its first hashes were predictable (CVE-2025-25183). Therefore this
cache uses SHA-256, compares the tokens as well, and uses a salt to separate streams that must not share
blocks.
"""

from array import array
from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import NamedTuple

from .paged_attention import BlockAllocator, BlockTable


def block_hash(parent: bytes, tokens: Seq[int]) -> bytes:
    """Return the hash of a full block and of all blocks before it: 32 bytes, equal for equal texts.

    parent: the hash of the previous block, which covers all blocks before it in the same way. tokens: the
    block's token ids, a list or a tuple. The parent is part of the hash because a block's keys and values
    depend on all tokens before it.

    The hash is the SHA-256 digest of the parent's bytes followed by the tokens' bytes. Each id takes 8 bytes,
    as a signed integer in the machine's byte order, with nothing between two ids. Because the size is fixed,
    different lists have different bytes (as decimal text, [1, 23] and [12, 3] would both be "123"). With
    SHA-256 a client cannot construct a second text with the same hash.

    >>> root = bytes(32)
    >>> len(block_hash(root, [5, 6])), block_hash(root, [5, 6]) == block_hash(root, (5, 6))
    (32, True)
    >>> block_hash(block_hash(root, [1, 2]), [5, 6]) == block_hash(root, [5, 6])
    False
    """
    return sha256(parent + array("q", tokens).tobytes()).digest()


class TokenBlocks:
    """A token stream cut into full blocks.

    tokens: the tokens of each block. hashes: the hash of each block, which covers all blocks before it too.
    salt: streams with different salts have different hashes in every block.
    """

    def __init__(self, block_size: int, salt: str = "") -> None:
        self.block_size = block_size
        self.tokens: list[tuple[int, ...]] = []
        self.hashes: list[bytes] = []
        self._root = sha256(salt.encode()).digest()

    def __len__(self) -> int:
        """Number of full blocks."""
        return len(self.hashes)

    def extend(self, token_ids: Seq[int]) -> None:
        """Append the full blocks of the stream's next tokens.

        For each full block, append its tokens as a tuple to `tokens`, and its `block_hash` to `hashes`. Its
        parent is `parent(index)`, where `index` is the new block's number: the hash of the previous block, or
        the salt's hash for block 0. Tokens that do not fill a block at the end are dropped: the caller passes
        them again, as the first ones of its next call.

        >>> stream = TokenBlocks(4)
        >>> stream.extend(range(11))
        >>> stream.extend(range(8, 14))
        >>> stream.tokens
        [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
        """
        for start in range(0, len(token_ids) - self.block_size + 1, self.block_size):
            tokens = tuple(token_ids[start : start + self.block_size])
            self.hashes.append(block_hash(self.parent(len(self)), tokens))
            self.tokens.append(tokens)

    def parent(self, index: int) -> bytes:
        """Return the parent of block `index`: the hash of the previous block, or the salt's for block 0."""
        return self.hashes[index - 1] if index else self._root

    def copy(self) -> "TokenBlocks":
        """Return a second, independent stream with the same blocks."""
        return self.tail(0)

    def tail(self, first: int) -> "TokenBlocks":
        """Return a stream of the blocks from `first` on; its block 0 has the parent of block `first`."""
        other = TokenBlocks(self.block_size)
        other._root, other.tokens, other.hashes = self.parent(first), self.tokens[first:], self.hashes[first:]
        return other


@dataclass(slots=True)
class KeptBlock:
    """A kept block, the tokens whose keys and values it holds, and the hash of the previous block."""

    block: int
    tokens: tuple[int, ...]
    parent: bytes

    def is_block(self, stream: TokenBlocks, index: int) -> bool:
        """True if it holds block `index` of a stream: the tokens and the parent are equal."""
        return self.tokens == stream.tokens[index] and self.parent == stream.parent(index)


class PartMatch(NamedTuple):
    """A kept block whose first `length` tokens equal the requested ones; the next one, if any, differs."""

    block: int
    length: int


class PrefixCache:
    """Keeps full blocks after their tables have released them, until the pool needs free blocks.

    Every block of the pool is in one of four states; `allocator.ref_count` counts its holders:

    - free: no holder. When a table allocates it, it becomes private.
    - private: held by tables only. `add` changes it to in use; when the last table releases it, it is free.
    - in use: held by the cache and by at least one table. When the last table releases it, `released` makes
      it idle.
    - idle: held by the cache only, and in the queue. `share` and `exchange` change it to in use again;
      `evict` frees it.

    "Kept" means in use or idle. Invariants: the allocator counts the cache as one holder of each kept block.
    The queue holds exactly the idle blocks, in the order of eviction. Three more invariants hold as long as
    no window (day 3.5) has passed a block's parent: the parent of a kept block is kept, a table that holds a
    kept block also holds its parent, and in the queue a block comes before its parent.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        self.block_size = block_size
        self._allocator = allocator
        self._kept: dict[bytes, KeptBlock] = {}  # every kept block, by its hash
        self._queue: OrderedDict[bytes, KeptBlock] = OrderedDict()  # the idle ones, next to be evicted first
        self._hash_of: dict[int, bytes] = {}  # the hash of every kept block, by the block's id
        self._newest_child: dict[tuple[bytes, int], bytes] = {}  # a hash, by its parent and first token

    def __len__(self) -> int:
        """Number of kept blocks."""
        return len(self._kept)

    def __contains__(self, block: int) -> bool:
        """True if a block is kept."""
        return block in self._hash_of

    @property
    def blocks(self) -> list[int]:
        """The ids of all kept blocks."""
        return [kept.block for kept in self._kept.values()]

    @property
    def hash_of(self) -> Mapping[int, bytes]:
        """The hash of each kept block, by the block's id; do not change it."""
        return self._hash_of

    @property
    def idle(self) -> list[int]:
        """The ids of the idle blocks, the next to be evicted first."""
        return [kept.block for kept in self._queue.values()]

    @property
    def num_idle(self) -> int:
        """The number of idle blocks, which `evict` could free now."""
        return len(self._queue)

    def hashes(self, limit: int | None = None) -> list[bytes]:
        """The hashes of the kept blocks, at most `limit` of them; a block's comes after that of its parent.

        If there are more, the idle blocks that will be evicted first are left out, then the blocks in use
        that were kept last. So the result never has a block without its parent, as long as no window has
        passed the parent.
        """
        if limit is None or len(self._kept) <= limit:
            return list(self._kept)
        in_use = [digest for digest in self._kept if digest not in self._queue]
        return [*in_use[:limit], *islice(reversed(self._queue), max(0, limit - len(in_use)))]

    def add(self, block: int, stream: TokenBlocks, index: int) -> None:
        """Keep a table's block, which holds block `index` of a stream and whose hash is not kept yet.

        Count the cache as one more holder. Enter the block in three dicts; `_forget` undoes all of this:

        - `_kept`: a `KeptBlock`, by the block's hash `stream.hashes[index]`. Its parent is
          `stream.parent(index)`.
        - `_hash_of`: the hash, by the block's id.
        - `_newest_child`: the hash, by (parent, first token). It replaces the hash of an older block.

        A table holds the block, so it is in use and does not enter the queue.

        >>> allocator, stream = BlockAllocator(4), TokenBlocks(2)
        >>> cache, block = PrefixCache(allocator, 2), allocator.allocate()
        >>> stream.extend([5, 6])
        >>> cache.add(block, stream, 0)
        >>> block in cache, allocator.ref_count(block), cache.num_idle
        (True, 2, 0)
        """
        digest, tokens, parent = stream.hashes[index], stream.tokens[index], stream.parent(index)
        self._allocator.add_ref(block)
        self._kept[digest] = KeptBlock(block, tokens, parent)
        self._hash_of[block] = digest
        self._newest_child[parent, tokens[0]] = digest

    def match(self, stream: TokenBlocks, first: int, stop: int) -> list[int]:
        """Return the kept blocks that hold the blocks first .. stop - 1 of a stream, up to the first miss.

        A block is a miss if its hash is not kept, or if the block that is kept under its hash has other
        tokens or another parent; `KeptBlock.is_block` compares both. Comparing hashes is not enough: a client
        that found two texts with one hash would get an answer computed from the other text. Stop at the first
        miss, even if later blocks are kept, because a table cannot have gaps.

        Changes nothing: no block gets a holder, and idle blocks stay idle. A caller that wants the blocks
        calls the given `share` for each of them, in order.

        >>> allocator, stream = BlockAllocator(4), TokenBlocks(2)
        >>> cache, block = PrefixCache(allocator, 2), allocator.allocate()
        >>> stream.extend([5, 6, 7, 8])
        >>> cache.add(block, stream, 0)
        >>> cache.match(stream, 0, 2) == [block], cache.match(stream, 1, 2)
        (True, [])
        """
        found = []
        for index in range(first, stop):
            kept = self._kept.get(stream.hashes[index])
            if kept is None or not kept.is_block(stream, index):
                break
            found.append(kept.block)
        return found

    def share(self, table: BlockTable, block: int, length: int) -> None:
        """Append a kept block to a table of full blocks; its first `length` tokens are the table's next ones.

        The table becomes a holder of the block, so the block is not idle any more.
        """
        table.share_block(block, length)
        self._queue.pop(self._hash_of[block], None)

    def released(self, blocks: Seq[int]) -> None:
        """Make idle the blocks that only the cache still holds, after a table has released its references.

        blocks: the released blocks, in the table's order. A kept block becomes idle if the cache is its only
        holder (`ref_count` is 1). Append the idle ones to the end of the queue in reverse order, the last
        block of the table first: the queue is evicted from the front, and a block is useless without the
        blocks before it. Ignore blocks that are not kept; an empty list changes nothing.

        >>> allocator, stream = BlockAllocator(4), TokenBlocks(2)
        >>> cache, block = PrefixCache(allocator, 2), allocator.allocate()
        >>> stream.extend([5, 6])
        >>> cache.add(block, stream, 0)
        >>> allocator.free(block)  # as `BlockTable.release` does
        >>> cache.released([block])
        >>> cache.num_idle
        1
        """
        for block in reversed(blocks):
            digest = self._hash_of.get(block)
            if digest is not None and self._allocator.ref_count(block) == 1:
                self._queue[digest] = self._kept[digest]

    def evict(self, num_blocks: int) -> int:
        """Free up to `num_blocks` idle blocks, from the front of the queue; return how many were freed.

        If fewer are idle, free all of them; for 0 or a negative number free none. An evicted block is not
        kept any more, so `match` does not find it. The given `_forget` does all of this for one block.

        >>> cache = PrefixCache(BlockAllocator(4), 2)
        >>> cache.evict(3), cache.evict(-2)
        (0, 0)
        """
        count = max(0, min(num_blocks, self.num_idle))
        for _ in range(count):
            self._forget(next(iter(self._queue)))
        return count

    def exchange(self, table: BlockTable, index: int, block: int) -> None:
        """Replace a table's block at `index` by a kept block with the same content.

        The table becomes a holder of the kept block, which is then not idle any more (as in `share`), and
        frees its reference to its old block, which is private. If the table has the kept block at `index`
        already, nothing changes.

        >>> allocator, stream = BlockAllocator(4), TokenBlocks(2)
        >>> cache, table, kept = PrefixCache(allocator, 2), BlockTable(allocator, 2), allocator.allocate()
        >>> copies = table.append_tokens(2)
        >>> stream.extend([5, 6])
        >>> cache.add(kept, stream, 0)
        >>> cache.exchange(table, 0, kept)
        >>> table.blocks == [kept], allocator.ref_count(kept), allocator.num_free
        (True, 3, 3)
        """
        self._queue.pop(self._hash_of[block], None)  # it may have been idle
        self._allocator.add_ref(block)
        self._allocator.free(table.blocks[index])
        table.blocks[index] = block

    def keep(self, table: BlockTable, stream: TokenBlocks, first: int, stop: int) -> None:
        """Keep a table's blocks first .. stop - 1: they are full and computed, and hold the stream's tokens.

        Go through the indices in order. For each, first check that `match` could reach the block, then look
        up `stream.hashes[index]` in `_kept`.

        The check, for an index above 0: the table's previous block, `table.blocks[index - 1]`, must be kept
        under the hash `stream.parent(index)` (see `_hash_of`). Read its id from the table now, because the
        previous index may have exchanged it. Otherwise return: neither this block nor any later one is kept.

        The look-up has three cases:

        - If the hash is not kept, `add` the table's block.
        - If a block with the same tokens and parent is kept (`is_block`), `exchange` the table's block for
          it. So the pool holds a prefix once, even if several sequences have computed it.
        - If a block with other tokens or another parent is kept, the table keeps its own block, and the cache
          does not.

        Two examples in which the check fails, for a table with the blocks 4 and 9:

        - A collision: block 3 is kept, with other tokens, under the hash of this text's block 0. Block 4
          stays in the table and is not kept. Block 9 must not be kept either, because the hash before it
          leads to block 3, never to block 4.
        - A gap: block 4 was kept, but then the cache was cleared while the table was in use. Now
          `keep(table, stream, 1, 2)` must not keep block 9, because `match` would stop at the missing
          block 0.

        In both examples the previous block is not kept at all. While table and stream belong to one sequence,
        it cannot be kept under another text's hash. Compare the hashes all the same, as a safeguard.

        >>> allocator, stream = BlockAllocator(8), TokenBlocks(2)
        >>> cache, tables = PrefixCache(allocator, 2), [BlockTable(allocator, 2), BlockTable(allocator, 2)]
        >>> stream.extend([5, 6, 7, 8])
        >>> for table in tables:
        ...     copies = table.append_tokens(4)
        ...     cache.keep(table, stream, 0, 2)
        >>> tables[0].blocks == tables[1].blocks, allocator.num_free
        (True, 6)
        """
        for index in range(first, stop):
            if index > 0 and self._hash_of.get(table.blocks[index - 1]) != stream.parent(index):
                return
            kept = self._kept.get(stream.hashes[index])
            if kept is None:
                self.add(table.blocks[index], stream, index)
            elif kept.is_block(stream, index):
                self.exchange(table, index, kept.block)

    def match_part(self, parent: bytes, tokens: Seq[int]) -> PartMatch | None:
        """Return a kept block with this parent that starts with the first of `tokens`, or None.

        `PartMatch.length` counts the equal tokens up to the first difference: 1 .. block_size. `tokens` may
        be fewer than a block. Look only at the newest kept block with this parent and first token
        (`_newest_child`), even if an older one has more equal tokens. Return None if `_newest_child` has no
        entry for them (evicting the newest block removes the entry, even if an older block is still kept), or
        if `tokens` is empty.

        >>> allocator, stream = BlockAllocator(4), TokenBlocks(4)
        >>> cache = PrefixCache(allocator, 4)
        >>> stream.extend([5, 6, 7, 8])
        >>> cache.add(allocator.allocate(), stream, 0)
        >>> cache.match_part(stream.parent(0), [5, 6, 9, 8]).length
        2
        """
        digest = self._newest_child.get((parent, tokens[0])) if tokens else None
        if digest is None:
            return None
        kept = self._kept[digest]
        length = 0
        while length < len(tokens) and kept.tokens[length : length + 1] == (tokens[length],):
            length += 1
        return PartMatch(kept.block, length)

    def clear(self) -> None:
        """Stop keeping all blocks; those in use stay in their tables."""
        for digest in list(self._kept):
            self._forget(digest)

    def rename_blocks(self, moved: Mapping[int, int]) -> None:
        """Replace the ids of blocks that have moved in the pool: {old: new}."""
        for kept in self._kept.values():
            kept.block = moved.get(kept.block, kept.block)
        self._hash_of = {kept.block: digest for digest, kept in self._kept.items()}

    def _forget(self, digest: bytes) -> None:
        """Stop keeping one block, idle or in use, and free the cache's reference to it."""
        kept = self._kept.pop(digest)
        self._queue.pop(digest, None)
        del self._hash_of[kept.block]
        if self._newest_child.get((kept.parent, kept.tokens[0])) == digest:
            del self._newest_child[kept.parent, kept.tokens[0]]
        self._allocator.free(kept.block)
