"""Steps of the reference's batch manager for the interactive timeline: the same requests, many settings.

The manager runs without a model, so nothing is computed; scheduling does not depend on the tokens. The prefix
cache is off.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

from tiny_llm_ref.paged_batch import PagedBatchManager
from tiny_llm_ref.policies import NoPreemption, Policies
from tiny_llm_ref.preemption import NewestFirst
from tiny_llm_ref.sampling_params import SamplingParams
from tiny_llm_ref.sequence import PagedSequence, SequenceState
from tiny_llm_ref.step import Plan

BLOCK_SIZE, MAX_SEQS = 4, 4
BUDGETS = (8, 16, 32)
POOLS = (12, 16, 24)
POLICIES = {
    "recompute": Policies(preemption=NewestFirst()),
    "swap": Policies(preemption=NewestFirst(), swap_blocks=32),
    "none": Policies(preemption=NoPreemption()),
}


class Request(NamedTuple):
    """A request: the step before which it arrives, and the tokens of its prompt and of its output."""

    arrival: int
    prompt: int
    output: int


REQUESTS = {
    "A": Request(1, 16, 12),
    "B": Request(3, 16, 15),
    "C": Request(5, 10, 9),
    "D": Request(7, 18, 6),
    "E": Request(8, 13, 5),
}


class Now(NamedTuple):
    """What is compared before and after a step: state, computed tokens, and whether it has run before."""

    state: SequenceState
    num_computed: int


def frames() -> dict[str, Any]:
    """The requests, and for each mode, budget and pool the recorded run."""
    runs = {
        f"{mode}/{budget}/{pool}": Recorder(mode, budget, pool).record()
        for mode, budget, pool in product(POLICIES, BUDGETS, POOLS)
    }
    requests = {name: list(request) for name, request in REQUESTS.items()}
    return {"blockSize": BLOCK_SIZE, "requests": requests, "runs": runs}


class Recorder:
    """Serves the requests and records one cell for each request and step.

    A cell is a letter and numbers. `w`: waits for the first time. `p`, `d`, `r`: computes the tokens
    start .. stop - 1 of its prompt, of its output, or again after a preemption. `i`: runs and computes
    nothing. `x`: is preempted, with the number of tokens to recompute; then `q`: waits. `o`: is swapped out,
    with the number of blocks; then `h`: waits on the host. `s`: is swapped in, with the number of blocks,
    start and stop. `!` at the end: has its last token. `-`: has not arrived, or has ended.
    """

    def __init__(self, mode: str, budget: int, pool: int) -> None:
        self._manager = PagedBatchManager(
            pool, BLOCK_SIZE, MAX_SEQS, max_batched_tokens=budget, policies=POLICIES[mode]
        )
        self._rows: dict[str, list[str]] = {name: [] for name in REQUESTS}
        self._computed = dict.fromkeys(REQUESTS, 0)  # the most tokens that were ever computed
        self._has_run: set[str] = set()
        self._used: list[int] = []

    def record(self) -> dict[str, Any]:
        """Run until all requests have ended; return the rows of cells and the blocks in use in each step."""
        step = 0
        while self._manager.has_work or step < max(one.arrival for one in REQUESTS.values()):
            step += 1
            for name, request in REQUESTS.items():
                if request.arrival == step:
                    params = SamplingParams(max_tokens=request.output, ignore_eos=True)
                    self._manager.add_request([1] * request.prompt, name, params)
            self._step()
        rows = {name: " ".join(cell or "-" for cell in cells) for name, cells in self._rows.items()}
        return {"rows": rows, "used": self._used}

    def _step(self) -> None:
        manager = self._manager
        before = {name: Now(one.state, one.num_computed) for name, one in self._sequences()}
        logits = manager.process_batch()
        self._used.append(manager.allocator.num_blocks - manager.allocator.num_free)
        cells = dict.fromkeys(REQUESTS, "")
        for name, sequence in self._sequences():
            cells[name] = self._cell(name, sequence, before[name], manager.last_plan)
        manager.commit(dict.fromkeys(logits.row_of, 1))
        for name in list(logits.row_of):
            if len(manager.sequence(name).outputs) == REQUESTS[name].output:
                manager.finish(name)
                cells[name] += "!"
        for name, cell in cells.items():
            self._rows[name].append(cell)

    def _sequences(self) -> Iterator[tuple[str, PagedSequence]]:
        for name in REQUESTS:
            if self._manager.has_sequence(name):
                yield name, self._manager.sequence(name)

    def _cell(self, name: str, sequence: PagedSequence, before: Now, plan: Plan[PagedSequence]) -> str:
        chunk = next((one for one in plan.chunks if one.sequence is sequence), None)
        if sequence.state is not SequenceState.RUNNING:
            return self._waiting(name, sequence, before, plan)
        self._has_run.add(name)
        if chunk is None:
            return "i"
        start, stop = chunk.start, chunk.stop
        again = start < self._computed[name]
        self._computed[name] = max(self._computed[name], stop)
        if any(one is sequence for one in plan.swapped_in_sequences):
            num_blocks = -(-start // BLOCK_SIZE)
            return f"s{num_blocks},{start},{stop}"
        if again:
            return f"r{start},{stop}"
        return f"d{start},{stop}" if start >= REQUESTS[name].prompt else f"p{start},{stop}"

    def _waiting(self, name: str, sequence: PagedSequence, before: Now, plan: Plan[PagedSequence]) -> str:
        stopped = before.state is SequenceState.RUNNING
        if sequence.state is SequenceState.SWAPPED and sequence.swapped is not None:
            num_blocks = sum(len(table.host_blocks) for table in sequence.swapped.tables)
            return f"o{num_blocks}" if stopped else "h"
        if stopped:
            return f"x{before.num_computed}"
        return "q" if name in self._has_run else "w"
