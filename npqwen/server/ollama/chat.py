"""POST /api/chat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from npqwen.server.fields import read_fields
from npqwen.server.ollama.answer import Head, chat_part
from npqwen.server.ollama.answering import answer, load_or_unload
from npqwen.server.ollama.body import read_body
from npqwen.server.ollama.conversation import read_messages
from npqwen.server.tool_fields import tool_options

if TYPE_CHECKING:
    from npqwen.server.models import Models


async def chat(models: Models, request: Request) -> Response:
    """Answer a conversation; without messages, load or unload the model."""
    fields = await read_fields(request)
    body = read_body(fields)
    messages = read_messages(fields)
    tools = tool_options(fields)
    fields.log_unknown()
    head = Head(body.model or models.names[0], chat_part)
    if not messages:
        return await load_or_unload(models, head, body)
    return await answer(request, models, head, body, lambda model: body.chat_request(model, messages, tools))
