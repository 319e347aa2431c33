"""Default sampling: the values that the model's authors recommend with and without thinking."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from npqwen.chat.chat_template import Thinking
from npqwen.chat.messages import Message, joined
from npqwen.generation.sampling import Sampling

_SOFT_SWITCH = re.compile(r"(?<!\S)/(no_)?think(?!\w)")


def thinks(template: Thinking, thinking: bool | None, messages: Sequence[Message]) -> bool:
    """Whether the next answer begins with thinking.

    A hybrid model thinks unless that is switched off, by the template's switch or by the last /think or /no_think in a
    message of the user or the system, which it was trained to obey.
    """
    if template != "switch":
        return template == "always"
    if thinking is False:
        return False
    switches = [
        switch[1] is None
        for message in messages
        if message["role"] in ("user", "system")
        for switch in _SOFT_SWITCH.finditer(joined(message)["content"])
    ]
    return switches[-1] if switches else True


def default_sampling(own: Sampling, template: Thinking, thinking: bool) -> Sampling:
    """The checkpoint's own sampling; for a hybrid model that does not think, the one that Qwen advises for that mode.

    A hybrid's generation_config.json describes one mode only, thinking (QwenLM/Qwen3, quickstart.md, has both). Values
    that differ from Qwen's were chosen by someone and are kept.
    """
    with_thinking = replace(own, temperature=0.6, top_p=0.95, top_k=20, min_p=0.0)
    if template == "switch" and not thinking and own == with_thinking:
        return replace(own, temperature=0.7, top_p=0.8)
    return own
