"""Health, version, metrics and models, and the tokenizer: `/tokenize` and `/detokenize`."""

import asyncio
from importlib.metadata import version as version_of

from fastapi import APIRouter, Response

from tiny_llm import kernel_info

from .answers import Detokenized, Health, ModelCard, ModelList, Tokenized, Version
from .bodies import JsonRoute
from .errors import refused
from .schema import DetokenizeRequest, TokenizeRequest
from .service import Service, Status


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(route_class=JsonRoute)

    @routes.get("/health", response_model=Health)
    async def health(response: Response) -> Health:
        """200 if requests are accepted; 503 while the model loads, the server drains or no replica runs."""
        response.status_code = 200 if service.status is Status.READY else 503
        return Health(status=service.status.value)

    @routes.get("/version", response_model=Version)
    async def version() -> Version:
        """Versions of tiny-llm and MLX, and the kernels' instruction set."""
        kernels = await asyncio.to_thread(kernel_info)
        return Version(
            version=version_of("tiny-llm"), mlx=version_of("mlx"), kernels=kernels.instruction_set or "none"
        )

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Metrics in Prometheus's text format."""
        return Response(await service.metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/v1/models", response_model=ModelList)
    async def models() -> ModelList:
        """The served model, as a list of one."""
        return ModelList(data=[_card(service)])

    @routes.get("/v1/models/{name:path}", response_model=ModelCard)
    async def model(name: str) -> ModelCard:
        """The served model; 404 for any other name."""
        service.check_model(name)
        return _card(service)

    @routes.post("/tokenize", response_model=Tokenized)
    async def tokenize(body: TokenizeRequest) -> Tokenized:
        """Token ids of a text or a conversation."""
        service.check_model(body.model)
        tokenizer = service.llm.tokenizer
        if body.messages is not None:
            tokens = await asyncio.to_thread(service.encode_chat, body, body.tools)
        else:
            text, special = body.prompt or "", body.add_special_tokens is not False
            tokens = await asyncio.to_thread(lambda: tokenizer.encode(text, add_special_tokens=special))
        texts = None
        if body.return_token_strs:
            texts = await asyncio.to_thread(lambda: [tokenizer.token_text(token) for token in tokens])
        return Tokenized(
            tokens=tokens, count=len(tokens), max_model_len=service.max_model_len, token_strs=texts
        )

    @routes.post("/detokenize", response_model=Detokenized)
    async def detokenize(body: DetokenizeRequest) -> Detokenized:
        """The text of token ids."""
        service.check_model(body.model)
        try:
            return Detokenized(prompt=await asyncio.to_thread(_decoded, service, body.tokens))
        except ValueError as error:
            raise refused(str(error), "tokens") from error

    return routes


def _decoded(service: Service, tokens: list[int]) -> str:
    """Return the text of token ids, control tokens included. ValueError for ids outside the vocabulary."""
    service.llm.engine.check_token_ids(tokens)
    return service.llm.tokenizer.decode(tokens, skip_special_tokens=False)


def _card(service: Service) -> ModelCard:
    return ModelCard(id=service.model_name, created=service.created, max_model_len=service.max_model_len)
