"""The NumPy reference of benches/accuracy.py equals transformers (tests/goldens)."""

import json
import runpy
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tiny_llm_checkpoints.embedded import embedded_model_path

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / "tests" / "goldens" / "greedy.json").read_text(encoding="utf-8"))
BENCH = runpy.run_path(str(ROOT / "benches" / "numpy_llama.py"))
# Both sides are float32 and add in different orders; they differ by at most 4.1e-5 on these prompts.
TOLERANCE = 2e-4


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


def continuations() -> list[Any]:
    """Every continuation that transformers computed; by default the shortest two are run."""
    records = sorted(GOLDEN["continuations"], key=lambda one: len(one["prompt_ids"] + one["output_ids"]))
    return [
        pytest.param(record, id=record["name"], marks=[pytest.mark.deep] if rank > 1 else [])
        for rank, record in enumerate(records)
    ]


@pytest.mark.parametrize("record", continuations())
def test_the_reference_follows_transformers_through_every_continuation(
    reference: Any, record: dict[str, Any]
) -> None:
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


def test_a_row_does_not_depend_on_later_tokens(reference: Any) -> None:
    tokens = GOLDEN["continuations"][0]["output_ids"]
    whole, start = reference.logits(tokens), reference.logits(tokens[:9])
    np.testing.assert_allclose(whole[:9], start, atol=TOLERANCE)


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The benchmark as a module, with benches/ on the path as in `python benches/accuracy.py`."""
    monkeypatch.syspath_prepend(str(ROOT / "benches"))
    return runpy.run_path(str(ROOT / "benches" / "accuracy.py"))


def test_scores_follow_their_definitions(accuracy: dict[str, Any]) -> None:
    """Oracle: two distributions over three tokens, computed by hand. Logits may be shifted by a constant."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.25, 0.5, 0.25])
    reference, engine = (np.log(np.stack([row, row])).astype(np.float32) + 7 for row in (p, q))
    engine[1] = reference[1] - 3
    scores = accuracy["score"](reference, engine, [2, 0])
    divergence = 0.5 * np.log(2) + 0.3 * np.log(0.6) + 0.2 * np.log(0.8)
    np.testing.assert_allclose(scores.kl, [divergence, 0], atol=1e-6)
    assert scores.same_top.tolist() == [False, True]
    figures = accuracy["summarize"]([scores])
    assert figures["top1_agreement"] == 0.5
    assert figures["kl_max"] == pytest.approx(divergence, abs=1e-6)
    assert figures["perplexity_reference"] == pytest.approx((0.2 * 0.5) ** -0.5, abs=1e-5)
    assert figures["perplexity_engine"] == pytest.approx((0.25 * 0.5) ** -0.5, abs=1e-5)


def test_scores_reject_shapes_that_differ(accuracy: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"shapes differ: reference \(2, 3\), engine \(2, 3\), 1 targets"):
        accuracy["score"](np.zeros((2, 3)), np.zeros((2, 3)), [0])


def test_windows_are_spread_over_the_text_and_never_overrun_it(accuracy: dict[str, Any]) -> None:
    spread = accuracy["spread_windows"](range(100), 3, 20)
    assert [(window[0], window[-1]) for window in spread] == [(0, 20), (39, 59), (79, 99)]
    with pytest.raises(ValueError, match="5 windows of 21 tokens do not fit into 100 tokens"):
        accuracy["spread_windows"](range(100), 5, 20)
