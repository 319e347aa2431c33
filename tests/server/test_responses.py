"""OpenAI's Responses API: what a body means to the model, and how its answers and errors look."""

from __future__ import annotations

from typing import Any

import pytest
from event_streams import ResponseReader, server_sent
from reciter import Reciter
from scripted import ask, post

THOUGHT = "<think>\nHm.\n</think>\n\nYes."
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "here"}}\n</tool_call>'
PATCH = '<tool_call>\n{"name": "patch", "arguments": {"input": "*** Begin\\n"}}\n</tool_call>'
TRACKER = '<tool_call>\n{"name": "mcp__tracker__get", "arguments": {"id": 7}}\n</tool_call>'
TOOL = {
    "type": "function",
    "name": "look",
    "description": "Looks.",
    "strict": True,
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
}
CUSTOM = {
    "type": "custom",
    "name": "patch",
    "description": "Patches.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: LF"},
}
NAMESPACE = {
    "type": "namespace",
    "name": "mcp__tracker",
    "tools": [{"type": "function", "name": "get", "parameters": {}}],
}


def body(given: Any = "Hi", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "input": given, **fields}


def prompt(given: Any = "Hi", template: str = "hybrid", **fields: Any) -> str:
    """The prompt that a body becomes."""
    model = Reciter("ok", template=template)
    post(model, "/v1/responses", body(given, **fields))
    return model.prompts[0]


def refusal(given: Any = "Hi", status: int = 400, **fields: Any) -> str:
    """The message of the error that a body is answered with."""
    error = post(Reciter(), "/v1/responses", body(given, **fields), status)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    message: str = error["message"]
    return message


def answer(written: str, **fields: Any) -> Any:
    return post(Reciter(written), "/v1/responses", body(**fields))


def streamed(text: str, context: int = 2048, **fields: Any) -> ResponseReader:
    got = ask(Reciter(text, context=context), "/v1/responses", body(stream=True, **fields))
    assert got.headers["content-type"].startswith("text/event-stream")
    return ResponseReader(server_sent(got.text.split("\n")))


# --- what the model reads ---


def test_the_input_is_text_or_messages_of_parts() -> None:
    parts = [{"type": "input_text", "text": "H"}, {"type": "input_text", "text": "i"}]
    for given in (
        "H\ni",
        [{"role": "user", "content": "H\ni"}],
        [{"type": "message", "role": "user", "content": parts}],
    ):
        assert prompt(given) == "<|im_start|>user\nH\ni<|im_end|>\n<|im_start|>assistant\n"


def test_instructions_and_developer_messages_become_one_system_message() -> None:
    messages = [{"role": "developer", "content": "Use tabs."}, {"role": "user", "content": "Hi"}]
    wanted = "<|im_start|>system\nBe brief.\n\nUse tabs.<|im_end|>\n<|im_start|>user\nHi<|im_end|>"
    assert prompt(messages, instructions="Be brief.").startswith(wanted)


def test_an_answer_that_the_input_ends_with_is_continued() -> None:
    given = [{"role": "user", "content": "17 + 25?"}, {"role": "assistant", "content": "The sum is"}]
    assert prompt(given).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nThe sum is")
    got = post(Reciter(" 42."), "/v1/responses", body(given))
    assert [part["text"] for item in got["output"] for part in item["content"]] == [" 42."]
    counted = post(Reciter(), "/v1/responses/input_tokens", body(given))
    assert counted["input_tokens"] == got["usage"]["input_tokens"]


def test_reasoning_text_and_calls_of_one_answer_are_read_as_one() -> None:
    reasoning = answer("<think>\nWhere?\n</think>\n\nHere.")["output"][0]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Where?"}]
    shapes = [
        reasoning,
        {**reasoning, "content": None},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Where?"}]},
    ]
    for item in shapes:
        text = prompt(
            [
                {"role": "user", "content": "Hi"},
                item,
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me look."}]},
                {"type": "function_call", "name": "look", "arguments": '{"at": "here"}', "call_id": "a"},
                {"type": "function_call", "name": "look", "arguments": '{"at": "there"}', "call_id": "b"},
                {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "two"}]},
                {"type": "function_call_output", "call_id": "a", "output": "one"},
            ],
            tools=[TOOL],
        )
        assert (
            "<|im_start|>assistant\n<think>\nWhere?\n</think>\n\nLet me look.\n"
            '<tool_call>\n{"name": "look", "arguments": {"at": "here"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "look", "arguments": {"at": "there"}}\n</tool_call><|im_end|>\n'
            "<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>\n"
        ) in text


