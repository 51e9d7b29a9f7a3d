"""`/v1/completions`: continues texts or token ids."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Literal

from fastapi import APIRouter, Request, Response
from tiny_llm.prompts import PlainPrompt

from tiny_llm import Logprob, RequestEvent, RequestUsage
from tiny_llm_checkpoints.tokenizer import Detokenizer, Tokenizer

from .answer_form import plain_form
from .answers import Completion, CompletionChoice, CompletionLogprobs, Usage, new_head
from .bodies import JsonRoute
from .request_log import track
from .run import PromptEvent, Run
from .schema import CompletionRequest
from .service import Service, sampling_params
from .sse import REQUEST_ID, STREAMED, EventStream, unless_disconnected
from .stream_events import CompletionEvent, CompletionPart, null_usage, stop_reason_of
from .token_names import name_of, offsets_in

OBJECT: Literal["text_completion"] = "text_completion"

Positions = tuple[dict[int, Logprob] | None, ...]


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter(route_class=JsonRoute)

    @routes.post("/v1/completions", response_model=Completion, responses=STREAMED)
    async def complete(
        body: CompletionRequest, request: Request, response: Response
    ) -> Completion | Response:
        """Continue one or more prompts, each with `n` choices."""
        service.check(body, len(_prompts(body)))
        work = _Work(service, body, service.cache_salt(body, request))
        prompts = await work.encoded()
        run = await service.begin(
            prompts,
            work.params,
            work.id,
            "prompt",
            form=work.form,
            may_shorten=service.may_shorten(body),
            arrival=work.arrival,
        )
        track(request, run.stats)
        if body.stream:
            return EventStream(work.stream(run), run.cancel, {REQUEST_ID: work.id})
        response.headers[REQUEST_ID] = work.id
        return await unless_disconnected(request, work.whole(run), run.cancel)

    return routes


class _Work:
    """One request. Completion c of prompt p is choice p * n + c."""

    def __init__(self, service: Service, body: CompletionRequest, cache_salt: str) -> None:
        self.arrival = monotonic()
        self._service = service
        self._body = body
        self.prompts = _prompts(body)
        echoed = body.logprobs if body.echo else None
        self.params = sampling_params(
            body,
            service.sampling_defaults,
            max_tokens=max(1, body.max_tokens),
            logprobs=body.logprobs,
            prompt_logprobs=echoed,
            cache_salt=cache_salt,
        )
        self.form = plain_form(body.form, body.form_field)
        if self.form is not None:
            self.params = replace(self.params, structured_outputs=self.form.params)
        self._head = new_head("cmpl", service.model_name)
        self._no_usage = null_usage(body.stream_options)
        self.id: str = self._head["id"]
        self._choices: list[_Choice] = [_Choice(self, index) for index in range(len(self.prompts) * body.n)]
        self._prompt_texts: list[_PromptText] = []
        self._prompt_positions: dict[int, Positions] = {}
        self._usages: list[RequestUsage] = []

    async def encoded(self) -> list[PlainPrompt]:
        """Return the prompts for the engine, which adds special tokens to texts."""
        if self._body.add_special_tokens:
            return self.prompts
        encode = self.tokenizer.encode
        return await asyncio.to_thread(
            lambda: [encode(one) if isinstance(one, str) else one for one in self.prompts]
        )

    async def whole(self, run: Run) -> Completion:
        """Wait for the whole answer."""
        await self._read_prompts(run.prompts)
        choices: dict[int, list[CompletionPart]] = {choice.index: [] for choice in self._choices}
        async with aclosing(run.events()) as events:
            async for one in events:
                part = self._take(one)
                choices[part["index"]].append(part)
        return Completion(
            **self._head, choices=[_joined(parts) for parts in choices.values()], usage=Usage.of(self._usages)
        )

    async def stream(self, run: Run) -> AsyncGenerator[CompletionEvent | None, None]:
        """Yield an event for each new part of a choice; None after a time without events."""
        await self._read_prompts(run.prompts)
        options = self._body.stream_options
        async with aclosing(run.steps(self._service.config.keep_alive)) as steps:
            async for step in steps:
                if not step:
                    yield None
                for one in step:
                    part = self._take(one)
                    if part["text"] or part["logprobs"] or part["finish_reason"]:
                        yield {**self._head, "object": OBJECT, "choices": [part], **self._no_usage}
        if options is not None and options.include_usage:
            yield {**self._head, "object": OBJECT, "choices": [], "usage": Usage.of(self._usages)}

    def _take(self, one: PromptEvent) -> CompletionPart:
        event = one.event if self._body.max_tokens else _without_output(one.event)
        if event.usage is not None:
            self._usages.append(event.usage)
        positions: Positions = self._prompt_positions.setdefault(one.prompt, event.prompt_logprobs or ())
        choice = self._choices[one.prompt * self._body.n + event.index]
        return choice.take(event, self._prompt_texts[one.prompt], positions)

    async def _read_prompts(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Decode each prompt once if its choices need it, in a thread: a long prompt takes a while."""
        if self._body.logprobs is None and not self._body.echo:
            self._prompt_texts = [_PromptText(self.tokenizer.stream())] * len(prompts)
            return
        pairs = zip(self.prompts, prompts, strict=True)
        self._prompt_texts = await asyncio.to_thread(lambda: [self._prompt_text(*pair) for pair in pairs])

    def _prompt_text(self, prompt: PlainPrompt, tokens: tuple[int, ...]) -> "_PromptText":
        skips, tokenizer = self._body.skip_special_tokens, self.tokenizer
        stream = tokenizer.stream(tokens, skip_special_tokens=skips)
        if not self._body.echo:
            return _PromptText(stream)
        echo = prompt if isinstance(prompt, str) else tokenizer.decode(tokens, skip_special_tokens=skips)
        return _PromptText(stream, echo, tokens, offsets_in(echo, tokens, tokenizer))

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._service.llm.tokenizer


