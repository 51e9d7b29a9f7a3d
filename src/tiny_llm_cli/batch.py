"""OpenAI's batch files: each line is an HTTP request.

`{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}`
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .lines import Line, parsed

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True)
class BatchRequest:
    """A line of a batch file. problem: why it is not a request, or None."""

    place: str
    custom_id: Any = None
    url: str = ""
    body: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None


def is_batch(lines: Sequence[Line]) -> bool:
    """Whether lines are those of a batch file: the first JSON object among them has a "body" or a "url"."""
    for line in lines:
        if line.is_json:
            try:
                return not {"body", "url"}.isdisjoint(parsed(line))
            except ValueError:
                continue
    return False


def read_batch(lines: Sequence[Line]) -> list[BatchRequest]:
    """The request of each line. A line that is wrong becomes a request with a problem."""
    known: set[Any] = set()
    return [_request(line, known) for line in lines]


def _request(line: Line, known: set[Any]) -> BatchRequest:
    try:
        found = parsed(line)
    except ValueError as error:
        return BatchRequest(line.place, problem=str(error))
    custom_id = found.get("custom_id")
    problem = _problem(found, known)
    if problem is not None:
        return BatchRequest(line.place, custom_id, problem=problem)
    known.add(custom_id)
    return BatchRequest(line.place, custom_id, found["url"], found["body"])


def _problem(found: Mapping[str, Any], known: set[Any]) -> str | None:
    custom_id, body = found.get("custom_id"), found.get("body")
    if not isinstance(custom_id, str):
        return '"custom_id" must be a string'
    if custom_id in known:
        return f"custom_id {custom_id!r} is used twice"
    if found.get("method", "POST") != "POST":
        return f'"method" must be POST, not {found["method"]!r}'
    if found.get("url") not in (CHAT, COMPLETIONS):
        return f'"url" must be {CHAT} or {COMPLETIONS}, not {found.get("url")!r}'
    if not isinstance(body, dict):
        return '"body" must be an object'
    return "stream is not supported in a batch" if body.get("stream") else None


def other_models(requests: Sequence[BatchRequest], name: str) -> list[str]:
    """The models that requests name, other than the one that answers them."""
    named = {str(request.body["model"]) for request in requests if request.body.get("model")}
    return sorted(named - {name})
