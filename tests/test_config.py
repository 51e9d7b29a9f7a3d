"""ModelConfig and EngineConfig: frozen, checked once; every error names the value and the limit."""

import dataclasses
from contextlib import nullcontext

import pytest
from tiny_llm.engine_config import EngineConfig
from tiny_llm.errors import RequestTooLargeError
from tiny_llm.layer_groups import group_layers
from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.sampling_params import SamplingParams

from tiny_llm_checkpoints.errors import ConfigError
from tiny_llm_checkpoints.sizes import shown_bytes
from tiny_model import CONTEXT, tiny_config

BYTES_PER_TOKEN = 2 * 2 * 2 * 32 * 2  # K and V, two layers, two heads of 32, two bytes


def test_the_bytes_of_a_token_include_keys_and_values_of_all_layers() -> None:
    assert tiny_config().kv_bytes_per_token(2) == BYTES_PER_TOKEN


def test_the_number_of_query_heads_must_be_a_multiple_of_the_key_value_heads() -> None:
    with pytest.raises(ConfigError, match=r"num_attention_heads \(4\).*num_key_value_heads \(3\)"):
        tiny_config(num_key_value_heads=3)


SLIDING, FULL = "sliding_attention", "full_attention"


def test_each_layer_has_a_sliding_window_or_full_attention() -> None:
    assert tiny_config().windows == (None, None)
    assert tiny_config(layer_types=(FULL, SLIDING), sliding_window=9).windows == (None, 9)
    assert tiny_config(layer_types=(FULL, FULL)).windows == (None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 8}, r"sliding_window \(8\) needs layer_types"),
        ({"layer_types": (FULL, SLIDING)}, r"'sliding_attention', which needs a sliding_window, not None"),
        ({"layer_types": (SLIDING,), "sliding_window": 8}, r"layer_types must name 2 layers, not 1"),
        ({"layer_types": (FULL, "local"), "sliding_window": 8}, r"layer_types 'local' is not supported"),
        (
            {"layer_types": (FULL, SLIDING), "sliding_window": 0},
            r"sliding_window must be .* at least 1 token, not 0",
        ),
        ({"layer_types": (FULL, SLIDING), "sliding_window": 8.0}, r"sliding_window must be .*, not 8.0"),
        ({"layer_types": (FULL, SLIDING), "sliding_window": True}, r"sliding_window must be .*, not True"),
        ({"rope_local_theta": 0.0}, r"rope_local_theta must be a positive number, not 0.0"),
        ({"query_pre_attn_scalar": -1.0}, r"query_pre_attn_scalar must be a positive number, not -1.0"),
        ({"hidden_act": "relu"}, r"hidden_act must be one of silu, gelu_pytorch_tanh, not 'relu'"),
    ],
)
def test_an_inconsistent_model_config_is_rejected(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)


def test_attention_scale_comes_from_the_head_size_or_from_query_pre_attn_scalar() -> None:
    assert tiny_config().attention_scale == 32**-0.5
    assert tiny_config(query_pre_attn_scalar=24.0).attention_scale == 24**-0.5


def test_sandwich_norms_give_each_layer_four_norm_parameters() -> None:
    names = {name for name in tiny_config(sandwich_norm=True).parameter_shapes if ".1." in name}
    norms = sorted(name.split(".")[3] for name in names if "layernorm" in name)
    assert norms == sorted(f"{x}_layernorm" for x in tiny_config(sandwich_norm=True).layer_norms)
    assert len(norms) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 0},
        {"num_blocks": 0},
        {"kv_cache_memory": -5},
        {"max_num_seqs": 0},
        {"max_model_len": 0},
        {"kv_cache_dtype": "int3"},
        {"dtype": "float16"},
        {"preemption_mode": "swop"},
        {"activation_bits": 4},
    ],
)
def test_an_invalid_option_is_rejected_with_its_name_and_value(options: dict[str, object]) -> None:
    [(name, value)] = options.items()
    with pytest.raises(ConfigError, match=name) as refusal:
        EngineConfig.from_options(**options)
    assert str(value) in str(refusal.value)


def test_max_num_batched_tokens_must_be_at_least_max_num_seqs() -> None:
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens \(8\).*max_num_seqs \(9\)"):
        EngineConfig(max_num_batched_tokens=8, max_num_seqs=9)


def test_an_unknown_option_is_rejected_with_the_list_of_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown engine option 'blocksize'.*block_size"):
        EngineConfig.from_options(blocksize=16)


