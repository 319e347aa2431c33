"""A finished text: its tokens, their log-probabilities, why it ended, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from npqwen.structure.structure import Structured
from npqwen.wording import quoted

FinishReason = Literal["stop", "length", "loop"]
"""Why a text ended: eos or a stop string; max_tokens or a full context; the loop guard."""


@dataclass(frozen=True)
class Usage:
    """The cost of a text: tokens, and wall-clock seconds spent in the model (not in the caller's loop)."""

    prompt_tokens: int
    generated_tokens: int
    """Tokens of the text, drawn or forced, eos included."""
    prefill_seconds: float
    first_token_seconds: float
    """From the start to the first token, including the prefill."""
    decode_seconds: float
    """For the tokens after the first."""
    cached_tokens: int = 0
    """Prompt tokens that the cache already held and that were not computed."""
    drafted_tokens: int = 0
    """Draft tokens that were run, see the option `speculation`."""
    accepted_tokens: int = 0
    """Those of them that became part of the text."""

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens computed per second; 0.0 if none was."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first; 0.0 if there are none."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Logprob:
    """A token and the natural logarithm of its probability."""

    id: int
    bytes: bytes
    """The token's UTF-8 bytes, perhaps only part of a character."""
    logprob: float

    @property
    def text(self) -> str:
        """The token's text; U+FFFD for part of a character."""
        return self.bytes.decode("utf-8", "replace")


@dataclass(frozen=True)
class TokenLogprobs(Logprob):
    """A token of the text, and the likeliest tokens at its position, likeliest first."""

    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A finished text.

    text: without eos and without the stop string. ids: all tokens, including eos and the stop string's.
    finish_reason: "stop" (eos or a stop string), "length" (max_tokens reached, or the context is full) or "loop" (the
    loop guard ended it). logprobs: one entry for each of `ids`, None unless requested. structured: the part of the
    text that has the structure given by an option, if it is complete.
    """

    text: str
    ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    logprobs: list[TokenLogprobs] | None = None
    structured: Structured | None = None

    @property
    def parsed(self) -> Any:
        """The value of the text, if there was a `schema`: an instance of a type, or the JSON value for a dictionary.

        None without a schema, and if the text was cut off: by max_tokens, a stop string or the loop guard. Raises what
        the type's own checks raise, such as pydantic's ValidationError for what a JSON schema cannot express.
        """
        return None if self.structured is None else self.structured.parsed

    def __repr__(self) -> str:
        return f"Completion({quoted(self.text)}, finish_reason={self.finish_reason!r}, tokens={len(self.ids)})"
