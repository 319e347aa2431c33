"""/health and /metrics."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from asgi import call, exchange, post

import npqwen
from npqwen.server import app
from npqwen.server.app import application
from npqwen.server.models import Models
from npqwen.server.offer import Offer
from npqwen.server.settings import Settings
from npqwen.server.statistics import WorkerStatistics
from npqwen.server.worker import Worker

HI = [{"role": "user", "content": "Hi"}]
LINE = re.compile(r'([a-z_]+)(?:\{model="((?:[^"\\]|\\.)*)"\})? (\S+)')


def scraped(text: str) -> dict[tuple[str, str | None], float]:
    """The samples of a text in Prometheus' format, by name and model; every one must have a TYPE before it."""
    found: dict[tuple[str, str | None], float] = {}
    kinds: dict[str, str] = {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            match = LINE.fullmatch(line)
            assert match is not None, line
            assert kinds[match[1]] == ("counter" if match[1].endswith("_total") else "gauge")
            found[match[1], match[2]] = float(match[3])
    return found


def with_statistics(statistics: WorkerStatistics) -> object:
    return mock.patch.object(Worker, "statistics", property(lambda self: statistics))


def test_health_is_the_engines_and_not_the_sockets(tiny_model: npqwen.Model) -> None:
    served = app(tiny_model)
    now = time.monotonic()
    states = {
        "idle for long": (WorkerStatistics(heartbeat=now - 1e6), 200),
        "busy": (WorkerStatistics(running=3, heartbeat=now - 5), 200),
        "stalled in a pass": (WorkerStatistics(running=1, heartbeat=now - 1000), 503),
        "stalled with a queue": (WorkerStatistics(waiting=1, heartbeat=now - 1000), 503),
        "dead": (WorkerStatistics(alive=False), 503),
    }
    for name, (statistics, status) in states.items():
        with with_statistics(statistics):  # type: ignore[attr-defined]
            reply = call(served, "GET", "/health")
            assert reply.status == status, name
            assert reply.json["status"] == ("ok" if status == 200 else "stalled")
            stalled = scraped(call(served, "GET", "/metrics").body.decode())["npqwen_engine_stalled", tiny_model.name]
            assert stalled == (status == 503)
        assert call(served, "GET", "/v1/models").status == 200  # which tells nothing


def test_health_says_when_the_first_model_is_being_loaded(tiny: Callable[[int], Path]) -> None:
    gate = threading.Event()
    made = Offer.of(tiny(4), "m", threads=1)

    def load() -> npqwen.Model:
        gate.wait(30)
        return made.load()

    models = Models(replace(made, load=load))
    served = application(models, Settings())

    async def main() -> None:
        loading = asyncio.create_task(models.worker(None))
        await asyncio.sleep(0)
        reply = await exchange(served, "GET", "/health")
        assert (reply.status, reply.json["status"]) == (503, "loading")
        assert reply.headers["retry-after"] == "1"
        gate.set()
        await loading
        assert (await exchange(served, "GET", "/health")).status == 200
        await models.unload("m")  # it is loaded by the next request
        assert (await exchange(served, "GET", "/health")).status == 200
        await models.close()

    asyncio.run(main())


def test_metrics_have_the_numbers_of_every_model(tiny_model: npqwen.Model, tiny: Callable[[int], Path]) -> None:
    statistics = WorkerStatistics(
        waiting=2,
        running=3,
        requests=10,
        prompt_tokens=1000,
        cached_tokens=400,
        generated_tokens=50,
        prefill_seconds=1.5,
        decode_seconds=2.0,
        cache_bytes=12345,
    )
    served = app(tiny_model, Offer.of(tiny(4), 'other "name"'))
    with with_statistics(statistics):  # type: ignore[attr-defined]
        found = scraped(call(served, "GET", "/metrics").body.decode())
    expected = {
        "model_loaded": 1,
        "requests_waiting": 2,
        "sequences_running": 3,
        "requests_total": 10,
        "prompt_tokens_total": 1000,
        "prompt_tokens_cached_total": 400,
        "generated_tokens_total": 50,
        "prefill_seconds_total": 1.5,
        "decode_seconds_total": 2,
        "prompt_tokens_per_second": 400,
        "generated_tokens_per_second": 25,
        "cache_bytes": 12345,
        "weight_bytes": sum(file.stat().st_size for file in tiny_model.path.glob("*.safetensors")),
    }
    for name, value in expected.items():
        assert found[f"npqwen_{name}", tiny_model.name] == value, name
        assert found[f"npqwen_{name}", r"other \"name\""] == 0, name


@pytest.mark.skipif(sys.platform == "win32", reason="needs ps")
def test_metrics_tell_the_memory_of_the_process(tiny_model: npqwen.Model) -> None:
    found = scraped(call(app(tiny_model), "GET", "/metrics").body.decode())["process_resident_memory_bytes", None]
    kilobytes = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, check=True).stdout
    assert found == pytest.approx(1024 * int(kilobytes), rel=0.1)


