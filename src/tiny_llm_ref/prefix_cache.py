"""A cache of full blocks by what they hold: prompts that begin alike find each other's keys and values.

It owns one reference to each block that it keeps, and gives idle ones up when asked: the least recently used
first, and of one prompt the deepest first. Ints and bytes only; knows nothing of arrays, nor of who runs.
Source: vLLM's automatic prefix caching. Its first hashes were predictable (CVE-2025-25183): these are
SHA-256, the tokens are compared as well, and a salt keeps streams apart that must not share.
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
    """What stands for a full block and all before it: 32 bytes, for the same text the same.

    parent: the hash of the block before, which stands for all before in its turn. tokens: the block's ids, a
    list or a tuple. SHA-256, so that nobody can make up another text with the same hash.
    """
    return sha256(parent + array("q", tokens).tobytes()).digest()


class TokenBlocks:
    """A token stream cut into full blocks: `tokens[i]` of block i, and `hashes[i]` of blocks 0 .. i.

    salt: another salt, another hash for every block.
    """

    def __init__(self, block_size: int, salt: str = "") -> None:
        self.block_size = block_size
        self.tokens: list[tuple[int, ...]] = []
        self.hashes: list[bytes] = []
        self._root = sha256(salt.encode()).digest()

    def __len__(self) -> int:
        return len(self.hashes)

    def extend(self, token_ids: Seq[int]) -> None:
        """Cut off the full blocks of the stream's next tokens; a rest is ignored, and must be given again.

        Each block adds its tokens to `tokens`, and to `hashes` its `block_hash`, whose parent is the hash of
        the block before, or the salt's for the first one.
        """
        for start in range(0, len(token_ids) - self.block_size + 1, self.block_size):
            tokens = tuple(token_ids[start : start + self.block_size])
            self.hashes.append(block_hash(self.parent(len(self)), tokens))
            self.tokens.append(tokens)

    def parent(self, index: int) -> bytes:
        """What block `index` hangs on: the hash of the block before, or the salt's."""
        return self.hashes[index - 1] if index else self._root

    def copy(self) -> "TokenBlocks":
        """The same stream so far, to go on differently."""
        return self.tail(0)

    def tail(self, first: int) -> "TokenBlocks":
        """The same stream from block `first` on, which is block 0 there and hangs on the same parent."""
        other = TokenBlocks(self.block_size)
        other._root, other.tokens, other.hashes = self.parent(first), self.tokens[first:], self.hashes[first:]
        return other


@dataclass(slots=True)
class KeptBlock:
    """A block of the cache, the tokens whose keys and values are in it, and the hash that it hangs on."""

    block: int
    tokens: tuple[int, ...]
    parent: bytes

    def is_block(self, stream: TokenBlocks, index: int) -> bool:
        """True where it holds block `index` of a stream, which has its hash: a hash alone is not believed."""
        return self.tokens == stream.tokens[index] and self.parent == stream.parent(index)


class PartMatch(NamedTuple):
    """A kept block that begins with the `length` tokens that were asked for, and goes on differently."""

    block: int
    length: int


