"""A conversation with a model: its messages, its answers as they stream, and its place in the context.

It does not know about the terminal.
"""

from bisect import bisect_left
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

from tiny_llm import LLM, SamplingParams, TextDelta

from .answer_stats import AnswerMeter, AnswerStats

Message = dict[str, str]
_NEARLY = 0.9  # of the tokens that fit before the oldest exchanges are dropped


class Exchange(NamedTuple):
    """A question and its answer; the answer may have been stopped."""

    question: str
    answer: str


class Prompt(NamedTuple):
    """A question, the exchanges before it, and the token ids of both.

    num_dropped: how many older exchanges had to be left out.
    """

    question: str
    exchanges: Sequence[Exchange]
    token_ids: list[int]
    num_dropped: int


class Conversation:
    """An optional system message, and exchanges with a model: questions, each with its answer.

    cut_short: why the last answer stopped before the model was done, in words; None if the model was done.
    stats: measurements of the last answer; None before the first.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        self.system = system
        self.exchanges: Sequence[Exchange] = ()
        self.cut_short: str | None = None
        self.stats: AnswerStats | None = None
        self._llm = llm
        self._params = params
        self._num_retries = 0
        self._dropped: list[Exchange] = []  # the model no longer sees them
        self._unanswered: str | None = None  # the last question, if its answer was stopped before any text

    @property
    def model_name(self) -> str:
        """The name of the model that answers."""
        return self._llm.model_name

    @property
    def context(self) -> int:
        """The maximum number of tokens of a prompt and its answer together."""
        return self._llm.max_model_len

    @property
    def is_greedy(self) -> bool:
        """Whether the same question always gets the same answer."""
        return self._params.temperature == 0

    @property
    def messages(self) -> list[Message]:
        """All messages, as a chat template and the server's API take them, with those that were dropped."""
        return self._messages([*self._dropped, *self.exchanges])

    def reset(self) -> None:
        """Forget everything except the system message."""
        self.exchanges = ()
        self._dropped, self._unanswered = [], None
        self.stats = self.cut_short = None

    def set_system(self, text: str | None) -> None:
        """Set the system message; None removes it.

        Raises ValueError if the chat template rejects it, or if it leaves no space for a question.
        """
        before, self.system = self.system, text
        try:
            self._check_fits(self._encode((), "Hello"))
        except ValueError:
            self.system = before
            raise

    def restore(self, messages: Sequence[Message]) -> None:
        """Replace the system message and the exchanges with those of saved messages.

        Raises ValueError unless the messages are an optional system message and then questions (user) and
        answers (assistant), alternating.
        """
        system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        rest = messages[system is not None :]
        if len(rest) % 2 or any(m["role"] != ("user", "assistant")[i % 2] for i, m in enumerate(rest)):
            raise ValueError("messages must alternate between user and assistant, and end with an answer")
        self.reset()
        self.system = system
        pairs = zip(rest[::2], rest[1::2], strict=True)
        self.exchanges = [Exchange(question["content"], answer["content"]) for question, answer in pairs]

    def prepare(self, question: str) -> Prompt:
        """Make the prompt for `question`; drop the oldest exchanges if they leave too little for the answer.

        If any must be dropped, enough are dropped to leave half of the context free: dropping changes
        the start of the prompt, so the prefix cache no longer helps and the whole prompt is computed again.

        Raises ValueError, with advice, if the question does not fit even without exchanges.
        """
        return self._fit(self.exchanges, question)

    def prepare_retry(self) -> Prompt:
        """Make the prompt for the last question again; its new answer replaces the old one.

        A question whose answer was stopped before any text is asked again. The next answers are drawn with
        another seed. Raises ValueError if there is no question yet.
        """
        if not self.exchanges and self._unanswered is None:
            raise ValueError("no question yet")
        self._num_retries += 1
        if self._unanswered is not None:
            return self._fit(self.exchanges, self._unanswered)
        return self._fit(self.exchanges[:-1], self.exchanges[-1].question)

    @property
    def is_nearly_full(self) -> bool:
        """Whether the next questions are likely to drop the oldest exchanges."""
        return self.stats is not None and self.stats.num_tokens >= _NEARLY * self._most_prompt_tokens

    def answer(self, prompt: Prompt) -> Generator[TextDelta, None, None]:
        """Stream the answer to a prepared prompt. Closing the generator stops the answer.

        At the end, the question and the text that has arrived join the exchanges, unless no text has arrived.
        """
        left = self.context - len(prompt.token_ids)
        params = self._limited_params(left)
        hits_before = self._llm.engine.stats.prefix_cache_hits
        self.cut_short = None
        meter, text = AnswerMeter(), ""
        try:
            with closing(self._llm.stream(prompt.token_ids, params)) as deltas:
                for delta in deltas:
                    meter.count(len(delta.token_ids))
                    text += delta.text
                    if delta.finish_reason == "length":
                        self.cut_short = self._why_cut_short(params)
                    yield delta
        finally:
            num_cached = self._llm.engine.stats.prefix_cache_hits - hits_before
            self.stats = meter.stats(len(prompt.token_ids), num_cached)
            is_new = len(prompt.exchanges) + prompt.num_dropped == len(self.exchanges)  # not a retry
            self._unanswered = prompt.question if is_new and not text else None
            if text:
                self._dropped += self.exchanges[: prompt.num_dropped]
                self.exchanges = [*prompt.exchanges, Exchange(prompt.question, text)]

    @property
    def _most_prompt_tokens(self) -> int:
        """The longest prompt that leaves enough for an answer: `max_tokens`, or a quarter of the context."""
        quarter = self.context // 4
        answer = min(self._params.max_tokens or quarter, quarter)
        return self.context - max(answer, self._params.min_tokens, 1)

    def _messages(self, exchanges: Sequence[Exchange]) -> list[Message]:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for question, answer in exchanges:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return messages

    def _encode(self, exchanges: Sequence[Exchange], question: str) -> list[int]:
        template = self._llm.chat_template
        if template is None:
            raise ValueError(f"{self.model_name} has no chat template: use `tiny-llm generate`")
        messages = [*self._messages(exchanges), {"role": "user", "content": question}]
        return template.encode(messages, self._llm.tokenizer)

    def _fit(self, exchanges: Sequence[Exchange], question: str) -> Prompt:
        tokens = self._encode(exchanges, question)
        if len(tokens) <= self._most_prompt_tokens:
            return Prompt(question, exchanges, tokens, num_dropped=0)
        self._check_fits(self._encode((), question))
        num_dropped = self._num_to_drop(exchanges, question)
        kept = exchanges[num_dropped:]
        return Prompt(question, kept, self._encode(kept, question), num_dropped)

    def _num_to_drop(self, exchanges: Sequence[Exchange], question: str) -> int:
        """The fewest exchanges to drop that leave half of the context free, or at least enough to answer."""
        counts = range(len(exchanges) + 1)
        for most in (self.context // 2, self._most_prompt_tokens):
            count = bisect_left(counts, -most, key=lambda n: -len(self._encode(exchanges[n:], question)))
            if count < len(counts):
                return count
        return len(exchanges)

    def _check_fits(self, tokens: list[int]) -> None:
        if len(tokens) >= self.context:
            raise ValueError(
                f"the prompt has {len(tokens):,} tokens, but prompt and answer together must fit into "
                f"{self.context:,} tokens: shorten it, or {self._how_to_extend()}"
            )

    def _how_to_extend(self) -> str:
        """The option that sets the size of the context, as advice."""
        config, most = self._llm.engine_config, self._llm.model_config.max_position_embeddings
        if self.context >= most:
            return "use a model with a longer context"
        option = "--kv-cache-memory" if config.num_blocks is None else "--num-blocks"
        option = option if config.max_model_len is None else "--max-model-len"
        return f"raise {option} (the model's own limit is {most:,} tokens)"

    def _limited_params(self, left: int) -> SamplingParams:
        max_tokens = min(self._params.max_tokens or left, left)
        seed = None if self._params.seed is None else self._params.seed + self._num_retries
        return replace(self._params, max_tokens=max_tokens, seed=seed)

    def _why_cut_short(self, params: SamplingParams) -> str:
        if params.max_tokens == self._params.max_tokens:
            return f"stopped at --max-tokens {params.max_tokens}"
        return f"stopped: the context of {self.context:,} tokens is full"
