"""/tokenize, /detokenize and /apply-template: llama-server's requests, which may name a model, and its replies."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from npqwen.checks import whole_range
from npqwen.errors import quoted
from npqwen.server.background import in_thread
from npqwen.server.fields import FieldError, read_fields
from npqwen.server.json_text import JSONReply
from npqwen.tokenizer import Tokenizer

if TYPE_CHECKING:
    from npqwen.server.models import Models


def routes(models: Models) -> list[Route]:
    """The routes over these models."""
    handlers = {"/tokenize": tokenize, "/detokenize": detokenize, "/apply-template": apply_template}
    return [Route(path, partial(handler, models), methods=["POST"]) for path, handler in handlers.items()]


async def tokenize(models: Models, request: Request) -> Response:
    """The token ids of a text: {"content": "..."} gives {"tokens": [...]}.

    parse_special, by default true: names of special tokens in the text become these tokens. with_pieces: the tokens are
    objects with an id and a piece: its text, or a list of its bytes if they are not whole characters. add_special: has
    no effect, because Qwen's tokenizer adds no special tokens.
    """
    fields = await read_fields(request)
    text = fields.required("content", fields.text)
    fields.flag("add_special")
    special = fields.flag("parse_special") is not False
    pieces = bool(fields.flag("with_pieces"))
    worker = await models.worker(fields.text("model"), task=None)
    tokenizer: Tokenizer = worker.model.tokenizer
    ids = await in_thread(lambda: tokenizer.encode(text) if special else tokenizer.plain_ids(text))
    tokens: list[Any] = [{"id": id, "piece": _piece(tokenizer.token_bytes(id))} for id in ids] if pieces else ids
    return JSONReply({"tokens": tokens})


async def detokenize(models: Models, request: Request) -> Response:
    """The text of token ids, special tokens included: {"tokens": [...]} gives {"content": "..."}."""
    fields = await read_fields(request)
    ids = fields.required("tokens", fields.items)
    worker = await models.worker(fields.text("model"), task=None)
    size = worker.model.config.vocab_size
    for at, id in enumerate(ids):
        if type(id) is not int or not 0 <= id < size:
            place = f"tokens[{at}]"
            raise FieldError(f"{place} is {quoted(id)}; it must be {whole_range(0, size - 1)}", place)
    tokenizer: Tokenizer = worker.model.tokenizer
    return JSONReply({"content": await in_thread(lambda: tokenizer.decode(ids, special=True))})


async def apply_template(models: Models, request: Request) -> Response:
    """The prompt for a conversation: {"messages": [...], "tools": [...]} gives {"prompt": "..."}.

    chat_template_kwargs: variables of the template, enable_thinking among them.
    """
    fields = await read_fields(request)
    messages = fields.required("messages", fields.items)
    tools = fields.items("tools")
    variables = fields.object("chat_template_kwargs")
    options = {} if variables is None else dict(variables.values)
    thinking = options.pop("enable_thinking", None)
    worker = await models.worker(fields.text("model"), task=None)
    model = worker.model
    prompt = await in_thread(
        lambda: model.chat_template.prepare(messages, tools or None, thinking, True, **options).text()
    )
    return JSONReply({"prompt": prompt})


def _piece(data: bytes) -> str | list[int]:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)
