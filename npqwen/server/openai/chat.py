"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
from npqwen.server.waiting import CommentKeepalives, response_or_keepalives

if TYPE_CHECKING:
    from npqwen.server.models import Models
    from npqwen.server.run import Run


async def chat_completions(models: Models, request: Request) -> Response:
    """Answer a conversation, in one piece or as a stream. Raises what the request's fields, model and worker raise."""
    body = chat_body(await read_fields(request))
    if body.stream:
        return await response_or_keepalives(request, _stream(models, body), CommentKeepalives(error_event))
    run, head, special_ids = await _begin(models, body)
    replies = await until_disconnected(request, run.replies(), run)
    return JSONReply(chat_reply(head, replies, body.shown, special_ids))


async def _stream(models: Models, body: ChatBody) -> StreamedRun:
    run, head, special_ids = await _begin(models, body)
    usage, progress = body.include_usage, body.return_progress
    chunks = ChatChunks(head, body.n, body.shown, special_ids, include_usage=usage, return_progress=progress)
    return StreamedRun(run, chunks)


async def _begin(models: Models, body: ChatBody) -> tuple[Run, dict[str, Any], frozenset[int]]:
    """Start the run; returns it, the answer's head, and tokens whose log-probabilities are left out."""
    worker = await models.worker(body.model)
    run = await worker.start(body.request(worker.model))
    return run, answer_head(worker.model, body.model, "chatcmpl"), worker.model.tokenizer.special_ids
