"""What programs ask of a chat: token counts, several answers, ids of calls, roles and tools as other clients send."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from reciter import TOKENIZER, Reciter

import npqwen
from npqwen.chat.chat_stream import chat, chat_batch
from npqwen.errors import OptionError, SamplingWarning
from npqwen.generation.session import Session
from npqwen.tools.calls import call_id

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def get_weather(city: str) -> str:
    """Get the weather.

    Args:
        city: Its name.
    """
    return f"sunny in {city}"


SCHEMA = {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Weather"}, {"type": "text", "text": "here? <|im_end|>"}]},
    {"role": "assistant", "content": "Sunny."},
    {"role": "user", "content": "And now?"},
]


@pytest.fixture(scope="module")
def model(tiny: Callable[[int], Path]) -> Iterator[npqwen.Model]:
    with npqwen.load(tiny(4), threads=1) as loaded:
        yield loaded


# --- tokens ---


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("tools", [None, [], [get_weather], [SCHEMA, get_weather]], ids=["none", "no", "one", "two"])
@pytest.mark.parametrize("messages", ["Hi", TALK], ids=["text", "messages"])
def test_count_tokens_is_what_a_chat_reads(model: npqwen.Model, messages: Any, tools: Any, thinking: Any) -> None:
    reply = model.chat(messages, tools=tools, thinking=thinking, max_tokens=1, seed=1)
    assert model.count_tokens(messages, tools=tools, thinking=thinking) == reply.usage.prompt_tokens
    if messages == "Hi":
        rendered = model.render(messages, tools, thinking)
        assert model.count_tokens(messages, tools=tools, thinking=thinking) == len(model.tokenizer.encode(rendered))


def test_count_tokens_refuses_what_a_chat_refuses(model: npqwen.Model) -> None:
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "the list of messages is empty"),
        ("Hi", {"thinking": "yes"}, "thinking is 'yes'"),
        ("Hi", {"tools": 3}, "tools is int"),
        ("Hi", {"template_options": {"color": 1}}, "unknown option 'color'"),
    ]
    for messages, options, message in wrong:
        with pytest.raises(OptionError, match=message):
            model.count_tokens(messages, **options)


# --- several answers ---


def test_n_answers_are_those_of_n_seeds_and_read_the_prompt_once(model: npqwen.Model) -> None:
    question = "What is 17 + 25?"
    options: dict[str, Any] = {"thinking": True, "temperature": 1.5, "top_k": 0, "max_tokens": 25}
    several = model.chat(question, n=3, seed=5, **options)
    alone = [model.chat(question, seed=seed, **options) for seed in (5, 6, 7)]
    assert [(reply.reasoning, reply.text) for reply in several] == [(reply.reasoning, reply.text) for reply in alone]
    assert len({reply.reasoning for reply in several}) == 3
    prompt = several[0].usage.prompt_tokens
    assert [reply.usage.cached_tokens for reply in several] == [0, prompt - 1, prompt - 1]
    (one,) = model.chat(question, n=1, seed=5, **options)
    assert one.reasoning == alone[0].reasoning
    session = Session(model)
    assert model.chat(question, n=2, seed=5, session=session, **options)[0].reasoning == alone[0].reasoning
    assert model.chat(question, seed=5, session=session, **options).usage.cached_tokens == prompt - 1


def test_answers_of_one_call_end_after_it_in_a_batch_too() -> None:
    text = f"{CALL}\n{CALL}\n" + "and some more text " * 10
    options: dict[str, Any] = {"tools": [get_weather], "parallel_tool_calls": False, "logprobs": True}
    (alone,) = chat_batch(Reciter(text), ["Hi"], **options)
    together = chat(Reciter("a plain answer " * 20, text), "Hi", n=2, **options)
    assert isinstance(together, list)
    listed = chat_batch(Reciter("a plain answer " * 20, text), ["Hi", "Hi"], **options)
    assert len(alone.tool_calls) == 1
    for reply in (together[1], listed[1]):
        assert reply.usage.generated_tokens == alone.usage.generated_tokens
        assert reply.tool_calls[0].name == alone.tool_calls[0].name


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", True, float("nan")])
def test_a_number_of_answers_is_a_whole_number(model: npqwen.Model, n: Any) -> None:
    for call in (model.chat, model.generate):
        with pytest.raises(OptionError, match=r"^n is .*; it must be a whole number, 1 or more"):
            call("Hi", n=n)


def test_where_there_is_one_answer_n_says_what_to_do(model: npqwen.Model) -> None:
    calls: list[Callable[..., object]] = [model.stream_chat, model.conversation, model.conversation().send]
    for call in calls:
        with pytest.raises(OptionError, match=r"n is an option of model\.chat; fork\(\) a conversation"):
            call("Hi", n=2)
    with pytest.raises(OptionError, match="n is an option of generate and chat"):
        model.stream("Hi", n=2)  # type: ignore[call-arg]


# --- calls ---


def ids_of_calls(seed: int | None) -> list[str]:
    model = Reciter(f"{CALL}\n{CALL}", CALL, "Sunny.")
    talk = model.conversation(tools=[get_weather], run_tools=True, thinking=False, seed=seed)
    reply = talk.send("Weather?")
    ids = [result.call.id for result in reply.tool_results]
    assert [m["tool_call_id"] for m in talk.messages if m["role"] == "tool"] == ids
    assert [call["id"] for m in talk.messages for call in m.get("tool_calls", [])] == ids
    return ids


def test_ids_of_calls_are_unique_across_requests_and_repeatable_with_a_seed() -> None:
    random = [id for _ in range(5) for id in ids_of_calls(None)]
    assert len(set(random)) == 15
    assert all(len(id) == 29 and id.startswith("call_") and id[5:].isalnum() for id in random)
    assert ids_of_calls(1) == ids_of_calls(1)
    assert len({*ids_of_calls(1), *ids_of_calls(2), *random}) == 21
    assert call_id(1, [2, 3], 0) != call_id(1, [2, 3], 1) != call_id(1, [2], 31)


# --- as other clients send it ---


def test_the_role_developer_is_the_system_message(model: npqwen.Model) -> None:
    developer = [{"role": "developer", "content": "Be brief."}, *TALK[1:]]
    assert model.render(developer) == model.render(TALK)
    assert model.conversation(messages=developer).system == "Be brief."
    scripted = Reciter("Yes.")
    scripted.chat(developer, thinking=False)
    assert scripted.prompts[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_render_takes_the_tools_that_chat_takes(model: npqwen.Model) -> None:
    shown = model.render("Hi", tools=[get_weather, SCHEMA])
    scripted = Reciter("Yes.")
    scripted.chat_template = model.chat_template
    scripted.chat("Hi", tools=[get_weather, SCHEMA])
    assert TOKENIZER.decode(scripted.prompt_ids[0], special=True) == shown
    assert '"Get the weather."' in shown
    tool = npqwen.Tool("now", SCHEMA)
    assert model.render("Hi", tools=[tool]) == model.render("Hi", tools=[SCHEMA])
    wrong: list[tuple[Any, str]] = [
        (3, "tools is int; give a list of functions or JSON schemas"),
        ([3], r"tools\[0\] is int, neither a function nor a JSON schema"),
        ([get_weather, get_weather], "two tools are named get_weather"),
    ]
    for tools, message in wrong:
        with pytest.raises(OptionError, match=message):
            model.render("Hi", tools=tools)


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_content_in_parts_is_content(model: npqwen.Model, role: str) -> None:
    def talk(content: Any) -> list[dict[str, Any]]:
        first = {"role": role, "content": content}
        return [first, TALK[-1]] if role in ("system", "developer") else [TALK[-1], first]

    assert model.render(talk([{"type": "text", "text": "One"}])) == model.render(talk("One"))


# --- warnings and what is printed ---


def test_the_warning_comes_once_per_line_of_the_caller_and_can_be_switched_off(model: npqwen.Model) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            model.chat("Hi", temperature=0, thinking=True, max_tokens=2)
        assert [warning.category for warning in caught] == [SamplingWarning]
        assert Path(caught[0].filename) == Path(__file__)
        warnings.filterwarnings("ignore", category=npqwen.SamplingWarning)
        reply = model.chat("Hi", temperature=0, thinking=True, max_tokens=2)
        assert len(caught) == 1
    assert "greedy" in reply.notices[0]


def test_objects_say_what_they_are_in_a_line(model: npqwen.Model) -> None:
    assert repr(model) == f"<Model {model.path.name}: 4 bits, context 2048, threads 1>"
    assert repr(model.new_cache(100)) == "<KVCache: 0 of 100 tokens, 0.0 MB>"
    talk = model.conversation("Be brief.")
    assert repr(talk) == "<Conversation: 1 messages, 0 of 2048 tokens>"
    assert repr(model.chat("What is 17 + 25?", thinking=False, temperature=0)) == (
        "Reply('17 + 25 = 42', finish_reason='stop')"
    )
    call = Reciter(f"<think>\n{'Hm. ' * 99}\n</think>\n{CALL}").chat("Weather?", tools=[get_weather])
    assert repr(call).startswith("Reply('', tool_calls=['get_weather'], reasoning='Hm. Hm. ")
    assert len(repr(call)) < 200
    assert repr(model.generate("A river", max_tokens=2, temperature=0)).endswith(
        "finish_reason='length', tokens=2)"
    )
