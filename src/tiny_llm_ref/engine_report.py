"""What an engine reports to a router: the prefixes that it has cached, and the work that waits.

A router sends a request to the replica that has most of its prompt cached and has little work. It finds the
prompt's hashes as a sequence does, with `PageLayout.streams`.
"""

from dataclasses import dataclass

from .engine_core import EngineCore, EngineStats
from .paged_batch import PagedBatchManager
from .sequence import PagedSequence, Sequence


@dataclass(frozen=True)
class EngineReport:
    """A snapshot of an engine between two steps, as plain numbers and bytes.

    prefix_hashes: the hashes of cached blocks. If the layers have different windows, these are the blocks of
    all groups of layers, and a prompt is a hit only as far as each group has the blocks that it needs
    (`WindowedPrefixSharing.longest_hit`). num_queued_tokens: prompt tokens of waiting and running sequences
    that are not computed yet.
    """

    prefix_hashes: tuple[bytes, ...]
    num_queued_tokens: int
    stats: EngineStats


def report_of(core: EngineCore, max_hashes: int | None = None) -> EngineReport:
    """The report of a core. Costs O(blocks that the cache keeps + sequences); call it in the engine's thread.

    max_hashes: if more blocks are cached, those that will be evicted first are left out; None: no limit.

    >>> from tiny_llm.sampling_params import SamplingParams
    >>> core = EngineCore(PagedBatchManager(8, 4, 2), ())
    >>> core.add_request("a", list(range(9)), SamplingParams())
    True
    >>> report = report_of(core)
    >>> report.prefix_hashes, report.num_queued_tokens, report.stats.num_waiting
    ((), 9, 1)
    """
    manager = core.manager
    hashes = manager.prefix.hashes(max_hashes) if isinstance(manager, PagedBatchManager) else ()
    return EngineReport(
        prefix_hashes=tuple(hashes),
        num_queued_tokens=sum(_num_queued(one) for one in (*manager.waiting, *manager.running)),
        stats=core.stats,
    )


def _num_queued(sequence: Sequence) -> int:
    """The number of a sequence's prompt tokens that are not computed yet; those on the host are computed."""
    computed = sequence.num_computed
    if isinstance(sequence, PagedSequence) and sequence.swapped is not None:
        computed = max(computed, sequence.swapped.num_computed)
    return max(0, len(sequence.prompt) - computed)
