"""Day 3.7, tasks 9 and 10: the engine for other threads."""

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

from week_3_day_7.alphabet import (
    ALPHABET,
    MANY_TOKENS,
    MAX_PROMPT,
    THREE_TOKENS,
    TOKENIZER,
    AlphabetCore,
    RecordingListener,
    text,
)
from week_3_day_7.serving import free_blocks, serving, small_core
from week_3_day_7.timeouts import background, cancelled, queued, value, with_timeout

# Task 9: Engine.submit


def rejected(engine: Engine, requests: list[Any]) -> None:
    """Submit requests that `submit` must reject with an error; fails if it returns a future."""
    with_timeout(engine.submit, requests, RecordingListener())
    raise AssertionError("`submit` returned a future: it must raise the error itself, and post nothing")


def test_task_9_a_request_from_another_thread_is_served() -> None:
    """Oracle: by hand: one letter per step, the usage with the last one."""
    with serving() as engine:
        listener, one = RecordingListener(), engine.request("abc", THREE_TOKENS)
        assert queued(engine.submit([one], listener)) is None
        found = listener.until_end()
    assert text(found) == "def"
    assert [event.usage is None for event in found] == [True, True, False]
    assert [len(call) for call in listener.calls] == [1, 1, 1]


def test_task_9_the_listener_is_called_in_the_engine_thread() -> None:
    """Oracle: the thread's name: not the test's thread, which would have to wait for a step."""
    with serving() as engine:
        listener = RecordingListener()
        queued(engine.submit([engine.request("a", THREE_TOKENS)], listener))
        listener.until_end()
    assert [thread.name for thread in listener.threads] == ["tiny-llm-engine"]


def test_task_9_submit_does_not_wait_for_the_running_step() -> None:
    """Oracle: by hand: `submit` returns a future at once, which is done before the next step."""
    core = AlphabetCore()
    core.hold()
    with serving(core) as engine:
        with_timeout(engine.submit, [engine.request("a", MANY_TOKENS)], RecordingListener())
        core.wait_for_step()
        listener = RecordingListener()
        answer = with_timeout(engine.submit, [engine.request("m", MANY_TOKENS, "second")], listener)
        assert not answer.done()
        core.allow_step()
        core.wait_for_step()
        assert answer.done()
        assert core.log[-3:] == ["step", "add second", "step"]
        core.allow_step()
        assert text(listener.next()) == "n"


@pytest.mark.parametrize(
    ("prompt", "error"), [([], ValueError), ([0] * (MAX_PROMPT + 1), RequestTooLargeError)]
)
def test_task_9_the_future_raises_the_error_of_the_core(prompt: list[int], error: type[Exception]) -> None:
    """Oracle: the core's error; no request of a call with three is queued."""
    core, listener = AlphabetCore(), RecordingListener()
    with serving(core) as engine:
        requests = [engine.request(tokens, THREE_TOKENS) for tokens in ([0], prompt, [1])]
        with pytest.raises(error):
            queued(engine.submit(requests, listener))
        queued(engine.submit([engine.request("x", SamplingParams(max_tokens=1), "last")], listener))
        assert [event.request_id for event in listener.until_end()] == ["last"]
    assert len(listener.calls) == 1


def test_task_9_a_duplicate_id_is_rejected_and_its_owner_continues() -> None:
    """Oracle: by hand: the second request is rejected, and the first continues to its end."""
    core, listener = AlphabetCore(), RecordingListener()
    core.hold()
    with serving(core) as engine:
        with_timeout(engine.submit, [engine.request("a", THREE_TOKENS, "name")], listener)
        core.wait_for_step()
        rejected = with_timeout(
            engine.submit, [engine.request("m", THREE_TOKENS, "name")], RecordingListener()
        )
        core.allow_all_steps()
        with pytest.raises(DuplicateRequestError):
            queued(rejected)
        assert text(listener.until_end()) == "bcd"


