"""POST /v1/completions by the openai package: raw text, token ids, several prompts, fill in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from serving import Runs

import npqwen
from npqwen.generation.completion import TokenLogprobs
from npqwen.server.openai.logprobs import TextLogprobs

RIVER = "A river is"


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def texts(chunks: Any) -> dict[int, str]:
    """Each choice's text, put together from a stream."""
    found: dict[int, str] = {}
    finished = set()
    for chunk in chunks:
        for choice in chunk.choices:
            assert choice.index not in finished
            found[choice.index] = found.get(choice.index, "") + choice.text
            if choice.finish_reason:
                finished.add(choice.index)
    assert finished == set(found)
    return found


def test_a_text_is_continued_as_by_the_library(client: openai.OpenAI, tiny_model: npqwen.Model) -> None:
    answer = client.completions.create(model="", prompt=RIVER, seed=1)
    expected = tiny_model.generate(RIVER, seed=1)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.completion_tokens == expected.usage.generated_tokens
    assert texts(client.completions.create(model="", prompt=RIVER, seed=1, stream=True)) == {0: expected.text}


def test_prompts_are_texts_or_token_ids_one_or_many(client: openai.OpenAI, tiny_model: npqwen.Model) -> None:
    prompts = [RIVER, "A house is"]
    ids = [tiny_model.tokenizer.encode(prompt) for prompt in prompts]
    expected = [tiny_model.generate(prompt, seed=seed, max_tokens=8) for prompt in prompts for seed in (3, 4)]
    for prompt in (prompts, ids):
        options: Any = {"model": "", "prompt": prompt, "n": 2, "seed": 3, "max_tokens": 8}
        answer = client.completions.create(**options)
        assert [choice.text for choice in answer.choices] == [one.text for one in expected]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        assert answer.usage.completion_tokens == sum(one.usage.generated_tokens for one in expected)
        chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
        assert texts(chunks) == dict(enumerate(choice.text for choice in answer.choices))
        counted = {"prompt_tokens", "completion_tokens", "total_tokens"}  # numbers of draft tokens differ
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.model_dump(include=counted) == answer.usage.model_dump(include=counted)
    one = client.completions.create(model="", prompt=ids[0], seed=3, max_tokens=8)
    assert one.choices[0].text == expected[0].text


def test_more_prompts_than_are_started_at_once_come_back_in_order(client: openai.OpenAI, runs: Runs) -> None:
    prompts = [f"The number {n} is" for n in range(20)]
    options: Any = {"model": "", "prompt": prompts, "max_tokens": 3, "temperature": 0}
    answer = client.completions.create(**options, echo=True)
    assert all(choice.text.startswith(prompt) for choice, prompt in zip(answer.choices, prompts, strict=True))
    assert len(runs.all) == 20
    streamed = texts(client.completions.create(**options, echo=True, stream=True))
    assert [streamed[index] for index in range(20)] == [choice.text for choice in answer.choices]


def test_one_bad_prompt_among_many_is_refused_and_the_others_are_cancelled(client: openai.OpenAI, runs: Runs) -> None:
    with pytest.raises(openai.BadRequestError, match="the prompt has token id 99999"):
        client.completions.create(model="", prompt=[[1, 2], [99999]])
    assert [run.cancelled for run in runs.all] == [True]


def test_echo_begins_with_the_prompt(client: openai.OpenAI, tiny_model: npqwen.Model) -> None:
    ids = tiny_model.tokenizer.encode("<|im_start|>user")
    answer = client.completions.create(model="", prompt=ids, max_tokens=2, echo=True, temperature=0)
    assert answer.choices[0].text == "<|im_start|>user" + tiny_model.generate(ids, max_tokens=2, temperature=0).text


