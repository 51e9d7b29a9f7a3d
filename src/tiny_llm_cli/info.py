"""`tiny-llm info`: shows versions, hardware, the model and its memory."""

import json
from typing import Annotated

import typer

from .engine import load
from .options import EngineOptions, takes_groups


@takes_groups()
def info(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, with sizes in bytes.")
    ] = False,
    *,
    engine: EngineOptions,
) -> None:
    """Show versions, hardware, the model and its memory.

    \b
    tiny-llm info
    tiny-llm info --kv-cache-memory 64MiB --json

    The memory figures are this process's peak after loading the model, and its peak after serving a prompt
    that fills one step (--max-num-batched-tokens). If the model cannot be loaded, the machine is shown
    anyway.
    """
    from . import facts

    described: dict[str, dict[str, object]] = {}
    try:
        llm = load(engine)
        described = {"model": facts.model(llm), "pool": facts.pool(llm), "memory": facts.memory(llm)}
    finally:
        found = {"machine": facts.machine(), "overlay": facts.overlay(), **described}
        print(json.dumps(found) if as_json else _as_text(found))


def _as_text(found: dict[str, dict[str, object]]) -> str:
    from .render import as_table, with_units

    if not found["overlay"]["modules"]:
        found["overlay"]["modules"] = "none: every module is the reference's"
    return "\n\n".join(f"{title}\n{_indented(as_table(with_units(part)))}" for title, part in found.items())


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
