"""Day 3.6: more users than memory: which sequence is preempted, and how its blocks go to the host and back.

When it passes, you have the two ways to go on when blocks run out: the newest sequence gives its blocks up,
and later either computes them again or finds them on the host, where what several share is stored once.
"""

from week_3_day_6.host_blocks import *
from week_3_day_6.policy import *
from week_3_day_6.swap_in import *
from week_3_day_6.swap_out import *
from week_3_day_6.there_and_back import *
from week_3_day_6.two_pools import *
