"""3.2: What beams save by sharing blocks, how much forks copy, and what a search without sharing costs.

Beam search on the embedded model. Counts in each step: the entries in the beams' block tables, the distinct
blocks among them, and the blocks copied because two beams continue in the same block. Predicted from the
beams' tokens: beams share a block if all their tokens up to its end are equal. They share at least the blocks
that the prompt fills, and at most all except the last block of each. Then one search is repeated with
separate requests, which compute the whole text of every beam again, with and without a prefix cache.

\b
pdm run lab beams
pdm run lab beams --prompt-len 64 --output-len 128 --plot beams.svg
"""

from collections import Counter
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import typer
from tiny_llm.beam_search import BeamSearch
from tiny_llm.model import Model
from tiny_llm.policies import NoPrefixSharing
from tiny_llm.prefix_sharing import PrefixSharing
from tiny_llm.step import StepLogits

from result import Column, Line, Pair, Picture, Point, Progress, Result, Table, percent
from tiny_llm import LLM, BeamSearchParams, EngineCore, PagedBatchManager, Policies, SamplingParams

WIDTHS = (2, 4, 6)
BLOCK_SIZE = 16
SHORT_PROMPT, SHORT_OUTPUT = 19, 58  # tokens: like the means of instruction data
AGAIN_WIDTH, AGAIN_PROMPT, AGAIN_OUTPUT = 4, 64, 8  # of the search that is repeated without sharing
PUBLISHED = "38-55% for short prompts, 44-66% for chats"  # in the PagedAttention paper, for widths 2 to 6
TEXT = (
    "Once upon a time, in a small house by the sea, there lived a cat who could read. Every morning she took "
    "a book from the shelf, carried it to the window and turned its pages with one paw until the boats came "
    "back. Nobody in the village knew about it but the old baker, who had found her one day asleep on an "
    "atlas, and had asked her, half in jest, where the wind would come from tomorrow. She had put her paw on "
    "a valley far in the north, and the next day it snowed. Since then he brought her a fish each week, and "
    "asked no more than one question. In the spring of the great flood, when the bridge was gone and no "
    "letters came, the whole village stood before the small house, and the baker, who had grown very old, "
    "said to her: "
)


