"""Runs the commands of `results/runs.toml` and saves what they print, with the date and the machine."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Collection
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .errors import BookError
from .results import FOLDER, Run, Saved, runs, write

ROOT = Path(__file__).parents[2]


def measure_all(names: Collection[str], *, only_missing: bool) -> None:
    """Run all commands, or those with the given names, or those without a saved result.

    Prints a line for each. Raises `BookError` for an unknown name and for a command that fails.
    """
    found = runs()
    unknown = set(names) - found.keys()
    if unknown:
        raise BookError(f"results/runs.toml has no {', '.join(sorted(unknown))} (has: {', '.join(found)})")
    wanted = [name for name in found if not names or name in names]
    if only_missing:
        wanted = [name for name in wanted if not (FOLDER / f"{name}.json").exists()]
    described = machine()
    for place, name in enumerate(wanted, start=1):
        print(f"[{place}/{len(wanted)}] {name}: {found[name].command}", flush=True)
        with TemporaryDirectory() as overlay:  # without modules, so that the reference is measured
            write(name, _measured(found[name], described, Path(overlay)))


def machine() -> dict[str, Any]:
    """What a result says about the machine: the processor, kernels, threads and versions."""
    from tiny_llm_cli.facts import machine as described

    kept = ("version", "python", "mlx", "processor", "instruction_set", "threads")
    found = described()
    return {name: found[name] for name in kept}


def _measured(run: Run, described: dict[str, Any], overlay: Path) -> Saved:
    if run.start:
        _printed(f"pdm run start {run.start}", overlay)
    for name, code in run.writes.items():
        file = overlay / name
        file.write_text(_with_functions(file.read_text(encoding="utf-8"), code), encoding="utf-8")
    for command in run.before:
        _printed(command, overlay)
    printed = _printed(run.command, overlay, run.exit_code)
    day = date.today().isoformat()
    if "--json" in shlex.split(run.command):
        return Saved(run.command, day, described, json=json.loads(printed))
    return Saved(run.command, day, described, output=printed)


def _printed(command: str, overlay: Path, exit_code: int = 0) -> str:
    """What a command prints with this overlay. Raises `BookError` if it ends with another exit code."""
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TINY_LLM_OVERLAY": str(overlay)}
    words = _runnable(shlex.split(command))
    ended = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if ended.returncode != exit_code:
        raise BookError(f"{command}: exit code {ended.returncode}\n{ended.stdout}{ended.stderr}")
    return ended.stdout.replace(str(overlay), "src/tiny_llm").replace(str(ROOT), "~/tiny-llm")


def _with_functions(source: str, code: str) -> str:
    """The source with the functions of `code` in place of those with the same names."""
    from tiny_llm_course.source import find, functions

    for name, written in functions(code).items():
        lines, old = source.splitlines(), find(source, name)
        lines[old.lineno - 1 : old.end_lineno] = code.splitlines()[written.lineno - 1 : written.end_lineno]
        source = "\n".join(lines) + "\n"
    return source


def _runnable(words: list[str]) -> list[str]:
    """The command as this environment runs it: without PDM, by the scripts in pyproject.toml."""
    import tomllib

    if words[:2] != ["pdm", "run"]:
        return [sys.executable, "-m", "tiny_llm_cli", *words[1:]] if words[0] == "tiny-llm" else words
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    script = shlex.split(project["tool"]["pdm"]["scripts"][words[2]]["cmd"])
    program = [sys.executable] if script[0] == "python" else [sys.executable, "-m", "tiny_llm_cli"]
    return [*program, *script[1:], *words[3:]]
