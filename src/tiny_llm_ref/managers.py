"""From a configuration to the batch manager that it asks for."""

from .batch_manager import BatchManager
from .dense_batch import DenseBatchManager
from .engine_config import EngineConfig
from .kv_pool import DTYPES
from .model import Model
from .paged_batch import PagedBatchManager
from .policies import NoPreemption, NoPrefixSharing, Policies
from .preemption import RecomputeNewestFirst
from .prefix_sharing import PrefixSharing


def make_manager(config: EngineConfig, model: Model) -> BatchManager:
    """A batch manager for a loaded model, paged or dense, with all its memory taken."""
    return _dense_manager(config, model) if config.batching == "dense" else _paged_manager(config, model)


def _paged_manager(config: EngineConfig, model: Model) -> BatchManager:
    dtype = DTYPES[config.kv_cache_dtype]
    return PagedBatchManager(
        config.pool_blocks(model.config, dtype.size),
        config.block_size,
        config.max_num_seqs,
        model=model,
        max_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.model_len(model.config),
        kv_dtype=dtype,
        policies=_policies(config),
        min_pages=config.min_num_blocks,
    )


def _policies(config: EngineConfig) -> Policies:
    """Who gives way, and who shares."""
    return Policies(
        preemption=RecomputeNewestFirst() if config.preemption_mode == "recompute" else NoPreemption(),
        prefix=PrefixSharing if config.enable_prefix_caching else NoPrefixSharing,
    )


def _dense_manager(config: EngineConfig, model: Model) -> BatchManager:
    dtype = DTYPES[config.kv_cache_dtype]
    return DenseBatchManager(
        config.dense_slots(model.config, dtype.size),
        config.model_len(model.config),
        model=model,
        max_batched_tokens=config.max_num_batched_tokens,
        kv_dtype=dtype,
    )
