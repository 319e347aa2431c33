"""An answer in the format of the Messages API: the finished message, and the stream of its events."""

from __future__ import annotations

import secrets
from typing import Any

from npqwen.chat.events import CallArguments, CallStart, Finish, Reasoning, Reply, Text, UnfinishedCall
from npqwen.server.opaque_reasoning import pack, placeholder
from npqwen.server.run import RunEvent
from npqwen.tools.calls import ToolCall

Json = dict[str, Any]

_STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens", "loop": "max_tokens"}


class Message:
    """Converts a run's events into those of the API.

        message_start (content_block_start content_block_delta* content_block_stop)* message_delta message_stop

    Blocks follow one another in the order in which the model writes them: thinking, text, tool calls. `body` is the
    message so far; after the last event it is the reply to a client that does not stream.
    """

    def __init__(self, model: str, prompt_tokens: int, *, omit_thinking: bool = False) -> None:
        """omit_thinking: thinking blocks have no text; the client gets it in their signature, to send it back."""
        self.finished = False
        self._omit_thinking = omit_thinking
        self._broken = 0
        """Number of blocks that were sent as events, but are not in `body`."""
        self._pieces: list[str] = []
        """The text of the open block."""
        self._open = ""
        """The type of the block that is open, "" for none."""
        self.body: Json = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {
                "input_tokens": prompt_tokens,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": 0,
            },
        }

    def start(self) -> Json:
        """The first event."""
        return {"type": "message_start", "message": {**self.body, "content": [], "usage": dict(self.body["usage"])}}

    def push(self, event: RunEvent) -> list[Json]:
        """The API's events for an event of the run."""
        if isinstance(event, Reasoning):
            opened = self._begin({"type": "thinking", "thinking": "", "signature": ""})
            self._pieces.append(event.text)
            return opened + ([] if self._omit_thinking else [self._delta("thinking_delta", "thinking", event.text)])
        if isinstance(event, Text):
            opened = self._begin({"type": "text", "text": ""})
            self._pieces.append(event.text)
            return [*opened, self._delta("text_delta", "text", event.text)]
        if isinstance(event, CallStart):
            return self._begin({"type": "tool_use", "id": event.id, "name": event.name, "input": {}})
        if isinstance(event, CallArguments):
            return [self._delta("input_json_delta", "partial_json", event.text)]
        if isinstance(event, ToolCall):
            self.body["content"][-1]["input"] = event.arguments
            return self._end()
        if isinstance(event, UnfinishedCall):
            return self._broken_call()
        return self._finish(event.reply) if isinstance(event, Finish) else []

    def _begin(self, block: Json) -> list[Json]:
        """Open a block, unless one of its type that text can be appended to is open."""
        if self._open == block["type"] != "tool_use":
            return []
        closed = self._end()
        self._open = block["type"]
        self.body["content"].append(block)
        return [*closed, {"type": "content_block_start", "index": self._index, "content_block": dict(block)}]

    def _broken_call(self) -> list[Json]:
        """End the block of an unfinished call, and remove it from `body`, because nobody should run it.

        Indices in events still count it: a client that streams has seen it.
        """
        events = self._end()
        self.body["content"].pop()
        self._broken += 1
        return events

    def _end(self) -> list[Json]:
        """Close the block that is open, if there is one."""
        if not self._open:
            return []
        events: list[Json] = []
        block, text = self.body["content"][-1], "".join(self._pieces)
        if self._open == "text":
            block["text"] = text
        elif self._open == "thinking":
            block["thinking"] = "" if self._omit_thinking else text
            block["signature"] = pack(text) if self._omit_thinking else placeholder()
            events.append(self._delta("signature_delta", "signature", block["signature"]))
        self._open, self._pieces = "", []
        return [*events, {"type": "content_block_stop", "index": self._index}]

    def _delta(self, kind: str, key: str, text: str) -> Json:
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, key: text}}

    @property
    def _index(self) -> int:
        return len(self.body["content"]) + self._broken - 1

    def _finish(self, reply: Reply) -> list[Json]:
        closed = self._end()
        usage = reply.usage
        stopped = reply.finish_reason == "stop" and reply.stop_string is not None
        end: Json = {
            "stop_reason": "stop_sequence" if stopped else _STOP_REASONS[reply.finish_reason],
            "stop_sequence": reply.stop_string if stopped else None,
        }
        self.body |= end
        self.body["usage"] |= {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.generated_tokens,
            "output_tokens_details": {"thinking_tokens": reply.reasoning_tokens},
        }
        self.finished = True
        return [
            *closed,
            {"type": "message_delta", "delta": end, "usage": dict(self.body["usage"])},
            {"type": "message_stop"},
        ]
