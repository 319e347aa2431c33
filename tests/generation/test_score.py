"""Log-probabilities of continuations, against the logits of one pass over prompt and continuation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from npqwen.errors import ContextLengthError, OptionError
from npqwen.generation.session import Session
from npqwen.model import Model, load
from npqwen.tokenizer import Tokenizer

PROMPT = "river (noun): a large natural stream of"
LABELS = [" water", " wood and stone", ".", " water (larger than a creek)"]


@pytest.fixture(scope="module")
def model(tiny: Callable[[int], Path]) -> Iterator[Model]:
    with load(tiny(8), threads=2, context=200) as loaded:
        yield loaded


def plain(model: Model, prompt: list[int], continuation: list[int]) -> NDArray[np.float64]:
    """Each token's log-probability, by the softmax of the logits of one pass."""
    logits = model.logits(prompt + continuation)[len(prompt) - 1 : -1].astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    found: NDArray[np.float64] = logits[np.arange(len(continuation)), continuation]
    return found


def test_scores_are_those_of_one_pass_over_prompt_and_continuation(model: Model) -> None:
    encode = model.tokenizer.encode
    scores = model.score(PROMPT, LABELS)
    assert [score.text for score in scores] == LABELS
    for label, score in zip(LABELS, scores, strict=True):
        expected = plain(model, encode(PROMPT), encode(label))
        assert [token.id for token in score.tokens] == encode(label)
        np.testing.assert_allclose([token.logprob for token in score.tokens], expected, atol=1e-4)
        assert score.logprob == pytest.approx(expected.sum(), abs=1e-3)
        assert score.mean_logprob == pytest.approx(expected.mean(), abs=1e-3)
    assert max(scores, key=lambda score: score.logprob).text == " water"


def test_a_greedy_continuation_says_so(model: Model) -> None:
    ids = model.generate(PROMPT, max_tokens=6, temperature=0).ids
    likeliest, other = model.score(PROMPT, [ids, [*ids[:-1], ids[-1] + 1]])
    assert likeliest.is_greedy
    assert not other.is_greedy
    assert [token.top[0].id for token in other.tokens] == ids


def test_a_long_continuation_is_scored_in_parts(model: Model) -> None:
    ids = [int(id) for id in np.random.default_rng(0).integers(0, 4000, 195)]
    for length in (1, 2, 64, 65, 66, 130, 195):
        (score,) = model.score([7, 8, 9], [ids[:length]])
        expected = plain(model, [7, 8, 9], ids[:length])
        np.testing.assert_allclose([token.logprob for token in score.tokens], expected, atol=1e-3)


def test_the_prompt_is_computed_once_and_kept_in_a_session(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(ids: Any, *rest: Any, **options: Any) -> Any:
            computed.append(len(ids))
            return method(ids, *rest, **options)

        return call

    monkeypatch.setattr(model, "prefill", counted(model.prefill))
    monkeypatch.setattr(model, "forward", counted(model.forward))
    session, ids = Session(model), model.tokenizer.encode(PROMPT)
    alone = model.score(PROMPT, LABELS)
    rest = [n for n in (len(model.tokenizer.encode(label)) - 1 for label in LABELS) if n]
    assert computed == [len(ids), *rest]
    computed.clear()
    assert model.score(PROMPT, LABELS, session=session) == alone
    assert session.ids == ids
    assert session.cache.length == len(ids)
    computed.clear()
    model.score(PROMPT + " water", [" a"], session=session)
    assert computed == [len(model.tokenizer.encode(PROMPT + " water")) - len(ids)]


def test_one_continuation_gives_one_score(model: Model) -> None:
    assert model.score(PROMPT, " water") == model.score(PROMPT, [" water"])[0]
    assert model.score(PROMPT, []) == []
    assert repr(model.score(PROMPT, " wood and stone")).startswith("ContinuationScore(' wood and stone', logprob=-")


def harness_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """How lm-evaluation-harness cuts a pair into tokens: lm_eval/api/model.py, TemplateLM._encode_pair."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    whole, begin = tokenizer.encode(context + continuation), tokenizer.encode(context)
    return begin, whole[len(begin) :]


@pytest.mark.parametrize(
    ("context", "continuation"),
    [("The answer is", " 42"), ("Is it so?\nAnswer:", " yes, it is"), ("a (b)", " c"), ("x\n", "y z"), ("1 =", " 1")],
)
def test_words_that_begin_with_a_space_have_the_tokens_that_lm_evaluation_harness_gives_them(
    model: Model, context: str, continuation: str
) -> None:
    begin, end = harness_pair(model.tokenizer, context, continuation)
    if context.endswith("\n"):  # it moves all white space to the continuation
        begin, end = begin + end[:1], end[1:]
    score = model.score(context, continuation)
    assert [token.id for token in score.tokens] == end
    assert score.logprob == pytest.approx(plain(model, begin, end).sum(), abs=1e-3)


def test_a_continuation_inside_a_word_is_encoded_by_itself(model: Model) -> None:
    """Encoded together, the word is one token, and the prompt's end another one than the model is given."""
    encode = model.tokenizer.encode
    assert encode(" wat" + "er") == encode(" water") != encode(" wat") + encode("er")
    score = model.score("a stream of wat", "er")
    assert [token.id for token in score.tokens] == encode("er")
    assert score.logprob == pytest.approx(plain(model, encode("a stream of wat"), encode("er")).sum(), abs=1e-3)


@pytest.mark.parametrize(
    ("prompt", "continuations", "error", "message"),
    [
        ("", ["a"], OptionError, "the prompt is empty"),
        (None, ["a"], OptionError, "the prompt is None; give text or token ids"),
        ("a", 3, OptionError, "continuations is 3; give a list of texts or of token ids"),
        ("a", b"b", OptionError, "continuations is b'b'"),
        ("a", ["b", ""], OptionError, r"continuations\[1\] is empty; give it at least one token"),
        ("a", ["b", []], OptionError, r"continuations\[1\] is empty"),
        ("a", ["b", None], OptionError, r"continuations\[1\] is None; give text or token ids"),
        ("a", ["b", 7], OptionError, r"continuations\[1\] is 7; give text or token ids"),
        ("a", [[1.5]], OptionError, r"continuations\[0\] has 1\.5; each token id must be a whole number"),
        ("a", [[99999]], OptionError, r"continuations\[0\] has token id 99999; the model's are 0 to 4127"),
        ([5] * 150, ["b", [5] * 51], ContextLengthError, "150 tokens and a continuation's 51 exceed"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_runs(
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
    prompt: Any,
    continuations: Any,
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(model, "prefill", None)
    with pytest.raises(error, match=message):
        model.score(prompt, continuations)
    with pytest.raises(OptionError, match="session is 3; it must be a Session"):
        model.score("a", ["b"], session=3)  # type: ignore[call-overload]
