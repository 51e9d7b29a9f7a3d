"""`pdm run bench`: what it lists, what it starts, and what it refuses. What it measures is not tested."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHES = Path(__file__).parents[1] / "benches"
NAMES = sorted(path.stem for path in BENCHES.glob("*.py"))
NO_QUESTION = {"front", "harness", "numpy_llama", "servers"}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHES / "front.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_question_is_listed_with_a_line_about_it() -> None:
    listed = bench()
    assert listed.returncode == 0
    table = listed.stdout.partition("\nBenchmarks:\n")[2]
    lines = [line.split(maxsplit=1) for line in table.splitlines()]
    assert {name for name, _ in lines} == {"latency", "throughput", "serve", *NAMES} - NO_QUESTION
    assert all(len(line) > 20 for _, line in lines)


@pytest.mark.parametrize("name", sorted({*NAMES, "latency", "serve"} - NO_QUESTION))
def test_a_question_explains_itself(name: str) -> None:
    told = bench(name, "--help")
    assert told.returncode == 0, told.stderr
    assert "--json" in told.stdout


@pytest.mark.parametrize(("name", "hint"), [("pears", "did you mean peers?"), ("xyzzy", "lists them")])
def test_a_wrong_name_is_refused_with_a_hint(name: str, hint: str) -> None:
    refused = bench(name)
    assert refused.returncode == 2
    assert f"there is no benchmark {name!r}" in refused.stderr
    assert hint in refused.stderr


def test_peers_that_are_missing_say_how_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHES))
    import peers

    others = peers.all_peers(Path("/nowhere"), None)[2:]
    reasons = [peer.why_missing() or "" for peer in others]
    assert len(others) == 3
    assert all(reason.startswith("no /nowhere/") for reason in reasons)
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


def test_a_peer_that_fails_is_left_out_with_its_reason(
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
    ("arguments", "said"),
    [
        (["growth", "--steps", "25"], "--steps 25: at most 24"),
        (["growth", "--prompt", "500"], "--prompt 500: at most 192"),
        (["roofline", "--repetitions", "0"], "'0': a whole number from 1 on"),
        (["peers", "--plot", "picture.txt"], "--plot picture.txt"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(arguments: list[str], said: str) -> None:
    refused = bench(*arguments)
    assert refused.returncode == 2
    assert said in refused.stderr


def test_the_share_of_repeated_sequences_tells_a_loop_from_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHES))
    import defaults

    assert defaults.repeated_share(range(100)) == 0
    assert defaults.repeated_share([1, 2, 3] * 40) > 0.9
    assert defaults.repeated_share([*range(60), *range(60)]) == pytest.approx(53 / 113)
    assert defaults.repeated_share([1, 2, 3]) == 0, "shorter than a sequence that could repeat"
