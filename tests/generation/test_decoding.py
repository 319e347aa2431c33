"""The steps of one sequence, driven by hand: what is pending, what logits do, and many sequences side by side."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reciter import EOS, TOKENIZER, Reciter
from reference import ReferenceModel

from npqwen.generation.decoding import Decoding, check_prompt_ids
from npqwen.generation.options import check_options
from npqwen.generation.stream import Stream
from npqwen.generation.watched import Watched
from npqwen.generation.watches import option_watches

VOCAB = 4128
PROMPT = TOKENIZER.encode("ab")


class Passive(Reciter):
    """A model that fails the test if it is run."""

    def forward(self, *args: Any, **options: Any) -> NDArray[np.float32]:
        raise AssertionError


def decoding(limit: int = 100, prompt: list[int] = PROMPT, **options: Any) -> Decoding:
    given = check_options({"temperature": 0, **options})
    return Decoding(Passive(), prompt, given, option_watches(given), limit=limit)


def rows(*ids: int) -> NDArray[np.float32]:
    """Logits, one row for each of `ids`, which is the likeliest token by it."""
    logits = np.zeros((len(ids), VOCAB), np.float32)
    logits[np.arange(len(ids)), ids] = 1
    return logits


def test_the_prompt_is_pending_then_each_token_drawn_until_eos() -> None:
    text = decoding()
    one, two = TOKENIZER.encode("12")
    assert (text.pending(), text.rows, text.target_length) == (PROMPT, 1, len(PROMPT))
    assert text.pending() == PROMPT  # until its logits are there
    assert text.accept(rows(one)) == "1"
    assert text.pending() == [one]
    assert text.accept(rows(two)) == "2"
    assert (text.pending(), text.finished) == ([two], False)
    assert text.accept(rows(EOS)) == ""
    assert (text.finished, text.finish_reason, text.text, text.ids) == (True, "stop", "12", [one, two, EOS])
    assert text.pending() == []


def test_only_the_last_row_counts() -> None:
    text = decoding()
    assert text.accept(rows(7, 8, *TOKENIZER.encode("5"))) == "5"


def test_forced_tokens_need_no_logits_and_are_then_pending_with_the_one_before() -> None:
    text = decoding()
    one, two, three, four = TOKENIZER.encode("1234")
    text.accept(rows(one))
    text.force([two, three])
    assert text.pending() == []
    assert text.accept(None) == "23"
    assert text.pending() == [one, two, three]
    assert text.accept(rows(four)) == "4"
    assert text.ids == [one, two, three, four]


def test_forced_tokens_with_log_probabilities_ask_for_the_logits_of_all() -> None:
    text = decoding(logprobs=True)
    one, two, three, four = TOKENIZER.encode("1234")
    text.accept(rows(one))
    text.force([two, three, four])
    assert (text.pending(), text.rows, text.target_length) == ([one], 1, len(PROMPT) + 1)
    assert text.accept(rows(two)) == ""  # held until the others have their log-probabilities
    assert (text.pending(), text.rows, text.target_length) == ([two, three], 2, len(PROMPT) + 3)
    assert text.accept(rows(9, four)) == "234"
    assert text.logprobs is not None
    assert [entry.id for entry in text.logprobs] == text.ids
    likely, unlikely = 1 - np.log(np.e + VOCAB - 1), -np.log(np.e + VOCAB - 1)
    assert [entry.logprob for entry in text.logprobs] == pytest.approx([likely, likely, unlikely, likely], abs=1e-5)
    assert (text.pending(), text.rows, text.target_length) == ([four], 1, len(PROMPT) + 4)


def test_a_finished_text_still_asks_for_the_logits_that_its_log_probabilities_need() -> None:
    text = decoding(limit=3, logprobs=True)
    ids = TOKENIZER.encode("12345")
    text.force(ids)
    assert text.accept(rows(ids[0])) == ""
    assert (text.finish_reason, text.finished, text.pending()) == ("length", False, ids[:2])
    assert text.accept(rows(ids[1], ids[2])) == "123"
    assert text.finished


def test_a_text_that_is_ended_between_steps_lets_go_of_what_it_held_back() -> None:
    text = decoding(stop=["12x"])
    one, two = TOKENIZER.encode("12")
    assert text.accept(rows(one)) == ""
    assert text.accept(rows(two)) == ""
    text.end("length")
    assert (text.pending(), text.finished) == ([], False)
    assert text.accept(None) == "12"
    assert (text.finished, text.text) == (True, "12")


def test_a_watch_that_ends_the_text_at_once_still_has_the_prompt_run() -> None:
    def end(text: Watched) -> None:
        text.end("loop")

    text = decoding(watch=[end])
    assert text.pending() == PROMPT
    assert text.accept(rows(5)) == ""
    assert (text.finished, text.ids, text.finish_reason) == (True, [], "loop")


@pytest.mark.parametrize("seed", range(4))
def test_many_sequences_side_by_side_give_the_texts_they_give_alone(seed: int) -> None:
    """A driver of several sequences, which steps any of them in any order: what a batch would do."""
    rng = random.Random(seed)
    model = ReferenceModel.from_directory(Reciter().path)
    prompts = ["<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n", "A river is", "1 2 3"]
    options: list[dict[str, Any]] = [
        {"temperature": 0, "max_tokens": 30, "thinking_budget": 5},
        {"temperature": 1.0, "seed": seed, "max_tokens": 12, "top_logprobs": 2, "stop": ["a"]},
        {"temperature": 0.7, "seed": 9, "max_tokens": 9, "presence_penalty": 1.0, "loop_guard": True},
    ]
    alone = [model.stream(prompt, **each).completion() for prompt, each in zip(prompts, options, strict=True)]

    texts, caches = [], []
    for prompt, each in zip(prompts, options, strict=True):
        given = check_options(each)
        ids = check_prompt_ids(model, TOKENIZER.encode(prompt))
        texts.append(Decoding(model, ids, given, option_watches(given), limit=each["max_tokens"]))
        caches.append(model.new_cache())
    running = list(range(len(texts)))
    while running:
        for k in rng.sample(running, rng.randint(1, len(running))):
            pending = texts[k].pending()
            logits = model.forward(pending, caches[k], all_logits=texts[k].rows > 1) if pending else None
            texts[k].accept(logits)
        running = [k for k in running if not texts[k].finished]

    assert [text.ids for text in texts] == [each.ids for each in alone]
    assert [text.text for text in texts] == [each.text for each in alone]
    assert [text.finish_reason for text in texts] == [each.finish_reason for each in alone]
    assert texts[1].logprobs == alone[1].logprobs


def test_a_stream_runs_what_its_decoding_wants() -> None:
    model = Reciter("123")
    stream = Stream(model, PROMPT, temperature=0)
    assert "".join(stream) == "123"
    assert model.calls == [len(PROMPT), 1, 1, 1]
