"""Day 1.3: the attention layer, with query heads in groups that share keys and values.

When these tests pass, you have grouped-query attention, and the layer that projects, rotates, hands its heads
to a context, and projects back.
"""

from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.grouped_attention import Attention, NoCacheContext, grouped_query_attention
from tiny_llm.linear import BiasedLinear, LinearLike

from common.matrices import matrix
from common.numpy_oracles import numpy_attention, numpy_rope
from common.toy_arrays import column, random_qkv

# The suite runs with and without compiled kernels; the warning about missing ones does not concern this day.
pytestmark = pytest.mark.filterwarnings("ignore:no compiled kernels:RuntimeWarning")


def numpy_causal_mask(length: int, total: int) -> np.ndarray:
    """[length, total] float32, for the last tokens."""
    positions = np.arange(total - length, total)[:, None]
    return np.where(np.arange(total) <= positions, 0, -np.inf).astype(np.float32)


# Task 1: grouped_query_attention


def test_task_1_neighbouring_query_heads_share_a_value_head() -> None:
    """Oracle: by hand: heads 0 and 1 read the first value head, 2 and 3 the second, not h % Hkv."""
    q, k = mx.zeros((1, 4, 1, 1)), mx.zeros((1, 2, 1, 1))
    v = mx.array([10.0, 20.0]).reshape(1, 2, 1, 1)
    out = grouped_query_attention(q, k, v, 1.0)
    assert out.shape == (1, 4, 1, 1)
    np.testing.assert_allclose(np.array(out).ravel(), [10, 10, 20, 20], rtol=1e-6)


def test_task_1_neighbouring_query_heads_share_a_key_head() -> None:
    """Oracle: by hand: the first key head gives the weights 1/4 and 3/4, the second 1/2 and 1/2."""
    q = mx.ones((1, 4, 1, 1))
    k = mx.array([0.0, np.log(3.0), 0.0, 0.0]).reshape(1, 2, 2, 1)
    v = mx.array([4.0, 8.0, 4.0, 8.0]).reshape(1, 2, 2, 1)
    out = grouped_query_attention(q, k, v, 1.0)
    np.testing.assert_allclose(np.array(out).ravel(), [7, 7, 6, 6], rtol=1e-5)


def test_task_1_scores_are_multiplied_by_the_scale() -> None:
    """Oracle: by hand: 4 ln 3 times 0.25 is ln 3."""
    out = grouped_query_attention(column(4), column(0, np.log(3)), column(4, 8), 0.25)
    np.testing.assert_allclose(np.array(out).ravel(), [7], rtol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 2), (6, 2), (6, 3), (9, 3), (4, 1)])
