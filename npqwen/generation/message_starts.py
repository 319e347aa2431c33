"""Where a text's messages begin: the tokens before are likely to be a prefix of another text, such as the next turn.

A hybrid model's cache can be truncated only to these positions and a few others (npqwen/engine/recurrent_states.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from npqwen.tokenizer import Tokenizer

_NEAREST = 3
"""The last starts, always kept: as a rule, of the answer to be written, the last message and the previous answer."""
_APART = 1.5
"""Of the others, a start is kept if it is at least this many times as far from the end as the last one kept."""
_UNMARKED = 64
"""If a text ends with more than this many tokens without a start, another position is added."""
_STEP = 16


def message_starts(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Positions before some of the messages of a prompt, ascending, all within 1 and len(ids) - 1.

    The first one, at the end of a system prompt, and the last ones, which are denser towards the end. If no message
    begins near the end, also a position just before the end, in case the text is sent again.
    """
    start, last = tokenizer.token_id("<|im_start|>"), len(ids) - 1
    starts = [at for at, id in enumerate(ids) if id == start and 0 < at <= last]
    kept = starts[:1]
    distance = 0.0
    for count, at in enumerate(reversed(starts)):
        if count < _NEAREST or last - at >= _APART * distance:
            kept.append(at)
            distance = last - at
    before_end = last // _STEP * _STEP
    if before_end and (not starts or last - starts[-1] > _UNMARKED):
        kept.append(before_end)
    return sorted(set(kept))
