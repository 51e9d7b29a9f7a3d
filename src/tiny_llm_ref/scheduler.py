"""The order in which requests are served: priorities with ageing, so that no request waits forever.

A request's priority key is fixed at arrival, so the order of all requests, waiting and running, never
changes. The first one in this order is never preempted while another runs, so one request always makes
progress.
"""


class AgedPriority:
    """Makes priority keys.

    patience: a request that is less urgent by k levels of priority is overtaken by fewer than k * patience
    later arrivals. 0: requests are served in the order of arrival. Raises ValueError for a patience below 0.
    """

    def __init__(self, patience: int = 32) -> None:
        if patience < 0:
            raise ValueError(f"patience must be at least 0 requests, not {patience}")
        self.patience = patience

    def key(self, number: int, priority: int) -> int:
        """The priority key of the `number`-th arrival, counted from 0. The lowest key is served first.

        A lower priority is more urgent, and may be negative. A request of priority p + k is overtaken by
        those requests of priority p that arrive fewer than k * `patience` arrivals later, and by no others of
        that priority. Requests with the same key, or with the same priority, are served in the order of
        arrival.

        >>> policy = AgedPriority(patience=3)
        >>> [policy.key(number, priority) for number, priority in enumerate([1, 0, 0, 0])]
        [3, 1, 2, 3]
        """
        return number + self.patience * priority
