"""A learner's kernels in C++: writes their starter files, and builds the library that contains them.

A kernel's file is read as top-level parts separated by empty lines. A blank function contains an `#error`
with the exercise's own message.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from textwrap import fill

from .errors import CourseError
from .repo import Repo
from .syllabus import Syllabus
from .units import Kernel, Unit

LAST_LINES = 20
RULE = (
    "use only what kernels.h and vec.h define (namespaces tiny_llm and tiny_llm::TINY_LLM_ISA), nothing of "
    "the standard library"
)
FIRST_BUILD = "the first build compiles every kernel, which takes a few minutes; later builds take seconds"
SHOWN_STEPS = 10  # of a build whose output is not a terminal
_STEP = re.compile(r"\[(\d+)/(\d+)\]")
_NAMED = re.compile(r"(?:struct|class)\s+(\w+)|constexpr\s+\w+\s+(\w+)\s*=|\b(\w+)\s*\([^;{]*\)\s*\{")
_HEADING = re.compile(r"// ---- .* ----")


class Build(Enum):
    """Whether one of the learner's kernels is in their library."""

    DONE = "built"
    NEVER = "not built"
    STALE = "newer than your library"


def sources(repo: Repo) -> Path:
    """The folder with the reference's kernels."""
    return repo.root / "src" / "tiny_llm_kernels" / "csrc" / "kernels"


def blanked(source: str, functions: Iterable[str], removed: Iterable[str], message: str) -> str:
    """A kernel's source with some functions blank and other parts removed.

    Raises `CourseError` for an unknown name.
    """
    blank, gone = set(functions), set(removed)
    kept: list[str] = []
    for part in _parts(source):
        name = _name(part)
        if name in gone:
            gone.discard(name)
            continue
        if _HEADING.fullmatch(part) and kept and _HEADING.fullmatch(kept[-1]):
            kept.pop()  # everything under that heading was removed
        if name in blank:
            blank.discard(name)
            kept.append(f'{part[: part.index("{", _code_from(part)) + 1]}\n#error "{message}"\n}}')
        else:
            kept.append(part)
    if blank or gone:
        raise CourseError(f"the file does not define {', '.join(sorted(blank | gone))}")
    return "\n\n".join(kept) + "\n"


def body_lines(source: str, name: str) -> list[str]:
    """The lines of a function's body. Raises `CourseError` for an unknown name."""
    for part in _parts(source):
        if _name(part) == name:
            return part[part.index("{", _code_from(part)) + 1 :].splitlines()
    raise CourseError(f"the file does not define {name}")


def start_kernels(repo: Repo, unit: Unit) -> list[Path]:
    """Write a day's C++ starters into the overlay. Raises `CourseError` if there are none or one exists."""
    if not unit.kernels:
        raise CourseError(f"{unit.named} has no kernel in C++")
    written = []
    for kernel in unit.kernels:
        file = repo.overlay / kernel.file
        if file.exists():
            raise CourseError(f"{repo.shown(file)} exists already: `pdm run reset {unit.id}` moves it aside")
        file.write_text(_preface(repo, kernel) + starter(repo, kernel), encoding="utf-8")
        written.append(file)
    return written


def starter(repo: Repo, kernel: Kernel) -> str:
    """The reference's file of a kernel, its exercises blank. Raises `CourseError` for an unknown name."""
    source = (sources(repo) / kernel.file).read_text(encoding="utf-8")
    return blanked(source, kernel.functions, kernel.removed, kernel.message)


def job(repo: Repo, kernel: Kernel) -> str:
    """The name of the struct in kernels.h that holds a kernel's arguments, such as `MatmulJob`."""
    header = (sources(repo) / "kernels.h").read_text(encoding="utf-8")
    found = re.search(rf"\(\*{kernel.name}\)\(const (\w+)&", header)
    return found[1] if found else "its arguments"


