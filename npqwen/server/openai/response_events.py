"""An answer in the format of the Responses API: the finished response, and the stream of its events."""

from __future__ import annotations

import secrets
import time
from typing import Any

from npqwen.chat.events import CallArguments, CallStart, Finish, Reasoning, Reply, Text, UnfinishedCall
from npqwen.server.failure import CONTEXT_LENGTH_EXCEEDED, Failure
from npqwen.server.opaque_reasoning import pack
from npqwen.server.openai.response_tools import ClientTools
from npqwen.server.run import RunEvent
from npqwen.tools.calls import ToolCall

Json = dict[str, Any]


class Answer:
    """Converts a run's events into those of the API, which are numbered.

        response.created response.in_progress
        (response.output_item.added ... response.output_item.done)*
        response.completed | response.incomplete | response.failed

    Items follow one another in the order in which the model writes them: reasoning, a message, tool calls. `body` is
    the response so far; after the last event it is the reply to a client that does not stream.
    """

    def __init__(self, model: str, echo: Json, tools: ClientTools, *, summary: bool = False) -> None:
        """echo: fields of the response that repeat the request's. summary: send reasoning as its own summary."""
        self.finished = False
        self._tools = tools
        self._summary = summary
        self._events: list[Json] = []
        self._number = 0
        self._item: Json | None = None
        """The item that is open."""
        self._pieces: list[str] = []
        """Its text, or its arguments."""
        self.body: Json = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "usage": None,
            **echo,
        }

    def start(self) -> list[Json]:
        """The first events."""
        self._add_response("response.created")
        return self.keepalive()

    def keepalive(self) -> list[Json]:
        """An event without new information."""
        self._add_response("response.in_progress")
        return self._taken()

    def push(self, event: RunEvent) -> list[Json]:
        """The API's events for an event of the run."""
        if isinstance(event, Reasoning):
            self._add_reasoning(event.text)
        elif isinstance(event, Text):
            self._add_text(event.text)
        elif isinstance(event, CallStart):
            self._begin_call(event.id, event.name)
        elif isinstance(event, CallArguments):
            self._add_arguments(event.text)
        elif isinstance(event, ToolCall):
            self._end_call(event)
        elif isinstance(event, UnfinishedCall):
            self._end("incomplete")
        elif isinstance(event, Finish):
            self._finish(event.reply)
        return self._taken()

    def fail(self, failure: Failure) -> list[Json]:
        """The last event, if the run ended with an error."""
        self._end("incomplete")
        code = {400: "invalid_prompt", 429: "rate_limit_exceeded", 503: "rate_limit_exceeded"}
        known = CONTEXT_LENGTH_EXCEEDED if failure.code == CONTEXT_LENGTH_EXCEEDED else code.get(failure.status)
        self.body |= {"status": "failed", "error": {"code": known or "server_error", "message": failure.message}}
        self._add_response("response.failed")
        self.finished = True
        return self._taken()

    def _add(self, kind: str, **fields: Any) -> None:
        self._events.append({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1

    def _add_response(self, kind: str) -> None:
        self._add(kind, response={**self.body, "output": list(self.body["output"])})

    def _add_to_item(self, kind: str, **fields: Any) -> None:
        assert self._item is not None
        self._add(kind, item_id=self._item["id"], output_index=len(self.body["output"]), **fields)

    def _taken(self) -> list[Json]:
        events, self._events = self._events, []
        return events

    def _is(self, kind: str) -> bool:
        return self._item is not None and self._item["type"] == kind

    def _open(self, item: Json) -> None:
        self._end("completed")
        self._item = item
        self._add("response.output_item.added", output_index=len(self.body["output"]), item=dict(item))

    def _add_reasoning(self, text: str) -> None:
        if not self._is("reasoning"):
            self._open({"id": _id("rs"), "type": "reasoning", "status": "in_progress", "summary": [], "content": []})
            if self._summary:
                part = {"type": "summary_text", "text": ""}
                self._add_to_item("response.reasoning_summary_part.added", summary_index=0, part=part)
            else:
                part = {"type": "reasoning_text", "text": ""}
                self._add_to_item("response.content_part.added", content_index=0, part=part)
        self._pieces.append(text)
        if self._summary:
            self._add_to_item("response.reasoning_summary_text.delta", summary_index=0, delta=text)
        else:
            self._add_to_item("response.reasoning_text.delta", content_index=0, delta=text)

    def _add_text(self, text: str) -> None:
        if not self._is("message"):
            self._open(
                {"id": _id("msg"), "type": "message", "status": "in_progress", "role": "assistant", "content": []}
            )
            self._add_to_item("response.content_part.added", content_index=0, part=_output_text(""))
        self._pieces.append(text)
        self._add_to_item("response.output_text.delta", content_index=0, delta=text, logprobs=[])

    def _begin_call(self, id: str, name: str) -> None:
        tool = self._tools.called(name)
        names = {"name": tool.name, **({"namespace": tool.namespace} if tool.namespace else {})}
        if tool.custom:
            kind: Json = {"id": _id("ctc"), "type": "custom_tool_call", "input": ""}
        else:
            kind = {"id": _id("fc"), "type": "function_call", "arguments": ""}
        self._open({**kind, "status": "in_progress", "call_id": id, **names})

    def _add_arguments(self, text: str) -> None:
        self._pieces.append(text)
        if self._is("function_call"):
            self._add_to_item("response.function_call_arguments.delta", delta=text)

    def _end_call(self, call: ToolCall) -> None:
        if self._is("custom_tool_call"):
            self._pieces = [self._tools.called(call.name).text(call.arguments)]
            self._add_to_item("response.custom_tool_call_input.delta", delta=self._pieces[0])
        self._end("completed")

    def _end(self, status: str) -> None:
        """Close the item that is open, if there is one."""
        item, text = self._item, "".join(self._pieces)
        if item is None:
            return
        kind = item["type"]
        if kind == "message":
            part = _output_text(text)
            self._add_to_item("response.output_text.done", content_index=0, text=text, logprobs=[])
            self._add_to_item("response.content_part.done", content_index=0, part=part)
            item["content"] = [part]
        elif kind == "reasoning":
            self._end_reasoning(item, text)
        elif kind == "function_call":
            self._add_to_item("response.function_call_arguments.done", name=item["name"], arguments=text)
            item["arguments"] = text
        else:
            self._add_to_item("response.custom_tool_call_input.done", input=text)
            item["input"] = text
        item["status"] = status
        self._add("response.output_item.done", output_index=len(self.body["output"]), item=dict(item))
        self.body["output"].append(item)
        self._item, self._pieces = None, []

    def _end_reasoning(self, item: Json, text: str) -> None:
        if self._summary:
            part = {"type": "summary_text", "text": text}
            self._add_to_item("response.reasoning_summary_text.done", summary_index=0, text=text)
            self._add_to_item("response.reasoning_summary_part.done", summary_index=0, part=part)
            item["summary"] = [part]
        else:
            part = {"type": "reasoning_text", "text": text}
            self._add_to_item("response.reasoning_text.done", content_index=0, text=text)
            self._add_to_item("response.content_part.done", content_index=0, part=part)
            item["content"] = [part]
        item["encrypted_content"] = pack(text)  # the only part of reasoning that Codex sends back

    def _finish(self, reply: Reply) -> None:
        whole = reply.finish_reason in ("stop", "tool_calls")
        self._end("completed" if whole else "incomplete")
        usage = reply.usage
        self.body |= {
            "status": "completed" if whole else "incomplete",
            "incomplete_details": None if whole else {"reason": "max_output_tokens"},
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.generated_tokens,
                "output_tokens_details": {"reasoning_tokens": reply.reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.generated_tokens,
            },
        }
        self._add_response("response.completed" if whole else "response.incomplete")
        self.finished = True


def _output_text(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(16)}"
