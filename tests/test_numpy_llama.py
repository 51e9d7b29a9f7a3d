"""The NumPy reference of benches/accuracy.py equals transformers (tests/goldens), so that it may judge."""

import json
import runpy
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tiny_llm_ref.embedded import embedded_model_path

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / "tests" / "goldens" / "greedy.json").read_text(encoding="utf-8"))
BENCH = runpy.run_path(str(ROOT / "benches" / "numpy_llama.py"))
# Two float32 programs that add in different orders: measured apart by at most 7e-5 on these prompts.
TOLERANCE = 5e-4


@pytest.fixture(scope="module")
def reference() -> Any:
    return BENCH["NumpyLlama"](embedded_model_path())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantizing_equals_mlx(bits: int) -> None:
    """Oracle: `mx.dequantize`."""
    weight = mx.random.normal((6, 96), key=mx.random.key(0))
    packed, scales, biases = mx.quantize(weight, group_size=32, bits=bits)
    ours = BENCH["dequantize"](np.array(packed), np.array(scales), np.array(biases))
    theirs = np.array(mx.dequantize(packed, scales, biases, group_size=32, bits=bits))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("record", GOLDEN["continuations"], ids=lambda record: record["name"])
def test_it_follows_transformers_through_every_continuation(reference: Any, record: dict[str, Any]) -> None:
    """At every position the same token, the same margin to the next, and the same top log-probabilities."""
    prompt, output = record["prompt_ids"], record["output_ids"]
    rows = reference.logits(prompt + output)[len(prompt) - 1 : -1]
    assert rows.argmax(axis=-1).tolist() == output
    second, first = np.sort(rows, axis=-1)[:, -2:].T
    np.testing.assert_allclose(first - second, record["margins"], atol=TOLERANCE)
    log_probs = log_softmax(rows)
    for place, top in enumerate(record["top_log_probs"]):
        ids, expected = zip(*top, strict=True)
        np.testing.assert_allclose(log_probs[place, list(ids)], expected, atol=TOLERANCE)


def test_a_row_does_not_see_what_comes_after_it(reference: Any) -> None:
    tokens = GOLDEN["continuations"][0]["output_ids"]
    whole, start = reference.logits(tokens), reference.logits(tokens[:9])
    np.testing.assert_allclose(whole[:9], start, atol=TOLERANCE)
