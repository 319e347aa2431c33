"""The thresholds by which a text that keeps repeating itself is ended."""

from __future__ import annotations

from dataclasses import dataclass, fields

from npqwen.checks import check_whole


@dataclass(frozen=True)
class LoopGuard:
    """When a repetition is a loop.

    The last tokens of the text must repeat one run of at most `longest_period` tokens, at least `copies` times; all
    copies together must be at least `thinking_tokens` long while the model thinks, `answer_tokens` otherwise. Tables,
    matrices of zeros, refrains and "ha ha ha" stay far below the defaults.
    """

    thinking_tokens: int = 512
    answer_tokens: int = 1024
    copies: int = 4
    longest_period: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            check_whole(field.name, getattr(self, field.name), 2 if field.name == "copies" else 1, 2**20)
