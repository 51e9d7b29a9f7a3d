"""What a model file says: its configuration, its tensors by name, its tokenizer and its chat template.

`hub.find_model` gives a path, and `readers.read_checkpoint` makes a `Checkpoint` of what is there. Knows
nothing of models, pages or requests.

Shapes are written in letters: N outputs of a matrix, K its inputs, D head size.
"""
