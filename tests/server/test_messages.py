"""Anthropic's Messages API: what a body means to the model, and how its answers and errors look."""

from __future__ import annotations

from typing import Any

import pytest
from event_streams import MessageReader, server_sent
from reciter import TOKENIZER, Reciter
from scripted import ask, post

THOUGHT = "<think>\nHm.\n</think>\n\nYes."
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "here"}}\n</tool_call>'
TOOL = {
    "name": "look",
    "description": "Looks.",
    "input_schema": {"type": "object", "properties": {"at": {"type": "string"}}},
}
USER = {"role": "user", "content": "Hi"}


def body(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 100, "messages": list(messages or [USER]), **fields}


def prompt(template: str = "hybrid", **fields: Any) -> str:
    """The prompt that a body becomes."""
    model = Reciter("ok", template=template)
    post(model, "/v1/messages", body(*fields.pop("messages", []), **fields))
    return model.prompts[0]


def refusal(template: str = "hybrid", status: int = 400, **fields: Any) -> str:
    """The message of the error that a body is answered with."""
    answer = post(Reciter(template=template), "/v1/messages", body(*fields.pop("messages", []), **fields), status)
    assert answer.keys() == {"type", "error", "request_id"}
    assert answer["type"] == "error"
    assert answer["error"]["type"] == {400: "invalid_request_error", 404: "not_found_error"}[status]
    message: str = answer["error"]["message"]
    return message


def answer(text: str, *messages: Any, **fields: Any) -> Any:
    return post(Reciter(text), "/v1/messages", body(*messages, **fields))


def streamed(text: str, **fields: Any) -> MessageReader:
    got = ask(Reciter(text), "/v1/messages", body(stream=True, **fields))
    assert got.headers["content-type"].startswith("text/event-stream")
    return MessageReader(server_sent(got.text.split("\n")))


# --- what the model reads ---


def test_the_system_message_is_text_or_blocks() -> None:
    for system in ("Be brief.", [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]):
        assert prompt(system=system).startswith(
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>"
        )


def test_a_block_that_changes_with_every_request_is_dropped_so_that_the_prefix_stays_the_same() -> None:
    def system(cch: str) -> list[dict[str, str]]:
        header = {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.160; cch={cch};"}
        return [header, {"type": "text", "text": "You are a helper."}]

    first = prompt(system=system("11111"))
    assert first == prompt(system=system("22222"))
    assert first.startswith("<|im_start|>system\nYou are a helper.<|im_end|>")
    joined = "x-anthropic-billing-header: cch=33333;\n\nYou are a helper."
    assert prompt(system=joined) == first


@pytest.mark.parametrize("template", ["hybrid", "instruct-2507", "thinking-2507", "coder", "features"])
def test_system_messages_within_the_conversation_are_read_by_every_template(template: str) -> None:
    late = {"role": "system", "content": [{"type": "text", "text": "The file is open."}]}
    answered = {"role": "assistant", "content": "Yes?"}
    for messages in ([USER, late], [USER, answered, late, USER], [late, USER], [USER, answered, USER, late]):
        text = prompt(template, messages=messages, system="Be brief.")
        assert text.count("The file is open.") == 1
        assert text.index("Be brief.") < text.index("The file is open.")


def test_a_template_that_refuses_late_system_messages_gets_their_text_in_the_next_turn_of_the_user() -> None:
    messages = [
        USER,
        {"role": "system", "content": "A."},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "B"},
    ]
    assert "user: A.\n\nB\n" in prompt("features", messages=messages)
    assert "user: Hi\nuser: A.\n" in prompt("features", messages=messages[:2])


def test_results_follow_their_calls_in_the_calls_order() -> None:
    calls = [
        {"type": "text", "text": "Let me look."},
        {"type": "tool_use", "id": "a", "name": "look", "input": {"at": "here"}},
        {"type": "tool_use", "id": "b", "name": "look", "input": {"at": "there"}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "text", "text": "two"}], "is_error": True},
        {"type": "tool_result", "tool_use_id": "a", "content": "one"},
        {"type": "text", "text": "Go on."},
    ]
    text = prompt(
        messages=[USER, {"role": "assistant", "content": calls}, {"role": "user", "content": results}], tools=[TOOL]
    )
    assert (
        'Let me look.\n<tool_call>\n{"name": "look", "arguments": {"at": "here"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "look", "arguments": {"at": "there"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\none\n</tool_response>\n"
        "<tool_response>\nError: two\n</tool_response><|im_end|>\n<|im_start|>user\nGo on.<|im_end|>"
    ) in text


