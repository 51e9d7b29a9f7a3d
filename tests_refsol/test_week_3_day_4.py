"""Day 3.4: prefix caching: prompts that share a prefix reuse its KV blocks.

When these tests pass, you have a cache that identifies full blocks by their tokens and all tokens before
them. It keeps them after their sequences finish, shares them with later ones, and evicts the least recently
used when pages are short. The tests are in `week_3_day_4/`.
"""

from week_3_day_4.blocks_by_content import *
from week_3_day_4.idle_blocks import *
from week_3_day_4.named_prefixes import *
from week_3_day_4.sharing_policy import *
