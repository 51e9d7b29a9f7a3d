"""Results as text for people and as JSON for programs."""

import json
from collections.abc import Mapping, Sequence

from tiny_llm import CompletionOutput, Logprob, RequestOutput


def as_json_line(prompt: str | Sequence[int], result: RequestOutput) -> str:
    """One prompt's result as one line of JSON; `prompt` is null where it was given as token ids."""
    return json.dumps(
        {
            "prompt": prompt if isinstance(prompt, str) else None,
            "prompt_token_ids": result.prompt_token_ids,
            "prompt_logprobs": result.prompt_logprobs and [_position(p) for p in result.prompt_logprobs],
            "outputs": [_completion(output) for output in result.outputs],
            "num_cached_tokens": result.num_cached_tokens,
        },
        ensure_ascii=False,
    )


def as_text(prompt: str | Sequence[int], result: RequestOutput, titled: bool) -> str:
    """One prompt's completions as text; titled: under headings, for where there are several."""
    if not titled:
        return result.outputs[0].text
    title = prompt if isinstance(prompt, str) else f"{len(prompt)} token ids"
    title = " ".join(title.split())
    title = title if len(title) <= 70 else title[:67] + "..."
    several = len(result.outputs) > 1
    return "\n".join(
        f"==> {title}{f' ({output.index + 1} of {len(result.outputs)})' if several else ''} <==\n"
        f"{output.text.strip()}\n"
        for output in result.outputs
    )


def as_table(rows: Mapping[str, object]) -> str:
    """Names and values in two columns; what is None or empty is left out."""
    shown = {name: _cell(value) for name, value in rows.items() if value not in (None, [], {})}
    width = max(map(len, shown))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown.items())


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
