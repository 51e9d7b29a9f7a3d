"""Day 3.7, tasks 7 and 8: admission control: counting waiting requests from any thread."""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from tiny_llm.admission_control import AdmissionControl, Occupancy
from tiny_llm.errors import QueueFullError

from week_3_day_7.timeouts import background, value, with_timeout


def check_waiting(control: AdmissionControl, waiting: int, admitted: int = 0) -> None:
    """Assert the number of waiting requests; the message shows the figures."""
    found = control.num_waiting()
    assert found == waiting, (
        f"num_waiting() is {found} and should be {waiting}, after {admitted} were admitted, "
        f"with at most {vars(control)['_max_num_seqs']} sequences and {control.occupancy}"
    )


# Task 7: AdmissionControl.num_waiting


@pytest.mark.parametrize(
    ("occupancy", "waiting"),
    [
        (Occupancy(), -4),
        (Occupancy(num_running=3), -1),
        (Occupancy(num_running=4), 0),
        (Occupancy(num_running=5), 0),
        (Occupancy(num_waiting=2, num_running=4), 2),
        (Occupancy(num_waiting=2, num_running=1), -1),
        (Occupancy(num_waiting=2, num_running=1, is_crowded=True), 2),
        (Occupancy(num_running=0, is_crowded=True), 0),
    ],
)
def test_task_7_requests_that_can_start_do_not_count_as_waiting(occupancy: Occupancy, waiting: int) -> None:
    """Oracle: by hand, at most 4 sequences. If `is_crowded`, none can start.

    The count may be negative only without a crowd.
    """
    control = AdmissionControl(None, 4)
    control.occupancy = occupancy
    check_waiting(control, waiting)


@pytest.mark.parametrize(("seen", "waiting"), [(0, 0), (5, 1), (7, 3), (9, 5)])
def test_task_7_requests_that_the_engine_has_seen_are_counted_once(seen: int, waiting: int) -> None:
    """Oracle: by hand: 9 were admitted, at most 4 sequences: 4 run, and 5 wait, seen or not.

    Before the engine has seen any, 9 are on their way and 4 slots are free.
    """
    control = AdmissionControl(None, 4)
    vars(control)["_num_admitted"] = 9
    control.occupancy = Occupancy(seen, waiting, num_running=4 if seen else 0)
    check_waiting(control, 5, admitted=9)


def test_task_7_counting_the_waiting_requests_changes_nothing() -> None:
    """Oracle: by hand."""
    control = AdmissionControl(1, 2)
    control.occupancy = Occupancy(num_waiting=3, num_running=1)
    assert [control.num_waiting() for _ in range(3)] == [2, 2, 2]


def test_task_7_the_occupancy_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand: 2 requests wait and 2 can start; then 2 run. Both times no request waits.

    Here the engine replaces the figures after each read.
    """
    before, after = Occupancy(num_waiting=2), Occupancy(num_running=2)
    reads: list[Occupancy] = []

    def read(control: AdmissionControl) -> Occupancy:
        reads.append(before if len(reads) % 2 == 0 else after)
        return reads[-1]

    control = AdmissionControl(None, 2)
    monkeypatch.setattr(AdmissionControl, "occupancy", property(read), raising=False)
    for number in (1, 2):
        assert control.num_waiting() == 0, "figures of two different moments were mixed"
        assert len(reads) == number, "read `occupancy` once: the engine may replace it between two reads"


# Task 8: AdmissionControl.admit


def test_task_8_admitted_requests_wait_until_the_engine_has_seen_them() -> None:
    """Oracle: by hand: 3 and 2 requests, at most 2 sequences; then the engine has seen 4 and all 5."""
    control = AdmissionControl(None, 2)
    control.admit(3)
    check_waiting(control, 1, admitted=3)
    control.admit(2)
    check_waiting(control, 3, admitted=5)
    control.occupancy = Occupancy(num_seen=4, num_waiting=2, num_running=2, is_crowded=True)
    check_waiting(control, 3, admitted=5)
    control.occupancy = Occupancy(num_seen=5, num_waiting=0, num_running=2)
    check_waiting(control, 0, admitted=5)


def test_task_8_all_requests_of_a_call_are_admitted_or_none() -> None:
    """Oracle: by hand: one may wait and one may start. Three are rejected without a trace; two fit."""
    control = AdmissionControl(1, 1)
    for _ in range(3):
        with pytest.raises(QueueFullError):
            control.admit(3)
    control.admit(2)
    check_waiting(control, 1, admitted=2)
    with pytest.raises(QueueFullError):
        control.admit(1)
    control.admit(0)


def test_task_8_without_a_limit_every_request_is_admitted() -> None:
    """Oracle: the docstring of the class."""
    control = AdmissionControl(None, 1)
    control.admit(10**6)
    check_waiting(control, 10**6 - 1, admitted=10**6)


class SlowOccupancy(Occupancy):
    """An occupancy whose reads sleep, so that other threads run meanwhile."""

    @property
    def num_seen(self) -> int:  # type: ignore[override]
        """Sleep, then return the field."""
        time.sleep(0.01)
        return self[0]

    def __iter__(self) -> Iterator[int]:
        """Sleep, then unpack."""
        time.sleep(0.01)
        return super().__iter__()


def test_task_8_concurrent_calls_never_exceed_the_limit() -> None:
    """Oracle: by hand: ten threads call `admit` at once, three may wait.

    Without the lock all are admitted.
    """
    control = AdmissionControl(3, 1)
    control.occupancy = SlowOccupancy(is_crowded=True)
    calls: list[Future[Any]] = [background(control.admit, 1) for _ in range(10)]
    rejected = 0
    for each in calls:
        try:
            value(each, "`AdmissionControl.admit` does not return in one of ten threads")
        except QueueFullError:
            rejected += 1
    admitted = 10 - rejected
    why = ": count and admit under one lock" if admitted > 3 else ""
    assert admitted == 3, f"of ten requests for 3 places {admitted} were admitted{why}"


def test_task_8_a_rejected_call_releases_the_lock() -> None:
    """Oracle: by hand: one thread is rejected, and then another one calls `admit`."""
    control = AdmissionControl(1, 0)
    with pytest.raises(QueueFullError):
        with_timeout(control.admit, 2)
    assert with_timeout(control.admit, 1) is None
