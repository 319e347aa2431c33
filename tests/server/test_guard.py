"""What a server refuses: foreign hosts and pages, wrong keys, climbing paths, bodies that are too large or too slow."""

from __future__ import annotations

import hmac
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from asgi import call
from serving import served
from starlette.applications import Starlette
from starlette.routing import Mount

import npqwen
from npqwen.errors import OptionError
from npqwen.server import Offer, app, connection, guard
from npqwen.server.guard import climbs

KEY, OTHER = "sk-1", "sk-2"


@pytest.fixture(scope="module")
def open_app(tiny_model: npqwen.Model) -> Starlette:
    return app(tiny_model)


@pytest.fixture(scope="module")
def locked(tiny_model: npqwen.Model) -> Starlette:
    return app(tiny_model, api_keys=[KEY, OTHER])


def test_browsers_get_the_page_and_ollamas_clients_their_sentence(open_app: Starlette) -> None:
    browser = call(open_app, "GET", "/", {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert browser.headers["content-type"].startswith("text/html")
    client = call(open_app, "GET", "/", {"accept": "*/*"})
    assert (client.status, client.body, client.headers["vary"]) == (200, b"Ollama is running", "Accept")
    assert call(open_app, "HEAD", "/").status == 200


def test_only_models_and_offers_are_served(tiny: Callable[[int], Path]) -> None:
    with pytest.raises(OptionError, match=r"'tiny' is not a model; give npqwen\.load"):
        app("tiny")  # type: ignore[arg-type]
    assert Offer.of(str(tiny(4)), "named").name == "named"


# --- keys ---


@pytest.mark.parametrize("path", ["/v1/models", "/api/tags", "/metrics", "/nowhere", "/v1/messages"])
@pytest.mark.parametrize("header", [{}, {"authorization": "Bearer sk-3"}, {"x-api-key": "sk-"}, {"authorization": KEY}])
def test_without_a_right_key_nothing_is_told(path: str, header: dict[str, str], locked: Starlette) -> None:
    reply = call(locked, "GET", path, header)
    assert reply.status == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert b"tiny" not in reply.body
    assert "API key" in str(reply.json)


def test_a_key_learns_nothing_from_the_prompts_of_another(locked: Starlette) -> None:
    def cached(key: str, **fields: str) -> int:
        body = {"prompt": "PIN 673005 of the account, which is secret and must stay so.", "max_tokens": 1, **fields}
        reply = call(locked, "POST", "/v1/completions", {"authorization": f"Bearer {key}"}, json.dumps(body).encode())
        return int(reply.json["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached(KEY) == 0
    assert cached(KEY) > 16
    assert cached(OTHER) == 0
    assert cached(OTHER) > 16
    assert cached(OTHER, cache_salt="a") == 0


@pytest.mark.parametrize("key", [KEY, OTHER])
def test_each_key_is_enough_in_either_header(key: str, locked: Starlette) -> None:
    assert call(locked, "GET", "/v1/models", {"authorization": f"Bearer {key}"}).status == 200
    assert call(locked, "GET", "/v1/models", {"authorization": f"bearer {key}"}).status == 200
    assert call(locked, "GET", "/v1/models", {"x-api-key": key}).status == 200
    both = {"x-api-key": key, "authorization": "Bearer placeholder"}  # SDKs send both
    assert call(locked, "GET", "/v1/models", both).status == 200


def test_health_and_the_page_need_no_key(locked: Starlette) -> None:
    assert call(locked, "GET", "/health").status == 200
    assert call(locked, "GET", "/").status == 200
    assert call(locked, "GET", "/page/app.js").status == 200


def test_keys_are_compared_in_constant_time(locked: Starlette, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def noted(a: Any, b: Any) -> bool:
        compared.append((len(a), len(b)))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    assert call(locked, "GET", "/v1/models", {"x-api-key": KEY}).status == 200
    assert call(locked, "GET", "/v1/models", {"x-api-key": "x" * 1000}).status == 401
    assert compared == [(32, 32)] * 4


@pytest.mark.parametrize(
    "setting",
    [
        {"api_keys": ["a b"]},
        {"api_keys": [""]},
        {"api_keys": "sk-1"},
        {"api_keys": ["ä"]},
        {"api_keys": None},
        {"api_keys": b"sk-1"},
        {"hosts": 5},
        {"hosts": [None]},
        {"hosts": ["http://x"]},
        {"hosts": ["a b"]},
        {"origins": ["example.com"]},
        {"origins": ["http://example.com/path"]},
        {"body_limit": 0},
        {"queue": 0},
        {"memory": -1},
        {"keep_alive": "5m"},
        {"aliases": {"gpt": "no-such-model"}},
        {"aliases": None},
        {"aliases": ["gpt=tiny-qwen3-16"]},
        {"api_key": ["sk-1"]},
    ],
)
def test_impossible_settings_are_refused_at_the_door(setting: dict[str, Any], tiny_model: npqwen.Model) -> None:
    with pytest.raises(OptionError):
        app(tiny_model, **setting)


# --- hosts ---


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "192.168.1.5", "app.localhost:8000"]
)
def test_its_own_names_and_addresses_reach_the_server(host: str, open_app: Starlette) -> None:
    assert call(open_app, "GET", "/health", {"host": host}).status == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:1", "127.0.0.1.evil.example", "", "[", "::1"])
def test_a_name_that_was_rebound_to_this_machine_is_refused(host: str, open_app: Starlette) -> None:
    for path in ("/health", "/v1/models", "/api/tags"):
        reply = call(open_app, "GET", path, {"host": host})
        assert reply.status == 403
        assert "host" in str(reply.json).lower()


def test_further_names_are_allowed_by_a_setting(tiny_model: npqwen.Model) -> None:
    named = app(tiny_model, hosts=["Pi.local"])
    assert call(named, "GET", "/health", {"host": "pi.local:8000"}).status == 200
    assert call(named, "GET", "/health", {"host": "other.local:8000"}).status == 403
    assert call(app(tiny_model, hosts=["*"]), "GET", "/health", {"host": "evil.example"}).status == 200


# --- origins ---


@pytest.mark.parametrize("origin", ["http://evil.example", "http://localhost:3000", "https://localhost.evil", "null"])
def test_pages_of_other_sites_may_not_call_a_server_on_this_machine(origin: str, open_app: Starlette) -> None:
    page = {"origin": origin, "host": "localhost:8000"}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("POST", "/api/chat"), ("GET", "/")):
        reply = call(open_app, method, path, page, b'{"messages": [{"role": "user", "content": "hi"}]}')
        assert reply.status == 403
        assert ("open the page from a web server" if origin == "null" else f"--cors {origin}") in str(reply.json)
        assert not [name for name in reply.headers if name.startswith("access-control")]
    preflight = {**page, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    reply = call(open_app, "OPTIONS", "/v1/chat/completions", preflight)
    assert reply.status == 403
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_the_servers_own_page_may_call_it(open_app: Starlette) -> None:
    for host in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000"):
        assert call(open_app, "GET", "/v1/models", {"host": host, "origin": f"http://{host}"}).status == 200
    # Behind a proxy that ends TLS, the page's scheme is not the server's.
    assert call(open_app, "GET", "/v1/models", {"host": "localhost", "origin": "https://localhost"}).status == 200
    assert call(open_app, "GET", "/v1/models", {"host": "localhost:8000", "origin": "http://localhost"}).status == 403


def test_a_page_that_is_allowed_may_call_also_with_a_key(tiny_model: npqwen.Model) -> None:
    friendly = app(tiny_model, origins=["http://localhost:3000"], api_keys=[KEY])
    page = {"origin": "http://localhost:3000"}
    wanted = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    preflight = call(friendly, "OPTIONS", "/v1/chat/completions", {**page, **wanted})
    assert preflight.status == 200
    assert preflight.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    reply = call(friendly, "GET", "/v1/models", {**page, "authorization": f"Bearer {KEY}"})
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "http://localhost:3000")
    assert "access-control-allow-credentials" not in reply.headers
    refused = call(friendly, "GET", "/v1/models", page)  # the page can read why
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, "http://localhost:3000")
    other = call(friendly, "GET", "/v1/models", {"origin": "http://localhost:3001", "authorization": f"Bearer {KEY}"})
    assert other.status == 403
    assert call(app(tiny_model, origins=["HTTP://LocalHost:3000/"]), "GET", "/v1/models", page).headers[
        "access-control-allow-origin"
    ] == page["origin"]


def test_any_page_may_call_if_a_setting_says_so(tiny_model: npqwen.Model) -> None:
    reply = call(app(tiny_model, origins=["*"]), "GET", "/v1/models", {"origin": "https://anywhere.example"})
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "*")


@pytest.mark.parametrize("path", ["/slots", "/v1/stream", "/v1/responses", "/v1/conversations", "/api/me"])
def test_nobody_can_list_what_others_ask(path: str, open_app: Starlette) -> None:
    assert call(open_app, "GET", path).status in (404, 405)


# --- paths ---


@pytest.mark.parametrize(
    "path",
    [
        "/../etc/passwd",
        "/page/../../etc/passwd",
        "/page/%2e%2e/%2e%2e/etc/passwd",
        "/page/%252e%252e/etc/passwd",
        "/page/..%5c..%5cetc",
        "/v1/models/..",
        "/v1/models/%2E%2E%2fetc",
    ],
)
def test_a_path_with_dots_is_refused_encoded_or_not(path: str, open_app: Starlette) -> None:
    reply = call(open_app, "GET", path)
    assert reply.status == 400
    assert '".."' in str(reply.json)


def test_a_path_with_dots_is_refused_on_the_wire(server: str) -> None:
    host, port = server.removeprefix("http://").split(":")
    for path in (b"/../../etc/passwd", b"/page/%2e%2e%2fapp.py"):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert client.makefile("rb").read().startswith(b"HTTP/1.1 400 ")


def test_dots_in_names_are_no_climbing() -> None:
    assert not climbs("/v1/models/Qwen/Qwen3-0.6B..x")
    assert not climbs("/page/app.js")
    assert climbs("/a/..")


# --- sizes ---


def test_a_body_that_is_announced_as_too_large_is_not_read(tiny_model: npqwen.Model) -> None:
    small = app(tiny_model, body_limit=1000)
    reply = call(small, "POST", "/v1/chat/completions", {"content-length": "1001"}, [b"x" * 500] * 3)
    assert (reply.status, reply.read) == (413, 0)
    assert "1 kB" in reply.json["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat", "/tokenize"])
