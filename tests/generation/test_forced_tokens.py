"""Tokens forced into a text, and functions that watch a text and end it."""

from __future__ import annotations

import pytest
from checkpoints import TINY
from reciter import TOKENIZER, RecitersCache, recite
from reference import ReferenceModel

from npqwen.errors import OptionError
from npqwen.generation.generate import stream
from npqwen.generation.watched import Watched


def test_forced_tokens_are_text_and_run_in_one_pass() -> None:
    model = recite([16, 17, *[0] * 6, 19, 20])  # "12", six that are forced away, "45"
    pieces = stream(model, "x")
    text = next(pieces) + next(pieces)
    forced = model.tokenizer.encode("abé🎉")
    assert len(forced) == 6
    pieces.force(forced[:2])
    pieces.force(forced[2:])
    text += next(pieces)
    assert text == pieces.text == "12abé🎉"
    text += "".join(pieces)
    assert text == "12abé🎉45"
    assert pieces.ids[2:] == [*forced, *model.tokenizer.encode("45"), 4098]
    assert model.calls == [1, 1, 1 + len(forced), 1, 1]  # with the token drawn before them
    assert isinstance(pieces.cache, RecitersCache)
    assert list(pieces.cache.ids) == model.tokenizer.encode("x") + pieces.ids[:-1]
    assert pieces.usage.generated_tokens == len(pieces.ids)
    with pytest.raises(OptionError, match="the text is finished"):
        pieces.force([1])


def test_forced_tokens_can_be_the_first_the_last_and_cut_off() -> None:
    first = stream(recite("1"), "x")
    first.force([*TOKENIZER.encode("0"), 4098, 7])  # eos ends it
    assert first.completion().text == "0"
    assert first.ids[-1] == 4098
    limited = stream(recite("1"), "x", max_tokens=3)
    limited.force(TOKENIZER.encode("01234"))
    done = limited.completion()
    assert (done.text, done.finish_reason, len(done.ids)) == ("012", "length", 3)
    stopped = stream(recite("1"), "x", stop="23")
    stopped.force(TOKENIZER.encode("01234"))
    done = stopped.completion()
    assert (done.text, done.finish_reason, len(done.ids)) == ("01", "stop", 4)


@pytest.mark.parametrize("id", [-1, 4128, 4125])
def test_ids_without_a_token_cannot_be_forced(id: int) -> None:
    """Embeddings may be more than tokens: 4125 is one that no text can hold."""
    with pytest.raises(OptionError, match=f"token id {id} cannot be forced: this model has no such token"):
        stream(recite("1"), "x", presence_penalty=1.0).force([5, id])


def test_forced_tokens_count_for_penalties() -> None:
    model = ReferenceModel.from_directory(TINY)
    prompt = "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n"
    pieces = stream(model, prompt, temperature=0, presence_penalty=100.0, max_tokens=3)
    think = 4120  # <think>
    pieces.force([think])
    assert think not in pieces.completion().ids[1:]


def test_a_watch_sees_every_step_and_can_end_the_text() -> None:
    seen: list[int] = []

    def watch(pieces: Watched) -> None:
        seen.append(len(pieces.ids))
        if len(pieces.ids) == 3:
            pieces.end("loop")

    model = recite("12345")
    done = stream(model, "x", watch=[watch], stop="34").completion()
    assert (done.text, done.finish_reason) == ("123", "loop")  # what was held back for "34" is let go
    assert seen == [0, 1, 2, 3]
    assert stream(recite("12"), "x", watch=[lambda pieces: pieces.end("stop")]).completion().text == ""


def test_the_caller_can_end_the_text_between_pieces() -> None:
    pieces = stream(recite("1234"), "x", stop="23")
    assert next(pieces) == "1"
    pieces.end("length")
    assert pieces.completion().text == "1"
    held = stream(recite("1234"), "x", stop=["14", "12345"], max_tokens=9)
    held.force(TOKENIZER.encode("0123"))
    assert next(held) == "0"
    held.end("stop")
    assert list(held) == ["123"]
    assert (held.text, held.stop_string) == ("0123", None)
