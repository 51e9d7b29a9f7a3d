"""Day 2.3: what `pdm run try` shows and `pdm run compare` times."""

import random

import mlx.core as mx

from .shared import Lines, Work, random_array


def show() -> Lines:
    """Show that enough blocks can be free although no contiguous run of them is long enough."""
    from tiny_llm.dynamic_cache import DynamicKVCache, GlobalAllocator
    from tiny_llm.errors import OutOfBlocksError

    pool, wanted, rounds = 96, 20, 100
    refused = {"in one run": 0, "anywhere": 0}
    free = longest = 0
    for seed in range(rounds):
        draw = random.Random(seed)
        allocator = GlobalAllocator(pool, 16, 1, 4)
        users: list[DynamicKVCache] = []
        while len(allocator.free_blocks) >= 6:
            users.append(DynamicKVCache(allocator, str(len(users))))
            users[-1].blocks += allocator.alloc_contiguous(draw.randint(1, 6))
        for user in draw.sample(users, len(users) // 2):
            user.free()
        free += len(allocator.free_blocks)
        longest += allocator.longest_run()
        ways = {"in one run": allocator.alloc_contiguous, "anywhere": allocator.alloc_blocks}
        for name, take in ways.items():
            try:
                allocator.free_blocks_ids(take(wanted))
            except OutOfBlocksError:
                refused[name] += 1
    yield f"a simulation, without the model: {rounds} pools of {pool} blocks"
    yield f"  users arrive until a pool is nearly full, half of them leave, one more needs {wanted} blocks"
    yield f"  free on average: {free / rounds:.0f} blocks; the longest run of them has {longest / rounds:.0f}"
    for name, count in refused.items():
        yield f"  {wanted} blocks {name}: refused {count} of {rounds} times"
    yield "if blocks can be anywhere, gaps between them waste nothing: that is why week 3 uses pages"


def work() -> Work:
    """256 tokens stored one by one in blocks of 16, then read as one array."""
    from tiny_llm.dynamic_cache import DynamicKVCache, GlobalAllocator

    tokens = random_array(256, 3, 64)

    def work() -> mx.array:
        cache = DynamicKVCache(GlobalAllocator(64, 16, 3, 64, mx.float32), "one")
        for token in tokens:
            cache.append_token(token, 2 * token)
        return mx.concatenate(list(cache.read()))

    return work
