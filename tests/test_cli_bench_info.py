"""`tiny-llm bench` and `tiny-llm info`: figures with units and conditions, and a description of a model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_llm
from command_line import Run, check_blocks_are_freed, cli, llm, plain_cli
from tiny_checkpoints import CONFIGS, random_weights, write_folder, write_tokenizer
from tiny_llm import LLM
from tiny_llm_cli import bench_checks
from tiny_llm_cli.bench_latency import LatencyRun, measure_latency
from tiny_llm_cli.bench_throughput import ThroughputRun, measure_throughput
from tiny_llm_cli.engine import control_token_ids
from tiny_llm_cli.statistics_of import statistics_of

__all__ = ["check_blocks_are_freed", "cli", "llm", "plain_cli"]


def quiet(what: str, done: int, total: int) -> None:
    pass


def test_bench_latency_reports_figures_with_the_conditions_of_the_run(llm: LLM) -> None:
    run = LatencyRun(prefill_tokens=16, prompt_tokens=4, output_tokens=3, repetitions=2, warmups=0, seed=0)
    result = measure_latency(llm, run, quiet)
    for key in ("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_ms"):
        assert 0 < result[f"{key}_min"] <= result[key] <= result[f"{key}_max"]  # type: ignore[operator]
    assert run._asdict().items() <= result["run"].items()  # type: ignore[attr-defined]
    for key in ("model", "mlx", "device", "kernels", "instruction_set", "threads"):
        assert key in result["run"]  # type: ignore[operator]


def test_bench_throughput_has_the_keys_of_vllm_and_obeys_max_concurrency(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, max_requests = llm.core.step, 0

    def watched() -> Any:
        nonlocal max_requests
        max_requests = max(max_requests, llm.core.stats.num_running + llm.core.stats.num_waiting)
        return step()

    monkeypatch.setattr(llm.core, "step", watched)
    run = ThroughputRun(5, 2, 4, 8, output_tokens=3, shared_prefix=16, seed=0)
    result = measure_throughput(llm, run, quiet)
    assert max_requests == 2
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (5, 0, 15)
    assert 5 * (16 + 4) <= result["total_input_tokens"] <= 5 * (16 + 8)  # type: ignore[operator]
    statistics = {
        f"{s}_{what}_ms" for s in ("mean", "median", "std", "p99") for what in ("ttft", "tpot", "itl", "e2el")
    }
    assert statistics < set(result)
    assert {"duration", "request_throughput", "output_throughput", "total_token_throughput"} < set(result)


def test_bench_prompts_contain_no_control_tokens(llm: LLM) -> None:
    assert [llm.tokenizer.token_text(token) for token in sorted(control_token_ids(llm))[:3]] == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 100, 101, 250])
def test_p99_equals_the_percentile_of_numpy(count: int) -> None:
    seconds = np.random.default_rng(count).exponential(size=count).tolist()
    result = statistics_of("itl", seconds)
    for kind, expected in (("p99", np.percentile(seconds, 99)), ("median", np.median(seconds))):
        assert result[f"{kind}_itl_ms"] == pytest.approx(1000 * float(expected), rel=1e-12)


def test_bench_prints_json_or_a_table(cli: Run) -> None:
    arguments = ["bench", "latency", "--prefill-tokens", "4", "--output-tokens", "2", "--repetitions", "1"]
    assert json.loads(cli(*arguments, "--json").out)["decode_tokens_per_s"] > 0
    table = cli(*arguments)
    assert table.err == ""
    heading, *lines = table.out.splitlines()
    assert heading == "Median (smallest to largest) of 1 run:"
    units = {line.split()[0]: line.split()[2] for line in lines[:3]}
    assert units == {"decode": "tokens/s", "prefill": "tokens/s", "ttft": "ms"}
    assert "instruction set " in table.out


def test_bench_throughput_prints_a_unit_with_each_figure(cli: Run) -> None:
    arguments = ["--num-prompts", "2", "--max-input-tokens", "32", "--output-tokens", "3"]
    totals, times, run = cli("bench", "throughput", *arguments).out.split("\n\n")
    units = {line.split()[0]: line.split()[2] for line in totals.splitlines()}
    assert (units["duration"], units["completed"], units["total_output_tokens"]) == (
        "s",
        "requests",
        "tokens",
    )
    assert (units["request_throughput"], units["output_throughput"]) == ("requests/s", "tokens/s")
    heading, *rows = [line.split() for line in times.splitlines()]
    assert heading == ["milliseconds", "mean", "median", "std", "p99"]
    assert [row[0] for row in rows] == ["ttft", "tpot", "itl", "e2el"]
    assert "num prompts " in run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["latency", "--prefill-tokens", "9000"], "--prefill-tokens: 9000 prompt tokens and 1 output token"),
        (
            ["latency", "--prompt-tokens", "8100"],
            "--prompt-tokens, --output-tokens: 8100 prompt tokens and 128 output tokens exceed the context",
        ),
        (
            ["throughput", "--max-input-tokens", "9000", "--shared-prefix", "7"],
            "--shared-prefix, --max-input-tokens, --output-tokens: 9007 prompt tokens and 64 output tokens",
        ),
        (["throughput", "--num-blocks", "8"], "exceed the context of 128"),
        (["throughput", "--kv-cache-memory", "1KiB"], "--kv-cache-memory (1 KiB) is less than one block"),
        (["throughput", "--swap-space", "1GiB"], "--swap-space (1 GiB) needs"),
        (["latency", "--model", "/nowhere.gguf"], "/nowhere.gguf: no such file"),
        (
            ["throughput", "--max-concurrency", "9", "--max-num-seqs", "4", "--max-num-waiting", "4"],
            "--max-concurrency: 9 is more than --max-num-seqs (4) and --max-num-waiting (4) together",
        ),
        (["serve", "--api-key", "geheimnis-\u00fc"], "--api-key: must have only printable ASCII"),
        (["serve", "--api-key", "a\nb"], "--api-key: must have only printable ASCII"),
    ],
)
def test_bench_rejects_wrong_arguments_before_it_loads_a_model(
    arguments: list[str], expected: str, plain_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_checks, "load_silently", lambda _: pytest.fail("the model was loaded"))
    done = plain_cli("bench", *arguments)
    assert (done.code, done.out) == (1 if "/nowhere" in expected else 2, "")
    assert expected in done.err


def test_bench_accepts_as_many_requests_as_the_queue_holds(cli: Run) -> None:
    few = ["--num-prompts", "3", "--max-input-tokens", "32", "--output-tokens", "2"]
    limits = ["--max-num-seqs", "1", "--max-num-waiting", "2"]
    assert cli("bench", "throughput", *few, *limits, "--json").code == 0


def test_bench_checks_the_lengths_for_a_model_that_had_to_be_downloaded(
    cli: Run, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its context is known only after the download."""
    monkeypatch.setattr(bench_checks, "check_model", lambda _: None)
    done = cli("bench", "latency", "--prefill-tokens", str(llm.max_model_len))
    assert done.code == 2
    assert f"exceed the context of {llm.max_model_len}" in done.err