def test_task_9_a_full_queue_rejects_at_once() -> None:
    """Oracle: by hand: two may run and two may wait.

    A fifth is rejected during the step and accepted later.
    """
    core = AlphabetCore(max_seqs=2)
    with serving(core, max_num_seqs=2, max_num_waiting=2) as engine:
        first, second = RecordingListener(), RecordingListener()
        queued(engine.submit([engine.request(letter, MANY_TOKENS, letter) for letter in "ab"], first))
        first.next()
        core.hold()
        core.wait_for_step()
        waiting = with_timeout(
            engine.submit, [engine.request(letter, THREE_TOKENS) for letter in "cd"], second
        )
        for _ in range(3):
            with pytest.raises(QueueFullError):
                rejected(engine, [engine.request("e", THREE_TOKENS)])
        core.allow_all_steps()
        queued(waiting)
        for letter in "ab":
            cancelled(engine.cancel(letter))
        while sum(event.usage is not None for event in second.events) < 2:
            second.next()
        third = RecordingListener()
        queued(engine.submit([engine.request("e", THREE_TOKENS)], third))
        assert text(third.until_end()) == "fgh"


def test_task_9_all_requests_of_a_call_are_queued_or_none() -> None:
    """Oracle: by hand: one may run and one may wait: three are rejected, and then two are accepted."""
    core = AlphabetCore(max_seqs=1)
    with serving(core, max_num_seqs=1, max_num_waiting=1) as engine:
        requests = [engine.request("a", THREE_TOKENS) for _ in range(3)]
        with pytest.raises(QueueFullError):
            rejected(engine, requests)
        listener = RecordingListener()
        queued(engine.submit(requests[:2], listener))
        assert text(listener.until_end() + listener.until_end()) == "bcdbcd"


def test_task_9_a_draining_engine_rejects_at_once() -> None:
    """Oracle: by hand: raised at once, while a step runs, not by a future."""
    core = AlphabetCore()
    with serving(core) as engine:
        listener = RecordingListener()
        queued(engine.submit([engine.request("a", MANY_TOKENS, "a")], listener))
        listener.next()
        drained = engine.start_draining()
        cancelled(engine.cancel("unknown"))
        core.hold()
        core.wait_for_step()
        with pytest.raises(EngineStoppingError):
            rejected(engine, [engine.request("b", THREE_TOKENS)])
        ended = engine.cancel("a")
        core.allow_all_steps()
        cancelled(ended)
        value(drained, "the drain is not done, although its last request was cancelled")


@pytest.mark.parametrize("bad", [["a"], "a", 7, [None]])
def test_task_9_an_object_that_is_not_a_request_raises_type_error(bad: Any) -> None:
    """Oracle: by hand: raised at once and not counted, also by a stopped engine."""
    with serving(max_num_seqs=1, max_num_waiting=1) as engine:
        for _ in range(10):  # more than the queue's limit
            with pytest.raises(TypeError):
                with_timeout(engine.submit, bad, RecordingListener())
        listener = RecordingListener()
        queued(engine.submit([engine.request("a", THREE_TOKENS)], listener))
        assert text(listener.until_end()) == "bcd"
        with_timeout(engine.stop)
        with pytest.raises(TypeError):
            with_timeout(engine.submit, bad, RecordingListener())


def test_task_9_a_listener_that_is_not_callable_raises_type_error() -> None:
    """Oracle: by hand: raised at once, not by the engine's thread when the first event comes."""
    with serving() as engine, pytest.raises(TypeError):
        with_timeout(engine.submit, [engine.request("a", THREE_TOKENS)], None)


def test_task_9_the_caller_may_change_its_list_afterwards() -> None:
    """Oracle: by hand: the submitted request is queued, although the list is empty by then."""
    core, listener = AlphabetCore(), RecordingListener()
    core.hold()
    with serving(core) as engine:
        with_timeout(engine.submit, [engine.request("m", MANY_TOKENS)], RecordingListener())
        core.wait_for_step()
        requests = [engine.request("a", THREE_TOKENS, "mine")]
        answer = with_timeout(engine.submit, requests, listener)
        requests.clear()
        core.allow_all_steps()
        queued(answer)
        assert "add mine" in core.log, (
            "copy the caller's list: it may change before the engine's thread reads it"
        )
        assert text(listener.until_end()) == "bcd"


