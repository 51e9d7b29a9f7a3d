"""How far are the engine's logits from float32? KL divergence, top-1 agreement and perplexity.

The text is Python's own documentation, which every interpreter contains (`pydoc_data.topics`). The reference
is the same GGUF file dequantized to float32 (`numpy_llama`, tested against transformers). So this measures
the error of the engine's arithmetic and KV cache, not the error of 4-bit weights.
"""

import argparse
import hashlib
import json
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from numpy_llama import Floats, NumpyLlama
from tiny_llm import LLM

Doubles = NDArray[np.float64]
_ROWS = 64  # rows compared at a time: bounds the memory of the float64 copies


class Scores(NamedTuple):
    """One value for each position; natural logarithms."""

    kl: Doubles  # KL(reference || engine)
    same_top: NDArray[np.bool_]  # True if both rank the same token first
    reference_nll: Doubles  # -log p of the token that follows in the text
    engine_nll: Doubles


def log_softmax(logits: Floats) -> Doubles:
    """Log-softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normed: Doubles = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normed


def score(reference: Floats, engine: Floats, targets: Sequence[int]) -> Scores:
    """Compare two sets of logits [N, V] row by row; `targets` are the N tokens that follow in the text.

    Raises ValueError unless both have the same shape and one row for each target.
    """
    if reference.shape != engine.shape or len(reference) != len(targets):
        raise ValueError(
            f"shapes differ: reference {reference.shape}, engine {engine.shape}, {len(targets)} targets"
        )
    parts = []
    for start in range(0, len(targets), _ROWS):
        p, q = (log_softmax(logits[start : start + _ROWS]) for logits in (reference, engine))
        rows, tokens = np.arange(len(p)), np.asarray(targets[start : start + _ROWS])
        kl = (np.exp(p) * (p - q)).sum(axis=-1)
        parts.append(Scores(kl, p.argmax(-1) == q.argmax(-1), -p[rows, tokens], -q[rows, tokens]))
    return Scores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def summarize(windows: Sequence[Scores]) -> dict[str, float]:
    """Summarize all positions of all windows."""
    kl, same_top, reference_nll, engine_nll = (
        np.concatenate(column) for column in zip(*windows, strict=True)
    )
    return {
        "positions": len(kl),
        "kl_mean": float(kl.mean()),
        "kl_median": float(np.median(kl)),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "kl_max": float(kl.max()),
        "top1_agreement": float(same_top.mean()),
        "perplexity_reference": float(np.exp(reference_nll.mean())),
        "perplexity_engine": float(np.exp(engine_nll.mean())),
    }


def compare(
    reference: Callable[[Sequence[int]], Floats],
    engine: Callable[[Sequence[int]], Floats],
    windows: Sequence[Sequence[int]],
) -> dict[str, float]:
    """Run both models on each window of token ids and summarize; each maps L ids to logits [L, V]."""
    scored = []
    for number, window in enumerate(windows, start=1):
        scored.append(score(reference(window[:-1]), engine(window[:-1]), window[1:]))
        print(f"window {number} of {len(windows)}: mean KL {scored[-1].kl.mean():.2e}", file=sys.stderr)
    return summarize(scored)


def engine_logits(llm: LLM, token_ids: Sequence[int]) -> Floats:
    """The engine's logits [L, V], computed as in serving: through KV blocks, in prefill chunks."""
    return np.array(llm.logits(list(token_ids)).astype(mx.float32))


def spread_windows(token_ids: Sequence[int], count: int, length: int) -> list[list[int]]:
    """Return `count` windows of `length + 1` tokens, spread evenly over the text.

    Each window predicts `length` tokens. Raises ValueError if the text is too short.
    """
    size = length + 1
    if len(token_ids) < count * size:
        raise ValueError(f"{count} windows of {size} tokens do not fit into {len(token_ids)} tokens")
    starts = np.linspace(0, len(token_ids) - size, count).astype(int)
    return [list(token_ids[start : start + size]) for start in starts]


def measure(count: int, length: int, model: Path | None = None, activation_bits: int = 16) -> dict[str, Any]:
    """Load both models, compare `count` windows of `length` tokens, and return figures and settings."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    llm = LLM(model, activation_bits=activation_bits)
    reference = NumpyLlama(llm.model_path)
    windows = spread_windows(llm.tokenizer.encode(text, special_tokens=False), count, length)
    figures = compare(reference.logits, lambda token_ids: engine_logits(llm, token_ids), windows)
    return {
        **figures,
        "windows": count,
        "window_tokens": length,
        "model": llm.model_name,
        "kv_cache_dtype": llm.engine_config.kv_cache_dtype,
        "activation_bits": llm.engine_config.activation_bits,
        "text": f"pydoc_data.topics of Python {platform.python_version()}",
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "machine": f"{platform.system()} {platform.machine()}",
        "mlx": version("mlx"),
    }


def main() -> None:
    """Read the options, measure, and print the figures."""
    parser = argparse.ArgumentParser(
        prog="pdm run bench accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--windows", type=int, default=8, help="windows of text (default 8)")
    parser.add_argument("--window-tokens", type=int, default=512, help="tokens in each window (default 512)")
    parser.add_argument("--model", type=Path, default=None, help="a GGUF file (default: the embedded model)")
    parser.add_argument(
        "--activation-bits", type=int, default=16, help="bits of activations: 8 or 16 (default 16)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    result = measure(options.windows, options.window_tokens, options.model, options.activation_bits)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name:22} {value:.6g}" if isinstance(value, float) else f"{name:22} {value}")


if __name__ == "__main__":
    main()
