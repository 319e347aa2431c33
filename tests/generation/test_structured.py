"""Texts of guaranteed structure: every completed one has it, and all other options still hold."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from json_validator import is_valid
from noise import Noise
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from reciter import EOS, TOKENIZER, recite

import npqwen
from npqwen.errors import OptionError
from npqwen.generation.generate import generate, stream
from npqwen.generation.session import Session
from npqwen.structure.constraint import Constraint

SCHEMAS: dict[str, Any] = {
    "flat": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tall": {"type": "boolean"}},
        "required": ["name", "age", "tall"],
    },
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "number"}, "b": {"type": ["string", "null"]}, "c": {"enum": ["x", 3, None]}},
        "required": ["b"],
    },
    "nested": {
        "type": "object",
        "properties": {
            "points": {
                "type": "array",
                "minItems": 1,
                "maxItems": 3,
                "items": {
                    "type": "object",
                    "properties": {"x": {"type": "integer", "minimum": -5, "maximum": 5}, "y": {"const": "é\n\"'"}},
                    "required": ["x", "y"],
                },
            },
            "pair": {"type": "array", "prefixItems": [{"type": "string", "maxLength": 3}, {"type": "null"}],
                     "minItems": 2, "maxItems": 2},
        },
        "required": ["points", "pair"],
    },
    "recursive": {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "value": {"type": "string", "pattern": "^[a-z]{1,4}$"},
                    "left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
                },
                "required": ["value", "left"],
            }
        },
    },
    "open": {"type": "object", "additionalProperties": {"type": "integer"}},
}  # fmt: skip
LATER: dict[str, Any] = {"temperature": 3.0, "max_tokens": 400}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_completed_json_text_is_valid(name: str) -> None:
    schema, complete = SCHEMAS[name], 0
    for seed in range(12):
        done = generate(Noise(""), "x", schema=schema, seed=seed, **LATER)
        if done.finish_reason == "length":
            assert done.parsed is None
            continue
        value = json.loads(done.text)
        assert is_valid(value, schema), done.text
        assert done.parsed == value
        assert set(value) <= set(schema.get("properties", value))
        assert done.ids[-1] == EOS
        complete += 1
    assert complete >= 6


REGEXES = [
    r"\d{3}-\d{4}",
    r"[A-Z][a-z]+( [A-Z][a-z]+){0,2}",
    "^(yes|no|maybe)$",
    r"[^\n]{0,20}\n?",
    'a/b"c\\\\d',
    "é+ü?",
]


@pytest.mark.parametrize("regex", REGEXES)
def test_every_completed_text_matches_the_regex_as_a_whole(regex: str) -> None:
    complete = 0
    for seed in range(12):
        done = generate(Noise(""), "x", regex=regex, seed=seed, **LATER)
        assert done.parsed is None
        if done.finish_reason == "stop":
            assert re.fullmatch(regex, done.text), done.text
            complete += 1
    assert complete >= 6


def test_choices_are_exact_and_all_possible() -> None:
    choices = ["yes", "no", "no way", 'a "quoted" one\n', "ünïcode 🎉"]
    texts = {generate(Noise(""), "x", choice=choices, seed=seed, temperature=9.0).text for seed in range(60)}
    assert texts == set(choices)


LARK = 'start: greeting " " NAME ("," " " NAME)* "!"\ngreeting: "Hello" | "Good morning"\nNAME: /[A-Z][a-z]{1,8}/\n'
GBNF = 'root ::= greeting " " name (", " name)* "!"\ngreeting ::= "Hello" | "Good morning"\nname ::= [A-Z] [a-z]{1,8}\n'


@pytest.mark.parametrize("grammar", [LARK, GBNF], ids=["lark", "gbnf"])
def test_grammars_of_both_languages(grammar: str) -> None:
    for seed in range(10):
        done = generate(Noise(""), "x", grammar=grammar, seed=seed, **LATER)
        if done.finish_reason == "stop":
            assert re.fullmatch(r"(Hello|Good morning) [A-Z][a-z]{1,8}(, [A-Z][a-z]{1,8})*!", done.text), done.text


class Point(BaseModel):
    x: int = Field(ge=0, le=9)
    label: str = Field(max_length=5, alias="the label")


class Shape(BaseModel):
    points: list[Point] = Field(min_length=1, max_length=3)
    closed: bool | None = None


@dataclass
class Person:
    name: str
    friends: list[Person]


@pytest.mark.parametrize("kind", [Shape, Person])
def test_a_type_gives_its_instance(kind: Any) -> None:
    complete = 0
    for seed in range(12):
        done = generate(Noise(""), "x", schema=kind, seed=seed, **LATER)
        if done.finish_reason == "stop":
            assert isinstance(done.parsed, kind)
            assert done.parsed is done.parsed
            complete += 1
    assert complete >= 4


def test_a_check_that_a_schema_cannot_express_is_raised_with_the_text_kept() -> None:
    from pydantic import ValidationError, field_validator

    class Picky(BaseModel):
        word: str

        @field_validator("word")
        @classmethod
        def never(cls, value: str) -> str:
            raise ValueError("never right")

    done = generate(recite('{"word": "a"}'), "x", schema=Picky)
    assert done.text == '{"word": "a"}'
    with pytest.raises(ValidationError, match="never right"):
        _ = done.parsed


def without_forced(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> Any:
    """What `run` returns if every token is drawn from its mask."""
    with monkeypatch.context() as patch:
        patch.setattr(Constraint, "forced", lambda self: [])
        return run()


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.5},
    {"temperature": 1.0, "top_k": 5, "top_p": 0.9},
    {"temperature": 2.0, "min_p": 0.1, "presence_penalty": 1.0},
]


@pytest.mark.parametrize(
    "options", [{"schema": s} for s in SCHEMAS.values()] + [{"grammar": LARK}, {"regex": "abc(de|fg)hij"}]
)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_forced_tokens_are_those_that_would_be_drawn(
    options: Any, sampling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[list[int], Any, int]:
        model = Noise("", seed=1)
        done = generate(model, "x", seed=7, max_tokens=200, logprobs=True, **options, **sampling)
        return done.ids, done.logprobs, len(model.calls)

    fast, slow = run(), without_forced(monkeypatch, run)
    assert fast[:2] == slow[:2]


def test_forced_tokens_save_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = {"type": "object", "properties": {"a_long_name_of_a_property": {"type": "boolean"}},
              "required": ["a_long_name_of_a_property"]}  # fmt: skip
    model = recite("")
    done = generate(model, "x", schema=schema)
    assert re.fullmatch(r'\{"a_long_name_of_a_property": (true|false)\}', done.text)
    assert len(model.calls) <= 4 < len(done.ids) - 4
    assert done.usage.generated_tokens == len(done.ids)
    slow = recite("")
    assert without_forced(monkeypatch, lambda: generate(slow, "x", schema=schema)).ids == done.ids
    assert len(slow.calls) == len(done.ids) - 1  # the end alone is never drawn


def test_samples_of_one_prompt_and_lists_of_prompts_equal_texts_alone(tiny: Callable[[int], Path]) -> None:
    options: dict[str, Any] = {"schema": SCHEMAS["nested"], "temperature": 1.5, "max_tokens": 60, "logprobs": True}
    with npqwen.load(tiny(4), threads=1) as model:
        alone = [model.generate("Define river.", seed=seed, **options) for seed in (5, 6, 7)]
        together = model.generate("Define river.", n=3, seed=5, **options)
        several = model.generate(["Define river.", "x"], seed=5, **options)
    assert [one.ids for one in together] == [one.ids for one in alone]
    assert [one.parsed for one in together] == [one.parsed for one in alone]
    assert [one.logprobs for one in together] == [one.logprobs for one in alone]
    assert several[0].ids == alone[0].ids


def test_a_seeded_text_is_the_same_in_any_company() -> None:
    options: dict[str, Any] = {"schema": SCHEMAS["nested"], "temperature": 2.0, "max_tokens": 120}
    alone = [generate(Noise(""), "x", seed=seed, **options) for seed in (5, 6, 7)]
    model = Noise("", "")
    streams = [stream(model, "x", seed=seed, **options) for seed in (5, 6)]

    async def read() -> list[str]:
        return [piece async for piece in stream(Noise(""), "x", seed=7, **options)]

    texts = ["", ""]
    while any(one.finish_reason is None for one in streams):  # one model, taking turns
        for i, one in enumerate(streams):
            texts[i] += next(one, "")
    assert streams[0].ids == alone[0].ids
    assert "".join(asyncio.run(read())) == alone[2].text


def test_logprobs_are_the_models_own() -> None:
    model = Noise("")
    done = generate(model, "x", schema=SCHEMAS["flat"], top_logprobs=3, max_tokens=40, temperature=0.0)
    assert done.logprobs is not None
    assert [token.id for token in done.logprobs] == done.ids
    ids = TOKENIZER.encode("x")
    cache = (again := Noise("")).new_cache()
    row = again.prefill(ids, cache)
    for token in done.logprobs:
        expected = row.astype(np.float64)
        expected -= np.log(np.exp(expected).sum())
        assert token.logprob == pytest.approx(expected[token.id], abs=1e-4)
        assert [other.id for other in token.top] == np.argsort(-expected[: len(TOKENIZER)])[:3].tolist()
        row = again.forward([token.id], cache)[-1]


def test_penalties_bias_and_a_processor_choose_among_the_allowed() -> None:
    digits = [TOKENIZER.encode(str(digit))[0] for digit in range(10)]
    seven = generate(recite(""), "x", regex=r"\d{5}", logit_bias={digits[7]: 50.0})
    assert seven.text == "77777"
    different = generate(
        recite(""), "x", regex=r"\d{10}", logit_bias=dict.fromkeys(digits, 50.0), presence_penalty=100.0
    )
    assert sorted(different.text) == list("0123456789")
    seen: list[int] = []

    def prefers_three(ids: list[int], logits: NDArray[np.float32]) -> None:
        seen.append(len(ids))
        logits[digits[3]] = 1000

    assert generate(recite(""), "x", regex=r"a\d\db", logits_processor=prefers_three).text == "a33b"
    assert len(seen) >= 4  # it sees forced tokens, too


def test_a_token_that_options_forbid_is_not_forced() -> None:
    ids = TOKENIZER.encode("abc")
    forbidding: list[Any] = [
        {"logit_bias": {ids[0]: -np.inf}},
        {"logits_processor": lambda _, logits: np.full_like(logits, -np.inf)},
    ]
    for options in forbidding:
        with pytest.raises(OptionError, match="logits_processor forbid all tokens that the text's structure allows"):
            generate(recite(""), "x", regex="abc", **options)
    ended = generate(recite("", context=50), "x", regex="abc", logit_bias={EOS: -np.inf})
    assert (ended.text, ended.finish_reason) == ("abc", "stop")  # it is complete, with or without eos


def test_limits_stop_strings_and_the_loop_guard_end_a_text_that_is_then_not_parsed() -> None:
    schema = SCHEMAS["flat"]
    short = generate(Noise(""), "x", schema=schema, max_tokens=4)
    assert (short.finish_reason, len(short.ids), short.parsed) == ("length", 4, None)
    assert short.text.startswith('{"name":')
    stopped = generate(Noise(""), "x", schema=schema, stop='name"')
    assert (stopped.text, stopped.finish_reason, stopped.parsed) == ('{"', "stop", None)
    guard = npqwen.LoopGuard(answer_tokens=32)
    looping = generate(
        recite('["' + "a" * 900), "x", schema={"type": "array", "items": {"type": "string"}}, loop_guard=guard
    )
    assert (looping.finish_reason, looping.parsed) == ("loop", None)


def test_forced_tokens_of_the_caller_have_to_fit() -> None:
    pieces = stream(recite(""), "x", regex="abc|xyz")
    pieces.force(TOKENIZER.encode("xy"))
    assert pieces.completion().text == "xyz"
    pieces = stream(recite(""), "x", regex="abc|xyz")
    pieces.force(TOKENIZER.encode("q"))
    with pytest.raises(OptionError, match="was forced into the text, where regex does not allow it"):
        pieces.completion()


def test_a_session_continues_after_a_structured_text() -> None:
    model = Noise("", "")
    session = Session(model)
    first = generate(model, "x", schema=SCHEMAS["flat"], session=session, seed=1, temperature=1.0)
    assert session.ids == TOKENIZER.encode("x") + first.ids
    second = generate(model, session.ids, regex="[ab]{3}", session=session)
    assert re.fullmatch("[ab]{3}", second.text)
    assert second.usage.cached_tokens > 1
    assert model.read == [1, 1 + len(first.ids) - second.usage.cached_tokens]


OPEN = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
ANY = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("prompt", "script", "thought"),
    [
        (OPEN, "<think>\nHm {\n</think>\n\n", "<think>\nHm {\n</think>\n\n"),  # may think, and does
        (OPEN, '{"a": true}', ""),  # may think, and does not
        (OPEN + "<think>\n", "Hm.\n</think>\n\n", "Hm.\n</think>\n\n"),
        (OPEN + "<think>\n", "Hm.</think>Yes", "Hm.</think>\n\n"),  # the blank line is forced
        (OPEN + "<think>\n\n</think>\n\n", "Hm.", ""),
        ("Some text: ", "<think>", ""),  # raw text does not lead to thinking
    ],
)
def test_the_structure_begins_after_the_thinking(prompt: str, script: str, thought: str) -> None:
    done = generate(recite(script), prompt, schema=ANY)
    assert done.text.startswith(thought)
    assert done.text[len(thought) :] in ('{"a": true}', '{"a": false}')
    assert done.parsed == json.loads(done.text[len(thought) :])


def test_a_thinking_budget_leads_to_the_structure() -> None:
    done = generate(recite("<think>\n" + "Hm. " * 100), OPEN, schema=ANY, thinking_budget=5)
    thought, _, answer = done.text.partition("</think>\n\n")
    assert thought.startswith("<think>\nHm.")
    assert "limited time" in thought
    assert done.parsed == json.loads(answer)


def test_thinking_cannot_end_the_text() -> None:
    done = generate(recite([*TOKENIZER.encode("<think>\nHm."), EOS, EOS]), OPEN, schema=ANY, max_tokens=30)
    assert EOS not in done.ids
    assert done.finish_reason == "length"


def test_no_token_of_the_template_is_drawn_inside_a_string() -> None:
    tags = [TOKENIZER.token_id(tag) for tag in ("<think>", "</think>", "<tool_call>", "<|im_end|>", "<|endoftext|>")]
    bias = {id: 20.0 for id in tags if id is not None}
    done = generate(
        Noise(""), "x", schema={"type": "string", "minLength": 20}, logit_bias=bias, temperature=1.0, seed=1
    )
    assert not set(done.ids[:-1]) & bias.keys()


def test_without_a_structure_nothing_of_it_is_imported() -> None:
    import subprocess
    import sys

    code = "import npqwen, sys; npqwen.GenerationOptions; npqwen.Stream; print('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_real_model_follows_a_schema(tiny: Callable[[int], Path]) -> None:
    properties = {"word": {"type": "string", "maxLength": 12}, "kind": {"enum": ["noun", "verb"]}}
    schema = {"type": "object", "properties": properties, "required": ["word", "kind"]}
    with npqwen.load(tiny(4), threads=1) as model:
        for seed in range(3):
            done = model.generate("Define river.", schema=schema, seed=seed, temperature=1.0)
            assert is_valid(done.parsed, schema)
        pieces = model.stream("Define river.", schema=schema, seed=2, temperature=1.0)
        assert "".join(pieces) == done.text
