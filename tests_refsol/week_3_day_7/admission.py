"""Tasks 7 and 8: how many requests wait, counted from any thread."""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from tiny_llm.admission_control import AdmissionControl, Occupancy
from tiny_llm.errors import QueueFullError

from week_3_day_7.patience import background, value, within


def check_waiting(control: AdmissionControl, waiting: int, admitted: int = 0) -> None:
    """Compare how many requests wait, and say for which figures."""
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
def test_task_7_requests_wait_less_the_sequences_that_can_start(occupancy: Occupancy, waiting: int) -> None:
    """Oracle: by hand, at most 4 sequences at once. In a crowd none can start; never fewer than none."""
    control = AdmissionControl(None, 4)
    control.occupancy = occupancy
    check_waiting(control, waiting)


def test_task_7_what_the_engine_has_seen_is_counted_once() -> None:
    """Oracle: by hand: 7 requests have reached the engine that were not admitted here: 7 fewer wait."""
    control = AdmissionControl(None, 0)
    control.occupancy = Occupancy(num_seen=7, num_waiting=7)
    check_waiting(control, 0)


def test_task_7_asking_changes_nothing() -> None:
    """Oracle: by hand."""
    control = AdmissionControl(1, 2)
    control.occupancy = Occupancy(num_waiting=3, num_running=1)
    assert [control.num_waiting() for _ in range(3)] == [2, 2, 2]


def test_task_7_the_figures_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand: 2 requests wait, 2 can start; then 2 run. None is left over, before or after it.

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
        assert control.num_waiting() == 0, "figures of two moments are mixed"
        assert len(reads) == number, "the engine may replace `occupancy` between two reads"


# Task 8: AdmissionControl.admit


def test_task_8_admitted_requests_wait_until_the_engine_has_seen_them() -> None:
    """Oracle: by hand: 3 and 2 requests, 2 sequences at once; the engine has then seen 4, and all 5."""
    control = AdmissionControl(None, 2)
    control.admit(3)
    check_waiting(control, 1, admitted=3)
    control.admit(2)
    check_waiting(control, 3, admitted=5)
    control.occupancy = Occupancy(num_seen=4, num_waiting=2, num_running=2, is_crowded=True)
    check_waiting(control, 3, admitted=5)
    control.occupancy = Occupancy(num_seen=5, num_waiting=0, num_running=2)
    check_waiting(control, 0, admitted=5)


def test_task_8_all_or_none() -> None:
    """Oracle: by hand: one may wait, one may start. Three are refused and leave nothing behind; two fit."""
    control = AdmissionControl(1, 1)
    for _ in range(3):
        with pytest.raises(QueueFullError):
            control.admit(3)
    control.admit(2)
    check_waiting(control, 1, admitted=2)
    with pytest.raises(QueueFullError):
        control.admit(1)
    control.admit(0)


def test_task_8_a_limit_of_none_refuses_nothing() -> None:
    """Oracle: the docstring of the class."""
    control = AdmissionControl(None, 1)
    control.admit(10**6)
    check_waiting(control, 10**6 - 1, admitted=10**6)


class SlowFigures(Occupancy):
    """An occupancy that takes a while to read: other threads run in the meantime."""

    @property
    def num_seen(self) -> int:  # type: ignore[override]
        """Read as a field."""
        time.sleep(0.01)
        return self[0]

    def __iter__(self) -> Iterator[int]:
        """Unpacked."""
        time.sleep(0.01)
        return super().__iter__()


def test_task_8_the_last_places_are_taken_once() -> None:
    """Oracle: by hand: ten threads ask at the same moment, three may wait. Without the lock all come in."""
    control = AdmissionControl(3, 1)
    control.occupancy = SlowFigures(is_crowded=True)
    asked: list[Future[Any]] = [background(control.admit, 1) for _ in range(10)]
    refused = 0
    for each in asked:
        try:
            value(each, "`AdmissionControl.admit` does not return in one of ten threads")
        except QueueFullError:
            refused += 1
    came = 10 - refused
    why = ": the count was not under the lock" if came > 3 else ""
    assert came == 3, f"ten threads asked for 3 places, {came} came in{why}"


def test_task_8_a_refusal_does_not_keep_the_lock() -> None:
    """Oracle: by hand: a thread that is refused, and one that asks after it."""
    control = AdmissionControl(1, 0)
    with pytest.raises(QueueFullError):
        within(control.admit, 2)
    assert within(control.admit, 1) is None
