"""A finished text, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from npqwen.generation.logprobs import TokenLogprobs

FinishReason = Literal["stop", "length", "loop"]


@dataclass(frozen=True)
class Usage:
    """What a text cost: tokens, and wall-clock seconds spent in the model (not in the caller's loop)."""

    prompt_tokens: int
    generated_tokens: int
    """All that the text is made of: drawn or forced, eos included."""
    prefill_seconds: float
    first_token_seconds: float
    """From the start to the first token, the prefill included."""
    decode_seconds: float
    """For the tokens after the first."""
    cached_tokens: int = 0
    """Of the prompt's tokens, those that the cache held already: they took no time."""

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens computed a second; 0.0 if there was no time to measure."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first; 0.0 if there was none."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Completion:
    """A finished text.

    text: without eos and without the stop string. ids: every token, eos and stop string included.
    finish_reason: "stop" (eos or a stop string), "length" (max_tokens, or the context is full) or "loop" (the
    loop guard saw the text repeat itself). logprobs: one entry for each of `ids` if they were asked for.
    """

    text: str
    ids: list[int] = field(repr=False)
    finish_reason: FinishReason
    usage: Usage
    logprobs: list[TokenLogprobs] | None = field(default=None, repr=False)
