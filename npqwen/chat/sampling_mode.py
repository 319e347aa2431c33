"""Default sampling: the values that the model's authors recommend with and without thinking."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from npqwen.chat.chat_template import Mode
from npqwen.chat.messages import Message, joined
from npqwen.generation.sampling import Sampling

_SOFT_SWITCH = re.compile(r"(?<!\S)/(no_)?think(?!\w)")


def thinks(mode: Mode, thinking: bool | None, messages: Sequence[Message]) -> bool:
    """Whether the next answer begins with thinking.

    A model with a switch obeys it. One whose template does not open the thinking itself (Qwen3) was also trained to
    obey the last /think or /no_think in a message of the user or the system.
    """
    if mode.thinking != "switch":
        return mode.by_default
    if thinking is False or mode.opens:
        return mode.by_default if thinking is None else thinking
    switches = [
        switch[1] is None
        for message in messages
        if message["role"] in ("user", "system")
        for switch in _SOFT_SWITCH.finditer(joined(message)["content"])
    ]
    return switches[-1] if switches else True


def default_sampling(own: Sampling, mode: Mode, thinking: bool) -> Sampling:
    """The checkpoint's own sampling; for a model with a switch, what Qwen recommends with or without thinking.

    Its generation_config.json describes one mode only, thinking, and no presence penalty (QwenLM/Qwen3, quickstart.md,
    and the model cards of Qwen3.5, 3.6 and 3.8 give all values). Values that differ from Qwen's were set deliberately,
    and are kept.
    """
    of_qwen = any(own == replace(own, temperature=t, top_p=0.95, top_k=20, min_p=0.0) for t in _temperatures(mode))
    if mode.thinking != "switch" or not of_qwen:
        return own
    if not mode.opens:
        return own if thinking else replace(own, temperature=0.7, top_p=0.8)
    if own.presence_penalty:
        return own
    if not thinking:
        return replace(own, temperature=0.7, top_p=0.8, presence_penalty=1.5)
    return replace(own, temperature=1.0, presence_penalty=0.0 if mode.graded else 1.5)


def _temperatures(mode: Mode) -> tuple[float, ...]:
    """Qwen's temperatures for models with such a template: two since Qwen3.5, the lower one for precise tasks."""
    return (0.6, 1.0) if mode.opens else (0.6,)
