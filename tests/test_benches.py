"""`pdm run bench`: the list, the help texts and wrong command lines. The measurements are not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_llm_kernels

BENCHES = Path(__file__).parents[1] / "benches"
NAMES = sorted(path.stem for path in BENCHES.glob("*.py"))
NO_QUESTION = {"front", "harness", "numpy_llama", "servers"}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHES / "front.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_benchmark_is_listed_with_its_question() -> None:
    listed = bench()
    assert listed.returncode == 0
    table = listed.stdout.partition("\nBenchmarks:\n")[2]
    lines = [line.split(maxsplit=1) for line in table.splitlines()]
    assert {name for name, _ in lines} == {"latency", "throughput", "serve", *NAMES} - NO_QUESTION
    assert all(len(line) > 20 for _, line in lines)


@pytest.mark.parametrize("name", sorted({*NAMES, "latency", "serve"} - NO_QUESTION))
def test_every_benchmark_has_a_help_text(name: str) -> None:
    shown = bench(name, "--help")
    assert shown.returncode == 0, shown.stderr
    assert "--json" in shown.stdout


@pytest.mark.parametrize(("name", "hint"), [("pears", "did you mean peers?"), ("xyzzy", "lists them")])
def test_an_unknown_name_is_an_error_with_a_hint(name: str, hint: str) -> None:
    failed = bench(name)
    assert failed.returncode == 2
    assert f"there is no benchmark {name!r}" in failed.stderr
    assert hint in failed.stderr


def test_a_missing_peer_is_reported_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHES))
    import peers

    others = peers.all_peers(Path("/nowhere"), None)[2:]
    reasons = [peer.why_missing() or "" for peer in others]
    assert len(others) == 3
    assert all(reason.startswith("/nowhere/") and " is missing; to install: " in reason for reason in reasons)
    assert sum("pip install" in reason for reason in reasons) == 2
    assert "--llama-server" in reasons[-1]


WORKER = """
import json, sys
print(json.dumps({"version": "1"}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if len(job["prompts"]) > 1 and "breaks" in sys.argv:
        sys.exit("no memory left")
    tokens = len(job["prompts"]) * job["output_tokens"]
    print(json.dumps({"seconds": tokens / 1000, "tokens": tokens}), flush=True)
"""


def test_a_peer_that_fails_is_left_out_and_the_reason_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHES))
    import peers

    file = tmp_path / "worker.py"
    file.write_text(WORKER)
    kinds = {"tiny-llm, 16 bits": "works", "works": "works", "breaks": "breaks"}
    workers = [
        peers.Worker(peers.Peer(name, Path(sys.executable), str(file), (kind,)), tmp_path, 1)
        for name, kind in kinds.items()
    ]
    left_out: dict[str, str] = {}
    try:
        rows = peers.compare(workers, 2, left_out)
    finally:
        for worker in workers:
            worker.close()
    assert [*left_out] == ["breaks"]
    assert "no memory left" in left_out["breaks"]
    assert {name for row in rows.values() for name in row["tokens_per_s"]} == {"tiny-llm, 16 bits", "works"}
    with pytest.raises(peers.WorkerError, match="No such file"):
        peers.Worker(peers.Peer("absent", Path(sys.executable), "absent.py"), tmp_path, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["growth", "--steps", "25"], "--steps 25: at most 24"),
        (["growth", "--prompt", "500"], "--prompt 500: at most 192"),
        (["roofline", "--repetitions", "0"], "'0' is not a whole number of 1 or more"),
        (["peers", "--plot", "picture.txt"], "--plot picture.txt"),
        (["routing", "--plot", "picture.txt"], "--plot picture.txt"),
        (["routing", "--load", "0"], "--load 0.0: must be more than 0"),
        (["routing", "--traces", "poems"], "invalid choice: 'poems'"),
    ],
)
def test_wrong_arguments_are_errors_before_any_measurement(arguments: list[str], message: str) -> None:
    failed = bench(*arguments)
    assert failed.returncode == 2
    assert message in failed.stderr


def test_the_share_of_repeated_sequences_distinguishes_a_loop_from_a_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHES))
    import defaults

    assert defaults.repeated_share(range(100)) == 0
    assert defaults.repeated_share([1, 2, 3] * 40) > 0.9
    assert defaults.repeated_share([*range(60), *range(60)]) == pytest.approx(53 / 113)
    assert defaults.repeated_share([1, 2, 3]) == 0, "shorter than a sequence that could repeat"


def test_every_other_prompt_of_the_load_for_options_begins_with_the_shared_prefix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHES))
    import knobs

    load = knobs.Load.drawn(8, seed=1)
    shared, others = load.prompts[::2], load.prompts[1::2]
    assert len({tuple(prompt[: knobs.PREFIX]) for prompt in shared}) == 1
    assert len({tuple(prompt[: knobs.SHORTEST]) for prompt in others}) == 4
    assert all(len(prompt) in range(32, 161) for prompt in others)
    assert all(len(prompt) in range(232, 361) for prompt in shared)
    assert all(length in range(32, 97) for length in load.answers)


@pytest.mark.skipif(not tiny_llm_kernels.available(), reason="the embedded model is too slow")
def test_a_changed_option_changes_counts_but_not_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHES))
    import knobs

    rows = knobs.measure(["default", "no_prefix_cache"], requests=3, clients=1, repetitions=1)
    assert {name: row["equal"] for name, row in rows.items()} == {"default": 3, "no_prefix_cache": 3}
    assert rows["no_prefix_cache"]["computed"] - rows["default"]["computed"] == knobs.PREFIX
    assert rows["no_prefix_cache"]["hits"] == 0
    assert [line.split()[0] for line in knobs.as_text(rows).splitlines()[1:]] == [*rows]


def test_routing_simulates_every_trace_number_of_replicas_and_policy(tmp_path: Path) -> None:
    plot = tmp_path / "picture.svg"
    command = ["routing", "--replicas", "2", "3", "--requests", "4", "--traces", "shared", "unrelated"]
    ran = bench(*command, "--json", "--plot", str(plot))
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(ran.stdout)["rows"]
    found = [(row["trace"], row["replicas"], row["policy"], row["num_requests"]) for row in rows]
    assert found == [
        (trace, replicas, policy, 4 * replicas)
        for trace in ("shared", "unrelated")
        for replicas in (2, 3)
        for policy in ("prefix", "least-loaded", "round-robin")
    ]
    assert plot.stat().st_size > 1000


@pytest.mark.deep
@pytest.mark.skipif(not tiny_llm_kernels.available(), reason="the embedded model is too slow")
def test_a_simulated_replica_finds_as_many_tokens_in_its_cache_as_the_engine() -> None:
    ran = bench("replay", "--json", "--fit", "1", "--conversations", "3", "--rate", "0.1", "--trace", "chats")
    assert ran.returncode == 0, ran.stderr
    real, simulated = (json.loads(ran.stdout)["rows"][name] for name in ("real", "simulated"))
    assert real["num_requests"] == simulated["num_requests"] > 5
    assert real["hit_rate"] == pytest.approx(simulated["hit_rate"], abs=0.02)
    assert real["hit_rate"] > 0.4


METRICS = """
# HELP vllm:num_requests_running Sequences that are running.
vllm:num_requests_running{model_name="m"} 3.0
vllm:inter_token_latency_seconds_bucket{le="0.001",model_name="m"} 0.0
vllm:inter_token_latency_seconds_count{model_name="m"} 5.0
vllm:inter_token_latency_seconds_created{model_name="m"} 1.79e+09
vllm:request_success_total{finished_reason="length",model_name="m"} 2.0
python_info{version="3.11"} 1.0
"""


def test_a_reading_of_the_metrics_has_the_engines_lines_without_buckets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHES))
    import metrics

    assert len([*metrics.samples(METRICS)]) == 3
    assert metrics.values(METRICS) == {"num_requests_running": 3.0, "inter_token_latency_seconds_count": 5.0}
