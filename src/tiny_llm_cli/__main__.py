"""`python -m tiny_llm_cli` is the `tiny-llm` command."""

from .main import main

main()
