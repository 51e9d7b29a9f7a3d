"""Tables of the benchmarks' figures, each with its unit; the names are the same as in the JSON."""

from collections.abc import Mapping
from typing import Any

from .render import as_table, with_units
from .serve_load import lengths

UNITS = {
    "completed": "requests",
    "failed": "requests",
    "duration": "s",
    "total_input_tokens": "tokens",
    "total_output_tokens": "tokens",
    "request_throughput": "requests/s",
    "output_throughput": "tokens/s",
    "total_token_throughput": "tokens/s",
}
KINDS = ("mean", "median", "std", "p99")


def as_latency_table(result: Mapping[str, Any]) -> str:
    """The median of each figure, its extremes, and the conditions of the run."""
    rows = {
        "decode": ("decode_tokens_per_s", "tokens/s"),
        "prefill": ("prefill_tokens_per_s", "tokens/s"),
        "ttft": ("ttft_ms", "ms"),
    }
    count = result["run"]["repetitions"]
    lines = [
        f"{title:<9}{_number(result[name]):>10} {unit:<10}"
        f"({_number(result[f'{name}_min'])} to {_number(result[f'{name}_max'])})"
        for title, (name, unit) in rows.items()
    ]
    heading = f"Median (smallest to largest) of {count} run{'s' if count > 1 else ''}:"
    return "\n".join([heading, *lines, "", as_table(with_units(result["run"]))])


def as_throughput_table(result: Mapping[str, Any]) -> str:
    """The totals, a row for each of vLLM's four times (such as ttft), and the conditions of the run."""
    rows = [_row(name, result) for name in UNITS]
    return "\n".join([*rows, "", *_times(result), "", as_table(with_units(result["run"]))])


def as_serve_table(result: Mapping[str, Any]) -> str:
    """The load, the totals, and a row for each of vLLM's four times (such as ttft)."""
    note = " (chunks with text, because the server does not report usage)"
    notes = {"total_output_tokens": note} if _is_counted(result) else {}
    rows = [_row(name, result) + notes.get(name, "") for name in UNITS]
    errors = [f"{'':<24}{count:,} x {text}" for text, count in result["error_counts"].items()]
    failed = list(UNITS).index("failed") + 1
    return "\n".join([*_title(result), "", *rows[:failed], *errors, *rows[failed:], "", *_times(result)])


def _row(name: str, result: Mapping[str, Any]) -> str:
    return f"{name:<24}{_number(result[name])} {UNITS[name]}"


def _is_counted(result: Mapping[str, Any]) -> bool:
    return bool(result["output_tokens_are"] == "chunks")


def _title(result: Mapping[str, Any]) -> list[str]:
    """Two lines: the server and the load, then the other conditions of the run."""
    run, end = result["run"], "ignored" if result["run"]["ignore_eos"] else "stops answers"
    tokens_in, tokens_out = (
        _span(lengths(run[f"random_{which}_len"], run["random_range_ratio"])) for which in ("input", "output")
    )
    shared = f" plus a shared prefix of {run['random_prefix_len']:,}" if run["random_prefix_len"] else ""
    return [
        f"{result['backend']} at {run['base_url']}{run['endpoint']}: {result['num_prompts']:,} requests, "
        f"{_pace(result)}, {tokens_in} tokens in{shared}, {tokens_out} out",
        f"model {result['model_id']}, end of sequence {end}, seed {run['seed']}",
    ]


def _pace(result: Mapping[str, Any]) -> str:
    most, rate = result["max_concurrency"], result["request_rate"]
    limits = [] if most is None else [f"{most:,} at a time"]
    return ", ".join(limits + ([] if rate == "inf" else [f"{rate:g} requests/s"])) or "all at once"


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
