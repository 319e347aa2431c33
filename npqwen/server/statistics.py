"""Statistics of a model's work, for /health and /metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from npqwen.generation.scheduler_statistics import SchedulerStatistics


@dataclass
class WorkerStatistics(SchedulerStatistics):
    """A snapshot: what the worker's scheduler has done since its start, and the state of its queue and thread."""

    waiting: int = 0
    """Requests in the queue."""
    running: int = 0
    """Sequences that are being computed."""
    requests: int = 0
    """Requests that were started."""
    heartbeat: float = field(default_factory=time.monotonic)
    """The value of `time.monotonic` at the last heartbeat of the engine's thread."""
    alive: bool = True
    """Whether the engine's thread runs."""

    def plus(self, earlier: WorkerStatistics) -> WorkerStatistics:
        """These statistics, with the sums of a worker that has ended added."""
        return replace(self, **{name: getattr(self, name) + getattr(earlier, name) for name in _SUMS})


_SUMS = (
    *("requests", "prompt_tokens", "cached_tokens", "generated_tokens", "drafted_tokens", "accepted_tokens"),
    *("prefill_seconds", "decode_seconds", "preempted"),
)
"""The fields that are sums."""