def test_logprobs_have_the_old_shape(client: openai.OpenAI, tiny_model: npqwen.Model) -> None:
    options: Any = {"model": "", "prompt": RIVER, "seed": 1, "max_tokens": 6, "logprobs": 2}
    answer = client.completions.create(**options)
    found = answer.choices[0].logprobs
    expected = tiny_model.generate(RIVER, seed=1, max_tokens=6, top_logprobs=2).logprobs
    assert found is not None
    assert expected is not None
    assert found.tokens == [one.text for one in expected]
    assert found.token_logprobs == pytest.approx([one.logprob for one in expected])
    assert found.top_logprobs is not None
    assert [set(one) for one in found.top_logprobs] == [{top.text for top in one.top} for one in expected]
    text = answer.choices[0].text
    assert found.text_offset is not None
    assert len(found.text_offset) == 6
    assert all(text[at:].startswith(token) for at, token in zip(found.text_offset, found.tokens or [], strict=True))
    chunks = list(client.completions.create(**options, stream=True))
    pieces = [chunk.choices[0].logprobs for chunk in chunks]
    assert [token for piece in pieces if piece for token in piece.tokens or []] == found.tokens
    assert [offset for piece in pieces if piece for offset in piece.text_offset or []] == found.text_offset


def test_offsets_count_characters_that_are_split_over_tokens() -> None:
    text = "a🎉é한x\u0301"
    inside = [at for at, character in enumerate(text) for _ in character.encode()]
    whole = text.encode()
    for cuts in ([*range(len(whole))], [0, 3, 4, 9], [0, 2, 5, 6, 11], [0]):
        pieces = [whole[start:end] for start, end in zip(cuts, [*cuts[1:], len(whole)], strict=True)]
        tokens = [TokenLogprobs(0, piece, -1.0) for piece in pieces]
        expected = [inside[cut] for cut in cuts]
        assert TextLogprobs()(tokens)["text_offset"] == expected
        chunks = TextLogprobs()
        assert [offset for token in tokens for offset in chunks([token])["text_offset"]] == expected
    broken = [TokenLogprobs(0, piece, -1.0) for piece in (b"\xf0", b"\xf0\x9f", b"b", b"", b"\xff", b"c")]
    assert TextLogprobs()(broken)["text_offset"] == [0, 1, 2, 3, 3, 4]  # of "��b�c"


def test_a_suffix_makes_a_prompt_with_the_fill_in_the_middle_tokens(
    client: openai.OpenAI, tiny_model: npqwen.Model
) -> None:
    raw = "<|fim_prefix|>def add(a, b):\n    return<|fim_suffix|>\n\nadd(1, 2)<|fim_middle|>"
    options: Any = {"model": "", "seed": 1, "max_tokens": 8}
    by_suffix = client.completions.create(
        prompt="def add(a, b):\n    return", suffix="\n\nadd(1, 2)", **options
    )
    by_text = client.completions.create(prompt=raw, **options)
    assert by_suffix.choices[0].text == by_text.choices[0].text
    assert by_suffix.usage is not None
    assert by_suffix.usage.prompt_tokens == len(tiny_model.tokenizer.encode(raw))
    assert tiny_model.tokenizer.token_id("<|fim_middle|>") in tiny_model.tokenizer.encode(raw)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"best_of": 3}, "best_of is not supported"),
        ({"prompt": []}, "prompt is []; it must be text, a list of texts, token ids"),
        ({"prompt": [1, "a"]}, "prompt is [1, 'a']; it must be"),
        ({"prompt": [[1], "a"]}, "it must be"),
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": ""}, "prompt is empty; send text or token ids"),
        ({"prompt": ["a", ""]}, "prompt[1] is empty"),
        ({"prompt": [[]]}, "prompt is empty"),
        ({"prompt": [-1]}, "token id -1"),
        ({"prompt": 1200 * ["a"]}, "at most 1024"),
        ({"prompt": [1], "suffix": "a"}, "suffix needs a prompt of text"),
        ({"echo": True, "logprobs": 1}, "echo with logprobs is not supported"),
        ({"logprobs": True}, "logprobs is True; it must be a whole number from 0 to 20"),
        ({"n": 17}, "n is 17; it must be a whole number from 1 to 16"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(client: openai.OpenAI, fields: Any, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="", prompt="a", extra_body=fields)
    assert words in error.value.message
