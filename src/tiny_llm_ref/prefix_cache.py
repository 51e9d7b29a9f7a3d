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
    """What stands for a full block and all before it. parent: the hash of the block before."""
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
        """Cut off the full blocks of the stream's next tokens; a rest is ignored, and must be given again."""
        for start in range(0, len(token_ids) - self.block_size + 1, self.block_size):
            tokens = tuple(token_ids[start : start + self.block_size])
            self.hashes.append(block_hash(self.parent(len(self)), tokens))
            self.tokens.append(tokens)

    def parent(self, index: int) -> bytes:
        """What block `index` hangs on: the hash of the block before, or the salt's."""
        return self.hashes[index - 1] if index else self._root

    def copy(self) -> "TokenBlocks":
        """The same stream so far, to go on differently."""
        other = TokenBlocks(self.block_size)
        other._root, other.tokens, other.hashes = self._root, list(self.tokens), list(self.hashes)
        return other


@dataclass(slots=True)
class KeptBlock:
    """A block of the cache, and the tokens whose keys and values are in it."""

    block: int
    tokens: tuple[int, ...]
    parent: bytes


class PartMatch(NamedTuple):
    """A kept block that begins with the `length` tokens that were asked for, and goes on differently."""

    block: int
    length: int


class PrefixCache:
    """Keeps full blocks after their tables have gone, until somebody needs the pages.

    Invariants: the allocator counts the cache as one holder of each kept block. A table that holds a kept
    block holds the kept blocks of everything before it too. The queue is in the order of giving up: no idle
    block stands behind one that hangs on it.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        self.block_size = block_size
        self._allocator = allocator
        self._queue: OrderedDict[bytes, KeptBlock] = OrderedDict()
        self._hash_of: dict[int, bytes] = {}
        self._newest_child: dict[tuple[bytes, int], bytes] = {}
        self._num_idle = 0

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def blocks(self) -> list[int]:
        """Every kept block."""
        return [kept.block for kept in self._queue.values()]

    @property
    def num_idle(self) -> int:
        """Kept blocks that no table holds: how many `evict` could give up now."""
        return self._num_idle

    def match(self, stream: TokenBlocks, first: int, stop: int) -> list[int]:
        """The kept blocks that hold blocks first .. stop - 1 of a stream, as far as they go unbroken.

        A hash is not believed: a block whose tokens differ is no match. Nobody holds them more than before.
        """
        found = []
        for index in range(first, stop):
            kept = self._queue.get(stream.hashes[index])
            if kept is None or kept.tokens != stream.tokens[index]:
                break
            found.append(kept.block)
        return found

    def match_part(self, parent: bytes, tokens: Seq[int]) -> PartMatch | None:
        """How far the block after `parent` that was kept last begins like `tokens`; None for not at all."""
        digest = self._newest_child.get((parent, tokens[0])) if tokens else None
        if digest is None:
            return None
        kept = self._queue[digest]
        length = 0
        while length < len(tokens) and kept.tokens[length : length + 1] == (tokens[length],):
            length += 1
        return PartMatch(kept.block, length)

    def share(self, table: BlockTable, block: int, length: int) -> None:
        """Put a kept block behind a table's full ones; its first `length` tokens count as the table's."""
        self._num_idle -= self._allocator.ref_count(block) == 1
        table.share_block(block, length)

    def keep(self, table: BlockTable, stream: TokenBlocks, first: int, stop: int) -> None:
        """Keep a table's blocks first .. stop - 1, which have been computed and hold the stream's tokens.

        Where the same tokens are kept already, the table holds that block from now on, and its own goes back:
        a prefix is in the pool once.
        """
        for index in range(first, stop):
            digest, own = stream.hashes[index], table.blocks[index]
            kept = self._queue.get(digest)
            if kept is None:
                self._add(digest, KeptBlock(own, stream.tokens[index], stream.parent(index)))
            elif kept.block != own and kept.tokens == stream.tokens[index]:
                self._num_idle -= self._allocator.ref_count(kept.block) == 1
                self._allocator.add_ref(kept.block)
                self._allocator.free(own)
                table.blocks[index] = kept.block

    def released(self, blocks: Seq[int]) -> None:
        """Take note that a table has let go of these blocks, given in the table's order.

        They become the last to be given up, the deepest of them first.
        """
        for block in reversed(blocks):
            digest = self._hash_of.get(block)
            if digest is not None:
                self._queue.move_to_end(digest)
                self._num_idle += self._allocator.ref_count(block) == 1

    def evict(self, num_blocks: int) -> int:
        """Give up to `num_blocks` idle blocks back to the allocator; returns how many."""
        left = given = max(0, min(num_blocks, self._num_idle))
        while left:
            digest, kept = next(iter(self._queue.items()))
            if self._allocator.ref_count(kept.block) > 1:
                self._queue.move_to_end(digest)  # in use: it gets its place when it is released
            else:
                self._forget(digest)
                left -= 1
        self._num_idle -= given
        return given

    def clear(self) -> None:
        """Give up every block; those in use stay with their tables."""
        for digest in list(self._queue):
            self._forget(digest)
        self._num_idle = 0

    def rename_blocks(self, moved: Mapping[int, int]) -> None:
        """Follow blocks that have moved to other places in the pool: from old ids to new ones."""
        for kept in self._queue.values():
            kept.block = moved.get(kept.block, kept.block)
        self._hash_of = {kept.block: digest for digest, kept in self._queue.items()}

    def _add(self, digest: bytes, kept: KeptBlock) -> None:
        self._allocator.add_ref(kept.block)
        self._queue[digest] = kept
        self._hash_of[kept.block] = digest
        self._newest_child[kept.parent, kept.tokens[0]] = digest

    def _forget(self, digest: bytes) -> None:
        kept = self._queue.pop(digest)
        del self._hash_of[kept.block]
        if self._newest_child.get((kept.parent, kept.tokens[0])) == digest:
            del self._newest_child[kept.parent, kept.tokens[0]]
        self._allocator.free(kept.block)
