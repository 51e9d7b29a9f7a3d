"""Which replicas have which blocks: an index from a block's hash to a set of replicas.

A set is an int with one bit for each replica, so that a prompt's blocks are matched against all replicas at
once, with one `&` for each block.
"""

from collections import Counter
from collections.abc import Iterable


class BlockIndex:
    """The blocks that replicas have reported, and those that they are expected to have.

    A replica is a number from 0 on; small numbers keep the sets small. A block may be expected several times,
    until each of them is taken back. Changes cost time in proportion to the blocks that change.

    Invariant: a hash has the bit of a replica if the replica has reported it or is expected to have it.
    """

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}
        self._reported: dict[int, frozenset[bytes]] = {}
        self._expected: dict[int, Counter[bytes]] = {}

    def __len__(self) -> int:
        """Number of different blocks that any replica has."""
        return len(self._holders)

    def add(self, replica: int) -> None:
        """Add a replica that has no blocks."""
        self._reported[replica], self._expected[replica] = frozenset(), Counter()

    def remove(self, replica: int) -> None:
        """Forget a replica; its number can be used again."""
        self._clear(self._expected.pop(replica).keys() | self._reported.pop(replica), replica)

    def report(self, replica: int, hashes: frozenset[bytes]) -> None:
        """Replace the blocks that a replica has reported."""
        before, self._reported[replica] = self._reported[replica], hashes
        self._set(hashes - before, replica)
        self._clear((before - hashes) - self._expected[replica].keys(), replica)

    def expect(self, replica: int, hashes: Iterable[bytes]) -> None:
        """Count blocks as the replica's, once more."""
        self._expected[replica].update(hashes)
        self._set(hashes, replica)

    def take_back(self, replica: int, hashes: Iterable[bytes]) -> None:
        """Take back one call of `expect` with these hashes."""
        expected = self._expected[replica]
        expected.subtract(hashes)
        over = {digest for digest in hashes if not expected[digest]}
        for digest in over:
            del expected[digest]
        self._clear(over - self._reported[replica], replica)

    def match(self, hashes: Iterable[bytes]) -> dict[int, int]:
        """Return how many of the first hashes each replica has, up to the first that it does not have.

        Replicas with none are left out. Stops where no replica has all blocks.

        >>> index = BlockIndex()
        >>> for replica, blocks in enumerate(([b"a", b"b", b"d"], [], [b"a"])):
        ...     index.add(replica)
        ...     index.report(replica, frozenset(blocks))
        >>> index.match([b"a", b"b", b"c", b"d"])
        {2: 1, 0: 2}
        """
        found: dict[int, int] = {}
        length, candidates = 0, -1  # -1 has all bits: every replica has the first 0 blocks
        for digest in hashes:
            holders = self._holders.get(digest, 0) & candidates
            if holders != candidates and length:
                found.update(dict.fromkeys(_members(candidates & ~holders), length))
            candidates = holders
            if not candidates:
                return found
            length += 1
        if length:
            found.update(dict.fromkeys(_members(candidates), length))
        return found

    def _set(self, hashes: Iterable[bytes], replica: int) -> None:
        holders, bit = self._holders, 1 << replica
        for digest in hashes:
            others = holders.get(digest)
            holders[digest] = bit if others is None else others | bit  # most blocks have one holder: one int

    def _clear(self, hashes: Iterable[bytes], replica: int) -> None:
        holders, bit = self._holders, 1 << replica
        for digest in hashes:
            others = holders[digest] & ~bit
            if others:
                holders[digest] = others
            else:
                del holders[digest]


def _members(replicas: int) -> list[int]:
    """The numbers in a set, smallest first."""
    return [number for number, digit in enumerate(reversed(f"{replicas:b}")) if digit == "1"]
