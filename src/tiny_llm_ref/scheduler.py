"""The order of service: priorities that age, so that no request waits for ever.

A request's key is fixed when it arrives, so the order of all requests, waiting and running, never changes.
The first one in it is never preempted while another runs, so some request always advances.
"""


class AgedPriority:
    """patience: how many later arrivals a request lets pass for each step of priority between them.

    Raises ValueError for a patience below 0. With patience 0 the order is the order of arrival.
    """

    def __init__(self, patience: int = 32) -> None:
        if patience < 0:
            raise ValueError(f"patience must be at least 0 requests, not {patience}")
        self.patience = patience

    def key(self, number: int, priority: int) -> int:
        """The priority key of the `number`-th arrival, counted from 0. The lowest key is served first.

        A lower priority is more urgent, and may be negative. A request of priority p + 1 is passed by those
        of priority p that arrive fewer than `patience` requests later, and by no others. Requests with one
        key are served in the order of their arrival, and so are those of one priority.

        >>> policy = AgedPriority(patience=3)
        >>> [policy.key(number, priority) for number, priority in enumerate([1, 0, 0, 0])]
        [3, 1, 2, 3]
        """
        return number + self.patience * priority
