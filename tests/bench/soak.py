#!/usr/bin/env python3
"""Load a server for minutes with clients of which a third vanish, change their mind or send garbage.

    python tests/bench/soak.py [MODEL] --clients 64 --minutes 10

Starts `npqwen serve MODEL` (examples/tiny-qwen3) on 127.0.0.1 and asks it, one after another, the requests that the
clients will draw from: all APIs, streaming and not, n, seeds, penalties, stop strings, tools, shared prefixes. Then the
clients ask them together, and every finished answer must equal the one that was computed alone. Afterwards nothing may
run or wait, memory, threads and open files must be where they were after three tenths of the time, and the log must
have neither warnings nor errors. At last the server is killed while it answers, and must answer again after a restart.

Prints a series of samples and a table; the exit status is 1 if anything did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

import httpx
from server_process import ServerProcess, serve_command
from soak_requests import Answer, SoakRequest, events_of, long_requests, soak_requests

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen3"
BASE = 0.3
"""Part of the time after which the server's size is taken as normal."""
GROWTH = 1.05, 32e6
"""What memory may grow by from then on: a factor, and bytes beside it."""
PATIENCE = 120
"""Seconds without a byte after which a request counts as stuck."""
IDLE = 10
"""Seconds after the last request within which nothing may run or wait."""
_TROUBLE = re.compile(r"^\d{4}-\d\d-\d\d (?!.*Invalid HTTP request received)|Traceback|Error")
"""Lines of the server's output that should not be there: it warns of what is not HTTP, and of nothing else."""
SHOWN = 20
"""The most failures that are printed."""
_JSON = {"Content-Type": "application/json"}
_MESSAGES = [{"role": "user", "content": "hi"}]
_GARBAGE: list[tuple[str, str, bytes]] = [
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "hi"}]'),
    ("POST", "/v1/chat/completions", b"\xff\xfe\x00"),
    ("POST", "/v1/chat/completions", b""),
    ("POST", "/v1/chat/completions", b"[" * 100_000),
    ("POST", "/v1/chat/completions", json.dumps({"messages": "hi"}).encode()),
    ("POST", "/v1/chat/completions", json.dumps({"messages": _MESSAGES, "temperature": "hot"}).encode()),
    ("POST", "/v1/chat/completions", json.dumps({"messages": _MESSAGES, "n": 10**9}).encode()),
    ("POST", "/v1/chat/completions", json.dumps({"messages": _MESSAGES, "model": "nobody"}).encode()),
    ("POST", "/v1/completions", json.dumps({"prompt": [-1, 10**12]}).encode()),
    ("POST", "/v1/completions", json.dumps({"prompt": "water " * 20_000}).encode()),
    ("POST", "/v1/completions", b'{"prompt": "hi", "max_tokens": NaN}'),
    ("POST", "/v1/responses", json.dumps({"input": {"a": 1}}).encode()),
    ("POST", "/v1/messages", json.dumps({"messages": [{"role": 1}], "max_tokens": -3}).encode()),
    ("POST", "/api/chat", json.dumps({"messages": [None], "options": []}).encode()),
    ("POST", "/v1/chat/completion", json.dumps({"messages": _MESSAGES}).encode()),
    ("DELETE", "/v1/chat/completions", b""),
    ("GET", "/v1/../etc/passwd", b""),
    ("GET", "/no/such/path", b""),
]
"""Requests that are refused: method, path and body."""


@dataclass
class Sample:
    """The size of the server, and its work, at one moment."""

    seconds: float
    memory: float
    threads: int
    files: int
    cache: float
    running: float
    waiting: float