def test_info_describes_model_and_pool(cli: Run, llm: LLM) -> None:
    found = json.loads(cli("info", "--json").out)
    assert found["model"]["parameters"] == 134_515_008  # SmolLM2-135M's own figure
    assert found["model"]["context"] == 8192
    assert found["pool"]["blocks"] * found["pool"]["block_size"] == found["pool"]["tokens"] == 64 * 16
    assert found["pool"]["bytes"] == found["pool"]["tokens"] * 2 * 30 * 3 * 64 * 2
    assert found["machine"]["mlx"]
    assert found["overlay"]["path"] == tiny_llm.__path__[0]
    shown = cli("info").out
    assert f"tokens          {64 * 16:,}" in shown
    assert "size            22.5 MiB" in shown
    assert "size per token  22.5 KiB" in shown


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_info_and_generate_work_with_a_checkpoint_folder(name: str, tmp_path: Path, plain_cli: Run) -> None:
    """Tiny random checkpoints; qwen2's projections have biases, and its head is tied."""
    path = write_folder(tmp_path / name, CONFIGS[name], random_weights(CONFIGS[name]))
    write_tokenizer(path)
    found = json.loads(plain_cli("info", "--model", str(path), "--num-blocks", "16", "--json").out)["model"]
    assert (found["name"], found["architecture"], found["path"]) == (name, name, str(path))
    assert found["quantization"].startswith("float32 x ")
    assert 0 <= found["bytes"] - 4 * found["parameters"] < 256  # frequencies are not parameters
    answered = plain_cli("generate", "ab", "--model", str(path), "--max-tokens", "3", "--json")
    assert len(json.loads(answered.out)["outputs"][0]["token_ids"]) == 3
    too_long = plain_cli("generate", "ab " * 200, "--model", str(path))
    assert too_long.code == 1
    assert "128" in too_long.err


def test_info_without_a_model_still_describes_the_machine(plain_cli: Run) -> None:
    done = plain_cli("info", "--model", "/nowhere.gguf", "--json")
    assert done.code == 1
    assert "mlx" in json.loads(done.out)["machine"]
    assert "/nowhere.gguf" in done.err


def test_info_names_the_device_as_mlx_users_do(plain_cli: Run) -> None:
    arguments = ("info", "--model", "/nowhere.gguf")
    assert json.loads(plain_cli(*arguments, "--json").out)["machine"]["device"] in ("cpu", "gpu")
    assert "Device(" not in plain_cli(*arguments).out


def test_info_names_the_learners_modules(
    tmp_path: Path, plain_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sampler.py").touch()
    (tmp_path / "kvcache.py").touch()
    monkeypatch.setattr(tiny_llm, "__path__", [str(tmp_path), *tiny_llm.__path__[1:]])
    found = json.loads(plain_cli("info", "--model", "/nowhere.gguf", "--json").out)["overlay"]
    assert (found["modules"], found["unknown_modules"]) == (["sampler"], ["kvcache"])
