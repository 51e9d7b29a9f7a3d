"""`tiny-llm models`: lists the models that can be named without a path."""

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tiny_llm_checkpoints.embedded import PackagedModel
    from tiny_llm_checkpoints.hub_cache import CachedModel


def models(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, with sizes in bytes.")
    ] = False,
) -> None:
    """List the models that you can use by name.

    \b
    tiny-llm models
    tiny-llm chat --model smollm2 "What is the capital of France?"

    Give a name from this list to --model, or to LLM() in Python. There are two kinds: models that come as
    Python packages, installed or not, and models that are in the cache of the Hugging Face hub because they
    were downloaded before.

    The list is not complete: --model also takes a .gguf file, a folder in Hugging Face's layout, and
    OWNER/NAME or OWNER/NAME/FILE.gguf on the hub, which is downloaded the first time.
    """
    from tiny_llm_checkpoints.embedded import packaged_models
    from tiny_llm_checkpoints.hub_cache import cached_models

    packaged, cached = packaged_models(), cached_models()
    print(_as_json(packaged, cached) if as_json else _as_text(packaged, cached))


def _as_json(packaged: Sequence["PackagedModel"], cached: Sequence["CachedModel"]) -> str:
    return json.dumps(
        {
            "packaged": [
                {
                    "name": model.name,
                    "title": model.title,
                    "bytes": model.nbytes,
                    "installed": model.is_installed,
                    "install": model.install,
                }
                for model in packaged
            ],
            "cached": [{"name": model.name, "bytes": model.nbytes} for model in cached],
        }
    )


def _as_text(packaged: Sequence["PackagedModel"], cached: Sequence["CachedModel"]) -> str:
    from tiny_llm_checkpoints.sizes import shown_bytes

    rows = [(model.name, shown_bytes(model.nbytes), _state(model)) for model in packaged]
    found = [(model.name, shown_bytes(model.nbytes), "") for model in cached]
    return "\n".join(
        [
            "models that come as packages",
            *_table(rows),
            "",
            "models in the Hugging Face cache",
            *(_table(found) if found else ["  none: --model OWNER/NAME downloads one"]),
        ]
    )


def _state(model: "PackagedModel") -> str:
    if model.is_installed:
        return f"{model.title}; installed"
    commands = f"`{model.install}` (in a checkout with pdm: `{model.install_with_pdm}`)"
    return f"{model.title}; not installed: run {commands}"


def _table(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    """Three columns, indented; the sizes are aligned to the right."""
    rows = list(rows)
    names, sizes = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"  {name:{names}}  {size:>{sizes}}  {state}".rstrip() for name, size, state in rows]
