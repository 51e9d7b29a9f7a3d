"""Traces: which requests arrive when. Made from a seed or recorded; replayed on simulated or real replicas.

A trace has conversations. Each turn's prompt is everything said before, answers included, and new text, so it
depends on the answers and arrives some time after the last one. Token ids only, no text.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from random import Random
from typing import Any, Self

FIRST_TOKEN, VOCAB = 100, 30_000  # token ids are drawn from this range, which every real vocabulary has


@dataclass(frozen=True)
class Turn:
    """A request of a conversation.

    text: the new tokens of its prompt. num_outputs: tokens of its answer. think_seconds: from the end of the
    previous answer until this request arrives; for the first turn nothing.
    """

    text: tuple[int, ...]
    num_outputs: int
    think_seconds: float = 0.0


@dataclass(frozen=True)
class Conversation:
    """Requests that follow each other.

    arrival: when the first turn arrives, in seconds. system: the tokens before the first turn's text; other
    conversations may have the same. salt: the `cache_salt` of its requests.
    """

    arrival: float
    system: tuple[int, ...]
    turns: tuple[Turn, ...]
    salt: str = ""

    def num_prompt_tokens(self) -> int:
        """Return the tokens of all its prompts; a later prompt contains the earlier ones."""
        lengths = accumulate(len(turn.text) for turn in self.turns)
        answers = accumulate((turn.num_outputs for turn in self.turns[:-1]), initial=0)
        return len(self.system) * len(self.turns) + sum(lengths) + sum(answers)


@dataclass(frozen=True)
class Trace:
    """Conversations in order of arrival, and the seed of the simulated answers."""

    name: str
    conversations: tuple[Conversation, ...]
    seed: int = 0

    @property
    def num_requests(self) -> int:
        """The number of turns of all conversations."""
        return sum(len(conversation.turns) for conversation in self.conversations)

    def answer(self, conversation: int, turn: int) -> list[int]:
        """Return the simulated answer to a turn: always the same tokens, whichever replica gives it."""
        num_outputs = self.conversations[conversation].turns[turn].num_outputs
        return _text(Random(f"{self.seed} {conversation} {turn}"), num_outputs)

    def to_json(self) -> str:
        """Return the trace as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, text: str) -> Self:
        """Return the trace of a text from `to_json`."""
        trace: dict[str, Any] = json.loads(text)
        conversations = (
            Conversation(
                one["arrival"],
                tuple(one["system"]),
                tuple(Turn(tuple(t["text"]), t["num_outputs"], t["think_seconds"]) for t in one["turns"]),
                one["salt"],
            )
            for one in trace["conversations"]
        )
        return cls(trace["name"], tuple(conversations), trace["seed"])


@dataclass(frozen=True)
class Sizes:
    """Sizes of a generated trace; ranges include both ends and are drawn evenly.

    num_systems: different system prompts. system: tokens of a system prompt. text: new tokens of a turn.
    outputs: tokens of an answer. turns: turns of a chat. think_seconds: mean time between an answer and the
    next turn.
    """

    num_systems: int = 8
    system: tuple[int, int] = (512, 1024)
    text: tuple[int, int] = (16, 128)
    outputs: tuple[int, int] = (16, 64)
    turns: tuple[int, int] = (2, 6)
    think_seconds: float = 4.0


def shared_prompts(num_conversations: int, rate: float, seed: int, sizes: Sizes) -> Trace:
    """Single requests that begin with one of the system prompts; a few of these are used most (Zipf).

    rate: mean arrivals per second, of a Poisson process.
    """
    numbers = Random(f"shared {seed}")
    systems = _Systems(numbers, sizes)
    conversations = [
        Conversation(arrival, systems.draw(), (_turn(numbers, sizes),))
        for arrival in _poisson(numbers, num_conversations, rate)
    ]
    return Trace("shared prompts", tuple(conversations), seed)


def chats(num_conversations: int, rate: float, seed: int, sizes: Sizes) -> Trace:
    """Conversations of several turns, each with one of the system prompts; rate: of conversations."""
    numbers = Random(f"chats {seed}")
    systems = _Systems(numbers, sizes)
    conversations = []
    for arrival in _poisson(numbers, num_conversations, rate):
        later = [
            _turn(numbers, sizes, numbers.expovariate(1 / sizes.think_seconds))
            for _ in range(numbers.randint(*sizes.turns) - 1)
        ]
        turns = (_turn(numbers, sizes), *later)
        conversations.append(Conversation(arrival, systems.draw(), turns))
    return Trace("chats", tuple(conversations), seed)


def bursts(num_conversations: int, rate: float, seed: int, sizes: Sizes) -> Trace:
    """Like `shared_prompts`, but requests arrive in 2 of each 8 seconds only, at four times the mean rate."""
    numbers = Random(f"bursts {seed}")
    systems = _Systems(numbers, sizes)
    conversations = [
        Conversation(moment // 2 * 8 + moment % 2, systems.draw(), (_turn(numbers, sizes),))
        for moment in _poisson(numbers, num_conversations, 4 * rate)
    ]
    return Trace("bursts", tuple(conversations), seed)


def unrelated(num_conversations: int, rate: float, seed: int, sizes: Sizes) -> Trace:
    """Single requests with nothing in common, as long as those of `shared_prompts`."""
    numbers = Random(f"unrelated {seed}")
    conversations = [
        Conversation(arrival, _system(numbers, sizes), (_turn(numbers, sizes),))
        for arrival in _poisson(numbers, num_conversations, rate)
    ]
    return Trace("unrelated", tuple(conversations), seed)


TRACES: dict[str, Callable[[int, float, int, Sizes], Trace]] = {
    "shared": shared_prompts,
    "chats": chats,
    "bursts": bursts,
    "unrelated": unrelated,
}


class _Systems:
    """System prompts; number k is drawn with a probability proportional to 1 / k."""

    def __init__(self, numbers: Random, sizes: Sizes) -> None:
        self._numbers = numbers
        self._systems = [_system(numbers, sizes) for _ in range(sizes.num_systems)]
        self._weights = [1 / (k + 1) for k in range(sizes.num_systems)]

    def draw(self) -> tuple[int, ...]:
        """Return one of the system prompts."""
        return self._numbers.choices(self._systems, self._weights)[0]


def _text(numbers: Random, length: int) -> list[int]:
    return numbers.choices(range(FIRST_TOKEN, VOCAB), k=length)


def _system(numbers: Random, sizes: Sizes) -> tuple[int, ...]:
    return tuple(_text(numbers, numbers.randint(*sizes.system)))


def _turn(numbers: Random, sizes: Sizes, think_seconds: float = 0.0) -> Turn:
    text = tuple(_text(numbers, numbers.randint(*sizes.text)))
    return Turn(text, numbers.randint(*sizes.outputs), think_seconds)


def _poisson(numbers: Random, count: int, rate: float) -> Sequence[float]:
    """The times of `count` arrivals."""
    return list(accumulate(numbers.expovariate(rate) for _ in range(count)))
