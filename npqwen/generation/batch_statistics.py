"""What a batch, or a reader of texts, has done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class BatchStatistics:
    """What a batch has done so far."""

    prompt_tokens: int = 0
    """Of prompts that were begun, cached ones included."""
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    """That were guessed, and run beside those of a text."""
    accepted_tokens: int = 0
    """Those of them that became part of a text."""
    prefill_seconds: float = 0.0
    """In passes of prompts, or parts of them, alone or beside texts."""
    decode_seconds: float = 0.0
    """In passes of texts alone."""
    cache_bytes: int = 0
    """Of all pages, shared ones counted once, after the last step."""
    preempted: int = 0
    """How often a sequence had to give its memory to an older one, and was computed again."""
