"""How many requests may wait: too many are refused at once, in the thread that submits them.

Knows nothing of the engine except the figures that the engine publishes after each task and each step.
"""


class AdmissionControl:
    def num_waiting(self) -> int:
        """Requests that wait now; below 0: so many more could start in the next step.

        The sum of the requests that wait in the engine and of those that were admitted here and that the
        engine has not seen yet, less the sequences that can still start: `max_num_seqs` less those that run,
        and never below 0. None can start while `is_crowded`: the pool has no blocks for them, or the
        requests that wait already take the free places. Read `self.occupancy` once: the engine may replace it
        between two reads.

        >>> control = AdmissionControl(limit=4, max_num_seqs=2)
        >>> control.num_waiting()
        -2
        >>> control.occupancy = Occupancy(num_seen=0, num_waiting=5, num_running=1)
        >>> control.num_waiting()
        4
        """
        now = self.occupancy
        free = 0 if now.is_crowded else max(0, self._max_num_seqs - now.num_running)
        return now.num_waiting + self._num_admitted - now.num_seen - free

    def admit(self, num_requests: int) -> None:
        """Count requests as admitted, all of them or none.

        Raises `QueueFullError` as `check` does, and then counts nothing. Any thread may call it. Looking and
        counting are one operation under `_lock`: of two threads that ask for the last place at the same
        moment, one must be refused.

        >>> control = AdmissionControl(limit=1, max_num_seqs=2)
        >>> control.admit(3)
        >>> control.check(0), control.num_waiting()
        (None, 1)
        """
        with self._lock:
            self.check(num_requests)
            self._num_admitted += num_requests
