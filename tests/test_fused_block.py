"""A block as one operator: the same bits as its parts run one by one, if all parts are the reference's.

Oracle: the same model with fusion switched off, whose operators have their own tests.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llm.fused_block import fuse
from tiny_llm.kernels import twins
from tiny_llm.kv_pool import KVPool
from tiny_llm.layer_groups import group_layers
from tiny_llm.linear import Linear, PackedLinear
from tiny_llm.mlp import MLP
from tiny_llm.model import Model
from tiny_llm.page_layout import PageLayout
from tiny_llm.paged_attention import BlockAllocator
from tiny_llm.paged_kernel import PagedContext
from tiny_llm.sliding_window import WindowedContext

import tiny_llm_kernels
from promises import kernels_on
from tiny_llm import block, fused_block
from tiny_model import (
    assemble,
    dense_model,
    examples,
    gemma_model,
    logits_through_pages,
    quantized,
    qwen_model,
    random_prompt,
    tiny_config,
    tiny_model,
)

pytestmark = pytest.mark.skipif(
    not tiny_llm_kernels.available(), reason=tiny_llm_kernels.why_unavailable() or ""
)


def packed(activation_bits: int = 16, **changes: object) -> Model:
    return assemble(
        tiny_config(**changes),
        3,
        lambda name, matrix: quantized(matrix, 8 if "down" in name else 4, activation_bits),
    )


MODELS: dict[str, Callable[[], Model]] = {
    "llama": tiny_model,
    "8 bits": lambda: packed(8),
    "qwen2": lambda: packed(architecture="qwen2", qkv_bias=True),
    "qwen3": lambda: packed(architecture="qwen3", qk_norm=True, num_attention_heads=6),
    "windows": lambda: packed(
        architecture="mistral", sliding_window=9, layer_types=("sliding_attention", "full_attention")
    ),
    "gemma": gemma_model,
}


@dataclass
class Runs:
    """How often a block ran as one operator, since the count was last reset."""

    count: int = 0


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    counted = Runs()
    for context in (PagedContext, WindowedContext):
        original = context.run_block

        def run_block(self: object, *args: object, call: Callable[..., mx.array] = original) -> mx.array:
            counted.count += 1
            return call(self, *args)

        monkeypatch.setattr(context, "run_block", run_block)
    return counted


def unfused(model: Model, tokens: list[int], chunks: list[int], **options: object) -> np.ndarray:
    """The logits with every block's parts run one by one."""
    with pytest.MonkeyPatch.context() as patch:
        for context in (PagedContext, WindowedContext):
            patch.setattr(context, "fuses", False)
        return np.array(logits_through_pages(model, tokens, chunks, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("instruction_set", tiny_llm_kernels.instruction_sets())
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_fused_block_gives_the_same_bits_as_its_parts(
    name: str, dtype: mx.Dtype, instruction_set: str, runs: Runs
) -> None:
    model, tokens = MODELS[name](), random_prompt(90, seed=5)
    with kernels_on(2, instruction_set):
        want = unfused(model, tokens, [70, 1, 19], kv_dtype=dtype)
        assert runs.count == 0
        got = np.array(logits_through_pages(model, tokens, [70, 1, 19], kv_dtype=dtype))
    assert runs.count == 3 * len(model.layers)
    assert np.array_equal(got, want)


@settings(max_examples=examples(40))
@given(
    name=st.sampled_from(sorted(MODELS)),
    cuts=st.sets(st.integers(1, 149), max_size=8),  # steps of 32 tokens a thread or more are divided
    block_size=st.integers(1, 17),
    threads=st.integers(1, 4),
)
def test_a_fused_block_gives_the_same_bits_for_any_chunks_on_any_threads(
    name: str, cuts: set[int], block_size: int, threads: int
) -> None:
    model, tokens, ends = MODELS[name](), random_prompt(150, seed=6), [0, *sorted(cuts), 150]
    chunks = [stop - start for start, stop in pairwise(ends)]
    with kernels_on(1, ""):
        want = unfused(model, tokens, [150])
    with kernels_on(threads, ""):
        got = np.array(logits_through_pages(model, tokens, chunks, block_size=block_size))
    assert np.array_equal(got, want)


@settings(max_examples=examples(60))
@given(
    name=st.sampled_from(sorted(MODELS)),
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=3),
    chosen=st.lists(st.floats(0, 1, exclude_max=True), max_size=6),
    threads=st.integers(1, 4),
)
def test_rows_that_need_no_logits_change_no_others(
    name: str, lengths: list[int], chosen: list[float], threads: int
) -> None:
    """The last block leaves them out. Oracle: each sequence with the logits of all its rows."""
    model, after = MODELS[name](), 3
    rows = [int(part * sum(lengths)) for part in chosen]
    prompts = [random_prompt(length + after, seed=i) for i, length in enumerate(lengths)]
    with kernels_on(1, ""):
        want = [unfused(model, prompt, [len(prompt)]) for prompt in prompts]
    layout = PageLayout(group_layers(model.config.windows), 16, sum(lengths))
    pages = sum(layout.max_blocks(len(prompt)) for prompt in prompts)
    allocator, pool = BlockAllocator(pages), KVPool.for_model(model.config, pages, 16, mx.float16)
    all_tables = [layout.tables(allocator) for _ in prompts]

    def step(parts: list[tuple[int, int]], logit_rows: mx.array | None) -> np.ndarray:
        """Compute a part of each prompt together."""
        spans, tokens = [], []
        for tables, prompt, (start, stop) in zip(all_tables, prompts, parts, strict=True):
            for table in tables:
                table.append_tokens(stop - start)
            spans.append((tables, start, stop))
            tokens += prompt[start:stop]
        context = layout.context(pool, spans, model.config.attention_scale, logit_rows)
        logits = model(mx.array([tokens], mx.int32), context)[0]
        pool.evaluate(logits)
        return np.array(logits)

    with kernels_on(threads, ""):
        some = step([(0, length) for length in lengths], mx.array(rows, mx.int32))
        rest = step([(length, length + after) for length in lengths], None)
    first = np.concatenate([logits[:-after] for logits in want])
    assert np.array_equal(some, first[rows])
    assert np.array_equal(rest, np.concatenate([logits[-after:] for logits in want]))


@pytest.mark.parametrize("name", MODELS)
def test_only_the_last_block_gets_the_rows_that_are_needed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[int] | None] = []
    call = tiny_llm_kernels.TransformerBlock.__call__

    def noted(self: Any, *args: Any, out_rows: mx.array | None = None) -> Any:
        told.append(None if out_rows is None else out_rows.tolist())  # type: ignore[arg-type]
        return call(self, *args, out_rows=out_rows)

    monkeypatch.setattr(tiny_llm_kernels.TransformerBlock, "__call__", noted)
    model, tokens = MODELS[name](), random_prompt(9, seed=1)
    layout = PageLayout(group_layers(model.config.windows), 16, 9)
    tables = layout.tables(BlockAllocator(layout.max_blocks(9)))
    for table in tables:
        table.append_tokens(9)
    pool = KVPool.for_model(model.config, layout.max_blocks(9), 16, mx.float16)
    rows = mx.array([4, 8], mx.int32)
    context = layout.context(pool, [(tables, 0, 9)], model.config.attention_scale, rows)
    mx.eval(model(mx.array([tokens], mx.int32), context))
    assert told == [None] * (len(model.layers) - 1) + [[4, 8]]


