"""How a model is sampled by default: its authors recommend other values with thinking than without."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from npqwen.chat.chat_template import Thinking
from npqwen.chat.messages import Message, joined
from npqwen.generation.sampling import Sampling

_SOFT_SWITCH = re.compile(r"(?<!\S)/(no_)?think(?!\w)")


def thinks(template: Thinking, thinking: bool | None, messages: Sequence[Message]) -> bool:
    """Whether the next answer begins with a thought.

    A hybrid model does unless it is told not to: by the template's switch, or by the last /think or /no_think that the
    user or the system message says, which it was trained to obey.
    """
    if template != "switch":
        return template == "always"
    if thinking is False:
        return False
    said = [
        switch[1] is None
        for message in messages
        if message["role"] in ("user", "system")
        for switch in _SOFT_SWITCH.finditer(joined(message)["content"])
    ]
    return said[-1] if said else True


def default_sampling(own: Sampling, template: Thinking, thinking: bool) -> Sampling:
    """The checkpoint's own sampling; a hybrid's without a thought is Qwen's for that (QwenLM/Qwen3, quickstart.md).

    A hybrid's generation_config.json has room for one mode only and describes thinking. If it has other values than
    Qwen's, somebody chose them, and they stay.
    """
    for_thought = replace(own, temperature=0.6, top_p=0.95, top_k=20, min_p=0.0)
    if template == "switch" and not thinking and own == for_thought:
        return replace(own, temperature=0.7, top_p=0.8)
    return own
