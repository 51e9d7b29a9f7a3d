"""How a model's layers are divided into groups: the layers of a group have the same window and share a table.

A block holds the keys and values of one group's layers. Blocks of all groups have the same size, so one pool
serves them all: a block that a window has passed is free for any group. Ints only. Source: vLLM's hybrid KV
cache.
"""

from collections import Counter
from collections.abc import Sequence as Seq
from typing import NamedTuple

# A group has as many layers as the most frequent kind if that has less than this many times as many as the
# rarest kind.
MAX_SIZE_RATIO = 1.25


class LayerGroup(NamedTuple):
    """Layers that share a block table. window: the number of tokens that a query sees; None: all."""

    layers: tuple[int, ...]
    window: int | None = None

    def max_blocks(self, num_tokens: int, block_size: int, most_at_once: int) -> int:
        """Return how many blocks a table may hold at once while it grows to `num_tokens` tokens.

        most_at_once: the maximum number of tokens that one step computes for a sequence.

        With a window of 6, 4 queries see 9 tokens, which are in at most 3 blocks of 4:

        >>> LayerGroup((0,), window=6).max_blocks(100, block_size=4, most_at_once=4)
        3
        """
        blocks = -(-num_tokens // block_size)
        if self.window is None:
            return blocks
        in_reach = self.window - 1 + most_at_once  # tokens that a step's queries see; may start mid-block
        return min(blocks, (in_reach + block_size - 2) // block_size + 1)


def group_layers(windows: Seq[int | None]) -> tuple[LayerGroup, ...]:
    """Divide the layers 0 .. len(windows) - 1 into groups of one window each, layers without a window first.

    Layers with the same window are of one kind. A group has as many layers as the rarest kind has; but if the
    most frequent kind has less than `MAX_SIZE_RATIO` times as many, a group has as many as that kind. The
    last group of a kind may have fewer layers; it leaves part of its blocks empty.

    >>> [tuple(group) for group in group_layers([512, 512, None, 512, 512, None])]
    [((2, 5), None), ((0, 1), 512), ((3, 4), 512)]
    """
    counts = Counter(windows)
    fewest, most = min(counts.values()), max(counts.values())
    size = most if most < MAX_SIZE_RATIO * fewest else fewest
    groups = []
    for window in sorted(counts, key=lambda window: window or 0):
        layers = tuple(layer for layer, other in enumerate(windows) if other == window)
        groups += [LayerGroup(layers[i : i + size], window) for i in range(0, len(layers), size)]
    return tuple(groups)


def layers_per_block(groups: Seq[LayerGroup]) -> int:
    """Return the number of layers whose keys and values share a block."""
    return max(len(group.layers) for group in groups)
