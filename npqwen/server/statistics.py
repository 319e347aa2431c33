"""Statistics of a model's work, for /health and /metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class WorkerStatistics:
    """A snapshot. Counts of tokens and seconds are sums since the worker's start."""

    waiting: int = 0
    """Requests in the queue."""
    running: int = 0
    """Sequences that are being computed."""
    requests: int = 0
    """Requests that were started."""
    prompt_tokens: int = 0
    """Tokens of prompts, including those found in the cache."""
    cached_tokens: int = 0
    """Tokens of prompts that were found in the cache."""
    generated_tokens: int = 0
    drafted_tokens: int = 0
    """Draft tokens that were verified."""
    accepted_tokens: int = 0
    """Draft tokens that were accepted."""
    prefill_seconds: float = 0.0
    """Spent in prefill passes."""
    decode_seconds: float = 0.0
    """Spent in decode passes."""
    cache_bytes: int = 0
    """Bytes of all keys and values: those of running requests, and those cached for later ones."""
    heartbeat: float = field(default_factory=time.monotonic)
    """The value of `time.monotonic` at the last heartbeat of the engine's thread."""
    alive: bool = True
    """Whether the engine's thread runs."""

    def plus(self, earlier: WorkerStatistics) -> WorkerStatistics:
        """These statistics, with the sums of a worker that has ended added."""
        return replace(self, **{name: getattr(self, name) + getattr(earlier, name) for name in _SUMS})


_SUMS = (
    *("requests", "prompt_tokens", "cached_tokens", "generated_tokens", "drafted_tokens", "accepted_tokens"),
    *("prefill_seconds", "decode_seconds"),
)
"""The fields that are sums."""
