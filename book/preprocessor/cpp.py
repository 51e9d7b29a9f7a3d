"""Shows C++ of the kernels by name: the directive `cpp FILE NAME`.

FILE is relative to the kernels' source folder. NAME is a function or a type, or a member, `Type::member`.
The code must be balanced in every branch of `#if`, as ours is: the text is read, not compiled.
"""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from textwrap import dedent

from .errors import BookError

CSRC = Path(__file__).parents[2] / "src" / "tiny_llm_kernels" / "csrc"

_SILENT = re.compile(
    r"//[^\n]*|/\*.*?\*/"  # comments
    r'|"(?:\\.|[^"\\\n])*"'  # strings
    r"|(?<![\w'])'(?:\\.|[^'\\\n])+'"  # characters, but not the separators of digits
    r"|^[ \t]*\#[^\n]*(?:\\\n[^\n]*)*",  # lines of the preprocessor
    re.MULTILINE | re.DOTALL,
)
_ATTRIBUTES = re.compile(r"__attribute__\s*\(\(.*?\)\)|\b_Pragma\s*\(.*?\)", re.DOTALL)
_NAMESPACE = re.compile(r"^(?:inline\s+)?namespace\b")
_TYPE = re.compile(
    r"\b(?:struct|class|enum(?:\s+class)?|union)\s+(?:alignas\s*\([^()]*\)\s*)?"
    r"(?P<name>\w+(?:\s*<[^{};()]*>)?)\s*(?:final\s*)?(?::[^:][^{}]*)?$"
)
_FUNCTION = re.compile(r"(?P<name>(?:\w+::)*(?:operator\s*(?:\(\)|[^\s(]+)|(?!alignas\b)~?\b\w+))\s*\(")
_TEMPLATE = re.compile(r"^template\s*<(?:[^<>]|<[^<>]*>)*>\s*")
_RANGE = re.compile(r'^(?P<name>.+?) from "(?P<first>.+)" to "(?P<last>.+)"$')


def cpp(arguments: str) -> str:
    """The directive: a fenced block with a definition, or with the lines of it that two texts delimit.

    arguments: `FILE NAME`, or `FILE NAME from "TEXT" to "TEXT"`. A name with several definitions, such as an
    overload, shows all of them. Raises `BookError` for anything that does not exist.
    """
    file, _, rest = arguments.partition(" ")
    cut = _RANGE.match(rest)
    code = cpp_source_of(file, cut["name"] if cut else rest)
    if cut:
        code = _between(code, cut["first"], cut["last"])
    return f"```cpp\n{code}\n```"


def cpp_source_of(file: str, name: str) -> str:
    """The source of all definitions of that name, without the indentation of their class."""
    path = CSRC / file
    if not name or not path.is_file():
        raise BookError(f"{file!r} is not a file of {CSRC.name}, or the name is missing: write FILE NAME")
    definitions = _definitions(path)
    found = [code for known, code in definitions if known == name]
    if not found:
        guess = get_close_matches(name, [known for known, _ in definitions], n=1)
        advice = f"; did you mean {guess[0]}?" if guess else ""
        raise BookError(f"{file} has no {name!r}{advice}")
    return "\n\n".join(found)


def _between(code: str, first: str, last: str) -> str:
    """The lines from the one that contains `first` to the next one that contains `last`."""
    lines = code.splitlines()
    begin = [place for place, line in enumerate(lines) if first in line]
    if len(begin) != 1:
        raise BookError(f"{len(begin)} lines contain {first!r}: it must be one")
    end = [place for place in range(begin[0], len(lines)) if last in lines[place]]
    if not end:
        raise BookError(f"no later line contains {last!r}")
    return dedent("\n".join(lines[begin[0] : end[0] + 1]))


@cache
def _definitions(path: Path) -> tuple[tuple[str, str], ...]:
    """The functions and types of a file by name, members as `Type::member`."""
    source = path.read_text(encoding="utf-8")
    plain = _SILENT.sub(_blank, source)
    return tuple(
        (name, dedent(source[source.rfind("\n", 0, start) + 1 : end]).rstrip())
        for name, start, end in _scan(plain, 0, len(plain), "", path.name)
    )


def _blank(found: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", found[0])


def _scan(plain: str, begin: int, end: int, scope: str, file: str) -> Iterator[tuple[str, int, int]]:
    """The definitions between two places of a text without comments: name, first and last place."""
    start = place = begin
    while place < end:
        if plain[place] == ";" or (plain[place] == ":" and _is_access(plain[start:place])):
            start = place + 1
        elif plain[place] == "{":
            close = _closing(plain, place, end, file)
            head = plain[start:place]
            first = start + len(head) - len(head.lstrip())
            yield from _block(plain, first, place, close, scope, file)
            after = close + 1
            is_type = plain[after : after + 1] == ";"
            start = place = after + is_type
            continue
        place += 1


def _is_access(text: str) -> bool:
    return text.split()[-1:] in (["public"], ["private"], ["protected"])


def _block(
    plain: str, first: int, opening: int, close: int, scope: str, file: str
) -> Iterator[tuple[str, int, int]]:
    """What one pair of braces defines: a namespace's contents, a type and its members, or a function."""
    head = _ATTRIBUTES.sub(_blank, plain[first:opening])
    if _NAMESPACE.match(head):
        yield from _scan(plain, opening + 1, close, scope, file)
        return
    head = _TEMPLATE.sub("", head).rstrip()
    last = close + 1 + (plain[close + 1 : close + 2] == ";")
    if is_type := _TYPE.search(head):
        name = f"{scope}{is_type['name']}"
        yield name, first, last
        yield from _scan(plain, opening + 1, close, f"{name}::", file)
    elif is_function := _FUNCTION.search(head):
        yield f"{scope}{is_function['name']}", first, last


def _closing(plain: str, opening: int, end: int, file: str) -> int:
    """The place of the brace that closes the one at `opening`."""
    depth = 0
    for place in range(opening, end):
        depth += {"{": 1, "}": -1}.get(plain[place], 0)
        if depth == 0:
            return place
    raise BookError(f"{file}: the brace in line {plain.count(chr(10), 0, opening) + 1} is never closed")
