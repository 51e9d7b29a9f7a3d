"""Layers that look equally far back share a block table: how a model's layers are divided into groups.

A block holds the keys and values of one group's layers, and all groups have one size, so that one pool serves
them all: what a window has passed is free for anybody. Ints only. Source: vLLM's hybrid KV cache.
"""

from collections import Counter
from collections.abc import Sequence as Seq
from typing import NamedTuple

MOST_WASTE = 1.25  # groups take the larger kind's size where it is less than so many times the smaller's


class LayerGroup(NamedTuple):
    """Layers that share a block table. window: tokens that each of their queries sees; None: all."""

    layers: tuple[int, ...]
    window: int | None = None

    def most_blocks(self, num_tokens: int, block_size: int, most_at_once: int) -> int:
        """Blocks that a table may hold at once on its way to so many tokens, computed so many in a step."""
        blocks = -(-num_tokens // block_size)
        if self.window is None:
            return blocks
        in_reach = self.window - 1 + most_at_once  # of a step's queries; they may begin within a block
        return min(blocks, (in_reach + block_size - 2) // block_size + 1)


def group_layers(windows: Seq[int | None]) -> tuple[LayerGroup, ...]:
    """The layers 0 .. len(windows) - 1 in groups of one window each, those that see everything first.

    A group has as many layers as the rarest kind; or as the most frequent one, where the kinds differ little.
    The last group of a kind may have fewer, and leaves a part of its blocks empty.
    """
    counts = Counter(windows)
    fewest, most = min(counts.values()), max(counts.values())
    size = most if most < MOST_WASTE * fewest else fewest
    groups = []
    for window in sorted(counts, key=lambda window: window or 0):
        layers = tuple(layer for layer, other in enumerate(windows) if other == window)
        groups += [LayerGroup(layers[i : i + size], window) for i in range(0, len(layers), size)]
    return tuple(groups)


def layers_per_block(groups: Seq[LayerGroup]) -> int:
    """Layers whose keys and values lie in one block."""
    return max(len(group.layers) for group in groups)
