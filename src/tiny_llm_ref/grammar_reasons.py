"""The reasons for which the library llguidance refuses a grammar, in our words."""

import re

from tiny_llm_checkpoints.errors import shown

LONGEST_REASON = 300  # characters of a reason in an error

# The library shows an expression, and marks the place below it with "^".
_EXPRESSION = re.compile(
    r"regex parse error:\n {4}(?P<pattern>.*)\n {4}(?P<before> *)\^.*\nerror: (?P<problem>.*)"
)
_ANCHOR = re.compile(r"lookarounds not supported yet; \w+ in regex /(?P<pattern>.*)/")
_PLACE = re.compile(r"(?:at )?(?P<line>\d+)\(\d+\): (?P<problem>.*)", re.DOTALL)
_LINES = re.compile(r"(?:\n *\d+ \| [^\n]*|\n *\^ *)+\s*\Z")  # of the grammar, which the library shows


def reworded(reason: str, *, names_line: bool = False) -> str:
    """Return the library's reason in one line of our words.

    names_line: say in which line of the grammar the problem is, if the library does.

    >>> reworded('at 1(8): unknown name: "a"\\n   1 | start: a\\n              ^', names_line=True)
    'unknown name: "a" (line 1)'
    """
    reason = reason.replace("<non-verbose/>", "").split("while processing")[0].strip()
    line = ""
    if found := _PLACE.fullmatch(reason):
        reason = _LINES.sub("", found["problem"])
        line = f" (line {found['line']})" if names_line else ""
    return " ".join(_problem(reason).split())[:LONGEST_REASON] + line


def _problem(reason: str) -> str:
    """A reason without its place in a grammar."""
    if found := _EXPRESSION.search(reason):
        place = f"is wrong at character {len(found['before']) + 1}: {found['problem']}"
        return f"the regular expression {_quoted(found['pattern'])} {place}"
    if found := _ANCHOR.search(reason):
        problem = "has an anchor or a word boundary inside, which is not supported"
        return f"the regular expression {_quoted(found['pattern'])} {problem}"
    if found := re.fullmatch(r"Unimplemented keys: \[(.*)\]", reason):
        return f"{found[1]} is not supported"
    if reason == "NoExtensionBias":
        return "no text satisfies it"
    if reason.startswith("oneOf"):  # the library would have its caller ignore the difference
        return "oneOf needs alternatives that exclude each other, such as by a constant: use anyOf"
    return reason


def _quoted(pattern: str) -> str:
    """An expression for an error message, shortened, with each backslash written once."""
    return shown(pattern).replace("\\\\", "\\")
