"""A chat completion in one piece, not as a stream."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from npqwen.chat.events import Reply
from npqwen.server.logprobs import without_end
from npqwen.server.openai.logprobs import chat_logprobs
from npqwen.server.openai.usage import finish_reason_of, timings_of, usage_of
from npqwen.server.reasoning_fields import Shown

OPEN, CLOSE = "<think>\n", "\n</think>\n\n"
"""The text around reasoning within the content."""


def chat_reply(
    head: dict[str, Any], replies: Sequence[Reply], shown: Shown, special_ids: frozenset[int]
) -> dict[str, Any]:
    """The response's body. head: see `answer_head`. special_ids: tokens whose log-probabilities are left out."""
    timings = {"timings": timings_of(replies[0].usage)} if len(replies) == 1 else {}
    return {
        **head,
        "object": "chat.completion",
        "choices": [_choice(index, reply, shown, special_ids) for index, reply in enumerate(replies)],
        "usage": replies_usage(replies),
        **timings,
    }


def replies_usage(replies: Sequence[Reply]) -> dict[str, Any]:
    """The usage of all choices."""
    return usage_of([reply.usage for reply in replies], sum(reply.reasoning_tokens for reply in replies))


def _choice(index: int, reply: Reply, shown: Shown, special_ids: frozenset[int]) -> dict[str, Any]:
    content, apart = reply.text, {}
    calls = _calls(reply)
    if reply.reasoning and shown == "apart":
        apart = {"reasoning_content": reply.reasoning}
    elif reply.reasoning and shown == "inline":
        content = OPEN + reply.reasoning + (CLOSE + content if content or calls else "")
    message = {"role": "assistant", "content": content if content or not calls else None, "refusal": None, **apart}
    logprobs = None if reply.logprobs is None else chat_logprobs(without_end(reply.logprobs, special_ids))
    return {
        "index": index,
        "message": {**message, "tool_calls": calls} if calls else message,
        "logprobs": logprobs,
        "finish_reason": finish_reason_of(reply.finish_reason),
    }


def _calls(reply: Reply) -> list[dict[str, Any]]:
    """The calls in the order in which the answer began them, including unfinished ones, as in a stream."""
    calls = [(call.id, call.name, json.dumps(call.arguments, ensure_ascii=False)) for call in reply.tool_calls]
    for unfinished in sorted(reply.unfinished_calls, key=lambda call: call.index):
        calls.insert(unfinished.index, (unfinished.id, unfinished.name, unfinished.arguments))
    return [
        {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for id, name, arguments in calls
    ]
