"""What a scheduler has done: a batch of sequences, or a reader of texts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SchedulerStatistics:
    """What a scheduler has done so far. Counts and seconds are sums."""

    prompt_tokens: int = 0
    """Tokens of prompts that were started, cached ones included."""
    cached_tokens: int = 0
    """Tokens of these prompts that were found in a cache."""
    generated_tokens: int = 0
    drafted_tokens: int = 0
    """Draft tokens that were run."""
    accepted_tokens: int = 0
    """Those of them that became part of a text."""
    prefill_seconds: float = 0.0
    """In passes with prompt tokens, with or without tokens of texts."""
    decode_seconds: float = 0.0
    """In passes without prompt tokens."""
    cache_bytes: int = 0
    """Of all pages, kept prefixes included and shared ones counted once, after the last step."""
    preempted: int = 0
    """How often a sequence was preempted: its memory was freed for an older one, and it was recomputed."""
