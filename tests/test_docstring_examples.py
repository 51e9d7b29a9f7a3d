"""The examples in the docstrings of the reference and the checkpoints. Oracle: the results in them."""

import doctest
import importlib
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
MODULES = [
    f"{package}.{file.stem}"
    for package, folder in (("tiny_llm", "tiny_llm_ref"), ("tiny_llm_checkpoints", "tiny_llm_checkpoints"))
    for file in sorted((SRC / folder).glob("*.py"))
    if ">>> " in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_in_docstrings_are_right(module: str) -> None:
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0
