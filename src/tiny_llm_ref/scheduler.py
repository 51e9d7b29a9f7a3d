"""Whose turn it is: priorities that age, so that everybody's turn comes.

A request's turn is fixed when it arrives, so the order of all who wait and run never changes: whoever comes
first in it is never preempted while another runs, and somebody always gets on.
"""


class AgedPriority:
    """patience: how many later arrivals a request lets pass for each step of priority between them."""

    def __init__(self, patience: int = 32) -> None:
        if patience < 0:
            raise ValueError(f"patience must be at least 0 requests, not {patience}")
        self.patience = patience

    def turn(self, number: int, priority: int) -> int:
        """When it is the turn of the request that arrived as the `number`-th, counted from 0; lowest first.

        A request of priority p + 1 is passed by those of priority p that arrive fewer than `patience`
        requests later, and by no others. Requests of one turn go in the order of their arrival, and so do
        those of one priority.
        """
        return number + self.patience * priority
