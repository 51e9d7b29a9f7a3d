"""`/v1/completions`: texts or token ids, continued."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from fastapi import APIRouter, Request, Response
from tiny_llm.engine import Prompt
from tiny_llm.tokenizer import Detokenizer, Tokenizer

from tiny_llm import Logprob, RequestEvent, RequestUsage

from .answers import Completion, CompletionChoice, CompletionLogprobs, Usage, new_head
from .bodies import JsonRoute
from .errors import refused
from .run import PromptEvent, Run
from .schema import CompletionRequest
from .service import Service, sampling_params
from .sse import REQUEST_ID, STREAMED, EventStream, unless_left
from .token_names import name_of

Places = tuple[dict[int, Logprob] | None, ...]


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter(route_class=JsonRoute)

    @routes.post("/v1/completions", response_model=Completion, responses=STREAMED)
    async def complete(
        body: CompletionRequest, request: Request, response: Response
    ) -> Completion | Response:
        """Continue prompts: `n` times each, all of them together."""
        service.check(body)
        work = _Work(service, body, service.cache_salt(body, request))
        run = await service.begin(work.prompts, work.params, work.id, "prompt")
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
        if len(self.prompts) > (most := service.max_prompts):
            raise refused(f"prompt: at most {most} prompts in one request, not {len(self.prompts)}", "prompt")
        echoed = body.logprobs if body.echo else None
        self.params = sampling_params(
            body,
            max_tokens=max(1, body.max_tokens),
            logprobs=body.logprobs,
            prompt_logprobs=echoed,
            cache_salt=cache_salt,
        )
        self._head = new_head("cmpl", service.model_name)
        self.id: str = self._head["id"]
        self._pieces: list[_Piece] = [_Piece(self, index) for index in range(len(self.prompts) * body.n)]
        self._prompt_places: dict[int, Places] = {}
        self._usages: list[RequestUsage] = []

    async def whole(self, run: Run) -> Completion:
        """Wait for all of it."""
        choices: dict[int, list[CompletionChoice]] = {piece.index: [] for piece in self._pieces}
        async with aclosing(run.events()) as events:
            async for one in events:
                choice = self._take(one, run.prompts)
                choices[choice.index].append(choice)
        return Completion(
            **self._head, choices=[_joined(parts) for parts in choices.values()], usage=Usage.of(self._usages)
        )

    async def stream(self, run: Run) -> AsyncGenerator[Completion | None, None]:
        """An event for each piece that says something."""
        options = self._body.stream_options
        async with aclosing(run.steps(self._service.config.keep_alive)) as steps:
            async for step in steps:
                if not step:
                    yield None
                for one in step:
                    choice = self._take(one, run.prompts)
                    if choice.text or choice.logprobs or choice.finish_reason:
                        yield Completion(**self._head, choices=[choice])
        if options is not None and options.include_usage:
            yield Completion(**self._head, choices=[], usage=Usage.of(self._usages))

    def _take(self, one: PromptEvent, prompts: list[tuple[int, ...]]) -> CompletionChoice:
        event = one.event if self._body.max_tokens else _without_output(one.event)
        if event.usage is not None:
            self._usages.append(event.usage)
        places: Places = self._prompt_places.setdefault(one.prompt, event.prompt_logprobs or ())
        tokens = prompts[one.prompt] if places else ()
        return self._pieces[one.prompt * self._body.n + event.index].take(event, tokens, places)

    def echo(self, index: int) -> str:
        """The text that a choice begins with."""
        if not self._body.echo:
            return ""
        prompt = self.prompts[index // self._body.n]
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self._service.llm.tokenizer

    def detokenizer(self) -> Detokenizer:
        """For one choice."""
        return self.tokenizer.stream(skip_special_tokens=self._body.skip_special_tokens)


class _Piece:
    """A choice as it comes: its first event brings the prompt, where that is echoed."""

    def __init__(self, work: _Work, index: int) -> None:
        self.index = index
        self._work = work
        self._offset = 0
        self._detokenizer = work.detokenizer()
        self._has_begun = False

    def take(self, event: RequestEvent, prompt: tuple[int, ...], prompt_places: Places) -> CompletionChoice:
        """What an event adds to it. prompt: its tokens, with log-probabilities, where these are wanted."""
        text, tokens = event.text, event.token_ids
        places: Places = event.logprobs or ()
        if not self._has_begun:
            text = self._work.echo(self.index) + text
            tokens, places = prompt + tokens, prompt_places + places
        self._has_begun = True
        return CompletionChoice(
            index=self.index,
            text=text,
            logprobs=self._logprobs(tokens, places) if places else None,
            finish_reason=event.finish_reason,
            stop_reason=event.stop_reason,
        )

    def _logprobs(self, tokens: tuple[int, ...], places: Places) -> CompletionLogprobs:
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.push(token))
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
    reason = event.finish_reason and "length"
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
