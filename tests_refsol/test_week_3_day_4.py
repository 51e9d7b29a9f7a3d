"""Day 3.4: prompts with the same prefix find each other's keys and values and do not compute them again.

When it passes, you have a cache that knows full blocks by their content and by all that comes before. It
keeps them when their sequences have ended, shares them with the next ones, and evicts the least recently used
when pages are short. The tests are in `week_3_day_4/`.
"""

from week_3_day_4.blocks_by_content import *
from week_3_day_4.idle_blocks import *
from week_3_day_4.named_prefixes import *
from week_3_day_4.sharing_policy import *
