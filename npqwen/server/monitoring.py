"""/health and /metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from npqwen.hardware.machine import resident_memory
from npqwen.server.json_text import JSONReply
from npqwen.server.models import Models, ModelState

STALLED = 300.0
"""Seconds without a heartbeat after which an engine with work to do counts as stalled. The longest pass takes less: 512
tokens of a large mixture-of-experts model that is read from an SD card."""


class _Metric(NamedTuple):
    name: str
    kind: str
    help: str
    value: Callable[[ModelState], float]


_METRICS = (
    _Metric("model_loaded", "gauge", "Whether the model is in memory.", lambda m: m.worker is not None),
    _Metric("requests_waiting", "gauge", "Requests in the queue.", lambda m: m.statistics.waiting),
    _Metric("sequences_running", "gauge", "Sequences that are being computed.", lambda m: m.statistics.running),
    _Metric("requests_total", "counter", "Requests that were started.", lambda m: m.statistics.requests),
    _Metric("prompt_tokens_total", "counter", "Tokens of prompts.", lambda m: m.statistics.prompt_tokens),
    _Metric(
        "prompt_tokens_cached_total",
        "counter",
        "Tokens of prompts that were in the cache and not computed.",
        lambda m: m.statistics.cached_tokens,
    ),
    _Metric("generated_tokens_total", "counter", "Generated tokens.", lambda m: m.statistics.generated_tokens),
    _Metric(
        "drafted_tokens_total",
        "counter",
        "Tokens that were drafted and verified in one pass with others.",
        lambda m: m.statistics.drafted_tokens,
    ),
    _Metric(
        "drafted_tokens_accepted_total",
        "counter",
        "Draft tokens that were accepted.",
        lambda m: m.statistics.accepted_tokens,
    ),
    _Metric("prefill_seconds_total", "counter", "Time spent on prompts.", lambda m: m.statistics.prefill_seconds),
    _Metric("decode_seconds_total", "counter", "Time spent generating.", lambda m: m.statistics.decode_seconds),
    _Metric(
        "prompt_tokens_per_second",
        "gauge",
        "Mean speed at which prompts were computed.",
        lambda m: _rate(m.statistics.prompt_tokens - m.statistics.cached_tokens, m.statistics.prefill_seconds),
    ),
    _Metric(
        "generated_tokens_per_second",
        "gauge",
        "Mean speed at which tokens were generated, all sequences together.",
        lambda m: _rate(m.statistics.generated_tokens, m.statistics.decode_seconds),
    ),
    _Metric("cache_bytes", "gauge", "Memory of keys and values.", lambda m: m.statistics.cache_bytes),
    _Metric("weight_bytes", "gauge", "Size of the mapped weights.", lambda m: m.offer.weight_bytes if m.worker else 0),
    _Metric(
        "engine_heartbeat_age_seconds",
        "gauge",
        "Time since the engine's last sign of life; 0 without an engine.",
        lambda m: max(0.0, time.monotonic() - m.statistics.heartbeat) if m.worker else 0.0,
    ),
    _Metric("engine_stalled", "gauge", "Whether the engine has stalled or died.", lambda m: is_stalled(m)),
)
"""Metrics of each model, with the prefix npqwen_."""


def routes(models: Models) -> list[Route]:
    """The routes over these models."""
    return [
        Route("/health", partial(health, models)),
        Route("/v1/health", partial(health, models)),
        Route("/metrics", partial(metrics, models)),
    ]


async def health(models: Models, request: Request) -> Response:
    """Whether requests are answered: 200, or 503 while the first model is being loaded or if an engine has stalled."""
    states = models.states
    if stalled := [state.name for state in states if is_stalled(state)]:
        return JSONReply({"status": "stalled", "models": stalled}, 503)
    first = states[0]
    if first.worker is None and first.loading:
        return JSONReply({"status": "loading", "models": [first.name]}, 503, {"Retry-After": "1"})
    return JSONReply({"status": "ok"})


def is_stalled(state: ModelState) -> bool:
    """Whether a model's engine has died, or has had work but no heartbeat for `STALLED` seconds."""
    if state.worker is None:
        return False
    found = state.statistics
    busy = found.running > 0 or found.waiting > 0
    return not found.alive or (busy and time.monotonic() - found.heartbeat > STALLED)


async def metrics(models: Models, request: Request) -> Response:
    """Metrics in Prometheus's text format; those of a model are labelled with its name."""
    return PlainTextResponse("".join(_lines(models.states)), media_type="text/plain; version=0.0.4")


def _lines(states: list[ModelState]) -> Iterator[str]:
    for metric in _METRICS:
        yield _head(f"npqwen_{metric.name}", metric.kind, metric.help)
        for state in states:
            yield f'npqwen_{metric.name}{{model="{_escaped(state.name)}"}} {_number(metric.value(state))}\n'
    resident = resident_memory()
    if resident is not None:
        name = "process_resident_memory_bytes"
        yield f"{_head(name, 'gauge', 'Memory of the process, mapped weights included.')}{name} {resident}\n"


def _head(name: str, kind: str, help: str) -> str:
    return f"# HELP {name} {help}\n# TYPE {name} {kind}\n"


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds else 0.0


def _number(value: float) -> str:
    return repr(value) if type(value) is float else repr(int(value))


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
