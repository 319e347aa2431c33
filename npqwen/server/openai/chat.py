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
from npqwen.server.openai.chat_request import chat_body
from npqwen.server.streaming import StreamedRun, until_disconnected

if TYPE_CHECKING:
    from npqwen.server.models import Models


async def chat_completions(models: Models, request: Request) -> Response:
    """Answer a conversation, in one piece or as a stream. Raises what the request's fields, model and worker raise."""
    body = chat_body(await read_fields(request))
    worker = await models.worker(body.model)
    run = await worker.start(body.request(worker.model))
    special_ids = worker.model.tokenizer.special_ids
    head = answer_head(worker.model, body.model, "chatcmpl")
    if not body.stream:
        replies = await until_disconnected(request, run.replies(), run)
        return JSONReply(chat_reply(head, replies, body.shown, special_ids))
    chunks = ChatChunks(
        head,
        body.n,
        body.shown,
        special_ids,
        include_usage=body.include_usage,
        return_progress=body.return_progress,
    )
    return StreamedRun(run, chunks)
