"""Tasks 9 and 10: the engine for other threads."""

import gc
import threading
import time
import weakref
from functools import partial
from typing import Any

import pytest
from tiny_llm.engine import Engine
from tiny_llm.engine_config import EngineConfig
from tiny_llm.errors import (
    DuplicateRequestError,
    EngineDeadError,
    EngineStoppingError,
    QueueFullError,
    RequestTooLargeError,
)
from tiny_llm.sampling_params import SamplingParams

from week_3_day_7.alphabet import ALPHABET, LONG, LONGEST, THREE, TOKENIZER, AlphabetCore, Ear, text
from week_3_day_7.patience import background, cancelled, queued, value, within
from week_3_day_7.serving import free_blocks, serving, small_core

# Task 9: Engine.submit


def test_task_9_a_request_from_another_thread() -> None:
    """Oracle: by hand: a letter a step, the usage with the last."""
    with serving() as engine:
        ear, one = Ear(), engine.request("abc", THREE)
        assert queued(engine.submit([one], ear)) is None
        heard = ear.until_end()
    assert text(heard) == "def"
    assert [event.usage is None for event in heard] == [True, True, False]
    assert [len(call) for call in ear.calls] == [1, 1, 1]


def test_task_9_the_listener_is_called_in_the_engines_thread() -> None:
    """Oracle: the threads' names: not this one, which would have to wait for a step."""
    with serving() as engine:
        ear = Ear()
        queued(engine.submit([engine.request("a", THREE)], ear))
        ear.until_end()
    assert [thread.name for thread in ear.threads] == ["tiny-llm-engine"]


def test_task_9_it_does_not_wait_for_the_step_that_runs() -> None:
    """Oracle: by hand: a future now, which is done before the next step."""
    core = AlphabetCore()
    core.hold()
    with serving(core) as engine:
        within(engine.submit, [engine.request("a", LONG)], Ear())
        core.wait_for_step()
        ear = Ear()
        answer = within(engine.submit, [engine.request("m", LONG, "second")], ear)
        assert not answer.done()
        core.let_step()
        core.wait_for_step()
        assert answer.done()
        assert core.log[-3:] == ["step", "add second", "step"]
        core.let_step()
        assert text(ear.next()) == "n"


@pytest.mark.parametrize(("prompt", "error"), [([], ValueError), ([0] * (LONGEST + 1), RequestTooLargeError)])
def test_task_9_the_future_raises_the_cores_error(prompt: list[int], error: type[Exception]) -> None:
    """Oracle: the core's error, and nothing of a batch of three is queued."""
    core, ear = AlphabetCore(), Ear()
    with serving(core) as engine:
        requests = [engine.request(tokens, THREE) for tokens in ([0], prompt, [1])]
        with pytest.raises(error):
            queued(engine.submit(requests, ear))
        queued(engine.submit([engine.request("x", SamplingParams(max_tokens=1), "last")], ear))
        assert [event.request_id for event in ear.until_end()] == ["last"]
    assert len(ear.calls) == 1


def test_task_9_an_id_in_use() -> None:
    """Oracle: by hand: the second one is refused, and the first goes on to its end."""
    core, ear = AlphabetCore(), Ear()
    core.hold()
    with serving(core) as engine:
        within(engine.submit, [engine.request("a", THREE, "name")], ear)
        core.wait_for_step()
        refused = within(engine.submit, [engine.request("m", THREE, "name")], Ear())
        core.let_go()
        with pytest.raises(DuplicateRequestError):
            queued(refused)
        assert text(ear.until_end()) == "bcd"


def test_task_9_a_full_queue_refuses_at_once() -> None:
    """Oracle: by hand: two seats, and two may wait; refused while the step still runs, and later let in."""
    core = AlphabetCore(max_seqs=2)
    with serving(core, max_num_seqs=2, max_num_waiting=2) as engine:
        first, second = Ear(), Ear()
        queued(engine.submit([engine.request(letter, LONG, letter) for letter in "ab"], first))
        first.next()
        core.hold()
        core.wait_for_step()
        waiting = within(engine.submit, [engine.request(letter, THREE) for letter in "cd"], second)
        for _ in range(3):
            with pytest.raises(QueueFullError):
                within(engine.submit, [engine.request("e", THREE)], Ear())
        core.let_go()
        queued(waiting)
        for letter in "ab":
            cancelled(engine.cancel(letter))
        while sum(event.usage is not None for event in second.events) < 2:
            second.next()
        third = Ear()
        queued(engine.submit([engine.request("e", THREE)], third))
        assert text(third.until_end()) == "fgh"