@dataclass
class Load:
    """Clients of one server, and what they have seen."""

    url: str
    pool: list[SoakRequest]
    long: list[SoakRequest]
    expected: list[list[Answer]] = field(default_factory=list)
    end: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def client(self) -> httpx.AsyncClient:
        """A client with connections of its own."""
        return httpx.AsyncClient(base_url=self.url, timeout=httpx.Timeout(PATIENCE), verify=False, trust_env=False)

    def fail(self, what: str) -> None:
        """Note something that must not happen."""
        self.counts["failures"] += 1
        self.failures.append(what)

    async def learn(self) -> None:
        """Ask every request alone; the answers are what the load must give."""
        async with self.client() as client:
            for request in self.pool:
                response = await client.post(request.api.path, content=request.content(False), headers=_JSON)
                if response.status_code != 200:
                    raise SystemExit(f"{request.api.path} refuses {request.body}: {response.text}")
                self.expected.append(request.api.whole(response.json()))

    async def run(self, clients: int, seconds: float, seed: int) -> None:
        """Let clients ask until the time is over, every third of them an unruly one."""
        self.end = time.monotonic() + seconds
        await asyncio.gather(*[self._client(number, Random(seed * 10_000 + number)) for number in range(clients)])

    async def _client(self, number: int, random: Random) -> None:
        act = self._misbehave if number % 3 == 2 else self._ask
        async with self.client() as client:
            while time.monotonic() < self.end:
                try:
                    await act(client, random)
                except Exception as error:
                    self.fail(f"{act.__name__}: {type(error).__name__}: {error}")
                await asyncio.sleep(random.random() * 0.5)

    async def _ask(self, client: httpx.AsyncClient, random: Random) -> None:
        """Ask one request and compare its answer."""
        at, stream = random.randrange(len(self.pool)), random.random() < 0.6
        request = self.pool[at]
        response = await client.post(request.api.path, content=request.content(stream), headers=_JSON)
        if response.status_code == 503:
            self.counts["queue full (503)"] += 1
            await asyncio.sleep(min(2.0, float(response.headers["retry-after"])))
            return
        if response.status_code != 200:
            self.fail(f"{request.api.path} {response.status_code}: {response.text[:300]}")
            return
        found = request.api.streamed(events_of(response.text)) if stream else request.api.whole(response.json())
        self.counts[f"answers compared, {'streamed' if stream else 'whole'}"] += 1
        if found != self.expected[at]:
            self.counts["wrong answers"] += 1
            self.fail(f"wrong answer to {request.body}:\n    {found}\n    alone: {self.expected[at]}")

    async def _misbehave(self, client: httpx.AsyncClient, random: Random) -> None:
        acts: list[Callable[[httpx.AsyncClient, Random], Awaitable[None]]] = [
            self._vanish_in_prefill,
            self._vanish_in_stream,
            self._vanish_without_stream,
            self._change_mind,
            self._send_garbage,
            self._send_half_a_body,
        ]
        await random.choice(acts)(client, random)

    async def _vanish_in_prefill(self, client: httpx.AsyncClient, random: Random) -> None:
        """Go before a long prompt has been read."""
        await self._leave(client, random.choice(self.long), random, 0)
        self.counts["vanished in the prompt"] += 1

    async def _vanish_in_stream(self, client: httpx.AsyncClient, random: Random) -> None:
        """Go after some events."""
        await self._leave(client, random.choice(self.pool), random, random.randint(1, 30))
        self.counts["vanished in the stream"] += 1

    async def _vanish_without_stream(self, client: httpx.AsyncClient, random: Random) -> None:
        """Go before an answer that does not stream."""
        request = random.choice(self.pool + self.long)
        with contextlib.suppress(asyncio.TimeoutError):
            asking = client.post(request.api.path, content=request.content(False), headers=_JSON)
            await asyncio.wait_for(asking, random.random() * 0.3)
        self.counts["vanished, no stream"] += 1

    async def _change_mind(self, client: httpx.AsyncClient, random: Random) -> None:
        """Leave an answer for the next question."""
        await self._leave(client, random.choice(self.pool), random, random.randint(1, 10))
        self.counts["changed their mind"] += 1
        await self._ask(client, random)

    async def _leave(self, client: httpx.AsyncClient, request: SoakRequest, random: Random, events: int) -> None:
        """Begin to read a stream, and close the connection after so many lines, or a moment after the headers."""
        content = request.content(True)
        async with client.stream("POST", request.api.path, content=content, headers=_JSON) as response:
            if response.status_code not in (200, 503):
                self.fail(f"{request.api.path} {response.status_code}")
            lines = response.aiter_lines()
            for _ in range(events):
                if await anext(lines, None) is None:
                    return
            if not events:
                await asyncio.sleep(random.random() * 0.1)

    async def _send_garbage(self, client: httpx.AsyncClient, random: Random) -> None:
        method, path, content = random.choice(_GARBAGE)
        response = await client.request(method, path, content=content, headers=_JSON)
        self.counts[f"garbage refused ({response.status_code // 100}xx)"] += 1
        if not 400 <= response.status_code < 500:
            self.fail(f"{method} {path} {content[:60]!r}: {response.status_code} {response.text[:200]}")

    async def _send_half_a_body(self, client: httpx.AsyncClient, random: Random) -> None:
        """Announce a body and send a part of it, or send something that is not HTTP, and go."""
        port = httpx.URL(self.url).port
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n"
        _reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(ConnectionError):
            writer.write(random.choice([head + b'{"messages": [', head[:40], os.urandom(200) + b"\r\n\r\n"]))
            await writer.drain()
            await asyncio.sleep(random.random() * 0.2)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        self.counts["half a body, or no HTTP"] += 1


