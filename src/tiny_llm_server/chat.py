"""`/v1/chat/completions`: answers a conversation, using the model's chat template."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import replace
from time import monotonic
from typing import Literal

from fastapi import APIRouter, Request, Response

from tiny_llm import Logprob, RequestEvent, RequestUsage

from .answer_form import AnswerForm
from .answers import (
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatTokenLogprob,
    TokenLogprob,
    Usage,
    new_head,
)
from .bodies import JsonRoute
from .chat_choice import ChatChoiceState
from .errors import refused
from .request_log import track
from .run import Run
from .schema import ChatCompletionRequest
from .service import Service, sampling_params
from .sse import REQUEST_ID, STREAMED, EventStream, unless_disconnected
from .stream_events import ChatDelta, ChatEvent, ChatPart, null_usage, stop_reason_of
from .token_names import bytes_of
from .tool_use import text_of, tool_use

CHUNK: Literal["chat.completion.chunk"] = "chat.completion.chunk"


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter(route_class=JsonRoute)

    @routes.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
    async def chat(
        body: ChatCompletionRequest, request: Request, response: Response
    ) -> ChatCompletion | Response:
        """Answer a conversation with `n` choices."""
        service.check(body)
        work = _Work(service, body, service.cache_salt(body, request))
        prompt = await asyncio.to_thread(work.encoded)
        run = await service.begin(
            [prompt],
            work.params,
            work.id,
            "messages",
            form=work.form,
            may_shorten=service.may_shorten(body),
            visible=work.visible,
            arrival=work.arrival,
        )
        track(request, run.stats)
        if body.stream:
            return EventStream(work.stream(run), run.cancel, {REQUEST_ID: work.id})
        response.headers[REQUEST_ID] = work.id
        return await unless_disconnected(request, work.whole(run), run.cancel)

    return routes


class _Work:
    """One request."""

    def __init__(self, service: Service, body: ChatCompletionRequest, cache_salt: str) -> None:
        self.arrival = monotonic()
        self._service = service
        self._body = body
        self._top = body.top_logprobs or 0
        new_name, old_name = body.max_completion_tokens, body.max_tokens
        logprobs = self._top if body.logprobs else None
        self.params = sampling_params(
            body,
            service.sampling_defaults,
            max_tokens=old_name if new_name is None else new_name,
            logprobs=logprobs,
            cache_salt=cache_salt,
        )
        self.form: AnswerForm | None = None
        self._head = new_head("chatcmpl", service.model_name)
        self._no_usage = null_usage(body.stream_options)
        self.id: str = self._head["id"]
        self.visible: tuple[str, ...] = ()
        self._choices: list[ChatChoiceState] = []

    def encoded(self) -> list[int]:
        """Check the tools, set the form, make the prompt, and prepare the choices. Called in a thread."""
        service, body = self._service, self._body
        use, form = tool_use(body), service.chat_format
        if use.callable and form.tools is None:
            message = "tools: --tool-call-parser is none, or the form of this model's calls is not known"
            raise refused(message, "tools", "unsupported_field")
        prompt = service.encode_chat(body, [tool.fields for tool in use.offered], service.max_model_len)
        continued = text_of(body.messages[-1]) if body.continue_final_message else None
        form, in_reasoning = form.after(prompt, service.llm.tokenizer, continued)
        self.form = form.answer_form(body, use, service.llm.tokenizer, in_reasoning=in_reasoning)
        if self.form is not None:
            self.params = replace(self.params, structured_outputs=self.form.params)
        self.visible = form.visible_tokens(use)
        self._choices = [
            ChatChoiceState(
                index,
                form.parser(use, in_reasoning=in_reasoning, is_certain=self.form is not None),
                has_short_ids=form.tools is not None and form.tools.name == "mistral",
                shows_reasoning=body.include_reasoning,
                is_named=use.is_named,
            )
            for index in range(body.n)
        ]
        return prompt

    async def whole(self, run: Run) -> ChatCompletion:
        """Wait for the whole answer."""
        usages: list[RequestUsage] = []
        answers: list[list[RequestEvent]] = [[] for _ in range(self._body.n)]
        async with aclosing(run.events()) as events:
            async for one in events:
                answers[one.event.index].append(one.event)
                self._choices[one.event.index].take(one.event)
                usages += [one.event.usage] if one.event.usage is not None else []
        choices = [self._choice(index, events) for index, events in enumerate(answers)]
        return ChatCompletion(**self._head, choices=choices, usage=Usage.of(usages))

    async def stream(self, run: Run) -> AsyncGenerator[ChatEvent | None, None]:
        """Yield the role of each choice, then events with its text; None after a time without events."""
        usages: list[RequestUsage] = []
        options = self._body.stream_options
        has_started = False
        async with aclosing(run.steps(self._service.config.keep_alive)) as steps:
            async for step in steps:
                if not step:
                    yield None
                elif not has_started:  # not earlier: clients measure the TTFT by this event
                    has_started = True
                    for index in range(self._body.n):
                        yield self._event(_part(index, {"role": "assistant", "content": ""}))
                for one in step:
                    event = one.event
                    usages += [event.usage] if event.usage is not None else []
                    for part in self._parts(event):
                        yield self._event(part)
        if options is not None and options.include_usage:
            yield {**self._head, "object": CHUNK, "choices": [], "usage": Usage.of(usages)}

    def _event(self, part: ChatPart) -> ChatEvent:
        return {**self._head, "object": CHUNK, "choices": [part], **self._no_usage}

    def _parts(self, event: RequestEvent) -> Iterator[ChatPart]:
        choice = self._choices[event.index]
        deltas = choice.take(event)
        if not deltas and not event.logprobs and not event.finish_reason:
            return
        for delta in deltas[:-1]:
            yield _part(event.index, delta)
        yield {
            "index": event.index,
            "delta": deltas[-1] if deltas else {},
            "logprobs": self._logprobs([event]),
            "finish_reason": choice.finish_reason,
            **stop_reason_of(event),
        }

    def _choice(self, index: int, events: list[RequestEvent]) -> ChatChoice:
        choice, last = self._choices[index], events[-1]
        return ChatChoice(
            index=index,
            message=choice.message,
            logprobs=self._logprobs(events),
            finish_reason=choice.finish_reason or "abort",
            stop_reason=last.stop_reason,
        )

    def _logprobs(self, events: list[RequestEvent]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        positions = [
            (token, position)
            for event in events
            for token, position in zip(event.token_ids, event.logprobs or (), strict=True)
        ]
        return ChatLogprobs(content=[self._token_logprob(*one) for one in positions])

    def _token_logprob(self, token: int, position: dict[int, Logprob]) -> ChatTokenLogprob:
        """Make the entry of a token. position: the log-probabilities there, by token id."""
        most_likely = sorted(position.items(), key=lambda item: item[1].rank)[: self._top]
        return ChatTokenLogprob(
            **self._token(token, position[token]).model_dump(),
            top_logprobs=[self._token(*one) for one in most_likely],
        )

    def _token(self, token: int, logprob: Logprob) -> TokenLogprob:
        raw = bytes_of(token, logprob.decoded_token, self._service.llm.tokenizer)
        return TokenLogprob(token=logprob.decoded_token, logprob=logprob.logprob, bytes=list(raw))


def _part(index: int, delta: ChatDelta) -> ChatPart:
    """Return a part without the log-probabilities and the end, which are in the last part of an event."""
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
