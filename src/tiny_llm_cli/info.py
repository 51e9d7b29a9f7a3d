"""`tiny-llm info`: what would run here, and on what."""

import json
from typing import Annotated

import typer

from .engine import load
from .options import EngineOptions, takes_groups


@takes_groups()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    *,
    engine: EngineOptions,
) -> None:
    """Show versions, device, kernels, the model, the KV pool, memory, and which modules are yours.

    \b
    tiny-llm info
    tiny-llm info --num-blocks 4096 --json

    Memory is this process's: the most it held while the model was loaded and while it served one full step.
    """
    from . import facts

    found: dict[str, dict[str, object]] = {"machine": facts.machine(), "overlay": facts.overlay()}
    try:
        llm = load(engine)
        found |= {"model": facts.model(llm), "pool": facts.pool(llm), "memory": facts.memory(llm)}
    finally:  # a machine on which no model loads is one that this is asked about
        print(json.dumps(found) if as_json else _as_text(found))


def _as_text(found: dict[str, dict[str, object]]) -> str:
    from .render import as_table

    if not found["overlay"]["modules"]:
        found["overlay"]["modules"] = "none are yours: the engine is the reference"
    return "\n\n".join(f"{title}\n{_indented(as_table(part))}" for title, part in found.items())


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
