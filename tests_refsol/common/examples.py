"""The Hypothesis settings of the suites."""

from hypothesis import Phase, settings

# The same examples in every run, and no database of past failures. For a slow property, use fewer examples:
# `settings(quick, max_examples=60)`.
quick = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
