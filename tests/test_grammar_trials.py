"""The process that tries grammars: it may die of one, and is started again; nothing is left at the end."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from llguidance import LLMatcher
from tiny_llm.grammar_trials import TOO_COSTLY, GrammarTrials

GOOD, WRONG = LLMatcher.grammar_from_regex("[a-z]+"), LLMatcher.grammar_from_regex("(")
ENDLESS = LLMatcher.grammar_from_json_schema({"type": "integer", "multipleOf": 99_999_989})
LIMITS = {"verbose_errors": False}


@pytest.fixture
def trials() -> Iterator[GrammarTrials]:
    trials = GrammarTrials(256, {}, [])
    yield trials
    trials.close()


def process_of(trials: GrammarTrials) -> int:
    assert trials._process is not None
    return trials._process.pid


def exists(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def test_a_good_grammar_has_no_reason_and_a_wrong_one_has_the_librarys(trials: GrammarTrials) -> None:
    assert trials.reason_to_refuse(GOOD, LIMITS) == ""
    assert "unclosed group" in trials.reason_to_refuse(WRONG, LIMITS)
    process = process_of(trials)
    assert trials.reason_to_refuse(GOOD, LIMITS) == ""
    assert process_of(trials) == process, "one process serves all trials"


def test_a_grammar_that_does_not_end_ends_only_the_process(trials: GrammarTrials) -> None:
    assert trials.reason_to_refuse(ENDLESS, LIMITS) == TOO_COSTLY
    assert trials.reason_to_refuse(GOOD, LIMITS) == ""


def test_the_limits_of_the_parser_are_used(trials: GrammarTrials) -> None:
    assert "limit for this grammar: 1" in trials.reason_to_refuse(GOOD, {**LIMITS, "initial_lexer_fuel": 1})


def test_a_process_that_was_killed_is_started_again(trials: GrammarTrials) -> None:
    assert trials.reason_to_refuse(GOOD, LIMITS) == ""
    process = process_of(trials)
    os.kill(process, signal.SIGKILL)
    assert trials._process is not None
    trials._process.wait()
    assert trials.reason_to_refuse(GOOD, LIMITS) == ""
    assert process_of(trials) != process


def test_threads_get_their_own_answers(trials: GrammarTrials) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda source: trials.reason_to_refuse(source, LIMITS), [GOOD, WRONG] * 20))
    assert [reason == "" for reason in found] == [True, False] * 20


def test_the_process_ends_with_its_owner() -> None:
    trials = GrammarTrials(256, {}, [])
    trials.reason_to_refuse(GOOD, LIMITS)
    process = process_of(trials)
    assert exists(process)
    del trials
    gc.collect()
    assert not exists(process)


def test_ended_processes_are_forgotten(trials: GrammarTrials) -> None:
    for _ in range(3):
        trials.reason_to_refuse(GOOD, LIMITS)
        process = process_of(trials)
        trials.close()
        assert not exists(process)
    assert trials._ender is not None
    assert not trials._ender.alive


def test_the_process_ends_at_exit_even_if_the_program_is_killed() -> None:
    code = (
        "import sys\n"
        "from tiny_llm.grammar_trials import GrammarTrials\n"
        "trials = GrammarTrials(256, {}, [])\n"
        f"trials.reason_to_refuse({GOOD!r}, {LIMITS!r})\n"
        "print(trials._process.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    for kill in (False, True):
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as program:
            assert program.stdout is not None
            process = int(program.stdout.readline())
            assert exists(process)
            if kill:
                program.kill()
        for _ in range(500):
            if not exists(process):
                break
            subprocess.run(["sleep", "0.02"], check=True)
        assert not exists(process)


def test_a_fork_starts_its_own_process(trials: GrammarTrials) -> None:
    """Both sides would otherwise read the answers from the same pipe."""
    trials.reason_to_refuse(GOOD, LIMITS)
    code = os.fork()
    if code == 0:
        status = 1
        try:
            parents = process_of(trials)
            same = trials.reason_to_refuse(GOOD, LIMITS) == "" and process_of(trials) != parents
            trials.close()
            status = 0 if same and exists(parents) else 1
        finally:
            os._exit(status)
    assert os.waitpid(code, 0)[1] == 0
    assert trials.reason_to_refuse(GOOD, LIMITS) == ""