def test_task_9_requests_enter_together_or_not_at_all() -> None:
    """Oracle: by hand: one seat and one that may wait: three are too many, and two come in after that."""
    core = AlphabetCore(max_seqs=1)
    with serving(core, max_num_seqs=1, max_num_waiting=1) as engine:
        requests = [engine.request("a", THREE) for _ in range(3)]
        with pytest.raises(QueueFullError):
            within(engine.submit, requests, Ear())
        ear = Ear()
        queued(engine.submit(requests[:2], ear))
        assert text(ear.until_end() + ear.until_end()) == "bcdbcd"


def test_task_9_an_engine_that_drains_refuses_at_once() -> None:
    """Oracle: by hand: raised here and now, while a step runs, not by a future."""
    core = AlphabetCore()
    with serving(core) as engine:
        ear = Ear()
        queued(engine.submit([engine.request("a", LONG, "a")], ear))
        ear.next()
        drained = engine.start_draining()
        cancelled(engine.cancel("nobody"))
        core.hold()
        core.wait_for_step()
        with pytest.raises(EngineStoppingError):
            within(engine.submit, [engine.request("b", THREE)], Ear())
        ended = engine.cancel("a")
        core.let_go()
        cancelled(ended)
        value(drained, "the drain is not over, although its last request was cancelled")


@pytest.mark.parametrize("bad", [["a"], "a", 7, [None]])
def test_task_9_what_is_no_request_is_a_type_error(bad: Any) -> None:
    """Oracle: by hand: raised at once, counted as nothing, and the same in an engine that takes no more."""
    with serving(max_num_seqs=1, max_num_waiting=1) as engine:
        for _ in range(10):  # more than may wait
            with pytest.raises(TypeError):
                within(engine.submit, bad, Ear())
        ear = Ear()
        queued(engine.submit([engine.request("a", THREE)], ear))
        assert text(ear.until_end()) == "bcd"
        within(engine.stop)
        with pytest.raises(TypeError):
            within(engine.submit, bad, Ear())


def test_task_9_a_listener_that_cannot_be_called_is_a_type_error() -> None:
    """Oracle: by hand: raised at once, not by the engine's thread when the first event comes."""
    with serving() as engine, pytest.raises(TypeError):
        within(engine.submit, [engine.request("a", THREE)], None)


def test_task_9_the_callers_list_may_change_afterwards() -> None:
    """Oracle: by hand: what was submitted is queued, although the list is empty by then."""
    core, ear = AlphabetCore(), Ear()
    core.hold()
    with serving(core) as engine:
        within(engine.submit, [engine.request("m", LONG)], Ear())
        core.wait_for_step()
        requests = [engine.request("a", THREE, "mine")]
        answer = within(engine.submit, requests, ear)
        requests.clear()
        core.let_go()
        queued(answer)
        assert "add mine" in core.log, "the engine's thread got the caller's list, which has changed since"
        assert text(ear.until_end()) == "bcd"


def test_task_9_a_task_that_waits_does_not_hold_the_engine() -> None:
    """Oracle: a weak reference: the engine is forgotten while a step runs. A lambda holds `self`."""
    core = AlphabetCore()
    core.hold()
    engine = within(Engine, lambda: core, TOKENIZER, len(ALPHABET), EngineConfig(max_num_seqs=8))
    try:
        within(engine.submit, [engine.request("a", LONG)], Ear())
        core.wait_for_step()
        within(engine.submit, [engine.request("b", LONG)], Ear())
        forgotten, end = weakref.ref(engine), time.monotonic() + 1
        del engine
        while forgotten() is not None and time.monotonic() < end:
            time.sleep(0.01)
            gc.collect()
        assert forgotten() is None, "what was posted holds the engine, so its thread would never end"
    finally:
        core.let_go()


def test_task_9_an_engine_that_was_stopped() -> None:
    """Oracle: by hand: active requests are cancelled, and new ones refused, however many."""
    with serving(max_num_waiting=1) as engine:
        ear = Ear()
        queued(engine.submit([engine.request("a", LONG)], ear))
        within(engine.stop)
        assert ear.until_end()[-1].finish_reason == "abort"
        for _ in range(10):  # more than may wait
            with pytest.raises(EngineStoppingError):
                within(engine.submit, [engine.request("b", THREE)], Ear())


def test_task_9_when_the_engine_dies_listeners_and_new_clients_get_its_error() -> None:
    """Oracle: by hand: the listener gets the error with its cause, and a later client too."""
    core, error = AlphabetCore(), SystemError("unforeseen")
    with serving(core) as engine:
        ear = Ear()
        queued(engine.submit([engine.request("a", LONG)], ear))
        ear.next()
        core.dies = error
        with pytest.raises(EngineDeadError) as raised:
            ear.until_end()
        assert raised.value.__cause__ is error
        with pytest.raises(EngineDeadError):
            queued(engine.submit([engine.request("b", THREE)], Ear()))


