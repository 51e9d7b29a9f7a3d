"""Day 3.7: the engine as a server: one thread owns the arrays and serves any number of clients.

When these tests pass, requests from any thread and any event loop run in one batch; the request of a client
that leaves is cancelled before the next step, an error reaches only the request that caused it, and the
engine can drain and stop.
"""

from week_3_day_7.admission import *
from week_3_day_7.alphabet import *
from week_3_day_7.coroutines import *
from week_3_day_7.iterations import *
from week_3_day_7.requests import *
from week_3_day_7.serving import *
from week_3_day_7.step import *
from week_3_day_7.threads import *
from week_3_day_7.timeouts import *
