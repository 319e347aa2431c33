"""Readers of the streams of Anthropic's and OpenAI's APIs that fail on whatever comes out of order.

They share no code with the server, and know what the APIs' documentation says about their events.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

Json = dict[str, Any]


def server_sent(lines: Iterable[str]) -> Iterator[Json]:
    """The data of named server-sent events, from the lines of a stream; the name must be the data's type."""
    name = data = None
    for line in lines:
        if line.startswith("event: "):
            assert name is None
            name = line[len("event: ") :]
        elif line.startswith("data: "):
            assert data is None
            data = json.loads(line[len("data: ") :])
        elif not line.startswith(":"):  # a comment
            assert line == "", f"neither event nor data: {line!r}"
            if data is not None:
                assert data["type"] == name
                yield data
            name = data = None
    assert name is None
    assert data is None


class MessageReader:
    """Builds a message of Anthropic's Messages API from its stream.

    message: the message so far. pings: how many came. error: what ended the stream early.
    """

    def __init__(self, events: Iterable[Json] = ()) -> None:
        self.message: Json = {}
        self.pings = 0
        self.error: Json | None = None
        self.over = False
        self._open: Json | None = None
        self._text = ""
        self._next = 0
        for event in events:
            self.push(event)

    def push(self, event: Json) -> None:
        assert not self.over, f"{event['type']} after the end"
        getattr(self, f"_{event['type']}")(event)

    def _ping(self, event: Json) -> None:
        assert event == {"type": "ping"}
        self.pings += 1

    def _error(self, event: Json) -> None:
        assert event.keys() == {"type", "error", "request_id"}
        assert event["error"].keys() == {"type", "message"}
        self.error, self.over = event["error"], True

    def _message_start(self, event: Json) -> None:
        assert not self.message
        self.message = event["message"]
        assert self.message["content"] == []
        assert self.message["stop_reason"] is None
        assert self.message["usage"]["input_tokens"] > 0

    def _content_block_start(self, event: Json) -> None:
        assert self.message
        assert self.message["stop_reason"] is None
        assert self._open is None, "a block in a block"
        assert event["index"] == self._next
        self._open, self._text = event["content_block"], ""
        empty: dict[str, Json] = {
            "text": {"text": ""},
            "thinking": {"thinking": "", "signature": ""},
            "tool_use": {"input": {}, "name": self._open.get("name"), "id": self._open.get("id")},
        }
        assert self._open == {"type": self._open["type"], **empty[self._open["type"]]}

    def _content_block_delta(self, event: Json) -> None:
        assert self._open is not None, "a delta outside of blocks"
        assert event["index"] == self._next
        delta, kind = event["delta"], self._open["type"]
        assert not self._open.get("signature"), "a delta after the signature"
        key = {
            ("text", "text_delta"): "text",
            ("thinking", "thinking_delta"): "thinking",
            ("thinking", "signature_delta"): "signature",
            ("tool_use", "input_json_delta"): "partial_json",
        }[kind, delta["type"]]
        assert delta.keys() == {"type", key}
        if key == "partial_json":
            self._text += delta[key]
        else:
            assert delta[key]
            self._open[key] += delta[key]

    def _content_block_stop(self, event: Json) -> None:
        assert self._open is not None
        assert event["index"] == self._next
        if self._open["type"] == "tool_use":
            self._open["input"] = json.loads(self._text)
        else:
            assert self._open["text" if self._open["type"] == "text" else "signature"]
        self.message["content"].append(self._open)
        self._open, self._next = None, self._next + 1

    def _message_delta(self, event: Json) -> None:
        assert self._open is None, "the message ends within a block"
        assert self.message["stop_reason"] is None
        assert event["delta"].keys() == {"stop_reason", "stop_sequence"}
        self.message.update(event["delta"])
        assert self.message["stop_reason"] in ("end_turn", "tool_use", "max_tokens", "stop_sequence")
        self.message["usage"].update(event["usage"])

    def _message_stop(self, event: Json) -> None:
        assert event == {"type": "message_stop"}
        assert self.message["stop_reason"] is not None
        self.over = True


_DELTAS = {
    "output_text": "response.output_text",
    "reasoning_text": "response.reasoning_text",
    "summary_text": "response.reasoning_summary_text",
}


