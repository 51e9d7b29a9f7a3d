"""What a replica says about itself once in each period: what it caches, and what it still has to compute.

`read_report` makes a report from a batch manager. A report's size is limited, and it travels as a dictionary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from struct import iter_unpack
from typing import Any, Self

from tiny_llm.batch_manager import BatchManager
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.prefix_sharing import PrefixSharing
from tiny_llm.sequence import PagedSequence, Sequence

from .prompt_blocks import HASH_BYTES, short_hash

MAX_HASHES = 4096  # in a report: 32 KiB. The default pool of the embedded model has 1,456 blocks
MAX_MATCHED = 64  # waiting sequences that are looked up in the prefix cache for a report


@dataclass(frozen=True)
class ReplicaReport:
    """The state of a replica between two of its steps.

    made_at: when it was made, in seconds on the router's clock. Replicas on other machines use the time of
    day, as the router then must; an error of some milliseconds does no harm. hashes: the short hashes of the
    cached blocks. queued_tokens: prompt tokens of waiting and running sequences that are neither computed nor
    cached. num_running, num_waiting: sequences. is_full: its queue takes no request now.
    """

    made_at: float
    hashes: frozenset[bytes] = frozenset()
    queued_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    is_full: bool = False

    def as_message(self) -> dict[str, Any]:
        """Return the report as a dictionary of plain values; all hashes are one `bytes`."""
        return {
            "made_at": self.made_at,
            "hashes": b"".join(sorted(self.hashes)),
            "queued_tokens": self.queued_tokens,
            "num_running": self.num_running,
            "num_waiting": self.num_waiting,
            "is_full": self.is_full,
        }

    @classmethod
    def of_message(cls, message: Mapping[str, Any]) -> Self:
        """Return the report of a message from `as_message`.

        >>> report = ReplicaReport(5.0, frozenset([b"8 bytes.", b"8 others"]), queued_tokens=7)
        >>> ReplicaReport.of_message(report.as_message()) == report
        True
        """
        hashes = frozenset(chain.from_iterable(iter_unpack(f"{HASH_BYTES}s", message["hashes"])))
        return cls(**{**message, "hashes": hashes})


def read_report(
    manager: BatchManager, made_at: float, *, max_waiting: int | None = None, max_hashes: int = MAX_HASHES
) -> ReplicaReport:
    """Return a batch manager's report; call it between two steps, in the thread that owns the manager.

    max_waiting: requests that may wait at once; None: any number. max_hashes: the most blocks that are
    reported, those that will be evicted last.
    """
    waiting = manager.num_waiting_requests
    return ReplicaReport(
        made_at=made_at,
        hashes=frozenset(_cached_hashes(manager, max_hashes)),
        queued_tokens=_queued_tokens(manager),
        num_running=len(manager.running),
        num_waiting=len(manager.waiting),
        is_full=max_waiting is not None and waiting >= max_waiting,
    )


def _cached_hashes(manager: BatchManager, limit: int) -> Iterator[bytes]:
    """The short hashes of cached blocks, at most `limit`."""
    if isinstance(manager, PagedBatchManager):
        yield from map(short_hash, manager.prefix.hashes(limit))


def _queued_tokens(manager: BatchManager) -> int:
    """The tokens that are to be computed before every sequence has its next token, without those of decodes.

    A waiting sequence will find some of its tokens in the cache. This is looked up for the first
    `MAX_MATCHED` of them; of the others, the same share of tokens counts.
    """
    running: int = sum(max(0, sequence.num_uncomputed - 1) for sequence in manager.running)
    waiting: int = sum(sequence.num_tokens - _num_swapped(sequence) for sequence in manager.waiting)
    if not isinstance(manager, PagedBatchManager) or not isinstance(manager.prefix, PrefixSharing):
        return running + waiting
    known, found = 0, 0
    for sequence in manager.first_waiting(MAX_MATCHED):
        stop = (sequence.num_tokens - 1) // manager.block_size
        known += sequence.num_tokens
        found += manager.block_size * len(manager.prefix.cache.match(sequence.stream_of(0, stop), 0, stop))
    return running + waiting - (waiting * found // known if known else 0)


def _num_swapped(sequence: Sequence) -> int:
    """The tokens of a swapped sequence that cost nothing: those on the host, and the one to decode next."""
    swapped = sequence.swapped if isinstance(sequence, PagedSequence) else None
    return 0 if swapped is None else swapped.num_computed + 1
