"""The days that still lack something. A finished day leaves its list; with both empty this module goes."""

WITHOUT_EXAMPLES = frozenset(
    {
        "2.1",
        "2.2",
        "2.3",
        "2.4",
        "2.5",
        "2.6",
        "2.7",
        "3.1",
        "3.2",
        "3.3",
        "3.4",
        "3.5",
    }
)
WITHOUT_SECOND_SOLUTION = WITHOUT_EXAMPLES