@pytest.mark.parametrize("rows", [[0], [63, 64], [-1, 127], [], [500, -500]])
def test_rows_of_the_output_that_are_needed_are_those_of_the_whole_output(rows: list[int]) -> None:
    """Rows outside the step are ignored; they must not touch other memory."""
    whole = tiny_llm_kernels.TransformerBlock(**arguments(tiny_model()))  # type: ignore[arg-type]
    x = mx.array(np.random.default_rng(2).normal(size=(1, 128, 64)).astype(np.float32))
    places, row = mx.arange(128, dtype=mx.int32), mx.zeros(128, mx.int32)

    def run(out_rows: mx.array | None) -> list[np.ndarray]:
        pools = (mx.zeros((128, 2, 1, 32)) for _ in range(2))
        return [
            np.array(one)
            for one in whole(x, *pools, places, places[None], row, places, 1.0, out_rows=out_rows)
        ]

    with kernels_on(2, ""):
        (out, *pools), (partial, *written) = run(None), run(mx.array(rows, mx.int32))
    inside = [one for one in rows if -128 <= one < 128]
    assert np.array_equal(partial[0, inside], out[0, inside])
    assert all(np.array_equal(one, other) for one, other in zip(pools, written, strict=True))
    if not inside:
        assert not np.array_equal(partial, out), "nothing was left out"


