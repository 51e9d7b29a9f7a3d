"""Suggestions for a name that is not known."""

import pytest

from tiny_llm_checkpoints.suggestions import closest, did_you_mean, unknown_name

KNOWN = ["temperature", "top_p", "top_k", "max_tokens", "--num-blocks"]


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("temprature", ["temperature"]),
        ("temp", ["temperature"]),  # the start of a name
        ("topP", ["top_p"]),  # other case, dashes and underscores: no other name is suggested
        ("MAX-TOKENS", ["max_tokens"]),
        ("num_blocks", ["--num-blocks"]),
        ("top", ["top_p", "top_k"]),
        ("xyzzy", []),
        ("", []),
        ("--", []),
    ],
)
def test_the_closest_known_names_are_suggested(name: str, suggested: list[str]) -> None:
    assert closest(name, KNOWN) == suggested


def test_at_most_three_names_are_suggested() -> None:
    assert len(closest("a", [f"a{number}" for number in range(9)])) == 3


def test_nothing_is_suggested_for_a_long_name() -> None:
    """Comparing costs time in proportion to the length, and a client chooses that."""
    assert closest("x" * 65, ["x" * 66]) == []


def test_the_fallback_is_shown_only_if_there_is_no_suggestion() -> None:
    assert did_you_mean("xyzzy", KNOWN) == ""
    assert did_you_mean("xyzzy", KNOWN, "see --help") == "; see --help"
    assert did_you_mean("top", KNOWN, "see --help") == "; did you mean top_p or top_k?"


def test_an_error_about_an_unknown_name_suggests_a_known_one_or_lists_all() -> None:
    assert unknown_name("option", "topp", KNOWN) == "unknown option 'topp'; did you mean top_p?"
    listed = "temperature, top_p, top_k, max_tokens, --num-blocks"
    assert unknown_name("option", "xyzzy", KNOWN) == f"unknown option 'xyzzy'; known: {listed}"
