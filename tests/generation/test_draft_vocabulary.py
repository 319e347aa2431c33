"""The ids that a draft layer chooses from: the lowest, and beyond them those that the text has had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npqwen
from npqwen.engine.draft_layer import DraftLayer
from npqwen.errors import OptionError
from npqwen.generation import draft_vocabulary
from npqwen.generation.draft_vocabulary import LATEST, MOST_GROUPS, DraftVocabulary
from npqwen.generation.drafting import Drafting
from npqwen.generation.generate import generate
from npqwen.generation.layer_drafter import LayerStatistics
from npqwen.model import Model

SIZE = 16 * 2000
RARE = [SIZE - 16 * i - 3 for i in range(1, 400)]
"""Ids of as many groups."""


@pytest.fixture(scope="module")
def model(hybrid: Callable[[str, int], Path]) -> Iterator[Model]:
    with npqwen.load(hybrid("mtp", 16), threads=2) as loaded:
        yield loaded


def ids_of(vocabulary: DraftVocabulary) -> list[int]:
    return [vocabulary.id(place) for place in range(vocabulary.logits.size)]


def test_ids_are_the_lowest_and_those_of_the_text() -> None:
    vocabulary = DraftVocabulary(SIZE, [])
    vocabulary.follow([*range(300), *RARE[:5] * 100])
    ids = ids_of(vocabulary)
    assert ids[: SIZE // 8] == list(range(SIZE // 8))
    assert set(RARE[:5]) < set(ids)
    assert len(ids) == len(set(ids)) == SIZE // 8 + 16 * 5


def test_many_new_ids_need_a_larger_part() -> None:
    vocabulary = DraftVocabulary(SIZE, [])
    vocabulary.follow([*range(200), *(SIZE // 5 + 16 * i for i in range(100))])
    assert ids_of(vocabulary)[: SIZE // 4] == list(range(SIZE // 4))
    vocabulary = DraftVocabulary(SIZE, [])
    vocabulary.follow(RARE)
    assert ids_of(vocabulary) == list(range(SIZE))


def test_added_ids_can_be_drafted_once_the_text_has_them() -> None:
    vocabulary = DraftVocabulary(SIZE, range(SIZE - 20, SIZE))
    vocabulary.follow([SIZE - 1, 5, 6, 7])
    ids = ids_of(vocabulary)
    assert len(ids) == SIZE // 8 + 16
    assert ids[-1] == SIZE - 1


def test_the_latest_ids_go_first_where_there_are_too_many() -> None:
    vocabulary = DraftVocabulary(SIZE, [])
    old = [SIZE - 8 - 16 * i for i in range(900, 950)]
    text = [*old, *([9] * LATEST)]
    vocabulary.follow(text)
    assert not set(old) & set(ids_of(vocabulary))
    many = [SIZE - 8 - 16 * i for i in range(MOST_GROUPS + 30)]
    vocabulary.follow([*text, *many, *([7] * 1000)])
    ids = set(ids_of(vocabulary))
    assert set(many[30:]) < ids
    assert not set(many[:30]) & ids


def test_ids_are_chosen_anew_after_some_tokens() -> None:
    vocabulary, text = DraftVocabulary(SIZE, []), [5] * 100
    vocabulary.follow(text)
    before = vocabulary.logits
    vocabulary.follow([*text, RARE[0]])
    assert vocabulary.logits is before
    vocabulary.follow([*text, *[RARE[0]] * 64])
    assert RARE[0] in ids_of(vocabulary)


@pytest.mark.parametrize("size", [SIZE - 5, 16 * 3 + 1])
def test_padding_is_never_drafted(size: int) -> None:
    vocabulary = DraftVocabulary(size, [])
    for text in ([4] * 50 + [size - 1] * 500, list(range(0, size, 3))):
        vocabulary.follow([*text, *[5] * 100])
        assert size - 1 in ids_of(vocabulary)
        vocabulary.logits[:] = -2
        vocabulary.logits[0, [i for i, id in enumerate(ids_of(vocabulary)) if id >= size]] = 0
        vocabulary.logits[0, 7] = -1
        assert vocabulary.id(vocabulary.best()) == 7


def logits_of(layer: DraftLayer, columns: int, groups: list[int]) -> np.ndarray:
    states = np.random.default_rng(2).standard_normal((9, 64)).astype(np.float32)
    out = np.empty((1, columns), np.float32)
    layer.run(range(300, 309), states, layer.new_cache(), out, groups=np.array(groups, np.int64))
    logits: np.ndarray = out[0]
    return logits


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("threads", [1, 3])
def test_logits_of_groups_are_those_of_the_whole_vocabulary(
    hybrid: Callable[[str, int], Path], bits: int, threads: int
) -> None:
    with npqwen.load(hybrid("mtp", bits), threads=threads) as model:
        layer = model.draft_layer
        assert layer is not None
        whole = logits_of(layer, 4128, [])
        for groups in ([257], [3, 40, 41, 256], list(range(4, 257, 3))):
            found = logits_of(layer, 64 + 16 * len(groups), groups)
            wanted = np.concatenate([np.arange(64), *(np.arange(16 * group, 16 * group + 16) for group in groups)])
            np.testing.assert_array_equal(found, whole[wanted])


def test_impossible_groups_are_refused(model: Model) -> None:
    layer = model.draft_layer
    assert layer is not None
    for groups in ([-1], [258]):
        with pytest.raises(OptionError, match="groups must be int64, from 0 to 257"):
            logits_of(layer, 64, groups)
    with pytest.raises(OptionError, match="out has 32 columns; with 2 groups of 16 ids it needs 48 to 4160"):
        logits_of(layer, 32, [3, 4])


def test_ids_of_the_prompt_are_drafted_beyond_the_lowest_ones(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the 256 lowest ids would do: bytes, and no word of the text."""
    monkeypatch.setattr(draft_vocabulary, "_PARTS", (1 / 16,))
    monkeypatch.setattr(draft_vocabulary, "ENOUGH", 0)
    monkeypatch.setattr(Drafting, "remember", lambda self, ids: None)
    example = "<|im_start|>user\nDefine {}.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    options: dict[str, Any] = {"max_tokens": 60, "temperature": 0, "logit_bias": {4098: -1e9, 4096: -1e9}}
    prompt = example.format("anger")
    prompt += generate(model, prompt, speculation=False, **options).text + "<|im_end|>\n" + prompt
    want = generate(model, prompt, speculation=False, **options).ids
    accepted = []
    for most in (0, MOST_GROUPS):
        monkeypatch.setattr(draft_vocabulary, "MOST_GROUPS", most)
        monkeypatch.setattr(model, "_drafting", Drafting(model.passes, layer=LayerStatistics(model)))
        monkeypatch.setattr("npqwen.generation.text_drafter.TextDrafter.propose", lambda self, most: None)
        found = generate(model, prompt, speculation=True, **options)
        assert found.ids == want
        accepted.append(found.usage.accepted_tokens)
    assert accepted[1] > 1.5 * accepted[0]
