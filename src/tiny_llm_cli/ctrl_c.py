"""Ctrl-C while an answer streams."""

import signal
from types import FrameType
from typing import Self


class CtrlC:
    """Turns Ctrl-C into a request to stop the answer, for the duration of the block.

    Once `answering` is set, Ctrl-C only sets `pressed`, so the stream is closed between two pieces of text.
    Before that (a long prompt takes seconds to compute) it raises KeyboardInterrupt, and so does a second
    Ctrl-C.
    """

    def __init__(self) -> None:
        self.answering = False
        self.pressed = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed or not self.answering:
            raise KeyboardInterrupt
        self.pressed = True
