# A second solution of day 1.5, written from the docstrings alone.
"""The decoder: look tokens up, run the blocks, normalise, project to logits. One file for every week.

It knows nothing of caches, pages, batches or quantization: its matrices are objects that the loader made,
and keys and values go to the context.
"""

from math import sqrt

import mlx.core as mx

from tiny_llm_checkpoints.model_config import ModelConfig

from .kv_context import KVContext
from .linear import LinearLike, ScaledRows
from .norm import rms_norm


class Model:
    def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
        """Compute the logits of the next token: token ids [B, L] int32 -> [B, R, vocab_size].

        Every layer gets the context of the pass. `context.logit_rows`, [R] int32, names the rows along L that
        need logits, the same in every sequence and in the order given; None: all, R = L. Choose them after
        the last layer: until there the other tokens read every row. Choose them before the last norm and the
        projection, so that the largest matrix of the model sees only R rows. The last norm uses
        `config.rms_norm_eps`.

        >>> from tiny_llm.linear import Linear
        >>> from types import SimpleNamespace as Some
        >>> table = Linear(mx.array([[4.0, 4.0], [-2.0, 2.0]]))  # two tokens, and no layers
        >>> model = Model(Some(rms_norm_eps=0.0), table, (), mx.ones(2), table)
        >>> model(mx.array([[0, 1]]), Some(logit_rows=None)).tolist()
        [[[8.0, 0.0], [0.0, 4.0]]]
        """
        x = self.embed_tokens.rows(tokens)
        for layer in self.layers:
            x = layer(x, context)
        if context.logit_rows is not None:
            x = mx.take(x, context.logit_rows, axis=1)
        return self.lm_head(rms_norm(x, self.norm, self.config.rms_norm_eps))


def build_model(config: ModelConfig, linears: ByName[LinearLike], vectors: ByName[mx.array]) -> Model:
    """Assemble a model from its parameters, named as in a checkpoint but without `.weight`.

    linears: the matrices; vectors: the norms' weights. Both read a parameter from the file when it is asked
    for and do not keep it: ask for each name once, and for none that `config.parameter_shapes` does not list.

    - `embed_tokens` is the matrix "model.embed_tokens". If `config.scale_embeddings` (Gemma), rows that are
      looked up are multiplied by sqrt(hidden_size): wrap the matrix in `ScaledRows(matrix, scale)`.
    - `layers`, a tuple: `build_block` for each layer from 0 on, with its array of
      `layer_frequencies(config)`.
    - `norm` is the vector "model.norm".
    - `lm_head` is the matrix "lm_head". If `config.tie_word_embeddings`, there is none of that name: it is
      the embedding's matrix, the same object, so that it is in memory once, and without the scale.

    >>> from tiny_llm.loader import load_model
    >>> model = load_model(None).model  # the embedded model, assembled by this function
    >>> len(model.layers), model.lm_head is model.embed_tokens
    (30, True)
    """
    matrix = linears["model.embed_tokens"]
    embed_tokens = ScaledRows(matrix, sqrt(config.hidden_size)) if config.scale_embeddings else matrix
    layers = tuple(
        build_block(config, layer, inv_freq, linears, vectors)
        for layer, inv_freq in enumerate(layer_frequencies(config))
    )
    lm_head = matrix if config.tie_word_embeddings else linears["lm_head"]
    return Model(config, embed_tokens, layers, vectors["model.norm"], lm_head)