# `cancel`, which is given, in an engine that `submit` fills


def test_task_9_it_takes_effect_before_the_next_step() -> None:
    """Oracle: by hand: asked for during the second step; no third one is taken for it."""
    core, ear = AlphabetCore(), Ear()
    core.hold()
    with serving(core) as engine:
        within(engine.submit, [engine.request("a", LONG, "mine"), engine.request("m", LONG, "other")], ear)
        core.wait_for_step()
        core.let_step()
        core.wait_for_step()
        done = within(engine.cancel, "mine")
        assert not done.done()
        core.let_step()
        core.wait_for_step()
        assert cancelled(done) is None
        assert core.log[-3:] == ["step", "cancel mine", "step"]
    mine = [event for event in ear.events if event.request_id == "mine"]
    assert (text(mine), mine[-1].finish_reason) == ("bc", "abort")
    assert mine[-1].usage is not None
    assert mine[-1].usage.completion_tokens == 2


def test_task_9_when_it_is_done_the_pages_are_back() -> None:
    """Oracle: the pool of a real core: all blocks can be had, and the figures say so."""
    core = small_core()
    with serving(core) as engine:
        ear = Ear()
        params = SamplingParams(max_tokens=50, ignore_eos=True, seed=1)
        queued(engine.submit([engine.request([1, 2, 3], params, "mine")], ear))
        ear.next()
        cancelled(engine.cancel("mine"))
        assert engine.stats.num_running == 0, "it was cancelled, and the published figures say that it runs"
        assert free_blocks(core) == 40, "not all blocks are back"
        assert ear.until_end()[-1].finish_reason == "abort"


def test_task_9_an_id_that_is_not_known_is_ignored() -> None:
    """Oracle: by hand: none, one that has ended, and others go on."""
    with serving() as engine:
        ear = Ear()
        queued(engine.submit([engine.request("a", THREE, "a")], ear))
        ear.until_end()
        assert [cancelled(engine.cancel(name)) for name in ("nobody", "a")] == [None, None]
        other = Ear()
        queued(engine.submit([engine.request("a", THREE, "a")], other))
        assert text(other.until_end()) == "bcd"


# Task 10: Engine.call


def test_task_10_a_functions_value() -> None:
    """Oracle: by hand, and the name of the thread that it ran in."""
    with serving() as engine:
        assert within(engine.call, lambda: 6 * 7) == 42
        assert within(engine.call, threading.current_thread).name == "tiny-llm-engine"
        assert within(engine.call, lambda: None) is None


def test_task_10_what_a_function_raises() -> None:
    """Oracle: by hand: it reaches only the caller; the engine goes on."""
    with serving() as engine:
        ear = Ear()
        queued(engine.submit([engine.request("a", LONG)], ear))
        with pytest.raises(ZeroDivisionError):
            within(engine.call, lambda: 1 // 0)
        assert within(engine.call, lambda: 7) == 7
        assert text(ear.next()) == "b"


def test_task_10_between_two_steps() -> None:
    """Oracle: by hand: asked for during a step; it runs after that, before the next."""
    core = AlphabetCore()
    core.hold()
    with serving(core) as engine:
        within(engine.submit, [engine.request("a", LONG)], Ear())
        core.wait_for_step()
        called = background(engine.call, partial(core.log.append, "called"))

        def steps() -> None:
            while not called.done():
                core.let_step()
                core.wait_for_step()

        within(steps)
        value(
            called,
            "`Engine.call` does not return: the function is never run, or waits for the end of all steps",
        )
        first = core.log.index("called")
        assert core.log[first - 1] == "step"
        assert core.log[first + 1] == "step"


def test_task_10_a_call_within_a_call() -> None:
    """Oracle: by hand: the thread that waits for itself waits for ever."""
    with serving() as engine:
        assert within(engine.call, lambda: engine.call(lambda: engine.call(lambda: 7))) == 7


def test_task_10_a_stopped_engine_raises() -> None:
    """Oracle: the docstring of `stop`: an error, instead of an answer that never comes.

    The thread that calls has got the ident of the engine's, which has ended: a system may give it again.
    """
    with serving() as engine:
        thread, inbox = within(engine.call, threading.current_thread), vars(engine)["_inbox"]
        within(engine.stop)

        def called() -> int:
            vars(thread)["_ident"] = vars(inbox)["_runner"] = threading.get_ident()
            return engine.call(lambda: 7)

        with pytest.raises(EngineStoppingError):
            within(called)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_task_10_what_cannot_be_called_is_a_type_error(is_stopped: bool) -> None:
    """Oracle: the docstring: refused in the thread that calls, before anything is posted."""
    with serving() as engine:
        if is_stopped:
            within(engine.stop)
        with pytest.raises(TypeError, match="must be callable"):
            within(engine.call, 7)
