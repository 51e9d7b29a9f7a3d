"""Admission control: the figures are unpacked, and the lock is taken and given back by hand."""


class AdmissionControl:
    """The exercises only."""

    def num_waiting(self) -> int:
        """Nothing can start in a crowd, or where too many run."""
        num_seen, num_waiting, num_running, is_crowded = self.occupancy
        waiting = num_waiting + (self._num_admitted - num_seen)
        if is_crowded or num_running > self._max_num_seqs:
            return waiting
        return waiting - (self._max_num_seqs - num_running)

    def admit(self, num_requests: int) -> None:
        """The lock goes back in `finally`."""
        self._lock.acquire()
        try:
            self.check(num_requests)
            self._num_admitted += num_requests
        finally:
            self._lock.release()
