"""Loops are detected and intended repetition is not, checked against comparing the text with itself."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_thinking_budget import SENTENCE, TURN, Drawn, Taking

from npqwen.errors import OptionError
from npqwen.generation.loop_guard import LoopGuard
from npqwen.generation.repetition import Repetition
from npqwen.generation.stream import Stream
from npqwen.tokenizer import Tokenizer

TINY = Path(__file__).parents[2] / "examples" / "tiny-qwen3"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(TINY)


@pytest.mark.parametrize(("longest", "letters"), [(1, 2), (3, 2), (8, 1), (8, 2), (16, 3)])
def test_runs_are_those_of_comparing_the_ids_after_every_id(longest: int, letters: int) -> None:
    rng = random.Random(longest)
    seen: list[int] = []
    repetition = Repetition(longest)
    for step in range(600):
        seen.append(seen[-5] if step > 300 and step % 97 else rng.randrange(letters))
        repetition.push(seen[-1])
        for period in range(1, longest + 1):
            run = 0
            while run + period < len(seen) and seen[-1 - run] == seen[-1 - run - period]:
                run += 1
            assert repetition.runs[period - 1] == run
    repetition.clear()
    repetition.push(0)
    assert not repetition.runs.any()


def run(tokenizer: Tokenizer, ids: list[int], prompt: str = TURN, guard: Any = True, **options: Any) -> Stream:
    model = Drawn(tokenizer, "", context=100_000)
    model.script = [*ids, 4098]
    stream = Stream(model, tokenizer.encode(prompt), logits_processor=Taking(model), loop_guard=guard, **options)
    list(stream)
    return stream


def noise(n: int, seed: int = 0) -> list[int]:
    """Random ids, without repetition."""
    return [int(id) for id in np.random.default_rng(seed).integers(0, 4096, n)]


SENTENCES = "Wait, but maybe the user means the other one. Let me reconsider. "


@pytest.mark.parametrize("period", [1, 2, 3, 13, 100, 255, 256, 511, 512])
@pytest.mark.parametrize("before", [0, 700])
def test_an_answer_that_loops_is_ended(tokenizer: Tokenizer, period: int, before: int) -> None:
    unit = noise(period, seed=period)
    ids = noise(before, seed=99) + unit * (6000 // period)
    stream = run(tokenizer, ids)
    assert stream.finish_reason == "loop"
    assert before + max(1024, 4 * period) <= len(stream.ids) <= before + max(1024, 4 * period) + 2
    assert stream.completion().finish_reason == "loop"


def test_thinking_that_loops_is_ended_and_the_answer_follows(tokenizer: Tokenizer) -> None:
    loop = tokenizer.encode(SENTENCES)
    ids = tokenizer.encode("Let me think. ") + loop * 30
    model = Drawn(tokenizer, "", context=100_000)
    model.script = [*ids]

    class Answering(Taking):
        def __call__(self, seen: list[int], logits: np.ndarray) -> np.ndarray:
            if 4121 in seen:
                model.script[:] = [*tokenizer.encode("42"), 4098][seen[::-1].index(4121) - 1 :]
            return super().__call__(seen, logits)

    prompt = tokenizer.encode(TURN + "<think>")
    stream = Stream(model, prompt, logits_processor=Answering(model), loop_guard=True)
    list(stream)
    text = stream.text
    assert text.endswith(SENTENCE + "42")
    assert (stream.finish_reason, stream.thinking_ended_by) == ("stop", "loop")
    assert 512 <= len(stream.ids) < 512 + 60


def test_an_answer_that_loops_after_looping_thinking_is_ended_too(tokenizer: Tokenizer) -> None:
    stream = run(tokenizer, [7, 8, 9] * 3000, prompt=TURN + "<think>")
    assert (stream.finish_reason, stream.thinking_ended_by) == ("loop", "loop")
    assert 512 + 1024 <= len(stream.ids) < 512 + 1024 + 60


def test_with_a_budget_the_first_limit_reached_ends_the_thinking(tokenizer: Tokenizer) -> None:
    early = run(tokenizer, [7] * 3000, prompt=TURN + "<think>", thinking_budget=100)
    assert (early.thinking_ended_by, early.text.count("</think>")) == ("budget", 1)
    late = run(tokenizer, [7] * 3000, prompt=TURN + "<think>", thinking_budget=5000)
    assert (late.thinking_ended_by, late.text.count("</think>")) == ("loop", 1)
    same = run(tokenizer, [7] * 3000, prompt=TURN + "<think>", thinking_budget=512)
    assert (same.thinking_ended_by, same.text.count("</think>")) == ("budget", 1)


ROW = "| {} | {} | 0.0 | n/a |\n"
HARMLESS = {
    "ha ha ha": "ha " * 200,
    "a long scream": "A" * 500,
    "a line of a table": "|" + "---|" * 60 + "\n",
    "a table of zeros": "| 0 | 0 | 0 | 0 |\n" * 40,
    "a table that counts": "".join(ROW.format(i, i * i) for i in range(400)),
    "a matrix of zeros": ("[" + "0, " * 11 + "0],\n") * 12,
    "an identity matrix": "".join(
        "[" + ", ".join("1" if i == j else "0" for j in range(30)) + "],\n" for i in range(30)
    ),
    "a list of numbers": "".join(f"{i}, " for i in range(800)),
    "lines to write": "I will not talk in class.\n" * 60,
    "numbered lines to write": "".join(f"{i}. I will not talk in class.\n" for i in range(300)),
    "a refrain": ("We all live in a yellow submarine, " * 3 + "and our friends are all aboard.\n") * 6,
    "getters": "".join(f"    def get_{i}(self):\n        return self._{i}\n\n" for i in range(150)),
    "bytes": "".join(f"0x{i * 37 % 256:02x}, " for i in range(600)),
    "a rule": "=" * 200 + "\n" + "-" * 200 + "\n",
    "decimals of a seventh": "0." + "142857" * 60,
    "a chess board": ("# . # . # . # . \n" + ". # . # . # . #\n") * 20,
    "DNA": "".join(random.Random(0).choices("ACGT", k=1500)),
    "bottles": "".join(
        f"{n} bottles of beer on the wall, {n} bottles of beer. Take one down, pass it around, "
        for n in range(99, 0, -1)
    ),
}


@pytest.mark.parametrize("text", HARMLESS.values(), ids=HARMLESS)
def test_intended_repetition_is_left_alone(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert run(tokenizer, ids).finish_reason == "stop"


def test_a_token_a_thousand_times_is_left_alone() -> None:
    assert run(Tokenizer.from_directory(TINY), [7] * 1000).finish_reason == "stop"


def test_an_answer_may_repeat_its_thinking(tokenizer: Tokenizer) -> None:
    part = tokenizer.encode("ha " * 250)
    ids = [*part, 4121, *part, *part]
    stream = run(tokenizer, ids, prompt=TURN + "<think>", guard=LoopGuard(thinking_tokens=len(part) + 1))
    assert (stream.finish_reason, stream.thinking_ended_by) == ("stop", None)


def test_an_interrupted_loop_is_not_a_loop(tokenizer: Tokenizer) -> None:
    ids = (noise(10) * 100 + [5]) * 4
    assert run(tokenizer, ids).finish_reason == "stop"


def test_it_is_off_by_default_and_can_be_tuned(tokenizer: Tokenizer) -> None:
    ids = [7] * 3000
    for guard in (False, None):
        assert run(tokenizer, ids, guard=guard).finish_reason == "stop"
    tuned = run(tokenizer, ids, guard=LoopGuard(answer_tokens=50))
    assert (tuned.finish_reason, len(tuned.ids)) == ("loop", 50)
    copies = run(tokenizer, noise(30) * 90, guard=LoopGuard(answer_tokens=1, copies=7))
    assert (copies.finish_reason, len(copies.ids)) == ("loop", 210)
    short = run(tokenizer, noise(30) * 90, guard=LoopGuard(longest_period=29))
    assert short.finish_reason == "stop"


@pytest.mark.parametrize(
    "options", [{"copies": 1}, {"answer_tokens": 0}, {"thinking_tokens": 1.5}, {"longest_period": True}], ids=str
)
def test_impossible_thresholds(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(OptionError, match=rf"{name} is .*; it must be a whole number from "):
        LoopGuard(**options)