def test_the_engine_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().block_size = 8  # type: ignore[misc]


def test_num_blocks_sets_the_pool_size_directly() -> None:
    assert EngineConfig(num_blocks=7).pool_blocks(tiny_config(), 2) == 7


@pytest.mark.parametrize("block_size", [1, 16, 17])
def test_the_pool_has_as_many_whole_blocks_as_fit_into_kv_cache_memory(block_size: int) -> None:
    memory = 1_000_000
    blocks = EngineConfig(kv_cache_memory=memory, block_size=block_size).pool_blocks(tiny_config(), 2)
    block_bytes = BYTES_PER_TOKEN * block_size
    assert blocks * block_bytes <= memory < (blocks + 1) * block_bytes


def test_memory_for_less_than_one_block_is_rejected_with_both_sizes() -> None:
    with pytest.raises(ConfigError, match=rf"100 bytes.*which takes {shown_bytes(16 * BYTES_PER_TOKEN)}"):
        EngineConfig(kv_cache_memory=100).pool_blocks(tiny_config(), 2)


def test_by_default_the_pool_is_no_larger_than_max_num_seqs_full_contexts() -> None:
    config = EngineConfig(max_num_seqs=3, max_num_batched_tokens=64)
    assert config.pool_blocks(tiny_config(), 2) == 3 * CONTEXT // 16


def test_by_default_the_pool_takes_at_most_half_a_gibibyte() -> None:
    model = tiny_config(max_position_embeddings=1_000_000)
    blocks = EngineConfig().pool_blocks(model, 2)
    assert blocks * 16 * BYTES_PER_TOKEN <= 2**29 < (blocks + 1) * 16 * BYTES_PER_TOKEN


def test_the_maximum_context_is_that_of_the_model_unless_max_model_len_is_smaller() -> None:
    assert EngineConfig().model_len(tiny_config(), 2) == CONTEXT
    assert EngineConfig(max_model_len=50).model_len(tiny_config(), 2) == 50
    with pytest.raises(ConfigError, match=rf"max_model_len \({CONTEXT + 1}\).*{CONTEXT} tokens"):
        EngineConfig(max_model_len=CONTEXT + 1).model_len(tiny_config(), 2)


@pytest.mark.parametrize("windows", [(), (SLIDING, SLIDING), (FULL, SLIDING), (SLIDING, SLIDING, FULL)])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7, 19, 60])
def test_the_maximum_context_is_the_longest_request_that_the_pool_can_hold(
    windows: tuple[str, ...], num_blocks: int
) -> None:
    """Oracle: an empty pool accepts a request of that length, and rejects a longer one."""
    some_layers = {"layer_types": windows, "num_hidden_layers": len(windows), "sliding_window": 9}
    model = tiny_config(**some_layers if windows else {})
    config = EngineConfig(num_blocks=num_blocks, block_size=4, max_num_batched_tokens=8, max_num_seqs=2)
    groups = group_layers(model.windows)
    if num_blocks < len(groups):
        with pytest.raises(
            ConfigError, match=f"1 tokens needs {len(groups)} blocks of 4; the pool has {num_blocks}"
        ):
            config.model_len(model, 2)
        return
    max_len = config.model_len(model, 2)
    manager = PagedBatchManager(num_blocks, 4, 2, max_batched_tokens=8, max_model_len=CONTEXT, groups=groups)
    for length in range(2, CONTEXT + 1):
        outcome = nullcontext() if length <= max_len else pytest.raises(RequestTooLargeError)
        with outcome:
            assert manager.add_request([1], f"of {length}", SamplingParams(max_tokens=length - 1))


def test_a_context_that_does_not_fit_into_the_pool_is_rejected_with_the_numbers() -> None:
    config = EngineConfig(num_blocks=5, block_size=4, max_model_len=21)
    message = "a sequence of 21 tokens needs 6 blocks of 4; the pool has 5, for 20 tokens: raise num_blocks"
    with pytest.raises(ConfigError, match=message):
        config.model_len(tiny_config(), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_num_blocks": 9, "num_blocks": 8}, r"min_num_blocks \(9\) exceeds num_blocks \(8\)"),
        ({"min_num_blocks": 2, "batching": "dense"}, r"min_num_blocks \(2\) needs batching='paged'"),
    ],
)
def test_an_invalid_min_num_blocks_is_rejected(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_options(**options)
