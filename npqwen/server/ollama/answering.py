"""From a checked request to the response: within num_ctx, in one piece or as a stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from starlette.requests import Request
from starlette.responses import Response

from npqwen.chat.chat_options import ChatOptions
from npqwen.chat.messages import checked
from npqwen.errors import ContextLengthError
from npqwen.generation.decoding import check_prompt_ids
from npqwen.generation.options import GenerationOptions
from npqwen.server.background import in_thread
from npqwen.server.json_text import JSONReply
from npqwen.server.ollama.answer import Head, Lines, whole
from npqwen.server.requests import ChatRequest, TextRequest
from npqwen.server.streaming import StreamedRun, until_disconnected
from npqwen.server.waiting import response_or_keepalives

if TYPE_CHECKING:
    from npqwen.model import Model
    from npqwen.server.models import Models
    from npqwen.server.ollama.body import Body
    from npqwen.server.run import Run


async def answer(
    request: Request, models: Models, head: Head, body: Body, wanted: Callable[[Model], ChatRequest | TextRequest]
) -> Response:
    """Run a request, and answer in one piece or as a stream, as the body sets. wanted(model): the model's request."""
    if body.stream:
        return await response_or_keepalives(request, _stream(models, head, body, wanted), Lines(head))
    run = await _run(models, head, body, wanted)
    results = await until_disconnected(request, run.results(), run)
    return JSONReply(whole(head, results[0]))


async def _stream(
    models: Models, head: Head, body: Body, wanted: Callable[[Model], ChatRequest | TextRequest]
) -> StreamedRun:
    return StreamedRun(await _run(models, head, body, wanted), Lines(head))


async def _run(models: Models, head: Head, body: Body, wanted: Callable[[Model], ChatRequest | TextRequest]) -> Run:
    worker = await models.worker(body.model, body.keep_alive)
    head.loaded = time.perf_counter()
    head.special_ids = worker.model.tokenizer.special_ids
    body.options.check(worker.model)
    return await worker.start(await _within_context(worker.model, wanted(worker.model), body.options.context))


async def load_or_unload(models: Models, head: Head, body: Body) -> Response:
    """The response to a request without a prompt: the model is loaded, or unloaded if keep_alive is 0."""
    if body.keep_alive == 0:
        await models.unload(body.model)
        return JSONReply(head.object(**head.end("unload", None)))
    await models.worker(body.model, body.keep_alive)
    return JSONReply(head.object(**head.end("load", None)))


async def _within_context(
    model: Model, wanted: ChatRequest | TextRequest, context: int | None
) -> ChatRequest | TextRequest:
    """The request, with max_tokens so that prompt and answer have at most `context` tokens. No prompt is truncated.

    A context beyond the model's has no effect: many clients send a fixed one. Raises ContextLengthError if the prompt
    leaves no room for an answer.
    """
    if context is None or context >= model.context:
        return wanted
    tokens = await in_thread(lambda: _prompt_tokens(model, wanted))
    if tokens >= context:
        raise ContextLengthError(
            f"the prompt has {tokens} tokens, but num_ctx is {context}; shorten the prompt, or send a larger num_ctx "
            f"(the model's limit is {model.context})"
        )
    options: dict[str, Any] = dict(wanted.options)
    options["max_tokens"] = min(options.get("max_tokens") or context, context - tokens)
    if isinstance(wanted, ChatRequest):
        return replace(wanted, options=cast(ChatOptions, options))
    return replace(wanted, options=cast(GenerationOptions, options))


def _prompt_tokens(model: Model, wanted: ChatRequest | TextRequest) -> int:
    if isinstance(wanted, TextRequest):
        return len(check_prompt_ids(model, wanted.prompt))
    return len(wanted.settings().prompter(model).ids(checked(wanted.messages)))
