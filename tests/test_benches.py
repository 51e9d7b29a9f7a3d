"""`pdm run bench`: what it lists, what it starts, and what it refuses. What it measures is not tested."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHES = Path(__file__).parents[1] / "benches"
NAMES = sorted(path.stem for path in BENCHES.glob("*.py"))


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHES / "front.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_question_is_listed_with_a_line_about_it() -> None:
    listed = bench()
    assert listed.returncode == 0
    lines = [line.split(maxsplit=1) for line in listed.stdout.splitlines() if line.startswith("  ")]
    no_question = {"front", "harness", "numpy_llama"}
    assert {name for name, _ in lines} == {"latency", "throughput", *NAMES} - no_question
    assert all(len(line) > 20 for _, line in lines)


@pytest.mark.parametrize("name", ["peers", "roofline", "contiguous", "growth", "latency"])
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