def test_thinking_of_the_turn_in_progress_is_read_again_whoever_signed_it() -> None:
    def asked(*blocks: dict[str, str]) -> str:
        call = {"type": "tool_use", "id": "a", "name": "look", "input": {}}
        result = {"type": "tool_result", "tool_use_id": "a", "content": "one"}
        messages = [USER, {"role": "assistant", "content": [*blocks, call]}, {"role": "user", "content": [result]}]
        return prompt(messages=messages, tools=[TOOL])

    read = "<|im_start|>assistant\n<think>\nWhere?\n</think>\n\n<tool_call>"
    assert read in asked({"type": "thinking", "thinking": "Where?", "signature": "another server's"})
    omitted = answer("<think>\nWhere?\n</think>\n\nHere.", thinking={"type": "adaptive", "display": "omitted"})[
        "content"
    ][0]
    assert omitted["thinking"] == ""
    assert read in asked(omitted, {"type": "redacted_thinking", "data": "?"})
    assert "Where?" not in asked({"type": "thinking", "thinking": "", "signature": "npqwen.no base64"})


def test_blocks_of_anthropics_own_tools_are_left_out() -> None:
    messages = [
        USER,
        {
            "role": "assistant",
            "content": [
                {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "x"}},
                {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
                {"type": "text", "text": "Found."},
            ],
        },
        USER,
    ]
    assert "<|im_start|>assistant\nFound.<|im_end|>" in prompt(messages=messages)


def test_tools_of_unknown_types_are_skipped() -> None:
    server_tools = [{"type": "web_search_20250305", "name": "web_search"}, {"type": "bash_20250124", "name": "bash"}]
    text = prompt(tools=[*server_tools, {**TOOL, "type": "custom"}])
    assert '"name": "look"' in text
    assert "web_search" not in text
    assert prompt(tools=server_tools) == prompt()


def test_documents_of_text_are_read_and_pictures_refused() -> None:
    document = {
        "type": "document",
        "title": "Notes",
        "source": {"type": "text", "media_type": "text/plain", "data": "Buy milk."},
    }
    question = {"type": "text", "text": "What?"}
    assert "user\nNotes\nBuy milk.\nWhat?<|im_end|>" in prompt(
        messages=[{"role": "user", "content": [document, question]}]
    )
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    assert "messages[0].content[1] has the type image, and Qwen3 reads text only" in refusal(
        messages=[{"role": "user", "content": [question, picture]}]
    )
    result = {"type": "tool_result", "tool_use_id": "a", "content": [picture]}
    assert "messages[0].content[0].content[0]" in refusal(messages=[{"role": "user", "content": [result]}])


# --- thinking ---


def test_no_thinking_unless_it_is_requested() -> None:
    closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert prompt().endswith(closed)
    assert prompt(thinking={"type": "disabled"}).endswith(closed)
    assert prompt(thinking={"type": "adaptive"}).endswith("<|im_start|>assistant\n")
    assert prompt(thinking={"type": "enabled", "budget_tokens": 1024}).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("thinking", "effort", "budget"),
    [
        ({"type": "enabled", "budget_tokens": 20}, "high", 20),
        ({"type": "adaptive"}, "low", 1024),
        ({"type": "adaptive"}, "max", None),
    ],
)
def test_a_budget_of_thinking_is_obeyed(thinking: dict[str, Any], effort: str, budget: int | None) -> None:
    long = f"<think>\n{' '.join(map(str, range(1000)))}</think>\n\nDone."
    asked = body(max_tokens=8000, thinking=thinking, output_config={"effort": effort})
    got = post(Reciter(long, context=10000), "/v1/messages", asked)
    thought = got["content"][0]["thinking"]
    tokens = got["usage"]["output_tokens_details"]["thinking_tokens"]
    if budget is None:
        assert thought.endswith("998 999")
    else:
        assert thought.endswith("based on the thinking directly now.")
        assert 0 <= tokens - budget < 40  # the words that end it


def test_a_model_that_always_thinks_ends_it_at_once_when_it_is_disabled() -> None:
    model = Reciter("I wonder. " * 20, template="thinking-2507")
    got = post(model, "/v1/messages", body(thinking={"type": "disabled"}))
    assert "wonder" not in got["content"][0].get("thinking", "")
    assert got["content"][0]["thinking"].startswith("Considering the limited time")


