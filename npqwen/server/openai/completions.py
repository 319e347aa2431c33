"""POST /v1/completions: raw text, without a chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from npqwen.server.fields import read_fields
from npqwen.server.json_text import JSONReply
from npqwen.server.openai.answer_head import answer_head
from npqwen.server.openai.completion_reply import CompletionChunks, completion_reply
from npqwen.server.openai.completion_request import CompletionBody, completion_body
from npqwen.server.openai.errors import error_event
from npqwen.server.openai.prompts_run import PromptsRun
from npqwen.server.streaming import StreamedRun, until_disconnected
from npqwen.server.waiting import CommentManner, soon

if TYPE_CHECKING:
    from npqwen.server.models import Models


async def completions(models: Models, request: Request) -> Response:
    """Continue texts, in one piece or as a stream. Raises what the request's fields, model and worker raise."""
    body = completion_body(await read_fields(request))
    if body.stream:
        return await soon(request, _stream(models, body), CommentManner(error_event))
    worker = await models.worker(body.model)
    tokenizer = worker.model.tokenizer
    requests, echoes = body.requests(tokenizer), body.echoes(tokenizer)
    run = await PromptsRun.start(worker, requests)
    head = answer_head(worker.model, body.model, "cmpl")
    results = await until_disconnected(request, run.completions(), run)
    return JSONReply(completion_reply(head, results, echoes, tokenizer.special_ids))


async def _stream(models: Models, body: CompletionBody) -> StreamedRun:
    worker = await models.worker(body.model)
    tokenizer = worker.model.tokenizer
    requests, echoes = body.requests(tokenizer), body.echoes(tokenizer)
    run = await PromptsRun.start(worker, requests)
    chunks = CompletionChunks(
        answer_head(worker.model, body.model, "cmpl"),
        body.n,
        echoes,
        tokenizer.special_ids,
        scored="logprobs" in body.options,
        include_usage=body.include_usage,
    )
    return StreamedRun(run, chunks)
