"""Answers in ollama's format, in one piece and as lines of JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from npqwen.chat.events import Finish, Reasoning, Reply, Text
from npqwen.generation.completion import Completion, TokenLogprobs, Usage
from npqwen.server.failure import Failure
from npqwen.server.json_text import json_text
from npqwen.server.logprobs import scored_tokens, without_end
from npqwen.server.run import Completed, Progress, RunEvent, Scored
from npqwen.tools.calls import ToolCall

Part = Callable[[str, str, Sequence[ToolCall]], dict[str, Any]]
"""part(text, thinking, calls): a part of an answer, or all of it, as an endpoint presents it."""


def chat_part(text: str, thinking: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    """A message of /api/chat."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    return {"message": message}


def text_part(text: str, thinking: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    """A response of /api/generate, which has no calls."""
    return {"response": text, "thinking": thinking} if thinking else {"response": text}


@dataclass
class Head:
    """What all objects of an answer have in common.

    name: what the client called the model. special_ids: tokens whose log-probabilities are left out. loaded: when the
    model was loaded, None before that; started and loaded are values of `time.perf_counter`.
    """

    name: str
    part: Part
    special_ids: frozenset[int] = frozenset()
    started: float = field(default_factory=time.perf_counter)
    loaded: float | None = None

    def object(self, text: str = "", thinking: str = "", calls: Sequence[ToolCall] = (), **more: Any) -> dict[str, Any]:
        """A part of the answer."""
        now = datetime.now(timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")
        return {"model": self.name, "created_at": now, **self.part(text, thinking, calls), "done": False, **more}

    def end(self, reason: str, usage: Usage | None) -> dict[str, Any]:
        """The fields of the last object only: why the answer ended, and its usage in tokens and nanoseconds."""
        now = time.perf_counter()
        found: dict[str, Any] = {"done": True, "done_reason": reason}
        if usage is not None:
            found |= {
                "total_duration": _nanoseconds(now - self.started),
                "load_duration": _nanoseconds((self.loaded or now) - self.started),
                "prompt_eval_count": usage.prompt_tokens,
                "prompt_eval_duration": _nanoseconds(usage.prefill_seconds),
                "eval_count": usage.generated_tokens,
                "eval_duration": _nanoseconds(usage.decode_seconds),
            }
        return found

    def logprobs(self, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The field of log-probabilities; none without tokens."""
        shown = scored_tokens(without_end(tokens, self.special_ids))
        return {"logprobs": shown} if shown else {}


def whole(head: Head, result: Reply | Completion) -> dict[str, Any]:
    """An answer in one piece."""
    end = head.end(_reason(result), result.usage) | head.logprobs(result.logprobs or [])
    if isinstance(result, Completion):
        return head.object(result.text, **end)
    return head.object(result.text, result.reasoning, result.tool_calls, **end)


class Lines:
    """The stream's format: a JSON object on each line. The last one has "done": true; keepalives are empty parts."""

    media_type = "application/x-ndjson"

    def __init__(self, head: Head) -> None:
        self._head = head
        self._scored: list[TokenLogprobs] = []
        """Log-probabilities that wait for the next part."""

    def start(self) -> str:
        return self._line(self._head.object())

    def event(self, index: int, event: RunEvent) -> str:
        if isinstance(event, Scored):
            self._scored += event.tokens
        elif isinstance(event, Text):
            return self._part(event.text)
        elif isinstance(event, Reasoning):
            return self._part(thinking=event.text)
        elif isinstance(event, ToolCall):
            return self._part(calls=[event])
        elif isinstance(event, Finish):
            return self._part(**self._head.end(_reason(event.reply), event.reply.usage))
        elif isinstance(event, Completed):
            return self._part(**self._head.end(_reason(event.completion), event.completion.usage))
        return ""

    def keepalive(self, progress: Progress | None) -> str:
        return self._line(self._head.object())

    def error(self, failure: Failure) -> str:
        return self._line({"error": failure.message})

    def end(self) -> str:
        return ""

    def _part(self, text: str = "", thinking: str = "", calls: Sequence[ToolCall] = (), **more: Any) -> str:
        scored, self._scored = self._scored, []
        return self._line(self._head.object(text, thinking, calls, **more, **self._head.logprobs(scored)))

    def _line(self, value: dict[str, Any]) -> str:
        return f"{json_text(value)}\n"


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}


def _reason(result: Reply | Completion) -> str:
    """The done_reason. Tool calls count as a normal end; an answer that the loop guard ended is incomplete."""
    return {"tool_calls": "stop", "loop": "length"}.get(result.finish_reason, result.finish_reason)


def _nanoseconds(seconds: float) -> int:
    return round(1e9 * seconds)