def test_a_chunked_body_is_read_up_to_the_limit_only(path: str, tiny_model: npqwen.Model) -> None:
    small = app(tiny_model, body_limit=1000)
    reply = call(small, "POST", path, {"transfer-encoding": "chunked"}, [b" " * 100] * 1000)
    assert (reply.status, reply.read) == (413, 11)
    assert "larger" in str(reply.json)


def test_a_body_of_the_limit_is_fine(tiny_model: npqwen.Model) -> None:
    body = b'{"content": "hi"}'
    small = app(tiny_model, body_limit=len(body))
    assert call(small, "POST", "/tokenize", {"content-length": str(len(body))}, body).status == 200
    assert call(small, "POST", "/tokenize", {}, [body[:5], body[5:]]).status == 200


# --- shapes, and mounting ---


def test_errors_have_the_shape_of_the_api_that_was_called(locked: Starlette) -> None:
    assert isinstance(call(locked, "GET", "/api/tags").json["error"], str)
    assert call(locked, "POST", "/v1/messages").json["error"]["type"] == "authentication_error"
    assert call(locked, "POST", "/v1/messages").json["type"] == "error"
    assert call(locked, "GET", "/v1/models").json["error"]["code"] == "invalid_api_key"


def test_unknown_paths_and_methods(open_app: Starlette) -> None:
    assert call(open_app, "GET", "/nowhere").json["error"]["message"] == "no such endpoint: /nowhere"
    assert call(open_app, "GET", "/api/nowhere").json == {"error": "no such endpoint: /api/nowhere"}
    wrong = call(open_app, "GET", "/api/chat")
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json == {"error": "/api/chat does not support GET"}


