"""`python -m tiny_llm_course COMMAND`: what `pdm run COMMAND` runs."""

from .main import main

main()