def test_task_9_a_posted_task_does_not_keep_the_engine_alive() -> None:
    """Oracle: a weak reference: the engine is dropped while a step runs. A lambda would hold `self`."""
    core = AlphabetCore()
    core.hold()
    engine = with_timeout(Engine, lambda: core, TOKENIZER, len(ALPHABET), EngineConfig(max_num_seqs=8))
    try:
        with_timeout(engine.submit, [engine.request("a", MANY_TOKENS)], RecordingListener())
        core.wait_for_step()
        with_timeout(engine.submit, [engine.request("b", MANY_TOKENS)], RecordingListener())
        reference, end = weakref.ref(engine), time.monotonic() + 1
        del engine
        while reference() is not None and time.monotonic() < end:
            time.sleep(0.01)
            gc.collect()
        assert reference() is None, "the posted task keeps the engine alive, so its thread never ends"
    finally:
        core.allow_all_steps()


def test_task_9_a_stopped_engine_cancels_active_requests_and_rejects_new_ones() -> None:
    """Oracle: by hand: active requests are cancelled, and any number of new ones is rejected."""
    with serving(max_num_waiting=1) as engine:
        listener = RecordingListener()
        queued(engine.submit([engine.request("a", MANY_TOKENS)], listener))
        with_timeout(engine.stop)
        assert listener.until_end()[-1].finish_reason == "abort"
        for _ in range(10):  # more than the queue's limit
            with pytest.raises(EngineStoppingError):
                rejected(engine, [engine.request("b", THREE_TOKENS)])


def test_task_9_listeners_and_new_clients_get_the_error_of_a_dead_engine() -> None:
    """Oracle: by hand: the listener and a later client get the error with its cause."""
    core, error = AlphabetCore(), SystemError("unforeseen")
    with serving(core) as engine:
        listener = RecordingListener()
        queued(engine.submit([engine.request("a", MANY_TOKENS)], listener))
        listener.next()
        core.dies = error
        with pytest.raises(EngineDeadError) as raised:
            listener.until_end()
        assert raised.value.__cause__ is error
        with pytest.raises(EngineDeadError):
            queued(engine.submit([engine.request("b", THREE_TOKENS)], RecordingListener()))


# `cancel`, which is given, for submitted requests


def test_task_9_cancel_takes_effect_before_the_next_step() -> None:
    """Oracle: by hand: requested during the second step; the third has no token for it."""
    core, listener = AlphabetCore(), RecordingListener()
    core.hold()
    with serving(core) as engine:
        with_timeout(
            engine.submit,
            [engine.request("a", MANY_TOKENS, "mine"), engine.request("m", MANY_TOKENS, "other")],
            listener,
        )
        core.wait_for_step()
        core.allow_step()
        core.wait_for_step()
        done = with_timeout(engine.cancel, "mine")
        assert not done.done()
        core.allow_step()
        core.wait_for_step()
        assert cancelled(done) is None
        assert core.log[-3:] == ["step", "cancel mine", "step"]
    mine = [event for event in listener.events if event.request_id == "mine"]
    assert (text(mine), mine[-1].finish_reason) == ("bc", "abort")
    assert mine[-1].usage is not None
    assert mine[-1].usage.completion_tokens == 2


def test_task_9_pages_are_free_when_cancel_is_done() -> None:
    """Oracle: the pool of a real core: all blocks are available, and the figures agree."""
    core = small_core()
    with serving(core) as engine:
        listener = RecordingListener()
        params = SamplingParams(max_tokens=50, ignore_eos=True, seed=1)
        queued(engine.submit([engine.request([1, 2, 3], params, "mine")], listener))
        listener.next()
        cancelled(engine.cancel("mine"))
        assert engine.stats.num_running == 0, (
            "the published figures still count the cancelled request as running"
        )
        assert free_blocks(core) == 40, "not all blocks were freed"
        assert listener.until_end()[-1].finish_reason == "abort"