class PrefixCache:
    """Keeps full blocks after their tables have gone, until somebody needs the pages.

    Invariants: the allocator counts the cache as one holder of each kept block. What a kept block hangs on is
    kept, and a table that holds a kept block holds that too, unless a window has passed it. The queue has the
    idle blocks, which no table holds, in the order of giving up: none stands behind one that hangs on it.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        self.block_size = block_size
        self._allocator = allocator
        self._kept: dict[bytes, KeptBlock] = {}  # every kept block, by its hash
        self._queue: OrderedDict[bytes, KeptBlock] = OrderedDict()  # the idle ones, the first to go first
        self._hash_of: dict[int, bytes] = {}  # the hash of every kept block, by the block
        self._newest_child: dict[tuple[bytes, int], bytes] = {}  # by parent and first token: a hash

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, block: int) -> bool:
        return block in self._hash_of

    @property
    def blocks(self) -> list[int]:
        """Every kept block."""
        return [kept.block for kept in self._kept.values()]

    @property
    def num_idle(self) -> int:
        """Kept blocks that no table holds: how many `evict` could give up now."""
        return len(self._queue)

    def keep(self, table: BlockTable, stream: TokenBlocks, first: int, stop: int) -> None:
        """Keep a table's blocks first .. stop - 1, which have been computed and hold the stream's tokens.

        The cache becomes one more holder of each. Where the same tokens behind the same parent are kept
        already, the table holds that block from now on, and its own goes back: a prefix is in the pool once.
        Where the hash stands for other tokens, or this table's block before is not kept, the block and those
        behind it stay the table's alone: nobody could find them.
        """
        for index in range(first, stop):
            digest, own = stream.hashes[index], table.blocks[index]
            if index > 0 and self._hash_of.get(table.blocks[index - 1]) != stream.parent(index):
                return
            kept = self._kept.get(digest)
            if kept is None:
                self._add(digest, KeptBlock(own, stream.tokens[index], stream.parent(index)))
            elif kept.is_block(stream, index):
                self._queue.pop(self._hash_of[kept.block], None)
                self._allocator.add_ref(kept.block)
                self._allocator.free(own)
                table.blocks[index] = kept.block

    def match(self, stream: TokenBlocks, first: int, stop: int) -> list[int]:
        """The kept blocks that hold blocks first .. stop - 1 of a stream, as far as they go unbroken.

        A hash is not believed: a block whose tokens or whose parent differ is no match. Nobody holds what was
        found more than before: whoever takes it calls `share`, and holds what is kept of the blocks before.
        """
        found = []
        for index in range(first, stop):
            kept = self._kept.get(stream.hashes[index])
            if kept is None or not kept.is_block(stream, index):
                break
            found.append(kept.block)
        return found

    def match_part(self, parent: bytes, tokens: Seq[int]) -> PartMatch | None:
        """How far a kept block that hangs on `parent` begins like `tokens`: their number is 1 .. block_size.

        Of several blocks with the first of these tokens the one that was kept last is looked at. None where
        there is none, or it has been given up.
        """
        digest = self._newest_child.get((parent, tokens[0])) if tokens else None
        if digest is None:
            return None
        kept = self._kept[digest]
        length = 0
        while length < len(tokens) and kept.tokens[length : length + 1] == (tokens[length],):
            length += 1
        return PartMatch(kept.block, length)

    def share(self, table: BlockTable, block: int, length: int) -> None:
        """Put a kept block behind a table's full ones; its first `length` tokens count as the table's."""
        table.share_block(block, length)
        self._queue.pop(self._hash_of[block], None)

    def released(self, blocks: Seq[int]) -> None:
        """Take note that a table has let go of these blocks, given in the table's order.

        Kept ones that no other table holds become idle: the last to be given up, the deepest of them first.
        """
        for block in reversed(blocks):
            digest = self._hash_of.get(block)
            if digest is not None and self._allocator.ref_count(block) == 1:
                self._queue[digest] = self._kept[digest]

    def evict(self, num_blocks: int) -> int:
        """Give up to `num_blocks` idle blocks back to the allocator; returns how many.

        The first of the queue go first. What is given up is found no more.
        """
        given = max(0, min(num_blocks, self.num_idle))
        for _ in range(given):
            self._forget(next(iter(self._queue)))
        return given

    def clear(self) -> None:
        """Give up every block; those in use stay with their tables."""
        for digest in list(self._kept):
            self._forget(digest)

    def rename_blocks(self, moved: Mapping[int, int]) -> None:
        """Follow blocks that have moved to other places in the pool: from old ids to new ones."""
        for kept in self._kept.values():
            kept.block = moved.get(kept.block, kept.block)
        self._hash_of = {kept.block: digest for digest, kept in self._kept.items()}

    def _add(self, digest: bytes, kept: KeptBlock) -> None:
        self._allocator.add_ref(kept.block)
        self._kept[digest] = kept
        self._hash_of[kept.block] = digest
        self._newest_child[kept.parent, kept.tokens[0]] = digest

    def _forget(self, digest: bytes) -> None:
        """Give up one block, idle or in use: nobody finds it from now on."""
        kept = self._kept.pop(digest)
        self._queue.pop(digest, None)
        del self._hash_of[kept.block]
        if self._newest_child.get((kept.parent, kept.tokens[0])) == digest:
            del self._newest_child[kept.parent, kept.tokens[0]]
        self._allocator.free(kept.block)
