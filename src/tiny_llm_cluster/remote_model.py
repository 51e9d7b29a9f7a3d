"""A model whose engine runs on replicas: the tokenizer and the description are here, the weights are not."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from tiny_llm.chat_prompts import ChatPrompts
from tiny_llm.grammar_compiler import GrammarCompiler
from tiny_llm.kv_pool import DTYPES
from tiny_llm.layer_groups import group_layers
from tiny_llm.loader import describe_model, load_chat_template
from tiny_llm.page_layout import PageLayout
from tiny_llm.prefix_cache import TokenBlocks
from tiny_llm.request_maker import RequestMaker

from tiny_llm import EngineConfig, SamplingParams

from .answers import Replicas
from .remote_engine import RemoteEngine, Routed, seeds_of


class RemoteModel:
    """A loaded model as the server uses it (`ServedModel`).

    engine_options: the arguments of `LLM`, as the replicas get them. replicas, routing: as in `RemoteEngine`.
    ingress: its name if it is one of several. Raises the errors of `LLM`.
    """

    def __init__(
        self,
        engine_options: Mapping[str, Any],
        replicas: Replicas,
        routing: Routed,
        ingress: str | None = None,
    ) -> None:
        options = dict(engine_options)
        model, content_format = (
            options.pop("model", None),
            options.pop("chat_template_content_format", "auto"),
        )
        self.engine_config = config = EngineConfig.from_options(**options)
        described = describe_model(model, config.generation_config)
        self.model_name = described.name
        self.sampling_defaults, self.sampling_source = described.sampling_defaults, described.sampling_source
        self.tokenizer, model_config = described.checkpoint.tokenizer, described.checkpoint.config
        self.chat_template = load_chat_template(described.path, self.tokenizer, content_format)
        self.max_model_len = config.model_len(model_config, DTYPES[config.kv_cache_dtype].size)
        maker = RequestMaker(
            self.tokenizer,
            model_config.vocab_size,
            config.max_num_seqs,
            self.max_model_len,
            chat_prompts=ChatPrompts(self.model_name, self.chat_template, self.tokenizer, self.max_model_len),
            defaults=SamplingParams.from_options(**self.sampling_defaults),
            grammars=GrammarCompiler(self.tokenizer, model_config.vocab_size, model_config.eos_token_ids),
        )
        layout = PageLayout(
            tuple(group_layers(model_config.windows)), config.block_size, config.max_num_batched_tokens
        )
        self.engine = RemoteEngine(
            replicas,
            routing,
            maker,
            partial(_new_stream, layout),
            seeds_of(config.seed, ingress),
        )


def _new_stream(layout: PageLayout, salt: str) -> TokenBlocks:
    """The empty stream of the layers without a window, or of the first group of layers if all have one."""
    kept = next((place for place, group in enumerate(layout.groups) if group.window is None), 0)
    streams: list[TokenBlocks] = layout.streams(salt)
    return streams[kept]
