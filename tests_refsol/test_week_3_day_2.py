"""Day 3.2: attention over scattered pages, beams that share them, and a batch manager that runs on them.

When these tests pass, you have the engine of this course: requests of all kinds share one pool of pages, a
step is one packed pass, and no request's tokens depend on the rest of the batch. The tests are in
`week_3_day_2/`.
"""

from week_3_day_2.beams import *
from week_3_day_2.compaction import *
from week_3_day_2.manager import *
from week_3_day_2.packed import *
from week_3_day_2.pages import *
from week_3_day_2.steps import *
from week_3_day_2.whole_requests import *
