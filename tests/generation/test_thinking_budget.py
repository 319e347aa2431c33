"""Thinking that is cut short: when, with which words, and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reciter import Reciter
from reference import ReferenceModel

from npqwen.errors import OptionError
from npqwen.generation.sampling import Sampling
from npqwen.generation.stream import Stream
from npqwen.generation.thinking import ThinkingTracker
from npqwen.tokenizer import Tokenizer

TINY = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
SUM = "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n"
THINK, END = 4120, 4121
# QwenLM/Qwen3, docs/source/getting_started/quickstart: thinking budget
SENTENCE = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly "
    "now.\n</think>\n\n"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(TINY)


class Drawn(Reciter):
    """With `Taking`, draws `script` token by token, whatever is forced between them, then eos."""

    def __init__(self, tokenizer: Tokenizer, script: str, context: int = 1000) -> None:
        self.script = [*tokenizer.encode(script), 4098]
        super().__init__("", context=context, sampling=Sampling(temperature=0))


class Taking:
    """Takes a token off the script each time one is drawn."""

    def __init__(self, model: Drawn) -> None:
        self.model = model

    def __call__(self, ids: list[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        found = np.zeros_like(logits)
        found[self.model.script.pop(0)] = 1
        return found


def run(tokenizer: Tokenizer, prompt: str, script: str, **options: Any) -> Stream:
    model = Drawn(tokenizer, script)
    stream = Stream(model, tokenizer.encode(prompt), logits_processor=Taking(model), **options)
    list(stream)
    assert stream.finish_reason == "stop" or "max_tokens" in options
    if stream.thinking_ended_by is not None and stream.finish_reason == "stop":
        forced = len(tokenizer.encode(SENTENCE))
        assert sum(n >= forced for n in model.calls[1:]) == 1  # one pass for all of it
    return stream


TURN = "<|im_start|>assistant\n"


@pytest.mark.parametrize("budget", [0, 1, 2, 5, 6])
@pytest.mark.parametrize("template_opens", [True, False])
def test_after_the_budgets_tokens_qwens_sentence_is_forced(
    tokenizer: Tokenizer, budget: int, template_opens: bool
) -> None:
    thought = "12345 78"
    prompt, start = (TURN + "<think>", "") if template_opens else (TURN, "<think>")
    drawn = tokenizer.encode(thought)
    stream = run(tokenizer, prompt, start + thought + " 9", thinking_budget=budget)
    begun = tokenizer.decode(drawn[:budget])
    # After the closing tag the model continues with the rest of the script.
    rest = tokenizer.decode([*drawn[budget:], *tokenizer.encode(" 9")])
    assert stream.text == start + begun + SENTENCE + rest
    assert tokenizer.decode(stream.ids) == stream.text
    assert stream.thinking_ended_by == "budget"
    assert stream.thinking.is_over
    assert stream.usage.generated_tokens == len(stream.ids)


def test_thinking_that_ends_by_itself_is_left_alone(tokenizer: Tokenizer) -> None:
    thought = tokenizer.encode("1 2 3")
    script = "<think>1 2 3</think>4 5 6 7 8 9"
    for budget in (len(thought) + 1, 100):
        stream = run(tokenizer, TURN, script, thinking_budget=budget)
        assert (stream.text, stream.thinking_ended_by) == (script, None)


@pytest.mark.parametrize(
    ("prompt", "script"),
    [
        (TURN, "No thought: 1 2 3 4"),
        (TURN, "The mark <think> begins a thought"),  # an answer that speaks of marks
        (TURN + "<think>\n\n</think>\n\n", "1 2 3 <think> 4"),  # thinking is off
        ("<|im_start|>user\nWhat is <think>?<|im_end|>\n" + TURN, "1 2 3 4"),
        (TURN + "<think>x</think>y<|im_end|>\n<|im_start|>user\n<think><|im_end|>\n" + TURN, "1 2 3 4"),
    ],
)
def test_text_without_thinking_is_left_alone(tokenizer: Tokenizer, prompt: str, script: str) -> None:
    stream = run(tokenizer, prompt, script, thinking_budget=0)
    assert (stream.text, stream.thinking_ended_by) == (script, None)


def test_white_space_before_thinking_and_thinking_that_the_prompt_began(tokenizer: Tokenizer) -> None:
    stream = run(tokenizer, TURN, "\n<think>12", thinking_budget=1)
    assert stream.text == "\n<think>1" + SENTENCE + "2"
    begun = run(tokenizer, TURN + "<think>\nLet me see", "12", thinking_budget=1)
    assert begun.text == "1" + SENTENCE + "2"
    raw = run(tokenizer, "No turns at all. <think>", "12", thinking_budget=1)
    assert raw.text == "1" + SENTENCE + "2"


def test_characters_are_not_cut_apart(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("🎉")) == 4
    for budget in range(1, 5):
        stream = run(tokenizer, TURN + "<think>", "🎉2", thinking_budget=budget)
        assert stream.text == "🎉" + SENTENCE + "2"
    # Bytes that never become characters do not put it off for ever.
    model = Drawn(tokenizer, "")
    model.script = [*tokenizer.encode("🎉")[:1] * 50, 4098]
    broken = Stream(model, tokenizer.encode(TURN + "<think>"), logits_processor=Taking(model), thinking_budget=3)
    assert SENTENCE in broken.completion().text
    assert broken.text.index("\n") <= 8


def test_it_ends_once_even_if_the_answer_thinks_again(tokenizer: Tokenizer) -> None:
    stream = run(tokenizer, TURN + "<think>", "12<think>34567", thinking_budget=2)
    assert stream.text == "12" + SENTENCE + "<think>34567"


def test_max_tokens_counts_the_forced_ones(tokenizer: Tokenizer) -> None:
    stream = run(tokenizer, TURN + "<think>", "123456", thinking_budget=2, max_tokens=6)
    assert (len(stream.ids), stream.finish_reason) == (6, "length")
    assert ("12" + SENTENCE).startswith(stream.text)


def test_the_caller_can_end_thinking(tokenizer: Tokenizer) -> None:
    model = Drawn(tokenizer, "1234")
    stream = Stream(model, tokenizer.encode(TURN + "<think>"), logits_processor=Taking(model))
    next(stream)
    stream.end_thinking()
    assert stream.completion().text == "1" + SENTENCE + "234"
    assert stream.thinking_ended_by == "caller"
    with pytest.raises(OptionError, match="the model is not thinking"):
        stream.end_thinking()


def test_thinking_whose_end_is_forced_already_is_not_ended_again(tokenizer: Tokenizer) -> None:
    """By a caller who does so twice, or after the budget: the sentence would become part of the answer."""
    model = Drawn(tokenizer, "1234")
    stream = Stream(model, tokenizer.encode(TURN + "<think>"), logits_processor=Taking(model))
    next(stream)
    stream.end_thinking()
    stream.end_thinking()
    assert stream.completion().text == "1" + SENTENCE + "234"
    ended = run(
        tokenizer,
        TURN + "<think>",
        "1234",
        thinking_budget=2,
        watch=[lambda s: s.end_thinking() if s.thinking.length == 2 and s.thinking.is_open else None],
    )
    assert (ended.text, ended.thinking_ended_by) == ("12" + SENTENCE + "34", "budget")


def test_a_tokenizer_without_the_closing_tag_is_refused(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "token_id", lambda self, name: None)
    with pytest.raises(OptionError, match="no </think> token, so its thinking cannot be ended"):
        Stream(Drawn(tokenizer, "1"), [1], thinking_budget=1)


def test_the_trained_model_answers_after_its_thinking_was_cut_short() -> None:
    model = ReferenceModel.from_directory(TINY)
    whole = model.generate(SUM, temperature=0)
    stream = model.stream(SUM, temperature=0, thinking_budget=6, max_tokens=120)
    list(stream)
    assert stream.text.startswith(whole.text[:8])
    assert stream.text.count("</think>") == 1
    assert stream.ids.count(END) == 1
    assert stream.text.split(SENTENCE)[1] != ""
    assert len(stream.ids) > 0
    assert stream.finish_reason == "stop"


def test_thinking_is_tracked(tokenizer: Tokenizer) -> None:
    thought = ThinkingTracker(tokenizer, tokenizer.encode(TURN + "<think>\n"))
    assert thought.is_open
    for id in tokenizer.encode("a b"):
        thought.push(id)
    assert thought.length == len(tokenizer.encode("a b"))
    thought.push(END)
    assert (thought.is_open, thought.is_over) == (False, True)
    thought.push(THINK)
    assert (thought.is_open, thought.is_over) == (False, True)


@pytest.mark.parametrize(
    ("prompt", "is_open", "is_over"),
    [
        (TURN, False, False),
        (TURN + "<think>", True, False),
        (TURN + "<think>\nHm, <think>", True, False),
        (TURN + "<think>\n\n</think>\n\nThe tag <think>", False, True),
        (TURN + "The tag <think>", False, True),
        (TURN + "<think>\n<|im_end|>\n" + TURN, False, False),
        (TURN[:-1], False, False),
        ("A riddle. <think>", True, False),
        ("</think>A riddle.", False, True),
        ("A riddle.", False, False),
    ],
)  # fmt: skip
def test_a_prompt_may_begin_the_thinking(tokenizer: Tokenizer, prompt: str, is_open: bool, is_over: bool) -> None:
    thought = ThinkingTracker(tokenizer, tokenizer.encode(prompt))
    assert (thought.is_open, thought.is_over, thought.length) == (is_open, is_over, 0)
