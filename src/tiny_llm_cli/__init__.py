"""The `tiny-llm` command: one thin module per sub-command.

Knows what people type and how answers are shown; what it shows comes from the names of `tiny_llm`.
Nothing heavy (MLX, the engine, rich) is imported before a command runs, so that help is instant.
"""