# ---- what is not fused ----


class CustomMLP(MLP):
    """An MLP that is not the reference's."""


def test_an_unpacked_or_replaced_part_makes_a_block_run_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    [layer, *_] = tiny_model().layers
    assert isinstance(layer, block.TransformerBlock)
    assert fuse(layer) is not None
    assert fuse(replace(layer, mlp=CustomMLP(layer.mlp.gate_up_proj, layer.mlp.down_proj))) is None
    dense = Linear(mx.zeros((layer.input_layernorm.shape[0], 96)))
    assert fuse(replace(layer, mlp=replace(layer.mlp, down_proj=dense))) is None
    down = layer.mlp.down_proj
    assert isinstance(down, PackedLinear)
    other = replace(layer.mlp, down_proj=replace(down, activation_bits=8))
    assert fuse(replace(layer, mlp=other)) is None, "one block rounds to one number of bits"
    with twins():
        assert fuse(layer) is None
    for name in ("rms_norm", "rope", "swiglu", "geglu"):
        with monkeypatch.context() as patch:
            patch.setattr(fused_block, name, lambda *_: None)
            assert fuse(layer) is None, f"a custom {name} is bypassed"


@pytest.mark.parametrize("make", [dense_model, qwen_model])
def test_blocks_that_cannot_be_fused_run_part_by_part(make: Callable[[], Model], runs: Runs) -> None:
    model = make()
    tokens = random_prompt(20, seed=7)
    assert np.array_equal(np.array(logits_through_pages(model, tokens, [20])), unfused(model, tokens, [20]))
    assert runs.count == 0


def test_readable_kernels_run_part_by_part(runs: Runs) -> None:
    with twins():
        logits_through_pages(dense_model(), random_prompt(5, seed=8), [5])
    assert runs.count == 0


# ---- errors ----