def test_task_9_cancelling_unknown_or_finished_ids_is_ignored() -> None:
    """Oracle: by hand: an unknown id, a finished one, and others continue."""
    with serving() as engine:
        listener = RecordingListener()
        queued(engine.submit([engine.request("a", THREE_TOKENS, "a")], listener))
        listener.until_end()
        assert [cancelled(engine.cancel(name)) for name in ("unknown", "a")] == [None, None]
        other = RecordingListener()
        queued(engine.submit([engine.request("a", THREE_TOKENS, "a")], other))
        assert text(other.until_end()) == "bcd"


# Task 10: Engine.call


def test_task_10_call_returns_the_value_of_the_function() -> None:
    """Oracle: by hand, and the name of the thread that it ran in."""
    with serving() as engine:
        assert with_timeout(engine.call, lambda: 6 * 7) == 42
        assert with_timeout(engine.call, threading.current_thread).name == "tiny-llm-engine"
        assert with_timeout(engine.call, lambda: None) is None


def test_task_10_call_raises_the_error_of_the_function() -> None:
    """Oracle: by hand: the error reaches only the caller; the engine continues."""
    with serving() as engine:
        listener = RecordingListener()
        queued(engine.submit([engine.request("a", MANY_TOKENS)], listener))
        with pytest.raises(ZeroDivisionError):
            with_timeout(engine.call, lambda: 1 // 0)
        assert with_timeout(engine.call, lambda: 7) == 7
        assert text(listener.next()) == "b"


def test_task_10_call_runs_the_function_between_two_steps() -> None:
    """Oracle: by hand: called during a step; it runs after that step, before the next one."""
    core = AlphabetCore()
    core.hold()
    with serving(core) as engine:
        with_timeout(engine.submit, [engine.request("a", MANY_TOKENS)], RecordingListener())
        core.wait_for_step()
        called = background(engine.call, partial(core.log.append, "called"))

        def steps() -> None:
            while not called.done():
                core.allow_step()
                core.wait_for_step()

        with_timeout(steps)
        value(
            called,
            "`Engine.call` does not return: the function is never run, or only after all steps",
        )
        first = core.log.index("called")
        assert core.log[first - 1] == "step"
        assert core.log[first + 1] == "step"


def test_task_10_nested_calls_do_not_deadlock() -> None:
    """Oracle: by hand: a thread that waits for itself waits forever."""
    with serving() as engine:
        assert with_timeout(engine.call, lambda: engine.call(lambda: engine.call(lambda: 7))) == 7


def test_task_10_a_call_to_a_stopped_engine_raises_an_error() -> None:
    """Oracle: the docstring of `stop`: an error instead of a deadlock.

    The calling thread has the ident of the engine's ended thread, which an operating system may reuse.
    """
    with serving() as engine:
        thread, inbox = with_timeout(engine.call, threading.current_thread), vars(engine)["_inbox"]
        with_timeout(engine.stop)

        def called() -> object:
            vars(thread)["_ident"] = vars(inbox)["_runner"] = threading.get_ident()
            try:
                return engine.call(lambda: 7)
            except EngineStoppingError as error:
                return error

        assert isinstance(with_timeout(called), EngineStoppingError), (
            "`call` ran the function although the engine's thread has ended: a new thread may have the ident "
            "of that thread, so compare thread objects, not idents (`_inbox.is_mine` compares idents, too)"
        )


@pytest.mark.parametrize("is_stopped", [False, True])
def test_task_10_an_object_that_is_not_callable_raises_type_error(is_stopped: bool) -> None:
    """Oracle: the docstring: raised in the calling thread, before anything is posted."""
    with serving() as engine:
        if is_stopped:
            with_timeout(engine.stop)
        with pytest.raises(TypeError, match="must be callable"):
            with_timeout(engine.call, 7)
