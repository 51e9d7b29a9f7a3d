"""Random prompts for benchmarks, and the conditions that their figures depend on."""

import random
from collections.abc import Callable, Mapping

from tiny_llm import LLM

from . import facts
from .engine import control_token_ids

Progress = Callable[[str, int, int], None]


class RandomPrompts:
    """Prompts of random token ids, without control tokens. The same seed gives the same prompts."""

    def __init__(self, llm: LLM, seed: int) -> None:
        control = control_token_ids(llm)
        self._ids = [token for token in range(llm.model_config.vocab_size) if token not in control]
        self._random = random.Random(seed)

    def tokens(self, count: int) -> list[int]:
        """Return the next prompt: `count` token ids."""
        return self._random.choices(self._ids, k=count)

    def length(self, low: int, high: int) -> int:
        """Return a random number of tokens from `low` to `high`, both included."""
        return self._random.randint(low, high)


def run_conditions(llm: LLM, run: Mapping[str, object]) -> dict[str, object]:
    """What the figures of a run depend on: its own numbers, the engine's configuration, the machine."""
    machine = facts.machine()
    engine = {
        name: getattr(llm.engine_config, name)
        for name in (
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_cache_dtype",
            "activation_bits",
        )
    }
    return {
        "model": llm.model_name,
        **run,
        **engine,
        "num_blocks": llm.core.manager.capacity.num_blocks,
        **machine,
    }
