"""Create the batch manager that a configuration asks for."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial

from tiny_llm_checkpoints.errors import ConfigError
from tiny_llm_checkpoints.model_config import ModelConfig

from .batch_manager import BatchManager
from .dense_batch import DenseBatchManager
from .engine_config import EngineConfig
from .kv_pool import DTYPES
from .layer_groups import LayerGroup, group_layers
from .model import Model
from .page_layout import PageLayout
from .paged_attention import BlockAllocator
from .paged_batch import PagedBatchManager
from .policies import DraftPolicy, NoPreemption, NoPrefixSharing, NoSpeculation, Policies, PrefixPolicy
from .preemption import NewestFirst
from .prefix_sharing import PrefixSharing
from .resources import requiring
from .scheduler import AgedPriority
from .speculation import Speculation
from .speculative_config import SpeculativeConfig
from .step_costs import measure_step_costs
from .windowed_prefix import WindowedPrefixSharing


def make_manager(config: EngineConfig, model: Model) -> BatchManager:
    """A batch manager for a loaded model, paged or dense, with all of its memory allocated.

    Raises `OutOfResourcesError` if there is not enough memory, and `ConfigError` for batching="dense" if a
    layer of the model has a window that is shorter than the context.
    """
    value_bytes = DTYPES[config.kv_cache_dtype].size
    with requiring("keys and values", config.pool_bytes(model.config, value_bytes)):
        if config.batching == "dense":
            return _dense_manager(config, model)
        return _paged_manager(config, model.config, model)


def without_model(config: EngineConfig, model: ModelConfig) -> PagedBatchManager:
    """A paged batch manager for a model of this shape; the manager has no arrays and computes nothing."""
    return _paged_manager(config, model, None)


def _paged_manager(config: EngineConfig, described: ModelConfig, model: Model | None) -> PagedBatchManager:
    dtype = DTYPES[config.kv_cache_dtype]
    return PagedBatchManager(
        config.pool_blocks(described, dtype.size),
        config.block_size,
        config.max_num_seqs,
        model=model,
        max_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.model_len(described, dtype.size),
        kv_dtype=dtype,
        policies=_policies(config, described, model),
        min_pages=config.min_num_blocks,
        groups=group_layers(described.windows),
    )


def _drafting(config: EngineConfig, model: Model | None) -> DraftPolicy:
    """The drafting policy that a configuration asks for; it measures what a step of the model costs."""
    speculative = config.speculative_config
    if speculative is None or model is None:
        return NoSpeculation()
    layout = PageLayout(
        tuple(group_layers(model.config.windows)), config.block_size, config.max_num_batched_tokens
    )
    costs = measure_step_costs(model, layout, DTYPES[config.kv_cache_dtype], config.max_num_batched_tokens)
    return Speculation(SpeculativeConfig.of(speculative), costs)


def _policies(config: EngineConfig, described: ModelConfig, model: Model | None) -> Policies:
    """The policies that a configuration asks for."""
    return Policies(
        preemption=NoPreemption() if config.preemption_mode == "none" else NewestFirst(),
        prefix=sharing(group_layers(described.windows)) if config.enable_prefix_caching else NoPrefixSharing,
        swap_blocks=config.swap_blocks(described, DTYPES[config.kv_cache_dtype].size),
        priority_key=AgedPriority().key,
        drafting=_drafting(config, model),
    )


def sharing(groups: Seq[LayerGroup]) -> Callable[[BlockAllocator, int], PrefixPolicy]:
    """The prefix-sharing policy for a model with these groups of layers."""
    if len(groups) == 1 and groups[0].window is None:
        return PrefixSharing
    return partial(WindowedPrefixSharing, groups=groups)


def _dense_manager(config: EngineConfig, model: Model) -> BatchManager:
    window = min((window for window in model.config.windows if window is not None), default=None)
    dtype = DTYPES[config.kv_cache_dtype]
    model_len = config.model_len(model.config, dtype.size)
    if window is not None and model_len > window:
        raise ConfigError(
            f"batching 'dense' has no sliding windows, but layers of this model have a window of {window} "
            f"tokens and the context has {model_len}: use batching 'paged', or a max_model_len of at most "
            f"{window}"
        )
    return DenseBatchManager(
        config.dense_slots(model.config, dtype.size),
        model_len,
        model=model,
        max_batched_tokens=config.max_num_batched_tokens,
        kv_dtype=dtype,
    )
