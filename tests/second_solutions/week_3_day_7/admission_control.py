"""Limit how many requests may wait. Further ones are rejected immediately, in the thread that submits them.

This module sees nothing of the engine except the occupancy that it publishes after each task and step.
"""


class AdmissionControl:
    def num_waiting(self) -> int:
        now = self.occupancy
        free = 0 if now.is_crowded else max(0, self._max_num_seqs - now.num_running)
        return now.num_waiting + self._num_admitted - now.num_seen - free

    def admit(self, num_requests: int) -> None:
        with self._lock:
            self.check(num_requests)
            self._num_admitted += num_requests