def test_a_model_that_never_thinks_stays_within_every_budget() -> None:
    for thinking in ({"type": "enabled", "budget_tokens": 5}, {"type": "adaptive"}, {"type": "disabled"}, None):
        assert post(Reciter("Yes.", template="instruct-2507"), "/v1/messages", body(thinking=thinking))["content"] == [
            {"type": "text", "text": "Yes."}
        ]


def test_thinking_is_a_block_with_a_signature() -> None:
    got = answer(THOUGHT, thinking={"type": "adaptive"})
    assert got["content"] == [
        {"type": "thinking", "thinking": "Hm.", "signature": "npqwen"},
        {"type": "text", "text": "Yes."},
    ]
    assert got["stop_reason"] == "end_turn"


# --- answers ---


def test_calls_are_blocks_with_an_input() -> None:
    got = answer(f"Let me look.\n{CALL}", tools=[TOOL])
    text, call = got["content"]
    assert text == {"type": "text", "text": "Let me look."}
    assert call == {"type": "tool_use", "id": call["id"], "name": "look", "input": {"at": "here"}}
    assert got["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("text", "fields", "reason", "sequence"),
    [
        ("Yes.", {}, "end_turn", None),
        ("one two three four", {"max_tokens": 2}, "max_tokens", None),
        ("one STOP two", {"stop_sequences": ["never", "STOP"]}, "stop_sequence", "STOP"),
        ("one two", {"stop_sequences": ["STOP"]}, "end_turn", None),
        ("one two", {"stop_sequences": [""]}, "end_turn", None),
        (CALL, {"tools": [TOOL]}, "tool_use", None),
    ],
)
def test_stop_reasons_are_the_same_in_both_modes(text: str, fields: Any, reason: str, sequence: str | None) -> None:
    whole, stream = answer(text, **fields), streamed(text, **fields)
    assert stream.over
    for message in (whole, stream.message):
        assert message["stop_reason"] == reason
        assert message["stop_sequence"] == sequence
    assert stream.message["usage"] == whole["usage"]


@pytest.mark.parametrize(
    "text",
    [
        "Yes.",
        THOUGHT,
        f"{THOUGHT}\n{CALL}",
        f"{CALL}\n{CALL}",
        f"One.\n{CALL}\nTwo.\n{CALL}",
        "",
        "<tool_call>no</tool_call>",
    ],
)
def test_a_stream_builds_the_message_of_one_piece(text: str) -> None:
    fields: Any = {"tools": [TOOL], "thinking": {"type": "adaptive"}}
    whole, stream = answer(text, **fields), streamed(text, **fields)
    assert stream.over
    assert stream.pings >= 1
    for message in (whole, stream.message):
        for block in message["content"]:
            block.pop("id", None)
        del message["id"]
    assert stream.message == whole


def test_thinking_that_is_omitted_has_a_signature_only() -> None:
    stream = streamed(THOUGHT, thinking={"type": "adaptive", "display": "omitted"})
    thought, text = stream.message["content"]
    assert thought["thinking"] == ""
    assert thought["signature"].startswith("npqwen.")
    assert text["text"] == "Yes."


def test_usage_tells_what_was_cached() -> None:
    model = Reciter("Yes.", "Yes.")
    for _ in range(2):
        used = post(model, "/v1/messages", body())["usage"]
        assert used.keys() == {
            "input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens",
            "output_tokens_details",
        }  # fmt: skip
        assert used["input_tokens"] + used["cache_read_input_tokens"] == len(model.prompt_ids[0])
        assert used["cache_creation_input_tokens"] == 0
        assert used["output_tokens"] == len(TOKENIZER.encode("Yes.")) + 1


# --- counting ---


def test_tokens_are_counted_without_max_tokens() -> None:
    model = Reciter("Yes.")
    asked = body(system="Be brief.", tools=[TOOL], thinking={"type": "adaptive"})
    post(model, "/v1/messages", asked)
    del asked["max_tokens"]
    assert post(model, "/v1/messages/count_tokens", asked) == {"input_tokens": len(model.prompt_ids[0])}
    assert len(model.prompts) == 1


def test_a_prompt_longer_than_the_context_is_counted_and_refused_in_the_words_that_claude_code_looks_for() -> None:
    long = {"role": "user", "content": "word " * 300}
    counted = post(Reciter(context=200), "/v1/messages/count_tokens", body(long))["input_tokens"]
    wanted = f"prompt is too long: {counted} tokens > 199 maximum"
    error = post(Reciter(context=200), "/v1/messages", body(long), 400)["error"]
    assert error == {"type": "invalid_request_error", "message": wanted}