def test_an_answer_sent_back_is_read_as_the_model_wrote_it() -> None:
    """The prompt of the next step begins with the prompt and the text of this one: nothing is computed again."""
    written = f"<think>\nHm.\n</think>\n\nLet me look.\n{CALL}"
    model = Reciter(written, "ok")
    output = post(model, "/v1/responses", body(tools=[TOOL]))["output"]
    result = {"type": "function_call_output", "call_id": output[-1]["call_id"], "output": "one"}
    post(model, "/v1/responses", body([{"role": "user", "content": "Hi"}, *output, result], tools=[TOOL]))
    assert model.prompts[1].startswith(model.prompts[0] + written)


def test_items_of_unknown_types_are_skipped() -> None:
    unknown = [
        {"type": "web_search_call", "id": "x"},
        {"type": "ghost_snapshot"},
        {"type": "compaction", "encrypted_content": "x"},
    ]
    assert prompt([{"role": "user", "content": "Hi"}, *unknown]) == prompt()


def test_a_call_that_was_cut_off_does_not_end_the_conversation() -> None:
    for template in ("hybrid", "coder"):
        items = [
            {"role": "user", "content": "Hi"},
            {"type": "function_call", "name": "look", "arguments": '{"at": "he', "call_id": "a"},
            {"type": "function_call_output", "call_id": "a", "output": "failed to parse function arguments"},
        ]
        assert '{"at' in prompt(items, template, tools=[TOOL]).replace('\\"', '"')


def test_tools_of_unknown_types_are_skipped() -> None:
    hosted = [
        {"type": "web_search"},
        {"type": "local_shell"},
        {"type": "tool_search", "execution": "client"},
        {"type": "mcp", "server_label": "x"},
    ]
    text = prompt(tools=[*hosted, TOOL])
    assert '{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters"' in text
    assert "search" not in text
    assert prompt(tools=hosted) == prompt()


def test_allowed_tools_are_the_only_ones_that_the_model_sees() -> None:
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "custom", "name": "patch"}]}
    text = prompt(tools=[TOOL, CUSTOM], tool_choice=choice)
    assert '"patch"' in text
    assert '"look"' not in text


def test_effort_decides_whether_and_how_long_the_model_thinks() -> None:
    closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert prompt(reasoning={"effort": "none"}).endswith(closed)
    assert prompt(reasoning={"effort": "low"}).endswith("<|im_start|>assistant\n")
    long = f"<think>\n{' '.join(map(str, range(1000)))}</think>\n\nDone."
    got = post(Reciter(long, context=8192), "/v1/responses", body(reasoning={"effort": "low"}))
    assert got["output"][0]["content"][0]["text"].endswith("based on the thinking directly now.")
    assert 1024 <= got["usage"]["output_tokens_details"]["reasoning_tokens"] < 1100


# --- answers ---


@pytest.mark.parametrize(
    "text",
    [
        "Yes.",
        THOUGHT,
        CALL,
        f"{THOUGHT}\n{CALL}\n{PATCH}",
        f"One.\n{TRACKER}\nTwo.\n{CALL}",
        "",
        "<tool_call>no</tool_call>",
    ],
)
@pytest.mark.parametrize("summary", [None, "auto"])
def test_a_stream_builds_the_response_of_one_piece(text: str, summary: str | None) -> None:
    fields: Any = {"tools": [TOOL, CUSTOM, NAMESPACE], "reasoning": {"summary": summary}, "instructions": "Be brief."}
    stream, whole = streamed(text, **fields).response, answer(text, **fields)
    for response in (stream, whole):
        assert response["status"] == "completed"
        for item in response["output"]:
            assert item.pop("id").startswith(("rs_", "msg_", "fc_", "ctc_"))
            item.pop("call_id", None)
        del response["id"], response["created_at"]
    assert stream == whole


def test_reasoning_is_raw_text_or_a_summary_never_both() -> None:
    raw = answer(THOUGHT)["output"][0]
    assert (raw["content"], raw["summary"]) == ([{"type": "reasoning_text", "text": "Hm."}], [])
    shown = answer(THOUGHT, reasoning={"summary": "auto"})["output"][0]
    assert (shown["content"], shown["summary"]) == ([], [{"type": "summary_text", "text": "Hm."}])


def test_calls_have_the_names_that_the_client_gave_their_tools() -> None:
    look, patch, get = answer(f"{CALL}\n{PATCH}\n{TRACKER}", tools=[TOOL, CUSTOM, NAMESPACE])["output"]
    assert (look["type"], look["name"], look["arguments"]) == ("function_call", "look", '{"at": "here"}')
    assert (patch["type"], patch["name"], patch["input"]) == ("custom_tool_call", "patch", "*** Begin\n")
    assert (get["type"], get["name"], get["namespace"]) == ("function_call", "get", "mcp__tracker")
    items = [{"role": "user", "content": "Hi"}, look, patch, get]
    items += [
        {"type": "function_call_output", "call_id": look["call_id"], "output": "1"},
        {"type": "custom_tool_call_output", "call_id": patch["call_id"], "output": "2"},
        {"type": "function_call_output", "call_id": get["call_id"], "output": "3"},
    ]
    text = prompt(items, tools=[TOOL, CUSTOM, NAMESPACE])
    assert f"{CALL}\n{PATCH}\n{TRACKER}<|im_end|>" in text
    assert "The input follows this lark grammar:\\nstart: LF" in text


