"""`pdm run bench NAME`: measures one thing about the engine on this machine.

`latency`, `throughput` and `serve` are those of `tiny-llm bench`; every other name is a file of this folder.
Exit codes: 0: done. 1: the benchmark failed. 2: the command line is wrong.
"""

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

from tiny_llm_checkpoints.suggestions import did_you_mean
from tiny_llm_course.arguments import open_course
from tiny_llm_course.cpp import refuse_outdated
from tiny_llm_course.errors import CourseError
from tiny_llm_course.mistake import one_line

FOLDER = Path(__file__).parent
NOT_BENCHMARKS = {"front", "harness", "numpy_llama", "servers"}
OF_TINY_LLM = {
    "latency": "How fast is one request at a time?",
    "throughput": "How fast are many requests together?",
    "serve": "How fast is a running server, over HTTP?",
}
INTRODUCTION = """\
Usage: pdm run bench NAME [OPTIONS]

  Measure one property of the engine on this machine, and compare the result
  with the expected one.

  pdm run bench latency
  pdm run bench pool_size --json

  `pdm run bench NAME --help` explains a benchmark. --json prints its figures
  as JSON, with a description of the machine.

Benchmarks:
"""


def questions() -> dict[str, str]:
    """Every benchmark by name, with the question that it answers."""
    files = {path.stem: path for path in sorted(FOLDER.glob("*.py")) if path.stem not in NOT_BENCHMARKS}
    first = {name: _first_line(path) for name, path in files.items()}
    return {**OF_TINY_LLM, **first}


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def main() -> int:
    """Run the benchmark that the command line names and return the exit code."""
    arguments, known = sys.argv[1:], questions()
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, known))
        print(INTRODUCTION + "\n".join(f"  {name:{width}}  {line}" for name, line in known.items()))
        return 0
    name = arguments[0]
    try:
        refuse_outdated(*open_course())
    except CourseError as error:
        print(f"pdm run bench: error: {error}", file=sys.stderr)
        return 1
    if name in OF_TINY_LLM:
        return subprocess.call([sys.executable, "-m", "tiny_llm_cli", "bench", *arguments])
    if name not in known:
        hint = did_you_mean(name, known, "`pdm run bench` lists them")
        print(f"pdm run bench: error: there is no benchmark {name!r}{hint}", file=sys.stderr)
        return 2
    path = FOLDER / f"{name}.py"
    sys.argv = [str(path), *arguments[1:]]
    sys.path.insert(0, str(FOLDER))
    try:
        runpy.run_path(str(path), run_name="__main__")
    except Exception as error:
        if os.environ.get("TINY_LLM_DEBUG") or (mistake := one_line(error)) is None:
            raise
        print(f"pdm run bench: error: {mistake}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
