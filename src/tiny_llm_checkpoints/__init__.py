"""Read model files: configuration, tensors by name, tokenizer and chat template.

`hub.find_model` returns a path, and `readers.read_checkpoint` reads it into a `Checkpoint`. This package does
not depend on models, pages or requests.

Shapes are written in letters: N is the number of outputs of a matrix, K its inputs, D the head size.
"""
