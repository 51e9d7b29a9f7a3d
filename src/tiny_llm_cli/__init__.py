"""The `tiny-llm` command: one thin module per sub-command.

Parses command lines and shows results; the engine comes from the public names of `tiny_llm`. Nothing heavy
(MLX, the engine, rich) is imported before a command runs, so that help is instant.
"""
