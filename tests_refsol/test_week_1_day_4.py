"""Day 1.4: RMSNorm, stacked matrices and the feed-forward network.

When these tests pass, you have the norm in front of each half of a block, the gated network that is the
second half, and one matrix that does the work of several.
"""

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.grouped_attention import Attention
from tiny_llm.kernels import compiled_kernel
from tiny_llm.linear import BiasedLinear, Linear, LinearLike, PackedLinear
from tiny_llm.mlp import MLP, swiglu
from tiny_llm.norm import rms_norm
from tiny_llm.stacked_linear import stack

from common.matrices import matrix

# The suite runs with and without compiled kernels; the warning about missing ones does not concern this day.
pytestmark = pytest.mark.filterwarnings("ignore:no compiled kernels:RuntimeWarning")


# Task 1: rms_norm


def numpy_rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """The formula in float64."""
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def test_task_1_a_row_is_divided_by_the_root_of_its_mean_square() -> None:
    """Oracle: by hand: the mean of 1 and 49 is 25. A norm that subtracts the mean first gives (-1, 1)."""
    out = rms_norm(mx.array([[1.0, 7.0]]), mx.ones(2), 0.0)
    np.testing.assert_allclose(np.array(out), [[0.2, 1.4]], rtol=1e-5)


def test_task_1_each_value_is_multiplied_by_its_weight() -> None:
    """Oracle: by hand: (0.2, 1.4) times (10, -5)."""
    out = rms_norm(mx.array([[1.0, 7.0]]), mx.array([10.0, -5.0]), 0.0)
    np.testing.assert_allclose(np.array(out), [[2, -7]], rtol=1e-5)


def test_task_1_eps_is_added_under_the_root() -> None:
    """Oracle: by hand: sqrt(25 + 11) = 6. Common mistake: adding it after the root, 5 + 11."""
    out = rms_norm(mx.array([[1.0, 7.0]]), mx.ones(2), 11.0)
    np.testing.assert_allclose(np.array(out), [[1 / 6, 7 / 6]], rtol=1e-5)


def test_task_1_a_row_of_zeros_stays_zero() -> None:
    """Oracle: by hand: 0 / sqrt(eps). Without eps it is nan."""
    np.testing.assert_array_equal(np.array(rms_norm(mx.zeros((2, 4)), mx.ones(4), 1e-5)), np.zeros((2, 4)))


def test_task_1_a_row_of_one_value_becomes_its_sign() -> None:
    """Oracle: by hand: x / sqrt(x^2)."""
    out = rms_norm(mx.array([[3.0], [-0.5]]), mx.ones(1), 0.0)
    np.testing.assert_allclose(np.array(out), [[1], [-1]], rtol=1e-5)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (8, 8), (1, 1, 64), (2, 3, 5), (2, 4, 3, 16)])
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.1])
def test_task_1_the_norm_runs_over_the_last_axis(shape: tuple[int, ...], eps: float) -> None:
    """Oracle: NumPy in float64. Common mistakes: a sum instead of the mean, another axis."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=shape).astype(np.float32)
    weight = rng.normal(size=shape[-1]).astype(np.float32)
    out = rms_norm(mx.array(x), mx.array(weight), eps)
    assert out.shape == shape
    np.testing.assert_allclose(np.array(out), numpy_rms_norm(x, weight, eps), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_task_1_small_and_large_rows_match_mlx(size: float) -> None:
    """Oracle: mx.fast.rms_norm. In small rows eps matters."""
    x = mx.random.normal((4, 96), key=mx.random.key(2)) * size
    weight = mx.random.uniform(0.5, 2.0, (96,), key=mx.random.key(3))
    out, oracle = rms_norm(x, weight, 1e-5), mx.fast.rms_norm(x, weight, 1e-5)
    np.testing.assert_allclose(np.array(out), np.array(oracle), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_task_1_the_output_has_the_dtype_of_x(dtype: mx.Dtype) -> None:
    """Oracle: the docstring."""
    x = mx.random.normal((2, 8), key=mx.random.key(4)).astype(dtype)
    assert rms_norm(x, mx.ones(8, dtype), 1e-5).dtype == dtype
    assert rms_norm(x, mx.ones(8), 1e-5).dtype == dtype, (
        "a float32 weight must not change the dtype of the output"
    )


def test_task_1_the_mean_of_half_precision_values_is_taken_in_float32() -> None:
    """Oracle: NumPy in float64. In float16 300 squared is infinite, and 0.001 squared loses its digits."""
    x = np.array([[300.0, -900.0, 600.0, 1200.0], [0.001, -0.002, 0.003, 0.001]], np.float16)
    out = rms_norm(mx.array(x), mx.ones(4, mx.float16), 1e-6)
    expected = numpy_rms_norm(x, np.ones(4), 1e-6)
    np.testing.assert_allclose(np.array(out.astype(mx.float32)), expected, rtol=4e-3)


class RecordingContext:
    """A context that records the queries and keys that it is given; all tokens are at position 0."""

    def __init__(self, length: int) -> None:
        self.positions = mx.zeros(length, mx.int32)
        self.logit_rows: mx.array | None = None
        self.queries = self.keys = mx.array([])

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Return zeros: the tests look only at the recorded arrays."""
        self.queries, self.keys = q, k
        return mx.zeros(q.shape)


