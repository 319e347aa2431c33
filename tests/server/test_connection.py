"""What a connection answers to bytes that are not valid HTTP, and to requests for WebSocket."""

from __future__ import annotations

import json
import logging
import socket

import pytest

POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


def answer(server: str, request: bytes, rest: bytes = b"") -> tuple[bytes, dict[str, str], bytes]:
    """The status line, the headers and the body that a server sends before it closes the connection.

    rest: sent after the server has read `request`, as far as that can be known.
    """
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(request)
        if rest:
            assert client.recv(100).startswith(b"HTTP/1.1 100")  # a handler waits for the body
            client.sendall(rest)
        received = b""
        while piece := client.recv(4096):
            received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return status.encode(), {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}, body


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"hello\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000,
    ],
    ids=["no HTTP", "two hosts", "two lengths", "long headers"],
)
def test_what_is_not_http_is_refused_like_other_requests(request_bytes: bytes, server: str) -> None:
    status, headers, body = answer(server, request_bytes)
    assert status == b"HTTP/1.1 400 Bad Request"
    assert (headers["content-type"], headers["connection"]) == ("application/json", "close")
    assert headers["x-request-id"].startswith("req_")
    assert int(headers["content-length"]) == len(body)
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_http")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat"])
def test_a_body_that_is_not_http_is_refused_in_the_format_of_its_api(
    path: str, server: str, caplog: pytest.LogCaptureFixture
) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: mine\r\n".encode()
    status, headers, body = answer(
        server, head + b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n", b"wrong\r\n"
    )
    assert (status, headers["x-request-id"]) == (b"HTTP/1.1 400 Bad Request", "mine")
    error = json.loads(body)["error"]
    assert "not valid HTTP" in (error if path == "/api/chat" else error["message"])
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.WARNING] == []


def test_a_request_for_websocket_is_answered_without_advice_in_the_log(
    server: str, caplog: pytest.LogCaptureFixture
) -> None:
    upgrade = b"Connection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n"
    status, _, _ = answer(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + upgrade)
    assert status.startswith(b"HTTP/1.1 200")
    assert "upgrade" not in caplog.text.lower()
