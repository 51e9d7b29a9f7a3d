# A second solution of day 1.5, written only from the docstrings.
"""The decoder: look up the tokens, run the blocks, normalize, project to logits.

It knows nothing of caches, pages, batches or quantization, so all weeks of the course use the same model: its
matrices are objects that the loader made, and it hands keys and values to the context.
"""

from math import sqrt

import mlx.core as mx

from tiny_llm_checkpoints.model_config import ModelConfig

from .kv_context import KVContext
from .linear import LinearLike, ScaledRows
from .norm import rms_norm


class Model:
    def __call__(self, tokens: mx.array, context: KVContext) -> mx.array:
        x = self.embed_tokens.rows(tokens)
        for layer in self.layers:
            x = layer(x, context)
        if context.logit_rows is not None:
            x = mx.take(x, context.logit_rows, axis=1)
        return self.lm_head(rms_norm(x, self.norm, self.config.rms_norm_eps))


def build_model(config: ModelConfig, linears: ByName[LinearLike], vectors: ByName[mx.array]) -> Model:
    matrix = linears["model.embed_tokens"]
    embed_tokens = ScaledRows(matrix, sqrt(config.hidden_size)) if config.scale_embeddings else matrix
    layers = tuple(
        build_block(config, layer, inv_freq, linears, vectors)
        for layer, inv_freq in enumerate(layer_frequencies(config))
    )
    lm_head = matrix if config.tie_word_embeddings else linears["lm_head"]
    return Model(config, embed_tokens, layers, vectors["model.norm"], lm_head)
