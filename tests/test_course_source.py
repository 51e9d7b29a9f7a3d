"""Edits of a learner's source: bodies on the line of the signature, and characters that end no line.

Oracle: Python's own parser, and the text of all other functions.
"""

import ast

import pytest

from tiny_llm_course.source import blanked, body_lines, functions, with_blank, with_body_of

SHAPES = {
    "one line": "def f(x): return x\n",
    "continued": "def f(x): return x + \\\n    1\n",
    "two statements": "def f(x): y = x; return y\n",
    "letters": "def f(\u00e4): return \u00e4\n",
    "usual": "def f(x):\n    return x\n",
    "documented": 'def f(x):\n    """A."""\n    return x\n',
}
REFERENCE = "def f(x):\n    y = 2 * x\n    return y\n"
ODD = '"""A module."""\n\nx = "\f"\n\f\n# \u2028 \x85 \x1c\n\n\ndef f(x):\n    return x\n'


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inside", [False, True])
def test_a_body_may_begin_on_the_line_of_the_signature(shape: str, inside: bool) -> None:
    before, after = "def a():\n    return 1\n\n\n", "\n\ndef z():\n    return 3\n"
    own, reference, name = SHAPES[shape], REFERENCE, "f"
    if inside:
        own, reference = (
            f"class C:\n    {s.replace(chr(10), chr(10) + '    ').rstrip()}\n" for s in (own, reference)
        )
        name = "C.f"
    source = before + own + after
    for edited in (
        with_body_of(source, reference, name),
        with_blank(source, name, "m"),
        blanked(source, {name: "m"}),
    ):
        assert list(functions(edited)) == ["a", name, "z"]
        assert edited.startswith(before)
        assert edited.endswith(after)
    assert "2 * x" in with_body_of(source, reference, name)
    taken = with_body_of(reference, source, name)
    [mine], [given] = ([ast.dump(n) for n in functions(s)[name].body[-1:]] for s in (taken, source))
    assert mine == given


def test_a_character_that_python_does_not_count_as_a_line_end_moves_nothing() -> None:
    ast.parse(ODD)
    edited = with_body_of(ODD, REFERENCE, "f")
    assert edited == ODD.replace(
        "    return x\n", "    # skipped: the reference's code\n    y = 2 * x\n    return y\n"
    )
    assert body_lines(ODD, "f") == ["    return x"]