def test_task_1_attention_normalizes_each_query_head_and_each_key_head() -> None:
    """Oracle: NumPy in float64.

    Rotation by position 0 changes nothing, so the context gets normalized heads.
    """
    rng = np.random.default_rng(15)
    stacked, x = rng.normal(size=(32, 16)), rng.normal(size=(2, 5, 16))
    q_norm, k_norm = rng.uniform(0.3, 2.0, size=(2, 8))
    layer = Attention(
        layer=0,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        inv_freq=mx.ones(4),
        qkv_proj=Linear(mx.array(stacked.astype(np.float32))),
        o_proj=Linear(mx.zeros((16, 16))),
        q_norm=mx.array(q_norm.astype(np.float32)),
        k_norm=mx.array(k_norm.astype(np.float32)),
        eps=1e-5,
    )
    context = RecordingContext(5)
    mx.eval(layer(mx.array(x.astype(np.float32)), context))
    heads = (x @ stacked.T).reshape(2, 5, 4, 8).swapaxes(1, 2)
    normed = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(np.array(context.queries), normed[:, :2] * q_norm, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.array(context.keys), normed[:, 2:3] * k_norm, rtol=1e-3, atol=1e-4)


# Task 2: stack


def random_matrix(seed: int, outputs: int, inputs: int, dtype: mx.Dtype = mx.float32) -> Linear:
    """A dense matrix of that type."""
    return Linear(mx.random.normal((outputs, inputs), key=mx.random.key(seed)).astype(dtype))


def random_vector(seed: int, size: int) -> mx.array:
    """[size] float32."""
    return mx.random.normal((size,), key=mx.random.key(seed))


def check_stack(*parts: LinearLike, inputs: int = 8) -> LinearLike:
    """Assert that the stack's output is the outputs of its parts, concatenated; return the stack."""
    x = mx.random.normal((2, 3, inputs), key=mx.random.key(99))
    separate = np.concatenate([np.array(part(x)) for part in parts], axis=-1)
    stacked = stack(parts)
    np.testing.assert_allclose(np.array(stacked(x)), separate, rtol=1e-5, atol=1e-5)
    return stacked


def test_task_2_outputs_of_the_first_part_come_first() -> None:
    """Oracle: by hand: 1 and 2 times x, then 30 times x."""
    both = stack([matrix(np.array([[1], [2]])), matrix(np.array([[30]]))])
    np.testing.assert_allclose(np.array(both(mx.array([[1.0], [-2.0]]))), [[1, 2, 30], [-2, -4, -60]])


