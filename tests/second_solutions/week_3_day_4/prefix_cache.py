"""A cache of full blocks by content: prompts with the same prefix reuse its keys and values.

The cache holds one reference to each block that it keeps. When the pool needs free blocks, it evicts idle
ones: the least recently used first, and within one prompt the last block first. Ints and bytes only; knows
nothing of arrays, or of which sequences run.

Source: vLLM's automatic prefix caching. Its first hashes were predictable (CVE-2025-25183). Therefore this
cache uses SHA-256, compares the tokens as well, and uses a salt to separate streams that must not share
blocks.
"""

from array import array
from collections.abc import Sequence as Seq
from hashlib import sha256

from .paged_attention import BlockTable


def block_hash(parent: bytes, tokens: Seq[int]) -> bytes:
    return sha256(parent + array("q", tokens).tobytes()).digest()


class TokenBlocks:
    def extend(self, token_ids: Seq[int]) -> None:
        for start in range(0, len(token_ids) - self.block_size + 1, self.block_size):
            tokens = tuple(token_ids[start : start + self.block_size])
            digest = block_hash(self.parent(len(self)), tokens)
            self.tokens.append(tokens)
            self.hashes.append(digest)


class PrefixCache:
    def add(self, block: int, stream: TokenBlocks, index: int) -> None:
        entry = KeptBlock(block, stream.tokens[index], stream.parent(index))
        name = stream.hashes[index]
        self._kept[name], self._hash_of[block] = entry, name
        self._newest_child[entry.parent, entry.tokens[0]] = name
        self._allocator.add_ref(block)

    def match(self, stream: TokenBlocks, first: int, stop: int) -> list[int]:
        blocks: list[int] = []
        for index in range(first, stop):
            kept = self._kept.get(stream.hashes[index])
            if kept is None or not kept.is_block(stream, index):
                break
            blocks.append(kept.block)
        return blocks

    def released(self, blocks: Seq[int]) -> None:
        for block in reversed(blocks):
            if block in self and self._allocator.ref_count(block) == 1:
                digest = self._hash_of[block]
                self._queue[digest] = self._kept[digest]

    def evict(self, num_blocks: int) -> int:
        count = max(0, min(num_blocks, len(self._queue)))
        for _ in range(count):
            self._forget(next(iter(self._queue)))
        return count

    def exchange(self, table: BlockTable, index: int, block: int) -> None:
        own = table.blocks[index]
        if own == block:
            return
        self._allocator.add_ref(block)
        self._queue.pop(self._hash_of[block], None)
        table.blocks[index] = block
        self._allocator.free(own)

    def keep(self, table: BlockTable, stream: TokenBlocks, first: int, stop: int) -> None:
        for index in range(first, stop):
            if index and self._hash_of.get(table.blocks[index - 1]) != stream.parent(index):
                return
            kept = self._kept.get(stream.hashes[index])
            if kept is None:
                self.add(table.blocks[index], stream, index)
            elif kept.is_block(stream, index):
                self.exchange(table, index, kept.block)

    def match_part(self, parent: bytes, tokens: Seq[int]) -> PartMatch | None:
        if not tokens:
            return None
        digest = self._newest_child.get((parent, tokens[0]))
        if digest is None:
            return None
        kept = self._kept[digest]
        length = 0
        for ours, theirs in zip(tokens, kept.tokens, strict=False):
            if ours != theirs:
                break
            length += 1
        return PartMatch(kept.block, length)