async def watch(server: ServerProcess, interval: float, samples: list[Sample]) -> None:
    """Take samples until this is cancelled."""
    start = time.monotonic()
    while True:
        samples.append(await asyncio.to_thread(take_sample, server, time.monotonic() - start))
        await asyncio.sleep(interval)


def take_sample(server: ServerProcess, seconds: float) -> Sample:
    """The server's size now."""
    metrics = server.metrics()
    return Sample(
        seconds,
        metrics.get("process_resident_memory_bytes", 0.0),
        server.threads,
        server.files,
        metrics["npqwen_cache_bytes"],
        metrics["npqwen_sequences_running"],
        metrics["npqwen_requests_waiting"],
    )


def wait_idle(server: ServerProcess) -> float | None:
    """Seconds until nothing runs or waits; None if that takes too long."""
    start = time.monotonic()
    while (seconds := time.monotonic() - start) < IDLE:
        sample = take_sample(server, 0)
        if not sample.running and not sample.waiting:
            return seconds
        time.sleep(0.05)
    return None


async def answers_after_kill(load: Load, server: ServerProcess, command: list[str]) -> ServerProcess:
    """Kill the server while it answers, start it again and ask it anew. Returns the new one."""
    clients = [load.client() for _ in range(8)]
    try:
        asking = [
            asyncio.ensure_future(client.post(one.api.path, content=one.content(False), headers=_JSON))
            for client, one in zip(clients, load.long, strict=True)
        ]
        await asyncio.sleep(0.3)
        server.kill()
        results = await asyncio.gather(*asking, return_exceptions=True)
    finally:
        for client in clients:
            await client.aclose()
    load.counts["requests that died with the server"] = sum(isinstance(one, httpx.HTTPError) for one in results)
    again = await asyncio.to_thread(ServerProcess, command, server.log, port=server.port)
    async with load.client() as client:
        for request, expected in list(zip(load.pool, load.expected, strict=True))[:10]:
            response = await client.post(request.api.path, content=request.content(False), headers=_JSON)
            load.counts["answers compared after kill -9"] += 1
            if response.status_code != 200 or request.api.whole(response.json()) != expected:
                load.fail(f"after a restart, {request.api.path} gives {response.status_code} {response.text[:300]}")
    return again