def arguments(model: Model) -> dict[str, object]:
    """The arguments that make up a block of the tiny model."""
    layer = model.layers[0]
    matrices = {
        "qkv": layer.self_attn.qkv_proj,
        "o": layer.self_attn.o_proj,
        "gate_up": layer.mlp.gate_up_proj,
        "down": layer.mlp.down_proj,
    }
    made: dict[str, object] = {}
    for name, matrix in matrices.items():
        assert isinstance(matrix, PackedLinear)
        made[name] = (matrix.packed, matrix.out_features, matrix.bits)
    attention = layer.self_attn
    return {
        **made,
        "attention_norm": layer.input_layernorm,
        "mlp_norm": layer.post_attention_layernorm,
        "inv_freq": attention.inv_freq,
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "eps": 1e-5,
    }


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_kv_heads": 3}, "multiple of Hkv"),
        ({"head_dim": 16}, "qkv must hold"),
        ({"activation_bits": 4}, "activation_bits 4"),
        ({"inv_freq": mx.zeros(5)}, "inv_freq must have shape"),
        ({"attention_norm": mx.zeros(64, mx.float16)}, "attention_norm must be float32"),
        ({"mlp_norm": mx.zeros(63)}, "mlp_norm must have shape"),
        ({"mlp_out_norm": mx.zeros(64)}, "must be given together"),
        ({"mlp_out_norm": mx.zeros(64), "attention_out_norm": mx.zeros(63)}, "mlp_out_norm must have shape"),
        ({"q_norm": mx.ones(32)}, "must be given together"),
        ({"q_norm": mx.ones(32), "k_norm": mx.ones(31)}, "k_norm must have shape"),
        ({"qkv_bias": mx.ones(7)}, "qkv_bias must have shape"),
    ],
)
def test_parts_that_do_not_fit_together_are_rejected(change: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tiny_llm_kernels.TransformerBlock(**{**arguments(tiny_model()), **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": mx.zeros((1, 3, 65))}, "x must have shape"),
        ({"x": mx.zeros((1, 3, 64), mx.float16)}, "x must be float32"),
        ({"slots": mx.zeros(2, mx.int32)}, "slots must have shape"),
        ({"positions": mx.zeros(3)}, "positions must be int32"),
        ({"key_pool": mx.zeros((4, 1, 8, 32))}, "key_pool must have shape"),
        ({"window": 0}, "window must be at least 1"),
        ({"out_rows": mx.zeros(1)}, "out_rows must be int32"),
        ({"out_rows": mx.zeros((1, 1), mx.int32)}, "out_rows must have 1 axis"),
    ],
)
def test_a_step_that_does_not_fit_the_block_is_rejected(change: dict[str, object], named: str) -> None:
    whole = tiny_llm_kernels.TransformerBlock(**arguments(tiny_model()))  # type: ignore[arg-type]
    step: dict[str, object] = {
        "x": mx.zeros((1, 3, 64)),
        "key_pool": mx.zeros((4, 2, 8, 32)),
        "value_pool": mx.zeros((4, 2, 8, 32)),
        "slots": mx.arange(3, dtype=mx.int32),
        "tables": mx.zeros((1, 1), mx.int32),
        "row_of_token": mx.zeros(3, mx.int32),
        "positions": mx.arange(3, dtype=mx.int32),
        "scale": 1.0,
    }
    mx.eval(whole(**step))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=named):
        whole(**{**step, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [3, 64])
def test_a_block_writes_into_its_input_only_if_nothing_else_holds_it(tokens: int) -> None:
    whole = tiny_llm_kernels.TransformerBlock(**arguments(tiny_model()))  # type: ignore[arg-type]
    numbers = np.random.default_rng(1).normal(size=(1, tokens, 64)).astype(np.float32)

    def output(x: mx.array) -> mx.array:
        keys, values = (mx.zeros((tokens, 2, 1, 32)) for _ in range(2))
        places = mx.arange(tokens, dtype=mx.int32)
        row = mx.zeros(tokens, mx.int32)
        return whole(x, keys, values, places, places[None], row, places, 1.0)[0]

    with kernels_on(2, ""):
        held = mx.array(numbers) * 1
        out, reader = output(held), held + 1
        mx.eval(out, reader)
        free = output(mx.array(numbers) * 1)
    assert np.array_equal(np.array(held), numbers)
    assert np.array_equal(np.array(reader), numbers + 1)
    assert np.array_equal(np.array(free), np.array(out))


def test_the_blocks_of_a_step_share_their_temporary_memory() -> None:
    """All blocks of a step are in the graph before the first is computed; many need little more than one."""

    def peak(layers: int) -> int:
        model = packed(num_hidden_layers=layers)
        logits_through_pages(model, tokens, [len(tokens)])
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        logits_through_pages(model, tokens, [len(tokens)])
        return mx.get_peak_memory() - before

    tokens, config = random_prompt(120, seed=1), tiny_config()
    stream = len(tokens) * config.hidden_size * 4
    pool = 128 * config.kv_bytes_per_token(2) // config.num_hidden_layers
    assert peak(24) - peak(4) < 20 * (pool + 2 * stream)