def test_mounted_below_a_prefix_everything_holds(tiny_model: npqwen.Model) -> None:
    outer = Starlette(routes=[Mount("/llm", app=app(tiny_model, api_keys=[KEY]))])
    assert call(outer, "GET", "/llm/health").status == 200
    assert call(outer, "GET", "/llm/v1/models").status == 401
    assert call(outer, "GET", "/llm/v1/models", {"x-api-key": KEY}).status == 200
    assert call(outer, "GET", "/llm/api/tags").json == {
        "error": "an API key is needed; send Authorization: Bearer KEY or x-api-key: KEY"
    }
    assert call(outer, "GET", "/llm/v1/../x").status == 400
    assert call(outer, "GET", "/llm/health", {"host": "evil.example"}).status == 403


def test_a_mounted_app_is_served_too(tiny_model: npqwen.Model) -> None:
    with served(Starlette(routes=[Mount("/llm", app=app(tiny_model))])) as url:
        assert httpx.get(f"{url}/llm/health").json() == {"status": "ok"}
        found = httpx.post(f"{url}/llm/tokenize", json={"content": "hi"}).json()
        assert found == {"tokens": tiny_model.tokenizer.encode("hi")}


def test_an_error_of_the_servers_own_tells_clients_nothing(
    tiny_model: npqwen.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr("npqwen.tokenizer.Tokenizer.encode", fail)
    with served(app(tiny_model)) as url:
        reply = httpx.post(f"{url}/tokenize", json={"content": "x"})
    assert reply.status_code == 500
    assert reply.json()["error"]["message"] == "internal error; the server's log has the details"


# --- time ---


def trickle(server: str, start: bytes, pause: float = 0.02) -> bytes:
    """What a server answers to a request that begins with `start` and goes on byte by byte, as long as it listens."""
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(start)
        client.settimeout(pause)
        received = b""
        for _ in range(1000):
            try:
                client.sendall(b"x")
                piece = client.recv(4096)
            except TimeoutError:
                continue
            except ConnectionError:
                return received
            if not piece:
                return received
            received += piece
    raise AssertionError("the server never lost patience")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat"])
@pytest.mark.parametrize("resumable", [b"", b"X-Resumable: true\r\n"])
def test_a_body_that_trickles_in_is_refused(
    path: str, resumable: bytes, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000\r\n".encode()
    answer = trickle(server, head + resumable + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 408 ")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    assert "of the body came in time" in (error if path == "/api/chat" else error["message"])
    if path == "/v1/messages":
        assert json.loads(body)["type"] == "error"


def test_a_large_body_may_take_longer(tiny_model: npqwen.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.0)
    reply = call(app(tiny_model), "POST", "/tokenize", None, [b'{"content": "a"', b" " * 50_000, b"}"])
    assert reply.status == 408  # with 0 seconds, not even the first chunk is in time
    monkeypatch.setattr(guard, "BODY_SECONDS", 30.0)
    reply = call(app(tiny_model), "POST", "/tokenize", None, [b'{"content": "a"', b" " * 50_000, b"}"])
    assert reply.status == 200


def test_headers_that_trickle_in_end_the_connection(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADERS_SECONDS", 0.2)
    assert trickle(server, b"GET /health HTTP/1.1\r\nX-Long: ") == b""


def test_headers_of_a_later_request_have_a_time_limit_too(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADERS_SECONDS", 0.2)
    first = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert trickle(server, first + b"GET /health HTTP/1.1\r\nX-Long: ").count(b"HTTP/1.1 200") == 1


def test_an_answer_may_take_longer_than_headers(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADERS_SECONDS", 0.1)
    host, port = server.removeprefix("http://").split(":")
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 16\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(head)
        time.sleep(0.3)
        client.sendall(b'{"content": "a"}')
        assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