class ResponseReader:
    """Builds a response of OpenAI's Responses API from its stream.

    items: the finished ones. keepalives: repeated response.in_progress events. response: the last event's.
    """

    def __init__(self, events: Iterable[Json] = ()) -> None:
        self.items: list[Json] = []
        self.keepalives = 0
        self.response: Json = {}
        self._count = 0
        self._item: Json | None = None
        self._part: Json | None = None
        self._text = ""
        self._said = False
        """Whether the done event of the open part, or call, has come."""
        for event in events:
            self.push(event)

    @property
    def over(self) -> bool:
        return bool(self.response) and self.response["status"] != "in_progress"

    def push(self, event: Json) -> None:
        assert event["sequence_number"] == self._count
        assert not self.over, f"{event['type']} after the end"
        kind = event["type"].removeprefix("response.")
        if "response" in event:
            self._read_response(kind, event["response"])
        else:
            assert self._count > 1, "an item before response.in_progress"
            assert event["output_index"] == len(self.items)
            if "item_id" in event:
                assert self._item is not None
                assert event["item_id"] == self._item["id"]
            self._read_item(kind, event)
        self._count += 1

    def _read_response(self, kind: str, response: Json) -> None:
        assert response["object"] == "response"
        if self.response:
            assert response["id"] == self.response["id"]
        if kind in ("created", "in_progress"):
            assert (kind == "created") == (self._count == 0)
            assert response["status"] == "in_progress"
            self.keepalives += self._count > 1
        else:
            assert kind in ("completed", "incomplete", "failed")
            assert response["status"] == kind
            assert self._item is None, "the response ends within an item"
            assert response["output"] == self.items
            assert (response["error"] is None) == (kind != "failed")
            assert (response["incomplete_details"] is None) == (kind != "incomplete")
            assert (response["usage"] is None) == (kind == "failed")
        self.response = response

    def _read_item(self, kind: str, event: Json) -> None:
        if kind == "output_item.added":
            assert self._item is None, "an item in an item"
            self._item, self._text, self._said = event["item"], "", False
            assert self._item["status"] == "in_progress"
            fields = {"function_call": "arguments", "custom_tool_call": "input"}
            assert self._item[fields.get(self._item["type"], "content")] in ([], "")
        elif kind == "output_item.done":
            assert self._item is not None
            self._read_done(event["item"])
        elif kind in ("content_part.added", "reasoning_summary_part.added"):
            assert self._item is not None
            assert self._part is None
            self._part = event["part"]
            assert self._part["text"] == ""
            expected = {
                ("message", "content_part.added"): "output_text",
                ("reasoning", "content_part.added"): "reasoning_text",
                ("reasoning", "reasoning_summary_part.added"): "summary_text",
            }
            assert self._part["type"] == expected[self._item["type"], kind]
            assert event["summary_index" if self._part["type"] == "summary_text" else "content_index"] == 0
        elif kind in ("content_part.done", "reasoning_summary_part.done"):
            assert self._part is not None
            assert self._said
            assert event["part"] == {**self._part, "text": self._text}
            self._part = None
            field = "summary" if kind.startswith("reasoning") else "content"
            assert self._item is not None
            self._item[field] = [event["part"]]
        else:
            self._read_text(f"response.{kind}", event)

    def _read_text(self, kind: str, event: Json) -> None:
        assert self._item is not None
        assert not self._said
        if self._part is not None:
            name, field = _DELTAS[self._part["type"]], "text"
        else:
            name, field = {
                "function_call": ("response.function_call_arguments", "arguments"),
                "custom_tool_call": ("response.custom_tool_call_input", "input"),
            }[self._item["type"]]
        if kind == f"{name}.delta":
            assert isinstance(event["delta"], str)
            self._text += event["delta"]
        else:
            assert kind == f"{name}.done"
            assert event[field] == self._text
            self._said = True

    def _read_done(self, item: Json) -> None:
        assert self._item is not None
        assert self._said
        assert self._part is None, "the item ends within a part"
        kind = item["type"]
        if kind in ("function_call", "custom_tool_call"):
            self._item["arguments" if kind == "function_call" else "input"] = self._text
        assert item["status"] in ("completed", "incomplete")
        assert item == {**self._item, "status": item["status"], **_opaque(item)}
        self.items.append(item)
        self._item = None


def _opaque(item: Json) -> Json:
    return {"encrypted_content": item["encrypted_content"]} if item["type"] == "reasoning" else {}
