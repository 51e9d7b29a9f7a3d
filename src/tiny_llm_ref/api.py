"""The public names of `tiny_llm` and `tiny_llm_ref`, and the module that defines each.

Names are imported on first use, so that importing the package costs nothing.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str

    from tiny_llm_checkpoints.errors import ConfigError as ConfigError
    from tiny_llm_checkpoints.errors import ModelFileError as ModelFileError
    from tiny_llm_checkpoints.errors import TinyLLMError as TinyLLMError
    from tiny_llm_checkpoints.model_config import ModelConfig as ModelConfig

    from .batch_manager import DraftStats as DraftStats
    from .beam_search import BeamSearchPageManager as BeamSearchPageManager
    from .beam_search import BeamSearchParams as BeamSearchParams
    from .beam_search import fork_sequence as fork_sequence
    from .block_events import PoolChange as PoolChange
    from .block_events import SequenceView as SequenceView
    from .chunked_prefill import share_budget as share_budget
    from .compaction import compact_memory as compact_memory
    from .compaction import compact_pages as compact_pages
    from .engine import Engine as Engine
    from .engine_config import EngineConfig as EngineConfig
    from .engine_core import EngineCore as EngineCore
    from .engine_core import EngineStats as EngineStats
    from .errors import DoubleFreeError as DoubleFreeError
    from .errors import DuplicateRequestError as DuplicateRequestError
    from .errors import EngineDeadError as EngineDeadError
    from .errors import EngineStoppingError as EngineStoppingError
    from .errors import ForkedProcessError as ForkedProcessError
    from .errors import OutOfBlocksError as OutOfBlocksError
    from .errors import OutOfResourcesError as OutOfResourcesError
    from .errors import QueueFullError as QueueFullError
    from .errors import RequestFailedError as RequestFailedError
    from .errors import RequestTooLargeError as RequestTooLargeError
    from .errors import SamplingParamsError as SamplingParamsError
    from .errors import UnknownBlockError as UnknownBlockError
    from .errors import WrongThreadError as WrongThreadError
    from .kernels import KernelInfo as KernelInfo
    from .kernels import kernel_info as kernel_info
    from .kv_pool import KVPool as KVPool
    from .llm import LLM as LLM
    from .outputs import BeamSearchOutput as BeamSearchOutput
    from .outputs import BeamSearchSequence as BeamSearchSequence
    from .outputs import CompletionOutput as CompletionOutput
    from .outputs import Logprob as Logprob
    from .outputs import RequestEvent as RequestEvent
    from .outputs import RequestOutput as RequestOutput
    from .outputs import RequestUsage as RequestUsage
    from .outputs import TextDelta as TextDelta
    from .page_block import PageBlock as PageBlock
    from .page_block import copy_block as copy_block
    from .page_block import paged_attention_kernel as paged_attention_kernel
    from .paged_attention import BlockAllocator as BlockAllocator
    from .paged_attention import BlockTable as BlockTable
    from .paged_batch import PagedBatchManager as PagedBatchManager
    from .paged_cache import PagedKVCache as PagedKVCache
    from .policies import Policies as Policies
    from .prefix_cache import PrefixCache as PrefixCache
    from .prefix_kv_cache import PrefixCachingKVCache as PrefixCachingKVCache
    from .prompts import TextPrompt as TextPrompt
    from .prompts import TokensPrompt as TokensPrompt
    from .sampling_params import SamplingParams as SamplingParams
    from .speculative_config import SpeculativeConfig as SpeculativeConfig
    from .structured_outputs import StructuredOutputsParams as StructuredOutputsParams

_MODULE_OF = {
    "LLM": ".llm",
    "SamplingParams": ".sampling_params",
    "StructuredOutputsParams": ".structured_outputs",
    "RequestOutput": ".outputs",
    "CompletionOutput": ".outputs",
    "Logprob": ".outputs",
    "TextDelta": ".outputs",
    "TextPrompt": ".prompts",
    "TokensPrompt": ".prompts",
    "Engine": ".engine",
    "RequestEvent": ".outputs",
    "RequestUsage": ".outputs",
    "EngineConfig": ".engine_config",
    "ModelConfig": "tiny_llm_checkpoints.model_config",
    "ConfigError": "tiny_llm_checkpoints.errors",
    "EngineCore": ".engine_core",
    "EngineStats": ".engine_core",
    "DraftStats": ".batch_manager",
    "SpeculativeConfig": ".speculative_config",
    "PoolChange": ".block_events",
    "SequenceView": ".block_events",
    "BlockAllocator": ".paged_attention",
    "BlockTable": ".paged_attention",
    "KVPool": ".kv_pool",
    "PageBlock": ".page_block",
    "copy_block": ".page_block",
    "paged_attention_kernel": ".page_block",
    "PagedBatchManager": ".paged_batch",
    "PagedKVCache": ".paged_cache",
    "KernelInfo": ".kernels",
    "kernel_info": ".kernels",
    "Policies": ".policies",
    "PrefixCache": ".prefix_cache",
    "PrefixCachingKVCache": ".prefix_kv_cache",
    "BeamSearchParams": ".beam_search",
    "BeamSearchPageManager": ".beam_search",
    "BeamSearchOutput": ".outputs",
    "BeamSearchSequence": ".outputs",
    "fork_sequence": ".beam_search",
    "compact_memory": ".compaction",
    "compact_pages": ".compaction",
    "share_budget": ".chunked_prefill",
    "SamplingParamsError": ".errors",
    "TinyLLMError": "tiny_llm_checkpoints.errors",
    "OutOfBlocksError": ".errors",
    "OutOfResourcesError": ".errors",
    "DoubleFreeError": ".errors",
    "UnknownBlockError": ".errors",
    "RequestTooLargeError": ".errors",
    "RequestFailedError": ".errors",
    "QueueFullError": ".errors",
    "EngineStoppingError": ".errors",
    "EngineDeadError": ".errors",
    "DuplicateRequestError": ".errors",
    "ModelFileError": "tiny_llm_checkpoints.errors",
    "ForkedProcessError": ".errors",
    "WrongThreadError": ".errors",
}

if not TYPE_CHECKING:  # type checkers cannot evaluate this list, and would see no exports
    __all__ = [*_MODULE_OF]  # noqa: PLE0604 (its keys are strings)


def __getattr__(name: str) -> object:
    """Import a public name from its module; AttributeError for any other name."""
    if name == "__version__":
        from importlib.metadata import version

        return version("tiny-llm")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__package__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name], __package__), name)


def __dir__() -> list[str]:
    """The public names and the package's attributes, for tab completion: no submodules, no helpers."""
    attributes = [name for name in vars(sys.modules[__package__ or ""]) if name.startswith("__")]
    return sorted({*_MODULE_OF, "__version__", *attributes})
