"""Small stacks, few threads and little memory: the engine runs, or exits with one line that names the limit.

Each case runs in a new process under an operating-system limit (`setrlimit`, as set by `ulimit`).
"""

import os
import resource
import subprocess
import sys
from collections.abc import Callable

import pytest

import tiny_llm_kernels

KIB, MIB = 1 << 10, 1 << 20
SECONDS = 120  # guards against hanging
UNPRIVILEGED = 65534  # a user id; root has no limit on threads

compiled = pytest.mark.skipif(not tiny_llm_kernels.available(), reason="no compiled kernels")


def run(
    code: str, limit: Callable[[], object] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new process. limit: called in it first."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def limited(which: int, value: int) -> Callable[[], object]:
    """A function that sets the soft limit and keeps the hard one."""
    return lambda: resource.setrlimit(which, (value, resource.getrlimit(which)[1]))


COMMAND = "import sys; from tiny_llm_cli.main import main; sys.argv = ['tiny-llm', *{arguments!r}]; main()"


def command(
    *arguments: str, limit: Callable[[], object] | None = None, **environment: str
) -> tuple[int, str]:
    """Run a command; return its exit code and its standard error."""
    ended = run(COMMAND.format(arguments=arguments), limit, **environment)
    return ended.returncode, ended.stderr


# ---- stacks ----

EVERY_KERNEL = """
import mlx.core as mx
import tiny_llm_kernels as k
names = k.instruction_sets()
for name in names:
    k.select_instruction_set(name)
    for D in (64, 512):
        q = mx.random.normal((1, 8, 40, D), key=mx.random.key(0))
        kv = mx.random.normal((1, 2, 40, D), key=mx.random.key(1))
        pool = mx.zeros((12, 2, 4, D), mx.float16)
        tables, rows = mx.arange(12, dtype=mx.int32)[None], mx.zeros(40, mx.int32)
        places = mx.arange(40, dtype=mx.int32)
        out, *_ = k.write_and_attend(q, kv, kv, pool, mx.array(pool), places, tables, rows, places, 0.1)
        mx.eval(out, k.flash_attention(q, kv, kv, 0.1, True))
    for bits in (4, 8):
        quantized = mx.quantize(mx.random.normal((64, 256)), group_size=32, bits=bits)
        weights = k.pack(*quantized, group_size=32, bits=bits)
        for activation_bits in (8, 16):
            x = mx.random.normal((50, 256))
            mx.eval(k.quantized_matmul(x, weights, 64, bits=bits, activation_bits=activation_bits))
    x = mx.random.normal((50, 256))
    mx.eval(k.dense_matmul(x, x), k.rms_norm(x, mx.ones(256), 1e-5), k.swiglu(x, x), k.geglu(x, x))
    for masks in (None, mx.full((2, 1563), 7, mx.int32)):
        mx.eval(k.sample(mx.random.normal((2, 50_000)), [1, 0], 1.0, 0.01, 50, 0.9, [0.5, 0.2], masks))
print(len(names))
"""


@compiled
@pytest.mark.parametrize("stack", [256 * KIB, 512 * KIB])
def test_every_kernel_runs_on_a_small_stack(stack: int) -> None:
    """Regression test: attention had half a megabyte of locals, which caused a segmentation fault."""
    ended = run(EVERY_KERNEL, limited(resource.RLIMIT_STACK, stack))
    assert (ended.returncode, ended.stdout) == (0, f"{len(tiny_llm_kernels.instruction_sets())}\n"), (
        ended.stderr
    )


def test_generation_works_on_a_small_stack() -> None:
    code, stderr = command(
        *("generate", "The capital of France is", "--max-tokens", "3", "--num-blocks", "64"),
        limit=limited(resource.RLIMIT_STACK, 256 * KIB),
    )
    assert (code, stderr) == (0, "")


# ---- threads ----


@compiled
@pytest.mark.parametrize("value", ["100000", "1025", "0", "-1", "abc", "1e9", "\u0662", "9" * 5000])
def test_an_invalid_number_of_threads_in_the_environment_gives_a_one_line_error(value: str) -> None:
    code, stderr = command("info", TINY_LLM_NUM_THREADS=value)
    assert code == 1
    assert stderr.startswith(
        "tiny-llm: error: TINY_LLM_NUM_THREADS must be a whole number from 1 to 1024, got '"
    )
    assert stderr.count("\n") == 1
    assert len(stderr) < 200


@compiled
@pytest.mark.parametrize("value", [0, -1, 1025, 2**40])
def test_set_num_threads_rejects_an_invalid_number(value: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to 1024, got {value}"):
        tiny_llm_kernels.set_num_threads(value)


FEW_THREADS = f"""
import os, resource, threading
import mlx.core as mx
import tiny_llm_kernels as k
from tiny_llm.kernels import kernel_info
x = mx.random.normal((50, 256))
mx.eval(x)                                       # starts MLX's own thread
k.set_num_threads(1)
alone = k.dense_matmul(x, x)
mx.eval(alone)
if os.getuid() == 0:
    os.setuid({UNPRIVILEGED})
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))  # no more than are running: no thread can be started
k.set_num_threads(8)
crowd = k.dense_matmul(x, x)
mx.eval(crowd)
print(k.num_threads(), mx.array_equal(alone, crowd).item())
"""


@compiled
def test_kernels_run_on_fewer_threads_if_the_system_cannot_start_more() -> None:
    """Regression test: a std::system_error terminated the process."""
    ended = run(FEW_THREADS)
    assert (ended.returncode, ended.stdout) == (0, "1 True\n"), ended.stderr


NO_THREAD = f"""
import os, resource, sys
from tiny_llm_cli.main import main
import tiny_llm.llm, tiny_llm.resources, typer.exceptions, tiny_llm_cli.app
import tiny_llm_checkpoints.embedded
model = str(tiny_llm_checkpoints.embedded.embedded_model_path())
import tiny_llm_checkpoints.gguf_tokenizer, mlx.core as mx
from tiny_llm.engine import Engine
from tiny_llm import EngineConfig
mx.eval(mx.zeros(1) + 1)
if os.getuid() == 0:
    os.setuid({UNPRIVILEGED})
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
try:
    Engine(lambda: None, None, 10, EngineConfig())
except tiny_llm.resources.OutOfResourcesError as error:
    print(error)
"""


def test_an_engine_that_cannot_start_its_thread_reports_the_limit() -> None:
    ended = run(NO_THREAD)
    assert ended.stdout.startswith("not enough threads or memory for the engine's thread ("), ended.stderr
    assert "limit 1 threads, ulimit -u" in ended.stdout


# ---- memory ----


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "Hi", "--max-tokens", "2"),
        pytest.param(("info",), marks=pytest.mark.deep),
        pytest.param(("serve", "--port", "0"), marks=pytest.mark.deep),
    ],
)
@pytest.mark.parametrize(
    ("memory", "purpose"), [(200 * MIB, "the model /"), (700 * MIB, "keys and values: needs 537 MB")]
)
def test_too_little_memory_gives_a_one_line_error_with_the_purpose_and_the_limit(
    arguments: tuple[str, ...], memory: int, purpose: str
) -> None:
    code, stderr = command(*arguments, limit=limited(resource.RLIMIT_AS, memory))
    assert code == 1
    last = stderr.splitlines()[-1]
    assert last.startswith("tiny-llm: error: not enough ")
    assert f" for {purpose}" in last
    assert f"limit {memory / 1e6:,.0f} MB, ulimit -v" in last
    assert "Traceback" not in stderr
    assert arguments[0] == "serve" or stderr.count("\n") == 1


def test_generation_works_within_two_gigabytes() -> None:
    code, stderr = command(
        "generate", "Hi", "--max-tokens", "2", limit=limited(resource.RLIMIT_AS, 2_000_000 * KIB)
    )
    assert (code, stderr) == (0, "")
