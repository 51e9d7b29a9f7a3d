"""An engine that speculates whatever a step costs: what it drafts does not depend on the machine's speed."""

from typing import Any

from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.speculation import Speculation
from tiny_llm.step_costs import StepCosts

from tiny_llm import LLM


class FixedCosts(StepCosts):
    """Costs that no step corrects."""

    def observe(self, num_rows: int, seconds: float) -> None:
        """Ignored."""


FREE = FixedCosts.of([(1, 1.0), (64, 1.0)])  # more rows cost nothing


def guessing_llm(**options: Any) -> LLM:
    """An engine with speculation for which more rows cost nothing."""
    llm = LLM(**{"speculative_config": {}, **options})
    manager = llm.core.manager
    assert isinstance(manager, PagedBatchManager)
    assert isinstance(manager.drafting, Speculation)
    manager.drafting.costs = FREE
    return llm
