"""Day 3.1: how many holders each block has, and which blocks a sequence's tokens are in.

When it passes, you have pages: blocks from anywhere in the pool look like one text to their owner, several
sequences hold the same block, and only the block in which two of them would write is ever copied. The tests
are in `week_3_day_1/`.
"""

from week_3_day_1.allocator import *
from week_3_day_1.tables import *
