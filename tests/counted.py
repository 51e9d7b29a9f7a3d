"""A batch manager that counts what prefix sharing saves."""

from collections import Counter

from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.step import Plan


class Counted(PagedBatchManager):
    """A batch manager that counts the tokens that each request computes, and the blocks that are copied."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.computed: Counter[str] = Counter()
        self.num_copies = 0

    def _schedule(self) -> Plan:
        plan = super()._schedule()
        for sequence, start, stop, copies in plan.chunks:
            self.computed[sequence.request_id] += stop - start
            self.num_copies += len(copies)
        return plan