def _preface(repo: Repo, kernel: Kernel) -> str:
    """The comment at the top of a starter: the task, what to read first, and the rule."""
    return (
        f"// {kernel.id}: write {' and '.join(kernel.functions)}. "
        "You do not need the day's tasks in Python for it.\n"
        f"// First read {job(repo, kernel)} in kernels.h, and vec.h, both in {repo.shown(sources(repo))}.\n"
        f"{fill(f'{RULE[0].upper()}{RULE[1:]}.', 110, initial_indent='// ', subsequent_indent='// ')}\n\n"
    )


def own_kernels(repo: Repo, syllabus: Syllabus) -> list[Kernel]:
    """The kernels for which the learner has a file."""
    all_kernels = [kernel for day in syllabus.days for kernel in day.kernels]
    return [kernel for kernel in all_kernels if (repo.overlay / kernel.file).exists()]


def is_blank(repo: Repo, kernel: Kernel) -> bool:
    """Whether a function of the learner's kernel is still blank."""
    return kernel.message in (repo.overlay / kernel.file).read_text(encoding="utf-8")


def running_kernels(repo: Repo, syllabus: Syllabus) -> list[Kernel]:
    """The learner's kernels that are in their library, in the current version."""
    own = own_kernels(repo, syllabus)
    return [kernel for kernel in own if build_of(repo, kernel) is Build.DONE and not is_blank(repo, kernel)]


def whose_kernels(repo: Repo, syllabus: Syllabus) -> list[str]:
    """A line about the learner's kernels that run, and one about those that do not; empty without any."""
    own, running = own_kernels(repo, syllabus), running_kernels(repo, syllabus)
    waiting = [kernel for kernel in own if kernel not in running]
    lines = [f"compiled kernels: your {_files(running)}; all others are the reference's"] if running else []
    if waiting:
        verb = "is" if len(waiting) == 1 else "are"
        lines.append(f"your {_files(waiting)} {verb} not built: the reference's version runs")
    return lines


def _files(kernels: Iterable[Kernel]) -> str:
    return ", ".join(kernel.file for kernel in kernels)


def libraries(repo: Repo) -> list[Path]:
    """The learner's compiled library, as a list of one file; empty before the first build."""
    return sorted(repo.overlay.glob("_kernels.*so"))


def build_of(repo: Repo, kernel: Kernel) -> Build:
    """Whether the current version of a learner's kernel is in their library."""
    built = [file.stat().st_mtime_ns for file in libraries(repo)]
    if not built:
        return Build.NEVER
    return Build.STALE if (repo.overlay / kernel.file).stat().st_mtime_ns > max(built) else Build.DONE


def refuse_stale(repo: Repo, syllabus: Syllabus) -> None:
    """Raise `CourseError` if the current version of a learner's kernel is not in their library."""
    for kernel in own_kernels(repo, syllabus):
        if build_of(repo, kernel) is not Build.DONE:
            file = repo.shown(repo.overlay / kernel.file)
            raise CourseError(
                f"{file} is not built yet: run `pdm run build-kernels`, or `pdm run skip {kernel.id}`"
            )


def refuse_outdated(repo: Repo, syllabus: Syllabus) -> None:
    """Raise `CourseError` if the library contains an older version of one of the learner's kernels.

    A kernel that is not built yet is no error here: the reference's version runs.
    """
    for kernel in own_kernels(repo, syllabus):
        if build_of(repo, kernel) is Build.STALE and not is_blank(repo, kernel):
            file = repo.shown(repo.overlay / kernel.file)
            raise CourseError(
                f"{file} is {Build.STALE.value}, which would run an older version: run "
                f"`pdm run build-kernels`, or `pdm run skip {kernel.id}`"
            )


