"""Entry point of `python -m tiny_llm_course COMMAND`, which `pdm run COMMAND` runs."""

from .main import main

main()