@pytest.mark.parametrize(("batch", "length", "total"), [(1, 1, 1), (1, 1, 7), (2, 5, 5), (3, 2, 4)])
def test_task_1_each_query_head_reads_the_key_and_value_head_of_its_group(
    heads: int, kv_heads: int, batch: int, length: int, total: int
) -> None:
    """Oracle: NumPy in float64: query head h reads key and value head h // (H / Hkv)."""
    q, k, v = random_qkv(1, (batch, heads, length, 8), (batch, kv_heads, total, 8))
    out = grouped_query_attention(mx.array(q), mx.array(k), mx.array(v), 0.4)
    assert out.shape == (batch, heads, length, 8)
    np.testing.assert_allclose(np.array(out), numpy_attention(q, k, v, 0.4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask_shape", [(3, 5), (1, 5)])
def test_task_1_the_mask_broadcasts(mask_shape: tuple[int, ...]) -> None:
    """Oracle: NumPy in float64. The same mask for all sequences and heads."""
    q, k, v = random_qkv(2, (2, 6, 3, 8), (2, 2, 5, 8))
    mask = np.random.default_rng(3).normal(size=mask_shape).astype(np.float32)
    mask[..., 2] = -np.inf
    out = grouped_query_attention(mx.array(q), mx.array(k), mx.array(v), 0.4, mx.array(mask))
    np.testing.assert_allclose(np.array(out), numpy_attention(q, k, v, 0.4, mask), rtol=1e-4, atol=1e-5)


def test_task_1_the_mask_of_a_single_query_is_used() -> None:
    """Oracle: by hand: the mean of 4 and 8, without the hidden 90.

    A single new token may not see everything either: with a window, or in a padded batch.
    """
    mask = mx.array([[0.0, 0.0, -np.inf]])
    out = grouped_query_attention(mx.ones((1, 2, 1, 1)), column(0, 0, 0), column(4, 8, 90), 1.0, mask)
    np.testing.assert_allclose(np.array(out).ravel(), [6, 6], rtol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_task_1_without_a_mask_the_output_has_the_dtype_of_the_input(dtype: mx.Dtype) -> None:
    """Oracle: the docstring, as in `scaled_dot_product_attention`."""
    q, k, v = (mx.array(x).astype(dtype) for x in random_qkv(7, (1, 4, 2, 8), (1, 2, 3, 8)))
    assert grouped_query_attention(q, k, v, 0.4).dtype == dtype


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_task_1_with_a_float32_mask_the_output_is_float32(dtype: mx.Dtype) -> None:
    """Oracle: the docstring: float32 is the type of day 1.1's output, which must not be converted."""
    q, k, v = (mx.array(x).astype(dtype) for x in random_qkv(7, (1, 4, 2, 8), (1, 2, 3, 8)))
    found = grouped_query_attention(q, k, v, 0.4, mx.array(numpy_causal_mask(2, 3))).dtype
    assert found == mx.float32, f"{found}: do not convert the result, not even to the type of q"


def test_task_1_keys_and_values_are_not_copied_for_every_query_head() -> None:
    """Oracle: by hand: the scores take less memory than the keys. Copies of both take 16 times as much."""
    q, k, v = (mx.array(x) for x in random_qkv(8, (1, 16, 1, 64), (1, 2, 1024, 64)))
    mx.eval(q, k, v)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(grouped_query_attention(q, k, v, 0.125))
    times = (mx.get_peak_memory() - before) / k.nbytes
    assert times < 4, f"{times:.0f} times the memory of the keys: do not copy keys and values, broadcast them"


@pytest.mark.parametrize(("length", "total"), [(6, 6), (2, 6), (1, 6)])
def test_task_1_causal_attention_matches_mlx(length: int, total: int) -> None:
    """Oracle: mx.fast.scaled_dot_product_attention, which groups heads in the same way."""
    q, k, v = (mx.array(x) for x in random_qkv(4, (2, 9, length, 16), (2, 3, total, 16)))
    mask = mx.array(numpy_causal_mask(length, total))
    out = grouped_query_attention(q, k, v, 0.25, mask)
    oracle = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask=mask)
    np.testing.assert_allclose(np.array(out), np.array(oracle), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 2), (2, 4), (9, 4)])
def test_task_1_query_heads_must_be_a_multiple_of_the_kv_heads(heads: int, kv_heads: int) -> None:
    """Oracle: the docstring: ValueError if H is not a multiple of Hkv."""
    q, k, v = (mx.array(x) for x in random_qkv(5, (1, heads, 2, 8), (1, kv_heads, 2, 8)))
    with pytest.raises(ValueError):
        grouped_query_attention(q, k, v, 1.0)


def test_task_1_no_cache_context_attends_causally() -> None:
    """Oracle: by hand: the running means of 2, 4 and 9 are 2, 3 and 5; without a mask all are 5."""
    out = NoCacheContext(3, 1.0).attend(0, column(1, 1, 1), column(0, 0, 0), column(2, 4, 9))
    np.testing.assert_allclose(np.array(out).ravel(), [2, 3, 5], rtol=1e-6)


