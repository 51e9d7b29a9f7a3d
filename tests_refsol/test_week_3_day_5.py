"""Day 3.5: sliding-window attention: queries see only the last W tokens, and passed blocks are released.

When these tests pass, you have windows on pages: tokens that no query can see any more are neither read nor
stored; layers with and without windows share one pool; and a cached prefix is used if every group of layers
has the blocks that it still needs. The tests are in `week_3_day_5/`.
"""

from week_3_day_5.windowed_batches import *
from week_3_day_5.windowed_prefixes import *
from week_3_day_5.windowed_reading import *
from week_3_day_5.windowed_tables import *
