"""The limits of llguidance's work on one grammar, and what to say where a grammar exceeds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits

_ITEMS = 16_000
"""The most Earley items of one step. A mask takes up to 0.1 s with as many, and 2 s with llguidance's default of
50,000. Of Qwen's vocabulary, JSON schemas need less than 5,000, grammars of single characters up to 10,000."""
TOO_COMPLEX = (
    "a text can follow it in too many ways; make its rules unambiguous, and match runs of characters by one regular "
    "expression"
)

EXCEEDED = ("Too many items", "Current row has", "too many expressions", "too many states", "fuel")
"""What is in llguidance's messages where a text exceeds its limits."""

TOO_LARGE = "it has too many rules and alternatives; make it smaller"
TOO_LARGE_REPORTS = ("grammar.symbols.len()", "grammar size (number of symbols) too big")
"""What is in llguidance's messages about a grammar of more than 65,525 symbols, or half a million in its rules."""


def parser_limits() -> LLParserLimits:
    """The limits, to be given wherever llguidance reads a grammar."""
    from llguidance import LLParserLimits

    return LLParserLimits(step_max_items=_ITEMS)