@dataclass(frozen=True)
class _PromptText:
    """The parts of a prompt that its choices need. stream: decodes the tokens that follow the prompt.

    echo: the text that each choice starts with. tokens, offsets: the echo's tokens and their offsets in it.
    """

    stream: Detokenizer
    echo: str = ""
    tokens: tuple[int, ...] = ()
    offsets: list[int] = field(default_factory=list)


class _Choice:
    """A choice that grows with each event; the first event adds the echoed prompt."""

    def __init__(self, work: _Work, index: int) -> None:
        self.index = index
        self._work = work
        self._offset = 0
        self._detokenizer: Detokenizer | None = None

    def take(self, event: RequestEvent, prompt: _PromptText, prompt_positions: Positions) -> CompletionPart:
        """Return what an event adds. prompt_positions: the prompt's log-probabilities, if requested."""
        text, tokens = event.text, event.token_ids
        positions: Positions = event.logprobs or ()
        offsets: list[int] = []
        if self._detokenizer is None:
            self._detokenizer = prompt.stream.fork()
            self._offset = len(prompt.echo)
            text = prompt.echo + text
            if prompt_positions:
                tokens, positions, offsets = (
                    prompt.tokens + tokens,
                    prompt_positions + positions,
                    [*prompt.offsets],
                )
        if positions:
            offsets += self._offsets(event.token_ids, self._detokenizer)
        return {
            "index": self.index,
            "text": text,
            "logprobs": self._logprobs(tokens, positions, offsets) if positions else None,
            "finish_reason": event.finish_reason,
            **stop_reason_of(event),
        }

    def _offsets(self, tokens: tuple[int, ...], detokenizer: Detokenizer) -> list[int]:
        """Return the offsets of new tokens in the choice's text."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(detokenizer.push(token))
        return offsets

    def _logprobs(
        self, tokens: tuple[int, ...], positions: Positions, offsets: list[int]
    ) -> CompletionLogprobs:
        own = [
            None if position is None else position[token]
            for token, position in zip(tokens, positions, strict=True)
        ]
        return CompletionLogprobs(
            tokens=[self._name(token, one) for token, one in zip(tokens, own, strict=True)],
            token_logprobs=[None if one is None else one.logprob for one in own],
            top_logprobs=[None if position is None else self._top(position) for position in positions],
            text_offset=offsets,
        )

    def _top(self, position: dict[int, Logprob]) -> dict[str, float]:
        """Return log-probabilities by token name. Of two tokens with one name, the sampled one is kept."""
        found: dict[str, float] = {}
        for token, one in position.items():
            found.setdefault(self._name(token, one), one.logprob)
        return found

    def _name(self, token: int, known: Logprob | None) -> str:
        """Return a token's name. known: its entry from the engine; None for a prompt's first token."""
        tokenizer = self._work.tokenizer
        return name_of(token, known.decoded_token if known else tokenizer.token_text(token), tokenizer)


def _without_output(event: RequestEvent) -> RequestEvent:
    """Remove the output of a prompt with max_tokens 0: the engine computes one token anyway."""
    usage = None if event.usage is None else replace(event.usage, completion_tokens=0)
    reason = "length" if event.finish_reason == "stop" else event.finish_reason
    return replace(
        event, text="", token_ids=(), logprobs=None, finish_reason=reason, stop_reason=None, usage=usage
    )


def _prompts(body: CompletionRequest) -> list[PlainPrompt]:
    """Return the prompts as a list, even if there is only one."""
    prompt = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _joined(parts: list[CompletionPart]) -> CompletionChoice:
    """Join the parts of a choice."""
    logprobs = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    whole = None
    if logprobs:
        fields = CompletionLogprobs.model_fields
        whole = CompletionLogprobs(
            **{name: [x for one in logprobs for x in getattr(one, name)] for name in fields}
        )
    text = "".join(part["text"] for part in parts)
    return CompletionChoice.model_validate({**parts[-1], "text": text, "logprobs": whole})
