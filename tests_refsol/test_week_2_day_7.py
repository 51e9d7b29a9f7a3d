"""Day 2.7: continuous batching over contiguous caches: requests join and leave between any two steps.

When these tests pass, you have a batch manager that serves many requests at once: it admits them in order,
packs their tokens into one pass, and no request's tokens depend on the other requests in the batch.
"""

from week_2_day_7.admission import *
from week_2_day_7.attention import *
from week_2_day_7.ending import *
from week_2_day_7.steps import *
