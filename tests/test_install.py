"""Installing leaves the overlay alone: what is imported is what `__path__` says, install after install.

Each test has a copy of the source tree and a fresh environment. Nothing is compiled or downloaded:
the running environment lends the build backend and MLX.
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


class House:
    """A copy of the source tree, without anything that a learner wrote, and an environment for it."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.empty, self._venv = folder / "tree", folder / "empty", folder / "venv"
        self.empty.mkdir()
        leave_out = shutil.ignore_patterns("__pycache__", "*.so", "CMakeCache.txt", "CMakeFiles")
        shutil.copytree(ROOT / "src", self.tree / "src", ignore=leave_out)
        for file in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, self.tree / file)
        self.learners = self.tree / "src" / "tiny_llm"
        for module in self.learners.glob("*.py"):
            if module.name != "__init__.py":
                module.unlink()
        self._run(sys.executable, "-m", "venv", str(self._venv))
        (self.site_packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")

    @property
    def site_packages(self) -> Path:
        """Where the fresh environment keeps its packages."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self._venv / "lib" / version / "site-packages"

    def install(self, *how: str) -> None:
        """`pip install` the tree, in pure Python."""
        options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
        options.append("--config-settings=wheel.cmake=false")
        self._run(*self._python, "-m", "pip", "install", *options, *how)

    def where(self, overlay: Path | None = None) -> Path:
        """The file that `tiny_llm.chunked_prefill` comes from."""
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
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_install_start_install_again_empty_overlay_reset(house: House) -> None:
    """An editable install that maps modules to files would, the second time, map the learner's too."""
    reference = house.tree / "src" / "tiny_llm_ref" / "chunked_prefill.py"
    mine = house.learners / "chunked_prefill.py"

    house.install("--editable", ".")
    assert house.where() == reference

    mine.write_text("def share_budget(wants, budget):\n    raise NotImplementedError\n")
    assert house.where() == mine
    assert house.where(overlay=house.empty) == reference

    house.install("--editable", ".")
    assert house.where() == mine
    assert house.where(overlay=house.empty) == reference

    mine.unlink()
    assert house.where() == reference
    assert house.where(overlay=house.empty) == reference


def test_a_plain_install_needs_no_source_tree(house: House) -> None:
    house.install(".")
    page = {file.name for file in (house.tree / "src" / "tiny_llm_server" / "page").iterdir()}
    assert page == {file.name for file in (house.site_packages / "tiny_llm_server" / "page").iterdir()}
    shutil.rmtree(house.tree / "src")
    assert house.where() == house.site_packages / "tiny_llm_ref" / "chunked_prefill.py"
