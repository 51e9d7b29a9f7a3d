"""`pdm run doctor`: checks the installation, and the learner's files against the reference."""

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

from .cpp import Build, build_of, own_kernels
from .errors import CourseError
from .progress import own_modules
from .repo import Repo
from .runs import run_python
from .source import functions, parameters, signature
from .syllabus import Syllabus
from .units import Unit

PYTHONS = ((3, 11), (3, 13))
COMPILERS = ("c++", "g++", "clang++")


class Finding(NamedTuple):
    """The result of one check. advice: how to fix it, or optional advice if the check is ok."""

    what: str
    ok: bool
    found: str
    advice: str = ""

    def __str__(self) -> str:
        line = f"{'ok' if self.ok else '!!':3}{self.what}: {self.found}"
        return f"{line}\n   {self.advice}" if self.advice else line


def examine(repo: Repo, syllabus: Syllabus) -> Iterator[Finding]:
    """Run all checks, and yield their findings."""
    yield _python()
    yield _mlx(repo)
    yield from _overlay(repo, syllabus)
    try:
        yield from _kernels()
        yield _model()
    except ImportError as error:  # from a module in the overlay, or an extension built for another MLX
        yield Finding("the engine", False, str(error), "fix the file that it names, or run `pdm install`")


def _python() -> Finding:
    version = sys.version_info[:2]
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding(
        "Python",
        PYTHONS[0] <= version <= PYTHONS[1],
        found,
        "" if version <= PYTHONS[1] else "use 3.11 to 3.13",
    )


def _mlx(repo: Repo) -> Finding:
    pinned = _pinned(repo)
    try:
        import mlx.core as mx

        installed = metadata.version("mlx")
        total = mx.sum(mx.ones(3)).item()
    except Exception as error:  # a broken install may raise any error
        return Finding("MLX", False, f"cannot be used ({error})", "run `pdm install`")
    works = total == 3 and installed == pinned
    advice = "" if works else f"{pinned} is pinned: run `pdm install`"
    return Finding("MLX", works, f"{installed} on {mx.default_device().type.name}", advice)


def _pinned(repo: Repo) -> str:
    settings = tomllib.loads((repo.root / "pyproject.toml").read_text(encoding="utf-8"))
    for requirement in settings["project"]["dependencies"]:
        if requirement.startswith("mlx"):
            return str(requirement.partition("==")[2].partition(";")[0].strip())
    return ""


def _kernels() -> Iterator[Finding]:
    """Check compiler and kernels. Missing ones are not a failure: without them, the course is only slower."""
    from tiny_llm import kernel_info

    info = kernel_info()
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    version = ""
    if compiler is not None:
        run = subprocess.run([compiler, "--version"], text=True, capture_output=True, check=False)
        version = (run.stdout.splitlines() or [""])[0]
    yield Finding(
        "C++ compiler",
        True,
        version or "none",
        "" if compiler else "only compiled kernels need it: install g++ or clang++, then run `pdm install`",
    )
    found = (
        f"{info.instruction_set}, {info.num_threads} threads" if info.available else f"{info.why_unavailable}"
    )
    slow = "the engine uses MLX's own operators; with a C++20 compiler, `pdm install` builds the kernels"
    yield Finding("compiled kernels", True, found, "" if info.available else slow)


def _model() -> Finding:
    from tiny_llm import ModelFileError
    from tiny_llm_checkpoints.embedded import embedded_model_path

    try:
        return Finding("embedded model", True, embedded_model_path().name)
    except ModelFileError as error:
        return Finding("embedded model", False, str(error), "run `pdm install`")


def _overlay(repo: Repo, syllabus: Syllabus) -> Iterator[Finding]:
    """Check the learner's files: they replace a module, parse, and keep its signatures; kernels are built."""
    try:
        own = own_modules(repo)
    except CourseError as error:
        yield Finding("your modules", False, str(error), "rename it, or move it out of the folder")
        return
    yield Finding("your modules", True, ", ".join(own) or "none yet: `pdm run start 1.1`")
    for module in own:
        unit = syllabus.owner(module)
        if unit is None:
            yield Finding(
                f"{module}.py", True, "does not belong to any day; yours replaces the reference's module"
            )
            continue
        found = list(_signatures(repo, module, unit))
        yield from found or _import(repo, module)
    for kernel in own_kernels(repo, syllabus):
        build = build_of(repo, kernel)
        advice = "" if build is Build.DONE else f"`pdm run build-kernels`, or `pdm run skip {kernel.id}`"
        yield Finding(kernel.file, build is Build.DONE, build.value, advice)


def _import(repo: Repo, module: str) -> Iterator[Finding]:
    """Check that a module can be imported, with the other files that it imports."""
    run = run_python(repo, ["-c", f"import tiny_llm.{module}"])
    if run.returncode:
        lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
        where = next((line for line in reversed(lines) if line.startswith(f'File "{repo.overlay}')), "")
        said = lines[-1] if lines else f"it ended Python with the code {run.returncode}"
        yield Finding(f"{module}.py", False, f"cannot be imported: {said}", where)


def _signatures(repo: Repo, module: str, unit: Unit) -> Iterator[Finding]:
    own, reference = (
        (folder / f"{module}.py").read_text(encoding="utf-8") for folder in (repo.overlay, repo.reference)
    )
    try:
        known = functions(own)
    except SyntaxError as error:
        yield Finding(
            f"{module}.py", False, f"line {error.lineno}: {error.msg}", "fix it: the file cannot be imported"
        )
        return
    for name in functions(reference):
        if name.rpartition(".")[2].startswith("_") and not name.endswith("__"):
            continue
        if name in unit.day.removed_from(module):
            continue  # the starter does not contain it
        if name not in known:
            yield Finding(
                f"{module}.py",
                False,
                f"has no {name}",
                f"other days call it; `pdm run diff {unit.id} --anyway` shows the reference's version",
            )
        elif parameters(own, name) != parameters(reference, name):
            advice = f"the reference has {signature(reference, name)}"
            yield Finding(f"{module}.py", False, f"has {signature(own, name)}", advice)