def measure(
    progress: Progress,
    prompt_len: Annotated[int, typer.Option(min=2, max=512, help="Tokens of the longer prompt.")] = 161,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens generated after the prompt.")] = 48,
) -> Result:
    """Search after a short prompt and after a longer one; then search again without sharing."""
    pages = max(WIDTHS) * _blocks(prompt_len + output_len)
    llm = LLM(block_size=BLOCK_SIZE, num_blocks=pages, max_num_seqs=max(WIDTHS), enable_prefix_caching=False)
    text = llm.tokenizer.encode(TEXT)
    text *= -(-prompt_len // len(text))
    short = Task(text[: min(SHORT_PROMPT, prompt_len)], min(SHORT_OUTPUT, output_len))
    again = Task(text[: min(AGAIN_PROMPT, prompt_len)], min(AGAIN_OUTPUT, output_len))
    runs: list[Run] = []
    searches: list[Found] = []
    total = 2 * len(WIDTHS) + len(WAYS)
    for task in (short, Task(text[:prompt_len], output_len)):
        for width in WIDTHS:
            progress("beams: searches:", len(runs), total)
            runs.append(_search(llm, task, width))
    for way in WAYS:
        progress("beams: searches:", len(runs) + len(searches), total)
        searches.append(way.search(llm, again))
    progress("beams", total, total)
    return Result(
        title="Beams on shared blocks",
        question="Beams have most tokens in common. What does it save to store and compute them once?",
        tables=[_table_of_savings(runs), _table_of_ways(searches, again)],
        conclusion=_conclusion(runs[-1], searches),
        picture=_picture(runs[len(WIDTHS) :]),
    )


class Task(NamedTuple):
    """A prompt as token ids, and the number of tokens to generate."""

    prompt: list[int]
    output_len: int

    @property
    def name(self) -> str:
        """The label in tables."""
        return f"{len(self.prompt)} in, {self.output_len} out"

    def params(self, width: int) -> BeamSearchParams:
        """Parameters of a search whose hypotheses all have the same length."""
        return BeamSearchParams(beam_width=width, max_tokens=self.output_len, ignore_eos=True)

    def lengths(self) -> range:
        """The length of each beam in tokens, in every step after prefill."""
        return range(len(self.prompt) + 1, len(self.prompt) + self.output_len)

    def predict_savings(self, width: int, shared: Callable[[int], int]) -> float:
        """The share of blocks saved over a run if beams of n tokens share shared(n) blocks.

        The prefill step has one beam, which saves nothing.
        """
        logical = _blocks(len(self.prompt)) + sum(width * _blocks(n) for n in self.lengths())
        return sum((width - 1) * shared(n) for n in self.lengths()) / logical

    def least(self, width: int) -> float:
        """Saved share if beams diverge at their first token: they share the blocks that the prompt fills."""
        return self.predict_savings(width, lambda _: len(self.prompt) // BLOCK_SIZE)

    def most(self, width: int) -> float:
        """Saved share if beams diverge at their last token: they share all blocks before the last."""
        return self.predict_savings(width, lambda n: (n - 1) // BLOCK_SIZE)


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


# ---- What beams hold ----


class Beam(NamedTuple):
    """A beam in a step: its tokens that have keys and values, and its blocks.

    blocks_before: the blocks of its table before the step.
    """

    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    blocks_before: tuple[int, ...]

    @property
    def is_copied(self) -> bool:
        """True if the step replaced its last block by a copy."""
        return self.blocks_before != self.blocks[: len(self.blocks_before)]


class Step(NamedTuple):
    """One step of a search, and the number of tokens it computed."""

    beams: list[Beam]
    computed: int

    @property
    def logical(self) -> int:
        """Entries in the block tables."""
        return sum(len(beam.blocks) for beam in self.beams)

    @property
    def physical(self) -> Pair:
        """Distinct blocks; predicted: distinct token sequences up to the end of a block."""
        texts = {beam.tokens[: end + BLOCK_SIZE] for beam in self.beams for end in self._starts(beam)}
        return Pair(len(texts), len({block for beam in self.beams for block in beam.blocks}))

    @property
    def copies(self) -> Pair:
        """Blocks copied on write; predicted: of beams that diverge within a block, all except one copy it."""
        parents = Counter(beam.tokens[:-1] for beam in self.beams if (len(beam.tokens) - 1) % BLOCK_SIZE)
        return Pair(
            sum(children - 1 for children in parents.values()), sum(beam.is_copied for beam in self.beams)
        )

    @staticmethod
    def _starts(beam: Beam) -> range:
        return range(0, len(beam.tokens), BLOCK_SIZE)


class RecordingManager(PagedBatchManager):
    """A batch manager for one search that records the blocks of its beams in every step."""

    def __init__(self, pages: int, max_seqs: int, model: Model) -> None:
        super().__init__(pages, BLOCK_SIZE, max_seqs, model=model)
        self.steps: list[Step] = []

    def process_batch(self) -> StepLogits:
        """Run the step and record its beams."""
        before = {beam.seq_id: tuple(beam.table.blocks) for beam in self.running}
        computed = sum(beam.num_computed for beam in self.running)
        logits = super().process_batch()
        beams = [
            Beam(
                tuple(beam.tokens(0, beam.table.num_tokens)),
                tuple(beam.table.blocks),
                before.get(beam.seq_id, ()),
            )
            for beam in self.running
        ]
        self.steps.append(Step(beams, sum(beam.num_computed for beam in self.running) - computed))
        return logits


class Run(NamedTuple):
    """A search inside the engine, step by step."""

    task: Task
    width: int
    steps: list[Step]

    @property
    def savings(self) -> Pair:
        """The share of blocks that sharing saves, summed over steps."""
        logical = sum(step.logical for step in self.steps)
        physical = map(sum, zip(*(step.physical for step in self.steps), strict=True))
        return Pair(*(1 - blocks / logical for blocks in physical))

    @property
    def copies(self) -> Pair:
        """Blocks copied on write."""
        return Pair(*map(sum, zip(*(step.copies for step in self.steps), strict=True)))

    @property
    def computed(self) -> int:
        """Tokens that went through the model."""
        return sum(step.computed for step in self.steps)


def _search(llm: LLM, task: Task, width: int) -> Run:
    pages = width * _blocks(len(task.prompt) + task.output_len)
    manager = RecordingManager(pages, width, llm.model)
    core = EngineCore(manager, llm.model_config.eos_token_ids)
    search = core.add_beam_search("search", task.prompt, task.params(width))
    while search.beams:
        core.step()
    return Run(task, width, manager.steps)


def _table_of_savings(runs: Sequence[Run]) -> Table:
    return Table(
        f"Blocks of {BLOCK_SIZE} tokens that sharing saves over a whole search. The PagedAttention paper "
        f"reports, for its models and requests, {PUBLISHED}",
        [
            Column("task", "tokens"),
            Column("width", "beams"),
            Column("least", "at least", percent),
            Column("most", "at most", percent),
            Column("saved", "saved", percent),
            Column("copies", "blocks\ncopied"),
        ],
        [
            (
                run.task.name,
                run.width,
                run.task.least(run.width),
                run.task.most(run.width),
                run.savings,
                run.copies,
            )
            for run in runs
        ],
    )


def _picture(runs: Sequence[Run]) -> Picture:
    lines = []
    for run in runs:
        for half, name in enumerate(Pair._fields):
            shares = (1 - step.physical[half] / step.logical for step in run.steps)
            points = [Point(found, share) for found, share in enumerate(shares, start=1)]
            lines.append(Line(f"{run.width} beams", points, is_predicted=name == "predicted"))
    return Picture(
        title=f"Blocks that beams save by sharing, prompt of {len(runs[0].task.prompt)} tokens",
        x="generated tokens",
        y="blocks saved",
        lines=lines,
        y_is_share=True,
    )


# ---- The same search without sharing ----


class Found(NamedTuple):
    """The result of a search: tokens and score of each hypothesis, best first; tokens computed; seconds."""

    hypotheses: list[tuple[tuple[int, ...], float]]
    computed: int
    seconds: float


class Way(NamedTuple):
    """A way to search. predict: the number of tokens that it computes."""

    name: str
    search: Callable[[LLM, Task], Found]
    predict: Callable[[Task], int]


def _inside(llm: LLM, task: Task) -> Found:
    """`LLM.beam_search`, timed; a second, recorded search counts the tokens that it computes."""
    start = perf_counter()
    [output] = llm.beam_search([task.prompt], task.params(AGAIN_WIDTH))
    seconds = perf_counter() - start
    found = [(beam.tokens[len(task.prompt) :], beam.score) for beam in output.sequences]
    return Found(found, _search(llm, task, AGAIN_WIDTH).computed, seconds)


def _predict_inside(task: Task) -> int:
    """The prompt once, then one token of each beam in every step."""
    return len(task.prompt) + AGAIN_WIDTH * len(task.lengths())


def _outside(llm: LLM, task: Task, prefix: Callable[..., Any]) -> Found:
    """Search with one independent request for each beam and step, which returns the likeliest next tokens."""
    pages = 2 * AGAIN_WIDTH * _blocks(len(task.prompt) + task.output_len)
    policies = Policies(prefix=prefix)
    manager = PagedBatchManager(pages, BLOCK_SIZE, AGAIN_WIDTH, model=llm.model, policies=policies)
    core = EngineCore(manager, llm.model_config.eos_token_ids)
    search = BeamSearch(task.params(AGAIN_WIDTH), llm.model_config.eos_token_ids)
    computed, start = 0, perf_counter()
    while search.beams:
        texts = [[*task.prompt, *beam.tokens] for beam in search.beams]
        answers = _ask(core, texts, search.num_candidates)
        computed += sum(answer.computed for answer in answers)
        search.advance([answer.likeliest for answer in answers])
    found = [(ended.hypothesis.tokens, ended.score) for ended in search.ended]
    return Found(found, computed, perf_counter() - start)


class Answer(NamedTuple):
    """The likeliest next tokens with their log-probabilities, and the number of tokens computed for them."""

    likeliest: Sequence[tuple[int, float]]
    computed: int


def _ask(core: EngineCore, texts: Sequence[list[int]], num_likeliest: int) -> list[Answer]:
    """Run one request for each text, all at once."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=num_likeliest)
    for number, tokens in enumerate(texts):
        core.add_request(str(number), tokens, params)
    answers: dict[int, Answer] = {}
    while core.has_work:
        for output in core.step():
            number = int(output.seq_id)
            assert output.logprobs is not None
            computed = len(texts[number]) - output.num_cached_tokens
            answers[number] = Answer(output.logprobs.top, computed)
    return [answers[number] for number in range(len(texts))]


def _predict_outside(task: Task) -> int:
    """The whole text of each beam in every step; the prefill step has one beam."""
    return len(task.prompt) + AGAIN_WIDTH * sum(task.lengths())


def _predict_cached(task: Task) -> int:
    """The same without the full blocks before the last token, which are in the cache."""
    return len(task.prompt) + AGAIN_WIDTH * sum((n - 1) % BLOCK_SIZE + 1 for n in task.lengths())


WAYS = (
    Way("in the engine, shared blocks", _inside, _predict_inside),
    Way("requests, prefix cache", lambda llm, task: _outside(llm, task, PrefixSharing), _predict_cached),
    Way("requests, no cache", lambda llm, task: _outside(llm, task, NoPrefixSharing), _predict_outside),
)


def _table_of_ways(searches: Sequence[Found], task: Task) -> Table:
    """Times are predicted as proportional to the tokens computed."""
    first, least = searches[0], WAYS[0].predict(task)
    return Table(
        f"One search with {AGAIN_WIDTH} beams, {task.name}; predicted time: in proportion to tokens computed",
        [
            Column("way", "way"),
            Column("computed", "tokens\ncomputed"),
            Column("seconds", "seconds", "{:.2f}".format),
            Column("times", "times\nas long", "{:.1f}".format),
            Column("equal", "equal\nbeams"),
        ],
        [
            (
                way.name,
                Pair(way.predict(task), found.computed),
                found.seconds,
                Pair(way.predict(task) / least, found.seconds / first.seconds),
                Pair(AGAIN_WIDTH, _num_equal(found, first)),
            )
            for way, found in zip(WAYS, searches, strict=True)
        ],
    )


def _num_equal(search: Found, other: Found) -> int:
    """Hypotheses of the same rank that have the same tokens and the same score, to the last bit."""
    return sum(a == b for a, b in zip(search.hypotheses, other.hypotheses, strict=True))


def _conclusion(run: Run, searches: Sequence[Found]) -> str:
    inside, cached, plain = searches
    equal = min(_num_equal(search, inside) for search in searches)
    return (
        f"{run.width} beams save {percent(run.savings.measured)} of the blocks ({run.task.name}) and copy "
        f"{run.copies.measured} on write. A search that computes every beam again in each step takes "
        f"{plain.seconds / inside.seconds:.1f} times as long; with a prefix cache "
        f"{cached.seconds / inside.seconds:.1f} times. {equal} of {AGAIN_WIDTH} beams have the same tokens "
        "and the same score in all three ways."
    )
