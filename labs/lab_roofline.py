"""2.4: The roofline of this machine: what limits a pass, for weights in 8 and in 4 bits.

Measures two limits: the bytes per second that all threads together read from memory, and the operations per
second of the matrix kernel at its best, on a layer that stays in the cache. From these it predicts the time
of the matrix products of a pass over 1, 2, 4, ... tokens: that of reading all weights once, or that of the
arithmetic, whichever is longer. Then it measures them, for matrices of the embedded model's shapes. Attention
and all other operators are left out.

\b
pdm run lab roofline
pdm run lab roofline --plot roofline.svg
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # `bandwidth` has threads; set before NumPy is loaded

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import Annotated, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np
import typer
from tiny_llm.kernels import compiled_kernel, kernel_info

from result import Cell, Column, Line, Pair, Picture, Point, Progress, Result, Table, as_bytes
from tiny_llm_course.errors import CourseError

SHAPES = ((576, 960), (576, 576), (576, 3072), (1536, 576))  # inputs and outputs of qkv, o, gate and up, down
OUTPUTS = [outputs for _, outputs in SHAPES]
WIDTH, MLP = 576, 1536
READ_BYTES = 256 * 2**20  # larger than most caches
GROUP_SIZE, ACTIVATION_BITS = 32, 16
LONG_ENOUGH = 0.1  # seconds of repetitions, of which the fastest counts

Multiply = Callable[[mx.array], mx.array]
Layer = Sequence[Multiply]
T = TypeVar("T")


def measure(
    progress: Progress,
    layers: Annotated[int, typer.Option(min=1, max=100, help="Layers, each with weights of its own.")] = 30,
    longest: Annotated[
        int, typer.Option(min=2, max=4096, help="Tokens in the largest pass; the others have 1, 2, 4, ...")
    ] = 256,
    repetitions: Annotated[int, typer.Option(min=1, max=100, help="Rounds; the best values count.")] = 5,
) -> Result:
    """Measure the limits and all passes, several times, and take the best values."""
    info = kernel_info()
    if info.num_threads is None:
        raise CourseError(f"this lab needs the compiled kernels: {info.why_unavailable}")
    counts = [1 << doublings for doublings in range(longest.bit_length())]
    kinds = [Weights.of(bits, layers) for bits in (8, 4)]
    runs = []
    for done in range(repetitions):
        progress("roofline: rounds measured:", done, repetitions)
        runs.append(Run(bandwidth(info.num_threads), [kind.measured(counts) for kind in kinds]))
    progress("roofline", repetitions, repetitions)
    found = [Roofline.of(kind, counts, runs, place) for place, kind in enumerate(kinds)]
    return Result(
        title="The roofline of this machine",
        question="What decides how long a pass takes: reading the weights, or computing with them?",
        tables=[_table_of_limits(found), _table_of_passes(found)],
        conclusion=_conclusion(found),
        picture=_picture(found),
    )


def bandwidth(threads: int) -> float:
    """Bytes per second that all threads together read from memory, by dot products of long arrays."""
    arrays = [np.ones(READ_BYTES // threads // 4, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        read = partial(pool.map, lambda array: np.dot(array, array))
        return READ_BYTES / fastest(lambda: arrays, lambda parts: list(read(parts)))


def fastest(prepare: Callable[[], T], work: Callable[[T], object]) -> float:
    """Run `work` on what `prepare` returns, again and again, and return the seconds of the fastest run.

    `prepare` is not timed: building the graph of MLX's operators takes time, too.
    """
    times: list[float] = []
    while sum(times) < LONG_ENOUGH:
        prepared = prepare()
        start = perf_counter()
        work(prepared)
        times.append(perf_counter() - start)
    return min(times)


class Speeds(NamedTuple):
    """Operations per second in the cache, at best, and the seconds of a pass over each number of tokens."""

    peak: float
    seconds: list[float]


class Run(NamedTuple):
    """What one round measured: bytes per second, and the speeds for each kind of weights."""

    bandwidth: float
    speeds: list[Speeds]


class Weights(NamedTuple):
    """The matrices of a model's layers in one number of bits, packed for the kernel."""

    bits: int
    layers: Sequence[Layer]
    nbytes: int

    @classmethod
    def of(cls, bits: int, layers: int) -> "Weights":
        """Random weights; each group of 32 has a scale and a bias in 16 bits."""
        packed = [[_packed(bits, *shape) for shape in SHAPES] for _ in range(layers)]
        mx.eval(packed)
        made = [[_product(bits, *pair) for pair in zip(layer, OUTPUTS, strict=True)] for layer in packed]
        return cls(bits, made, sum(matrix.nbytes for layer in packed for matrix in layer))

    def operations(self, tokens: int) -> int:
        """Multiplications and additions of a pass."""
        return 2 * tokens * len(self.layers) * sum(inputs * outputs for inputs, outputs in SHAPES)

    def measured(self, counts: Sequence[int]) -> Speeds:
        """Time passes of all sizes through one layer, which stays in the cache, and through all layers."""
        one = self._replace(layers=self.layers[:1])
        peak = max(one.operations(tokens) / one.seconds(tokens) for tokens in counts)
        return Speeds(peak, [self.seconds(tokens) for tokens in counts])

    def seconds(self, tokens: int) -> float:
        """Seconds of the fastest pass."""
        return fastest(partial(self.products, tokens), mx.eval)

    def products(self, tokens: int) -> mx.array:
        """All products of a pass; the input of each is an output of the one before."""
        x = mx.ones((tokens, WIDTH))
        for qkv, o, gate_up, down in self.layers:
            x = down(gate_up(o(qkv(x)[:, :WIDTH]))[:, :MLP])
        return x


