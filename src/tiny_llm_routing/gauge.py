"""A number that replicas report now and then, corrected by what the router knows has changed since."""

from collections import deque
from typing import NamedTuple

MOST_PAST = 4096  # removed items that are remembered; more between two reports make the value too high


class _Past(NamedTuple):
    """An item that was removed."""

    added_at: float
    removed_at: float
    amount: int


class Gauge:
    """The sum of the amounts of some items at a replica, such as the queued tokens of its requests.

    The replica reports the sum. The router adds and removes the items that it knows, and other routers may
    have added more. The value is:

    - what the last report said, less the amounts of the items that were added here before it was made and
      removed after; at least 0,
    - plus the amounts of the items that were added here after it was made and are still there.

    Without a report, or after `forget`, it is the sum of the router's own items. All methods are idempotent:
    adding an item again replaces it, and removing an unknown one does nothing. Times must not decrease.

    value: the current estimate. It is 0 again when all items are removed and the last report said 0.
    """

    def __init__(self) -> None:
        self.value = 0
        self._reported = 0
        self._made_at: float | None = None
        self._items: dict[str, tuple[float, int]] = {}  # when it was added, and its amount
        self._past: deque[_Past] = deque(maxlen=MOST_PAST)  # removed since the last report, oldest first
        self._own = 0  # all items
        self._since = 0  # items that were added after the report was made
        self._gone = 0  # amounts in the report whose items were removed after it was made

    def __contains__(self, item: str) -> bool:
        """True if the router has added the item and not removed it."""
        return item in self._items

    def add(self, item: str, amount: int, now: float) -> None:
        """Add an item of this amount."""
        self.remove(item, now)
        self._items[item] = (now, amount)
        self._own += amount
        self._since += amount
        self._update()

    def remove(self, item: str, now: float) -> None:
        """Remove an item, unless it is unknown or was removed before."""
        if item not in self._items:
            return
        added_at, amount = self._items.pop(item)
        self._own -= amount
        self._past.append(_Past(added_at, now, amount))  # a report that was made before may still come
        if self._made_at is None or added_at > self._made_at:
            self._since -= amount
        else:
            self._gone += amount
        self._update()

    def take(self, reported: int, made_at: float) -> None:
        """Replace the last report; one that is older than it is ignored."""
        if self._made_at is not None and made_at < self._made_at:
            return
        self._reported, self._made_at = reported, made_at
        while self._past and self._past[0].removed_at <= made_at:
            self._past.popleft()
        self._gone = sum(past.amount for past in self._past if past.added_at <= made_at)
        self._since = sum(amount for added_at, amount in self._items.values() if added_at > made_at)
        self._update()

    def forget(self) -> None:
        """Drop the last report."""
        self._reported, self._made_at, self._gone, self._since = 0, None, 0, self._own
        self._update()

    def _update(self) -> None:
        self.value = max(0, self._reported - self._gone) + self._since
