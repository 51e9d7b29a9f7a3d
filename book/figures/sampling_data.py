"""The data of the interactive figure of day 1.7: a lab's logits, and the random numbers of a few seeds."""

import json
from pathlib import Path
from typing import Any

from tiny_llm_ref.sampler import uniform

RESULT = Path(__file__).parents[1] / "results" / "sampling.json"
NUM_SEEDS, NUM_INDICES = 10, 20


def data() -> dict[str, Any]:
    """The lab's prompts with their logits, and `uniform(seed, index)` as `uniform[seed][index]`."""
    prompts = json.loads(RESULT.read_text(encoding="utf-8"))["json"]["data"]["prompts"]
    numbers = [[uniform(seed, index) for index in range(NUM_INDICES)] for seed in range(NUM_SEEDS)]
    return {"prompts": prompts, "uniform": numbers}
