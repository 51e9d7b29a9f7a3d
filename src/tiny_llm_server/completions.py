"""`/v1/completions`: texts or token ids, continued."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Literal

from fastapi import APIRouter, Request, Response
from tiny_llm.engine import Prompt

from tiny_llm import Logprob, RequestEvent, RequestUsage
from tiny_llm_checkpoints.tokenizer import Detokenizer, Tokenizer

from .answers import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
    new_head,
    null_usage,
    stop_reason_of,
)
from .bodies import JsonRoute
from .request_log import track
from .run import PromptEvent, Run
from .schema import CompletionRequest
from .service import Service, sampling_params
from .sse import REQUEST_ID, STREAMED, EventStream, unless_left
from .token_names import name_of, offsets_in

OBJECT: Literal["text_completion"] = "text_completion"

Places = tuple[dict[int, Logprob] | None, ...]


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter(route_class=JsonRoute)

    @routes.post("/v1/completions", response_model=Completion, responses=STREAMED)
    async def complete(
        body: CompletionRequest, request: Request, response: Response
    ) -> Completion | Response:
        """Continue prompts: `n` times each, all of them together."""
        service.check(body, len(_prompts(body)))
        work = _Work(service, body, service.cache_salt(body, request))
        prompts = await asyncio.to_thread(work.encoded)
        run = await service.begin(
            prompts, work.params, work.id, "prompt", may_shorten=service.may_shorten(body)
        )
        track(request, run.stats)
        if body.stream:
            return EventStream(work.stream(run), run.cancel, {REQUEST_ID: work.id})
        response.headers[REQUEST_ID] = work.id
        return await unless_left(request, work.whole(run), run.cancel)

    return routes


class _Work:
    """One request: completion c of prompt p is choice p * n + c."""

    def __init__(self, service: Service, body: CompletionRequest, cache_salt: str) -> None:
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
        self._head = new_head("cmpl", service.model_name)
        self._no_usage = null_usage(body.stream_options)
        self.id: str = self._head["id"]
        self._pieces: list[_Piece] = [_Piece(self, index) for index in range(len(self.prompts) * body.n)]
        self._prompt_texts: list[_PromptText] = []
        self._prompt_places: dict[int, Places] = {}
        self._usages: list[RequestUsage] = []

    def encoded(self) -> list[Prompt]:
        """The prompts for the engine, which frames a text as the tokenizer does unless that is not wanted."""
        if self._body.add_special_tokens:
            return self.prompts
        return [self.tokenizer.encode(one) if isinstance(one, str) else one for one in self.prompts]

    async def whole(self, run: Run) -> Completion:
        """Wait for all of it."""
        await asyncio.to_thread(self._read_prompts, run.prompts)
        choices: dict[int, list[CompletionChoice]] = {piece.index: [] for piece in self._pieces}
        async with aclosing(run.events()) as events:
            async for one in events:
                choice = self._take(one)
                choices[choice.index].append(choice)
        return Completion(
            **self._head, choices=[_joined(parts) for parts in choices.values()], usage=Usage.of(self._usages)
        )

    async def stream(self, run: Run) -> AsyncGenerator[Completion | None, None]:
        """An event for each piece that says something."""
        await asyncio.to_thread(self._read_prompts, run.prompts)
        options = self._body.stream_options
        async with aclosing(run.steps(self._service.config.keep_alive)) as steps:
            async for step in steps:
                if not step:
                    yield None
                for one in step:
                    choice = self._take(one)
                    if choice.text or choice.logprobs or choice.finish_reason:
                        yield Completion(**self._head, object=OBJECT, choices=[choice], **self._no_usage)
        if options is not None and options.include_usage:
            yield Completion(**self._head, object=OBJECT, choices=[], usage=Usage.of(self._usages))

    def _take(self, one: PromptEvent) -> CompletionChoice:
        event = one.event if self._body.max_tokens else _without_output(one.event)
        if event.usage is not None:
            self._usages.append(event.usage)
        places: Places = self._prompt_places.setdefault(one.prompt, event.prompt_logprobs or ())
        piece = self._pieces[one.prompt * self._body.n + event.index]
        return piece.take(event, self._prompt_texts[one.prompt], places)

    def _read_prompts(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Decode what the choices need of their prompts, once each; long ones take a while."""
        pairs = zip(self.prompts, prompts, strict=True)
        self._prompt_texts = [self._prompt_text(prompt, tokens) for prompt, tokens in pairs]

    def _prompt_text(self, prompt: Prompt, tokens: tuple[int, ...]) -> "_PromptText":
        skips, tokenizer = self._body.skip_special_tokens, self.tokenizer
        if self._body.logprobs is None and not self._body.echo:
            return _PromptText(tokenizer.stream())
        stream = tokenizer.stream(tokens, skip_special_tokens=skips)
        if not self._body.echo:
            return _PromptText(stream)
        echo = prompt if isinstance(prompt, str) else tokenizer.decode(tokens, skip_special_tokens=skips)
        return _PromptText(stream, echo, tokens, offsets_in(echo, tokens, tokenizer))

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self._service.llm.tokenizer