def test_an_answer_that_is_cut_off_is_incomplete() -> None:
    for response in (
        answer("one two three", max_output_tokens=2),
        streamed("one two three", max_output_tokens=2).response,
    ):
        assert response["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        assert response["output"][0]["status"] == "incomplete"
        assert response["usage"]["output_tokens"] == 2


def test_a_call_that_is_cut_off_is_an_incomplete_item() -> None:
    stream = streamed(CALL, tools=[TOOL], max_output_tokens=20)
    assert stream.response["status"] == "incomplete"
    (item,) = stream.items
    assert item["status"] == "incomplete"
    assert '{"at": "here"}'.startswith(item["arguments"])


def test_usage_has_all_details() -> None:
    usage = answer(THOUGHT)["usage"]
    assert usage.keys() == {
        "input_tokens",
        "input_tokens_details",
        "output_tokens",
        "output_tokens_details",
        "total_tokens",
    }
    assert usage["input_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 0}
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]


def test_tokens_are_counted() -> None:
    model = Reciter("Yes.")
    post(model, "/v1/responses", body(tools=[TOOL]))
    counted = post(model, "/v1/responses/input_tokens", body(tools=[TOOL]))
    assert counted == {"object": "response.input_tokens", "input_tokens": len(model.prompt_ids[0])}


# --- errors ---


def test_an_input_longer_than_the_context_fails_a_stream_with_the_code_that_codex_looks_for() -> None:
    stream = streamed("", context=100, input="word " * 200)
    assert stream.response["status"] == "failed"
    assert stream.response["error"]["code"] == "context_length_exceeded"
    assert "and the context is 100; shorten it" in stream.response["error"]["message"]
    error = post(Reciter(context=100), "/v1/responses", body("word " * 200), 400)["error"]
    assert error["code"] == "context_length_exceeded"


def test_an_error_in_the_middle_of_a_stream_fails_the_response() -> None:
    got = ask(Reciter(), "/v1/responses", body(stream=True))  # nothing is left to recite: an error of the server's own
    response = ResponseReader(server_sent(got.text.split("\n"))).response
    assert response["status"] == "failed"
    assert response["error"]["code"] == "server_error"


def test_fields_without_an_effect_are_tolerated() -> None:
    fields = {
        "store": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "x",
        "client_metadata": {"x": "y"},
        "service_tier": "auto",
        "truncation": "auto",
        "text": {"verbosity": "medium", "format": {"type": "text"}},
        "stream_options": {"include_obfuscation": False},
        "metadata": {"who": "me"},
        "brand_new": 1,
    }
    got = answer("Yes.", **fields)
    assert got["store"] is False
    assert got["metadata"] == {"who": "me"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"previous_response_id": "resp_1"},
            "previous_response_id is not supported: nothing is stored here; send the whole conversation in input",
        ),
        ({"conversation": "conv_1"}, "conversation is not supported: nothing is stored here"),
        ({"background": True}, "background is not supported"),
        ({"given": [{"type": "item_reference", "id": "x"}]}, "input[0] refers to a stored item"),
        ({"given": []}, "input has no message"),
        ({"given": 7}, "input is 7; it must be text"),
        ({"given": [{"content": "x"}]}, "input[0].type is missing"),
        ({"given": [{"role": "tool", "content": "x"}]}, "input[0].role is 'tool'"),
        (
            {"given": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]},
            "input[0].content[0] has the type input_image",
        ),
        ({"given": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id is missing"),
        ({"max_output_tokens": 0}, "max_output_tokens is 0"),
        ({"text": {"verbosity": "low"}}, "text.verbosity is not supported"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema is missing"),
        ({"top_logprobs": 3}, "top_logprobs is not supported: /v1/chat/completions has"),
        ({"include": ["message.output_text.logprobs"]}, "/v1/chat/completions has log-probabilities"),
        ({"tool_choice": "required"}, "tool_choice is required, but there are no tools"),
        (
            {"tool_choice": {"type": "function", "name": "x"}, "tools": [TOOL]},
            "tool_choice.name is 'x'; it must be one of the tools: look",
        ),
        ({"tools": [TOOL, TOOL]}, "tools[1] is a second tool of the name 'look'"),
        ({"tools": [{"type": "function"}]}, "tools[0].name is missing"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort is 'huge'"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_and_the_field_named(fields: dict[str, Any], message: str) -> None:
    assert message in refusal(**fields)
