"""Pages for keys and values: how many holders each page has, and which pages a sequence uses.

The pages are called blocks here. A block has places for the keys and values of `block_size` tokens; this
module knows only its id. A holder is a block table or the prefix cache (day 3.4). Plain bookkeeping over
ints, no arrays. Knows nothing of the tokens, of the pool's arrays, or of the prefix cache. Source: Kwon et
al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (SOSP 2023).
"""

from .errors import OutOfBlocksError


class BlockAllocator:
    def allocate(self) -> int:
        if not self._free:
            raise OutOfBlocksError(f"none of the {self.num_blocks} blocks is free")
        block = self._free.pop()
        self._ref_counts[block] = 1
        return block

    def free(self, block: int) -> None:
        self._ref_counts[block] = self._num_holders(block) - 1
        if self._ref_counts[block] == 0:
            self._free.append(block)


class BlockTable:
    def blocks_to_append(self, num_new_tokens: int) -> int:
        if num_new_tokens == 0:
            return 0
        num_blocks = -(-(self.num_tokens + num_new_tokens) // self.block_size)
        return num_blocks - len(self.blocks) + int(self._must_copy())

    def _must_copy(self) -> bool:
        """Whether a write to the last block needs a copy: it is partly filled and shared."""
        if self.num_tokens % self.block_size == 0:
            return False
        return self.allocator.ref_count(self.blocks[-1]) > 1

    def append_tokens(self, num_new_tokens: int) -> list[BlockCopy]:
        if num_new_tokens == 0:
            return []
        needed = self.blocks_to_append(num_new_tokens)
        if needed > self.allocator.num_free:
            raise OutOfBlocksError(f"{needed} blocks are needed, {self.allocator.num_free} are free")
        copies = []
        if self._must_copy():
            src, dst = self.blocks[-1], self.allocator.allocate()
            self.allocator.free(src)
            self.blocks[-1] = dst
            copies.append(BlockCopy(src, dst, self.num_tokens % self.block_size))
            needed -= 1
        self.blocks += [self.allocator.allocate() for _ in range(needed)]
        self.num_tokens += num_new_tokens
        return copies

    def slots(self, start: int, stop: int) -> list[int]:
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"positions {start} .. {stop} are not within the {self.num_tokens} tokens")
        size = self.block_size
        return [self.blocks[i // size] * size + i % size for i in range(start, stop)]

    def fork(self) -> "BlockTable":
        child = BlockTable(self.allocator, self.block_size)
        for block in self.blocks:
            self.allocator.add_ref(block)
        child.blocks = list(self.blocks)
        child.num_tokens = self.num_tokens
        return child

    def release(self) -> None:
        for block in self.blocks:
            self.allocator.free(block)
        self.blocks = []
        self.num_tokens = 0