@pytest.mark.parametrize("sizes", [(4,), (4, 4), (6, 2, 2), (1, 5)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_task_2_dense_matrices_of_one_dtype_become_one(sizes: tuple[int, ...], dtype: mx.Dtype) -> None:
    """Oracle: each matrix called separately. Converting a weight on the way costs memory."""
    stacked = check_stack(*(random_matrix(seed, size, 8, dtype) for seed, size in enumerate(sizes)))
    assert isinstance(stacked, Linear)
    assert stacked.weight.shape == (sum(sizes), 8)
    assert stacked.weight.dtype == dtype


def test_task_2_matrices_of_different_dtypes_are_not_merged() -> None:
    """Oracle: each matrix called separately, bit for bit: converting a weight would change the result."""
    parts = random_matrix(1, 4, 8), random_matrix(2, 4, 8, mx.float16)
    assert not isinstance(check_stack(*parts), Linear)
    x = mx.random.normal((1, 8), key=mx.random.key(3))
    separate = np.concatenate([np.array(part(x)) for part in parts], axis=-1)
    np.testing.assert_array_equal(np.array(stack(parts)(x)), separate)


def test_task_2_matrices_with_a_bias_become_one_matrix_with_a_bias() -> None:
    """Oracle: each matrix called separately. Common mistakes: summed biases, only the first bias."""
    parts = [
        BiasedLinear(random_matrix(seed, size, 8), random_vector(seed, size))
        for seed, size in enumerate((4, 2, 2))
    ]
    stacked = check_stack(*parts)
    assert isinstance(stacked, BiasedLinear)
    assert isinstance(stacked.matrix, Linear)
    assert stacked.bias.shape == (8,)


def test_task_2_a_matrix_with_a_bias_and_one_without_work_together() -> None:
    """Oracle: each matrix called separately."""
    biased = BiasedLinear(random_matrix(1, 4, 8), random_vector(2, 4))
    check_stack(biased, random_matrix(3, 4, 8))
    check_stack(random_matrix(3, 4, 8), biased)


def test_task_2_any_callable_matrix_can_be_stacked() -> None:
    """Oracle: each matrix called separately. Every object with the methods of a matrix is one."""

    class Doubling:
        def __call__(self, x: mx.array) -> mx.array:
            return 2 * x

        def rows(self, ids: mx.array) -> mx.array:
            raise AssertionError("no lookup is expected")

    check_stack(Doubling(), random_matrix(1, 4, 8), Doubling())
    check_stack(BiasedLinear(Doubling(), random_vector(1, 8)), BiasedLinear(Doubling(), random_vector(2, 8)))


def packed_matrix(seed: int, outputs: int, bits: int) -> PackedLinear:
    """A quantized matrix of 64 inputs in the layout of the compiled kernels."""
    weight = mx.random.normal((outputs, 64), key=mx.random.key(seed)).astype(mx.float16)
    packed = compiled_kernel("pack")(*mx.quantize(weight, group_size=32, bits=bits), group_size=32, bits=bits)
    return PackedLinear(packed, 64, outputs, bits)


@pytest.mark.usefixtures("compiled")
def test_task_2_packed_matrices_of_equal_bits_become_one() -> None:
    """Oracle: each matrix called separately. Calling the embedded model's matrices one by one costs time."""
    one = check_stack(packed_matrix(1, 32, 4), packed_matrix(2, 16, 4), packed_matrix(3, 16, 4), inputs=64)
    assert isinstance(one, PackedLinear)
    assert one.out_features == 64
    check_stack(packed_matrix(1, 32, 4), packed_matrix(2, 16, 8), inputs=64)
    biased = [BiasedLinear(packed_matrix(seed, 16, 4), random_vector(seed, 16)) for seed in range(2)]
    stacked = check_stack(*biased, inputs=64)
    assert isinstance(stacked, BiasedLinear)
    assert isinstance(stacked.matrix, PackedLinear)


@pytest.mark.parametrize("biased", [False, True])
def test_task_2_the_first_pass_does_not_copy_the_weights(biased: bool) -> None:
    """Oracle: by hand: 16 MiB of weights. Weights that are not evaluated before are copied in the first
    pass, all at once."""

    def part(seed: int) -> LinearLike:
        dense = random_matrix(seed, 1024, 512)
        vector = random_vector(seed, 1024)
        mx.eval(dense.weight, vector)
        return BiasedLinear(dense, vector) if biased else dense

    before = mx.get_active_memory()
    stacks = [stack([part(2 * i), part(2 * i + 1)]) for i in range(4)]
    mx.reset_peak_memory()
    mx.eval([stacked(mx.zeros((1, 512))) for stacked in stacks])
    mib = (mx.get_peak_memory() - before) / 2**20
    assert mib < 20, f"{mib:.0f} MiB at the peak"


def test_task_2_the_joined_bias_is_evaluated_at_once() -> None:
    """Oracle: by hand: evaluating it again takes no memory. Joining lazily would add 2 MiB."""
    parts = [BiasedLinear(random_matrix(seed, 2**18, 1), random_vector(seed, 2**18)) for seed in range(2)]
    mx.eval([(part.bias, part(mx.zeros((1, 1)))) for part in parts])
    stacked = stack(parts)
    assert isinstance(stacked, BiasedLinear)
    before = mx.get_active_memory()
    mx.eval(stacked.bias)
    assert mx.get_active_memory() == before


# Task 3: swiglu


def numpy_swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """The formula in float64."""
    gate = gate.astype(np.float64)
    return gate / (1 + np.exp(-gate)) * up


def test_task_3_a_gate_of_zero_gives_zero() -> None:
    """Oracle: by hand: 0 times one half."""
    np.testing.assert_array_equal(np.array(swiglu(mx.zeros(2), mx.array([5.0, -5.0]))), [0, 0])


def test_task_3_the_gate_is_multiplied_by_its_sigmoid() -> None:
    """Oracle: by hand: sigmoid(ln 3) is 3/4, so 4 becomes 3 ln 3. A gate that is only a sigmoid gives 3."""
    out = swiglu(mx.array([np.log(3.0)]), mx.array([4.0]))
    np.testing.assert_allclose(np.array(out), [3 * np.log(3)], rtol=1e-5)


def test_task_3_the_first_argument_is_the_gate() -> None:
    """Oracle: by hand: -ln 3 / 4 times 2. Swapped arguments give -1.93."""
    out = swiglu(mx.array([-np.log(3.0)]), mx.array([2.0]))
    np.testing.assert_allclose(np.array(out), [-np.log(3) / 2], rtol=1e-5)


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 5), (2, 3, 48)])
def test_task_3_values_match_the_formula(shape: tuple[int, ...]) -> None:
    """Oracle: NumPy in float64. Common mistake: gelu instead of silu."""
    rng = np.random.default_rng(5)
    gate, up = (rng.normal(size=shape, scale=2.0).astype(np.float32) for _ in range(2))
    out = swiglu(mx.array(gate), mx.array(up))
    assert out.shape == shape
    np.testing.assert_allclose(np.array(out), numpy_swiglu(gate, up), rtol=1e-4, atol=1e-5)


