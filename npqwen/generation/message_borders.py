"""Where a text's messages begin: the tokens before are likely to begin another text, the next turn of a conversation.

A hybrid model's cache can go back to these places only, and to a few others (npqwen/engine/recurrent_states.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from npqwen.tokenizer import Tokenizer

_NEAREST = 3
"""Borders before the end that are kept in any case: the last message, the one before, and its answer."""
_APART = 1.5
"""How much further from the end the next border must be than the last one, of those further away."""
_UNMARKED = 64
"""Tokens without a border at the end of a text for which another place is chosen."""
_STEP = 16


def message_borders(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Positions before some of the messages of a prompt, ascending, all within 1 and len(ids) - 1.

    The first one, at the end of a system prompt, and the last ones, the closer together the nearer to the end. Without
    messages near the end, a place just before the end, for who sends the text again.
    """
    start, last = tokenizer.token_id("<|im_start|>"), len(ids) - 1
    borders = [at for at, id in enumerate(ids) if id == start and 0 < at <= last]
    kept = borders[:1]
    distance = 0.0
    for count, at in enumerate(reversed(borders)):
        if count < _NEAREST or last - at >= _APART * distance:
            kept.append(at)
            distance = last - at
    before_end = last // _STEP * _STEP
    if before_end and (not borders or last - borders[-1] > _UNMARKED):
        kept.append(before_end)
    return sorted(set(kept))
