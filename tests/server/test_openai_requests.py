"""How bodies become the library's requests, for models that switch thinking, always think, or never do."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from reciter import Reciter
from scripted import ask, post

from npqwen.chat.chat_template import ChatTemplate
from npqwen.errors import OptionError
from npqwen.server.fields import FieldError, Fields
from npqwen.server.openai.chat_request import chat_body
from npqwen.server.openai.completion_request import completion_body
from npqwen.server.requests import ChatRequest

STRUCTURED = pytest.mark.skipif(find_spec("llguidance") is None, reason="structured output needs llguidance")
HELLO: Any = [{"role": "user", "content": "Hello"}]
SWITCH, ALWAYS, NEVER = "hybrid", "thinking-2507", "instruct-2507"


def request(template: str = SWITCH, **fields: Any) -> ChatRequest:
    model: Any = Reciter(template=template)
    return chat_body(Fields({"messages": HELLO, **fields})).request(model)


@pytest.mark.parametrize(
    ("template", "fields", "expected"),
    [
        (SWITCH, {}, {}),
        (SWITCH, {"reasoning_effort": "none"}, {"thinking": False}),
        (SWITCH, {"reasoning_effort": "low"}, {"thinking_budget": 1024}),
        (SWITCH, {"reasoning_effort": "max"}, {}),
        (SWITCH, {"reasoning_effort": "low", "thinking_budget": 7}, {"thinking_budget": 7}),
        (SWITCH, {"reasoning_effort": "none", "enable_thinking": True}, {"thinking": True}),
        (SWITCH, {"reasoning_effort": "low", "enable_thinking": False}, {"thinking": False}),
        (SWITCH, {"enable_thinking": True, "thinking_budget": -1}, {"thinking": True}),
        (SWITCH, {"thinking_budget": 0}, {"thinking": False, "thinking_budget": 0}),
        (SWITCH, {"thinking": {"type": "enabled", "budget_tokens": 9}}, {"thinking": True, "thinking_budget": 9}),
        (SWITCH, {"thinking": {"type": "adaptive"}}, {}),
        (ALWAYS, {}, {}),
        (ALWAYS, {"reasoning_effort": "none"}, {"thinking_budget": 0}),
        (ALWAYS, {"enable_thinking": False}, {"thinking_budget": 0}),
        (ALWAYS, {"enable_thinking": True}, {"thinking": True}),
        (ALWAYS, {"reasoning_effort": "medium"}, {"thinking_budget": 4096}),
        (NEVER, {}, {}),
        (NEVER, {"reasoning_effort": "none"}, {}),
        (NEVER, {"reasoning_effort": "high"}, {"thinking_budget": 16384}),
        (NEVER, {"enable_thinking": False}, {}),
    ],
)
def test_fields_about_thinking_become_options(template: str, fields: Any, expected: dict[str, Any]) -> None:
    assert request(template, **fields).options == expected


def test_an_effort_is_the_templates_own_where_it_has_one() -> None:
    source = (Path(__file__).parents[1] / "data" / "templates" / "qwen3.5.jinja").read_text(encoding="utf-8")
    graded = ChatTemplate({"default": "{% set e = reasoning_effort|default('xhigh') %}" + source}, {}, Path())
    model: Any = Reciter(template="qwen3.5")
    model.chat_template = graded

    def options(**fields: Any) -> Any:
        return chat_body(Fields({"messages": HELLO, **fields})).request(model).options

    for effort, grade in (("minimal", None), ("low", "low"), ("medium", "medium"), ("high", "xhigh"), ("max", "xhigh")):
        expected = {"thinking": False} if grade is None else {"template_options": {"reasoning_effort": grade}}
        assert options(reasoning_effort=effort) == expected
    own = {"chat_template_kwargs": {"reasoning_effort": "medium"}}
    assert options(reasoning_effort="low", **own) == {"template_options": {"reasoning_effort": "medium"}}
    assert options(reasoning_effort="low", thinking_budget=7) == {"thinking_budget": 7}
    assert options(reasoning_effort="low", enable_thinking=False) == {"thinking": False}


def test_variables_that_the_chat_template_does_not_have_are_ignored() -> None:
    kwargs = {"add_vision_id": True, "colour": 1, "enable_thinking": False}
    found = request("qwen3.5", chat_template_kwargs=kwargs).options
    assert found == {"thinking": False, "template_options": {"add_vision_id": True}}
    assert request(SWITCH, chat_template_kwargs=kwargs).options == {"thinking": False}


def test_a_model_that_never_thinks_is_not_made_to() -> None:
    with pytest.raises(OptionError, match="this model does not think"):
        request(NEVER, enable_thinking=True)


def test_results_of_parallel_calls_are_in_the_order_of_the_calls() -> None:
    def call(id: str, city: str) -> dict[str, Any]:
        return {"id": id, "type": "function", "function": {"name": f"look_at_{city}", "arguments": "{}"}}

    calls = {"role": "assistant", "tool_calls": [call("a", "paris"), call("b", "oslo")]}
    results = [{"role": "tool", "tool_call_id": id, "content": text} for id, text in (("b", "rain"), ("a", "sun"))]
    found = request(messages=[*HELLO, calls, *results]).messages[2:]
    assert [(one["content"], one["name"]) for one in found] == [("sun", "look_at_paris"), ("rain", "look_at_oslo")]
    unnamed = [{"role": "tool", "content": "fog"}, {"role": "tool", "content": "snow"}]
    found = request(messages=[*HELLO, calls, unnamed[0], results[1], unnamed[1]]).messages[2:]
    assert [one["content"] for one in found] == ["sun", "fog", "snow"]


def test_every_field_of_sampling_becomes_an_option() -> None:
    made = request(
        temperature=1, top_p=0.5, top_k=7, min_p=0.1, presence_penalty=1, frequency_penalty=-1, repeat_penalty=1.1,
        seed=-5, stop="x", logit_bias={"7": -100}, max_tokens=9, n=3, logprobs=True, top_logprobs=2,
    )  # fmt: skip
    assert made.n == 3
    assert made.options == {
        "temperature": 1, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.1, "seed": 2**64 - 5, "stop": ["x"], "logit_bias": {7: -100}, "max_tokens": 9,
        "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip


def test_null_is_as_good_as_absent() -> None:
    names = (
        "temperature", "n", "stop", "tools", "tool_choice", "response_format", "logit_bias", "stream", "thinking",
        "best_of", "audio", "functions", "reasoning", "stream_options", "max_tokens", "seed", "parallel_tool_calls",
    )  # fmt: skip
    fields: dict[str, Any] = dict.fromkeys(names)
    assert request(**fields).options == {}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"schema": {"type": "object"}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}}},
            {"schema": {"type": "array"}},
        ),
        ({"json_schema": {"type": "array"}}, {"schema": {"type": "array"}}),
        ({"guided_json": '{"type": "array"}'}, {"schema": {"type": "array"}}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
    ],
)
def test_structures_of_every_dialect_become_options(fields: Any, expected: dict[str, Any]) -> None:
    assert chat_body(Fields({"messages": HELLO, **fields})).options == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"guided_regex": "a", "grammar": "b"}, "excludes the other fields"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "json_schema.schema is missing"),
        ({"guided_json": "{"}, "guided_json is text, but not of JSON"),
        ({"guided_json": 5}, "guided_json is 5; it must be a JSON schema"),
    ],
)
def test_structures_that_make_no_sense_are_refused(fields: Any, words: str) -> None:
    with pytest.raises(FieldError) as error:
        chat_body(Fields({"messages": HELLO, **fields}))
    assert words in str(error.value)


def test_a_suffix_needs_a_model_with_tokens_for_it() -> None:
    class Without:
        def token_id(self, token: str) -> int | None:
            return None

    body = completion_body(Fields({"prompt": "a", "suffix": "b"}))
    with pytest.raises(FieldError, match="no fill-in-the-middle tokens"):
        body.requests(Without())  # type: ignore[arg-type]


def test_a_fill_in_the_middle_ends_before_tokens_that_begin_something_else() -> None:
    (made,) = completion_body(Fields({"prompt": "a", "suffix": "b", "stop": "x"})).requests(Reciter().tokenizer)
    assert made.prompt == "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"
    stop = made.options["stop"]
    assert isinstance(stop, list)
    assert stop[0] == "x"
    assert {"<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"} < set(stop)


BEGUN: Any = [*HELLO, {"role": "assistant", "content": "The sum is"}]


@pytest.mark.parametrize("fields", [{}, {"continue_final_message": True, "add_generation_prompt": False}])
def test_an_answer_that_the_messages_end_with_is_continued(fields: Any) -> None:
    body = {"messages": BEGUN, **fields}
    model: Any = Reciter(" 42.", " 42.")
    got = post(model, "/v1/chat/completions", body)
    assert got["choices"][0]["message"]["content"] == " 42."
    events = ask(model, "/v1/chat/completions", {**body, "stream": True}).text.split("\n\n")[:-2]
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == " 42."
    shown = post(Reciter(), "/apply-template", body)["prompt"]
    assert model.prompts == [shown, shown]
    assert shown.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nThe sum is")


@pytest.mark.parametrize(
    "last",
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]},
    ],
)
def test_only_an_answer_without_calls_can_be_continued(last: Any) -> None:
    for name, wrong in (("continue_final_message", True), ("add_generation_prompt", False)):
        with pytest.raises(FieldError, match="there is nothing to continue") as error:
            chat_body(Fields({"messages": [*HELLO, last], name: wrong}))
        assert error.value.param == name
        chat_body(Fields({"messages": [*HELLO, last], name: not wrong}))


def test_no_new_message_can_follow_an_answer_that_has_begun() -> None:
    for name, wrong in (("continue_final_message", False), ("add_generation_prompt", True)):
        with pytest.raises(FieldError, match="the assistant's, which is always continued") as error:
            chat_body(Fields({"messages": BEGUN, name: wrong}))
        assert error.value.param == name


@STRUCTURED
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"stop": [""]}, "stop", ""),
        ({"guided_regex": "("}, "guided_regex", "cannot be used"),
        ({"guided_regex": ""}, "guided_regex", "is empty"),
        ({"guided_choice": []}, "guided_choice", "is []; it must be a sequence"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice", "is [1]"),
        ({"grammar": "root ::= foo"}, "grammar", "cannot be read"),
        ({"guided_grammar": "nothing"}, "guided_grammar", "begins with 'nothing'"),
        ({"guided_json": {"type": "nothing"}}, "guided_json", "cannot be used"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}},
            "response_format.json_schema.schema",
            "cannot be used",
        ),
    ],
)
def test_an_error_about_structure_names_the_field(fields: Any, param: str, words: str) -> None:
    for path, body in (("chat/completions", {"messages": HELLO}), ("completions", {"prompt": "Hello"})):
        error = post(Reciter(), f"/v1/{path}", {**body, **fields}, 400)["error"]
        assert error["param"] == param
        assert error["message"].startswith(f"{param} {words}")


@STRUCTURED
def test_an_error_about_a_schema_names_the_field_of_every_api() -> None:
    schema = {"type": "nothing"}
    format = {"type": "json_schema", "name": "a", "schema": schema}
    bodies: list[tuple[str, Any, str]] = [
        ("/v1/responses", {"input": "Hello", "text": {"format": format}}, "text.format.schema"),
        ("/v1/messages", {"messages": HELLO, "output_config": {"format": format}}, "output_config.format.schema"),
        ("/v1/messages", {"messages": HELLO, "output_format": format}, "output_format.schema"),
        ("/api/chat", {"messages": HELLO, "format": schema}, "format"),
        ("/api/chat", {"messages": HELLO, "format": schema, "options": {"num_ctx": 99}}, "format"),
        ("/api/generate", {"prompt": "Hello", "raw": True, "format": schema}, "format"),
        ("/api/generate", {"prompt": "Hello", "suffix": "!", "format": schema}, "format"),
    ]
    for path, body, field in bodies:
        error = post(Reciter(), path, body, 400)["error"]
        message = error if isinstance(error, str) else error["message"]
        assert message.startswith(f"{field} cannot be used: "), path
