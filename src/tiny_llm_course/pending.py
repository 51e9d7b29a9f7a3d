"""The days that still lack something. A finished day leaves its list; with both empty this module goes."""

WITHOUT_EXAMPLES = frozenset(
    {
        "1.1",
        "1.2",
        "1.3",
        "1.4",
        "1.5",
        "1.6",
        "1.7",
        "3.1",
        "3.2",
        "3.3",
        "3.4",
        "3.5",
        "3.6",
        "3.7",
    }
)
# A solution of 2.4 unpacks every matrix in each step: too slow for the suites that run the real model.
WITHOUT_SECOND_SOLUTION = (WITHOUT_EXAMPLES - {"1.1"}) | {"2.4"}
