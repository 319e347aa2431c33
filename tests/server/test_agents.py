"""Requests as Claude Code and Codex send them, and what these programs need while they wait."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from event_streams import MessageReader, ResponseReader, server_sent
from reciter import Reciter
from scripted import Held, ask, client, recorded
from serving import Runs, served, wait_until

from npqwen.server import app, streaming

READ = '<tool_call>\n{"name": "Read", "arguments": {"file_path": "/home/me/shop/cart.py"}}\n</tool_call>'
EXEC = '<tool_call>\n{"name": "exec_command", "arguments": {"cmd": "cat cart.py"}}\n</tool_call>'
CLAUDE = ("/v1/messages?beta=true", "claude_code", READ, MessageReader)
CODEX = ("/v1/responses", "codex", EXEC, ResponseReader)
HEADERS = {
    "x-api-key": "local",
    "authorization": "Bearer local",
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27",
}
BOTH = pytest.mark.parametrize(("path", "name", "call", "reader"), [CLAUDE, CODEX], ids=["claude-code", "codex"])


@pytest.fixture
def short_keepalive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keepalives after 20 ms of silence."""
    monkeypatch.setattr(streaming, "KEEPALIVE", 0.02)


def said(text: str) -> str:
    return f"<think>\nI should read it again.\n</think>\n\nThe edit failed; I read the file again.\n{text}"


# --- the requests ---


def test_a_request_of_claude_code_is_read_whole_and_answered() -> None:
    model = Reciter(said(READ), context=16384)
    got = ask(model, CLAUDE[0], recorded("claude_code"))
    stream = MessageReader(server_sent(got.text.split("\n")))
    thought, text, call = stream.message["content"]
    assert thought["thinking"] == "I should read it again."
    assert text["text"] == "The edit failed; I read the file again."
    assert (call["name"], call["input"]) == ("Read", {"file_path": "/home/me/shop/cart.py"})
    assert stream.message["stop_reason"] == "tool_use"
    read = model.prompts[0]
    assert read.startswith(
        "<|im_start|>system\nYou are Claude Code, Anthropic's official CLI for Claude.\n\nYou are an"
    )
    assert "billing" not in read
    assert read.count('{"type": "function", "function": {"name": ') == 18
    assert "web_search_20250305" not in read
    assert "The user has opened the file /home/me/shop/cart.py in the IDE." in read
    first, second = "-item.price for item in cart", "shop.py:12"
    assert read.index(first) < read.index(second), "the results are not in the order of the calls"
    end = "<tool_response>\n<tool_use_error>File has been modified since read.</tool_use_error>\n</tool_response>"
    assert read.endswith(f"<|im_start|>user\n{end}<|im_end|>\n<|im_start|>assistant\n")


def test_two_requests_of_claude_code_have_one_prefix() -> None:
    first, second = recorded("claude_code"), recorded("claude_code")
    second["system"][0]["text"] = "x-anthropic-billing-header: cc_version=2.1.160.9ab; cc_entrypoint=cli; cch=00001;"
    second["messages"].append({"role": "assistant", "content": [{"type": "text", "text": "Done."}]})
    second["messages"].append({"role": "user", "content": "thanks"})
    prompts = []
    for request in (first, second):
        model = Reciter("Yes.", context=16384)
        ask(model, CLAUDE[0], request)
        prompts.append(model.prompts[0])
    tools = prompts[0].index("<|im_start|>user")
    assert prompts[0][:tools] == prompts[1][:tools]


def test_claude_code_can_count_tokens_of_its_request_without_max_tokens() -> None:
    request = recorded("claude_code")
    model = Reciter("Yes.", context=16384)
    ask(model, CLAUDE[0], request)
    for name in ("max_tokens", "stream", "metadata", "context_management"):
        del request[name]
    counted = ask(model, "/v1/messages/count_tokens?beta=true", request)
    assert counted.json() == {"input_tokens": len(model.prompt_ids[0])}


