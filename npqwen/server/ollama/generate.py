"""POST /api/generate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from starlette.requests import Request
from starlette.responses import Response

from npqwen.generation.options import GenerationOptions
from npqwen.server.fields import FieldError, Fields, read_fields
from npqwen.server.fill_in_middle import middle_request
from npqwen.server.ollama.answer import Head, text_part
from npqwen.server.ollama.answering import answer, load_or_unload
from npqwen.server.ollama.body import STRUCTURE_FIELD, Body, read_body, refuse_images
from npqwen.server.requests import ChatRequest, TextRequest

if TYPE_CHECKING:
    from npqwen.model import Model
    from npqwen.server.models import Models


async def generate(models: Models, request: Request) -> Response:
    """Answer a prompt, or continue it as raw text; without one, load or unload the model."""
    fields = await read_fields(request)
    body = read_body(fields)
    prompt = _prompt(fields)
    fields.log_unknown()
    head = Head(body.model or models.names[0], text_part)
    if not prompt.text and prompt.suffix is None:
        return await load_or_unload(models, head, body)
    return await answer(request, models, head, body, lambda model: _request(model, body, prompt))


@dataclass(frozen=True)
class _Prompt:
    """suffix: the text after the answer. raw: without the chat template."""

    text: str
    system: str
    suffix: str | None
    raw: bool


def _prompt(fields: Fields) -> _Prompt:
    refuse_images(fields)
    fields.refuse("template", "ollama's templates are not; send raw: true and a prompt that is complete", "")
    fields.refuse("context", "send the earlier messages to /api/chat", [])
    suffix = fields.text("suffix") or None
    raw = fields.flag("raw") or suffix is not None
    system = fields.text("system") or ""
    if raw and system:
        reason = "a suffix" if suffix is not None else "raw: true"
        raise FieldError(f"system has no place in a prompt with {reason}; write it into the prompt", "system")
    return _Prompt(fields.text("prompt") or "", system, suffix, raw)


def _request(model: Model, body: Body, prompt: _Prompt) -> ChatRequest | TextRequest:
    """The request; for raw text also if the model has no chat template. FieldError for unsupported fields."""
    if not prompt.raw and model.chat_template.names:
        system = [{"role": "system", "content": prompt.system}] if prompt.system else []
        return body.chat_request(model, [*system, {"role": "user", "content": prompt.text}], {})
    if body.reasoning.thinking or body.reasoning.effort:
        raise FieldError("think has no effect on raw text; leave it out", "think")
    if prompt.system:
        raise FieldError("this model has no chat template, and so no system message; leave system out", "system")
    options = cast(GenerationOptions, {**body.options.generation, **body.generation})
    if prompt.suffix is None:
        return TextRequest(prompt.text, options, fields=STRUCTURE_FIELD)
    return middle_request(prompt.text, prompt.suffix, options, model.tokenizer, fields=STRUCTURE_FIELD)
