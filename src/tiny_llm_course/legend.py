"""What the letters in the shapes of a day's docstrings mean."""

import ast
import re

from .repo import Repo
from .source import docstrings
from .starter import starter
from .units import Unit


def legend(repo: Repo, unit: Unit) -> list[str]:
    """`B batch` and so on, of the letters that a day or a part uses; empty where its docstrings need none.

    A letter beside one of its own, such as N in the [N, K] of a matrix, is explained where it stands.
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
    """What each letter means, as the reference's package says it: `L or T tokens` for L, and for T."""
    package = ast.parse((repo.reference / "__init__.py").read_text(encoding="utf-8"))
    said = re.search(r"in letters: (.*?)\.(?:\n|$)", ast.get_docstring(package) or "", re.DOTALL)
    meanings = " ".join(said[1].split()).split(", ") if said else []
    return {letter: meaning for meaning in meanings for letter in re.findall(r"(?:^|or )([A-Z]\w*)", meaning)}