@dataclass(frozen=True)
class _PromptText:
    """A prompt as its choices see it. stream: for the tokens behind it.

    echo: the text that a choice begins with; tokens: those of the echo, and where each begins in it.
    """

    stream: Detokenizer
    echo: str = ""
    tokens: tuple[int, ...] = ()
    offsets: list[int] = field(default_factory=list)


class _Piece:
    """A choice as it comes: its first event brings the prompt, where that is echoed."""

    def __init__(self, work: _Work, index: int) -> None:
        self.index = index
        self._work = work
        self._offset = 0
        self._detokenizer: Detokenizer | None = None

    def take(self, event: RequestEvent, prompt: _PromptText, prompt_places: Places) -> CompletionChoice:
        """What an event adds to it. prompt_places: the prompt's log-probabilities, where these are wanted."""
        text, tokens = event.text, event.token_ids
        places: Places = event.logprobs or ()
        offsets: list[int] = []
        if self._detokenizer is None:
            self._detokenizer = prompt.stream.fork()
            self._offset = len(prompt.echo)
            text = prompt.echo + text
            if prompt_places:
                tokens, places, offsets = prompt.tokens + tokens, prompt_places + places, [*prompt.offsets]
        if places:
            offsets += self._offsets(event.token_ids, self._detokenizer)
        return CompletionChoice(
            index=self.index,
            text=text,
            logprobs=self._logprobs(tokens, places, offsets) if places else None,
            finish_reason=event.finish_reason,
            **stop_reason_of(event),
        )

    def _offsets(self, tokens: tuple[int, ...], detokenizer: Detokenizer) -> list[int]:
        """Where new tokens begin in the choice's text."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(detokenizer.push(token))
        return offsets

    def _logprobs(self, tokens: tuple[int, ...], places: Places, offsets: list[int]) -> CompletionLogprobs:
        own = [None if place is None else place[token] for token, place in zip(tokens, places, strict=True)]
        return CompletionLogprobs(
            tokens=[self._name(token, one) for token, one in zip(tokens, own, strict=True)],
            token_logprobs=[None if one is None else one.logprob for one in own],
            top_logprobs=[None if place is None else self._top(place) for place in places],
            text_offset=offsets,
        )

    def _top(self, place: dict[int, Logprob]) -> dict[str, float]:
        """The likeliest by their names; where two have one name, the chosen one is what it stands for."""
        found: dict[str, float] = {}
        for token, one in place.items():
            found.setdefault(self._name(token, one), one.logprob)
        return found

    def _name(self, token: int, known: Logprob | None) -> str:
        """known: what the engine says of it; nothing of a prompt's first token."""
        tokenizer = self._work.tokenizer
        return name_of(token, known.decoded_token if known else tokenizer.token_text(token), tokenizer)


def _without_output(event: RequestEvent) -> RequestEvent:
    """The same of a prompt that was not to be continued: one token was computed all the same."""
    usage = None if event.usage is None else replace(event.usage, completion_tokens=0)
    reason = "length" if event.finish_reason == "stop" else event.finish_reason
    return replace(
        event, text="", token_ids=(), logprobs=None, finish_reason=reason, stop_reason=None, usage=usage
    )


def _prompts(body: CompletionRequest) -> list[Prompt]:
    """One prompt or several, as a list."""
    prompt = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _joined(parts: list[CompletionChoice]) -> CompletionChoice:
    """The pieces of a choice in one."""
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    whole = None
    if logprobs:
        fields = CompletionLogprobs.model_fields
        whole = CompletionLogprobs(
            **{name: [x for one in logprobs for x in getattr(one, name)] for name in fields}
        )
    return parts[-1].model_copy(update={"text": "".join(part.text for part in parts), "logprobs": whole})
