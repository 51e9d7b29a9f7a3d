"""Installing does not affect the overlay: imports follow `__path__`, even after a second install.

Each test has a copy of the source tree and a new virtual environment. Nothing is compiled or downloaded: the
build backend and MLX come from the running environment.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("scikit_build_core", reason="the build backend is in the development group")
pytestmark = pytest.mark.install

ROOT = Path(__file__).parents[1]
WHERE = "import tiny_llm.chunked_prefill as module; print(module.__file__)"


class Checkout:
    """A copy of the source tree without a learner's modules, and a virtual environment for it."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.empty, self._venv = folder / "tree", folder / "empty", folder / "venv"
        self.empty.mkdir()
        leave_out = shutil.ignore_patterns("__pycache__", "*.so", "CMakeCache.txt", "CMakeFiles")
        shutil.copytree(ROOT / "src", self.tree / "src", ignore=leave_out)
        for file in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, self.tree / file)
        self.overlay = self.tree / "src" / "tiny_llm"
        for module in self.overlay.glob("*.py"):
            if module.name != "__init__.py":
                module.unlink()
        self._run(sys.executable, "-m", "venv", str(self._venv))
        (self.site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    @property
    def site_packages(self) -> Path:
        """The folder of the virtual environment's packages."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self._venv / "lib" / version / "site-packages"

    def install(self, *how: str) -> None:
        """`pip install` the tree without compiling."""
        options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
        options.append("--config-settings=wheel.cmake=false")
        self._run(*self._python, "-m", "pip", "install", *options, *how)

    def where(self, overlay: Path | None = None) -> Path:
        """The file that `tiny_llm.chunked_prefill` is imported from."""
        setting = {} if overlay is None else {"TINY_LLM_OVERLAY": str(overlay)}
        return Path(self._run(*self._python, "-c", WHERE, **setting).strip())

    @property
    def _python(self) -> tuple[str, ...]:
        return (str(self._venv / "bin" / "python"),)

    def _run(self, *command: str, **setting: str) -> str:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TINY_LLM_", "PYTHON", "PIP_"))}
        environment = inherited | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | setting
        done = subprocess.run(
            command, cwd=self.tree, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_a_second_editable_install_does_not_capture_the_overlays_modules(checkout: Checkout) -> None:
    """An editable install that mapped modules to files would also map the learner's file the second time."""
    reference = checkout.tree / "src" / "tiny_llm_ref" / "chunked_prefill.py"
    mine = checkout.overlay / "chunked_prefill.py"

    checkout.install("--editable", ".")
    assert checkout.where() == reference

    mine.write_text("def share_budget(wants, budget):\n    raise NotImplementedError\n")
    assert checkout.where() == mine
    assert checkout.where(overlay=checkout.empty) == reference

    checkout.install("--editable", ".")
    assert checkout.where() == mine
    assert checkout.where(overlay=checkout.empty) == reference

    mine.unlink()
    assert checkout.where() == reference
    assert checkout.where(overlay=checkout.empty) == reference


def test_a_plain_install_does_not_need_the_source_tree(checkout: Checkout) -> None:
    checkout.install(".")
    page = {file.name for file in (checkout.tree / "src" / "tiny_llm_server" / "page").iterdir()}
    assert page == {file.name for file in (checkout.site_packages / "tiny_llm_server" / "page").iterdir()}
    shutil.rmtree(checkout.tree / "src")
    assert checkout.where() == checkout.site_packages / "tiny_llm_ref" / "chunked_prefill.py"
