"""Day 3.5: layers whose queries see only the last W tokens, and pages that go back while the text goes on.

When it passes, you have windows on pages: what no query can see any more is neither read nor held; layers
with and without windows share one pool; and a prefix is found where every group of layers has what it still
needs. The tests are in `week_3_day_5/`.
"""

from week_3_day_5.windowed_batches import *
from week_3_day_5.windowed_prefixes import *
from week_3_day_5.windowed_reading import *
from week_3_day_5.windowed_tables import *
