"""A cache of full blocks by content: prompts with the same prefix reuse its keys and values.

The cache owns one reference to each block that it keeps, and gives back idle ones when pages are needed: the
least recently used first, and of one prompt the last block first. Ints and bytes only; knows nothing of
arrays, or of which sequence runs. Source: vLLM's automatic prefix caching. Its first hashes were predictable
(CVE-2025-25183): these are SHA-256, the tokens are compared as well, and a salt separates streams that must
not share.
"""

from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

from .paged_attention import BlockAllocator, BlockTable


def block_hash(parent: bytes, tokens: Seq[int]) -> bytes:
    """Fed in pieces, each id as 8 bytes by `int.to_bytes`."""
    digest = sha256()
    digest.update(parent)
    for token in tokens:
        digest.update(int(token).to_bytes(8, "big"))
    return digest.digest()


class TokenBlocks:
    """A token stream cut into full blocks: `tokens[i]` of block i, and `hashes[i]` of the blocks 0 .. i.

    salt: streams with different salts have different hashes in every block.
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
        """One full block after another, as long as there is one."""
        rest = list(token_ids)
        while len(rest) >= self.block_size:
            block, rest = tuple(rest[: self.block_size]), rest[self.block_size :]
            digest = block_hash(self.parent(len(self.tokens)), block)
            self.tokens.append(block)
            self.hashes.append(digest)

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
        """The four entries, from one `KeptBlock`."""
        kept = KeptBlock(block=block, tokens=stream.tokens[index], parent=stream.parent(index))
        self._kept |= {stream.hashes[index]: kept}
        self._newest_child |= {(kept.parent, kept.tokens[0]): stream.hashes[index]}
        self._hash_of |= {block: stream.hashes[index]}
        self._allocator.add_ref(kept.block)

    def match(self, stream: TokenBlocks, first: int, stop: int) -> list[int]:
        """Recursion from the first index on."""
        if first >= stop or stream.hashes[first] not in self._kept:
            return []
        kept = self._kept[stream.hashes[first]]
        if not kept.is_block(stream, first):
            return []
        return [kept.block, *self.match(stream, first + 1, stop)]

    def share(self, table: BlockTable, block: int, length: int) -> None:
        """Append a kept block to a table of full blocks, which continues with its first `length` tokens.

        The table becomes a holder of it, so it is not idle any more.
        """
        table.share_block(block, length)
        self._queue.pop(self._hash_of[block], None)

    def released(self, blocks: Seq[int]) -> None:
        """The kept blocks first, then those that only the cache holds."""
        known = [block for block in blocks if block in self]
        for block in known[::-1]:
            if self._allocator.ref_count(block) < 2:
                self._queue.update({self._hash_of[block]: self._kept[self._hash_of[block]]})

    def evict(self, num_blocks: int) -> int:
        """The hashes are listed before any of them goes."""
        doomed = list(self._queue)[: max(num_blocks, 0)]
        for digest in doomed:
            self._forget(digest)
        return len(doomed)

    def exchange(self, table: BlockTable, index: int, block: int) -> None:
        """Nothing to do for the block that is there already."""
        own = table.blocks[index]
        if own != block:
            self._allocator.add_ref(block)
            table.blocks[index] = block
            self._allocator.free(own)
            if self._hash_of[block] in self._queue:
                del self._queue[self._hash_of[block]]

    def keep(self, table: BlockTable, stream: TokenBlocks, first: int, stop: int) -> None:
        """The hash that must be before is carried along."""
        for index in range(first, stop):
            before = self._hash_of.get(table.blocks[index - 1]) if index else stream.parent(0)
            if before != stream.parent(index):
                break
            if stream.hashes[index] not in self._kept:
                self.add(table.blocks[index], stream, index)
                continue
            same = self._kept[stream.hashes[index]]
            if not same.is_block(stream, index):
                break
            self.exchange(table, index, same.block)

    def match_part(self, parent: bytes, tokens: Seq[int]) -> PartMatch | None:
        """Equal pairs are taken until one differs."""
        if not tokens or (parent, tokens[0]) not in self._newest_child:
            return None
        kept = self._kept[self._newest_child[parent, tokens[0]]]
        length = next((i for i, (a, b) in enumerate(zip(kept.tokens, tokens, strict=False)) if a != b), None)
        return PartMatch(kept.block, min(len(tokens), self.block_size) if length is None else length)

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