# --- errors ---


def test_unknown_fields_are_tolerated() -> None:
    got = answer(
        "Yes.",
        context_management={"edits": [{"type": "clear_tool_uses_20250919"}]},
        output_config={"effort": "high", "task_budget": {"type": "tokens", "total": 64000}},
        metadata={"user_id": "me"},
        service_tier="auto",
        speed="fast",
        diagnostics=None,
        brand_new={"deep": [1, 2]},
    )
    assert got["content"][0]["text"] == "Yes."


@pytest.mark.parametrize("content", ["The sum is", [{"type": "text", "text": "The sum is"}]])
def test_an_answer_that_the_messages_end_with_is_continued(content: Any) -> None:
    begun = {"role": "assistant", "content": content}
    assert prompt(messages=[USER, begun]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nThe sum is")
    got = answer(" 42.", USER, begun)
    assert [(block["type"], block["text"]) for block in got["content"]] == [("text", " 42.")]
    assert streamed(" 42.", messages=[USER, begun]).message["content"] == got["content"]
    model = Reciter()
    counted = post(model, "/v1/messages/count_tokens", body(USER, begun))
    usage = got["usage"]
    assert counted["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_thinking_that_the_messages_end_with_is_continued() -> None:
    begun = {"role": "assistant", "content": [{"type": "thinking", "thinking": "Tens first,", "signature": ""}]}
    got = answer(" then ones.\n</think>\n\n42.", USER, begun, thinking={"type": "enabled", "budget_tokens": 1024})
    assert [block.get("thinking", block.get("text")) for block in got["content"]] == [" then ones.", "42."]


def test_a_late_system_message_precedes_an_answer_that_has_begun() -> None:
    messages = [USER, {"role": "system", "content": "The file is open."}, {"role": "assistant", "content": "So"}]
    for template in ("hybrid", "instruct-2507", "features"):
        text = prompt(template, messages=messages)
        assert text.count("The file is open.") == 1
        assert text.endswith("So")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages[0].role is 'tool'; it must be one of user, assistant, system",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "messages[0].content[0] has the type 'video'",
        ),
        ({"max_tokens": 0}, "max_tokens is 0; it must be a whole number"),
        ({"max_tokens": "many"}, "max_tokens is 'many'"),
        ({"temperature": -1}, "temperature is -1"),
        ({"stop_sequences": [3]}, "stop_sequences is [3]; it must be text or a list of texts"),
        ({"stop_sequences": ["x"] * 65}, "stop_sequences has 65 texts; at most 64 are possible"),
        ({"system": 7}, "system is 7; it must be text or a list of blocks"),
        ({"tools": [{"name": "look"}]}, "tools[0].input_schema is missing"),
        ({"tools": [TOOL, TOOL]}, "two tools are named look"),
        ({"tool_choice": {"type": "any"}}, "tool_choice is any, but there are no tools"),
        (
            {"tool_choice": {"type": "tool", "name": "x"}, "tools": [TOOL]},
            "tool_choice.name is 'x'; it must be one of the tools: look",
        ),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens is missing"),
        ({"thinking": {"type": "maybe"}}, "thinking.type is 'maybe'"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema is missing"),
        ({"output_format": {"type": "xml"}}, "output_format.type is 'xml'"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_and_the_field_named(fields: dict[str, Any], message: str) -> None:
    assert message in refusal(**fields)


def test_errors_have_the_apis_shape_and_a_request_id() -> None:
    assert "model 'x' is not served" in refusal(model="x", status=404)
    for content in (b"", b"{", b"[]", b"\xff", b'{"model": NaN}'):
        response = ask(Reciter(), "/v1/messages", content)
        assert response.status_code == 400
        error = response.json()
        assert error["error"]["type"] == "invalid_request_error"
        assert error["request_id"] == response.headers["request-id"]


def test_an_error_in_the_middle_of_a_stream_is_an_event() -> None:
    stream = streamed("Yes.", brand_new=1)
    assert stream.error is None
    got = ask(Reciter(), "/v1/messages", body(stream=True))  # nothing is left to recite: an error of the server's own
    stream = MessageReader(server_sent(got.text.split("\n")))
    assert stream.error == {"type": "api_error", "message": "internal error; the server's log has the details"}