@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 2, 2), (2, 4, 2), (3, 6, 2), (2, 4, 1)])
def test_task_1_no_cache_context_handles_grouped_heads_and_several_sequences(
    batch: int, heads: int, kv_heads: int
) -> None:
    """Oracle: NumPy in float64, causal."""
    q, k, v = random_qkv(6, (batch, heads, 5, 8), (batch, kv_heads, 5, 8))
    out = NoCacheContext(5, 0.3).attend(0, mx.array(q), mx.array(k), mx.array(v))
    assert out.shape == (batch, heads, 5, 8)
    expected = numpy_attention(q, k, v, 0.3, numpy_causal_mask(5, 5))
    np.testing.assert_allclose(np.array(out), expected, rtol=1e-4, atol=1e-5)


# Task 2: Attention.project


@dataclass(frozen=True)
class Weights:
    """One layer in NumPy: matrices as [outputs, inputs]."""

    heads: int
    kv_heads: int
    size: int
    frequencies: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    o: np.ndarray

    def layer(self) -> Attention:
        """The layer under test, of these weights."""
        return Attention(
            layer=0,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.size,
            inv_freq=mx.array(self.frequencies),
            qkv_proj=matrix(np.concatenate([self.q, self.k, self.v])),
            o_proj=matrix(self.o),
            q_norm=None,
            k_norm=None,
            eps=1e-5,
        )


def random_weights(seed: int, heads: int, kv_heads: int, size: int, width: int) -> Weights:
    """A layer for a residual stream of `width` values, with weights large enough that scores differ."""
    rng = np.random.default_rng(seed)
    rows = [heads * size, kv_heads * size, kv_heads * size]
    q, k, v = (rng.normal(size=(n, width)) * 1.5 / width**0.5 for n in rows)
    o = rng.normal(size=(width, heads * size)) / (heads * size) ** 0.5
    frequencies = (100.0 ** (-np.arange(0, size, 2) / size)).astype(np.float32)
    return Weights(heads, kv_heads, size, frequencies, *(x.astype(np.float32) for x in (q, k, v, o)))


