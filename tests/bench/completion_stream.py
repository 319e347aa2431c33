"""Streams of POST /v1/completions, and when their text came: a client that takes little of the machine's time.

One thread reads all connections and notes when bytes came; only when all streams have ended are they parsed.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SILENCE = 300.0
"""Seconds without any byte after which a server counts as stuck."""


class OtherTokensError(SystemExit):
    """A server counts other tokens than were requested: a text that was drawn may have ended early."""


@dataclass
class Stream:
    """A finished stream.

    sent, times: values of `time.perf_counter` when the request was sent, and when each event with text came. tokens:
    generated ones, as the server counts them; an event may have the text of several.
    """

    prompt_tokens: int
    sent: float
    tokens: int = 0
    cached: int = 0
    """Tokens of the prompt that were not computed."""
    times: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring events."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


class _Exchange:
    """A request, and the bytes of its response with the times at which they came."""

    def __init__(self, port: int, prompt: Sequence[int], tokens: int, more: Mapping[str, Any]) -> None:
        body = {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "stream": True}
        content = json.dumps({**body, "stream_options": {"include_usage": True}, **more}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        self._prompt_tokens, self._tokens = len(prompt), tokens
        self._pieces: list[tuple[float, bytes]] = []
        self.socket = socket.create_connection(("127.0.0.1", port))
        self._sent = time.perf_counter()
        self.socket.sendall(head.encode() + content)

    def read(self) -> bool:
        """Take what has come; returns whether there is more to come."""
        data = self.socket.recv(1 << 16)
        self._pieces.append((time.perf_counter(), data))
        return bool(data)

    def stream(self) -> Stream:
        """The finished stream. SystemExit if the server refuses, or counts other tokens than were requested."""
        raw = b"".join(data for _, data in self._pieces)
        head, _, body = raw.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(raw[:500].decode("utf-8", "replace"))
        found = Stream(self._prompt_tokens, self._sent)
        usage: dict[str, Any] = {}
        for moment, line in self._lines(len(head) + 4, body):
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            if any(choice["text"] for choice in event["choices"]):
                found.times.append(moment)
        found.tokens = usage.get("completion_tokens", 0)
        found.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        if found.tokens != self._tokens or usage["prompt_tokens"] != self._prompt_tokens:
            wanted = f"{self._prompt_tokens} + {self._tokens} tokens were wanted"
            raise OtherTokensError(f"{wanted}, but the server counts {usage}")
        return found

    def _lines(self, start: int, body: bytes) -> Iterator[tuple[float, bytes]]:
        """The lines of a body in chunked encoding, and when the last byte of each came. start: offset of the body."""
        arrivals = iter(self._pieces)
        moment, arrived = 0.0, 0
        at, rest = 0, b""
        while size := int(body[at : (data := body.index(b"\r\n", at) + 2)], 16):
            at = data + size + 2
            while arrived < start + data + size:
                moment, piece = next(arrivals)
                arrived += len(piece)
            *lines, rest = (rest + body[data : data + size]).split(b"\n")
            for line in lines:
                yield moment, line


def streams(
    port: int, prompts: Sequence[Sequence[Sequence[int]]], tokens: int, more: Mapping[str, Any]
) -> list[Stream]:
    """The streams of several clients at once, each of which generates `tokens` tokens greedily.

    prompts[i]: those that client i sends, one after another. more: fields to add to the requests. SystemExit if the
    server refuses a request, counts other tokens, or falls silent.
    """
    exchanges: list[list[_Exchange]] = [[] for _ in prompts]
    with selectors.DefaultSelector() as selector:

        def send(client: int) -> None:
            """Send the next request of a client."""
            exchange = _Exchange(port, prompts[client][len(exchanges[client])], tokens, more)
            exchanges[client].append(exchange)
            selector.register(exchange.socket, selectors.EVENT_READ, (client, exchange))

        try:
            for client in range(len(prompts)):
                send(client)
            while selector.get_map():
                ready = selector.select(SILENCE)
                if not ready:
                    raise SystemExit(f"the server has sent nothing for {SILENCE:.0f} seconds")
                for key, _ in ready:
                    client, exchange = key.data
                    if not exchange.read():
                        selector.unregister(exchange.socket)
                        exchange.socket.close()
                        if len(exchanges[client]) < len(prompts[client]):
                            send(client)
        finally:
            for exchange in (one for several in exchanges for one in several):
                exchange.socket.close()
    return [exchange.stream() for several in exchanges for exchange in several]


def decode_rate(found: Sequence[Stream]) -> float:
    """Tokens a second of all streams together while all of them were being written."""
    start, end = max(one.times[0] for one in found), min(one.times[-1] for one in found)
    inside = sum(one.tokens / len(one.times) * sum(start < moment <= end for moment in one.times) for one in found)
    return inside / (end - start)