def test_task_3_gates_far_from_zero_do_not_overflow() -> None:
    """Oracle: by hand: silu(100) is 100, silu(-100) is 0. exp(100) / (1 + exp(100)) is nan in float32."""
    out = swiglu(mx.array([100.0, -100.0]), mx.array([0.5, 0.5]))
    np.testing.assert_allclose(np.array(out), [50, 0], rtol=1e-5, atol=1e-6)


# Task 4: MLP.__call__


def numpy_mlp(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """The network in float64, its matrices as [outputs, inputs]."""
    x, gate, up, down = (a.astype(np.float64) for a in (x, gate, up, down))
    return numpy_swiglu(x @ gate.T, x @ up.T) @ down.T


def random_matrices(seed: int, width: int, inner: int) -> list[np.ndarray]:
    """gate and up [inner, width], down [width, inner]."""
    rng = np.random.default_rng(seed)
    shapes = [(inner, width), (inner, width), (width, inner)]
    return [(rng.normal(size=shape) * 2 / shape[1] ** 0.5).astype(np.float32) for shape in shapes]


def test_task_4_a_single_value_passes_through_gate_up_and_down() -> None:
    """Oracle: by hand: gate ln 3 and up 4 give 3 ln 3, and down doubles it.

    Swapping gate and up gives 8.63.
    """
    mlp = MLP(gate_up_proj=matrix(np.array([[1.0], [4 / np.log(3)]])), down_proj=matrix(np.array([[2.0]])))
    out = mlp(mx.array([[[np.log(3.0)]]]))
    np.testing.assert_allclose(np.array(out), [[[6 * np.log(3)]]], rtol=1e-5)


def test_task_4_the_first_half_of_the_stack_is_the_gate() -> None:
    """Oracle: by hand: gates 100 and 0, ups 3 and 5. Common mistake: every other row as a gate."""
    mlp = MLP(gate_up_proj=matrix(np.array([[100], [0], [3], [5]])), down_proj=matrix(np.eye(2)))
    np.testing.assert_allclose(np.array(mlp(mx.array([[[1.0]]]))), [[[300, 0]]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "inner"), [(1, 4), (8, 8), (8, 24), (32, 96), (24, 8)])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 6), (3, 4)])
