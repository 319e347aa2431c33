"""Numbers about a model's work, for /health and /metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class WorkerStatistics:
    """A snapshot. Counts of tokens and seconds are sums since the worker's start."""

    waiting: int = 0
    """Requests that wait for their turn."""
    running: int = 0
    """Sequences that are being computed."""
    requests: int = 0
    """Requests that were started."""
    prompt_tokens: int = 0
    """Of prompts, those found in the cache included."""
    cached_tokens: int = 0
    """Of prompts, found in the cache."""
    generated_tokens: int = 0
    drafted_tokens: int = 0
    """Guessed, and run beside those of a text."""
    accepted_tokens: int = 0
    """Guessed, and found to be the text's."""
    prefill_seconds: float = 0.0
    """Spent in passes over prompts."""
    decode_seconds: float = 0.0
    """Spent in passes that generate."""
    cache_bytes: int = 0
    """Memory of all keys and values: of running requests, and kept for later ones."""
    heartbeat: float = field(default_factory=time.monotonic)
    """The value of `time.monotonic` when the engine's thread last gave a sign of life."""
    alive: bool = True
    """Whether the engine's thread runs."""

    def plus(self, earlier: WorkerStatistics) -> WorkerStatistics:
        """These numbers, and the sums of a worker that has ended."""
        return replace(self, **{name: getattr(self, name) + getattr(earlier, name) for name in _SUMS})


_SUMS = (
    *("requests", "prompt_tokens", "cached_tokens", "generated_tokens", "drafted_tokens", "accepted_tokens"),
    *("prefill_seconds", "decode_seconds"),
)
"""The fields that only grow."""
