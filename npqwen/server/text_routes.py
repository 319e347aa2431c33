"""/tokenize, /detokenize and /apply-template: llama-server's requests, which may name a model, and its replies."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from npqwen.chat.messages import checked
from npqwen.checks import whole_range
from npqwen.server.background import in_thread
from npqwen.server.fields import FieldError, Fields, read_fields
from npqwen.server.json_text import JSONReply
from npqwen.server.openai.chat_request import chat_body
from npqwen.tokenizer import Tokenizer
from npqwen.wording import quoted

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
    """The prompt that a chat completion with the same body has: {"messages": [...]} gives {"prompt": "..."}.

    add_generation_prompt, also within chat_template_kwargs, by default true: end with the opening of an answer, or with
    what the assistant has said if that is the last message.
    """
    fields = await read_fields(request)
    opened = _opened(fields)
    body = chat_body(fields)
    model = (await models.worker(body.model, task=None)).model

    def prompt() -> str:
        chat = body.request(model)
        settings = chat.settings()
        if opened:
            ids = settings.prompter(model).ids(checked(chat.messages))
            return model.tokenizer.decode(ids, special=True)
        tools = None if settings.tools is None else list(settings.tools.values())
        return model.chat_template.render(chat.messages, tools, settings.thinking, False, **settings.template_options)

    return JSONReply({"prompt": await in_thread(prompt)})


def _opened(fields: Fields) -> bool:
    """Whether the prompt is one for an answer.

    Where add_generation_prompt has a meaning that chat completions do not know, it is removed from the body.
    """
    kwargs = fields.object("chat_template_kwargs")
    opened = True
    if kwargs is not None and kwargs.flag("add_generation_prompt") is not None:
        opened = kwargs.values.pop("add_generation_prompt")
    if fields.flag("add_generation_prompt") is False and fields.flag("continue_final_message") is not True:
        opened = fields.values.pop("add_generation_prompt")
    return opened


def _piece(data: bytes) -> str | list[int]:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)