def test_task_4_the_whole_network_matches_numpy(width: int, inner: int, batch: int, length: int) -> None:
    """Oracle: NumPy in float64."""
    gate, up, down = random_matrices(6, width, inner)
    x = np.random.default_rng(7).normal(size=(batch, length, width)).astype(np.float32)
    out = MLP(gate_up_proj=matrix(np.concatenate([gate, up])), down_proj=matrix(down))(mx.array(x))
    assert out.shape == (batch, length, width)
    np.testing.assert_allclose(np.array(out), numpy_mlp(x, gate, up, down), rtol=1e-3, atol=1e-4)


def test_task_4_each_token_is_computed_independently() -> None:
    """Oracle: each token computed separately."""
    gate, up, down = random_matrices(8, 8, 24)
    mlp = MLP(gate_up_proj=matrix(np.concatenate([gate, up])), down_proj=matrix(down))
    x = mx.random.normal((2, 3, 8), key=mx.random.key(9))
    separate = [[np.array(mlp(x[b : b + 1, i : i + 1]))[0, 0] for i in range(3)] for b in range(2)]
    np.testing.assert_allclose(np.array(mlp(x)), separate, rtol=1e-5, atol=1e-5)


def test_task_4_projections_may_have_a_bias() -> None:
    """Oracle: NumPy in float64: a bias is one more column, for an input that is always 1.

    A network must call its matrices; one that reads `.weight` loses the bias.
    """
    gate, up, down = random_matrices(10, 8, 24)
    x = np.random.default_rng(11).normal(size=(2, 3, 8)).astype(np.float32)
    x[:, :, -1] = 1.0
    stacked = np.concatenate([gate, up])
    biased = BiasedLinear(matrix(stacked * (np.arange(8) < 7)), mx.array(stacked[:, -1]))
    out = MLP(gate_up_proj=biased, down_proj=BiasedLinear(matrix(down), mx.full(8, 0.5)))(mx.array(x))
    np.testing.assert_allclose(np.array(out), numpy_mlp(x, gate, up, down) + 0.5, rtol=1e-3, atol=1e-4)
