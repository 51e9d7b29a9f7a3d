"""A cache of full blocks by content: prompts with the same prefix reuse its keys and values.

The cache owns one reference to each block that it keeps, and gives back idle ones when pages are needed: the
least recently used first, and of one prompt the last block first. Ints and bytes only; knows nothing of
arrays, or of which sequence runs. Source: vLLM's automatic prefix caching. Its first hashes were predictable
(CVE-2025-25183): these are SHA-256, the tokens are compared as well, and a salt separates streams that must
not share.
"""

from array import array
from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

from .paged_attention import BlockAllocator, BlockTable


def block_hash(parent: bytes, tokens: Seq[int]) -> bytes:
    """Return the hash of a full block and of all blocks before it: 32 bytes, equal for equal texts.

    parent: the hash of the block before, which stands for everything before that in the same way. tokens: the
    block's token ids, a list or a tuple. Keys and values depend on all tokens before, so the parent is part
    of the hash.

    The hash is the SHA-256 digest of the parent's bytes, followed by the bytes of the tokens. With SHA-256 a
    client cannot construct a second text with the same hash. Each id takes 8 bytes, a signed integer in the
    machine's byte order, and nothing stands between two ids. With a fixed size, different lists never have
    the same bytes.

    >>> root = bytes(32)
    >>> len(block_hash(root, [5, 6])), block_hash(root, [5, 6]) == block_hash(root, (5, 6))
    (32, True)
    >>> block_hash(block_hash(root, [1, 2]), [5, 6]) == block_hash(root, [5, 6])
    False
    """
    return sha256(parent + array("q", tokens).tobytes()).digest()


class TokenBlocks:
    """A token stream cut into full blocks: `tokens[i]` of block i, and `hashes[i]` of the blocks 0 .. i.

    hashes: one for each full block, which depends on the blocks before it too. salt: streams with different
    salts have different hashes in every block.
    """

    def __init__(self, block_size: int, salt: str = "") -> None:
        self.block_size = block_size
        self.tokens: list[tuple[int, ...]] = []
        self.hashes: list[bytes] = []
        self._root = sha256(salt.encode()).digest()

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.hashes)

    def extend(self, token_ids: Seq[int]) -> None:
        """Append the full blocks of the stream's next tokens.

        Each full block adds a tuple to `tokens`, and its `block_hash` to `hashes`. Its parent is
        `parent(index)`, where `index` is the number of the block that is added: the hash of the block before,
        or the salt's for block 0. Tokens left over at the end are ignored, not remembered. The next call
        must begin at the first token that was left over.

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
        """Return the parent of block `index`: the hash of the block before, or the salt's for block 0."""
        return self.hashes[index - 1] if index else self._root

    def copy(self) -> "TokenBlocks":
        """Return a second stream with the same blocks, which can go on differently."""
        return self.tail(0)

    def tail(self, first: int) -> "TokenBlocks":
        """Return the stream from block `first` on: that is its block 0, with the same parent as here."""
        other = TokenBlocks(self.block_size)
        other._root, other.tokens, other.hashes = self.parent(first), self.tokens[first:], self.hashes[first:]
        return other


@dataclass(slots=True)
class KeptBlock:
    """A kept block, the tokens whose keys and values are in it, and the hash of the block before."""

    block: int
    tokens: tuple[int, ...]
    parent: bytes

    def is_block(self, stream: TokenBlocks, index: int) -> bool:
        """Return whether it holds block `index` of a stream: compares the tokens and the parent."""
        return self.tokens == stream.tokens[index] and self.parent == stream.parent(index)


class PartMatch(NamedTuple):
    """A kept block whose first `length` tokens are those that were asked for, and whose next one differs."""

    block: int
    length: int


