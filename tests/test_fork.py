"""A forked process has no threads of its parent: every call in it raises an error immediately and never
waits.

Each test runs its own programs, because a fork of this process would inherit everything that pytest has.
"""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SECONDS = 60  # a guard against hanging

PARENT = """
import asyncio, multiprocessing, os, signal, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks in processes with threads
from tiny_llm import LLM, SamplingParams
SMALL = dict(num_blocks=60, block_size=8, max_model_len=200, max_num_seqs=8, max_num_batched_tokens=32)
PARAMS = SamplingParams(temperature=0.0, max_tokens=3)
"""
ENGINE = """
llm = LLM(**SMALL)
assert llm.generate("The", PARAMS, use_tqdm=False)[0].finished
"""
CHILD = """
signal.alarm(20)  # a call that hangs ends here, and so does the child
"""


def run(program: str, env: dict[str, str] | None = None) -> str:
    """The output of a program, which must exit without an error."""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        cwd=Path(__file__).parent,
        env=env,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stderr == ""
    return ended.stdout


def in_child(code: str) -> str:
    """The part of a program that runs in a forked child and exits normally; the parent waits for it."""
    body = textwrap.indent(CHILD + textwrap.dedent(code) + "\nsys.exit(0)\n", "    ")
    waits = "_, status = os.waitpid(pid, 0)\nassert status == 0, status\n"
    return f"sys.stdout.flush()\npid = os.fork()\nif pid == 0:\n{body}\n{waits}"


CALLS = """
def refused(call):
    began = time.monotonic()
    try:
        call()
    except RuntimeError as error:
        assert type(error).__name__ == "ForkedProcessError", repr(error)
        assert "'spawn'" in str(error)
    else:
        raise AssertionError(call)
    assert time.monotonic() - began < 5

engine = llm.engine
async def first(events):
    return await anext(events)
request = engine.request([5, 6], PARAMS)
for call in (
    lambda: llm.generate("The", PARAMS, use_tqdm=False),
    lambda: llm.chat([{"role": "user", "content": "Hi"}], PARAMS, use_tqdm=False),
    lambda: next(llm.stream("The", PARAMS)),
    lambda: next(under_way),
    lambda: llm.logits([5, 6]),
    lambda: engine.call(int),
    lambda: engine.submit([request], print),
    lambda: engine.cancel("a").result(),
    lambda: engine.start_draining().result(),
    lambda: engine.watch_blocks(print),
    lambda: asyncio.run(engine.drain()),
    lambda: asyncio.run(first(engine.generate([5, 6], PARAMS))),
    lambda: unfinished.result(),
    lambda: LLM(**SMALL),
    lambda: multiprocessing.get_context("fork") and LLM(**SMALL),
):
    refused(call)
engine.stop()
engine.forget([request])
del llm, engine, under_way
print("refused", flush=True)
"""


def test_every_call_in_a_forked_child_raises_and_both_processes_go_on() -> None:
    begin = """
under_way = llm.stream("The", SamplingParams(max_tokens=100, ignore_eos=True))
next(under_way)
gate = threading.Event()
llm.engine._inbox.post(gate.wait)
unfinished = llm.engine._inbox.post(int)
"""
    end = """
gate.set()
assert unfinished.result(30) == 0
assert len(list(under_way)) > 50
assert llm.generate("The", PARAMS, use_tqdm=False)[0].finished
"""
    assert run(PARENT + ENGINE + begin + in_child(CALLS) + end) == "refused\n"


def test_closing_in_a_child_leaves_the_parents_engine_running() -> None:
    child = """
        llm.close()
        with llm:
            pass
    """
    after = "assert llm.generate('The', PARAMS, use_tqdm=False)[0].finished\nllm.close()\n"
    run(PARENT + ENGINE + in_child(child) + after)


def test_a_multiprocessing_child_gets_an_error_that_says_what_to_do() -> None:
    program = """
def work(queue):
    signal.alarm(20)
    try:
        llm.generate("The", PARAMS, use_tqdm=False)
    except RuntimeError as error:
        queue.put(str(error))
context = multiprocessing.get_context("fork")
queue = context.Queue()
child = context.Process(target=work, args=(queue,))
child.start()
print(queue.get(timeout=30))
child.join(30)
assert child.exitcode == 0
"""
    assert "start the process with multiprocessing's 'spawn' or 'forkserver' method" in run(
        PARENT + ENGINE + program
    )


@pytest.mark.parametrize(
    "before",
    ["", "import mlx.core as mx\nmx.eval(mx.ones(3) + 1)\n", "import tiny_llm.llm, tiny_llm.engine\n"],
)
def test_a_child_may_have_an_engine_if_its_parent_has_none(before: str) -> None:
    code = """
        child = LLM(**SMALL)
        print(child.generate("The", PARAMS, use_tqdm=False)[0].finished, flush=True)
    """
    after = "assert LLM(**SMALL).generate('The', PARAMS, use_tqdm=False)[0].finished\n"
    assert run(PARENT + before + in_child(code) + after) == "True\n"
