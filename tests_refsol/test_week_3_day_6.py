"""Day 3.6: preemption: choosing the sequence to preempt, and swapping its blocks to the host and back.

When these tests pass, you have both ways to continue when blocks run out: the newest sequence is preempted,
and later either recomputes its blocks or swaps them in from the host, where shared blocks are stored once.
"""

from week_3_day_6.host_blocks import *
from week_3_day_6.policy import *
from week_3_day_6.round_trips import *
from week_3_day_6.swap_in import *
from week_3_day_6.swap_out import *
from week_3_day_6.two_pools import *