def soak(options: argparse.Namespace, log: Path) -> tuple[Load, list[Sample], list[tuple[str, str, bool]]]:
    """The load, samples, and checks: what was checked, what was found, whether that is right."""
    command = serve_command(options.model, "--threads", str(options.threads))
    server = ServerProcess(command, log)
    samples: list[Sample] = []
    checks: list[tuple[str, str, bool]] = []
    try:
        load = Load(server.url, soak_requests(options.requests, options.seed), long_requests(options.seed))
        seconds = 60 * options.minutes

        async def run() -> None:
            await load.learn()
            watching = asyncio.create_task(watch(server, max(0.5, seconds / 60), samples))
            await load.run(options.clients, seconds, options.seed)
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching

        asyncio.run(run())
        idle = wait_idle(server)
        stuck = "nothing runs or waits" if idle is not None else f"{take_sample(server, 0)}"
        checks.append(("after the last request", stuck, idle is not None))
        samples.append(take_sample(server, seconds))
        checks += level_checks(samples)
        server = asyncio.run(answers_after_kill(load, server, command))
        compared = sum(n for name, n in load.counts.items() if name.startswith("answers compared"))
        wrong = load.counts["wrong answers"]
        checks.insert(0, ("finished answers", f"{compared}, {wrong} of them wrong", compared > 0 and not wrong))
        checks.insert(1, ("other failures", str(load.counts["failures"] - wrong), load.counts["failures"] == wrong))
        status = server.stop()
        # Windows has no SIGTERM: the process just ends, with status 1.
        checks.append(("exit status after SIGTERM", str(status), status == 0 or sys.platform == "win32"))
    finally:
        if server.process.poll() is None:
            server.kill()
    output = log.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line for line in output if _TROUBLE.search(line)]
    checks.append(("warnings and errors in the log", str(len(lines)), not lines))
    load.failures += lines[:SHOWN]
    return load, samples, checks


def level_checks(samples: list[Sample]) -> list[tuple[str, str, bool]]:
    """Whether memory, threads and files have stayed where they were."""
    last = samples[-1]
    middle = [sample for sample in samples[:-1] if sample.seconds >= BASE * last.seconds]
    base = middle[: max(1, len(middle) // 5)]
    memory = max(sample.memory for sample in base)
    late = median(sample.memory for sample in middle[-max(1, len(middle) // 5) :])
    threads = max(sample.threads for sample in base)
    files = min(sample.files for sample in samples)
    return [
        (
            "memory",
            f"{memory / 1e6:.0f} MB after {base[0].seconds:.0f} s, {late / 1e6:.0f} MB at the end",
            late <= GROWTH[0] * memory + GROWTH[1],
        ),
        ("threads", f"{threads}, {last.threads} at the end", last.threads <= threads),
        ("open files", f"at least {files}, {last.files} at the end", last.files <= files + 2),
    ]


def report(load: Load, samples: list[Sample], checks: list[tuple[str, str, bool]]) -> str:
    """The series, what the clients did, and the checks, as Markdown."""
    lines = [
        "| second | memory, MB | threads | files | keys and values, MB | running | waiting |",
        "|---|---|---|---|---|---|---|",
    ]
    step = max(1, len(samples) // 20)
    for one in [*samples[:-1:step], samples[-1]]:
        cells = f"{one.seconds:.0f} | {one.memory / 1e6:.0f} | {one.threads} | {one.files} | {one.cache / 1e6:.0f}"
        lines.append(f"| {cells} | {one.running:.0f} | {one.waiting:.0f} |")
    lines += ["", "| what clients did | times |", "|---|---|"]
    lines += [f"| {name} | {count} |" for name, count in sorted(load.counts.items()) if name != "failures"]
    lines += ["", "| what must hold | found | |", "|---|---|---|"]
    lines += [f"| {name} | {found} | {'yes' if right else 'NO'} |" for name, found, right in checks]
    return "\n".join([*lines, *(["", "Failures:"] if load.failures else []), *load.failures[:SHOWN]])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(TINY), help="what `npqwen serve` takes")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--requests", type=int, default=60, help="how many different requests there are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="the server's")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server does not outlive this
    with tempfile.TemporaryDirectory() as directory:
        load, samples, checks = soak(options, Path(directory) / "server.log")
    print(report(load, samples, checks))
    if not all(right for _, _, right in checks):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
