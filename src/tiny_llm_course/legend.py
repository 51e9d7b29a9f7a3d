"""Explains the letters in the shapes of a day's docstrings."""

import ast
import re

from .repo import Repo
from .source import docstrings
from .starter import starter
from .units import Unit


def legend(repo: Repo, unit: Unit) -> list[str]:
    """The letters that a unit's docstrings use, such as `B batch`; empty if they use none.

    A shape with a letter that is not in the package's list, such as [N, K] of a matrix, is left out: its
    docstring explains the letters.
    """
    meanings = _meanings(repo)
    shapes = [
        set(re.findall(r"\b[A-Z][a-z]*\b", shape))
        for module in unit.modules
        for text in docstrings(starter(repo, module, unit))
        for shape in re.findall(r"\[.*?\]", text)
    ]
    elsewhere = set().union(*(letters for letters in shapes if letters - meanings.keys()))
    used = set().union(*shapes) - elsewhere
    return list(dict.fromkeys(meaning for letter, meaning in meanings.items() if letter in used))


def _meanings(repo: Repo) -> dict[str, str]:
    """The meaning of each letter, from the reference's package docstring; `L or T tokens` is for L and T."""
    package = ast.parse((repo.reference / "__init__.py").read_text(encoding="utf-8"))
    said = re.search(r"in letters: (.*?)\.(?:\n|$)", ast.get_docstring(package) or "", re.DOTALL)
    meanings = " ".join(said[1].split()).split(", ") if said else []
    return {letter: meaning for meaning in meanings for letter in re.findall(r"(?:^|or )([A-Z]\w*)", meaning)}