def compiles(repo: Repo, source: str) -> subprocess.CompletedProcess[str]:
    """Let the compiler check one kernel's syntax, without output files."""
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        raise CourseError("no C++ compiler found: install g++ or clang++")
    command = [
        compiler,
        "-std=c++20",
        "-fsyntax-only",
        "-Wno-psabi",
        "-DTINY_LLM_ISA=portable",
        f"-I{sources(repo)}",
    ]
    return subprocess.run(
        [*command, "-x", "c++", "-"], input=source, text=True, capture_output=True, check=False
    )


def build(repo: Repo, syllabus: Syllabus) -> Path:
    """Build the learner's library, with their kernels replacing the reference's, and return its path.

    Raises `CourseError` if they have no kernel, a tool is missing, or compilation fails.
    """
    own = own_kernels(repo, syllabus)
    if not own:
        raise CourseError("you have no kernel yet: `pdm run start 2.4 --cpp` writes the first")
    for kernel in own:  # the compiler's messages are clearest for a single file
        run = compiles(repo, (repo.overlay / kernel.file).read_text(encoding="utf-8"))
        if run.returncode:
            said = _last(run.stderr.replace("<stdin>", kernel.file))
            raise CourseError(f"{repo.shown(repo.overlay / kernel.file)} does not compile\n{said}")
    cmake, ninja = (_tool(name) for name in ("cmake", "ninja"))
    folder = repo.records / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    configure = [
        cmake,
        "-S",
        str(repo.root),
        "-B",
        str(folder),
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
    ]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DTINY_LLM_LIBRARY_FOLDER={repo.overlay}"]
    if not (folder / "build.ninja").exists():
        print(FIRST_BUILD, flush=True)
    for command in (configure, [cmake, "--build", str(folder)]):
        _run(command)
    return libraries(repo)[0]


def _run(command: Sequence[str]) -> None:
    """Run a build command and show its steps. Raises `CourseError` with its last lines if it fails."""
    said: list[str] = []
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            for step in _steps(line):
                print(step, end="", flush=True)
    if process.returncode:
        failed = next((n for n, line in enumerate(said) if line.startswith("FAILED")), 0)
        raise CourseError(f"the build failed\n{_last(''.join(said[failed:]))}")


def _steps(line: str) -> Iterator[str]:
    """What to print for a line of the build tool: `step 3 of 40`, on one line of a terminal."""
    match = _STEP.match(line)
    if match is None:
        return
    done, total = int(match[1]), int(match[2])
    if sys.stdout.isatty():
        yield f"\r\033[Kstep {done} of {total}{chr(10) * (done == total)}"
    elif done * SHOWN_STEPS // total > (done - 1) * SHOWN_STEPS // total:
        yield f"step {done} of {total}\n"


def _tool(name: str) -> str:
    """The path of a build tool, in this environment or on the system. Raises `CourseError` if missing."""
    installed = Path(sys.executable).parent / name
    found = str(installed) if installed.exists() else shutil.which(name)
    if found is None:
        raise CourseError(f"{name} is not installed: run `pdm install`")
    return found


def _parts(source: str) -> list[str]:
    """The top-level parts, which empty lines separate.

    Empty lines within braces do not count, unless the braces are a namespace's.
    """
    parts: list[str] = []
    current: list[str] = []
    depth = 0
    for line in source.splitlines():
        if not line.strip() and depth == 0:
            if current:
                parts.append("\n".join(current))
            current = []
            continue
        current.append(line)
        if not line.startswith(("namespace", "}  // namespace", "//")):
            depth += line.count("{") - line.count("}")
    return [*parts, "\n".join(current)] if current else parts


def _code_from(part: str) -> int:
    """The index at which the code starts, after the leading comment."""
    at = 0
    for line in part.splitlines(keepends=True):
        if not line.lstrip().startswith("//"):
            return at
        at += len(line)
    return at


def _name(part: str) -> str | None:
    """The name that a part defines, or None."""
    match = _NAMED.search(part, _code_from(part))
    return next(filter(None, match.groups()), None) if match else None


def _last(output: str) -> str:
    return "\n".join(output.splitlines()[:LAST_LINES])
