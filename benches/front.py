"""`pdm run bench NAME`: one question about the engine, measured on this machine.

`latency`, `throughput` and `serve` are `tiny-llm bench`'s; every other name is a file of this folder.
0: done. 1: it failed. 2: it was called wrongly.
"""

import ast
import difflib
import os
import runpy
import subprocess
import sys
from pathlib import Path

from tiny_llm_cli.overlay import one_line

FOLDER = Path(__file__).parent
NO_QUESTION = {"front", "harness", "numpy_llama", "servers"}
OF_THE_ENGINE = {
    "latency": "How fast is one stream?",
    "throughput": "How fast are many requests?",
    "serve": "How fast is a server that runs already, asked over HTTP?",
}
INTRODUCTION = """\
Usage: pdm run bench NAME [its own options]

Each measures one question, on this machine, and says what was expected. --help explains one, --json prints
figures for machines with what they were measured on.

"""


def questions() -> dict[str, str]:
    """Every benchmark by name, and its first line."""
    files = {path.stem: path for path in sorted(FOLDER.glob("*.py")) if path.stem not in NO_QUESTION}
    first = {name: _first_line(path) for name, path in files.items()}
    return {**OF_THE_ENGINE, **first}


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def main() -> int:
    """Run the benchmark that the command line names; the exit code."""
    arguments, known = sys.argv[1:], questions()
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, known))
        print(INTRODUCTION + "\n".join(f"  {name:{width}}  {line}" for name, line in known.items()))
        return 0
    name = arguments[0]
    if name in OF_THE_ENGINE:
        return subprocess.call([sys.executable, "-m", "tiny_llm_cli", "bench", *arguments])
    if name not in known:
        guess = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {guess[0]}?" if guess else "`pdm run bench` lists them"
        print(f"pdm run bench: there is no benchmark {name!r}; {hint}", file=sys.stderr)
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
