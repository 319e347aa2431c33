"""The messages and tools of a body of the Messages API, in the library's own terms."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from npqwen.chat.messages import Message
from npqwen.server.fields import FieldError, Fields
from npqwen.server.opaque_reasoning import unpack
from npqwen.server.tool_results import matched
from npqwen.wording import quoted

_log = logging.getLogger(__name__)

_BILLING = "x-anthropic-billing-header"
"""How a block begins that differs in every request of Claude Code: with it, no two prompts would share a prefix."""

_ROLES = ("user", "assistant", "system")
_UNSEEN = ("redacted_thinking", "fallback", "container_upload", "tool_reference")
"""Types of blocks that only Anthropic's servers can read; dropped, like calls and results of their own tools."""


def read_messages(body: Fields) -> list[Message]:
    """The system message, if there is one, and the conversation; tool results are in the order of their calls.

    A block of the system message that Claude Code changes with every request is dropped. Raises FieldError for content
    that the model cannot read, such as images.
    """
    messages: list[Message] = []
    system = _text(body, "system", "\n\n")
    if system:
        messages.append({"role": "system", "content": system})
    given = body.required("messages", body.objects)
    if not given:
        body.wrong("messages", "a list of at least one message")
    for fields in given:
        messages += _turn(fields)
    return matched(messages)


def _turn(fields: Fields) -> list[Message]:
    """A message of the API as messages for chat templates, in which each tool result is a separate message."""
    role = fields.required("role", lambda name: fields.one_of(name, _ROLES))
    fields.required("content", fields.any)
    if role == "system":
        text = _text(fields, "content", "\n\n")
        return [{"role": role, "content": text}] if text else []
    if isinstance(fields.any("content"), str):
        return [{"role": role, "content": fields.text("content")}]
    blocks = fields.objects("content") or []
    return [_answer(blocks)] if role == "assistant" else _question(blocks)


def _question(blocks: Sequence[Fields]) -> list[Message]:
    results: list[Message] = []
    texts: list[str] = []
    for block in blocks:
        kind = _kind(block)
        if kind == "tool_result":
            text = _text(block, "content", "\n")
            if block.flag("is_error") and "error" not in text.lower():
                text = f"Error: {text}"
            id = block.required("tool_use_id", block.text)
            results.append({"role": "tool", "tool_call_id": id, "content": text})
        else:
            texts += _readable(block, kind)
    return results + ([{"role": "user", "content": "\n".join(texts)}] if texts or not results else [])


def _answer(blocks: Sequence[Fields]) -> Message:
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in blocks:
        kind = _kind(block)
        if kind == "thinking":
            signature = block.text("signature") or ""
            reasoning.append(block.text("thinking") or unpack(signature) or "")
        elif kind == "tool_use":
            block.required("input", block.object)
            function = {"name": block.required("name", block.text), "arguments": block.any("input")}
            calls.append({"id": block.required("id", block.text), "type": "function", "function": function})
        else:
            texts += _readable(block, kind)
    message: Message = {"role": "assistant", "content": "".join(texts)}
    if any(reasoning):
        message["reasoning_content"] = "\n".join(text for text in reasoning if text)
    if calls:
        message["tool_calls"] = calls
    return message


def _text(fields: Fields, name: str, separator: str) -> str:
    """Text, or blocks of text, as one string; "" for a field that is absent."""
    value = fields.any(name)
    if value is None:
        return ""
    if isinstance(value, str):
        text = fields.text(name) or ""
        return text.partition("\n")[2].lstrip("\n") if text.startswith(_BILLING) else text
    if not isinstance(value, list):
        fields.wrong(name, "text or a list of blocks")
    texts = [text for block in fields.objects(name) or [] for text in _readable(block, _kind(block))]
    return separator.join(text for text in texts if not text.startswith(_BILLING))


def _kind(block: Fields) -> str:
    return block.required("type", block.text)


def _readable(block: Fields, kind: str) -> list[str]:
    """The texts of a block; none for a block that the model need not see. Raises FieldError for other kinds."""
    if kind == "text":
        return [block.required("text", block.text)]
    if kind == "document" and (source := block.object("source")) is not None and source.any("type") == "text":
        return [text for text in (block.text("title"), source.required("data", source.text)) if text]
    if kind in ("image", "document"):
        raise FieldError(f"{block.path} has the type {kind}, and Qwen3 reads text only; leave it out", block.path)
    if kind in _UNSEEN or kind == "server_tool_use" or kind.endswith("_tool_result"):
        _log.debug("%s of type %s was dropped", block.path, kind)
        return []
    raise FieldError(f"{block.path} has the type {quoted(kind)}, which does not belong there", block.path)


def read_tools(body: Fields) -> list[dict[str, Any]] | None:
    """The tools that the client runs, as schemas; None if there are none. Tools of Anthropic's servers are skipped."""
    tools = []
    for tool in body.objects("tools") or []:
        kind = tool.any("type")
        if kind not in (None, "custom") and "input_schema" not in tool:
            _log.debug("%s of type %s was skipped", tool.path, quoted(kind))
            continue
        function = {"name": tool.required("name", tool.text), "parameters": tool.required("input_schema", tool.mapping)}
        if description := tool.text("description"):
            function["description"] = description
        tools.append({"type": "function", "function": function})
    return tools or None
