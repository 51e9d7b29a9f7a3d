"""Day 3.1: reference counts of blocks, and the block table of a sequence.

When these tests pass, you have paging: a sequence's blocks may be anywhere in the pool, several sequences
share blocks, and a block is copied only if one of them writes to it. The tests are in `week_3_day_1/`.
"""

from week_3_day_1.allocator import *
from week_3_day_1.tables import *