def numpy_split(x: np.ndarray, size: int) -> np.ndarray:
    """[B, L, N * size] -> [B, N, L, size]."""
    return np.stack(np.split(x, x.shape[-1] // size, axis=-1), axis=1)


def numpy_project(weights: Weights, x: np.ndarray, positions: np.ndarray) -> list[np.ndarray]:
    """Queries, keys and values in float64 of x [B, L, E] at positions [L]."""
    q, k, v = (
        numpy_split(x.astype(np.float64) @ w.astype(np.float64).T, weights.size)
        for w in (weights.q, weights.k, weights.v)
    )
    return [*(numpy_rope(y, positions, weights.frequencies) for y in (q, k)), v]


def plain_layer(heads: int, kv_heads: int, size: int, layer: int = 0) -> Attention:
    """A layer that changes nothing: its projections are the identity and its rotation angles are 0."""
    return Attention(
        layer=layer,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size,
        inv_freq=mx.zeros(size // 2),
        qkv_proj=matrix(np.eye((heads + 2 * kv_heads) * size)),
        o_proj=matrix(np.eye(heads * size)),
        q_norm=None,
        k_norm=None,
        eps=1e-5,
    )


def quarter_turns() -> Attention:
    """A layer of one head of 2 values, rotated by a quarter turn per position; it changes nothing else."""
    return replace(plain_layer(heads=1, kv_heads=1, size=2), inv_freq=mx.array([np.pi / 2], mx.float32))


def test_task_2_the_projection_holds_all_queries_then_all_keys_then_all_values() -> None:
    """Oracle: by hand: with the identity for a projection, the heads are slices of x.

    A reshape to [B, N, L, D] without a transpose mixes tokens and heads.
    """
    x = np.arange(2 * 3 * 12, dtype=np.float32).reshape(2, 3, 12)
    found = plain_layer(heads=4, kv_heads=1, size=2).project(mx.array(x), mx.arange(3, dtype=mx.int32))
    q, k, v = np.array(found.q), np.array(found.k), np.array(found.v)
    assert (q.shape, k.shape, v.shape) == ((2, 4, 3, 2), (2, 1, 3, 2), (2, 1, 3, 2))
    for head in range(4):
        np.testing.assert_allclose(q[:, head], x[:, :, 2 * head : 2 * head + 2], rtol=1e-6)
    np.testing.assert_allclose(k[:, 0], x[:, :, 8:10], rtol=1e-6)
    np.testing.assert_allclose(v[:, 0], x[:, :, 10:12], rtol=1e-6)


def test_task_2_queries_and_keys_are_rotated_by_the_given_positions_and_values_are_not() -> None:
    """Oracle: by hand: a quarter turn per position, at positions 2 and 5.

    Common mistake: positions 0 and 1.
    """
    x = mx.array([[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]] * 2])
    found = quarter_turns().project(x, mx.array([2, 5], mx.int32))
    q, k, v = (np.array(heads).reshape(2, 2) for heads in (found.q, found.k, found.v))
    np.testing.assert_allclose(q, [[-1, -2], [-2, 1]], rtol=1e-5)
    np.testing.assert_allclose(k, [[-3, -4], [-4, 3]], rtol=1e-5)
    np.testing.assert_allclose(v, [[5, 6], [5, 6]], rtol=1e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "width"), [(1, 1, 8, 8), (2, 2, 4, 8), (4, 2, 8, 32), (9, 3, 8, 24)]
)
@pytest.mark.parametrize("positions", [[0], [0, 1, 2, 3], [7, 3, 3]])
def test_task_2_projected_heads_match_numpy(
    heads: int, kv_heads: int, size: int, width: int, positions: list[int]
) -> None:
    """Oracle: NumPy in float64, one matrix after the other, even if H * D is not E."""
    weights = random_weights(21, heads, kv_heads, size, width)
    x = np.random.default_rng(22).normal(size=(2, len(positions), width)).astype(np.float32)
    found = weights.layer().project(mx.array(x), mx.array(positions, mx.int32))
    expected = numpy_project(weights, x, np.array(positions))
    for out, oracle in zip((found.q, found.k, found.v), expected, strict=True):
        assert out.shape == oracle.shape
        np.testing.assert_allclose(np.array(out), oracle, rtol=1e-3, atol=1e-4)


def test_task_2_queries_and_keys_are_normalized_before_they_are_rotated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: by hand: the query (1, 2) times (10, 1), then a quarter turn. Rotating first gives (-20, 1).

    `rms_norm` is day 1.4's; a multiplication by the weight replaces it here.
    """
    monkeypatch.setattr("tiny_llm.grouped_attention.rms_norm", lambda x, weight, eps: x * weight)
    layer = replace(quarter_turns(), q_norm=mx.array([10.0, 1.0]), k_norm=mx.array([1.0, 100.0]))
    found = layer.project(mx.array([[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]]), mx.array([1], mx.int32))
    for out, expected in [(found.q, [-2, 10]), (found.k, [-400, 3]), (found.v, [5, 6])]:
        np.testing.assert_allclose(np.array(out).ravel(), expected, rtol=1e-5, atol=1e-4)


def test_task_2_the_projection_may_have_a_bias() -> None:
    """Oracle: by hand. A layer that reads `.weight` instead of calling its matrix loses the bias."""
    bias = mx.array([10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
    layer = plain_layer(heads=1, kv_heads=1, size=2)
    found = replace(layer, qkv_proj=BiasedLinear(layer.qkv_proj, bias)).project(
        mx.ones((1, 1, 6)), mx.array([0], mx.int32)
    )
    for out, expected in [(found.q, [11, 21]), (found.k, [31, 41]), (found.v, [51, 61])]:
        np.testing.assert_allclose(np.array(out).ravel(), expected, rtol=1e-6)


@dataclass
class CountedLinear:
    """A matrix that counts its products."""

    matrix: LinearLike
    products: int = 0

    def __call__(self, x: mx.array) -> mx.array:
        self.products += 1
        return self.matrix(x)

    def rows(self, ids: mx.array) -> mx.array:
        return self.matrix.rows(ids)


def test_task_2_the_projection_is_computed_once() -> None:
    """Oracle: the docstring: one product gives queries, keys and values."""
    layer = plain_layer(heads=2, kv_heads=1, size=2)
    counted = CountedLinear(layer.qkv_proj)
    replace(layer, qkv_proj=counted).project(mx.ones((1, 3, 8)), mx.arange(3, dtype=mx.int32))
    assert counted.products == 1, f"qkv_proj was called {counted.products} times"


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_task_2_the_heads_have_the_dtype_of_the_projections_output(dtype: mx.Dtype) -> None:
    """Oracle: the docstring. In float32, keys and values take twice the memory of float16."""
    x = mx.ones((1, 3, 8), dtype)
    heads = plain_layer(heads=2, kv_heads=1, size=2).project(x, mx.arange(3, dtype=mx.int32))
    assert {part.dtype for part in heads} == {dtype}


# Task 3: Attention.__call__


@dataclass
class FakeContext:
    """A context that records what it is given and returns `result`, or the queries if that is None."""

    positions: mx.array
    result: mx.array | None = None
    logit_rows: mx.array | None = None
    layers: list[int] = field(default_factory=list)
    given: list[np.ndarray] = field(default_factory=list)

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        self.layers.append(layer)
        self.given = [np.array(x) for x in (q, k, v)]
        return q if self.result is None else self.result


def numpy_layer(weights: Weights, x: np.ndarray) -> np.ndarray:
    """The whole layer in float64, for whole sequences x [B, L, E]."""
    length = x.shape[1]
    q, k, v = numpy_project(weights, x, np.arange(length))
    out = numpy_attention(q, k, v, weights.size**-0.5, numpy_causal_mask(length, length))  # [B, H, L, D]
    return np.concatenate(list(out.swapaxes(0, 1)), axis=-1) @ weights.o.astype(np.float64).T


def run_layer(layer: Attention, x: np.ndarray) -> np.ndarray:
    """The layer over whole sequences x [B, L, E]."""
    out = layer(mx.array(x), NoCacheContext(x.shape[1], layer.head_dim**-0.5))
    return np.array(out)


def test_task_3_a_single_token_outputs_its_projected_value() -> None:
    """Oracle: by hand: a single token has weight 1 on itself, so the output is its projected value."""
    layer = replace(
        plain_layer(heads=1, kv_heads=1, size=2),
        qkv_proj=matrix(np.array([[5, 0], [0, 5], [7, 0], [0, 7], [1, 0], [0, 2]])),  # q, k, v: two rows each
        o_proj=matrix(np.array([[10, 0], [1, 1]])),
    )
    out = run_layer(layer, np.array([[[3.0, 4.0]]], np.float32))  # its value is (3, 8)
    np.testing.assert_allclose(out, [[[30, 11]]], rtol=1e-5)


def test_task_3_heads_are_rotated_by_the_positions_of_the_context() -> None:
    """Oracle: by hand: a quarter turn per position, at positions 2 and 5.

    Common mistake: positions 0 and 1.
    """
    context = FakeContext(mx.array([2, 5], mx.int32))
    quarter_turns()(mx.array([[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]] * 2]), context)
    assert context.layers == [0], "the layer must call `attend` of the context that it is given, once"
    q, k, v = (x.reshape(2, 2) for x in context.given)
    np.testing.assert_allclose(q, [[-1, -2], [-2, 1]], rtol=1e-5)
    np.testing.assert_allclose(k, [[-3, -4], [-4, 3]], rtol=1e-5)
    np.testing.assert_allclose(v, [[5, 6], [5, 6]], rtol=1e-5)


def test_task_3_heads_are_concatenated_before_the_output_projection() -> None:
    """Oracle: by hand: each head holds 100 b + 10 h + l, so a row lists its heads in order."""
    b, h, token, _ = np.ogrid[:2, :3, :4, :2]
    result = np.broadcast_to(100 * b + 10 * h + token, (2, 3, 4, 2)).astype(np.float32)
    context = FakeContext(mx.arange(4, dtype=mx.int32), mx.array(result))
    out = plain_layer(heads=3, kv_heads=1, size=2)(mx.zeros((2, 4, 10)), context)
    assert out.shape == (2, 4, 6)
    np.testing.assert_allclose(np.array(out)[0, 1], [1, 1, 11, 11, 21, 21], rtol=1e-6)
    np.testing.assert_allclose(np.array(out)[1, 3], [103, 103, 113, 113, 123, 123], rtol=1e-6)


@pytest.mark.parametrize("layer", [0, 5])
def test_task_3_the_context_gets_the_number_of_the_layer(layer: int) -> None:
    """Oracle: by hand: a cache finds its keys by this number."""
    context = FakeContext(mx.arange(2, dtype=mx.int32))
    plain_layer(heads=2, kv_heads=1, size=2, layer=layer)(mx.zeros((1, 2, 8)), context)
    assert context.layers == [layer]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "width"),
    [(1, 1, 8, 8), (2, 2, 4, 8), (4, 2, 8, 32), (9, 3, 8, 24), (4, 1, 8, 20)],
)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 6), (3, 4)])
def test_task_3_the_whole_layer_matches_numpy(
    heads: int, kv_heads: int, size: int, width: int, batch: int, length: int
) -> None:
    """Oracle: NumPy in float64, with rotation, even if H * D is not E."""
    weights = random_weights(9, heads, kv_heads, size, width)
    x = np.random.default_rng(10).normal(size=(batch, length, width)).astype(np.float32)
    out = run_layer(weights.layer(), x)
    assert out.shape == (batch, length, width)
    np.testing.assert_allclose(out, numpy_layer(weights, x), rtol=1e-3, atol=1e-4)


def test_task_3_the_whole_layer_matches_mlx_operators() -> None:
    """Oracle: mx.fast.rope and mx.fast.scaled_dot_product_attention."""
    weights = random_weights(11, heads=6, kv_heads=2, size=16, width=40)
    x = mx.random.normal((2, 7, 40), key=mx.random.key(12))
    heads = [
        (x @ mx.array(w).T).reshape(2, 7, -1, 16).transpose(0, 2, 1, 3)
        for w in (weights.q, weights.k, weights.v)
    ]
    q, k = (mx.fast.rope(y, 16, traditional=False, base=100.0, scale=1.0, offset=0) for y in heads[:2])
    oracle = mx.fast.scaled_dot_product_attention(q, k, heads[2], scale=0.25, mask="causal")
    oracle = oracle.transpose(0, 2, 1, 3).reshape(2, 7, -1) @ mx.array(weights.o).T
    out = run_layer(weights.layer(), np.array(x))
    np.testing.assert_allclose(out, np.array(oracle), rtol=1e-3, atol=1e-4)


def test_task_3_the_output_projection_may_have_a_bias() -> None:
    """Oracle: by hand: if queries, keys and values are zeros, the output is the bias."""
    layer = plain_layer(heads=2, kv_heads=1, size=2)
    biased = replace(layer, o_proj=BiasedLinear(layer.o_proj, mx.array([1.0, 2.0, 3.0, 4.0])))
    np.testing.assert_allclose(run_layer(biased, np.zeros((1, 2, 8), np.float32)), [[[1, 2, 3, 4]] * 2])


def test_task_3_a_later_token_does_not_affect_earlier_tokens() -> None:
    """Oracle: the same tokens with a different last token."""
    weights = random_weights(17, heads=4, kv_heads=2, size=8, width=16)
    x = np.random.default_rng(18).normal(size=(1, 6, 16)).astype(np.float32)
    other = x.copy()
    other[:, -1] = 3.0
    first, second = run_layer(weights.layer(), x), run_layer(weights.layer(), other)
    np.testing.assert_allclose(second[:, :-1], first[:, :-1], rtol=1e-5, atol=1e-5)
    assert not np.allclose(second[:, -1], first[:, -1])
