"""The days that still lack something. A finished day leaves its list; with both empty this module goes."""

WITHOUT_EXAMPLES = frozenset({"3.6", "3.7"})
WITHOUT_SECOND_SOLUTION = WITHOUT_EXAMPLES
