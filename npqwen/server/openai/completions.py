"""POST /v1/completions: raw text, without a chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
from npqwen.server.waiting import CommentKeepalives, response_or_keepalives

if TYPE_CHECKING:
    from npqwen.server.models import Models


async def completions(models: Models, request: Request) -> Response:
    """Continue texts, in one piece or as a stream. Raises what the request's fields, model and worker raise."""
    body = completion_body(await read_fields(request))
    if body.stream:
        return await response_or_keepalives(request, _stream(models, body), CommentKeepalives(error_event))
    run, head, echoes, special_ids = await _begin(models, body)
    results = await until_disconnected(request, run.completions(), run)
    return JSONReply(completion_reply(head, results, echoes, special_ids))


async def _stream(models: Models, body: CompletionBody) -> StreamedRun:
    run, head, echoes, special_ids = await _begin(models, body)
    scored, usage = "logprobs" in body.options, body.include_usage
    chunks = CompletionChunks(head, body.n, echoes, special_ids, scored=scored, include_usage=usage)
    return StreamedRun(run, chunks)


async def _begin(models: Models, body: CompletionBody) -> tuple[PromptsRun, dict[str, Any], list[str], frozenset[int]]:
    """Start the prompts; returns their run, the answer's head, what each prompt's texts begin with, and tokens whose
    log-probabilities are left out.
    """
    worker = await models.worker(body.model)
    tokenizer = worker.model.tokenizer
    requests, echoes = body.requests(tokenizer), body.echoes(tokenizer)
    run = await PromptsRun.start(worker, requests)
    return run, answer_head(worker.model, body.model, "cmpl"), echoes, tokenizer.special_ids