def _packed(bits: int, inputs: int, outputs: int) -> mx.array:
    """A matrix [outputs, inputs] that hardly changes the size of the numbers it is multiplied with."""
    matrix = mx.random.normal((outputs, inputs), scale=inputs**-0.5, key=mx.random.key(outputs))
    weight, scales, biases = mx.quantize(matrix.astype(mx.float16), GROUP_SIZE, bits)
    packed: mx.array = compiled_kernel("pack")(weight, scales, biases, group_size=GROUP_SIZE, bits=bits)
    return packed


def _product(bits: int, packed: mx.array, outputs: int) -> Multiply:
    options = {"bits": bits, "activation_bits": ACTIVATION_BITS}
    return lambda x: compiled_kernel("quantized_matmul")(x, packed, outputs, **options)


class Roofline(NamedTuple):
    """The best of all rounds for one kind of weights, because other work on the machine only slows it down.

    bandwidth: bytes per second. peak: operations per second. seconds: of a pass over each of `counts` tokens.
    """

    weights: Weights
    counts: Sequence[int]
    bandwidth: float
    peak: float
    seconds: Sequence[float]

    @classmethod
    def of(cls, weights: Weights, counts: Sequence[int], runs: Sequence[Run], place: int) -> "Roofline":
        """Take the best of all rounds. place: of these weights in the speeds of a round."""
        speeds = [run.speeds[place] for run in runs]
        seconds = [min(times) for times in zip(*(one.seconds for one in speeds), strict=True)]
        peak = max(one.peak for one in speeds)
        return cls(weights, counts, max(run.bandwidth for run in runs), peak, seconds)

    def predicted(self, tokens: float) -> float:
        """Seconds of a pass: reading the weights, or the arithmetic, whichever takes longer."""
        return max(self.reading, tokens * self.weights.operations(1) / self.peak)

    @property
    def reading(self) -> float:
        """Seconds of reading all weights once."""
        return self.weights.nbytes / self.bandwidth

    @property
    def corner(self) -> Pair:
        """The tokens in a pass from which on the arithmetic takes longer than reading the weights.

        Measured: the time of a pass over one token, in times per token of the largest pass.
        """
        predicted = self.reading * self.peak / self.weights.operations(1)
        return Pair(predicted, self.seconds[0] * self.counts[-1] / self.seconds[-1])

    def point(self, tokens: float, seconds: float) -> Point:
        """A point of the picture: operations per byte, and billions of operations per second."""
        operations = tokens * self.weights.operations(1)
        return Point(operations / self.weights.nbytes, operations / seconds / 1e9)


def _table_of_limits(found: Sequence[Roofline]) -> Table:
    one = "{:,.1f}".format
    return Table(
        "The limits of this machine, and the tokens in a pass at which both take equally long",
        [
            Column("weights", "weights"),
            Column("bits", "bits per\nweight", one),
            Column("bytes", "size", as_bytes),
            Column("bandwidth", "memory\n(GB/s)", one),
            Column("peak", "arithmetic\n(Gop/s)", "{:,.0f}".format),
            Column("tokens", "equal at\n(tokens)", one),
        ],
        [
            (
                f"{roof.weights.bits} bits",
                16 * roof.weights.nbytes / roof.weights.operations(1),
                roof.weights.nbytes,
                roof.bandwidth / 1e9,
                roof.peak / 1e9,
                roof.corner,
            )
            for roof in found
        ],
    )


def _table_of_passes(found: Sequence[Roofline]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for place, tokens in enumerate(found[0].counts):
        eight, four = (Pair(roof.predicted(tokens), roof.seconds[place]) for roof in found)
        times = [Pair(*(1000 * seconds for seconds in pair)) for pair in (eight, four)]
        ratio = Pair(eight.predicted / four.predicted, eight.measured / four.measured)
        rows.append((tokens, *times, ratio))
    ms = "{:,.1f}".format
    return Table(
        "All matrix products of a pass",
        [
            Column("tokens", "tokens in\nthe pass"),
            Column("eight_ms", "8-bit weights\n(ms)", ms),
            Column("four_ms", "4-bit weights\n(ms)", ms),
            Column("ratio", "times as long\nwith 8 bits", "{:,.2f}".format),
        ],
        rows,
    )


def _conclusion(found: Sequence[Roofline]) -> str:
    eight, four = found
    first, last = (eight.seconds[place] / four.seconds[place] for place in (0, -1))
    return (
        f"8-bit weights have {eight.weights.nbytes / four.weights.nbytes:.1f} times the bytes of 4-bit ones. "
        f"With them, a pass over one token takes {first:.1f} times as long, and a pass over "
        f"{four.counts[-1]} tokens {last:.1f} times as long. By the two limits, arithmetic takes longer than "
        f"reading from {eight.corner.predicted:.0f} tokens on with 8 bits, and from "
        f"{four.corner.predicted:.0f} on with 4."
    )


def _picture(found: Sequence[Roofline]) -> Picture:
    lines = []
    for roof in found:
        name = f"{roof.weights.bits}-bit weights"
        corner = [roof.corner.predicted] if 1 < roof.corner.predicted < roof.counts[-1] else []
        ends = [1, *corner, roof.counts[-1]]
        lines.append(Line(name, [roof.point(n, roof.predicted(n)) for n in ends], is_predicted=True))
        lines.append(Line(name, [roof.point(*pair) for pair in zip(roof.counts, roof.seconds, strict=True)]))
    return Picture(
        title="Roofline: the matrix products of passes over 1, 2, 4, ... tokens",
        x="operations per byte of weights",
        y="billion operations per second",
        lines=lines,
        x_base=2,
        y_base=2,
    )
