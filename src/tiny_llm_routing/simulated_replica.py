"""A simulated replica: the engine's own scheduler and prefix cache, without arrays, on a clock of its own."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from tiny_llm.paged_batch import PagedBatchManager
from tiny_llm.policies import Policies
from tiny_llm.preemption import NewestFirst
from tiny_llm.prefix_sharing import PrefixSharing
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.scheduler import AgedPriority

from .reports import ReplicaReport, read_report
from .step_time import StepTime, StepWork


@dataclass(frozen=True)
class ReplicaSizes:
    """The sizes of a replica's engine, with the names of `EngineConfig`; the defaults are those of the
    embedded model.
    """

    num_blocks: int = 1456
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512


class Token(NamedTuple):
    """A token that a step has generated. num_cached_tokens: of the request's prompt."""

    request_id: str
    is_first: bool
    is_last: bool
    num_cached_tokens: int


class SimulatedReplica:
    """Runs requests step by step; the caller advances the clock.

    name: its id. A step lasts as long as `step_time` says. The answers are given, because nothing is
    computed.
    """

    def __init__(self, name: str, sizes: ReplicaSizes, step_time: StepTime) -> None:
        self.name = name
        self.manager = PagedBatchManager(
            sizes.num_blocks,
            sizes.block_size,
            sizes.max_num_seqs,
            max_batched_tokens=sizes.max_num_batched_tokens,
            policies=Policies(
                preemption=NewestFirst(), prefix=PrefixSharing, priority_key=AgedPriority().key
            ),
        )
        self._step_time = step_time
        self._answers: dict[str, list[int]] = {}
        self._ready: list[str] = []
        self._report: ReplicaReport | None = None  # the last one, unless something has changed since
        self.is_busy = False

    def add(self, request_id: str, prompt: list[int], salt: str, answer: list[int]) -> None:
        """Queue a request. Raises `RequestTooLargeError` if it can never run."""
        params = SamplingParams(max_tokens=len(answer), cache_salt=salt)
        self.manager.add_request(prompt, request_id, params)
        self._answers[request_id] = answer
        self._report = None

    def start_step(self) -> float | None:
        """Start the next step and return how many seconds it takes; None if there is nothing to do."""
        if not self.manager.has_work:
            return None
        self._ready = list(self.manager.process_batch())
        work = StepWork.of((chunk.start, chunk.stop) for chunk in self.manager.last_plan.chunks)
        self._report, self.is_busy = None, True
        return self._step_time.seconds(work)

    def end_step(self) -> list[Token]:
        """End the step, and return the tokens that it has generated; requests with their last one end."""
        tokens = []
        for request_id in self._ready:
            sequence, answer = self.manager.sequence(request_id), self._answers[request_id]
            number = len(sequence.outputs)
            self.manager.commit({request_id: answer[number]})
            is_last = number + 1 == len(answer)
            tokens.append(Token(request_id, number == 0, is_last, sequence.num_cached_tokens))
            if is_last:
                self.manager.finish(request_id)
                del self._answers[request_id]
        self._ready, self._report, self.is_busy = [], None, False
        return tokens

    def report(self, now: float) -> ReplicaReport:
        """Return the replica's report."""
        if self._report is None:
            self._report = read_report(self.manager, now)
        return replace(self._report, made_at=now)
