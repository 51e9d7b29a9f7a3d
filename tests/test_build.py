"""How the kernel extension is found, rejected and switched off; and how its threads start and stop.

Each test runs a new interpreter, because all of this happens at import or at exit.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from sysconfig import get_path

import pytest

import tiny_llm_kernels as kernels

PACKAGE = Path(kernels.__file__).parent
ROOT = Path(__file__).parent.parent
needs_kernels = pytest.mark.skipif(not kernels.available(), reason=kernels.why_unavailable() or "")


def run(code: str, *, where: Path = PACKAGE.parent, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TINY_LLM_")}
    return subprocess.run(
        [sys.executable, "-S", "-c", code],  # -S: an editable install's finder would precede PYTHONPATH
        env=clean | {"PYTHONPATH": os.pathsep.join([str(where), get_path("purelib")])} | env,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def copy_of_package(target: Path, *, with_extension: bool = True) -> Path:
    ignored = shutil.ignore_patterns("csrc", "inplace", "__pycache__", *([] if with_extension else ["*.so"]))
    shutil.copytree(PACKAGE, target / "tiny_llm_kernels", ignore=ignored)
    return target


REPORT = "import tiny_llm_kernels as k; print(k.available(), k.why_unavailable())"


def test_the_package_imports_with_kernels_switched_off() -> None:
    done = run(REPORT, TINY_LLM_KERNELS="off")
    assert done.stdout == "False switched off by TINY_LLM_KERNELS=off\n", done.stderr


def test_calling_a_missing_kernel_raises_an_error_with_the_reason() -> None:
    done = run("import tiny_llm_kernels as k; k.num_threads()", TINY_LLM_KERNELS="off")
    assert "num_threads cannot be called: switched off" in done.stderr.splitlines()[-1]


def test_the_package_imports_without_an_extension(tmp_path: Path) -> None:
    done = run(REPORT, where=copy_of_package(tmp_path, with_extension=False))
    assert done.stdout.startswith("False not built"), done.stderr


@needs_kernels
def test_an_extension_for_another_mlx_version_raises_import_error(tmp_path: Path) -> None:
    copy_of_package(tmp_path)
    (extension,) = (tmp_path / "tiny_llm_kernels").glob("_kernels.*so")
    same_length = "0.0.1".ljust(len(version("mlx")), "0")
    mine, other = (f"built for mlx={v};".encode() for v in (version("mlx"), same_length))
    assert extension.read_bytes().count(mine) == 1
    extension.write_bytes(extension.read_bytes().replace(mine, other))
    last = run(REPORT, where=tmp_path).stderr.splitlines()[-1]
    assert last.startswith("ImportError: tiny_llm_kernels was built for mlx 0.0.1")
    assert f"but mlx {version('mlx')} is installed: run `pdm install`" in last
    assert run(REPORT, where=tmp_path, TINY_LLM_KERNELS="off").returncode == 0


@needs_kernels
def test_an_extension_that_cannot_be_loaded_does_not_fail_the_import(tmp_path: Path) -> None:
    copy_of_package(tmp_path)
    (extension,) = (tmp_path / "tiny_llm_kernels").glob("_kernels.*so")
    extension.write_text(f"not a library, but tiny_llm_kernels built for mlx={version('mlx')};")
    assert run(REPORT, where=tmp_path).stdout.startswith("False built, but cannot be loaded:")


@pytest.mark.parametrize(
    ("variable", "value"),
    [("TINY_LLM_KERNELS", "fast"), ("TINY_LLM_NUM_THREADS", "0"), ("TINY_LLM_NUM_THREADS", "two")],
)
def test_an_invalid_environment_variable_is_rejected_with_its_value(variable: str, value: str) -> None:
    if not kernels.available() and variable == "TINY_LLM_NUM_THREADS":
        pytest.skip("read only with compiled kernels")
    last = run(REPORT, **{variable: value}).stderr.splitlines()[-1]
    assert last.startswith(f"ValueError: {variable}")
    assert repr(value) in last


def test_an_error_of_the_kernels_is_not_reported_as_a_model_file_error() -> None:
    last = run("from tiny_llm import LLM; LLM()", TINY_LLM_KERNELS="fast").stderr.splitlines()[-1]
    assert last.startswith("ValueError: TINY_LLM_KERNELS must be")


@needs_kernels
def test_instruction_set_and_threads_are_read_from_the_environment() -> None:
    code = "import tiny_llm_kernels as k; print(k.instruction_set(), k.num_threads())"
    assert run(code, TINY_LLM_KERNELS="portable", TINY_LLM_NUM_THREADS="3").stdout == "portable 3\n"


WORK = """
import mlx.core as mx, os, sys, tiny_llm_kernels as k
x, w = mx.ones((4096, 64)), mx.ones(64)
def work(): mx.eval([k.rms_norm(x, w, 1e-5) for _ in range(20)])
"""


@needs_kernels
@pytest.mark.parametrize(
    "code",
    [
        "work()",
        "mx.async_eval([k.rms_norm(x, w, 1e-5) for _ in range(200)])",  # exits while kernels run
        "[(k.set_num_threads(1 + i % 4), work()) for i in range(100)]",
        "[(mx.async_eval(k.rms_norm(x, w, 1e-5)), k.set_num_threads(1 + i % 4)) for i in range(100)]; work()",
    ],
)
def test_a_process_exits_cleanly_while_threads_start_and_stop(code: str) -> None:
    done = run(WORK + code, TINY_LLM_NUM_THREADS="4")
    assert done.returncode == 0, done.stderr


@needs_kernels
def test_a_forked_child_can_use_the_thread_pool_and_exit() -> None:
    """The child uses only the pool, because MLX's stream does not survive a fork."""
    fork = """
work()
child = os.fork()
if child == 0:
    k.set_num_threads(2); k.set_num_threads(3); assert k.num_threads() == 3
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
work()
"""
    done = run(WORK + fork, TINY_LLM_NUM_THREADS="4")
    assert done.returncode == 0, done.stderr


@needs_kernels
def test_idle_threads_sleep() -> None:
    """After the last kernel, workers spin only for a limited time."""
    idle = "import time; work(); time.sleep(0.05); a = time.process_time(); time.sleep(0.5)\n"
    idle += "print(time.process_time() - a)"
    assert float(run(WORK + idle, TINY_LLM_NUM_THREADS="4").stdout) < 0.05


def test_no_build_flag_depends_on_the_build_machine() -> None:
    text = "\n".join(
        line
        for line in (ROOT / "CMakeLists.txt").read_text().splitlines()
        if not line.lstrip().startswith("#")
    )
    assert "native" not in text
    assert "fast-math" not in text
    assert "-ffp-contract=off" in text


def test_kernels_are_built_only_on_linux_and_a_failed_build_falls_back_to_python() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]
    without_cmake = [o["if"] for o in settings["overrides"] if o.get("wheel", {}).get("cmake") is False]
    assert {"platform-system": "^(?!linux)"} in without_cmake
    assert {"failed": True} in without_cmake
