"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from npqwen.server.fields import read_fields
from npqwen.server.json_text import JSONReply
from npqwen.server.openai.answer_head import answer_head
from npqwen.server.openai.chat_chunks import ChatChunks
from npqwen.server.openai.chat_reply import chat_reply
from npqwen.server.openai.chat_request import ChatBody, chat_body
from npqwen.server.openai.errors import error_event
from npqwen.server.streaming import StreamedRun, until_disconnected
from npqwen.server.waiting import CommentManner, soon

if TYPE_CHECKING:
    from npqwen.server.models import Models


async def chat_completions(models: Models, request: Request) -> Response:
    """Answer a conversation, in one piece or as a stream. Raises what the request's fields, model and worker raise."""
    body = chat_body(await read_fields(request))
    if body.stream:
        return await soon(request, _stream(models, body), CommentManner(error_event))
    worker = await models.worker(body.model)
    run = await worker.start(body.request(worker.model))
    head = answer_head(worker.model, body.model, "chatcmpl")
    replies = await until_disconnected(request, run.replies(), run)
    return JSONReply(chat_reply(head, replies, body.shown, worker.model.tokenizer.special_ids))


async def _stream(models: Models, body: ChatBody) -> StreamedRun:
    worker = await models.worker(body.model)
    run = await worker.start(body.request(worker.model))
    chunks = ChatChunks(
        answer_head(worker.model, body.model, "chatcmpl"),
        body.n,
        body.shown,
        worker.model.tokenizer.special_ids,
        include_usage=body.include_usage,
        return_progress=body.return_progress,
    )
    return StreamedRun(run, chunks)
