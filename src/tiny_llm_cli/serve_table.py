"""The figures of `bench serve` for people, with their units; the names are those of the JSON."""

from collections.abc import Mapping
from typing import Any

from .serve_load import lengths

UNITS = {
    "completed": "requests",
    "failed": "requests",
    "duration": "s",
    "total_input_tokens": "tok",
    "total_output_tokens": "tok",
    "request_throughput": "req/s",
    "output_throughput": "tok/s",
    "total_token_throughput": "tok/s",
}
KINDS = ("mean", "median", "std", "p99")


def as_serve_table(result: Mapping[str, Any]) -> str:
    """What was run, its figures, and a row of times for each of vLLM's four."""
    notes = {"total_output_tokens": " (chunks with text: no usage)"} if _is_counted(result) else {}
    rows = [f"{name:<24}{_number(result[name])} {unit}{notes.get(name, '')}" for name, unit in UNITS.items()]
    errors = [f"{'':<24}{count:,} x {text}" for text, count in result["error_counts"].items()]
    failed = list(UNITS).index("failed") + 1
    return "\n".join([*_title(result), "", *rows[:failed], *errors, *rows[failed:], "", *_times(result)])


def _is_counted(result: Mapping[str, Any]) -> bool:
    return bool(result["output_tokens_are"] == "chunks")


def _title(result: Mapping[str, Any]) -> list[str]:
    """Two lines: where and how much, and the rest of what the figures depend on."""
    run, end = result["run"], "ignored" if result["run"]["ignore_eos"] else "heeded"
    tokens_in, tokens_out = (
        _span(lengths(run[f"random_{which}_len"], run["random_range_ratio"])) for which in ("input", "output")
    )
    shared = f" after {run['random_prefix_len']:,} shared" if run["random_prefix_len"] else ""
    return [
        f"{result['backend']} at {run['base_url']}{run['endpoint']}: {result['num_prompts']:,} requests, "
        f"{_pace(result)}, {tokens_in} tokens in{shared}, {tokens_out} out",
        f"model {result['model_id']}, end of sequence {end}, seed {run['seed']}",
    ]


def _pace(result: Mapping[str, Any]) -> str:
    most, rate = result["max_concurrency"], result["request_rate"]
    limits = [] if most is None else [f"{most:,} at a time"]
    return ", ".join(limits + ([] if rate == "inf" else [f"{rate:g} req/s"])) or "all at once"


def _span(tokens: range) -> str:
    return f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"


def _times(result: Mapping[str, Any]) -> list[str]:
    heading = f"{'milliseconds':<14}" + "".join(f"{kind:>12}" for kind in KINDS)
    return [heading] + [
        f"{what:<14}" + "".join(f"{_number(result[f'{kind}_{what}_ms']):>12}" for kind in KINDS)
        for what in ("ttft", "tpot", "itl", "e2el")
    ]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
