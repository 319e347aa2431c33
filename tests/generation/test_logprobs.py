"""Log-probabilities of a text's tokens, against a float64 log-softmax of the model's own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reference import ReferenceModel

from npqwen.generation.decoding import token_logprobs

TINY = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
SUM = "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return ReferenceModel.from_directory(TINY)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    return x


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1.7, "seed": 3, "top_k": 50},
        {"temperature": 0.0, "presence_penalty": 5.0, "logit_bias": {17: 4.0}},
    ],
    ids=str,
)
def test_they_are_the_models_own_whatever_the_sampling(model: ReferenceModel, options: dict[str, Any]) -> None:
    result = model.generate(SUM, max_tokens=12, top_logprobs=3, **options)
    prompt = model.tokenizer.encode(SUM)
    rows = model.logits([*prompt, *result.ids])[len(prompt) - 1 :]
    assert result.logprobs is not None
    assert [entry.id for entry in result.logprobs] == result.ids
    for row, entry in zip(rows, result.logprobs, strict=False):
        expected = log_softmax(row)
        assert entry.logprob == pytest.approx(expected[entry.id], abs=1e-3)
        assert [t.logprob for t in entry.top] == pytest.approx(sorted(expected[:4122], reverse=True)[:3], abs=1e-3)
        assert [t.id for t in entry.top] == np.argsort(-row[:4122], kind="stable")[:3].tolist()
        assert entry.bytes == model.tokenizer.token_bytes(entry.id)


def test_they_are_kept_only_on_request(model: ReferenceModel) -> None:
    assert model.generate(SUM, max_tokens=3).logprobs is None
    stream = model.stream(SUM, max_tokens=3, logprobs=True, temperature=0)
    next(stream)
    assert stream.logprobs is not None
    assert len(stream.logprobs) == len(stream.ids) == 1
    assert stream.logprobs[0].top == ()
    assert stream.logprobs[0].text == "<think>"


def test_rows_without_a_token_are_not_candidates_and_parts_of_characters_are_bytes(model: ReferenceModel) -> None:
    logits = np.zeros(4128, np.float32)
    logits[4122:] = 9.0
    part = model.tokenizer.encode("🎉")[0]
    logits[part] = 5.0
    logits[3] = -np.inf
    found = token_logprobs(logits, part, 2, model.tokenizer)
    assert found.top[0].id == part
    assert found.top[1].id < 4122
    assert (found.text, len(found.bytes)) == ("\ufffd", 1)
    assert found.logprob == pytest.approx(log_softmax(logits)[part], abs=1e-6)
    everything = token_logprobs(logits, 3, 1000, model.tokenizer)
    assert (len(everything.top), everything.logprob) == (1000, -np.inf)
    assert len(token_logprobs(np.where(logits == 5.0, logits, -np.inf), part, 5, model.tokenizer).top) == 1


def test_forced_tokens_have_theirs(model: ReferenceModel) -> None:
    prompt = model.tokenizer.encode(SUM)
    stream = model.stream(SUM, max_tokens=14, logprobs=True, temperature=0)
    next(stream)
    next(stream)
    stream.force(model.tokenizer.encode("Let us see: "))
    list(stream)
    rows = model.logits([*prompt, *stream.ids])[len(prompt) - 1 :]
    expected = [log_softmax(row)[id] for row, id in zip(rows, stream.ids, strict=False)]
    assert stream.logprobs is not None
    assert [entry.logprob for entry in stream.logprobs] == pytest.approx(expected, abs=1e-3)
    assert stream.cache.length == len(prompt) + len(stream.ids) - 1
