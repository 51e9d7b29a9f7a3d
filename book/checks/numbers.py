"""Finds numbers in a chapter's text that no directive computed.

A number with a thousands separator, a unit, a percent sign or a factor is a claim: it must come from `value`,
`calc`, or a table of results. Numbers of an example (four requests, block 7) need no source. At the start
of a chapter, `<!-- given: ... -->` lists the numbers that are assumed or quoted, with where they are from.
"""

import re
from pathlib import Path

UNITS = (
    "ms|s|us|µs|seconds|minutes|hours|GB|MB|KB|kB|GiB|MiB|KiB|bytes|tokens/s|GB/s|GFLOP/s|GOP/s|TFLOP/s|times"
)
_CLAIM = re.compile(
    rf"(?<![\w.,])(?:\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?|\d+(?:\.\d+)?(?:\s?%|\s?x\b|\u00d7|\s(?:{UNITS})\b))"
)
_IGNORED = re.compile(
    r"^(`{3,})[^\n]*\n.*?^\1[ \t]*$"  # fenced blocks
    r"|`[^`\n]+`"  # code spans and formulas
    r"|\{\{[^{}\n]*\}\}"  # directives
    r"|<!--.*?-->"
    r"|<[^>\n]+>"
    r"|\]\([^)\n]+\)",  # addresses of links
    re.MULTILINE | re.DOTALL,
)
_GIVEN = re.compile(r"<!-- given: (.*?) -->", re.DOTALL)


def number_problems(sources: Path) -> list[str]:
    """A line for each number without a source."""
    return [
        f"{chapter.relative_to(sources)}:{line}: {claim!r} has no source: use calc or value, or list it as "
        "given"
        for chapter in sorted(sources.rglob("*.md"))
        for line, claim in claims(chapter.read_text(encoding="utf-8"))
    ]


def claims(text: str) -> list[tuple[int, str]]:
    """The numbers without a source, with their lines."""
    given = " ".join(_GIVEN.findall(text))
    plain = _IGNORED.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    return [
        (plain.count("\n", 0, found.start()) + 1, found[0])
        for found in _CLAIM.finditer(plain)
        if found[0] not in given
    ]