def test_the_text_routes_do_as_llama_server(tiny_model: npqwen.Model) -> None:
    served, tokenizer = app(tiny_model), tiny_model.tokenizer
    text = "Grüße, 世界 <|im_end|>"
    ids = tokenizer.encode(text)
    assert post(served, "/tokenize", {"content": text, "add_special": True}).json == {"tokens": ids}
    assert post(served, "/detokenize", {"tokens": ids}).json == {"content": text}
    plain = post(served, "/tokenize", {"content": text, "parse_special": False}).json["tokens"]
    assert not set(plain) & tokenizer.special_ids
    assert tokenizer.decode(plain) == text
    pieces = post(served, "/tokenize", {"content": text, "with_pieces": True}).json["tokens"]
    assert [piece["id"] for piece in pieces] == ids
    joined = b"".join(
        piece["piece"].encode() if isinstance(piece["piece"], str) else bytes(piece["piece"]) for piece in pieces
    )
    assert joined.decode() == text
    assert post(served, "/apply-template", {"messages": HI}).json == {"prompt": tiny_model.render(HI)}
    body = {"messages": HI, "chat_template_kwargs": {"enable_thinking": False}}
    assert post(served, "/apply-template", body).json == {"prompt": tiny_model.render(HI, thinking=False)}


@pytest.mark.parametrize(
    "fields", [{"add_generation_prompt": False}, {"chat_template_kwargs": {"add_generation_prompt": False}}]
)
def test_a_prompt_may_end_with_the_last_message(fields: dict[str, Any], tiny_model: npqwen.Model) -> None:
    reply = post(app(tiny_model), "/apply-template", {"messages": HI, **fields})
    assert reply.json == {"prompt": tiny_model.render(HI, add_generation_prompt=False)}


def test_the_prompt_is_the_one_of_a_chat(tiny_model: npqwen.Model) -> None:
    """Of fields and messages that the template does not read as they are."""
    messages = [{"role": "developer", "content": "Be brief."}, *HI, {"role": "system", "content": "Be kind."}]
    body = {"messages": messages, "reasoning_effort": "none", "max_tokens": 1}
    served = app(tiny_model)
    prompt = post(served, "/apply-template", body).json["prompt"]
    usage = post(served, "/v1/chat/completions", body).json["usage"]
    assert usage["prompt_tokens"] == len(tiny_model.tokenizer.encode(prompt))
    assert "Be brief." in prompt


@pytest.mark.parametrize(
    ("path", "body", "problem"),
    [
        ("/tokenize", {}, "content is missing"),
        ("/tokenize", {"content": 1}, "content is 1"),
        ("/tokenize", {"content": "\ud800"}, "surrogate"),
        ("/tokenize", {"content": "x", "model": "no"}, "model 'no' is not served"),
        ("/detokenize", {"tokens": ["x"]}, r"tokens[0] is 'x'"),
        ("/detokenize", {"tokens": [1, -1]}, r"tokens[1] is -1"),
        ("/detokenize", {"tokens": [10**9]}, r"tokens[0] is 1000000000"),
        ("/detokenize", {"tokens": [True]}, r"tokens[0] is True"),
        ("/apply-template", {"messages": []}, "empty"),
        ("/apply-template", {"messages": [{"role": "x", "content": ""}]}, "role"),
        ("/apply-template", {"messages": HI, "tools": [1]}, "tools"),
        ("/apply-template", {"messages": HI, "chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs.messages"),
        ("/apply-template", {"messages": HI, "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ("/apply-template", {"messages": HI, "chat_template_kwargs": {"thinking": 1}}, "chat_template_kwargs.thinking"),
        ("/apply-template", {"messages": HI, "chat_template_kwargs": {"self": 1}}, "chat_template_kwargs.self"),
        ("/apply-template", {"messages": HI, "add_generation_prompt": 1}, "add_generation_prompt is 1"),
        ("/v1/chat/completions", {"messages": HI, "chat_template_kwargs": {"self": 1}}, "chat_template_kwargs.self"),
    ],
)
def test_wrong_bodies_of_text_routes(path: str, body: object, problem: str, tiny_model: npqwen.Model) -> None:
    reply = post(app(tiny_model), path, body)
    assert reply.status == (404 if "is not served" in problem else 400)
    assert problem in reply.json["error"]["message"]
