"""Prompts, random options, and all that a text shows: for tests that two ways to generate a text are the same."""

from __future__ import annotations

import random
from typing import Any

from npqwen.errors import OptionError
from npqwen.generation.loop_guard import LoopGuard
from npqwen.generation.stream import Stream
from npqwen.generation.watched import Watched

QUESTION = "<|im_start|>user\nDefine anger. 12 + 13 =<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = (
    QUESTION,
    "<|im_start|>assistant\n<think>\n14 + 30 = 44. 44 + 7 = 51.\n</think>\n\n14 + 37 = 51<|im_end|>\n<|im_start|>user\n"
    "14 + 37 =<|im_end|>\n<|im_start|>assistant\n<think>\n",
    'anger (noun): a strong emotion. anger (noun): a strong emotion. {"name": "get_weather", {"name": "get_',
    "part (noun): something determined in relation to something that includes it.",
)


class RandomTexts:
    """Draws the options of texts.

    tokenizer: the model's. structured: whether some texts follow a structure, which needs llguidance.
    """

    def __init__(self, seed: int, tokenizer: Any, structured: bool) -> None:
        self.random = random.Random(seed)
        self.tokenizer = tokenizer
        self.structured = structured

    def one(self) -> dict[str, Any]:
        """New functions each time: those of a text are its own."""
        rng = self.random
        options: dict[str, Any] = {"max_tokens": rng.randrange(1, 60)}
        mode = rng.randrange(4)
        options |= (
            {"temperature": 0}
            if mode == 0
            else {"temperature": rng.choice([0.3, 1.0, 1.5]), "seed": rng.randrange(1000)}
        )
        if mode == 2:
            options |= {"top_k": rng.choice([2, 20, 600]), "top_p": 0.9}
        if mode == 3:
            options |= {"min_p": 0.05}
        if rng.random() < 0.3:
            options |= {"repetition_penalty": rng.choice([0.8, 1.2])}
        if rng.random() < 0.3:
            options |= {"presence_penalty": 0.5, "frequency_penalty": rng.choice([-0.5, 0.3])}
        if rng.random() < 0.4:
            options |= {"logprobs": True, "top_logprobs": rng.choice([0, 3])}
        if rng.random() < 0.3:
            options |= {"stop": rng.choice(["noun", [". ", "=\n"], "</think>", "<|im_start|>"])}
        if rng.random() < 0.4:
            options |= {"logit_bias": {4098: -float("inf"), 4096: -float("inf"), 300: 1.0}}
        if rng.random() < 0.2:
            options |= {"thinking_budget": rng.randrange(12)}
        if rng.random() < 0.2:
            options |= {"loop_guard": LoopGuard(12, 16, 3, 8)}
        if self.structured and rng.random() < 0.3:
            options |= rng.choice(
                [
                    {"regex": r"\d\d \+ \d\d = \d+\. (\d\d \+ \d\d = \d+\. )*"},
                    {"choice": ["14 + 37 = 51", "14 + 38 = 52", "anger (noun): a strong emotion."]},
                    {"schema": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}},
                ]
            )
        return options

    def functions(self, kind: int) -> dict[str, Any]:
        """A watch that forces tokens or ends the text, and a processor that counts its calls."""
        options: dict[str, Any] = {}
        if kind % 3 == 0:
            forced = self.tokenizer.encode(" 14 + 37 = 51")

            def watch(text: Watched) -> None:
                if len(text.ids) in (3, 17):
                    text.force(forced)
                if len(text.ids) > 45:
                    text.end("stop")

            options["watch"] = [watch]
        if kind % 4 == 0:
            calls = []

            def processor(ids: list[int], logits: Any) -> None:
                calls.append(ids)
                logits[ids[-1] % len(logits)] -= len(calls) % 3

            options["logits_processor"] = processor
        return options


def outcome(stream: Stream) -> tuple[Any, ...]:
    """Everything that a text shows, piece by piece: its ids, pieces and log-probabilities, and how much is cached."""
    steps, error = [], ""
    try:
        for piece in stream:
            steps.append((piece, len(stream.ids), stream.cache.length))
    except OptionError as failed:  # a structure does not allow tokens that a watch forces
        error = str(failed)
    return stream.ids, stream.text, stream.finish_reason, stream.logprobs, error, steps, stream.stop_string