class PrefixCache:
    """Keeps full blocks after their tables have gone, until the pages are needed.

    Every block of the pool is in one of four states. Its holders are counted by `allocator.ref_count`:

    - free, 0 holders. A table allocates it: private.
    - private, held by tables only. `add`: in use. When the last table releases it: free.
    - in use, held by the cache and by tables, 2 or more. `released` after the last table is gone: idle.
    - idle, held by the cache only, 1. It stands in the queue. `share`, `exchange`: in use. `evict`: free.

    "Kept" means in use or idle. Invariants: the allocator counts the cache as one holder of each kept block.
    The parent of a kept block is kept, and a table that holds a kept block holds its parent too, except where
    a window has passed it. The queue holds exactly the idle blocks, in the order of eviction: no block stands
    behind one that continues it.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        self.block_size = block_size
        self._allocator = allocator
        self._kept: dict[bytes, KeptBlock] = {}  # every kept block, by its hash
        self._queue: OrderedDict[bytes, KeptBlock] = OrderedDict()  # idle ones, the next to be evicted first
        self._hash_of: dict[int, bytes] = {}  # the hash of every kept block, by the block's id
        self._newest_child: dict[tuple[bytes, int], bytes] = {}  # a hash, by its parent and first token

    def __len__(self) -> int:
        """Number of kept blocks."""
        return len(self._kept)

    def __contains__(self, block: int) -> bool:
        """Return whether a block is kept."""
        return block in self._hash_of

    @property
    def blocks(self) -> list[int]:
        """The ids of all kept blocks."""
        return [kept.block for kept in self._kept.values()]

    @property
    def idle(self) -> list[int]:
        """The ids of the idle blocks, the next to be evicted first."""
        return [kept.block for kept in self._queue.values()]

    @property
    def num_idle(self) -> int:
        """Number of idle blocks: how many `evict` could give back now."""
        return len(self._queue)

    def add(self, block: int, stream: TokenBlocks, index: int) -> None:
        """Keep a block whose hash is not kept yet: a table holds it, and it holds block `index` of a stream.

        The cache becomes one more holder of it. It is entered in `_kept` as a `KeptBlock` by its hash,
        `stream.hashes[index]`; in `_hash_of` by its id; and in `_newest_child` by its parent and first token,
        where it replaces an older block. The parent is `stream.parent(index)`. It is in use, so it is not in
        the queue. `_forget` undoes all of this.

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
        tokens or another parent. Equal hashes prove nothing: a client that found two texts with one hash
        would be answered from the other text. `KeptBlock.is_block` compares both. Behind a miss nothing is of
        use, even if it is kept: a table has no holes.

        Looking changes nothing: no block gets a holder, and idle blocks stay idle. A caller that wants the
        blocks calls the given `share` for each of them, in order.

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
        """Append a kept block to a table of full blocks, which continues with its first `length` tokens.

        The table becomes a holder of it, so it is not idle any more.
        """
        table.share_block(block, length)
        self._queue.pop(self._hash_of[block], None)

    def released(self, blocks: Seq[int]) -> None:
        """Note that a table has given back its references to these blocks, listed in the table's order.

        The kept ones that no table holds now become idle: the cache is their only holder (`ref_count` 1).
        They go to the end of the queue, the last block of the table first: the queue is evicted from the
        front, and a block is of no use without the blocks before it. Blocks that are not kept are ignored; an
        empty list changes nothing.

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
        """Give up to `num_blocks` idle blocks back to the allocator, and return how many.

        The front of the queue goes first. If fewer are idle, all of them go; 0 or a negative number gives
        back none. An evicted block is not kept any more, so no match finds it: `_forget` does that for one
        block.

        >>> cache = PrefixCache(BlockAllocator(4), 2)
        >>> cache.evict(3), cache.evict(-2)
        (0, 0)
        """
        given = max(0, min(num_blocks, self.num_idle))
        for _ in range(given):
            self._forget(next(iter(self._queue)))
        return given

    def exchange(self, table: BlockTable, index: int, block: int) -> None:
        """Put a kept block in place `index` of a table, instead of the table's own with the same content.

        The table becomes a holder of the kept block, which is not idle any more (as in `share`), and gives
        the reference to its own block back, which is not a kept one. If the kept block is the table's own
        already, nothing changes.

        >>> allocator, stream = BlockAllocator(4), TokenBlocks(2)
        >>> cache, table, kept = PrefixCache(allocator, 2), BlockTable(allocator, 2), allocator.allocate()
        >>> copies, _ = table.append_tokens(2), stream.extend([5, 6])
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

        In order, each block by its hash in the stream:

        - The hash is not kept: `add` the table's block.
        - A block with the same tokens and parent is kept (`is_block`): `exchange` the table's block for it.
          So the pool holds a prefix once, however many sequences computed it.
        - Another text is kept under the hash: the table goes on with its own block, which is not kept.

        Keep nothing that `match` could not reach. For an index above 0, look first at the table's block
        before it, `table.blocks[index - 1]`, as the step before has left it. Its hash in the cache must be
        `stream.parent(index)`. If it has another hash or is not kept, stop: this block and all behind it are
        not kept. There are two such cases. The table has the blocks 4 and 9:

        - A collision. Block 3 is kept, with other tokens, under the hash of this text's block 0.
          Block 4 stays in the table and is not kept.
          Block 9 is not kept: the hash before it leads to block 3, never to block 4.
        - A gap. Block 4 was kept; then the cache was cleared while the table went on.
          `keep(table, stream, 1, 2)` finds that block 4 is not kept.
          Block 9 is not kept: `match` would stop at the missing block 0.

        >>> allocator, stream = BlockAllocator(8), TokenBlocks(2)
        >>> cache, tables = PrefixCache(allocator, 2), [BlockTable(allocator, 2), BlockTable(allocator, 2)]
        >>> stream.extend([5, 6, 7, 8])
        >>> for table in tables:
        ...     _ = table.append_tokens(4), cache.keep(table, stream, 0, 2)
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
        """Return a kept block that continues `parent` and begins like `tokens`, with the count of equal ones.

        The count ends with the first difference: 1 .. block_size. `tokens` may be fewer than a block. Of
        several kept blocks with this parent and this first token only the newest is looked at
        (`_newest_child`), which may not be the one with the most equal tokens. None if there is none, if it
        has been evicted, or without tokens.

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
        """Stop keeping every block; those in use stay with their tables."""
        for digest in list(self._kept):
            self._forget(digest)

    def rename_blocks(self, moved: Mapping[int, int]) -> None:
        """Follow blocks that have moved in the pool: from old ids to new ones."""
        for kept in self._kept.values():
            kept.block = moved.get(kept.block, kept.block)
        self._hash_of = {kept.block: digest for digest, kept in self._kept.items()}

    def _forget(self, digest: bytes) -> None:
        """Stop keeping one block, idle or in use, and give back the cache's reference to it."""
        kept = self._kept.pop(digest)
        self._queue.pop(digest, None)
        del self._hash_of[kept.block]
        if self._newest_child.get((kept.parent, kept.tokens[0])) == digest:
            del self._newest_child[kept.parent, kept.tokens[0]]
        self._allocator.free(kept.block)
