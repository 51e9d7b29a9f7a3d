"""Runs the commands of `results/runs.toml` and saves what they print, with the date and the machine."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Collection
from datetime import date
from tempfile import TemporaryDirectory
from typing import Any

from .errors import BookError
from .results import FOLDER, Saved, runs, write


def measure_all(names: Collection[str], *, only_missing: bool) -> None:
    """Run all commands, or those with the given names, or those without a saved result.

    Prints a line for each. Raises `BookError` for an unknown name and for a command that fails.
    """
    commands = runs()
    unknown = set(names) - commands.keys()
    if unknown:
        raise BookError(f"results/runs.toml has no {', '.join(sorted(unknown))} (has: {', '.join(commands)})")
    wanted = [name for name in commands if not names or name in names]
    if only_missing:
        wanted = [name for name in wanted if not (FOLDER / f"{name}.json").exists()]
    described = machine()
    with TemporaryDirectory() as overlay:  # without modules, so that the reference is measured
        for place, name in enumerate(wanted, start=1):
            print(f"[{place}/{len(wanted)}] {name}: {commands[name]}", flush=True)
            write(name, _measured(commands[name], described, overlay))


def machine() -> dict[str, Any]:
    """What a result says about the machine: the processor, kernels, threads and versions."""
    from tiny_llm_cli.facts import machine as described

    kept = ("version", "python", "mlx", "processor", "instruction_set", "threads")
    found = described()
    return {name: found[name] for name in kept}


def _measured(command: str, described: dict[str, Any], overlay: str) -> Saved:
    words = shlex.split(command)
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TINY_LLM_OVERLAY": overlay}
    ended = subprocess.run(
        _runnable(words), capture_output=True, text=True, cwd=FOLDER.parents[1], env=environment, check=False
    )
    if ended.returncode:
        raise BookError(f"{command}: exit code {ended.returncode}\n{ended.stderr}")
    day = date.today().isoformat()
    printed = ended.stdout.replace(overlay, "src/tiny_llm")  # as without modules of a learner
    if "--json" in words:
        return Saved(command, day, described, json=json.loads(printed))
    return Saved(command, day, described, output=printed)


def _runnable(words: list[str]) -> list[str]:
    """The command as this environment runs it: without PDM, by the scripts in pyproject.toml."""
    import tomllib

    if words[:2] != ["pdm", "run"]:
        return [sys.executable, "-m", "tiny_llm_cli", *words[1:]] if words[0] == "tiny-llm" else words
    project = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    script = shlex.split(project["tool"]["pdm"]["scripts"][words[2]]["cmd"])
    program = [sys.executable] if script[0] == "python" else [sys.executable, "-m", "tiny_llm_cli"]
    return [*program, *script[1:], *words[3:]]