def test_a_request_of_codex_is_read_whole_and_answered() -> None:
    model = Reciter(said(EXEC), context=16384)
    got = ask(model, CODEX[0], recorded("codex"))
    stream = ResponseReader(server_sent(got.text.split("\n")))
    thought, text, call = stream.items
    assert thought["summary"] == [{"type": "summary_text", "text": "I should read it again."}]
    assert text["content"][0]["text"] == "The edit failed; I read the file again."
    assert (call["name"], json.loads(call["arguments"])) == ("exec_command", {"cmd": "cat cart.py"})
    assert stream.response["status"] == "completed"
    assert stream.response["usage"]["total_tokens"] > len(model.prompt_ids[0])
    read = model.prompts[0]
    assert read.startswith("<|im_start|>system\nYou are Codex, a coding agent")
    assert "Approval policy: on-request.\n</permissions instructions>\n\n# Tools" in read
    assert read.count('{"type": "function", "function": {"name": ') == 9
    assert '"multi_agent_v1__spawn_agent"' in read
    assert '"mcp__tracker__get_issue"' in read
    assert "<think>\nI should read cart.py.\n</think>\n\nI'll look at the file and the issue.\n<tool_call>" in read
    first, second = "return sum(-item.price for item in cart)\n\n</tool_response>", "The total is negative."
    assert read.index(first) < read.index(second), "the results are not in the order of the calls"
    assert "Success. Updated the following files:" in read


# --- while they wait ---


@BOTH
@pytest.mark.usefixtures("short_keepalive")
def test_a_long_prompt_never_leaves_the_client_without_events(path: str, name: str, call: str, reader: Any) -> None:
    """Each line that arrives is part of an event that the API's clients parse: comments would not do."""
    model = Held(said(call), context=16384)
    with client(model) as http, http.stream("POST", path, json=recorded(name), headers=HEADERS) as got:
        stream = reader()
        for event in server_sent(got.iter_lines()):
            stream.push(event)
            if keepalives(stream) >= 4:
                model.go.set()
    assert stream.over
    assert keepalives(stream) >= 4


@BOTH
@pytest.mark.usefixtures("short_keepalive")
def test_a_long_call_is_never_silent(path: str, name: str, call: str, reader: Any) -> None:
    """Arguments come while they are written, and keepalives between their pieces."""
    tool, field = ("Write", "content") if name == "claude_code" else ("exec_command", "cmd")
    long = f'<tool_call>\n{{"name": "{tool}", "arguments": {{"{field}": "{"line after line " * 50}"}}}}\n</tool_call>'
    model = Held(long, context=16384, at=100)
    pieces: list[str] = []
    waited = 0
    with client(model) as http, http.stream("POST", path, json=recorded(name), headers=HEADERS) as got:
        stream = reader()
        for event in server_sent(got.iter_lines()):
            before = keepalives(stream)
            stream.push(event)
            if delta := event.get("delta"):
                pieces.append(delta if isinstance(delta, str) else delta.get("partial_json", ""))
            elif pieces and keepalives(stream) > before and not model.go.is_set():
                waited += 1
                if waited == 3:
                    assert len("".join(pieces)) > 100, "no arguments came while the call was being written"
                    model.go.set()
    assert waited == 3
    assert "".join(pieces) == f'{{"{field}": "{"line after line " * 50}"}}'


def keepalives(stream: MessageReader | ResponseReader) -> int:
    return stream.pings - 1 if isinstance(stream, MessageReader) else stream.keepalives


@BOTH
def test_the_first_event_comes_before_the_prompt_is_read(path: str, name: str, call: str, reader: Any) -> None:
    model = Held(said(call), context=16384)
    with client(model) as http, http.stream("POST", path, json=recorded(name)) as got:
        events = server_sent(got.iter_lines())
        assert next(events)["type"] in ("message_start", "response.created")
        assert next(events)["type"] in ("ping", "response.in_progress")
        assert model.calls == []
        model.go.set()
        assert [*events][-1]["type"] in ("message_stop", "response.completed")


@pytest.fixture
def held() -> Iterator[Held]:
    """A model that waits before it reads a prompt, until the test is over."""
    model = Held(said(READ), context=16384)
    yield model
    model.go.set()


@BOTH
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_request(
    path: str, name: str, call: str, reader: Any, stream: bool, held: Held, runs: Runs
) -> None:
    body = json.dumps(recorded(name) | {"stream": stream}).encode()
    model: Any = held
    with served(app(model)) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as sent:
            head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(body)}\r\n\r\n"
            sent.sendall(head.encode() + body)
            wait_until(lambda: runs.all)
            if stream:
                assert sent.recv(15) == b"HTTP/1.1 200 OK"
            assert not runs.newest.cancelled
        wait_until(lambda: runs.newest.cancelled)
        held.go.set()


@BOTH
def test_keys_and_versions_in_headers_are_no_problem(path: str, name: str, call: str, reader: Any) -> None:
    with client(Reciter(said(call), context=16384)) as http:
        response: httpx.Response = http.post(path, json=recorded(name) | {"stream": False}, headers=HEADERS)
    assert response.status_code == 200
