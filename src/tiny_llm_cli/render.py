"""Results as text for people and as JSON for programs."""

from collections.abc import Mapping

from tiny_llm import CompletionOutput, Logprob, RequestOutput
from tiny_llm_checkpoints.sizes import shown_bytes

from .json_line import json_line
from .prompts import PromptRequest

_SIZES = {"bytes", "bytes_per_token", "weights", "pool", "peak_at_load", "peak_in_service"}
_SIZES |= {"beyond", "live_in_mlx"}  # names of facts that are numbers of bytes
_LABELS = {"bytes": "size", "bytes_per_token": "size per token", "beyond": "everything else"}
_LABELS |= {"live_in_mlx": "used by MLX now", "why_no_kernels": "why no kernels"}


def as_json_line(request: PromptRequest, result: RequestOutput) -> str:
    """One prompt's result as one line of JSON, with the ids of its request first.

    `prompt` is null for token ids and for a conversation, which is under `messages`.
    """
    prompt = request.prompt
    return json_line(
        {
            **request.ids,
            "prompt": prompt if isinstance(prompt, str) else None,
            **({"messages": request.messages} if prompt is None else {}),
            "prompt_token_ids": result.prompt_token_ids,
            "prompt_logprobs": result.prompt_logprobs and [_position(p) for p in result.prompt_logprobs],
            "outputs": [_completion(output) for output in result.outputs],
            "num_cached_tokens": result.num_cached_tokens,
        }
    )


def as_text(request: PromptRequest, result: RequestOutput, titled: bool) -> str:
    """One prompt's completions as text. titled: put each under a heading, because there are several."""
    if not titled:
        return result.outputs[0].text
    title = request.title
    title = title if len(title) <= 70 else title[:67] + "..."
    several = len(result.outputs) > 1
    return "\n".join(
        f"==> {title}{f' ({output.index + 1} of {len(result.outputs)})' if several else ''} <==\n"
        f"{output.text.strip()}\n"
        for output in result.outputs
    )


def as_table(rows: Mapping[str, object]) -> str:
    """Names and values in two columns, without the values that are None or empty."""
    shown = {name: _cell(value) for name, value in rows.items() if value not in (None, [], {})}
    width = max(map(len, shown))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown.items())


def with_units(rows: Mapping[str, object]) -> dict[str, object]:
    """Facts for people: names without underscores, sizes in MiB and the like instead of bytes."""
    return {
        _LABELS.get(name, name.replace("_", " ")): shown_bytes(value)
        if name in _SIZES and isinstance(value, int)
        else value
        for name, value in rows.items()
    }


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        value = [f"{name} {of}" for name, of in value.items()]
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _completion(output: CompletionOutput) -> dict[str, object]:
    return {
        "index": output.index,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
        "error": output.error,
        "cumulative_logprob": output.cumulative_logprob,
        "logprobs": output.logprobs and [_position(position) for position in output.logprobs],
    }


def _position(logprobs: Mapping[int, Logprob] | None) -> dict[int, dict[str, object]] | None:
    return None if logprobs is None else {token: logprob._asdict() for token, logprob in logprobs.items()}
